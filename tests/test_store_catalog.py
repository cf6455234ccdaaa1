"""The store as a whole: opening, publishing, takes, failures, and what a kill leaves."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmm import AlreadyThere, BadInput, NewerFormat, NotFound, PmmError, StoreCorrupt
from pmm.store.care import info, verify
from pmm.store.catalog import Failure, Store, sheet
from pmm.store.clip import Take, lossless_clip
from pmm.store.digest import canonical_json, sealed
from pmm.store.feature import FeatureSpec
from pmm.store.medium import LocalMedium

AUDIO = FeatureSpec("audio", "test/1", "float16", (5,), None, {})
TARGET = FeatureSpec("target", "test/1", "float32", (3,), 30, {})
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
HERE = {"host": "h", "root": "/data", "layout": "livelink"}


def name(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def some(*keys, value=1.0, spec=AUDIO):
    return [(name(key), np.full((4, *spec.shape), value, spec.dtype)) for key in keys]


def take(number, subject="anna", **more):
    raw = np.arange(number, number + 160, dtype="<i2").tobytes()
    return Take(lossless_clip(16000, 1, "s16", 0, 160, [raw]), name(("t", number)), subject, **more)


@pytest.fixture
def memory():
    """A folder in memory where there is one: hundreds of fsyncs are quick there."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def path(memory):
    return memory / "store"


# -- opening


def test_create_open_and_create_again(path):
    store = Store.create(path)
    assert store.about["format"] == 1
    assert json.loads((path / "pmm.json").read_bytes())["store"] == store.about["store"]
    assert (
        Store.create(path).about
        == Store.open_or_create(path).about
        == Store.open(str(path)).about
        == store.about
    )
    assert Store.open_or_create(path.parent / "a/b/store").specs == {}


def test_what_is_no_store_says_what_it_is(path, tmp_path):
    with pytest.raises(
        NotFound, match=f"no store at {path}; `pmm precompute DATASET --store {path}` makes one"
    ):
        Store.open(path)
    file = tmp_path / "notes.txt"
    file.write_text("keep me")
    for opening in (Store.open, Store.open_or_create):
        with pytest.raises(BadInput, match=f"^{file} is a file, a store is a folder with a pmm.json"):
            opening(file)
        with pytest.raises(BadInput, match=r"holds notes.txt\), so it is no store$"):
            opening(tmp_path)
    with pytest.raises(AlreadyThere, match=f"^{file} is a file"):
        Store.create(file)
    with pytest.raises(AlreadyThere, match=r"a folder with other things in it \(notes.txt\)"):
        Store.create(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert file.read_text() == "keep me"
    with pytest.raises(PmmError, match=r"cannot make a store at .*: Not a directory"):
        Store.create(file / "below")


def mark(path, data):
    path.mkdir(exist_ok=True)
    (path / "pmm.json").unlink(missing_ok=True)
    (path / "pmm.json").write_bytes(data)


def test_a_newer_store_is_refused_and_newer_keys_are_not(path):
    mark(path, b'{"format": 2, "whatever": "a newer format says"}')
    with pytest.raises(
        NewerFormat, match=f"^{path}/pmm.json has store format 2, this pmm reads up to 1; install"
    ):
        Store.open(path)
    mark(path, sealed({"format": 1, "colour": "blue"}))
    assert Store.open(path).about["colour"] == "blue"


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1]", b'{"format":1,"format":1}', b'{"format":true}', b'{"format":1}']
)
def test_a_mark_that_is_none_is_refused(path, data):
    mark(path, data)
    with pytest.raises((BadInput, StoreCorrupt), match=f"^{path}/pmm.json "):
        Store.open(path)


