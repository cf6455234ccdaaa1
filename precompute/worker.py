"""What a worker of a cluster does: a run's tasks, one after another, with models loaded once.

What a task is told and what it tells is small and plain. Before it begins, a task says so to the scheduler:
so a task that is begun again knows how many workers it was the last of.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pmm
from pmm import BadInput, NotFound, PmmError
from pmm.precompute import run
from pmm.precompute.plan import Plan, Work
from pmm.precompute.tasks import Task
from pmm.store.catalog import Store
from pmm.store.remote import is_address

if TYPE_CHECKING:
    from pmm.precompute.models import FrozenModels, ModelSet, Options

GPU = "GPU"
"""The Dask resource that a task takes one of, where workers have it."""


@dataclass(frozen=True)
class Job:
    """What all tasks of one run have in common.

    name      one nobody else uses
    version   of pmm
    store     an absolute path or an address; ``store_id`` tells it from another store under that path
    plan      without its sources and its work
    """

    name: str
    version: str
    store: str
    store_id: str
    models: ModelSet
    options: Options
    limits: run.Limits
    plan: Plan

    @classmethod
    def of(cls, plan: Plan, store: Store, models: ModelSet, options: Options, limits: run.Limits) -> Job:
        from pmm.precompute.models import located

        where = store.where if is_address(store.where) else str(Path(store.where).absolute())
        frame = replace(plan, sources=(), work=())
        name = f"pmm-{uuid4().hex}"
        return cls(
            name, pmm.__version__, where, store.about["store"], located(models), options, limits, frame
        )

    @property
    def begun(self) -> str:
        """The topic where a task says that it begins, by its number."""
        return f"{self.name}-begun"

    @property
    def clips(self) -> str:
        """The topic where each clip is told as it is done, by its id."""
        return f"{self.name}-clips"

    @property
    def stop(self) -> str:
        """The topic where the client says that batches under way are to be the last."""
        return f"{self.name}-stop"

    @staticmethod
    def located(work: Iterable[Work]) -> tuple[Work, ...]:
        """The same with absolute paths: a worker stands in another folder."""
        return tuple(
            replace(
                item,
                audio=item.audio.absolute(),
                targets=tuple(
                    replace(
                        source,
                        audio=source.audio.absolute(),
                        target=source.target and source.target.absolute(),
                    )
                    for source in item.targets
                ),
            )
            for item in work
        )


@dataclass(frozen=True)
class Receipt:
    """What came of a task: an outcome, or none because ``deaths`` workers died of it before."""

    outcome: run.Outcome | None
    published: tuple[run.Published, ...] = ()
    deaths: int = 0


def dask_setup(worker: Any) -> None:
    """Dask calls this in each worker that is told to preload this module: those that pmm starts.

    A Ctrl-C in the terminal reaches them too. It is for the client to say what comes of it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_one_at_a_time = threading.Lock()
"""The models and their memory are for one task; a worker with several threads lets the others wait."""


def compute(job: Job, number: int, task: Task) -> Receipt:
    """One task, in a worker. Raises the PmmErrors of a run, with the worker's name before them."""
    from distributed import get_worker

    here = get_worker()
    with _one_at_a_time:
        try:
            _check_version(job)
            _check_sight(task)
            store, models = _store(job), _models(job)  # who dies of these does not die of the task
            deaths = task.deaths + _begin(job, number)
            if deaths >= task.patience:
                return Receipt(None, deaths=deaths)
            return _computed(job, task, store, models, here)
        except PmmError as error:
            name = f"worker {here.address} on {socket.gethostname()}"
            raise type(error)(f"{name}: {error}") from None


def _begin(job: Job, number: int) -> int:
    """Says that the task of this number begins; how often it was said before, by workers that are gone."""
    from distributed import get_client

    client = get_client()
    before = [event[1] for event in client.get_events(job.begun) or ()].count(number)
    client.log_event(job.begun, number)
    return before


def _computed(job: Job, task: Task, store: Store, models: FrozenModels | None, here: Any) -> Receipt:
    published: list[run.Published] = []

    def on_event(event: run.Event) -> None:
        if isinstance(event, run.Published):
            published.append(event)
        elif isinstance(event, run.ClipDone) and not event.failures:
            here.log_event(job.clips, event.clip)

    plan = replace(job.plan, clips=len(task.work), seconds=task.seconds, work=task.work)
    outcome = run.execute(
        plan, store, models, (), job.limits, on_event, lambda: _is_told_to_stop(job), job.name
    )
    return Receipt(outcome, tuple(published))


def _is_told_to_stop(job: Job) -> bool:
    from distributed import get_client

    with suppress(OSError):  # the scheduler is gone, and this worker will go with it
        return bool(get_client().get_events(job.stop))
    return False


def _check_version(job: Job) -> None:
    if pmm.__version__ != job.version:
        raise BadInput(f"it has pmm {pmm.__version__}, the run is of pmm {job.version}; install the same")


def _check_sight(task: Task) -> None:
    """One file that is gone is that clip's failure; where all their folders are, the machine lacks a disk."""
    folders = {item.audio.parent for item in task.work}
    if not any(folder.is_dir() for folder in folders):
        raise NotFound(
            f"it sees no folder {min(folders)}; recordings must be under the same path on every worker"
        )


_stores: dict[str, Store] = {}
_loaded: dict[tuple[ModelSet, Options], FrozenModels] = {}


def _store(job: Job) -> Store:
    """The run's store, opened once by this process."""
    if job.store_id not in _stores:
        store = Store.open(job.store)
        if store.about["store"] != job.store_id:
            raise BadInput(
                f"its {job.store} is another store than the run's; mount the run's store there, "
                "or name one in a bucket"
            )
        _stores[job.store_id] = store
    _stores[job.store_id].refresh()
    return _stores[job.store_id]


def _models(job: Job) -> FrozenModels | None:
    """The run's models, loaded once by this process; those of another run before make room."""
    from pmm.precompute.models import load

    if all(share.spec.modality == "target" for share in job.plan.shares):
        return None

    key = (job.models, job.options)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load(*key)
    found = _loaded[key]
    for share in job.plan.shares:
        ours = found.specs.get(share.spec.modality)
        if ours is not None and ours.id != share.spec.id:
            raise BadInput(
                f"its models give other {share.spec.modality} features ({ours.id[:12]}, the run's are "
                f"{share.spec.id[:12]}); the checkpoints must be the same on every worker"
            )
    return found
