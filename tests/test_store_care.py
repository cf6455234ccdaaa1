"""`verify` finds what is broken and names the clips; `info` says what is there."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from pmm.store.care import Damage, Verified, info, verify
from pmm.store.catalog import Failure, Store
from pmm.store.clip import Take, lossless_clip
from pmm.store.feature import FeatureSpec

AUDIO = FeatureSpec("audio", "wav2vec2-hidden/1", "float16", (5,), None, {})
TARGET = FeatureSpec("target", "livelink/1", "float32", (3,), 30, {})
HERE = {"host": "h", "root": "/data", "layout": "livelink"}


def clip(number):
    return lossless_clip(16000, 1, "s16", 0, 160, [np.arange(number, number + 160, dtype="<i2").tobytes()])


def target(number):
    return hashlib.sha256(b"%d" % number).hexdigest()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Three clips of 20 steps in chunks of 22, their face tracks of 12 frames, listed and known."""
    store = Store.create(tmp_path_factory.mktemp("care") / "store")
    rng = np.random.default_rng(0)
    takes = [Take(clip(n), target(n), f"subject{n % 2}", source=f"take_{n}") for n in range(3)]
    audio = [(clip(n).id, rng.random((20, 5)).astype(np.float16)) for n in range(3)]
    store.publish(AUDIO, audio, {"model": "tiny", "device": "cpu"}, chunk_bytes=200)
    store.publish(TARGET, [(target(n), rng.random((12, 3)).astype(np.float32)) for n in range(3)], {})
    store.publish_takes("talk", takes, HERE)
    store.publish_failures([Failure("path:/data/x.wav", "/data/x.wav", "probe", "cannot be read")])
    return store


@pytest.fixture
def store(original, tmp_path):
    shutil.copytree(original.path, tmp_path / "store")
    for folder, _, files in os.walk(tmp_path):
        for file in files:
            os.chmod(os.path.join(folder, file), 0o644)
    return Store.open(tmp_path / "store")


def parts(store, modality):
    (one,) = [one for one in store.fragments() if store.specs[one.spec_id].modality == modality]
    return one, store.path / one.folder


def test_a_whole_store_is_clean(original):
    seen = []
    report = verify(original, seen.append)
    assert report.clean
    assert (report.damaged, report.orphans) == ((), 0)
    assert (report.fragments, report.rows, report.takes, report.listings) == (2, 6, 3, 1)
    assert seen[-1] == Verified(report.bytes, report.bytes)
    assert [one.done_bytes for one in seen] == sorted(one.done_bytes for one in seen)
    assert json.loads(json.dumps(report.to_json()))["clean"] is True


def test_every_flipped_byte_of_the_payload_is_found_and_names_its_clip(store):
    one, folder = parts(store, "audio")
    missed = []
    for chunk in range(3):
        path = folder / "values/c" / str(chunk) / "0"
        whole = path.read_bytes()
        for offset in range(0, len(whole), 7):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 16]) + whole[offset + 1 :])
            position = (chunk * len(whole) + offset) // 10  # the row, 10 bytes each
            names = (one.row_ids[position // 20],)
            report = verify(store)
            sources = tuple(f"take_{n}" for n in range(3) if clip(n).id in names)
            if report.damaged != (
                Damage(f"{one.folder}/values/c/{chunk}/0", "its sha256 is not the recorded one"),
                Damage(one.folder, "rows changed since they were written", names, sources),
            ):
                missed.append((chunk, offset, report.damaged))
        path.write_bytes(whole)
    assert missed == []
    assert verify(store).clean


def test_flipped_padding_is_found_and_costs_no_clip(store):
    rows = [("ab" * 32, np.ones((5, 5), np.float16))]
    one = store.publish(AUDIO, rows, {}, chunk_bytes=30)  # two chunks of three rows, one row is padding
    path = store.path / one.folder / "values/c/1/0"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    report = verify(store)
    assert [(damage.where, damage.rows) for damage in report.damaged] == [
        (f"{one.folder}/values/c/1/0", ()),
        (one.folder, ()),
    ]


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "grow"])
def test_any_damaged_object_is_found_and_names_the_clips_it_costs(store, how):
    one, folder = parts(store, "target")
    for item in one.objects:
        path = folder / item.path
        whole = path.read_bytes()
        if how == "delete":
            path.unlink()
        else:
            middle = len(whole) // 2
            flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
            path.write_bytes({"flip": flipped, "truncate": whole[:-1], "grow": whole + b"\0"}[how])
        report = verify(store)
        assert not report.clean
        assert report.damaged[0].where == f"{one.folder}/{item.path}"
        lost = {row for damage in report.damaged for row in damage.rows}
        if item.path == "values/c/0/0" and how == "flip":
            assert len(lost) == 1
        else:
            assert lost == {target(n) for n in range(3)}
            assert report.damaged[-1].sources == ("take_0", "take_1", "take_2")
        path.write_bytes(whole)
    assert verify(store).clean


