"""From the feature store to batches: every clip on the frame clock, one ragged flat tensor a modality.

Axes: B clips, T frames of the longest, F frames of all clips one after another, S native steps, D
features, V vocabulary, K coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pmm import BadInput, NotFound
from pmm.store import clock
from pmm.store.cache import Fetched
from pmm.store.clip import Take
from pmm.store.feature import MODALITIES, FeatureSpec
from pmm.store.rig import columns
from pmm.store.snapshots import Readable
from pmm.train.heads import valid_frames

DISAGREEMENT_SECONDS = 0.1
"""Features and target of one clip may differ in length by this much; the longer is cropped."""

POOL_BATCHES = 8
_SLICE = 4096  # frames; statistics of the images go over them in slices


# --- which features --------------------------------------------------------------------------------


def choose_specs(
    store: Readable, fps: int, wanted: Mapping[str, str] | None = None, modalities: Sequence[str] = MODALITIES
) -> dict[str, FeatureSpec]:
    """One feature spec for each of ``modalities``, of those the store holds rows of.

    ``wanted`` names a spec by modality, by its id or the beginning of it. Where specs differ in fps,
    ``fps`` decides. Raises NotFound for a modality that the store lacks, BadInput where several fit.
    """
    unknown = set(wanted or {}) - set(MODALITIES)
    if unknown:
        raise BadInput(f"features {min(unknown)}=...: a modality is one of {', '.join(MODALITIES)}")
    made_by = _labels(store)
    return {name: _choose(store, name, fps, (wanted or {}).get(name, ""), made_by) for name in modalities}


def _choose(store: Readable, modality: str, fps: int, wanted: str, made_by: Mapping[str, str]) -> FeatureSpec:
    present = [store.specs[name] for name in made_by if store.specs[name].modality == modality]
    present.sort(key=lambda spec: (spec.fps or 0, spec.id))
    if not present and (lost := {one.spec_id for one in store.fragments()} - set(store.specs)):
        raise NotFound(
            f"the store at {store.where} holds no {modality} features that can be told apart: "
            f"specs/{min(lost)}.json, which describes some, is lost or damaged; run "
            f"`pmm store verify --repair`, or `pmm precompute DATASET --store {store.where}` writes it again"
        )
    if not present:
        raise NotFound(
            f"the store at {store.where} holds no {modality} features; "
            f"`pmm precompute DATASET --store {store.where}` makes them"
        )
    fitting = [spec for spec in present if spec.fps in (None, fps) and spec.id.startswith(wanted)]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(
        f"{spec.id[:12]} ({made_by[spec.id]}{f', {spec.fps} fps' if spec.fps else ''})"
        for spec in (fitting or present)
    )
    if not fitting:
        asked = f"{modality}={wanted} at {fps} fps" if wanted else f"{modality} features at {fps} fps"
        raise NotFound(
            f"the store at {store.where} holds no {asked}, only {listed}; choose by --fps or --features"
        )
    raise BadInput(
        f"the store at {store.where} holds {len(fitting)} kinds of {modality} features: {listed}; "
        f"choose one with --features {modality}={fitting[0].id[:12]}"
    )


def _labels(store: Readable) -> dict[str, str]:
    """What made the rows of each spec that has any: spec id to a name for people.

    Rows whose spec is lost or damaged are passed over: nothing says what they are.
    """
    labels: dict[str, dict[str, None]] = {}
    for fragment in store.fragments():
        if fragment.spec_id not in store.specs:
            continue
        name = str(fragment.made_with.get("label") or store.specs[fragment.spec_id].algorithm)
        labels.setdefault(fragment.spec_id, {})[name] = None
    return {spec_id: " or ".join(names) for spec_id, names in labels.items()}


def listed_takes(store: Readable) -> list[Take]:
    """Every take the store serves, under every dataset label it is listed by.

    ``Store.takes`` keeps one label of each; who is who (``protocols.identities``) needs them all.
    """
    return store.listed_takes()


# --- clips on the frame clock ----------------------------------------------------------------------


def row_size(spec: FeatureSpec) -> int:
    """D or V of one row as the heads read it: of top-k logits all V, of lip frames their rows."""
    if spec.modality == "text" and len(spec.shape) == 2:
        return int(spec.settings["vocabulary_size"])
    return spec.shape[0]


def expanded(largest: np.ndarray, size: int) -> np.ndarray:
    """Top-k logits (S, 2, k + 1) to all of them (S, V): (S, size) float32.

    Row 0 holds values, row 1 their columns; the last value is the mean of those that are not named, and
    stands for each of them. Raises BadInput for columns beyond V: rows of another vocabulary.
    """
    values, columns = largest[:, 0], largest[:, 1, :-1].astype(np.int64)
    if columns.size and (columns.min() < 0 or columns.max() >= size):
        raise BadInput(f"top-k logits name column {columns.max()} of a vocabulary of {size}")
    full = np.repeat(values[:, -1:].astype(np.float32), size, axis=1)
    np.put_along_axis(full, columns, values[:, :-1], axis=1)
    return full


def on_frames(
    native: np.ndarray, frames: int, fps: int, first_frame: int = 0, size: int | None = None
) -> Tensor:
    """Native steps (S, D) to normalised features of ``frames`` frames from ``first_frame``: (frames, D).

    Top-k logits (S, 2, k + 1) of a vocabulary of ``size`` count as all V of them (see ``expanded``).
    In fp32: LayerNorm without parameters per native step, then linear interpolation at positions of
    the whole clip (``clock.step_positions``), so that a window reads what the clip reads.
    """
    position = clock.step_positions(frames, len(native), fps, first_frame)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, len(native) - 1)
    start, stop = int(low[0]), int(high[-1]) + 1
    read = np.array(native[start:stop], dtype=np.float32)
    steps = torch.from_numpy(read if native.ndim == 2 else expanded(read, size or 0))
    steps = F.layer_norm(steps, steps.shape[1:])
    between = torch.from_numpy((position - low).astype(np.float32))[:, None]
    return torch.lerp(steps[low - start], steps[high - start], between)


@dataclass(frozen=True)
class Skipped:
    """A take that is not used, and why, for people to read."""

    take: str
    source: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """Clips one after another on the frame clock.

    offsets   (N + 1,) int64: clip n is frames [offsets[n], offsets[n + 1]) of every tensor
    features  audio (F, D) and text (F, V) float32, normalised; image (F, rows, 96, 3) uint8, or
              latents (F, D) float32
    target    (F, K) float32
    subjects  the identity of each clip
    """

    takes: tuple[Take, ...]
    subjects: tuple[str, ...]
    offsets: Tensor
    features: Mapping[str, Tensor]
    target: Tensor
    skipped: tuple[Skipped, ...] = ()

    @property
    def lengths(self) -> Tensor:
        """(N,) frames of each clip."""
        return self.offsets.diff()

    @property
    def frames(self) -> int:
        return len(self.target)

    def to(self, device: torch.device) -> Corpus:
        features = {name: x.to(device) for name, x in self.features.items()}
        return replace(
            self, features=features, target=self.target.to(device), offsets=self.offsets.to(device)
        )


def fetch(
    store: Readable,
    specs: Mapping[str, FeatureSpec],
    takes: Iterable[Take],
    on_event: Callable[[Fetched], None] | None = None,
) -> None:
    """Brings the features of ``takes`` to the local cache, where the store lies in a bucket.

    Raises BadInput, before anything is fetched, where the cache is too small for them.
    """
    store.fetch(rows(store, specs, takes), on_event)


def rows(store: Readable, specs: Mapping[str, FeatureSpec], takes: Iterable[Take]) -> list[tuple[str, str]]:
    """Those rows, (spec id, row id), of ``takes`` that are there, each once."""
    found = ((spec.id, spec.row_id(take.clip.id, take.target)) for take in takes for spec in specs.values())
    return [row for row in dict.fromkeys(found) if store.has(*row)]


def frames_of(
    store: Readable, specs: Mapping[str, FeatureSpec], people: Mapping[str, Sequence[Take]], fps: int
) -> int:
    """F: the frames that ``load`` would load of these takes; nothing is read but lengths."""
    found = (_length(store, specs, take, fps) for takes in people.values() for take in takes)
    return sum(one for one in found if isinstance(one, int))


def load(
    store: Readable,
    specs: Mapping[str, FeatureSpec],
    people: Mapping[str, Sequence[Take]],
    names: Sequence[str],
    fps: int,
    image_rows: tuple[int, int] | None = None,
) -> Corpus:
    """The takes of ``people`` (identity to takes) with the features of ``specs``, on the frame clock.

    ``names`` are the coefficients wanted, ``image_rows`` the rows of each lip frame that are kept
    (None: all).
    T of a clip is the least of its audio's, its target's and its image's frames. A take without a
    row of some modality, or whose rows disagree by over 100 ms, is skipped and stands in
    ``skipped``. Raises BadInput for values that are not finite, and when nothing is left.
    """
    performed = [(who, take) for who, takes in people.items() for take in takes]
    lengths, kept, skipped = [], [], []
    for who, take in performed:
        found = _length(store, specs, take, fps)
        if isinstance(found, int):
            kept.append((who, take))
            lengths.append(found)
        else:
            skipped.append(Skipped(take.id, take.source or take.clip.id, found))
    if not kept:
        why = f"; the first: {skipped[0].source}: {skipped[0].reason}" if skipped else ""
        raise BadInput(f"none of {len(performed)} takes in {store.where} can be used{why}")
    takes = [take for _, take in kept]
    fetch(store, specs, takes)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    features = {
        name: _flat(store, spec, takes, offsets, fps, image_rows)
        for name, spec in specs.items()
        if name != "target"
    }
    target = _targets(store, specs["target"], takes, offsets, names)
    return Corpus(tuple(takes), tuple(who for who, _ in kept), offsets, features, target, tuple(skipped))


def _length(store: Readable, specs: Mapping[str, FeatureSpec], take: Take, fps: int) -> int | str:
    """Frames of a take, or why it cannot be used."""
    frames = {"clip": clock.frames(take.clip.samples, take.clip.rate, fps)}
    for name, spec in specs.items():
        row = spec.row_id(take.clip.id, take.target)
        if not store.has(spec.id, row):
            return f"no {name} features in the store"
        count = store.length(spec.id, row)
        if not count:
            return f"{name} features of no length"
        frames[name] = _frames_of_steps(count, fps) if spec.fps is None else count
    shortest, longest = min(frames, key=frames.__getitem__), max(frames, key=frames.__getitem__)
    if clock.seconds(frames[longest] - frames[shortest], fps) > DISAGREEMENT_SECONDS:
        return (
            f"{longest} has {frames[longest]} frames, {shortest} {frames[shortest]}, more than 100 ms apart"
        )
    # Audio and text hold any number of frames: the clock clips positions to the last step.
    exact = [count for name, count in frames.items() if name == "clip" or specs[name].fps is not None]
    return min(exact) or "shorter than one frame"


def _frames_of_steps(steps: int, fps: int) -> int:
    return clock.frames(clock.step_span(0, steps)[1], clock.SPEECH_RATE, fps)


def _flat(
    store: Readable,
    spec: FeatureSpec,
    takes: Sequence[Take],
    offsets: Tensor,
    fps: int,
    image_rows: tuple[int, int] | None,
) -> Tensor:
    """One modality of all takes: (F, D) float32, or (F, rows, 96, 3) uint8."""
    pictures = len(spec.shape) == 3
    rows = slice(*image_rows) if pictures and image_rows else slice(None)
    shape = (len(range(spec.shape[0])[rows]), *spec.shape[1:]) if pictures else (row_size(spec),)
    flat = torch.empty(int(offsets[-1]), *shape, dtype=torch.uint8 if pictures else torch.float32)
    for take, start, stop in zip(takes, offsets.tolist(), offsets[1:].tolist()):
        native = store.read(spec.id, take.clip.id)
        if spec.fps is None:
            flat[start:stop] = on_frames(native, stop - start, fps, size=row_size(spec))
        else:
            flat.numpy()[start:stop] = native[: stop - start, rows]
        if not pictures:
            _refuse_nan(flat[start:stop], spec.modality, take)
    return flat


def _targets(
    store: Readable, spec: FeatureSpec, takes: Sequence[Take], offsets: Tensor, names: Sequence[str]
) -> Tensor:
    """(F, K) float32, the coefficients ``names`` in their order."""
    wanted = columns(names, spec.settings["names"], f"target features {spec.id[:12]}")
    flat = torch.empty(int(offsets[-1]), len(names))
    for take, start, stop in zip(takes, offsets.tolist(), offsets[1:].tolist()):
        native = store.read(spec.id, spec.row_id(take.clip.id, take.target))
        flat.numpy()[start:stop] = native[: stop - start, wanted]
        _refuse_nan(flat[start:stop], "target", take)
    return flat


def _refuse_nan(x: Tensor, modality: str, take: Take) -> None:
    if not torch.isfinite(x).all():
        frame = int((~torch.isfinite(x)).any(-1).nonzero()[0])
        raise BadInput(
            f"{take.source or take.clip.id}: the {modality} features hold NaN or infinity at frame {frame}; "
            f"take this take ({take.id[:12]}) out of the data, or compute it again"
        )


# --- batches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """B clips side by side, padded to the longest.

    clips     (B,) their numbers in the corpus
    features  (B, T, ...) by modality; target (B, T, K); valid (B, T)
    """

    clips: Tensor
    features: Mapping[str, Tensor]
    target: Tensor
    valid: Tensor


def batch_plan(lengths: Tensor, indices: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffled clip numbers in batches of like lengths.

    Clips are shuffled, every POOL_BATCHES batches' worth of them is sorted by length and cut into
    batches, and the batches are shuffled: little padding, every order possible between pools.
    """
    order = indices[torch.randperm(len(indices), generator=generator)]
    pools = order.split(POOL_BATCHES * batch_size)
    batches = [part for pool in pools for part in pool[lengths[pool].argsort(stable=True)].split(batch_size)]
    return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass(frozen=True)