def test_opening_loads_no_zarr_and_the_clock_loads_nothing(path):
    Store.create(path)
    code = (
        "import sys; from pmm.store import clock; assert 'pmm.store.catalog' not in sys.modules;"
        f"from pmm.store import Store; Store.open({str(path)!r}); assert 'zarr' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


# -- features


def test_rows_come_and_go_by_their_ids(path):
    store = Store.create(path)
    ids = ["00" * 32, "00" * 31 + "01", "01" + "00" * 31, "ab" * 31 + "00", "ab" * 32]
    rows = [(row, np.full((index + 1, 5), index, np.float16)) for index, row in enumerate(ids)]
    assert store.missing(AUDIO.id, [*ids, *ids]) == ids
    assert store.rows(AUDIO.id) == []
    store.publish(AUDIO, rows[3:], {})
    store.publish(AUDIO, rows[:2], {})
    for opened in (store, Store.open(path)):
        assert opened.rows(AUDIO.id) == [*ids[:2], *ids[3:]]
        assert [opened.has(AUDIO.id, row) for row in ids] == [True, True, False, True, True]
        assert opened.missing(AUDIO.id, [ids[2], ids[0], ids[2], name("other")]) == [ids[2], name("other")]
        assert [opened.length(AUDIO.id, row) for row in (ids[0], ids[4])] == [1, 5]
        assert dict(opened.specs) == {AUDIO.id: AUDIO}
        for method in (opened.read, opened.length):
            with pytest.raises(
                NotFound, match=rf"clip {ids[2]} has no audio \(test/1\) in {path}; run `pmm prec"
            ):
                method(AUDIO.id, ids[2])
    with pytest.raises(NotFound, match=f"has no rows of spec {TARGET.id}"):
        store.read(TARGET.id, ids[0])
    with pytest.raises(BadInput, match="'nonsense' is no row id"):
        store.has(AUDIO.id, "nonsense")


def test_what_another_writer_publishes_is_seen_after_refresh(path):
    mine, other = Store.create(path), Store.open(path)
    one = other.publish(AUDIO, some("a"), {"device": "cpu", "seconds": 1.5})
    assert not mine.has(AUDIO.id, name("a"))
    mine.refresh()
    assert mine.read(AUDIO.id, name("a")).shape == (4, 5)
    (seen,) = mine.fragments()
    assert (seen.spec_id, seen.id, seen.location, seen.row_ids) == (
        AUDIO.id,
        one.id,
        one.location,
        [name("a")],
    )
    assert seen.made_with == {"device": "cpu", "seconds": 1.5}
    assert seen.writer == one.writer
    assert set(seen.writer) == {"host", "user", "pid", "pmm"}
    assert seen.created == one.created
    assert seen.bytes == sum((path / one.folder / item.path).stat().st_size for item in one.objects)


def test_of_two_copies_of_a_row_the_lowest_fragment_serves(path):
    store = Store.create(path)
    made = [store.publish(AUDIO, some("a", value=value), {}) for value in range(6)]
    lowest = min(range(6), key=lambda index: made[index].id)
    assert store.rows(AUDIO.id) == [name("a")]
    for opened in (store, Store.open(path)):
        assert opened.read(AUDIO.id, name("a"))[0, 0] == lowest


def test_foreign_files_are_nobodys_business(path):
    store = Store.create(path)
    one = store.publish(AUDIO, some("a"), {})
    store.publish_takes("d", [take(1)], HERE)
    for stray in (".DS_Store", "README.txt", "records/notes.txt", "records/Thumbs.db", "datasets/.x.jsonl",
                  f"records/{AUDIO.id}/.nfs0001", f"records/{AUDIO.id}/{one.location}.json~", "index/x.json",
                  "snapshots/x.json", f"{one.folder}/.zattrs", "damaged/notes", "removed/U"):  # fmt: skip
        (path / stray).parent.mkdir(exist_ok=True)
        (path / stray).write_text("not ours {")
    fresh = Store.open(path)
    assert dict(fresh.problems) == {}
    assert fresh.rows(AUDIO.id) == [name("a")]
    assert len(fresh.takes()) == 1
    assert verify(fresh).clean


def test_a_record_that_is_damaged_hides_its_rows_and_nothing_else(path):
    store = Store.create(path)
    lost, kept = store.publish(AUDIO, some("a"), {}), store.publish(AUDIO, some("b"), {})
    record = path / lost.record
    record.chmod(0o644)
    record.write_bytes(record.read_bytes().replace(b'"float16"', b"").replace(b'"pid"', b'"dip"'))
    fresh = Store.open(path)
    assert fresh.rows(AUDIO.id) == [name("b")]
    assert fresh.problems == {
        lost.record: f"{record} is not as it was written: its own sha256 does not match"
    }
    assert [one.location for one in fresh.fragments()] == [kept.location]
    fresh.publish(AUDIO, some("a"), {})  # recomputing puts it back
    assert len(Store.open(path).rows(AUDIO.id)) == 2
    record.unlink()
    fresh.refresh()
    assert dict(fresh.problems) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ONE = take(1, source="a.wav", dataset="d")
VALID = {
    "specs": AUDIO.to_json(),
    "removed": {"format": 1, "rows": [ONE.clip.id], "takes": [ONE.id], "cancels": []},
    "damaged": {"format": 1},
    "failures": {"format": 1},
    "datasets": {"format": 1, "dataset": "d", "origin": HERE, "created": "", "replaces": []},
}
LINES = {
    "failures": dataclasses.asdict(Failure("path:/x", "/x", "find", "broken", 1, "2020")),
    "datasets": ONE.to_json(),
}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(VALID)), st.data())
def test_whatever_a_stranger_seals_the_store_opens_and_says_what_is_wrong(folder, data):
    def changed(valid):
        return valid | data.draw(st.dictionaries(st.sampled_from(sorted(valid)), JSON, max_size=2))

    with tempfile.TemporaryDirectory(dir=MEMORY) as root:
        store = Store.create(root)
        header = changed(VALID[folder])
        if folder in LINES:
            key, spelled = f"{folder}/b.jsonl", sheet(header, [changed(LINES[folder])])
        else:
            key = f"{folder}/{AUDIO.id}.json"
            spelled = canonical_json(header) if folder == "specs" else sealed(header)
        store.medium.create(key, spelled)
        fresh = Store.open(root)
        assert all(reason.startswith(root) and "\n" not in reason for reason in fresh.problems.values())
        assert len(fresh.takes()) + len(fresh.failures()) + len(fresh.specs) + len(fresh.removed) <= 5
        assert len(fresh.open_failures()) == len(fresh.failures())
        assert verify(fresh).clean == (not fresh.problems)
        json.dumps(info(fresh))


