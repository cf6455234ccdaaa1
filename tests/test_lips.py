"""The lip-frame generator: the published network, its mel, the reference face, and T frames exactly."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pmm import BadInput, NotFound, PmmError
from pmm.precompute import face, lips, mel, standin
from pmm.precompute.weights import read_tensors, weights_digest
from pmm.store import clock

DATA = Path(__file__).parent / "data"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    """Inputs and outputs of the published code at 30 fps, on weights that :func:`filled` makes."""
    with np.load(DATA / "wav2lip_vectors.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def published_shapes() -> dict[str, list[int]]:
    return json.loads((DATA / "wav2lip_tensors.json").read_text())


def filled(name: str, shape: list[int]) -> torch.Tensor:
    """The weights the reference outputs were made with."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1, dtype=torch.int64)
    if name.endswith("running_var") or (name.endswith(".weight") and len(shape) != 4):
        return torch.from_numpy(rng.uniform(0.5, 1.5, shape).astype(np.float32))
    deviation = (1 / np.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.1
    return torch.from_numpy(rng.normal(0, deviation, shape).astype(np.float32))


@pytest.fixture(scope="module")
def tiny() -> lips.LipGenerator:
    network = lips.network_for(standin.lips_tensors(), "the stand-in")
    return lips.LipGenerator(network, face.drawn_face(), 30, CPU)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """Three seconds that the stand-in was not calibrated on."""
    return standin.made_speech(seconds=3, seed=7)


# --- the published network --------------------------------------------------------------------------------


def test_the_network_has_the_published_tensors_in_order() -> None:
    with torch.device("meta"):
        network, small = lips.Wav2Lip(), lips.Wav2Lip(standin.LIPS_BASE)
    ours = [(name, list(tensor.shape)) for name, tensor in network.state_dict().items()]
    assert ours == list(published_shapes().items())
    assert len(ours) == 352
    assert sum(p.numel() for p in network.parameters()) == 36_298_035
    assert sum(p.numel() for p in small.parameters()) == 571_449


def test_mel_is_the_published_mel(vectors: dict[str, np.ndarray]) -> None:
    wave = vectors["pcm"].astype(np.float32) / 32768
    ours = mel.mel_spectrogram(wave)
    assert ours.dtype == np.float32
    assert np.abs(ours - vectors["mel"]).max() < 1e-5


def test_mel_in_blocks_is_mel_at_once(
    vectors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    wave = vectors["pcm"].astype(np.float32) / 32768
    whole = mel.mel_spectrogram(wave)
    monkeypatch.setattr(mel, "_BLOCK_COLUMNS", 50)
    np.testing.assert_allclose(mel.mel_spectrogram(wave), whole, atol=1e-6)


@pytest.mark.parametrize("fps", [25, 30, 60])
def test_windows_start_where_the_published_script_starts_them(
    vectors: dict[str, np.ndarray], fps: int
) -> None:
    published = vectors[f"chunk_starts_{fps}"]
    ours = clock.mel_window_starts(2 * fps, vectors["mel"].shape[1], fps, lips.WINDOW_COLUMNS)
    assert ours[: len(published)].tolist() == published.tolist()
    assert set(ours[len(published) :].tolist()) <= {published[-1]}  # the frames the script loses


@pytest.fixture(scope="module")
def published() -> lips.Wav2Lip:
    tensors = {name: filled(name, shape) for name, shape in published_shapes().items()}
    return lips.network_for(tensors, "the reference weights")


def test_frames_are_the_published_frames(vectors: dict[str, np.ndarray], published: lips.Wav2Lip) -> None:
    network = published
    wave = vectors["pcm"].astype(np.float32) / 32768
    windows = lips.mel_windows(wave, 60, 30)[vectors["selected_frames"]]
    inputs = torch.from_numpy(windows)[:, None], lips.face_input(vectors["face_bgr"][:, :, ::-1])
    expected = vectors["frames_bgr"]
    with torch.inference_mode():
        ours = network(*inputs).numpy()
        folded = lips.folded(network)(*inputs).numpy()
    assert np.abs(ours - expected).max() < 1e-5
    assert np.abs(folded - expected).max() < 1e-5
    assert expected.std(axis=0).max() > 1e-4  # a still picture would not pass


def test_the_fast_path_paints_the_published_frames(
    vectors: dict[str, np.ndarray], published: lips.Wav2Lip
) -> None:
    """1e-5 in float32; in bfloat16 half a grey level, and the frames' own movement is twice that."""
    wave = vectors["pcm"].astype(np.float32) / 32768
    chosen = vectors["selected_frames"][:3]
    windows = torch.from_numpy(lips.mel_windows(wave, 60, 30)[chosen])[:, None]
    expected = vectors["frames_bgr"][:3]
    pixels = np.rint(expected[:, ::-1].transpose(0, 2, 3, 1) * 255).astype(int)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.5 / 255)):
        fast = lips.LipGenerator(published, vectors["face_bgr"][:, :, ::-1], 30, CPU, dtype)
        with torch.inference_mode():
            image = fast.painter(fast.encoder(windows)).numpy()
        assert np.abs(image - expected).max() < bound
        fast.micro_batch = 3
        with torch.inference_mode():
            latents = fast.encoder(windows)[:, :, 0, 0].numpy()
        assert np.abs(fast.paint(latents) - pixels).max() <= 1
        assert np.abs(fast.paint(latents.astype(np.float16)) - pixels).max() <= 1
    assert np.ptp(expected, axis=0).max() > 1 / 255


