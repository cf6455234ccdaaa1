"""Where the features of a fit lie: on the device, in memory, or in the store. Decided before any is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pmm import BadInput
from pmm.store.feature import FeatureSpec
from pmm.train.data import row_size

AUTO = "auto"
SHARE = 0.8
"""Of the memory that is free, what ``auto`` fills: fitting needs some, too."""

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Cached:
    """Event: where the features lie.

    cache      "device" (a GPU), "ram" or "mmap"
    asked      the same, or "auto"
    needed     bytes that all of them fill
    available  bytes free where they were to lie: on the device, or for "mmap" in memory; None: unknown
    """

    cache: str
    asked: str
    needed: int
    available: int | None


@dataclass(frozen=True)
class Limits:
    """Bytes that can still be filled.

    machine  of the machine's memory; None: nobody knows
    device   of the device's own; None: it has none, and computes in the machine's
    """

    machine: int | None
    device: int | None = None


def measured(device: torch.device, machine: int | None = None) -> Limits:
    """What is free now; ``machine`` bytes of the machine's memory, where given."""
    machine = available() if machine is None else machine
    return Limits(machine, torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None)


def choose_cache(
    asked: str, needed: int, limits: Limits, takes: int, modalities: Sequence[str], share: float = SHARE
) -> Cached:
    """Where ``needed`` bytes of features go. "auto" takes the first place that holds them in ``share`` of it.

    Raises BadInput where they do not fit into the place that was asked for; the store always holds them.
    """
    free = {"ram": limits.machine, "mmap": limits.machine}
    if limits.device is not None:
        free = {"device": limits.device, **free}
    if asked == AUTO:
        place = next(name for name in free if name == "mmap" or _holds(free[name], needed, share))
        return Cached(place, asked, needed, free[place])
    place = asked if asked in free else "ram"
    if place != "mmap" and not _holds(free[place], needed):
        raise BadInput(_too_much(place, needed, free[place] or 0, takes, modalities))
    return Cached(place, asked, needed, free[place])


def _holds(limit: int | None, needed: int, share: float = 1.0) -> bool:
    return limit is None or needed <= share * limit


def corpus_bytes(
    frames: int,
    specs: Mapping[str, FeatureSpec],
    coefficients: int,
    image_rows: tuple[int, int] | None = None,
) -> int:
    """What ``data.load`` fills for so many frames in memory: lip frames as uint8, all else as float32.

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


def _too_much(cache: str, needed: int, limit: int, takes: int, modalities: Sequence[str]) -> str:
    leave = ", leave the lip frames out (--without image)" if "image" in modalities else ""
    where = "of memory" if cache == "ram" else "on the device"
    return (
        f"the features of {takes} takes fill {_gb(needed)}, and {_gb(limit)} {where} are available; "
        f"read them from the store while fitting (--cache mmap), or fit fewer subjects{leave}"
    )


def available() -> int | None:
    """Bytes of memory that can still be filled: the least of the machine's and the container's."""
    limits = [*_machine(), *_container(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]
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
