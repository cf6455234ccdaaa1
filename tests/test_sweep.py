"""Several fits over one corpus, early ends, interruptions, and beginning from another run."""

import json
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from pmm import AlreadyThere, BadInput, NotFound
from pmm.store import clock
from pmm.store.catalog import Store
from pmm.store.clip import Clip, Take
from pmm.store.feature import FeatureSpec
from pmm.store.rig import ARKIT52
from pmm.train import sweep as sweeps
from pmm.train.evaluate import evaluate
from pmm.train.loaded import Content
from pmm.train.loop import EpochDone, Schedule, State, StepDone
from pmm.train.memory import Cached
from pmm.train.options import FitOptions
from pmm.train.run import Job, JobFailed, JobStarted, fit, fit_many, load_run
from pmm.train.sweep import sweep

FPS = 30
AUDIO = FeatureSpec("audio", "made-up/1", "float16", (12,), None, {"weights": "a"})
IMAGE = FeatureSpec("image", "made-up/1", "uint8", (16, 16, 3), FPS, {"weights": "i"})
TARGET = FeatureSpec("target", "made-up/1", "float32", (52,), FPS, {"names": list(ARKIT52)})
SPECS = (AUDIO, IMAGE, TARGET)
TINY = FitOptions(preset="smoke", without=("text",), device="cpu")


def curves(times, phase):
    return 0.5 + 0.5 * np.sin(2 * np.pi * (times[:, None] * np.array([1.1, 1.7, 2.3, 2.9]) + phase))


def make_store(path, subjects=5, clips=3, seconds=1.0, manner=lambda who: 1.0, first=0):
    """Clips of four curves of time that audio and image show; ``manner`` scales what a face makes of them."""
    store, takes, rows = Store.create(path), [], {spec.id: [] for spec in SPECS}
    mixes = np.random.default_rng(7)
    heard, shown = mixes.normal(size=(4, 12)), mixes.uniform(0, 0.25, size=(4, 52))
    for who in range(first, first + subjects):
        for n in range(clips):
            samples = int(clock.SPEECH_RATE * (seconds + 0.2 * n))
            clip = Clip(f"{who:02x}{n:02x}".ljust(64, "0"), clock.SPEECH_RATE, 1, 0, samples)
            takes.append(Take(clip, clip.id[::-1], f"person{who}", source=f"person{who}/take{n}.wav"))
            at_steps = curves((np.arange(clock.steps(samples)) + 0.625) * 0.02, 0.13 * who + 0.31 * n)
            frames = clock.frames(samples, clock.SPEECH_RATE, FPS)
            at_frames = curves(np.arange(frames) / FPS, 0.13 * who + 0.31 * n)
            image = np.full((frames, 16, 16, 3), 90.0)
            image[:, 8:] += 60 * np.kron(at_frames.reshape(-1, 2, 2), np.ones((1, 4, 8)))[..., None]
            rows[AUDIO.id].append((clip.id, (at_steps @ heard).astype(np.float16)))
            rows[IMAGE.id].append((clip.id, image.astype(np.uint8)))
            rows[TARGET.id].append((clip.id[::-1], (manner(who) * at_frames @ shown).astype(np.float32)))
    for spec in SPECS:
        store.publish(spec, rows[spec.id], {"label": "made up (untrained stand-in)"})
    store.publish_takes("studio", takes, {"host": "here", "root": "/there", "layout": "made-up"})
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


def weights(path):
    return (path / "last.safetensors").read_bytes()


