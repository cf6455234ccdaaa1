"""The still reference face: the user's picture, or one drawn here.

A face is (96, 96, 3) uint8 RGB, cropped as Wav2Lip's training faces are: forehead to chin, the
mouth in the lower half.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pmm import BadInput, NotFound
from pmm.store.digest import digest

SIZE = 96
_SMALLEST, _LARGEST = 64, 16_384

Colour = tuple[int, int, int]


def face_digest(face: np.ndarray) -> str:
    """The name of a face: its decoded 96x96 pixels, whatever file they came in."""
    return digest("face", {"shape": list(face.shape), "colour": "rgb"}, np.ascontiguousarray(face).tobytes())


def read_face(path: Path) -> np.ndarray:
    """A picture as a face: upright, centre-cropped to a square, Lanczos to (96, 96, 3) uint8 RGB.

    Raises NotFound, or BadInput when the file is no picture or its sides are not 64 to 16384 pixels.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise NotFound(f"no face picture at {path}; give an image of one face, or `builtin`")
    try:
        with Image.open(path) as picture:
            if not all(_SMALLEST <= side <= _LARGEST for side in picture.size):
                size = "x".join(map(str, picture.size))
                raise BadInput(f"{path} is {size} pixels, expected sides of {_SMALLEST} to {_LARGEST}")
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} is no picture that can be read (PNG or JPEG, say)") from None
    return np.asarray(ImageOps.fit(upright, (SIZE, SIZE), method=Image.Resampling.LANCZOS), np.uint8)


# --- the drawn face ---------------------------------------------------------------------------------------

_SCALE = 8  # drawn at 8 x 8 samples a pixel, then averaged: smooth edges without a drawing library


def drawn_face() -> np.ndarray:
    """A friendly front face (96, 96, 3) uint8 RGB, made by arithmetic alone: the same on every machine."""
    canvas = _Canvas((203, 214, 222))
    _head(canvas)
    for side in (-1, 1):
        _eye(canvas, side)
    _nose(canvas)
    _mouth(canvas)
    return canvas.pixels()


class _Canvas:
    """Coordinates in units of half the picture: x to the right, y down, both -1..1."""

    def __init__(self, background: Colour):
        count = SIZE * _SCALE
        axis = (2 * np.arange(count) + 1 - count) / count
        self.x, self.y = axis[None, :], axis[:, None]
        self.image = np.empty((count, count, 3))
        self.image[:] = background

    def paint(self, inside: np.ndarray, colour: Colour, strength: float = 1.0) -> None:
        under = self.image[inside]
        self.image[inside] = under + strength * (np.array(colour) - under)

    def ellipse(self, x: float, y: float, width: float, height: float, power: int = 2) -> np.ndarray:
        """Inside a (super-)ellipse with these half sizes."""
        u, v = np.abs(self.x - x) / width, np.abs(self.y - y) / height
        u2, v2 = u * u, v * v
        inside: np.ndarray = (u2 + v2 if power == 2 else u2 * u + v2 * v) <= 1
        return inside

    def arc(self, x: float, y: float, width: float, bend: float, thickness: float) -> np.ndarray:
        """Within a stroke along a parabola that sinks by ``bend`` at its ends, tapering towards them."""
        u = (self.x - x) / width
        middle = y + bend * u * u
        half = thickness * np.maximum(0, 1 - u * u * u * u)
        inside: np.ndarray = np.abs(self.y - middle) < half
        return inside

    def pixels(self) -> np.ndarray:
        blocks = self.image.reshape(SIZE, _SCALE, SIZE, _SCALE, 3)
        return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


_SKIN, _SHADE, _HAIR = (226, 178, 148), (205, 150, 122), (74, 52, 40)
_LIP, _LIP_DARK, _WHITE = (190, 92, 92), (120, 46, 52), (246, 244, 240)


def _head(canvas: _Canvas) -> None:
    canvas.paint(canvas.ellipse(0, -0.22, 0.9, 0.86, power=3), _HAIR)
    canvas.paint(canvas.ellipse(0, 1.05, 0.42, 0.45), _SHADE)  # neck
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.82, 0.02, 0.11, 0.2), _SHADE)  # ears
    canvas.paint(canvas.ellipse(0, 0.0, 0.78, 0.96, power=3), _SKIN)
    canvas.paint(canvas.ellipse(0, -0.84, 0.62, 0.25), _HAIR)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.45, 0.3, 0.19, 0.14), (226, 150, 130), 0.35)  # cheeks


def _eye(canvas: _Canvas, side: int) -> None:
    x, y = side * 0.34, -0.2
    canvas.paint(canvas.ellipse(x, y, 0.16, 0.085), _WHITE)
    canvas.paint(canvas.ellipse(x, y, 0.078, 0.082), (86, 112, 96))
    canvas.paint(canvas.ellipse(x, y, 0.04, 0.042), (26, 22, 22))
    canvas.paint(canvas.ellipse(x + 0.025, y - 0.03, 0.016, 0.016), (255, 255, 255))
    canvas.paint(canvas.arc(x, y - 0.09, 0.18, 0.07, 0.022), (92, 58, 46))  # lid
    canvas.paint(canvas.arc(x, y - 0.26, 0.22, 0.06, 0.036), _HAIR)  # brow


def _nose(canvas: _Canvas) -> None:
    canvas.paint(canvas.ellipse(0, 0.17, 0.12, 0.085), _SHADE, 0.7)
    canvas.paint(canvas.ellipse(0, 0.12, 0.075, 0.08), _SKIN)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.055, 0.21, 0.026, 0.018), (150, 92, 76))


def _mouth(canvas: _Canvas) -> None:
    canvas.paint(canvas.arc(0, 0.5, 0.32, -0.03, 0.06), _LIP)  # upper lip
    canvas.paint(canvas.arc(0, 0.575, 0.3, -0.06, 0.085), _LIP)  # lower lip
    canvas.paint(canvas.arc(0, 0.535, 0.31, -0.035, 0.016), _LIP_DARK)  # where they meet
    canvas.paint(canvas.ellipse(0, 0.605, 0.1, 0.018), (222, 140, 136), 0.7)
    canvas.paint(canvas.arc(0, 0.74, 0.14, 0.02, 0.014), _SHADE, 0.6)  # chin
