"""A snapshot names exact content: it is read byte for byte, or refused with the clips named."""

import dataclasses
import hashlib
import os
import shutil

import numpy as np
import pytest

from pmm import AlreadyThere, BadInput, NotFound, StoreCorrupt
from pmm.store import snapshots
from pmm.store.catalog import Store
from pmm.store.clip import Take, lossless_clip
from pmm.store.compact import compact
from pmm.store.feature import FeatureSpec
from pmm.store.removal import remove
from pmm.store.snapshots import View

AUDIO = FeatureSpec("audio", "snap/1", "float16", (5,), None, {})
OTHER = FeatureSpec("audio", "snap/2", "float16", (5,), None, {})
HERE = {"host": "h", "root": "/data", "layout": "livelink"}


def take(number, subject="anna", **more):
    raw = np.arange(number, number + 160, dtype="<i2").tobytes()
    clip = lossless_clip(16000, 1, "s16", 0, 160, [raw])
    return Take(clip, hashlib.sha256(b"%d" % number).hexdigest(), subject, source=f"take_{number}", **more)


def publish(store, value, *numbers, spec=AUDIO):
    return store.publish(spec, [(take(n).clip.id, np.full((4, 5), value, np.float16)) for n in numbers], {})


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "store")
    publish(store, 1, 0, 1)
    publish(store, 2, 2)
    store.publish_takes("d", [take(n) for n in range(3)], HERE)
    store.publish_takes("e", [take(0, subject="also anna")], HERE)
    return store


def view(store, name):
    found = View(store, snapshots.load(store, name))
    found.require(found.specs)
    return found


def values(view):
    return [float(view.read(AUDIO.id, take(n).clip.id)[0, 0]) for n in range(3)]


def test_a_snapshot_reads_what_it_named_after_all_else_has_changed(store):
    taken = snapshots.take(store, "base")
    for value in range(3, 9):  # other bytes for the same rows, some under lower fragment ids
        publish(store, value, 0, 1, 2, 3)
    publish(store, 1, 7, spec=OTHER)
    store.publish_takes("d", [take(n, split="train") for n in range(4)], HERE)
    compact(store)
    fresh = Store.open(store.path)
    assert [float(fresh.read(AUDIO.id, take(n).clip.id)[0, 0]) for n in range(3)] != [1, 1, 2]
    seen = view(fresh, "base")
    assert values(seen) == [1, 1, 2]
    assert set(seen.specs) == {AUDIO.id}
    assert [(one.dataset, one.subject, one.split) for one in seen.listed_takes()] == [
        *[("d", "anna", "")] * 3, ("e", "also anna", ""),
    ]  # fmt: skip
    assert [one.subject for one in seen.takes()] == ["anna", "anna", "anna", "also anna"]
    assert seen.length(AUDIO.id, take(0).clip.id) == 4
    assert not seen.has(AUDIO.id, take(3).clip.id)
    with pytest.raises(NotFound, match="as snapshot base has it"):
        seen.read(AUDIO.id, take(3).clip.id)
    assert snapshots.load(fresh, "base") == taken
    assert snapshots.load(fresh, "base").id == taken.id


def test_a_name_is_taken_once_and_for_ever(store):
    first = snapshots.take(store, "base")
    assert snapshots.take(store, "base") == first
    publish(store, 5, 5)
    with pytest.raises(AlreadyThere, match=r"a snapshot 'base' of other content is in .* take another name"):
        snapshots.take(store, "base")
    assert snapshots.take(store, "next").id != first.id
    assert snapshots.names(store) == ["base", "next"]
    with pytest.raises(BadInput, match=r"'\.\./x' is no name of a snapshot"):
        snapshots.take(store, "../x")
    with pytest.raises(NotFound, match=r"no snapshot 'nope' in .*; it has base, next"):
        snapshots.load(store, "nope")


def test_content_alone_decides_the_id(store, tmp_path):
    taken = snapshots.take(store, "base")
    shutil.copytree(store.path, tmp_path / "copy")
    copy = Store.open(tmp_path / "copy")
    compact(copy)
    copy.refresh()
    assert snapshots.take(copy, "renamed").id == taken.id


def test_what_is_lost_is_named(store):
    snapshots.take(store, "base")
    (two,) = [one for one in store.fragments() if len(one.lengths) == 1]
    store.mark_damaged(two.location, "test")
    publish(store, 9, 2)  # computed anew, and not the same
    with pytest.raises(NotFound, match=r"^1 clips of snapshot base are not in .* as they were \(take_2\)"):
        view(store, "base")
    publish(store, 2, 2)
    assert values(view(store, "base")) == [1, 1, 2]
    remove(store, clips=["take_0"])
    with pytest.raises(NotFound, match=r"\(take_0\)"):
        view(store, "base")


