"""LVE and ALE on numbers small enough to work out by hand."""

import numpy as np
import pytest

from pmm.train import metrics

TARGET = np.zeros((2, 2), np.float32)
PREDICTION = np.array([[0.1, -0.3], [0.2, 0.0]], np.float32)


def test_coefficients_by_hand():
    assert metrics.lve(PREDICTION, TARGET) == pytest.approx((0.09 + 0.04) / 2)
    assert metrics.lve_l2(PREDICTION, TARGET) == pytest.approx((0.3 + 0.2) / 2)
    assert metrics.ale(PREDICTION, TARGET) == pytest.approx((0.01 + 0.09 + 0.04 + 0.0) / 4)
    assert metrics.ale_l2(PREDICTION, TARGET) == pytest.approx((0.1 + 0.3 + 0.2 + 0.0) / 4)


def test_vertices_by_hand():
    """Two frames of two vertices: errors 5 and 1, then 0 and 2."""
    target = np.zeros((2, 2, 3))
    prediction = np.array([[[3.0, 4, 0], [0, 0, 1]], [[0, 0, 0], [0, 2, 0]]])
    assert metrics.lve(prediction, target) == pytest.approx((25 + 4) / 2)
    assert metrics.lve_l2(prediction, target) == pytest.approx((5 + 2) / 2)
    assert metrics.ale(prediction, target) == pytest.approx((25 + 1 + 0 + 4) / 4)
    assert metrics.ale_l2(prediction, target) == pytest.approx((5 + 1 + 0 + 2) / 4)


def test_frame_errors_pool_frames_not_clips():
    long, short = np.full((3, 2), 1.0), np.full((1, 2), 2.0)
    pooled = np.concatenate([metrics.FRAME_ERRORS["lve"](clip, 0 * clip) for clip in (long, short)])
    assert pooled.mean() == (3 * 1 + 1 * 4) / 4


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\) and target \(3, 2\)"):
        metrics.lve(PREDICTION, np.zeros((3, 2)))
