"""What gc and compact take away, and that nothing acknowledged is ever lost to them, however slow a writer.

The interleavings are all there are, at the operations named: two actors run in threads of which one
moves at a time, and every order of their steps is tried in turn. `--hypothesis-profile long` takes more
operations apart.
"""

import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from pmm.store import snapshots
from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.compact import compact
from pmm.store.digest import sealed
from pmm.store.feature import FeatureSpec
from pmm.store.gc import gc
from pmm.store.medium import LocalMedium
from pmm.store.retire import ABANDONED

FINE = settings.get_current_profile_name() == "long"
AUDIO = FeatureSpec("audio", "gc/1", "float16", (5,), None, {})
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def name(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def some(*keys, value=1.0):
    return [(name(key), np.full((4, 5), value, np.float16)) for key in keys]


@pytest.fixture
def memory():
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def store(memory):
    return Store.create(memory / "store")


def dead_writer(killed, store, at):
    """What a writer leaves that was killed before its ``at``-th operation."""
    assert killed(store.path, at, lambda dying: dying.publish(AUDIO, some("dead"), {}))


# -- what gc takes


@pytest.mark.parametrize("at", range(5, 55, 6))
def test_gc_takes_what_a_killed_writer_left_and_nothing_else(store, at, killed):
    kept = store.publish(AUDIO, some("a"), {})
    dead_writer(killed, store, at)
    report = verify(store)
    assert report.clean
    planned = gc(store, grace_seconds=0, dry_run=True)
    assert verify(store).orphans == report.orphans
    done = gc(store, grace_seconds=0)
    assert (done.unfinished, done.drafts, done.bytes) == (planned.unfinished, planned.drafts, planned.bytes)
    assert len(done.unfinished) == report.orphans
    assert (done.young, done.kept, done.replaced) == (0, (), ())
    assert [entry.key for entry in store.medium.list("tmp")] == []
    assert {entry.key.split("/")[2] for entry in store.medium.list("fragments")} == {kept.location}
    fresh = Store.open(store.path)
    assert fresh.rows(AUDIO.id) == [name("a")]
    assert verify(fresh).orphans == 0
    again = gc(store, grace_seconds=0)
    assert (again.unfinished, again.bytes) == ((), 0)


def test_what_is_younger_than_the_grace_period_stays(store, killed):
    dead_writer(killed, store, 30)
    done = gc(store, grace_seconds=3600)
    assert (done.unfinished, done.young > 0) == ((), True)
    for folder, _, files in os.walk(store.path / "fragments"):
        for file in files:  # the clock of the disk decides, and it is as if two hours had passed
            os.utime(Path(folder) / file, (0, os.stat(store.path / "pmm.json").st_mtime - 7200))
    assert len(gc(store, grace_seconds=3600).unfinished) == 1


def test_an_abandoned_folder_is_taken_without_waiting(store, killed):
    dead_writer(killed, store, 30)
    (folder,) = {"/".join(entry.key.split("/")[:3]) for entry in store.medium.list("fragments")}
    store.medium.create(f"records/{folder.removeprefix('fragments/')}.json", ABANDONED)
    assert gc(store, grace_seconds=1e9).unfinished == (folder,)


def test_a_damaged_copy_is_kept_until_others_hold_every_row_of_it(store):
    bad = store.publish(AUDIO, some("a", "b"), {})
    snapshots.take(store, "base")
    store.mark_damaged(bad.location, "test")
    assert gc(store, grace_seconds=0).kept == (bad.folder,)
    store.publish(AUDIO, some("a"), {})
    assert gc(store, grace_seconds=0).kept == (bad.folder,)  # b is nowhere else
    store.publish(AUDIO, some("b", value=7.0), {})
    assert gc(store, grace_seconds=0).kept == (bad.folder,)  # b is, but not as the snapshot names it
    store.publish(AUDIO, some("b"), {})
    assert gc(store, grace_seconds=3600).replaced == ()
    assert gc(store, grace_seconds=0).replaced == (bad.folder,)
    assert not (store.path / bad.folder).exists()
    view = snapshots.View(store, snapshots.load(store, "base"))
    view.require([AUDIO.id])
    assert verify(store).clean


def test_a_keeper_that_is_itself_damaged_keeps_nothing(store):
    bad, good = store.publish(AUDIO, some("a"), {}), store.publish(AUDIO, some("a"), {})
    store.mark_damaged(bad.location, "test")
    path = store.path / good.folder / "values/c/0/0"
    path.chmod(0o644)
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    assert gc(store, grace_seconds=0).kept == (bad.folder,)
    assert compact(store).retired == ()


# -- every order of steps


class Actor(threading.Thread):
    """Work that waits at each ``gate`` until it is told to go on."""

    def __init__(self, work):
        super().__init__(daemon=True)
        self.work, self.result, self.error = work, None, None
        self.go, self.arrived, self.done = threading.Semaphore(0), threading.Semaphore(0), False

    def gate(self):
        self.arrived.release()
        self.go.acquire()

    def run(self):
        self.gate()
        try:
            self.result = self.work(self)
        except BaseException as error:
            self.error = error
        self.done = True
        self.arrived.release()

    def step(self):
        self.go.release()
        self.arrived.acquire()


def run_in_order(works, choices):
    """Runs two works step by step: ``choices`` says who moves where both can, then the first does.

    Returns the actors and the choices made, so that the next order can be derived from them.
    """
    actors = [Actor(work) for work in works]
    for one in actors:
        one.start()
        one.arrived.acquire()
    made = []
    while any(not one.done for one in actors):
        able = [one for one in actors if not one.done]
        if len(able) == 2:
            made.append(choices[len(made)] if len(made) < len(choices) else 0)
            actors[made[-1]].step()
        else:
            able[0].step()
    for one in actors:
        one.join()
        if one.error:
            raise one.error
    return actors, made


def every_order(prepare):
    """Yields for each order of steps what ``prepare`` made and the two results, and the choices."""
    choices = []
    while True:
        world, works = prepare()
        actors, made = run_in_order(works, choices)
        yield world, [one.result for one in actors], made
        while made and made[-1] == 1:
            made.pop()
        if not made:
            return
        choices = [*made[:-1], 1]


class Gated(LocalMedium):
    """A local disk that waits before what ``stops`` picks: (operation, key, how often it was picked)."""

    def __init__(self, root, actor, stops):
        super().__init__(root, before=self._wait)
        self._actor, self._stops, self._seen = actor, stops, {}

    def _wait(self, operation, key):
        kind = (operation, key.split("/")[0])
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._stops(operation, kind[1], self._seen[kind]):
            self._actor.gate()

    def list(self, prefix):
        self._wait("list", prefix)
        return iter(list(super().list(prefix)))


def writer_stops(operation, top, count):
    """Before an object in the middle, each draft, each record."""
    if FINE and (operation, top) in (("open", "fragments"), ("fsync", "records"), ("fsync", "fragments")):
        return count in (1, 3, 5, 9)
    if top == "fragments":
        return operation == "open" and count == 5
    return (operation, top) in (("open", "tmp"), ("link", "records"))


def gc_stops(operation, top, count):
    """Before it lists drafts, fragments, records; before it abandons; before it deletes."""
    if operation == "list":
        return top in ("tmp", "fragments") or (top == "records" and count == 3)
    if operation == "delete":
        return (top == "fragments" and count == 4) or (top == "tmp" and count > 1) or FINE
    return (operation, top) == ("link", "records") or (FINE and (operation, top) == ("open", "tmp"))


def test_no_order_of_a_writer_and_a_gc_loses_what_was_acknowledged(memory):
    store = Store.create(memory / "original")
    store.publish(AUDIO, some("earlier"), {})

    def publish(path):
        return lambda actor: Store(path, Gated(path, actor, writer_stops)).publish(AUDIO, some("a"), {})

    def collect(path):
        return lambda actor: gc(Store(path, Gated(path, actor, gc_stops)), grace_seconds=0)

    def prepare():
        path = memory / "store"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(memory / "original", path)
        return path, [publish(path), collect(path)]

    orders, again, spared = 0, 0, 0
    for path, (one, collected), made in every_order(prepare):
        fresh = Store.open(path)
        assert fresh.rows(AUDIO.id) == sorted([name("a"), name("earlier")]), made
        np.testing.assert_array_equal(fresh.read(AUDIO.id, name("a")), some("a")[0][1])
        assert one.location in {live.location for live in fresh.fragments()}, made
        assert verify(fresh).clean, made
        orders += 1
        again += bool(collected.unfinished)
        spared += not collected.unfinished
    assert orders > 120
    assert again > 20, "gc never took a slow writer's folder: the orders show nothing"
    assert spared > 20, "the writer never came first: the orders show nothing"
    gc(Store.open(path), grace_seconds=0)
    assert verify(Store.open(path)).orphans == 0


def compact_stops(operation, top, count):
    """Before it publishes, and before it deletes a record."""
    return operation in ("link", "delete") and top == "records" and (count < 3 or FINE)


def test_no_order_of_two_compactions_loses_a_row(memory):
    store = Store.create(memory / "original")
    for keys in (("a", "b"), ("b", "c"), ("a", "c"), ("d",)):
        store.publish(AUDIO, some(*keys), {})
    store.publish(AUDIO, some("d", value=2.0), {})  # another device's bits
    snapshots.take(store, "base")

    def prepare():
        path = memory / "store"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(memory / "original", path)
        work = lambda actor: compact(Store(path, Gated(path, actor, compact_stops)))  # noqa: E731
        return path, [work, work]

    orders = 0
    for path, _, made in every_order(prepare):
        fresh = Store.open(path)
        view = snapshots.View(fresh, snapshots.load(fresh, "base"))
        view.require([AUDIO.id])
        assert [view.read(AUDIO.id, name(key))[0, 0] for key in "abc"] == [1, 1, 1], made
        found = {fresh.reader(one).rows(one.row_ids.index(name("d")))[0, 0]
                 for one in fresh.fragments() if name("d") in one.row_ids}  # fmt: skip
        assert found == {1, 2}, made
        assert verify(fresh).clean, made
        orders += 1
    assert orders >= 70


STOPPED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec
from pmm.store.medium import LocalMedium

root, operation, top, count = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
spec = FeatureSpec("audio", "gc/1", "float16", (5,), None, {})
seen = 0

def before(what, key):
    global seen
    if (what, key.split("/")[0]) == (operation, top):
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGSTOP)

