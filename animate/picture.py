"""One picture of a result: a few curves, predicted and true, over the waveform they were spoken with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pmm.animate.speak import Curves
from pmm.store import clock, rig

SHOWN = ("JawOpen", "MouthClose", "MouthFunnel", "MouthPucker")
_INK, _TRUE, _FIT = "#6b7280", "#111827", "#d9480f"


def draw(
    out: Path,
    wave: np.ndarray,
    predicted: Curves,
    true: Curves | None = None,
    title: str = "",
    names: Sequence[str] = SHOWN,
) -> None:
    """Write a PNG.

    wave  (n,) float32 at clock.SPEECH_RATE
    true  the captured curves of the same clip, or None; they may have another length or order of names
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.0 * (len(names) + 1)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names) + 1, 1, sharex=True)
    _waveform(panels[0], wave)
    panels[0].set_title(title, loc="left", fontsize=11)
    for axis, name in zip(panels[1:], names):
        if true is not None:
            _curve(axis, true, name, _TRUE, "true", 1.4)
        _curve(axis, predicted, name, _FIT, "predicted", 1.8)
        axis.set_ylabel(name[0].lower() + name[1:], fontsize=10)
        axis.set_ylim(-0.03, max(0.35, axis.get_ylim()[1]))
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    panels[1].legend(loc="upper right", ncols=2, frameon=False, fontsize=9)
    panels[-1].set_xlabel("seconds")
    panels[-1].set_xlim(0, clock.seconds(len(wave), clock.SPEECH_RATE))
    figure.savefig(out)


def _waveform(axis, wave: np.ndarray, bins: int = 2000) -> None:  # type: ignore[no-untyped-def]
    width = max(1, len(wave) // bins)
    blocks = wave[: len(wave) // width * width].reshape(-1, width)
    times = np.linspace(0, clock.seconds(len(wave), clock.SPEECH_RATE), len(blocks))
    axis.fill_between(times, blocks.min(1), blocks.max(1), color=_INK, linewidth=0)
    axis.set_yticks([])
    axis.set_ylabel("speech", fontsize=10)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _curve(axis, curves: Curves, name: str, colour: str, label: str, width: float) -> None:  # type: ignore[no-untyped-def]
    (column,) = rig.columns([name], curves.names, label)
    times = clock.frame_times(len(curves.values), curves.fps)
    axis.plot(times, curves.values[:, column], color=colour, linewidth=width, label=label)
