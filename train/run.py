"""The run folder: everything that decides a run, what it measured, and its heads.

::

    config.json        options, sizes, feature specs with what made them, store, split, styles, mean
    metrics.jsonl      one line an epoch; after a resumption the last line of an epoch holds
    best.safetensors   the heads with the lowest validation LVE
    last.safetensors   the heads and the optimiser after the last whole epoch: where --resume goes on

The folder is written by one run and never taken over by another.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pmm
from pmm import AlreadyThere, BadInput, NotFound
from pmm.store import snapshots
from pmm.store.cache import Fetched
from pmm.store.catalog import Store
from pmm.store.clip import Take
from pmm.store.digest import canonical_json, strict_json
from pmm.store.feature import FeatureSpec
from pmm.store.remote import is_address, place
from pmm.store.rig import RIGS
from pmm.store.snapshots import Readable, View
from pmm.train import checkpoint, data, memory, protocols
from pmm.train.checkpoint import FORMAT, State
from pmm.train.data import Corpus, Skipped
from pmm.train.heads import Heads, HeadsConfig, preset
from pmm.train.loop import EpochDone, Schedule, Started, StepDone, seed_of, train
from pmm.train.options import FitOptions, torch_device
from pmm.train.predict import predict_heads
from pmm.train.protocols import MEAN_STYLE, Merged

CONFIG, METRICS, BEST, LAST = "config.json", "metrics.jsonl", "best.safetensors", "last.safetensors"


@dataclass(frozen=True)
class Content:
    """Event: what the run reads, as a snapshot of the store, with its id.

    ``unpinned`` says why the snapshot could not be kept in the store; empty if it is there.
    """

    snapshot: str = ""
    id: str = ""
    unpinned: str = ""


Event = Fetched | Content | Started | StepDone | EpochDone


@dataclass(frozen=True)
class Result:
    """What came of a fit. ``skipped`` takes lacked features or disagreed in length."""

    path: Path
    epochs: int
    best_epoch: int
    best_lve: float
    clips: int
    frames: int
    skipped: tuple[Skipped, ...]
    content: Content = Content()

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.path),
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "best_validation_lve": self.best_lve,
            "training_clips": self.clips,
            "training_frames": self.frames,
            "skipped": [asdict(one) for one in self.skipped],
            "content": asdict(self.content),
        }


# --- fit -------------------------------------------------------------------------------------------


def fit(
    store: Store,
    run_dir: Path | str,
    options: FitOptions,
    on_event: Callable[[Event], None] | None = None,
    resume: bool = False,
    memory_limit: int | None = None,
) -> Result:
    """Fit heads from the cached features of ``store`` into the new folder ``run_dir``.

    With ``resume`` the run that is there goes on from its last whole epoch, with the options it was
    started with, to the same losses as if it had never stopped.
    All of training and validation is held in memory: at most ``memory_limit`` bytes (None: what is
    available).

    Raises AlreadyThere if ``run_dir`` exists (and not ``resume``), NotFound or BadInput where the
    store lacks what is needed, too few subjects for the protocol included, and where the memory does
    not hold it.
    """
    path = Path(run_dir)
    tell = on_event or (lambda event: None)
    if resume:
        return _go_on(store, path, options, tell, memory_limit)
    if path.exists():
        raise AlreadyThere(
            f"{path} already exists and nothing is overwritten; "
            "go on with it by --resume, or name another folder"
        )
    return _begin(store, path, options, tell, memory_limit)


def _begin(
    store: Store, path: Path, options: FitOptions, tell: Callable[[Event], None], memory_limit: int | None
) -> Result:
    device = torch_device(options.device)
    schedule, names = options.schedule, RIGS[options.rig]
    chosen = View(store, snapshots.load(store, options.snapshot)) if options.snapshot else store
    specs = data.choose_specs(chosen, options.fps, options.features, (*options.modalities, "target"))
    keywords = _head_keywords(options, specs)
    split = protocols.split(options.protocol, data.listed_takes(chosen), options.seed)
    rows = HeadsConfig(**keywords, styles=1).image_rows
    sides = (split.train, split.validation)
    _refuse_too_much(chosen, specs, sides, options, rows, device, memory_limit)
    wanted = [take for name in ("train", "validation") for takes in split[name].values() for take in takes]
    if isinstance(chosen, View):
        chosen.require(spec.id for spec in specs.values())
    data.fetch(chosen, specs, wanted, tell)
    content, source = _content(store, chosen, specs, wanted)
    tell(content)
    parts = {
        name: data.load(source, specs, split[name], names, options.fps, rows)
        for name in ("train", "validation")
    }
    corpus = parts["train"].to(device)
    styles = tuple(dict.fromkeys(corpus.subjects))
    heads = _new_heads(HeadsConfig(**keywords, styles=len(styles)), corpus, options.seed, device)
    config = {
        "format": FORMAT,
        "versions": _versions(),
        "options": options.to_json(),
        "schedule": asdict(schedule),
        "heads": heads.config.to_json(),
        "names": list(names),
        "fps": options.fps,
        "content": asdict(content),
        "store": store.where if is_address(store.where) else str(store.path.resolve()),
        "specs": {name: spec.to_json() for name, spec in specs.items()},
        "made_with": {name: _made_with(store, spec) for name, spec in specs.items()},
        "split": _used(split, parts),
        "merged": [asdict(one) for one in split.merged],
        "skipped": [asdict(one) for part in parts.values() for one in part.skipped],
        "styles": list(styles),
        "mean": heads.decoder.output.bias.tolist(),
    }
    _create(path, config)
    return _train(Run.of(path, config, heads, device), corpus, parts["validation"].to(device), tell)


def _refuse_too_much(
    store: Readable,
    specs: Mapping[str, FeatureSpec],
    sides: Sequence[protocols.Part],
    options: FitOptions,
    rows: tuple[int, int],
    device: torch.device,
    limit: int | None,
) -> None:
    frames = sum(data.frames_of(store, specs, people, options.fps) for people in sides)
    takes = sum(len(own) for people in sides for own in people.values())
    needed = memory.corpus_bytes(frames, specs, len(RIGS[options.rig]), rows)
    limit = memory.available(device) if limit is None else limit
    memory.refuse_too_much(needed, limit, takes, options.modalities)


def _content(
    store: Store, chosen: Readable, specs: Mapping[str, FeatureSpec], wanted: Sequence[Take]
) -> tuple[Content, View]:
    """What a run is about to read, byte for byte: the snapshot it was given, or a new one of its own."""
    if isinstance(chosen, View):
        return Content(chosen.snapshot.name, chosen.snapshot.id), chosen
    found = data.rows(store, specs, wanted)
    snapshot, reason = snapshots.pin(store, found)
    return Content(snapshot.name, snapshot.id, reason), View(store, snapshot)


def _head_keywords(options: FitOptions, specs: Mapping[str, FeatureSpec]) -> dict[str, Any]:
    """Keywords of HeadsConfig, but for the styles."""
    pictures = "image" in specs and len(specs["image"].shape) == 3
    plain = [name for name in options.modalities if name != "image" or not pictures]
    sizes = {name: data.row_size(specs[name]) for name in plain}
    changes = {
        name: getattr(options, name)
        for name in ("lookahead", "context", "max_context", "dropout", "modality_dropout")
    }
    keywords = {
        "feature_sizes": sizes,
        "coefficients": len(RIGS[options.rig]),
        "modalities": options.modalities,
        "decoder_input": options.decoder_input,
        **preset(options.preset, options.fps, **changes),
    }
    if pictures:
        height, width, _ = specs["image"].shape
        if height != width:
            raise BadInput(f"lip frames of {height} x {width} pixels; the image encoder reads square ones")
        rows = keywords.get("image_rows", HeadsConfig.image_rows)
        keywords |= {"image_size": width, "image_rows": tuple(row * height // 96 for row in rows)}
    return keywords


def _new_heads(config: HeadsConfig, corpus: Corpus, seed: int, device: torch.device) -> Heads:
    """Heads drawn from ``seed``, the same on every device, that begin at the means of ``corpus``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights", 0))
        heads = Heads(config).to(device)
    image, scale = (
        data.image_statistics(corpus.features["image"]) if "image" in corpus.features else (None, 1.0)
    )
    heads.start_from(corpus.target.mean(0, dtype=torch.float64).float(), image, scale)
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


