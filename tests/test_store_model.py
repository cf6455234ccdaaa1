"""Two real stores on a real disk against plain dicts, whatever is done to them in whatever order.

The dicts hold what was acknowledged: (spec, clip) to the values it was published with. What the disk
holds is read beside the Store, by json and numpy alone. Nothing acknowledged may ever be missing but
for what damage took and what was purged. `--hypothesis-profile long` runs longer.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pmm import AlreadyThere, NotFound
from pmm.store import snapshots
from pmm.store.care import repair, verify
from pmm.store.catalog import Store
from pmm.store.clip import Take, lossless_clip, target_id
from pmm.store.compact import compact
from pmm.store.feature import FeatureSpec
from pmm.store.gc import gc
from pmm.store.medium import LocalMedium
from pmm.store.removal import purge, readmit, remove
from pmm.store.share import merge

LONG = settings.get_current_profile_name() == "long"
EXAMPLES, STEPS = (5000, 50) if LONG else (200, 6)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
AUDIO = FeatureSpec("audio", "model/1", "float16", (2,), None, {})
TARGET = FeatureSpec("target", "model/1", "float32", (3,), 30, {})
SPECS = {AUDIO.id: AUDIO, TARGET.id: TARGET}
CLIPS = range(4)
ROWS = 3
COUNT = itertools.count()


def take(number):
    raw = np.arange(number, number + 160, dtype="<i2").tobytes()
    clip = lossless_clip(16000, 1, "s16", 0, 160, [raw])
    return Take(clip, target_id(clip, b"face"), f"subject{number % 2}", source=f"take_{number}")


TAKES = {number: take(number) for number in CLIPS}
OF_ROW = {row: n for n, one in TAKES.items() for row in (one.clip.id, one.target)}


def row(spec_id, number):
    return SPECS[spec_id].row_id(TAKES[number].clip.id, TAKES[number].target)


class Killed(BaseException):
    """The machine stops here."""


class Side:
    """One store and what must be in it.

    content    (spec id, clip) to the values that were acknowledged
    possible   the same, and those of writers that were killed
    removals   what was removed: by number, (clips, whether purged); and the numbers that were taken back
    """

    def __init__(self, path):
        self.path = path
        self.content, self.possible = {}, {}
        self.removals, self.cancelled = {}, set()
        self.listed = {}  # origin to clips
        self.unsure = set()  # clips that were hidden in a merge: some listing may have come without them
        self.snapshots = {}

    def store(self, dying=None):
        """The store; with ``dying`` the disk stops before that many more operations are done."""
        left = [dying]

        def before(operation, key):
            if left[0] == 0:
                shutil.copytree(self.path, f"{self.path}.then")
                left[0] = None
                raise Killed
            if left[0] is not None:
                left[0] -= 1

        return Store(self.path, LocalMedium(self.path, before=before))

    @contextlib.contextmanager
    def perhaps_killed(self):
        """If the machine stops within, the disk is as it was at that instant, not as cleaned up since."""
        try:
            yield
        except Killed:
            shutil.rmtree(self.path)
            os.rename(f"{self.path}.then", self.path)

    def add(self, table, spec_id, numbers, value):
        for number in numbers:
            table.setdefault((spec_id, number), set()).add(value)

    def found(self):
        """What published and unmarked records say is on the disk, read by json and numpy alone; a row
        that does not hold one value throughout is damaged and counts for nothing."""
        seen = {}
        marked = {file.stem for file in (self.path / "damaged").glob("*.json")}
        for file in (self.path / "records").glob("*/*.json"):
            record = json.loads(file.read_bytes())
            if record["state"] == "published" and file.stem not in marked:
                folder = self.path / "fragments" / file.parent.name / file.stem
                for name, values in rows_in(folder, record):
                    if len(values) == 1:
                        self.add(seen, record["spec"], [OF_ROW[name]], values.pop())
        return seen

    @property
    def in_force(self):
        return {key: one for key, one in self.removals.items() if key not in self.cancelled}

    def hides(self, number):
        return any(number in which for which, _ in self.in_force.values())

    @property
    def purged(self):
        return {n for which, purge_bytes in self.in_force.values() if purge_bytes for n in which}

    def remove(self, which, purge_bytes):
        if not any(which <= old and been >= purge_bytes for old, been in self.in_force.values()):
            self.removals[next(COUNT)] = (frozenset(which), purge_bytes)

    def readmit(self, number):
        for key, (which, purge_bytes) in self.in_force.items():
            if number in which:
                self.cancelled.add(key)
                self.removals[next(COUNT)] = (which - {number}, purge_bytes)

    def must_hold(self):
        return {key: values for key, values in self.content.items() if key[1] not in self.purged}

    def check(self):
        found = self.found()
        for key, values in self.must_hold().items():
            assert values <= found.get(key, set()), f"lost {values - found.get(key, set())} of {key}"
        for key, values in found.items():
            assert values <= self.possible.get(key, set()), f"{key} holds what nobody wrote"
        self.content = {key: values for key, values in found.items() if values}  # seen once, seen for ever
        self.check_reading(found)

    def check_reading(self, found):
        store = Store.open(self.path)
        assert dict(store.problems) == {}
        for spec_id in SPECS:
            for number in CLIPS:
                name = row(spec_id, number)
                served = bool(found.get((spec_id, number))) and not self.hides(number)
                assert store.has(spec_id, name) == served
                if served:
                    (value,) = set(store.read(spec_id, name).flat)
                    assert value in found[spec_id, number]
        listed = {TAKES[n].id for numbers in self.listed.values() for n in numbers if not self.hides(n)}
        unsure = {TAKES[n].id for n in self.unsure}
        assert {one.id for one in store.takes()} - unsure == listed - unsure


def rows_in(folder, record):
    """Row ids with the set of values in their rows; none of a fragment that is not whole."""
    spec = SPECS[record["spec"]]
    if any(not (folder / path).is_file() or (folder / path).stat().st_size != size
           for path, size, _ in record["objects"]):  # fmt: skip
        return
    chunks = sorted((folder / "values/c").iterdir(), key=lambda one: int(one.name))
    parts = [np.fromfile(one / "0", np.dtype(spec.dtype).newbyteorder("<")) for one in chunks]
    values = np.concatenate(parts).reshape(-1, *spec.shape)
    first = 0
    for name, length in zip(record["rows"], record["lengths"]):
        yield name, set(map(float, values[first : first + length].flat))
        first += length


sides = st.integers(0, 1)
dying = st.none() | st.integers(0, 120)
numbers = st.sets(st.sampled_from(CLIPS), min_size=1)
specs = st.sampled_from(sorted(SPECS))
DAMAGES = st.sampled_from(["flip", "cut", "lose"])


FILLED = ({0, 1, 2}, {2, 3})
TEMPLATES = tempfile.TemporaryDirectory(dir=MEMORY)


def filled(label, which):
    """A store with these clips: the audio of each in a fragment of its own, their face tracks in one, and
    the audio of the first once more, in a fragment with other bytes."""
    path = Path(TEMPLATES.name) / label
    if not path.exists():
        store = Store.create(path)
        publish_takes(path, label, which)
        for spec, numbers in [*((AUDIO, {n}) for n in sorted(which)), (TARGET, which)]:
            rows = [(row(spec.id, n), np.full((ROWS, *spec.shape), 1, spec.dtype)) for n in numbers]
            store.publish(spec, rows, {"by": "model"}, chunk_bytes=16)
        again = np.full((ROWS, *AUDIO.shape), 2, AUDIO.dtype)
        store.publish(AUDIO, [(row(AUDIO.id, min(which)), again)], {"by": "model"})
    return path


def publish_takes(path, label, which):
    origin = {"host": "h", "root": label, "layout": "l"}
    Store.open(path).publish_takes(label, [TAKES[n] for n in which], origin)


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        """Two stores filled apart, from overlapping data."""
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.sides = [Side(self.folder / name) for name in ("a", "b")]
        for side, which in zip(self.sides, FILLED):
            shutil.copytree(filled(side.path.name, which), side.path)
            side.listed[side.path.name] = which
            for spec in SPECS:
                side.add(side.content, spec, which, 1)
                side.add(side.possible, spec, which, 1)
            side.add(side.content, AUDIO.id, [min(which)], 2)
            side.add(side.possible, AUDIO.id, [min(which)], 2)
        self.touched = list(self.sides)

    def side(self, number):
        self.touched.append(self.sides[number])
        return self.sides[number]

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(side=sides, spec=specs, which=numbers, value=st.integers(1, 3), dying=dying)
    def publish(self, side, spec, which, value, dying):
        """A writer, which may be killed before any of its operations."""
        side = self.side(side)
        shape, dtype = SPECS[spec].shape, SPECS[spec].dtype
        rows = [(row(spec, n), np.full((ROWS, *shape), value, dtype)) for n in which]
        side.add(side.possible, spec, which, value)
        with side.perhaps_killed():
            side.store(dying).publish(SPECS[spec], rows, {"by": "model"}, chunk_bytes=16)
            side.add(side.content, spec, which, value)

    @rule(side=sides, which=numbers)
    def list_takes(self, side, which):
        side = self.side(side)
        publish_takes(side.path, side.path.name, which)
        side.listed[side.path.name] = which

    @rule(side=sides, dying=dying)
    def gc(self, side, dying):
        side = self.side(side)
        with side.perhaps_killed():
            gc(side.store(dying), grace_seconds=0)
            assert verify(Store.open(side.path)).orphans == 0
            self.purged(side)

    @rule(side=sides, size=st.sampled_from([2000, 20_000]), dying=dying)
    def compact(self, side, size, dying):
        side = self.side(side)
        with side.perhaps_killed():
            done = compact(side.store(dying), size)
            assert done.damaged == ()

    @rule(side=sides, which=numbers, purge_bytes=st.booleans(), dying=dying)
    def rm(self, side, which, purge_bytes, dying):
        side = self.side(side)
        store = Store.open(side.path)
        known = {n for numbers in side.listed.values() for n in numbers}
        which = which & known
        names = [TAKES[n].id for n in which]
        if not which:
            with pytest.raises(NotFound):
                remove(store, clips=["0" * 64])
            return
        remove(store, clips=names)
        side.remove(which, False)
        if purge_bytes:
            side.remove(which, True)
            with side.perhaps_killed():
                remove(side.store(dying), clips=names, purge_bytes=True)
            with contextlib.suppress(NotFound):  # run again, as one would after a kill
                remove(Store.open(side.path), clips=names, purge_bytes=True)
            self.purged(side)

    def purged(self, side):
        """No file holds a row of what was purged, no list and no snapshot names it."""
        for file in side.path.glob("fragments/*/*/clips/c/0/0"):
            ids = file.read_bytes()
            for n in side.purged:
                assert bytes.fromhex(TAKES[n].clip.id) not in ids
                assert bytes.fromhex(TAKES[n].target) not in ids
        for file in [*side.path.glob("datasets/*"), *side.path.glob("snapshots/*")]:
            for n in side.purged:
                assert f'"take_{n}"' not in file.read_text()
        side.listed = {label: which - side.purged for label, which in side.listed.items()}
        for one in side.snapshots.values():
            one["purged"] |= bool(side.purged & one["named"])

    @rule(side=sides, number=st.sampled_from(CLIPS))
    def readmit(self, side, number):
        side = self.side(side)
        one = TAKES[number]
        known = side.hides(number)
        assert (readmit(Store.open(side.path), {one.id, one.clip.id, one.target}) > 0) == known
        side.readmit(number)

    @rule(side=sides, name=st.sampled_from(["one", "two"]))
    def snapshot(self, side, name):
        side = self.side(side)
        store = Store.open(side.path)
        try:
            taken = snapshots.take(store, name)
        except AlreadyThere:
            assert name in side.snapshots
            return
        served = {
            (spec, n): float(store.read(spec, row(spec, n)).flat[0])
            for spec in SPECS
            for n in CLIPS
            if store.has(spec, row(spec, n))
        }
        named = {n for _, n in served} | {n for n in CLIPS for one in taken.takes if one.id == TAKES[n].id}
        side.snapshots.setdefault(name, {"served": served, "named": named, "purged": False})

    @rule(side=sides)
    def read_snapshots(self, side):
        """Each reads exactly what it named, or not at all."""
        side = self.side(side)
        store = Store.open(side.path)
        for name, one in side.snapshots.items():
            view = snapshots.View(store, snapshots.load(store, name))
            there = all(
                value in side.content.get(key, set()) and not side.hides(key[1])
                for key, value in one["served"].items()
            )
            if one["purged"] or not there:
                with pytest.raises(NotFound, match="snapshot"):
                    view.require(SPECS)
                continue
            view.require(SPECS)
            for key, value in one["served"].items():
                assert set(view.read(key[0], row(*key)).flat) == {value}

    @rule(side=sides, pick=st.integers(0, 1000), at=st.integers(0, 10**6), how=DAMAGES, dying=dying)
    def damage_and_repair(self, side, pick, at, how, dying):
        """One object is damaged: verify finds it; repair costs no clip that was still whole."""
        side = self.side(side)
        found = sorted(Store.open(side.path).fragments(), key=lambda one: one.location)
        if not found:
            return
        one = found[pick % len(found)]
        item = one.objects[at % len(one.objects)]
        damage(side.path / one.folder / item.path, at, how)
        payload = item.path.startswith("values/c/") and how == "flip"
        expected = side.found() if payload else self.without(side, one.location)
        report = verify(Store.open(side.path))
        assert any(told.where.startswith(one.folder) for told in report.damaged)
        quick = verify(Store.open(side.path), quick=True)
        assert quick.clean == payload
        with side.perhaps_killed():
            repair(side.store(dying), report)
        if dying is not None:  # run again, as one would after a kill
            repair(Store.open(side.path), verify(Store.open(side.path)))
        assert verify(Store.open(side.path)).clean
        left = side.found()
        for key, values in expected.items():
            assert values <= left.get(key, set()), f"repair cost {key}, which was whole"
        side.content = {key: values & left.get(key, set()) for key, values in side.content.items()}

    def without(self, side, location):
        mark = side.path / "damaged" / f"{location}.json"
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        found = side.found()
        mark.unlink()
        return found

    @rule()
    def merge(self):
        """Both hold what either did, but for what either removed, and lost nothing."""
        a, b = self.touched = list(self.sides)
        merge(Store.open(a.path), Store.open(b.path))
        for mine, other in ((a, b), (b, a)):
            for key, values in other.possible.items():
                mine.possible.setdefault(key, set()).update(values)
        both = [
            {key: which for key, which in one.listed.items() if key[0] == one.path.name} for one in (a, b)
        ]
        kept = [dict(one.snapshots) for one in (b, a)]
        for side, others in zip(self.sides, kept):
            side.snapshots = {name: dict(one) for name, one in (others | side.snapshots).items()}
            side.removals = {**a.removals, **b.removals}
            side.cancelled = a.cancelled | b.cancelled
            side.listed = both[0] | both[1]
            side.unsure |= {n for n in CLIPS if side.hides(n)}
        for side in self.sides:
            purge(Store.open(side.path))  # what slow writers brought back since: gc does so, too
            self.purged(side)
        one, two = Store.open(a.path), Store.open(b.path)
        for spec in SPECS:
            assert one.rows(spec) == two.rows(spec)

    @invariant()
    def nothing_is_lost(self):
        for side in getattr(self, "touched", ()):
            side.check()
        self.touched = []


def damage(path, at, how):
    path.chmod(0o644)
    whole = path.read_bytes()
    if how == "lose":
        path.unlink()
    elif how == "cut":
        path.write_bytes(whole[:-1])
    else:
        offset = at % len(whole)
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 64]) + whole[offset + 1 :])


Machine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=list(HealthCheck),
)
test_stores_hold_what_plain_dicts_hold = Machine.TestCase
