"""Who withdraws consent is gone: hidden at once, with --purge destroyed, and after a merge, too."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest

from pmm import NotFound
from pmm.store import snapshots
from pmm.store.care import info, repair, verify
from pmm.store.catalog import Failure, Store
from pmm.store.clip import Take, lossless_clip, target_id
from pmm.store.compact import compact
from pmm.store.feature import FeatureSpec
from pmm.store.gc import gc
from pmm.store.medium import MediumError
from pmm.store.removal import purge, readmit, remove
from pmm.store.share import merge

AUDIO = FeatureSpec("audio", "rm/1", "float16", (5,), None, {})
TARGET = FeatureSpec("target", "rm/1", "float32", (3,), 30, {})
HERE = {"host": "h", "root": "/data", "layout": "livelink"}


KILL_EVERY = int(os.environ.get("PMM_KILL_EVERY", "7"))  # 1 in tests/campaign


def take(number, subject):
    raw = np.arange(number, number + 160, dtype="<i2").tobytes()
    clip = lossless_clip(16000, 1, "s16", 0, 160, [raw])
    secret = f"what {subject} said"
    return Take(clip, target_id(clip, b"face"), subject, text=secret, source=f"{subject}/take_{number}")


TAKES = [take(0, "anna"), take(1, "anna"), take(2, "bob"), take(3, "bob"), take(1, "anna too")]
ANNA = {text for one in TAKES[:2] for text in (one.clip.id, one.target)}


def fill(path):
    store = Store.create(path)
    for which in (TAKES[:3], TAKES[3:4]):
        store.publish(AUDIO, [(one.clip.id, np.ones((4, 5), np.float16)) for one in which], {})
        store.publish(TARGET, [(one.target, np.ones((4, 3), np.float32)) for one in which], {})
    store.publish_takes("d", TAKES[:2], HERE)
    store.publish_takes("d", TAKES, HERE)
    store.publish_failures([Failure(TAKES[0].clip.id, "anna/take_0", "features", "broken")])
    return store


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "store")


def traces(path):
    """Files that still hold a word or a number of anna's. Ids are digests, and stay in removed/."""
    words = [b"anna/take", b"what anna", *(bytes.fromhex(row) for row in ANNA)]
    files = [one for one in path.rglob("*") if one.is_file() and one.parent.name != "removed"]
    return {one.relative_to(path).parts[0] for one in files if any(w in one.read_bytes() for w in words)}


def test_a_removal_hides_a_subject_everywhere_and_can_be_taken_back(store):
    done = remove(store, subjects=["anna"])
    assert (len(done.takes), set(done.rows), done.purged) == (2, ANNA, None)
    for opened in (store, Store.open(store.path)):
        assert [one.subject for one in opened.takes()] == ["bob", "bob"]  # her clip under another name, too
        assert opened.rows(AUDIO.id) == sorted(one.clip.id for one in TAKES[2:4])
        assert opened.removed >= ANNA
    assert remove(store, subjects=["d/anna"]).rows == done.rows
    assert len(store.removals) == 1
    assert traces(store.path) != set()
    assert readmit(store, {TAKES[0].clip.id}) == 1
    assert [one.source for one in store.takes()] == ["bob/take_2", "bob/take_3"]  # her take is still out
    assert readmit(store, {TAKES[0].id, TAKES[0].target}) == 1
    assert [one.source for one in Store.open(store.path).takes()] == [
        "anna/take_0",
        "bob/take_2",
        "bob/take_3",
    ]
    assert readmit(store, {TAKES[0].id}) == 0


@pytest.mark.parametrize("named", ["bob/take_2", TAKES[2].id, TAKES[2].clip.id[:8], TAKES[2].target])
def test_clips_are_named_by_source_or_id(store, named):
    assert remove(store, clips=[named]).takes == (TAKES[2].id,)
    assert TAKES[2].clip.id not in store.rows(AUDIO.id)
    assert TAKES[3].clip.id in store.rows(AUDIO.id)


