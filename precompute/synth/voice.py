"""Speech and the times of its phonemes, by espeak-ng through ctypes.

espeak-ng is GPL-3 and an optional extra (``pip install 'pmmtalk[synth]'``): it is loaded when the
first sentence is spoken, and never vendored. What it speaks depends a little on what it spoke
before (its noise generator is not seeded), so a wave belongs to its own timeline: keep both, and
never expect the same samples twice.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pmm import BadInput, ExtraMissing
from pmm.store import clock


@dataclass(frozen=True)
class Phoneme:
    """An espeak phoneme name (stress and length marks included) and its extent in seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Spoken:
    """pcm: (n,) int16 mono at ``rate`` Hz; phonemes in order, without holes."""

    pcm: np.ndarray
    rate: int
    phonemes: tuple[Phoneme, ...]


def speak(
    text: str, voice: str, *, words_per_minute: int = 175, pitch: int = 50, pitch_range: int = 50
) -> Spoken:
    """Say ``text`` with an espeak voice such as ``en-us+f2`` or ``cmn+m3``.

    pitch and pitch_range go from 0 to 99, 50 is the voice's own.
    Raises ExtraMissing without espeakng-loader; BadInput for an unknown voice.
    """
    return _engine().speak(text, voice, {_RATE: words_per_minute, _PITCH: pitch, _RANGE: pitch_range})


def require_engine() -> None:
    """Start espeak-ng now, to learn early whether it is there. Raises ExtraMissing if not."""
    _engine()


# espeak-ng's speak_lib.h
_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT = 2, 0x0001, 0x8000
_RATE, _PITCH, _RANGE = 1, 3, 4
_UTF8, _POSITION_CHARACTER = 1, 1
_LIST_TERMINATED, _PHONEME = 0, 7


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms; too coarse
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@cache
def _engine() -> _Engine:
    return _Engine()


class _Engine:
    """The library holds global state: one per process, not for threads."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise ExtraMissing(
                "speech on the spot needs espeak-ng, and it is not installed: pip install 'pmmtalk[synth]'"
            ) from None
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = Path(espeakng_loader.get_data_path()).parent
        flags = _PHONEME_EVENTS | _DONT_EXIT
        self._rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), flags)
        if self._rate <= 0:
            raise ExtraMissing(f"espeak-ng did not start with the data in {data}; reinstall espeakng-loader")
        self._waves: list[bytes] = []
        self._starts: list[tuple[int, str]] = []
        self._callback = _CALLBACK(self._collect)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, wave: Any, count: int, events: Any) -> int:
        if wave and count:
            self._waves.append(ctypes.string_at(wave, 2 * count))
        at = 0
        while events[at].type != _LIST_TERMINATED:
            if events[at].type == _PHONEME:
                self._starts.append((events[at].sample, events[at].name.decode("utf-8", "replace")))
            at += 1
        return 0

    def speak(self, text: str, voice: str, parameters: dict[int, int]) -> Spoken:
        self._waves.clear()
        self._starts.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise BadInput(f"espeak-ng has no voice {voice!r}; expected one such as en-us+f2 or cmn+m3")
        for parameter, value in parameters.items():
            self._library.espeak_SetParameter(parameter, value, 0)
        data = text.encode()
        status = self._library.espeak_Synth(data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        if status != 0 or not self._waves:
            raise BadInput(f"espeak-ng could not say {text[:40]!r} (status {status})")
        pcm = np.frombuffer(b"".join(self._waves), dtype="<i2")
        return Spoken(pcm, self._rate, _phonemes(self._starts, len(pcm), self._rate))


def _phonemes(starts: Sequence[tuple[int, str]], samples: int, rate: int) -> tuple[Phoneme, ...]:
    """Each phoneme ends where the next begins, the last with the wave."""
    ends = [start for start, _ in starts[1:]] + [samples]
    return tuple(
        Phoneme(name, clock.seconds(start, rate), clock.seconds(end, rate))
        for (start, name), end in zip(starts, ends)
        if end > start
    )
