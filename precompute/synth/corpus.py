"""The talking corpus: speakers, what they say, and the folder it is written to.

The plan is pure: the same specification gives the same speakers, sentences and face noise. The
waves differ a little from run to run (see ``voice``), and the curves follow their own wave.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from pmm import AlreadyThere, BadInput
from pmm.precompute.datasets import livelink
from pmm.precompute.synth import sentences
from pmm.precompute.synth.curves import Face, animate
from pmm.precompute.synth.phonemes import Segment, segments
from pmm.precompute.synth.voice import Spoken, require_engine, speak
from pmm.store import clock

_VOICES = {"en": ("en-us", "en-gb-x-rp"), "cmn": ("cmn",)}
_VARIANTS = {"female": 5, "male": 8}  # espeak's +f1..+f5, +m1..+m8
_TAKE_SECONDS = (4.5, 8.5)
_PAD_SECONDS = 0.35  # of quiet before and after, so that the lips can lead the first sound
_QUIET = 1.5  # standard deviation of the room's noise, in 16-bit steps


@dataclass(frozen=True)
class CorpusSpec:
    """minutes of speech in all, shared by ``subjects`` who speak ``languages`` in turn.

    fps is 60 or 30: rows of the face track per second, as a device keeps it (59.9 or 29.95).
    rate is that of the audio, Hz.
    """

    minutes: float = 10.0
    subjects: int = 10
    languages: tuple[str, ...] = ("en", "cmn")
    seed: int = 0
    fps: int = 60
    rate: int = 48_000

    def __post_init__(self) -> None:
        unknown = [name for name in self.languages if name not in sentences.LANGUAGES]
        if unknown or not self.languages:
            known = ", ".join(sentences.LANGUAGES)
            raise BadInput(f"languages {', '.join(unknown) or 'none'}: expected some of {known}")
        if not 0 < self.minutes < 100_000 or not 1 <= self.subjects <= 1000:
            raise BadInput(
                f"{self.minutes} minutes of {self.subjects} subjects; expected above 0, and 1 to 1000"
            )
        if self.fps not in (30, 60) or not 8_000 <= self.rate <= 192_000:
            raise BadInput(f"{self.fps} fps and {self.rate} Hz; expected 30 or 60, and 8000 to 192000")


@dataclass(frozen=True)
class Speaker:
    """A voice and a face. device_hz is what their phone's clock makes of the nominal rate."""

    name: str
    gender: str
    language: str
    voice: str
    words_per_minute: int
    pitch: int
    pitch_range: int
    level: float
    device_hz: float
    face: Face


@dataclass(frozen=True)
class PlannedTake:
    """What is said, and the seed of the face's chance movements. start is the time code in ticks."""

    speaker: Speaker
    name: str
    text: str
    start: int
    seed: tuple[int, ...]


@dataclass(frozen=True)
class TakeWritten:
    """Progress: one take is on the disk."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What was written. ``unknown_phonemes`` should be empty: names no mouth shape is known for."""

    takes: int
    subjects: int
    seconds: float
    unknown_phonemes: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "unknown_phonemes": dict(self.unknown_phonemes)}


def plan(spec: CorpusSpec) -> tuple[PlannedTake, ...]:
    """Every take of the corpus, speaker by speaker; pure, and a function of ``spec`` alone."""
    share = clock.minutes(spec.minutes) / spec.subjects
    takes: list[PlannedTake] = []
    owed = 0.0
    for index in range(spec.subjects):
        speaker = _speaker(spec, index)
        rng = np.random.default_rng([spec.seed, 1, index])
        owed += share
        number = 0
        while number == 0 or owed > _TAKE_SECONDS[0] / 2:
            number += 1
            text, seconds = _text(speaker, rng)
            owed -= seconds
            start = int(rng.integers(clock.TICKS_PER_DAY))
            seed = (spec.seed, 2, index, number)
            takes.append(PlannedTake(speaker, f"take{number:03}", text, start, seed))
    return tuple(takes)


