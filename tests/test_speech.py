"""Speech features: right layers, exact lengths, no dependence on the batch, honest names for weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pmm import BadInput, NotFound
from pmm.precompute import speech, standin
from pmm.store import clock

CPU = torch.device("cpu")
MINUTE = 60 * clock.SPEECH_RATE

GROUP_NORM = {
    "model_type": "wav2vec2",
    "vocab_size": 11,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.5,
    "hidden_dropout": 0.5,
}
LAYER_NORM = {**GROUP_NORM, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
PROCESSOR = {"do_normalize": True, "sampling_rate": 16000, "feature_size": 1}


def made(config: dict[str, Any], **processor: Any) -> speech.Checkpoint:
    """A small checkpoint of that configuration, weights from the seed."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**config))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():  # transformers' own start has zero biases and tiny weights
        if "norm" not in name and tensor.ndim > 1:
            tensor.mul_(3)
    return speech.Checkpoint("made", config, {**PROCESSOR, **processor}, None, tensors)


def model(checkpoint: speech.Checkpoint, layer: int | None = 2) -> speech.SpeechModel:
    return speech.SpeechModel(checkpoint, layer, wants_hidden=True, wants_logits=True, device=CPU)


def wave(samples: int, seed: int = 0) -> np.ndarray:
    return standin.made_speech(seconds=-(-samples // clock.SPEECH_RATE), seed=seed)[:samples]


def arrays(result: Any) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(result, tuple), result
    hidden, logits = result
    return hidden, logits


@pytest.fixture(scope="module")
def tiny() -> speech.SpeechModel:
    return model(standin.speech_checkpoint())


def assert_same_feature(one: np.ndarray, other: np.ndarray) -> None:
    """One unit in the last float16 place, or 1e-3 * max(1, |x|)."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    places = np.abs(np.spacing(one).astype(np.float64))
    assert (np.abs(a - b) <= np.maximum(places, 1e-3 * np.maximum(1, np.abs(a)))).all(), np.abs(a - b).max()


# --- which tensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LAYER_NORM, GROUP_NORM], ids=["layer norm", "group norm"])
def test_features_are_those_of_transformers(config: dict[str, Any]) -> None:
    """Layer n is block n's output; the last hidden state is what ``lm_head`` reads, not hidden_states[-1]."""
    checkpoint = made(config)
    reference = speech.build(checkpoint, with_logits=True)
    sound = speech.normalised(wave(16_000))
    with torch.inference_mode():
        whole = reference(torch.from_numpy(sound)[None], output_hidden_states=True)
        last = reference.wav2vec2(torch.from_numpy(sound)[None]).last_hidden_state
    for layer, expected in ((2, whole.hidden_states[2]), (None, last)):
        [(hidden, logits)] = model(checkpoint, layer).forward([sound])
        for ours, theirs in ((hidden, expected[0].numpy()), (logits, whole.logits[0].numpy())):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.sqrt(np.square(theirs).mean()))
    np.testing.assert_allclose(whole.logits[0], reference.lm_head(last)[0], atol=1e-5)
    final_norm_missing = (whole.hidden_states[-1] - last).abs().max() > 0.1
    assert final_norm_missing == config.get("do_stable_layer_norm", False)


def test_blocks_after_the_layer_are_not_run_where_nobody_reads_them() -> None:
    checkpoint = made(LAYER_NORM)
    alone = speech.SpeechModel(checkpoint, 2, wants_hidden=True, wants_logits=False, device=CPU)
    assert len(alone.model.wav2vec2.encoder.layers) == 2
    [(short, none)] = alone.forward([wave(8000)])
    [(full, _)] = model(checkpoint, 2).forward([wave(8000)])
    assert none is None
    np.testing.assert_array_equal(short, full)


def test_a_layer_beyond_the_last_is_refused() -> None:
    for layer in (0, 4, -1):
        with pytest.raises(BadInput) as caught:
            model(made(LAYER_NORM), layer)
        assert str(caught.value) == f"audio_layer {layer}: made has layers 1 to 3, or none for the last"


def test_normalisation_is_the_feature_extractors() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    loud = 0.3 * wave(16_000) + 0.1
    theirs = Wav2Vec2FeatureExtractor(do_normalize=True)(loud, sampling_rate=16_000)["input_values"][0]
    np.testing.assert_allclose(speech.normalised(loud), theirs, atol=1e-5)


def test_do_normalize_is_read_from_the_checkpoint() -> None:
    loud = wave(16_000)
    results = [
        arrays(speech.features(model(made(LAYER_NORM, do_normalize=flag)), [sound], MINUTE)[0])[0]
        for flag in (True, False)
        for sound in (loud, loud / 4)
    ]
    apart = [np.abs(results[i].astype(float) - results[i + 1]).mean() for i in (0, 2)]
    assert apart[0] < 1e-3 < 1e-2 < apart[1], apart


# --- lengths ----------------------------------------------------------------------------------------------


def test_every_length_has_its_steps(tiny: speech.SpeechModel) -> None:
    lengths = [400, 719, 720, 721, 3200, 16_000, 16_079, 16_080, 31_999, 32_000, 32_001]
    results = speech.features(tiny, [wave(n) for n in lengths], MINUTE)
    for n, result in zip(lengths, results):
        hidden, logits = arrays(result)
        assert (hidden.shape, logits.shape) == ((clock.steps(n), 192), (clock.steps(n), 54))
        assert (hidden.dtype, logits.dtype) == (np.float16, np.float16)
    assert [clock.steps(n) for n in (16_000, 32_000)] == [49, 99]


@pytest.mark.parametrize("samples", [480_399, 480_400, 800_000, 832_400, 1_000_000])
def test_chunks_tile_a_long_clip(samples: int) -> None:
    found = list(speech.spans(0, samples))
    kept = [step for span in found for step in range(span.first, span.last)]
    assert kept == list(range(clock.steps(samples)))
    if len(found) == 1:
        assert (found[0].start, found[0].end) == (0, samples)
        return
    assert max(clock.steps(span.samples) for span in found) <= speech.CHUNK_ABOVE_STEPS
    for span in found:
        before = span.first - clock.first_step(span.start)
        after = clock.first_step(span.start) + clock.steps(span.samples) - span.last
        assert before == (0 if span is found[0] else 100)
        assert after == min(100, clock.steps(samples) - span.last)


def test_chunks_of_a_long_clip_are_what_each_chunk_gives_alone() -> None:
    frozen = model(made(LAYER_NORM))
    long = wave(32 * clock.SPEECH_RATE)
    hidden, logits = arrays(speech.features(frozen, [long], MINUTE)[0])
    assert (len(hidden), len(logits)) == (1599, 1599)
    sound = speech.normalised(long)
    start, end = clock.step_span(1200, 1599)
    [(alone, spoken)] = frozen.forward([sound[start:end]])
    assert_same_feature(hidden[1300:], alone[100:].astype(np.float16))
    assert_same_feature(logits[1300:], spoken[100:].astype(np.float16))


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LAYER_NORM, GROUP_NORM], ids=["layer norm", "group norm"])
def test_features_are_the_same_alone_and_in_a_batch(config: dict[str, Any]) -> None:
    waves = [wave(n, seed=n) for n in (16_000, 7000, 23_456, 400, 16_000)]
    frozen = model(made(config))
    together = speech.features(frozen, waves, MINUTE)
    for sound, among in zip(waves, together):
        [alone] = speech.features(frozen, [sound], MINUTE)
        for one, other in zip(arrays(alone), arrays(among)):
            assert_same_feature(one, other)


