"""espeak phoneme names to mouth shapes: what the lips and the jaw aim at, and how firmly.

Peak amplitudes are set to the 99th percentiles seen in real captures: a synthesis, no measurement.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pmm.precompute.synth.voice import Phoneme

CHANNELS = (
    "jaw",
    "closure",
    "press",
    "roll_lower",
    "roll_upper",
    "shrug_upper",
    "lower_down",
    "upper_up",
    "stretch",
    "smile",
    "dimple",
    "funnel",
    "pucker",
)
"""What a shape sets. ``closure`` is how far the lips close over the open jaw, from 0 to 1."""

GROUPS = {
    "jaw": ("jaw",),
    "seal": ("closure", "press", "roll_lower", "roll_upper", "shrug_upper"),
    "open": ("lower_down", "upper_up"),
    "spread": ("stretch", "smile", "dimple"),
    "round": ("funnel", "pucker"),
}
"""Channels that one set of muscles moves: they share dominance and speed."""


@dataclass(frozen=True)
class Shape:
    """Targets by channel (0 where absent) and dominance by group (1 where absent).

    Low dominance yields to the neighbours: the tongue makes a ``t`` whatever the lips do. High
    dominance forces them: a ``p`` closes between the widest vowels.
    """

    targets: dict[str, float]
    dominance: dict[str, float]


def _shape(dominance: str, **targets: float) -> Shape:
    pairs = (item.split("=") for item in dominance.split())
    return Shape(targets, {group: float(value) for group, value in pairs})


_FREE = "jaw=.6 seal=.5 open=.6 spread=.35 round=.12"

SHAPES = {
    "pause": _shape("jaw=1.2 open=1.2", jaw=0.02, closure=0.4, press=0.02),
    "bilabial": _shape(
        "jaw=2.6 seal=7 open=4 spread=.4 round=.35",
        jaw=0.10,
        closure=1.0,
        press=0.12,
        roll_lower=0.12,
        roll_upper=0.09,
    ),
    "labiodental": _shape(
        "jaw=2.5 seal=6 open=3 spread=.4 round=.4", jaw=0.08, roll_lower=0.18, upper_up=0.22, shrug_upper=0.15
    ),
    "dental": _shape(_FREE, jaw=0.12, lower_down=0.25, upper_up=0.10),
    "alveolar": _shape(_FREE, jaw=0.10, lower_down=0.25, upper_up=0.15, stretch=0.08),
    "velar": _shape(_FREE, jaw=0.15, lower_down=0.20, upper_up=0.10),
    "sibilant": _shape(
        "jaw=2 seal=.7 open=1 spread=.6 round=.15",
        jaw=0.05,
        lower_down=0.35,
        upper_up=0.25,
        stretch=0.20,
        smile=0.12,
    ),
    "postalveolar": _shape(
        "jaw=1.6 seal=.7 spread=.8 round=1.2",
        jaw=0.10,
        funnel=0.45,
        pucker=0.20,
        lower_down=0.30,
        upper_up=0.25,
    ),
    "palatal": _shape("jaw=1.4 seal=.7 round=.4", jaw=0.06, stretch=0.20, smile=0.20, lower_down=0.25),
    "r": _shape("seal=.7 spread=.8", jaw=0.12, funnel=0.25, pucker=0.25),
    "a": _shape("jaw=1.3", jaw=0.55, lower_down=0.45, upper_up=0.25, stretch=0.10),
    "E": _shape("", jaw=0.30, lower_down=0.40, upper_up=0.20, smile=0.20, stretch=0.15),
    "schwa": _shape(
        "jaw=.5 seal=.5 open=.5 spread=.5 round=.4",
        jaw=0.30,
        lower_down=0.40,
        upper_up=0.20,
        smile=0.20,
        stretch=0.15,
    ),
    "I": _shape("", jaw=0.12, smile=0.35, stretch=0.20, lower_down=0.30, dimple=0.08),
    "O": _shape("spread=1.2 round=1.6", jaw=0.35, funnel=0.50, pucker=0.20),
    "U": _shape("spread=1.2 round=2", jaw=0.10, pucker=0.50, funnel=0.35),
    "Y": _shape("spread=1.2 round=2", jaw=0.08, pucker=0.55, funnel=0.25),
    # the buzzed vowel of Mandarin si, zhi, ri: teeth near, lips drawn a little
    "apical": _shape(
        "jaw=.8 open=.8 spread=.7 round=.5", jaw=0.08, lower_down=0.30, upper_up=0.18, stretch=0.12
    ),
}

_SYMBOLS = {
    "pause": "_ | !",
    "bilabial": "p b m ph",
    "labiodental": "f v",
    "dental": "T D",
    "alveolar": "t d n l L t# th",
    "velar": "k g N ng h X kh ?",
    "sibilant": "s z ts tsh",
    "postalveolar": "S Z tS dZ s. z. ts. ts.h",
    "palatal": "S; tS; tS;h",
    "r": "r 3",
    "a": "a A V 0 aa",
    "E": "E e &",
    "schwa": "@ a# o-",  # o- is the unrounded back vowel of Mandarin ge
    "I": "I i j",
    "O": "O o",
    "U": "U u w",
    "Y": "y",
    "apical": "i. i[",
    "": "' , % = : ; # - 2 4 5 6 7 8 9",  # stress, length and variants; no mouth of their own
}
_SHAPE_OF = {symbol: shape for shape, symbols in _SYMBOLS.items() for symbol in symbols.split()}
_SYMBOL = re.compile("|".join(re.escape(s) for s in sorted(_SHAPE_OF, key=len, reverse=True)))


def shapes_of(name: str) -> tuple[str, ...] | None:
    """Keys of SHAPES that an espeak phoneme goes through; None if the name is not understood.

    >>> shapes_of("'aU"), shapes_of("tS;h"), shapes_of("_:"), shapes_of("zz9!x")
    (('a', 'U'), ('palatal',), ('pause',), None)
    """
    symbols = _SYMBOL.findall(name)
    if "".join(symbols) != name:
        return None
    found = [shape for symbol in symbols if (shape := _SHAPE_OF[symbol])]
    return tuple(shape for i, shape in enumerate(found) if i == 0 or shape != found[i - 1])


@dataclass(frozen=True)
class Segment:
    """One mouth shape from ``start`` to ``end`` (seconds); ``stressed`` as espeak marks it."""

    shape: str
    start: float
    end: float
    stressed: bool = False

    @property
    def centre(self) -> float:
        return (self.start + self.end) / 2


def segments(phonemes: Iterable[Phoneme]) -> tuple[tuple[Segment, ...], tuple[str, ...]]:
    """(the mouth shapes in order, the names that were not understood).

    A phoneme of several shapes (a diphthong) is split into equal parts.
    """
    found: list[Segment] = []
    unknown: list[str] = []
    for phoneme in phonemes:
        shapes = shapes_of(phoneme.name)
        if shapes is None:
            unknown.append(phoneme.name)
            shapes = ()
        step = (phoneme.end - phoneme.start) / max(1, len(shapes))
        for number, shape in enumerate(shapes):
            start = phoneme.start + number * step
            found.append(Segment(shape, start, start + step, "'" in phoneme.name))
    return tuple(found), tuple(unknown)