class Spans:
    """What is read of each clip: ``length`` (N,) frames of the flat tensors from ``start`` (N,)."""

    start: Tensor
    length: Tensor


def whole(corpus: Corpus) -> Spans:
    """Every clip from end to end."""
    return Spans(corpus.offsets[:-1], corpus.lengths)


def windows(corpus: Corpus, longest: int, period: int, generator: torch.Generator) -> Spans:
    """One window of at most ``longest`` frames of each clip; a clip that is no longer is read whole.

    A window starts at a random multiple of ``period`` within its clip, so that its frames have the
    positions they have in the clip, and late enough at the most to reach the clip's end.
    """
    lengths = corpus.lengths.cpu()
    starts = (lengths - longest).clamp(min=0).add(period - 1) // period + 1
    draw = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    first = (draw * starts).long() * period
    length = (lengths - first).clamp(max=longest)
    device = corpus.offsets.device
    return Spans(corpus.offsets[:-1] + first.to(device), length.to(device))


def gather(corpus: Corpus, clips: Tensor, spans: Spans | None = None) -> Batch:
    """The clips of these numbers (B,), or their ``spans``, gathered by index where the corpus lies.

    Past its end a clip repeats its last frame: finite, and masked by ``valid``.
    """
    spans = spans or whole(corpus)
    clips = clips.to(corpus.offsets.device)
    start, length = spans.start[clips], spans.length[clips]
    frame = torch.arange(int(length.max()), device=start.device)
    rows = start[:, None] + torch.minimum(frame, length[:, None] - 1)
    features = {name: x[rows] for name, x in corpus.features.items()}
    return Batch(clips, features, corpus.target[rows], valid_frames(length))


