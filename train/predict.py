"""Curves from native features with fitted heads: any length, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pmm import BadInput
from pmm.store import clock
from pmm.train.data import on_frames
from pmm.train.heads import Heads

CHUNK_FRAMES = 4096


def clip_frames(features: Mapping[str, np.ndarray], fps: int) -> int:
    """T: the image's frames, or without one the frames of the audio behind the native steps."""
    if "image" in features:
        return len(features["image"])
    steps = min(len(native) for native in features.values())
    return clock.frames(clock.step_span(0, steps)[1], clock.SPEECH_RATE, fps)


@torch.no_grad()
def predict_heads(
    heads: Heads,
    features: Mapping[str, np.ndarray],
    style: Tensor,
    frames: int | None = None,
    chunk_frames: int = CHUNK_FRAMES,
) -> np.ndarray:
    """Coefficients (T, K) float32 of one clip, equal to one forward over all of it.

    features      native rows, as stored: audio (S, D), text (S, V) or the largest logits (S, 2, k + 1),
                  image (T, 96, 96, 3) uint8 or latents (T, D), whichever the heads were fitted on;
                  modalities that the heads do not read are ignored
    style         (P,) style vector
    frames        T, where it is known better than ``clip_frames`` can tell
    chunk_frames  output frames at a time; each chunk also reads what can reach it (``Heads.reach``),
                  and starts at a multiple of the period of the positions
    Raises BadInput if a modality is missing or of another size.
    """
    config = heads.config
    _check(heads, features)
    total = clip_frames(features, config.fps) if frames is None else frames
    if "image" in config.modalities:
        total = min(total, len(features["image"]))
    heads.eval()
    parts = [np.zeros((0, config.coefficients), np.float32)]
    for start in range(0, total, chunk_frames):
        stop = min(start + chunk_frames, total)
        first = clock.second_start(max(0, start - heads.reach.past), config.fps)
        last = min(total, stop + heads.reach.future)
        window = _window(heads, features, first, last, style.device)
        valid = torch.ones(1, last - first, dtype=torch.bool, device=style.device)
        values = heads.decode(heads.encode(window, valid), style[None], valid)
        parts.append(values[0, start - first : stop - first].cpu().numpy())
    return np.concatenate(parts)


def _check(heads: Heads, features: Mapping[str, np.ndarray]) -> None:
    for name in heads.config.modalities:
        if name not in features:
            raise BadInput(f"these heads read {name} features, and got only {', '.join(features) or 'none'}")
        native = features[name]
        pictures = name == "image" and not heads.config.reads_latents
        size = heads.config.image_size if pictures else heads.config.feature_sizes[name]
        shape = (size, size, 3) if pictures else (size,)
        largest = name == "text" and native.ndim == 3 and native.shape[1] == 2
        if not len(native) or (native.shape[1:] != shape and not largest):
            raise BadInput(f"{name} features of shape {native.shape}; these heads read (n, *{shape}), n > 0")


def _window(
    heads: Heads, features: Mapping[str, np.ndarray], first: int, last: int, device: torch.device
) -> dict[str, Tensor]:
    """Frames [first, last) of every modality the heads read, as a batch of one."""
    window = {}
    for name in heads.config.modalities:
        config, native = heads.config, features[name]
        if name != "image":
            size = config.feature_sizes[name]
            window[name] = on_frames(native, last - first, config.fps, first, size)
        elif config.reads_latents:
            window[name] = torch.from_numpy(np.array(native[first:last], dtype=np.float32))
        else:
            window[name] = torch.from_numpy(np.array(native[first:last, slice(*config.image_rows)]))
    return {name: x[None].to(device) for name, x in window.items()}
