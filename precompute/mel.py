"""Wav2Lip's mel spectrogram, in numpy.

Pre-emphasis ``y[t] = x[t] - 0.97 x[t-1]``; STFT with a Hann window of 800, hop 200, centred with
reflected edges; magnitudes; 80 Slaney mels from 55 to 7600 Hz with Slaney's area normalisation;
``20 log10(max(1e-5, S)) - 20``; then -100..0 dB mapped to -4..4 and clipped.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pmm.store import clock

ALGORITHM = "wav2lip-mel/1"
MELS = 80
_WINDOW = 800
_LOW_HZ, _HIGH_HZ = 55.0, 7600.0
_BLOCK_COLUMNS = 4096


def mel_spectrogram(wave: np.ndarray) -> np.ndarray:
    """The mel spectrogram of a 16 kHz ``wave`` (n,), n > 400, as (80, n // 200 + 1) float32 in -4..4."""
    frames = _frames(_pre_emphasised(np.asarray(wave, np.float64)))
    filters, window = mel_filters(), _hann()
    columns = []
    for start in range(0, len(frames), _BLOCK_COLUMNS):  # blocks, so that memory does not grow with n
        spectrum = np.abs(np.fft.rfft(frames[start : start + _BLOCK_COLUMNS] * window, axis=1))
        columns.append(_scaled(spectrum @ filters.T).astype(np.float32))
    return np.ascontiguousarray(np.concatenate(columns).T)


def _pre_emphasised(wave: np.ndarray) -> np.ndarray:
    result = wave.copy()
    result[1:] -= 0.97 * wave[:-1]
    return result


def _frames(wave: np.ndarray) -> np.ndarray:
    padded = np.pad(wave, _WINDOW // 2, mode="reflect")
    return np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[:: clock.MEL_HOP_SAMPLES]


def _hann() -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)


def _scaled(magnitude: np.ndarray) -> np.ndarray:
    decibels = 20 * np.log10(np.maximum(1e-5, magnitude)) - 20
    return np.clip(8 * (decibels + 100) / 100 - 4, -4, 4)


@cache
def mel_filters() -> np.ndarray:
    """Triangles between mel-spaced corners, each of unit area in Hz (times 1): (80, 401) float64."""
    bins = np.linspace(0, clock.SPEECH_RATE / 2, _WINDOW // 2 + 1)
    corners = _mel_to_hz(np.linspace(_hz_to_mel(_LOW_HZ), _hz_to_mel(_HIGH_HZ), MELS + 2))
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


# Slaney's scale: linear below 1000 Hz (3/200 mel per Hz), logarithmic above (27 mels per factor 6.4).
_BREAK_HZ, _BREAK_MEL, _LOG_STEP = 1000.0, 15.0, np.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz * 3 / 200
    return float(_BREAK_MEL + np.log(hz / _BREAK_HZ) / _LOG_STEP)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    above = _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * 200 / 3, above)
