"""Audio in: what a file says (its identity), and what the models hear (16 kHz mono float32).

WAV, FLAC and AIFF are read by libsndfile; everything else (.mov, .mp4, .m4a, .mp3, .ogg, ...) by
FFmpeg through PyAV. Both stream, so that memory does not grow with the length of a file.

Lossless audio is named by its integers, so that a WAV, its FLAC and its ALAC are one clip. Lossy
audio is named by its packets, for decoders differ and packets do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pmm import BadInput, NotFound
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


class Source(Protocol):
    """Native audio of one file. ``blocks`` gives (n, channels) arrays of ``sample_format``."""

    @property
    def rate(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def sample_format(self) -> str: ...

    @property
    def samples(self) -> int: ...

    def blocks(self, start: int, end: int) -> Iterator[np.ndarray]: ...

    def clip(self, start: int, end: int, blocks: Iterable[np.ndarray]) -> Clip: ...


def probe(path: Path, start: int = 0, end: int | None = None) -> Clip:
    """The identity of the audio in ``path``, of its samples [start, end) at its own rate.

    Reads the whole range once (twice for containers), in blocks.

    Raises NotFound if the file is missing, BadInput (one line) if it holds no usable audio: not
    audio, empty, truncated, silent to the last bit, not finite, or shorter than MIN_SECONDS.
    """
    source = _open(path)
    end = source.samples if end is None else end
    _check_range(path, source, start, end)
    heard = _Heard()
    with _reading(path):
        clip = source.clip(start, end, heard.through(source.blocks(start, end)))
    heard.check(path, source.sample_format)
    return clip


def decode(path: Path, clip: Clip) -> np.ndarray:
    """The clip as the models hear it: (n,) float32 in [-1, 1], n = ``clock.resampled`` of its samples.

    Channels are mixed by their mean and resampled to SPEECH_RATE as PREPROCESSING says.

    Raises BadInput if the file no longer holds as many samples as the clip that was probed.
    """
    import soxr

    source = _open(path)
    if (source.rate, source.channels) != (clip.rate, clip.channels) or source.samples < clip.end:
        raise _changed(path, clip, f"{source.samples} samples, {source.channels} x {source.rate} Hz")
    quality = PREPROCESSING["quality"]
    resampler = soxr.ResampleStream(clip.rate, clock.SPEECH_RATE, 1, dtype="float32", quality=quality)
    scale = np.float32(1 / _FULL_SCALE[source.sample_format])
    pieces, count = [], 0
    with _reading(path):
        for block in source.blocks(clip.start, clip.end):
            count += len(block)
            mono = block.mean(axis=1, dtype=np.float64).astype(np.float32) * scale
            pieces.append(resampler.resample_chunk(mono))
    if count != clip.samples:
        raise _changed(path, clip, f"{count} samples")
    pieces.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return _exactly(np.concatenate(pieces), clock.resampled(clip.samples, clip.rate))


def _exactly(audio: np.ndarray, count: int) -> np.ndarray:
    """The resampler may round the count the other way; by more than that it would be broken."""
    if abs(len(audio) - count) > 2:
        raise RuntimeError(f"the resampler gave {len(audio)} samples where {count} were due")
    return np.ascontiguousarray(np.pad(audio[:count], (0, max(0, count - len(audio)))))


def _changed(path: Path, clip: Clip, found: str) -> BadInput:
    return BadInput(
        f"{path}: the file changed since it was probed: it was {clip.end} samples, {clip.channels} x "
        f"{clip.rate} Hz, and is {found}; run the command again"
    )


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
    if source.samples == 0:
        raise BadInput(f"{path}: is audio of 0 samples, expected speech")


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
            info = soundfile.info(str(path))
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
        with soundfile.SoundFile(str(self.path)) as file:
            file.seek(start)
            while start < end:
                block = file.read(min(_BLOCK, end - start), dtype=dtype, always_2d=True)
                if not len(block):
                    raise _cut_off(self.path, f"{end} samples", f"{start}")
                start += len(block)
                yield _narrow(block >> shift if shift else block, self.sample_format)

    def clip(self, start: int, end: int, blocks: Iterable[np.ndarray]) -> Clip:
        return _hash_samples(self, start, end, blocks)


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
    """``silence`` samples of zeros stand before the first packet, where the track starts late."""

    path: Path
    codec: str
    private: bytes
    rate: int
    channels: int
    sample_format: str
    shift: int
    silence: int
    samples: int

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
                return cls._survey(path, container)
        except av.error.FFmpegError:
            raise BadInput(
                f"{path}: not audio, or truncated or damaged: it cannot be opened as WAV, FLAC, AIFF, MOV, "
                "MP4, MP3 or OGG"
            ) from None

    @classmethod
    def _survey(cls, path: Path, container: Any) -> _Container:
        """Decode once to learn how many samples there are; headers of containers only estimate."""
        stream = container.streams.audio[0]
        context = stream.codec_context
        private = bytes(context.extradata or b"")
        is_mov = container.format.name.startswith(_MOV)
        announced = _at_rate(stream.duration, stream) if is_mov and stream.duration else None
        count, silence, first = 0, 0, True
        for frame in container.decode(stream):
            if first and is_mov and frame.pts:
                silence = max(0, _at_rate(frame.pts, stream))
            first = False
            count += frame.samples
        count = _trimmed(path, count, announced, context.rate) + silence
        sample_format, shift = _sample_format(context.name, context.format.name, private)
        return cls(
            path,
            context.name,
            private,
            context.rate,
            context.channels,
            sample_format,
            shift,
            silence,
            count,
        )

    @property
    def lossless(self) -> bool:
        return self.codec.startswith("pcm_") or self.codec in _LOSSLESS

    def blocks(self, start: int, end: int) -> Iterator[np.ndarray]:
        at = 0
        for block in self._all_blocks():
            wanted = block[max(0, start - at) : max(0, end - at)]
            at += len(block)
            if len(wanted):
                yield wanted
            if at >= end:
                return

    def _all_blocks(self) -> Iterator[np.ndarray]:
        with _movie(self.path) as container:
            for number, frame in enumerate(container.decode(container.streams.audio[0])):
                block = frame.to_ndarray()
                planar = frame.format.is_planar
                block = block.T if planar else block.reshape(-1, frame.layout.nb_channels)
                if block.shape[1] != self.channels:
                    raise BadInput(f"{self.path}: its channel count changes midway; export it again")
                block = _native(block, self.shift)
                if number == 0 and self.silence:
                    yield np.zeros((self.silence, self.channels), block.dtype)
                yield block

    def clip(self, start: int, end: int, blocks: Iterable[np.ndarray]) -> Clip:
        if self.lossless:
            return _hash_samples(self, start, end, blocks)
        for _ in blocks:  # heard, for the checks; the packets make the name
            pass
        name = partial(lossy_clip, self.codec, self.private, self.rate, self.channels, start, end)
        return name(self._packets())

    def _packets(self) -> Iterator[bytes]:
        with _movie(self.path) as container:
            for packet in container.demux(container.streams.audio[0]):
                if packet.size:
                    yield bytes(packet)


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
