"""Checkpoints: heads, and what it takes to go on training them, as safetensors.

A checkpoint is replaced whole or not at all, so a run killed at any instant has its last one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import pmm
from pmm import BadInput, NewerFormat, NotFound, PmmError
from pmm.train.heads import Heads
from pmm.train.loop import State

FORMAT = 2
"""Of run folders as a whole: config.json says it, and every checkpoint. 2 stops within epochs, too."""

_HEADS, _ADAM, _ABOUT = "heads.", "adam.", "pmm"


def refuse_newer(found: int, path: Path) -> None:
    """Raises NewerFormat for a run format above ours."""
    if found > FORMAT:
        raise NewerFormat(
            f"{path} has run format {found}; this pmm {pmm.__version__} reads up to {FORMAT}, update it"
        )


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file of this run whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def save(path: Path, heads: Heads, state: State, optimiser: torch.optim.Optimizer | None = None) -> None:
    """The heads, and with ``optimiser`` what goes on training them needs."""
    tensors = {_HEADS + name: x for name, x in heads.state_dict().items()}
    if optimiser is not None:
        moments = optimiser.state_dict()["state"]
        tensors |= {f"{_ADAM}{n}.{name}": x for n, own in moments.items() for name, x in own.items()}
    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    # One key: safetensors writes several in any order, and equal runs should be equal files.
    about = json.dumps({"format": FORMAT, **asdict(state)})
    replace_file(path, lambda to: save_file(whole, to, {_ABOUT: about}))


def load(path: Path, heads: Heads, optimiser: torch.optim.Adam | None = None) -> State:
    """Put ``heads``, and ``optimiser``, where ``save`` found them.

    Raises NotFound, NewerFormat, or BadInput for a file that is truncated or of other sizes.
    """
    tensors, state = _read(path)
    own = {name.removeprefix(_HEADS): x for name, x in tensors.items() if name.startswith(_HEADS)}
    try:
        heads.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(f"{path} does not fit the sizes in the config.json beside it ({reason})") from None
    for n, parameter in enumerate(heads.parameters() if optimiser else ()):
        if f"{_ADAM}{n}.step" in tensors:
            optimiser.state[parameter] = _moments(tensors, n, parameter)  # type: ignore[union-attr]
    return state


def read_state(path: Path) -> State:
    """Where the run stood; the tensors are not read. Raises as ``load`` does."""
    return _read(path, tensors=False)[1]


def _moments(tensors: Mapping[str, Tensor], n: int, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's state of one parameter, laid out as the parameter is: the same arithmetic to the bit."""
    moments = {
        name: torch.empty_like(parameter).copy_(tensors[f"{_ADAM}{n}.{name}"])
        for name in ("exp_avg", "exp_avg_sq")
    }
    return {"step": tensors[f"{_ADAM}{n}.step"], **moments}


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], State]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            refuse_newer(about.pop("format"), path)
            names = list(file.keys()) if tensors else []
            return {name: file.get_tensor(name) for name in names}, State(**about)
    except FileNotFoundError:
        raise NotFound(f"{path} is not there: the run has not finished an epoch; use --resume") from None
    except PmmError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise BadInput(f"{path} is truncated or no checkpoint of pmm ({error}); it cannot be used") from None
