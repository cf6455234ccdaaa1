"""Audio in: what a file says (its identity), and what the models hear (16 kHz mono float32).

WAV, FLAC and AIFF are read by libsndfile; everything else (.mov, .mp4, .m4a, .mp3, .ogg, ...) by
FFmpeg through PyAV. Both stream, so that memory does not grow with the length of a file.

Lossless audio is named by its integers, so that a WAV, its FLAC and its ALAC are one clip. Lossy
audio is named by its packets, for decoders differ and packets do not.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pmm import BadInput, NotFound
from pmm.precompute.datasets import refuse_special
from pmm.store import clock
from pmm.store.clip import Clip, lossless_clip, lossy_clip

PREPROCESSING: dict[str, Any] = {
    "downmix": "mean",
    "resampler": "soxr",
    "quality": "HQ",
    "rate": clock.SPEECH_RATE,
}
"""What :func:`decode` does, for the settings of a FeatureSpec: a change here is another feature."""

MIN_SECONDS = 0.2
"""Shorter clips hold no syllable (and few or no steps of a speech model)."""

RATES = (4_000, 768_000)
"""Hz; a header outside this range is damaged, not exotic."""

MAX_CHANNELS = 32

_BLOCK = 1 << 16  # samples per channel read at once
_FULL_SCALE = {"s8": 2**7, "s16": 2**15, "s24": 2**23, "s32": 2**31, "f32": 1, "f64": 1}


Listener = Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]]
"""Sees the blocks of a clip, (n, channels) in its sample format, on their way to where they are named."""


class Source(Protocol):
    """Native audio of one file. ``clip`` names [start, end) in one pass, with ``listen`` to hear it.

    ``samples`` may take decoding the whole file.
    """

    @property
    def rate(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def sample_format(self) -> str: ...

    @property
    def samples(self) -> int: ...

    def clip(self, start: int, end: int, listen: Listener) -> Clip: ...


def probe(path: Path, start: int = 0, end: int | None = None) -> Clip:
    """The identity of the audio in ``path``, of its samples [start, end) at its own rate.

    Reads the range once, in blocks; a container is decoded once before, to learn its length.

    Raises NotFound if the file is missing, BadInput (one line) if it holds no usable audio: not
    audio, empty, truncated, silent to the last bit, not finite, or shorter than MIN_SECONDS.
    """
    source = _open(path)
    heard = _Heard()
    with _reading(path):
        if source.samples == 0:
            raise _no_samples(path)
        end = source.samples if end is None else end
        _check_range(path, source, start, end)
        clip = source.clip(start, end, heard.through)
    heard.check(path, source.sample_format)
    return clip


def decode(path: Path, clip: Clip) -> np.ndarray:
    """The clip as the models hear it: (n,) float32 in [-1, 1], n = ``clock.resampled`` of its samples.

    Channels are mixed by their mean and resampled to SPEECH_RATE as PREPROCESSING says.

    Raises BadInput if the file no longer holds the clip that was probed: its identity is computed
    again from what is decoded, so that nothing is ever stored under the name of something else.
    """
    source = _open(path)
    if (source.rate, source.channels) != (clip.rate, clip.channels):
        raise _changed(path, clip, f"{source.channels} x {source.rate} Hz")
    speech = _Speech(clip.rate, source.sample_format, clock.resampled(clip.samples, clip.rate))
    with _reading(path):
        found = source.clip(clip.start, clip.end, speech.through)
    if found.id != clip.id:
        raise _changed(path, clip, "of other content")
    return speech.finish()


class _Speech:
    """What the models hear of the native blocks that pass: ``count`` samples, held once."""

    def __init__(self, rate: int, sample_format: str, count: int):
        import soxr

        quality = PREPROCESSING["quality"]
        self._resampler = soxr.ResampleStream(rate, clock.SPEECH_RATE, 1, dtype="float32", quality=quality)
        self._scale = np.float32(1 / _FULL_SCALE[sample_format])
        self._heard = np.zeros(count, np.float32)
        self._at = 0

    def through(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            mono = block.mean(axis=1, dtype=np.float64).astype(np.float32) * self._scale
            self._keep(self._resampler.resample_chunk(mono))
            yield block

    def _keep(self, piece: np.ndarray) -> None:
        fits = piece[: max(0, len(self._heard) - self._at)]
        self._heard[self._at : self._at + len(fits)] = fits
        self._at += len(piece)

    def finish(self) -> np.ndarray:
        """The resampler may round the count the other way; by more than that it would be broken."""
        self._keep(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        if abs(self._at - len(self._heard)) > 2:
            raise RuntimeError(f"the resampler gave {self._at} samples where {len(self._heard)} were due")
        return self._heard


def _changed(path: Path, clip: Clip, found: str) -> BadInput:
    return BadInput(
        f"{path}: the file changed since it was probed: it was {clip.end} samples, {clip.channels} x "
        f"{clip.rate} Hz, and is {found}; run the command again"
    )


def _ended(path: Path, wanted: int, found: int) -> BadInput:
    """The header or a pass before announced more than came."""
    return BadInput(
        f"{path}: truncated, or changed since it was probed: {wanted} samples are wanted, it holds {found}; "
        "copy it again or run the command again"
    )


def _no_samples(path: Path) -> BadInput:
    return BadInput(f"{path}: is audio of 0 samples, expected speech")


@dataclass
class _Heard:
    """What passes while the identity is computed: whether anything but zeros, and only finite numbers."""

    silent: bool = True
    finite: bool = True

    def through(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.silent = self.silent and not block.any()
            if block.dtype.kind == "f":
                self.finite = self.finite and bool(np.isfinite(block).all())
            yield block

    def check(self, path: Path, sample_format: str) -> None:
        if not self.finite:
            raise BadInput(f"{path}: holds NaN or infinite {sample_format} samples; export it again")
        if self.silent:
            raise BadInput(f"{path}: every sample is zero; expected speech, check the recording")


def _check_range(path: Path, source: Source, start: int, end: int) -> None:
    if not 0 <= start < end <= source.samples:
        raise BadInput(f"{path}: samples [{start}, {end}) were asked for, the file has {source.samples}")
    length = clock.seconds(end - start, source.rate)
    if length < MIN_SECONDS:
        raise BadInput(f"{path}: {length:.3f} s of audio; at least {MIN_SECONDS} s are needed")


def _open(path: Path) -> Source:
    if path.is_dir():
        raise BadInput(f"{path}: is a folder, expected an audio file")
    try:
        refuse_special(path)
        with path.open("rb") as file:
            head = file.read(12)
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise NotFound(f"{path}: no such audio file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if size == 0:
        raise BadInput(f"{path}: is empty (0 bytes), expected audio")
    source: Source | None = _SoundFile.open(path, head)
    if source is None:
        source = _Container.open(path)
    _check_header(path, source)
    return source


def _check_header(path: Path, source: Source) -> None:
    if not RATES[0] <= source.rate <= RATES[1] or not 1 <= source.channels <= MAX_CHANNELS:
        raise BadInput(
            f"{path}: its header says {source.channels} channels at {source.rate} Hz; expected 1 to "
            f"{MAX_CHANNELS} at {RATES[0]} to {RATES[1]} Hz, it is damaged"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Decoder errors in the middle of a file, in one line."""
    import av
    import soundfile

    try:
        yield
    except (soundfile.LibsndfileError, av.error.FFmpegError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"{path}: truncated or damaged audio ({reason}); copy it again") from None


