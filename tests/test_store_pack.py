"""One HDF5 file to hand to someone: what goes in comes out, and nothing is believed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from pmm import AlreadyThere, BadInput, NewerFormat, NotFound, StoreCorrupt
from pmm.store import snapshots
from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.clip import Take, lossless_clip
from pmm.store.digest import digest
from pmm.store.feature import FeatureSpec
from pmm.store.pack import Packed, pack, unpack

SPECS = (
    FeatureSpec("audio", "test/1", "float16", (5,), None, {}),
    FeatureSpec("image", "test/1", "uint8", (4, 4, 3), 30, {"face": "made of numbers"}),
    FeatureSpec("target", "test/1", "float32", (3,), 30, {}),
)
AUDIO, IMAGE, TARGET = SPECS
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
WHO = ("anna", "anna", "berta", "bob", "bob")


def take(number, **more):
    raw = np.arange(number, number + 160, dtype="<i2").tobytes()
    target = hashlib.sha256(f"target {number}".encode()).hexdigest() if number != 2 else None
    more = {"dataset": "d", "text": f"čau {number} \udcff", "source": f"{number}.wav", **more}
    return Take(lossless_clip(16000, 1, "s16", 0, 160, [raw]), target, WHO[number], **more)


def publish(store, numbers, spec):
    rows = []
    for number in numbers:
        one = take(number)
        if spec.modality != "target" or one.target:
            rng = np.random.default_rng(number)
            array = (rng.random((3 + number, *spec.shape)) * 200).astype(spec.dtype)
            rows.append((spec.row_id(one.clip.id, one.target), array))
    store.publish(spec, rows, {"label": "untrained stand-in"})


def filled(path, numbers=range(5)):
    store = Store.create(path)
    for spec in SPECS:
        publish(store, numbers, spec)
    store.publish_takes("d", [take(number) for number in numbers], {"host": "h", "root": "/", "layout": "x"})
    return store


@pytest.fixture
def tmp_path():
    """In memory where there is one: hundreds of fsyncs are quick there."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole():
    """A folder with a store and the file that ``pack`` wrote of it. Copy what you change."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        pack(filled(Path(folder) / "store"), Path(folder) / "all.h5")
        yield Path(folder)


@pytest.fixture
def file(whole, tmp_path):
    return shutil.copy(whole / "all.h5", tmp_path / "all.h5")


def taken(path, store, *options):
    """``unpack`` into a store that is open."""
    done = unpack(path, store.where, *options)
    store.refresh()
    return done


def contents(store):
    rows = {(name, row): store.read(name, row).tobytes() for name in store.specs for row in store.rows(name)}
    return rows, store.takes(), {name: spec.to_bytes() for name, spec in store.specs.items()}


def test_what_is_packed_comes_back_under_the_same_ids(whole, tmp_path):
    events = []
    done = taken(whole / "all.h5", Store.create(tmp_path / "new"), events.append)
    new, old = Store.open(tmp_path / "new"), Store.open(whole / "store")
    assert contents(new) == contents(old)
    assert (done.takes, done.rows) == (5, 14)
    assert done.bytes == sum(map(len, contents(old)[0].values()))
    assert events[-1] == Packed(2 * done.bytes, 2 * done.bytes)
    assert verify(new).clean
    assert {one.made_with["label"] for one in new.fragments()} == {"untrained stand-in"}
    again = taken(whole / "all.h5", new)
    assert (again.takes, again.rows, len(new.fragments()), len(new.listings())) == (0, 0, 3, 1)
    assert taken(whole / "all.h5", old).to_json() == {"takes": 0, "rows": 0, "bytes": 0}


def test_the_file_explains_itself(file, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with h5py.File(file) as packed:
        about = packed.attrs["about"]
    (tmp_path / "this.h5").write_bytes((tmp_path / "all.h5").read_bytes())
    code = about[about.index("import json") : about.index("\n\n`pmm")]
    space = {}
    exec(code.replace("array = ", "found[take['take'], group.attrs['modality']] = "), {"found": space})
    store = Store.open(whole / "store")
    assert len(space) == 14
    for one in store.takes():
        for spec in SPECS:
            if row := one.target if spec is TARGET else one.clip.id:
                np.testing.assert_array_equal(space[one.id, spec.modality], store.read(spec.id, row))
    with h5py.File(file) as packed:
        group = packed[f"features/image-{IMAGE.id}"]
        assert (group.attrs["fps"], list(group.attrs["axes"])) == (30, ["frame", "y", "x", "rgb"])
        assert (group["values"].chunks, group["values"].compression) == (None, None)


def test_only_some_subjects(whole, tmp_path):
    store = Store.open(whole / "store")
    done = pack(store, tmp_path / "some.h5", subjects=["anna", "berta"])
    assert (done.takes, done.rows) == (3, 8)
    new = Store.create(tmp_path / "new")
    taken(tmp_path / "some.h5", new)
    assert new.takes() == [take(0), take(1), take(2)]
    assert take(3).clip.id.encode() not in (tmp_path / "some.h5").read_bytes()
    with pytest.raises(BadInput, match=r"no takes of carl, dora; its subjects are anna, berta, bob$"):
        pack(store, tmp_path / "none.h5", subjects=["anna", "dora", "carl"])
    with pytest.raises(BadInput, match=r"has no features of the chosen takes; run `pmm precompute` first$"):
        pack(Store.create(tmp_path / "empty"), tmp_path / "none.h5")
    assert sorted(os.listdir(tmp_path)) == ["empty", "new", "some.h5"]


def test_a_snapshot_as_it_was(tmp_path):
    store = filled(tmp_path / "store", range(3))
    snapshots.take(store, "paper")
    before = contents(store)
    for spec in SPECS:
        publish(store, range(3, 5), spec)
    pack(store, tmp_path / "paper.h5", snapshot="paper")
    new = Store.create(tmp_path / "new")
    taken(tmp_path / "paper.h5", new)
    assert contents(new) == before
    store.publish_removal(rows=[take(1).clip.id])
    with pytest.raises(NotFound, match=r"1 clips of snapshot paper are not in .* as they were \(1.wav\)"):
        pack(store, tmp_path / "no.h5", snapshot="paper")
    with pytest.raises(NotFound, match=r"no snapshot 'other' in .*; it has paper$"):
        pack(store, tmp_path / "no.h5", snapshot="other")
    assert not (tmp_path / "no.h5").exists()


def test_what_was_removed_goes_neither_out_nor_in(whole, tmp_path):
    shutil.copytree(whole / "store", tmp_path / "store")
    store = Store.open(tmp_path / "store")
    store.publish_removal(rows=[take(1).clip.id, take(1).target])
    pack(store, tmp_path / "less.h5")
    assert take(1).clip.id.encode() not in (tmp_path / "less.h5").read_bytes()
    assert taken(whole / "all.h5", store).rows == 0
    new = Store.create(tmp_path / "new")
    new.publish_removal(rows=[take(1).clip.id, take(1).target], specs=[IMAGE.id])
    assert taken(whole / "all.h5", new).takes == 4
    assert sorted(new.rows(AUDIO.id)) == sorted(take(number).clip.id for number in (0, 2, 3, 4))
    assert {one.spec_id for one in new.fragments()} == {AUDIO.id, TARGET.id}
    assert new.takes() == [take(number) for number in (0, 2, 3, 4)]


def test_nothing_is_overwritten_and_nothing_left_where_it_fails(whole, tmp_path):
    store = Store.open(whole / "store")
    out = tmp_path / "out.h5"
    out.write_text("keep me")
    with pytest.raises(AlreadyThere, match=f"^{out} already exists and nothing is overwritten; name another"):
        pack(store, out)
    assert out.read_text() == "keep me"
    with pytest.raises(AlreadyThere, match="appeared meanwhile"):
        pack(store, tmp_path / "late.h5", on_event=lambda event: (tmp_path / "late.h5").write_text("mine"))
    assert (tmp_path / "late.h5").read_text() == "mine"
    with pytest.raises(NotFound, match=r"is no folder to write x.h5 in; make it first$"):
        pack(store, tmp_path / "nowhere/x.h5")

    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(store, tmp_path / "broken.h5", on_event=interrupt)
    assert sorted(os.listdir(tmp_path)) == ["late.h5", "out.h5"]


def test_damage_is_not_handed_on(whole, tmp_path):
    shutil.copytree(whole / "store", tmp_path / "store")
    store = Store.open(tmp_path / "store")
    one, index = store.find(AUDIO.id, take(3).clip.id)
    chunk = store.path / one.folder / "values/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[int(one.lengths[:index].sum()) * 10] ^= 1
    chunk.chmod(0o600)
    chunk.write_bytes(data)
    with pytest.raises(StoreCorrupt, match=f"clip {take(3).clip.id} in .* is not as it was written"):
        pack(Store.open(tmp_path / "store"), tmp_path / "all.h5")
    assert os.listdir(tmp_path) == ["store"]
    assert pack(Store.open(tmp_path / "store"), tmp_path / "some.h5", subjects=["anna"]).takes == 2


def test_an_unpack_that_was_interrupted_goes_on(whole, tmp_path):
    new = Store.create(tmp_path / "new")

    def interrupt(event):
        if event.done_bytes > 0.6 * event.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(whole / "all.h5", new.where, interrupt)
    new.refresh()
    there = len(new.fragments())
    assert 0 < there < 3
    assert new.takes() == []
    taken(whole / "all.h5", Store.open(tmp_path / "new"))
    assert contents(Store.open(tmp_path / "new")) == contents(Store.open(whole / "store"))
    assert len(Store.open(tmp_path / "new").fragments()) == 3


# -- files of strangers

NAME = f"features/audio-{AUDIO.id}"


def put(packed, name, data, **more):
    """Another dataset in place of one."""
    del packed[name]
    packed.create_dataset(name, data=data, **more)


def nan(packed):
    packed[f"{NAME}/values"][4, 1] = np.nan


def nan_with_its_sum(packed):
    group = packed[NAME]
    group["values"][0, 0] = np.nan
    rows = group["values"][: group["offsets"][1]]
    group["sums"][0] = np.frombuffer(hashlib.sha256(rows.tobytes()).digest(), np.uint8)


def changed(packed):
    packed[f"{NAME}/values"][4, 1] += 1


def other_spec_id(packed):
    packed.move(NAME, f"features/audio-{'0' * 64}")


def other_spec(packed):
    spec = json.loads(packed[f"{NAME}/spec"][0])
    put(packed, f"{NAME}/spec", np.array([json.dumps({**spec, "algorithm": "better/9"}).encode()]))


def other_take(packed):
    lines = [json.loads(line) for line in packed["takes"]]
    put(packed, "takes", np.array([json.dumps({**line, "subject": "eve"}).encode() for line in lines]))


def take_of_no_id(packed):
    line = {**take(2).to_json(), "clip": "../../x"}
    line["take"] = digest("take", {key: line[key] for key in ("clip", "target", "subject")})
    put(packed, "takes", np.array([json.dumps(line).encode()]))


def clip_of_no_take(packed):
    put(packed, "takes", packed["takes"][:3])


def twice(packed):
    clips = packed[f"{NAME}/clips"][:]
    clips[1] = clips[0]
    packed[f"{NAME}/clips"][:] = clips


def vlen(packed):
    put(packed, f"{NAME}/clips", [row.decode() for row in packed[f"{NAME}/clips"]], dtype=h5py.string_dtype())


def objects(packed):
    put(packed, "takes", ["{}"], dtype=h5py.string_dtype())


def references(packed):
    put(packed, f"{NAME}/offsets", [packed.ref] * 6, dtype=h5py.ref_dtype)


def compound(packed):
    put(packed, f"{NAME}/offsets", np.zeros(6, dtype=[("a", "<i8")]))


def double(packed):
    put(packed, f"{NAME}/values", packed[f"{NAME}/values"][:].astype("f8"))


def big_endian(packed):
    put(packed, f"{NAME}/values", packed[f"{NAME}/values"][:].astype(">f2"))


def compressed(packed):
    put(packed, f"{NAME}/values", packed[f"{NAME}/values"][:], compression="gzip")


def chunked_and_empty(packed):
    del packed[f"{NAME}/values"]
    packed[NAME].create_dataset("values", (1 << 40, 5), "<f2", chunks=(1024, 5))


def absurd(packed):
    """A petabyte that was never written."""
    del packed[f"{NAME}/values"]
    packed[NAME].create_dataset("values", (1 << 47, 5), "<f2")
    packed[f"{NAME}/offsets"][-1] = 1 << 47


def many_clips(packed):
    del packed[f"{NAME}/clips"]
    packed[NAME].create_dataset("clips", (1 << 40,), "S64")


def backwards(packed):
    packed[f"{NAME}/offsets"][1] = -3


def beyond(packed):
    packed[f"{NAME}/offsets"][-1] += 5


def external_link(packed):
    del packed[f"{NAME}/values"]
    packed[f"{NAME}/values"] = h5py.ExternalLink("/etc/passwd", "/values")


def soft_link(packed):
    packed.move(NAME, "elsewhere")
    packed[NAME] = h5py.SoftLink("/elsewhere")


def external_storage(packed):
    shape = packed[f"{NAME}/values"].shape
    del packed[f"{NAME}/values"]
    packed[NAME].create_dataset("values", shape, "<f2", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def virtual(packed):
    shape = packed[f"{NAME}/values"].shape
    layout = h5py.VirtualLayout(shape, "<f2")
    layout[:] = h5py.VirtualSource("/etc/passwd", "values", shape)
    del packed[f"{NAME}/values"]
    packed[NAME].create_virtual_dataset("values", layout)


def group_for_data(packed):
    del packed[f"{NAME}/values"]
    packed.create_group(f"{NAME}/values")


def data_for_group(packed):
    put(packed, "features", np.zeros(3))


def named_type(packed):
    del packed[f"{NAME}/values"]
    packed[f"{NAME}/values"] = np.dtype("<f2")


def no_space(packed):
    del packed[f"{NAME}/values"]
    packed[f"{NAME}/values"] = h5py.Empty("<f2")


def no_json(packed):
    put(packed, "takes", np.array([b"{" * 100_000]))


def twice_in_json(packed):
    line = packed["takes"][0]
    put(packed, "takes", np.array([line[:-1] + b',"subject":"anna"}']))


def other_format(packed):
    packed.attrs["format"] = np.bytes_("weights")


def format_of_any_length(packed):
    packed.attrs["format"] = "pmm-pack"


def no_format(packed):
    del packed.attrs["format"]


def many_versions(packed):
    packed.attrs["version"] = np.array([1, 2])


HOSTILE = {
    nan: "clip [0-9a-f]{64} has NaN or infinity in its audio",
    nan_with_its_sum: "clip [0-9a-f]{64} has NaN or infinity in its audio",
    changed: "the audio of clip [0-9a-f]{64} was changed: its sha256 differs",
    other_spec_id: "audio-0{64} is not the id that its spec gives",
    other_spec: f"audio-{AUDIO.id} is not the id that its spec gives",
    other_take: "not a take .its id does not follow from its fields.",
    take_of_no_id: "a take of '../../x', which is no id",
    clip_of_no_take: "clip [0-9a-f]{64} belongs to none of its takes",
    twice: "clips are not ids, each once and ascending",
    vlen: "clips is no plain dataset",
    objects: "takes is no plain dataset",
    references: "offsets is no plain dataset",
    compound: "offsets is .* of shape",
    double: "values is float64 of shape",
    big_endian: "values is >f2 of shape",
    compressed: "values does not lie in this file in one piece, uncompressed",
    chunked_and_empty: "values does not lie in this file in one piece",
    absurd: "values is said to have 1407374883553280 bytes, which the file has not",
    many_clips: "clips is said to have 70368744177664 bytes, which the file has not",
    backwards: "offsets do not rise from 0",
    beyond: r"values is float16 of shape \(25, 5\)",
    external_link: "values is missing, or a link to elsewhere",
    soft_link: "audio-[0-9a-f]{64} is missing, or a link to elsewhere",
    external_storage: "values does not lie in this file in one piece",
    virtual: "values does not lie in this file in one piece",
    group_for_data: "values is no plain dataset",
    data_for_group: "features is no group",
    named_type: "values is no plain dataset",
    no_space: "values is no plain dataset",
    no_json: "takes is not valid JSON",
    twice_in_json: "takes is not valid JSON .a key stands twice",
    other_format: "its format is .*b'weights'.*, version 1; 'pmm-pack' was expected",
    format_of_any_length: "its attribute 'format' is object of shape ",
    no_format: "it has no attribute 'format'",
    many_versions: r"its attribute 'version' is int64 of shape \(2,\)",
}


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda one: one.__name__)
def test_a_strangers_file_is_refused_in_one_line_and_nothing_taken(spoil, file, tmp_path):
    with h5py.File(file, "r+") as packed:
        spoil(packed)
    store = Store.create(tmp_path / "new")
    with pytest.raises(
        BadInput, match=f"^{file} is not what `pmm store pack` writes: .*{HOSTILE[spoil]}"
    ) as told:
        taken(file, store)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 500
    assert [one for one in (tmp_path / "new").rglob("*") if one.is_file()] == [tmp_path / "new/pmm.json"]


def test_no_pack_at_all(tmp_path, whole):
    store = Store.create(tmp_path / "new")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(BadInput, match=r"text.h5 is not what `pmm store pack` writes: .*signature not found"):
        taken(tmp_path / "text.h5", store)
    with pytest.raises(NotFound, match=r"nothing.h5 is no file; `pmm store pack STORE "):
        taken(tmp_path / "nothing.h5", store)
    newer = shutil.copy(whole / "all.h5", tmp_path / "newer.h5")
    with h5py.File(newer, "r+") as packed:
        packed.attrs["version"] = 2
    with pytest.raises(NewerFormat, match="has pack version 2, this pmm reads up to 1; install a newer"):
        taken(newer, store)


FLIPS = """
import sys
from pathlib import Path
import numpy as np
from pmm import PmmError
from pmm.store.catalog import Store
from pmm.store.pack import unpack