def test_the_stand_ins_features_are_the_same_alone_and_in_a_batch(tiny: speech.SpeechModel) -> None:
    waves = [wave(n, seed=n) for n in (20_000, 47_000, 5000)]
    for sound, among in zip(waves, speech.features(tiny, waves, MINUTE)):
        for one, other in zip(arrays(speech.features(tiny, [sound], MINUTE)[0]), arrays(among)):
            assert_same_feature(one, other)


def test_group_norm_models_never_run_padded() -> None:
    """Padding would change them even under a mask, so only equal lengths share a forward."""
    frozen = model(made(GROUP_NORM))
    assert not frozen.can_pad
    waves = [speech.normalised(wave(n)) for n in (8000, 16_000)]
    [(padded, _), _] = frozen.forward(waves)
    [(alone, _)] = frozen.forward(waves[:1])
    assert np.abs(padded - alone).max() > 0.01
    parts = [span for i, n in enumerate((8000, 16_000, 8000, 8001)) for span in speech.spans(i, n)]
    grouped = [[span.clip for span in batch] for batch in speech.batches(parts, False, MINUTE)]
    assert grouped == [[1], [3], [0, 2]]


def test_batches_stay_within_their_padded_samples() -> None:
    parts = [span for i in range(7) for span in speech.spans(i, 16_000 * (i + 1))]
    grouped = [[span.clip for span in batch] for batch in speech.batches(parts, True, 16_000 * 12)]
    assert grouped == [[6], [5, 4], [3, 2, 1], [0]]
    assert [[s.clip for s in b] for b in speech.batches(parts[:2], True, 100)] == [[1], [0]]


