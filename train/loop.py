"""The training loop.

What is random in it (the order of clips, the windows of long ones, dropout) is a function of the
seed and of the number of the epoch or step, so the number is all that must be kept to go on exactly
where a run stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from pmm import BadInput
from pmm.store import clock
from pmm.store.digest import digest
from pmm.train import losses, metrics
from pmm.train.data import Batch, Corpus, batches, windows
from pmm.train.heads import Heads
from pmm.train.losses import Losses, Weights
from pmm.train.protocols import Merged

VALIDATION_BATCH = 8


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    batch_size     clips
    learning_rate  of Adam; with ``cosine`` it rises over the first ``warm_up`` of all steps and then
                   falls to zero along half a cosine; without, it stays
    window         seconds; an epoch reads one window of this length of each clip that is longer, at
                   another place each time: the temporal loss of a clip costs the square of its length
    patience       epochs without a better validation LVE after which training stops; 0: never
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warm_up: float = 0.0
    cosine: bool = False
    window: float = 20.0
    patience: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.learning_rate < math.inf:
            raise BadInput(
                f"epochs {self.epochs}, batch size {self.batch_size}, learning rate {self.learning_rate}: "
                "each must be above zero"
            )
        if not 1 <= self.window < math.inf:
            raise BadInput(f"window {self.window} s: it must be at least 1 s, and finite")
        if self.patience < 0:
            raise BadInput(f"patience {self.patience}: it must be at least 0, which is for ever")

    def to_do(self, state: State) -> bool:
        """Whether there are epochs left after ``state``, and one that was better is recent enough."""
        patient = not self.patience or state.epoch - state.best_epoch < self.patience
        return state.epoch < self.epochs and patient


@dataclass(frozen=True)
class State:
    """Where a run stands: all that is random in it follows from these numbers.

    epoch        whole epochs done
    best_epoch   the best of them (from 1), and its validation LVE
    step         steps done of the epoch under way
    clips, sums  how many clips these were, and their losses added up
    """

    epoch: int = 0
    best_epoch: int = 0
    best_lve: float = math.inf
    step: int = 0
    clips: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)

    def after_step(self, losses: Mapping[str, float], clips: int) -> State:
        sums = {name: self.sums.get(name, 0.0) + clips * value for name, value in losses.items()}
        return replace(self, step=self.step + 1, clips=self.clips + clips, sums=sums)

    def after_epoch(self, validation_lve: float) -> State:
        best = (self.epoch + 1, validation_lve)
        if not validation_lve < self.best_lve:
            best = (self.best_epoch, self.best_lve)
        return State(self.epoch + 1, *best)

    @property
    def losses(self) -> dict[str, float]:
        """Means over the clips of the epoch under way."""
        return {name: total / self.clips for name, total in self.sums.items()}


SCHEDULES: dict[str, dict[str, Any]] = {
    "fast": {
        "epochs": 20,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warm_up": 0.1,
        "cosine": True,
        "patience": 10,
    },
    "paper": {"epochs": 80, "batch_size": 1, "learning_rate": 1e-4},
    "smoke": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "window": 5.0},
}


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """Of ``step`` (from 0) out of ``steps``."""
    if not schedule.cosine:
        return schedule.learning_rate
    rising = max(1, round(schedule.warm_up * steps))
    if step < rising:
        return schedule.learning_rate * (step + 1) / rising
    return schedule.learning_rate * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def seed_of(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for every purpose and number, 60 bits."""
    return int(digest("seed", {"seed": seed, "purpose": purpose, "number": number})[:15], 16)


@dataclass(frozen=True)
class Started:
    """Event: everything is loaded, training begins (or goes on) at ``first_epoch`` (from 0).

    ``first_step`` (from 0) of it. ``skipped`` takes are not used; ``merged`` are the subjects that count as
    one person. ``split`` are the identities by part, as the protocol chose them; ``unused`` takes it put
    into no part.
    """

    clips: int
    frames: int
    validation_clips: int
    styles: tuple[str, ...]
    skipped: int
    merged: tuple[Merged, ...]
    parameters: int
    epochs: int
    first_epoch: int
    steps_per_epoch: int
    device: str
    first_step: int = 0
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unused: int = 0


