"""The run folder: everything that decides a run, what it measured, and its heads.

::

    config.json        options, sizes, feature specs with what made them, store, split, styles, mean
    metrics.jsonl      one line an epoch, steps.jsonl one a step; after a resumption the last of each holds
    best.safetensors   the heads with the lowest validation LVE
    last.safetensors   the heads and the optimiser as they were last kept: where --resume goes on
    curves.png         loss and validation LVE by epoch
    tensorboard/       the same by step, where TensorBoard is installed

The folder is written by one run and never taken over by another.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pmm
from pmm import AlreadyThere, BadInput, NotFound, PmmError
from pmm.store import snapshots
from pmm.store.cache import Fetched
from pmm.store.catalog import Store
from pmm.store.clip import Take
from pmm.store.digest import canonical_json, strict_json
from pmm.store.feature import FeatureSpec
from pmm.store.remote import is_address, place
from pmm.store.snapshots import Readable, View
from pmm.train import checkpoint, data, loaded, memory, protocols
from pmm.train.checkpoint import FORMAT
from pmm.train.data import Corpus, Skipped
from pmm.train.heads import Heads, HeadsConfig
from pmm.train.loaded import Content, Loaded, Plan
from pmm.train.loop import EpochDone, Schedule, Started, State, StepDone, seed_of, train
from pmm.train.memory import Cached
from pmm.train.options import FitOptions, torch_device
from pmm.train.predict import predict_heads
from pmm.train.protocols import MEAN_STYLE, Merged
from pmm.train.record import Record

CONFIG, BEST, LAST = "config.json", "best.safetensors", "last.safetensors"
KEEP_SECONDS = 600
"""Within an epoch that is longer, the heads are kept this often."""


@dataclass(frozen=True)
class Job:
    """One fit of several: a folder for the run, and what is asked of it."""

    path: Path
    options: FitOptions


@dataclass(frozen=True)
class JobStarted:
    """Event: number ``number`` (from 1) of ``jobs`` fits begins, or goes on."""

    path: Path
    number: int
    jobs: int


@dataclass(frozen=True)
class JobFailed:
    """Event: that fit cannot go on; the others do."""

    path: Path
    reason: str


Event = Fetched | Content | Cached | JobStarted | JobFailed | Started | StepDone | EpochDone
Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Result:
    """What came of a fit. ``skipped`` takes lacked features or disagreed in length.

    ended    "done", "patience" (no better epoch for too long) or "interrupted"
    seconds  of training, this time
    """

    path: Path
    epochs: int
    best_epoch: int
    best_lve: float
    clips: int
    frames: int
    skipped: tuple[Skipped, ...]
    content: Content
    ended: str = "done"
    seconds: float = field(default=0.0, compare=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.path),
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "best_validation_lve": self.best_lve if self.best_epoch else None,
            "training_clips": self.clips,
            "training_frames": self.frames,
            "skipped": [asdict(one) for one in self.skipped],
            "content": asdict(self.content),
            "ended": self.ended,
            "seconds": round(self.seconds, 3),
        }


# --- fit -------------------------------------------------------------------------------------------


def fit(
    store: Store,
    run_dir: Path | str,
    options: FitOptions,
    on_event: Tell | None = None,
    resume: bool = False,
    memory_limit: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Result:
    """Fit heads from the cached features of ``store`` into the new folder ``run_dir``.

    With ``resume`` the run that is there goes on from where it was last kept, with the options it was
    started with, to the same losses as if it had never stopped. When ``stopping`` says so, the heads are
    kept after the step under way and the fit ends.
    At most ``memory_limit`` bytes of features are held in memory (None: what is available); where they do
    not fit they are read from the store, unless ``options.cache`` asks for a place of its own.

    Raises AlreadyThere if ``run_dir`` exists (and not ``resume``), NotFound or BadInput where the
    store lacks what is needed, too few subjects for the protocol included, and where the memory that is
    asked for does not hold it.
    """
    job = Job(Path(run_dir), options)
    if resume:
        read_config(job.path)
    (one,) = prepare(store, [job], on_event, resume, memory_limit)
    return one.train(on_event, stopping)


def fit_many(
    store: Store,
    jobs: Sequence[Job],
    on_event: Tell | None = None,
    resume: bool = False,
    memory_limit: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Result]:
    """Fit each of ``jobs`` in turn over one corpus, which is loaded once; results in their order.

    All jobs train on takes that have every feature any of them reads, and on the lengths these agree in;
    else each is, to the bit, what ``fit`` makes of it alone. A fit that cannot go on (its loss is not
    finite, say) is told by JobFailed and has no result; the others go on. With ``resume`` those whose
    folder is there go on, and the others begin. Raises as ``fit`` does, before any of them begins.
    """
    tell = on_event or (lambda event: None)
    results = []
    for number, one in enumerate(prepare(store, jobs, tell, resume, memory_limit), 1):
        tell(JobStarted(one.run.path, number, len(jobs)))
        try:
            results.append(one.train(tell, stopping))
        except PmmError as error:
            tell(JobFailed(one.run.path, str(error)))
        if stopping():
            break
    return results


@dataclass(frozen=True)
class Prepared:
    """A run whose data is in place: ``train`` begins it, or goes on with it."""

    run: Run
    corpus: Corpus
    validation: Corpus

    def train(self, on_event: Tell | None = None, stopping: Callable[[], bool] = lambda: False) -> Result:
        return _train(self, on_event or (lambda event: None), stopping)


def prepare(
    store: Store,
    jobs: Sequence[Job],
    on_event: Tell | None = None,
    resume: bool = False,
    memory_limit: int | None = None,
) -> list[Prepared]:
    """Load what all ``jobs`` read, once, and make their folders; nothing is trained yet.

    Raises as ``fit`` and ``loaded.load`` do.
    """
    tell = on_event or (lambda event: None)
    there = [job for job in jobs if resume and job.path.exists()]
    for job in jobs:
        if job not in there and job.path.exists():
            raise AlreadyThere(
                f"{job.path} already exists and nothing is overwritten; "
                "go on with it by --resume, or name another folder"
            )
    first = jobs[0].options
    device = torch_device(first.device)
    old = {job.path: _reopened(job, device) for job in there}
    content, chosen = _source(store, first, list(old.values()))
    plans = [_plan_again(old[job.path], chosen) if job.path in old else _plan(job, chosen) for job in jobs]
    whole = loaded.load(store, chosen, plans, device, first.cache, tell, content, memory_limit)
    return [_prepared(store, whole, one, job, old.get(job.path), device) for one, job in zip(plans, jobs)]


def _source(store: Store, options: FitOptions, runs: Sequence[Run]) -> tuple[Content | None, Readable]:
    """The snapshot that runs read which go on, or the one asked for, or the store as it is now."""
    contents = {Content(**run.config.get("content", {})).id: run for run in runs}
    if len(contents) > 1:
        paths = " and ".join(str(run.path) for run in contents.values())
        raise BadInput(
            f"the runs in {paths} read different contents of the store; go on with them one by one"
        )
    if runs:
        content = Content(**runs[0].config.get("content", {}))
        if content.snapshot in snapshots.names(store):
            return content, View(store, snapshots.load(store, content.snapshot))
        return content, store
    if options.snapshot:
        return None, View(store, snapshots.load(store, options.snapshot))
    return None, store


def _plan(job: Job, chosen: Readable) -> Plan:
    if job.options.init is None:
        return loaded.plan(chosen, job.options)
    before = load_run(job.options.init, "cpu")
    return loaded.plan(chosen, _options_after(before, job.options), _sizes_of(before.heads.config))


def _plan_again(run: Run, chosen: Readable) -> Plan:
    sides = {name: part_of(run, chosen, name) for name in loaded.SIDES}
    specs = {name: run.specs[name] for name in (*run.options.modalities, "target")}
    return Plan(run.options, specs, sides, _sizes_of(run.heads.config))


def _sizes_of(config: HeadsConfig) -> dict[str, Any]:
    """Keywords of HeadsConfig, but for the styles."""
    names = config.__dataclass_fields__
    return {name: getattr(config, name) for name in names if name != "styles"}


def _options_after(before: Run, options: FitOptions) -> FitOptions:
    """``options``, with what the heads of the run to begin from decide. Raises BadInput for other wishes."""
    changes: dict[str, Any] = {}
    for name in _DECIDED_BY_HEADS:
        was, wish = getattr(before.options, name), getattr(options, name)
        if wish not in (was, getattr(FitOptions(), name)):
            raise BadInput(
                f"the run in {before.path} has {name} {was!r}, and --init keeps it: leave out {name} {wish!r}"
            )
        changes[name] = was
    changes["features"] = {name: spec.id for name, spec in before.specs.items()}
    return replace(options, **changes)


_DECIDED_BY_HEADS = (
    *("preset", "rig", "fps", "lookahead", "context", "max_context", "dropout", "modality_dropout"),
    *("decoder_input", "without", "features"),
)
"""Options that a run to begin from has decided."""


def _prepared(
    store: Store, whole: Loaded, one: Plan, job: Job, old: Run | None, device: torch.device
) -> Prepared:
    sides = whole.sides(one)
    corpus, validation = sides["train"], sides["validation"]
    if old is None:
        run = _begin(store, whole.content, one, job.path, corpus, validation, device)
    else:
        run = old
        _refuse_lost(run, store, sides)
        if not (run.path / LAST).exists():
            run.heads.load_state_dict(
                _first_heads(run.options, run.heads.config, corpus, device).state_dict()
            )
    run.heads.freeze(run.options.freeze)
    return Prepared(run, corpus, validation)


def _refuse_lost(run: Run, store: Readable, sides: Mapping[str, Corpus]) -> None:
    for name, corpus in sides.items():
        if corpus.skipped:
            first = corpus.skipped[0]
            raise NotFound(
                f"{len(corpus.skipped)} {name} takes of the run in {run.path} can no longer be used "
                f"({first.source}: {first.reason}); restore them in {store.where}, or start a new run"
            )


def _reopened(job: Job, device: torch.device) -> Run:
    run = _open(job.path, device)
    if other := run.options.differs(job.options):
        raise BadInput(
            f"the run in {job.path} was started with {other}; resume it without that option, or start a "
            "new run"
        )
    return run


def _begin(
    store: Store,
    content: Content,
    one: Plan,
    path: Path,
    corpus: Corpus,
    validation: Corpus,
    device: torch.device,
) -> Run:
    """A new folder with everything that decides the run."""
    assert one.split is not None
    styles = tuple(dict.fromkeys(corpus.subjects))
    heads = _first_heads(one.options, HeadsConfig(**one.heads, styles=len(styles)), corpus, device)
    config = {
        "format": FORMAT,
        "versions": _versions(),
        "options": one.options.to_json(),
        "schedule": asdict(one.options.schedule),
        "heads": heads.config.to_json(),
        "names": list(one.names),
        "fps": one.options.fps,
        "content": asdict(content),
        "store": store.where if is_address(store.where) else str(store.path.resolve()),
        "specs": {name: spec.to_json() for name, spec in one.specs.items()},
        "made_with": {name: _made_with(store, spec) for name, spec in one.specs.items()},
        "split": _used(one.split, {"train": corpus, "validation": validation}),
        "unused": one.split.unused,
        "merged": [asdict(one) for one in one.split.merged],
        "skipped": [asdict(one) for part in (corpus, validation) for one in part.skipped],
        "styles": list(styles),
        "mean": corpus.own_target().mean(0, dtype=torch.float64).float().tolist(),
    }
    _create(path, config)
    return Run.of(path, config, heads, device)


def _first_heads(options: FitOptions, config: HeadsConfig, corpus: Corpus, device: torch.device) -> Heads:
    if options.init is None:
        return _new_heads(config, corpus, options.seed, device)
    before = load_run(options.init, "cpu")
    return _tuned_heads(before, config, tuple(dict.fromkeys(corpus.subjects)), device)


def _tuned_heads(before: Run, config: HeadsConfig, styles: Sequence[str], device: torch.device) -> Heads:
    """The heads of ``before``, its statistics too; a new subject's style begins as the mean of all."""
    heads = Heads(config)
    state = before.heads.state_dict()
    state["styles.weight"] = torch.stack(
        [before.style_vector(who if who in before.styles else MEAN_STYLE) for who in styles]
    )
    heads.load_state_dict(state)
    return heads.to(device)


