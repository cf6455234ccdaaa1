"""The stages of a run at once: order kept, memory bounded, time accounted for, errors told, all ended."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pmm.precompute.claims import Claims
from pmm.precompute.pipeline import Behind, Meter, Pace, ahead
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec

AUDIO = FeatureSpec("audio", "test/1", "float16", (4,), None, {})


def slowly(seconds: float):
    def prepare(item: int) -> int:
        time.sleep(seconds * (item % 3))
        return item * item

    return prepare


def test_results_come_in_order_whatever_the_timing() -> None:
    groups = [[1, 2, 3], [5], [4, 6], [], [7, 8]]
    with closing(ahead(iter(groups), slowly(0.01), lambda _: 1, 100, 4, Meter())) as ready:
        assert list(ready) == [(group, [item * item for item in group]) for group in groups]


def test_what_is_ahead_is_bounded_in_groups_and_bytes() -> None:
    made: list[int] = []

    def groups():
        for number in range(10):
            made.append(number)
            yield [number]

    def furthest(limit: int) -> int:
        made.clear()
        most = 0
        with closing(ahead(groups(), lambda item: item, lambda _: 10, limit, 2, Meter())) as ready:
            for (number,), _ in ready:
                time.sleep(0.02)
                most = max(most, len(made) - number - 1)
        return most

    assert furthest(1000) == 2  # groups
    assert furthest(20) == 2  # this one, and one more of 10 bytes; the third is named and waits
    assert furthest(5) == 1  # each alone: only named


def test_a_failure_ahead_is_raised_in_its_turn() -> None:
    def groups():
        yield [1]
        yield [2]
        raise OSError("the store is gone")

    seen = []
    with (
        pytest.raises(OSError, match="gone"),
        closing(ahead(groups(), slowly(0), lambda _: 1, 100, 2, Meter())) as ready,
    ):
        seen += [results for _, results in ready]
    before = threading.active_count()

    def prepare(item: int) -> int:
        return 1 // (item - 2)

    with (
        pytest.raises(ZeroDivisionError),
        closing(ahead(iter([[1], [2], [3]]), prepare, lambda _: 1, 100, 2, Meter())) as ready,
    ):
        list(ready)
    assert threading.active_count() == before


def test_leaving_early_ends_every_thread() -> None:
    before = threading.active_count()
    with closing(ahead(iter([[n] for n in range(100)]), slowly(0.001), lambda _: 1, 2, 2, Meter())) as ready:
        next(ready)
    assert threading.active_count() == before


def test_jobs_behind_are_done_in_order_and_bounded_in_bytes() -> None:
    done, meter, gate = [], Meter(), threading.Event()
    behind = Behind(100, meter)
    behind.do(gate.wait, 60)
    behind.do(lambda: done.append(1), 40)
    blocked = threading.Thread(target=behind.do, args=(lambda: done.append(2), 60))
    blocked.start()
    blocked.join(0.2)
    assert blocked.is_alive()
    gate.set()
    blocked.join()
    behind.do(lambda: done.append(3), 1000)  # larger than the bound: alone
    behind.finish()
    assert done == [1, 2, 3]
    assert meter.pace.for_disk >= 0.15
    assert meter.pace.disk >= 0.15


def test_a_failure_behind_is_raised_and_nothing_follows_it() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("disk full")

    behind = Behind(100, Meter())
    behind.do(fail)
    with pytest.raises(OSError, match="full"):
        [behind.do(lambda: time.sleep(0.001) or done.append(1)) for _ in range(100_000)]
    with pytest.raises(OSError, match="full"):
        behind.finish()
    assert not any(thread.name == "disk" for thread in threading.enumerate())
    assert done == []


def test_a_writer_that_is_blocked_is_woken_by_a_failure() -> None:
    gate = threading.Event()

    def fail() -> None:
        gate.wait()
        raise OSError("disk full")

    behind = Behind(10, Meter())
    behind.do(fail, 10)
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(OSError, match="full"):
        behind.do(lambda: None, 10)
    with pytest.raises(OSError, match="full"):
        behind.finish()


def test_what_is_due_is_done_while_nothing_comes() -> None:
    ticks: list[float] = []
    behind = Behind(10, Meter(), idle=lambda: ticks.append(time.monotonic()))
    time.sleep(1.2)
    behind.finish()
    assert len(ticks) == 1


@pytest.mark.parametrize(
    ("pace", "stage"),
    [
        (Pace(models=10, for_decode=0.5, for_disk=0.5, decode=10, disk=10), "models"),
        (Pace(models=10, for_decode=3, for_disk=1), "decode"),
        (Pace(models=10, for_decode=1, for_disk=30), "disk"),
    ],
)
def test_the_stage_that_is_waited_for_is_the_bottleneck(pace: Pace, stage: str) -> None:
    assert pace.bottleneck == stage
    later = replace(pace, audio=30.0, elapsed=12.0) + Pace(audio=10, elapsed=8, models=1000)
    assert (later - Pace(models=1000)).bottleneck == stage
    assert later.speed == 2.0


def stage_of(decode: float, models: float, disk: float) -> Pace:
    """Twenty groups through stages that take so long for each."""
    meter = Meter()
    behind = Behind(2, meter)
    groups = iter([[number] for number in range(20)])
    with closing(ahead(groups, lambda _: time.sleep(decode), lambda _: 1, 100, 1, meter)) as ready:
        for _ in ready:
            with meter.timing("models"):
                time.sleep(models)
            behind.do(lambda: time.sleep(disk), 1)
    behind.finish()
    return meter.pace


def test_stages_overlap_and_the_slow_one_is_named() -> None:
    for slow in ("decode", "models", "disk"):
        stages = {"decode": 0.002, "models": 0.002, "disk": 0.002, slow: 0.03}
        pace = stage_of(**stages)
        assert pace.bottleneck == slow
        accounted = pace.models + pace.for_decode + pace.for_disk
        assert 0.8 * pace.elapsed <= accounted <= pace.elapsed
        assert pace.elapsed < 0.9 * (pace.decode + pace.models + pace.disk)


# ---------------------------------------------------------------- what the threads share


@pytest.fixture
def hurried():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def rows(number: int) -> list[tuple[str, np.ndarray]]:
    return [(f"{number:064x}", np.full((3, 4), number, np.float16))]


def test_one_store_is_published_to_refreshed_and_asked_by_several_threads(hurried, tmp_path: Path) -> None:
    store, errors = Store.create(tmp_path / "store"), []
    done = threading.Event()
    published: list[str] = []

    def watched(work) -> threading.Thread:
        def run() -> None:
            try:
                while not done.is_set():
                    work()
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    def ask() -> None:
        known = list(published)
        assert [row for row in known if not store.has(AUDIO.id, row)] == []  # never gone again

    others = [watched(store.refresh), watched(ask), watched(ask)]
    for one in others:
        one.start()
    for number in range(45):
        store.publish(AUDIO, rows(number), {})
        published.append(f"{number:064x}")
    done.set()
    for one in others:
        one.join()
    assert errors == []
    assert store.rows(AUDIO.id) == Store.open(tmp_path / "store").rows(AUDIO.id)


def test_claims_are_taken_and_released_by_two_threads(hurried, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    claims, errors = Claims(store, [AUDIO.id]), []
    taken: list[str] = []

    def release() -> None:
        try:
            while len(taken) < 100:
                claims.release(list(taken))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=release)
    thread.start()
    for number in range(100):
        name = f"{number:064x}"
        assert claims.take([name]) == {name}
        taken.append(name)
    thread.join()
    claims.release_all()
    assert errors == []
    assert [entry.key for entry in store.medium.list("tmp")] == []
