"""What a user of ``pmm fit`` decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from pmm import BadInput
from pmm.store.rig import RIGS
from pmm.train.data import CACHES
from pmm.train.heads import MODALITIES, PRESETS
from pmm.train.loop import SCHEDULES, Schedule
from pmm.train.losses import REDUCTIONS, Weights
from pmm.train.memory import AUTO
from pmm.train.protocols import PROTOCOLS

LOSS_PARTS = ("temporal", "semantic", "motion")
"""Losses that can be left out."""

FREEZABLE = ("image", "projections", "styles", "decoder", "output")
"""Parts of the heads by plain names; ``decoder`` is its layers, ``output`` its last one."""

_OF_THE_SCHEDULE = ("epochs", "batch_size", "learning_rate", "window", "patience")
_FREE = ("device", "cache")


@dataclass(frozen=True)
class FitOptions:
    """What a user decides. None leaves a value to the preset.

    preset          "fast", "paper" or "smoke" (seconds: whether everything works)
    rig             "lip32" or "arkit52": the coefficients that are predicted
    without         modalities (text, audio, image) and losses (temporal, semantic, motion) to leave out
    features        feature spec by modality, where the store has several: an id or its beginning
    snapshot        read exactly what this snapshot of the store names, instead of all that is there now
    lookahead, context, max_context   frames
    window          seconds that an epoch reads of a longer take
    patience        epochs without a better validation LVE after which training stops; 0: never
    split_seed      draws the protocol's split; None: ``seed`` does
    test_subject    who is tested, under leave-one-subject-out
    subjects        only these identities take part; none: everybody
    cache           where features lie: "device", "ram", "mmap" (in the store) or "auto"
    init            a run to begin from: its heads, features and statistics, with new styles
    freeze          parts of the heads (see FREEZABLE) that keep the weights they begin with
    Raises BadInput for values that cannot be.
    """

    preset: str = "fast"
    rig: str = "lip32"
    fps: int = 30
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    window: float | None = None
    seed: int = 0
    device: str = "auto"
    lookahead: int | None = None
    context: int | None = None
    max_context: int | None = None
    dropout: float | None = None
    modality_dropout: float | None = None
    decoder_input: str = "aligned"
    loss_reduction: str = "sum"
    without: tuple[str, ...] = ()
    protocol: str = "cross-subject"
    features: Mapping[str, str] = field(default_factory=dict)
    snapshot: str | None = None
    patience: int | None = None
    split_seed: int | None = None
    test_subject: str = ""
    subjects: tuple[str, ...] = ()
    cache: str = AUTO
    init: str | None = None
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, PRESETS)
        _one_of("rig", self.rig, RIGS)
        _one_of("loss reduction", self.loss_reduction, REDUCTIONS)
        _one_of("protocol", self.protocol, PROTOCOLS)
        for name in self.without:
            _one_of("without", name, (*MODALITIES, *LOSS_PARTS))
        _one_of("cache", self.cache, (AUTO, *CACHES))
        for name in self.freeze:
            _one_of("freeze", name, FREEZABLE)
        if self.freeze and self.init is None:
            raise BadInput(
                "freeze without init: untrained heads are no use as they are; name a run by --init"
            )
        if self.fps < 1:
            raise BadInput(f"fps {self.fps}: it must be at least 1")

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(name for name in MODALITIES if name not in self.without)

    @property
    def weights(self) -> Weights:
        return Weights(**{name: 0.0 for name in LOSS_PARTS if name in self.without})

    @property
    def schedule(self) -> Schedule:
        own = {name: getattr(self, name) for name in _OF_THE_SCHEDULE}
        given = {name: value for name, value in own.items() if value is not None}
        return Schedule(**{**SCHEDULES[self.preset], **given})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "features": dict(self.features)}

    def changed(self) -> dict[str, Any]:
        """Those that are not as they are by default."""
        plain, default = self.to_json(), FitOptions().to_json()
        return {name: value for name, value in plain.items() if value != default[name]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FitOptions:
        """Raises TypeError for options this version does not know."""
        tuples = {name: tuple(value.get(name, ())) for name in ("without", "subjects", "freeze")}
        return cls(**{**value, **tuples})

    def differs(self, given: FitOptions) -> str:
        """How ``given`` asks for something else than these options, in words; empty if it does not.

        An option left at its default asks for nothing; the device and the cache may always change.
        """
        for one in fields(self):
            was, now = getattr(self, one.name), getattr(given, one.name)
            if one.name not in _FREE and now not in (was, getattr(FitOptions(), one.name)):
                return f"{one.name} {was!r}, not {now!r}"
        return ""


def _one_of(what: str, value: str, legal: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in legal:
        raise BadInput(f"{what} {value!r} is none of {', '.join(legal)}")


def torch_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises BadInput for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _one_of("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("device cuda: this PyTorch finds no CUDA device; use --device cpu")
    return torch.device(name)
