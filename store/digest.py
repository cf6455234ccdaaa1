"""Names made from content: SHA-256 over a domain tag, canonical JSON and length-prefixed bytes.

The layout, for readers in other languages::

    "pmm:" + tag + "\\0"  |  u64 little-endian length + canonical JSON  |  (u64 length + bytes)*

Canonical JSON is UTF-8, keys sorted by code point, no spaces, no floats (a float prints
differently in every language; rates are integers, other reals travel as strings).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pmm import BadInput, StoreCorrupt

Json = None | bool | int | str | list["Json"] | dict[str, "Json"]


def canonical_json(value: Any) -> bytes:
    """The one spelling of ``value`` as JSON. Tuples are lists. Raises TypeError on a float."""
    _refuse_floats(value)
    return _spelled(value)


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _spelled(value: Any) -> bytes:
    text = _ENCODER.encode(value)
    # A file name that is no UTF-8 reaches us with lone surrogates; backslashreplace spells one as
    # JSON does, \udcff.
    return text.encode("utf-8", "backslashreplace")


_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n')
_SEAL_BYTES = len(',"sha256":""}\n') + 64


def sealed(value: Mapping[str, Any]) -> bytes:
    """A line of JSON whose last key is the SHA-256 of the same object without that key.

    The digest is over bytes, not over a re-spelling: those before ``,"sha256":`` and then ``}``.
    Raises TypeError or ValueError on what is no JSON.
    """
    body = _spelled(value)
    return body[:-1] + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def json_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON, keys sorted."""
    return _spelled(value) + b"\n"


def unsealed(data: bytes, where: str) -> dict[str, Any]:
    """The object ``sealed`` spelled. Raises StoreCorrupt, naming ``where``, if any byte differs."""
    body, seal = data[:-_SEAL_BYTES] + b"}", _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if seal is None or hashlib.sha256(body).hexdigest().encode() != seal[1]:
        raise StoreCorrupt(f"{where} is not as it was written: its own sha256 does not match")
    try:
        value = strict_json(body, where)
    except BadInput as error:
        raise StoreCorrupt(str(error)) from None
    if not isinstance(value, dict):
        raise StoreCorrupt(f"{where} holds no JSON object")
    return value


_PLAIN = frozenset((type(None), bool, int, str))


def _refuse_floats(value: Any) -> None:
    if isinstance(value, bool | int | str | None):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"canonical JSON keys are strings, got {key!r}")
            if type(item) not in _PLAIN:
                _refuse_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            if type(item) not in _PLAIN:
                _refuse_floats(item)
    else:
        raise TypeError(f"canonical JSON holds no {type(value).__name__} ({value!r}); spell it as a string")


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        raise ValueError("a key stands twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def strict_json(text: bytes | str, where: str) -> Any:
    """Parse JSON and refuse duplicate keys (two readers would disagree) and NaN.

    Raises BadInput that names ``where`` the text came from.
    """

    try:
        if not isinstance(text, str):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        return _DECODER.decode(text)
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
