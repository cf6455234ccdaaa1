"""Model sets: names, studio files, and what makes a feature another feature."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pmm import BadInput, NotFound
from pmm.precompute import lips, mel, models, speech, standin
from pmm.precompute.models import MODEL_SETS, FrozenModels, ModelSet, Speech, load, resolve

TINY = MODEL_SETS["tiny"]


@pytest.fixture(scope="module")
def tiny() -> FrozenModels:
    return load(TINY, fps=30)


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    return standin.made_speech(seconds=2, seed=3)


def save_speech(folder: Path, **config: Any) -> Path:
    """The stand-in as a checkpoint folder, as a user would have one."""
    checkpoint = standin.speech_checkpoint()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**checkpoint.config, **config}))
    (folder / "preprocessor_config.json").write_text(json.dumps(checkpoint.processor))
    (folder / "vocab.json").write_text(json.dumps(checkpoint.vocabulary))
    save_file(checkpoint.tensors, folder / "model.safetensors")
    return folder


# --- naming a set -----------------------------------------------------------------------------------------


def test_importing_and_resolving_load_nothing_heavy() -> None:
    code = (
        "import sys; from pmm.precompute.models import resolve; resolve('paper', lips='x.pth'); "
        "print([m for m in ('torch', 'transformers', 'PIL', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_sets_are_those_of_the_paper() -> None:
    paper, english = resolve("paper"), resolve("paper-en")
    assert paper.audio_model == english.audio_model == "facebook/wav2vec2-large-xlsr-53"
    assert paper.audio_layer is None
    assert paper.text_model == "jonatasgrosman/wav2vec2-large-xlsr-53-chinese-zh-cn"
    assert english.text_model == "jonatasgrosman/wav2vec2-large-xlsr-53-english"
    assert not paper.one_forward
    assert resolve("tiny").one_forward


def test_overrides_replace_fields() -> None:
    changed = resolve("tiny", lips="mine.pth", face=None, audio_layer=3)
    assert changed == replace(TINY, lips="mine.pth", audio_layer=3)


def test_a_studios_own_set(tmp_path: Path) -> None:
    (tmp_path / "speech").mkdir()
    (tmp_path / "ours.toml").write_text(
        'audio_model = "speech"\ntext_model = "owner/model"\ntext_revision = "v2"\n'
        'lips = "../lips.pth"\nface = "builtin"\n'
    )
    assert resolve(str(tmp_path / "ours.toml")) == ModelSet(
        name="ours",
        audio_model=str(tmp_path / "speech"),
        text_model="owner/model",
        text_revision="v2",
        lips=str(tmp_path / "../lips.pth"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("audio_model = ", "{path} is no readable TOML (Invalid value (at end of document))"),
        (
            'audio_model = "builtin"',
            "{path} lacks text_model, lips; expected the fields name, audio_model, text_model, "
            "audio_revision, audio_layer, text_revision, lips, face",
        ),
        (
            'audio = "builtin"',
            "{path}: unknown field audio; expected name, audio_model, text_model, "
            "audio_revision, audio_layer, text_revision, lips, face",
        ),
        (
            'audio_model = "a"\ntext_model = "b"\nlips = "builtin"\naudio_layer = "2"',
            "model set: audio_layer is '2', expected a whole number",
        ),
        (
            'audio_model = "a/b"\ntext_model = "a/b"\nlips = "builtin"',
            "model set ours: audio and text would both be the last hidden state of a/b; "
            "give audio_layer (a middle layer), or another audio_model",
        ),
    ],
)
def test_a_studios_set_that_will_not_do(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ours.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        resolve(str(path))
    assert str(caught.value) == message.format(path=path)


def test_sets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as unknown:
        resolve("papr")
    assert str(unknown.value) == (
        "model set 'papr' is none of tiny, paper, paper-en, nor a .toml file of your own"
    )
    with pytest.raises(NotFound) as missing:
        resolve(str(tmp_path / "ours.toml"))
    assert str(missing.value) == (
        f"no model set at {tmp_path / 'ours.toml'}; expected a .toml file or one of tiny, paper, paper-en"
    )


def test_options_that_will_not_do(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"device": "tpu"}, "device 'tpu' is none of auto, cpu, cuda"),
        ({"precision": "int8"}, "precision 'int8' is none of fp32, bf16, fp16"),
        ({"fps": 0}, "fps 0, expected 1 to 240"),
        (
            {"models": resolve("paper")},
            "model set paper needs a Wav2Lip checkpoint: get wav2lip_gan.pth from the links in the README of "
            "github.com/Rudrabha/Wav2Lip (its weights are for non-commercial use) "
            "and give --lips wav2lip_gan.pth",
        ),
    ]
    if not torch.cuda.is_available():
        cases.append(
            (
                {"device": "cuda"},
                "device cuda: this torch sees no GPU; use --device cpu, or install a torch with CUDA",
            )
        )
    for options, message in cases:
        with pytest.raises(BadInput) as caught:
            load(**{"models": TINY, "fps": 30, **options})
        assert str(caught.value) == message
    missing = str(tmp_path / "wav2lip_gan.pth")
    with pytest.raises(NotFound, match=r"no weights at .*wav2lip_gan\.pth; expected a"):
        load(resolve("paper", lips=missing), fps=30)


# --- the models together ----------------------------------------------------------------------------------


def test_stand_ins_say_so(tiny: FrozenModels) -> None:
    assert tiny.label == tiny.description["label"] == "tiny (untrained stand-in)"
    assert tiny.description["untrained stand-in"] is True
    assert json.loads(json.dumps(tiny.description)) == tiny.description
    assert models.label(resolve("paper", lips="builtin")) == "paper (lips: untrained stand-in)"
    assert models.label(resolve("paper", lips="wav2lip.pth")) == "paper"


def test_a_clip_becomes_what_the_specs_say(tiny: FrozenModels, sound: np.ndarray) -> None:
    [heard] = tiny.speech([sound])
    assert isinstance(heard, Speech)
    frames = tiny.lips(sound, 60)
    for modality, values, count in (
        ("audio", heard.audio, 99),
        ("text", heard.text, 99),
        ("image", frames, 60),
    ):
        spec = tiny.specs[modality]
        assert (values.shape, values.dtype) == ((count, *spec.shape), np.dtype(spec.dtype))
        assert spec.modality == modality
    assert (tiny.can_batch, tiny.specs["image"].fps, tiny.specs["audio"].fps) == (True, 30, None)


def test_a_bad_clip_leaves_the_others(tiny: FrozenModels, sound: np.ndarray) -> None:
    heard = tiny.speech([sound[:100], sound])
    assert str(heard[0]) == "100 samples at 16 kHz, expected at least 400"
    assert isinstance(heard[1], Speech)
    assert tiny.speech([]) == []


def test_the_stand_ins_are_the_same_everywhere(tiny: FrozenModels) -> None:
    assert tiny.description["weights"] == {
        "audio": "757f722ab5a5d3d8d16b8a8c00264a979c116a0c3854a3443cab2bed7e465e1b",
        "text": "757f722ab5a5d3d8d16b8a8c00264a979c116a0c3854a3443cab2bed7e465e1b",
        "image": "4438676905b47bf73fd1ec1a214fecab6bb69e9099c3409ed245fe86774d1209",
    }


GOLDEN = {
    # what the algorithm versions named in the specs compute: a change here needs a new version there
    "audio": [0.632, 0.057, -1.645, 0.328],
    "text": [-1.076, -2.277, -0.19, 1.971],
    "image": [187, 125, 141, 109, 227, 101, 120, 167, 110],
}


def test_the_algorithms_compute_what_their_versions_stand_for(tiny: FrozenModels) -> None:
    t = np.arange(16_000) / 16_000
    tone = (0.4 * np.sin(2 * np.pi * (200 + 600 * t) * t) * np.sin(2 * np.pi * 3 * t)).astype(np.float32)
    [heard] = tiny.speech([tone])
    assert isinstance(heard, Speech)
    np.testing.assert_allclose(heard.audio[24, :4], GOLDEN["audio"], atol=5e-3)
    np.testing.assert_allclose(heard.text[24, :4], GOLDEN["text"], atol=5e-3)
    frame = tiny.lips(tone, 30)[15].astype(int)
    np.testing.assert_allclose(frame[[60, 70, 80], 48, :].ravel(), GOLDEN["image"], atol=1)


def test_two_models_give_what_one_forward_gives(
    tiny: FrozenModels, sound: np.ndarray, tmp_path: Path
) -> None:
    """The same checkpoint from a folder for the text, so that two models run: the same features."""
    folder = str(save_speech(tmp_path / "speech"))
    pair = load(replace(TINY, text_model=folder), fps=30)
    assert pair.label == "tiny (audio, lips: untrained stand-in)"
    assert {m: spec.id for m, spec in pair.specs.items()} == {m: spec.id for m, spec in tiny.specs.items()}
    [one], [two] = tiny.speech([sound]), pair.speech([sound])
    assert isinstance(one, Speech)
    assert isinstance(two, Speech)
    np.testing.assert_array_equal(one.audio, two.audio)
    np.testing.assert_array_equal(one.text, two.text)


# --- another feature --------------------------------------------------------------------------------------


def ids(frozen: FrozenModels) -> dict[str, str]:
    return {modality: spec.id for modality, spec in frozen.specs.items()}


def changed(before: FrozenModels, after: FrozenModels) -> set[str]:
    one, other = ids(before), ids(after)
    return {modality for modality in one if one[modality] != other[modality]}


def test_the_same_set_is_the_same_features(tiny: FrozenModels, tmp_path: Path) -> None:
    assert changed(tiny, load(TINY, fps=30)) == set()
    renamed = save_speech(tmp_path / "moved")
    save_file(standin.lips_tensors(), tmp_path / "lips.safetensors")
    moved = resolve(
        "tiny",
        name="ours",
        audio_model=str(renamed),
        text_model=str(renamed),
        lips=str(tmp_path / "lips.safetensors"),
    )
    assert changed(tiny, load(moved, fps=30)) == set()


def test_anything_else_is_another_feature(tiny: FrozenModels, tmp_path: Path) -> None:
    Image.new("RGB", (120, 120), (200, 160, 140)).save(tmp_path / "face.png")
    tensors = standin.lips_tensors()
    tensors["output_block.1.bias"] = tensors["output_block.1.bias"] + 1e-4
    save_file(tensors, tmp_path / "lips.safetensors")
    relu = str(save_speech(tmp_path / "relu", hidden_act="relu"))
    cases: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
        ({"face": str(tmp_path / "face.png")}, {}, {"image"}),
        ({"lips": str(tmp_path / "lips.safetensors"), "audio_layer": 3}, {}, {"audio", "image"}),
        ({"text_model": relu}, {}, {"text"}),
        ({"audio_model": relu}, {"fps": 60}, {"audio", "image"}),
        ({}, {"precision": "bf16"}, {"audio", "text", "image"}),
    ]
    for overrides, options, expected in cases:
        other = load(resolve("tiny", **overrides), **{"fps": 30, **options})
        assert changed(tiny, other) == expected, (overrides, options)


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        (speech, "HIDDEN_ALGORITHM", {"audio"}),
        (speech, "LOGITS_ALGORITHM", {"text"}),
        (speech, "CHUNK_OVERLAP_STEPS", {"audio", "text"}),
        (lips, "ALGORITHM", {"image"}),
        (mel, "ALGORITHM", {"image"}),
    ],
)
def test_another_algorithm_is_another_feature(
    tiny: FrozenModels, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, expected: set[str]
) -> None:
    monkeypatch.setattr(module, name, 50 if name.endswith("STEPS") else getattr(module, name) + "x")
    assert changed(tiny, load(TINY, fps=30)) == expected


def test_other_preprocessing_is_another_feature(tiny: FrozenModels, monkeypatch: pytest.MonkeyPatch) -> None:
    from pmm.precompute import media

    monkeypatch.setitem(media.PREPROCESSING, "quality", "VHQ")
    assert changed(tiny, load(TINY, fps=30)) == {"audio", "text", "image"}


def test_lower_precision_runs_and_stays_close(tiny: FrozenModels, sound: np.ndarray) -> None:
    half = load(TINY, fps=30, precision="bf16")
    [exact], [rough] = tiny.speech([sound]), half.speech([sound])
    assert isinstance(exact, Speech)
    assert isinstance(rough, Speech)
    error = np.abs(exact.audio.astype(float) - rough.audio).mean()
    assert 0 < error < 0.1
    apart = np.abs(tiny.lips(sound, 5).astype(int) - half.lips(sound, 5).astype(int)).mean()
    assert 0 < apart < 10


def test_convolutions_that_two_models_share_run_once(sound: np.ndarray, tmp_path: Path) -> None:
    """Another text model on the same convolutions, as fine-tuning leaves them: the features of both alone."""
    checkpoint = standin.speech_checkpoint()
    tuned = {k: v if "feature_extractor" in k else 0.9 * v for k, v in checkpoint.tensors.items()}
    text = save_speech(tmp_path / "text")
    save_file(tuned, text / "model.safetensors")
    pair = load(replace(TINY, text_model=str(text)), text_topk=5)
    extractor = pair._text.text.model.wav2vec2.feature_extractor
    calls: list[int] = []
    extractor.inner.register_forward_hook(lambda *_: calls.append(1))
    waves = [sound, sound[:9000]]
    both = pair.speech(waves)
    assert len(calls) == 1
    audio_alone, text_alone = (
        speech.SpeechModel(one, layer, True, True, torch.device("cpu"), text_topk=5)
        for one, layer in ((checkpoint, 2), (speech.read_checkpoint(str(text)), None))
    )
    for ours, one, other in zip(
        both, speech.features(audio_alone, waves, 10**6), speech.features(text_alone, waves, 10**6)
    ):
        assert isinstance(ours, Speech)
        np.testing.assert_array_equal(ours.audio, one[0])
        np.testing.assert_array_equal(ours.text, other[1])