def test_twice_the_same_bits_whatever_torchs_seed() -> None:
    checkpoint = made(LAYER_NORM)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        frozen = model(checkpoint)
        assert not frozen.model.training
        runs.append(arrays(speech.features(frozen, [wave(16_000)], MINUTE)[0]))
    for one, other in zip(*runs):
        np.testing.assert_array_equal(one, other)


# --- clips that fail --------------------------------------------------------------------------------------


def test_a_bad_wave_fails_alone(tiny: speech.SpeechModel) -> None:
    holes = wave(8000).copy()
    holes[100] = np.nan
    results = speech.features(tiny, [wave(8000), wave(399), holes], MINUTE)
    arrays(results[0])
    assert [str(result) for result in results[1:]] == [
        "399 samples at 16 kHz, expected at least 400",
        "the audio holds values that are not numbers",
    ]


def test_overflow_of_float16_fails_the_clip_alone() -> None:
    checkpoint = made(LAYER_NORM, do_normalize=False)
    head = checkpoint.tensors["lm_head.weight"]
    [(_, logits)] = model(checkpoint).forward([wave(8000)])
    checkpoint.tensors["lm_head.weight"] = head * (70_000 / np.abs(logits).max())
    checkpoint.tensors["lm_head.bias"].zero_()
    calm = np.zeros(8000, np.float32)
    frozen = model(checkpoint)
    ceiling = np.abs(frozen.forward([calm])[0][1]).max()
    loud, quiet = speech.features(frozen, [wave(8000), calm], MINUTE)
    expected = "logits overflow float16 or are not numbers; this clip cannot be stored as float16"
    assert (str(loud), ceiling < 65_504) == (expected, True)
    arrays(quiet)


def room_for(frozen: speech.SpeechModel, samples: int, error: Exception) -> None:
    """From now on the model raises ``error`` for padded batches of more than ``samples``."""

    def limited(model: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() > samples:
            raise error

    frozen.model.wav2vec2.feature_extractor.register_forward_pre_hook(limited)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tri"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1024 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "can't allocate", "not enough", "python"],
)
def test_out_of_memory_halves_the_batch_and_goes_on(error: Exception) -> None:
    waves = [wave(n, seed=n) for n in (16_000, 7000, 24_000, 400, 16_000, 12_000)]
    frozen = model(made(LAYER_NORM))
    before = speech.features(frozen, waves, MINUTE)
    room_for(frozen, 50_000, error)
    for one, other in zip(before, speech.features(frozen, waves, MINUTE)):
        for a, b in zip(arrays(one), arrays(other)):
            assert_same_feature(a, b)
    assert frozen.max_batch_samples == 36_000  # six of 24,000 padded, three, then one


