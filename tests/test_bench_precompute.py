"""The benchmark of precompute runs, in little: its figures are in docs/benchmarks.md, not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "precompute.py"


def test_the_benchmark_measures_all_three_ways(tmp_path):
    command = [sys.executable, "-P", BENCH, "--quick", "--json", "--folder", tmp_path, "--only", "speed"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
    speeds = told["speed"]["audio_seconds_per_second"]
    assert speeds.keys() == {"plain fp32", "ours fp32", "bare fp32", "ours bf16", "bare bf16"}
    assert min(speeds.values()) > 0
    assert len(told["speed"]["ratios"]) == 4
    assert list(tmp_path.iterdir()) == []
