"""The benchmark of the store runs, in little: its figures are in docs/benchmarks.md, not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "store.py"


def test_the_benchmark_measures_every_part(tmp_path):
    command = [sys.executable, "-P", BENCH, "--quick", "--json", "--folder", tmp_path]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
    for part in ("windows", "full_load", "write"):
        assert told[part]["numpy"]["ratio"] == 1
        assert {"pmm", "h5py", "zarr-python", "tensorstore"} <= told[part].keys()
        for name, one in told[part].items():
            if name != "bytes":
                assert 0 < one["quartiles"][0] <= one["ratio"] <= one["quartiles"][1]
                assert one["mb_per_s"] > 0
    assert (told["catalogue"]["takes"], told["catalogue"]["records"]) == (2000, 320)
    assert told["catalogue"]["with_index"]["open_s"] > 0
    assert told["plan"]["clips"] == 60
    assert told["plan"]["first_s"] > told["plan"]["second_s"] > 0
    assert list(tmp_path.iterdir()) == []
