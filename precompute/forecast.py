"""What a plan will take, before anything is computed: disk, memory and, from a short try, time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmm import BadInput
from pmm.precompute.plan import Plan, clip_bytes
from pmm.store import clock
from pmm.store.remote import is_address

if TYPE_CHECKING:
    from pmm.precompute.models import FrozenModels

_TRY_SECONDS = 2.0
"""Seconds of made sound that the models hear to learn their speed."""

_ROW_BYTES = 256
"""On the disk beside a row's own bytes: its id and checksum, its line in the record, its take."""


@dataclass(frozen=True)
class Forecast:
    """What carrying out a plan needs and what there is, in bytes and seconds; None where not known.

    disk, free_disk      to be written, and free where the store is; None for a store in a bucket
    memory, free_memory  for the longest clip beside the models, and free on this machine
    seconds              of computing in one process, about: by a short try of the models
    """

    disk: int
    free_disk: int | None
    memory: int
    free_memory: int | None
    seconds: float | None

    @property
    def tight(self) -> bool:
        """Whether the longest clip may not fit the memory."""
        return self.free_memory is not None and self.memory > self.free_memory

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(plan: Plan, store_path: Path | str, models: FrozenModels | None) -> Forecast:
    """What ``plan`` will take. The models, if any are needed, hear two seconds of noise for it."""
    specs = {share.spec.modality: share.spec for share in plan.shares}
    rows = sum(share.missing for share in plan.shares)
    return Forecast(
        disk=plan.bytes + rows * _ROW_BYTES,
        free_disk=None if is_address(store_path) else free_disk(Path(store_path)),
        memory=max((clip_bytes(item, specs) for item in plan.work), default=0),
        free_memory=free_memory(),
        seconds=None if models is None else _seconds(plan, models),
    )


def refuse_too_large(wanted: Forecast, store_path: Path | str) -> None:
    """Raises BadInput, with both numbers, where the disk cannot hold what is to be written."""
    if wanted.free_disk is not None and wanted.disk > wanted.free_disk:
        raise BadInput(
            f"{_gigabytes(wanted.disk)} are to be written and the disk of {store_path} has "
            f"{_gigabytes(wanted.free_disk)} free; free some, name a store on another disk, or compute less "
            "(--lip-features latent, --text-topk, --only, --limit)"
        )


def free_disk(path: Path) -> int:
    """Bytes free for this user on the disk where ``path`` is, or is going to be."""
    at = path.absolute()
    return shutil.disk_usage(next(one for one in (at, *at.parents) if one.exists())).free


def free_memory() -> int | None:
    """Bytes that a process can still take, by what Linux says; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) << 10
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _seconds(plan: Plan, models: FrozenModels) -> float:
    """Seconds that the models need for the plan, by their speed on two seconds of noise."""
    noise = np.random.default_rng(0).normal(0, 0.05, clock.samples(_TRY_SECONDS, clock.SPEECH_RATE))
    wave = noise.astype(np.float32)
    heard = sum(item.clip.seconds for item in plan.work if item.features & {"audio", "text"})
    seen = sum(item.clip.seconds for item in plan.work if "image" in item.features)
    total = 0.0
    if heard:
        total += heard / _TRY_SECONDS * _timed(lambda: models.speech([wave]))
    if seen:
        fps = models.specs["image"].fps or 1
        frames = clock.frames_in(_TRY_SECONDS, fps)
        total += seen / _TRY_SECONDS * _timed(lambda: models.lips(wave, frames))
    return total


def _timed(call: Callable[[], object]) -> float:
    """Seconds of the second call: the first also sets things up."""
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _gigabytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.1f} GB"
