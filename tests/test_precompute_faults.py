"""What a dataset, a machine or a model does to a run: one line each, the others unharmed, all recorded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pmm import PmmError
from pmm.precompute import models as frozen_models
from pmm.precompute.models import FrozenModels, resolve
from pmm.precompute.run import ClipDone, Limits, Outcome, Planned, precompute
from pmm.store import clock
from pmm.store.care import verify
from pmm.store.catalog import Failure, Store
from pmm.store.medium import LocalMedium, MediumError

from .conftest import RATE, babble, write_take

Run = Callable[..., Any]
VICTIM = "bob/take_2/take_2_bob"  # the longest of the captures: 2.3 s


def rows(store: Store) -> dict[str, int]:
    return {spec.modality: len(store.rows(name)) for name, spec in store.specs.items()}


def survived(store_path: Path, failures: tuple[Failure, ...], clips: int) -> list[Failure]:
    """So many clips are whole in a clean store, and just these failures recorded; returns them.

    The face track of a clip that the models cannot do is as good as any.
    """
    store = Store.open(store_path)
    assert verify(store).clean
    found = rows(store)
    assert found.pop("target") >= clips
    assert set(found.values()) == {clips}
    recorded = store.open_failures()
    assert {(one.key, one.reason) for one in recorded} == {(one.key, one.reason) for one in failures}
    assert all("\n" not in one.reason and one.attempt == 1 for one in recorded)
    assert [entry.key for entry in store.medium.list("tmp")] == []  # no claim is left
    return recorded


# ---------------------------------------------------------------- the models


class Wrapped:
    """The frozen models of set tiny, with something done to what one of them says."""

    def __init__(
        self, real: FrozenModels, speech: Callable[..., Any] | None, lips: Callable[..., Any] | None
    ):
        self.real = real
        self.specs, self.description, self.label = real.specs, real.description, real.label
        self.speech = (lambda waves: speech(real, waves)) if speech else real.speech
        self.lips = (lambda wave, count: lips(real, wave, count)) if lips else real.lips


@pytest.fixture
def wrap(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has every run load wrapped models: ``wrap(speech=..., lips=...)``."""
    load = frozen_models.load

    def use(speech: Callable[..., Any] | None = None, lips: Callable[..., Any] | None = None) -> None:
        monkeypatch.setattr(
            frozen_models, "load", lambda *args, **options: Wrapped(load(*args, **options), speech, lips)
        )

    return use


def is_victim(wave: np.ndarray) -> bool:
    return len(wave) == clock.resampled(round(2.3 * RATE), RATE)


def run(captures: Path, store: Path, **limits: Any) -> Outcome:
    _, outcome = precompute([captures], store, resolve("tiny"), limits=Limits(**limits))
    assert outcome is not None
    return outcome


def of_the_victim(outcome: Outcome, store: Path) -> str:
    """The reason of the only failure, the victim's, where the three others are whole."""
    (failure,) = outcome.failures
    assert (failure.source, failure.stage) == (VICTIM, "features")
    survived(store, outcome.failures, 3)
    return failure.reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_set_one_clip_aside(
    wrap: Callable[..., None], captures: Path, tmp_path: Path, value: float
) -> None:
    def speech(real: FrozenModels, waves: list[np.ndarray]) -> list[Any]:
        said = real.speech(waves)
        for wave, one in zip(waves, said):
            if is_victim(wave):
                one.audio[7, 3] = value
        return said

    wrap(speech=speech)
    reason = of_the_victim(run(captures, tmp_path / "store"), tmp_path / "store")
    assert "NaN or infinity in its audio" in reason


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_a_network_whose_logits_overflow_float16_or_are_nan_for_one_clip(
    wrap: Callable[..., None], captures: Path, tmp_path: Path, value: float
) -> None:
    """In the network itself, and in a batch with others: what it computes for one of them is too large."""
    steps = clock.steps(clock.resampled(round(2.3 * RATE), RATE))

    def spoil(_: Any, inputs: Any, logits: Any) -> Any:
        if logits.shape[1] != steps:
            return logits
        spoilt = logits.clone()
        spoilt[-1 if logits.shape[0] == 1 else 0, steps - 1, 5] = value  # the longest comes first
        return spoilt

    def speech(real: FrozenModels, waves: list[np.ndarray]) -> list[Any]:
        hook = real._text.model.lm_head.register_forward_hook(spoil)
        try:
            return real.speech(waves)
        finally:
            hook.remove()

    wrap(speech=speech)
    reason = of_the_victim(run(captures, tmp_path / "store"), tmp_path / "store")
    assert "float16" in reason


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("shape mismatch\nin layer 3"), "RuntimeError: shape mismatch in layer 3"),
        (MemoryError(), "not enough memory for 2 s of audio"),
        (PmmError("the clip is odd"), "the clip is odd"),
    ],
)
def test_a_batch_that_fails_is_tried_clip_by_clip(
    wrap: Callable[..., None], captures: Path, tmp_path: Path, error: Exception, said: str
) -> None:
    calls: list[int] = []

    def speech(real: FrozenModels, waves: list[np.ndarray]) -> list[Any]:
        calls.append(len(waves))
        if any(map(is_victim, waves)):
            raise error
        return real.speech(waves)

    wrap(speech=speech)
    reason = of_the_victim(run(captures, tmp_path / "store"), tmp_path / "store")
    assert reason.startswith(said)
    assert calls[-5:] == [4, 1, 1, 1, 1]