# --- checkpoints of strangers -----------------------------------------------------------------------------


@pytest.fixture
def small_tensors() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = lips.Wav2Lip(base=1).state_dict()
    return {name: filled(name, list(tensor.shape)) for name, tensor in shapes.items()}


def test_an_official_pickle_and_safetensors_are_the_same_weights(
    tmp_path: Path, small_tensors: dict[str, torch.Tensor]
) -> None:
    official = {"state_dict": {f"module.{k}": v for k, v in small_tensors.items()}, "optimizer": {"lr": 1e-4}}
    torch.save(official, tmp_path / "wav2lip_gan.pth")
    save_file(small_tensors, tmp_path / "lips.safetensors")
    found = [read_tensors(tmp_path / name) for name in ("wav2lip_gan.pth", "lips.safetensors")]
    assert weights_digest(found[0], {}) == weights_digest(found[1], {}) == weights_digest(small_tensors, {})
    network = lips.network_for(found[0], "wav2lip_gan.pth")
    assert network.face_encoder_blocks[0][0].conv_block[0].out_channels == 1  # the width is the tensors'
    assert not network.training


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    for name, save in (("new.pth", torch.save), ("old.pth", _plain_pickle)):
        save({"state_dict": Trap()}, tmp_path / name)
        with pytest.raises(BadInput) as caught:
            read_tensors(tmp_path / name)
        assert str(caught.value) == (
            f"{tmp_path / name} holds more than tensors; pmm does not run code from checkpoints: "
            "save its tensors as .safetensors, or get the file from its authors"
        )
    assert not (tmp_path / "sprung").exists()


