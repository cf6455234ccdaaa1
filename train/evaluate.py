"""Scores of a run beside what needs no model: the training mean face, and silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmm import BadInput
from pmm.store.catalog import Store
from pmm.train import metrics
from pmm.train.data import Batch, Corpus, Skipped, batches
from pmm.train.metrics import FRAME_ERRORS, MOTION_ERRORS
from pmm.train.protocols import PARTS
from pmm.train.run import Run, load_part

PREDICTORS = ("heads", "mean_face", "silence")
METRICS = (*FRAME_ERRORS, *MOTION_ERRORS, "jitter")
BATCH_CLIPS = 8

Score = Mapping[str, Mapping[str, float]]
"""predictor -> metric -> value"""


@dataclass(frozen=True)
class Pauses:
    """How closed and how still faces are where the captured one is in a pause (``metrics.pauses``).

    ``jaw_open`` and ``jitter`` are means over those frames, by predictor and for the ``target``;
    None where there is no such frame.
    """

    frames: int
    jaw_open: Mapping[str, float | None]
    jitter: Mapping[str, float | None]


@dataclass(frozen=True)
class Scores:
    """Metrics pooled over all frames of a part of the split.

    scores         predictor -> metric -> value; predictors are ``heads``, ``mean_face`` (the training
                   mean in every frame) and ``silence`` (all zeros), metrics those of METRICS; motion and
                   jitter are 0 where no clip has the frames that they compare
    coefficients   coefficient -> predictor -> its mean ``absolute`` and ``squared`` error
    target_jitter  of the captures themselves
    subjects       scores by identity
    style          the one style that everybody was predicted in; empty: their own, and unseen
                   subjects under all of ``styles``, whose metrics are averaged
    """

    run: str
    split: str
    clips: int
    frames: int
    style: str
    styles: tuple[str, ...]
    scores: Score
    target_jitter: float
    coefficients: Mapping[str, Score]
    pauses: Pauses
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
            "style": self.style,
            "styles": list(self.styles),
            "scores": {name: dict(values) for name, values in self.scores.items()},
            "lve_over_mean_face": self.ratio,
            "target_jitter": self.target_jitter,
            "pauses": {
                "frames": self.pauses.frames,
                "jaw_open": dict(self.pauses.jaw_open),
                "jitter": dict(self.pauses.jitter),
            },
            "coefficients": {
                name: {who: dict(errors) for who, errors in score.items()}
                for name, score in self.coefficients.items()
            },
            "subjects": {
                who: {"frames": self.subject_frames[who], **{name: dict(v) for name, v in score.items()}}
                for who, score in self.subjects.items()
            },
            "skipped": [{"source": one.source, "reason": one.reason} for one in self.skipped],
        }


@torch.no_grad()
def evaluate(
    run: Run, store: Store, split: str = "test", style: str = "", corpus: Corpus | None = None
) -> Scores:
    """Score the run's heads on one part of its split.

    A subject that was trained on is predicted in its own style; an unseen one under every training
    style, and its metrics are averaged over styles. ``style``, a training identity's name or "mean",
    fixes one for everybody. ``corpus`` are the clips of that part, where they are loaded already.
    Raises NotFound for a style the run does not have, and as ``load_run`` and ``load_part`` do.
    """
    corpus = part_to_score(run, store, split, style, corpus)
    rests = _rests(run, corpus)
    tallies: dict[str, _Tally] = {}
    for batch in batches(corpus, torch.arange(len(corpus.takes)), BATCH_CLIPS):
        for clip, target, heads in predictions(run, corpus, batch, style):
            who = corpus.subjects[clip]
            tally = tallies.setdefault(who, _Tally())
            _add_clip(tally, run, target, heads, rests.get(who))
    pooled = _Tally()
    for tally in tallies.values():
        pooled.join(tally)
    return Scores(
        run=str(run.path),
        split=split,
        clips=len(corpus.takes),
        frames=pooled.count["heads", "lve"],
        style=style,
        styles=run.styles,
        scores=_score(pooled),
        target_jitter=_number(pooled.mean("target", "jitter")) or 0.0,
        coefficients=_coefficients(pooled, run.names),
        pauses=_pauses(pooled),
        subjects={who: _score(tally) for who, tally in sorted(tallies.items())},
        subject_frames={who: tally.count["heads", "lve"] for who, tally in sorted(tallies.items())},
        skipped=corpus.skipped,
    )


# --- predictions -----------------------------------------------------------------------------------


def part_to_score(run: Run, store: Store, split: str, style: str, corpus: Corpus | None = None) -> Corpus:
    """The clips of one part of the run's split where the heads are, and the heads set to predict.

    Raises BadInput for a split and NotFound for a style that there is not.
    """
    if split not in PARTS:
        raise BadInput(f"split {split!r} is none of {', '.join(PARTS)}")
    if style:
        run.style_vector(style)
    run.heads.eval()
    return load_part(run, store, split) if corpus is None else corpus


def predictions(
    run: Run, corpus: Corpus, batch: Batch, style: str = ""
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of each clip of a batch its number, its target (T, K), and the heads' curves (R, T, K).

    R are the styles it is predicted under (see ``evaluate``); what does not depend on the style is
    computed once.
    """
    encoded = run.heads.encode(batch.features, batch.valid)
    under = _styles(run, [corpus.subjects[clip] for clip in batch.clips.tolist()], style)
    every = np.stack([run.heads.decode(encoded, one, batch.valid).cpu().numpy() for one in under])
    target, lengths = batch.target.cpu().numpy(), batch.valid.sum(1).tolist()
    for row, (clip, length) in enumerate(zip(batch.clips.tolist(), lengths)):
        yield clip, target[row, :length], every[:, row, :length]


