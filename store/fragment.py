"""One immutable fragment: a Zarr v3 group with the rows of some clips under one feature spec.

    values  (rows, ...)  the rows of all clips, one clip after another
    offsets (N + 1,)     int64: clip i has rows offsets[i] to offsets[i + 1]
    clips   (N, 32)      uint8: row ids, ascending
    sums    (N, 32)      uint8: sha256 of each clip's rows as stored

Writing: the bytes go to a folder that nobody else names, each object hashed as it is written; then
everything is synced; the record that makes the fragment known is the catalog's to create.
Reading: the small objects are checked against the record and the chunks of ``values`` by size; then
the chunks are mapped. Payload digests are checked by `pmm store verify`, not here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any
from uuid import uuid4

import numpy as np

from pmm import BadInput, NewerFormat, PmmError, StoreCorrupt
from pmm.store.digest import digest, sealed, strict_json, unsealed
from pmm.store.feature import DTYPES, FeatureSpec
from pmm.store.medium import Buffer, Medium

Blob = bytes  # Fragment has a property of that name

FORMAT = 1
"""Major version of everything in a store; readers refuse a greater one."""

CHUNK_BYTES = 256 << 20
RECORD_BYTES = 64 << 20
"""A record beyond this is not written, and not read either."""
_HEAD_BYTES = 64 << 20
_BLOCK_BYTES = 8 << 20
_WRITERS = 3
_WORTH_THREADS = 16 << 20
"""A fragment from this size is hashed, written and synced by several threads."""
_FOREIGN_BYTES = 1 << 30
ID_BYTES = 32
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
HEX64 = re.compile(r"[0-9a-f]{64}")
MALFORMED = (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError)
"""What reading JSON of another shape than expected raises."""
MAX_CLIPS = 500_000
"""Clips of one fragment: what keeps its record below RECORD_BYTES."""


@dataclass(frozen=True)
class Object:
    """One file of a fragment: its path within the fragment, its size in bytes, its sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Fragment:
    """What a record says. ``id`` is decided by the contents, ``location`` by chance, one per copy.

    ids        the row ids, 32 bytes each, ascending
    lengths    (N,) int64, rows of each clip
    created    ISO 8601 text, for people only
    writer     host, user, pid, pmm
    made_with  what made the tensors: models, library versions, device
    """

    spec_id: str
    id: str
    location: str
    ids: bytes
    lengths: np.ndarray
    objects: tuple[Object, ...]
    created: str
    writer: Mapping[str, Any]
    made_with: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return f"fragments/{self.spec_id}/{self.location}"

    @property
    def record(self) -> str:
        return f"records/{self.spec_id}/{self.location}.json"

    @property
    def row_ids(self) -> list[str]:
        """Hexadecimal, ascending, as ``lengths`` goes."""
        return hexes(self.ids)

    @property
    def bytes(self) -> int:
        """Size of all objects."""
        return sum(one.size for one in self.objects)

    def to_bytes(self) -> Blob:
        """The record."""
        return sealed(
            {
                "format": FORMAT,
                "state": "published",
                "spec": self.spec_id,
                "rows": self.row_ids,
                "lengths": self.lengths.tolist(),
                **self.told(),
            }
        )

    def told(self) -> dict[str, Any]:
        """What the record says beside its rows and its place, as JSON."""
        return {
            "fragment": self.id,
            "objects": [[one.path, one.size, one.sha256] for one in self.objects],
            "created": self.created,
            "writer": dict(self.writer),
            "made_with": dict(self.made_with),
        }

    @classmethod
    def from_told(
        cls, told: Mapping[str, Any], spec_id: str, location: str, ids: Blob, lengths: np.ndarray
    ) -> Fragment:
        """The fragment of which ``told`` said this. Raises one of MALFORMED if it is none, or if it names
        anything outside its own folder."""
        if len(ids) != len(lengths) * ID_BYTES or lengths.ndim != 1 or not lengths.size or lengths.min() < 1:
            raise ValueError("rows and lengths do not fit")
        if not _ascending(ids):
            raise ValueError("row ids are not ascending")
        objects = tuple(_object(one) for one in told["objects"])
        if told["fragment"] != fragment_id(spec_id, objects):
            raise ValueError("its fragment id does not follow from its contents")
        people = (str(told["created"]), dict(told["writer"]), dict(told["made_with"]))
        return cls(spec_id, told["fragment"], location, ids, lengths, objects, *people)

    @classmethod
    def from_bytes(cls, data: Blob, spec_id: str, location: str, where: str) -> Fragment | None:
        """The fragment a record makes known; None where the record says it was abandoned.

        Raises StoreCorrupt if the record is not one, or names anything outside its own folder.
        """
        value = unsealed(data, where)
        try:
            refuse_newer(value, where)
            if value["state"] != "published":
                return None
            if value["spec"] != spec_id:
                raise ValueError("it is of another spec")
            ids = bytes.fromhex("".join(_hex64(row) for row in value["rows"]))
            lengths = np.array(value["lengths"], dtype=np.int64)
            return cls.from_told(value, spec_id, location, ids, lengths)
        except NewerFormat:
            raise
        except MALFORMED as error:
            raise StoreCorrupt(f"{where} is no record of a fragment ({error})") from None


