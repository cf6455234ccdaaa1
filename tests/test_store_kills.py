"""Four writers that are killed again and again in the middle of a publish: what was acknowledged stays.

Only kills between the first write of a publish and its acknowledgement count. The longer form is
``tests/campaign/test_kills.py``: the same code, a thousand kills, on a disk rather than in memory.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec

WRITERS, KILLS = 4, 40
SPEC = FeatureSpec("audio", "test/1", "float16", (5,), None, {})

WRITER = """
import os, random, select, signal, sys, time
from pathlib import Path
import numpy as np, zarr.storage  # loaded once, before any child is forked
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec
from pmm.store.medium import LocalMedium

root, writer, wanted = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(writer)
spec = FeatureSpec("audio", "test/1", "float16", (5,), None, {})

def publish(turn, pipe):
    first = []

    def before(operation, key):
        if operation == "write" and not first:
            first.append(key)
            os.write(pipe, b"w")

    store = Store(root, LocalMedium(root, before=before))
    names = [f"{writer:02x}{turn:06x}{clip:02x}" + "ab" * 27 for clip in range(3)]
    rows = [(row, np.full((60, 5), turn % 1000 + clip, np.float16)) for clip, row in enumerate(names)]
    store.publish(spec, rows, {}, chunk_bytes=500)
    os.write(pipe, b"a")

kills, turn, usual = 0, 0, 0.02
while kills < wanted:
    out, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        publish(turn, pipe)
        os._exit(0)
    os.close(pipe)
    heard = os.read(out, 1)  # the first write
    start = time.monotonic()
    select.select([out], [], [], rng.uniform(0, usual))
    os.kill(child, signal.SIGKILL)
    took = time.monotonic() - start
    heard += os.read(out, 9)
    status = os.waitpid(child, 0)[1]
    os.close(out)
    if heard.endswith(b"a"):
        usual = min(usual, 1.2 * took)
        print("acknowledged", turn, flush=True)
    else:
        assert heard == b"w" and os.WIFSIGNALED(status), (heard, status)
        usual *= 1.1
        kills += 1
        print("killed", turn, flush=True)
    turn += 1
"""


def campaign(path: Path, kills: int) -> dict[str, int]:
    """Kills that many publishes of four writers on one store, and holds the store against what they said."""
    Store.create(path)
    run = [sys.executable, "-P", "-c", WRITER, str(path)]
    writers = [
        subprocess.Popen([*run, str(me), str(kills // WRITERS)], stdout=subprocess.PIPE, text=True)
        for me in range(WRITERS)
    ]
    said = [writer.communicate()[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * WRITERS
    turns = [(me, *line.split()) for me, lines in enumerate(said) for line in lines.splitlines()]
    killed = [(me, int(turn)) for me, what, turn in turns if what == "killed"]
    acknowledged = [(me, int(turn)) for me, what, turn in turns if what == "acknowledged"]
    assert len(killed) == kills

    store = Store.open(path)
    assert dict(store.problems) == {}
    there = set(store.rows(SPEC.id))
    assert [one for one in acknowledged if not there.issuperset(rows(*one))] == []
    told = {row: value for one in (*acknowledged, *killed) for row, value in rows(*one).items()}
    assert there <= told.keys()
    wrong = [row for row in there if not np.array_equal(store.read(SPEC.id, row), content(told[row]))]
    assert wrong == []
    halves = [one for one in killed if 0 < len(there & rows(*one).keys()) < 3]
    assert halves == []
    report = verify(store)
    assert report.clean, report.damaged
    survived = [one for one in killed if there.issuperset(rows(*one))]

    for one in set(killed) - set(survived):  # run again: only what is missing
        again = [(row, content(value)) for row, value in rows(*one).items()]
        store.publish(SPEC, again, {}, chunk_bytes=500)
    assert len(store.rows(SPEC.id)) == 3 * len(turns)
    assert verify(store).clean
    return {
        "killed": len(killed),
        "acknowledged": len(acknowledged),
        "survived": len(survived),
        "orphans": report.orphans,
    }


def content(value: int) -> np.ndarray:
    return np.full((60, 5), value, np.float16)


def rows(writer: int, turn: int) -> dict[str, int]:
    return {f"{writer:02x}{turn:06x}{clip:02x}" + "ab" * 27: turn % 1000 + clip for clip in range(3)}


def test_forty_kills_lose_nothing_that_was_acknowledged():
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        told = campaign(Path(folder) / "store", KILLS)
    assert told["killed"] == KILLS
    assert told["acknowledged"] > 0
    assert told["orphans"] > KILLS // 4  # they were killed in the middle of it, not after
