"""What `pmm precompute` costs beside the plain loop that researchers write, and beside the bare models.

    python bench/precompute.py [--device cuda] [--json] [--quick] [--folder DIR] [--only PART]

Three ways over the same made clips, which take turns within each round:

plain    one clip at a time: soundfile, soxr, transformers' models in fp32, the published Wav2Lip forward
         (the face encoded for every frame, BatchNorm as it is), numpy.save
ours     `precompute` from dataset folder to published fragments, models loaded already
bare     the forward passes of our models on batches that lie ready: nothing read, converted or written

The models have the paper's sizes (two wav2vec2 of 24 layers x 1024, Wav2Lip at full width) and random
weights: speed does not depend on them. Figures are seconds of audio per second, and ratios within a round
(median and quartiles over rounds).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported

import numpy as np
import torch

from pmm.precompute import face, lips, models, speech, standin
from pmm.precompute.datasets import livelink
from pmm.store import clock

PAPER_CONFIG = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "vocab_size": 3503,
}
SMALL_CONFIG = PAPER_CONFIG | {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 60,
    "conv_dim": [64] * 7,
}
FPS = 30
PLAIN_BATCH = 128  # frames: the published script's default


@dataclass(frozen=True)
class Size:
    config: dict[str, object]
    lips_base: int
    clips: int
    rounds: int
    worker_rounds: int
    long_minutes: tuple[int, ...]


FULL = Size(PAPER_CONFIG, 16, 3, 4, 2, (2, 8, 32))
QUICK = Size(SMALL_CONFIG, 2, 3, 2, 1, (1, 2))
CUDA = Size(PAPER_CONFIG, 16, 200, 5, 3, (2, 8, 32))


# -- what is measured on


def checkpoints(folder: Path, size: Size) -> models.ModelSet:
    """A model set of folders as users have them, with random weights."""
    from safetensors.torch import save_file
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    for name in ("audio", "text"):
        model = Wav2Vec2ForCTC(Wav2Vec2Config(**size.config))
        model.save_pretrained(folder / name)
        processor = {"do_normalize": True, "sampling_rate": clock.SPEECH_RATE, "feature_size": 1}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(processor))
        vocabulary = {f"t{number}": number for number in range(int(size.config["vocab_size"]))}
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary))
    save_file(lips.Wav2Lip(size.lips_base).state_dict(), folder / "lips.safetensors")
    parts = {part: str(folder / part) for part in ("audio", "text")}
    return models.ModelSet("bench", parts["audio"], parts["text"], lips=str(folder / "lips.safetensors"))


def corpus(folder: Path, seconds: Sequence[float], skip: int = 0) -> float:
    """Captures of these lengths in the Live Link Face layout; returns the seconds of audio in all.

    ``skip`` seconds of the made speech come before them: other captures than without.
    """
    sound = standin.made_speech(int(sum(seconds)) + 1 + skip)
    start = clock.samples(skip, clock.SPEECH_RATE)
    for number, length in enumerate(seconds):
        take = folder / f"subject{number % 4}" / f"take_{number}"
        take.mkdir(parents=True)
        count = clock.samples(length, clock.SPEECH_RATE)
        name = f"take_{number}_subject{number % 4}"
        livelink.write(take / f"{name}.csv", np.full((round(length * 60), 52), 0.3))
        with wave.open(str(take / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, clock.SPEECH_RATE, count, "NONE", ""))
            file.writeframes((sound[start : start + count] * 32767).astype("<i2").tobytes())
        start += count
    return sum(seconds)


def lengths(clips: int) -> list[float]:
    """Seconds of each clip, as sentences are: 2 to 6."""
    return np.random.default_rng(0).uniform(2, 6, clips).round(2).tolist()


# -- the three ways


class Plain:
    """The loop that researchers write: every clip alone, the published networks as they are."""

    def __init__(self, chosen: models.ModelSet, device: torch.device):
        from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Model

        self.device = device
        self.extractor = Wav2Vec2FeatureExtractor.from_pretrained(chosen.audio_model)
        self.audio = Wav2Vec2Model.from_pretrained(chosen.audio_model).eval().to(device)
        self.text = Wav2Vec2ForCTC.from_pretrained(chosen.text_model).eval().to(device)
        tensors = models._lip_tensors(chosen)[0]
        self.lips = lips.network_for(tensors, "the bench's lips").to(device)
        self.face = lips.face_input(models._face(chosen)).to(device)

    @torch.inference_mode()
    def run(self, files: Sequence[Path], out: Path) -> None:
        import soundfile
        import soxr

        for file in files:
            sound, rate = soundfile.read(file, dtype="float32", always_2d=True)
            heard = soxr.resample(sound.mean(axis=1), rate, clock.SPEECH_RATE)
            values = self.extractor(heard, sampling_rate=clock.SPEECH_RATE, return_tensors="pt").input_values
            values = values.to(self.device)
            np.save(out / f"{file.stem}.audio.npy", self.audio(values).last_hidden_state[0].cpu().numpy())
            np.save(out / f"{file.stem}.text.npy", self.text(values).logits[0].cpu().numpy())
            np.save(out / f"{file.stem}.image.npy", self.paint(heard))

    def paint(self, heard: np.ndarray) -> np.ndarray:
        frames = clock.frames(len(heard), clock.SPEECH_RATE, FPS)
        windows = torch.from_numpy(lips.mel_windows(heard, frames, FPS))[:, None]
        painted = []
        for first in range(0, frames, PLAIN_BATCH):
            part = windows[first : first + PLAIN_BATCH].to(self.device)
            faces = self.face.repeat(len(part), 1, 1, 1)
            image = self.lips(part, faces)
            painted.append((image.permute(0, 2, 3, 1).cpu().numpy() * 255).astype(np.uint8))
        return np.concatenate(painted)


class Bare:
    """Our models on ready batches: what is left when everything but the forward passes is gone."""

    def __init__(self, frozen: models.FrozenModels, files: Sequence[Path]):
        waves = [_heard(file) for file in files]
        self.models = [frozen._audio] + ([] if frozen._text is frozen._audio else [frozen._text])
        limit = clock.samples(frozen.max_batch_seconds, clock.SPEECH_RATE)
        self.batches = [(model, batch) for model in self.models for batch in _ready(model, waves, limit)]
        self.generator = frozen._generator
        self.windows = list(self._windows(waves))

    def _windows(self, waves: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        made = self.generator
        counts = [clock.frames(len(heard), clock.SPEECH_RATE, FPS) for heard in waves]
        every = [lips.mel_windows(heard, count, FPS) for heard, count in zip(waves, counts)]
        for part in torch.from_numpy(np.concatenate(every))[:, None].split(made.micro_batch):
            filled = torch.cat([part, part[-1:].expand(made.micro_batch - len(part), -1, -1, -1)])
            yield filled.to(made.device)

    @torch.inference_mode()
    def run(self) -> None:
        for model, (waves, mask) in self.batches:
            with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
                model._run(waves, mask)
        list(self.generator._workers.map(self._paint, self.windows))
        if self.generator.device.type == "cuda":
            torch.cuda.synchronize()

    def _paint(self, windows: torch.Tensor) -> None:
        with torch.inference_mode():
            self.generator.painter(self.generator.encoder(windows))


def _heard(file: Path) -> np.ndarray:
    with wave.open(str(file)) as opened:
        return np.frombuffer(opened.readframes(-1), "<i2").astype(np.float32) / 32768


def _ready(
    model: speech.SpeechModel, waves: Sequence[np.ndarray], limit: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Padded batches (B, n) and their masks, as ``speech.features`` makes them."""
    ready = [speech.normalised(one) for one in waves]
    left = [span for number, one in enumerate(ready) for span in speech.spans(number, len(one))]
    for spans in speech.batches(left, model.can_pad, limit):
        parts = [torch.from_numpy(ready[one.clip][one.start : one.end]) for one in spans]
        counts = torch.tensor([len(part) for part in parts])
        batch = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(model.device)
        mask = (torch.arange(batch.shape[1]) < counts[:, None]).long().to(model.device)
        yield batch, mask if counts.min() < counts.max() else None


