"""Scores of a run: what each number is, recomputed from the curves; styles; swapped modalities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pmm import BadInput, NotFound
from pmm.store import clock
from pmm.store.catalog import Store
from pmm.store.clip import Clip, Take
from pmm.store.feature import FeatureSpec
from pmm.store.rig import ARKIT52, LIP32
from pmm.train import metrics
from pmm.train.evaluate import METRICS, evaluate
from pmm.train.importance import EVERYTHING, derangement, importance
from pmm.train.options import FitOptions
from pmm.train.run import Run, fit, load_part, load_run, predict

FPS = 30
AUDIO = FeatureSpec("audio", "made-up/1", "float16", (8,), None, {"weights": "a"})
TEXT = FeatureSpec("text", "made-up/1", "float16", (6,), None, {"weights": "t"})
TARGET = FeatureSpec("target", "made-up/1", "float32", (52,), FPS, {"names": list(ARKIT52)})
SPECS = {"audio": AUDIO, "text": TEXT}


def syllables(times: np.ndarray, seed: int) -> np.ndarray:
    """(n,) in [0, 1]: bumps at other places for every seed, and a closed half second at the end."""
    draw = np.random.default_rng(seed)
    centres = np.arange(0.2, times[-1] - 0.7, 0.25) + draw.uniform(-0.08, 0.08)
    heights = draw.uniform(0.3, 1.0, len(centres))
    return sum(h * np.exp(-(((times - c) / 0.06) ** 2)) for c, h in zip(centres, heights))


def publish(path: Path, subjects: int = 4, clips: int = 3) -> Store:
    """Clips whose face follows audio; text is noise."""
    store, takes = Store.create(path), []
    rows: dict[str, list] = {spec.id: [] for spec in (AUDIO, TEXT, TARGET)}
    mix = np.random.default_rng(1).normal(size=8)
    for number in range(subjects * clips):
        who, n = divmod(number, clips)
        clip = Clip(f"{number:02x}".ljust(64, "0"), clock.SPEECH_RATE, 1, 0, 24_000 + 3_200 * n)
        take = Take(clip, clip.id[::-1], f"person{who}", source=f"person{who}/{n}.wav")
        steps, frames = clock.steps(clip.samples), clock.frames(clip.samples, clip.rate, FPS)
        noise = np.random.default_rng(1000 + number)
        heard = syllables((np.arange(steps) + 0.625) * 0.02, number)
        seen = syllables(np.arange(frames) / FPS, number)
        target = np.zeros((frames, 52), np.float32)
        target[:, ARKIT52.index("JawOpen")] = 0.02 + 0.5 * seen
        target[:, ARKIT52.index("MouthPucker")] = 0.3 * seen**2
        audio = heard[:, None] * mix + 0.1 * noise.normal(size=(steps, 8))
        text = noise.normal(size=(steps, 6))
        for spec, values in ((AUDIO, audio), (TEXT, text), (TARGET, target)):
            rows[spec.id].append((spec.row_id(clip.id, take.target), values.astype(spec.dtype)))
        takes.append(take)
    for spec in (AUDIO, TEXT, TARGET):
        store.publish(spec, rows[spec.id], {"label": "made up (untrained stand-in)"})
    store.publish_takes("studio", takes, {"host": "here", "root": "/there", "layout": "made-up"})
    return store


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Run]:
    root = tmp_path_factory.mktemp("scored")
    store = publish(root / "store")
    options = FitOptions(epochs=12, batch_size=2, learning_rate=3e-3, device="cpu", without=("image",))
    fit(store, root / "run", options)
    return store, load_run(root / "run", "cpu")


def curves(store: Store, run: Run, part: str, style: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(subject, prediction, target) of every take of a part, by the public ``predict``."""
    own = [ARKIT52.index(name) for name in LIP32]
    ids = {name for takes in run.config["split"][part].values() for name in takes}
    takes = [take for take in store.takes() if take.id in ids]
    return [
        (
            take.subject,
            predict(run, {name: store.read(spec.id, take.clip.id) for name, spec in SPECS.items()}, style),
            store.read(TARGET.id, take.target)[:, own],
        )
        for take in takes
    ]


def test_motion_and_jitter_are_pooled_within_clips(fitted: tuple[Store, Run]) -> None:
    store, run = fitted
    scores = evaluate(run, store)
    found: dict[str, list[np.ndarray]] = {"motion": [], "motion_l2": [], "jitter": []}
    captured = []
    for style in run.styles:
        for _, prediction, target in curves(store, run, "test", style):
            wrong = np.diff(prediction.astype(float), axis=0) - np.diff(target.astype(float), axis=0)
            found["motion"].append((wrong**2).mean(1))
            found["motion_l2"].append(np.abs(wrong).mean(1))
            found["jitter"].append(np.abs(np.diff(prediction.astype(float), 2, axis=0)).mean(1))
            captured.append(np.abs(np.diff(target.astype(float), 2, axis=0)).mean(1))
    for name, values in found.items():
        assert scores.scores["heads"][name] == pytest.approx(np.concatenate(values).mean(), rel=1e-4), name
    assert scores.target_jitter == pytest.approx(np.concatenate(captured).mean(), rel=1e-6)
    assert scores.scores["mean_face"]["jitter"] == scores.scores["silence"]["jitter"] == 0


