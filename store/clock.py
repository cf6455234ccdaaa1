"""The one place where samples, seconds, wav2vec2 steps, mel columns and video frames meet.

Nobody else multiplies or divides by a rate. Counts are integers and are computed in integer
arithmetic; only interpolation positions are real numbers.

The steps of a wav2vec2 model: its convolutions (kernels 10 3 3 3 3 2 2, strides 5 2 2 2 2 2 2)
turn 16 kHz audio into one vector each 320 samples, and step ``s`` is centred at
``(s + 0.625) * 20 ms``.
"""

from __future__ import annotations

import numpy as np

SPEECH_RATE = 16_000
"""Hz; what wav2vec2 and Wav2Lip listen to."""

STEP_SAMPLES = 320
"""Samples at SPEECH_RATE from one wav2vec2 step to the next (20 ms)."""

STEP_RECEPTIVE_SAMPLES = 400
"""Samples at SPEECH_RATE that one wav2vec2 step sees (25 ms)."""

STEPS_PER_SECOND = SPEECH_RATE // STEP_SAMPLES
_STEP_CENTRE = (STEP_RECEPTIVE_SAMPLES / 2) / STEP_SAMPLES  # 0.625 steps

MEL_HOP_SAMPLES = 200
"""Samples at SPEECH_RATE from one mel column to the next (12.5 ms)."""

MEL_COLUMNS_PER_SECOND = SPEECH_RATE // MEL_HOP_SAMPLES


def seconds(samples: int, rate: int) -> float:
    """Duration in seconds of ``samples`` at ``rate`` Hz, for people to read."""
    return samples / rate


def samples(duration_seconds: float, rate: int) -> int:
    """How many samples at ``rate`` Hz a duration in seconds takes, rounded."""
    return round(duration_seconds * rate)


def minutes(duration_minutes: float) -> float:
    """Minutes as seconds."""
    return duration_minutes * 60


def frames(samples: int, rate: int, fps: int) -> int:
    """T: video frames in a clip, ``round(samples / rate * fps)``, halves up, in integers.

    >>> frames(32000, 16000, 30), frames(801, 48000, 60), frames(1, 16000, 30)
    (60, 1, 0)
    """
    return (2 * samples * fps + rate) // (2 * rate)


def frames_in(duration_seconds: float, fps: int) -> int:
    """Video frames that a duration takes, rounded.

    >>> frames_in(0.2, 30), frames_in(20, 60)
    (6, 1200)
    """
    return round(duration_seconds * fps)


def second_start(frame: int, fps: int) -> int:
    """The last frame at a whole second that is not after ``frame``.

    >>> second_start(59, 30), second_start(60, 30)
    (30, 60)
    """
    return frame // fps * fps


def resampled(samples: int, rate: int, to_rate: int = SPEECH_RATE) -> int:
    """Samples of the same clip at another rate, rounded halves up."""
    return frames(samples, rate, to_rate)