def test_reserved_folders_are_honoured(path):
    store = Store.create(path)
    first, second = take(1), take(2)
    store.publish_takes("d", [first, second], HERE)
    one = store.publish(AUDIO, [(first.clip.id, some("a")[0][1])], {})
    two = store.publish(AUDIO, [(second.clip.id, some("a")[0][1])], {})
    store.medium.create(f"damaged/{one.location}.json", sealed({"format": 1}))
    store.refresh()
    assert store.rows(AUDIO.id) == [second.clip.id]
    assert [live.location for live in store.fragments()] == [two.location]
    store.medium.create("removed/aa.json", sealed({"format": 1, "rows": [second.clip.id], "takes": []}))
    store.medium.create("removed/bb.json", sealed({"format": 1, "takes": [first.id]}))
    store.refresh()
    assert store.takes() == []
    assert store.rows(AUDIO.id) == []
    assert store.removed == {second.clip.id, first.id}
    store.medium.create("removed/cc.json", sealed({"format": 1, "cancels": ["aa"]}))
    fresh = Store.open(path)
    assert fresh.takes() == [dataclasses.replace(second, dataset="d")]
    assert fresh.rows(AUDIO.id) == [second.clip.id]


# -- publishing


def test_a_record_that_gc_took_is_published_again_elsewhere(path):
    Store.create(path)
    planted = []

    def gc_is_faster(operation, key):
        if operation == "link" and key.startswith("records/") and len(planted) < 2:
            planted.append(key)
            (path / key).write_bytes(sealed({"format": 1, "state": "abandoned"}))

    store = Store(path, LocalMedium(path, before=gc_is_faster))
    one = store.publish(AUDIO, some("a"), {})
    assert len({*planted, one.record}) == 3
    fresh = Store.open(path)
    assert [live.record for live in fresh.fragments()] == [one.record]
    assert fresh.read(AUDIO.id, name("a")).shape == (4, 5)
    assert dict(fresh.problems) == {}