def lines(path, name="metrics.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


# --- several fits ----------------------------------------------------------------------------------


def test_each_fit_of_a_sweep_is_what_it_would_be_alone_and_the_data_is_read_once(store, tmp_path):
    """To the bit: other seeds (and so other subjects), other rows of the image, other coefficients."""
    wanted = {
        "seed": replace(TINY, seed=1),
        "rig": replace(TINY, rig="arkit52"),
        "rows": replace(TINY, preset="paper", epochs=1),
        "sound": replace(TINY, without=("text", "image")),
    }
    events = []
    jobs = [Job(tmp_path / "many" / name, options) for name, options in wanted.items()]
    results = fit_many(store, jobs, events.append)
    assert [type(e) for e in events if isinstance(e, Content | Cached | JobStarted)] == [
        *(Content, Cached),
        *[JobStarted] * 4,
    ]
    for job, result in zip(jobs, results):
        alone = fit(store, tmp_path / job.path.name, job.options)
        assert weights(job.path) == weights(tmp_path / job.path.name)
        assert (result.best_lve, result.clips, result.frames) == (alone.best_lve, alone.clips, alone.frames)
        assert [line["losses"] for line in lines(job.path)] == [
            line["losses"] for line in lines(tmp_path / job.path.name)
        ]


def test_a_grid_has_every_value_with_every_seed(tmp_path):
    jobs = sweeps.plan(tmp_path, replace(TINY, seed=4), ["lr=0.001,0.01", "without=none,text+motion"], 2)
    assert [job.path.name for job in jobs] == [
        "learning_rate-0.001_without-none_seed-4",
        "learning_rate-0.001_without-none_seed-5",
        "learning_rate-0.001_without-text+motion_seed-4",
        "learning_rate-0.001_without-text+motion_seed-5",
        "learning_rate-0.01_without-none_seed-4",
        "learning_rate-0.01_without-none_seed-5",
        "learning_rate-0.01_without-text+motion_seed-4",
        "learning_rate-0.01_without-text+motion_seed-5",
    ]
    assert jobs[-1].options == replace(TINY, seed=5, learning_rate=0.01, without=("text", "motion"))
    (one,) = sweeps.plan(tmp_path, TINY)
    assert one.path.name == "seed-0"
    (one,) = sweeps.plan(tmp_path, TINY, ["max-context=60"])
    assert (one.path.name, one.options.max_context) == ("max_context-60", 60)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["epochs"], r"--set epochs: expected key=value,value, with a key of preset, rig, epochs"),
        (["colour=red"], r"--set colour=red: expected key=value,value"),
        (["fps=25,30"], r"--set fps=25,30: expected key=value,value"),
        (["epochs=2,few"], r"--set epochs=2,few: 'few' is no int"),
        (["epochs=2,2"], r"--set epochs=2,2: a value stands there twice"),
        (["epochs=2", "epochs=3"], r"--set names epochs twice"),
        (["preset=slow"], r"preset 'slow' is none of fast, paper, smoke"),
        (["epochs=" + ",".join(map(str, range(1, 300)))], r"299 runs in one sweep; at most 200"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        sweeps.plan(tmp_path, TINY, settings)


def test_a_sweep_goes_on_where_it_was_stopped(store, tmp_path):
    whole = sweep(store, tmp_path / "whole", TINY, ["lr=0.001,0.002"], 2)
    steps = []

    def stopping():
        """In the second of four fits."""
        return len(steps) >= 7

    first = sweep(store, tmp_path / "run", TINY, ["lr=0.001,0.002"], 2, collect(steps), stopping=stopping)
    assert [one.ended for one in first] == ["done", "interrupted"]
    with pytest.raises(
        AlreadyThere, match=r"already exists and nothing is overwritten; go on with it by --resume"
    ):
        sweep(store, tmp_path / "run", TINY, ["lr=0.001,0.002"], 2)
    again = sweep(store, tmp_path / "run", TINY, ["lr=0.001,0.002"], 2, resume=True)
    assert [one.best_lve for one in again] == [one.best_lve for one in whole]
    for one, other in zip(again, whole):
        assert weights(one.path) == weights(other.path)
    wider = sweep(store, tmp_path / "run", TINY, ["lr=0.001,0.002,0.003"], 2, resume=True)
    assert len(wider) == 6
    with pytest.raises(BadInput, match=r"is a run, and a sweep makes a folder of runs"):
        sweep(store, whole[0].path, TINY)


def collect(steps):
    return lambda event: steps.append(event) if isinstance(event, StepDone) else None


def test_a_fit_that_diverges_does_not_stop_the_others(store, tmp_path):
    events = []
    results = sweep(store, tmp_path / "run", replace(TINY, epochs=9), ["lr=1e30,0.001"], 1, events.append)
    (failed,) = [e for e in events if isinstance(e, JobFailed)]
    assert failed.path.name == "learning_rate-1e+30"
    assert "the loss became" in failed.reason
    assert [one.path.name for one in results] == ["learning_rate-0.001"]


def test_the_command_fits_a_grid_and_compares_it(pmm, store, tmp_path):
    options = ("--preset", "smoke", "--without", "text", "--epochs", 1, "--device", "cpu")
    done = pmm(
        "fit", store.path, "--run", tmp_path / "grid", *options, "--set", "lr=0.001,0.01", "--seeds", 2
    )
    assert done.code == 0, done.err
    assert done.err.count("content ") == 1
    table = done.out.splitlines()
    assert table[0].split() == [
        "run",
        "learning_rate",
        "seed",
        *("epochs", "loss", "val", "LVE", "test", "LVE", "test", "ALE"),
    ]
    assert sorted(line.split()[0] for line in table[1:5]) == sorted(
        one.name for one in (tmp_path / "grid").iterdir()
    )
    assert [line.split()[:3] for line in table[5:7]] == [
        ["mean", "learning_rate", f"{rate}:"] for rate in rates(table)
    ]
    assert "note      these runs were validated on different subjects" in table[-1]
    told = json.loads(pmm("runs", tmp_path / "grid", "--json").out)
    best = [one["best_lve"] for one in told["runs"]]
    assert best == sorted(best)
    assert pmm("runs", tmp_path / "grid").out.splitlines() == table


def rates(table):
    """The learning rates in the order of their mean LVE, from the table's own lines."""
    found = {}
    for line in table[1:5]:
        _, rate, _, _, _, lve, *_ = line.split()
        found.setdefault(rate, []).append(float(lve))
    return sorted(found, key=lambda rate: np.mean(found[rate]))


# --- early ends ------------------------------------------------------------------------------------


def test_training_stops_when_nothing_gets_better(store, tmp_path):
    options = replace(TINY, epochs=40, patience=2, learning_rate=0.05)
    result = fit(store, tmp_path / "run", options)
    assert result.ended == "patience"
    assert result.epochs == result.best_epoch + 2 < 40
    assert [line["epoch"] for line in lines(tmp_path / "run")] == list(range(1, result.epochs + 1))
    assert fit(store, tmp_path / "run", FitOptions(), resume=True) == result
    patient = fit(store, tmp_path / "on", replace(options, patience=0, epochs=result.epochs + 3))
    assert patient.ended == "done"


def test_patience_counts_from_the_best_epoch():
    schedule = Schedule(10, 1, 1.0, patience=3)
    state = State()
    for lve, goes_on in ((3.0, True), (2.0, True), (2.0, True), (2.5, True), (2.1, False)):
        state = state.after_epoch(lve)
        assert schedule.to_do(state) == goes_on
    assert (state.epoch, state.best_epoch, state.best_lve) == (5, 2, 2.0)
    assert Schedule(10, 1, 1.0).to_do(state)
    with pytest.raises(BadInput, match="patience -1: it must be at least 0"):
        Schedule(1, 1, 1.0, patience=-1)


@pytest.mark.parametrize("after", [1, 3, 4, 7])
def test_a_fit_that_is_asked_to_stop_goes_on_from_that_step_to_the_same_end(store, tmp_path, after):
    """Within an epoch, at its end, and in the last one: three steps an epoch, two epochs."""
    whole, told, later = [], [], []
    fit(store, tmp_path / "whole", replace(TINY, epochs=3), whole.append)
    stopping = lambda: sum(isinstance(e, StepDone | EpochDone) for e in told) >= after  # noqa: E731
    stopped = fit(store, tmp_path / "run", replace(TINY, epochs=3), told.append, stopping=stopping)
    assert stopped.ended == "interrupted"
    result = fit(store, tmp_path / "run", FitOptions(), later.append, resume=True)
    assert result.ended == "done"
    numbers = [
        [(type(e), e.epoch, e.losses) for e in events if isinstance(e, StepDone | EpochDone)]
        for events in (told + later, whole)
    ]
    assert numbers[0] == numbers[1]
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_keeps_the_heads_and_says_how_to_go_on(pmm, pmm_process, store, tmp_path):
    options = ("--preset", "smoke", "--without", "text", "--epochs", 100_000, "--device", "cpu")
    process = pmm_process("fit", store.path, "--run", tmp_path / "run", *options)
    steps = tmp_path / "run" / "steps.jsonl"
    while process.poll() is None and not steps.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "keeping the heads after this step; Ctrl-C again stops at once" in err
    assert err.splitlines()[-1] == "pmm: interrupted; run the same command again with --resume to go on"
    assert "interrupted; run in" in out
    done = lines(tmp_path / "run", "steps.jsonl")
    last = load_state(tmp_path / "run")
    assert (last.epoch * done[-1]["steps"] + last.step) == len(done)
    assert (tmp_path / "run" / "last.safetensors").exists()


def load_state(path):
    from pmm.train.checkpoint import read_state

    return read_state(path / "last.safetensors")


# --- what a run leaves -----------------------------------------------------------------------------


def test_every_step_is_a_line_with_its_times(store, tmp_path):
    fit(store, tmp_path / "run", TINY)
    steps = lines(tmp_path / "run", "steps.jsonl")
    assert [(line["epoch"], line["step"]) for line in steps] == [(e, s) for e in (1, 2) for s in (1, 2, 3)]
    for line in steps:
        assert set(line["seconds"]) == {"data", "forward", "backward", "optimiser"}
        assert all(value > 0 for value in line["seconds"].values())
    first = [line for line in steps if line["epoch"] == 1]
    assert sum(line["frames"] for line in first) == sum(
        line["frames"] for line in steps if line["epoch"] == 2
    )
    picture = (tmp_path / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")


# --- a new person ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """Heads fitted on people of one manner."""
    root = tmp_path_factory.mktemp("general")
    store = make_store(root / "store", subjects=5, clips=4)
    fit(store, root / "run", replace(TINY, epochs=25, learning_rate=5e-3))
    return root / "run"


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """Ten takes of somebody who opens the mouth half as far."""
    path = tmp_path_factory.mktemp("newcomer") / "store"
    return make_store(path, subjects=1, clips=10, manner=lambda who: 0.5, first=9)


def test_tuning_to_a_new_person_helps_on_takes_it_never_saw(general, newcomer, tmp_path):
    tuned = replace(FitOptions(), init=str(general), protocol="single", epochs=12, device="cpu")
    result = fit(newcomer, tmp_path / "run", replace(tuned, freeze=("image", "projections")))
    run, before = load_run(tmp_path / "run"), load_run(general)
    assert run.styles == ("person9",)
    scores = evaluate(run, newcomer, "test")
    assert set(scores.subjects) == {"person9"}
    untuned = fit(newcomer, tmp_path / "untuned", replace(tuned, epochs=1, learning_rate=1e-12))
    same = evaluate(load_run(tmp_path / "untuned"), newcomer, "test")
    assert result.clips == untuned.clips == 8
    assert scores.scores["heads"]["lve"] < 0.5 * same.scores["heads"]["lve"]
    kept, were = run.heads.parts(), before.heads.parts()
    for name in ("image", "projections"):
        assert all(bool((x == y).all()) for x, y in zip(kept[name], were[name]))
    assert not all(bool((x == y).all()) for x, y in zip(kept["decoder"], were["decoder"]))
    assert bool((run.heads.image.mean == before.heads.image.mean).all())


def test_a_new_style_begins_as_the_mean_and_a_known_one_as_it_was(general, tmp_path):
    store = make_store(tmp_path / "store", subjects=5, clips=3)
    options = FitOptions(init=str(general), protocol="single", epochs=1, learning_rate=1e-12, device="cpu")
    fit(store, tmp_path / "run", options)
    run, before = load_run(tmp_path / "run"), load_run(general)
    for who in run.styles:
        expected = before.style_vector(who if who in before.styles else "mean")
        np.testing.assert_allclose(run.style_vector(who).numpy(), expected.numpy(), atol=1e-9)
    assert set(run.styles) > set(before.styles)


def test_tuning_keeps_the_shape_of_the_heads(general, newcomer, tmp_path):
    options = FitOptions(init=str(general), protocol="single", epochs=1, device="cpu")
    with pytest.raises(BadInput, match=r"has rig 'lip32', and --init keeps it: leave out rig 'arkit52'"):
        fit(newcomer, tmp_path / "run", replace(options, rig="arkit52"))
    with pytest.raises(BadInput, match=r"freeze without init"):
        FitOptions(freeze=("image",))
    with pytest.raises(
        BadInput, match=r"freeze 'nose' is none of image, projections, styles, decoder, output"
    ):
        replace(options, freeze=("nose",))
    with pytest.raises(NotFound, match=r"no run at"):
        fit(newcomer, tmp_path / "run", replace(options, init=str(tmp_path / "nowhere")))


def test_an_interrupted_tuning_goes_on_to_the_same_end(general, newcomer, tmp_path):
    options = FitOptions(init=str(general), protocol="single", epochs=2, freeze=("image",), device="cpu")
    fit(newcomer, tmp_path / "whole", options)
    told = []
    fit(newcomer, tmp_path / "run", options, told.append, stopping=lambda: len(told) > 3)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "run", moved)
    fit(newcomer, moved, FitOptions(), resume=True)
    assert weights(moved) == weights(tmp_path / "whole")


# --- who takes part --------------------------------------------------------------------------------


def test_only_the_subjects_that_are_wanted_take_part(store, tmp_path):
    chosen = ("person0", "person2", "person4")
    fit(store, tmp_path / "run", replace(TINY, subjects=chosen, epochs=1))
    split = load_run(tmp_path / "run").config["split"]
    assert {who for people in split.values() for who in people} == set(chosen)
    with pytest.raises(NotFound) as caught:
        fit(store, tmp_path / "none", replace(TINY, subjects=("ada",)))
    assert str(caught.value) == (
        f"no take of ada is in {store.where}, only of person0, person1, person2, person3, person4"
    )
    assert not (tmp_path / "none").exists()


def test_one_split_for_several_seeds(store, tmp_path):
    results = sweep(store, tmp_path / "run", replace(TINY, split_seed=3, epochs=1), seeds=3)
    splits = [load_run(one.path).config["split"] for one in results]
    assert splits[0] == splits[1] == splits[2]
    assert len({one.best_lve for one in results}) == 3


def test_the_single_protocol_parts_the_takes_of_each_subject(newcomer, tmp_path):
    fit(newcomer, tmp_path / "run", replace(TINY, protocol="single", epochs=1))
    split = load_run(tmp_path / "run").config["split"]
    assert {part: list(people) for part, people in split.items()} == {
        part: ["person9"] for part in ("train", "validation", "test")
    }
    assert {part: len(people["person9"]) for part, people in split.items()} == {
        "train": 8,
        "validation": 1,
        "test": 1,
    }
    assert len({take for people in split.values() for take in people["person9"]}) == 10
    few = make_store(tmp_path / "few", subjects=1, clips=2)
    with pytest.raises(
        BadInput, match=r"person0 has 2 clips with a face track; the single protocol needs at"
    ):
        fit(few, tmp_path / "none", replace(TINY, protocol="single"))