store = Store(root, LocalMedium(root, before=before))
one = store.publish(spec, [(sys.argv[5], np.full((4, 5), 3, np.float16))], {})
print(one.location)
"""


@pytest.mark.parametrize(("operation", "top", "count"), [("open", "fragments", 6), ("link", "records", 1)])
def test_a_writer_stopped_past_the_grace_period_publishes_again(store, operation, top, count):
    store.publish(AUDIO, some("earlier"), {})
    command = [sys.executable, "-P", "-c", STOPPED, store.path, operation, top, str(count), name("slow")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert os.WIFSTOPPED(os.waitpid(writer.pid, os.WUNTRACED)[1])
    done = gc(store, grace_seconds=0)
    assert len(done.unfinished) == 1
    assert done.drafts == (operation == "link")
    writer.send_signal(signal.SIGCONT)
    out, err = writer.communicate(timeout=60)
    assert writer.returncode == 0, err
    assert not done.unfinished[0].endswith(out.strip())
    fresh = Store.open(store.path)
    assert fresh.read(AUDIO.id, name("slow"))[0, 0] == 3
    assert verify(fresh).clean
    gc(store, grace_seconds=0)
    assert verify(Store.open(store.path)).orphans == 0


# -- compact


def test_compact_keeps_every_row_in_fewer_fragments(store):
    for number in range(9):
        store.publish(AUDIO, some(number, f"{number} too", value=number), {"model": "m"})
    other = store.publish(AUDIO, some("other"), {"model": "n"})
    before = {row: np.array(store.read(AUDIO.id, row)) for row in store.rows(AUDIO.id)}
    mapped = store.read(AUDIO.id, name(4))
    seen = []
    done = compact(store, on_event=seen.append)
    assert (len(done.written), len(done.retired), done.damaged) == (1, 9, ())
    assert seen[-1].done_bytes == seen[-1].total_bytes == done.bytes
    np.testing.assert_array_equal(mapped, before[name(4)])  # what is mapped stays readable
    for opened in (store, Store.open(store.path)):  # one that knew the old fragments, and one that never did
        for row, values in before.items():
            np.testing.assert_array_equal(opened.read(AUDIO.id, row), values)
    fresh = Store.open(store.path)
    assert {one.location for one in fresh.fragments()} == {other.location, done.written[0].split("/")[-1]}
    assert {str(one.made_with) for one in fresh.fragments()} == {"{'model': 'm'}", "{'model': 'n'}"}
    assert verify(fresh).orphans == 0
    assert compact(fresh) == compact(fresh)
    assert compact(fresh).written == ()


def test_compact_killed_before_any_of_its_operations_loses_nothing_and_is_ended_by_the_next(memory, killed):
    store = Store.create(memory / "original")
    for keys in (("a", "b"), ("c",), ("d",)):
        store.publish(AUDIO, some(*keys), {})
    for at in itertools.count():
        shutil.copytree(memory / "original", memory / "store")
        alive = not killed(memory / "store", at, compact)
        for again in (False, True):
            if again:
                compact(Store.open(memory / "store"))
                gc(Store.open(memory / "store"), grace_seconds=0)
            fresh = Store.open(memory / "store")
            for key in "abcd":
                np.testing.assert_array_equal(fresh.read(AUDIO.id, name(key)), some(key)[0][1])
            assert verify(fresh).clean
        assert (len(fresh.fragments()), verify(fresh).orphans) == (1, 0)
        shutil.rmtree(memory / "store")
        if alive:
            break
    assert at > 80


def test_compact_leaves_a_damaged_fragment_alone(store):
    bad = store.publish(AUDIO, some("a"), {})
    store.publish(AUDIO, some("b"), {})
    store.publish(AUDIO, some("c"), {})
    path = store.path / bad.folder / "values/c/0/0"
    path.chmod(0o644)
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    done = compact(store)
    assert (done.damaged, len(done.retired)) == ((bad.folder,), 2)
    assert (store.path / bad.record).exists()


def test_a_large_fragment_is_not_written_again(store):
    large = store.publish(AUDIO, [(name("large"), np.zeros((400, 5), np.float16))], {})
    for key in "abc":
        store.publish(AUDIO, some(key), {})
    done = compact(store, target_bytes=10_000)
    assert large.folder not in done.retired
    assert len(done.written) == 1


def test_clocks_that_are_wrong_stop_nothing(store):
    """Fragments from the far future, and of a time that is none, are replaced all the same."""
    for created in ("2999-01-01T00:00:00.000+00:00", "tomorrow"):
        from pmm.store import fragment as fragments

        people = {"created": created, "writer": {}, "made_with": {}}
        store.announce(AUDIO, lambda p=people: fragments.write(store.medium, AUDIO, some(p["created"]), p))
    done = compact(store)
    assert len(done.retired) == 2
    assert len(Store.open(store.path).rows(AUDIO.id)) == 2


def test_marks_that_say_nothing_are_honoured(store):
    one = store.publish(AUDIO, some("a"), {})
    store.medium.create(f"damaged/{one.location}.json", sealed({"format": 1}))
    assert gc(store, grace_seconds=0).kept == (one.folder,)
