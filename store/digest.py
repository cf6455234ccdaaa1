"""Names made from content: SHA-256 over a domain tag, canonical JSON and length-prefixed bytes.

The layout, for readers in other languages::

    "pmm:" + tag + "\\0"  |  u64 little-endian length + canonical JSON  |  (u64 length + bytes)*

Canonical JSON is UTF-8, keys sorted by code point, no spaces, no floats (a float prints
differently in every language; rates are integers, other reals travel as strings).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pmm import BadInput

Json = None | bool | int | str | list["Json"] | dict[str, "Json"]


def canonical_json(value: Any) -> bytes:
    """The one spelling of ``value`` as JSON. Tuples are lists. Raises TypeError on a float."""
    _refuse_floats(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _refuse_floats(value: Any) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"canonical JSON keys are strings, got {key!r}")
            _refuse_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_floats(item)
    else:
        raise TypeError(f"canonical JSON holds no {type(value).__name__} ({value!r}); spell it as a string")


def strict_json(text: bytes | str, where: str) -> Any:
    """Parse JSON and refuse duplicate keys (two readers would disagree) and NaN.

    Raises BadInput that names ``where`` the text came from.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a key stands twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not valid JSON ({error}); it was damaged or not written by pmm") from None


class Digest:
    """A digest under way: a tag and fields, then byte strings whose lengths are known beforehand."""

    def __init__(self, tag: str, fields: Mapping[str, Any]):
        self._hash = hashlib.sha256(b"pmm:" + tag.encode() + b"\0")
        self.add(canonical_json(fields))

    def add(self, data: bytes | memoryview) -> Digest:
        """One length-prefixed byte string."""
        view = memoryview(data)
        return self.add_stream(view.nbytes, [view])

    def add_stream(self, length: int, blocks: Iterable[bytes | memoryview]) -> Digest:
        """One byte string that comes in blocks. Raises ValueError if it is not ``length`` bytes long."""
        self._hash.update(length.to_bytes(8, "little"))
        seen = 0
        for block in blocks:
            view = memoryview(block).cast("B")
            seen += view.nbytes
            self._hash.update(view)
        if seen != length:
            raise ValueError(f"{seen} bytes came where {length} were announced")
        return self

    def hex(self) -> str:
        return self._hash.hexdigest()


def digest(tag: str, fields: Mapping[str, Any], *blobs: bytes | memoryview) -> str:
    """The 64-digit hexadecimal name of ``fields`` and ``blobs`` within the domain ``tag``."""
    running = Digest(tag, fields)
    for blob in blobs:
        running.add(blob)
    return running.hex()
