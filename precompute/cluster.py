"""Carry out a plan with many workers, on Dask: a cluster of this machine's own, or one that exists.

The client (this process) cuts the plan into tasks, hands them to the scheduler and counts what comes back.
A worker opens the store, loads the frozen models once in its life (``worker.py``), and does with each task
what a run without a cluster does with all of its work. Whatever is lost (a worker, the scheduler, this
process), what was published is not, and the rest is computed by whoever comes next.

Only names travel: paths, specs, ids. Features go from a worker to the store and nowhere else.
Dask is imported only when a cluster is asked for.
"""

from __future__ import annotations

import logging
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import reduce
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING, Any

from pmm import BadInput, NotFound, PmmError
from pmm.precompute import run, worker
from pmm.precompute.plan import Plan
from pmm.precompute.run import Limits
from pmm.precompute.tasks import Task, cut
from pmm.store.catalog import Failure, Store

if TYPE_CHECKING:
    from distributed import Client, Future
    from distributed.deploy.spec import SpecCluster

    from pmm.precompute.models import ModelSet, Options

_LOOK_SECONDS = 0.5
_ASK_SECONDS = 2.0
_QUIET_SECONDS = 10.0
"""After so long without a worker the user is told, and again whenever it was twice as long."""
_EXPECTED_WORKERS = 8
"""Where none has come yet."""
_SLOW_RESTART = "distributed.deploy.lost-worker-timeout"
_IN_VAIN = 20
"""So many workers that die, and not one task finished meanwhile, are no clip's fault."""


class ClusterLost(PmmError, ConnectionError):
    """The scheduler is gone, and with it the tasks that were not finished."""


@dataclass(frozen=True)
class Joined:
    """Event: the scheduler at ``address`` answers; it has so many workers now, and perhaps a web page."""

    address: str
    workers: int
    dashboard: str | None


@dataclass(frozen=True)
class Waiting:
    """Event: for ``seconds`` there has been no worker; the run goes on waiting."""

    address: str
    seconds: float


@dataclass(frozen=True)
class Suspected:
    """Event: ``deaths`` workers died of one task; its ``clips`` are tried in halves from now on."""

    clips: int
    deaths: int


@dataclass(frozen=True)
class Stopping:
    """Event: interrupted; so many tasks are running and will be finished."""

    tasks: int


Event = run.Event | Joined | Waiting | Suspected | Stopping


