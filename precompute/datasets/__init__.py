"""Dataset folders: which recordings they hold, one module per layout.

A layout is a module with ``LOOKED_FOR`` (one phrase for error messages) and
``find(folder) -> Found``, entered in LAYOUTS. It only lists: nothing is decoded here.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from pmm import BadInput, NotFound

LAYOUTS = {"livelink": "pmm.precompute.datasets.livelink"}
"""Layout name to module; without a name, the first that finds recordings is taken."""


@dataclass(frozen=True)
class Recording:
    """One performance as it lies in a folder. ``name`` is its path there, without suffix."""

    name: str
    audio: Path
    target: Path | None
    subject: str
    gender: str = ""
    language: str = ""
    text: str = ""
    split: str = ""


@dataclass(frozen=True)
class Found:
    """What a folder holds. ``refused`` are (path, reason): seen, and not usable."""

    layout: str
    recordings: tuple[Recording, ...]
    refused: tuple[tuple[Path, str], ...]


def find(folder: Path, layout: str | None = None) -> Found:
    """The recordings in ``folder``, sorted by name.

    Raises NotFound if there is no such folder; BadInput if it is a file, the layout is unknown, or
    nothing was found (saying what was looked for and what is there instead).
    """
    if not folder.exists():
        raise NotFound(f"{folder}: no such dataset folder")
    if not folder.is_dir():
        raise BadInput(f"{folder}: is a file, expected a dataset folder")
    if layout is not None and layout not in LAYOUTS:
        raise BadInput(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    modules = [import_module(LAYOUTS[name]) for name in ([layout] if layout else LAYOUTS)]
    tried: list[Found] = [module.find(folder) for module in modules]
    for found in (*(f for f in tried if f.recordings), *(f for f in tried if f.refused)):
        return found
    wanted = "; or ".join(module.LOOKED_FOR for module in modules)
    raise BadInput(f"{folder}: no clips found; looked for {wanted}; found {_inventory(folder)}")


def refuse_special(path: Path) -> None:
    """Raises BadInput for what is neither a file nor a link to one: a pipe would be waited for, and a
    device read, for ever. OSError, as ever, for what cannot even be looked at."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadInput(f"{path}: is no file but a pipe, device or folder; put a recording there")


def walk(folder: Path, unreadable: list[tuple[Path, str]]) -> Iterator[tuple[Path, list[str]]]:
    """(directory, its file names), both sorted; follows links but enters no directory twice.

    Directories that cannot be listed are added to ``unreadable`` with the reason.
    """

    def note(error: OSError) -> None:
        unreadable.append((Path(error.filename), f"cannot be listed ({error.strerror})"))

    seen = {folder.resolve()}
    for here, directories, files in os.walk(folder, followlinks=True, onerror=note):
        new = []
        for name in sorted(directories):
            real = Path(os.path.realpath(Path(here, name)))
            if real not in seen and not name.startswith("."):
                seen.add(real)
                new.append(name)
        directories[:] = new
        yield Path(here), sorted(name for name in files if not name.startswith("."))


def _inventory(folder: Path) -> str:
    counts = Counter(
        Path(name).suffix.lower() or "no suffix" for _, files in walk(folder, []) for name in files
    )
    if not counts:
        return "no files"
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(6))
