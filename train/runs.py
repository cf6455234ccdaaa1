"""Runs side by side: what was asked of each, and how well each did."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pmm import NotFound, PmmError
from pmm.train.checkpoint import read_state
from pmm.train.options import FitOptions
from pmm.train.record import METRICS, read
from pmm.train.run import CONFIG, LAST, read_config

SCORES = "scores.json"
"""What the test subjects gave, where a run was scored and the scores kept."""

_DEPTH = 3
_NO_DIFFERENCE = ("seed", "device", "cache")


@dataclass(frozen=True)
class Compared:
    """One run. ``epochs`` of ``planned`` are done; ``differences`` are the options in which runs differ.

    best_lve  on the validation subjects, at ``best_epoch``; None before the first epoch is over
    test      metric by name, of the heads on the test subjects; empty where nobody kept any
    problem   why it cannot be read; empty if it can
    """

    run: str
    epochs: int = 0
    planned: int = 0
    best_epoch: int = 0
    best_lve: float | None = None
    loss: float | None = None
    test: Mapping[str, float] = field(default_factory=dict)
    differences: Mapping[str, Any] = field(default_factory=dict)
    content: str = ""
    subjects: tuple[str, ...] = ()
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only: how many, and the mean and deviation of their best LVE."""

    differences: Mapping[str, Any]
    runs: int
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Comparison:
    """All runs in a folder, the best first. ``notes`` say where they cannot be compared, in words."""

    runs: tuple[Compared, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": [one.to_json() for one in self.runs],
            "groups": [asdict(one) for one in self.groups],
            "notes": list(self.notes),
        }


def compare(path: Path | str) -> Comparison:
    """Every run in ``path`` or up to three folders below it. Raises NotFound where there is none."""
    path = Path(path)
    folders = sorted(
        {file.parent for depth in range(_DEPTH + 1) for file in path.glob("*/" * depth + CONFIG)}
    )
    if not folders:
        raise NotFound(f"no run in {path}; `pmm fit STORE --run {path}/NAME` makes one")
    found, asked = [], {}
    for folder in folders:
        name = str(folder.relative_to(path))
        try:
            config = read_config(folder)
            found.append(_read(folder, name if name != "." else folder.name, config))
            asked[found[-1].run] = {**FitOptions().to_json(), **config["options"]}
        except (PmmError, KeyError, TypeError, ValueError) as error:
            found.append(Compared(name, problem=" ".join(str(error).split())))
    differing = _differing(list(asked.values()))
    runs = [
        _with(one, {key: asked[one.run][key] for key in differing}) if one.run in asked else one
        for one in found
    ]
    runs.sort(key=lambda one: (one.best_lve is None, one.best_lve, one.run))
    return Comparison(tuple(runs), _groups(runs), _notes(runs))


def _read(folder: Path, name: str, config: Mapping[str, Any]) -> Compared:
    lines = read(folder / METRICS)
    best = min(lines, key=lambda line: float(line["validation_lve"]), default=None)
    state = read_state(folder / LAST) if (folder / LAST).exists() else None
    scores = folder / SCORES
    return Compared(
        run=name,
        epochs=state.epoch if state else 0,
        planned=config["schedule"]["epochs"],
        best_epoch=best["epoch"] if best else 0,
        best_lve=best["validation_lve"] if best else None,
        loss=lines[-1]["losses"]["total"] if lines else None,
        test=json.loads(scores.read_text())["scores"]["heads"] if scores.exists() else {},
        content=config.get("content", {}).get("id", ""),
        subjects=tuple(config["split"]["validation"]),
    )


def _with(one: Compared, differences: Mapping[str, Any]) -> Compared:
    return Compared(**{**{name: getattr(one, name) for name in asdict(one)}, "differences": differences})


def _differing(asked: Sequence[Mapping[str, Any]]) -> list[str]:
    """Options in which runs differ, in the order of FitOptions; where they ran is none."""
    names = [name for name in FitOptions().to_json() if name not in ("device", "cache")]
    return [name for name in names if len({json.dumps(one[name], sort_keys=True) for one in asked}) > 1]


def _groups(runs: Sequence[Compared]) -> tuple[Group, ...]:
    """Runs that differ in the seed only, where there are several."""
    alike: dict[str, list[Compared]] = {}
    for one in runs:
        if one.best_lve is not None:
            alike.setdefault(json.dumps(_but_seed(one), sort_keys=True), []).append(one)
    groups = []
    for own in alike.values():
        values = [one.best_lve for one in own if one.best_lve is not None]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        groups.append(Group(_but_seed(own[0]), len(own), statistics.fmean(values), deviation))
    groups.sort(key=lambda one: one.mean)
    return tuple(groups) if any(one.runs > 1 for one in groups) else ()


def _but_seed(one: Compared) -> dict[str, Any]:
    return {name: value for name, value in one.differences.items() if name not in _NO_DIFFERENCE}


def _notes(runs: Sequence[Compared]) -> tuple[str, ...]:
    notes = []
    read_ = [one for one in runs if not one.problem]
    if len({one.content for one in read_}) > 1:
        notes.append("these runs read different contents of a store")
    if len({one.subjects for one in read_}) > 1:
        notes.append("these runs were validated on different subjects: their LVE is not of the same clips")
    return tuple(notes)
