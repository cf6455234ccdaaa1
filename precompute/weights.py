"""Checkpoints: reading tensors that strangers wrote, and naming weights by what they hold.

Nothing in a checkpoint is ever executed: pickles go through ``torch.load(weights_only=True)``,
which admits tensors and plain containers only.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pmm import BadInput, NotFound
from pmm.store.digest import Digest

Tensors = dict[str, torch.Tensor]

_RENAMED = {
    # old and new spelling of torch's weight norm
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}


def read_tensors(path: Path) -> Tensors:
    """The tensors of one ``.safetensors`` file or one PyTorch pickle, under canonical names.

    A pickle may hold them directly or under ``state_dict`` (as Wav2Lip's do, beside the optimiser's).
    Raises NotFound, or BadInput when the file is damaged, holds anything but data, or no tensors.
    """
    if not path.is_file():
        raise NotFound(f"no weights at {path}; expected a .safetensors, .pth or .bin file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise BadInput(f"{path} holds a {type(content).__name__}, expected named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise BadInput(f"{path}: {name!r} is a {type(value).__name__}, expected named tensors only")
    return canonical(content, path)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} is not a whole safetensors file ({one_line(error)})") from None


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(
            f"{path} holds more than tensors; pmm does not run code from checkpoints: "
            "save its tensors as .safetensors, or get the file from its authors"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a whole PyTorch checkpoint ({one_line(error)})") from None


def one_line(error: BaseException | str, limit: int = 160) -> str:
    """The first line of a library's message, for the brackets of ours."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    return first if len(first) <= limit else first[: limit - 1] + "…"


def canonical(tensors: Mapping[str, torch.Tensor], where: Path | str) -> Tensors:
    """``module.`` stripped, weight norm in its present spelling. Raises BadInput on two of one name."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        for old, new in _RENAMED.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name in found:
            raise BadInput(f"{where} holds {name} twice, once under an older spelling")
        found[name] = tensor
    return found


def weights_digest(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> str:
    """The name of weights: sorted (name, dtype, shape, bytes) of the tensors, plus ``settings``.

    ``settings`` is whatever else decides what the tensors compute (configuration, vocabulary,
    processor), as JSON without floats. File format, file name and library versions do not enter.
    """
    names = sorted(tensors)
    shapes = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    running = Digest("weights", {"tensors": shapes, "settings": dict(settings)})
    for name in names:
        running.add(_little_endian_bytes(tensors[name]))
    return running.hex()


def _little_endian_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def fit(
    expected: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    where: str,
    optional: Sequence[str] = (),
) -> Tensors:
    """Exactly the tensors a network expects, shapes checked.

    ``optional`` names may be missing (and then are absent from the result). Raises BadInput that
    names the first few tensors that are missing, or of another shape.
    """
    missing = [name for name in expected if name not in tensors and name not in optional]
    if missing:
        raise BadInput(f"{where} lacks {_few(missing)}; it is a checkpoint of another network")
    found = {name: tensors[name] for name in expected if name in tensors}
    wrong = [
        f"{name} {list(tensor.shape)} (expected {list(expected[name].shape)})"
        for name, tensor in found.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise BadInput(f"{where} has tensors of other shapes: {_few(wrong)}")
    return found


def refuse_unexpected(expected: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> None:
    """Raises BadInput that names the first few tensors the network has no place for."""
    extra = [name for name in tensors if name not in expected]
    if extra:
        raise BadInput(f"{where} holds tensors the network has no place for: {_few(extra)}")


def _few(names: Sequence[str], count: int = 3) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