# --- WAV, FLAC, AIFF ------------------------------------------------------------------------------

# subtype: (sample format, dtype that libsndfile fills, bits it left-justifies by)
_SUBTYPES = {
    "PCM_U8": ("s8", "int16", 8),
    "PCM_S8": ("s8", "int16", 8),
    "PCM_16": ("s16", "int16", 0),
    "PCM_24": ("s24", "int32", 8),
    "PCM_32": ("s32", "int32", 0),
    "FLOAT": ("f32", "float32", 0),
    "DOUBLE": ("f64", "float64", 0),
}
_MAGIC = (b"RIFF", b"RF64", b"RIFX", b"FORM", b"fLaC")
_UNKNOWN_LENGTH = 0xFFFFFFFF  # what a writer to a pipe announces


@dataclass(frozen=True)
class _SoundFile:
    path: Path
    rate: int
    channels: int
    subtype: str
    samples: int

    @classmethod
    def open(cls, path: Path, head: bytes) -> _SoundFile | None:
        """None if libsndfile does not know it as uncompressed or FLAC: FFmpeg may."""
        import soundfile

        if head[:4] not in _MAGIC:
            return None
        _check_chunks(path, head)
        try:
            info = soundfile.info(_libsndfile_name(path))
        except soundfile.LibsndfileError:
            return None
        if info.subtype not in _SUBTYPES or not 0 <= info.frames < 1 << 48:
            return None
        return cls(path, info.samplerate, info.channels, info.subtype, info.frames)

    @property
    def sample_format(self) -> str:
        return _SUBTYPES[self.subtype][0]

    def blocks(self, start: int, end: int) -> Iterator[np.ndarray]:
        import soundfile

        _, dtype, shift = _SUBTYPES[self.subtype]
        with soundfile.SoundFile(_libsndfile_name(self.path)) as file:
            file.seek(min(start, file.frames))
            while start < end:
                block = file.read(min(_BLOCK, end - start), dtype=dtype, always_2d=True)
                if not len(block):
                    raise _ended(self.path, end, min(start, file.frames))
                start += len(block)
                yield _narrow(block >> shift if shift else block, self.sample_format)

    def clip(self, start: int, end: int, listen: Listener) -> Clip:
        return _hash_samples(self, start, end, listen(self.blocks(start, end)))


