"""Smaller features in place of the full ones: lip latents for frames, the largest logits for all.

From the frozen models through a store to fitted heads and curves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pmm import BadInput
from pmm.animate.speak import animate_file
from pmm.precompute import standin, topk
from pmm.precompute.models import MODEL_SETS, FrozenModels, Options, Speech, load, options_of, resolve
from pmm.precompute.run import precompute
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec
from pmm.train import data
from pmm.train.evaluate import evaluate
from pmm.train.options import FitOptions
from pmm.train.run import fit, load_run

TINY = MODEL_SETS["tiny"]
SMALL = Options(text_topk=8, lips="latent")
VOCABULARY, LATENT = 54, 32 * standin.LIPS_BASE


@pytest.fixture(scope="module")
def full() -> FrozenModels:
    return load(TINY, fps=30)


@pytest.fixture(scope="module")
def small() -> FrozenModels:
    return load(TINY, SMALL)


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    return standin.made_speech(seconds=2, seed=3)


# --- the largest logits -----------------------------------------------------------------------------------


def plainly(logits: np.ndarray, k: int) -> np.ndarray:
    """(V,) float16 to (2, k + 1), by sorting (value down, column up)."""
    kept = sorted(sorted(range(len(logits)), key=lambda c: (-float(logits[c]), c))[:k])
    rest = np.mean([float(logits[c]) for c in range(len(logits)) if c not in kept])
    return np.array([[*map(float, logits[kept]), rest], [*kept, -1]])


def test_the_largest_are_those_of_sorting() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(0, 20, (40, 17)).astype(np.float16)
    rows[:10] = draw.integers(-2, 2, (10, 17))  # equals, of which the lower column goes first
    rows[10] = 0
    rows[10, ::2] = -0.0
    for k in (1, 5, 16):
        found = topk.largest(torch.from_numpy(rows), k).numpy()
        assert (found.shape, found.dtype) == ((40, 2, k + 1), np.float32)
        np.testing.assert_allclose(found, [plainly(row, k) for row in rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_no_number_shows_in_its_step_only(bad: float) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float16)
    rows[1, 4] = bad
    finite = np.isfinite(topk.largest(torch.from_numpy(rows), 3).numpy()).all(axis=(1, 2))
    assert finite.tolist() == [True, False, True]


def test_expanding_puts_the_rest_at_their_mean() -> None:
    rows = np.random.default_rng(0).normal(0, 20, (30, 11)).astype(np.float16)
    back = data.expanded(topk.largest(torch.from_numpy(rows), 4).numpy(), 11)
    assert (back.shape, back.dtype) == ((30, 11), np.float32)
    np.testing.assert_allclose(back.sum(axis=1), rows.sum(axis=1, dtype=np.float64), rtol=1e-5, atol=1e-4)
    for row, known in zip(back, rows):
        largest = np.argsort(-known.astype(float), kind="stable")[:4]
        np.testing.assert_array_equal(row[largest], known[largest].astype(np.float32))
        assert len(set(np.delete(row, largest).tolist())) == 1
    with pytest.raises(BadInput, match="top-k logits name column 10 of a vocabulary of 10"):
        data.expanded(topk.largest(torch.from_numpy(rows), 4).numpy(), 10)


def test_a_window_of_the_largest_reads_what_the_clip_reads() -> None:
    rows = np.random.default_rng(0).normal(0, 5, (99, 11)).astype(np.float16)
    kept = topk.largest(torch.from_numpy(rows), 10).numpy()  # all but the least: nothing is lost
    whole = data.on_frames(kept, 60, 30, size=11)
    np.testing.assert_allclose(whole, data.on_frames(rows, 60, 30), atol=1e-5)
    np.testing.assert_array_equal(data.on_frames(kept, 13, 30, first_frame=20, size=11), whole[20:33])


# --- what the models give ---------------------------------------------------------------------------------


def test_the_small_forms_are_those_of_the_full(
    full: FrozenModels, small: FrozenModels, sound: np.ndarray
) -> None:
    [whole], [less] = full.speech([sound]), small.speech([sound])
    assert isinstance(whole, Speech)
    assert isinstance(less, Speech)
    np.testing.assert_array_equal(less.audio, whole.audio)
    np.testing.assert_array_equal(less.text, topk.largest(torch.from_numpy(whole.text), 8).numpy())
    frames, latents = full.lips(sound, 60), small.lips(sound, 60)
    assert np.abs(small.paint(latents).astype(int) - frames).max() <= 1
    exact = load(TINY, lips="latent32").lips(sound, 60)
    np.testing.assert_array_equal(full.paint(exact), frames)
    np.testing.assert_array_equal(exact.astype(np.float16), latents)


def test_they_are_other_features_and_say_so(full: FrozenModels, small: FrozenModels) -> None:
    text, image = small.specs["text"], small.specs["image"]
    assert small.specs["audio"] == full.specs["audio"]
    assert (text.algorithm, text.dtype, text.shape) == ("wav2vec2-logits-topk/1", "float32", (2, 9))
    assert text.dimension_names == ("step", "part", "token")
    assert (text.settings["vocabulary_size"], text.settings["kept"]) == (VOCABULARY, 8)
    assert (image.algorithm, image.dtype, image.shape) == ("wav2lip-latent/1", "float16", (LATENT,))
    assert image.dimension_names == ("frame", "feature")
    assert full.specs["image"].dimension_names == ("frame", "y", "x", "rgb")
    assert data.row_size(text) == data.row_size(full.specs["text"]) == VOCABULARY
    for spec in (text, image):
        assert FeatureSpec.from_bytes(spec.to_bytes(), "here") == spec


def test_latents_are_the_same_for_every_face_and_precision(small: FrozenModels, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (120, 120), (200, 160, 140)).save(tmp_path / "face.png")
    other = load(resolve("tiny", face=str(tmp_path / "face.png")), SMALL, precision="bf16")
    assert other.specs["image"].id == small.specs["image"].id
    assert other.specs["text"].id != small.specs["text"].id


@pytest.mark.parametrize(
    "asked", [Options(30), SMALL, Options(25, precision="bf16", lips="latent32"), Options(60, text_topk=3)]
)
def test_specs_tell_what_was_asked_for(asked: Options) -> None:
    assert options_of(load(TINY, asked).specs, asked.fps) == asked


def test_options_that_cannot_be() -> None:
    cases: dict[str, Callable[[], object]] = {
        "text_topk 0: at least 1 logit of each step must be kept": lambda: Options(text_topk=0),
        "lips 'pictures' is none of frames, latent, latent32": lambda: Options(lips="pictures"),
        "text_topk 54: builtin has 54 logits, keep fewer": lambda: load(TINY, text_topk=54),
    }
    for message, ask in cases.items():
        with pytest.raises(BadInput) as caught:
            ask()
        assert str(caught.value) == message


# --- through the store to curves --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smaller(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``store`` of the small features of the same captures, and a ``run`` on it."""
    root = tmp_path_factory.mktemp("smaller")
    _, outcome = precompute([fitted / "captures"], root / "store", TINY, SMALL)
    assert outcome is not None
    assert (outcome.clips, outcome.failures) == (10, ())
    fit(Store.open(root / "store"), root / "run", FitOptions(epochs=2, batch_size=3, device="cpu"))
    return root


