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

from pmm import BadInput
from pmm.store import clock
from pmm.store.catalog import Failure
from pmm.store.clip import Clip, Take
from pmm.store.feature import MODALITIES, FeatureSpec

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
class Choice:
    """Which part of what could be computed is to be.

    only          modalities
    limit         at most so many clips, the first in the order they were found; the next run goes on
    retry_failed  only clips whose last try failed
    skip_failed   no clip whose last try failed

    Raises BadInput for an unknown modality, a limit below 1, or both of the last two.
    """

    only: frozenset[str] = frozenset(MODALITIES)
    limit: int | None = None
    retry_failed: bool = False
    skip_failed: bool = False

    def __post_init__(self) -> None:
        if not self.only or not self.only <= set(MODALITIES):
            named = ", ".join(sorted(self.only - set(MODALITIES))) or "nothing"
            raise BadInput(f"only {named}: expected some of {', '.join(MODALITIES)}")
        if self.limit is not None and self.limit < 1:
            raise BadInput(f"a limit of {self.limit} clips; expected at least 1")
        if self.retry_failed and self.skip_failed:
            raise BadInput("clips that failed are either tried again or skipped, not both")


@dataclass(frozen=True)
class Share:
    """One feature's part of a plan: how many rows are cached, how many to compute, and their bytes."""

    spec: FeatureSpec
    cached: int
    missing: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will do. ``seconds`` is all the audio found, ``work`` what is to be computed now, and
    ``left_out`` counts the clips that lack something and were not chosen."""

    sources: tuple[Source, ...]
    clips: int
    seconds: float
    shares: tuple[Share, ...]
    work: tuple[Work, ...]
    left_out: int = 0

    @property
    def work_seconds(self) -> float:
        """Audio of the clips to compute."""
        return sum(item.clip.seconds for item in self.work)

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
            "seconds_to_compute": round(self.work_seconds, 3),
            "clips_left_out": self.left_out,
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
    sources: Sequence[Source],
    specs: Mapping[str, FeatureSpec],
    has: Callable[[str, str], bool],
    wanted: Callable[[Source], bool] = lambda _: True,
    limit: int | None = None,
) -> Plan:
    """The work that is left.

    specs   modality -> spec, of the features that are asked for
    has     (spec id, row id) -> whether that row is cached
    wanted  whether to compute the clip of that source; of one in several, any source decides
    limit   compute at most so many clips, the first of ``sources``

    The work comes sorted by length, so that a batch pads little; equal lengths by id, so that
    two machines with the same dataset make the same batches.
    """
    by_clip: dict[str, list[Source]] = {}
    for source in sources:
        by_clip.setdefault(source.take.clip.id, []).append(source)
    rows = {modality: _row_ids(modality, spec, sources) for modality, spec in specs.items()}
    missing = {m: {row for row in rows[m] if not has(specs[m].id, row)} for m in specs}
    lacking = [item for group in by_clip.values() if _any(item := _work(group, missing))]
    chosen = [item for item in lacking if any(map(wanted, by_clip[item.clip.id]))][:limit]
    return Plan(
        tuple(sources),
        len(by_clip),
        sum(group[0].take.clip.seconds for group in by_clip.values()),
        tuple(_share(spec, len(rows[m]) - len(missing[m]), chosen) for m, spec in specs.items()),
        tuple(sorted(chosen, key=lambda item: (item.clip.seconds, item.clip.id))),
        len(lacking) - len(chosen),
    )


def _row_ids(modality: str, spec: FeatureSpec, sources: Sequence[Source]) -> set[str]:
    return {
        spec.row_id(source.take.clip.id, source.take.target)
        for source in sources
        if modality != "target" or source.take.target is not None
    }


def _any(item: Work) -> bool:
    return bool(item.features or item.targets)


def _share(spec: FeatureSpec, cached: int, chosen: Sequence[Work]) -> Share:
    counts = [(item.clip, rows) for item in chosen if (rows := _rows_of(item, spec.modality))]
    missing = sum(rows for _, rows in counts)
    return Share(spec, cached, missing, sum(rows * row_bytes(spec, clip) for clip, rows in counts))


def _rows_of(item: Work, modality: str) -> int:
    """How many rows of that modality the clip lacks."""
    return len(item.targets) if modality == "target" else int(modality in item.features)


def failed_before(failures: Sequence[Failure]) -> Callable[[Source], bool]:
    """Whether a source is one of ``failures``: its clip; or, where a file could not be read, its name."""
    clips = {one.key for one in failures}
    files = {one.source for one in failures if one.key.startswith(("file:", "path:"))}
    return lambda source: source.take.clip.id in clips or source.take.source in files


def clip_bytes(item: Work, specs: Mapping[str, FeatureSpec]) -> int:
    """Memory that one clip takes at most, measured: its sound, what its spectrogram is made of, its rows.

    Sound is float32, twice where it is normalised; for the lips three copies in float64 come and go, and
    their frames are gathered into one array from parts.
    """
    samples = clock.resampled(item.clip.samples, item.clip.rate)
    rows = {m: _rows_of(item, m) * row_bytes(spec, item.clip) for m, spec in specs.items()}
    lips = rows.get("image", 0)
    return samples * (2 * 4 + (3 * 8 if lips else 0)) + sum(rows.values()) + lips


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
