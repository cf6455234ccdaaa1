"""One HDF5 file to hand to someone: features with the takes they belong to, and back into a store.

    /                            attributes: format, version, about (how to read it), created, pmm
    /takes                       a line of JSON for each take
    /features/<modality>-<spec>  attributes for people: modality, algorithm, axes, fps
        values  (rows, ...)      the rows of all clips, one clip after another
        offsets (N + 1,)         int64: clip i has rows offsets[i] to offsets[i + 1]
        clips   (N,)             row ids, 64 digits, ascending
        sums    (N, 32)          uint8: sha256 of each clip's rows
        spec, made_with          JSON: how the tensors were made, in full

Everything is contiguous and uncompressed, so that any HDF5 reader has it at the speed of the disk (what
compression saves, 1.1 to 1.4 times, costs five to twenty times that speed). Text is of fixed length.

A file from somebody is not believed: only plain datasets of exactly these types are read, none that
lies in another file, no more of them than the file has bytes, and ids and sums are computed anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

import pmm
from pmm import AlreadyThere, BadInput, NewerFormat, NotFound, StoreCorrupt
from pmm.store.catalog import Store, now
from pmm.store.clip import Take
from pmm.store.digest import digest, json_line, strict_json
from pmm.store.feature import FeatureSpec
from pmm.store.fragment import HEX64, ID_BYTES, MALFORMED
from pmm.store.medium import MediumError
from pmm.store.snapshots import Readable, View, capture, load

if TYPE_CHECKING:
    import h5py

MAGIC = "pmm-pack"
VERSION = 1
_FRAGMENT_BYTES = 512 << 20
_CLIP_BYTES = 4 << 30
_MOST_CLIPS = 5_000_000
_TEXT_BYTES = 1 << 30

ABOUT = """\
Features of speech clips and the face tracks they go with, packed by pmm. In Python:

import json, h5py
file = h5py.File("this.h5")
takes = [json.loads(line) for line in file["takes"]]
for group in file["features"].values():
    ids = {row.decode(): index for index, row in enumerate(group["clips"])}
    names = "target" if group.attrs["modality"] == "target" else "clip"
    for take in takes:
        if take[names] in ids:
            first, last = group["offsets"][ids[take[names]] :][:2]
            array = group["values"][first:last]  # its axes: group.attrs["axes"]

`pmm store unpack this.h5 STORE` puts it all into a feature store, under the same ids."""


@dataclass(frozen=True)
class Packed:
    """Bytes of features written, checked or taken over, so far and in all."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Contents:
    """What went into a file, or came out of it into a store: takes, rows of features and their bytes."""

    takes: int
    rows: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


OnEvent = Callable[[Packed], None]


def pack(
    store: Store,
    out: Path,
    subjects: Sequence[str] = (),
    snapshot: str = "",
    on_event: OnEvent = lambda event: None,
) -> Contents:
    """Writes what ``store`` has of its takes to the new file ``out``.

    ``subjects`` chooses takes by subject, ``snapshot`` content by the name it was given. Each clip is
    checked against its sum. Raises AlreadyThere; BadInput for a subject that no take has, or if there is
    nothing to write; NotFound if the snapshot is no longer whole; StoreCorrupt, naming the clip. Then
    nothing is left where ``out`` was to be.
    """
    takes, view = _snapshot(store, snapshot, subjects) if snapshot else _current(store, subjects)
    wanted = {name: rows for name, spec in view.specs.items() if (rows := _rows_of(view, spec, takes))}
    if not wanted:
        raise BadInput(f"{store.where} has no features of the chosen takes; run `pmm precompute` first")
    total = sum(
        view.length(name, row) * _row_bytes(view.specs[name]) for name, rows in wanted.items() for row in rows
    )
    passed = _counting(on_event, total)
    with _new_file(out) as file:
        _write_about(file, takes)
        for name, rows in sorted(wanted.items()):
            _write_feature(file, view, view.specs[name], rows, passed)
    return Contents(len(takes), sum(map(len, wanted.values())), total)


def _snapshot(store: Store, name: str, subjects: Sequence[str]) -> tuple[list[Take], View]:
    view = View(store, load(store, name))
    view.require(view.specs)
    return _chosen(store, view.listed_takes(), subjects), view


def _current(store: Store, subjects: Sequence[str]) -> tuple[list[Take], View]:
    """What is there now, held still: rows are checked against the sums they have at this moment."""
    takes = _chosen(store, store.listed_takes(), subjects)
    rows = [(name, row) for name, spec in store.specs.items() for row in _rows_of(store, spec, takes)]
    return takes, View(store, capture(store, "", rows))


