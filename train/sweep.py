"""Several fits over one corpus: seeds, and a small grid of options.

::

    DIR/seed-0/                          run folders as ``fit`` makes them
    DIR/learning_rate-0.001_seed-0/
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pmm import BadInput
from pmm.store.catalog import Store
from pmm.train.options import FitOptions
from pmm.train.run import CONFIG, Job, Result, Tell, fit_many

FIXED = ("fps", "features", "snapshot", "device", "cache", "subjects", "seed")
"""Options that one sweep has in common; seeds are counted by themselves."""

SHORT = {"lr": "learning_rate", "batch": "batch_size"}
MOST_RUNS = 200


def plan(path: Path, options: FitOptions, settings: Sequence[str] = (), seeds: int = 1) -> tuple[Job, ...]:
    """Every run of the grid: each value of each of ``settings`` with each of ``seeds`` seeds.

    A setting is ``key=value,value``: an option by its name, tuples joined by ``+``, nothing for none.
    Seeds count from that of ``options``. Raises BadInput for a setting that cannot be read.
    """
    grid = [[(name, value) for value in values] for name, values in map(_setting, settings)]
    names = [name for name, _ in map(_setting, settings)]
    if len(set(names)) < len(names):
        raise BadInput(f"--set names {max(names, key=names.count)} twice; give all its values at once")
    counted = [("seed", seed) for seed in range(options.seed, options.seed + seeds)]
    chosen = [dict(one) for one in itertools.product(*grid, counted if seeds > 1 else counted[:1])]
    if len(chosen) > MOST_RUNS:
        raise BadInput(f"{len(chosen)} runs in one sweep; at most {MOST_RUNS}, give fewer values")
    shown = {*names, *(["seed"] if seeds > 1 or not names else [])}
    return tuple(Job(path / _folder(one, shown), replace(options, **one)) for one in chosen)


def _folder(chosen: Mapping[str, Any], shown: set[str]) -> str:
    return "_".join(f"{name}-{_spelt(value)}" for name, value in chosen.items() if name in shown)


def _spelt(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _setting(text: str) -> tuple[str, list[Any]]:
    """``key=value,value`` as the option's name and its values."""
    key, equals, given = text.partition("=")
    name = SHORT.get(key, key).replace("-", "_")
    kinds = {one.name: str(one.type) for one in fields(FitOptions) if one.name not in FIXED}
    if not equals or not given or name not in kinds:
        raise BadInput(f"--set {text}: expected key=value,value, with a key of {', '.join(kinds)}")
    values = [_value(text, kinds[name], one) for one in given.split(",")]
    if len(set(values)) < len(values):
        raise BadInput(f"--set {text}: a value stands there twice")
    return name, values


def _value(text: str, kind: str, given: str) -> Any:
    if given == "none" and kind.startswith("tuple"):
        return ()
    if given == "none" and kind.endswith("None"):
        return None
    if kind.startswith("tuple"):
        return tuple(given.split("+"))
    try:
        return int(given) if kind.startswith("int") else float(given) if kind.startswith("float") else given
    except ValueError:
        raise BadInput(f"--set {text}: {given!r} is no {kind.split(' ')[0]}") from None


def sweep(
    store: Store,
    path: Path | str,
    options: FitOptions,
    settings: Sequence[str] = (),
    seeds: int = 1,
    on_event: Tell | None = None,
    resume: bool = False,
    memory_limit: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Result]:
    """Fit the grid of ``plan`` into folders of ``path``, over one corpus that is loaded once.

    With ``resume`` runs that are there go on, and what is missing is fitted; more values or seeds may be
    asked for than before. Raises as ``plan`` and ``fit_many`` do.
    """
    path = Path(path)
    if (path / CONFIG).exists():
        raise BadInput(f"{path} is a run, and a sweep makes a folder of runs; name another folder")
    jobs = plan(path, options, settings, seeds)
    return fit_many(store, jobs, on_event, resume, memory_limit, stopping)
