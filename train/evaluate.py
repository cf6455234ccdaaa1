"""Scores of a run beside what needs no model: the training mean face, and silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pmm import BadInput
from pmm.store.catalog import Store
from pmm.train.data import Batch, Corpus, Skipped, batches
from pmm.train.metrics import FRAME_ERRORS
from pmm.train.protocols import PARTS
from pmm.train.run import Run, load_part

PREDICTORS = ("heads", "mean_face", "silence")
BATCH_CLIPS = 8

Score = Mapping[str, Mapping[str, float]]
"""predictor -> metric -> value"""


@dataclass(frozen=True)
class Scores:
    """Metrics pooled over all frames of a part of the split.

    scores    predictor -> metric -> value; predictors are ``heads``, ``mean_face`` (the training mean
              in every frame) and ``silence`` (all zeros), metrics those of ``metrics.FRAME_ERRORS``
    subjects  the same by identity
    styles    the training styles an unseen subject is predicted under; its metrics are their means
    """

    run: str
    split: str
    clips: int
    frames: int
    styles: tuple[str, ...]
    scores: Score
    subjects: Mapping[str, Score]
    subject_frames: Mapping[str, int]
    skipped: tuple[Skipped, ...]

    @property
    def ratio(self) -> float | None:
        """LVE of the heads over LVE of the mean face: below 1, they have learnt something.

        None where the mean face is never wrong: captures in which nothing moves.
        """
        still = self.scores["mean_face"]["lve"]
        return self.scores["heads"]["lve"] / still if still else None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "split": self.split,
            "clips": self.clips,
            "frames": self.frames,
            "styles": list(self.styles),
            "scores": {name: dict(values) for name, values in self.scores.items()},
            "lve_over_mean_face": self.ratio,
            "subjects": {
                who: {"frames": self.subject_frames[who], **{name: dict(v) for name, v in score.items()}}
                for who, score in self.subjects.items()
            },
            "skipped": [{"source": one.source, "reason": one.reason} for one in self.skipped],
        }


@torch.no_grad()
def evaluate(run: Run, store: Store, split: str = "test") -> Scores:
    """Score the run's heads on one part of its split.

    A subject that was trained on is predicted in its own style; an unseen one under every training
    style, and its metrics are averaged over styles. Raises as ``load_run`` and ``load_part`` do.
    """
    if split not in PARTS:
        raise BadInput(f"split {split!r} is none of {', '.join(PARTS)}")
    corpus = load_part(run, store, split).to(run.device)
    run.heads.eval()
    found: dict[str, list[np.ndarray]] = {}  # identity -> (predictor, metric, frame) errors
    for batch in batches(corpus, torch.arange(len(corpus.takes)), BATCH_CLIPS):
        for clip, errors in zip(batch.clips.tolist(), _clip_errors(run, corpus, batch)):
            found.setdefault(corpus.subjects[clip], []).append(errors)
    pooled = {who: np.concatenate(errors, axis=-1) for who, errors in sorted(found.items())}
    return Scores(
        run=str(run.path),
        split=split,
        clips=len(corpus.takes),
        frames=corpus.frames,
        styles=run.styles,
        scores=_score(np.concatenate(list(pooled.values()), axis=-1)),
        subjects={who: _score(errors) for who, errors in pooled.items()},
        subject_frames={who: errors.shape[-1] for who, errors in pooled.items()},
        skipped=corpus.skipped,
    )


def _clip_errors(run: Run, corpus: Corpus, batch: Batch) -> Iterator[np.ndarray]:
    """Of each clip of a batch: (predictor, metric, frame) float64."""
    predictions = _every_style(run, batch)
    lengths = batch.valid.sum(1).tolist()
    for row, (clip, length) in enumerate(zip(batch.clips.tolist(), lengths)):
        target = batch.target[row, :length].cpu().numpy()
        who = corpus.subjects[clip]
        styles = [run.styles.index(who)] if who in run.styles else range(len(run.styles))
        heads = np.mean([_frame_errors(predictions[s][row, :length], target) for s in styles], axis=0)
        mean = np.broadcast_to(run.mean, target.shape)
        yield np.stack([heads, _frame_errors(mean, target), _frame_errors(np.zeros_like(target), target)])


def _every_style(run: Run, batch: Batch) -> list[np.ndarray]:
    """(B, T, K) under each training style; what does not depend on the style is computed once."""
    heads = run.heads
    encoded = heads.encode(batch.features, batch.valid)
    styles = heads.styles.weight[:, None].expand(-1, len(batch.clips), -1)
    return [heads.decode(encoded, style, batch.valid).cpu().numpy() for style in styles]


def _frame_errors(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(metric, frame)."""
    return np.stack([error(prediction, target) for error in FRAME_ERRORS.values()])


def _score(errors: np.ndarray) -> dict[str, dict[str, float]]:
    """(predictor, metric, frame) -> the means over frames, by name."""
    means = errors.mean(-1).tolist()
    return {who: dict(zip(FRAME_ERRORS, values)) for who, values in zip(PREDICTORS, means)}
