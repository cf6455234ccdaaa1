"""The training loop.

What is random in it (the order of clips, the windows of long ones, dropout) is a function of the
seed and of the number of the epoch or step, so the number is all that must be kept to go on exactly
where a run stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
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
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warm_up: float = 0.0
    cosine: bool = False
    window: float = 20.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.learning_rate < math.inf:
            raise BadInput(
                f"epochs {self.epochs}, batch size {self.batch_size}, learning rate {self.learning_rate}: "
                "each must be above zero"
            )
        if not 1 <= self.window < math.inf:
            raise BadInput(f"window {self.window} s: it must be at least 1 s, and finite")


SCHEDULES: dict[str, dict[str, Any]] = {
    "fast": {"epochs": 20, "batch_size": 4, "learning_rate": 1e-3, "warm_up": 0.1, "cosine": True},
    "paper": {"epochs": 80, "batch_size": 1, "learning_rate": 1e-4},
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

    ``skipped`` takes are not used; ``merged`` are the subjects that count as one person.
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


@dataclass(frozen=True)
class StepDone:
    """Event: one step of the optimiser. ``epoch`` and ``step`` (within it) count from 1.

    ``losses`` are total, position, motion, temporal and semantic, the parts unweighted.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    losses: dict[str, float]
    learning_rate: float
    frames_per_second: float


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
    first_epoch: int = 0,
    best_lve: float = math.inf,
) -> Iterator[StepDone | EpochDone]:
    """Train ``heads`` in place; yields an event after every step and every epoch.

    ``styles`` (N,) is the number of each clip's style. Clips longer than the schedule's window train
    by windows; the one of a clip in an epoch depends on the seed and both numbers only. The heads may
    be saved when EpochDone comes. Raises BadInput if the loss is no longer finite.
    """
    indices = torch.arange(len(corpus.takes))
    steps = -(-len(indices) // schedule.batch_size)
    fps = heads.config.fps  # the period of the positions, too
    longest = clock.frames_in(schedule.window, fps)
    for epoch in range(first_epoch, schedule.epochs):
        began = time.perf_counter()
        heads.train()
        order = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
        chance = torch.Generator().manual_seed(seed_of(seed, "window", epoch))
        spans = windows(corpus, longest, fps, chance)
        done: list[tuple[int, dict[str, float]]] = []
        frames = 0
        for step, batch in enumerate(batches(corpus, indices, schedule.batch_size, order, spans)):
            number = epoch * steps + step
            rate = learning_rate(schedule, number, schedule.epochs * steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            value = _step(heads, optimiser, batch, styles[batch.clips], weights, reduction, seed, number)
            done.append((len(batch.clips), _finite(value, epoch, step)))
            frames += int(batch.valid.sum())
            speed = frames / (time.perf_counter() - began)
            yield StepDone(epoch + 1, schedule.epochs, step + 1, steps, done[-1][1], rate, speed)
        lve = validation_lve(heads, validation)
        best = lve < best_lve
        best_lve = min(lve, best_lve)
        seconds = time.perf_counter() - began
        yield EpochDone(epoch + 1, schedule.epochs, _mean(done), lve, best, seconds, speed)


def _step(
    heads: Heads,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    style: Tensor,
    weights: Weights,
    reduction: str,
    seed: int,
    number: int,
) -> Losses:
    devices = [batch.target.device] if batch.target.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(seed, "dropout", number))
        output = heads(batch.features, style, batch.valid)
        value = losses.total(output, batch.target, batch.valid, weights, reduction)
        optimiser.zero_grad(set_to_none=True)
        value.total.backward()
        optimiser.step()
        heads.alignment.limit_scale()
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


def _mean(done: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    clips = sum(count for count, _ in done)
    return {name: sum(count * value[name] for count, value in done) / clips for name in done[0][1]}


@torch.no_grad()
def validation_lve(heads: Heads, corpus: Corpus) -> float:
    """LVE over all frames of ``corpus`` under the mean style: one decoding a clip.

    (Evaluation averages over every training style; for choosing an epoch their mean is enough.)
    """
    heads.eval()
    style = heads.styles.weight.mean(0)
    errors = []
    for batch in batches(corpus, torch.arange(len(corpus.takes)), VALIDATION_BATCH):
        encoded = heads.encode(batch.features, batch.valid)
        prediction = heads.decode(encoded, style.expand(len(batch.clips), -1), batch.valid)
        pair = prediction[batch.valid].cpu().numpy(), batch.target[batch.valid].cpu().numpy()
        errors.append(metrics.largest_squared(*pair))
    total: float = sum(float(part.sum()) for part in errors)
    return total / corpus.frames
