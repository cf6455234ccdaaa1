"""Whatever byte is changed, whatever file is cut off or lost: `verify` finds it and names the clips.

A store of many fragments, one thing wrong in each, is verified as a whole: thousands of damages in seconds.
"""

import hashlib
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec

SPEC = FeatureSpec("audio", "test/1", "float16", (3,), None, {})
FRAGMENTS, CLIPS, STEPS = 100, 3, 7
CHUNK = 66
PAYLOAD_FLIPS = 2000


@pytest.fixture(scope="module")
def store():
    """A hundred fragments of three clips, 7 steps of 6 bytes each, in two chunks; the last step pads."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        store = Store.create(Path(folder) / "store")
        rng = np.random.default_rng(0)
        for number in range(FRAGMENTS):
            rows = [
                (
                    hashlib.sha256(b"%d %d" % (number, clip)).hexdigest(),
                    rng.random((STEPS, 3)).astype(np.float16),
                )
                for clip in range(CLIPS)
            ]
            store.publish(SPEC, rows, {}, chunk_bytes=CHUNK)
        yield store


def objects(store, one, payload):
    return [
        store.path / one.folder / it.path for it in one.objects if it.path.startswith("values/c/") == payload
    ]


def found(store):
    """What verify says: the row ids lost, by fragment folder; and every object named."""
    report = verify(store)
    lost = {}
    for damage in report.damaged:
        folder = "/".join(damage.where.split("/")[:3])
        lost.setdefault(folder, set()).update(damage.rows)
    return lost, {damage.where for damage in report.damaged}


def flip(file, at, bit):
    data = bytearray(file.read_bytes())
    data[at] ^= bit
    file.chmod(0o644)
    file.write_bytes(data)


def missed(store, damages):
    """Of (fragment, file, byte, row ids it costs), one a fragment: those not found, or named wrong."""
    whole = {file: file.read_bytes() for _, file, _, _ in damages}
    for turn, (_, file, at, _) in enumerate(damages):
        flip(file, at, 1 << turn % 8)
    lost, named = found(store)
    for file, data in whole.items():
        file.write_bytes(data)
    expected = {one.folder: rows for one, _, _, rows in damages}
    return [
        (str(file), at, lost.get(one.folder))
        for one, file, at, rows in damages
        if lost.get(one.folder) != rows or str(file.relative_to(store.path)) not in named
    ] + [(folder, rows) for folder, rows in lost.items() if folder not in expected]


def test_every_byte_of_every_header(store):
    fragments = store.fragments()
    sizes = [file.stat().st_size for file in objects(store, fragments[0], False)]
    places = [(index, at) for index, size in enumerate(sizes) for at in range(size)]
    assert len(places) > 2000
    wrong = []
    for first in range(0, len(places), FRAGMENTS):
        some = zip(fragments, places[first : first + FRAGMENTS])
        wrong += missed(
            store, [(one, objects(store, one, False)[n], at, set(one.row_ids)) for one, (n, at) in some]
        )
    assert wrong == []
    assert found(store) == ({}, set())


def test_two_thousand_bytes_of_the_payload(store):
    rng = random.Random(0)
    fragments, wrong, padding = store.fragments(), [], 0
    for _ in range(PAYLOAD_FLIPS // FRAGMENTS):
        damages = []
        for one in fragments:
            file = rng.choice(objects(store, one, True))
            at = rng.randrange(CHUNK)
            row = (int(file.parent.name) * CHUNK + at) // 6 // STEPS  # the clip this byte belongs to
            padding += row >= CLIPS
            damages.append((one, file, at, set(one.row_ids[row : row + 1])))
        wrong += missed(store, damages)
    assert wrong == []
    assert 0 < padding < PAYLOAD_FLIPS // 4
    assert found(store) == ({}, set())


@pytest.mark.parametrize("how", ["cut off", "longer", "empty", "gone"])
def test_every_file_of_a_fragment(store, how):
    fragments = store.fragments()
    count = len(fragments[0].objects)
    broken = {
        one.folder: store.path / one.folder / one.objects[n % count].path for n, one in enumerate(fragments)
    }
    whole = {file: file.read_bytes() for file in broken.values()}
    for file, data in whole.items():
        file.chmod(0o644)
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes({"cut off": data[:-1], "longer": data + b"\0", "empty": b""}[how])
    lost, named = found(store)
    for file, data in whole.items():
        file.write_bytes(data)
    assert lost == {one.folder: set(one.row_ids) for one in fragments}
    assert {str(file.relative_to(store.path)) for file in whole} <= named
    assert found(store) == ({}, set())
