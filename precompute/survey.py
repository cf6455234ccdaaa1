"""From dataset folders to sources: find the recordings, name their content, list what cannot be used."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pmm import PmmError
from pmm.precompute import media
from pmm.precompute.datasets import Recording, find
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
    listings: tuple[Listing, ...]
    failures: tuple[Failure, ...]

    @property
    def sources(self) -> list[Source]:
        return [source for listing in self.listings for source in listing.sources]


def survey(
    folders: Sequence[Path], layout: str | None = None, on_event: Callable[[Probed], None] = lambda _: None
) -> Survey:
    """Every usable recording of ``folders`` as a Source, and a Failure for each that is not.

    Raises NotFound or BadInput when a folder is missing, is no folder or holds no recording at all.
    """
    founds = [(folder, find(folder, layout)) for folder in folders]
    total = sum(len(found.recordings) for _, found in founds)
    listings: list[Listing] = []
    failures: list[Failure] = []
    done = 0
    with ThreadPoolExecutor(min(4, (os.cpu_count() or 1))) as pool:
        for folder, found in founds:
            failures += [_refusal(folder, path, reason) for path, reason in found.refused]
            dataset = folder.resolve().name
            sources: list[Source] = []
            outcomes = pool.map(lambda recording, label=dataset: _probe(recording, label), found.recordings)
            for recording, outcome in zip(found.recordings, outcomes):
                done += 1
                on_event(Probed(done, total, recording.audio))
                if isinstance(outcome, Source):
                    sources.append(outcome)
                else:
                    failures.append(outcome)
            origin = {"host": socket.gethostname(), "root": str(folder.resolve()), "layout": found.layout}
            listings.append(Listing(dataset, origin, tuple(sources)))
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
        dataset,
        recording.gender,
        recording.language,
        recording.text,
        recording.split,
        recording.name,
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
