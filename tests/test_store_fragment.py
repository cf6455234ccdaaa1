"""One fragment: what other readers see, what is refused, what damage is noticed."""

import dataclasses
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from pmm import BadInput, NewerFormat, NotFound, PmmError, StoreCorrupt
from pmm.store import fragment
from pmm.store.catalog import Store
from pmm.store.digest import sealed
from pmm.store.feature import FeatureSpec
from pmm.store.medium import LocalMedium

AUDIO = FeatureSpec("audio", "test/1", "float16", (5,), None, {"weights": "none"})
IMAGE = FeatureSpec("image", "test/1", "uint8", (4, 4, 3), 30, {"face": "none"})
TARGET = FeatureSpec("target", "test/1", "float32", (7,), 30, {})


def name(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def clips(spec, lengths=(10, 1, 25, 7), seed=0):
    """Random rows; the third clip is all zeros, which Zarr by default would not write."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, length in enumerate(lengths):
        array = (rng.random((length, *spec.shape)) * 200 + 1).astype(spec.dtype)
        rows.append((name((seed, index)), array * (index != 2)))
    return rows


@pytest.fixture
def memory():
    """A folder in memory where there is one: hundreds of fsyncs are quick there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def store(memory):
    return Store.create(memory / "store")


@pytest.mark.parametrize("spec", [AUDIO, IMAGE, TARGET], ids=lambda spec: spec.modality)
@pytest.mark.parametrize("chunk_bytes", [1, 100, 333, 1 << 20])
def test_any_zarr_reader_opens_a_fragment(store, spec, chunk_bytes):
    rows = clips(spec)
    one = store.publish(spec, rows, {}, chunk_bytes=chunk_bytes)
    folder = store.path / one.folder
    expected = dict(rows)
    group = zarr.open_group(folder, mode="r")
    assert dict(group.attrs)["pmm"] == {"format": 1, "spec": spec.id, "feature": spec.to_json()}
    assert {key: array.metadata.dimension_names for key, array in group.arrays()} == {
        "values": spec.dimension_names,
        "offsets": ("edge",),
        "clips": ("clip", "byte"),
        "sums": ("clip", "byte"),
    }
    seen = {}
    for key in ("values", "offsets", "clips", "sums"):
        opened = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{folder}/{key}/"}).result()
        seen[key] = opened.read().result()
        np.testing.assert_array_equal(seen[key], group[key][:])
    assert [row.tobytes().hex() for row in seen["clips"]] == sorted(expected)
    fresh = Store.open(store.path)
    for index, row in enumerate(sorted(expected)):
        first, last = seen["offsets"][index : index + 2]
        np.testing.assert_array_equal(seen["values"][first:last], expected[row])
        np.testing.assert_array_equal(fresh.read(spec.id, row), expected[row])
        assert seen["sums"][index].tobytes() == hashlib.sha256(expected[row].tobytes()).digest()
        assert fresh.length(spec.id, row) == len(expected[row])


def test_chunks_are_the_fewest_and_equal(store):
    rows = [(name(index), np.full((11, 5), index, np.float16)) for index in range(3)]  # 330 bytes
    one = store.publish(AUDIO, rows, {}, chunk_bytes=120)
    sizes = [item.size for item in one.objects if item.path.startswith("values/c/")]
    assert sizes == [110, 110, 110]
    raw = b"".join((store.path / one.folder / "values/c" / str(i) / "0").read_bytes() for i in range(3))
    assert raw == b"".join(array.tobytes() for _, array in sorted(rows))


def test_what_is_read_is_mapped_and_cannot_be_written(store):
    store.publish(AUDIO, clips(AUDIO), {}, chunk_bytes=200)
    for row in store.rows(AUDIO.id):
        with pytest.raises(ValueError, match="read-only"):
            store.read(AUDIO.id, row)[0] = 1
    assert not store.read(AUDIO.id, store.rows(AUDIO.id)[0]).flags.owndata


def test_order_and_memory_layout_of_the_arrays_do_not_matter(store):
    rows = clips(IMAGE)
    other = [(row, np.asfortranarray(array)) for row, array in reversed(rows)]
    first, second = store.publish(IMAGE, rows, {}), store.publish(IMAGE, other, {"by": "another"})
    assert first.id == second.id
    assert first.location != second.location


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "a fragment without clips"),
        ([("xyz", np.zeros((3, 5), np.float16))], "'xyz' is no row id; 64 hexadecimal digits"),
        ([(name(1), np.zeros((0, 5), np.float16))], f"clip {name(1)}: no rows"),
        (
            [(name(1), np.zeros((3, 5), np.float32))],
            f"clip {name(1)}: float32 of shape .3, 5.; audio is float16",
        ),
        ([(name(1), np.zeros((3, 6), np.float16))], r"float16 of shape \(3, 6\); .* of shape \(n, 5\)"),
        ([(name(1), np.zeros((), np.float16))], r"float16 of shape \(\)"),
        ([(name(1), np.full((3, 5), np.nan, np.float16))], "NaN or infinity in its audio"),
        ([(name(1), np.full((3, 5), np.inf, np.float16))], "NaN or infinity in its audio"),
        ([(name(1), np.zeros((3, 5), np.float16))] * 2, "comes twice"),
    ],
)
def test_what_the_spec_does_not_say_is_not_stored(store, rows, message):
    with pytest.raises(BadInput, match=message):
        store.publish(AUDIO, rows, {})
    assert os.listdir(store.path) == ["pmm.json"] or not (store.path / "fragments").exists()