def execute(
    plan: Plan,
    store: Store,
    earlier_failures: Sequence[Failure] = (),
    *,
    models: ModelSet,
    options: Options,
    workers: int | None = None,
    scheduler: str | None = None,
    limits: Limits,
    on_event: Callable[[Any], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> run.Outcome:
    """Compute and publish the work of ``plan`` with the workers of a Dask cluster.

    earlier_failures  what the survey could not use: recorded durably, as in a run without a cluster
    workers           start so many on this machine: a process each, and a GPU each where there are any
    scheduler         or use those that the scheduler at this address has, and gets meanwhile
    stopping          asked again and again: once true, each worker publishes after its batch and stops

    Workers must find the store, the recordings and the models under the same paths. A clip that workers
    die of is told from the others of its task and becomes a Failure. Interrupted (KeyboardInterrupt), it
    stops as by ``stopping`` and re-raises; interrupted again, it leaves what is running.

    Raises NotFound where no scheduler answers, ClusterLost where it goes away, and what workers raise:
    the same PmmErrors, with the worker's name.
    """
    began = time.monotonic()
    store.publish_failures(earlier_failures)
    done = [_nothing(tuple(earlier_failures))]
    if plan.work:
        job = worker.Job.of(plan, store, models, options, limits)
        with _quiet(), _client(workers, scheduler, options.device) as client:
            there = _joined(client, on_event)
            tasks = cut(replace(plan, work=job.located(plan.work)), there, limits)
            done += _Tasks(client, job, store, on_event, stopping).all(tasks)
    together = merged(done)
    return replace(together, pace=replace(together.pace, elapsed=time.monotonic() - began))


def _nothing(failures: tuple[Failure, ...] = (), left: int = 0) -> run.Outcome:
    return run.Outcome(0, {}, 0, 0, failures, 0, 0, left)


def merged(outcomes: Sequence[run.Outcome]) -> run.Outcome:
    """What several runs did together. There must be one at least."""
    columns = {one.name: [getattr(each, one.name) for each in outcomes] for one in fields(run.Outcome)}
    return run.Outcome(**{name: reduce(_both, values) for name, values in columns.items()})


def _both(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping):
        return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
    return one + other


# ---------------------------------------------------------------- the cluster


@contextmanager
def _client(workers: int | None, scheduler: str | None, device: str) -> Iterator[Client]:
    from distributed import Client

    if scheduler is None:
        with _local(workers or 1, device) as cluster, Client(cluster, set_as_default=False) as client:
            yield client
        return
    try:
        client = Client(scheduler, set_as_default=False)
    except (OSError, ValueError) as error:
        raise NotFound(
            f"no Dask scheduler answers at {scheduler} ({_line(error)}); start one with `dask scheduler`, "
            "or use --workers N for workers on this machine"
        ) from None
    with client:
        yield client


@contextmanager
def _local(workers: int, device: str) -> Iterator[SpecCluster]:
    """A scheduler and workers on this machine, reached by nobody but this user."""
    import dask
    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.security import Security

    _hush_tracker()
    secret = Security.temporary()  # certificates that live as long as the cluster
    common = {"host": "127.0.0.1", "protocol": "tls", "security": secret}
    page = find_spec("bokeh") is not None
    scheduler = {**common, "port": 0, "dashboard": page, "dashboard_address": "127.0.0.1:0"}
    specs = {
        number: {"cls": Nanny, "options": {**common, **_worker_options(one)}}
        for number, one in enumerate(_places(workers, device))
    }
    given = {"cls": Scheduler, "options": scheduler}
    with (
        dask.config.set({_SLOW_RESTART: "1 day"}),  # its own 15 s are too few for a busy machine
        SpecCluster(
            workers=specs, scheduler=given, security=secret, silence_logs=logging.CRITICAL
        ) as cluster,
    ):
        yield cluster


def _hush_tracker() -> None:
    """Starts Python's keeper of semaphores, which outlives us, so that it complains of no interrupted run."""
    from multiprocessing import resource_tracker

    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker")))
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


@dataclass(frozen=True)
class _Place:
    """What one local worker gets of this machine."""

    threads: int
    gpu: str | None


def _places(workers: int, device: str) -> list[_Place]:
    from dask.system import CPU_COUNT

    gpus = _gpus() if device != "cpu" else []
    threads = max(1, CPU_COUNT // workers)
    return [_Place(threads, gpus[number % len(gpus)] if gpus else None) for number in range(workers)]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name for name in (visible or "").split(",") if name]
    return (named or [str(number) for number in range(64)])[: torch.cuda.device_count()]


def _worker_options(place: _Place) -> dict[str, Any]:
    import dask

    threads = os.environ.get("OMP_NUM_THREADS", str(place.threads))
    env = {f"{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")}
    if place.gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = place.gpu
    return {
        "nthreads": 1,
        "memory_limit": 0,  # its guess would be a share of the memory by threads, and it kills above that
        "env": env,
        "resources": {} if place.gpu is None else {worker.GPU: 1},
        "preload": [*dask.config.get("distributed.worker.preload", []), worker.__name__],
        "silence_logs": logging.CRITICAL,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask's own stories of lost workers and connections are not printed, unless it was configured to."""
    import dask
    import distributed  # sets its logging up

    handlers = [] if "logging" in dask.config.config else logging.getLogger(distributed.__name__).handlers
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels):
            handler.setLevel(level)


def _joined(client: Client, on_event: Callable[[Any], None]) -> int:
    """Tells where the run takes place; among how many workers to share it."""
    there = len(client.nthreads())
    page = client.dashboard_link if find_spec("bokeh") else None
    on_event(Joined(_address(client), there, page))
    return there or _EXPECTED_WORKERS


def _address(client: Client) -> str:
    return str(client.scheduler.address) if client.scheduler else "its address"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- the tasks


class _Tasks:
    """The tasks of one run, from their submission until each has come back."""

    def __init__(
        self,
        client: Client,
        job: worker.Job,
        store: Store,
        on_event: Callable[[Any], None],
        stopping: Callable[[], bool],
    ):
        self.client, self.job, self.store = client, job, store
        self.on_event, self.stopping = on_event, stopping
        self._names = count()
        self._open: dict[int, tuple[Task, Future]] = {}
        self._came: queue.SimpleQueue[int | str] = queue.SimpleQueue()  # a task by number, or a clip
        self._untold: dict[str, float] = {}
        self._stopped = False
        self._in_vain = 0
        self._address = _address(client)
        self._resources = {worker.GPU: 1} if _with_gpus(client) else None

    def all(self, tasks: Sequence[Task]) -> list[run.Outcome]:
        """Hands out ``tasks`` and waits for them; what each did, and what they were cut into."""
        done: list[run.Outcome] = []
        self.client.subscribe_topic(self.job.clips, lambda event: self._came.put(event[1]))
        for task in tasks:
            self._untold.update((item.clip.id, item.clip.seconds) for item in task.work)
            self._submit(task)
        try:
            self._wait(done)
        except KeyboardInterrupt:
            done += self._stop()
            self._wait(done)
            raise
        return done

    def _submit(self, task: Task) -> None:
        number = next(self._names)
        future = self.client.submit(
            worker.compute,
            self.job,
            number,
            task,
            key=(self.job.name, number),
            pure=False,
            resources=self._resources,
        )
        self._open[number] = (task, future)
        future.add_done_callback(lambda _: self._came.put(number))

    def _wait(self, done: list[run.Outcome]) -> None:
        """Until no task is open."""
        idle = _Idle(self.client, self._address, self.on_event)
        while self._open:
            if self.stopping() and not self._stopped:
                done += self._stop()
                continue
            try:
                came = self._came.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if self.client.status != "running":
                    raise self._lost() from None
                idle.look()
                continue
            if isinstance(came, str):
                self._tell(came)
            elif came in self._open:
                done.extend(self._ended(came, *self._open.pop(came)))

    def _ended(self, number: int, task: Task, future: Future) -> list[run.Outcome]:
        if future.status == "finished":
            receipt = self._receipt(future)
            if receipt.outcome is None:
                return self._died(task, receipt.deaths)
            self._in_vain = 0
            self._computed(task, receipt.published, receipt.outcome)
            return [receipt.outcome]
        if future.status != "error":
            raise self._lost()
        error = future.exception()
        if _is_killed(error):
            return self._died(task, task.deaths + self._begun().count(number))
        raise _readable(error)

    def _receipt(self, future: Future) -> worker.Receipt:
        try:
            receipt: worker.Receipt = future.result()
        except (CancelledError, OSError):
            raise self._lost() from None
        future.release()
        return receipt

    def _computed(self, task: Task, published: Sequence[run.Published], outcome: run.Outcome) -> None:
        for event in published:
            self.on_event(event)
        failed = {one.key: one for one in outcome.failures}
        if not outcome.left:
            for item in task.work:
                self._tell(item.clip.id, (failed[item.clip.id],) if item.clip.id in failed else ())

    def _tell(self, clip: str, failures: tuple[Failure, ...] = ()) -> None:
        """Each clip once: its worker told it, then its task's receipt does, and a task may be run again."""
        if (seconds := self._untold.pop(clip, None)) is not None:
            self.on_event(run.ClipDone(clip, seconds, failures))

    def _died(self, task: Task, deaths: int) -> list[run.Outcome]:
        """What is to be done with a task after so many deaths: again, in halves, or no more."""
        if self._stopped:
            return [_nothing(left=len(task.work))]
        self._in_vain += max(1, deaths - task.deaths)
        if self._in_vain >= _IN_VAIN:
            raise PmmError(f"{self._in_vain} workers died one after another and no task was finished; {_WHY}")
        if deaths < task.patience:
            self._submit(replace(task, deaths=deaths))
        elif len(task.work) > 1:
            self.on_event(Suspected(len(task.work), deaths))
            for half in task.halves():
                self._submit(half)
        else:
            return [self._given_up(task, deaths)]
        return []

    def _given_up(self, task: Task, deaths: int) -> run.Outcome:
        (item,) = task.work
        reason = f"its worker died {deaths} times while it was computed"
        failure = Failure(item.clip.id, item.source, "worker", reason)
        self.store.publish_failures([failure])
        self._tell(item.clip.id, (failure,))
        return _nothing((failure,))

    def _stop(self) -> list[run.Outcome]:
        """No task is begun any more, and those that were stop after their batch; what that leaves."""
        self._stopped = True
        begun = set(self._begun())
        waiting = [self._open.pop(number) for number in list(self._open) if number not in begun]
        try:
            self.client.log_event(self.job.stop, True)
            self.client.cancel([future for _, future in waiting])
        except OSError:
            raise self._lost() from None
        self.on_event(Stopping(len(self._open)))
        return [_nothing(left=len(task.work)) for task, _ in waiting]

    def _begun(self) -> list[int]:
        """The number of a task for each time one was begun."""
        try:
            return [number for _, number in self.client.get_events(self.job.begun) or ()]
        except OSError:
            raise self._lost() from None

    def _lost(self) -> ClusterLost:
        return ClusterLost(
            f"lost the scheduler at {self._address}; all that was published is in the store, "
            "start a scheduler and run the same command again to go on"
        )


def _with_gpus(client: Client) -> bool:
    """Whether the workers were told to count their GPUs."""
    there = client.scheduler_info()["workers"].values()
    return any(worker.GPU in one["resources"] for one in there)


_WHY = (
    "they may lack the memory for these models or for such batches (--batch-seconds); try it without a "
    "cluster, or see what they logged"
)


def _is_killed(error: object) -> bool:
    from distributed.scheduler import KilledWorker

    return isinstance(error, KilledWorker)


def _readable(error: BaseException) -> BaseException:
    """What a worker raised; where it could not even read its task, what to do about that."""
    cause = error.__cause__ or error
    if isinstance(cause, (ImportError, AttributeError)) and not isinstance(error, PmmError):
        return BadInput(
            f"a worker cannot read its task ({_line(cause)}); install the same pmm and libraries there"
        )
    return error


def _none_restarts(client: Client) -> bool:
    """Whether those who keep the workers that we started have given up: one that dies at once is left."""
    if client.cluster is None:
        return False
    return all(one.status.name in ("closed", "failed") for one in client.cluster.workers.values())


class _Idle:
    """How long a run has been without any worker."""

    def __init__(self, client: Client, address: str, on_event: Callable[[Any], None]):
        self.client, self.address, self.on_event = client, address, on_event
        self._since: float | None = None
        self._next = _QUIET_SECONDS
        self._asked = 0.0

    def look(self) -> None:
        """Asks the scheduler now and then; tells the user when it is time to."""
        if time.monotonic() - self._asked < _ASK_SECONDS:
            return
        self._asked = time.monotonic()
        try:
            there = self.client.nthreads()
        except OSError:
            return  # the scheduler may be gone: the client will know
        if there:
            self._since, self._next = None, _QUIET_SECONDS
            return
        if _none_restarts(self.client):
            raise PmmError(f"all workers died, and none could be started again; {_WHY}")
        self._since = self._since or time.monotonic()
        waited = time.monotonic() - self._since
        if waited >= self._next:
            self._next *= 2
            self.on_event(Waiting(self.address, waited))