_CONFINED = """
import resource
import numpy as np
import torch
from pathlib import Path
from pmm.precompute import speech, standin
from pmm.store import clock

torch.set_num_threads(1)
model = speech.SpeechModel(standin.speech_checkpoint(), 2, True, True, torch.device("cpu"))
whole = standin.made_speech(seconds=6)
waves = [whole[: 90_000 + 64 * n] for n in range(40)]
free = speech.features(model, waves[:3], 10**9)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (300 << 20), resource.RLIM_INFINITY))
confined = speech.features(model, waves, 10**9)
assert all(isinstance(one, tuple) for one in confined), confined
apart = max(np.abs(a.astype(float) - b).max() for x, y in zip(free, confined) for a, b in zip(x, y))
print(model.max_batch_samples < len(waves) * len(waves[0]), apart < 0.02)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_real_shortage_of_memory_halves_the_batch_too() -> None:
    done = subprocess.run([sys.executable, "-c", _CONFINED], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True True\n", 0), done.stderr


def test_a_clip_too_large_for_the_memory_fails_alone() -> None:
    frozen = model(made(LAYER_NORM))
    room_for(frozen, 40_000, torch.OutOfMemoryError("CUDA out of memory."))
    long, short, other = speech.features(frozen, [wave(n) for n in (64_000, 8000, 16_000)], MINUTE)
    assert str(long) == "not enough memory for 4.0 s of audio at a time (cpu)"
    arrays(short)
    arrays(other)


def test_other_errors_of_a_forward_are_not_taken_for_memory() -> None:
    frozen = model(made(LAYER_NORM))
    room_for(frozen, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        speech.features(frozen, [wave(8000)], MINUTE)


def test_values_that_are_no_numbers_fail_their_clip_alone() -> None:
    """A model that yields NaN for one clip of a batch: what it makes of very loud sound."""
    checkpoint = made(LAYER_NORM, do_normalize=False)
    frozen = model(checkpoint)

    def burn_out(module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        loud = inputs[0].abs().amax(dim=1) > 10
        return torch.where(loud[:, None, None], torch.nan, output)

    frozen.model.wav2vec2.feature_extractor.register_forward_hook(burn_out)
    quiet = wave(8000)
    for kept in (None, 4):
        frozen.text_topk = kept
        first, burnt, last = speech.features(frozen, [quiet, 100 * quiet, quiet], MINUTE)
        assert str(burnt) == (
            "hidden states overflow float16 or are not numbers; this clip cannot be stored as float16"
        )
        for one, other in zip(arrays(first), arrays(last)):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [LAYER_NORM, GROUP_NORM], ids=["layer norm", "group norm"])
def test_lower_precision_is_no_less_exact_than_autocast(config: dict[str, Any], dtype: torch.dtype) -> None:
    checkpoint = made(config)
    plain, sound = speech.build(checkpoint, with_logits=True), speech.normalised(wave(16_000))
    with torch.inference_mode():
        exact = plain(torch.from_numpy(sound)[None]).logits[0].numpy()
        with torch.autocast("cpu", dtype):
            theirs = plain(torch.from_numpy(sound)[None]).logits[0].float().numpy()
    frozen = speech.SpeechModel(checkpoint, None, True, True, CPU, dtype)
    [(_, ours)] = frozen.forward([sound])
    error, allowed = (np.square(x - exact).mean() for x in (ours, theirs))
    assert 0 < error < 1.5 * allowed
    if config is GROUP_NORM:
        np.testing.assert_array_equal(ours, theirs)  # with weights in that type the very bits


# --- long recordings --------------------------------------------------------------------------------------

_PEAK = """
import resource, sys
import numpy as np
import torch
from pmm.precompute import speech, standin
from pmm.store import clock

torch.manual_seed(0)
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
config = {**standin.SPEECH_CONFIG, "vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [4] * 7,
          "conv_bias": False, "feat_extract_norm": "group",
          "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
tensors = Wav2Vec2ForCTC(Wav2Vec2Config(**config)).state_dict()
checkpoint = speech.Checkpoint("made", config, {}, None, dict(tensors))
model = speech.SpeechModel(checkpoint, None, True, True, torch.device("cpu"))
second = standin.made_speech(seconds=1)
wave = np.tile(second, int(sys.argv[1]))
speech.features(model, [wave[: 60 * clock.SPEECH_RATE]], 60 * clock.SPEECH_RATE)
[(hidden, logits)] = speech.features(model, [wave], 60 * clock.SPEECH_RATE)
own = 2 * wave.nbytes + hidden.nbytes + logits.nbytes
print(len(hidden), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - own, own)
"""


def test_a_recording_of_two_hours_takes_no_more_memory_than_ten_minutes() -> None:
    """Beyond its samples (twice: as given, and normalised) and its features."""
    found = []
    for seconds in (600, 7200):
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(seconds)], capture_output=True, text=True, check=True
        )
        steps, beyond, own = map(int, done.stdout.split())
        assert steps == clock.steps(seconds * clock.SPEECH_RATE)
        found.append((beyond, own))
    (short, _), (long, own) = found
    assert own > 920e6
    assert long - short < 40e6, found


def test_the_seams_of_a_long_recording_are_small() -> None:
    """Every step of a chunked minute beside one forward over all of it, in units of the features' size."""
    frozen = model(made(LAYER_NORM), layer=None)
    sound = speech.normalised(standin.made_speech(seconds=60, seed=9))
    [(whole, _)] = frozen.forward([sound])
    hidden, _ = arrays(speech.features(frozen, [sound], MINUTE)[0])
    apart = np.abs(hidden.astype(np.float64) - whole).max(axis=1) / np.sqrt(np.square(whole).mean())
    assert len(list(speech.spans(0, len(sound)))) == 3
    assert apart.max() < 0.05


# --- checkpoints and their names --------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a checkpoint as Hugging Face does, with changes, in a folder of its own."""

    def write(
        checkpoint: speech.Checkpoint,
        name: str,
        file: str = "model.safetensors",
        rename: Callable[[str], str] = str,
        vocabulary: dict[str, int] | None = None,
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**checkpoint.config, **config}))
        (folder / "preprocessor_config.json").write_text(json.dumps(checkpoint.processor))
        (folder / "vocab.json").write_text(json.dumps(vocabulary or {"a": 0, "b": 1}))
        tensors = {rename(key): tensor for key, tensor in checkpoint.tensors.items()}
        if file.endswith(".safetensors"):
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
        return folder

    return write