def _plain_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def test_damaged_and_foreign_checkpoints_are_named(
    tmp_path: Path, small_tensors: dict[str, torch.Tensor]
) -> None:
    torch.save(small_tensors, tmp_path / "whole.pth")
    save_file(small_tensors, tmp_path / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:5000])
        with pytest.raises(BadInput, match=r"cut\.(pth|safetensors) is not a whole") as caught:
            read_tensors(cut)
        assert "\n" not in str(caught.value)
    with pytest.raises(NotFound, match=r"no weights at .*missing\.pth; expected a"):
        read_tensors(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(BadInput):
        read_tensors(tmp_path / "text.pth")


def test_tensors_that_do_not_fit_are_named(small_tensors: dict[str, torch.Tensor]) -> None:
    first, *others = small_tensors
    without = {name: tensor for name, tensor in small_tensors.items() if not name.startswith("output_block")}
    cases = [
        ({name: small_tensors[name] for name in others}, f"x.pth lacks {first}; it is no Wav2Lip generator"),
        (
            without,
            "x.pth lacks output_block.0.conv_block.0.weight, output_block.0.conv_block.0.bias, "
            "output_block.0.conv_block.1.weight and 6 more; it is a checkpoint of another network",
        ),
        (
            {**small_tensors, "syncnet.weight": torch.zeros(1)},
            "x.pth holds tensors the network has no place for: syncnet.weight",
        ),
        (
            {**small_tensors, "output_block.1.bias": torch.zeros(4)},
            "x.pth has tensors of other shapes: output_block.1.bias [4] (expected [3])",
        ),
    ]
    for tensors, message in cases:
        with pytest.raises(BadInput) as caught:
            lips.network_for(tensors, "x.pth")
        assert str(caught.value) == message


# --- frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "count"), [(480, 1), (3200, 6), (16_000, 30), (24_001, 45)])
def test_exactly_as_many_frames_as_asked(
    tiny: lips.LipGenerator, speech: np.ndarray, samples: int, count: int
) -> None:
    assert clock.frames(samples, clock.SPEECH_RATE, 30) == count
    frames = tiny.frames(speech[:samples], count)
    assert frames.shape == (count, 96, 96, 3)
    assert frames.dtype == np.uint8


def test_short_audio_is_followed_by_silence(speech: np.ndarray) -> None:
    short = speech[:1600]
    silent = np.concatenate([short, np.zeros(1400, np.float32)])
    assert len(silent) == clock.mel_samples(lips.WINDOW_COLUMNS)
    np.testing.assert_array_equal(lips.mel_windows(short, 3, 30), lips.mel_windows(silent, 3, 30))


def test_a_frame_has_the_same_bits_alone_and_among_others(
    tiny: lips.LipGenerator, speech: np.ndarray
) -> None:
    count = 2 * tiny.micro_batch + 5
    many = tiny.frames(speech, count)
    np.testing.assert_array_equal(many, tiny.frames(speech, count))
    np.testing.assert_array_equal(many[:7], tiny.frames(speech, 7))


def test_latents_are_painted_to_the_very_frames(tiny: lips.LipGenerator, speech: np.ndarray) -> None:
    count = tiny.micro_batch + 5
    frames, latents = tiny.frames(speech, count), tiny.latents(speech, count)
    assert (latents.shape, latents.dtype) == ((count, 32 * standin.LIPS_BASE), np.float32)
    np.testing.assert_array_equal(tiny.paint(latents), frames)
    np.testing.assert_array_equal(tiny.paint(latents[:7]), frames[:7])
    apart = np.abs(tiny.paint(latents.astype(np.float16)).astype(int) - frames)
    assert apart.max() <= 1
    with pytest.raises(BadInput) as caught:
        tiny.paint(latents[:, 1:])
    assert str(caught.value) == "latents of shape (21, 63); this lip generator paints (T, 64)"


def test_latents_do_not_depend_on_the_face_or_the_precision(
    tiny: lips.LipGenerator, speech: np.ndarray
) -> None:
    network = lips.network_for(standin.lips_tensors(), "the stand-in")
    other = lips.LipGenerator(network, face.drawn_face()[::-1], 30, CPU, torch.bfloat16)
    np.testing.assert_array_equal(other.latents(speech, 20), tiny.latents(speech, 20))
    assert (other.frames(speech, 20) != tiny.frames(speech, 20)).any()


def test_the_painter_is_the_network_for_every_face(speech: np.ndarray) -> None:
    """Untrained filters amplify rounding, hence 1e-4; see the published frames for 1e-5."""
    network = lips.network_for(standin.lips_tensors(), "the stand-in")
    windows = torch.from_numpy(lips.mel_windows(speech, 90, 30)[::10])[:, None]
    for image in (face.drawn_face(), np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)):
        generator = lips.LipGenerator(network, image, 30, CPU)
        with torch.inference_mode():
            expected = network(windows, lips.face_input(image).expand(len(windows), -1, -1, -1))
            fast = generator.painter(generator.encoder(windows))
        assert (fast - expected).abs().max() < 1e-4
        assert expected.std(dim=0).max() > 0.05