def test_a_lost_reply_to_our_own_link_is_success(path):
    Store.create(path)

    def link_and_lose_the_reply(operation, key):
        if operation == "link" and key.startswith("records/"):
            (draft,) = (path / "tmp").iterdir()
            os.link(draft, path / key)

    store = Store(path, LocalMedium(path, before=link_and_lose_the_reply))
    one = store.publish(AUDIO, some("a"), {})
    assert [live.location for live in Store.open(path).fragments()] == [one.location]


def test_somebody_elses_bytes_under_our_name_are_an_error_and_stay(path):
    Store.create(path)

    def plant(operation, key):
        if operation == "link" and key.startswith("records/"):
            (path / key).write_bytes(b"mine")

    with pytest.raises(StoreCorrupt, match="does not match"):
        Store(path, LocalMedium(path, before=plant)).publish(AUDIO, some("a"), {})
    (record,) = (path / "records" / AUDIO.id).iterdir()
    assert record.read_bytes() == b"mine"


def test_everything_is_synced_before_the_record_and_the_record_before_the_answer(path):
    Store.create(path)
    done = []
    store = Store(path, LocalMedium(path, before=lambda operation, key: done.append((operation, key))))
    one = store.publish(AUDIO, some("a"), {}, chunk_bytes=20)
    link = done.index(("link", one.record))
    synced = {key: n for n, (operation, key) in enumerate(done[:link]) if operation == "fsync"}
    filled = {key: n for n, (operation, key) in enumerate(done[:link]) if operation == "write"}
    named = {
        key: n for n, (operation, key) in enumerate(done[:link]) if operation in ("open", "mkdir", "link")
    }
    assert {f"{one.folder}/{item.path}" for item in one.objects} < filled.keys()
    assert f"specs/{AUDIO.id}.json" in named
    for key, n in filled.items():
        assert n < synced[key], f"{key} is not on the disk when the record is"
    for key, n in named.items():
        folder = str(Path(key).parent)
        assert folder == "tmp" or key.startswith("records") or n < synced[folder], (
            f"{key} has no durable name"
        )
    answered = [key for operation, key in done[link + 1 :] if operation == "fsync"]
    assert answered == [f"records/{AUDIO.id}", "records", "."]


KILLED = """
import os, signal, sys
import tempfile
from pathlib import Path
import numpy as np, zarr
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec
from pmm.store.medium import LocalMedium

# One fresh child a step: forked before any thread runs, killed before its n-th operation on the disk.
root, what = Path(sys.argv[1]), sys.argv[2]

def spec(n):
    return FeatureSpec("audio", "test/1", "float16", (5,), None, {"n": n})

def publish(n, before):
    store = Store(root, LocalMedium(root, before=before))
    store.publish(spec(n), [("ab" * 32, np.full((40, 5), n, np.float16))], {}, chunk_bytes=200)

def create(n, before):
    path = root / str(n)
    path.mkdir()
    LocalMedium.__init__.__defaults__ = (before, None)
    Store.create(path)

for n in range(1000):
    left = [n]

    def before(operation, key):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    child = os.fork()
    if child == 0:
        {"publish": publish, "create": create}[what](n, before)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(n, "acknowledged" if status == 0 else -status, flush=True)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


def killed(memory, *args):
    script = memory / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, "-P", script, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_killed_before_any_operation_of_a_publish_nothing_is_half_there(memory, path):
    Store.create(path).publish(AUDIO, some("earlier"), {})
    steps = killed(memory, path, "publish")
    assert len(steps) > 60
    assert [end for _, end in steps[-1:]] == ["acknowledged"]
    store = Store.open(path)
    assert dict(store.problems) == {}
    specs = [FeatureSpec("audio", "test/1", "float16", (5,), None, {"n": n}) for n in range(len(steps))]
    there = [n for n, spec in enumerate(specs) if store.has(spec.id, "ab" * 32)]
    assert there[-1] == len(steps) - 1
    assert there == list(range(there[0], len(steps)))  # invisible until the link, visible ever after
    assert 1 < len(there) < 12
    for n, spec in enumerate(specs):
        if n not in there:
            store.publish(spec, [("ab" * 32, np.full((40, 5), n, np.float16))], {}, chunk_bytes=200)
        np.testing.assert_array_equal(store.read(spec.id, "ab" * 32), np.full((40, 5), n, np.float16))
    assert store.has(AUDIO.id, name("earlier"))
    report = verify(store)
    assert report.clean
    assert (report.fragments, report.rows) == (len(steps) + 1, len(steps) + 1)
    assert report.orphans > 40


def test_killed_before_any_operation_of_create_the_store_can_be_made(memory):
    (memory / "stores").mkdir()
    steps = killed(memory, memory / "stores", "create")
    assert steps[-1][1] == "acknowledged"
    assert len(steps) > 4
    for n, _ in steps:
        store = Store.open_or_create(memory / "stores" / n)
        store.publish(AUDIO, some("a"), {})
        assert verify(store).clean


def test_many_processes_fill_one_store(path):
    Store.create(path)
    code = """