def test_one_set_of_weights_has_one_name(save: Callable[..., Path]) -> None:
    checkpoint = made(LAYER_NORM)

    def old_weight_norm(name: str) -> str:
        return name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        )

    folders = [
        save(checkpoint, "safe"),
        save(checkpoint, "bin", file="pytorch_model.bin"),
        save(checkpoint, "old", file="pytorch_model.bin", rename=old_weight_norm),
        save(checkpoint, "parallel", file="pytorch_model.bin", rename=lambda name: f"module.{name}"),
        save(checkpoint, "noted", _name_or_path="x/y", transformers_version="4.1", torch_dtype="float32"),
        save(checkpoint, "spelt", layer_norm_eps=1e-5, hidden_act="gelu", final_dropout=0.3),
    ]
    read = [speech.read_checkpoint(str(folder)) for folder in folders]
    assert len({one.digest for one in read}) == 1
    [first, *others] = [speech.features(model(one), [wave(8000)], MINUTE)[0] for one in read]
    for other in others:
        for a, b in zip(arrays(first), arrays(other)):
            np.testing.assert_array_equal(a, b)


def test_what_changes_the_values_changes_the_name(save: Callable[..., Path]) -> None:
    checkpoint = made(LAYER_NORM)
    nudged = dict(checkpoint.tensors)
    nudged["lm_head.bias"] = nudged["lm_head.bias"] + 1e-6
    half = {name: tensor.half() for name, tensor in checkpoint.tensors.items()}
    folders = [
        save(checkpoint, "as it is"),
        save(replace(checkpoint, tensors=nudged), "nudged"),
        save(replace(checkpoint, tensors=half), "half"),
        save(replace(checkpoint, processor={**PROCESSOR, "do_normalize": False}), "processor"),
        save(checkpoint, "vocabulary", vocabulary={"b": 0, "a": 1}),
        save(checkpoint, "activation", hidden_act="relu"),
    ]
    assert len({speech.read_checkpoint(str(folder)).digest for folder in folders}) == len(folders)


def test_the_stand_ins_weights_are_the_same_everywhere() -> None:
    assert (
        standin.speech_checkpoint().digest
        == "757f722ab5a5d3d8d16b8a8c00264a979c116a0c3854a3443cab2bed7e465e1b"
    )


def test_the_stand_in_hears_loudness_and_vowels(tiny: speech.SpeechModel) -> None:
    """A ridge regression from its features predicts the energy of speech it was not fitted on."""
    scores = []
    for column in (0, 1):
        x, y = [], []
        for seed in (1, 2):
            sound = standin.made_speech(seconds=8, seed=seed)
            features = arrays(speech.features(tiny, [sound], MINUTE)[0])[column].astype(np.float64)
            at = np.arange(len(features)) * clock.STEP_SAMPLES
            energy = [np.log(1e-4 + np.mean(sound[i : i + 400].astype(np.float64) ** 2)) for i in at]
            x.append(features - features.mean(axis=0))
            y.append(np.array(energy) - np.mean(energy))
        fitted = np.linalg.solve(x[0].T @ x[0] + np.eye(x[0].shape[1]), x[0].T @ y[0])
        scores.append(1 - ((x[1] @ fitted - y[1]) ** 2).mean() / (y[1] ** 2).mean())
    assert min(scores) > 0.5, scores