def steps(speech_samples: int) -> int:
    """S: wav2vec2 steps in a clip of so many 16 kHz samples (49 in 1 s, 99 in 2 s); 0 if too short."""
    return max(0, (speech_samples - STEP_RECEPTIVE_SAMPLES) // STEP_SAMPLES + 1)


def step_span(first: int, last: int) -> tuple[int, int]:
    """The 16 kHz samples [start, end) that steps [first, last) are computed from."""
    return first * STEP_SAMPLES, (last - 1) * STEP_SAMPLES + STEP_RECEPTIVE_SAMPLES


def first_step(start: int) -> int:
    """The step whose samples begin at ``start``, a multiple of STEP_SAMPLES."""
    return start // STEP_SAMPLES


def step_positions(frame_count: int, step_count: int, fps: int, first_frame: int = 0) -> np.ndarray:
    """Where video frames read the native wav2vec2 steps, for linear interpolation.

    Frame ``j`` reads position ``clip(50 j / fps - 0.625, 0, S - 1)``, j counted from the start of
    the whole clip, so that a window of a clip reads the same values as the clip does.

    Returns (frame_count,) float64.
    """
    j = np.arange(first_frame, first_frame + frame_count, dtype=np.float64)
    return np.clip(STEPS_PER_SECOND * j / fps - _STEP_CENTRE, 0, step_count - 1)


def frame_times(frame_count: int, fps: int) -> np.ndarray:
    """Seconds of each video frame from the start of the clip: (frame_count,) float64."""
    return np.arange(frame_count, dtype=np.float64) / fps


def mel_columns(speech_samples: int) -> int:
    """Columns of the (centred) mel spectrogram of so many 16 kHz samples."""
    return speech_samples // MEL_HOP_SAMPLES + 1


def mel_samples(column_count: int) -> int:
    """The fewest 16 kHz samples whose mel spectrogram has so many columns."""
    return (column_count - 1) * MEL_HOP_SAMPLES


def mel_window_starts(frame_count: int, column_count: int, fps: int, width: int) -> np.ndarray:
    """First mel column of each video frame's window of ``width`` columns: (frame_count,) int64.

    Frame ``i`` takes columns from ``floor(80 i / fps)``; a window that would run past the end
    takes the last full window instead, so that no frame is lost.
    """
    starts = np.arange(frame_count, dtype=np.int64) * MEL_COLUMNS_PER_SECOND // fps
    return np.minimum(starts, max(0, column_count - width))


# --- time codes -----------------------------------------------------------------------------------
# Live Link Face writes HH:MM:SS:FF.sss: FF counts 60ths of a second (in 30 fps takes too) and sss
# thousandths of such a frame, so that a tick of 1/60,000 s holds any time code exactly.

TIMECODE_FRAMES_PER_SECOND = 60
TICKS_PER_FRAME = 1_000
TICKS_PER_SECOND = TIMECODE_FRAMES_PER_SECOND * TICKS_PER_FRAME
TICKS_PER_DAY = 24 * 3600 * TICKS_PER_SECOND


def ticks(milliseconds: int) -> int:
    """Milliseconds as ticks, exactly.

    >>> ticks(100), ticks(1)
    (6000, 60)
    """
    return milliseconds * TICKS_PER_SECOND // 1000


def timecode_ticks(
    hours: np.ndarray,
    minutes: np.ndarray,
    whole_seconds: np.ndarray,
    frame: np.ndarray,
    thousandths: np.ndarray,
) -> np.ndarray:
    """Ticks since midnight of time codes whose fields are int64 arrays of one shape."""
    second = 3600 * hours + 60 * minutes + whole_seconds
    return (second * TIMECODE_FRAMES_PER_SECOND + frame) * TICKS_PER_FRAME + thousandths


def timecode(ticks: int) -> str:
    """``HH:MM:SS:FF.sss`` of a time in ticks, modulo a day.

    >>> timecode(0), timecode(TICKS_PER_DAY + 61_500)
    ('00:00:00:00.000', '00:00:01:01.500')
    """
    frame, thousandths = divmod(ticks % TICKS_PER_DAY, TICKS_PER_FRAME)
    second, frame = divmod(frame, TIMECODE_FRAMES_PER_SECOND)
    minute, second = divmod(second, 60)
    return f"{minute // 60:02}:{minute % 60:02}:{second:02}:{frame:02}.{thousandths:03}"


def export_ticks(row_count: int, fps: int) -> np.ndarray:
    """Ticks of exact rows at ``fps``, which divides 60, from 0: (row_count,) int64."""
    return np.arange(row_count, dtype=np.int64) * (TICKS_PER_SECOND // fps)


def device_rate(fps: int, at_60: float) -> float:
    """Hz of a device set to ``fps`` whose clock makes ``at_60`` Hz of 60."""
    return fps * at_60 / TIMECODE_FRAMES_PER_SECOND


def device_rows(duration_seconds: float, device_hz: float) -> int:
    """Rows that a device at ``device_hz`` (59.9 or so) writes in that time, at least 2."""
    return max(2, round(duration_seconds * device_hz))


def device_times(row_count: int, device_hz: float) -> np.ndarray:
    """Seconds of those rows from the first: (row_count,) float64."""
    return np.arange(row_count) / device_hz


def device_ticks(row_count: int, device_hz: float) -> np.ndarray:
    """Ticks of those rows, as far as a time code holds them: (row_count,) int64."""
    return np.rint(device_times(row_count, device_hz) * TICKS_PER_SECOND).astype(np.int64)


def half_periods(times: np.ndarray, hz: float) -> np.ndarray:
    """Half periods of ``hz`` passed since the first of ``times`` in seconds: float64 of their shape."""
    return (times - times[0]) * 2 * hz


def spacing(times: np.ndarray) -> float:
    """Mean seconds from one of ``times`` (N,) to the next; 0 if there is but one."""
    return float((times[-1] - times[0]) / max(1, len(times) - 1))


def track_ticks(ticks: np.ndarray) -> int:
    """Length of a track of rows at ``ticks``: first to last, and the median interval for the last row."""
    return int(ticks[-1] - ticks[0]) + round(float(np.median(np.diff(ticks))))


def track_rate(ticks: np.ndarray) -> float:
    """Rows per second from the first row to the last."""
    return (len(ticks) - 1) * TICKS_PER_SECOND / int(ticks[-1] - ticks[0])


def track_positions(ticks: np.ndarray, frame_count: int, fps: int) -> np.ndarray:
    """Where video frames read the rows at ``ticks``, for linear interpolation: (frame_count,) float64.

    Frame ``j`` is at ``j / fps`` after the first row; frames after the last row read the last.
    """
    wanted = frame_times(frame_count, fps) * TICKS_PER_SECOND
    return np.interp(wanted, ticks - ticks[0], np.arange(len(ticks)))
