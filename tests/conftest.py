"""What several test files share: the command as users run it, and small captures made on the spot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported

if TYPE_CHECKING:
    from pmm.store.catalog import Store

RATE = 48_000

# pytest --hypothesis-profile long: as long as one likes to wait, and not the same examples each time
settings.register_profile("long", max_examples=5000)


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of an error. Fails where there is none, more than one, or a traceback."""
        assert "Traceback" not in self.err, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("pmm: error: ")]
        return line.removeprefix("pmm: error: ")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the caches of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def pmm(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process, where torch loads once: ``pmm("store", "info", path)``."""
    from pmm.cli import main

    def run(*args: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        printed = capfd.readouterr()
        return Done(int(stop.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def pmm_process() -> Callable[..., subprocess.Popen[str]]:
    """Start the installed ``pmm`` command as a process of its own."""

    def start(*args: object) -> subprocess.Popen[str]:
        command = [str(Path(sys.executable).parent / "pmm"), *map(str, args)]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


class Killed(BaseException):
    """The machine stops here."""


@pytest.fixture(scope="session")
def killed() -> Callable[[Path, int, Callable[[Store], object]], bool]:
    """``killed(path, at, work)`` works on the store there until the machine stops before operation ``at``.

    The disk is then as it was at that instant. False if the work was done before.
    """
    from pmm.store.catalog import Store
    from pmm.store.medium import LocalMedium

    def run(path: Path, at: int, work: Callable[[Store], object]) -> bool:
        then, left = Path(f"{path}.then"), [at]

        def before(operation: str, key: str) -> None:
            if left[0] == 0:
                shutil.copytree(path, then)
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        try:
            work(Store(path, LocalMedium(path, before=before)))
        except Killed:
            shutil.rmtree(path)
            then.rename(path)
            return True
        return False

    return run


def babble(seconds: float, seed: int) -> np.ndarray:
    """Speech-like sound, (n,) int16 at 48 kHz: a buzz whose loudness and colour change like syllables."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = 110 + 60 * rng.random()
    moments = np.arange(0, seconds + 0.12, 0.12)
    loud = np.clip(np.interp(t, moments, rng.random(len(moments))), 0.05, 1)
    tone = sum(np.sin(2 * np.pi * pitch * k * t + k) / k for k in range(1, 25))
    return (tone * loud * 4000 + rng.normal(0, 30, len(t))).astype(np.int16)


def write_take(root: Path, subject: str, take: str, seconds: float, seed: int) -> Path:
    """One take in the Live Link Face layout; returns its CSV, the .wav lies beside it."""
    import soundfile

    from pmm.precompute.datasets import livelink

    folder = root / subject / take
    folder.mkdir(parents=True)
    sound = babble(seconds, seed)
    soundfile.write(folder / f"{take}_{subject}.wav", sound, RATE)
    rng = np.random.default_rng(seed + 1000)
    wander = np.cumsum(rng.normal(0, 0.02, (round(seconds * 60), 52)), axis=0)
    path = folder / f"{take}_{subject}.csv"
    livelink.write(path, np.clip(0.3 + wander, 0, 1))
    return path


@pytest.fixture
def captures(tmp_path: Path) -> Path:
    """Four takes of two subjects, 1.0 to 2.3 s, in ``tmp_path/captures``."""
    root = tmp_path / "captures"
    for number, (subject, seconds) in enumerate((("ada", 1.0), ("ada", 1.55), ("bob", 2.3), ("bob", 1.2))):
        write_take(root, subject, f"take_{number}", seconds, number)
    return root


def run_quietly(*args: object) -> None:
    """A command that must work, for fixtures that outlive one test."""
    from pmm.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert not stop.value.code, args


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``captures`` of five subjects (ten takes), their ``store`` and a ``run`` of two epochs.

    Shared by many tests: read it, copy what you change.
    """
    root = tmp_path_factory.mktemp("fitted")
    for number in range(10):
        subject = ("ada", "bob", "cyd", "dan", "eve")[number // 2]
        write_take(root / "captures", subject, f"take_{number}", 1.0 + 0.13 * number, number)
    run_quietly("precompute", root / "captures", "--store", root / "store")
    run_quietly("fit", root / "store", "--run", root / "run", "--epochs", 2)
    return root