@dataclass(frozen=True)
class StepDone:
    """Event: one step of the optimiser. ``epoch`` and ``step`` (within it) count from 1.

    ``losses`` are total, position, motion, temporal and semantic, the parts unweighted. ``seconds`` went
    into waiting for data, forward, backward and optimiser; ``state`` is where the run stands now.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    losses: dict[str, float]
    learning_rate: float
    frames: int
    frames_per_second: float
    seconds: dict[str, float]
    state: State = field(repr=False, compare=False)


@dataclass(frozen=True)
class EpochDone:
    """Event: an epoch is over. ``losses`` are means over its clips; ``best`` if no epoch before had a
    lower ``validation_lve``; ``frames_per_second`` of training, ``seconds`` with validation.
    """

    epoch: int
    epochs: int
    losses: dict[str, float]
    validation_lve: float
    best: bool
    seconds: float
    frames_per_second: float
    state: State = field(repr=False, compare=False)


Event = Started | StepDone | EpochDone


def train(
    heads: Heads,
    optimiser: torch.optim.Optimizer,
    corpus: Corpus,
    styles: Tensor,
    validation: Corpus,
    schedule: Schedule,
    weights: Weights,
    *,
    seed: int,
    reduction: str = "sum",
    state: State | None = None,
    validation_styles: Tensor | None = None,
) -> Iterator[StepDone | EpochDone]:
    """Train ``heads`` in place from ``state`` on; yields an event after every step and every epoch.

    ``styles`` (N,) is the number of each clip's style; see ``validation_lve`` for those of validation.
    Clips longer than the schedule's window train by windows; the one of a clip in an epoch depends on
    the seed and both numbers only. The heads may be saved, with the event's state, whenever one comes.
    Raises BadInput if the loss is no longer finite.
    """
    state = state or State()
    while schedule.to_do(state):
        began, frames, speed = time.perf_counter(), 0, 0.0
        heads.train()
        steps = -(-len(corpus.takes) // schedule.batch_size)
        for batch, laps in _timed(_epoch(corpus, schedule, seed, state, heads.config.fps), corpus.device):
            number = state.epoch * steps + state.step
            rate = learning_rate(schedule, number, schedule.epochs * steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            dropout = seed_of(seed, "dropout", number)
            value = _step(heads, optimiser, batch, styles[batch.clips], weights, reduction, dropout, laps)
            found = _finite(value, state.epoch, state.step)
            state = state.after_step(found, len(batch.clips))
            count = int(batch.valid.sum())
            frames += count
            speed = frames / (time.perf_counter() - began)
            where = (state.epoch + 1, schedule.epochs, state.step, steps)
            yield StepDone(*where, found, rate, count, speed, laps.seconds(), state)
        means = state.losses
        lve = validation_lve(heads, validation, validation_styles)
        state = state.after_epoch(lve)
        seconds, best = time.perf_counter() - began, state.best_epoch == state.epoch
        yield EpochDone(state.epoch, schedule.epochs, means, lve, best, seconds, speed, state)


def _epoch(corpus: Corpus, schedule: Schedule, seed: int, state: State, fps: int) -> Iterator[Batch]:
    """What is left of the epoch's batches. ``fps`` is the period of the positions, too."""
    order = torch.Generator().manual_seed(seed_of(seed, "order", state.epoch))
    chance = torch.Generator().manual_seed(seed_of(seed, "window", state.epoch))
    spans = windows(corpus, clock.frames_in(schedule.window, fps), fps, chance)
    indices = torch.arange(len(corpus.takes))
    return batches(corpus, indices, schedule.batch_size, order, spans, first=state.step)


class Laps:
    """How long the parts of a step take; on a GPU by its own clock, asked when the step is over."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def lap(self, name: str) -> None:
        """What happened since the last lap was ``name``."""
        self._marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """By name, rounded to microseconds. On a GPU it must have finished."""
        laps = zip(self._marks, self._marks[1:])
        return {name: round(self._between(before, after), 6) for (_, before), (name, after) in laps}

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1000 if self._cuda else after - before


def _timed(made: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, Laps]]:
    """Each batch with a clock that began when it was asked for."""
    while True:
        laps = Laps(device)
        batch = next(made, None)
        if batch is None:
            return
        laps.lap("data")
        yield batch, laps


def _step(
    heads: Heads,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    style: Tensor,
    weights: Weights,
    reduction: str,
    seed: int,
    laps: Laps,
) -> Losses:
    devices = [batch.target.device] if batch.target.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = heads(batch.features, style.to(batch.target.device), batch.valid)
        value = losses.total(output, batch.target, batch.valid, weights, reduction)
        laps.lap("forward")
        optimiser.zero_grad(set_to_none=True)
        value.total.backward()
        laps.lap("backward")
        optimiser.step()
        heads.alignment.limit_scale()
        laps.lap("optimiser")
    return value


def _finite(value: Losses, epoch: int, step: int) -> dict[str, float]:
    names = [field.name for field in fields(value)]
    numbers = torch.stack([getattr(value, name).detach() for name in names]).tolist()
    if not math.isfinite(numbers[0]):
        raise BadInput(
            f"the loss became {numbers[0]} in epoch {epoch + 1}, step {step + 1}; "
            "start again with a lower learning rate"
        )
    return dict(zip(names, numbers))


@torch.no_grad()
def validation_lve(heads: Heads, corpus: Corpus, styles: Tensor | None = None) -> float:
    """LVE over all frames of ``corpus`` under each clip's own style or, of the unseen, the mean one.

    ``styles`` (N,) are the numbers of the clips' styles, -1 for the unseen (None: all of them).
    (Evaluation averages over every training style; for choosing an epoch one decoding a clip is enough.)
    """
    heads.eval()
    table = torch.cat([heads.styles.weight, heads.styles.weight.mean(0, keepdim=True)])
    styles = torch.full((len(corpus.takes),), -1) if styles is None else styles
    errors = []
    for batch in batches(corpus, torch.arange(len(corpus.takes)), VALIDATION_BATCH):
        encoded = heads.encode(batch.features, batch.valid)
        prediction = heads.decode(encoded, table[styles[batch.clips]], batch.valid)
        pair = prediction[batch.valid].cpu().numpy(), batch.target[batch.valid].cpu().numpy()
        errors.append(metrics.largest_squared(*pair))
    total: float = sum(float(part.sum()) for part in errors)
    return total / corpus.frames
