"""From the feature store to batches: every clip on the frame clock, one ragged flat tensor a modality.

Axes: B clips, T frames of the longest, F frames of all clips one after another, S native steps, D
features, V vocabulary, K coefficients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from queue import Full, Queue
from typing import TypeVar

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

CACHES = ("device", "ram", "mmap")
"""Where features lie while heads are fitted: on the device, in the machine's memory, or in the store."""

POOL_BATCHES = 8
PREFETCHED = 2
"""Batches that are made ahead where features stay in the store."""

_SLICE = 4096  # frames; statistics of the images go over them in slices
_CPU = torch.device("cpu")
T = TypeVar("T")


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
    # Not torch.lerp: it rounds differently in and beside a vector register, so that a window of a
    # clip would not be that window of the whole to the bit.
    below = steps[low - start]
    return steps[high - start].sub_(below).mul_(between).add_(below)


@dataclass(frozen=True)
class Skipped:
    """A take that is not used, and why, for people to read."""

    take: str
    source: str
    reason: str


@dataclass(frozen=True)
class Stored:
    """One modality of clips that stays in the store: frames are read and made when they are asked for.

    A window of a clip is, to the bit, that window of the clip as ``load`` puts it into memory.
    """

    store: Readable
    spec: FeatureSpec
    takes: tuple[Take, ...]
    fps: int
    image_rows: tuple[int, int] | None = None

    def read(self, clip: int, first: int, count: int) -> Tensor:
        """Frames [first, first + count) of a clip, by its number: (count, ...)."""
        take = self.takes[clip]
        native = self.store.read(self.spec.id, take.clip.id)
        found = _frames(native, self.spec, self.fps, first, count, self.image_rows)
        if found.is_floating_point():
            _refuse_nan(found, self.spec.modality, take, first)
        return found

    def of(self, clips: Sequence[int]) -> Stored:
        return replace(self, takes=tuple(self.takes[n] for n in clips))


@dataclass(frozen=True)
class Corpus:
    """Clips on the frame clock.

    start, lengths   (N,) int64 on the CPU: clip n is frames [start, start + length) of every tensor
    features         audio (F, D) and text (F, V) float32, normalised; image (F, rows, 96, 3) uint8, or
                     latents (F, D) float32; or ``Stored``, where a modality stays in the store
    target           (F, K) float32
    subjects         the identity of each clip
    device           where batches come out; the tensors lie there, or on the CPU
    """

    takes: tuple[Take, ...]
    subjects: tuple[str, ...]
    start: Tensor
    lengths: Tensor
    features: Mapping[str, Tensor | Stored]
    target: Tensor
    skipped: tuple[Skipped, ...] = ()
    device: torch.device = _CPU

    @cached_property
    def frames(self) -> int:
        return int(self.lengths.sum())

    @property
    def streams(self) -> bool:
        """Whether a modality stays in the store."""
        return any(isinstance(x, Stored) for x in self.features.values())

    @property
    def in_place(self) -> bool:
        """Whether batches are gathered where they are used."""
        return not self.streams and self.target.device.type == self.device.type

    def to(self, device: torch.device) -> Corpus:
        """With its tensors, and its batches, on ``device``."""
        features = {n: x if isinstance(x, Stored) else x.to(device) for n, x in self.features.items()}
        return replace(self, features=features, target=self.target.to(device), device=device)

    def part(
        self,
        people: Mapping[str, Sequence[Take]],
        modalities: Sequence[str],
        image_rows: tuple[int, int] | None = None,
        columns: Sequence[int] | None = None,
    ) -> Corpus:
        """The takes of ``people`` among these clips, sharing their tensors, but for chosen target columns.

        ``image_rows`` count from the first row that is kept here.
        """
        number = {take.id: n for n, take in enumerate(self.takes)}
        left_out = {one.take: one for one in self.skipped}
        performed = [(who, take.id) for who, takes in people.items() for take in takes]
        clips = [number[take] for _, take in performed if take in number]
        features = {name: _narrowed(self.features[name], clips, image_rows) for name in modalities}
        target = self.target if columns is None else self.target[:, list(columns)]
        return replace(
            self,
            takes=tuple(self.takes[n] for n in clips),
            subjects=tuple(who for who, take in performed if take in number),
            start=self.start[clips],
            lengths=self.lengths[clips],
            features=features,
            target=target,
            skipped=tuple(left_out[take] for _, take in performed if take in left_out),
        )

    def own_target(self) -> Tensor:
        """(F, K): the target of these clips, one after another, without what lies between them."""
        spans = zip(self.start.tolist(), self.lengths.tolist())
        return torch.cat([self.target[start : start + length] for start, length in spans])


