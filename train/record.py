"""What a run measures, as it is measured: lines of JSON, a picture, and TensorBoard where it is installed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pmm.train.loop import EpochDone, StepDone

METRICS, STEPS, CURVES, BOARD = "metrics.jsonl", "steps.jsonl", "curves.png", "tensorboard"


class Record:
    """Adds to the files of a run folder. Its picture is drawn when it closes.

    The checkpoint is written before the line of its epoch: whatever a kill leaves, the run can go on, and
    writes the lines of what it repeats once more.
    """

    def __init__(self, path: Path):
        self.path = path
        self._files: dict[str, TextIO] = {}
        self._board: Any = None
        self._tried = False

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        if kind is None and METRICS in self._files:
            draw(self.path)

    def write(self, event: StepDone | EpochDone) -> None:
        """One line. Those of steps reach the disk with the epoch's."""
        name = METRICS if isinstance(event, EpochDone) else STEPS
        if name not in self._files:
            self._files[name] = _appending(self.path / name)
        plain = asdict(event)
        del plain["state"]
        self._files[name].write(json.dumps(plain) + "\n")
        if isinstance(event, EpochDone):
            for file in self._files.values():
                file.flush()
        self._show(event)

    def _show(self, event: StepDone | EpochDone) -> None:
        if not self._tried:
            self._tried, self._board = True, _board(self.path / BOARD)
        if self._board is None:
            return
        if isinstance(event, EpochDone):
            self._board.add_scalar("validation/LVE", event.validation_lve, event.epoch)
            return
        step = (event.epoch - 1) * event.steps + event.step
        for name, value in event.losses.items():
            self._board.add_scalar(f"loss/{name}", value, step)
        self._board.add_scalar("learning rate", event.learning_rate, step)


def _board(path: Path) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path))


def _appending(path: Path) -> TextIO:
    """The file to add lines to, after closing one that a kill has torn."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return path.open("a")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` or ``steps.jsonl`` in order: the last of each epoch or step."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            one = json.loads(line)
            found[one["epoch"], one.get("step", 0)] = one
        except (ValueError, KeyError, TypeError):
            continue
    return [found[key] for key in sorted(found)]


def draw(path: Path) -> None:
    """``curves.png`` of the run folder: training loss and validation LVE by epoch."""
    from matplotlib.figure import Figure

    lines = read(path / METRICS)
    epochs = [line["epoch"] for line in lines]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot(epochs, [line["losses"]["total"] for line in lines], color="tab:blue", marker=".")
    right.plot(epochs, [line["validation_lve"] for line in lines], color="tab:orange", marker=".")
    left.set(xlabel="epoch", ylabel="training loss", yscale="log", title=path.name)
    right.set(ylabel="validation LVE")
    left.yaxis.label.set_color("tab:blue")
    right.yaxis.label.set_color("tab:orange")
    figure.savefig(path / CURVES, dpi=120)