def _chosen(store: Store, listed: Sequence[Take], subjects: Sequence[str]) -> list[Take]:
    takes = [take for take in listed if not store.hides(take)]
    known = {take.subject for take in takes}
    if unknown := sorted(set(subjects) - known):
        raise BadInput(
            f"{store.where} has no takes of {', '.join(unknown)}; its subjects are {', '.join(sorted(known))}"
        )
    return [take for take in takes if take.subject in subjects or not subjects]


def _rows_of(store: Readable, spec: FeatureSpec, takes: Sequence[Take]) -> list[str]:
    """Row ids, ascending, that are there of these takes."""
    ids = {take.target if spec.modality == "target" else take.clip.id for take in takes}
    return sorted(row for row in ids if row and store.has(spec.id, row))


def _row_bytes(spec: FeatureSpec) -> int:
    return prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _counting(on_event: OnEvent, total: int) -> Callable[[int], None]:
    done = 0

    def passed(size: int) -> None:
        nonlocal done
        done += size
        on_event(Packed(done, total))

    return passed


# -- writing


@contextmanager
def _new_file(out: Path) -> Iterator[h5py.File]:
    """A file under another name beside ``out``, which takes its place when whole. Raises AlreadyThere."""
    import h5py

    if os.path.lexists(out):
        raise AlreadyThere(f"{out} already exists and nothing is overwritten; name another file")
    if not out.parent.is_dir():
        raise NotFound(f"{out.parent} is no folder to write {out.name} in; make it first")
    partial = out.with_name(f".{out.name}.{uuid4().hex[:8]}.partial")
    try:
        with h5py.File(partial, "x", libver=("v108", "v108")) as file:  # its metadata has checksums
            yield file
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        _place(partial, out)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def _place(partial: Path, out: Path) -> None:
    try:
        os.link(partial, out)  # unlike a rename, never over another file
    except FileExistsError:
        raise AlreadyThere(
            f"{out} appeared meanwhile and nothing is overwritten; name another file"
        ) from None
    except OSError:  # a disk without hard links: a USB stick, say
        if os.path.lexists(out):
            raise AlreadyThere(f"{out} appeared meanwhile and nothing is overwritten") from None
        partial.rename(out)


def _write_about(file: h5py.File, takes: Sequence[Take]) -> None:
    file.attrs["format"] = np.bytes_(MAGIC)  # of fixed length, unlike those for people
    file.attrs.update(version=VERSION, about=ABOUT, created=now(), pmm=pmm.__version__)
    file["takes"] = _text([json_line(take.to_json()) for take in takes])
    file["takes"].attrs["about"] = "a JSON object each; `clip` and `target` name rows of the features"


def _text(lines: Sequence[bytes]) -> np.ndarray:
    """Lines of UTF-8, all of the same length in the file."""
    import h5py

    bare = [line.rstrip(b"\n") for line in lines]
    return np.array(bare, dtype=h5py.string_dtype("utf-8", max(map(len, bare))))


def _write_feature(
    file: h5py.File, view: View, spec: FeatureSpec, rows: Sequence[str], passed: Callable[[int], None]
) -> None:
    group = file.create_group(f"features/{spec.modality}-{spec.id}")
    group.attrs.update(modality=spec.modality, algorithm=spec.algorithm, axes=list(spec.dimension_names))
    group.attrs["about"] = "clip i has values[offsets[i]:offsets[i + 1]]; sums[i] is their sha256"
    if spec.fps:
        group.attrs["fps"] = spec.fps
    offsets = np.cumsum([0, *(view.length(spec.id, row) for row in rows)], dtype="<i8")
    values = group.create_dataset("values", (int(offsets[-1]), *spec.shape), _little(spec))
    sums = []
    for row, first, last in zip(rows, offsets[:-1], offsets[1:]):
        array = view.read(spec.id, row)
        values[first:last] = array
        sums.append(_sum(array))
        passed(array.nbytes)
    group["offsets"] = offsets
    group["clips"] = np.array(rows, "S64")
    group["sums"] = np.frombuffer(b"".join(sums), np.uint8).reshape(-1, ID_BYTES)
    group["spec"] = _text([spec.to_bytes()])
    made = {json_line(one.made_with): None for one in view.fragments() if one.spec_id == spec.id}
    group["made_with"] = _text(list(made))


def _little(spec: FeatureSpec) -> np.dtype[Any]:
    return np.dtype(spec.dtype).newbyteorder("<")