def _libsndfile_name(path: Path) -> str | bytes:
    """A POSIX name is bytes, and not always UTF-8."""
    return os.fsencode(path) if os.name == "posix" else str(path)


def _narrow(block: np.ndarray, sample_format: str) -> np.ndarray:
    return block.astype(np.int8) if sample_format == "s8" else block


def _hash_samples(source: Source, start: int, end: int, blocks: Iterable[np.ndarray]) -> Clip:
    little = (block.astype(block.dtype.newbyteorder("<"), copy=False) for block in blocks)
    data = (np.ascontiguousarray(block).data.cast("B") for block in little)
    return lossless_clip(source.rate, source.channels, source.sample_format, start, end, data)


def _cut_off(path: Path, announced: str, found: str) -> BadInput:
    return BadInput(
        f"{path}: truncated: its header announces {announced}, the file holds {found}; copy it again"
    )


def _check_chunks(path: Path, head: bytes) -> None:
    """libsndfile reads a WAV or AIFF that was cut off as if it were whole; the chunk sizes tell."""
    if head[8:12] not in (b"WAVE", b"AIFF", b"AIFC"):
        return
    order = "little" if head[:4] in (b"RIFF", b"RF64") else "big"
    with path.open("rb") as file:
        size, at, long_data = file.seek(0, 2), 12, None
        while at + 8 <= size:
            file.seek(at)
            chunk = file.read(24)
            name, length = chunk[:4], int.from_bytes(chunk[4:8], order)  # type: ignore[arg-type]
            if name == b"ds64":
                long_data = int.from_bytes(chunk[16:24], "little")
            if name in (b"data", b"SSND"):
                if length == _UNKNOWN_LENGTH:
                    length = long_data or 0
                if at + 8 + length > size:
                    raise _cut_off(path, f"{length} bytes of audio", f"{size - at - 8}")
                return
            at += 8 + length + (length & 1)


# --- containers -----------------------------------------------------------------------------------

_LOSSLESS = ("alac", "flac")
_MOV = "mov,mp4,m4a"
_MISSING_TAIL_SECONDS = 0.1  # what a container may announce beyond what its packets hold


def _movie(path: Path) -> Any:
    """Tags in any old encoding are no reason to refuse the sound."""
    import av

    return av.open(str(path), metadata_errors="replace")