def batches(
    corpus: Corpus,
    indices: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    spans: Spans | None = None,
) -> Iterator[Batch]:
    """Batches of the clips ``indices`` (n,), or of their ``spans``.

    Shuffled by ``generator``, or by length without one.
    """
    spans = spans or whole(corpus)
    lengths = spans.length.cpu()
    if generator is None:
        plan = list(indices[lengths[indices].argsort(stable=True)].split(batch_size))
    else:
        plan = batch_plan(lengths, indices, batch_size, generator)
    for clips in plan:
        yield gather(corpus, clips, spans)


def image_statistics(frames: Tensor) -> tuple[Tensor, float]:
    """Mean (rows, 96, 3) and root mean square deviation from it of frames (F, rows, 96, 3) or latents (F, D).

    That of uint8 frames is in grey levels, and at least 1: a still face is not blown up into noise.
    """
    total = torch.zeros(frames.shape[1:], dtype=torch.float64, device=frames.device)
    for part in frames.split(_SLICE):
        total += part.sum(0, dtype=torch.float64)
    mean = (total / len(frames)).float()
    squares = sum(float((part - mean).square().sum(dtype=torch.float64)) for part in frames.split(_SLICE))
    least = 1.0 if frames.dtype == torch.uint8 else 1e-6
    return mean, max(least, (squares / frames.numel()) ** 0.5)