def test_sharded_checkpoints_are_read(save: Callable[..., Path]) -> None:
    checkpoint = made(LAYER_NORM)
    whole, parts = save(checkpoint, "whole"), save(checkpoint, "parts")
    (parts / "model.safetensors").unlink()
    names = sorted(checkpoint.tensors)
    shards = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, keys in shards.items():
        save_file({key: checkpoint.tensors[key] for key in keys}, parts / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    assert speech.read_checkpoint(str(parts)).digest == speech.read_checkpoint(str(whole)).digest
    index["weight_map"]["lm_head.bias"] = "../elsewhere.safetensors"
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="has no weight_map of tensor names to file names"):
        speech.read_checkpoint(str(parts))


def test_bare_and_pretraining_checkpoints_serve_as_audio_models(save: Callable[..., Path]) -> None:
    checkpoint = made(LAYER_NORM)
    body = {k: v for k, v in checkpoint.tensors.items() if not k.startswith("lm_head")}
    pretraining = replace(checkpoint, tensors={**body, "quantizer.codevectors": torch.zeros(1, 4, 4)})
    bare = save(replace(checkpoint, tensors=body), "bare", rename=lambda name: name.removeprefix("wav2vec2."))
    [expected] = speech.features(model(checkpoint, None), [wave(8000)], MINUTE)
    for folder in (bare, save(pretraining, "pretraining")):
        read = speech.read_checkpoint(str(folder))
        audio = speech.SpeechModel(read, None, wants_hidden=True, wants_logits=False, device=CPU)
        [(hidden, none)] = speech.features(audio, [wave(8000)], MINUTE)
        assert none is None
        np.testing.assert_array_equal(hidden, arrays(expected)[0])
        with pytest.raises(BadInput) as caught:
            model(read)
        assert str(caught.value) == (
            f"{folder} has no CTC head (lm_head.weight); it cannot be the text model"
        )


def test_checkpoints_that_will_not_do(save: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = made(LAYER_NORM)
    slow = [5, 2, 2, 2, 2, 2, 4]
    cases = {
        save(checkpoint, "hubert", model_type="hubert"): "is a 'hubert' model, expected wav2vec2",
        save(checkpoint, "slow", conv_stride=slow): "does not make one vector each 320 samples from 400; "
        "other time bases do not fit",
        save(replace(checkpoint, processor={"sampling_rate": 8000}), "phone"): "wants audio at 8000 Hz, "
        "expected 16000",
    }
    for folder, message in cases.items():
        with pytest.raises(BadInput) as caught:
            speech.read_checkpoint(str(folder))
        assert str(caught.value) == f"{folder} {message}"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NotFound) as missing:
        speech.read_checkpoint(str(empty))
    assert str(missing.value) == (
        f"{empty} has no config.json; expected the files of a Hugging Face checkpoint"
    )


def test_tensors_that_are_missing_or_misshapen_are_named(save: Callable[..., Path]) -> None:
    checkpoint = made(LAYER_NORM)
    body = {name: tensor for name, tensor in checkpoint.tensors.items() if "encoder.layers.1." not in name}
    with pytest.raises(BadInput, match=r"made lacks wav2vec2\.encoder\.layers\.1\..* and 13 more; it is a"):
        model(replace(checkpoint, tensors=body))
    with pytest.raises(BadInput, match=r"made has tensors of other shapes: lm_head.weight \[11, 32\] \(exp"):
        model(replace(checkpoint, config={**LAYER_NORM, "vocab_size": 12}))


def test_a_pickle_that_runs_code_is_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "sprung",))

    folder = save(made(LAYER_NORM), "trap")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="holds more than tensors; pmm does not run code from checkpoints"):
        speech.read_checkpoint(str(folder))
    assert not (tmp_path / "sprung").exists()


def test_what_the_hub_cannot_give_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFound) as caught:
        speech.read_checkpoint("owner/not-in-any-cache", "v1")
    message = str(caught.value)
    assert message.startswith("cannot get owner/not-in-any-cache at v1 from the Hugging Face hub (")
    assert message.endswith("); download it where there is network access and give its folder")
    assert "\n" not in message
    with pytest.raises(NotFound) as caught:
        speech.read_checkpoint("./no/such/folder")
    assert str(caught.value) == (
        "no folder ./no/such/folder, and it is no Hugging Face id (owner/name) either"
    )
