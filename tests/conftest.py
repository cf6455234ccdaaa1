"""Fixtures several test files share: the command as users run it, a small corpus, a small store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

Pmm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def pmm() -> Pmm:
    """Run the installed ``pmm`` command in a process of its own: ``pmm("store", "info", path)``."""

    def run(*args: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300):
        command = [str(Path(sys.executable).parent / "pmm"), *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
        )

    return run
