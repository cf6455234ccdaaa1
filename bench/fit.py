"""What an epoch of `pmm fit` costs beside training end to end, and beside heads fed with no loader at all.

    python bench/fit.py [--device cuda] [--json] [--quick] [--folder DIR] [--preset PRESET]

Made features of the paper's sizes (audio 1024, text 3503, lip frames 96 x 96) of clips of 2 to 6 s; heads of
the presets. Per second of speech:

cache        an epoch of `pmm fit`, features in memory (on the GPU with --device cuda)
end to end   the same heads and steps, but the frozen models run in every step, as the published trainers do:
             the published Wav2Lip as it is (the face encoded for every frame), a wav2vec2 of 24 layers of
             1024, no backward through frozen parts. One speech forward gives audio and text: the paper has
             two transformers, so this flatters end to end. A few clips, extrapolated by the second of speech
no loader    the same steps on batches that lie ready, no loader at all: the limit of any loader
mmap         an epoch whose features stay in the store (`--cache mmap`), the page cache warm

All but end to end take turns within each round; figures are medians over rounds, with quartiles of ratios
within a round. Validation is left out of all of them. Random weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pmm.store import clock
from pmm.store.catalog import Store
from pmm.store.clip import Clip, Take
from pmm.store.feature import FeatureSpec
from pmm.store.rig import ARKIT52
from pmm.train import data, loop
from pmm.train.loop import StepDone
from pmm.train.options import FitOptions
from pmm.train.run import Job, prepare

FPS = 30
PAPER_HOURS = 9.2  # of speech in its training split
PAPER_EPOCHS = 80
PARTS = ("data", "forward", "backward", "optimiser")
SPEECH = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "vocab_size": 3503,
}


@dataclass(frozen=True)
class Size:
    """``clips`` in the store, ``rounds`` of the contenders, ``frozen_clips`` that run end to end."""

    audio: int
    text: int
    clips: int
    rounds: int
    frozen_clips: int
    layers: int
    lips_base: int


FULL = Size(1024, 3503, 60, 5, 4, 24, 16)
CUDA = Size(1024, 3503, 400, 5, 16, 24, 16)
QUICK = Size(32, 40, 10, 2, 2, 2, 2)


# -- what is measured on


def make_store(path: Path, size: Size) -> Store:
    """Noise of the right shapes: five subjects, of which three train."""
    specs = (
        FeatureSpec("audio", "bench/1", "float16", (size.audio,), None, {}),
        FeatureSpec("text", "bench/1", "float16", (size.text,), None, {}),
        FeatureSpec("image", "bench/1", "uint8", (96, 96, 3), FPS, {}),
        FeatureSpec("target", "bench/1", "float32", (52,), FPS, {"names": list(ARKIT52)}),
    )
    store, rng = Store.create(path), np.random.default_rng(0)
    takes = []
    for n, seconds in enumerate(rng.uniform(2, 6, size.clips)):
        samples = clock.samples(seconds, clock.SPEECH_RATE)
        clip = Clip(f"{n:04x}".ljust(64, "0"), clock.SPEECH_RATE, 1, 0, samples)
        takes.append(Take(clip, clip.id[::-1], f"person{n % 5}", source=f"take{n}.wav"))
    for spec in specs:
        store.publish(spec, [(spec.row_id(t.clip.id, t.target), _noise(rng, spec, t)) for t in takes], {})
    store.publish_takes("bench", takes, {"host": "", "root": "", "layout": "bench"})
    return store


def _noise(rng: np.random.Generator, spec: FeatureSpec, take: Take) -> np.ndarray:
    samples = take.clip.samples
    length = clock.steps(samples) if spec.fps is None else clock.frames(samples, clock.SPEECH_RATE, FPS)
    if spec.dtype == "uint8":
        return rng.integers(0, 256, (length, *spec.shape), dtype=np.uint8)
    return rng.random((length, *spec.shape), dtype=np.float32).astype(spec.dtype)


# -- the ways


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: wall seconds, those of its parts added up, frames that were trained on."""

    seconds: float
    parts: dict[str, float]
    frames: int

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.seconds


class Fitting:
    """`pmm fit` on one cache; each call is the next epoch, its validation left out."""

    def __init__(self, store: Store, folder: Path, preset: str, cache: str, device: str):
        options = FitOptions(preset=preset, cache=cache, device=device, epochs=1000, patience=0)
        (self.one,) = prepare(store, [Job(folder, options)])
        self.schedule = options.schedule
        self.optimiser = torch.optim.Adam(self.one.run.heads.parameters(), lr=self.schedule.learning_rate)
        self.state = loop.State()

    def epoch(self) -> Epoch:
        began, parts, frames = time.perf_counter(), dict.fromkeys(PARTS, 0.0), 0
        for event in self._events():
            parts = {name: parts[name] + event.seconds[name] for name in PARTS}
            frames += event.frames
        return Epoch(time.perf_counter() - began, parts, frames)

    def _events(self) -> Iterator[StepDone]:
        """The steps of one epoch: what would be validated next is never asked for."""
        run = self.one.run
        number = {name: n for n, name in enumerate(run.styles)}
        styles = torch.tensor([number[who] for who in self.one.corpus.subjects])
        given = (run.heads, self.optimiser, self.one.corpus, styles, self.one.validation, self.schedule)
        for event in loop.train(*given, run.options.weights, seed=0, state=self.state):
            assert isinstance(event, StepDone)
            yield event
            if event.step == event.steps:
                self.state = loop.State(self.state.epoch + 1)
                return