def test_a_name_that_fits_nothing_changes_nothing(store):
    before = sorted(one.name for one in store.path.rglob("*"))
    for wrong, message in (
        ({"clips": ["ab" * 32]}, "is no take, clip or source"),
        ({"clips": ["abc"]}, "abc is no take"),
        ({"subjects": ["carl"]}, "no take of subject 'carl' in .*; its subjects are anna, anna too, bob"),
        ({"specs": ["zz"]}, "0 feature specs in .* begin with 'zz'"),
        ({"clips": ["bob/take_2", "nope"]}, "nope is no take"),
    ):
        with pytest.raises(NotFound, match=message):
            remove(store, **wrong)
    assert sorted(one.name for one in store.path.rglob("*")) == before


def test_a_purge_leaves_no_trace_and_takes_nothing_else(store):
    snapshots.take(store, "base")
    assert traces(store.path) == {"fragments", "datasets", "failures", "snapshots"}
    done = remove(store, subjects=["anna"], purge_bytes=True)
    assert done.purged.fragments == 2
    assert traces(store.path) == set()
    fresh = Store.open(store.path)
    assert fresh.rows(AUDIO.id) == sorted(one.clip.id for one in TAKES[2:4])
    assert fresh.read(TARGET.id, TAKES[2].target).shape == (4, 3)
    assert [one.source for one in fresh.takes()] == ["bob/take_2", "bob/take_3"]
    assert verify(fresh).clean
    with pytest.raises(NotFound, match="no longer whole: some of its takes were withdrawn and purged"):
        snapshots.View(fresh, snapshots.load(fresh, "base")).require([AUDIO.id])
    assert purge(fresh).fragments == 0


def test_a_purge_finds_every_copy(store):
    """A damaged copy, what a killed writer left, and a fragment whose record is unreadable."""
    one = store.fragments()[0]
    store.publish(AUDIO, [(TAKES[0].clip.id, np.zeros((4, 5), np.float16))], {})
    store.mark_damaged(one.location, "test")
    for name in ("0" * 32, "1" * 32):
        shutil.copytree(store.path / one.folder, store.path / "fragments" / one.spec_id / name)
    (store.path / "records" / one.spec_id / f"{'1' * 32}.json").write_bytes(b"torn")
    remove(Store.open(store.path), subjects=["anna"], purge_bytes=True)
    assert traces(store.path) == set()


def test_who_is_purged_here_is_gone_there_after_a_merge(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "other")
    other = Store.open(tmp_path / "other")
    remove(store, subjects=["anna"], purge_bytes=True)
    merge(store, other)
    assert traces(store.path) == traces(other.path) == set()
    assert other.rows(AUDIO.id) == store.rows(AUDIO.id) == sorted(one.clip.id for one in TAKES[2:4])
    assert verify(other).clean


def test_gc_ends_a_purge_that_was_cut_short_and_takes_what_slow_writers_brought_back(store):
    remove(store, subjects=["anna"], purge_bytes=True)
    store.publish(AUDIO, [(TAKES[0].clip.id, np.ones((4, 5), np.float16))], {})
    assert TAKES[0].clip.id not in store.rows(AUDIO.id)
    assert gc(store).purged == 1
    assert traces(store.path) == set()


def test_a_purge_killed_anywhere_is_ended_by_gc_and_takes_nobody_else(tmp_path, killed):
    fill(tmp_path / "original")
    snapshots.take(Store.open(tmp_path / "original"), "before")
    for at in itertools.count(step=KILL_EVERY):
        path = shutil.copytree(tmp_path / "original", tmp_path / "store")
        alive = not killed(path, at, lambda dying: remove(dying, subjects=["anna"], purge_bytes=True))
        begun = any((path / "removed").glob("*.json"))
        gc(Store.open(path), grace_seconds=0)
        fresh = Store.open(path)
        assert (traces(path) == set()) == begun
        assert verify(fresh).clean
        for one in TAKES[2:4]:
            assert fresh.read(AUDIO.id, one.clip.id).all()
            assert fresh.read(TARGET.id, one.target).all()
        assert {one.subject for one in fresh.takes()} >= {"bob"}
        shutil.rmtree(path)
        if alive:
            break
    assert at > 150