def _narrowed(x: Tensor | Stored, clips: Sequence[int], rows: tuple[int, int] | None) -> Tensor | Stored:
    if isinstance(x, Tensor):
        return x[:, slice(*rows)] if rows and x.ndim == 4 else x
    if rows and len(x.spec.shape) == 3:
        first = x.image_rows[0] if x.image_rows else 0
        x = replace(x, image_rows=(first + rows[0], first + rows[1]))
    return x.of(clips)


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
    *,
    device: torch.device = _CPU,
    cache: str = "device",
) -> Corpus:
    """The takes of ``people`` (identity to takes) with the features of ``specs``, on the frame clock.

    ``names`` are the coefficients wanted, ``image_rows`` the rows of each lip frame that are kept
    (None: all), ``device`` where batches are wanted and ``cache`` one of CACHES: where features lie.
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
    ends = torch.tensor([0, *lengths]).cumsum(0)
    here = device if cache == "device" else _CPU
    features: dict[str, Tensor | Stored] = {}
    for name, spec in specs.items():
        if name == "target":
            continue
        stored = Stored(store, spec, tuple(takes), fps, image_rows)
        features[name] = stored if cache == "mmap" else _flat(stored, lengths, here)
    return Corpus(
        tuple(takes),
        tuple(who for who, _ in kept),
        ends[:-1],
        ends.diff(),
        features,
        _targets(store, specs["target"], takes, lengths, names).to(here),
        tuple(skipped),
        device,
    )


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


def _frames(
    native: np.ndarray,
    spec: FeatureSpec,
    fps: int,
    first: int,
    count: int,
    image_rows: tuple[int, int] | None,
) -> Tensor:
    """``count`` frames from ``first`` of one clip: (count, D) float32 or (count, rows, 96, 3) uint8."""
    if spec.fps is None:
        return on_frames(native, count, fps, first, row_size(spec))
    if len(spec.shape) == 3:
        rows = slice(*image_rows) if image_rows else slice(None)
        return torch.from_numpy(np.array(native[first : first + count, rows]))
    return torch.from_numpy(np.array(native[first : first + count], dtype=np.float32))


def _flat(stored: Stored, lengths: Sequence[int], device: torch.device) -> Tensor:
    """One modality of all clips: (F, D) float32, or (F, rows, 96, 3) uint8, filled clip by clip."""
    one = stored.read(0, 0, 1)
    flat = torch.empty(sum(lengths), *one.shape[1:], dtype=one.dtype, device=device)
    start = 0
    for clip, length in enumerate(lengths):
        flat[start : start + length] = stored.read(clip, 0, length)
        start += length
    return flat


def _targets(
    store: Readable, spec: FeatureSpec, takes: Sequence[Take], lengths: Sequence[int], names: Sequence[str]
) -> Tensor:
    """(F, K) float32, the coefficients ``names`` in their order."""
    wanted = columns(names, spec.settings["names"], f"target features {spec.id[:12]}")
    flat, start = torch.empty(sum(lengths), len(names)), 0
    for take, length in zip(takes, lengths):
        native = store.read(spec.id, spec.row_id(take.clip.id, take.target))
        flat.numpy()[start : start + length] = native[:length, wanted]
        _refuse_nan(flat[start : start + length], "target", take)
        start += length
    return flat


def _refuse_nan(x: Tensor, modality: str, take: Take, first: int = 0) -> None:
    if not torch.isfinite(x).all():
        frame = first + int((~torch.isfinite(x)).any(-1).nonzero()[0])
        raise BadInput(
            f"{take.source or take.clip.id}: the {modality} features hold NaN or infinity at frame {frame}; "
            f"take this take ({take.id[:12]}) out of the data, or compute it again"
        )


# --- batches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """B clips side by side, padded to the longest.

    clips     (B,) their numbers in the corpus, on the CPU
    features  (B, T, ...) by modality; target (B, T, K); valid (B, T)
    """

    clips: Tensor
    features: Mapping[str, Tensor]
    target: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> Batch:
        """On ``device``; onto a GPU while it computes."""
        if self.target.device.type == device.type == self.valid.device.type:
            return self
        features = {name: _moved(x, device) for name, x in self.features.items()}
        return Batch(self.clips, features, _moved(self.target, device), _moved(self.valid, device))


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


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
    return Spans(corpus.start, corpus.lengths)


def windows(corpus: Corpus, longest: int, period: int, generator: torch.Generator) -> Spans:
    """One window of at most ``longest`` frames of each clip; a clip that is no longer is read whole.

    A window starts at a random multiple of ``period`` within its clip, so that its frames have the
    positions they have in the clip, and late enough at the most to reach the clip's end.
    """
    lengths = corpus.lengths
    starts = (lengths - longest).clamp(min=0).add(period - 1) // period + 1
    draw = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    first = (draw * starts).long() * period
    return Spans(corpus.start + first, (lengths - first).clamp(max=longest))


def gather(corpus: Corpus, clips: Tensor, spans: Spans | None = None) -> Batch:
    """The clips of these numbers (B,), or their ``spans``, gathered by index where the corpus lies.

    Past its end a clip repeats its last frame: finite, and masked by ``valid``.
    """
    spans = spans or whole(corpus)
    start, length = spans.start[clips], spans.length[clips]
    inside = start - corpus.start[clips]
    rows = _Rows(clips.tolist(), start, inside.tolist(), length)
    features = {name: rows.of(x) for name, x in corpus.features.items()}
    return Batch(clips, features, rows.of(corpus.target), valid_frames(length)).to(corpus.device)


@dataclass(frozen=True)
class _Rows:
    """Frames of a batch: of each clip ``length`` from ``start`` in flat tensors, ``inside`` the clip."""

    clips: Sequence[int]
    start: Tensor
    inside: Sequence[int]
    length: Tensor

    def of(self, x: Tensor | Stored) -> Tensor:
        """(B, T, ...)"""
        if isinstance(x, Stored):
            return self._read(x)
        if len(self.clips) == 1:  # nothing to pad, nothing to copy
            return x.narrow(0, int(self.start), int(self.length))[None]
        rows = self._index.to(x.device, non_blocking=True)
        return x.index_select(0, rows).unflatten(0, (len(self.clips), -1))

    @cached_property
    def _index(self) -> Tensor:
        frame = torch.arange(int(self.length.max()))
        return (self.start[:, None] + torch.minimum(frame, self.length[:, None] - 1)).flatten()

    def _read(self, x: Stored) -> Tensor:
        lengths = self.length.tolist()
        parts = [x.read(*one) for one in zip(self.clips, self.inside, lengths)]
        if len(parts) == 1:
            return parts[0][None]
        batch = parts[0].new_empty(len(parts), max(lengths), *parts[0].shape[1:])
        for row, part in zip(batch, parts):
            row[: len(part)], row[len(part) :] = part, part[-1]
        return batch


def batches(
    corpus: Corpus,
    indices: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    spans: Spans | None = None,
    first: int = 0,
) -> Iterator[Batch]:
    """Batches of the clips ``indices`` (n,), or of their ``spans``, from number ``first`` on.

    Shuffled by ``generator``, or by length without one: the same batches wherever the features lie.
    Those that are not gathered where they are used are made ahead, by a thread.
    """
    spans = spans or whole(corpus)
    if generator is None:
        plan = list(indices[spans.length[indices].argsort(stable=True)].split(batch_size))
    else:
        plan = batch_plan(spans.length, indices, batch_size, generator)
    made = (gather(corpus, clips, spans) for clips in plan[first:])
    return made if corpus.in_place else prefetched(made, PREFETCHED)


def prefetched(items: Iterator[T], ahead: int) -> Iterator[T]:
    """The same items in the same order, made by a thread that is at most ``ahead`` of them ahead.

    What making them raises is raised here. The thread ends with the items, or when nobody asks for more.
    """
    ready: Queue[tuple[bool, T | BaseException | None]] = Queue(ahead)
    over = threading.Event()

    def hand_over(last: bool, item: T | BaseException | None) -> None:
        while not over.is_set():
            with suppress(Full):
                ready.put((last, item), timeout=0.1)
                break

    def make() -> None:
        try:
            for item in items:
                hand_over(False, item)
                if over.is_set():
                    return
            hand_over(True, None)
        except BaseException as error:  # told to whoever waits, in their thread
            hand_over(True, error)

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            last, item = ready.get()
            if isinstance(item, BaseException):
                raise item
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        over.set()
        thread.join()


def image_statistics(frames: Tensor | Stored, corpus: Corpus | None = None) -> tuple[Tensor, float]:
    """Mean (rows, 96, 3) and root mean square deviation from it of frames (F, rows, 96, 3) or latents (F, D).

    Of all of them, or of the clips of ``corpus``. That of uint8 frames is in grey levels, and at least 1: a
    still face is not blown up into noise. Sums of uint8 frames are exact, in whatever order they come.
    """
    count, total, squares, least = 0, torch.zeros(()), torch.zeros(()), 1e-6
    for part in _slices(frames, corpus):
        total = total.to(part.device) + part.sum(0, dtype=torch.float64)
        squares = squares.to(part.device) + part.float().square().sum(0, dtype=torch.float64)
        count += len(part)
        least = 1.0 if part.dtype == torch.uint8 else least
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0).mean()
    return mean.float(), max(least, float(variance.sqrt()))


def _slices(frames: Tensor | Stored, corpus: Corpus | None) -> Iterator[Tensor]:
    """The frames of each clip, in slices: the same ones wherever they lie."""
    if corpus is None:
        assert isinstance(frames, Tensor)
        yield from frames.split(_SLICE)
        return
    for clip, (start, length) in enumerate(zip(corpus.start.tolist(), corpus.lengths.tolist())):
        for first in range(0, length, _SLICE):
            count = min(_SLICE, length - first)
            if isinstance(frames, Stored):
                yield frames.read(clip, first, count).to(corpus.device)
            else:
                yield frames[start + first : start + first + count]
