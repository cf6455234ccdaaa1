"""Table V: seven rows, several seeds, resumable, beside the paper's figures."""

from __future__ import annotations

import json
import re
import shutil
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pmm import BadInput
from pmm.store import clock
from pmm.store.catalog import Store
from pmm.store.clip import Clip, Take
from pmm.store.feature import FeatureSpec
from pmm.store.rig import ARKIT52
from pmm.train.ablate import SCORES, TABLE_V, Ablation, CellDone, CellStarted, ablate, plan, spread
from pmm.train.evaluate import evaluate
from pmm.train.loop import StepDone
from pmm.train.options import FitOptions
from pmm.train.run import load_run

FPS = 30
PIXELS = 16
OPTIONS = FitOptions(epochs=2, batch_size=2, device="cpu")
SPECS = (
    FeatureSpec("audio", "made-up/1", "float16", (8,), None, {"weights": "a"}),
    FeatureSpec("text", "made-up/1", "float16", (6,), None, {"weights": "t"}),
    FeatureSpec("image", "made-up/1", "uint8", (PIXELS, PIXELS, 3), FPS, {"weights": "i"}),
    FeatureSpec("target", "made-up/1", "float32", (52,), FPS, {"names": list(ARKIT52)}),
)
ROWS = ("full", *(f"without {name}" for name in ("text", "audio", "image", "temporal", "semantic", "motion")))


def publish(path: Path, label: str = "made up (untrained stand-in)") -> Store:
    """Four subjects of one clip of a second, features and faces drawn at random."""
    store, draw, takes = Store.create(path), np.random.default_rng(0), []
    rows: dict[str, list] = {spec.id: [] for spec in SPECS}
    for who in range(4):
        clip = Clip(f"{who:02x}".ljust(64, "0"), clock.SPEECH_RATE, 1, 0, 16_000)
        take = Take(clip, clip.id[::-1], f"person{who}", source=f"person{who}.wav")
        length = {None: clock.steps(clip.samples), FPS: FPS}
        for spec in SPECS:
            values = draw.uniform(0, 255 if spec.modality == "image" else 1, (length[spec.fps], *spec.shape))
            rows[spec.id].append((spec.row_id(clip.id, take.target), values.astype(spec.dtype)))
        takes.append(take)
    for spec in SPECS:
        store.publish(spec, rows[spec.id], {"label": label})
    store.publish_takes("studio", takes, {"host": "here", "root": "/there", "layout": "made-up"})
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return publish(tmp_path_factory.mktemp("ablated") / "store")


@pytest.fixture(scope="module")
def ablated(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ablation, list]:
    path, events = tmp_path_factory.mktemp("tables") / "table", []
    return path, ablate(store, path, OPTIONS, 2, events.append), events


def test_the_plan_is_seven_rows_of_every_seed(tmp_path: Path) -> None:
    cells = plan(tmp_path, replace(OPTIONS, seed=5), 2)
    assert [(cell.row.name, cell.seed) for cell in cells] == [(row, seed) for seed in (5, 6) for row in ROWS]
    assert cells[1].job.path == tmp_path / "without-text" / "seed-5"
    assert cells[1].job.options == replace(OPTIONS, seed=5, without=("text",))
    assert cells[0].job.options.without == ()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_ablated_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^without text: each row of the ablation leaves out its own; fit a"):
        plan(tmp_path, replace(OPTIONS, without=("text",)), 1)
    with pytest.raises(
        BadInput, match=r"^0 seeds: an ablation needs at least 1, and at least 2 for a spread"
    ):
        plan(tmp_path, OPTIONS, 0)