class NoLoader:
    """The same steps on batches that were gathered before."""

    def __init__(self, fitting: Fitting):
        self.fitting, one = fitting, fitting.one
        number = {name: n for n, name in enumerate(one.run.styles)}
        styles = torch.tensor([number[who] for who in one.corpus.subjects])
        batches = list(loop._epoch(one.corpus, fitting.schedule, 0, loop.State(), FPS))
        self.batches = [(batch, styles[batch.clips].to(one.run.device)) for batch in batches]

    def epoch(self) -> Epoch:
        heads, weights = self.fitting.one.run.heads, self.fitting.one.run.options.weights
        began, parts, frames = time.perf_counter(), dict.fromkeys(PARTS, 0.0), 0
        heads.train()
        for step, (batch, style) in enumerate(self.batches):
            laps = loop.Laps(batch.target.device)
            value = loop._step(heads, self.fitting.optimiser, batch, style, weights, "sum", step, laps)
            loop._finite(value, 0, step)
            parts = {name: parts[name] + laps.seconds().get(name, 0.0) for name in PARTS}
            frames += int(batch.valid.sum())
        return Epoch(time.perf_counter() - began, parts, frames)


class EndToEnd:
    """The frozen models in every step, then the same step of the same heads."""

    def __init__(self, fitting: Fitting, size: Size):
        from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

        from pmm.precompute import face, lips

        self.fitting, self.device = fitting, fitting.one.run.device
        small = {"hidden_size": size.audio, "vocab_size": size.text, "num_hidden_layers": size.layers}
        shrunk = {"num_attention_heads": 4, "intermediate_size": 64, "conv_dim": [32] * 7}
        config = Wav2Vec2Config(**SPEECH | small | (shrunk if size.layers < 24 else {}))
        self.speech = Wav2Vec2ForCTC(config).eval().to(self.device)
        self.lips = lips.Wav2Lip(size.lips_base).eval().to(self.device)
        self.face = lips.face_input(face.drawn_face()).to(self.device)
        self.windows_of = lips.mel_windows
        self.rng = np.random.default_rng(0)

    @torch.no_grad()
    def features(self, batch: data.Batch) -> dict[str, Tensor]:
        """What the frozen models say of waves as long as the clips of ``batch``, one clip at a time."""
        found: dict[str, list[Tensor]] = {"audio": [], "text": [], "image": []}
        for frames in batch.valid.sum(1).tolist():
            wave = self.rng.normal(0, 0.1, clock.frames(frames, FPS, clock.SPEECH_RATE)).astype(np.float32)
            sound = torch.from_numpy(wave)[None].to(self.device)
            hidden = self.speech.wav2vec2(sound).last_hidden_state
            for name, native in (("audio", hidden), ("text", self.speech.lm_head(hidden))):
                found[name].append(self._on_frames(native, frames))
            windows = torch.from_numpy(self.windows_of(wave, frames, FPS))[:, None].to(self.device)
            painted = self.lips(windows, self.face.repeat(frames, 1, 1, 1)).permute(0, 2, 3, 1)
            rows = self.fitting.one.run.heads.config.image_rows
            found["image"].append((painted[:, slice(*rows)] * 255).to(torch.uint8))
        pad = torch.nn.utils.rnn.pad_sequence
        return {name: pad(parts, batch_first=True) for name, parts in found.items()}

    def _on_frames(self, native: Tensor, frames: int) -> Tensor:
        """As the reference code does: one interpolation over the clip, on the device."""
        steps = F.layer_norm(native, native.shape[2:]).transpose(1, 2)
        return F.interpolate(steps, size=frames, mode="linear", align_corners=True)[0].T

    def seconds_per_second(self, clips: int) -> float:
        """Wall seconds of training steps per second of speech, over so many clips, after one to warm up."""
        one, took, speech = self.fitting.one, 0.0, 0.0
        number = {name: n for n, name in enumerate(one.run.styles)}
        styles = torch.tensor([number[who] for who in one.corpus.subjects])
        size = min(self.fitting.schedule.batch_size, clips)
        parts = torch.arange(min(clips, len(one.corpus.takes))).split(size)
        one.run.heads.train()
        for step, chosen in enumerate((parts[0], *parts)):
            batch = data.gather(one.corpus, chosen)
            began = time.perf_counter()
            made = replace(batch, features=self.features(batch))
            laps = loop.Laps(self.device)
            value = loop._step(
                *(one.run.heads, self.fitting.optimiser, made, styles[chosen].to(self.device)),
                *(one.run.options.weights, "sum", step, laps),
            )
            loop._finite(value, 0, step)
            if step:
                took += time.perf_counter() - began
                speech += clock.seconds(int(batch.valid.sum()), FPS)
        return took / speech


