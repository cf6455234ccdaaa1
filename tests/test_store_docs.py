"""docs/store.md is executed: its snippets run as written, and its claims about bytes hold."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from pmm.store.catalog import Store
from pmm.store.clip import Take, lossless_clip
from pmm.store.digest import canonical_json
from pmm.store.feature import FeatureSpec

PAGE = (Path(__file__).parents[1] / "docs/store.md").read_text(encoding="utf-8")
IMAGE = FeatureSpec("image", "test/1", "uint8", (4, 4, 3), 30, {})
CLIP = lossless_clip(16000, 1, "s16", 0, 2, [b"abcd"])


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store.create("my-store")
    rng = np.random.default_rng(0)
    rows = [
        (digit * 64, rng.integers(0, 255, (length, 4, 4, 3), np.uint8))
        for digit, length in (("1", 8), ("a", 5))
    ]
    store.publish(
        IMAGE, rows, {"model": "none"}, chunk_bytes=48
    )  # thirteen chunks: two digits in their names
    store.publish_takes("d", [Take(CLIP, None, "anna")], {"host": "h", "root": "/", "layout": "livelink"})
    return store


def snippets():
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_snippets_read_what_was_written(store, capsys):
    by_zarr, by_numpy, by_pmm = snippets()
    space = {}
    exec(by_zarr, space)
    assert capsys.readouterr().out.splitlines() == [
        "image test/1 (13, 4, 4, 3)",
        f"{'1' * 64} (8, 4, 4, 3) uint8",
        f"{'a' * 64} (5, 4, 4, 3) uint8",
    ]
    exec(by_numpy, space)
    np.testing.assert_array_equal(space["first_clip"], store.read(IMAGE.id, "1" * 64))
    assert len(space["values"]) == 13
    assert len(space["chunks"]) > 10
    exec(by_pmm, space)
    np.testing.assert_array_equal(space["array"], store.read(IMAGE.id, "a" * 64))


def test_the_tests_it_names_are_there():
    named = set(re.findall(r"`(test_\w+\.py)`", PAGE))
    assert named == {one for one in named if (Path(__file__).parent / one).exists()}
    assert len(named) >= 7


def test_a_seal_is_checked_as_the_page_says(store):
    sealed = ["pmm.json", *(entry.key for entry in store.medium.list("records"))]
    for key in sealed:
        data = (store.path / key).read_bytes()
        assert json.loads(data)["sha256"] == hashlib.sha256(data[:-78] + b"}").hexdigest()


def test_a_record_has_the_keys_the_page_shows(store):
    (entry,) = store.medium.list("records")
    shown = re.search(r"## A record\n\n```json\n(.*?)```", PAGE, re.DOTALL)[1]
    value = json.loads((store.path / entry.key).read_bytes())
    assert set(value) == set(json.loads(shown.replace(", ...]", "]")))
    (fragment,) = store.fragments()
    assert value["objects"] == sorted(value["objects"])
    assert {path for path, _, _ in value["objects"]} == {
        path.relative_to(store.path / fragment.folder).as_posix()
        for path in (store.path / fragment.folder).rglob("*")
        if path.is_file()
    }


def spelled(tag, fields, *blobs):
    head = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    parts = (len(part).to_bytes(8, "little") + part for part in (head, *blobs))
    return hashlib.sha256(b"pmm:" + tag.encode() + b"\0" + b"".join(parts)).hexdigest()


def test_ids_follow_from_what_the_page_says(store):
    (fragment,) = store.fragments()
    record = json.loads((store.path / fragment.record).read_bytes())
    spec = (store.path / "specs" / f"{IMAGE.id}.json").read_bytes()
    assert spec == canonical_json(json.loads(spec))
    assert spelled("feature", json.loads(spec)) == IMAGE.id
    assert spelled("fragment", {"spec": IMAGE.id, "objects": record["objects"]}) == record["fragment"]
    (sheet,) = (store.path / "datasets").iterdir()
    header, line = map(json.loads, sheet.read_bytes().splitlines())
    assert hashlib.sha256(sheet.read_bytes().split(b"\n", 1)[1]).hexdigest() == header["body"]
    assert spelled("take", {key: line[key] for key in ("clip", "subject", "target")}) == line["take"]
    fields = {"kind": "lossless", "format": "s16", "samples": line["end"] - line["start"]}
    fields |= {key: line[key] for key in ("rate", "channels")}
    assert spelled("clip", fields, b"abcd") == line["clip"]
    shown = re.search(r"A line has (.*?)\.\n", PAGE, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", shown)) == set(line)
