"""Index objects: many records in one file, which nothing but speed depends on."""

import dataclasses
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pmm import NotFound
from pmm.store import index
from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.clip import Take, lossless_clip
from pmm.store.digest import sealed
from pmm.store.feature import FeatureSpec

AUDIO = FeatureSpec("audio", "test/1", "float16", (5,), None, {})
COUNT = 8


def name(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def rows(number):
    return [(name((number, k)), np.full((4 + k, 5), number, np.float16)) for k in range(3)]


@pytest.fixture
def path(monkeypatch):
    """A store of eight fragments and an abandoned record, all in one index object."""
    monkeypatch.setattr(index, "WORTH_READING", 4)
    monkeypatch.setattr(index, "WORTH_WRITING", COUNT)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        store = Store.create(Path(folder) / "store")
        for number in range(COUNT):
            store.publish(AUDIO, rows(number), {"number": number})
        record = f"records/{AUDIO.id}/{'0' * 32}.json"
        store.medium.create(record, sealed({"format": 1, "state": "abandoned"}))
        assert store.keep_index()
        assert not store.keep_index()
        yield store.path


def the_index(path):
    (one,) = (path / "index").iterdir()
    return one


def contents(store):
    return {
        one.location: (one.to_bytes(), {row: store.read(AUDIO.id, row).tolist() for row in one.row_ids})
        for one in store.fragments()
    }


def overwrite(file, data):
    file.chmod(0o644)
    file.write_bytes(data)


def rot(path, one):
    """Another record of the same size in the place of one."""
    data = bytearray((path / one.record).read_bytes())
    data[40] ^= 1
    overwrite(path / one.record, bytes(data))


def test_an_index_object_tells_what_the_records_do(path):
    by_index, by_record = Store.open(path), Store(path, Store.open(path).medium, indexed=False)
    assert len(by_index._records._unproven) == COUNT + 1
    assert not by_record._records._unproven
    assert contents(by_index) == contents(by_record)
    assert by_index.records.keys() == by_record.records.keys()
    assert list(by_index.records.values()).count(None) == 1
    assert dict(by_index.problems) == {}
    assert verify(by_index).clean
    the_index(path).unlink()
    assert contents(Store.open(path)) == contents(by_record)


def test_opening_reads_no_record_that_an_index_object_tells(path):
    store = Store.open(path)
    asked = []
    medium = store.medium

    class Counting(type(medium)):
        def read(self, key, start, length):
            asked.append(key.partition("/")[0])
            return super().read(key, start, length)

    counted = Store(path, Counting(path))
    assert counted.rows(AUDIO.id) == store.rows(AUDIO.id)
    assert asked.count("records") == 0
    assert asked.count("index") == 1
    counted.read(AUDIO.id, name((0, 0)))
    counted.read(AUDIO.id, name((0, 1)))
    assert asked.count("records") == 1  # the truth, once


def test_records_that_came_later_are_read_and_records_that_went_are_gone(path):
    store = Store.open(path)
    gone = store.fragments()[0]
    (path / gone.record).unlink()
    new = store.publish(AUDIO, rows(99), {})
    for opened in (store, Store.open(path)):
        opened.refresh()
        found = {one.location for one in opened.fragments()}
        assert gone.location not in found
        assert new.location in found
        assert len(found) == COUNT
        assert not any(opened.has(AUDIO.id, row) for row in gone.row_ids)
    shorter = Store.open(path).fragments()[0]
    overwrite(path / shorter.record, (path / shorter.record).read_bytes()[:-1])
    assert list(Store.open(path).problems) == [shorter.record]


def test_a_torn_or_flipped_index_object_is_told_and_changes_nothing(path):
    whole, file = the_index(path).read_bytes(), the_index(path)
    expected = contents(Store.open(path))
    head = whole.index(b"\n")
    flips = [*range(0, head + 1, 9), *range(head + 1, len(whole), 131)]
    broken = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in flips]
    broken += [whole[:-1], whole[: head + 1], whole[:head], b"", whole + b"\0"]
    for data in broken:
        overwrite(file, data)
        store = Store.open(path)
        assert list(store.problems) == [f"index/{file.name}"]
        assert "only a shortcut" in store.problems[f"index/{file.name}"]
        assert store.rows(AUDIO.id) == sorted(row for _, held in expected.values() for row in held)
    assert contents(store) == expected