def _styles(run: Run, subjects: Sequence[str], style: str) -> Tensor:
    """(R, B, P): the styles that the clips of these subjects (B) are predicted under."""
    table = run.heads.styles.weight
    if style:
        return run.style_vector(style).expand(1, len(subjects), -1)
    number = {name: n for n, name in enumerate(run.styles)}
    own = torch.tensor([number.get(who, -1) for who in subjects], device=table.device)
    if (own >= 0).all():
        return table[own][None]
    return torch.where((own >= 0)[None, :, None], table[own][None], table[:, None])


# --- tallies ---------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Sums over frames, and how many there were, by predictor and metric."""

    total: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    count: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, who: str, metric: str, values: np.ndarray) -> None:
        """``values`` (n,) or (n, K) of n frames."""
        self._add((who, metric), values.sum(0, dtype=np.float64), len(values))

    def join(self, other: _Tally) -> None:
        for key, total in other.total.items():
            self._add(key, total, other.count[key])

    def _add(self, key: tuple[str, str], total: np.ndarray, count: int) -> None:
        self.total[key] = self.total.get(key, np.zeros(())) + total
        self.count[key] = self.count.get(key, 0) + count

    def mean(self, who: str, metric: str) -> np.ndarray | None:
        """() or (K,); None without a frame."""
        count = self.count.get((who, metric), 0)
        return self.total[who, metric] / count if count else None


def _add_clip(tally: _Tally, run: Run, target: np.ndarray, heads: np.ndarray, jaw_rest: float | None) -> None:
    """One clip: its ``target`` (T, K) and the ``heads``' curves (R, T, K), averaged over the R styles."""
    mean = np.broadcast_to(run.mean, target.shape)
    curves = {"heads": heads, "mean_face": mean[None], "silence": np.zeros_like(target)[None]}
    for who, styles in curves.items():
        for metric, values in _values(styles, target).items():
            tally.add(who, metric, values)
    tally.add("target", "jitter", metrics.jitter(target))
    if jaw_rest is None:
        return
    jaw, pause = run.names.index("JawOpen"), metrics.pauses(target, run.names, run.fps, jaw_rest)
    for who, styles in {**curves, "target": target[None]}.items():
        tally.add(who, "pause_jaw", styles[:, pause > 0, jaw].mean(0))
        tally.add(who, "pause_jitter", np.mean([metrics.within(pause, one) for one in styles], axis=0))


def _values(styles: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of each frame, averaged over predictions (R, T, K) of one clip."""
    values = {
        name: np.mean([error(one, target) for one in styles], axis=0)
        for name, error in (FRAME_ERRORS | MOTION_ERRORS).items()
    }
    values["jitter"] = np.mean([metrics.jitter(one) for one in styles], axis=0)
    each = np.stack([metrics.errors(one, target) for one in styles])
    return values | {"absolute": each.mean(0), "squared": np.square(each).mean(0)}


def _rests(run: Run, corpus: Corpus) -> dict[str, float]:
    """Where each identity's jaw rests; {} on a rig without a JawOpen."""
    if "JawOpen" not in run.names:
        return {}
    jaw = corpus.target[:, run.names.index("JawOpen")].cpu().numpy()
    own: dict[str, list[np.ndarray]] = {}
    for who, first, length in zip(corpus.subjects, corpus.start.tolist(), corpus.lengths.tolist()):
        own.setdefault(who, []).append(jaw[first : first + length])
    return {who: metrics.rest(np.concatenate(parts)) for who, parts in own.items()}


def _score(tally: _Tally) -> dict[str, dict[str, float]]:
    return {
        who: {metric: _number(tally.mean(who, metric)) or 0.0 for metric in METRICS} for who in PREDICTORS
    }


def _coefficients(tally: _Tally, names: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    means = {
        (who, kind): tally.total[who, kind] / tally.count[who, kind]
        for who in PREDICTORS
        for kind in ("absolute", "squared")
    }
    return {
        name: {
            who: {kind: float(means[who, kind][column]) for kind in ("absolute", "squared")}
            for who in PREDICTORS
        }
        for column, name in enumerate(names)
    }


def _pauses(tally: _Tally) -> Pauses:
    every = (*PREDICTORS, "target")
    return Pauses(
        frames=tally.count.get(("heads", "pause_jaw"), 0),
        jaw_open={who: _number(tally.mean(who, "pause_jaw")) for who in every},
        jitter={who: _number(tally.mean(who, "pause_jitter")) for who in every},
    )


def _number(mean: np.ndarray | None) -> float | None:
    return None if mean is None else float(mean)