# -- rounds


def measure(root: Path, store: Store, size: Size, preset: str, device: str) -> dict[str, object]:
    before = held()
    mapped = Fitting(store, root / f"{preset}-mmap", preset, "mmap", device)
    mapped.epoch()
    after_mapped = held()
    mapped.epoch()
    flat = held()
    place = "device" if device == "cuda" else "ram"
    ours = Fitting(store, root / preset, preset, place, device)
    contenders: dict[str, Callable[[], Epoch]] = {
        "cache": ours.epoch,
        "no loader": NoLoader(ours).epoch,
        "mmap": mapped.epoch,
    }
    epochs = rounds(size.rounds, contenders)
    speech = clock.seconds(ours.one.corpus.frames, FPS)
    frozen = EndToEnd(ours, size).seconds_per_second(size.frozen_clips)
    cached = statistics.median(one.seconds for one in epochs["cache"]) / speech
    result: dict[str, object] = {
        "training_speech_s": round(speech, 1),
        "frames_per_second": {name: round(_speed(found)) for name, found in epochs.items()},
        "seconds_per_second_of_speech": {"cache": round(cached, 5), "end to end": round(frozen, 3)},
        "end_to_end_over_cache": round(frozen / cached, 1),
        "cache_over_no_loader": ratio(epochs["cache"], epochs["no loader"]),
        "mmap_over_cache": ratio(epochs["mmap"], epochs["cache"]),
        "step_ms": {name: _split(found) for name, found in epochs.items()},
        "features_mb": round(sum(x.nbytes for x in ours.one.corpus.features.values()) / 1e6),
        "private_mb": {"before": before, "mmap, epoch 1": after_mapped, "mmap, epoch 2": flat, "all": held()},
    }
    if device == "cuda":
        result["gpu"] = gpu(ours, epochs["cache"])
    return result


def rounds(count: int, contenders: dict[str, Callable[[], Epoch]]) -> dict[str, list[Epoch]]:
    """Epochs of each contender: all run in each round, in another order; once before to warm up."""
    epochs: dict[str, list[Epoch]] = {name: [] for name in contenders}
    names = list(contenders)
    for name in names:
        contenders[name]()
    for turn in range(count):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            epochs[name].append(contenders[name]())
    return epochs


def _speed(epochs: Iterable[Epoch]) -> float:
    return statistics.median(one.frames_per_second for one in epochs)


def ratio(ours: list[Epoch], others: list[Epoch]) -> dict[str, float]:
    """Frames a second of ours over theirs, round by round."""
    found = sorted(a.frames_per_second / b.frames_per_second for a, b in zip(ours, others))
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def _split(epochs: list[Epoch]) -> dict[str, float]:
    """Milliseconds per second of speech of each part of a step, medians over epochs."""
    return {
        part: round(
            statistics.median(1000 * one.parts[part] / clock.seconds(one.frames, FPS) for one in epochs), 3
        )
        for part in PARTS
    }


def held() -> float:
    """Megabytes of memory that this process holds for itself (pages of mapped files not counted)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(fields["RssAnon"].split()[0]) / 1000, 1)


def gpu(ours: Fitting, epochs: list[Epoch]) -> dict[str, object]:
    """The paper's training at this rate, and what part of the card's own fp32 matrix rate it reaches."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        one = ours.epoch()
    rate = counter.get_total_flops() / one.frames * _speed(epochs)
    total = clock.frames_in(3600 * PAPER_HOURS, FPS) * PAPER_EPOCHS
    return {
        "card": torch.cuda.get_device_name(),
        "paper_80_epochs_minutes": round(total / _speed(epochs) / 60, 1),
        "tflops": round(rate / 1e12, 3),
        "of_measured_fp32_matrix_rate": round(rate / matrix_rate(), 4),
        "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 1e6),
    }


def matrix_rate(side: int = 8192) -> float:
    """Operations a second of large fp32 matrix products on this card."""
    a, b = (torch.randn(side, side, device="cuda") for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * side**3 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a few seconds: whether it works, no figures")
    parser.add_argument("--folder", type=Path, help="where to write: about 1 GB; a new folder in it is used")
    parser.add_argument(
        "--preset", choices=("fast", "paper"), action="append", help="one; may be given again"
    )
    asked = parser.parse_args()
    size = QUICK if asked.quick else CUDA if asked.device == "cuda" else FULL
    result: dict[str, object] = {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": sys.version[:6],
    }
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        store = make_store(Path(folder) / "store", size)
        for preset in asked.preset or ("fast", "paper"):
            result[preset] = measure(Path(folder), store, size, preset, asked.device)
    print(json.dumps(result) if asked.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