def test_rows_that_changed_on_the_disk_are_not_read(store):
    snapshots.take(store, "base")
    (two,) = [one for one in store.fragments() if len(one.lengths) == 1]
    path = store.path / two.folder / "values/c/0/0"
    path.chmod(0o644)
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    seen = view(Store.open(store.path), "base")
    with pytest.raises(StoreCorrupt, match=f"clip {take(2).clip.id} in .* is not as it was written"):
        seen.read(AUDIO.id, take(2).clip.id)


def test_any_flipped_byte_of_a_snapshot_is_noticed(store):
    snapshots.take(store, "base")
    path = store.path / "snapshots/base.jsonl"
    whole = path.read_bytes()
    path.chmod(0o644)
    for offset in range(0, len(whole), 23):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 4]) + whole[offset + 1 :])
        with pytest.raises(StoreCorrupt):
            snapshots.load(store, "base")


# -- fit


@pytest.fixture(scope="module")
def run(fitted, tmp_path_factory):
    """A store of our own and the run fitted on it."""
    from pmm.train.run import FitOptions, fit

    root = tmp_path_factory.mktemp("snapshots")
    shutil.copytree(fitted / "store", root / "store")
    store = Store.open(root / "store")
    return store, fit(store, root / "run", FitOptions(epochs=2, device="cpu"))


def grow(store):
    """Six more people, and other bytes for what is there; then all of it in other fragments."""
    for spec_id, spec in dict(store.specs).items():
        rows = [(row, np.array(store.read(spec_id, row))) for row in store.rows(spec_id)]
        store.publish(spec, [(row, values[::-1].copy()) for row, values in rows], {"by": "another device"})
        new = [(hashlib.sha256(row.encode()).hexdigest(), values) for row, values in rows]
        store.publish(spec, new, {})
    old = store.takes()
    renamed = [
        dataclasses.replace(
            one,
            clip=dataclasses.replace(one.clip, id=hashlib.sha256(one.clip.id.encode()).hexdigest()),
            target=hashlib.sha256(one.target.encode()).hexdigest(),
            subject=f"new {one.subject}",
        )
        for one in old
    ]
    store.publish_takes("grown", renamed, HERE)
    compact(store)
    return Store.open(store.path)


def test_every_fit_can_be_repeated_after_the_store_has_grown(run, tmp_path):
    from pmm.train.run import FitOptions, fit, read_config

    store, first = run
    name = first.content.snapshot
    assert (first.content.unpinned, snapshots.names(store)) == ("", [name])
    assert read_config(first.path)["content"] == dataclasses.asdict(first.content)
    assert snapshots.load(store, name).id == first.content.id
    grown = grow(store)
    again = fit(grown, tmp_path / "again", FitOptions(epochs=2, device="cpu", snapshot=name))
    assert again.content == first.content
    weights = [(path / "best.safetensors").read_bytes() for path in (first.path, again.path)]
    assert weights[0] == weights[1]
    other = fit(grown, tmp_path / "other", FitOptions(epochs=2, device="cpu"))
    assert other.content.snapshot != name
    assert (other.clips, other.best_lve) != (first.clips, first.best_lve)
    resumed = fit(grown, first.path, FitOptions(epochs=2, device="cpu"), resume=True)
    assert resumed.best_lve == first.best_lve


def test_fit_of_a_snapshot_that_is_not_whole_names_the_clips(run, tmp_path):
    from pmm.train.run import FitOptions, fit

    store, _ = run
    shutil.copytree(store.path, tmp_path / "store")
    mine = Store.open(tmp_path / "store")
    snapshots.take(mine, "base")
    source = min(one.source for one in mine.takes())
    remove(mine, clips=[source])
    with pytest.raises(NotFound, match=rf"1 clips of snapshot base are not in .* \({source}\)"):
        fit(mine, tmp_path / "run", FitOptions(epochs=1, device="cpu", snapshot="base"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody who may not write")
def test_fit_goes_on_where_it_may_only_read_and_says_so(run, fitted, tmp_path_factory):
    from pmm.train.run import FitOptions, fit  # all it needs is loaded: `run` was fitted in this process

    folder = tmp_path_factory.mktemp("read-only")
    shutil.copytree(fitted / "store", folder / "store")
    (folder / "home").mkdir()
    os.chown(folder / "home", 54321, -1)
    before = snapshots.names(Store.open(folder / "store"))
    for path in (folder, folder.parent, folder.parent.parent):
        path.chmod(0o755)
    os.seteuid(54321)
    try:
        done = fit(
            Store.open(folder / "store"), folder / "home/run", FitOptions(epochs=1, device="cpu", seed=7)
        )
    finally:
        os.seteuid(0)
    assert done.content.snapshot.startswith("fit-")
    assert done.content.unpinned.endswith("Permission denied")
    assert snapshots.names(Store.open(folder / "store")) == before
