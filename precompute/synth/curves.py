"""Mouth shapes to ARKit curves: dominance blending (Cohen and Massaro, 1993), and a living face.

For each channel the value at time t is the mean of the targets of all segments, weighted by their
dominance::

    F(t) = sum_s D_s(t) T_s / sum_s D_s(t),    D_s(t) = alpha_s exp(-theta |t - c_s|)

where |t - c_s| counts from the edge of a short plateau about the centre c_s of segment s. Lips
lead the sound, rounding is anticipated further ahead than it is held, and the lips of bilabials
meet: ``mouthClose`` follows ``jawOpen`` (ARKit's mouthClose shuts the lips over an open jaw).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmm.precompute.synth.phonemes import CHANNELS, GROUPS, SHAPES, Segment
from pmm.store import clock
from pmm.store.rig import ARKIT52

LEAD_SECONDS = 0.1
"""How far the lips are ahead of the sound they make."""

MAX_CLOSE_OVER_JAW = 0.03
"""``mouthClose <= jawOpen + 0.03`` in 99 % of real frames; here, in all."""

_PLATEAU = 0.2  # of a segment, on either side of its centre
_SPEED = {  # theta, 1/s: (before the centre, after it)
    "jaw": (17.0, 17.0),
    "seal": (34.0, 38.0),
    "open": (20.0, 22.0),
    "spread": (15.0, 17.0),
    "round": (11.0, 18.0),
}
_CONTRAST = {  # F -> gain * F ** power
    "jaw": (1.95, 1.5),
    "lower_down": (3.3, 1.4),
    "upper_up": (4.2, 1.3),
    "smile": (2.1, 1.1),
    "funnel": (1.75, 1.4),
    "pucker": (1.05, 1.4),
}
"""A weighted mean draws peaks and valleys together; this parts them again, channel by channel, until
the corpus has the spread of real speech (percentiles 50, 90 and 99)."""

_USUAL_SECONDS = 0.09  # of one mouth shape


@dataclass(frozen=True)
class Face:
    """What one speaker's face does with the same sounds.

    gain       factor on every mouth movement
    jaw_gain   factor on the jaw besides
    smile      added to both smile coefficients
    asymmetry  -1..1 by pair: left is scaled by 1 + a, right by 1 - a
    liveliness factor on brows, blinks and head
    noise      standard deviation of the capture noise
    """

    gain: float = 1.0
    jaw_gain: float = 1.0
    smile: float = 0.0
    asymmetry: float = 0.0
    liveliness: float = 1.0
    noise: float = 0.004


@dataclass(frozen=True)
class Motion:
    """coefficients (N, 52) float64 in [0, 1], ARKIT52 order; rotations (N, 9) radians."""

    coefficients: np.ndarray
    rotations: np.ndarray


def animate(segments: Sequence[Segment], times: np.ndarray, face: Face, rng: np.random.Generator) -> Motion:
    """The face at ``times`` (N,) seconds while ``segments`` are spoken: the same for the same rng state."""
    emphasis = _emphasis(segments, rng)
    mouth = blend(segments, times + LEAD_SECONDS, emphasis)
    curves = _mouth_curves(mouth, face, times, rng)
    curves |= _upper_face(mouth, face, times, rng)
    values = np.zeros((len(times), len(ARKIT52)))
    for column, name in enumerate(ARKIT52):
        if name in curves:
            values[:, column] = curves[name] + face.noise * _hum(times, 9.0, rng) * (curves[name] > 0)
    values = np.clip(values, 0, 1)
    jaw, close = ARKIT52.index("JawOpen"), ARKIT52.index("MouthClose")
    values[:, close] = np.minimum(values[:, close], values[:, jaw] + MAX_CLOSE_OVER_JAW)
    return Motion(values, _rotations(times, face, rng))


def _emphasis(segments: Sequence[Segment], rng: np.random.Generator) -> np.ndarray:
    """(segments,) factors on the size of each movement: stressed and long sounds are made larger."""
    stressed = np.array([segment.stressed for segment in segments])
    length = np.array([segment.end - segment.start for segment in segments])
    held = np.clip(length / _USUAL_SECONDS, 0.4, 2.5) ** 0.35
    return np.where(stressed, 1.15, 0.7) * held * np.exp(rng.normal(0, 0.1, len(segments)))


def blend(segments: Sequence[Segment], times: np.ndarray, emphasis: np.ndarray) -> dict[str, np.ndarray]:
    """Every channel at ``times`` by dominance: {channel: (N,)}; targets scaled by ``emphasis``.

    Closure is not scaled: lips meet in soft speech too.
    """
    centres = np.array([segment.centre for segment in segments])
    plateaus = np.array([_PLATEAU * (segment.end - segment.start) for segment in segments])
    since = times[:, None] - centres
    away = np.maximum(0, np.abs(since) - plateaus)
    found = {}
    for group, channels in GROUPS.items():
        before, after = _SPEED[group]
        alpha = np.array([SHAPES[segment.shape].dominance.get(group, 1.0) for segment in segments])
        weights = alpha * np.exp(-np.where(since < 0, before, after) * away)
        weights /= weights.sum(axis=1, keepdims=True)
        for channel in channels:
            targets = np.array([SHAPES[segment.shape].targets.get(channel, 0.0) for segment in segments])
            found[channel] = weights @ (targets if channel == "closure" else targets * emphasis)
    return {channel: _smooth(found[channel], times) for channel in CHANNELS}


def _mouth_curves(
    mouth: dict[str, np.ndarray], face: Face, times: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """ARKit coefficients of jaw, mouth, cheeks and nose: {name: (N,)}."""
    size = {channel: _size(channel, face.gain * curve) for channel, curve in mouth.items()}
    jaw = _size("jaw", face.gain * face.jaw_gain * mouth["jaw"])
    closure = np.clip(mouth["closure"] / 0.8, 0, 1) ** 2
    smile = size["smile"] + face.smile * (1 + 0.3 * _hum(times, 0.4, rng))
    sway = 0.03 * _hum(times, 0.5, rng) + 0.02 * face.asymmetry
    curves = {
        "JawForward": 0.03 + 0.12 * size["funnel"],
        "JawRight": np.maximum(0, sway),
        "JawLeft": np.maximum(0, -sway),
        "JawOpen": jaw,
        "MouthClose": 0.015 + closure * jaw,
        "MouthFunnel": 0.02 + size["funnel"],
        "MouthPucker": 0.02 + size["pucker"],
        "MouthRight": np.maximum(0, 0.8 * sway),
        "MouthLeft": np.maximum(0, -0.8 * sway),
        "MouthRollLower": 0.01 + size["roll_lower"],
        "MouthRollUpper": 0.01 + size["roll_upper"],
        "MouthShrugLower": 0.05 + 0.8 * size["press"] + 0.15 * size["pucker"],
        "MouthShrugUpper": 0.03 + size["shrug_upper"] + 0.3 * size["press"],
        "CheekPuff": 0.01 + 0.5 * size["press"],
    }
    pairs = {
        "MouthSmile": smile,
        "MouthFrown": 0.02 + 0.15 * size["lower_down"],
        "MouthDimple": 0.02 + size["dimple"] + 0.2 * smile,
        "MouthStretch": 0.02 + size["stretch"],
        "MouthPress": 0.01 + size["press"],
        "MouthLowerDown": size["lower_down"] + 0.02,
        "MouthUpperUp": size["upper_up"] + 0.02,
        "CheekSquint": 0.03 + 0.25 * smile,
        "NoseSneer": 0.05 + 0.25 * size["upper_up"],
    }
    for name, curve in pairs.items():
        lean = 0.12 * face.asymmetry * (1 + 0.2 * _hum(times, 0.7, rng))
        curves[f"{name}Left"], curves[f"{name}Right"] = curve * (1 + lean), curve * (1 - lean)
    return curves


def _upper_face(
    mouth: dict[str, np.ndarray], face: Face, times: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Blinks, gaze and brows: {name: (N,)}. Brows rise a little where the speech is emphatic."""
    lids = np.maximum(_blinks(times, face, rng), 0.06 + 0.02 * _hum(times, 0.3, rng))
    side, up = 0.12 * _hum(times, 0.6, rng), 0.10 * _hum(times, 0.5, rng) - 0.08
    brow = face.liveliness * (0.06 + 0.05 * _hum(times, 0.5, rng) + 0.25 * _smooth(mouth["jaw"], times, 0.15))
    frown = face.liveliness * (0.04 + 0.03 * _hum(times, 0.3, rng))
    curves = {"BrowInnerUp": np.maximum(0, brow)}
    for eye, inward in (("Left", -1), ("Right", 1)):
        curves |= {
            f"EyeBlink{eye}": lids,
            f"EyeLookIn{eye}": np.maximum(0, inward * side),
            f"EyeLookOut{eye}": np.maximum(0, -inward * side),
            f"EyeLookUp{eye}": np.maximum(0, up),
            f"EyeLookDown{eye}": np.maximum(0, -up) + 0.3 * lids,
            f"EyeSquint{eye}": 0.05 + 0.1 * lids,
            f"EyeWide{eye}": np.maximum(0, 0.4 * brow - 0.2 * lids),
            f"BrowDown{eye}": np.maximum(0, frown),
            f"BrowOuterUp{eye}": np.maximum(0, 0.6 * brow),
        }
    return curves


