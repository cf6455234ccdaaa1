"""The plan: pure, so it is tested without a file, a model or a store."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pmm import BadInput
from pmm.precompute.forecast import Forecast, refuse_too_large
from pmm.precompute.plan import (
    Choice,
    Source,
    batches,
    clip_bytes,
    failed_before,
    make_plan,
    row_bytes,
    row_count,
)
from pmm.store.catalog import Failure
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


def ids(plan) -> set[int]:
    return {int(item.clip.id, 16) for item in plan.work}


def test_a_limit_takes_the_first_that_lack_something_and_counts_the_rest() -> None:
    sources = [source(n, seconds) for n, seconds in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.0))]
    plan = make_plan(sources, SPECS, lambda spec, row: int(row.strip("t"), 16) == 1, limit=2)
    assert (ids(plan), plan.left_out, plan.work_seconds) == ({2, 3}, 1, 3.0)
    assert [(share.cached, share.missing) for share in plan.shares] == [(1, 2)] * 3
    assert plan.bytes == sum(row_bytes(spec, item.clip) for spec in SPECS.values() for item in plan.work)
    told = plan.to_json()
    assert (told["clips_to_compute"], told["clips_left_out"], told["seconds_to_compute"]) == (2, 1, 3.0)
    assert make_plan(sources, SPECS, lambda spec, row: False, limit=9).left_out == 0


def test_only_some_features_are_planned() -> None:
    plan = make_plan([source(1)], {"image": IMAGE}, lambda spec, row: False)
    assert [share.spec for share in plan.shares] == [IMAGE]
    assert (plan.work[0].features, plan.work[0].targets) == ({"image"}, ())


def test_what_failed_is_known_by_its_clip_or_by_its_file() -> None:
    sources = [source(1), source(2), source(3)]
    by_name = Source(Take(sources[2].take.clip, "t3", "ada", source="ada/take_3"), Path("3.wav"), None)
    failures = [
        Failure(sources[0].take.clip.id, "wherever", "features", "NaN"),
        Failure("file:" + "0" * 64, "ada/take_3", "probe", "is empty"),
    ]
    failed = failed_before(failures)
    assert [failed(one) for one in (*sources, by_name)] == [True, False, False, True]
    everything = [*sources[:2], by_name]
    assert ids(make_plan(everything, SPECS, lambda spec, row: False, failed)) == {1, 3}
    assert ids(make_plan(everything, SPECS, lambda spec, row: False, lambda one: not failed(one))) == {2}


def test_a_clip_of_two_sources_is_wanted_if_either_is() -> None:
    both = [source(1), source(1, target="u", subject="bob")]
    plan = make_plan(both, SPECS, lambda spec, row: False, lambda one: one.take.subject == "bob")
    assert len(plan.work[0].targets) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"only": frozenset({"audio", "smell"})},
        {"only": frozenset()},
        {"limit": 0},
        {"retry_failed": True, "skip_failed": True},
    ],
)
def test_a_choice_that_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(BadInput):
        Choice(**wrong)


def test_memory_grows_with_the_longest_clip_and_with_what_is_computed() -> None:
    minute, hour = (make_plan([source(1, s)], SPECS, lambda spec, row: False).work[0] for s in (60, 3600))
    assert clip_bytes(hour, SPECS) == pytest.approx(60 * clip_bytes(minute, SPECS), rel=1e-3)
    only_audio = make_plan([source(1, 60)], {"audio": AUDIO}, lambda spec, row: False).work[0]
    assert clip_bytes(only_audio, SPECS) == 60 * 16_000 * 8 + row_bytes(AUDIO, only_audio.clip)


def test_a_disk_too_small_is_told_with_both_numbers_and_a_bucket_never_is() -> None:
    def wanting(free: int | None) -> Forecast:
        return Forecast(disk=2_000_000_000, free_disk=free, memory=10, free_memory=5, seconds=None)

    with pytest.raises(
        BadInput, match=r"^2\.0 GB are to be written and the disk of /data has 1\.5 GB free; "
    ):
        refuse_too_large(wanting(1_500_000_000), "/data")
    refuse_too_large(wanting(2_000_000_000), "/data")
    refuse_too_large(wanting(None), "s3://bucket")
    assert wanting(None).tight


def test_a_plan_travels() -> None:
    plan = make_plan([source(1)], SPECS, lambda spec, row: False, limit=1)
    assert pickle.loads(pickle.dumps(plan)) == plan  # noqa: S301