def _speaker(spec: CorpusSpec, index: int) -> Speaker:
    """Languages alternate, and within each language the genders."""
    rng = np.random.default_rng([spec.seed, 0, index])
    language = spec.languages[index % len(spec.languages)]
    turn = index // len(spec.languages)
    gender = ("female", "male")[turn % 2]
    accents = _VOICES[language]
    variant = f"{gender[0]}{1 + turn // 2 % _VARIANTS[gender]}"
    return Speaker(
        name=f"{language}-{gender[0]}{index + 1:02}",
        gender=gender,
        language=language,
        voice=f"{accents[turn // 2 % len(accents)]}+{variant}",
        words_per_minute=int(rng.integers(145, 196)),
        pitch=int(rng.integers(35, 66)),
        pitch_range=int(rng.integers(35, 66)),
        level=float(rng.uniform(0.5, 0.95)),
        device_hz=clock.device_rate(spec.fps, float(rng.uniform(59.90, 59.97))),
        face=Face(
            gain=float(rng.uniform(0.9, 1.2)),
            jaw_gain=float(rng.uniform(0.85, 1.2)),
            smile=float(rng.uniform(0.0, 0.06)),
            asymmetry=float(rng.uniform(-1, 1)),
            liveliness=float(rng.uniform(0.6, 1.3)),
            noise=float(rng.uniform(0.002, 0.006)),
        ),
    )


def _text(speaker: Speaker, rng: np.random.Generator) -> tuple[str, float]:
    """(one to three sentences that last about as long as a take should, expected seconds)."""
    aim = float(rng.uniform(*_TAKE_SECONDS))
    text, seconds = "", 2 * _PAD_SECONDS
    for _ in range(3):
        more = sentences.sentence(speaker.language, rng)
        longer = sentences.expected_seconds(more, speaker.language, speaker.words_per_minute)
        if text and seconds + longer > aim + 1:
            break
        text, seconds = f"{text} {more}".strip(), seconds + longer
    return text, seconds


def write_corpus(
    spec: CorpusSpec, out: Path, on_event: Callable[[TakeWritten], None] | None = None
) -> Summary:
    """Speak and animate every take of ``plan(spec)`` into the new or empty folder ``out``.

    ``out/<subject>/<take>/<take>_<subject>`` with .csv (Live Link Face), .wav (16-bit mono) and .txt;
    All is written to a folder beside it, ``<out>.<random>.partial``, which becomes ``out`` when it is
    whole. On an error or Ctrl-C what was made is taken away; what a killed run leaves hinders no other.

    Raises AlreadyThere if anything is in ``out``, ExtraMissing without espeak-ng.
    """
    require_engine()
    with _made_beside(out) as partial:
        return _write_takes(spec, partial, on_event)


def _write_takes(spec: CorpusSpec, out: Path, on_event: Callable[[TakeWritten], None] | None) -> Summary:
    """The same, into a folder of our own; ``subjects.csv`` comes last."""
    takes = plan(spec)
    unknown: Counter[str] = Counter()
    total = 0.0
    for take in takes:
        seconds, names = _write_take(spec, take, out)
        unknown.update(names)
        total += seconds
        if on_event is not None:
            on_event(TakeWritten(f"{take.speaker.name}/{take.name}", seconds))
    speakers = list({take.speaker.name: take.speaker for take in takes}.values())
    table = "".join(f"{s.name},{s.gender},{s.language}\n" for s in speakers)
    (out / "subjects.csv").write_text("subject,gender,language\n" + table, encoding="utf-8", newline="\n")
    return Summary(len(takes), len(speakers), total, tuple(sorted(unknown.items())))


