"""Exact, but fast: whatever shares a forward, in whatever order, a clip's features are those it has alone.

Two hundred made clips of mixed length, on small models of both kinds of normalisation. Alone means the
slow, obvious way: one clip, no padding, no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pmm.precompute import face, lips, speech, standin
from pmm.store import clock

CPU = torch.device("cpu")
CLIPS = 200
GROUP_NORM: dict[str, Any] = {
    "model_type": "wav2vec2",
    "vocab_size": 23,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16, 16, 24, 24, 24, 24],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
LAYER_NORM = {**GROUP_NORM, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
BATCH_SECONDS = (0.5, 5, 600)
"""A padded batch's: from one clip each to as many as there are."""


@dataclass(frozen=True)
class Alone:
    """A model, and what it says of each clip by itself in float32: (S, D) and (S, V)."""

    model: speech.SpeechModel
    expected: tuple[tuple[np.ndarray, np.ndarray], ...]


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    """0.3 to 1.5 s; of every length that occurs about four clips, so that equal lengths can share."""
    draw = np.random.default_rng(5)
    lengths = draw.choice(draw.integers(4800, 24_000, CLIPS // 4), CLIPS)
    whole = standin.made_speech(seconds=120, seed=11)
    starts = draw.integers(0, len(whole) - 24_000, CLIPS)
    loud = draw.uniform(0.2, 1, CLIPS).astype(np.float32)
    return [gain * whole[start : start + n] for start, n, gain in zip(starts, lengths, loud)]


@pytest.fixture(scope="module", params=[LAYER_NORM, GROUP_NORM], ids=["layer norm", "group norm"])
def alone(request: pytest.FixtureRequest, waves: Sequence[np.ndarray]) -> Alone:
    model = speech.SpeechModel(made(request.param), 2, wants_hidden=True, wants_logits=True, device=CPU)
    plain = speech.build(made(request.param), with_logits=True)
    expected = []
    with torch.inference_mode():
        for wave in waves:
            sound = torch.from_numpy(speech.normalised(wave))[None]
            hidden = plain.wav2vec2(sound, output_hidden_states=True).hidden_states[2]
            expected.append((hidden[0].numpy(), plain(sound).logits[0].numpy()))
    return Alone(model, tuple(expected))


def made(config: dict[str, Any]) -> speech.Checkpoint:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    tensors = Wav2Vec2ForCTC(Wav2Vec2Config(**config)).state_dict()
    for name, tensor in tensors.items():  # transformers' own start hardly mixes steps
        if "norm" not in name and tensor.ndim > 1:
            tensor.mul_(3)
    return speech.Checkpoint("made", config, {"do_normalize": True}, None, dict(tensors))


ORDERS = (np.arange(CLIPS), np.arange(CLIPS)[::-1], np.random.default_rng(1).permutation(CLIPS))


def samples(seconds: float) -> int:
    return clock.samples(seconds, clock.SPEECH_RATE)


@pytest.mark.parametrize("seconds", BATCH_SECONDS)
def test_float32_features_in_every_batch_are_those_alone(
    alone: Alone, waves: Sequence[np.ndarray], seconds: float
) -> None:
    """2e-5 of a feature's size (its root mean square over the clip, and over all clips)."""
    size = [np.sqrt(np.mean([np.square(e[k]).mean() for e in alone.expected])) for k in (0, 1)]
    parts = [span for i, wave in enumerate(waves) for span in speech.spans(i, len(wave))]
    grouped = list(speech.batches(parts, alone.model.can_pad, samples(seconds)))
    worst, together = 0.0, 0
    for batch in grouped:
        together = max(together, len(batch))
        found = alone.model.forward([speech.normalised(waves[span.clip]) for span in batch])
        for span, both in zip(batch, found):
            for k in (0, 1):
                worst = max(worst, np.abs(both[k] - alone.expected[span.clip][k]).max() / size[k])
    assert worst < 2e-5
    assert sum(map(len, grouped)) == CLIPS
    if seconds == BATCH_SECONDS[-1]:
        assert together == CLIPS if alone.model.can_pad else together > 4


@pytest.mark.parametrize("order", ORDERS, ids=["as found", "reversed", "shuffled"])
@pytest.mark.parametrize("seconds", BATCH_SECONDS)
def test_stored_features_in_every_batch_and_order_are_those_alone(
    alone: Alone, waves: Sequence[np.ndarray], seconds: float, order: np.ndarray
) -> None:
    """One unit in the last place of float16, or 1e-3 max(1, |x|)."""
    found = speech.features(alone.model, [waves[i] for i in order], samples(seconds))
    for i, result in zip(order, found):
        assert isinstance(result, tuple), result
        for ours, expected in zip(result, alone.expected[i]):
            assert ours is not None
            assert ours.dtype == np.float16
            unit = np.spacing(np.abs(expected.astype(np.float16))).astype(np.float64)
            bound = np.maximum(unit, 1e-3 * np.maximum(1, np.abs(expected)))
            assert (np.abs(ours.astype(np.float64) - expected) <= bound).all()


def test_lip_frames_have_the_same_bits_in_every_order(waves: Sequence[np.ndarray]) -> None:
    network = lips.network_for(standin.lips_tensors(), "the stand-in")
    ours, fresh = (lips.LipGenerator(network, face.drawn_face(), 30, CPU) for _ in range(2))
    chosen = range(0, CLIPS, 40)
    counts = {i: clock.frames(len(waves[i]), clock.SPEECH_RATE, 30) for i in chosen}
    forwards = {i: ours.frames(waves[i], counts[i]) for i in chosen}
    for i in reversed(chosen):
        np.testing.assert_array_equal(fresh.frames(waves[i], counts[i]), forwards[i])
