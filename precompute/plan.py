"""What there is to compute: takes x features, less what the store already holds. Pure.

No torch, no files: the plan is made from what a survey found, from the feature specs and from a
function that says which rows are cached, so it can be shown, tested and refused before anything
is loaded or written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pmm.store import clock
from pmm.store.clip import Clip, Take
from pmm.store.feature import FeatureSpec

ITEM_BYTES = {"float16": 2, "float32": 4, "uint8": 1}


@dataclass(frozen=True)
class Source:
    """A take and the files it was found in."""

    take: Take
    audio: Path
    target: Path | None


@dataclass(frozen=True)
class Work:
    """One clip with at least one row to compute.

    ``features`` are the modalities of its audio that are missing, ``targets`` the sources whose
    face track is missing (one clip may be listed under two subjects with two tracks), and
    ``other_takes`` says how many takes of the clip need none.
    """

    clip: Clip
    audio: Path
    source: str
    features: frozenset[str]
    targets: tuple[Source, ...]
    other_takes: int


@dataclass(frozen=True)
class Share:
    """One feature's part of a plan: how many rows are cached, how many to compute, and their bytes."""

    spec: FeatureSpec
    cached: int
    missing: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will do. ``seconds`` is all the audio found, ``work`` what is left to compute."""

    sources: tuple[Source, ...]
    clips: int
    seconds: float
    shares: tuple[Share, ...]
    work: tuple[Work, ...]

    @property
    def bytes(self) -> int:
        return sum(share.bytes for share in self.shares)

    def to_json(self) -> dict[str, Any]:
        return {
            "takes": len(self.sources),
            "clips": self.clips,
            "subjects": len({(s.take.dataset, s.take.subject) for s in self.sources}),
            "seconds": round(self.seconds, 3),
            "clips_to_compute": len(self.work),
            "bytes": self.bytes,
            "features": {
                share.spec.modality: {
                    "spec": share.spec.id,
                    "cached": share.cached,
                    "missing": share.missing,
                    "bytes": share.bytes,
                }
                for share in self.shares
            },
        }


def row_count(spec: FeatureSpec, clip: Clip) -> int:
    """Rows one clip takes in a fragment: T video frames, or S native wav2vec2 steps."""
    if spec.fps is not None:
        return clock.frames(clip.samples, clip.rate, spec.fps)
    return clock.steps(clock.resampled(clip.samples, clip.rate))


def row_bytes(spec: FeatureSpec, clip: Clip) -> int:
    return row_count(spec, clip) * prod(spec.shape) * ITEM_BYTES[spec.dtype]


def make_plan(
    sources: Sequence[Source], specs: Mapping[str, FeatureSpec], has: Callable[[str, str], bool]
) -> Plan:
    """The work that is left.

    specs  modality -> spec, for audio, text, image and target
    has    (spec id, row id) -> whether that row is cached

    The work comes sorted by length, so that a batch pads little; equal lengths by id, so that
    two machines with the same dataset make the same batches.
    """
    by_clip: dict[str, list[Source]] = {}
    for source in sources:
        by_clip.setdefault(source.take.clip.id, []).append(source)
    rows: dict[str, dict[str, Clip]] = {modality: {} for modality in specs}
    for source in sources:
        for modality, spec in specs.items():
            if modality != "target" or source.take.target is not None:
                rows[modality][spec.row_id(source.take.clip.id, source.take.target)] = source.take.clip
    missing = {m: {row for row in rows[m] if not has(specs[m].id, row)} for m in specs}
    shares = tuple(
        Share(
            spec,
            len(rows[m]) - len(missing[m]),
            len(missing[m]),
            sum(row_bytes(spec, rows[m][row]) for row in missing[m]),
        )
        for m, spec in specs.items()
    )
    work = [_work(group, missing) for group in by_clip.values()]
    return Plan(
        tuple(sources),
        len(by_clip),
        sum(group[0].take.clip.seconds for group in by_clip.values()),
        shares,
        tuple(
            sorted(
                (item for item in work if item.features or item.targets),
                key=lambda item: (item.clip.seconds, item.clip.id),
            )
        ),
    )


def _work(group: Sequence[Source], missing: Mapping[str, set[str]]) -> Work:
    clip = group[0].take.clip
    features = frozenset(m for m, rows in missing.items() if m != "target" and clip.id in rows)
    lacking = [source for source in group if source.take.target in missing.get("target", ())]
    targets = {source.take.target: source for source in reversed(lacking)}
    others = len(group) - len(lacking)
    return Work(clip, group[0].audio, group[0].take.source, features, tuple(targets.values()), others)


def batches(work: Sequence[Work], batch_seconds: float) -> list[tuple[Work, ...]]:
    """Consecutive clips whose padded length stays within ``batch_seconds``; a longer clip goes alone."""
    made: list[list[Work]] = []
    for item in work:
        longest = max([item.clip.seconds, *(other.clip.seconds for other in made[-1])]) if made else 0.0
        if made and longest * (len(made[-1]) + 1) <= batch_seconds:
            made[-1].append(item)
        else:
            made.append([item])
    return [tuple(batch) for batch in made]
