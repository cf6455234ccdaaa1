"""Stores filled apart and brought together: push, pull, merge."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pmm import StoreCorrupt
from pmm.store import snapshots
from pmm.store.care import verify
from pmm.store.catalog import Failure, Store
from pmm.store.clip import Take, lossless_clip
from pmm.store.compact import compact
from pmm.store.feature import FeatureSpec
from pmm.store.removal import remove
from pmm.store.share import Copied, copy_fragment, merge, push
from pmm.train import protocols

AUDIO = FeatureSpec("audio", "test/1", "float16", (5,), None, {})
TARGET = FeatureSpec("target", "test/1", "float32", (3,), 30, {})
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def name(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def rows(*keys, spec=AUDIO):
    """A few rows for each key, decided by the key."""
    made = []
    for key in keys:
        rng = np.random.default_rng(int(name(key)[:8], 16))
        made.append((name(key), rng.random((rng.integers(3, 9), *spec.shape)).astype(spec.dtype)))
    return made


@pytest.fixture
def memory():
    """A folder in memory where there is one: hundreds of fsyncs are quick there."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def flip(path):
    """One bit of the byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


# -- one fragment


def test_a_copied_fragment_is_the_same_elsewhere(memory):
    a, b = Store.create(memory / "a"), Store.create(memory / "b")
    one = a.publish(AUDIO, rows("x", "y"), {"model": "m"}, chunk_bytes=40)
    sizes = []
    copied = copy_fragment(a, one, b, sizes.append)
    assert sum(sizes) == one.bytes
    assert (copied.id, copied.objects, copied.row_ids) == (one.id, one.objects, one.row_ids)
    assert (copied.created, copied.writer, copied.made_with) == (one.created, one.writer, one.made_with)
    assert copied.location != one.location
    b = Store.open(memory / "b")
    assert dict(b.specs) == dict(a.specs)
    for row_id, array in rows("x", "y"):
        np.testing.assert_array_equal(b.read(AUDIO.id, row_id), array)
    assert verify(b).clean
    assert copy_fragment(a, one, b).location == copied.location
    assert len(b.fragments()) == 1


@pytest.mark.parametrize("path", ["values/c/0/0", "clips/c/0/0", "zarr.json"])
def test_a_damaged_fragment_is_not_copied_and_leaves_nothing(memory, path):
    a, b = Store.create(memory / "a"), Store.create(memory / "b")
    one = a.publish(AUDIO, rows("x", "y"), {})
    flip(memory / "a" / one.folder / path)
    with pytest.raises(StoreCorrupt, match=rf"{path} .*sha256 is not the record's"):
        copy_fragment(a, one, b)
    assert Store.open(memory / "b").fragments() == []
    assert not [file for file in (memory / "b").rglob("*") if file.is_file() and file.name != "pmm.json"]


# -- whole stores


WHO = ["anna"] * 3 + ["berta"] * 3 + ["bob"] * 3 + ["cyd"] * 3 + ["dan"] * 3 + ["eve"] * 2


def take(number, subject, dataset="d", **more):
    raw = np.arange(number, number + 160, dtype="<i2").tobytes()
    return Take(lossless_clip(16000, 1, "s16", 0, 160, [raw]), name(("t", number)), subject, dataset, **more)


def fill(store, dataset, people):
    """Publishes what ``people`` (number -> subject) say, in fragments of three, and lists it."""
    takes = [take(number, subject, source=f"{dataset}/{number}") for number, subject in people.items()]
    for spec in (AUDIO, TARGET):
        for first in range(0, len(takes), 3):
            ids = [spec.row_id(one.clip.id, one.target) for one in takes[first : first + 3]]
            arrays = [rows(row_id, spec=spec)[0][1] for row_id in ids]
            store.publish(spec, list(zip(ids, arrays)), {"label": "test"})
    store.publish_takes(dataset, takes, {"host": "h", "root": f"/{dataset}", "layout": "livelink"})


def contents(path):
    """All that a reader can tell of a store, without its history."""
    store = Store.open(path)
    assert dict(store.problems) == {}
    served = {
        (spec, row): store.read(spec, row).tobytes() for spec in store.specs for row in store.rows(spec)
    }
    takes = {json.dumps(one.to_json(), sort_keys=True) for one in store.takes()}
    failures = {(one.key, one.attempt, one.when) for one in store.failures()}
    return (
        served,
        takes,
        store.removed,
        failures,
        {name: spec.to_bytes() for name, spec in store.specs.items()},
    )


def fragment_of(store, spec, number):
    row = spec.row_id(take(number, "").clip.id, take(number, "").target)
    return next(one for one in store.fragments() if one.spec_id == spec.id and row in one.row_ids)


@pytest.fixture(scope="module")
def apart():
    """Two stores filled apart from overlapping datasets.

    Takes 0 to 8 in ``a``, 3 to 14 in ``b``, so both have the fragments of 3 to 5 and of 6 to 8; 8 is also
    in another one of ``a``, with 15 and 16. Who says 7 is bob in one and robert in the other. Damaged are
    the copy of 3 to 5 in ``b`` and the only one of 12 to 14. ``b`` removed 1, which it never had, and
    ``a`` 10.
    """
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        a, b = Store.create(Path(folder) / "a"), Store.create(Path(folder) / "b")
        fill(a, "left", dict(enumerate(WHO[:9])))
        fill(a, "more", {8: "bob", 15: "eve", 16: "eve"})
        fill(b, "right", {**dict(enumerate(WHO[3:15], start=3)), 7: "robert"})
        flip(b.path / fragment_of(b, AUDIO, 4).folder / "values/c/0/0")
        flip(b.path / fragment_of(b, AUDIO, 13).folder / "values/c/0/0")
        b.publish_removal(rows=[take(1, "").clip.id, take(1, "").target], takes=[take(1, "anna").id])
        a.publish_removal(rows=[take(10, "").clip.id, take(10, "").target], takes=[take(10, "cyd").id])
        a.publish_failures([Failure("path:/left/x.wav", "x.wav", "probe", "no sound")])
        yield a.path, b.path


@pytest.fixture
def two(apart, memory):
    """Fresh copies of the two stores."""
    for path in apart:
        shutil.copytree(path, memory / path.name)
    return memory / "a", memory / "b"


def damaged(path):
    return {one.where for one in verify(Store.open(path)).damaged}


def test_merged_both_ways_the_contents_are_the_same(two):
    a, b = map(Store.open, two)
    lost = fragment_of(b, AUDIO, 13).folder
    before = damaged(two[1])
    events = []
    there, back = merge(a, b, events.append)
    assert [one.where for one in back.skipped] == [lost]
    assert (there.skipped, damaged(two[0])) == ((), set())
    assert damaged(two[1]) == {where for where in before if where.startswith(lost)}  # the other is healed
    assert all(isinstance(one, Copied) and one.done_bytes <= one.total_bytes for one in events)
    assert events[-1].done_bytes == events[-1].total_bytes
    the_same_contents(*two)

    before = {path: sorted(file for file in path.rglob("*") if file.is_file()) for path in two}
    again = merge(Store.open(two[0]), Store.open(two[1]))
    assert [(one.fragments, one.lists) for one in again] == [(0, 0), (0, 0)]
    assert {path: sorted(file for file in path.rglob("*") if file.is_file()) for path in two} == before


def the_same_contents(one_path, other_path):
    """Both hold all but what only a damaged copy is known of: 12 to 14."""
    one, other = contents(one_path), contents(other_path)
    lost = {(AUDIO.id, take(number, "").clip.id) for number in (12, 13, 14)}
    stay = [number for number in range(17) if number not in (1, 10)]
    expected = {(AUDIO.id, take(number, "").clip.id) for number in stay}
    expected |= {(TARGET.id, take(number, "").target) for number in stay}
    for served, *_ in (one, other):
        assert served.keys() - lost == expected - lost
        for spec in (AUDIO, TARGET):
            for row in (row for name, row in expected - lost if name == spec.id):
                assert served[spec.id, row] == rows(row, spec=spec)[0][1].tobytes()
    assert one[1:] == other[1:]
    assert {json.loads(line)["take"] for line in one[1]} == {
        *(take(number, who).id for number, who in enumerate(WHO) if number in stay),
        take(7, "robert").id,
    }


def test_what_was_removed_reaches_neither_the_disk_nor_the_lists(two):
    merge(*map(Store.open, two))
    for path, number in ((two[1], 1), (two[0], 10)):
        one = take(number, "")
        held = [row for fragment in Store.open(path).fragments() for row in fragment.row_ids]
        assert not {one.clip.id, one.target} & set(held)
        everything = b"".join(file.read_bytes() for file in (path / "datasets").iterdir())
        assert one.clip.id.encode() not in everything
    assert Store.open(two[0]).removed == Store.open(two[1]).removed


def test_a_removal_taken_back_brings_everything_back(two):
    merge(*map(Store.open, two))
    a = Store.open(two[0])
    a.publish_removal(cancels=list(a.removals))
    merge(a, Store.open(two[1]))
    for path in two:
        store = Store.open(path)
        assert (len(store.takes()), len(store.rows(TARGET.id))) == (18, 17)


def test_a_clip_under_two_subjects_is_never_split(two):
    merge(*map(Store.open, two))
    for path in two:
        takes = Store.open(path).listed_takes()
        assert {one.subject for one in takes if one.clip.id == take(7, "").clip.id} == {"bob", "robert"}
        for seed in range(100):
            split = protocols.split("cross-subject", takes, seed)
            parts = [
                {one.clip.id for those in split[part].values() for one in those} for part in protocols.PARTS
            ]
            assert sum(map(len, parts)) == len(set().union(*parts)) == 15


def test_push_fills_a_new_store_and_marks_nothing_in_the_source(two, memory):
    before = {file: file.read_bytes() for file in two[1].rglob("*") if file.is_file()}
    done = push(Store.open(two[1]), Store.create(memory / "new"))
    assert {file: file.read_bytes() for file in two[1].rglob("*") if file.is_file()} == before
    assert (done.fragments, len(done.skipped)) == (6, 2)
    assert damaged(memory / "new") == set()
    assert not (memory / "new/damaged").exists()
    push(Store.open(two[0]), Store.open(memory / "new"))  # which has the one that was damaged
    merge(*map(Store.open, two))
    the_same_contents(two[0], memory / "new")


def test_marks_of_damage_do_not_travel_and_what_is_marked_is_named(two):
    b = Store.open(two[1])
    for number in (4, 13):
        b.mark_damaged(fragment_of(b, AUDIO, number).location, "flipped")
    a = Store.open(two[0])
    done = push(b, a)
    assert [one.reason for one in done.skipped] == ["marked as damaged, and no other copy is known"]
    assert a.damaged == frozenset()
    assert push(a, b).fragments == 2 * 2 + 1  # 0 and 2; 8, 15 and 16; and the healed one


def test_snapshots_travel_and_name_the_same_bytes(two):
    a, b = map(Store.open, two)
    paper = snapshots.take(a, "paper")
    pinned, _ = snapshots.pin(b, [(TARGET.id, row) for row in b.rows(TARGET.id)])
    snapshots.take(a, "both")
    snapshots.take(b, "both")
    there, back = merge(a, b)
    for store in map(Store.open, two):
        assert snapshots.names(store) == ["both", pinned.name, "paper"]
        assert snapshots.load(store, pinned.name).id == pinned.id
        view = snapshots.View(store, snapshots.load(store, "paper"))
        assert snapshots.load(store, "paper").id == paper.id
        for spec in (AUDIO, TARGET):
            for number in (0, 2, *range(3, 9), 15, 16):  # 1 was removed in b
                row = spec.row_id(take(number, "").clip.id, take(number, "").target)
                assert view.read(spec.id, row).tobytes() == rows(row, spec=spec)[0][1].tobytes()
    for skipped in (there.skipped[-1], back.skipped[-1]):
        assert skipped.where == "snapshots/both"
        assert "a snapshot 'both' of other content is in" in skipped.reason
    assert merge(a, b)[0].lists == 0


def test_who_was_purged_does_not_come_back_with_another_store(two):
    a, b = map(Store.open, two)
    merge(a, b)
    snapshots.take(b, "paper")
    b.publish_failures([Failure(take(4, "").clip.id, "/left/4.wav", "features", "too loud"), LOUD])
    remove(a, subjects=["berta"], purge_bytes=True)
    push(b, a)
    berta = [take(number, "berta", "left") for number in (3, 4, 5)]
    everything = b"".join(file.read_bytes() for file in two[0].rglob("*") if file.is_file())
    for one in berta:
        assert bytes.fromhex(one.clip.id) not in everything
        for row, spec in ((one.clip.id, AUDIO), (one.target, TARGET)):
            assert rows(row, spec=spec)[0][1].tobytes() not in everything
    assert b"berta" not in everything
    a.refresh()
    assert LOUD.key in {one.key for one in a.failures()}
    assert snapshots.load(a, "paper").purged
    assert not {one.id for one in a.takes()} & {one.id for one in berta}

    push(a, b)
    assert not {one.id for one in b.takes()} & {one.id for one in berta}
    everything = b"".join(file.read_bytes() for file in two[1].rglob("*") if file.is_file())
    assert b"berta" not in everything
    the_same = [contents(path) for path in two]
    lost = {(AUDIO.id, take(number, "").clip.id) for number in (12, 13, 14)}
    assert {key: data for key, data in the_same[1][0].items() if key not in lost} == the_same[0][0]
    assert the_same[0][1:3] == the_same[1][1:3]


LOUD = Failure("path:/left/y.wav", "y.wav", "probe", "too loud")


def test_what_was_compacted_does_not_come_back_in_pieces(two):
    a, b = map(Store.open, two)
    merge(a, b)
    b.refresh()
    done = compact(b)
    assert done.written
    count = len(Store.open(two[1]).fragments())
    again = push(a, Store.open(two[1]))
    assert (again.fragments, len(Store.open(two[1]).fragments())) == (0, count)
    the_same_contents(*two)


def test_a_row_of_other_bytes_is_kept_beside_and_one_serves_both_stores(memory):
    a, b = Store.create(memory / "a"), Store.create(memory / "b")
    (row, array), *_ = rows("x")
    mine, other = a.publish(AUDIO, [(row, array)], {}), b.publish(AUDIO, [(row, array + 1)], {})
    merge(a, b)
    serving = min((mine, other), key=lambda one: one.id)
    for store in (a, b):
        assert {one.id for one in store.fragments()} == {mine.id, other.id}
        assert store.find(AUDIO.id, row)[0].id == serving.id


def test_a_lying_source_is_named_and_harms_nobody(two, memory):
    a = Store.open(two[0])
    one = fragment_of(a, AUDIO, 0)
    lie = dataclasses.replace(one, location="f" * 32, ids=bytes(32) + one.ids[32:])
    shutil.copytree(a.path / one.folder, a.path / lie.folder)
    (a.path / one.record).unlink()
    (a.path / lie.record).write_bytes(lie.to_bytes())
    listing = a.listings()[0].name
    (a.path / f"datasets/{listing}.jsonl").chmod(0o600)
    with (a.path / f"datasets/{listing}.jsonl").open("a") as file:
        file.write("{}")
    new = Store.create(memory / "new")
    done = push(Store.open(two[0]), new)
    assert [one.where for one in done.skipped] == [f"datasets/{listing}.jsonl", lie.folder]
    assert "does not fit its record" in done.skipped[1].reason
    assert not new.has(AUDIO.id, "00" * 32)
    assert verify(new).clean


KILLED = """
import json, os, signal, sys
from pathlib import Path
import zarr, zarr.storage, zarr.core.sync
from pmm.store.catalog import Store
from pmm.store.medium import LocalMedium
from pmm.store.share import push

