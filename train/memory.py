"""Does what a run loads fit into memory? Asked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from pmm import BadInput
from pmm.store.feature import FeatureSpec
from pmm.train.data import row_size

_FLOAT = 4  # bytes


def corpus_bytes(
    frames: int,
    specs: Mapping[str, FeatureSpec],
    coefficients: int,
    image_rows: tuple[int, int] | None = None,
) -> int:
    """What ``data.load`` fills for so many frames: lip frames as uint8, all else as float32.

    ``image_rows`` are the rows of each lip frame that are kept (None: all).
    """
    each = coefficients * _FLOAT
    for name, spec in specs.items():
        if name == "image" and len(spec.shape) == 3:
            height, width, channels = spec.shape
            first, end = image_rows or (0, height)
            each += (end - first) * width * channels
        elif name != "target":
            each += row_size(spec) * _FLOAT
    return frames * each


def refuse_too_much(needed: int, limit: int | None, takes: int, modalities: Sequence[str]) -> None:
    """Raises BadInput where ``needed`` bytes are more than ``limit`` (None: nobody knows one)."""
    if limit is not None and needed > limit:
        leave = ", leave the lip frames out (--without image)" if "image" in modalities else ""
        raise BadInput(
            f"the features of {takes} takes fill {_gb(needed)} of memory, and {_gb(limit)} are available; "
            f"fit fewer subjects{leave}, or use a machine with more memory"
        )


def available(device: torch.device) -> int | None:
    """Bytes that can still be filled: the least of the machine's, the container's and the GPU's."""
    limits = [*_machine(), *_container(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]
    if device.type == "cuda":
        limits.append(torch.cuda.mem_get_info(device)[0])
    return min(limits, default=None)


def _machine() -> Iterator[int]:
    """MemAvailable of Linux; elsewhere all the memory there is, where the system says it."""
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            yield int(fields["MemAvailable"].split()[0]) * 1024
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container(root: Path, membership: Path) -> Iterator[int]:
    """What Docker or Slurm leave: each limit of a control group over this process, less what it holds."""
    entries = membership.read_text().splitlines() if membership.exists() else []
    for _, controllers, own in (line.split(":", 2) for line in entries):
        if controllers == "memory":
            top, ceiling, held = root / "memory", "memory.limit_in_bytes", "total_rss"
        elif not controllers:
            top, ceiling, held = root, "memory.max", "anon"
        else:
            continue
        here = top / own.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(top) and (limit := _number(folder / ceiling)) is not None:
                yield max(0, limit - _held(folder / "memory.stat", held))


def _number(path: Path) -> int | None:
    """None without the file, and for ``max``, which is no limit."""
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdecimal() else None


def _held(path: Path, field: str) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(value) for name, value in (line.split() for line in lines) if name == field), 0)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