def test_provenance_that_is_no_json_is_refused_before_anything_is_written(store):
    with pytest.raises(BadInput, match="made_with is not JSON"):
        store.publish(AUDIO, clips(AUDIO), {"device": object()})
    with pytest.raises(BadInput, match="made_with is not JSON"):
        store.publish(AUDIO, clips(AUDIO), {"rate": float("nan")})
    assert not (store.path / "fragments").exists()


def heads(one):
    return [item for item in one.objects if not item.path.startswith("values/c/")]


def test_every_flipped_byte_beside_the_payload_is_noticed_when_reading(store):
    one = store.publish(AUDIO, clips(AUDIO), {}, chunk_bytes=200)
    folder = store.path / one.folder
    noticed = 0
    for item in heads(one):
        path = folder / item.path
        path.chmod(0o644)
        whole = path.read_bytes()
        with open(path, "r+b", buffering=0) as file:
            for offset in range(item.size):
                os.pwrite(file.fileno(), bytes([whole[offset] ^ 1 << offset % 8]), offset)
                with pytest.raises(StoreCorrupt, match=f"{item.path} was changed: its sha256 is not the rec"):
                    fragment.Reader(store.medium, one)
                os.pwrite(file.fileno(), whole[offset : offset + 1], offset)
                noticed += 1
    assert noticed == sum(item.size for item in heads(one)) > 2000
    fragment.Reader(store.medium, one)


def test_a_truncated_or_missing_object_is_an_error_that_names_the_clip(store):
    one = store.publish(AUDIO, clips(AUDIO), {}, chunk_bytes=200)
    row = one.row_ids[0]
    for item in one.objects:
        path = store.path / one.folder / item.path
        whole = path.read_bytes()
        path.chmod(0o644)
        for broken in (whole[:-1], whole + b"\0", b""):
            path.write_bytes(broken)
            with pytest.raises(StoreCorrupt, match=f"clip {row} cannot be read: .*{item.path} has "):
                Store.open(store.path).read(AUDIO.id, row)
        path.unlink()
        with pytest.raises(StoreCorrupt, match=f"clip {row} cannot be read: .*{item.path} is missing"):
            Store.open(store.path).read(AUDIO.id, row)
        path.write_bytes(whole)
    assert len(Store.open(store.path).read(AUDIO.id, row)) == store.length(AUDIO.id, row)


def test_a_chunk_truncated_after_opening_is_an_error_and_not_a_bus_error(store):
    rows = [(name(index), np.ones((20, 5), np.float16)) for index in range(4)]
    one = store.publish(AUDIO, rows, {}, chunk_bytes=200)
    assert store.read(AUDIO.id, one.row_ids[0]).sum() == 100  # opened, only the first chunk is mapped
    path = store.path / one.folder / "values/c/3/0"
    path.chmod(0o644)
    os.truncate(path, 100)
    with pytest.raises(StoreCorrupt, match=f"clip {one.row_ids[3]} cannot be read: .*has 100 bytes"):
        store.read(AUDIO.id, one.row_ids[3])


def record_of(store, one, **changes):
    value = json.loads((store.path / one.record).read_bytes())
    del value["sha256"]
    return {**value, **changes}


def parse(one, value):
    return fragment.Fragment.from_bytes(sealed(value), one.spec_id, one.location, "here")


