"""When memory runs out in a forward: telling it from other errors, so that half as much is tried next."""

from __future__ import annotations

import torch

ERRORS = (RuntimeError, MemoryError)
"""What running out of memory may be raised as; ``ran_out`` tells whether one of these was it."""

_WORDS = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc", "alloc_failed")


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's or the computer's, as torch, its libraries and numpy tell it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


def let_go(device: torch.device) -> None:
    """Gives back what torch keeps for later, so that smaller tensors find room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