def _go_on(
    store: Store, path: Path, options: FitOptions, tell: Callable[[Event], None], memory_limit: int | None
) -> Result:
    run = _open(path, torch_device(options.device))
    if other := run.options.differs(options):
        raise BadInput(
            f"the run in {path} was started with {other}; resume it without that option, or start a new run"
        )
    content = Content(**run.config.get("content", {}))
    pinned = content.snapshot in snapshots.names(store)
    source = View(store, snapshots.load(store, content.snapshot)) if pinned else store
    sides = [part_of(run, source, name) for name in ("train", "validation")]
    rows = run.heads.config.image_rows
    _refuse_too_much(source, run.specs, sides, run.options, rows, run.device, memory_limit)
    parts = {name: load_part(run, source, name).to(run.device) for name in ("train", "validation")}
    for name, corpus in parts.items():
        if corpus.skipped:
            first = corpus.skipped[0]
            raise NotFound(
                f"{len(corpus.skipped)} {name} takes of the run in {path} can no longer be used "
                f"({first.source}: {first.reason}); restore them in {store.where}, or start a new run"
            )
    if not (path / LAST).exists():
        fresh = _new_heads(run.heads.config, parts["train"], run.options.seed, run.device)
        run.heads.load_state_dict(fresh.state_dict())
    return _train(run, parts["train"], parts["validation"], tell)