@pytest.mark.parametrize("folder", ["specs", "records", "datasets", "failures"])
def test_a_flipped_byte_in_any_list_is_found(store, folder):
    for entry in list(store.medium.list(folder)):
        path = store.path / entry.key
        whole = path.read_bytes()
        for offset in range(0, len(whole), 29):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 4]) + whole[offset + 1 :])
            assert entry.key in {damage.where for damage in verify(store).damaged}
        path.write_bytes(whole)
    assert verify(store).clean


def test_an_unreadable_record_names_the_clips_it_stood_for(store):
    one, _ = parts(store, "audio")
    (store.path / one.record).write_bytes(b"")
    (damage,) = verify(store).damaged
    assert (damage.where, set(damage.rows)) == (one.record, {clip(n).id for n in range(3)})
    assert damage.sources == ("take_0", "take_1", "take_2")


def test_a_missing_spec_is_found_and_publishing_puts_it_back(store):
    key = f"specs/{AUDIO.id}.json"
    (store.path / key).unlink()
    assert [damage.where for damage in verify(store).damaged] == [key]
    fresh = Store.open(store.path)
    fresh.publish(AUDIO, [("ab" * 32, np.ones((5, 5), np.float16))], {})
    assert verify(store).clean


def test_what_a_killed_writer_left_is_counted_and_is_no_damage(store):
    _, folder = parts(store, "audio")
    shutil.copytree(folder, folder.parent / ("0" * 32))
    report = verify(store)
    assert (report.clean, report.orphans) == (True, 1)


def test_info_tells_what_is_there(original):
    told = info(original)
    audio, track = told.pop("features")
    (failure,) = told.pop("failures")
    assert {key: told[key] for key in ("format", "takes", "clips", "subjects", "problems", "hours")} == {
        "format": 1,
        "takes": 3,
        "clips": 3,
        "subjects": 2,
        "problems": {},
        "hours": 0.0,
    }
    assert told["datasets"] == [{"dataset": "talk", "takes": 3, "subjects": ["subject0", "subject1"]}]
    assert (audio["modality"], audio["clips"], audio["fragments"], audio["made_with"]) == (
        "audio", 3, 1, [{"model": "tiny", "device": "cpu"}],
    )  # fmt: skip
    assert (audio["hours"], track["hours"]) == (round(60 / 50 / 3600, 4), round(36 / 30 / 3600, 4))
    assert told["bytes"] == audio["bytes"] + track["bytes"]
    assert audio["first_written"] == audio["last_written"] >= told["created"]
    assert len(audio["writers"]) == 1
    assert (failure["reason"], failure["attempt"]) == ("cannot be read", 1)
    json.dumps(info(original))


def test_info_of_an_empty_store(tmp_path):
    told = info(Store.create(tmp_path / "store"))
    assert (told["features"], told["takes"], told["bytes"], told["failures"]) == ([], 0, 0, [])
