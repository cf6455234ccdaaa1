"""From recordings to sources: read each, name its content, list what cannot be used."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pmm import PmmError
from pmm.precompute import media
from pmm.precompute.datasets import Found, Recording, refuse_special
from pmm.precompute.datasets.livelink import read_bytes
from pmm.precompute.identities import Identities, stamp
from pmm.precompute.plan import Source
from pmm.store.catalog import Failure
from pmm.store.catalog import Listing as Listed
from pmm.store.clip import Clip, Take, target_id

_CLIP = "clip/2"
"""What clip identities are cached as; another number whenever their rule changes."""


@dataclass(frozen=True)
class Probed:
    """Event: one recording was named, by reading it or (``known``) by its cached identity."""

    done: int
    total: int
    path: Path
    known: bool = False


@dataclass(frozen=True)
class Listing:
    """One dataset folder: its label, where it stands (host, root, layout), and what was found in it."""

    dataset: str
    origin: Mapping[str, str]
    sources: tuple[Source, ...]

    @property
    def takes(self) -> tuple[Take, ...]:
        return tuple(source.take for source in self.sources)


@dataclass(frozen=True)
class Survey:
    """Every usable recording as a Source, by folder, and a Failure for each that is not usable."""

    listings: tuple[Listing, ...]
    failures: tuple[Failure, ...]

    @property
    def sources(self) -> list[Source]:
        return [source for listing in self.listings for source in listing.sources]


def survey(
    founds: Sequence[tuple[Path, Found]],
    on_event: Callable[[Probed], None] = lambda _: None,
    identities: Identities | None = None,
) -> Survey:
    """Name the content of every recording of the (folder, what was found there) pairs.

    Files that ``identities`` knows are not read; what is read is kept there.
    """
    identities = identities or Identities(None)
    total = sum(len(found.recordings) for _, found in founds)
    failures = [_refusal(folder, *refused) for folder, found in founds for refused in found.refused]
    listings: list[Listing] = []
    done = itertools.count(1)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for folder, found in founds:
            label = folder.resolve().name
            sources: list[Source] = []
            asked = [_Asked.of(recording, identities) for recording in found.recordings]
            for one, outcome in zip(asked, pool.map(_probe, asked)):
                on_event(Probed(next(done), total, one.recording.audio, one.known))
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                else:
                    one.keep(outcome, identities)
                    sources.append(_source(one.recording, label, *outcome))
            origin = {"host": socket.gethostname(), "root": str(folder.resolve()), "layout": found.layout}
            listings.append(Listing(label, origin, tuple(sources)))
    return Survey(tuple(listings), tuple(failures))


def labelled(seen: Survey, known: Sequence[Listed]) -> Survey:
    """The survey with a label for each folder that keeps apart what a store already lists.

    A folder listed before keeps its label. A folder of the same name as another one's label, with no
    clip in common, holds other people: it goes by its parent's name too.
    """
    done: list[Listing] = []
    for one in seen.listings:
        listed: list[Listed | Listing] = [*known, *done]
        others = [old for old in listed if dict(old.origin) != dict(one.origin)]
        before = [old.dataset for old in known if dict(old.origin) == dict(one.origin)]
        parent = Path(one.origin["root"]).parent.name
        names = itertools.chain(before, (one.dataset, f"{parent}/{one.dataset}"), _numbered(one.dataset))
        label = next(name for name in names if name in before or not _rivals(name, one, others))
        sources = [replace(source, take=replace(source.take, dataset=label)) for source in one.sources]
        done.append(Listing(label, one.origin, tuple(sources)))
    return replace(seen, listings=tuple(done))


def _rivals(name: str, one: Listing, others: Sequence[Listed | Listing]) -> bool:
    """Whether ``name`` stands for a folder that has no clip in common with this one."""
    clips = {take.clip.id for take in one.takes}
    return any(old.dataset == name and clips.isdisjoint(take.clip.id for take in old.takes) for old in others)


def _numbered(name: str) -> Iterator[str]:
    return (f"{name} {number}" for number in itertools.count(2))


Named = tuple[Clip, str | None]
"""A recording's clip and the id of its target."""


@dataclass(frozen=True)
class _Asked:
    """A recording, what its files looked like before they were read, and what is known of them."""

    recording: Recording
    audio_stamp: str | None
    target_stamp: str | None
    clip: Clip | None
    target: str | None

    @classmethod
    def of(cls, recording: Recording, identities: Identities) -> _Asked:
        seen = stamp(recording.audio)
        known = identities.get(recording.audio, _CLIP, seen)
        clip = None if known is None else Clip(**json.loads(known))
        target_seen = stamp(recording.target) if recording.target else None
        if clip is None or recording.target is None:
            return cls(recording, seen, target_seen, clip, None)
        target = identities.get(recording.target, f"target of {clip.id}", target_seen)
        return cls(recording, seen, target_seen, clip, target)

    @property
    def known(self) -> bool:
        """Whether nothing is left to read."""
        return self.clip is not None and (self.recording.target is None or self.target is not None)

    def keep(self, named: Named, identities: Identities) -> None:
        clip, target = named
        if self.clip is None:
            identities.put(self.recording.audio, _CLIP, self.audio_stamp, json.dumps(asdict(clip)))
        if self.target is None and self.recording.target is not None and target is not None:
            identities.put(self.recording.target, f"target of {clip.id}", self.target_stamp, target)


def _probe(asked: _Asked) -> Named | Failure:
    """Read what is not known of one recording; a Failure when it cannot be used."""
    recording = asked.recording
    try:
        clip = asked.clip or media.probe(recording.audio)
        if asked.target or recording.target is None:
            return clip, asked.target
        return clip, target_id(clip, read_bytes(recording.target))
    except Exception as error:  # whatever a library makes of a damaged file: the others go on
        return Failure(file_key(recording.audio), recording.name, "probe", one_line(error))


def _source(recording: Recording, dataset: str, clip: Clip, target: str | None) -> Source:
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
        refuse_special(path)
        with open(path, "rb") as file:
            return "file:" + hashlib.file_digest(file, "sha256").hexdigest()
    except (PmmError, OSError):
        return f"path:{path}"


def one_line(error: BaseException) -> str:
    """The message; before one that was not written for users, the kind of error."""
    message = " ".join(str(error).split())
    if isinstance(error, PmmError | OSError) and message:
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")
