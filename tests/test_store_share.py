"""Stores filled apart and brought together: push, pull, merge."""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pmm import StoreCorrupt
from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec
from pmm.store.share import copy_fragment

AUDIO = FeatureSpec("audio", "test/1", "float16", (5,), None, {})
TARGET = FeatureSpec("target", "test/1", "float32", (3,), 30, {})
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def name(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def rows(*keys, spec=AUDIO):
    """A few rows for each key, decided by the key."""
    made = []
    for key in keys:
        rng = np.random.default_rng(int(name(key)[:8], 16))
        made.append((name(key), rng.random((rng.integers(3, 9), *spec.shape)).astype(spec.dtype)))
    return made


@pytest.fixture
def memory():
    """A folder in memory where there is one: hundreds of fsyncs are quick there."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def flip(path):
    """One bit of the byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


# -- one fragment


def test_a_copied_fragment_is_the_same_elsewhere(memory):
    a, b = Store.create(memory / "a"), Store.create(memory / "b")
    one = a.publish(AUDIO, rows("x", "y"), {"model": "m"}, chunk_bytes=40)
    sizes = []
    copied = copy_fragment(a, one, b, sizes.append)
    assert sum(sizes) == one.bytes
    assert (copied.id, copied.objects, copied.row_ids) == (one.id, one.objects, one.row_ids)
    assert (copied.created, copied.writer, copied.made_with) == (one.created, one.writer, one.made_with)
    assert copied.location != one.location
    b = Store.open(memory / "b")
    assert dict(b.specs) == dict(a.specs)
    for row_id, array in rows("x", "y"):
        np.testing.assert_array_equal(b.read(AUDIO.id, row_id), array)
    assert verify(b).clean
    assert copy_fragment(a, one, b).location == copied.location
    assert len(b.fragments()) == 1


@pytest.mark.parametrize("path", ["values/c/0/0", "clips/c/0/0", "zarr.json"])
def test_a_damaged_fragment_is_not_copied_and_leaves_nothing(memory, path):
    a, b = Store.create(memory / "a"), Store.create(memory / "b")
    one = a.publish(AUDIO, rows("x", "y"), {})
    flip(memory / "a" / one.folder / path)
    with pytest.raises(StoreCorrupt, match=rf"{path} .*sha256 is not the record's"):
        copy_fragment(a, one, b)
    assert Store.open(memory / "b").fragments() == []
    assert not [file for file in (memory / "b").rglob("*") if file.is_file() and file.name != "pmm.json"]
