"""The 52 ARKit coefficients by name, the 32 of PMMTalk, and how names are matched.

ARKIT52 is in the order of Live Link Face's CSV (JawRight before JawLeft, MouthRight before
MouthLeft); other files use other orders, so everything maps by name, case-insensitively.
"""

from __future__ import annotations

from collections.abc import Sequence

from pmm import BadInput


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ARKIT52 = _names(
    """
    EyeBlinkLeft EyeLookDownLeft EyeLookInLeft EyeLookOutLeft EyeLookUpLeft EyeSquintLeft EyeWideLeft
    EyeBlinkRight EyeLookDownRight EyeLookInRight EyeLookOutRight EyeLookUpRight EyeSquintRight EyeWideRight
    JawForward JawRight JawLeft JawOpen
    MouthClose MouthFunnel MouthPucker MouthRight MouthLeft MouthSmileLeft MouthSmileRight
    MouthFrownLeft MouthFrownRight MouthDimpleLeft MouthDimpleRight MouthStretchLeft MouthStretchRight
    MouthRollLower MouthRollUpper MouthShrugLower MouthShrugUpper MouthPressLeft MouthPressRight
    MouthLowerDownLeft MouthLowerDownRight MouthUpperUpLeft MouthUpperUpRight
    BrowDownLeft BrowDownRight BrowInnerUp BrowOuterUpLeft BrowOuterUpRight
    CheekPuff CheekSquintLeft CheekSquintRight NoseSneerLeft NoseSneerRight TongueOut
    """
)

LIP32 = _names(
    """
    JawForward JawLeft JawRight JawOpen
    MouthClose MouthFunnel MouthPucker MouthLeft MouthRight MouthSmileLeft MouthSmileRight
    MouthFrownLeft MouthFrownRight MouthDimpleLeft MouthDimpleRight MouthStretchLeft MouthStretchRight
    MouthRollLower MouthRollUpper MouthShrugLower MouthShrugUpper MouthPressLeft MouthPressRight
    MouthLowerDownLeft MouthLowerDownRight MouthUpperUpLeft MouthUpperUpRight
    CheekPuff CheekSquintLeft CheekSquintRight NoseSneerLeft NoseSneerRight
    """
)
"""Jaw 4, mouth 23, cheek 3, nose 2: the coefficients PMMTalk predicts."""

RIGS: dict[str, tuple[str, ...]] = {"lip32": LIP32, "arkit52": ARKIT52}


def columns(wanted: Sequence[str], present: Sequence[str], where: str) -> list[int]:
    """Positions in ``present`` of every name in ``wanted``, matched case-insensitively.

    Raises BadInput that names ``where`` and the missing names, or the names that stand twice.
    """
    index: dict[str, int] = {}
    for position, name in enumerate(present):
        if index.setdefault(name.casefold(), position) != position:
            raise BadInput(f"{where}: coefficient {name!r} stands twice; each name must stand once")
    missing = [name for name in wanted if name.casefold() not in index]
    if missing:
        raise BadInput(
            f"{where}: {len(missing)} of {len(wanted)} coefficients are missing ({', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}); it needs one column for each"
        )
    return [index[name.casefold()] for name in wanted]