def test_a_lip_generator_that_fails_on_one_clip(
    wrap: Callable[..., None], captures: Path, tmp_path: Path
) -> None:
    def lips(real: FrozenModels, wave: np.ndarray, count: int) -> np.ndarray:
        if is_victim(wave):
            raise RuntimeError("no such kernel")
        return real.lips(wave, count)

    wrap(lips=lips)
    reason = of_the_victim(run(captures, tmp_path / "store"), tmp_path / "store")
    assert reason == "RuntimeError: no such kernel"


def test_a_lost_gpu_blames_no_clip(wrap: Callable[..., None], captures: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def speech(real: FrozenModels, waves: list[np.ndarray]) -> list[Any]:
        calls.append(len(waves))
        if len(calls) > 4:  # the first two learn the speed
            raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ...")
        return real.speech(waves)

    wrap(speech=speech)
    with pytest.raises(PmmError, match=r"^the GPU failed \(CUDA error: .*run the same command again$"):
        run(captures, tmp_path / "store", batch_seconds=1)
    assert survived(tmp_path / "store", (), 2) == []


# ---------------------------------------------------------------- the dataset


def broken_take(root: Path, number: int, audio: Callable[[Path], object], suffix: str = ".wav") -> None:
    """A take whose sound is made by ``audio`` at the path it gets."""
    csv = write_take(root, "eve", f"bad_{number}", 1.0, 50 + number)
    csv.with_suffix(".wav").unlink()
    audio(csv.with_suffix(suffix))


def wav_header(announced: int) -> bytes:
    """A WAV of 16-bit mono at 48 kHz whose header announces so many bytes."""
    about = b"fmt " + (16).to_bytes(4, "little") + b"\1\0\1\0" + (48_000).to_bytes(4, "little")
    about += (96_000).to_bytes(4, "little") + b"\2\0\x10\0"
    riff = min(announced + 36, 0xFFFFFFFF).to_bytes(4, "little")
    return b"RIFF" + riff + b"WAVE" + about + b"data" + announced.to_bytes(4, "little")


def long_flac(path: Path) -> None:
    """A FLAC of a second whose header claims 2^31 samples."""
    soundfile.write(path, babble(1.0, 3), RATE)
    data = bytearray(path.read_bytes())
    data[21] = data[21] & 0xF0  # the upper 4 of the 36 bits that count the samples, after bits per sample
    data[22:26] = (1 << 31).to_bytes(4, "big")
    path.write_bytes(data)


def test_a_dataset_full_of_traps(pmm: Run, captures: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(50_000)
    traps: list[tuple[Callable[[Path], object], str, str]] = [
        (lambda p: p.write_bytes(noise), ".wav", "not audio"),
        (lambda p: p.write_bytes(wav_header(40_000) + noise[:40_000]), ".wav", ""),  # noise is audio
        (lambda p: p.write_bytes(b"fLaC" + noise), ".flac", "not audio"),
        (lambda p: p.write_bytes(wav_header(2**32 - 2) + noise), ".wav", "truncated"),
        (long_flac, ".flac", "truncated"),
        (lambda p: os.mkfifo(p), ".wav", "no file but a pipe"),
        (lambda p: p.symlink_to("/dev/zero"), ".wav", "no file but a pipe, device"),
        (lambda p: p.symlink_to(p), ".wav", "symbolic links"),
        (lambda p: p.symlink_to(p.with_name("gone.wav")), ".wav", "no such audio file"),
        (lambda p: p.write_bytes(b""), ".mov", "empty (0 bytes)"),
        (lambda p: p.mkdir(), ".wav", "without audio"),
        (lambda p: soundfile.write(p, np.stack([babble(1.0, 9)] * 8, 1), RATE), ".wav", ""),  # 8 channels
    ]
    for number, (make, suffix, _) in enumerate(traps):
        broken_take(captures, number, make, suffix)
    (captures / "eve" / "loop").symlink_to(captures, target_is_directory=True)
    os.mkfifo(write_take(captures, "fay", "take_0", 1.0, 90).with_suffix(".txt"))
    csv = write_take(captures, "fay", "take_1", 1.0, 91)
    csv.unlink()
    os.mkfifo(csv)
    # what a header claims, the length of noise, decides the range: 20,000 samples are 0.42 s of a 1 s take
    done = pmm("precompute", captures, "--store", tmp_path / "store", "--json")
    assert done.code == 3
    assert "Traceback" not in done.err
    said = {"take_0_fay": "no file but a pipe", "take_1_fay": "no file but a pipe"}
    said |= {f"bad_{n}_eve": text for n, (_, _, text) in enumerate(traps) if text}
    said["bad_1_eve"] = "face track"  # its sound is shorter than its face track
    lines = [line for line in done.err.splitlines() if line.startswith("pmm: failed: ")]
    for name, text in said.items():
        (line,) = [line for line in lines if name in line]
        assert text in line
    assert len(lines) == len(said)
    store = Store.open(tmp_path / "store")
    assert set(rows(store).values()) == {5}  # the captures and the one of 8 channels
    assert verify(store).clean
    recorded = {one.source.rpartition("/")[2] for one in store.open_failures()}
    assert recorded == set(said)


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder that other users may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_folder_nobody_may_enter(captures: Path, anyones: Path) -> None:
    """As somebody else, where root runs the tests: root may enter any folder."""
    shutil.copytree(captures, anyones / "captures")
    closed = anyones / "captures" / "bob"
    command = [sys.executable, "-P", "-c", AS_SOMEBODY, anyones / "captures", anyones / "somebody"]
    (anyones / "somebody").mkdir()
    if os.geteuid() == 0:
        os.chown(anyones / "somebody", 54321, -1)
    closed.chmod(0o000)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        closed.chmod(0o755)
    if "cannot import" in done.stderr:
        pytest.skip("another user may not read this installation")
    assert done.returncode == 0, done.stderr
    failures, clips = json.loads(done.stdout)
    assert clips == 2
    (reason,) = failures
    assert reason == f"{closed}: cannot be listed (Permission denied)"


AS_SOMEBODY = """
import json, os, sys
from pathlib import Path
os.environ["XDG_CACHE_HOME"] = sys.argv[2]
os.environ["HOME"] = sys.argv[2]
try:
    from pmm.precompute import run
    from pmm.precompute.models import resolve
    ours = Path(sys.argv[2]).parent / "ours"
    run.precompute([Path(sys.argv[1]) / "ada"], ours, resolve("tiny"))  # all of Python that it takes is read
except PermissionError:
    sys.exit("cannot import")
if os.geteuid() == 0:
    os.setgid(54321)
    os.setuid(54321)
store = Path(sys.argv[2]) / "store"
_, outcome = run.precompute([Path(sys.argv[1])], store, resolve("tiny"))
print(json.dumps([[one.reason for one in outcome.failures], outcome.clips]))
"""


def test_files_that_go_or_grow_after_the_plan(captures: Path, tmp_path: Path) -> None:
    wavs = sorted(captures.rglob("*.wav"))  # ada 0, ada 1, bob 2, bob 3

    def meddle(event: object) -> None:
        if isinstance(event, Planned):
            wavs[0].unlink()
            wavs[1].with_suffix(".csv").unlink()
            sound, rate = soundfile.read(wavs[2], dtype="int16")
            soundfile.write(wavs[2], np.concatenate([sound[5:], sound]), rate)  # grown, and not the same
            with open(wavs[3], "ab") as file:
                file.write(b"LIST\x10\0\0\0 and more to come")  # grown: the sound is still what it was

    _, outcome = precompute([captures], tmp_path / "store", resolve("tiny"), on_event=meddle)
    assert outcome is not None
    reasons = {one.source.rpartition("/")[2]: (one.stage, one.reason) for one in outcome.failures}
    assert reasons.keys() == {"take_0_ada", "take_1_ada", "take_2_bob"}
    assert reasons["take_0_ada"] == ("decode", f"{wavs[0]}: no such audio file")
    assert reasons["take_1_ada"] == ("target", f"{wavs[1].with_suffix('.csv')}: no such face track")
    assert reasons["take_2_bob"][0] == "decode"
    assert "changed since it was probed" in reasons["take_2_bob"][1]
    store = Store.open(tmp_path / "store")
    found = rows(store)
    assert (found["audio"], found["text"], found["image"], found["target"]) == (1, 1, 1, 3)
    assert len(store.open_failures()) == 3


# ---------------------------------------------------------------- the disk


FULL = (
    r"^cannot .*: No space left on device; what was published before is kept: free some space for .* "
    r"and run the same command again to go on$"
)


def test_a_disk_that_fills_stops_the_run_and_a_rerun_completes(
    captures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At many a point: no space left from the n-th operation of the disk on."""
    kept: set[int] = set()
    for room in (40, 110, 230):
        store, done = tmp_path / f"store-{room}", 0

        def before(operation: str, key: str, room: int = room) -> None:
            nonlocal done
            done += operation in ("open", "mkdir", "write")
            if done > room and operation in ("open", "mkdir", "write"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        Store.create(store)
        monkeypatch.setattr(LocalMedium.__init__, "__defaults__", (before, None))
        with pytest.raises(MediumError, match=FULL):
            run(captures, store, batch_seconds=1, fragment_bytes=1)
        monkeypatch.undo()
        found = Store.open(store)
        assert verify(found).clean
        kept.add(sum(rows(found).values()))
        run(captures, store)
        assert set(rows(Store.open(store)).values()) == {4}
        assert verify(Store.open(store)).clean
    assert len(kept) > 2, kept
    assert max(kept) < 16


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here (root and CAP_SYS_ADMIN are needed)")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_really_full(captures: Path, small_disk: Path) -> None:
    store, filler = small_disk / "store", small_disk / "filler"

    def fill(event: object) -> None:
        if isinstance(event, ClipDone) and not filler.exists():
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(bytes(max(0, free - 1_300_000)))

    with pytest.raises(MediumError, match=FULL):
        precompute([captures], store, resolve("tiny"), limits=Limits(1.0, fragment_bytes=1), on_event=fill)
    assert verify(Store.open(store)).clean
    assert 0 < sum(rows(Store.open(store)).values()) < 16
    filler.unlink()
    run(captures, store)
    assert set(rows(Store.open(store)).values()) == {4}


def test_a_disk_too_small_for_the_plan_is_refused_with_both_numbers(
    pmm: Run, captures: Path, small_disk: Path
) -> None:
    for number in range(4, 10):
        write_take(captures, "cyd", f"take_{number}", 2.0, number)
    for more in ((), ("--dry-run",)):
        done = pmm("precompute", captures, "--store", small_disk / "store", *more)
        assert done.code == 1
        assert done.complaint.startswith(
            f"15.5 MB are to be written and the disk of {small_disk / 'store'} has 8.4 MB free; "
        )
        assert not (small_disk / "store").exists()
    done = pmm("precompute", captures, "--store", small_disk / "store", "--only", "audio,targets")
    assert done.code == 0
    assert rows(Store.open(small_disk / "store")) == {"audio": 10, "target": 10}


def test_a_store_that_goes_away_stops_the_run(captures: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"

    def lose(event: object) -> None:
        if isinstance(event, ClipDone) and store.exists():
            store.rename(tmp_path / "moved")
            store.write_text("in the way")

    with pytest.raises(PmmError, match=r"^[^\n]+$"):
        precompute([captures], store, resolve("tiny"), limits=Limits(1.0), on_event=lose)
    assert verify(Store.open(tmp_path / "moved")).clean


# ---------------------------------------------------------------- tried again, or not


def test_clips_that_failed_are_tried_again_or_left_out(pmm: Run, captures: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    wav = captures / "bob" / "take_3" / "take_3_bob.wav"
    csv = captures / "ada" / "take_0" / "take_0_ada.csv"
    whole_wav, whole_csv = wav.read_bytes(), csv.read_bytes()
    wav.write_bytes(b"")
    csv.write_bytes(whole_csv[:-300])

    def report(*options: object) -> tuple[int, dict[str, Any]]:
        done = pmm("precompute", captures, "--store", store, "--json", *options)
        return done.code, json.loads(done.out)

    assert report("--limit", 1)[0] == 3  # the first is ada's
    code, told = report("--skip-failed")
    assert code == 0  # the two that failed are not tried: nothing else does
    assert told["plan"]["clips_left_out"] == 1
    assert told["outcome"]["clips"] == 2
    csv.write_bytes(whole_csv)
    wav.write_bytes(whole_wav)
    write_take(captures, "cyd", "take_9", 1.0, 9)
    code, told = report("--retry-failed")
    assert (code, told["outcome"]["clips"], told["plan"]["clips_left_out"]) == (0, 2, 1)
    assert Store.open(store).open_failures() == []
    assert rows(Store.open(store)) == {"audio": 4, "text": 4, "image": 4, "target": 4}
