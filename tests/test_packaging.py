"""What a user installs: the wheel holds every sub-package and nothing at the top but pmm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("build", ".venv", ".git", ".types", "*.egg-info", "__pycache__", "pmm-demo", ".*_cache")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is left in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, work / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", work, work / "source"], check=True, timeout=300)
    (found,) = work.glob("pmmtalk-*.whl")
    return found


def sub_packages() -> set[str]:
    """Every folder of the checkout that is a package of ours."""
    tops = ("animate", "precompute", "store", "train")
    return {
        "pmm." + ".".join(path.parent.relative_to(ROOT).parts)
        for top in tops
        for path in (ROOT / top).rglob("__init__.py")
    }


def test_wheel_has_no_stray_top_level_module_and_every_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"pmm", wheel.name.split("-py3")[0] + ".dist-info"}
    sources = {
        f"pmm/{path.relative_to(ROOT)}"
        for package in sub_packages()
        for path in (ROOT / Path(*package.split(".")[1:])).glob("*.py")
    }
    data = {f"pmm/{path.relative_to(ROOT)}" for path in (ROOT / "precompute" / "data").glob("*.*")}
    assert sources | data | {"pmm/__init__.py", "pmm/cli.py"} <= set(names)
    assert not [name for name in names if "tests" in name or "bench" in name]


def test_wheel_installs_and_imports_on_its_own(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, timeout=300)
    program = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__file__.startswith(sys.argv[1]), module.__file__\n"
        "from pmm.cli import main; main(['--version'])"
    )
    command = [sys.executable, "-I", "-c", program, str(target), "pmm.cli", *sorted(sub_packages())]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("pmm, version ")


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; from pmm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'zarr', 'numpy', 'matplotlib', 'av', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "pmm demo" in run.stdout


def test_layers_hold() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    env = {**os.environ, "NO_COLOR": "1"}
    run = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout
    assert "0 broken" in run.stdout
