"""Table V of the paper: what each modality and each loss is worth, over several seeds.

::

    DIR/full/seed-0/           a run folder as ``fit`` makes it, and in it
    DIR/full/seed-0/scores.json   what it scored on its test subjects: the sign that it is finished
    DIR/without-text/seed-0/   ...

A row's run with a seed has the split of every other row's with that seed, and all rows train and are
tested on the takes that have every modality: rows compare seed by seed. The store is read once for all
runs that are still to be trained, and once a seed for the test subjects.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmm import BadInput
from pmm.store.catalog import Store
from pmm.store.digest import strict_json
from pmm.train.checkpoint import replace_file
from pmm.train.data import Corpus
from pmm.train.evaluate import evaluate
from pmm.train.options import FitOptions
from pmm.train.run import LAST, Job, load_part, load_run, part_of, prepare, read_config
from pmm.train.run import Event as FitEvent

SCORES = "scores.json"
STAND_IN = "untrained stand-in"
MAY_CHANGE = ("device", "cache")


@dataclass(frozen=True)
class Row:
    """One row of Table V: what it goes without, and the paper's LVE and ALE (3D-CAVFA, x 1e-2)."""

    without: str
    paper_lve: float
    paper_ale: float

    @property
    def name(self) -> str:
        return f"without {self.without}" if self.without else "full"

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


FULL = Row("", 7.169, 0.640)
TABLE_V = (
    FULL,
    Row("text", 7.319, 0.682),
    Row("audio", 8.313, 0.786),
    Row("image", 7.459, 0.697),
    Row("temporal", 7.680, 0.704),
    Row("semantic", 7.599, 0.698),
    Row("motion", 7.363, 0.681),
)


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    row: Row
    seed: int
    job: Job


@dataclass(frozen=True)
class CellStarted:
    """Event: run ``number`` (from 1) of ``cells`` "begins", "goes on", or is "finished" already."""

    cell: Cell
    number: int
    cells: int
    state: str


@dataclass(frozen=True)
class CellDone:
    """Event: a run is scored on its test subjects."""

    cell: Cell
    lve: float
    ale: float


Event = FitEvent | CellStarted | CellDone
Scored = Mapping[str, Any]
"""What ``scores.json`` holds."""


@dataclass(frozen=True)
class RowScores:
    """One row over the seeds: its LVE and ALE of each, and its LVE over that of ``full``, seed by seed."""

    row: Row
    lve: tuple[float, ...]
    ale: tuple[float, ...]
    lve_over_full: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        own = {"lve": self.lve, "ale": self.ale, "lve_over_full": self.lve_over_full}
        return {
            "row": self.row.name,
            **{
                name: {"mean": statistics.fmean(values), "spread": spread(values), "seeds": list(values)}
                for name, values in own.items()
            },
            "paper": {"lve_x100": self.row.paper_lve, "ale_x100": self.row.paper_ale, "data": "3D-CAVFA"},
        }


