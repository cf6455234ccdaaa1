"""A store written in 2025 by format 1 is read for ever: this test and its data are never edited."""

import shutil
from pathlib import Path

import numpy as np

from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec

GOLDEN = Path(__file__).parent / "data/store-1"
AUDIO = FeatureSpec("audio", "golden/1", "float16", (6,), None, {"weights": "none"})
IMAGE = FeatureSpec("image", "golden/1", "uint8", (2, 2, 3), 30, {"face": "none"})
CLIPS = {
    0: "d08965367a89e5abc9bbead22365cbf7eb623afe2f2a168bfef5d5d9dcc76f8c",
    2: "d2d94d4e8a2d3d8a2eec34ee550c328bc0c8dd2f48fd497d5d18782049e874e5",
    3: "bba00bc0dc70f49a9090ebafa9dfc51a76d716c70b6d5cb7ff17e44c8804cd5a",
}


def clip(number):
    """The names its clips were given then: a store keeps names, and does not ask how they were made."""
    return CLIPS[number]


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
