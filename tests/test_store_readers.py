"""Readers that know nothing of pmm open every fragment, and all of them see the same."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec

SPECS = [
    FeatureSpec("audio", "test/1", "float16", (5,), None, {}),
    FeatureSpec("text", "test/1", "float16", (9,), None, {}),
    FeatureSpec("image", "test/1", "uint8", (4, 4, 3), 30, {}),
    FeatureSpec("target", "test/1", "float32", (7,), 30, {}),
]
GOLDEN = Path(__file__).parent / "data/store-1"
ARRAYS = ("values", "offsets", "clips", "sums")


@pytest.fixture(scope="module")
def store():
    """Four modalities, in one chunk and in many: an all-zero clip in the middle, one longer than a chunk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        store = Store.create(Path(folder) / "store")
        rng = np.random.default_rng(0)
        for number, spec in enumerate(SPECS):
            for chunk_bytes in (1 << 20, 40 * int(np.prod(spec.shape))):
                rows = [
                    (f"{number:02x}{chunk_bytes % 251:02x}{clip:02x}" * 10 + "abcd",
                     (rng.random((length, *spec.shape)) * (0 if clip == 1 else 200)).astype(spec.dtype))
                    for clip, length in enumerate((3, 60, 90, 1))
                ]  # fmt: skip
                store.publish(spec, rows, {}, chunk_bytes=chunk_bytes)
        yield store


def by_zarr(folder):
    group = zarr.open_group(folder, mode="r")
    return {name: group[name][:] for name in ARRAYS}


def by_zarrs(folder):
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        group = zarr.open_group(folder, mode="r")
        found = {name: group[name][:] for name in ARRAYS}
        assert type(group["values"]._async_array.codec_pipeline).__module__.startswith("zarrs")
    return found


def by_tensorstore(folder):
    opened = {name: {"driver": "zarr3", "kvstore": f"file://{folder}/{name}/"} for name in ARRAYS}
    return {name: tensorstore.open(spec, open=True).result().read().result() for name, spec in opened.items()}


def by_xarray(folder):
    with xarray.open_zarr(folder, consolidated=False) as opened:
        return {name: opened[name].values for name in ARRAYS}


READERS = {"zarr-python": by_zarr, "zarrs": by_zarrs, "tensorstore": by_tensorstore, "xarray": by_xarray}


def agrees(store, one, found):
    spec = store.specs[one.spec_id]
    assert found["values"].dtype == np.dtype(spec.dtype)
    assert [row.tobytes().hex() for row in found["clips"]] == one.row_ids
    reader = store.reader(one)
    for index in range(len(one.lengths)):
        first, last = found["offsets"][index : index + 2]
        np.testing.assert_array_equal(found["values"][first:last], reader.rows(index))


@pytest.mark.parametrize("name", READERS)
def test_every_reader_sees_what_was_published(store, name):
    fragments = store.fragments()
    chunks = {sum(it.path.startswith("values/c/") for it in one.objects) for one in fragments}
    assert chunks > {1}
    assert len(fragments) == 8
    zero = 0
    for one in fragments:
        found = READERS[name](store.path / one.folder)
        agrees(store, one, found)
        zero += any(not found["values"][a:b].any() for a, b in zip(found["offsets"], found["offsets"][1:]))
    assert zero == 8


@pytest.mark.parametrize("name", READERS)
def test_every_reader_reads_the_first_store_ever_written(name):
    store = Store.open(GOLDEN)
    for one in store.fragments():
        agrees(store, one, READERS[name](GOLDEN / one.folder))


def test_axes_have_names_in_xarray(store):
    for one in store.fragments():
        with xarray.open_zarr(store.path / one.folder, consolidated=False) as opened:
            spec = store.specs[one.spec_id]
            assert opened["values"].dims == spec.dimension_names
            assert opened.attrs["pmm"]["feature"] == spec.to_json()