def test_each_coefficient_has_its_own_error(fitted: tuple[Store, Run]) -> None:
    store, run = fitted
    scores = evaluate(run, store)
    wrong = np.concatenate([p - t for s in run.styles for _, p, t in curves(store, run, "test", s)])
    assert tuple(scores.coefficients) == LIP32
    for column, name in enumerate(LIP32):
        own = scores.coefficients[name]["heads"]
        assert own["absolute"] == pytest.approx(np.abs(wrong[:, column]).mean(), rel=1e-4, abs=1e-7)
        assert own["squared"] == pytest.approx(np.square(wrong[:, column]).mean(), rel=1e-4, abs=1e-9)
    for who in ("heads", "mean_face", "silence"):
        mean = np.mean([score[who]["squared"] for score in scores.coefficients.values()])
        assert mean == pytest.approx(scores.scores[who]["ale"], rel=1e-6)


def test_pauses_are_told_apart(fitted: tuple[Store, Run]) -> None:
    """Every clip ends in half a second of silence; there the captured jaw is at 0.02 and still."""
    store, run = fitted
    pauses = evaluate(run, store).pauses
    jaw = LIP32.index("JawOpen")
    rest = metrics.rest(np.concatenate([t[:, jaw] for _, _, t in curves(store, run, "test", "mean")]))
    opened, shaken, frames = [], [], 0
    for style in run.styles:
        for _, prediction, target in curves(store, run, "test", style):
            pause = metrics.pauses(target, LIP32, FPS, rest)
            opened.append(prediction[pause > 0, jaw])
            shaken.append(metrics.within(pause, prediction))
            frames += int((pause > 0).sum())
    assert pauses.frames == frames / len(run.styles) > 20
    assert pauses.jaw_open["heads"] == pytest.approx(np.concatenate(opened).mean(), rel=1e-4)
    assert pauses.jitter["heads"] == pytest.approx(np.concatenate(shaken).mean(), rel=1e-3)
    assert pauses.jaw_open["target"] == pytest.approx(0.02, abs=2e-3)
    assert pauses.jaw_open["silence"] == pauses.jitter["mean_face"] == 0
    assert pauses.jaw_open["mean_face"] == pytest.approx(run.mean[jaw], rel=1e-6)
    assert pauses.jaw_open["heads"] < pauses.jaw_open["mean_face"]  # fitted heads close the mouth


def test_a_style_can_be_fixed(fitted: tuple[Store, Run]) -> None:
    store, run = fitted
    for style in (run.styles[0], "mean"):
        scores = evaluate(run, store, "test", style)
        errors = [metrics.largest_squared(p, t) for _, p, t in curves(store, run, "test", style)]
        assert scores.style == style
        assert scores.scores["heads"]["lve"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)
    own = evaluate(run, store, "train")
    forced = evaluate(run, store, "train", run.styles[1])
    assert own.subjects[run.styles[1]] == forced.subjects[run.styles[1]]
    assert own.subjects[run.styles[0]] != forced.subjects[run.styles[0]]
    with pytest.raises(NotFound, match=r"style 'nobody' is not in the run at .*; it has mean, person"):
        evaluate(run, store, "test", "nobody")


def test_a_part_that_does_not_fit_into_memory_scores_the_same(fitted: tuple[Store, Run]) -> None:
    store, run = fitted
    inside, outside = load_part(run, store, "train"), load_part(run, store, "train", memory_limit=1)
    assert (inside.streams, outside.streams) == (False, True)
    assert evaluate(run, store, "train", corpus=outside) == evaluate(run, store, "train", corpus=inside)


def test_scores_survive_json(fitted: tuple[Store, Run]) -> None:
    store, run = fitted
    value = json.loads(json.dumps(evaluate(run, store).to_json()))
    assert set(value["scores"]["heads"]) == set(METRICS)
    assert set(value["pauses"]["jaw_open"]) == {"heads", "mean_face", "silence", "target"}
    assert set(value["coefficients"]) == set(LIP32)
    ((who, own),) = value["subjects"].items()
    assert who in run.config["split"]["test"]
    assert own["heads"] == value["scores"]["heads"]


# --- importance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 10, 57])
def test_a_derangement_leaves_nothing_in_its_place(count: int) -> None:
    other = derangement(count, 0)
    assert sorted(other.tolist()) == list(range(count))
    assert not (other == torch.arange(count)).any()
    assert torch.equal(derangement(count, 0), other)
    if count > 9:
        assert len({tuple(derangement(count, seed).tolist()) for seed in range(9)}) > 7