@dataclass(frozen=True)
class _Container:
    """``silence`` samples of zeros stand before the first packet, where the track starts late.

    ``announced`` is how many samples the header of a movie says its track has.
    """

    path: Path
    codec: str
    private: bytes
    rate: int
    channels: int
    sample_format: str
    shift: int
    silence: int
    announced: int | None

    @classmethod
    def open(cls, path: Path) -> _Container:
        import av

        try:
            with _movie(path) as container:
                if not container.streams.audio:
                    raise BadInput(f"{path}: has no audio stream; expected speech")
                if container.streams.audio[0].codec_context is None:
                    raise BadInput(
                        f"{path}: its audio is of a codec that FFmpeg does not know; export it as WAV"
                    )
                return cls._begin(path, container)
        except av.error.FFmpegError:
            raise BadInput(
                f"{path}: not audio, or truncated or damaged: it cannot be opened as WAV, FLAC, AIFF, MOV, "
                "MP4, MP3 or OGG"
            ) from None

    @classmethod
    def _begin(cls, path: Path, container: Any) -> _Container:
        """Decode the first frame: it tells the format, and when the track starts."""
        stream = container.streams.audio[0]
        context = stream.codec_context
        private = bytes(context.extradata or b"")
        is_mov = container.format.name.startswith(_MOV)
        first = next(container.decode(stream), None)
        if first is None:
            raise _no_samples(path)
        sample_format, shift = _sample_format(context.name, context.format.name, private)
        return cls(
            path,
            context.name,
            private,
            context.rate,
            context.channels,
            sample_format,
            shift,
            silence=max(0, _at_rate(first.pts, stream)) if is_mov and first.pts else 0,
            announced=_at_rate(stream.duration, stream) if is_mov and stream.duration else None,
        )

    @cached_property
    def samples(self) -> int:
        """Decodes once to learn it; headers of containers only estimate."""
        with _movie(self.path) as container:
            count = sum(frame.samples for frame in container.decode(container.streams.audio[0]))
        return _trimmed(self.path, count, self.announced, self.rate) + self.silence

    @property
    def lossless(self) -> bool:
        return self.codec.startswith("pcm_") or self.codec in _LOSSLESS

    def clip(self, start: int, end: int, listen: Listener) -> Clip:
        passed: deque[bytes] = deque()
        blocks = listen(self._blocks(start, end, passed))
        if self.lossless:
            return _hash_samples(self, start, end, blocks)
        name = partial(lossy_clip, self.codec, self.private, self.rate, self.channels, self.silence)
        return name(start, end, _drained(passed, blocks))

    def _blocks(self, start: int, end: int, passed: deque[bytes]) -> Iterator[np.ndarray]:
        """The samples of [start, end). All packets, if lossy, go to ``passed``."""
        at = 0
        with _movie(self.path) as container:
            for packet in container.demux(container.streams.audio[0]):
                if packet.size and not self.lossless:
                    passed.append(bytes(packet))
                for block in self._decoded(packet, at) if at < end else ():
                    wanted = block[max(0, start - at) : max(0, end - at)]
                    at += len(block)
                    if len(wanted):
                        yield wanted
                if at >= end and self.lossless:
                    return
        if at < end:
            raise _ended(self.path, end, at)

    def _decoded(self, packet: Any, at: int) -> Iterator[np.ndarray]:
        """The (n, channels) blocks of one packet; before the first of all, the silence."""
        for frame in packet.decode():
            block = frame.to_ndarray()
            block = block.T if frame.format.is_planar else block.reshape(-1, frame.layout.nb_channels)
            if block.shape[1] != self.channels:
                raise BadInput(f"{self.path}: its channel count changes midway; export it again")
            block = _native(block, self.shift)
            if at == 0:
                for begun in range(0, self.silence, _BLOCK):
                    yield np.zeros((min(_BLOCK, self.silence - begun), self.channels), block.dtype)
            at += len(block)
            yield block


def _drained(passed: deque[bytes], blocks: Iterable[np.ndarray]) -> Iterator[bytes]:
    """The packets as they pass while ``blocks`` are pulled to their end."""
    for _ in blocks:
        while passed:
            yield passed.popleft()
    yield from passed


def _at_rate(ticks: int, stream: Any) -> int:
    """A time in the stream's time base as samples at its rate, rounded to the nearest."""
    base = stream.time_base
    return clock.frames(ticks * base.numerator, base.denominator, stream.codec_context.rate)


def _trimmed(path: Path, count: int, announced: int | None, rate: int) -> int:
    """An encoder fills its last packet; what the movie announces is what was recorded."""
    if announced is None:
        return count
    if clock.seconds(announced - count, rate) > _MISSING_TAIL_SECONDS:
        raise _cut_off(path, f"{announced} samples", f"{count}")
    return min(count, announced)


def _native(block: np.ndarray, shift: int) -> np.ndarray:
    if block.dtype == np.uint8:
        return (block.astype(np.int16) - 128).astype(np.int8)
    return block >> shift if shift else block


def _sample_format(codec: str, decoded: str, private: bytes) -> tuple[str, int]:
    """FFmpeg decodes to u8, s16, s32 or floats: the true width, and the shift that brings it back."""
    decoded = decoded.removesuffix("p")
    if decoded != "s32":
        return {"u8": "s8", "s16": "s16", "flt": "f32", "dbl": "f64"}[decoded], 0
    bits = 32
    if codec.startswith("pcm_"):
        bits = int("".join(filter(str.isdigit, codec)) or 32)
    elif codec == "alac" and len(private) > 17:
        bits = private[17]  # the magic cookie: sample size
    elif codec == "flac" and len(private) >= 14:
        bits = ((private[12] & 1) << 4 | private[13] >> 4) + 1  # STREAMINFO: bits per sample
    return ("s24", 8) if bits <= 24 else ("s32", 0)