def test_a_purge_deletes_nothing_for_a_record_that_cannot_be_read_just_then(store):
    lost, read = [], store.medium.read

    def losing(key, start, length):
        if key.startswith("records/") and key not in lost:
            lost.append(key)
            raise MediumError(f"cannot read {key}: the connection was lost")
        return read(key, start, length)

    store.medium.read = losing
    remove(store, subjects=["anna"], purge_bytes=True)
    fresh = Store.open(store.path)
    assert len(lost) == 4
    assert traces(store.path) == set()
    assert {one.clip.id for one in TAKES[2:4]} == set(fresh.rows(AUDIO.id))
    broken = Store.open(store.path)
    broken.medium.read = lambda key, *span: losing(key, *span) if lost.clear() is None else b""
    with pytest.raises(MediumError, match="the connection was lost"):
        purge(broken)
    assert len(Store.open(store.path).rows(AUDIO.id)) == 2


def test_a_feature_set_is_removed_and_purged(store):
    size = info(store)["bytes"]
    remove(store, specs=[AUDIO.id[:9]])
    assert (store.rows(AUDIO.id), len(store.rows(TARGET.id)), len(store.takes())) == ([], 4, 5)
    assert compact(store).damaged == ()
    readmit(store, (), [AUDIO.id])
    assert len(store.rows(AUDIO.id)) == 4
    remove(store, specs=[AUDIO.id], purge_bytes=True)
    fresh = Store.open(store.path)
    assert fresh.rows(AUDIO.id) == []
    assert not list((store.path / "fragments" / AUDIO.id).glob("*"))
    assert len(fresh.rows(TARGET.id)) == 4
    assert info(fresh)["bytes"] < size
    assert verify(fresh).clean


# -- repair


def spoil(path):
    path.chmod(0o644)
    path.write_bytes(b"\1" + path.read_bytes()[1:])


def test_repair_saves_the_whole_clips_of_a_damaged_fragment(store):
    (one,) = [one for one in store.fragments() if one.spec_id == AUDIO.id and len(one.lengths) == 3]
    spoil(store.path / one.folder / "values/c/0/0")
    done = repair(store, verify(store))
    assert (done.marked, done.saved, done.lost, done.left) == ((one.folder,), 2, (one.row_ids[0],), ())
    fresh = Store.open(store.path)
    assert verify(fresh).clean
    assert fresh.missing(AUDIO.id, one.row_ids) == [one.row_ids[0]]
    assert gc(fresh, 0).kept == (one.folder,)
    fresh.publish(AUDIO, [(one.row_ids[0], np.ones((4, 5), np.float16))], {})
    assert gc(fresh, 0).replaced == (one.folder,)


def test_repair_needs_nothing_where_another_copy_is_whole(store):
    one = store.fragments()[0]
    spec = store.specs[one.spec_id]
    rows = [(row, np.array(store.read(spec.id, row))) for row in one.row_ids]
    copy = store.publish(spec, rows, {})
    spoil(store.path / one.folder / "zarr.json")
    done = repair(store, verify(store))
    assert (done.marked, done.saved, done.lost) == ((one.folder,), 0, ())
    assert copy.location in {live.location for live in Store.open(store.path).fragments()}


def test_repair_of_records_lists_and_specs(store):
    record = store.fragments()[0].record
    listing = f"datasets/{store.listings()[0].name}.jsonl"
    for key in (record, listing, f"specs/{TARGET.id}.json"):
        spoil(store.path / key)
    report = verify(store)
    done = repair(store, report)
    assert set(done.marked) == {record, listing}
    assert done.written == (f"specs/{TARGET.id}.json",)
    fresh = Store.open(store.path)
    assert verify(fresh).clean
    assert fresh.specs[TARGET.id] == TARGET
    fresh.publish_takes("d", TAKES, HERE)
    assert len(fresh.takes()) == 5