def test_importance_is_the_lve_with_another_clips_features(fitted: tuple[Store, Run]) -> None:
    """Against ``predict`` on rows that were swapped here, clip by clip."""
    store, run = fitted
    found = importance(run, store, "validation", run.styles[0], seed=4)
    ids = [name for takes in run.config["split"]["validation"].values() for name in takes]
    takes = {take.id: take for take in store.takes()}
    chosen = [takes[name] for name in ids]
    own = [ARKIT52.index(name) for name in LIP32]
    frames = [clock.frames(take.clip.samples, take.clip.rate, FPS) for take in chosen]
    assert len(set(frames)) > 1

    from pmm.train.data import on_frames

    errors = []
    for n, other in enumerate(derangement(len(chosen), 4).tolist()):
        rows = {
            name: on_frames(store.read(spec.id, chosen[k].clip.id), frames[k], FPS)
            for name, spec, k in (("audio", AUDIO, other), ("text", TEXT, n))
        }
        rows["audio"] = rows["audio"][torch.arange(frames[n]) % frames[other]]
        with torch.no_grad():
            valid = torch.ones(1, frames[n], dtype=torch.bool)
            out = run.heads({k: x[None] for k, x in rows.items()}, torch.tensor([0]), valid).prediction[0]
        errors.append(metrics.largest_squared(out.numpy(), store.read(TARGET.id, chosen[n].target)[:, own]))
    assert found.swapped["audio"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-4)
    assert found.lve == pytest.approx(
        evaluate(run, store, "validation", run.styles[0]).scores["heads"]["lve"], rel=1e-5
    )


def test_heads_listen_to_what_says_something_and_not_to_noise(fitted: tuple[Store, Run]) -> None:
    store, run = fitted
    found = importance(run, store, "train")
    assert list(found.swapped) == ["text", "audio", EVERYTHING]
    assert found.change("audio") > 0.5 * found.lve
    assert abs(found.change("text")) < 0.25 * found.change("audio")
    assert found.change(EVERYTHING) > 0.5 * found.lve
    assert found.relative("audio") == pytest.approx(found.swapped["audio"] / found.lve - 1)
    value = json.loads(json.dumps(found.to_json()))["swapped"]["audio"]
    assert value["change"] == pytest.approx(value["lve"] - found.lve)


def test_one_clip_has_nothing_to_swap_with(tmp_path: Path) -> None:
    store = publish(tmp_path / "store", subjects=3, clips=1)
    fit(store, tmp_path / "run", FitOptions(epochs=1, device="cpu", without=("image",)))
    with pytest.raises(BadInput, match=r"test part of the run in .* has 1 clip, and nothing to swap it with"):
        importance(load_run(tmp_path / "run", "cpu"), store)


# --- the command -----------------------------------------------------------------------------------


def test_the_table_says_all_and_stays_readable(pmm, fitted: tuple[Store, Run]) -> None:
    _, run = fitted
    done = pmm("eval", run.path, "--importance", "--device", "cpu")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "test: 3 clips, 153 frames of 1 subject, under 2 styles"
    assert lines[1].split() == ["LVE", "LVE", "(l2)", "ALE", "ALE", "(l2)"]
    assert lines[5].split() == ["motion", "motion", "(l2)", "jitter", "pause", "jaw", "pause", "jitter"]
    assert [line.split()[0] for line in lines[2:5]] == ["heads", "mean", "silence"]
    assert [line.split()[0] for line in lines[6:10]] == ["heads", "mean", "silence", "captured"]
    assert lines[9].split()[1:3] == ["-", "-"]
    assert lines[10].startswith("pauses: ")
    assert lines[11].split() == ["largest", "squared", "errors", "heads", "mean", "face"]
    assert [line.split()[0] for line in lines[12:14]] == ["JawOpen", "MouthPucker"]
    assert lines[15].startswith("LVE of the heads is 0.")
    assert [line.split()[0] for line in lines[17:]] == ["importance:", "as", "text", "audio", "everything"]
    assert max(map(len, lines)) < 80


def test_the_command_fixes_a_style_and_prints_json(pmm, fitted: tuple[Store, Run]) -> None:
    store, run = fitted
    style = run.styles[0]
    value = json.loads(pmm("eval", run.path, "--style", style, "--importance", "--json").out)
    assert value["scores"]["heads"] == evaluate(run, store, style=style).scores["heads"]
    assert value["importance"]["style"] == value["style"] == style
    assert set(value["importance"]["swapped"]) == {"text", "audio", EVERYTHING}
    assert f"in the style {style}" in pmm("eval", run.path, "--style", style).out
    done = pmm("eval", run.path, "--style", "nobody")
    assert (done.code, done.out) == (1, "")
    assert (
        done.complaint
        == f"style 'nobody' is not in the run at {run.path}; it has mean, {', '.join(run.styles)}"
    )