def test_fit_and_eval_read_them(smaller: Path) -> None:
    run = load_run(smaller / "run", "cpu")
    assert run.heads.config.feature_sizes == {"image": LATENT, "text": VOCABULARY, "audio": 192}
    assert run.heads.config.reads_latents
    scores = evaluate(run, Store.open(smaller / "store"))
    assert (scores.clips, scores.skipped) == (2, ())
    assert np.isfinite(scores.scores["heads"]["lve"])


def test_every_part_of_the_latent_encoder_learns(smaller: Path) -> None:
    run = load_run(smaller / "run", "cpu")
    image = run.heads.image
    assert image is not None
    assert image.mean.abs().max() > 0
    assert 0 < image.scale < 10
    features = {
        "audio": torch.randn(1, 30, 192),
        "text": torch.randn(1, 30, VOCABULARY),
        "image": torch.rand(1, 30, LATENT),
    }
    run.heads.train()
    output = run.heads(features, torch.tensor([0]), torch.ones(1, 30, dtype=torch.bool))
    output.prediction.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in image.parameters())


def test_a_clip_is_animated_as_its_cached_features_are(smaller: Path, fitted: Path, tmp_path: Path) -> None:
    """From sound (with models asked for the same small forms) and from the store: the same curves."""
    from pmm.train.run import predict

    run, store = load_run(smaller / "run", "cpu"), Store.open(smaller / "store")
    take = next(take for take in store.takes() if take.source and "take_9" in take.source)
    native = {name: store.read(run.specs[name].id, take.clip.id) for name in ("audio", "text", "image")}
    cached = predict(run, native)
    done = animate_file(smaller / "run", fitted / "captures/eve/take_9/take_9_eve.wav", tmp_path / "a.csv")
    assert done.frames == len(cached)
    corpus = data.load(store, run.specs, {"eve": [take]}, run.names, 30)
    whole = data.gather(corpus, torch.tensor([0]))
    with torch.no_grad():
        encoded = run.heads.encode(whole.features, whole.valid)
        straight = run.heads.decode(encoded, run.style_vector("mean")[None], whole.valid)[0].numpy()
    np.testing.assert_allclose(cached[: len(straight)], straight, atol=1e-4)


def test_frames_are_refused_by_heads_fitted_on_latents(smaller: Path) -> None:
    from pmm.train.run import predict

    native = {
        "audio": np.zeros((49, 192), np.float16),
        "text": np.zeros((49, VOCABULARY), np.float16),
        "image": np.zeros((30, 96, 96, 3), np.uint8),
    }
    with pytest.raises(
        BadInput, match=r"image features of shape \(30, 96, 96, 3\); these heads read \(n, \*\(64"
    ):
        predict(load_run(smaller / "run", "cpu"), native)
