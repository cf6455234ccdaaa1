"""The untrained stand-ins of set ``tiny``: the published classes, small, with made-up weights.

Every weight follows from its tensor's name by :func:`fill`, in integer-exact arithmetic, so that
the weights' digest is the same on every machine. Nothing was learnt: what the stand-ins know of
speech is what random filters keep of it. The lip generator's BatchNorm statistics were measured
once, on made speech-like sound, and are kept in ``data/``; ``python -m pmm.precompute.standin``
measures them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pmm import PmmError
from pmm.precompute import face, lips
from pmm.precompute.speech import Checkpoint
from pmm.precompute.weights import Tensors
from pmm.store import clock

SEED = 0
LIPS_BASE = 2
"""Channels of the lip generator's first block: width 1/8, 571,449 parameters."""

STATISTICS_FILE = Path(__file__).parent / "data" / "tiny_lips_batchnorm.npz"

SPEECH_CONFIG: dict[str, Any] = {
    "model_type": "wav2vec2",
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "conv_dim": [64, 64, 96, 96, 128, 128, 128],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 16,
}

# X-SAMPA-like names of the sounds of English and Mandarin, after CTC's own tokens
# fmt: off
_TOKENS = (
    "<pad>", "<s>", "</s>", "<unk>", "|",
    "p", "b", "m", "f", "v", "w", "T", "D", "t", "d", "n", "l", "s", "z", "r", "S", "Z", "tS", "dZ", "j",
    "k", "g", "N", "h", "X", "ts", "ts_h", "s\\", "ts\\", "s`", "z`",
    "i", "I", "e", "E", "{", "a", "A", "O", "o", "U", "u", "y", "V", "@", "3", "@`", "1", "7",
)
# fmt: on


def vocabulary() -> dict[str, int]:
    """The stand-in's tokens and their columns."""
    return {token: i for i, token in enumerate(_TOKENS)}


# --- weights from names -----------------------------------------------------------------------------------


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of mean 0 and variance 1, uniform, decided by ``name`` alone: float64 of ``shape``.

    Raw 64-bit words of PCG64, whose stream numpy guarantees, so no version or machine differs.
    """
    seed = int.from_bytes(hashlib.sha256(f"{SEED}:{name}".encode()).digest()[:8], "little")
    words = np.random.PCG64(seed).random_raw(int(np.prod(shape, dtype=np.int64)))
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).reshape(shape) * 3**0.5


def _filled(name: str, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> torch.Tensor:
    return torch.from_numpy((mean + deviation * uniform(name, shape)).astype(np.float32))


def _fan_in(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape[1:], dtype=np.int64))


# By the end of a tensor's name: (the weight's gain over 1/sqrt(fan-in), the bias's deviation). Branches
# that mix over time or depth are kept weak, so that a step keeps telling of its own 25 ms of sound.
# The convolutions' biases give LayerNorm a yardstick: without them it would erase loudness.
_SPEECH_GAINS: tuple[tuple[str, float, float], ...] = (
    ("conv_layers.0.conv", 1.0, 0.5),
    ("pos_conv_embed.conv", 1.0, 0.1),
    (".conv", 1.4, 0.3),
    ("projection", 1.0, 0.0),
    ("q_proj", 1.0, 0.0),
    ("k_proj", 1.0, 0.0),
    ("v_proj", 1.0, 0.0),
    ("out_proj", 0.3, 0.0),
    ("intermediate_dense", 1.4, 0.1),
    ("output_dense", 0.7, 0.0),
    ("lm_head", 2.0, 0.0),
)
_POSITION_GAIN = 0.2


def _speech_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    layer, _, kind = name.rpartition(".")
    if "norm" in layer:
        return torch.full(shape, 1.0 if kind == "weight" else 0.0)
    if kind == "original0":  # the length of the position kernels, one for each tap
        return torch.full(shape, _POSITION_GAIN)
    if kind in ("original1", "masked_spec_embed"):
        return _filled(name, shape, 1.0)
    gain, bias = next((gain, bias) for end, gain, bias in _SPEECH_GAINS if layer.endswith(end))
    if kind == "bias":
        return _filled(name, shape, bias)
    if layer.endswith(".conv") and not layer.endswith(".0.conv"):
        return _averaging(name, shape, gain)
    return _filled(name, shape, gain / _fan_in(shape) ** 0.5)


def _averaging(name: str, shape: tuple[int, ...], gain: float) -> torch.Tensor:
    """Kernels with all taps alike: they average what a nonlinearity rectified, as an energy detector does.

    Random taps instead keep the waveform's phase, which says nothing of the mouth: jaw opening was
    then half as predictable from the features.
    """
    over_inputs = _filled(name, (*shape[:2], *(1 for _ in shape[2:])), gain / shape[1] ** 0.5)
    return (over_inputs / float(np.prod(shape[2:]))).expand(shape).contiguous()


@cache
def speech_checkpoint() -> Checkpoint:
    """The untrained wav2vec2 stand-in: 192 wide, 4 layers, CTC logits over made-up tokens."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = {**SPEECH_CONFIG, "vocab_size": len(_TOKENS)}
    with torch.device("meta"):
        expected = Wav2Vec2ForCTC(Wav2Vec2Config(**config)).state_dict()
    tensors = {name: _speech_tensor(name, tuple(value.shape)) for name, value in expected.items()}
    processor = {"do_normalize": True, "sampling_rate": clock.SPEECH_RATE, "feature_size": 1}
    return Checkpoint("builtin", config, processor, vocabulary(), tensors)


