"""Precompute on a cluster, with real schedulers and workers: equal results, and what dies with whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest

from pmm.precompute import cluster
from pmm.precompute.claims import Claims
from pmm.precompute.plan import Plan, Share, Work
from pmm.precompute.run import Limits
from pmm.precompute.tasks import DEATHS, Task, cut
from pmm.store.catalog import Store
from pmm.store.clip import Clip
from pmm.store.feature import FeatureSpec

from .conftest import Done, write_take

Run = Callable[..., Any]

DEADLY = "deadly"

PRELOAD = f"""
import os
import torch, transformers  # before the first task: several workers start at once
from pmm.precompute import media

def deadly(path, *args, real=media.decode, **kwargs):
    if "{DEADLY}" in path.name:
        os._exit(1)
    return real(path, *args, **kwargs)

def dask_setup(worker):
    media.decode = deadly
"""
"""What the tests' workers preload: they die of sound files of that name, as of a broken codec."""


# ---------------------------------------------------------------- a cluster as people start one


@dataclass
class Cluster:
    """`dask scheduler` and `dask worker`s without a nanny: who is killed stays dead."""

    folder: Path
    scheduler: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return json.loads((self.folder / "scheduler.json").read_text())["address"]

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            where = ("--scheduler-file", str(self.folder / "scheduler.json"), "--no-dashboard")
            return subprocess.Popen(
                [sys.executable, "-m", "distributed.cli." + command[0], *where, *command[1:]],
                cwd=self.folder,
                env=env,
                stdout=log,
                stderr=log,
            )

    def begin(self) -> None:
        (self.folder / "scheduler.json").unlink(missing_ok=True)
        self.scheduler = self.start("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
        until((self.folder / "scheduler.json").exists)

    def with_workers(self, number: int) -> Cluster:
        """A scheduler that lives, and so many workers that do."""
        if self.scheduler is None or self.scheduler.poll() is not None:
            self.end()
            self.begin()
        self.workers = [one for one in self.workers if one.poll() is None]
        preload = self.folder / "preload.py"
        preload.write_text(PRELOAD)
        while len(self.workers) < number:
            options = ("--no-nanny", "--nthreads", "1", "--memory-limit", "0", "--preload", str(preload))
            self.workers.append(self.start("dask_worker", *options))
        return self

    def end(self) -> None:
        for process in (*self.workers, *([self.scheduler] if self.scheduler else [])):
            process.kill()
            process.wait()
        self.workers = []


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.end()


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


# ---------------------------------------------------------------- what it is to give

TAKES = 20
SMALL = ("--batch-seconds", "2")


@dataclass(frozen=True)
class Reference:
    """A corpus, and the store that a run in one process makes of it; which libraries that run imported."""

    corpus: Path
    store: Path
    imported: frozenset[str]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    root = tmp_path_factory.mktemp("reference")
    for number in range(TAKES):
        write_take(
            root / "corpus", f"s{number % 3}", f"take_{number}", 0.7 + 0.05 * (7 * number % TAKES), number
        )
    return run_alone(root)


def run_alone(root: Path) -> Reference:
    """What a process of its own, without a cluster, makes of ``corpus`` in ``root``."""
    program = (
        "import sys; from pmm.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('imported', *{name.partition('.')[0] for name in sys.modules})"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "precompute",
        root / "corpus",
        "--store",
        root / "store",
        *SMALL,
    ]
    out = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return Reference(root / "corpus", root / "store", frozenset(out.splitlines()[-1].split()))


def check_same(made: Path, reference: Reference) -> None:
    """Every row once, and as in the reference: one unit of float16, or 1e-3 of what is large."""
    ours, theirs = Store.open(made), Store.open(reference.store)
    assert published(ours) == published(theirs)
    assert set(published(ours).values()) == {1}
    assert {take.id for take in ours.takes()} == {take.id for take in theirs.takes()}
    for name, spec in theirs.specs.items():
        for row in theirs.rows(name):
            one, other = (store.read(name, row).astype(np.float64) for store in (ours, theirs))
            allowed = 1.0 if spec.dtype == "uint8" else 1e-3 * np.maximum(1, np.abs(other))
            assert one.shape == other.shape
            assert (np.abs(one - other) <= allowed).all(), (spec.modality, row)


def published(store: Store) -> Counter[tuple[str, str]]:
    """How often each (spec, row) was published."""
    return Counter((one.spec_id, row) for one in store.fragments() for row in one.row_ids)


def records(store: Path) -> list[Path]:
    return list(store.glob("records/*/*.json"))


def at_work(store: Path) -> set[int]:
    """The processes that say they are computing something right now."""
    found = set()
    for claim in store.glob("tmp/claim-*.json"):
        try:
            found.add(json.loads(claim.read_text())["pid"])
        except (OSError, ValueError, KeyError):
            continue
    return found


def done_of(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=120)
    return Done(process.returncode, out, err)


# ---------------------------------------------------------------- tests


def test_without_a_cluster_dask_is_not_imported(reference: Reference) -> None:
    assert {"torch", "zarr"} <= reference.imported
    assert reference.imported.isdisjoint({"dask", "distributed", "tornado"})


def test_two_local_workers_give_what_one_process_gives(
    pmm: Run, reference: Reference, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    done = pmm("precompute", reference.corpus, "--store", store, *SMALL, "--workers", 2, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)["outcome"]
    assert told["clips"] == TAKES
    assert told["rows"] == {"audio": TAKES, "text": TAKES, "image": TAKES, "target": TAKES}
    assert told["fragments"] == len(records(store))
    assert "cluster   2 workers at t" in done.err
    assert len({one.writer["pid"] for one in Store.open(store).fragments()} - {os.getpid()}) == 2
    check_same(store, reference)


def test_a_killed_worker_loses_its_task_and_nothing_else(
    pmm: Run, pmm_process: Run, clusters: Cluster, reference: Reference, tmp_path: Path
) -> None:
    running, store = clusters.with_workers(2), tmp_path / "store"
    victim = running.workers[0]
    process = pmm_process(
        "precompute", reference.corpus, "--store", store, *SMALL, "--scheduler", running.address
    )
    until(lambda: (len(records(store)) >= 4 and victim.pid in at_work(store)) or process.poll() is not None)
    victim.kill()
    victim.wait()
    assert process.poll() is None
    assert len(records(store)) < 4 * TAKES // 2
    done = done_of(process)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert pmm("store", "verify", store).code == 0
    check_same(store, reference)


def test_a_clip_that_workers_die_of_is_set_aside(pmm: Run, clusters: Cluster, tmp_path: Path) -> None:
    running, store, corpus = clusters.with_workers(DEATHS + 3), tmp_path / "store", tmp_path / "corpus"
    for number, subject in enumerate((DEADLY, "ada", "bob")):  # the shortest, so that its half is itself
        write_take(corpus, subject, "take", 0.8 + 0.1 * number, number)
    done = pmm("precompute", corpus, "--store", store, "--scheduler", running.address, "--json")
    assert done.code == 3, done.err
    assert "Traceback" not in done.err
    (failure,) = json.loads(done.out)["outcome"]["failures"]
    assert failure == {
        "source": f"{DEADLY}/take/take_{DEADLY}",
        "stage": "worker",
        "reason": "its worker died 2 times while it was computed",
    }
    assert "died      2 workers of one task: its 3 clips are tried in halves" in done.err
    (durable,) = Store.open(store).open_failures()
    assert durable.reason == failure["reason"]
    assert sorted(published(Store.open(store)).values()) == [1] * 8
    assert sum(one.poll() is not None for one in running.workers) == 4


def test_a_lost_scheduler_is_one_line_and_a_rerun_completes(
    pmm: Run, pmm_process: Run, clusters: Cluster, reference: Reference, tmp_path: Path
) -> None:
    running, store = clusters.with_workers(1), tmp_path / "store"
    process = pmm_process(
        "precompute", reference.corpus, "--store", store, *SMALL, "--scheduler", running.address
    )
    until(lambda: len(records(store)) >= 4 or process.poll() is not None)
    assert running.scheduler is not None
    running.scheduler.kill()
    running.scheduler.wait()
    assert process.poll() is None
    done = done_of(process)
    assert done.code == 1
    assert done.complaint.startswith(f"lost the scheduler at {running.address}; all that was published is in")
    running.end()
    assert pmm("store", "verify", store).code == 0
    kept = published(Store.open(store))
    assert 0 < len(kept) < 4 * TAKES
    assert pmm("precompute", reference.corpus, "--store", store, *SMALL).code == 0
    check_same(store, reference)


def test_a_worker_without_the_models_says_so(pmm_process: Run, tmp_path: Path, reference: Reference) -> None:
    running, face = Cluster(tmp_path), tmp_path / "face.png"
    write_face(face)
    running.begin()
    try:
        process = pmm_process(
            "precompute",
            reference.corpus,
            "--store",
            tmp_path / "store",
            "--face",
            face,
            "--scheduler",
            running.address,
        )
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("cluster   0 workers at tcp://") for line in lines)
        face.unlink()  # as on another machine
        running.with_workers(1)
        done = done_of(process)
    finally:
        running.end()
    assert done.code == 1
    assert done.complaint.startswith("worker tcp://127.0.0.1:")
    assert str(face) in done.complaint


def write_face(path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(path)


def test_an_interrupt_finishes_what_is_running(pmm: Run, reference: Reference, tmp_path: Path) -> None:
    store = tmp_path / "store"
    pmm_command = str(Path(sys.executable).parent / "pmm")
    process = subprocess.Popen(
        [pmm_command, "precompute", reference.corpus, "--store", store, *SMALL, "--workers", "1"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    until(lambda: len(records(store)) >= 4 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers hear it too
    done = done_of(process)
    assert done.code == 130
    assert "stopping  1 task under way" in done.err
    assert "Traceback" not in done.err
    kept = published(Store.open(store))
    assert len(kept) % 4 == 0
    assert 4 < len(kept) < 4 * TAKES
    assert pmm("precompute", reference.corpus, "--store", store, *SMALL).code == 0
    check_same(store, reference)


def test_addresses_where_no_scheduler_answers(pmm: Run, captures: Path, tmp_path: Path) -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):  # the user's setting is heard
        done = pmm("precompute", captures, "--store", tmp_path / "store", "--scheduler", "tcp://127.0.0.1:9")
    assert done.code == 1
    assert done.complaint.startswith("no Dask scheduler answers at tcp://127.0.0.1:9")
    done = pmm("precompute", captures, "--store", tmp_path / "store", "--scheduler", "x", "--workers", 2)
    assert done.code == 2


def test_partners_do_not_wait_for_each_other_and_strangers_do(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    names = ("a" * 64, "b" * 64)
    assert Claims(store, ["spec"], "us").take(names[:1]) == {names[0]}  # and its worker is lost
    assert Claims(store, ["spec"], "us").take(names) == set(names)
    assert Claims(store, ["spec"], "others").take(names) == set()
    assert Claims(store, ["spec"]).taken() == set(names)


def test_local_workers_share_out_processors_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that goes without a GPU: what each is told to see."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("dask.system.CPU_COUNT", 16)
    assert [cluster._worker_options(one)["env"]["OMP_NUM_THREADS"] for one in cluster._places(3, "cpu")] == [
        "5"
    ] * 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [one.gpu for one in cluster._places(3, "auto")] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    options = [cluster._worker_options(one) for one in cluster._places(2, "cuda")]
    assert [one["env"]["CUDA_VISIBLE_DEVICES"] for one in options] == ["5", "7"]
    assert [one["resources"] for one in options] == [{"GPU": 1}] * 2


# ---------------------------------------------------------------- tasks, which are pure

SPECS = (
    FeatureSpec("audio", "hidden", "float16", (192,), None, {}),
    FeatureSpec("image", "lips", "uint8", (96, 96, 3), 30, {}),
)


def made_plan(seconds: list[float]) -> Plan:
    clips = [Clip(f"{number:064x}", 48_000, 1, 0, round(one * 48_000)) for number, one in enumerate(seconds)]
    every = frozenset(("audio", "image"))
    work = tuple(Work(clip, Path(f"/a/{clip.id}.wav"), clip.id, every, (), 0) for clip in clips)
    return Plan((), len(work), sum(seconds), tuple(Share(spec, 0, len(work), 0) for spec in SPECS), work)


def test_tasks_hold_every_clip_once_and_one_fragment_at_most() -> None:
    rng = np.random.default_rng(0)
    plan = made_plan([float(one) for one in rng.uniform(0.5, 30, 500)])
    limits = Limits(batch_seconds=60, fragment_bytes=64 << 20)
    tasks = cut(plan, 3, limits)
    assert tasks == cut(plan, 3, limits)
    assert sorted(item.clip.id for task in tasks for item in task.work) == sorted(
        item.clip.id for item in plan.work
    )
    picture = 96 * 96 * 3 * 30
    assert max(task.seconds * picture for task in tasks) <= limits.fragment_bytes
    assert [task.seconds for task in tasks] == sorted((task.seconds for task in tasks), reverse=True)
    for task in tasks:  # alike in length
        lengths = [item.clip.seconds for item in task.work]
        assert lengths == sorted(lengths)
    padded = sum(len(task.work) * task.work[-1].clip.seconds for task in tasks)
    assert padded < 1.1 * plan.seconds


def test_every_worker_has_several_tasks_of_a_batch_at_least() -> None:
    plan = made_plan([5.0] * 240)
    assert len(cut(plan, 4, Limits(batch_seconds=10))) == 16
    assert len(cut(plan, 4, Limits(batch_seconds=400))) == 3
    assert len(cut(plan, 400, Limits(batch_seconds=60))) == 20
    long = made_plan([7200.0, 3.0])
    assert [len(task.work) for task in cut(long, 2, Limits())] == [1, 1]
    assert cut(made_plan([]), 2, Limits()) == []


def test_a_suspect_is_found_by_halving() -> None:
    work = made_plan([1.0] * 37).work
    bad, deaths, todo, found = work[23], 0, [Task(work)], []
    while todo:
        task = todo.pop()
        if bad not in task.work:
            continue
        deaths += task.patience
        if len(task.work) == 1:
            found.append(task.work)
        else:
            todo += task.halves()
    assert found == [(bad,)]
    assert deaths <= 2 + 6 + 2  # log2 of 37 halvings
