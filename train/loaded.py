"""What fits read: planned from the catalogue, then loaded once for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pmm import BadInput, NotFound
from pmm.store import snapshots
from pmm.store.cache import Fetched
from pmm.store.catalog import Store
from pmm.store.clip import Take
from pmm.store.feature import MODALITIES, FeatureSpec
from pmm.store.rig import ARKIT52, RIGS
from pmm.store.snapshots import Readable, View
from pmm.train import data, memory, protocols
from pmm.train.data import Corpus
from pmm.train.heads import HeadsConfig, preset
from pmm.train.memory import Cached
from pmm.train.options import FitOptions
from pmm.train.protocols import Part, Split

SIDES = ("train", "validation")
"""The parts of a split that a fit reads."""


@dataclass(frozen=True)
class Content:
    """Event: what the run reads, as a snapshot of the store, with its id.

    ``unpinned`` says why the snapshot could not be kept in the store; empty if it is there.
    """

    snapshot: str = ""
    id: str = ""
    unpinned: str = ""


@dataclass(frozen=True)
class Plan:
    """What one fit reads and what its heads are; nothing has been read but the catalogue.

    specs    the feature specs by modality, the target's too
    sides    the training and the validation part of the split
    heads    keywords of HeadsConfig, but for the styles
    split    the split as a protocol drew it; None where a run goes on with the one it has
    """

    options: FitOptions
    specs: Mapping[str, FeatureSpec]
    sides: Mapping[str, Part]
    heads: Mapping[str, Any]
    split: Split | None = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return RIGS[self.options.rig]

    @property
    def image_rows(self) -> tuple[int, int]:
        rows: tuple[int, int] = self.heads.get("image_rows", HeadsConfig.image_rows)
        return rows

    @property
    def takes(self) -> list[Take]:
        return [take for side in self.sides.values() for takes in side.values() for take in takes]


def plan(chosen: Readable, options: FitOptions, heads: Mapping[str, Any] | None = None) -> Plan:
    """The features, the split and the sizes of a fit on what ``chosen`` holds.

    ``heads`` are sizes to keep, of a run to begin from. Raises NotFound or BadInput where the store lacks
    what is needed, too few subjects for the protocol included.
    """
    specs = data.choose_specs(chosen, options.fps, options.features, (*options.modalities, "target"))
    keywords = heads_keywords(options, specs) if heads is None else heads
    seed = options.seed if options.split_seed is None else options.split_seed
    takes = wanted_takes(data.listed_takes(chosen), options.subjects, chosen.where)
    split = protocols.split(options.protocol, takes, seed, options.test_subject)
    return Plan(options, specs, {name: split[name] for name in SIDES}, keywords, split)


def wanted_takes(takes: Sequence[Take], subjects: Sequence[str], where: str) -> list[Take]:
    """The takes of ``subjects``, or all without any. Raises NotFound for a subject without takes."""
    if not subjects:
        return list(takes)
    people = protocols.identities(takes)
    if lost := [who for who in subjects if who not in people]:
        raise NotFound(f"no take of {lost[0]} is in {where}, only of {', '.join(people) or 'nobody'}")
    wanted = {take.id for who in subjects for take in people[who]}
    return [take for take in takes if take.id in wanted]


def heads_keywords(options: FitOptions, specs: Mapping[str, FeatureSpec]) -> dict[str, Any]:
    """Keywords of HeadsConfig, but for the styles."""
    pictures = "image" in specs and len(specs["image"].shape) == 3
    plain = [name for name in options.modalities if name != "image" or not pictures]
    sizes = {name: data.row_size(specs[name]) for name in plain}
    changes = {
        name: getattr(options, name)
        for name in ("lookahead", "context", "max_context", "dropout", "modality_dropout")
    }
    keywords = {
        "feature_sizes": sizes,
        "coefficients": len(RIGS[options.rig]),
        "modalities": options.modalities,
        "decoder_input": options.decoder_input,
        **preset(options.preset, options.fps, **changes),
    }
    if pictures:
        height, width, _ = specs["image"].shape
        if height != width:
            raise BadInput(f"lip frames of {height} x {width} pixels; the image encoder reads square ones")
        rows = keywords.get("image_rows", HeadsConfig.image_rows)
        keywords |= {"image_size": width, "image_rows": tuple(row * height // 96 for row in rows)}
    HeadsConfig(**keywords, styles=1)  # refuses sizes that cannot be
    return keywords


@dataclass(frozen=True)
class Loaded:
    """The takes of some fits with all their features: read once, shared by all of them.

    corpus      every take that one of them reads, the coefficients ``names`` and the rows ``image_rows`` of
                lip frames
    """

    content: Content
    cached: Cached
    corpus: Corpus
    names: tuple[str, ...]
    image_rows: tuple[int, int]

    def sides(self, one: Plan) -> dict[str, Corpus]:
        """What the fit of ``one`` trains on and what it is validated on: views, no copies of features."""
        first, last = one.image_rows[0] - self.image_rows[0], one.image_rows[1] - self.image_rows[0]
        rows = None if one.image_rows == self.image_rows else (first, last)
        columns = None if one.names == self.names else [self.names.index(name) for name in one.names]
        found = {
            name: self.corpus.part(people, one.options.modalities, rows, columns)
            for name, people in one.sides.items()
        }
        for name, corpus in found.items():
            if not corpus.takes:
                why = f"; the first: {corpus.skipped[0].source}: {corpus.skipped[0].reason}"
                raise BadInput(f"none of {len(corpus.skipped)} {name} takes can be used{why}")
        return found


def load(
    store: Store,
    chosen: Readable,
    plans: Sequence[Plan],
    device: torch.device,
    cache: str,
    tell: Callable[[Fetched | Content | Cached], None],
    content: Content | None = None,
    memory_limit: int | None = None,
) -> Loaded:
    """Load what ``plans`` read of ``chosen``: ``store`` itself, or it as a snapshot saw it.

    content       the snapshot to read; None: ``chosen`` where it is one, else a new one that is kept
    memory_limit  bytes of memory that may be filled; None: what is available
    Raises BadInput where the plans do not read the same features, and where the memory that is asked for
    does not hold them; NotFound where a snapshot is no longer whole.
    """
    specs = _common(plans)
    people = _everybody(plans)
    takes = [take for own in people.values() for take in own]
    names = tuple(name for name in ARKIT52 if any(name in one.names for one in plans))
    names = plans[0].names if set(names) == set(plans[0].names) else names
    rows = min(one.image_rows[0] for one in plans), max(one.image_rows[1] for one in plans)
    fps = plans[0].options.fps
    frames = data.frames_of(chosen, specs, people, fps)
    needed = memory.corpus_bytes(frames, specs, len(names), rows)
    modalities = tuple(name for name in specs if name != "target")
    limits = memory.measured(device, memory_limit)
    share = memory.SHARE if memory_limit is None else 1.0
    cached = memory.choose_cache(cache, needed, limits, len(takes), modalities, share)
    if isinstance(chosen, View) and content is None:
        chosen.require(spec.id for spec in specs.values())
    data.fetch(chosen, specs, takes, tell)
    content, source = _content(store, chosen, specs, takes, content)
    tell(content)
    tell(cached)
    corpus = data.load(source, specs, people, names, fps, rows, device=device, cache=cached.cache)
    return Loaded(content, cached, corpus, names, rows)


def _common(plans: Sequence[Plan]) -> dict[str, FeatureSpec]:
    """The feature specs of all plans. Raises BadInput where two read different features as one modality."""
    specs: dict[str, FeatureSpec] = {}
    for one in plans:
        for name, spec in one.specs.items():
            if specs.setdefault(name, spec) != spec or one.options.fps != plans[0].options.fps:
                raise BadInput(
                    f"these fits read different {name} features ({specs[name].id[:12]} and {spec.id[:12]}, "
                    f"{plans[0].options.fps} and {one.options.fps} fps), and one corpus is loaded for all; "
                    "fit them one by one"
                )
    return {name: specs[name] for name in (*MODALITIES, "target") if name in specs}


def _everybody(plans: Sequence[Plan]) -> dict[str, tuple[Take, ...]]:
    """Every take that a plan reads, once, by identity."""
    people: dict[str, dict[str, Take]] = {}
    for one in plans:
        for side in one.sides.values():
            for who, takes in side.items():
                people.setdefault(who, {}).update({take.id: take for take in takes})
    return {who: tuple(own.values()) for who, own in people.items()}


def _content(
    store: Store,
    chosen: Readable,
    specs: Mapping[str, FeatureSpec],
    takes: Sequence[Take],
    content: Content | None,
) -> tuple[Content, Readable]:
    """What is about to be read, byte for byte: the snapshot that was given, or a new one."""
    if content is not None:
        return content, chosen
    if isinstance(chosen, View):
        return Content(chosen.snapshot.name, chosen.snapshot.id), chosen
    snapshot, reason = snapshots.pin(store, data.rows(store, specs, takes))
    return Content(snapshot.name, snapshot.id, reason), View(store, snapshot)