def test_out_of_memory_halves_the_micro_batch(speech: np.ndarray) -> None:
    network = lips.network_for(standin.lips_tensors(), "the stand-in")
    generator = lips.LipGenerator(network, face.drawn_face(), 30, CPU)
    frames = generator.frames(speech, 20)
    room = 5

    def limited(painter: object, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    generator.painter.register_forward_pre_hook(limited)
    assert np.abs(generator.frames(speech, 20).astype(int) - frames).max() <= 1
    assert generator.micro_batch == 4
    room = 0
    with pytest.raises(PmmError) as caught:
        generator.frames(speech, 20)
    assert str(caught.value) == "not enough memory for one lip frame at a time (cpu)"


def test_frames_that_are_no_numbers_are_refused(speech: np.ndarray) -> None:
    tensors = standin.lips_tensors()
    tensors["output_block.1.bias"] = torch.tensor([0.0, torch.nan, 0.0])
    generator = lips.LipGenerator(lips.network_for(tensors, "x"), face.drawn_face(), 30, CPU)
    with pytest.raises(BadInput) as caught:
        generator.frames(speech, 3)
    assert str(caught.value) == "the lip generator gives values that are not numbers"


def test_frames_are_rgb(speech: np.ndarray) -> None:
    """The network's first output channel is blue; ours is the last."""
    tensors = standin.lips_tensors()
    tensors["output_block.1.weight"] = torch.zeros(3, 2 * standin.LIPS_BASE, 1, 1)
    tensors["output_block.1.bias"] = torch.tensor([8.0, 0.0, -8.0])
    generator = lips.LipGenerator(lips.network_for(tensors, "x"), face.drawn_face(), 30, CPU)
    frame = generator.frames(speech, 1)[0]
    assert frame.reshape(-1, 3).min(axis=0).tolist() == frame.reshape(-1, 3).max(axis=0).tolist()
    assert frame[0, 0].tolist() == [0, 128, 255]  # 127.5 rounds to even


def test_the_stand_ins_mouth_moves(tiny: lips.LipGenerator, speech: np.ndarray) -> None:
    frames = tiny.frames(speech, 90).astype(np.float64)
    mouth = frames[:, 56:80, 24:72]
    assert mouth.std(axis=0).mean() > 2  # grey levels over time
    assert np.abs(np.diff(mouth, axis=0)).mean() > 0.5


def test_the_stored_statistics_are_those_of_calibration() -> None:
    again = standin.calibrate()
    stored = standin.lips_tensors()
    assert again.keys() == {name for name in stored if name.endswith(("running_mean", "running_var"))}
    for name, values in again.items():
        np.testing.assert_allclose(stored[name].numpy(), values, rtol=1e-3, atol=1e-4, err_msg=name)


# --- the face ---------------------------------------------------------------------------------------------


def test_the_drawn_face_is_the_same_everywhere() -> None:
    drawn = face.drawn_face()
    assert (drawn.shape, drawn.dtype) == ((96, 96, 3), np.uint8)
    assert face.face_digest(drawn) == "53ffd610c726a06b36bd37fa12d8cf3878afac9872293e94bee463b588b2a767"
    lip_rows = drawn[62:82, 36:60].astype(int)
    assert (lip_rows[:, :, 0] - lip_rows[:, :, 1]).max() > 80  # a red mouth in the lower half


def test_a_picture_is_turned_upright_cropped_and_scaled(tmp_path: Path) -> None:
    upright = Image.new("RGB", (300, 200), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 300, 100))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    found = face.read_face(tmp_path / "turned.png")
    assert (found.shape, found.dtype) == ((96, 96, 3), np.uint8)
    assert found[10, 48].tolist() == [255, 0, 0]
    assert found[85, 48].tolist() == [0, 0, 255]


def test_pictures_of_the_same_pixels_are_the_same_face(tmp_path: Path) -> None:
    for name in ("a.png", "b.bmp"):
        Image.fromarray(face.drawn_face()).save(tmp_path / name)
    found = [face.read_face(tmp_path / name) for name in ("a.png", "b.bmp")]
    assert {face.face_digest(image) for image in found} == {face.face_digest(face.drawn_face())}


def test_pictures_that_will_not_do(tmp_path: Path) -> None:
    Image.new("RGB", (40, 300)).save(tmp_path / "narrow.png")
    (tmp_path / "text.png").write_text("no picture")
    cases = {
        "narrow.png": "is 40x300 pixels, expected sides of 64 to 16384",
        "text.png": "is no picture that can be read (PNG or JPEG, say)",
    }
    for name, message in cases.items():
        with pytest.raises(BadInput) as caught:
            face.read_face(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name} {message}"
    with pytest.raises(NotFound, match="no face picture at"):
        face.read_face(tmp_path / "missing.png")