def _sum(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()


# -- reading


def unpack(path: Path, where: Path | str, on_event: OnEvent = lambda event: None) -> Contents:
    """Puts what ``pack`` wrote to ``path`` into the store at ``where``, under the same ids.

    All of the file is read and checked before anything is taken from it, or the store made if it is not
    there. What the store has stays as it is; what it has removed does not come back. Raises NotFound,
    NewerFormat, or BadInput, with nothing taken, for a file that is not wholly as ``pack`` writes it.
    """
    import h5py

    if not path.is_file():
        raise NotFound(f"{path} is no file; `pmm store pack STORE {path}` writes one")
    try:
        with h5py.File(path, "r") as file:
            _check_format(file, path)
            takes, features = _takes(file), _features(file)
            total = sum(one.values.nbytes for one in features)
            passed = _counting(on_event, 2 * total)
            for one in features:
                one.check({row for take in takes for row in (take.clip.id, take.target)}, passed)
            return _take_over(Store.open_or_create(where), takes, features, passed)
    except (NewerFormat, MediumError, StoreCorrupt):  # the store's own, but for the first
        raise
    except (*MALFORMED, OSError, RuntimeError) as error:  # what h5py raises of a file that is not whole
        reason = " ".join(str(error).split())
        raise BadInput(f"{path} is not what `pmm store pack` writes: {reason}") from None


@dataclass(frozen=True)
class _Feature:
    """One group of a file, its small parts read. ``clips`` are row ids, ``values`` still in the file."""

    spec: FeatureSpec
    made_with: dict[str, Any]
    clips: list[str]
    offsets: np.ndarray
    sums: np.ndarray
    values: h5py.Dataset

    def bytes(self, index: int) -> int:
        return int(self.offsets[index + 1] - self.offsets[index]) * _row_bytes(self.spec)

    def rows(self, index: int) -> np.ndarray:
        return np.asarray(self.values[self.offsets[index] : self.offsets[index + 1]])

    def check(self, named: Collection[str | None], passed: Callable[[int], None]) -> None:
        """Reads every row. Raises ValueError."""
        for index, clip in enumerate(self.clips):
            if clip not in named:
                raise ValueError(f"clip {clip} belongs to none of its takes")
            array = self.rows(index)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"clip {clip} has NaN or infinity in its {self.spec.modality}")
            if _sum(array) != self.sums[index].tobytes():
                raise ValueError(f"the {self.spec.modality} of clip {clip} was changed: its sha256 differs")
            passed(array.nbytes)


def _check_format(file: h5py.File, path: Path) -> None:
    found, version = _attribute(file, "format", "S"), _attribute(file, "version", "iu")
    if found != MAGIC.encode() or version < 1:
        raise ValueError(f"its format is {found!r:.80}, version {version}; {MAGIC!r} was expected")
    if version > VERSION:
        raise NewerFormat(
            f"{path} has pack version {version}, this pmm reads up to {VERSION}; install a newer"
        )


def _attribute(file: h5py.File, name: str, kinds: str) -> Any:
    """A plain scalar; its type is looked at first, as damaged text of variable length can hang HDF5."""
    if name not in file.attrs:
        raise ValueError(f"it has no attribute {name!r}")
    stored = file.attrs.get_id(name)
    if stored.dtype.kind not in kinds or stored.shape != () or stored.dtype.itemsize > 64:
        raise ValueError(f"its attribute {name!r} is {stored.dtype} of shape {stored.shape}")
    return file.attrs[name]


def _member(group: h5py.Group, name: str) -> Any:
    """What stands in this very file under ``name``."""
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is missing, or a link to elsewhere")
    return group[name]


def _group(group: h5py.Group, name: str) -> h5py.Group:
    import h5py

    found = _member(group, name)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{name} is no group")
    return found


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """A dataset whose bytes all lie, as they are, in this file: nothing is unpacked, resolved or made up."""
    import h5py

    found = _member(group, name)
    if not isinstance(found, h5py.Dataset) or found.shape is None or found.dtype.hasobject:
        raise ValueError(f"{name} is no plain dataset")
    layout = found.id.get_create_plist()
    if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count():
        raise ValueError(f"{name} does not lie in this file in one piece, uncompressed")
    size, start = prod(found.shape) * found.dtype.itemsize, found.id.get_offset()
    if start is None or start + size > os.path.getsize(found.file.filename):
        raise ValueError(f"{name} is said to have {size} bytes, which the file has not")
    return found


