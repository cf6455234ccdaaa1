"""The plan: pure, so it is tested without a file, a model or a store."""

from __future__ import annotations

from pathlib import Path

from pmm.precompute.plan import Source, batches, make_plan, row_count
from pmm.store.clip import Clip, Take
from pmm.store.feature import FeatureSpec

AUDIO = FeatureSpec("audio", "test/1", "float16", (8,), None, {})
IMAGE = FeatureSpec("image", "test/1", "uint8", (4, 4, 3), 30, {})
TARGET = FeatureSpec("target", "test/1", "float32", (52,), 30, {})
SPECS = {"audio": AUDIO, "image": IMAGE, "target": TARGET}


def source(number: int, seconds: float = 1.0, target: str | None = "t", subject: str = "ada") -> Source:
    clip = Clip(f"{number:064x}", 48_000, 1, 0, round(seconds * 48_000))
    name = None if target is None else f"{target}{number}"
    return Source(Take(clip, name, subject), Path(f"{number}.wav"), Path(f"{number}.csv") if target else None)


def test_everything_is_missing_from_an_empty_store() -> None:
    plan = make_plan([source(1), source(2, 2.0)], SPECS, lambda spec, row: False)
    assert (plan.clips, plan.seconds) == (2, 3.0)
    assert [(share.cached, share.missing) for share in plan.shares] == [(0, 2)] * 3
    steps, frames = 49 + 99, 30 + 60
    assert [share.bytes for share in plan.shares] == [steps * 8 * 2, frames * 48, frames * 52 * 4]
    assert plan.bytes == plan.to_json()["bytes"] == sum(share.bytes for share in plan.shares)


def test_a_full_store_leaves_no_work() -> None:
    plan = make_plan([source(1), source(2)], SPECS, lambda spec, row: True)
    assert (plan.work, plan.bytes) == ((), 0)
    assert [(share.cached, share.missing) for share in plan.shares] == [(2, 0)] * 3


def test_an_edited_face_track_asks_for_its_targets_alone() -> None:
    plan = make_plan([source(1), source(2)], SPECS, lambda spec, row: row != "t2")
    (work,) = plan.work
    assert work.features == frozenset()
    assert [s.take.target for s in work.targets] == ["t2"]


def test_one_clip_under_two_subjects_is_heard_once() -> None:
    plan = make_plan([source(1), source(1, target="u", subject="bob")], SPECS, lambda spec, row: False)
    (work,) = plan.work
    assert plan.clips == 1
    assert work.features == {"audio", "image"}
    assert sorted(s.take.target or "" for s in work.targets) == ["t1", "u1"]


def test_audio_without_a_face_needs_no_target() -> None:
    plan = make_plan([source(1, target=None)], SPECS, lambda spec, row: False)
    assert plan.work[0].targets == ()
    assert plan.shares[2].missing == 0


def test_work_comes_by_length_whatever_the_order_found() -> None:
    sources = [source(n, seconds) for n, seconds in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.0))]
    plan = make_plan(sources, SPECS, lambda spec, row: False)
    assert plan.work == make_plan(sources[::-1], SPECS, lambda spec, row: False).work
    assert [w.clip.seconds for w in plan.work] == [1.0, 1.0, 2.0, 3.0]


def test_batches_stay_within_their_padded_length_and_lose_nothing() -> None:
    work = make_plan([source(n, n / 2) for n in range(1, 13)], SPECS, lambda spec, row: False).work
    made = batches(work, 10.0)
    assert [item for batch in made for item in batch] == list(work)
    assert all(max(w.clip.seconds for w in batch) * len(batch) <= 10.0 for batch in made)
    assert len(made) < len(work)
    assert [len(batch) for batch in batches(work, 0.1)] == [1] * 12


def test_rows_follow_the_clock() -> None:
    clip = source(1, 2.0).take.clip
    assert (row_count(AUDIO, clip), row_count(IMAGE, clip)) == (99, 60)
