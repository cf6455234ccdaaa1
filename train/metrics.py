"""LVE, ALE, motion, jitter and pauses, per frame and pooled; pure functions in float64.

Axes: N frames pooled over clips, T frames of one clip, K coefficients or K vertices with 3
coordinates each. Public code has no single definition of LVE and ALE: the squared forms are those of
the paper's tables, the l2 forms those of MeshTalk's author. Both are reported. What compares a frame
with its neighbours takes one clip at a time: differences across a clip's end mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pmm.store import clock
from pmm.store.rig import LIP32

REST_PERCENTILE = 5.0
"""Of a person's JawOpen over all of their frames: where their jaw rests."""

PAUSE_JAW = 0.05
PAUSE_SPEED = 0.5  # per second: a jaw that opens for a vowel makes several
PAUSE_SECONDS = 0.3


def errors(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The l2 error of every coefficient (N, K), or of every vertex (N, K, 3): (N, K) float64."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} differ in shape")
    difference = prediction.astype(np.float64) - target.astype(np.float64)
    return np.abs(difference) if difference.ndim == 2 else np.sqrt(np.square(difference).sum(-1))


def largest_squared(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Per frame, the largest squared error over coefficients: (N,). Its mean is the LVE."""
    return np.square(errors(prediction, target).max(-1))


def largest(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Per frame, the largest l2 error over coefficients: (N,). Its mean is the LVE (l2)."""
    return errors(prediction, target).max(-1)


def average_squared(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Per frame, the mean squared error over coefficients: (N,). Its mean is the ALE."""
    return np.square(errors(prediction, target)).mean(-1)


def average(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Per frame, the mean l2 error over coefficients: (N,). Its mean is the ALE (l2)."""
    return errors(prediction, target).mean(-1)


FRAME_ERRORS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "lve": largest_squared,
    "lve_l2": largest,
    "ale": average_squared,
    "ale_l2": average,
}
"""The error of each frame by metric; a metric is its mean over all frames pooled."""


def motion_squared(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Of one clip, the ALE of its first differences, frames 2..T: (T - 1,). Its mean is the motion error.

    What equation 10 adds up over coefficients, averaged over them, so that rigs compare.
    """
    return average_squared(np.diff(prediction, axis=0), np.diff(target, axis=0))


def motion(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Of one clip, the ALE (l2) of its first differences, frames 2..T: (T - 1,)."""
    return average(np.diff(prediction, axis=0), np.diff(target, axis=0))


MOTION_ERRORS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "motion": motion_squared,
    "motion_l2": motion,
}
"""The same of first differences: how wrongly it moves, wherever it is."""


def jitter(values: np.ndarray) -> np.ndarray:
    """Of one clip, the mean over coefficients of the absolute second difference, frames 3..T: (T - 2,).

    Of vertices (T, K, 3), the l2 of their second difference.
    """
    bend = np.diff(values.astype(np.float64), n=2, axis=0)
    return average(bend, np.zeros_like(bend))


def rest(jaw: np.ndarray) -> float:
    """Where a jaw rests: a low percentile of JawOpen (N,) over all of a person's frames."""
    return float(np.percentile(jaw.astype(np.float64), REST_PERCENTILE))


def pauses(target: np.ndarray, names: Sequence[str], fps: int, jaw_rest: float) -> np.ndarray:
    """Which of its pauses the frames of a captured clip (T, K) are in, by number: (T,) int64, 0 in none.

    Found without the sound. A pause is a run of at least PAUSE_SECONDS in which JawOpen stays within
    PAUSE_JAW of where this person's jaw rests, and no coefficient of the lower face (LIP32) changes
    by more than PAUSE_SPEED a second from frame to frame. A face that is held still while the jaw is
    down is none, nor is a closure within a word, which is shorter. Raises ValueError without a JawOpen.
    """
    values = target.astype(np.float64)
    lower = [column for column, name in enumerate(names) if name in LIP32]
    near = np.abs(values[:, names.index("JawOpen")] - jaw_rest) <= PAUSE_JAW
    speed = np.abs(np.diff(values[:, lower], axis=0)).max(1) / np.diff(clock.frame_times(len(values), fps))
    goes_on = np.concatenate([[False], near[1:] & near[:-1] & (speed <= PAUSE_SPEED)])[: len(values)]
    run = np.cumsum(~goes_on) - 1
    long = near & (np.bincount(run)[run] >= clock.frames_in(PAUSE_SECONDS, fps))
    return np.where(long, run + 1, 0)


def within(pause: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The jitter (n,) of those frames of ``values`` (T, K) whose three are in one pause (see ``pauses``)."""
    together = (pause[2:] == pause[:-2]) & (pause[2:] > 0)
    return jitter(values)[together]


def lve(prediction: np.ndarray, target: np.ndarray) -> float:
    """Lip vertex error: the largest squared error of a frame, averaged over the frames."""
    return float(largest_squared(prediction, target).mean())


def lve_l2(prediction: np.ndarray, target: np.ndarray) -> float:
    """Lip vertex error without the square."""
    return float(largest(prediction, target).mean())


def ale(prediction: np.ndarray, target: np.ndarray) -> float:
    """Average error: the mean squared error of a frame's coefficients, averaged over the frames."""
    return float(average_squared(prediction, target).mean())


def ale_l2(prediction: np.ndarray, target: np.ndarray) -> float:
    """Average error without the square."""
    return float(average(prediction, target).mean())
