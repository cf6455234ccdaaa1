"""Features that stay in the store while heads are fitted: the same numbers, in bounded memory."""

import json
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from pmm import BadInput
from pmm.store import clock
from pmm.store.catalog import Store
from pmm.store.clip import Clip, Take
from pmm.store.feature import FeatureSpec
from pmm.store.rig import ARKIT52, LIP32
from pmm.train import data
from pmm.train.loop import EpochDone, StepDone
from pmm.train.memory import Cached
from pmm.train.options import FitOptions
from pmm.train.run import fit

FPS = 30
SPECS = {
    "audio": FeatureSpec("audio", "made-up/1", "float16", (24,), None, {"weights": "a"}),
    "text": FeatureSpec("text", "made-up/1", "float16", (2, 5), None, {"vocabulary_size": 37}),
    "image": FeatureSpec("image", "made-up/1", "uint8", (16, 16, 3), FPS, {"weights": "i"}),
    "target": FeatureSpec("target", "made-up/1", "float32", (52,), FPS, {"names": list(ARKIT52)}),
}


def noise(rng, spec, length):
    if spec.dtype == "uint8":
        return rng.integers(0, 256, (length, *spec.shape), dtype=np.uint8)
    values = rng.random((length, *spec.shape), dtype=np.float32)
    if spec.modality == "text" and len(spec.shape) == 2:
        values[:, 1] = rng.permuted(np.tile(np.arange(37), (length, 1)), axis=1)[:, :5]
    return values.astype(spec.dtype)


def make_store(path, specs, clips, seconds):
    """A store of noise: ``clips`` takes of 5 subjects, about ``seconds`` each."""
    store, rng, takes = Store.create(path), np.random.default_rng(0), []
    rows = {name: [] for name in specs}
    for n in range(clips):
        samples = int(clock.SPEECH_RATE * seconds * (1 + 0.1 * (n % 4)))
        clip = Clip(f"{n:04x}".ljust(64, "0"), clock.SPEECH_RATE, 1, 0, samples)
        takes.append(Take(clip, clip.id[::-1], f"person{n % 5}", source=f"take{n}.wav"))
        lengths = {None: clock.steps(samples), FPS: clock.frames(samples, clock.SPEECH_RATE, FPS)}
        for name, spec in specs.items():
            row = noise(rng, spec, lengths[spec.fps])
            rows[name].append((spec.row_id(clip.id, clip.id[::-1]), row))
    for name, spec in specs.items():
        store.publish(spec, rows[name], {"label": "noise"}, chunk_bytes=1_000_000)
    store.publish_takes("studio", takes, {"host": "here", "root": "/there", "layout": "made-up"})
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store", SPECS, 15, 1.6)


LATENTS = {"image": FeatureSpec("image", "made-up/1", "float16", (20,), FPS, {"weights": "l"})}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store", {**SPECS, **LATENTS}, 10, 1.6)


def numbers(events):
    steps = [(e.epoch, e.step, e.losses) for e in events if isinstance(e, StepDone)]
    return steps, [(e.epoch, e.losses, e.validation_lve) for e in events if isinstance(e, EpochDone)]


@pytest.mark.parametrize("kind", ["store", "latents"])
@pytest.mark.parametrize(("batch_size", "window"), [(4, 20.0), (1, 1.0)])
def test_where_features_lie_changes_no_loss_and_no_weight(kind, batch_size, window, request, tmp_path):
    store = request.getfixturevalue(kind)
    options = FitOptions(preset="smoke", epochs=2, batch_size=batch_size, window=window, device="cpu")
    events = {}
    for cache in data.CACHES:
        events[cache] = []
        fit(store, tmp_path / cache, replace(options, cache=cache), events[cache].append)
        lies = "ram" if cache == "device" else cache  # that of the CPU
        assert [e.cache for e in events[cache] if isinstance(e, Cached)] == [lies]
    assert numbers(events["device"])[0]
    assert numbers(events["device"]) == numbers(events["ram"]) == numbers(events["mmap"])
    for name in ("best.safetensors", "last.safetensors"):
        assert len({(tmp_path / cache / name).read_bytes() for cache in data.CACHES}) == 1


def test_a_run_may_go_on_with_another_cache(store, tmp_path):
    options = FitOptions(preset="smoke", epochs=2, device="cpu")
    whole, first, second = [], [], []
    fit(store, tmp_path / "whole", options, whole.append)
    stopping = lambda: sum(isinstance(e, StepDone) for e in first) == 3  # noqa: E731
    fit(store, tmp_path / "run", replace(options, cache="mmap"), first.append, stopping=stopping)
    fit(store, tmp_path / "run", replace(FitOptions(), cache="ram"), second.append, resume=True)
    assert numbers([*first, *second]) == numbers(whole)


def test_measuring_latents_leaves_them_as_they_are():
    latents = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    mean, scale = data.image_statistics(latents)
    assert latents.tolist() == [[1.0, 2.0], [3.0, -4.0]]
    assert mean.tolist() == [2.0, -1.0]
    assert scale == pytest.approx(((1 + 9 + 1 + 9) / 4) ** 0.5)


@pytest.mark.parametrize("size", [5, 24, 1024, 3503])
def test_a_window_of_a_clip_is_that_window_to_the_bit(size):
    native = np.random.default_rng(0).normal(size=(499, size)).astype(np.float16)
    whole = data.on_frames(native, 300, FPS)
    for first, count in ((0, 1), (17, 100), (90, 210), (299, 1)):
        assert torch.equal(data.on_frames(native, count, FPS, first), whole[first : first + count])