import sys, numpy as np
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec
spec = FeatureSpec("audio", "test/1", "float16", (5,), None, {})
store = Store.open(sys.argv[1])
me = int(sys.argv[2])
for n in range(5):
    store.publish(spec, [(f"{me:02x}{n:02x}" * 16, np.full((4, 5), me, np.float16))], {})
"""
    writers = [subprocess.Popen([sys.executable, "-P", "-c", code, path, str(me)]) for me in range(3)]
    assert [one.wait() for one in writers] == [0, 0, 0]
    store = Store.open(path)
    assert store.rows(AUDIO.id) == sorted(f"{me:02x}{n:02x}" * 16 for me in range(3) for n in range(5))
    assert verify(store).clean


# -- takes


def test_takes_are_the_union_of_listings(path):
    store = Store.create(path)
    one, two, three = take(1, text="hello", source="1.wav"), take(2), take(3, subject="berta")
    assert store.takes() == []
    assert store.publish_takes("left", [one, two], HERE)
    assert not store.publish_takes("left", [one, two], dict(HERE))
    assert store.publish_takes("right", [two, three], HERE)
    expected = [("left", one.id), ("left", two.id), ("right", three.id)]
    for opened in (store, Store.open(path)):
        assert [(seen.dataset, seen.id) for seen in opened.takes()] == expected
    assert store.takes()[0] == dataclasses.replace(one, dataset="left")
    assert len(os.listdir(path / "datasets")) == 2


def test_a_new_listing_of_an_origin_replaces_the_old_and_no_other(path):
    store = Store.create(path)
    store.publish_takes("d", [take(1), take(2)], HERE)
    store.publish_takes("d", [take(4)], {**HERE, "root": "/elsewhere"})
    store.publish_takes("e", [take(5)], HERE)
    assert store.publish_takes("d", [take(2), take(3)], HERE)
    assert {seen.id for seen in store.takes()} == {take(n).id for n in (2, 3, 4, 5)}
    assert store.publish_takes("d", [take(2, text="now known"), take(3)], HERE)
    assert {seen.text for seen in store.takes()} == {"", "now known"}
    assert store.publish_takes("d", [], HERE)
    assert {seen.id for seen in Store.open(path).takes()} == {take(n).id for n in (4, 5)}
    assert len(os.listdir(path / "datasets")) == 6


def test_two_who_replace_the_same_listing_are_both_replaced_by_the_next(path):
    mine = Store.create(path)
    mine.publish_takes("d", [take(1)], HERE)
    (old,) = mine.listings()
    header = {"dataset": "d", "origin": HERE, "replaces": [old.name]}
    mine.publish_sheet("datasets", header, [take(2).to_json()])
    mine.publish_sheet("datasets", header, [take(3).to_json()])
    assert {seen.id for seen in mine.takes()} == {take(2).id, take(3).id}
    mine.publish_takes("d", [take(3)], HERE)
    assert {seen.id for seen in mine.takes()} == {take(3).id}
    assert len(mine.listings()) == 1


def test_text_in_any_script_and_names_in_no_encoding_survive(path):
    store = Store.create(path)
    source = b"caf\xe9.wav".decode("utf-8", "surrogateescape")
    store.publish_takes("数据", [take(1, text="你好", source=source)], HERE)
    (seen,) = Store.open(path).takes()
    assert (seen.dataset, seen.text, seen.source) == ("数据", "你好", source)
    (sheet,) = (path / "datasets").iterdir()
    assert "你好" in sheet.read_text()


# -- failures


def test_attempts_of_a_failure_are_counted(path):
    store = Store.create(path)
    bad = Failure("file:" + name("f"), "/data/bad.wav", "probe", "not a\n sound file")
    store.publish_failures([])
    assert store.failures() == []
    store.publish_failures([bad])
    store.publish_failures([bad, dataclasses.replace(bad, key="path:/data/x.wav")])
    store.publish_failures([dataclasses.replace(bad, attempt=7)])
    fresh = Store.open(path)
    assert sorted((one.key[:4], one.attempt) for one in fresh.failures()) == [
        ("file", 1), ("file", 2), ("file", 7), ("path", 1),
    ]  # fmt: skip
    assert {one.reason for one in fresh.failures()} == {"not a sound file"}
    assert {one.attempt for one in fresh.open_failures()} == {1, 7}


def test_a_failure_is_open_until_something_succeeds_after_it(path):
    store = Store.create(path)
    good, early, late = take(1, source="anna/take_1"), "2020-01-01T00:00:00.000+00:00", "2999-01-01"
    file = Failure("file:" + name("f"), "/data/anna/take_2/x.wav", "probe", "broken", when=early)
    wave = Failure(good.clip.id, "/data/anna/take_1/x.wav", "features", "broken", when=early)
    track = Failure(good.clip.id, "/data/anna/take_1/x.csv", "target", "broken", when=early)
    store.publish_failures([file, wave, track])
    assert store.open_failures() == store.failures()

    def still_open():
        return {one.stage for one in store.open_failures()}

    store.publish_takes("d", [good], HERE)
    assert still_open() == {"probe", "features", "target"}
    store.publish(TARGET, [(good.target, some("a", spec=TARGET)[0][1])], {})
    assert still_open() == {"probe", "features"}
    store.publish(AUDIO, [(good.clip.id, some("a")[0][1])], {})
    assert still_open() == {"probe"}
    store.publish_takes("d", [good, take(2, source="anna/take_22")], HERE)
    assert still_open() == {"probe"}
    store.publish_takes("d", [good, take(2, source="anna/take_2")], HERE)
    assert still_open() == set()
    store.publish_failures([dataclasses.replace(one, when=late) for one in (file, wave, track)])
    assert still_open() == {"probe", "features", "target"}
    assert len(store.failures()) == 6


TWO_PEOPLE = """
import os, sys
import numpy as np, zarr.storage  # while we may still read it
from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec

team, path = 54321, sys.argv[1]
os.mkdir(path)
os.chown(path, -1, team)
os.chmod(path, 0o2775)
spec = FeatureSpec("audio", "test/1", "float16", (5,), None, {})
people = [(54001, 0o077), (54002, 0o022), (54001, 0o077), (54002, 0o077)]

def start(turn):
    child = os.fork()  # before any thread runs; what a person without our rights can do
    if child == 0:
        user, umask = people[turn % 4]
        os.setgroups([team])
        os.setgid(user)
        os.setuid(user)
        os.umask(umask)
        store = Store.open_or_create(path)
        store.publish(spec, [(f"{turn:02x}" * 32, np.full((4, 5), turn, np.float16))], {})
        store.publish_takes(f"of turn {turn}", [], {"host": "h", "root": str(turn), "layout": "livelink"})
        seen = {row: store.read(spec.id, row)[0, 0] for row in store.rows(spec.id)}
        right = all(row == f"{int(value):02x}" * 32 for row, value in seen.items())
        os._exit(0 if right and len(seen) > min(turn, 3) and verify(store).clean else 1)
    return child

for turn in range(4):  # one after the other, then all at once
    assert os.waitpid(start(turn), 0)[1] == 0, turn
for child in [start(turn) for turn in range(4, 10)]:
    assert os.waitpid(child, 0)[1] == 0
store = Store.open(path)
assert len(store.rows(spec.id)) == len(store.listings()) == 10 and verify(store).clean
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two people")
def test_two_people_with_different_umasks_fill_one_store(memory):
    memory.chmod(0o755)
    subprocess.run([sys.executable, "-P", "-c", TWO_PEOPLE, memory / "store"], check=True)