@pytest.mark.parametrize(
    "path",
    [
        "../escape",
        "/etc/passwd",
        "values/../../x",
        "values//c",
        "",
        ".",
        "values/.hidden",
        "Values",
        "a\n",
        "a" * 65,
    ],
)
def test_a_record_that_points_outside_its_folder_is_refused(store, path):
    one = store.publish(AUDIO, clips(AUDIO), {})
    objects = [*record_of(store, one)["objects"], [path, 1, "0" * 64]]
    with pytest.raises(StoreCorrupt, match="is no path within a fragment"):
        parse(one, record_of(store, one, objects=objects))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": ["0" * 64]},
        {"rows": ["0" * 63 + "g"]},
        {"rows": 3},
        {"lengths": [1, 2]},
        {"lengths": [1, 2, 3, -4]},
        {"lengths": [1, 2, 3, 1 << 70]},
        {"spec": "0" * 64},
        {"fragment": "0" * 64},
        {"objects": []},
        {"objects": [["zarr.json", -1, "0" * 64]]},
        {"objects": [["zarr.json", 1 << 60, "0" * 64]]},
        {"objects": [["zarr.json", 1]]},
        {"objects": [[3, 1, "0" * 64]]},
        {"state": None, "format": 0},
        {"format": "1"},
        {"writer": 3},
    ],
    ids=str,
)
def test_a_record_that_is_none_is_refused(store, change):
    one = store.publish(AUDIO, clips(AUDIO), {})
    with pytest.raises(StoreCorrupt, match=r"^here is no record of a fragment"):
        parse(one, record_of(store, one, **change))


def test_records_may_carry_more_but_not_of_a_newer_format(store):
    one = store.publish(AUDIO, clips(AUDIO), {})
    assert parse(one, record_of(store, one, colour="blue")).id == one.id
    assert parse(one, record_of(store, one, state="abandoned")) is None
    with pytest.raises(NewerFormat, match="here has store format 2, this pmm reads up to 1"):
        parse(one, record_of(store, one, format=2))
    data = (store.path / one.record).read_bytes().replace(b'{"created"', b'{"created":"","created"')
    with pytest.raises(StoreCorrupt, match="does not match"):
        fragment.Fragment.from_bytes(data, one.spec_id, one.location, "here")
    body = data[: data.rindex(b',"sha256"')] + b"}"
    data = body[:-1] + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'
    with pytest.raises(StoreCorrupt, match="a key stands twice"):
        fragment.Fragment.from_bytes(data, one.spec_id, one.location, "here")


def republish(store, one, folder):
    """A record for objects that somebody else's Zarr writer laid at ``folder``."""
    root = store.path / folder
    objects = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        key = path.relative_to(root).as_posix()
        objects.append(fragment.Object(key, len(data), hashlib.sha256(data).hexdigest()))
    location = root.name
    foreign = fragment.Fragment(
        one.spec_id, fragment.fragment_id(one.spec_id, objects), location, one.ids, one.lengths,
        tuple(objects), one.created, one.writer, one.made_with,
    )  # fmt: skip
    store.medium.create(foreign.record, foreign.to_bytes())
    return foreign


@pytest.mark.parametrize("shards", [None, (20, 5)], ids=["compressed", "sharded"])
def test_another_layout_reads_through_zarr_and_its_rows_are_checked(tmp_path, shards):
    source = Store.create(tmp_path / "source")
    rows = clips(AUDIO)
    one = source.publish(AUDIO, rows, {})
    store = Store.create(tmp_path / "store")
    folder = f"fragments/{AUDIO.id}/{'0' * 32}"
    plain = zarr.open_group(source.path / one.folder, mode="r")
    group = zarr.open_group(store.path / folder, mode="w", zarr_format=3)
    for key, array in plain.arrays():
        how = {"chunks": (10, 5), "shards": shards} if key == "values" else {}
        group.create_array(key, data=array[:], **how)
    foreign = republish(store, one, folder)
    store.refresh()
    for row, array in rows:
        np.testing.assert_array_equal(store.read(AUDIO.id, row), array)
        assert not store.read(AUDIO.id, row).flags.writeable

    # A chunk that is neither on the disk nor in the record would read as zeros.
    lost = store.path / folder / ("values/c/0/0")
    lost.unlink()
    os.unlink(store.path / foreign.record)
    republish(store, one, folder)
    with pytest.raises(StoreCorrupt, match=r"clip \w{64} cannot be read: .*was changed"):
        Store.open(store.path).read(AUDIO.id, one.row_ids[0])


def test_nothing_is_read_through_a_symbolic_link(store, tmp_path):
    one = store.publish(AUDIO, clips(AUDIO), {})
    path = store.path / one.folder / "offsets/c/0"
    copy = tmp_path / "elsewhere"
    copy.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(copy)
    with pytest.raises(StoreCorrupt, match="offsets/c/0 is missing"):
        fragment.Reader(store.medium, one)
    with pytest.raises(PmmError, match="Too many levels of symbolic links"):
        store.medium.read(f"{one.folder}/offsets/c/0", 0, 10)
    (store.path / "linked").symlink_to(tmp_path)
    with pytest.raises(StoreCorrupt, match="behind a symbolic link"):
        store.medium.read("linked/elsewhere", 0, 10)
    with pytest.raises(StoreCorrupt, match="behind a symbolic link"):
        store.medium.write("linked/new", [b"x"])


