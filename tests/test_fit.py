"""From a small store of made-up features to fitted heads, scores and curves.

The store holds clips whose target follows a smooth signal of time; audio and text show it at native
wav2vec2 steps (step s is centred at (s + 0.625) * 20 ms), the image at frames.
"""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from pmm import AlreadyThere, BadInput, NewerFormat, NotFound
from pmm.cli import _score_table
from pmm.store import clock
from pmm.store.catalog import Store
from pmm.store.clip import Clip, Take
from pmm.store.feature import FeatureSpec
from pmm.store.rig import ARKIT52, LIP32
from pmm.train import data, losses, memory, protocols
from pmm.train.evaluate import evaluate
from pmm.train.heads import Heads, HeadsConfig, preset, valid_frames
from pmm.train.loop import EpochDone, Schedule, Started, StepDone, learning_rate
from pmm.train.memory import Cached
from pmm.train.metrics import FRAME_ERRORS, lve
from pmm.train.options import FitOptions
from pmm.train.predict import predict_heads
from pmm.train.run import Content, fit, load_run, predict

FPS = 30
PIXELS = 16
AUDIO = FeatureSpec("audio", "made-up/1", "float16", (12,), None, {"weights": "a"})
TEXT = FeatureSpec("text", "made-up/1", "float16", (9,), None, {"weights": "t"})
IMAGE = FeatureSpec("image", "made-up/1", "uint8", (PIXELS, PIXELS, 3), FPS, {"weights": "i"})
TARGET = FeatureSpec("target", "made-up/1", "float32", (52,), FPS, {"names": list(ARKIT52)})
QUICK = FitOptions(epochs=2, batch_size=3, device="cpu")


def signal(times, phase):
    """Four smooth curves in [0, 1]: (n, 4)."""
    rates = np.array([1.1, 1.7, 2.3, 2.9])
    return 0.5 + 0.5 * np.sin(2 * np.pi * (times[:, None] * rates + phase))