def _new_heads(config: HeadsConfig, corpus: Corpus, seed: int, device: torch.device) -> Heads:
    """Heads drawn from ``seed``, the same on every device, that begin at the means of ``corpus``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights", 0))
        heads = Heads(config).to(device)
    images = corpus.features.get("image")
    image, scale = (None, 1.0) if images is None else data.image_statistics(images, corpus)
    heads.start_from(corpus.own_target().mean(0, dtype=torch.float64).float(), image, scale)
    return heads


def _made_with(store: Readable, spec: FeatureSpec) -> list[Any]:
    """Every distinct account of what made the rows of ``spec``."""
    accounts = [dict(one.made_with) for one in store.fragments() if one.spec_id == spec.id]
    return [one for n, one in enumerate(accounts) if one not in accounts[:n]]


def _used(split: protocols.Split, parts: Mapping[str, Corpus]) -> dict[str, dict[str, list[str]]]:
    """The split, in which training and validation hold only the takes that are used."""
    value = split.to_json()
    for name, corpus in parts.items():
        used = {take.id for take in corpus.takes}
        people = {who: [take for take in takes if take in used] for who, takes in value[name].items()}
        value[name] = {who: takes for who, takes in people.items() if takes}
    return value


def _versions() -> dict[str, str]:
    return {
        "pmm": pmm.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _train(one: Prepared, tell: Tell, stopping: Callable[[], bool]) -> Result:
    """From the checkpoint, if there is one, to the end of the schedule, or until it is to stop."""
    run, heads, options = one.run, one.run.heads, one.run.options
    schedule = Schedule(**run.config["schedule"])
    optimiser = torch.optim.Adam(heads.parameters(), lr=schedule.learning_rate)
    last = run.path / LAST
    state = checkpoint.load(last, heads, optimiser) if last.exists() else State()
    tell(_started(run, one.corpus, one.validation, schedule, state))
    events = train(
        heads,
        optimiser,
        one.corpus,
        _styles(run, one.corpus),
        one.validation,
        schedule,
        options.weights,
        seed=options.seed,
        reduction=options.loss_reduction,
        state=state,
        validation_styles=_styles(run, one.validation),
    )
    began = kept = time.perf_counter()
    stopped = False
    with Record(run.path) as record:
        for event in events:
            state = event.state
            stopped = stopping()
            if isinstance(event, EpochDone) and event.best:
                checkpoint.save(run.path / BEST, heads, state)
            if isinstance(event, EpochDone) or stopped or time.perf_counter() - kept > KEEP_SECONDS:
                checkpoint.save(last, heads, state, optimiser)
                kept = time.perf_counter()
            record.write(event)
            tell(event)
            if stopped:
                break
    finished = "done" if state.epoch == schedule.epochs else "patience"
    ended = "interrupted" if stopped and schedule.to_do(state) else finished
    seconds = time.perf_counter() - began
    skipped = tuple(Skipped(**one) for one in run.config["skipped"])
    counted = (state.epoch, state.best_epoch, state.best_lve, len(one.corpus.takes), one.corpus.frames)
    return Result(run.path, *counted, skipped, Content(**run.config.get("content", {})), ended, seconds)


def _styles(run: Run, corpus: Corpus) -> Tensor:
    """(N,) the number of each clip's style; -1 of a subject who has none."""
    number = {name: n for n, name in enumerate(run.styles)}
    return torch.tensor([number.get(who, -1) for who in corpus.subjects])


