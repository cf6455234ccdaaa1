"""Snapshots: exact content under a name, for ever.

A snapshot is a list: a header, the takes with their attributes under every label they are listed by,
and for each fragment that served them the row ids with the sha256 of their rows. It names content,
not places: after a merge, a pull or `compact` the same bytes may lie in other fragments, and a snapshot
reads them there. It never reads anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pmm import AlreadyThere, BadInput, NotFound, StoreCorrupt
from pmm.store.cache import Fetched
from pmm.store.catalog import SHEET_BYTES, Store, now, sheet, unsheet, writer
from pmm.store.clip import Take
from pmm.store.digest import digest
from pmm.store.feature import FeatureSpec
from pmm.store.fragment import HEX64, MALFORMED, NAME, Fragment, hexes
from pmm.store.medium import MediumError

FOLDER, ENDING = "snapshots", ".jsonl"
PINNED = re.compile(r"fit-[0-9a-f]{16}")
"""Names that `pin` gives, decided by the content."""
_NAMED_IN_AN_ERROR = 5


@dataclass(frozen=True)
class Pin:
    """One row as a snapshot names it: the fragment that served it then, and the sha256 of its rows."""

    fragment: str
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """What was in a store, or the part of it that some specs make up.

    takes     as ``Store.listed_takes`` gives them
    rows      spec id to row id to what it was
    removals  uuids of the removals that were in force
    purged    whether consent was withdrawn since for some of it, which is no longer named
    """

    name: str
    created: str
    takes: tuple[Take, ...]
    rows: Mapping[str, Mapping[str, Pin]]
    removals: tuple[str, ...]
    purged: bool = False

    @cached_property
    def id(self) -> str:
        """Decided by the content alone; the name is a label."""
        rows = {
            spec: sorted([row, pin.sha256] for row, pin in pins.items()) for spec, pins in self.rows.items()
        }
        fields = {"removals": sorted(self.removals), "rows": rows, "takes": [t.to_json() for t in self.takes]}
        return digest("snapshot", fields)

    def to_bytes(self) -> bytes:
        header = {
            "name": self.name,
            "created": self.created,
            "removals": list(self.removals),
            "purged": self.purged,
            "writer": writer(),
        }
        return sheet(header, [*(take.to_json() for take in self.takes), *self._row_lines()])

    def _row_lines(self) -> Iterator[dict[str, Any]]:
        for spec, pins in self.rows.items():
            by_fragment: dict[str, list[str]] = {}
            for row, pin in pins.items():
                by_fragment.setdefault(pin.fragment, []).append(row)
            for name, rows in by_fragment.items():
                sums = [pins[row].sha256 for row in rows]
                yield {"spec": spec, "fragment": name, "rows": rows, "sums": sums}

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Snapshot:
        """Raises StoreCorrupt or BadInput."""
        header, lines = unsheet(data, where)
        try:
            takes: list[Take] = []
            rows: dict[str, dict[str, Pin]] = {}
            for line in lines:
                if "take" in line:
                    takes.append(Take.from_json(line, where))
                else:
                    pins = {
                        _id(row): Pin(line["fragment"], _id(total))
                        for row, total in zip(line["rows"], line["sums"])
                    }
                    rows.setdefault(line["spec"], {}).update(pins)
            people = (str(header["name"]), str(header["created"]))
            return cls(*people, tuple(takes), rows, tuple(header["removals"]), header.get("purged") is True)
        except MALFORMED as error:
            raise StoreCorrupt(f"{where} is no snapshot ({error})") from None


def _id(text: str) -> str:
    if not HEX64.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is not 64 hexadecimal digits")
    return text


def names(store: Store) -> list[str]:
    """The snapshots in ``store``."""
    keys = [entry.key for entry in store.medium.list(FOLDER)]
    return sorted(key[len(FOLDER) + 1 : -len(ENDING)] for key in keys if key.endswith(ENDING))


def load(store: Store, name: str) -> Snapshot:
    """Raises NotFound, or StoreCorrupt if it is not as it was written."""
    key = _key(name)
    try:
        data = store.medium.read(key, 0, SHEET_BYTES)
    except NotFound:
        known = ", ".join(names(store)) or "none"
        raise NotFound(f"no snapshot {name!r} in {store.where}; it has {known}") from None
    return Snapshot.from_bytes(data, f"{store.where}/{key}")


def capture(store: Store, name: str, rows: Iterable[tuple[str, str]] | None = None) -> Snapshot:
    """What ``store`` serves now: all takes, and of the features these rows (spec id, row id), or all.

    Writes nothing. Raises StoreCorrupt, naming the fragment, where it cannot say what its rows are.
    """
    known: dict[str, list[str]] = {}
    pins: dict[str, dict[str, Pin]] = {}
    for spec, row in _rows(store) if rows is None else rows:
        one, index = store.find(spec, row)
        if one.location not in known:
            known[one.location] = hexes(store.reader(one).sums)
        pins.setdefault(spec, {})[row] = Pin(one.id, known[one.location][index])
    return Snapshot(name, now(), tuple(store.listed_takes()), pins, tuple(sorted(store.removals)))


def _rows(store: Store) -> Iterator[tuple[str, str]]:
    return ((spec, row) for spec in store.specs for row in store.rows(spec))


def take(store: Store, name: str) -> Snapshot:
    """Names, durably, what ``store`` serves now. Doing so again is no error if it serves the same.

    Raises BadInput for a name that cannot be, AlreadyThere for one that names something else.
    """
    if not NAME.fullmatch(name):
        raise BadInput(f"{name!r} is no name of a snapshot: up to 64 of a-z 0-9 . _ - were expected")
    store.refresh()
    return put(store, capture(store, name))


def pin(store: Store, rows: Iterable[tuple[str, str]]) -> tuple[Snapshot, str]:
    """What a run is about to read, named by its content and kept where the store may be written.

    Returns the snapshot and, where it could not be kept, why.
    """
    snapshot = capture(store, "", rows)
    snapshot = replace(snapshot, name=f"fit-{snapshot.id[:16]}")
    try:
        return put(store, snapshot), ""
    except MediumError as error:
        return snapshot, str(error)


def put(store: Store, snapshot: Snapshot) -> Snapshot:
    """Keeps ``snapshot`` in ``store`` for ever. Raises AlreadyThere if another one of its name is there."""
    key, data = _key(snapshot.name), snapshot.to_bytes()
    if store.medium.create(key, data) == data:
        return snapshot
    there = load(store, snapshot.name)
    if there.id != snapshot.id:
        raise AlreadyThere(
            f"a snapshot {snapshot.name!r} of other content is in {store.where}, made {there.created[:16]}; "
            "a snapshot never changes, take another name"
        )
    return there


def _key(name: str) -> str:
    return f"{FOLDER}/{name}{ENDING}"


# -- reading one


class View:
    """A store as a snapshot saw it: its rows, byte for byte, and nothing else. Reads like a Store.

    Rows that are no longer there as they were count as absent; ``require`` refuses them, naming the clips.
    """

    def __init__(self, store: Store, snapshot: Snapshot):
        self.snapshot = snapshot
        self.where = store.where
        self._store = store
        self._found: dict[str, dict[str, tuple[Fragment, int]]] = {}
        self._whole: set[tuple[str, str]] = set()

    @property
    def specs(self) -> Mapping[str, FeatureSpec]:
        return {name: spec for name, spec in self._store.specs.items() if name in self.snapshot.rows}

    def fragments(self) -> list[Fragment]:
        """Those that serve at least one row."""
        found = {one.location: one for spec in self.specs for one, _ in self._at(spec).values()}
        return sorted(found.values(), key=lambda one: (one.spec_id, one.id, one.location))

    def takes(self) -> list[Take]:
        """Each take once, as the first listing has it."""
        return list({take.id: take for take in reversed(self.snapshot.takes)}.values())[::-1]

    def listed_takes(self) -> list[Take]:
        return list(self.snapshot.takes)

    def has(self, spec_id: str, row_id: str) -> bool:
        return row_id in self._at(spec_id)

    def fetch(
        self, rows: Iterable[tuple[str, str]], on_event: Callable[[Fetched], None] | None = None
    ) -> None:
        """As ``Store.fetch``: nothing more is read from a bucket for these rows."""
        if self._store.cache:
            wanted = {one.location: one for one, _ in (self._find(*row) for row in rows)}
            self._store.cache.fetch(self._store.medium, list(wanted.values()), on_event)

    def length(self, spec_id: str, row_id: str) -> int:
        one, index = self._find(spec_id, row_id)
        return int(one.lengths[index])

    def read(self, spec_id: str, row_id: str) -> np.ndarray:
        """(n, *shape), read-only, checked against the sum when they are read first.

        Raises NotFound, or StoreCorrupt with the clip.
        """
        one, index = self._find(spec_id, row_id)
        try:
            rows = self._store.reader(one).rows(index)
            whole = (spec_id, row_id) in self._whole or self._store.reader(one).sum_matches(index)
        except (StoreCorrupt, NotFound) as error:
            raise StoreCorrupt(f"clip {row_id} cannot be read: {error}") from None
        if not whole:
            raise StoreCorrupt(
                f"clip {row_id} in {self.where}/{one.folder} is not as it was written; "
                f"run `pmm store verify {self.where} --repair`"
            )
        self._whole.add((spec_id, row_id))
        return rows

    def require(self, spec_ids: Iterable[str]) -> None:
        """Raises NotFound, naming clips, unless every row of these specs is there as the snapshot has it."""
        if self.snapshot.purged:
            raise NotFound(
                f"snapshot {self.snapshot.name} in {self.where} is no longer whole: some of its takes were "
                "withdrawn and purged; make a new one"
            )
        lost = [
            row for spec in spec_ids for row in self.snapshot.rows.get(spec, {}) if not self.has(spec, row)
        ]
        if lost:
            sources = {row: t.source for t in self.snapshot.takes for row in (t.clip.id, t.target) if row}
            told = sorted({sources.get(row) or row[:12] for row in lost})
            named = ", ".join(told[:_NAMED_IN_AN_ERROR]) + (", ..." if told[_NAMED_IN_AN_ERROR:] else "")
            raise NotFound(
                f"{len(told)} clips of snapshot {self.snapshot.name} are not in {self.where} as they were "
                f"({named}): removed, lost or computed anew; `pmm store pull` them from a store that has them"
            )

    def _find(self, spec_id: str, row_id: str) -> tuple[Fragment, int]:
        if row_id not in self._at(spec_id):
            raise NotFound(f"clip {row_id} is not in {self.where} as snapshot {self.snapshot.name} has it")
        return self._at(spec_id)[row_id]

    def _at(self, spec_id: str) -> dict[str, tuple[Fragment, int]]:
        """Where the rows of a spec lie now."""
        if spec_id not in self._found:
            pins = self.snapshot.rows.get(spec_id, {})
            found = self._found[spec_id] = {}
            for one in (one for one in self._store.fragments() if one.spec_id == spec_id):
                for row, index in _same(self._store, one, pins):
                    if row not in self._store.removed:
                        found.setdefault(row, (one, index))
        return self._found[spec_id]


def _same(store: Store, one: Fragment, pins: Mapping[str, Pin]) -> Iterator[tuple[str, int]]:
    """Rows of a fragment that are those of ``pins``, and their places."""
    if pins.keys().isdisjoint(one.row_ids):
        return
    try:
        sums = hexes(store.reader(one).sums)
    except (StoreCorrupt, NotFound):
        return
    for index, (row, total) in enumerate(zip(one.row_ids, sums)):
        if row in pins and pins[row].sha256 == total:
            yield row, index


Readable = Store | View
"""What training reads from."""


# -- consent withdrawn


def purge(store: Store, ids: Collection[str], specs: Collection[str]) -> int:
    """Rewrites the snapshots that name any of these takes, rows or specs without them; returns how many.

    They say from then on that something was purged, and cannot be read as a whole any more.
    """
    changed = 0
    for name in names(store):
        try:
            old = load(store, name)
        except (StoreCorrupt, BadInput):  # who knows what it names
            store.medium.delete(_key(name))
            continue
        new = without(old, ids, specs)
        if new is not old:
            store.medium.delete(_key(name))
            store.medium.create(_key(name), new.to_bytes())
            changed += 1
    return changed


def without(old: Snapshot, ids: Collection[str], specs: Collection[str]) -> Snapshot:
    """``old`` with none of these takes, rows and specs, marked as purged; itself if it names none."""
    takes = tuple(one for one in old.takes if not {one.id, one.clip.id, one.target} & set(ids))
    rows = {
        spec: {row: one for row, one in pins.items() if row not in ids}
        for spec, pins in old.rows.items()
        if spec not in specs
    }
    same = (takes, rows) == (old.takes, old.rows)
    return old if same else replace(old, takes=takes, rows=rows, purged=True)
