"""Equations 8 to 12, as pure functions of one batch.

Axes: B clips, T frames, D features, K coefficients. ``valid`` (B, T) bool marks the frames that
belong to a clip. Every loss is computed per clip and then averaged over clips, so a batch's loss is
the mean of what its clips would give one by one, and padding changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pmm import BadInput
from pmm.train.heads import PAIRS, Output

SHARPNESS = 10.0
"""The target of the temporal loss is ``softmax(SHARPNESS * I)``: a plain identity is nearly flat."""

REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class Weights:
    """``L = position + 10 motion + 1e-4 temporal + 1e-5 semantic`` (equation 8)."""

    position: float = 1.0
    motion: float = 10.0
    temporal: float = 1e-4
    semantic: float = 1e-5


@dataclass(frozen=True)
class Losses:
    """The weighted ``total`` and its four parts, unweighted; each a scalar tensor."""

    total: Tensor
    position: Tensor
    motion: Tensor
    temporal: Tensor
    semantic: Tensor


def position(prediction: Tensor, target: Tensor, valid: Tensor, reduction: str = "sum") -> Tensor:
    """Equation 9: ``1/T sum_t ||b^_t - b_t||^2``, (B, T, K) -> ().

    ``reduction`` "sum" adds over the K coefficients as the equation is printed, "mean" averages.
    """
    if reduction not in REDUCTIONS:
        raise BadInput(f"loss reduction {reduction!r} is none of {', '.join(REDUCTIONS)}")
    squared = (prediction - target).square()
    per_frame = squared.sum(-1) if reduction == "sum" else squared.mean(-1)
    total = per_frame.masked_fill(~valid, 0).sum(1)
    return (total / valid.sum(1).clamp(min=1)).mean()


def motion(prediction: Tensor, target: Tensor, valid: Tensor, reduction: str = "sum") -> Tensor:
    """Equation 10: the same on first differences, frames 2..T over T - 1; 0 for a clip of one frame."""
    both = valid[:, 1:] & valid[:, :-1]
    return position(prediction.diff(dim=1), target.diff(dim=1), both, reduction)


def temporal(aligned: Mapping[str, Tensor], scale: Tensor, valid: Tensor) -> Tensor:
    """Equation 11: each frame of one modality should recognise its own frame in the other.

    Per pair ``1/2 [KL(target || softmax(D)) + KL(target || softmax(D^T))]`` summed over the valid
    frames, ``D = scale * cos(X^, Y^)`` (B, T, T) and ``target = softmax(10 I)``, both over valid
    frames only; mean over the pairs (0 without one).
    """
    unit = {name: F.normalize(x, dim=-1) for name, x in aligned.items()}
    pairs = [_pair_divergence(unit[a], unit[b], scale, valid) for a, b in _pairs(aligned)]
    return torch.stack(pairs).mean() if pairs else scale.new_zeros(())


def _pair_divergence(x: Tensor, y: Tensor, scale: Tensor, valid: Tensor) -> Tensor:
    similarity = scale * (x @ y.transpose(1, 2))
    both = _divergence(similarity, valid) + _divergence(similarity.transpose(1, 2), valid)
    return (both / 2).mean()


def _divergence(logits: Tensor, valid: Tensor) -> Tensor:
    """``KL(softmax(10 I) || softmax(logits))`` summed over valid rows: (B, T, T) -> (B,).

    The target has two values only, so with n valid columns, ``near`` on the diagonal and ``far``
    beside it: ``KL_i = near log near + (n - 1) far log far - far sum_j logp_ij - (near - far) logp_ii``.
    """
    n = valid.sum(1).to(logits.dtype)
    denominator = math.exp(SHARPNESS) + n - 1
    near, far = math.exp(SHARPNESS) / denominator, 1 / denominator
    shift = logits.masked_fill(~valid[:, None, :], -math.inf).logsumexp(2)
    row_sum = logits.masked_fill(~valid[:, None, :], 0).sum(2) - n[:, None] * shift
    diagonal = logits.diagonal(dim1=1, dim2=2) - shift
    cross = far[:, None] * row_sum + (near - far)[:, None] * diagonal
    negative_entropy = near * near.log() + (n - 1) * far * far.log()
    return (negative_entropy[:, None] - cross).masked_fill(~valid, 0).sum(1)


def semantic(aligned: Mapping[str, Tensor], valid: Tensor) -> Tensor:
    """Equation 12: ``1 - cos(X~, Y~)`` of the means over valid frames, averaged over the pairs (or 0)."""
    count = valid.sum(1).clamp(min=1)[:, None]
    mean = {name: x.masked_fill(~valid[..., None], 0).sum(1) / count for name, x in aligned.items()}
    pairs = [(1 - F.cosine_similarity(mean[a], mean[b], dim=-1)).mean() for a, b in _pairs(aligned)]
    return torch.stack(pairs).mean() if pairs else count.new_zeros((), dtype=torch.float32)


def _pairs(aligned: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if pair[0] in aligned and pair[1] in aligned]


def total(output: Output, target: Tensor, valid: Tensor, weights: Weights, reduction: str = "sum") -> Losses:
    """Equation 8. A part of weight 0 is not computed and stands as 0."""
    nothing = target.new_zeros(())
    parts = {
        "position": lambda: position(output.prediction, target, valid, reduction),
        "motion": lambda: motion(output.prediction, target, valid, reduction),
        "temporal": lambda: temporal(output.aligned, output.scale, valid),
        "semantic": lambda: semantic(output.aligned, valid),
    }
    value = {name: part() if getattr(weights, name) else nothing for name, part in parts.items()}
    whole = sum((getattr(weights, name) * value[name] for name in parts), nothing)
    return Losses(total=whole, **value)