data = Path(sys.argv[1]).read_bytes()
path, rng, count = Path(sys.argv[2] + ".h5"), np.random.default_rng(0), int(sys.argv[3])
for turn in range(count):
    spoilt = bytearray(data)
    for at in rng.integers(0, len(data), 1 + turn % 3):
        spoilt[at] = rng.integers(256)
    path.write_bytes(spoilt[: len(data) if turn % 4 else rng.integers(len(data))])
    try:
        unpack(path, sys.argv[2])
    except PmmError as error:
        assert "\\n" not in str(error), error
print(count)
"""


def test_flipped_and_cut_files_are_one_line_or_what_they_were(whole, tmp_path):
    count = os.environ.get("PMM_FLIPS", "150")
    command = [sys.executable, "-P", "-c", FLIPS, whole / "all.h5", tmp_path / "new", count]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout.strip()) == (0, count), done.stderr
    served, _, specs = contents(Store.open_or_create(tmp_path / "new"))
    assert served.items() <= contents(Store.open(whole / "store"))[0].items()
    assert specs.keys() <= {spec.id for spec in SPECS}


# -- the command


def test_the_commands(pmm, whole, tmp_path):
    done = pmm("store", "pack", whole / "store", tmp_path / "some.h5", "--subjects", "anna,bob", "--json")
    assert (done.code, json.loads(done.out)["takes"]) == (0, 4)
    done = pmm("store", "unpack", tmp_path / "some.h5", tmp_path / "new")
    assert (done.code, done.out) == (
        0,
        f"took 4 takes, 12 rows of features, 1.4 kB, from {tmp_path}/some.h5\n",
    )
    done = pmm("store", "pack", whole / "store", tmp_path / "some.h5")
    assert (done.code, done.complaint) == (
        1,
        f"{tmp_path}/some.h5 already exists and nothing is overwritten; name another file",
    )
    (tmp_path / "bad.h5").write_text("hello")
    done = pmm("store", "unpack", tmp_path / "bad.h5", tmp_path / "never")
    assert done.code == 1
    assert done.complaint.startswith(f"{tmp_path}/bad.h5 is not what `pmm store pack` writes")
    assert not (tmp_path / "never").exists()