def test_statistics_are_the_same_wherever_the_frames_lie(store):
    takes = {"x": store.takes()}
    specs = data.choose_specs(store, FPS)
    held = data.load(store, specs, takes, LIP32, FPS, (8, 16))
    streamed = data.load(store, specs, takes, LIP32, FPS, (8, 16), cache="mmap")
    assert isinstance(streamed.features["image"], data.Stored)
    one, two = (data.image_statistics(x.features["image"], x) for x in (held, streamed))
    assert torch.equal(one[0], two[0])
    assert one[1] == two[1]
    frames = held.features["image"].double()
    assert one[1] == pytest.approx(float((frames - frames.mean(0)).square().mean().sqrt()), rel=1e-9)


def test_a_part_shares_the_tensors_and_keeps_their_order(store):
    takes = store.takes()
    specs = data.choose_specs(store, FPS)
    for cache in ("ram", "mmap"):
        all_of_them = data.load(store, specs, {"x": takes}, ARKIT52, FPS, cache=cache)
        columns = [ARKIT52.index(name) for name in LIP32]
        part = all_of_them.part({"a": takes[5:3:-1], "b": takes[:1]}, ("image", "audio"), (8, 16), columns)
        alone = data.load(store, specs, {"a": takes[5:3:-1], "b": takes[:1]}, LIP32, FPS, (8, 16))
        assert part.subjects == alone.subjects == ("a", "a", "b")
        assert torch.equal(part.own_target(), alone.target)
        ours, theirs = (data.gather(one, torch.tensor([2, 0, 1])) for one in (part, alone))
        assert ours.features.keys() == {"image", "audio"}
        for name, x in ours.features.items():
            assert torch.equal(x, theirs.features[name])
        assert torch.equal(ours.target, theirs.target)
        if cache == "ram":
            assert part.features["audio"] is all_of_them.features["audio"]


# --- reading ahead ---------------------------------------------------------------------------------


def test_reading_ahead_keeps_the_order_and_stays_bounded():
    made, most, taken = [], 0, 0
    for item in data.prefetched((made.append(n) or n for n in range(50)), 3):
        assert item == taken
        taken += 1
        most = max(most, len(made) - taken)
    assert taken == 50
    assert most <= 3 + 1  # the queue, and the one in the thread's hands


def test_what_reading_ahead_raises_is_raised_where_it_is_used():
    def items():
        yield 1
        raise BadInput("take 7 cannot be read")

    found = []
    with pytest.raises(BadInput, match="take 7 cannot be read"):
        found.extend(data.prefetched(items(), 2))
    assert found == [1]


def test_the_thread_ends_with_its_reader():
    before = threading.active_count()
    ahead = data.prefetched(iter(range(1000)), 2)
    assert next(ahead) == 0
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before


def test_nan_in_the_store_is_told_while_streaming(tmp_path):
    store = make_store(tmp_path / "store", SPECS, 10, 1.0)
    take = store.takes()[4]
    fragment, index = store.find(SPECS["audio"].id, take.clip.id)
    (chunk,) = (tmp_path / "store" / fragment.folder).glob("values/c/0/0")
    flat = np.memmap(chunk, np.float16, "r+").reshape(-1, 24)
    flat[int(fragment.lengths[:index].sum()) + 10] = np.nan
    flat.flush()
    corpus = data.load(store, data.choose_specs(store, FPS), {"x": store.takes()}, LIP32, FPS, cache="mmap")
    with pytest.raises(
        BadInput, match=r"take4.wav: the audio features hold NaN or infinity at frame \d+; take"
    ):
        list(data.batches(corpus, torch.arange(10), 2))


# --- larger than memory ----------------------------------------------------------------------------

WIDE = {
    **SPECS,
    "text": FeatureSpec("text", "made-up/1", "float16", (2500,), None, {"weights": "t"}),
}
WATCHED = """
import json, sys
from pathlib import Path
import torch._dynamo  # which Adam imports: no part of what a fit holds
from pmm.store.catalog import Store
from pmm.train.memory import Cached
from pmm.train.run import FitOptions, StepDone, fit

def held():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024

told, most = [], []
def on_event(event):
    told.extend([event.cache, event.needed, held()] if isinstance(event, Cached) else [])
    most.extend([held()] if isinstance(event, StepDone) else [])
options = FitOptions(preset="smoke", epochs=2, batch_size=8, device="cpu")
result = fit(Store.open(sys.argv[1]), sys.argv[2], options, on_event, memory_limit=int(sys.argv[3]))
half = len(most) // 2
print(json.dumps([*told, max(most[:half]), max(most[half:]), result.best_lve]))
"""


def watched(store, run, limit):
    """A fit in a process of its own: (cache, bytes of features, held before, in each epoch, best LVE)."""
    command = [sys.executable, "-P", "-c", WATCHED, store.path, run, limit]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc of Linux")
def test_a_store_larger_than_an_imposed_limit_is_fitted_in_flat_memory(tmp_path):
    """By what the process itself holds: pages of mapped files are the system's, to take back when it will."""
    store = make_store(tmp_path / "store", WIDE, 800, 1.2)
    cache, needed, before, first, second, lve = watched(store, tmp_path / "streamed", 100_000_000)
    assert (cache, needed > 200_000_000) == ("mmap", True)
    assert first - before < 0.5 * needed
    assert second - first < 0.1 * needed
    cache, _, before, first, _, same = watched(store, tmp_path / "held", 10 * needed)
    assert (cache, same) == ("ram", lve)
    assert first - before > needed
