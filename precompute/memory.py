"""How much memory a forward may fill, and telling when it ran out, so that half as much is tried next."""

from __future__ import annotations

import torch

from pmm.precompute.forecast import free_memory

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


def free(device: torch.device) -> int | None:
    """Bytes that can still be filled on a device; None where nobody knows."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