def _started(run: Run, corpus: Corpus, validation: Corpus, schedule: Schedule, state: State) -> Started:
    return Started(
        clips=len(corpus.takes),
        frames=corpus.frames,
        validation_clips=len(validation.takes),
        styles=run.styles,
        skipped=len(run.config["skipped"]),
        merged=tuple(Merged.from_json(one) for one in run.config.get("merged", ())),
        parameters=sum(parameter.numel() for parameter in run.heads.parameters()),
        epochs=schedule.epochs,
        first_epoch=state.epoch,
        steps_per_epoch=-(-len(corpus.takes) // schedule.batch_size),
        device=str(run.device),
        first_step=state.step,
        split={part: tuple(run.config["split"][part]) for part in protocols.PARTS},
        unused=run.config.get("unused", 0),
    )


# --- the folder ------------------------------------------------------------------------------------


def _create(path: Path, config: Mapping[str, Any]) -> None:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise AlreadyThere(f"{path} was made by somebody else in the meantime; name another folder") from None
    except OSError as error:
        raise BadInput(f"cannot make the run folder {path}: {error.strerror}") from None
    checkpoint.replace_file(path / CONFIG, lambda to: to.write_text(json.dumps(config, indent=1) + "\n"))


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a run folder. Raises NotFound, BadInput or NewerFormat."""
    file = path / CONFIG
    if not path.exists():
        raise NotFound(f"no run at {path}; `pmm fit STORE --run {path}` makes one")
    if not file.is_file():
        raise NotFound(f"{path} is no run: it holds no {CONFIG}; name a folder that `pmm fit` made")
    config = strict_json(file.read_text(), str(file))
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise BadInput(f"{file} is not the configuration of a run: it says no format number")
    checkpoint.refuse_newer(config["format"], file)
    return config


@dataclass(frozen=True)
class Run:
    """Fitted heads and everything needed to use them.

    names   the K coefficients; ``mean`` (K,) float32 their training mean
    styles  training identities, in the order of the style embeddings
    specs   the feature specs by modality, the target's too
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    options: FitOptions
    heads: Heads = field(repr=False)
    specs: Mapping[str, FeatureSpec] = field(repr=False)
    names: tuple[str, ...]
    styles: tuple[str, ...]
    mean: np.ndarray = field(repr=False)
    fps: int
    store_path: Path | str
    device: torch.device

    @property
    def rig(self) -> str:
        return self.options.rig

    @classmethod
    def of(cls, path: Path, config: dict[str, Any], heads: Heads, device: torch.device) -> Run:
        """Raises KeyError or TypeError for a configuration that lacks something."""
        where = str(path / CONFIG)
        return cls(
            path=path,
            config=config,
            options=FitOptions.from_json(config["options"]),
            heads=heads,
            specs={
                name: FeatureSpec.from_bytes(canonical_json(spec), where)
                for name, spec in config["specs"].items()
            },
            names=tuple(config["names"]),
            styles=tuple(config["styles"]),
            mean=np.array(config["mean"], np.float32),
            fps=config["fps"],
            store_path=place(config["store"]),
            device=device,
        )

    def style_vector(self, style: str | int) -> Tensor:
        """(P,): of a training identity by name or number, or the mean of all. Raises NotFound."""
        table = self.heads.styles.weight.detach()
        if style == MEAN_STYLE:
            return table.mean(0)
        number = style if isinstance(style, int) else dict(zip(self.styles, range(len(table)))).get(style, -1)
        if not 0 <= number < len(table):
            raise NotFound(
                f"style {style!r} is not in the run at {self.path}; it has mean, {', '.join(self.styles)}"
            )
        return table[number]


def load_run(path: Path | str, device: str = "auto") -> Run:
    """The best heads of a run, ready to predict.

    Raises NotFound, BadInput (a truncated checkpoint, say) or NewerFormat.
    """
    run = _open(Path(path), torch_device(device))
    checkpoint.load(run.path / BEST, run.heads)
    run.heads.eval()
    return run


def _open(path: Path, device: torch.device) -> Run:
    """A run with heads of the right sizes and any weights."""
    config = read_config(path)
    try:
        return Run.of(path, config, Heads(HeadsConfig.from_json(config["heads"])).to(device), device)
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path / CONFIG} lacks something or is not from this pmm ({error})") from None


