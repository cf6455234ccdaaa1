"""A store written in 2025 by format 1 is read for ever: this test and its data are never edited."""

import shutil
from pathlib import Path

import numpy as np

from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.clip import lossless_clip
from pmm.store.feature import FeatureSpec

GOLDEN = Path(__file__).parent / "data/store-1"
AUDIO = FeatureSpec("audio", "golden/1", "float16", (6,), None, {"weights": "none"})
IMAGE = FeatureSpec("image", "golden/1", "uint8", (2, 2, 3), 30, {"face": "none"})


def clip(number):
    samples = np.arange(number, number + 320, dtype="<i2")
    return lossless_clip(16000, 1, "s16", 0, 320, [samples.tobytes()]).id


def rows(number, length, spec):
    counting = np.arange(length * int(np.prod(spec.shape))).reshape(length, *spec.shape)
    return (counting % 100 * (number % 3)).astype(spec.dtype)


def test_the_first_store_ever_written_still_reads():
    store = Store.open(GOLDEN)
    assert dict(store.problems) == {}
    assert set(store.specs) == {AUDIO.id, IMAGE.id}
    assert store.rows(AUDIO.id) == sorted(clip(n) for n in (0, 2, 3))  # 1 was removed, 2 taken back in
    assert store.rows(IMAGE.id) == sorted(clip(n) for n in (0, 2))  # the copy of 3 was found damaged
    for n in (0, 2, 3):
        np.testing.assert_array_equal(store.read(AUDIO.id, clip(n)), rows(n, 10 + n, AUDIO))
    for n in (0, 2):
        np.testing.assert_array_equal(store.read(IMAGE.id, clip(n)), rows(n, 5 + n, IMAGE))
    assert [(take.clip.id, take.subject, take.text) for take in store.takes()] == [
        (clip(2), "subject0", "你好"),
        (clip(3), "subject1", "你好"),
    ]
    assert [(one.key, one.attempt) for one in store.open_failures()] == [("path:/data/x.wav", 1)]
    report = verify(store)
    assert (report.clean, report.fragments, report.rows, report.listings) == (True, 2, 7, 1)


def test_the_first_store_ever_written_can_still_grow(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    store.publish(IMAGE, [(clip(3), rows(3, 9, IMAGE))], {})
    assert store.rows(IMAGE.id) == sorted(clip(n) for n in (0, 2, 3))
