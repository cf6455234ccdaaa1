"""Runs that work on one dataset at once share it; a claim that nobody stands behind costs only time."""

import os
import subprocess
import sys
import time

import pytest

from pmm.precompute import claims, models
from pmm.precompute.claims import Claims
from pmm.precompute.run import Limits, precompute
from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.digest import sealed

SPECS = ["a" * 64, "b" * 64]


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "store")


def drafts(store):
    folder = store.path / "tmp"
    return sorted(os.listdir(folder)) if folder.exists() else []


def plant(store, name, clips, host="elsewhere", pid=1, specs=SPECS):
    told = {"host": host, "pid": pid, "specs": specs, "clips": clips}
    store.medium.create(f"tmp/claim-{name}.json", sealed(told))


def test_two_runs_take_different_clips(store):
    one, other = Claims(store, SPECS), Claims(store, SPECS[:1])
    assert one.take(["x", "y"]) == {"x", "y"}
    assert other.take(["x", "y", "z"]) == {"z"}
    assert (one.taken(), other.taken()) == ({"z"}, {"x", "y"})
    one.release(["x"])
    assert other.taken() == {"x", "y"}  # one batch, not yet published whole
    one.release(["x", "y"])
    assert other.take(["x", "y"]) == {"x", "y"}
    other.release_all()
    assert drafts(store) == []


def test_who_works_on_other_features_is_not_in_the_way(store):
    Claims(store, SPECS[:1]).take(["x"])
    assert Claims(store, SPECS[1:]).take(["x"]) == {"x"}


def test_of_two_who_claim_at_once_the_lower_name_has_it(store, monkeypatch):
    one = Claims(store, SPECS)
    create = type(store.medium).create

    def and_so_does_another(medium, key, data):
        monkeypatch.undo()
        plant(store, "0" * 32, ["x"])
        plant(store, "f" * 32, ["y"])
        return create(medium, key, data)

    monkeypatch.setattr(type(store.medium), "create", and_so_does_another)
    assert one.take(["x", "y"]) == {"y"}


def test_a_claim_of_a_process_that_is_gone_is_taken_away(store):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    plant(store, "0" * 32, ["x"], host=claims._host(), pid=gone.pid)
    plant(store, "1" * 32, ["y"], host=claims._host(), pid=os.getppid())
    assert Claims(store, SPECS).take(["x", "y"]) == {"x"}
    assert f"claim-{'0' * 32}.json" not in drafts(store)
    assert f"claim-{'1' * 32}.json" in drafts(store)


def test_what_is_no_claim_is_ignored(store):
    for name, data in (("0", b""), ("1", sealed({"clips": 3})), ("2", b"{}")):
        store.medium.create(f"tmp/claim-{name}.json", data)
    store.medium.create("tmp/something", b"")
    assert Claims(store, SPECS).take(["x"]) == {"x"}
    assert len(drafts(store)) == 5


def run(captures, store, **limits):
    done = precompute([captures], store.path, models.resolve("tiny"), limits=Limits(**limits))
    store.refresh()
    return done


def test_a_quiet_claim_is_waited_for_and_no_longer(captures, store):
    clips = {source.take.clip.id for source in run(captures, store, batch_seconds=1)[0].sources}
    fresh = Store.create(store.path.parent / "other")
    specs = sorted(store.specs)
    plant(fresh, "0" * 32, sorted(clips)[:2], specs=specs)
    began = time.monotonic()
    _, outcome = run(captures, fresh, batch_seconds=1, patience_seconds=3)
    assert time.monotonic() - began > 3
    assert outcome.clips == 4
    assert {spec: len(fresh.rows(spec)) for spec in fresh.specs} == dict.fromkeys(specs, 4)


def test_what_another_publishes_while_we_wait_is_not_computed(captures, store):
    seen, _ = run(captures, store)
    fresh = Store.create(store.path.parent / "other")
    clips = sorted({source.take.clip.id for source in seen.sources})
    plant(fresh, "0" * 32, clips[:2], specs=sorted(store.specs))

    def the_other_gets_on(event):
        if type(event).__name__ == "ClipDone" and event.clip in clips[2:]:
            for one in store.fragments():
                rows = [(row, store.read(one.spec_id, row)) for row in one.row_ids]
                fresh.publish(store.specs[one.spec_id], rows, {})
            fresh.medium.delete(f"tmp/claim-{'0' * 32}.json")

    _, outcome = precompute([captures], fresh.path, models.resolve("tiny"), on_event=the_other_gets_on)
    assert outcome.clips == 2
    assert drafts(fresh) == []


def test_two_processes_share_a_dataset(captures, pmm_process, tmp_path):
    store = tmp_path / "store"
    command = ("precompute", captures, "--store", store, "--batch-seconds", 1)
    done = [(process, process.communicate()) for process in [pmm_process(*command) for _ in range(2)]]
    assert [process.returncode for process, _ in done] == [0, 0], done
    found = Store.open(store)
    assert [len(found.rows(spec)) for spec in found.specs] == [4, 4, 4, 4]
    written = sum(len(one.lengths) for one in found.fragments())
    assert 16 <= written < 24, f"{written} rows were computed where 16 are needed"
    assert verify(found).clean
    assert drafts(found) == []


def test_who_is_stopped_does_not_count_as_left_what_others_did(captures, store):
    seen, _ = run(captures, store)
    fresh = Store.create(store.path.parent / "other")
    clips = [item.clip.id for item in seen.work]
    plant(fresh, "0" * 32, clips[2:3], specs=sorted(store.specs))
    done = []

    def another_publishes_the_third(event):
        if type(event).__name__ == "ClipDone":
            done.append(event.clip)
            if len(done) == 2:
                for one in store.fragments():
                    own = [row for row in one.row_ids if row == clips[2]]
                    own += [s.take.target for s in seen.sources if s.take.clip.id == clips[2]]
                    rows = [(row, store.read(one.spec_id, row)) for row in own if row in one.row_ids]
                    fresh.publish(store.specs[one.spec_id], rows, {})

    _, outcome = precompute(
        [captures],
        fresh.path,
        models.resolve("tiny"),
        limits=Limits(1.0),
        on_event=another_publishes_the_third,
        stopping=lambda: len(done) >= 2,
    )
    assert (done, outcome.clips, outcome.left) == (clips[:2], 2, 1)