def test_a_damaged_removal_is_told_and_never_set_aside(store):
    remove(store, subjects=["anna"])
    (entry,) = store.medium.list("removed")
    spoil(store.path / entry.key)
    done = repair(store, verify(store))
    assert (done.marked, done.left) == ((), (entry.key,))
    assert not verify(store).clean


# -- from the command line


def test_precompute_refuses_what_was_removed_unless_told_otherwise(pmm, captures, tmp_path):
    store = tmp_path / "features"
    assert pmm("precompute", captures, "--store", store).code == 0
    done = pmm("store", "rm", store, "--subjects", "ada", "--purge", "--json")
    assert (done.code, len(json.loads(done.out)["takes"])) == (0, 2)
    done = pmm("precompute", captures, "--store", store)
    assert done.code == 3
    assert done.err.count("on purpose; --readmit takes it back") == 2
    assert len(Store.open(store).takes()) == 2
    assert Store.open(store).open_failures() == []
    assert pmm("precompute", captures, "--store", store, "--readmit").code == 0
    assert len(Store.open(store).takes()) == 4
    audio = next(s for s in Store.open(store).specs.values() if s.modality == "audio")
    assert len(Store.open(store).rows(audio.id)) == 4
    assert pmm("store", "rm", store, "--spec", audio.id[:10]).code == 0
    assert "were removed from" in pmm("precompute", captures, "--store", store).complaint
    assert pmm("precompute", captures, "--store", store, "--readmit").code == 0
    assert len(Store.open(store).rows(audio.id)) == 4


def test_damage_is_repaired_and_computed_again(pmm, captures, tmp_path):
    store = tmp_path / "features"
    assert pmm("precompute", captures, "--store", store).code == 0
    opened = Store.open(store)
    before = {
        (spec, row): np.array(opened.read(spec, row)) for spec in opened.specs for row in opened.rows(spec)
    }
    for one in opened.fragments():
        spoil(
            store / one.folder / next(item.path for item in one.objects if item.path.startswith("values/c/"))
        )
    assert pmm("store", "verify", store, "--quick").code == 0
    done = pmm("store", "verify", store, "--repair", "--json")
    told = json.loads(done.out)["repaired"]
    assert (done.code, len(told["marked"]), len(told["lost"])) == (
        3,
        4,
        2,
    )  # a clip, of audio, text and lips, and a face track
    assert pmm("store", "verify", store).code == 0
    assert pmm("precompute", captures, "--store", store).code == 0
    fresh = Store.open(store)
    for (spec, row), values in before.items():
        np.testing.assert_allclose(  # another batch rounds differently
            fresh.read(spec, row).astype(np.float32), values.astype(np.float32), atol=0.02
        )
    done = pmm("store", "gc", store, "--grace", "0s")
    assert done.out.startswith("deleted 0 unfinished fragments, 4 damaged copies and 0 drafts, ")
    assert pmm("store", "compact", store).code == 0
    assert pmm("store", "snapshot", store, "now", "--json").code == 0
    assert pmm("store", "verify", store, "--quick").code == 0


def test_wrong_options_are_refused_in_one_line(pmm, tmp_path):
    Store.create(tmp_path / "store")
    assert "nothing to remove" in pmm("store", "rm", tmp_path / "store").complaint
    assert (
        "'5 days' is no length of time"
        in pmm("store", "gc", tmp_path / "store", "--grace", "5 days").complaint
    )
    assert (
        "no snapshot 'x'"
        in pmm("fit", tmp_path / "store", "--run", tmp_path / "r", "--snapshot", "x").complaint
    )
    assert "no name of a snapshot" in pmm("store", "snapshot", tmp_path / "store", "A B").complaint