@pytest.mark.parametrize("key", ["../x", "/x", "a/../b", "a//b", "", ".x", "A", "a/", "a\0b", "a" * 200])
def test_keys_stay_within_the_store(store, key):
    for verb in (
        lambda: store.medium.read(key, 0, 1),
        lambda: store.medium.write(key, [b"x"]),
        lambda: store.medium.create(key, b"x"),
        lambda: store.medium.delete(key),
    ):
        with pytest.raises(BadInput, match="is no name within a store"):
            verb()


def test_the_medium_creates_once_and_never_overwrites(store):
    medium = store.medium
    assert medium.create("a/b", b"one") == b"one"
    assert medium.create("a/b", b"one") == b"one"
    assert medium.create("a/b", b"two") == b"one"
    with pytest.raises(PmmError, match=r"cannot write .*/a/b: File exists"):
        medium.write("a/b", [b"two"])
    assert medium.read("a/b", 0, 100) == b"one"
    assert medium.read("a/b", 1, 1) == b"n"
    assert medium.read("a/b", 5, 9) == b""
    with pytest.raises(NotFound):
        medium.read("a/c", 0, 1)
    assert [(entry.key, entry.size) for entry in medium.list("a")] == [("a/b", 3)]
    assert list(medium.list("nothing")) == []
    assert list(medium.list("tmp")) == []
    medium.delete("a/b")
    medium.delete("a/b")
    assert list(medium.list("a")) == []


def test_a_pipe_in_the_store_does_not_hang_a_reader(store):
    os.mkfifo(store.path / "pipe")
    with pytest.raises(StoreCorrupt, match="is not a regular file"):
        store.medium.read("pipe", 0, 1)


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("mode", [0o2775, 0o755, 0o700])
def test_folders_take_the_roots_mode_and_objects_its_read_bits(tmp_path, umask, mode):
    root = tmp_path / "store"
    root.mkdir()
    root.chmod(mode)
    before = os.umask(umask)
    try:
        store = Store.create(root)
        store.publish(AUDIO, clips(AUDIO), {}, chunk_bytes=200)
    finally:
        os.umask(before)
    for folder, folders, files in os.walk(root):
        assert {stat.S_IMODE(os.stat(os.path.join(folder, one)).st_mode) for one in folders} <= {mode}
        assert {stat.S_IMODE(os.stat(os.path.join(folder, one)).st_mode) for one in files} <= {mode & 0o444}


@pytest.mark.parametrize(
    ("lengths", "meta", "message"),
    [
        ([1 << 60], {"shape": [1 << 60, 5]}, "more than the record lists"),
        ([1 << 60], {}, "the record lists 1152921504606846976 rows"),
        ([10], {"data_type": "object"}, "values is object"),
        ([10], {"chunk_grid": 3}, "does not fit its record"),
        ([10], {"codecs": [{"name": "nonsense"}]}, "does not fit its record"),
    ],
)
def test_a_fragment_from_a_stranger_allocates_nothing_it_does_not_have(store, lengths, meta, message):
    one = store.publish(AUDIO, [(name(1), np.zeros((10, 5), np.float16))], {}, chunk_bytes=10)
    path = store.path / one.folder / "values/zarr.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), **meta}))
    os.unlink(store.path / one.record)
    liar = republish(store, dataclasses.replace(one, lengths=np.array(lengths)), one.folder)
    with pytest.raises(StoreCorrupt, match=message):
        fragment.Reader(store.medium, liar)


def test_a_full_disk_is_one_clear_error_and_nothing_is_visible(store):
    def full(operation, key):
        if operation == "write" and key.endswith("values/c/1/0"):
            raise OSError(28, "No space left on device")

    medium = LocalMedium(store.path, before=full)
    with pytest.raises(PmmError, match=r"^cannot write .*/values/c/1/0: No space left on device$") as caught:
        Store(store.path, medium).publish(AUDIO, clips(AUDIO), {}, chunk_bytes=200)
    assert caught.value.errno == 28
    fresh = Store.open(store.path)
    assert (fresh.fragments(), dict(fresh.problems)) == ([], {})
    assert (
        list(store.medium.list("fragments")) == list(store.medium.list("tmp")) == []
    )  # the disk is as full as before