def load_part(run: Run, store: Readable, part: str, memory_limit: int | None = None) -> Corpus:
    """The corpus of one part of a run's split, from exactly the features it was fitted on.

    It lies on the run's device where it fits, else in at most ``memory_limit`` bytes of memory (None:
    what is available), else in the store. Raises NotFound for features or takes that ``store`` does not have.
    """
    people, rows = part_of(run, store, part), run.heads.config.image_rows
    frames = data.frames_of(store, run.specs, people, run.fps)
    needed = memory.corpus_bytes(frames, run.specs, len(run.names), rows)
    limits, takes = memory.measured(run.device, memory_limit), sum(map(len, people.values()))
    lie = memory.choose_cache(memory.AUTO, needed, limits, takes, run.options.modalities).cache
    return data.load(store, run.specs, people, run.names, run.fps, rows, device=run.device, cache=lie)


def part_of(run: Run, store: Readable, part: str) -> dict[str, tuple[Take, ...]]:
    """The takes of one part of a run's split, by identity. Raises NotFound as ``load_part`` does."""
    missing = [name for name, spec in run.specs.items() if spec.id not in store.specs]
    if missing:
        raise NotFound(
            f"the {missing[0]} features {run.specs[missing[0]].id[:12]} that the run in {run.path} was "
            f"fitted on are not in the store at {store.where}; name the store by --store, or precompute them"
        )
    known = {take.id: take for take in store.takes()}
    return {who: _takes(run, store, known, ids) for who, ids in run.config["split"][part].items()}


def _takes(run: Run, store: Readable, known: Mapping[str, Take], ids: Sequence[str]) -> tuple[Take, ...]:
    gone = [name for name in ids if name not in known]
    if gone:
        raise NotFound(
            f"{len(gone)} takes of the run in {run.path} (the first {gone[0][:12]}) are not in the store at "
            f"{store.where}; name the store it was fitted on by --store"
        )
    return tuple(known[name] for name in ids)


def predict(
    run: Run, features: Mapping[str, np.ndarray], style: str | int = MEAN_STYLE, frames: int | None = None
) -> np.ndarray:
    """Coefficients (T, K) float32 of one clip from its native features; see ``predict_heads``.

    ``style`` is a training identity's name or number, or "mean". Raises NotFound for another.
    """
    return predict_heads(run.heads, features, run.style_vector(style), frames)


__all__ = [
    "Content",
    "EpochDone",
    "FitOptions",
    "Job",
    "Prepared",
    "Result",
    "Run",
    "Started",
    "StepDone",
    "fit",
    "fit_many",
    "load_run",
    "predict",
    "prepare",
]