@contextmanager
def _made_beside(out: Path) -> Iterator[Path]:
    """A new folder that becomes ``out`` if all goes well, and else goes away with the parents made for it."""
    _check_free(out)
    place = Path(os.path.realpath(out))  # an empty folder may be there, or a link to one
    partial = place.with_name(f"{place.name}.{uuid4().hex[:8]}.partial")
    new = [folder for folder in place.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{out}: cannot be made ({error.strerror}); choose another place") from None
    try:
        yield partial
        _put_in_place(partial, place, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # not ours alone any more
            for folder in new:
                folder.rmdir()
        raise


def _check_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise AlreadyThere(f"{out}: is a file, expected a new folder; choose another name")
    try:
        taken = next(out.iterdir(), None) if out.exists() else None
    except OSError as error:
        raise BadInput(f"{out}: cannot be read ({error.strerror}); choose another place") from None
    if taken is not None:
        complete = "a finished corpus" if (out / "subjects.csv").exists() else f"it holds {taken.name}"
        raise AlreadyThere(
            f"{out}: is not empty ({complete}) and nothing is overwritten; choose another name"
        )
    if out.is_mount():
        raise BadInput(f"{out}: is a disk's own top folder; name a new folder in it")


def _put_in_place(partial: Path, place: Path, out: Path) -> None:
    """Takes the place of an empty folder; of nothing else."""
    try:
        if place.is_dir():
            shutil.copymode(place, partial)
            if os.name == "nt":  # elsewhere renaming replaces an empty folder
                place.rmdir()
        partial.rename(place)
    except OSError as error:
        raise AlreadyThere(
            f"{out}: is no longer empty or cannot be replaced ({error.strerror}), and nothing is "
            "overwritten; choose another name"
        ) from None


def _write_take(spec: CorpusSpec, take: PlannedTake, out: Path) -> tuple[float, list[str]]:
    """(seconds, phoneme names without a mouth shape)."""
    import soundfile

    speaker = take.speaker
    rng = np.random.default_rng(take.seed)
    spoken = speak(
        take.text,
        speaker.voice,
        words_per_minute=speaker.words_per_minute,
        pitch=speaker.pitch,
        pitch_range=speaker.pitch_range,
    )
    timeline, unknown = lay_out(spoken)
    audio = _audio(spoken, spec.rate, speaker.level, rng)
    seconds = clock.seconds(len(audio), spec.rate)
    times = clock.device_times(clock.device_rows(seconds, speaker.device_hz), speaker.device_hz)
    motion = animate(timeline, times, speaker.face, rng)
    folder = out / speaker.name / take.name
    folder.mkdir(parents=True)
    stem = folder / f"{take.name}_{speaker.name}"
    livelink.write(
        stem.with_suffix(".csv"),
        motion.coefficients,
        fps=spec.fps,
        rotations=motion.rotations,
        start=take.start,
        device_hz=speaker.device_hz,
    )
    soundfile.write(stem.with_suffix(".wav"), audio, spec.rate, subtype="PCM_16")
    stem.with_suffix(".txt").write_text(take.text + "\n", encoding="utf-8", newline="\n")
    return seconds, unknown


def lay_out(spoken: Spoken) -> tuple[tuple[Segment, ...], list[str]]:
    """(mouth shapes on the take's clock, with the quiet before and after; names not understood)."""
    found, unknown = segments(spoken.phonemes)
    end = clock.seconds(len(spoken.pcm), spoken.rate) + _PAD_SECONDS
    moved = [Segment(s.shape, s.start + _PAD_SECONDS, s.end + _PAD_SECONDS, s.stressed) for s in found]
    first = moved[0].start if moved else end
    quiet = (Segment("pause", 0.0, first), *moved, Segment("pause", end, end + _PAD_SECONDS))
    return quiet, list(unknown)


def _audio(spoken: Spoken, rate: int, level: float, rng: np.random.Generator) -> np.ndarray:
    """(n,) int16 at ``rate``: the wave at the speaker's level between two quiet pads, in a quiet room."""
    import soxr

    wave = soxr.resample(spoken.pcm.astype(np.float32), spoken.rate, rate, quality="VHQ")
    pad = np.zeros(clock.samples(_PAD_SECONDS, rate), np.float32)
    peak = max(1.0, float(np.abs(wave).max()))
    audio = np.concatenate([pad, wave * (level * 2**15 / peak), pad])
    audio += rng.normal(0, _QUIET, len(audio)).astype(np.float32)
    return np.clip(np.rint(audio), -(2**15), 2**15 - 1).astype(np.int16)
