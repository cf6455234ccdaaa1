"""Speech in, curves out: the frozen models, then the fitted heads, then a file an artist can open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmm import AlreadyThere, BadInput, NotFound
from pmm.store import clock
from pmm.store.rig import ARKIT52

if TYPE_CHECKING:
    from pmm.precompute.models import FrozenModels, ModelSet
    from pmm.store.catalog import Store
    from pmm.store.clip import Take
    from pmm.train.run import Run


CSV_FPS = (30, 60)
"""What a Live Link Face CSV can hold; curves at another rate are resampled to the greater."""


@dataclass(frozen=True)
class Curves:
    """Coefficients over time: names (K), values (T, K) float32 in [0, 1], frames per second."""

    names: tuple[str, ...]
    values: np.ndarray
    fps: int


@dataclass(frozen=True)
class Animated:
    """What ``animate_file`` wrote: T frames of curves, in ``out``."""

    out: Path
    frames: int
    fps: int
    seconds: float
    style: str
    models: str

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "frames": self.frames,
            "fps": self.fps,
            "seconds": round(self.seconds, 3),
            "style": self.style,
            "models": self.models,
        }


def animate_file(
    run_path: Path,
    audio: Path,
    out: Path,
    *,
    style: str = "mean",
    models: ModelSet | None = None,
    replaced: Mapping[str, Any] | None = None,
    device: str = "auto",
    picture: Path | None = None,
    captured: Path | None = None,
) -> Animated:
    """Animate one audio file with the heads of a run; writes a Live Link Face CSV, and a picture if asked.

    style     a training subject, or "mean": the average of their style embeddings
    models    the frozen models; None for those the run was fitted with, where they lay then
    replaced  fields of that ModelSet to replace: a checkpoint that has moved since, say
    captured  a Live Link Face CSV of the same speech, drawn beside the prediction

    Raises AlreadyThere if ``out`` or ``picture`` exists, and BadInput or NotFound for a run, audio,
    style or models that cannot be used. Nothing is written unless all of it can be.
    """
    from pmm.precompute import media
    from pmm.precompute.datasets import livelink
    from pmm.train.run import load_run

    _refuse_existing(out, picture)
    if picture is not None and picture.suffix.lower() != ".png":
        raise BadInput(f"{picture} is to be a picture, and pictures are written as .png; name it so")
    run = load_run(run_path, device)
    run.style_vector(style)
    clip = media.probe(audio)
    true = None if captured is None else _captured(captured, run.fps)
    frozen = _frozen_models(run, models, replaced or {}, device)
    wave = media.decode(audio, clip)
    frames = clock.frames(clip.samples, clip.rate, run.fps)
    curves = speak(run, features(frozen, wave, frames), style, frames)
    written = curves if curves.fps in CSV_FPS else resampled(curves, max(CSV_FPS))
    livelink.write(out, written.values, names=written.names, fps=written.fps)
    if picture is not None:
        from pmm.animate.picture import draw

        draw(picture, wave, curves, true, f"{audio.name}, style {style}, {frozen.label}")
    return Animated(out, len(written.values), written.fps, clip.seconds, style, frozen.label)


def animate_take(
    run_path: Path,
    store: Store,
    clip: str,
    out: Path,
    *,
    style: str = "mean",
    device: str = "auto",
) -> Animated:
    """Animate a take of ``store`` from its cached features, without any frozen model; writes a CSV.

    clip   the take: its source name, with or without the ending, or the beginning of its id or its clip's

    Raises as ``animate_file`` does, and NotFound for a take or features that are not in ``store``.
    """
    from pmm.precompute.datasets import livelink
    from pmm.train.run import load_run

    _refuse_existing(out)
    run = load_run(run_path, device)
    run.style_vector(style)
    take = _named_take(store, clip)
    native = _cached(run, store, take)
    frames = clock.frames(take.clip.samples, take.clip.rate, run.fps)
    curves = speak(run, native, style, frames)
    written = curves if curves.fps in CSV_FPS else resampled(curves, max(CSV_FPS))
    livelink.write(out, written.values, names=written.names, fps=written.fps)
    return Animated(out, len(written.values), written.fps, take.clip.seconds, style, "cached features")


def _named_take(store: Store, name: str) -> Take:
    takes = store.takes()
    exact = [take for take in takes if name in (take.source, str(Path(take.source).with_suffix("")))]
    begun = [t for t in takes if len(name) >= 8 and (t.id.startswith(name) or t.clip.id.startswith(name))]
    found = exact or begun
    if not found:
        raise NotFound(f"no take {name!r} in {store.where}; `pmm store ls {store.where}` names them")
    if len({take.clip.id for take in found}) > 1:
        named = ", ".join(take.id[:12] for take in found)
        raise BadInput(f"{name!r} names {len(found)} takes in {store.where}; choose one by its id: {named}")
    return found[0]


def _cached(run: Run, store: Store, take: Take) -> dict[str, np.ndarray]:
    """The native features of ``take`` that the heads of ``run`` read."""
    native = {}
    for name, spec in run.specs.items():
        if name == "target":
            continue
        if not store.has(spec.id, take.clip.id):
            raise NotFound(
                f"{take.source or take.id[:12]} has no {name} features {spec.id[:12]}, which the run in "
                f"{run.path} was fitted on, in {store.where}; precompute them, or animate its sound itself"
            )
        native[name] = store.read(spec.id, take.clip.id)
    return native


def resampled(curves: Curves, fps: int) -> Curves:
    """The same curves at another frame rate, by linear interpolation; the last value is held."""
    values = curves.values
    times = clock.frame_times(clock.frames(len(values), curves.fps, fps), fps)
    known = clock.frame_times(len(values), curves.fps)
    columns = [np.interp(times, known, column) for column in values.T]
    return Curves(curves.names, np.stack(columns, axis=1).astype(np.float32), fps)


def features(models: FrozenModels, wave: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """What the models say of a wave (n,) at 16 kHz: audio (S, D), text (S, V), image (T, 96, 96, 3).

    Or text and image in their smaller forms, as the models were asked for.
    """
    heard = models.speech([wave])[0]
    if isinstance(heard, Exception):
        raise heard
    return {"audio": heard.audio, "text": heard.text, "image": models.lips(wave, frames)}


def speak(run: Run, native: Mapping[str, np.ndarray], style: str, frames: int) -> Curves:
    """Curves of one clip from its native features (see ``features``), T = ``frames``."""
    from pmm.train.run import predict

    used = {name: values for name, values in native.items() if name in run.specs}
    return Curves(run.names, np.clip(predict(run, used, style, frames), 0, 1), run.fps)


def _refuse_existing(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and path.exists():
            raise AlreadyThere(f"{path} already exists and nothing is overwritten; choose another name")
        if path is not None and not path.parent.is_dir():
            raise BadInput(f"{path.parent} is no folder; make it first, or write {path.name} elsewhere")


def _captured(path: Path, fps: int) -> Curves:
    from pmm.precompute.datasets import livelink

    return Curves(ARKIT52, livelink.read_targets(path, fps).values, fps)


def _recorded_models(run: Run) -> ModelSet:
    """The models whose features ``run`` was fitted on, as its configuration names them."""
    from pmm.precompute.models import ModelSet

    made = [one for name in run.specs if name != "target" for one in run.config["made_with"].get(name, [])]
    try:
        return ModelSet(**next(one["models"] for one in made if "models" in one))
    except (StopIteration, TypeError):
        raise BadInput(
            f"the run in {run.path} does not say which models made its features; name them by --models"
        ) from None


def _frozen_models(
    run: Run, models: ModelSet | None, replaced: Mapping[str, Any], device: str
) -> FrozenModels:
    """The models ``run`` was fitted with; refused (BadInput) if their features are not the very same."""
    from pmm.precompute.models import load, options_of

    options = options_of(run.specs, run.fps, device)
    frozen = load(replace(models or _recorded_models(run), **replaced), options)
    for name, spec in run.specs.items():
        if name != "target" and frozen.specs[name].id != spec.id:
            raise BadInput(
                f"{frozen.label} makes {name} features {frozen.specs[name].id[:12]}, and the run in "
                f"{run.path} was fitted on {spec.id[:12]} (other weights, face or rate); name the models it "
                "was fitted with by --models, --lips and --face"
            )
    return frozen