def test_the_papers_figures_are_table_v() -> None:
    printed = {row.name: (row.paper_lve, row.paper_ale) for row in TABLE_V}
    assert printed == {
        "full": (7.169, 0.640),
        "without text": (7.319, 0.682),
        "without audio": (8.313, 0.786),
        "without image": (7.459, 0.697),
        "without temporal": (7.680, 0.704),
        "without semantic": (7.599, 0.698),
        "without motion": (7.363, 0.681),
    }


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 4.0]) == pytest.approx(((16 + 1 + 25) / 9 / 2) ** 0.5)
    assert spread([3.0]) is None


def test_every_run_is_what_its_row_says(store: Store, ablated: tuple[Path, Ablation, list]) -> None:
    path, table, events = ablated
    done = [event for event in events if isinstance(event, CellDone)]
    assert len(done) == 14
    for event in done:
        run = load_run(event.cell.job.path)
        assert run.options == event.cell.job.options
        assert run.config["split"] == load_run(path / "full" / f"seed-{event.cell.seed}").config["split"]
    begun = [event for event in events if isinstance(event, CellStarted)]
    assert [(event.number, event.cells, event.state) for event in begun] == [
        (number, 14, "begins") for number in range(1, 15)
    ]
    scores = evaluate(load_run(path / "without-audio" / "seed-1"), store).scores["heads"]
    row = table.rows[2]
    assert (row.lve[1], row.ale[1]) == (scores["lve"], scores["ale"])


def test_the_table_holds_means_spreads_and_the_papers(ablated: tuple[Path, Ablation, list]) -> None:
    _, table, _ = ablated
    value = json.loads(json.dumps(table.to_json()))
    assert [row["row"] for row in value["rows"]] == list(ROWS)
    assert (value["seeds"], value["untrained_stand_in"], value["protocol"]) == ([0, 1], True, "cross-subject")
    full, text = value["rows"][0], value["rows"][1]
    assert text["lve"]["mean"] == pytest.approx(sum(text["lve"]["seeds"]) / 2)
    assert text["lve"]["spread"] == pytest.approx(statistics.stdev(text["lve"]["seeds"]))
    assert text["lve_over_full"]["seeds"] == pytest.approx(
        [own / whole for own, whole in zip(text["lve"]["seeds"], full["lve"]["seeds"])]
    )
    assert full["lve_over_full"] == {"mean": 1.0, "spread": 0.0, "seeds": [1.0, 1.0]}
    assert text["paper"] == {"lve_x100": 7.319, "ale_x100": 0.682, "data": "3D-CAVFA"}


def test_an_interrupted_table_goes_on_to_the_same(
    store: Store, ablated: tuple[Path, Ablation, list], tmp_path: Path
) -> None:
    """Ctrl-C in the third run: two are kept as they are, the third goes on, the rest begin."""

    def interrupt(event: object) -> None:
        stopped.append(event)
        begun = [one for one in stopped if isinstance(one, CellStarted)]
        if len(begun) == 3 and isinstance(event, StepDone) and event.epoch == 2:
            raise KeyboardInterrupt

    stopped: list = []
    with pytest.raises(KeyboardInterrupt):
        ablate(store, tmp_path / "table", OPTIONS, 1, interrupt)
    kept = {
        file: file.stat().st_mtime_ns
        for name in ("full", "without-text")
        for file in (tmp_path / "table" / name / "seed-0").iterdir()
    }
    assert len(kept) >= 8
    assert not (tmp_path / "table" / "without-audio" / "seed-0" / SCORES).exists()
    resumed: list = []
    table = ablate(store, tmp_path / "table", OPTIONS, 1, resumed.append)
    states = [event.state for event in resumed if isinstance(event, CellStarted)]
    assert states == ["finished"] * 2 + ["goes on"] + ["begins"] * 4
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert [row.lve[0] for row in table.rows] == [row.lve[0] for row in ablated[1].rows]