# One fresh child a step, forked before any thread runs, killed before its n-th operation on the target.
source, root, stride = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for n in range(0, 100_000, stride):
    left, target = [n], root / str(n)

    def before(operation, key):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    child = os.fork()
    if child == 0:
        Store.create(target)
        push(Store.open(source), Store(target, LocalMedium(target, before=before)))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(n, flush=True)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""
EVERY = int(os.environ.get("PMM_KILL_EVERY", "29"))
"""A push is killed before each so-many-th operation; 1 for all of them."""


def test_a_push_killed_anywhere_is_finished_by_the_next(two, memory):
    (memory / "killed").mkdir()
    command = [sys.executable, "-P", "-c", KILLED, two[0], memory / "killed", str(EVERY)]
    steps = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(steps) > 300 // EVERY
    push(Store.open(two[0]), Store.create(memory / "whole"))
    whole, sent = contents(memory / "whole"), []
    for n in steps:
        path = memory / "killed" / n
        half = Store.open(path)
        assert dict(half.problems) == {}
        served = contents(path)[0]
        assert served.items() <= whole[0].items()
        assert verify(half).clean
        sent.append(push(Store.open(two[0]), half).fragments)
        assert contents(path) == whole
        assert len(Store.open(path).fragments()) == len(Store.open(memory / "whole").fragments())
        assert verify(Store.open(path)).clean
    assert sent == sorted(sent, reverse=True)  # what had arrived was not sent again
    assert (sent[0], sent[-1]) == (len(Store.open(memory / "whole").fragments()), 0)


# -- the commands


def test_the_commands(pmm, two, memory):
    done = pmm("store", "push", two[1], memory / "new", "--json")
    assert (done.code, json.loads(done.out)["fragments"]) == (3, 6)
    assert len([line for line in done.err.splitlines() if line.startswith("pmm: not copied from ")]) == 2
    done = pmm("store", "pull", memory / "new", two[0])
    assert (done.code, done.err) == (0, "")
    assert done.out == f"copied 5 fragments, 14.3 kB, and 4 lists from {two[0]} to {memory}/new\n"
    done = pmm("store", "pull", memory / "new", two[0])
    assert done.out == f"nothing to copy from {two[0]} to {memory}/new\n"
    done = pmm("store", "merge", two[0], two[1], "--json")
    assert (done.code, json.loads(done.out).keys()) == (3, {"there", "back"})
    assert f"pmm: not copied from {two[1]} to {two[0]}: fragments/" in done.err
    done = pmm("store", "push", memory / "nowhere", two[0])
    assert (done.code, done.complaint.startswith(f"no store at {memory}/nowhere")) == (1, True)
    done = pmm("store", "merge", two[0], memory / "nowhere")
    assert (done.code, (memory / "nowhere").exists()) == (1, False)
