"""Do the heads listen? How much worse they get when one modality comes from another clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmm import BadInput
from pmm.store.catalog import Store
from pmm.train import metrics
from pmm.train.data import Batch, Corpus, batches, gather
from pmm.train.evaluate import BATCH_CLIPS, part_to_score, predictions
from pmm.train.loop import seed_of
from pmm.train.run import Run

EVERYTHING = "everything"
"""All modalities from the other clip: what is left is the mean, the style, and luck."""


@dataclass(frozen=True)
class Importance:
    """LVE with every modality in its place, and with one from another clip.

    swapped  modality -> LVE; EVERYTHING has all of them from one other clip
    """

    run: str
    split: str
    clips: int
    frames: int
    style: str
    seed: int
    lve: float
    swapped: Mapping[str, float]

    def change(self, modality: str) -> float:
        """How much the LVE rises: about 0 for a modality that the heads do not listen to."""
        return self.swapped[modality] - self.lve

    def relative(self, modality: str) -> float | None:
        """The same as a part of the LVE; None where that is 0."""
        return self.change(modality) / self.lve if self.lve else None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "split": self.split,
            "clips": self.clips,
            "frames": self.frames,
            "style": self.style,
            "seed": self.seed,
            "lve": self.lve,
            "swapped": {
                name: {"lve": value, "change": self.change(name), "relative_change": self.relative(name)}
                for name, value in self.swapped.items()
            },
        }


@torch.no_grad()
def importance(run: Run, store: Store, split: str = "test", style: str = "", seed: int = 0) -> Importance:
    """Score the heads with each modality of every clip taken from another clip of the same part.

    Which other clip is the same for all modalities, and never the clip itself (``derangement``). The
    other's frames are read at their own speed: from its start, over again where it is shorter, cut
    where it is longer; stretching them instead would show whether the heads mind the pace. The heads
    are not trained anew: this asks what they use, an ablation asks what could be done without.

    Raises BadInput with fewer than two clips, and as ``evaluate`` does.
    """
    corpus = part_to_score(run, store, split, style)
    clips = len(corpus.takes)
    if clips < 2:
        raise BadInput(
            f"the {split} part of the run in {run.path} has 1 clip, and nothing to swap it with; "
            "choose another --split"
        )
    other = derangement(clips, seed)
    modalities = run.heads.config.modalities
    swaps: dict[str, tuple[str, ...]] = {"": (), **{name: (name,) for name in modalities}}
    swaps[EVERYTHING] = modalities
    total, frames = dict.fromkeys(swaps, 0.0), 0
    for batch in batches(corpus, torch.arange(clips), BATCH_CLIPS):
        frames += int(batch.valid.sum())
        foreign = _foreign(corpus, batch, other)
        for name, own in swaps.items():
            features = {**batch.features, **{modality: foreign[modality] for modality in own}}
            total[name] += _squared_errors(run, corpus, replace(batch, features=features), style)
    lve = {name: value / frames for name, value in total.items()}
    return Importance(str(run.path), split, clips, frames, style, seed, lve.pop(""), lve)


def derangement(count: int, seed: int) -> Tensor:
    """A random order (count,) of count > 1 numbers that leaves none where it was: one cycle of all."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, "swap", 0)))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other


def _foreign(corpus: Corpus, batch: Batch, other: Tensor) -> dict[str, Tensor]:
    """The features of the clips that stand ``other`` (N,), over again to the length of the batch."""
    source = gather(corpus, other[batch.clips.cpu()])
    frame = torch.arange(batch.valid.shape[1], device=batch.valid.device)
    rows = frame % source.valid.sum(1)[:, None]
    clip = torch.arange(len(rows), device=rows.device)[:, None]
    return {name: x[clip, rows] for name, x in source.features.items()}


def _squared_errors(run: Run, corpus: Corpus, batch: Batch, style: str) -> float:
    """The largest squared error of each frame, averaged over styles and added up over the batch."""
    return sum(
        float(np.mean([metrics.largest_squared(one, target).sum() for one in heads]))
        for _, target, heads in predictions(run, corpus, batch, style)
    )