def rows_of(samples, phase, gain=1.0):
    """Row arrays of one clip by modality, ``samples`` long at 16 kHz."""
    draw = np.random.default_rng(7)
    count, frames = clock.steps(samples), clock.frames(samples, clock.SPEECH_RATE, FPS)
    at_steps = signal((np.arange(count) + 0.625) * 0.02, phase)
    at_frames = signal(np.arange(frames) / FPS, phase)
    audio = np.concatenate([at_steps @ draw.normal(size=(4, 8)), at_steps**2], axis=1)
    image = np.full((frames, PIXELS, PIXELS, 3), 90.0)
    image[:, PIXELS // 2 :] += 60 * np.kron(at_frames.reshape(-1, 2, 2), np.ones((1, 4, 8)))[..., None]
    mix = draw.uniform(0, 0.25, size=(4, 52))
    return {
        "audio": audio.astype(np.float16),
        "text": (at_steps @ draw.normal(size=(4, 9))).astype(np.float16),
        "image": image.astype(np.uint8),
        "target": (gain * at_frames @ mix).astype(np.float32),
    }


def make_store(path, subjects=5, clips=3, specs=(AUDIO, TEXT, IMAGE, TARGET), change=lambda take, rows: rows):
    store = Store.create(path)
    takes, rows = [], {spec.id: [] for spec in specs}
    for who in range(subjects):
        for n in range(clips):
            samples = 14_000 + 5_000 * n + 700 * who
            clip = Clip(f"{who:02x}{n:02x}".ljust(64, "0"), clock.SPEECH_RATE, 1, 0, samples)
            take = Take(clip, clip.id[::-1], f"person{who}", source=f"person{who}/take{n}.wav")
            takes.append(take)
            values = change(take, rows_of(samples, 0.13 * who + 0.31 * n, gain=0.8 + 0.1 * who))
            for spec in specs:
                if spec.modality in values:
                    rows[spec.id].append((spec.row_id(clip.id, take.target), values[spec.modality]))
    for spec in specs:
        store.publish(spec, rows[spec.id], {"label": "made up (untrained stand-in)"})
    store.publish_takes("studio", takes, {"host": "here", "root": "/there", "layout": "made-up"})
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def fitted(store, tmp_path_factory):
    """A run of two epochs, and the events it told."""
    events = []
    path = tmp_path_factory.mktemp("runs") / "run"
    result = fit(store, path, QUICK, events.append)
    return path, result, events


# --- data ------------------------------------------------------------------------------------------


def specs_of(store):
    return data.choose_specs(store, FPS)


def test_features_are_normalised_per_step_then_read_at_the_times_of_frames():
    """Against a plain loop: LayerNorm of each native step, then linear interpolation."""
    native = np.random.default_rng(0).normal(size=(49, 5)).astype(np.float16)
    ours = data.on_frames(native, 30, FPS).numpy()
    steps = native.astype(np.float64)
    steps = (steps - steps.mean(1, keepdims=True)) / np.sqrt(steps.var(1, keepdims=True) + 1e-5)
    for j in range(30):
        position = min(max(50 * j / 30 - 0.625, 0), 48)
        low = math.floor(position)
        expected = steps[low] + (position - low) * (steps[min(low + 1, 48)] - steps[low])
        np.testing.assert_allclose(ours[j], expected, atol=2e-6)
    window = data.on_frames(native, 11, FPS, first_frame=17).numpy()
    np.testing.assert_array_equal(window, ours[17:28])


def test_a_batch_is_the_clips_side_by_side(store):
    takes = store.takes()
    corpus = data.load(store, specs_of(store), {"someone": takes[:3]}, LIP32, FPS, (8, 16))
    assert corpus.lengths.tolist() == [26, 36, 45]
    batch = data.gather(corpus, torch.tensor([2, 0]))
    assert batch.valid.sum(1).tolist() == [45, 26]
    assert batch.features["image"].shape == (2, 45, 8, PIXELS, 3)
    image = store.read(IMAGE.id, takes[0].clip.id)
    np.testing.assert_array_equal(batch.features["image"][1, :26].numpy(), image[:, 8:])
    target = store.read(TARGET.id, takes[2].target)
    np.testing.assert_array_equal(batch.target[0, :, 3].numpy(), target[:, ARKIT52.index("JawOpen")])


def test_batches_take_every_clip_once_and_like_lengths_together():
    lengths = torch.tensor([5, 50, 6, 51, 7, 52, 8, 53, 9])
    plan = data.batch_plan(lengths, torch.arange(9), 2, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(plan).tolist()) == list(range(9))
    padding = sum(int((lengths[part].max() - lengths[part]).sum()) for part in plan)
    assert padding < 50
    again = data.batch_plan(lengths, torch.arange(9), 2, torch.Generator().manual_seed(0))
    other = data.batch_plan(lengths, torch.arange(9), 2, torch.Generator().manual_seed(1))
    assert [p.tolist() for p in again] == [p.tolist() for p in plan] != [p.tolist() for p in other]


def test_image_statistics_by_hand():
    frames = torch.tensor([0, 20, 10, 10], dtype=torch.uint8).reshape(4, 1, 1, 1)
    mean, scale = data.image_statistics(frames)
    assert mean.item() == 10
    assert scale == pytest.approx(math.sqrt(200 / 4))
    assert data.image_statistics(frames[2:])[1] == 1.0


def test_takes_without_features_or_of_other_lengths_are_skipped_and_said(tmp_path):
    def change(take, rows):
        if take.source == "person0/take0.wav":
            return {name: x for name, x in rows.items() if name != "text"}
        if take.source == "person1/take1.wav":
            return {**rows, "target": rows["target"][:-4]}
        if take.source == "person1/take2.wav":
            return {**rows, "target": rows["target"][:-3]}
        return rows

    store = make_store(tmp_path / "store", change=change)
    corpus = data.load(store, specs_of(store), {"all": store.takes()}, LIP32, FPS)
    assert [(one.source, one.reason) for one in corpus.skipped] == [
        ("person0/take0.wav", "no text features in the store"),
        ("person1/take1.wav", "clip has 37 frames, target 33, more than 100 ms apart"),
    ]
    assert len(corpus.takes) == 13
    assert corpus.lengths[3] == 46 - 3

    result = fit(store, tmp_path / "run", QUICK)
    split = load_run(tmp_path / "run").config["split"]
    trained = {who for part in ("train", "validation") for who in split[part]}
    expected = [f"person{who}/take{who}.wav" for who in (0, 1) if f"person{who}" in trained]
    assert sorted(one.source for one in result.skipped) == expected


def test_a_person_listed_in_two_folders_is_one_identity(tmp_path):
    """Half of the takes of person0 came under another dataset's label, and one under both."""
    store = make_store(tmp_path / "store", subjects=3, clips=4)
    takes = [take for take in store.takes() if take.subject == "person0"]
    rest = [take for take in store.takes() if take not in takes[2:]]
    where = {"host": "here", "root": "/there", "layout": "made-up"}
    store.publish_takes("studio", rest, where)
    store.publish_takes("copy", takes[1:], {**where, "root": "/elsewhere"})
    people = protocols.identities(data.listed_takes(store))
    assert {who: len(own) for who, own in people.items()} == {"person0": 4, "person1": 4, "person2": 4}


def started(events):
    (one,) = [event for event in events if isinstance(event, Started)]
    return one


def test_a_fit_tells_which_subjects_it_made_one(tmp_path):
    store = make_store(tmp_path / "store", subjects=4, clips=1)
    first, second, *_ = store.takes()
    copy = replace(first, subject=second.subject, source="person1/copy.wav")
    store.publish_takes(
        "studio", [*store.takes(), copy], {"host": "here", "root": "/there", "layout": "made-up"}
    )
    events = []
    fit(store, tmp_path / "run", replace(QUICK, epochs=1), events.append)
    (one,) = started(events).merged
    assert one.subjects == ("person0", "person1")
    assert one.clips == (first.clip.id,)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [tuple(entry["subjects"]) for entry in config["merged"]] == [one.subjects]
    again = []
    fit(store, tmp_path / "run", FitOptions(), again.append, resume=True)
    assert started(again).merged == (one,)


def features_bytes(store):
    """What the takes of a fit fill in memory, as torch counts it."""
    split = protocols.split("cross-subject", store.takes(), 0)
    sides = (split.train, split.validation)
    parts = [data.load(store, specs_of(store), own, LIP32, FPS, (8, 16)) for own in sides]
    return sum(x.nbytes for part in parts for x in (*part.features.values(), part.target))


def test_what_does_not_fit_into_memory_is_read_from_the_store_or_refused(store, tmp_path):
    held = features_bytes(store)
    once = replace(QUICK, epochs=1)
    told = {}
    for name, limit in (("fits", held), ("large", held - 1)):
        events = []
        fit(store, tmp_path / name, once, events.append, memory_limit=limit)
        (told[name],) = [event for event in events if isinstance(event, Cached)]
    assert told["fits"] == Cached("ram", "auto", held, held)
    assert told["large"] == Cached("mmap", "auto", held, held - 1)
    for cache in ("ram", "device"):
        with pytest.raises(
            BadInput, match=r"12 takes fill 0.0 GB, and 0.0 GB of memory are available; read them"
        ):
            fit(store, tmp_path / "run", replace(once, cache=cache), memory_limit=held - 1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match=r"12 takes fill"):
        fit(store, tmp_path / "fits", replace(once, cache="ram"), resume=True, memory_limit=held - 1)


def test_both_numbers_and_the_way_out_are_said():
    lips = replace(IMAGE, shape=(96, 96, 3))
    hour = 3600 * FPS
    needed = memory.corpus_bytes(hour, {"audio": AUDIO, "image": lips, "target": TARGET}, 32, (48, 96))
    assert needed == hour * (4 * 12 + 48 * 96 * 3 + 4 * 32)
    nobody_knows, small = memory.Limits(None), memory.Limits(10**9, 10**8)
    assert memory.choose_cache("ram", needed, memory.Limits(needed, 0), 9, ()).cache == "ram"
    assert memory.choose_cache("auto", needed, nobody_knows, 9, ()).cache == "ram"
    assert memory.choose_cache("mmap", needed, small, 9, ()).cache == "mmap"
    with pytest.raises(BadInput) as caught:
        memory.choose_cache("ram", needed, small, 9, ("image", "audio"))
    assert str(caught.value) == (
        "the features of 9 takes fill 1.5 GB, and 1.0 GB of memory are available; read them from the store "
        "while fitting (--cache mmap), or fit fewer subjects, leave the lip frames out (--without image)"
    )
    with pytest.raises(BadInput, match=r"fill 1.5 GB, and 0.1 GB on the device are available"):
        memory.choose_cache("device", needed, small, 9, ("audio",))


@pytest.mark.parametrize(
    ("free", "chosen"),
    [((100, 100), "device"), ((100, 99), "ram"), ((99, 99), "mmap"), ((100,), "ram"), ((99,), "mmap")],
)
def test_auto_takes_the_first_place_that_holds_the_features_in_four_fifths(free, chosen):
    assert memory.choose_cache("auto", 80, memory.Limits(*free), 1, ()).cache == chosen


@pytest.mark.parametrize(
    ("membership", "folder", "ceiling", "held"),
    [
        ("0::/job/step\n", "job", "memory.max", "anon"),
        ("5:memory:/job/step\n0::/\n", "memory/job", "memory.limit_in_bytes", "total_rss"),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, membership, folder, ceiling, held):
    """A limit on the job, none on the step below it, in both versions of Linux control groups."""
    (tmp_path / folder / "step").mkdir(parents=True)
    (tmp_path / folder / ceiling).write_text("5000\n")
    (tmp_path / folder / "memory.stat").write_text(f"cache 900\n{held} 1200\n")
    (tmp_path / folder / "step" / ceiling).write_text("max\n")
    (tmp_path / "self").write_text(membership)
    assert list(memory._container(tmp_path, tmp_path / "self")) == [3800]
    assert memory.available() > 0


# --- specs -----------------------------------------------------------------------------------------


def test_a_store_without_a_modality_is_refused(tmp_path):
    store = make_store(tmp_path / "store", specs=(AUDIO, IMAGE, TARGET))
    with pytest.raises(NotFound) as caught:
        fit(store, tmp_path / "run", QUICK)
    assert str(caught.value) == (
        f"the store at {store.path} holds no text features; "
        f"`pmm precompute DATASET --store {store.path}` makes them"
    )
    assert not (tmp_path / "run").exists()
    fit(store, tmp_path / "run", replace(QUICK, epochs=1, without=("text",)))


def test_two_kinds_of_one_modality_must_be_chosen_between(tmp_path):
    other = FeatureSpec("audio", "made-up/2", "float16", (12,), None, {"weights": "b"})
    store = make_store(tmp_path / "store", specs=(AUDIO, other, TEXT, IMAGE, TARGET))
    with pytest.raises(BadInput) as caught:
        specs_of(store)
    message = str(caught.value)
    assert "holds 2 kinds of audio features: " in message
    assert f"{AUDIO.id[:12]} (made up (untrained stand-in))" in message
    assert f"{other.id[:12]} (made up (untrained stand-in))" in message
    assert "--features audio=" in message
    assert data.choose_specs(store, FPS, {"audio": other.id[:12]})["audio"] == other
    with pytest.raises(NotFound, match=r"holds no audio=ffff at 30 fps"):
        data.choose_specs(store, FPS, {"audio": "ffff"})
    with pytest.raises(BadInput, match=r"features sound=...: a modality is one of audio"):
        data.choose_specs(store, FPS, {"sound": "ffff"})


def test_fps_decides_between_specs_that_differ_in_it(tmp_path):
    faster = FeatureSpec("image", "made-up/1", "uint8", (PIXELS, PIXELS, 3), 60, {"weights": "i"})
    store = make_store(tmp_path / "store", specs=(AUDIO, TEXT, IMAGE, faster, TARGET))
    assert specs_of(store)["image"] == IMAGE
    with pytest.raises(NotFound, match=r"holds no image features at 25 fps, only .* 30 fps\).* 60 fps\)"):
        data.choose_specs(store, 25)


def test_a_lost_spec_file_is_one_line_or_no_matter(tmp_path):
    """Rows that nothing describes are passed over; where only such are left, the way out is said."""
    store = make_store(tmp_path / "store")
    stray = FeatureSpec("audio", "made-up/2", "float16", (12,), None, {"weights": "b"})
    take = store.takes()[0]
    store.publish(stray, [(stray.row_id(take.clip.id, None), np.ones((5, 12), np.float16))], {})
    (tmp_path / "store" / "specs" / f"{stray.id}.json").unlink()
    assert specs_of(Store.open(tmp_path / "store"))["audio"] == AUDIO

    (tmp_path / "store" / "specs" / f"{TEXT.id}.json").write_text("{")
    torn = Store.open(tmp_path / "store")
    with pytest.raises(NotFound) as caught:
        fit(torn, tmp_path / "run", QUICK)
    lost = min(stray.id, TEXT.id)
    assert str(caught.value) == (
        f"the store at {torn.where} holds no text features that can be told apart: specs/{lost}.json, which "
        "describes some, is lost or damaged; run `pmm store verify --repair`, or "
        f"`pmm precompute DATASET --store {torn.where}` writes it again"
    )
    assert not (tmp_path / "run").exists()


def long_corpus():
    """Clips of 45, 90, 91 and 217 frames whose target counts the frames of all."""
    lengths = torch.tensor([45, 90, 91, 217])
    target = torch.arange(int(lengths.sum())).float()[:, None]
    takes = (Take(Clip("0" * 64, 16000, 1, 0, 1), "f" * 64, "x"),) * 4
    return data.Corpus(takes, ("x",) * 4, lengths.cumsum(0) - lengths, lengths, {}, target)


def test_windows_start_at_whole_periods_and_reach_every_frame():
    corpus, seen = long_corpus(), set()
    for epoch in range(200):
        spans = data.windows(corpus, 90, 30, torch.Generator().manual_seed(epoch))
        first = (spans.start - corpus.start).tolist()
        assert first[:2] == [0, 0]
        assert spans.length[:2].tolist() == [45, 90]
        assert all(start % 30 == 0 for start in first)
        assert int(spans.length.max()) <= 90
        (batch,) = data.batches(corpus, torch.tensor([3]), 1, spans=spans)
        values = batch.target[batch.valid][:, 0].long().tolist()
        assert values == list(range(values[0], values[0] + len(values)))
        assert values[0] == int(spans.start[3])
        seen |= set(values)
    assert seen == set(range(45 + 90 + 91, 45 + 90 + 91 + 217))


def test_the_window_of_a_clip_changes_with_the_epoch_and_not_with_the_run():
    drawn = [
        data.windows(long_corpus(), 90, 30, torch.Generator().manual_seed(n)).start for n in (0, 1, 2, 0)
    ]
    assert torch.equal(drawn[0], drawn[3])
    assert len({tuple(start.tolist()) for start in drawn}) > 1


def test_long_takes_train_by_windows_and_short_ones_as_ever(store, fitted, tmp_path):
    """All takes are under two seconds: a window of two changes no bit, one of one second does."""
    _, _, events = fitted
    two, one, resumed = [], [], []
    fit(store, tmp_path / "two", replace(QUICK, window=2.0), two.append)
    assert history(two) == history(events)
    options = replace(QUICK, window=1.0)
    fit(store, tmp_path / "one", options, one.append)
    assert history(one) != history(events)

    def stop(event):
        if isinstance(event, StepDone) and event.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        fit(store, tmp_path / "broken", options, stop)
    fit(store, tmp_path / "broken", FitOptions(), resumed.append, resume=True)
    assert resumed[-1].losses == one[-1].losses
    assert load_run(tmp_path / "broken").config["schedule"]["window"] == 1.0
    with pytest.raises(BadInput, match=r"window 0.5 s: it must be at least 1 s"):
        fit(store, tmp_path / "none", replace(QUICK, window=0.5))


# --- fit -------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_the_run_was(store, fitted):
    path, result, _ = fitted
    assert sorted(file.name for file in path.iterdir()) == [
        "best.safetensors",
        "config.json",
        "curves.png",
        "last.safetensors",
        "metrics.jsonl",
        "steps.jsonl",
    ]
    config = json.loads((path / "config.json").read_text())
    assert config["format"] == 2
    assert config["options"]["epochs"] == 2
    assert config["made_with"]["image"] == [{"label": "made up (untrained stand-in)"}]
    assert config["names"] == list(LIP32)
    assert config["styles"] == sorted(config["split"]["train"])
    assert len(config["styles"]) == 3
    run = load_run(path)
    assert run.specs == {"audio": AUDIO, "text": TEXT, "image": IMAGE, "target": TARGET}
    takes = [take for take in store.takes() if take.subject in run.styles]
    target = np.concatenate([store.read(TARGET.id, take.target) for take in takes])
    own = [ARKIT52.index(name) for name in LIP32]
    np.testing.assert_allclose(run.mean, target[:, own].mean(0), rtol=1e-6)
    assert result.clips == 9
    assert result.skipped == ()


def test_events_tell_the_steps_and_the_epochs(fitted):
    path, result, events = fitted
    assert [type(event) for event in events] == [
        Content,
        Cached,
        Started,
        *([StepDone] * 3 + [EpochDone]) * 2,
    ]
    assert (events[2].clips, events[2].validation_clips, events[2].steps_per_epoch) == (9, 3, 3)
    assert [(e.epoch, e.step, e.steps) for e in events if isinstance(e, StepDone)][2:4] == [
        (1, 3, 3),
        (2, 1, 3),
    ]
    epochs = [event for event in events if isinstance(event, EpochDone)]
    assert min(e.validation_lve for e in epochs) == result.best_lve
    assert set(epochs[0].losses) == {"total", "position", "motion", "temporal", "semantic"}
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["losses"] for line in lines] == [e.losses for e in epochs]


def history(events):
    """Every number that training told, but for the times."""
    steps = [(e.epoch, e.step, e.losses) for e in events if isinstance(e, StepDone)]
    return steps, [(e.epoch, e.losses, e.validation_lve) for e in events if isinstance(e, EpochDone)]


def test_the_same_seed_gives_the_same_losses_to_the_bit(store, fitted, tmp_path):
    _, _, events = fitted
    again, other = [], []
    torch.rand(5)  # what the caller does with the global generator changes nothing
    fit(store, tmp_path / "again", QUICK, again.append)
    assert history(again) == history(events)
    fit(store, tmp_path / "other", replace(QUICK, seed=1), other.append)
    assert history(other) != history(events)


class Stop(Exception):
    pass


def test_fitting_leaves_the_callers_generator_alone(store, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(store, tmp_path / "run", QUICK)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(store, tmp_path, after):
    """Stopped in the first epoch (nothing kept yet), and in the middle of later ones."""
    options = replace(QUICK, epochs=3)
    whole, broken = [], []
    fit(store, tmp_path / "whole", options, whole.append)

    def stop(event):
        broken.append(event)
        if sum(isinstance(e, StepDone) for e in broken) == after:
            raise Stop

    with pytest.raises(Stop):
        fit(store, tmp_path / "broken", options, stop)
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')  # a line that a kill has torn
    kept = [e for e in broken if isinstance(e, EpochDone)]
    resumed = []
    result = fit(store, tmp_path / "broken", FitOptions(), resumed.append, resume=True)
    assert started(resumed).first_epoch == len(kept)
    joined = [e for e in broken if isinstance(e, StepDone | EpochDone) and e.epoch <= len(kept)] + resumed
    assert history(joined) == history(whole)
    assert result.epochs == 3
    whole_lines = [
        line for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines() if line[-1] == "}"
    ]
    assert [json.loads(line)["epoch"] for line in whole_lines] == [1, 2, 3]
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_resuming_a_finished_run_changes_nothing(store, fitted):
    path, result, _ = fitted
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert fit(store, path, FitOptions(), resume=True) == result
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_an_existing_folder_is_refused_and_untouched(store, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(AlreadyThere) as caught:
        fit(store, tmp_path / "run", QUICK)
    assert str(caught.value) == (
        f"{tmp_path / 'run'} already exists and nothing is overwritten; "
        "go on with it by --resume, or name another folder"
    )
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_resuming_with_other_options_is_refused(store, fitted):
    path, _, _ = fitted
    with pytest.raises(BadInput, match=r"was started with epochs 2, not 7; resume it without that option"):
        fit(store, path, FitOptions(epochs=7), resume=True)
    with pytest.raises(NotFound, match=r"no run at .*nowhere"):
        fit(store, path / "nowhere", FitOptions(), resume=True)


def test_resuming_on_a_store_that_lost_takes_is_refused(fitted, tmp_path):
    path, _, _ = fitted
    shutil.copytree(path, tmp_path / "run")
    smaller = make_store(tmp_path / "smaller", subjects=2)
    with pytest.raises(NotFound, match=r"takes of the run in .* are not in the store at .*smaller"):
        fit(smaller, tmp_path / "run", FitOptions(), resume=True)


def test_too_few_subjects_are_refused(tmp_path):
    store = make_store(tmp_path / "store", subjects=2, clips=1)
    with pytest.raises(BadInput, match=r"2 subjects with a face track were found .*needs at least 3"):
        fit(store, tmp_path / "run", QUICK)
    assert not (tmp_path / "run").exists()


def test_nan_in_targets_is_one_line(tmp_path):
    """The store refuses to publish NaN, so a float is spoilt where it lies on the disk."""
    store = make_store(tmp_path / "store")
    (chunk,) = (tmp_path / "store" / "fragments" / TARGET.id).glob("*/values/c/0/0")
    flat = np.memmap(chunk, np.float32, "r+").reshape(-1, 52)
    flat[5, ARKIT52.index("JawOpen")] = math.nan
    flat.flush()
    with pytest.raises(BadInput) as caught:
        data.load(store, specs_of(store), {"all": store.takes()}, LIP32, FPS)
    assert "/take0.wav: the target features hold NaN or infinity at frame 5; take" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        FitOptions(preset="paper", epochs=1, device="cpu"),
        FitOptions(
            epochs=1, device="cpu", rig="arkit52", without=("image", "motion"), decoder_input="separate"
        ),
    ],
)
def test_presets_rigs_and_ablations_fit_and_score(tmp_path, options):
    store = make_store(tmp_path / "store", subjects=3, clips=1)
    events = []
    fit(store, tmp_path / "run", options, events.append)
    run = load_run(tmp_path / "run")
    assert run.options == options
    assert run.heads.config.modalities == options.modalities
    assert len(run.names) == (52 if options.rig == "arkit52" else 32)
    assert (events[-1].losses["motion"] == 0) == ("motion" in options.without)
    assert events[-1].losses["temporal"] > 0
    scores = evaluate(run, store).scores["heads"]
    assert all(0 < value < 1 for value in scores.values())


def test_a_diverging_run_stops_with_one_line(store, tmp_path):
    with pytest.raises(BadInput, match=r"the loss became (nan|inf) in epoch"):
        fit(store, tmp_path / "run", FitOptions(epochs=9, learning_rate=1e30, device="cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "slow"}, "preset 'slow' is none of fast, paper, smoke"),
        ({"rig": "face"}, "rig 'face' is none of lip32, arkit52"),
        (
            {"without": ("sound",)},
            "without 'sound' is none of image, text, audio, temporal, semantic, motion",
        ),
        ({"fps": 0}, "fps 0: it must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        FitOptions(**options)


def test_learning_rate_rises_then_falls_along_a_cosine():
    schedule = Schedule(10, 1, 1.0, warm_up=0.1, cosine=True)
    rates = [learning_rate(schedule, step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    assert learning_rate(Schedule(10, 1, 1e-4), 77, 100) == 1e-4


# --- runs ------------------------------------------------------------------------------------------


def test_bad_runs_are_refused_with_one_line(fitted, tmp_path):
    path, _, _ = fitted
    with pytest.raises(NotFound, match=r"no run at .*; `pmm fit STORE --run "):
        load_run(tmp_path / "nothing")
    with pytest.raises(NotFound, match=r"is no run: it holds no config.json"):
        load_run(tmp_path)

    newer = shutil.copytree(path, tmp_path / "newer")
    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps({**config, "format": 3}))
    with pytest.raises(NewerFormat, match=r"config.json has run format 3; this pmm .* reads up to 2"):
        load_run(newer)

    torn = shutil.copytree(path, tmp_path / "torn")
    (torn / "best.safetensors").write_bytes((path / "best.safetensors").read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"best.safetensors is truncated or no checkpoint"):
        load_run(torn)

    early = shutil.copytree(path, tmp_path / "early")
    (early / "best.safetensors").unlink()
    with pytest.raises(NotFound, match=r"the run has not finished an epoch; use --resume"):
        load_run(early)

    mixed = shutil.copytree(path, tmp_path / "mixed")
    config["heads"]["style_width"] = 32
    (mixed / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"does not fit the sizes in the config.json beside it"):
        load_run(mixed)


# --- prediction ------------------------------------------------------------------------------------


def test_predicting_from_native_features_equals_the_training_path(store, fitted):
    run = load_run(fitted[0])
    take = store.takes()[4]
    native = {spec.modality: store.read(spec.id, take.clip.id) for spec in (AUDIO, TEXT, IMAGE)}
    ours = predict(run, native, run.styles[1])
    corpus = data.load(store, run.specs, {"x": [take]}, LIP32, FPS, run.heads.config.image_rows)
    batch = data.gather(corpus, torch.tensor([0]))
    with torch.no_grad():
        theirs = run.heads(batch.features, torch.tensor([1]), batch.valid).prediction[0].numpy()
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.array_equal(predict(run, native, 1), ours)
    assert not np.array_equal(predict(run, native), ours)
    with pytest.raises(NotFound, match=r"style 'nobody' is not in the run at .*; it has mean, person"):
        predict(run, native, "nobody")
    with pytest.raises(BadInput, match=r"these heads read image features, and got only audio, text"):
        predict(run, {name: native[name] for name in ("audio", "text")})


@pytest.mark.parametrize("changes", [{}, {"decoder_layers": 2, "image_layers": 2, "context": 3}])
def test_three_minutes_in_chunks_equal_the_whole(changes):
    torch.manual_seed(0)
    sizes = {"feature_sizes": {"audio": 12, "text": 9}, "coefficients": 5, "styles": 2}
    small = {"width": 8, "style_width": 8, "attention_heads": 2, "image_size": PIXELS, "image_rows": (8, 16)}
    config = HeadsConfig(**sizes, **preset("fast", FPS, max_context=100, **small, **changes))
    heads = Heads(config)
    torch.nn.init.normal_(heads.decoder.output.weight)
    native = rows_of(180 * clock.SPEECH_RATE, 0.2)
    style = heads.styles.weight[1].detach()
    whole = predict_heads(heads, native, style, chunk_frames=10_000)
    assert whole.shape == (5400, 5)
    assert np.ptp(whole, axis=0).min() > 0.1
    for chunk in (1000, 1777):
        parts = predict_heads(heads, native, style, chunk_frames=chunk)
        np.testing.assert_allclose(parts, whole, atol=2e-5)


# --- evaluation ------------------------------------------------------------------------------------


def test_scores_are_pooled_over_frames_and_averaged_over_styles(store, fitted):
    run = load_run(fitted[0])
    scores = evaluate(run, store, "test")
    assert set(scores.subjects) == set(run.config["split"]["test"])
    expected, baseline = {name: [] for name in FRAME_ERRORS}, []
    own = [ARKIT52.index(name) for name in LIP32]
    takes = [take for take in store.takes() if take.subject in scores.subjects]
    for take in takes:
        native = {spec.modality: store.read(spec.id, take.clip.id) for spec in (AUDIO, TEXT, IMAGE)}
        target = store.read(TARGET.id, take.target)[:, own]
        for style in run.styles:
            prediction = predict(run, native, style)
            for name, error in FRAME_ERRORS.items():
                expected[name].append(error(prediction, target))
        baseline.append(FRAME_ERRORS["lve"](np.tile(run.mean, (len(target), 1)), target))
    for name, errors in expected.items():
        assert scores.scores["heads"][name] == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)
    assert scores.scores["mean_face"]["lve"] == pytest.approx(np.concatenate(baseline).mean(), rel=1e-6)
    assert scores.frames == sum(map(len, baseline))
    assert scores.clips == len(takes) == 3
    value = json.loads(json.dumps(scores.to_json()))
    assert value["lve_over_mean_face"] == pytest.approx(
        value["scores"]["heads"]["lve"] / value["scores"]["mean_face"]["lve"]
    )


def test_captures_without_motion_are_scored(tmp_path):
    """The mean face is exact there: nothing can be so many times as good."""

    def still(take, rows):
        return {**rows, "target": np.full_like(rows["target"], 0.25)}

    store = make_store(tmp_path / "store", subjects=3, clips=1, change=still)
    fit(store, tmp_path / "run", replace(QUICK, epochs=1))
    scores = evaluate(load_run(tmp_path / "run"), store)
    assert scores.scores["mean_face"]["lve"] == 0
    assert json.loads(json.dumps(scores.to_json()))["lve_over_mean_face"] is None
    assert _score_table(scores).splitlines()[-1] == "no motion to predict: the mean face is never wrong"


def test_a_trained_subject_is_scored_in_its_own_style(store, fitted):
    run = load_run(fitted[0])
    scores = evaluate(run, store, "train")
    assert tuple(scores.subjects) == run.styles
    who = run.styles[2]
    takes = [take for take in store.takes() if take.subject == who]
    own = [ARKIT52.index(name) for name in LIP32]
    errors = [
        FRAME_ERRORS["lve"](
            predict(run, {s.modality: store.read(s.id, take.clip.id) for s in (AUDIO, TEXT, IMAGE)}, who),
            store.read(TARGET.id, take.target)[:, own],
        )
        for take in takes
    ]
    assert scores.subjects[who]["heads"]["lve"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)


def test_evaluating_on_another_store_is_refused(fitted, tmp_path):
    run = load_run(fitted[0])
    with pytest.raises(NotFound, match=r"that the run in .* was fitted on are not in the store at"):
        evaluate(run, Store.create(tmp_path / "empty"))
    with pytest.raises(BadInput, match=r"split 'all' is none of train, validation, test"):
        evaluate(run, Store.create(tmp_path / "empty"), "all")


# --- learning --------------------------------------------------------------------------------------


def test_the_heads_overfit_one_clip(store):
    """Wiring: LVE below 1e-4 within 500 steps without dropout."""
    rows = rows_of(5 * clock.SPEECH_RATE, 0.4)
    frames = len(rows["image"])
    sizes = {"feature_sizes": {"audio": 12, "text": 9}, "coefficients": 32, "styles": 1}
    quiet = {"dropout": 0.0, "modality_dropout": 0.0, "image_size": PIXELS, "image_rows": (8, 16)}
    torch.manual_seed(0)
    heads = Heads(HeadsConfig(**sizes, **preset("fast", FPS, **quiet)))
    features = {name: data.on_frames(rows[name], frames, FPS)[None] for name in ("audio", "text")}
    features["image"] = torch.from_numpy(rows["image"][:, 8:])[None]
    target = torch.from_numpy(rows["target"][:, :32])[None]
    valid = valid_frames(torch.tensor([frames]))
    heads.start_from(target.mean((0, 1)), *data.image_statistics(features["image"][0]))
    before = lve(target.mean((0, 1)).expand(frames, -1).numpy(), target[0].numpy())
    optimiser = torch.optim.Adam(heads.parameters(), lr=1e-3)
    schedule = Schedule(1, 1, 1e-3, warm_up=0.05, cosine=True)
    reached = math.inf
    for step in range(500):
        output = heads(features, torch.tensor([0]), valid)
        reached = lve(output.prediction[0].detach().numpy(), target[0].numpy())
        if reached < 1e-4:
            break
        optimiser.param_groups[0]["lr"] = learning_rate(schedule, step, 500)
        optimiser.zero_grad()
        losses.total(output, target, valid, losses.Weights()).total.backward()
        optimiser.step()
    assert before > 0.01
    assert reached < 1e-4


def test_curves_come_at_the_right_time(tmp_path):
    """On held-out clips the error over target lags of -8..8 frames is least at 0.

    Overfitting alone does not notice a shift; the target and the features were made from one clock.
    """
    store = make_store(tmp_path / "store", subjects=6, clips=4)
    fit(store, tmp_path / "run", FitOptions(epochs=10, batch_size=2, learning_rate=3e-3, device="cpu"))
    run = load_run(tmp_path / "run")
    held_out = [t for t in store.takes() if t.subject in run.config["split"]["test"]]
    own = [ARKIT52.index(name) for name in LIP32]
    errors = {lag: [] for lag in range(-8, 9)}
    for take in held_out:
        native = {spec.modality: store.read(spec.id, take.clip.id) for spec in (AUDIO, TEXT, IMAGE)}
        prediction = predict(run, native)[8:-8]
        target = store.read(TARGET.id, take.target)[:, own]
        for lag, found in errors.items():
            found.append(FRAME_ERRORS["lve"](prediction, target[8 + lag : len(target) - 8 + lag]))
    curve = {lag: np.concatenate(found).mean() for lag, found in errors.items()}
    best = min(curve, key=curve.get)
    assert abs(best) <= 1
    assert min(curve[-5], curve[5]) > 1.1 * curve[best]


WITHOUT_TRANSFORMERS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "dask", "distributed"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
from pmm.store.catalog import Store
from pmm.train.evaluate import evaluate
from pmm.train.run import FitOptions, fit, load_run
store = Store.open(sys.argv[1])
fit(store, sys.argv[2], FitOptions(epochs=1, device="cpu"))
print(evaluate(load_run(sys.argv[2]), store).clips)
"""


COMMAND_WITHOUT_TRANSFORMERS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "dask", "distributed"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
from pmm.cli import main
main(sys.argv[1:])
"""


def command(*args):
    line = [sys.executable, "-P", "-c", COMMAND_WITHOUT_TRANSFORMERS, *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_the_commands_need_no_transformers_and_no_dask_and_add_no_more_than_a_snapshot(tmp_path):
    """``pmm fit`` and ``pmm eval`` as processes: what was in the store stays untouched, to the time stamp."""
    make_store(tmp_path / "store", subjects=3, clips=1)
    contents = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in contents}
    options = ("--without", "text", "--without", "semantic", "--max-context", 60, "--dropout", 0)
    options += ("--protocol", "cross-subject", "--window", 5, "--epochs", 1, "--device", "cpu")
    done = command("fit", tmp_path / "store", "--run", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    scored = command("eval", tmp_path / "run", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["clips"] == 1
    drawn = ("--features-from-store", tmp_path / "store", "--clip", "person1/take0", "-o", tmp_path / "a.csv")
    animated = command("animate", tmp_path / "run", *drawn)
    assert animated.returncode == 0, animated.stderr
    assert animated.stdout == f"28 frames at 30 fps (0:00:01) from cached features, in {tmp_path / 'a.csv'}\n"
    assert {path: path.stat().st_mtime_ns for path in contents} == before
    added = {path for path in (tmp_path / "store").rglob("*") if path.is_file()} - set(contents)
    assert {path.parent.name for path in added} == {"snapshots"}
    run = load_run(tmp_path / "run")
    assert run.options.without == ("text", "semantic")
    config = run.heads.config
    assert (config.modalities, config.max_context, config.dropout) == (("image", "audio"), 60, 0)
    assert run.config["schedule"]["window"] == 5


def test_a_cached_take_is_animated_as_its_features_predict(pmm, store, fitted, tmp_path):
    path, out = fitted[0], tmp_path / "out.csv"
    take, style = store.takes()[4], load_run(path).styles[1]
    source = ("--features-from-store", store.path)
    done = pmm("animate", path, *source, "--clip", take.source, "-o", out, "--style", style, "--json")
    assert done.code == 0, done.err
    native = {spec.modality: store.read(spec.id, take.clip.id) for spec in (AUDIO, TEXT, IMAGE)}
    run = load_run(path)
    expected = np.clip(predict(run, native, style=run.styles[1]), 0, 1)
    rows = [line.split(",") for line in out.read_text().splitlines()]
    column = rows[0].index("JawOpen")
    written = [float(row[column]) for row in rows[1:]]
    np.testing.assert_allclose(written, expected[:, run.names.index("JawOpen")], atol=1e-6)
    for name, complaint in (
        ("nobody/take9", f"no take 'nobody/take9' in {store.where}; `pmm store ls {store.where}` names them"),
        (take.source, f"{out} already exists and nothing is overwritten; choose another name"),
    ):
        other = tmp_path / "new.csv" if name != take.source else out
        assert pmm("animate", path, *source, "--clip", name, "-o", other).complaint == complaint
    mixed = pmm("animate", path, tmp_path / "a.wav", *source, "--clip", take.source, "-o", tmp_path / "x.csv")
    assert (mixed.code, "no sound, no model" in mixed.complaint) == (2, True)


def test_a_last_checkpoint_that_was_cut_off_is_one_line(store, fitted, tmp_path):
    path = shutil.copytree(fitted[0], tmp_path / "run")
    whole = (path / "last.safetensors").read_bytes()
    (path / "last.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        BadInput, match=r"last.safetensors is truncated or no checkpoint of pmm .*; it cannot"
    ):
        fit(store, path, FitOptions(), resume=True)


def test_leaving_every_modality_out_is_one_line(pmm, store, tmp_path):
    without = [part for name in ("text", "audio", "image") for part in ("--without", name)]
    done = pmm("fit", store.path, "--run", tmp_path / "run", *without)
    assert done.code == 1
    assert done.complaint == "modalities none: at least one of image, text, audio must remain"
    assert not (tmp_path / "run").exists()


def test_the_command_says_who_counts_as_one_person(pmm, tmp_path):
    store = make_store(tmp_path / "store", subjects=4, clips=1)
    first, second, *_ = store.takes()
    copy = replace(first, subject=second.subject, source="person1/copy.wav")
    store.publish_takes(
        "studio", [*store.takes(), copy], {"host": "here", "root": "/there", "layout": "made-up"}
    )
    done = pmm("fit", store.path, "--run", tmp_path / "run", "--epochs", 1, "--device", "cpu")
    said = f"person0, person1 share clip {first.clip.id[:12]} (person0/take0.wav) and count as one person"
    assert f"people    {said}" in done.err.splitlines()


def test_fit_and_evaluate_need_no_transformers_and_no_dask(store, tmp_path):
    command = [sys.executable, "-P", "-c", WITHOUT_TRANSFORMERS, str(store.path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
