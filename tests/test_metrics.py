"""Metrics on numbers small enough to work out by hand."""

import numpy as np
import pytest

from pmm.store.rig import ARKIT52, LIP32
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


def test_motion_errors_by_hand():
    """Three frames of two coefficients. First differences: 0.3, -0.1 and 0.1, 0.2, of a still target."""
    prediction = np.array([[0.0, 0.5], [0.3, 0.4], [0.4, 0.6]])
    still = np.full((3, 2), 0.7)
    assert metrics.motion_squared(prediction, still) == pytest.approx([(0.09 + 0.01) / 2, (0.01 + 0.04) / 2])
    assert metrics.motion(prediction, still) == pytest.approx([(0.3 + 0.1) / 2, (0.1 + 0.2) / 2])
    moved = prediction + np.array([5.0, -2.0])
    assert metrics.motion_squared(prediction, moved) == pytest.approx([0.0, 0.0])
    assert metrics.motion(prediction[:1], still[:1]).shape == (0,)


def test_motion_of_vertices_by_hand():
    """One vertex goes 3, 4, 0 further than it should, another stays as it should."""
    prediction, target = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    prediction[1, 0] = [3, 4, 0]
    assert metrics.motion_squared(prediction, target) == pytest.approx([25 / 2])
    assert metrics.motion(prediction, target) == pytest.approx([5 / 2])


def test_jitter_by_hand():
    """Second differences: 1 - 2 * 0 + 0 = 1 and 0 - 2 * 1 + 0 = -2; a straight line has none."""
    values = np.array([[0.0, 0.0], [0.0, 0.1], [1.0, 0.2], [0.0, 0.3]])
    assert metrics.jitter(values) == pytest.approx([1 / 2, 2 / 2])
    assert metrics.jitter(values[:2]).shape == (0,)
    corner = np.zeros((3, 1, 3))
    corner[2, 0] = [0, 3, 4]
    assert metrics.jitter(corner) == pytest.approx([5.0])


def test_a_jaw_rests_at_a_low_percentile():
    jaw = np.concatenate([np.full(10, 0.02), np.linspace(0.1, 0.9, 90)])
    assert metrics.rest(jaw) == pytest.approx(0.02)


def face(jaw, names=LIP32, **others):
    """A clip of the coefficients ``names``: JawOpen as given, the others still but for those named."""
    values = np.full((len(jaw), len(names)), 0.1)
    values[:, names.index("JawOpen")] = jaw
    for name, curve in others.items():
        values[:, names.index(name)] = curve
    return values


def test_pauses_are_where_the_jaw_rests_and_nothing_moves_for_long_enough():
    """At 30 fps 0.3 s are 9 frames: one run of 12, one of 8 (too short), one of 9."""
    jaw = np.array([0.02] * 12 + [0.4] * 5 + [0.02] * 8 + [0.4] * 5 + [0.02] * 9)
    found = metrics.pauses(face(jaw), LIP32, 30, 0.02)
    assert (found > 0).tolist() == [True] * 12 + [False] * 18 + [True] * 9
    assert len(set(found[found > 0])) == 2
    assert (metrics.pauses(face(jaw), LIP32, 60, 0.02) > 0).sum() == 0
    assert (metrics.pauses(face(jaw), LIP32, 25, 0.02) > 0).sum() == 12 + 8 + 9
    assert not metrics.pauses(face(jaw), LIP32, 30, 0.2).any()


def test_a_moving_mouth_is_no_pause_and_a_blink_is():
    jaw, waving = np.full(20, 0.02), 0.1 + 0.1 * (np.arange(20) % 2)
    assert metrics.pauses(face(jaw), LIP32, 30, 0.02).all()
    assert not metrics.pauses(face(jaw, MouthPucker=waving), LIP32, 30, 0.02).any()
    assert metrics.pauses(face(jaw, ARKIT52, EyeBlinkLeft=waving), ARKIT52, 30, 0.02).all()
    once = np.where(np.arange(20) < 10, 0.1, 0.3)  # 0.2 in a thirtieth of a second, in the middle
    assert len(set(metrics.pauses(face(jaw, MouthPucker=once), LIP32, 30, 0.02))) == 2
    slow = 0.1 + 0.01 * np.arange(20)  # 0.3 a second
    assert metrics.pauses(face(jaw, MouthPucker=slow), LIP32, 30, 0.02).all()


def test_jitter_within_pauses_leaves_out_what_reaches_across_their_ends():
    pause = np.array([1, 1, 1, 1, 0, 7, 7, 7, 8, 8])
    values = np.arange(10.0)[:, None] ** 2  # second difference 2 everywhere
    assert metrics.within(pause, values) == pytest.approx([2, 2, 2])
    spike = np.zeros((10, 1))
    spike[4] = 1.0
    assert metrics.within(pause, spike) == pytest.approx([0, 0, 0])


def test_clips_shorter_than_a_difference_have_no_pauses():
    for frames in (1, 2):
        assert metrics.pauses(face(np.full(frames, 0.02)), LIP32, 30, 0.02).tolist() == [0] * frames
        assert metrics.within(np.ones(frames), np.ones((frames, 3))).shape == (0,)