@dataclass(frozen=True)
class Ablation:
    """The table. ``stand_in``: the features are by untrained stand-ins, and so the rows mean little."""

    path: str
    protocol: str
    seeds: tuple[int, ...]
    rows: tuple[RowScores, ...]
    mean_face_lve: tuple[float, ...]
    stand_in: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "ablation": self.path,
            "protocol": self.protocol,
            "seeds": list(self.seeds),
            "untrained_stand_in": self.stand_in,
            "mean_face_lve": {
                "mean": statistics.fmean(self.mean_face_lve),
                "spread": spread(self.mean_face_lve),
                "seeds": list(self.mean_face_lve),
            },
            "rows": [row.to_json() for row in self.rows],
        }


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of a single value, which has none."""
    return statistics.stdev(values) if len(values) > 1 else None


def plan(path: Path, options: FitOptions, seeds: int) -> tuple[Cell, ...]:
    """Every run of the table, all rows of one seed before the next seed.

    Seeds count from that of ``options``. Raises BadInput for options that leave something out
    already, and for no seed.
    """
    if options.without:
        raise BadInput(
            f"without {', '.join(options.without)}: each row of the ablation leaves out its own; "
            "fit a single run by `pmm fit --without`"
        )
    if seeds < 1:
        raise BadInput(f"{seeds} seeds: an ablation needs at least 1, and at least 2 for a spread")
    return tuple(
        _cell(path, row, replace(options, seed=seed))
        for seed in range(options.seed, options.seed + seeds)
        for row in TABLE_V
    )


def _cell(path: Path, row: Row, options: FitOptions) -> Cell:
    own = replace(options, without=(row.without,) if row.without else ())
    return Cell(row, options.seed, Job(path / row.folder / f"seed-{options.seed}", own))


def ablate(
    store: Store,
    run_dir: Path | str,
    options: FitOptions,
    seeds: int = 3,
    on_event: Callable[[Event], None] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Ablation | None:
    """Run the seven rows of Table V with several seeds, and compare what they score.

    Runs that are finished are not run again, and one that was interrupted goes on: the same call
    after an interruption gives the same table. When ``stopping`` says so, the run under way is kept
    and there is no table: None.

    Raises BadInput where a run that is there was made with other options, and as ``plan``, ``fit``
    and ``evaluate`` do.
    """
    path, tell = Path(run_dir), on_event or (lambda event: None)
    cells = plan(path, options, seeds)
    states = [_state(cell) for cell in cells]  # all of them looked at before any is run
    left = [cell for cell, state in zip(cells, states) if state != "finished"]
    prepared = iter(prepare(store, [cell.job for cell in left], tell, resume=True) if left else ())
    scores: dict[tuple[Row, int], Scored] = {}
    test = _Test(store, path)
    for number, (cell, state) in enumerate(zip(cells, states), 1):
        tell(CellStarted(cell, number, len(cells), state))
        if state != "finished":
            if next(prepared).train(tell, stopping).ended == "interrupted":
                return None
            test.score(cell)
        scores[cell.row, cell.seed] = found = _read(cell)
        tell(CellDone(cell, *(found["scores"]["heads"][name] for name in ("lve", "ale"))))
    return _table(path, options, scores)


def _state(cell: Cell) -> str:
    """begins, goes on, or finished."""
    path = cell.job.path
    if not path.exists():
        return "begins"
    was, now = read_config(path)["options"], cell.job.options.to_json()
    plain = FitOptions().to_json()
    other = [
        one for one in now if one not in MAY_CHANGE and was.get(one, _plain(plain[one])) != _plain(now[one])
    ]
    if other:
        raise BadInput(
            f"the run in {path} was made with {other[0]} {was.get(other[0])!r}, not {now[other[0]]!r}; "
            "give the same options as before, or another --run"
        )
    if (path / SCORES).exists():
        return "finished"
    return "goes on" if (path / LAST).exists() else "begins"


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


class _Test:
    """The test subjects of one seed after another, read once for all its rows."""

    def __init__(self, store: Store, path: Path):
        self.store, self.path = store, path
        self.seed = -1
        self.corpus: Corpus | None = None

    def score(self, cell: Cell) -> None:
        """Score a fitted cell and write it down."""
        run = load_run(cell.job.path, cell.job.options.device)
        if self.corpus is None or self.seed != cell.seed:
            full = load_run(self.path / FULL.folder / f"seed-{cell.seed}", cell.job.options.device)
            self.seed, self.corpus = cell.seed, load_part(full, self.store, "test")
        own = self.corpus.part(part_of(run, self.store, "test"), run.options.modalities)
        scores = evaluate(run, self.store, "test", corpus=own).to_json()
        text = json.dumps(scores, indent=1) + "\n"
        replace_file(cell.job.path / SCORES, lambda to: to.write_text(text))


def _read(cell: Cell) -> Scored:
    file = cell.job.path / SCORES
    scores = strict_json(file.read_text(), str(file))
    if not isinstance(scores, dict) or not {"heads", "mean_face"} <= set(scores.get("scores", ())):
        raise BadInput(f"{file} holds no scores; delete it, and the same command writes it again")
    return scores


def _table(path: Path, options: FitOptions, scores: Mapping[tuple[Row, int], Scored]) -> Ablation:
    seeds = tuple(dict.fromkeys(seed for _, seed in scores))

    def of(row: Row, metric: str, who: str = "heads") -> tuple[float, ...]:
        return tuple(scores[row, seed]["scores"][who][metric] for seed in seeds)

    full = of(FULL, "lve")
    if not all(full):
        raise BadInput(f"nothing moves in the test captures of {path}: there is no error to compare")
    rows = tuple(
        RowScores(
            row,
            of(row, "lve"),
            of(row, "ale"),
            tuple(own / whole for own, whole in zip(of(row, "lve"), full)),
        )
        for row in TABLE_V
    )
    first = read_config(path / FULL.folder / f"seed-{seeds[0]}")
    stand_in = any(_by_stand_in(one) for made in first["made_with"].values() for one in made)
    return Ablation(str(path), options.protocol, seeds, rows, of(FULL, "lve", "mean_face"), stand_in)


def _by_stand_in(made_with: Mapping[str, Any]) -> bool:
    return bool(made_with.get(STAND_IN)) or STAND_IN in str(made_with.get("label", ""))
