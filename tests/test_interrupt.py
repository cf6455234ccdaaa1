"""Ctrl-C in the middle of a precompute run, with real processes and real signals."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pmm.store.care import verify
from pmm.store.catalog import Store

from .conftest import write_take

Run = Callable[..., subprocess.Popen[str]]
CLIPS = 12
ONCE = "pmm: stopping after this batch, to publish what is computed; Ctrl-C again stops at once"
TWICE = "pmm: stopped at once; what was published is kept: run the same command again to go on"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve takes whose lengths grow, so that batches of one clip come in a known order."""
    root = tmp_path_factory.mktemp("interrupt") / "corpus"
    for number in range(CLIPS):
        write_take(root, ("ada", "bob")[number % 2], f"take_{number}", 2.0 + 0.25 * number, number)
    return root


def start(pmm_process: Run, corpus: Path, store: Path, batch_seconds: int = 1) -> subprocess.Popen[str]:
    """A run of batches of one clip, or more, that publishes nearly every row at once."""
    small = ("--batch-seconds", batch_seconds, "--fragment-mb", 0.001)
    return pmm_process("precompute", corpus, "--store", store, *small, "--json")


def wait_for_records(process: subprocess.Popen[str], store: Path, count: int) -> None:
    while process.poll() is None and len(list(store.glob("records/*/*.json"))) < count:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()


def published(store: Path) -> Counter[tuple[str, str]]:
    return Counter((one.spec_id, row) for one in Store.open(store).fragments() for row in one.row_ids)


def complete(pmm: Callable[..., object], corpus: Path, store: Path) -> dict:
    """Run it to its end; what it said."""
    done = pmm("precompute", corpus, "--store", store, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert verify(Store.open(store)).clean
    assert set(published(store).values()) == {1}
    assert len(published(store)) == 4 * CLIPS
    return report


def test_once_finishes_the_batch_and_publishes_what_is_computed(
    pmm: Callable[..., object], pmm_process: Run, corpus: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    process = start(pmm_process, corpus, store)
    wait_for_records(process, store, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert ONCE in err
    assert "Traceback" not in err
    outcome = json.loads(out)["outcome"]
    left = outcome["clips_left"]
    assert 0 < left < CLIPS  # in the middle
    assert outcome["clips"] == CLIPS - left
    assert f"pmm: interrupted, {left} clip{'s' * (left > 1)} left; what is computed is published" in err
    kept = published(store)
    assert len(kept) == 4 * (CLIPS - left)  # whole clips: of each its four features
    assert verify(Store.open(store)).clean
    assert not list(store.glob("tmp/claim-*"))
    report = complete(pmm, corpus, store)
    assert report["outcome"]["clips"] == left
    assert kept < published(store)


def interrupted_twice(pmm_process: Run, corpus: Path, store: Path) -> str:
    """What it said; the second time comes while a batch of seconds is under way."""
    process = start(pmm_process, corpus, store, batch_seconds=20)
    wait_for_records(process, store, 3)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while ONCE not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - began < 5
    assert "Traceback" not in err
    return err


def test_twice_stops_at_once_and_corrupts_nothing(
    pmm: Callable[..., object], pmm_process: Run, corpus: Path, tmp_path: Path
) -> None:
    for attempt in range(3):
        store = tmp_path / f"store-{attempt}"
        if TWICE in interrupted_twice(pmm_process, corpus, store):
            break  # else it had just stopped by itself, which is another test
    else:
        pytest.fail("three runs ended before they could be interrupted a second time")
    assert verify(Store.open(store)).clean
    kept = published(store)
    assert 0 < len(kept) < 4 * CLIPS
    report = complete(pmm, corpus, store)
    assert sum(report["outcome"]["rows"].values()) == 4 * CLIPS - len(kept)
