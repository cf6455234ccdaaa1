"""LVE and ALE, per frame and pooled; pure functions in float64.

Axes: N frames pooled over clips, K coefficients or K vertices with 3 coordinates each. Public code
has no single definition of these metrics: the squared forms are those of the paper's tables, the l2
forms those of MeshTalk's author. Both are reported.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


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
