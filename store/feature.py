"""FeatureSpec: how a tensor was made, in full. Its digest is its name.

Two tensors with the same spec id and the same row id are the same tensor, whoever made them and
wherever. What may differ without making another tensor (library versions, the device, the folder
a checkpoint lay in) stands in the record of a fragment, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pmm import BadInput
from pmm.store.digest import canonical_json, digest, strict_json

MODALITIES = ("audio", "text", "image", "target")
DTYPES = ("float16", "float32", "uint8")
AXES = {
    "audio": ("step", "feature"),
    "text": ("step", "token"),
    "image": ("frame", "y", "x", "rgb"),
    "target": ("frame", "coefficient"),
}
"""Dimension names of ``values`` by modality (a fragment's rows of all clips follow one another)."""

OTHER_AXES = {
    "text": ("step", "part", "token"),
    "image": ("frame", "feature"),
}
"""Of smaller forms: the largest logits (values and columns), and latents that frames are painted from."""


@dataclass(frozen=True)
class FeatureSpec:
    """One kind of tensor.

    modality   one of MODALITIES
    algorithm  what computes it, with the version that a golden output pins: ``wav2vec2-hidden/1``
    dtype      as stored: float16, float32 or uint8, little-endian
    shape      of one row: (D,), (V,), (96, 96, 3), (K,)
    fps        frames per second of the rows; None for native wav2vec2 steps (50 Hz, see clock)
    settings   everything else that decides the values, as JSON without floats: the weights' digest,
               preprocessing, precision, the face's digest, coefficient names, ...
    """

    modality: str
    algorithm: str
    dtype: str
    shape: tuple[int, ...]
    fps: int | None
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise BadInput(f"modality {self.modality!r} is none of {', '.join(MODALITIES)}")
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if not isinstance(self.algorithm, str) or not isinstance(self.settings, Mapping):
            raise BadInput("a feature spec without a text for its algorithm or an object for its settings")
        if self.fps is not None and (not isinstance(self.fps, int) or self.fps < 1):
            raise BadInput(f"fps is {self.fps!r}; a whole number from 1, or None for wav2vec2 steps")
        if not self.shape or not all(isinstance(n, int) and 0 < n < 1 << 24 for n in self.shape):
            raise BadInput(
                f"a row of shape {self.shape!r}; every size must be a whole number from 1 to 2**24"
            )
        if self._axes is None:
            raise BadInput(
                f"a row of {self.modality} has axes {AXES[self.modality][1:]}, got shape {self.shape}"
            )

    @cached_property
    def id(self) -> str:
        return digest("feature", self.to_json())

    @property
    def dimension_names(self) -> tuple[str, ...]:
        assert self._axes is not None
        return self._axes

    @property
    def _axes(self) -> tuple[str, ...] | None:
        """The axes of a form of this modality that has as many as ``shape``."""
        forms = (AXES[self.modality], OTHER_AXES.get(self.modality, ()))
        return next((axes for axes in forms if len(axes) == len(self.shape) + 1), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "modality": self.modality,
            "algorithm": self.algorithm,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "fps": self.fps,
            "settings": dict(self.settings),
        }

    def to_bytes(self) -> bytes:
        """Canonical JSON: what ``specs/<id>.json`` holds."""
        return canonical_json(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> FeatureSpec:
        """Raises BadInput, naming ``where``, when the bytes are not a spec."""
        value = strict_json(data, where)
        try:
            shape = tuple(value["shape"])
            return cls(
                value["modality"], value["algorithm"], value["dtype"], shape, value["fps"], value["settings"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{where} is not a feature spec ({error})") from None

    def row_id(self, clip_id: str, target_id: str | None) -> str:
        """Which id names a row of this spec: the target's for targets, the clip's for all else."""
        if self.modality != "target":
            return clip_id
        if target_id is None:
            raise BadInput("a take without a face track has no target row")
        return target_id