def _array(group: h5py.Group, name: str, dtype: str, shape: tuple[int | None, ...]) -> h5py.Dataset:
    """A dataset of exactly this type and shape, where None stands for any size from 1."""
    found = _dataset(group, name)
    same = len(found.shape) == len(shape) and all(
        size == wanted or (wanted is None and size > 0) for size, wanted in zip(found.shape, shape)
    )
    if found.dtype != np.dtype(dtype).newbyteorder("<") or not same:
        raise ValueError(f"{name} is {found.dtype} of shape {found.shape}")
    return found


def _lines(group: h5py.Group, name: str) -> list[bytes]:
    found = _dataset(group, name)
    if found.dtype.kind != "S" or found.ndim != 1 or found.nbytes > _TEXT_BYTES:
        raise ValueError(f"{name} is {found.dtype} of shape {found.shape}, lines of text were expected")
    return list(found[:])


def _takes(file: h5py.File) -> list[Take]:
    takes = [Take.from_json(strict_json(line, "takes"), "takes") for line in _lines(file, "takes")]
    for take in takes:
        for row in (take.clip.id, take.target):
            if row is not None and not HEX64.fullmatch(row):
                raise ValueError(f"a take of {row!r:.80}, which is no id")
    return takes


def _features(file: h5py.File) -> list[_Feature]:
    group = _group(file, "features")
    return [_feature(_group(group, name), name) for name in group]


def _feature(group: h5py.Group, name: str) -> _Feature:
    (line,) = _lines(group, "spec")
    spec = FeatureSpec.from_bytes(line, name)
    if name != f"{spec.modality}-{spec.id}":
        raise ValueError(f"{name} is not the id that its spec gives")
    made = [dict(strict_json(one, "made_with")) for one in _lines(group, "made_with")]
    clips = [row.decode() for row in _array(group, "clips", "S64", (None,))[:_MOST_CLIPS]]
    offsets = _array(group, "offsets", "i8", (len(clips) + 1,))[:]
    if offsets[0] != 0 or (np.diff(offsets) < 1).any():
        raise ValueError("offsets do not rise from 0")
    if not all(map(HEX64.fullmatch, clips)) or not all(one < other for one, other in pairwise(clips)):
        raise ValueError("clips are not ids, each once and ascending")
    values = _array(group, "values", spec.dtype, (int(offsets[-1]), *spec.shape))
    if (longest := int(np.diff(offsets).max()) * _row_bytes(spec)) > _CLIP_BYTES:
        raise ValueError(f"a clip of {longest} bytes; at most {_CLIP_BYTES} are read")
    sums = _array(group, "sums", "u1", (len(clips), ID_BYTES))[:]
    return _Feature(spec, made[0] if len(made) == 1 else {"any_of": made}, clips, offsets, sums, values)


def _take_over(
    store: Store, takes: Sequence[Take], features: Sequence[_Feature], passed: Callable[[int], None]
) -> Contents:
    """Publishes what ``store`` lacks and has not removed, features first."""
    rows = size = 0
    for one in features:
        before = size
        for batch in _batches(store, one):
            store.publish(one.spec, [(one.clips[index], one.rows(index)) for index in batch], one.made_with)
            rows += len(batch)
            size += (done := sum(map(one.bytes, batch)))
            passed(done)
        passed(one.values.nbytes - (size - before))
    return Contents(_list_takes(store, takes), rows, size)


def _batches(store: Store, one: _Feature) -> Iterator[list[int]]:
    """Places of the clips that ``store`` is to get, as many together as make a fragment."""
    if any(one.spec.id in removal.specs for removal in store.removals.values()):
        return
    wanted = set(store.missing(one.spec.id, one.clips)) - store.removed
    batch, size = list[int](), 0
    for index, clip in enumerate(one.clips):
        if clip in wanted:
            if batch and size + one.bytes(index) > _FRAGMENT_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(index)
            size += one.bytes(index)
    if batch:
        yield batch


def _list_takes(store: Store, takes: Sequence[Take]) -> int:
    """Lists the takes of each dataset, unless all of them are listed; returns how many were not."""
    here = {(take.dataset, take.id) for take in store.listed_takes()}
    stay = [take for take in takes if not store.hides(take)]
    origin = {
        "host": "",
        "root": digest("pack", {"takes": [take.id for take in takes]})[:16],
        "layout": "pack",
    }
    new = [take for take in stay if (take.dataset, take.id) not in here]
    for dataset in dict.fromkeys(take.dataset for take in new):
        store.publish_takes(dataset, [take for take in stay if take.dataset == dataset], origin)
    return len(new)