# --- the lip generator ------------------------------------------------------------------------------------


_RESIDUAL_GAIN = 0.3
"""Each residual block adds little: at 1 the deep decoder scrambles what the sound was."""

_CONTRAST_GAIN = 3.0


def _lips_tensor(name: str, shape: tuple[int, ...], residual: bool) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1, dtype=torch.int64)
    if len(shape) == 4:
        return _lips_kernel(name, shape)
    if name.endswith("running_var"):
        return torch.ones(shape)
    if name.endswith("running_mean"):
        return torch.zeros(shape)
    if name.endswith(".weight"):
        return _filled(name, shape, 0.2, mean=1.0) * (_RESIDUAL_GAIN if residual else 1.0)
    return _filled(name, shape, 0.1)


def _lips_kernel(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name == "output_block.1.weight":
        return _filled(name, shape, _CONTRAST_GAIN / _fan_in(shape) ** 0.5)
    if name.startswith("audio_encoder"):
        return _averaging(name, shape, 2**0.5)
    return _filled(name, shape, (2 / _fan_in(shape)) ** 0.5)  # the scale is BatchNorm's to set


def uncalibrated_lips() -> Tensors:
    """The lip generator's tensors before BatchNorm was measured: means 0, variances 1."""
    with torch.device("meta"):
        network = lips.Wav2Lip(LIPS_BASE)
    blocks = network.named_modules()
    residual = tuple(f"{name}." for name, block in blocks if isinstance(block, lips.Conv) and block.residual)
    return {
        name: _lips_tensor(name, tuple(value.shape), name.startswith(residual))
        for name, value in network.state_dict().items()
    }


def lips_tensors() -> Tensors:
    """The untrained lip generator with its stored BatchNorm statistics."""
    with np.load(STATISTICS_FILE, allow_pickle=False) as stored:
        statistics = {name: torch.from_numpy(stored[name]) for name in stored.files}
    return {**uncalibrated_lips(), **statistics}


def calibrate() -> dict[str, np.ndarray]:
    """BatchNorm means and variances over made speech and the drawn face, by tensor name, float32."""
    network = lips.network_for(uncalibrated_lips(), "the stand-in")
    windows = torch.from_numpy(lips.mel_windows(made_speech(seconds=24), 120, fps=5))[:, None]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None  # the plain average of the batches seen, here one
        norm.reset_running_stats()
    with torch.inference_mode():
        features = network.encode_face(torch.cat([lips.face_input(image) for image in _faces()]))
        network.decode(windows, [feature[:1] for feature in features])
    state = network.state_dict()
    return {name: state[name].numpy() for name in state if name.endswith(("running_mean", "running_var"))}


def _faces() -> list[np.ndarray]:
    """The drawn face, and the same moved, mirrored and dimmed: one picture alone has no variance."""
    drawn = face.drawn_face()
    moved = [np.roll(drawn, (dy, dx), (0, 1)) for dy in (-8, 0, 8) for dx in (-8, 0, 8)]
    return [drawn, *moved, *(image[:, ::-1] for image in moved), *(image // 2 + 40 for image in moved)]


def write_statistics(path: Path, statistics: Mapping[str, np.ndarray]) -> None:
    """Write the statistics. Raises PmmError rather than replace a file."""
    try:
        with path.open("xb") as file:
            np.savez_compressed(file, **statistics)  # type: ignore[arg-type]
    except FileExistsError:
        raise PmmError(f"{path} exists; move it away first") from None


# --- speech-like sound ------------------------------------------------------------------------------------

_VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))


def made_speech(seconds: int, seed: int = 0) -> np.ndarray:
    """Syllables of hiss, vowel and pause at 16 kHz, by arithmetic: (n,) float32 of peak about 0.5.

    A vowel is a sum of a glottal pitch's harmonics, each weighted by its distance from three formants.
    """
    rng = np.random.default_rng(seed)
    total = clock.samples(seconds, clock.SPEECH_RATE)
    wave = np.zeros(total)
    at = 0
    while at < total:
        syllable = _syllable(rng)
        end = min(total, at + len(syllable))
        wave[at:end] = syllable[: end - at]
        at = end
    return wave.astype(np.float32)


def _syllable(rng: np.random.Generator) -> np.ndarray:
    pitch, loud = rng.uniform(90, 240), rng.uniform(0.1, 0.5)
    start, stop = _VOWELS[rng.integers(5)], _VOWELS[rng.integers(5)]
    hiss = _hiss(rng, clock.samples(rng.uniform(0.02, 0.12), clock.SPEECH_RATE))
    vowel = _vowel(pitch, start, stop, clock.samples(rng.uniform(0.08, 0.3), clock.SPEECH_RATE))
    pause = np.zeros(clock.samples(rng.choice([0.0, 0.05, 0.3], p=[0.6, 0.3, 0.1]), clock.SPEECH_RATE))
    return np.concatenate([0.3 * loud * hiss, loud * vowel, pause])


def _hiss(rng: np.random.Generator, count: int) -> np.ndarray:
    noise = np.diff(rng.standard_normal(count + 1))
    return noise / np.abs(noise).max()


def _vowel(pitch: float, start: tuple[int, ...], stop: tuple[int, ...], count: int) -> np.ndarray:
    """A vowel that glides from one set of formants (Hz) to another."""
    glide = np.linspace(0, 1, count)
    phase = 2 * np.pi * np.cumsum(pitch * (1.05 - 0.1 * glide)) / clock.SPEECH_RATE
    wave = np.zeros(count)
    for harmonic in range(1, int(4000 / pitch)):
        frequency = harmonic * pitch
        strength = sum(1 / (1 + ((frequency - (a + (b - a) * glide)) / 90) ** 2) for a, b in zip(start, stop))
        wave += strength * np.sin(harmonic * phase) / harmonic**0.5
    return wave / np.abs(wave).max() * np.sin(np.pi * glide) ** 0.5


def main() -> None:
    """Measure the statistics again and write them where the package looks for them."""
    write_statistics(STATISTICS_FILE, calibrate())
    print(f"wrote {STATISTICS_FILE}")


if __name__ == "__main__":
    main()
