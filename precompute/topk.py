"""The largest logits of each step, in place of all V of them.

Most of a step's probability lies with few tokens; the rest is kept as its mean. Row 0 holds the k largest
logits, row 1 their vocabulary columns, both in the order of columns (a neighbour's rounding then moves
no other value); the last column holds the mean of the other V - k logits, and -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALGORITHM = "wav2vec2-logits-topk/1"
REST = -1
"""In place of a column: the value is the mean of all columns that are not named."""


def largest(logits: Tensor, k: int) -> Tensor:
    """(..., V) float16 to (..., 2, k + 1) float32, 1 <= k < V. Of equal logits the lower column goes first.

    Where a logit is not finite, neither are all values of its step.
    """
    columns = torch.arange(logits.shape[-1], device=logits.device)
    keys = (_ordered(logits) << 32) - columns  # all different: topk leaves the order of equals open
    kept = keys.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    wide = logits.double()
    values = wide.gather(-1, kept)
    rest = (wide.sum(-1, keepdim=True) - values.sum(-1, keepdim=True)) / (logits.shape[-1] - k)
    names = torch.cat([kept, torch.full_like(kept[..., :1], REST)], dim=-1)
    return torch.stack([torch.cat([values, rest], dim=-1), names], dim=-2).float()


def _ordered(half: Tensor) -> Tensor:
    """Whole numbers in the order of float16 numbers: their bits, those of negative numbers upside down."""
    bits = (half + 0.0).view(torch.int16).long()  # -0.0 becomes 0.0
    return torch.where(bits < 0, -0x8000 - bits, bits)