def refuse_newer(value: Mapping[str, Any], where: str) -> None:
    """Raises NewerFormat for a greater major version than ours, ValueError for none at all."""
    found = value.get("format")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"its format version is {found!r}")
    if found > FORMAT:
        raise NewerFormat(
            f"{where} has store format {found}, this pmm reads up to {FORMAT}; install a newer pmm"
        )


def fragment_id(spec_id: str, objects: Iterable[Object]) -> str:
    """The name of these contents, wherever they lie."""
    listed = sorted([one.path, one.size, one.sha256] for one in objects)
    return digest("fragment", {"spec": spec_id, "objects": listed})


def hexes(ids: bytes) -> list[str]:
    text = ids.hex()
    return [text[i : i + 2 * ID_BYTES] for i in range(0, len(text), 2 * ID_BYTES)]


def sortable(ids: bytes) -> np.ndarray:
    """(N,) view of row ids that numpy compares as bytes."""
    return np.frombuffer(ids, dtype=f"S{ID_BYTES}")


def _ascending(ids: bytes) -> bool:
    view = sortable(ids)
    return bool((view[:-1] < view[1:]).all())


def _hex64(text: str) -> str:
    if not HEX64.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is not 64 hexadecimal digits")
    return text


@lru_cache(4096)  # the same few names in every record
def _is_path(text: str) -> bool:
    return all(NAME.fullmatch(name) for name in text.split("/"))


def _object(value: Sequence[Any]) -> Object:
    path, size, sha256 = value
    if not _is_path(path):
        raise ValueError(f"{path[:80]!r} is no path within a fragment")
    if not isinstance(size, int) or not 0 <= size < 1 << 48:
        raise ValueError(f"{path} has the size {size!r}")
    return Object(path, size, _hex64(sha256))


# -- writing


def write(
    medium: Medium,
    spec: FeatureSpec,
    rows: Sequence[tuple[str, np.ndarray]],
    people: Mapping[str, Any],
    chunk_bytes: int = CHUNK_BYTES,
) -> Fragment:
    """Writes and syncs the objects of one fragment at a new location; nothing is visible yet.

    ``rows`` are (row id, array (n, *spec.shape)); ``people`` holds created, writer and made_with.
    Raises BadInput unless every array is what ``spec`` says, finite and not empty.
    """
    ordered = check(spec, rows)
    arrays = [array for _, array in ordered]
    location = uuid4().hex
    folder = f"fragments/{spec.id}/{location}"
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    ids = bytes.fromhex("".join(row_id for row_id, _ in ordered))
    chunk_rows = _chunk_rows(int(lengths.sum()), arrays[0][0].nbytes, chunk_bytes)
    small = _metadata(spec, lengths, chunk_rows)
    small["offsets/c/0"] = np.concatenate([[0], lengths.cumsum()]).astype("<i8").tobytes()
    small["clips/c/0/0"] = ids
    tail = "/0" * len(spec.shape)
    sums = (hashlib.sha256(_raw(array)).digest() for array in arrays)  # computed as they are written
    contents: list[tuple[str, Iterable[Buffer]]] = [("sums/c/0/0", sums)]
    contents += [(f"values/c/{n}{tail}", one) for n, one in enumerate(_chunks(arrays, chunk_rows))]
    contents += [(path, [data]) for path, data in small.items()]
    large = sum(array.nbytes for array in arrays) >= _WORTH_THREADS
    objects = _write_all(medium, folder, contents, writers=_WRITERS if large else 1)
    return Fragment(spec.id, fragment_id(spec.id, objects), location, ids, lengths, tuple(objects), **people)