def _train(run: Run, corpus: Corpus, validation: Corpus, tell: Callable[[Event], None]) -> Result:
    """From the checkpoint, if there is one, to the end of the schedule."""
    heads, options, schedule = run.heads, run.options, Schedule(**run.config["schedule"])
    optimiser = torch.optim.Adam(heads.parameters(), lr=schedule.learning_rate)
    last = run.path / LAST
    state = checkpoint.load(last, heads, optimiser) if last.exists() else State()
    number = {name: n for n, name in enumerate(run.styles)}
    styles = torch.tensor([number[who] for who in corpus.subjects], device=run.device)
    tell(_started(run, corpus, validation, schedule, state))
    events = train(
        heads,
        optimiser,
        corpus,
        styles,
        validation,
        schedule,
        options.weights,
        seed=options.seed,
        reduction=options.loss_reduction,
        first_epoch=state.epoch,
        best_lve=state.best_lve,
    )
    for event in events:
        if isinstance(event, EpochDone):
            state = _keep(run.path, event, state, heads, optimiser)
        tell(event)
    skipped = tuple(Skipped(**one) for one in run.config["skipped"])
    clips, frames = len(corpus.takes), corpus.frames
    content = Content(**run.config.get("content", {}))
    return Result(run.path, state.epoch, state.best_epoch, state.best_lve, clips, frames, skipped, content)


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


def _keep(
    path: Path, event: EpochDone, state: State, heads: Heads, optimiser: torch.optim.Optimizer
) -> State:
    """Checkpoints, then the line of metrics: whatever a kill leaves behind, the run can go on."""
    if event.best:
        state = State(event.epoch, event.epoch, event.validation_lve)
        checkpoint.save(path / BEST, heads, state)
    state = State(event.epoch, state.best_epoch, state.best_lve)
    checkpoint.save(path / LAST, heads, state, optimiser)
    _append(path / METRICS, json.dumps(asdict(event)))
    return state


def _append(path: Path, line: str) -> None:
    """Add a line, after closing one that a kill has torn."""
    with path.open("a+b") as file:
        torn = file.tell() > 0 and path.read_bytes()[-1:] != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")


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


def load_part(run: Run, store: Readable, part: str) -> Corpus:
    """The corpus of one part of a run's split, from exactly the features it was fitted on.

    Raises NotFound for features or takes that ``store`` does not have.
    """
    people = part_of(run, store, part)
    return data.load(store, run.specs, people, run.names, run.fps, run.heads.config.image_rows)


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


__all__ = ["EpochDone", "FitOptions", "Result", "Run", "Started", "StepDone", "fit", "load_run", "predict"]
