"""Clips, targets and takes: what was said, what the face did, and who did it.

A *clip* is audio named by its content. A *target* is a face track of a clip. A *take* is a clip,
its target (or none) and the subject: the unit of training. Nothing here depends on a file's name,
place or header, so the same recording in another folder is the same clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from sys import intern
from typing import Any

from pmm import BadInput
from pmm.store import clock
from pmm.store.digest import Digest, digest

SAMPLE_BYTES = {"s8": 1, "s16": 2, "s24": 4, "s32": 4, "f32": 4, "f64": 8}
"""Sample formats and the bytes each takes where it is hashed: little-endian, s24 in an int32."""


@dataclass(frozen=True, slots=True)  # a store may list a million
class Clip:
    """Audio, named by its content. ``start`` and ``end`` are samples of the file at ``rate`` Hz."""

    id: str
    rate: int
    channels: int
    start: int
    end: int

    @property
    def samples(self) -> int:
        """Native samples per channel."""
        return self.end - self.start

    @property
    def seconds(self) -> float:
        return clock.seconds(self.samples, self.rate)


def lossless_clip(
    rate: int, channels: int, sample_format: str, start: int, end: int, blocks: Iterable[bytes | memoryview]
) -> Clip:
    """The clip of native interleaved samples in [start, end), which come in ``blocks`` of bytes.

    ``sample_format`` is a key of SAMPLE_BYTES. A WAV with other header chunks, a FLAC of the same
    integers, or the same samples cut out of another file, is the same clip.
    """
    fields = {"kind": "lossless", "rate": rate, "channels": channels, "format": sample_format}
    running = Digest("clip", {**fields, "samples": end - start})
    running.add_stream((end - start) * channels * SAMPLE_BYTES[sample_format], blocks)
    return Clip(running.hex(), rate, channels, start, end)


def lossy_clip(
    codec: str,
    private: bytes,
    rate: int,
    channels: int,
    silence: int,
    start: int,
    end: int,
    packets: Iterable[bytes | memoryview],
) -> Clip:
    """The clip of compressed audio: codec, its private data and all packets in order (decoders differ).

    [start, end) counts the samples they decode to, after ``silence`` samples of zeros before the
    first, where the track starts later than its movie.
    """
    fields = {"kind": "lossy", "codec": codec, "rate": rate, "channels": channels}
    running = Digest("clip", {**fields, "silence": silence, "start": start, "end": end})
    running.add(private)
    for packet in packets:
        running.add(packet)
    return Clip(running.hex(), rate, channels, start, end)


def target_id(clip: Clip, data: bytes, template: bytes | None = None) -> str:
    """The name of a face track: its clip and time range, the bytes of its file, a mesh's template."""
    fields = {"clip": clip.id, "start": clip.start, "end": clip.end, "template": template is not None}
    return digest("target", fields, data, *([] if template is None else [template]))


_COMMON = ("subject", "dataset", "gender", "language", "split")
"""Attributes that many takes share: kept once in memory."""


@dataclass(frozen=True, slots=True)
class Take:
    """One performance: a clip, its target id (or None), the subject, and attributes of them.

    ``dataset`` labels the listing the take stands in; it is no part of the identity, so two people
    who keep one dataset under different folder names share its takes.
    """

    clip: Clip
    target: str | None
    subject: str
    dataset: str = ""
    gender: str = ""
    language: str = ""
    text: str = ""
    split: str = ""
    source: str = ""

    @property
    def id(self) -> str:
        return digest("take", {"clip": self.clip.id, "target": self.target, "subject": self.subject})

    def to_json(self) -> dict[str, Any]:
        clip = self.clip
        return {
            "take": self.id,
            "clip": clip.id,
            "rate": clip.rate,
            "channels": clip.channels,
            "start": clip.start,
            "end": clip.end,
            "target": self.target,
            "subject": self.subject,
            "dataset": self.dataset,
            "gender": self.gender,
            "language": self.language,
            "text": self.text,
            "split": self.split,
            "source": self.source,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Take:
        """Raises BadInput if a field is missing or of another type, or the id does not follow from them."""
        try:
            clip = Clip(*(value[key] for key in ("clip", "rate", "channels", "start", "end")))
            common = {key: intern(value.get(key, "")) for key in _COMMON}
            own = {key: value.get(key, "") for key in ("text", "source")}
            take = cls(clip, value["target"], **common, **own)
            if {type(clip.rate), type(clip.channels), type(clip.start), type(clip.end)} != {int}:
                raise TypeError("a count is no whole number")
            if {type(take.text), type(take.source)} != {str}:
                raise TypeError("a text is none")
            if take.id != value["take"]:
                raise ValueError("its id does not follow from its fields")
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{where}: not a take ({error}); run `pmm store verify`") from None
        return take
