"""A plan's work cut into tasks for many workers. Pure: the same plan gives the same tasks.

A task is what one worker computes and publishes together, and loses if it dies: at most one fragment of
each feature set. Its clips are of about one length, so that its batches pad little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pmm.precompute.plan import Plan, Work, row_bytes
from pmm.store.feature import FeatureSpec

if TYPE_CHECKING:
    from pmm.precompute.run import Limits

TASKS_PER_WORKER = 4
"""At least, where the work is enough: who is done early takes from what the others would be late with."""

DEATHS = 2
"""How many workers may die of a task before it is cut, and of a single clip before it is given up."""


@dataclass(frozen=True)
class Task:
    """Clips for one worker, shortest first.

    deaths   how many workers died of it, as far as was known when it was handed out
    suspect  whether it was cut from a task of which workers died
    """

    work: tuple[Work, ...]
    deaths: int = 0
    suspect: bool = False

    @property
    def seconds(self) -> float:
        """Audio to hear."""
        return sum(item.clip.seconds for item in self.work)

    @property
    def patience(self) -> int:
        """How many workers may die of it. One is enough to suspect the half of a suspect again."""
        return 1 if self.suspect and len(self.work) > 1 else DEATHS

    def halves(self) -> tuple[Task, Task]:
        """Its clips in two tasks, both suspects. The task must have two clips at least."""
        middle = len(self.work) // 2
        return Task(self.work[:middle], suspect=True), Task(self.work[middle:], suspect=True)


def cut(plan: Plan, workers: int, limits: Limits) -> list[Task]:
    """The work of ``plan`` as tasks, those with most audio first.

    workers  among how many it is shared: each has several tasks, unless they would be less than a batch
    limits   of a batch and of a fragment, of which each feature set fills one; a longer clip goes alone
    """
    specs = {share.spec.modality: share.spec for share in plan.shares}
    work = sorted(plan.work, key=lambda item: (item.clip.seconds, item.clip.id))
    share = sum(item.clip.seconds for item in work) / (max(1, workers) * TASKS_PER_WORKER)
    limit = _Size(max(share, limits.batch_seconds), dict.fromkeys(specs, limits.fragment_bytes))
    made: list[tuple[list[Work], _Size]] = []
    for item in reversed(work):
        size = _size(item, specs)
        if made and (grown := made[-1][1] + size).within(limit):
            made[-1][0].append(item)
            made[-1] = (made[-1][0], grown)
        else:
            made.append(([item], size))
    tasks = [Task(tuple(reversed(items))) for items, _ in made]
    return sorted(tasks, key=lambda task: -task.seconds)  # stable: equals by the length of their clips


@dataclass(frozen=True)
class _Size:
    """Seconds of audio, and bytes of each modality."""

    seconds: float
    bytes: Mapping[str, int]

    def __add__(self, other: _Size) -> _Size:
        both = self.bytes.keys() | other.bytes.keys()
        added = {name: self.bytes.get(name, 0) + other.bytes.get(name, 0) for name in both}
        return _Size(self.seconds + other.seconds, added)

    def within(self, limit: _Size) -> bool:
        fits = all(count <= limit.bytes[name] for name, count in self.bytes.items())
        return fits and self.seconds <= limit.seconds


def _size(item: Work, specs: Mapping[str, FeatureSpec]) -> _Size:
    """What ``item`` will take, of the modalities that are missing."""
    counts = {modality: row_bytes(specs[modality], item.clip) for modality in item.features}
    if item.targets:
        counts["target"] = len(item.targets) * row_bytes(specs["target"], item.clip)
    return _Size(item.clip.seconds, counts)