class Ours:
    """`pmm precompute` from the folder to the fragments. Each run has a store of its own."""

    def __init__(self, frozen: models.FrozenModels, data: Path, folder: Path):
        self.frozen, self.data, self.folder, self.turn = frozen, data, folder, 0

    def run(self) -> None:
        from pmm.precompute import run
        from pmm.precompute.datasets import find
        from pmm.precompute.plan import make_plan
        from pmm.precompute.survey import survey
        from pmm.store.catalog import Store

        self.turn += 1
        store = Store.create(self.folder / f"store{self.turn}")
        seen = survey([(self.data, find(self.data))])
        specs = {**self.frozen.specs, "target": livelink.target_spec(FPS)}
        plan = make_plan(seen.sources, specs, store.has)
        done = run.execute(plan, store, self.frozen)
        assert done.clips == len(plan.work), done.failures
        shutil.rmtree(self.folder / f"store{self.turn}")


# -- rounds


@dataclass(frozen=True)
class Job:
    """One contender in one precision."""

    name: str
    run: Callable[[], None]


def rounds(
    count: int, jobs: Sequence[Job], now: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each job in each round: all run in each, in another order; once before to warm up."""
    seconds: dict[str, list[float]] = {job.name: [] for job in jobs}
    for job in jobs:
        job.run()
    for turn in range(count):
        first = turn % len(jobs)
        for job in (*jobs[first:], *jobs[:first]):
            start = now()
            job.run()
            seconds[job.name].append(now() - start)
            print(f"round {turn + 1}: {job.name} {seconds[job.name][-1]:.1f} s", file=sys.stderr)
    return seconds


def told(seconds: dict[str, list[float]], audio: float) -> dict[str, object]:
    """Seconds of audio per second of each, and what of ours compares to what, round by round."""
    speed = {name: round(audio / statistics.median(times), 3) for name, times in seconds.items()}
    ratios = {}
    for name, times in seconds.items():
        kind, _, precision = name.partition(" ")
        if kind == "ours":
            for other in ("plain fp32", f"bare {precision}"):
                if other in seconds:
                    ratios[f"{name} / {other}"] = spread(b / a for a, b in zip(times, seconds[other]))
    return {"audio_seconds_per_second": speed, "ratios": ratios}


def spread(values: Iterable[float]) -> dict[str, float]:
    found = sorted(values)
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def speed(root: Path, size: Size, device: str) -> dict[str, object]:
    chosen = checkpoints(root, size)
    audio = corpus(root / "data", lengths(size.clips))
    files = sorted((root / "data").rglob("*.wav"))
    plain = Plain(chosen, torch.device("cuda" if device == "cuda" else "cpu"))
    (root / "plain").mkdir()
    jobs = [Job("plain fp32", partial(plain.run, files, root / "plain"))]
    for precision in ("fp32", "bf16"):
        frozen = models.load(chosen, fps=FPS, device=device, precision=precision)
        (root / precision).mkdir()
        jobs.append(Job(f"ours {precision}", Ours(frozen, root / "data", root / precision).run))
        jobs.append(Job(f"bare {precision}", Bare(frozen, files).run))
    result = {"clips": len(files), "audio_s": round(audio, 1), **told(rounds(size.rounds, jobs), audio)}
    if device == "cuda":
        result["gpu"] = gpu(jobs[-2], jobs[-1])
    return result


def gpu(ours: Job, bare: Job) -> dict[str, object]:
    """How busy the card is while ours runs, and what part of its own bf16 matrix rate the models reach."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        bare.run()
    busy: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            busy.append(torch.cuda.utilization())

    thread = threading.Thread(target=watch)
    torch.cuda.synchronize()
    thread.start()
    start = time.perf_counter()
    ours.run()
    seconds = time.perf_counter() - start
    over.set()
    thread.join()
    rate = counter.get_total_flops() / seconds
    return {
        "card": torch.cuda.get_device_name(),
        "utilisation_percent": round(statistics.mean(busy), 1),
        "tflops": round(rate / 1e12, 1),
        "of_measured_bf16_matrix_rate": round(rate / matrix_rate(), 3),
    }


def matrix_rate(side: int = 8192) -> float:
    """Operations a second of large bf16 matrix products on this card."""
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * side**3 / (time.perf_counter() - start)


# -- workers, memory, a second run


_LONG = """
import json, resource, sys, time
from pathlib import Path
from pmm.precompute import models
from pmm.precompute.run import precompute
def most():
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["VmHWM"].split()[0]) / 1024
data, store = Path(sys.argv[1]), Path(sys.argv[2])
plan, done = precompute([data], store, models.resolve("tiny"), models.Options(device="cpu", lips=sys.argv[3]))
print(json.dumps({"clips": done.clips, "failures": len(done.failures), "peak_mb": most()}))
"""


def memory(root: Path, size: Size) -> dict[str, object]:
    """Peak memory of a process that computes one recording of so many minutes, built-in models."""
    found = {}
    for minutes in size.long_minutes:
        data = root / f"long{minutes}"
        corpus(data, [60.0 * minutes])
        for kind in ("frames", "latent"):
            command = [sys.executable, "-P", "-c", _LONG, data, root / f"store{minutes}{kind}", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak = json.loads(done.stdout.splitlines()[-1])
            assert (peak["clips"], peak["failures"]) == (1, 0), done.stdout
            found[f"{minutes} min, {kind}"] = round(peak["peak_mb"])
    return {"peak_mb": found}


def workers(root: Path, size: Size) -> dict[str, object]:
    """The same clips by one and by two workers of one thread each, their models loaded before."""
    chosen = checkpoints(root, size)
    written = {name: getattr(chosen, name) for name in ("audio_model", "text_model", "lips")}
    (root / "bench.toml").write_text("".join(f'{name} = "{path}"\n' for name, path in written.items()))
    corpus(root / "warm", [2.0] * 4)
    audio = corpus(root / "data", [2.5] * 8, skip=60)
    seconds: dict[str, list[float]] = {}
    for turn in range(size.worker_rounds):
        for count in (1, 2):
            with cluster(root / f"cluster{turn}{count}", count) as address:
                store = root / f"store{turn}{count}"
                for data in ("warm", "data"):
                    elapsed = clustered(root / data, store, root / "bench.toml", address)
                seconds.setdefault(f"{count} x 1 thread", []).append(elapsed)
            shutil.rmtree(store)
    one, two = seconds.values()
    speeds = {name: round(audio / statistics.median(times), 3) for name, times in seconds.items()}
    return {"audio_seconds_per_second": speeds, "two / one": spread(a / b for a, b in zip(one, two))}


@contextmanager
def cluster(folder: Path, count: int) -> Iterator[str]:
    """A Dask scheduler and so many workers, processes as people start them; yields the address."""
    folder.mkdir()
    place = ["--scheduler-file", str(folder / "scheduler.json"), "--no-dashboard"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log, ExitStack() as stack:

        def start(what: str, *options: str) -> None:
            command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *place, *options]
            started = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
            stack.callback(started.wait)
            stack.callback(started.terminate)

        start("scheduler", "--host", "127.0.0.1", "--port", "0")
        for _ in range(count):
            start("worker", "--nthreads", "1", "--no-nanny")
        while not (folder / "scheduler.json").exists():
            time.sleep(0.1)
        time.sleep(5)  # the workers join
        yield json.loads((folder / "scheduler.json").read_text())["address"]


def clustered(data: Path, store: Path, chosen: Path, address: str) -> float:
    """Seconds from the first task's submission to the last receipt."""
    command = [Path(sys.executable).parent / "pmm", "precompute", data, "--store", store, "--models", chosen]
    options = ["--scheduler", address, "--device", "cpu", "--batch-seconds", "5", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["outcome"]["pace"]["elapsed"])


def again(root: Path, size: Size) -> dict[str, object]:
    """The first and the second run of the command over one dataset, built-in models, all included."""
    corpus(root / "data", lengths(40))
    command = [Path(sys.executable).parent / "pmm", "precompute", root / "data", "--store", root / "store"]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(round(time.perf_counter() - start, 2))
    assert "nothing to compute" in done.stdout, done.stdout
    return {"first_s": seconds[0], "second_s": seconds[1]}


def painting(root: Path, size: Size) -> dict[str, object]:
    """Lip frames by the published forward and by ours in fp32 and bf16: processor time of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = lips.Wav2Lip(size.lips_base).requires_grad_(False).eval()
    drawn = face.drawn_face()
    ours = {
        name: lips.LipGenerator(network, drawn, FPS, torch.device("cpu"), dtype)
        for name, dtype in (("ours fp32", torch.float32), ("ours bf16", torch.bfloat16))
    }
    frames = 4 * ours["ours fp32"].micro_batch
    windows = torch.from_numpy(lips.mel_windows(standin.made_speech(3), frames, FPS))
    faces = lips.face_input(drawn).repeat(frames, 1, 1, 1)

    def paint(generator: lips.LipGenerator) -> None:
        for part in windows.split(generator.micro_batch):
            generator._decode(part)

    jobs = [Job("published", lambda: network(windows[:, None], faces))]
    jobs += [Job(name, partial(paint, generator)) for name, generator in ours.items()]
    with torch.inference_mode():
        seconds = rounds(3 * size.rounds, jobs, now=time.thread_time)
    torch.set_num_threads(threads)
    milliseconds = {
        name: round(1000 * statistics.median(times) / frames, 2) for name, times in seconds.items()
    }
    base = seconds.pop("published")
    faster = {name: spread(a / b for a, b in zip(base, times)) for name, times in seconds.items()}
    return {"ms_per_frame": milliseconds, "times_as_fast_as_published": faster}


BASE_CONFIG = {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "vocab_size": 32,
}


def seams(root: Path, size: Size) -> dict[str, object]:
    """A minute of sound in overlapping windows against the whole of it, relative to the values' rms."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    tensors = dict(Wav2Vec2ForCTC(Wav2Vec2Config(**BASE_CONFIG)).state_dict())
    config = {**BASE_CONFIG, "model_type": "wav2vec2"}
    base = speech.Checkpoint("base", config, {"do_normalize": True}, None, tensors)
    heard = speech.normalised(standin.made_speech(60, seed=9))
    found = {}
    for name, checkpoint in {"tiny": standin.speech_checkpoint(), "base, random weights": base}.items():
        model = speech.SpeechModel(checkpoint, None, True, True, torch.device("cpu"))
        model.do_normalize = False  # it is
        ((whole, _),) = model.forward([heard])
        ((parts, _),) = speech.features(model, [heard], clock.samples(60, clock.SPEECH_RATE))
        error = np.abs(parts.astype(np.float64) - whole) / np.sqrt(np.square(whole.astype(np.float64)).mean())
        near = np.zeros(len(error), bool)
        for seam in range(speech.CHUNK_KEPT_STEPS, len(error), speech.CHUNK_KEPT_STEPS):
            near[seam - 50 : seam + 50] = True
        found[name] = {
            "largest": round(float(error.max()), 4),
            "largest_within_1_s_of_a_seam": round(float(error[near].max()), 4),
            "rms": round(float(np.sqrt(np.square(error).mean())), 4),
        }
    return found


PARTS = {
    "speed": speed,
    "painting": painting,
    "seams": seams,
    "workers": workers,
    "memory": memory,
    "again": again,
}


def show(part: str, found: object) -> None:
    print(f"\n{part}: {json.dumps(found, indent=1)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a few seconds: whether it works, no figures")
    parser.add_argument("--folder", type=Path, help="where to write: about 4 GB; a new folder in it is used")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be given again")
    asked = parser.parse_args()
    size = QUICK if asked.quick else CUDA if asked.device == "cuda" else FULL
    result: dict[str, object] = {"cores": os.cpu_count(), "torch": torch.__version__}
    for part in asked.only or PARTS:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            extra = (asked.device,) if part == "speed" else ()
            result[part] = PARTS[part](Path(folder), size, *extra)
        if not asked.json:
            show(part, result[part])
    if asked.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
