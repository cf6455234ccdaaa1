"""The longer forms of test_cluster.py: many clips, many killed workers, and the ends of local clusters."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..conftest import write_take
from ..test_cluster import Cluster, Reference, Run, check_same, done_of, run_alone, until

CLIPS = 200


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    root = tmp_path_factory.mktemp("many")
    rng = random.Random(0)
    for number in range(CLIPS):
        write_take(root / "corpus", f"s{number % 7}", f"take_{number}", rng.uniform(0.5, 3), number)
    return run_alone(root)


def start(corpus: Path, store: Path, *options: object, **env: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a terminal has it."""
    command = [Path(sys.executable).parent / "pmm", "precompute", corpus, "--store", store, *options]
    return subprocess.Popen(
        [str(one) for one in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_200_clips_on_workers_that_are_killed(
    pmm: Run, pmm_process: Run, many: Reference, tmp_path: Path, workers: int
) -> None:
    cluster, store, rng, kills = (
        Cluster(tmp_path).with_workers(workers),
        tmp_path / "store",
        random.Random(1),
        0,
    )
    try:
        process = pmm_process(
            "precompute", many.corpus, "--store", store, "--batch-seconds", 5, "--scheduler", cluster.address
        )
        until(lambda: list(store.glob("records/*/*.json")) or process.poll() is not None)
        while process.poll() is None:
            victim = rng.choice(cluster.workers)
            victim.kill()
            victim.wait()
            kills += process.poll() is None
            cluster.with_workers(workers)
            end = time.monotonic() + rng.uniform(5, 20)
            until(lambda end=end: time.monotonic() > end or process.poll() is not None)
        done = done_of(process)
    finally:
        cluster.end()
    assert kills
    failed = [line for line in done.err.splitlines() if line.startswith("pmm: failed")]
    assert done.code == 0, failed
    assert pmm("store", "verify", store).code == 0
    check_same(store, many)


def test_an_interrupt_twice_ends_everything_at_once(pmm: Run, many: Reference, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = start(many.corpus, store, "--workers", 2)
    until(lambda: list(store.glob("tmp/claim-*.json")) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    done = done_of(process)
    assert done.code == 130
    assert done.err.endswith("run the same command again to go on\n")
    until(lambda: not alive(process.pid), 20)
    assert pmm("store", "verify", store).code == 0


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_that_die_of_the_models_are_no_clip_s_fault(many: Reference, tmp_path: Path) -> None:
    preload = tmp_path / "preload.py"
    preload.write_text(
        "import os\nfrom pmm.precompute import models\n"
        "def dask_setup(worker):\n    models.load = lambda *args, **options: os._exit(1)\n"
    )
    store = tmp_path / "store"
    process = start(many.corpus, store, "--workers", 2, DASK_DISTRIBUTED__WORKER__PRELOAD=f'["{preload}"]')
    done = done_of(process)
    assert done.code == 1
    assert "they may lack the memory for these models" in done.complaint
    assert not list(store.glob("failures/*"))