def copy(
    source: Medium, fragment: Fragment, target: Medium, passed: Callable[[int], None] = lambda size: None
) -> Fragment:
    """Writes and syncs the objects of ``fragment`` at a new location of ``target``; nothing is visible yet.

    Every byte is checked against the record on its way; ``passed`` hears of each block's size. Raises
    StoreCorrupt or NotFound, and leaves nothing, where the source is not as its record says.
    """
    one = replace(fragment, location=uuid4().hex)
    contents = ((it.path, _blocks(source, f"{fragment.folder}/{it.path}", passed)) for it in one.objects)
    try:
        _write_all(target, one.folder, contents, {it.path: it for it in one.objects})
    except StoreCorrupt as error:
        raise StoreCorrupt(f"{fragment.folder}: {error}") from None
    return one


def _blocks(medium: Medium, key: str, passed: Callable[[int], None]) -> Iterator[Buffer]:
    start = 0
    while block := medium.read(key, start, _BLOCK_BYTES):
        yield block
        start += len(block)
        passed(len(block))


def check(spec: FeatureSpec, rows: Sequence[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """``rows`` by ascending id, every array contiguous and as ``spec`` says. Raises BadInput."""
    if not rows:
        raise BadInput("a fragment without clips; give at least one")
    if len(rows) > MAX_CLIPS:
        raise BadInput(f"{len(rows)} clips in one fragment; at most {MAX_CLIPS} are allowed, give fewer")
    ordered = sorted(rows, key=lambda row: row[0])
    for row_id, _ in ordered:
        if not HEX64.fullmatch(row_id):
            raise BadInput(f"{row_id!r} is no row id; 64 hexadecimal digits were expected")
    for (one, _), (other, _) in pairwise(ordered):
        if one == other:
            raise BadInput(f"clip {one} comes twice; a fragment holds each clip once")
    return [(row_id, _checked_array(spec, row_id, array)) for row_id, array in ordered]


def _checked_array(spec: FeatureSpec, row_id: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.dtype(spec.dtype) or array.shape[1:] != spec.shape or array.ndim == 0:
        raise BadInput(
            f"clip {row_id}: {array.dtype} of shape {array.shape}; {spec.modality} is {spec.dtype} "
            f"of shape (n, {', '.join(map(str, spec.shape))})"
        )
    if len(array) == 0:
        raise BadInput(f"clip {row_id}: no rows; an empty clip is not stored")
    stored = np.ascontiguousarray(array, dtype=_stored(spec.dtype))
    if not _finite(stored):
        raise BadInput(f"clip {row_id}: NaN or infinity in its {spec.modality} ({spec.dtype}); not stored")
    return stored


_EXPONENTS = {"<f2": 0x7C00, "<f4": 0x7F800000}
"""All ones in the exponent: NaN or infinity. Tens of times faster than numpy's isfinite of float16."""


def _finite(stored: np.ndarray) -> bool:
    mask = _EXPONENTS.get(stored.dtype.str)
    return mask is None or bool((stored.view(f"<u{stored.itemsize}") & mask != mask).all())


def _stored(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _raw(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _chunk_rows(total_rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of a chunk when the fewest chunks of at most about ``chunk_bytes`` share the rows equally."""
    count = -(-total_rows * row_bytes // chunk_bytes)
    return -(-total_rows // min(count, total_rows))


def _chunks(arrays: Sequence[np.ndarray], chunk_rows: int) -> Iterator[Iterator[Buffer]]:
    """The bytes of each chunk in order, the last filled up with zeros, as Zarr has it."""
    ends = np.cumsum([len(array) for array in arrays])
    for first in range(0, int(ends[-1]), chunk_rows):
        yield _chunk(arrays, ends, first, first + chunk_rows)


def _chunk(arrays: Sequence[np.ndarray], ends: np.ndarray, first: int, last: int) -> Iterator[Buffer]:
    for index in range(int(np.searchsorted(ends, first, side="right")), len(arrays)):
        start = int(ends[index]) - len(arrays[index])
        if start >= last:
            return
        yield _raw(arrays[index][max(0, first - start) : last - start])
    yield bytes(max(0, last - int(ends[-1])) * arrays[0][0].nbytes)


def _write_all(
    medium: Medium,
    folder: str,
    contents: Iterable[tuple[str, Iterable[Buffer]]],
    expected: Mapping[str, Object] | None = None,
    writers: int = 1,
) -> list[Object]:
    """Objects by path, on the disk. What was written is taken away again if the rest cannot be.

    Several ``writers`` hash, write and sync objects at the same time.
    """

    def write_one(item: tuple[str, Iterable[Buffer]]) -> Object:
        return _write(medium, folder, *item, expected[item[0]] if expected else None)

    try:
        if writers == 1:
            done = [write_one(item) for item in contents]
        else:
            with ThreadPoolExecutor(writers) as pool:
                done = list(pool.map(write_one, contents))
        medium.sync(folder)
    except BaseException:  # also Ctrl-C: no record names this folder yet, and nobody else ever will
        with suppress(PmmError):
            for entry in list(medium.list(folder)):
                medium.delete(entry.key)
        raise
    return sorted(done, key=lambda one: one.path)


def _write(
    medium: Medium, folder: str, path: str, blocks: Iterable[Buffer], expected: Object | None = None
) -> Object:
    """Writes one object and hashes it on the way. Raises StoreCorrupt if it is not the ``expected`` one,
    before the medium has taken the last of it."""
    running, size = hashlib.sha256(), 0

    def passing() -> Iterator[Buffer]:
        nonlocal size
        for block in blocks:
            running.update(block)
            size += len(block)
            yield block
        if expected and (size, running.hexdigest()) != (expected.size, expected.sha256):
            raise StoreCorrupt(f"{path} was changed: its size or sha256 is not the record's")

    medium.write(f"{folder}/{path}", passing())
    return Object(path, size, running.hexdigest())


def _metadata(spec: FeatureSpec, lengths: np.ndarray, chunk_rows: int) -> dict[str, bytes]:
    """The zarr.json objects, spelled by zarr-python itself."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync
    from zarr.storage import MemoryStore

    memory, count, total = MemoryStore(), len(lengths), int(lengths.sum())
    about = {"pmm": {"format": FORMAT, "spec": spec.id, "feature": spec.to_json()}}
    group = zarr.create_group(memory, zarr_format=3, attributes=about)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], str, tuple[str, ...]]] = {
        "values": ((total, *spec.shape), (chunk_rows, *spec.shape), spec.dtype, spec.dimension_names),
        "offsets": ((count + 1,), (count + 1,), "int64", ("edge",)),
        "clips": ((count, ID_BYTES), (count, ID_BYTES), "uint8", ("clip", "byte")),
        "sums": ((count, ID_BYTES), (count, ID_BYTES), "uint8", ("clip", "byte")),
    }
    for name, (shape, chunks, dtype, axes) in shapes.items():
        group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=_stored(dtype),
            dimension_names=axes,
            compressors=None,
            filters=None,
            fill_value=0,
        )
    keys = ["zarr.json", *(f"{name}/zarr.json" for name in shapes)]
    found = {key: sync(memory.get(key, default_buffer_prototype())) for key in keys}
    return {key: buffer.to_bytes() for key, buffer in found.items() if buffer is not None}


# -- reading


class Reader:
    """A fragment opened: its small objects checked against the record, its chunks mapped on demand.

    Raises StoreCorrupt, naming the object, where they differ.
    """

    def __init__(self, medium: Medium, fragment: Fragment):
        self.fragment = fragment
        self._medium = medium
        self._check_sizes()
        heads = {one.path: self._head(one) for one in fragment.objects if not _is_payload(one.path)}
        try:
            self._open(heads)
        except MALFORMED as error:
            raise StoreCorrupt(f"{fragment.folder} does not fit its record ({error})") from None

    def rows(self, index: int) -> np.ndarray:
        """All rows of the clip at ``index`` in ``fragment.row_ids``: (n, *shape), read-only."""
        first, last = int(self._offsets[index]), int(self._offsets[index + 1])
        found = self._values(first, last)
        if self._foreign and not self._same(found, index):  # a lost chunk would read as zeros
            raise StoreCorrupt(
                f"clip {hexes(self.fragment.ids)[index]} in {self.fragment.folder} was changed: its sha256 "
                f"is not the one stored; {_remedy}"
            )
        found.flags.writeable = False
        return found

    def map(self) -> None:
        """Maps every chunk now, so that its rows can be read whatever becomes of the files' names."""
        if not self._foreign and not self._medium.safe:  # a foreign layout is in memory already
            for index in range(len(self._keys)):
                self._chunk(index)

    @property
    def sums(self) -> bytes:
        """The sha256 of each clip's rows as they were written, 32 bytes each."""
        return self._sums.tobytes()

    def sum_matches(self, index: int) -> bool:
        """Whether the rows of that clip are still those that were written."""
        first, last = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._same(self._values(first, last), index)

    def _same(self, rows: np.ndarray, index: int) -> bool:
        stored = np.ascontiguousarray(rows, dtype=self._dtype)
        return hashlib.sha256(_raw(stored)).digest() == self._sums[index].tobytes()

    def _check_sizes(self) -> None:
        folder = self.fragment.folder
        found = {entry.key: entry.size for entry in self._medium.list(folder)}
        for one in self.fragment.objects:
            size = found.get(f"{folder}/{one.path}")
            if size is None:
                raise StoreCorrupt(f"{folder}/{one.path} is missing; {_remedy}")
            if size != one.size:
                raise StoreCorrupt(f"{folder}/{one.path} has {size} bytes, not {one.size}; {_remedy}")

    def _head(self, one: Object) -> bytes:
        key = f"{self.fragment.folder}/{one.path}"
        if one.size > _HEAD_BYTES:
            raise StoreCorrupt(f"{key} is {one.size} bytes large; no more than {_HEAD_BYTES} are read")
        data = self._medium.read(key, 0, one.size)
        if hashlib.sha256(data).hexdigest() != one.sha256:
            raise StoreCorrupt(f"{key} was changed: its sha256 is not the record's; {_remedy}")
        return data

    def _open(self, heads: Mapping[str, bytes]) -> None:
        fragment, count = self.fragment, len(self.fragment.lengths)
        meta = {name: strict_json(heads[f"{name}/zarr.json"], name) for name in _ARRAYS}
        total = int(fragment.lengths.sum())
        dtype, shape = meta["values"]["data_type"], tuple(meta["values"]["shape"])
        if dtype not in DTYPES or shape[0] != total:
            raise ValueError(f"values is {dtype} of shape {shape}, the record lists {total} rows")
        self._dtype, self._shape = _stored(dtype), shape
        plain = _plain(meta["values"], dtype, shape)
        small = [
            _plain(meta["offsets"], "int64", (count + 1,)) == count + 1,
            _plain(meta["clips"], "uint8", (count, ID_BYTES)) == count,
            _plain(meta["sums"], "uint8", (count, ID_BYTES)) == count,
        ]
        self._foreign = not (plain and all(small))
        if plain and all(small):
            self._open_mapped(heads, plain)
        else:
            self._open_foreign(count)
        offsets = np.concatenate([[0], fragment.lengths.cumsum()])
        if not np.array_equal(self._offsets, offsets) or self._ids != fragment.ids:
            raise ValueError("other clips or offsets than the record's")

    def _open_mapped(self, heads: Mapping[str, bytes], chunk_rows: int) -> None:
        self._offsets = np.frombuffer(heads["offsets/c/0"], dtype="<i8")
        self._ids = heads["clips/c/0/0"]
        self._sums = np.frombuffer(heads["sums/c/0/0"], dtype=np.uint8).reshape(-1, ID_BYTES)
        self._chunk_rows = chunk_rows
        self._chunk_bytes = chunk_rows * prod(self._shape[1:]) * self._dtype.itemsize
        count = -(-self._shape[0] // chunk_rows)
        if count > len(self.fragment.objects):
            raise ValueError(f"{count} chunks, more than the record lists")
        tail = "/0" * (len(self._shape) - 1)
        self._keys = [f"values/c/{index}{tail}" for index in range(count)]
        sizes = {one.path: one.size for one in self.fragment.objects}
        if any(sizes[key] != self._chunk_bytes for key in self._keys):
            raise ValueError("chunks of another size than values has")
        self._mapped: dict[int, np.ndarray] = {}
        self._values = self._mapped_rows

    def _mapped_rows(self, first: int, last: int) -> np.ndarray:
        size = self._chunk_rows
        parts = [
            self._part(index, max(0, first - index * size), min(size, last - index * size))
            for index in range(first // size, (last - 1) // size + 1)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, index: int, first: int, last: int) -> np.ndarray:
        """Rows of one chunk: mapped, or read where the medium had better not be mapped."""
        if not self._medium.safe:
            return self._chunk(index)[first:last]
        row = self._chunk_bytes // self._chunk_rows
        key = f"{self.fragment.folder}/{self._keys[index]}"
        data = self._medium.read(key, first * row, (last - first) * row)
        if len(data) != (last - first) * row:
            raise StoreCorrupt(f"{key} was cut off; {_remedy}")
        return np.frombuffer(data, dtype=self._dtype).reshape(-1, *self._shape[1:])

    def _chunk(self, index: int) -> np.ndarray:
        if index not in self._mapped:
            mapped = self._medium.map(f"{self.fragment.folder}/{self._keys[index]}", self._chunk_bytes)
            flat = np.frombuffer(mapped, dtype=self._dtype)
            self._mapped[index] = flat.reshape(self._chunk_rows, *self._shape[1:])
        return self._mapped[index]

    def _open_foreign(self, count: int) -> None:
        """A layout that is not ours (compressed, sharded): read whole, through zarr-python."""
        if self.fragment.bytes > _FOREIGN_BYTES:
            raise ValueError(
                f"{self.fragment.bytes} bytes in a foreign layout; at most {_FOREIGN_BYTES} are read"
            )
        group = _zarr_group(self._medium, self.fragment)
        for name, array in group.arrays():
            if prod(array.shards or array.chunks) * array.dtype.itemsize > _FOREIGN_BYTES:
                raise ValueError(f"{name} has chunks of more than {_FOREIGN_BYTES} bytes")
        for name, shape in (("offsets", (count + 1,)), ("clips", (count, 32)), ("sums", (count, 32))):
            if group[name].shape != shape:
                raise ValueError(f"{name} has shape {group[name].shape}, not {shape}")
        self._offsets = np.asarray(group["offsets"][:])
        self._ids = np.asarray(group["clips"][:]).astype(np.uint8).tobytes()
        self._sums = np.asarray(group["sums"][:])
        self._values = lambda first, last: np.asarray(group["values"][first:last])


def object_damage(medium: Medium, one: Fragment, stored: Object) -> str:
    """Reads an object whole: why it is not the recorded one, in a line; empty if it is."""
    key = f"{one.folder}/{stored.path}"
    running, size = hashlib.sha256(), 0
    try:
        while block := medium.read(key, size, _BLOCK_BYTES):
            running.update(block)
            size += len(block)
    except PmmError as error:
        return str(error)
    if size != stored.size:
        return f"{size} bytes, the record says {stored.size}"
    return "" if running.hexdigest() == stored.sha256 else "its sha256 is not the recorded one"


_ARRAYS = ("values", "offsets", "clips", "sums")
_remedy = "run `pmm store verify`, then `pmm precompute` again"


def _is_payload(path: str) -> bool:
    return path.startswith("values/c/")


def _plain(meta: Mapping[str, Any], dtype: str, shape: tuple[int, ...]) -> int | None:
    """Rows of a chunk if the chunk files are raw rows of ``dtype``; None if they are anything else."""
    chunk = tuple(meta["chunk_grid"]["configuration"].get("chunk_shape", (0,)))
    bare: dict[str, Any] = {"name": "bytes"}
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    same = (
        meta["node_type"] == "array"
        and meta["data_type"] == dtype
        and tuple(meta["shape"]) == shape
        and meta["chunk_grid"]["name"] == "regular"
        and chunk[1:] == shape[1:]
        and isinstance(chunk[0], int)
        and chunk[0] > 0
        and meta["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        and (meta["codecs"] == [little] or (np.dtype(dtype).itemsize == 1 and meta["codecs"] == [bare]))
        and not meta.get("storage_transformers")
    )
    return chunk[0] if same else None


def _zarr_group(medium: Medium, fragment: Fragment) -> Any:
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    make = default_buffer_prototype().buffer.from_bytes
    found = {
        one.path: make(medium.read(f"{fragment.folder}/{one.path}", 0, one.size)) for one in fragment.objects
    }
    return zarr.open_group(MemoryStore(found), mode="r", zarr_format=3)
