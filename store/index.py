"""Index objects: many records in one file, so that a large store opens in seconds.

Records stay the truth. An index object repeats what it read in records, ids and lengths as plain
binary, and is only a shortcut: deleting one is always safe. What keeps a bad one from being believed:

- torn: its header seals its length and the sha256 of all that follows; else it is not used at all;
- stale: a record counts only if it is listed now, with the size the index object gives; records it does
  not name are read as ever;
- lying: before the first byte of a fragment is served, its record itself is read. If that says anything
  else, the index object is deleted and every record it named is read (``Store`` does this).

Written by whoever has written fragments, when enough records are in no index object. Each covers what
those before it do not, so two writers at once only waste a few bytes.

Layout: a sealed line (``json``: bytes of the second line; ``rows``; ``body``: the sha256 of all after the
first line), a line of JSON (for each record its key, its size, how many rows, and what else it says),
then the lengths, int64 little-endian, and the row ids, 32 bytes each, of all rows in that order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np

from pmm import NotFound, PmmError, StoreCorrupt
from pmm.store.digest import json_line, sealed, strict_json, unsealed
from pmm.store.fragment import FORMAT, ID_BYTES, MALFORMED, Fragment, refuse_newer
from pmm.store.medium import Medium

FOLDER, ENDING = "index", ".idx"
WORTH_READING = 64
"""Fewer unknown records than this are read themselves."""
WORTH_WRITING = 256
"""Records in no index object that are worth another one."""
_LARGEST = 1 << 30


@dataclass(frozen=True)
class Known:
    """What an index object says of a record: its size in bytes, and its fragment (None: abandoned)."""

    size: int
    fragment: Fragment | None
    index: str


def read(medium: Medium, where: str, wanted: Set[str]) -> tuple[dict[str, Known], set[str], dict[str, str]]:
    """What index objects say of the records ``wanted``, which were read for it, and the unusable with why."""
    found: dict[str, Known] = {}
    seen: set[str] = set()
    problems: dict[str, str] = {}
    for key, size in _listed(medium):
        if wanted <= found.keys():
            break
        try:
            found |= _read_one(medium, key, size, where, wanted - found.keys())
            seen.add(key)
        except NotFound:
            continue  # deleted since it was listed
        except StoreCorrupt as error:
            problems[key] = str(error)
    return found, seen, problems


def compare(medium: Medium, where: str, records: Mapping[str, Fragment | None]) -> dict[str, str]:
    """The index objects that are unusable or do not say what ``records``, all read just now, do; and why."""
    wrong: dict[str, str] = {}
    listed = {one.key for one in medium.list("records")}
    for key, size in _listed(medium):
        try:
            told = _read_one(medium, key, size, where, listed)
        except (StoreCorrupt, NotFound) as error:
            wrong[key] = str(error)
            continue
        if any(one not in records or not same(records[one], told[one].fragment) for one in told):
            wrong[key] = f"{where}/{key} does not say what the records do; delete it, it is only a shortcut"
    return wrong


def same(one: Fragment | None, other: Fragment | None) -> bool:
    """Whether two records say the same."""
    if one is None or other is None:
        return one is other
    return one.to_bytes() == other.to_bytes()


def write(medium: Medium, header: Mapping[str, Any], records: Mapping[str, Known]) -> str:
    """One index object over ``records`` (record key to what it says); returns its key."""
    lines, lengths, ids = [], [], []
    for key, one in sorted(records.items()):
        count = len(one.fragment.lengths) if one.fragment else 0
        lines.append([key, one.size, count, one.fragment and one.fragment.told()])
        if one.fragment:
            lengths.append(one.fragment.lengths.astype("<i8").tobytes())
            ids.append(one.fragment.ids)
    text = json_line({"records": lines})
    body = b"".join([text, *lengths, *ids])
    rows = sum(map(len, ids)) // ID_BYTES
    counted = {"format": FORMAT, "json": len(text), "rows": rows, "body": hashlib.sha256(body).hexdigest()}
    key = f"{FOLDER}/{uuid4().hex}{ENDING}"
    medium.create(key, sealed({**header, **counted}) + body)
    return key


def _listed(medium: Medium) -> list[tuple[str, int]]:
    return sorted((one.key, one.size) for one in medium.list(FOLDER) if one.key.endswith(ENDING))


def _read_one(medium: Medium, key: str, size: int, where: str, wanted: Set[str]) -> dict[str, Known]:
    """Raises StoreCorrupt, or NotFound."""
    path = f"{where}/{key}"
    if size > _LARGEST:
        raise StoreCorrupt(f"{path} has {size} bytes; no more than {_LARGEST} are read")
    try:
        return _parse(key, medium.read(key, 0, size), path, wanted)
    except NotFound:
        raise
    except (PmmError, *MALFORMED) as error:
        raise StoreCorrupt(f"{path} is no index object ({error}); delete it, it is only a shortcut") from None


def _parse(key: str, data: bytes, where: str, wanted: Set[str]) -> dict[str, Known]:
    head, newline, _ = data[: 1 << 16].partition(b"\n")
    header = unsealed(head + newline, where)
    refuse_newer(header, where)
    body = memoryview(data)[len(head) + 1 :]
    if hashlib.sha256(body).hexdigest() != header["body"]:
        raise StoreCorrupt(f"{where} is not as it was written: its sha256 does not match")
    text, rows = body[: header["json"]], header["rows"]
    lengths = np.frombuffer(body[len(text) : len(text) + 8 * rows], dtype="<i8").astype(np.int64)
    ids = body[len(text) + 8 * rows :]
    if len(lengths) != rows or len(ids) != rows * ID_BYTES:
        raise ValueError("its rows are not as many as it says")
    listed = strict_json(bytes(text), where)["records"]
    return {one: Known(size, made, key) for one, size, made in _entries(listed, lengths, ids, wanted)}


def _entries(
    listed: list[Any], lengths: np.ndarray, ids: memoryview, wanted: Set[str]
) -> Iterator[tuple[str, int, Fragment | None]]:
    first = 0
    for key, size, count, told in listed:
        last = first + count
        if key in wanted:
            _, spec_id, name = key.split("/")
            rows = bytes(ids[first * ID_BYTES : last * ID_BYTES])
            location = name.removesuffix(".json")
            yield key, size, told and Fragment.from_told(told, spec_id, location, rows, lengths[first:last])
        first = last


def forget(medium: Medium, key: str) -> None:
    """Deletes an index object that was found to lie, where we may."""
    with suppress(PmmError):
        medium.delete(key)