def test_a_run_made_otherwise_is_refused_before_anything_is_run(
    store: Store, ablated: tuple[Path, Ablation, list]
) -> None:
    path, table, _ = ablated
    events: list = []
    with pytest.raises(BadInput) as caught:
        ablate(store, path, replace(OPTIONS, epochs=3), 3, events.append)
    assert str(caught.value) == (
        f"the run in {path / 'full' / 'seed-0'} was made with epochs 2, not 3; give the same options as "
        "before, or another --run"
    )
    assert events == []
    assert ablate(store, path, replace(OPTIONS, device="auto"), 2) == table
    assert len(list(path.rglob("config.json"))) == 14


def test_a_stop_keeps_what_was_done_and_gives_no_table(store: Store, tmp_path: Path) -> None:
    """As Ctrl-C does it: the run under way is kept, and no other begins."""
    events: list = []
    stopped = ablate(
        store,
        tmp_path / "table",
        OPTIONS,
        1,
        events.append,
        lambda: any(isinstance(event, StepDone) for event in events),
    )
    assert stopped is None
    assert sum(isinstance(event, StepDone) for event in events) == 1
    assert sum(isinstance(event, CellStarted) for event in events) == 1
    assert not list((tmp_path / "table").rglob(SCORES))
    assert [file.parent.parent.name for file in (tmp_path / "table").rglob("last.safetensors")] == ["full"]


def test_trained_features_are_not_called_stand_ins(
    store: Store, ablated: tuple[Path, Ablation, list], tmp_path: Path
) -> None:
    path = shutil.copytree(ablated[0], tmp_path / "table")
    file = path / "full" / "seed-0" / "config.json"
    file.write_text(file.read_text().replace("untrained stand-in", "of the hub"))
    assert not ablate(store, path, OPTIONS, 2).stand_in
    (one_seed,) = ablate(store, path, OPTIONS, 1).to_json()["rows"][3]["lve"]["seeds"]
    assert ablate(store, path, OPTIONS, 1).to_json()["rows"][3]["lve"] == {
        "mean": one_seed,
        "spread": None,
        "seeds": [one_seed],
    }


def test_the_command_prints_the_table_beside_the_papers(
    pmm, store: Store, ablated: tuple[Path, Ablation, list]
) -> None:
    path, table, _ = ablated
    command = ("ablate", store.path, "--run", path, "--seeds", 2, "--epochs", 2, "--batch", 2)
    done = pmm(*command)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == (
        "cross-subject, test subjects, x1e-2: means of 2 seeds ± sample standard deviation; "
        "of full: LVE over full's"
    )
    assert "paper: LVE / ALE on 3D-CAVFA" in lines[1]
    for name, line, row in zip(ROWS, lines[2:], table.rows):
        assert line.startswith(f"{name:<17}")
        numbers = [float(found) for found in re.findall(r"\d+\.\d+", line)]
        assert numbers[0] == pytest.approx(100 * statistics.fmean(row.lve), abs=6e-4)
        assert numbers[1] == pytest.approx(100 * statistics.stdev(row.lve), abs=6e-4)
        assert numbers[-2:] == [row.row.paper_lve, row.row.paper_ale]
    assert lines[9].startswith("mean face ")
    assert "untrained stand-in" in lines[10]
    assert json.loads(pmm(*command, "--json").out) == table.to_json()
    done = pmm("ablate", store.path, "--run", path, "--seeds", 2, "--epochs", 4)
    assert (done.code, done.out) == (1, "")
    assert "was made with epochs 2, not 4" in done.complaint


def test_ctrl_c_keeps_the_run_under_way_and_the_same_command_goes_on(
    pmm, pmm_process, store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "table"
    command = ("ablate", store.path, "--run", path, "--seeds", 1, "--batch", 2, "--patience", 0)
    process = pmm_process(*command, "--epochs", 100_000)
    metrics = path / "full" / "seed-0" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert (path / "full" / "seed-0" / "last.safetensors").exists()
    assert not list(path.rglob(SCORES))
    done = pmm(*command, "--epochs", 1)
    assert "was made with epochs 100000, not 1; give the same options as before" in done.complaint