def lie(path, change):
    """An index object, whole and sealed, that says something else of the first fragment."""
    store = Store(path, Store.open(path).medium, indexed=False)
    sizes = {one.key: one.size for one in store.medium.list("records")}
    victim = store.fragments()[0]
    told = {key: index.Known(sizes[key], one, "") for key, one in store.records.items()}
    told[victim.record] = index.Known(sizes[victim.record], change(victim), "")
    os.unlink(the_index(path))
    index.write(store.medium, {}, told)
    return victim


LIES = {
    "other clips": lambda one: dataclasses.replace(one, ids=b"".join(bytes([n]) * 32 for n in range(3))),
    "other lengths": lambda one: dataclasses.replace(one, lengths=one.lengths + 1),
    "other maker": lambda one: dataclasses.replace(one, made_with={"model": "better"}),
}


@pytest.mark.parametrize("what", LIES)
def test_a_lying_index_object_is_never_believed_when_reading(path, what):
    expected = contents(Store(path, Store.open(path).medium, indexed=False))
    victim = lie(path, LIES[what])
    store = Store.open(path)
    asked = store.fragments()[[one.location for one in store.fragments()].index(victim.location)].row_ids[0]
    if asked in victim.row_ids:
        np.testing.assert_array_equal(store.read(AUDIO.id, asked), expected[victim.location][1][asked])
    else:
        with pytest.raises(NotFound, match=f"clip {asked} has no audio"):
            store.read(AUDIO.id, asked)
    assert contents(store) == expected
    assert os.listdir(path / "index") == []
    assert contents(Store.open(path)) == expected


def test_verify_finds_a_lying_index_object_and_drops_it(path):
    lie(path, LIES["other clips"])
    file = f"index/{the_index(path).name}"
    report = verify(Store.open(path))
    assert [(one.where, one.rows) for one in report.damaged] == [(file, ())]
    assert "does not say what the records do" in report.damaged[0].reason
    assert verify(Store.open(path)).clean


def test_a_record_that_rotted_below_its_index_object_is_found_by_reading_and_by_verify(path):
    store = Store.open(path)
    one, other = store.fragments()[:2]
    rot(path, one)
    reader = Store.open(path)
    with pytest.raises(NotFound, match="run `pmm precompute`"):
        reader.read(AUDIO.id, one.row_ids[0])
    assert len(reader.read(AUDIO.id, other.row_ids[0])) == other.lengths[0]
    assert list(reader.problems) == [one.record]
    assert not Store.open(path).has(AUDIO.id, one.row_ids[0])  # so that precompute puts it back
    assert {damage.where for damage in verify(store).damaged} == {one.record}


def test_verify_drops_an_index_object_over_a_rotten_record(path):
    one = Store.open(path).fragments()[0]
    rot(path, one)
    assert Store.open(path).has(AUDIO.id, one.row_ids[0])
    assert {damage.where.partition("/")[0] for damage in verify(Store.open(path)).damaged} == {
        "records",
        "index",
    }
    assert not Store.open(path).has(AUDIO.id, one.row_ids[0])


def test_what_no_record_needs_is_deleted_by_the_next_writer(path):
    store = Store.open(path)
    old = the_index(path).name
    for one in store.fragments():
        (path / one.record).unlink()
    store.keep_index()  # one record, the abandoned one, still needs it
    assert the_index(path).name == old
    (path / "records" / AUDIO.id / f"{'0' * 32}.json").unlink()
    store.keep_index()
    assert os.listdir(path / "index") == []


def test_a_listing_is_read_when_its_takes_are_asked_for(path):
    store = Store.open(path)
    origin = {"host": "h", "root": "/d", "layout": "livelink"}
    for count in (1, 2):
        raw = [np.arange(n, n + 160, dtype="<i2").tobytes() for n in range(count)]
        takes = [Take(lossless_clip(16000, 1, "s16", 0, 160, [one]), None, "anna") for one in raw]
        store.publish_takes("d", takes, origin)
    (live,) = store.listings()
    file = path / "datasets" / f"{live.name}.jsonl"
    overwrite(file, file.read_bytes().replace(b"anna", b"anne", 1))
    fresh = Store.open(path)
    assert dict(fresh.problems) == {}
    assert len(fresh.takes()) == 1  # of the listing that this one replaced
    assert list(fresh.problems) == [f"datasets/{live.name}.jsonl"]
    assert [one.where for one in verify(fresh).damaged] == [f"datasets/{live.name}.jsonl"]
