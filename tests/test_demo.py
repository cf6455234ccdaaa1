"""The main job, end to end, in a process of its own: `pmm demo` on a smaller corpus than its default.

Speech is made on the spot, features are those of the untrained stand-ins, and the scores are of
subjects the heads never saw.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pmm.store.catalog import Store
from pmm.train.data import batches
from pmm.train.run import Run, load_part, load_run

pytest.importorskip("espeakng_loader", reason="pmm demo needs the extra: pip install 'pmmtalk[synth]'")

WORST_LAG = 8


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, pmm_process: Callable) -> tuple[Path, str]:
    """The demo's folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "pmm-demo"
    options = ("--dir", folder, "--minutes", 4, "--epochs", 12, "--seed", 0, "--device", "cpu")
    process = pmm_process("demo", *options)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return folder, out


def test_demo_shows_each_command_with_its_time(demo: tuple[Path, str]) -> None:
    _, out = demo
    assert re.findall(r"^\$ pmm (\w+)", out, re.M) == [
        "synth",
        "precompute",
        "store",
        "fit",
        "animate",
        "eval",
    ]
    assert len(re.findall(r"^  \(\d+\.\d s\)$", out, re.M)) == 6
    assert "untrained stand-in" in out


def test_demo_ends_with_the_scores_and_the_paths(demo: tuple[Path, str]) -> None:
    folder, out = demo
    tail = out[out.index("$ pmm eval") :]
    assert re.search(r"^heads( +\d\.\d{5}){4}$", tail, re.M)
    curves = Path(re.search(r"^curves +(\S+\.csv)", tail, re.M)[1])  # type: ignore[index]
    picture = Path(re.search(r"^picture +(\S+\.png)", tail, re.M)[1])  # type: ignore[index]
    assert {curves.parent, picture.parent} == {folder}
    rows = list(csv.reader(curves.read_text().splitlines()))
    assert {len(row) for row in rows} == {63}
    assert len(rows) > 60
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_fitted_heads_beat_the_mean_face_on_unseen_subjects(demo: tuple[Path, str]) -> None:
    _, out = demo
    ratio = float(re.search(r"LVE of the heads is (\d\.\d+) of the mean face's", out)[1])  # type: ignore[index]
    assert ratio <= 0.92


def test_curves_come_when_the_sound_does(demo: tuple[Path, str]) -> None:
    """A shift anywhere between the audio file and the curves would move the minimum away from lag 0."""
    folder, _ = demo
    run = load_run(folder / "run", device="cpu")
    error = error_by_lag(run, Store.open(folder / "store"))
    best = min(error, key=error.__getitem__)
    assert abs(best) <= 1, error
    assert min(error[-5], error[5]) >= 1.1 * error[best], error


@torch.no_grad()
def error_by_lag(run: Run, store: Store) -> dict[int, float]:
    """LVE on the test subjects against targets that come ``lag`` frames later than they should."""
    corpus = load_part(run, store, "test")
    style = run.heads.styles.weight.mean(0)
    found: dict[int, list[np.ndarray]] = {lag: [] for lag in range(-WORST_LAG, WORST_LAG + 1)}
    for batch in batches(corpus, torch.arange(len(corpus.takes)), 8):
        encoded = run.heads.encode(batch.features, batch.valid)
        prediction = run.heads.decode(encoded, style.expand(len(batch.clips), -1), batch.valid)
        for clip, length in enumerate(batch.valid.sum(1).tolist()):
            inner = prediction[clip, WORST_LAG : length - WORST_LAG].numpy()
            for lag, errors in found.items():
                shifted = batch.target[clip, WORST_LAG + lag : length - WORST_LAG + lag].numpy()
                errors.append(((inner - shifted) ** 2).max(axis=1))
    return {lag: float(np.concatenate(errors).mean()) for lag, errors in found.items()}
