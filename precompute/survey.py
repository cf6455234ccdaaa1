"""From recordings to sources: read each, name its content, list what cannot be used."""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pmm import PmmError
from pmm.precompute import media
from pmm.precompute.datasets import Found, Recording
from pmm.precompute.datasets.livelink import read_bytes
from pmm.precompute.plan import Source
from pmm.store.catalog import Failure
from pmm.store.clip import Take, target_id


@dataclass(frozen=True)
class Probed:
    """Event: one recording was read and named."""

    done: int
    total: int
    path: Path


@dataclass(frozen=True)
class Listing:
    """One dataset folder: its label, where it stands (host, root, layout), and what was found in it."""

    dataset: str
    origin: Mapping[str, str]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Survey:
    """Every usable recording as a Source, by folder, and a Failure for each that is not usable."""

    listings: tuple[Listing, ...]
    failures: tuple[Failure, ...]

    @property
    def sources(self) -> list[Source]:
        return [source for listing in self.listings for source in listing.sources]


def survey(
    founds: Sequence[tuple[Path, Found]], on_event: Callable[[Probed], None] = lambda _: None
) -> Survey:
    """Read every recording of the (folder, what was found there) pairs and name its content."""
    total = sum(len(found.recordings) for _, found in founds)
    failures = [_refusal(folder, *refused) for folder, found in founds for refused in found.refused]
    listings: list[Listing] = []
    done = itertools.count(1)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for folder, found in founds:
            label = folder.resolve().name
            sources: list[Source] = []
            for outcome, recording in zip(
                pool.map(_probe, found.recordings, itertools.repeat(label)), found.recordings
            ):
                on_event(Probed(next(done), total, recording.audio))
                if isinstance(outcome, Source):
                    sources.append(outcome)
                else:
                    failures.append(outcome)
            origin = {"host": socket.gethostname(), "root": str(folder.resolve()), "layout": found.layout}
            listings.append(Listing(label, origin, tuple(sources)))
    return Survey(tuple(listings), tuple(failures))


def _probe(recording: Recording, dataset: str) -> Source | Failure:
    """Name one recording by its content; a Failure when its audio cannot be used."""
    try:
        clip = media.probe(recording.audio)
        target = None if recording.target is None else target_id(clip, read_bytes(recording.target))
    except (PmmError, OSError) as error:
        return Failure(file_key(recording.audio), recording.name, "probe", one_line(error))
    take = Take(
        clip,
        target,
        recording.subject,
        dataset=dataset,
        gender=recording.gender,
        language=recording.language,
        text=recording.text,
        split=recording.split,
        source=recording.name,
    )
    return Source(take, recording.audio, recording.target)


def _refusal(folder: Path, path: Path, reason: str) -> Failure:
    named = reason if str(path) in reason else f"{path}: {reason}"
    return Failure(file_key(path), path.relative_to(folder).with_suffix("").as_posix(), "find", named)


def file_key(path: Path) -> str:
    """A durable name for a file that is no clip: its content's digest, or its path if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return "file:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return f"path:{path}"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
