"""The long forms of tests that are cut short for every day: ``pytest tests/campaign/test_long.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LONG = {
    "test_store_share.py::test_a_push_killed_anywhere_is_finished_by_the_next": {"PMM_KILL_EVERY": "1"},
    "test_store_removal.py::test_a_purge_killed_anywhere_is_ended_by_gc_and_takes_nobody_else": {
        "PMM_KILL_EVERY": "1"
    },
    "test_store_pack.py::test_flipped_and_cut_files_are_one_line_or_what_they_were": {"PMM_FLIPS": "5000"},
}


@pytest.mark.parametrize("test", LONG)
def test_at_length(test):
    """A push and a purge killed before every single operation; five thousand flipped or cut files."""
    pytest_command = [Path(sys.executable).parent / "pytest", "-q", TESTS / test]
    done = subprocess.run(
        pytest_command, env={**os.environ, **LONG[test]}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