def _blinks(times: np.ndarray, face: Face, rng: np.random.Generator) -> np.ndarray:
    """(N,): a quarter of a second each, some three seconds apart."""
    lids = np.zeros(len(times))
    at = times[0] + rng.uniform(0.2, 3.0)
    while at < times[-1]:
        phase = (times - at) / np.where(times < at, 0.045, 0.09)
        lids = np.maximum(lids, rng.uniform(0.75, 0.95) * np.exp(-0.5 * phase**2))
        at += 0.6 + rng.exponential(2.6 / max(0.2, face.liveliness))
    return lids


def _rotations(times: np.ndarray, face: Face, rng: np.random.Generator) -> np.ndarray:
    """(N, 9) radians: head yaw, pitch, roll; the eyes' follow their gaze a little."""
    head = [face.liveliness * size * _hum(times, 0.5, rng) for size in (0.05, 0.04, 0.02)]
    eyes = [size * _hum(times, 0.6, rng) for size in (0.05, 0.03)]
    still = np.zeros(len(times))
    return np.stack([*head, *eyes, still, *eyes, still], axis=1)


def _hum(times: np.ndarray, hz: float, rng: np.random.Generator) -> np.ndarray:
    """(N,) smooth noise of unit variance with periods down to about 1 / ``hz`` seconds."""
    passed = clock.half_periods(times, hz)
    knots = 4 + int(passed[-1])
    values = rng.normal(0, 1.2, knots)
    position = np.clip(passed, 0, knots - 4) + 1
    below = np.minimum(position.astype(np.int64), knots - 3)
    x = position - below
    a, b, c, d = (values[below + offset] for offset in (-1, 0, 1, 2))
    # cubic through the knots (Catmull-Rom)
    return b + 0.5 * x * (c - a + x * (2 * a - 5 * b + 4 * c - d + x * (3 * (b - c) + d - a)))


def _smooth(curve: np.ndarray, times: np.ndarray, sigma: float = 0.012) -> np.ndarray:
    """Gaussian of ``sigma`` seconds over evenly spaced rows; rounds off the cusps of the exponentials."""
    step = clock.spacing(times)
    reach = max(1, int(3 * sigma / step))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / sigma) ** 2)
    return np.convolve(np.pad(curve, reach, mode="edge"), kernel / kernel.sum(), mode="valid")


def _size(channel: str, curve: np.ndarray) -> np.ndarray:
    """_CONTRAST, then linear below half, and bent above so that it never reaches 1."""
    gain, power = _CONTRAST.get(channel, (1.0, 1.0))
    size = gain * np.maximum(curve, 0) ** power
    over = np.maximum(size - 0.5, 0) / 0.5
    return np.minimum(size, 0.5) + 0.5 * over / (1 + over)
