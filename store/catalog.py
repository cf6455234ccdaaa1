"""Store: what is known to be in a folder of fragments, and the only way to add to it.

A store is a set of files created once each. Opening lists them and reads each small one; what a
fragment holds is read when it is asked for. Everything derived (which fragment serves a row, which
takes are listed) is computed from these tables, so ``refresh`` only has to read what is new.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar
from uuid import uuid4

import numpy as np

import pmm
from pmm import AlreadyThere, BadInput, NotFound, PmmError, StoreCorrupt
from pmm.store import fragment as fragments
from pmm.store import index
from pmm.store.cache import Cache, Fetched
from pmm.store.clip import Take
from pmm.store.digest import json_line, sealed, strict_json, unsealed
from pmm.store.doctor import insist
from pmm.store.feature import FeatureSpec
from pmm.store.fragment import CHUNK_BYTES, FORMAT, MALFORMED, Fragment, Reader, refuse_newer
from pmm.store.medium import Medium, MediumError, make_root
from pmm.store.remote import ObjectMedium, is_address, medium_at

MARK = "pmm.json"
SHEET_BYTES = 1 << 30
_SMALL_BYTES = 16 << 20
_ATTEMPTS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """A clip that could not be processed.

    key      clip id; ``file:<sha256>`` of a file that did not decode; ``path:<path>`` of one that
             could not even be read
    source   the path it came from
    stage    where it failed: find, probe, decode, features, target, ...
    reason   one line
    attempt  1 + earlier attempts of this key; filled in by ``Store.publish_failures`` where 0
    when     ISO 8601, for people; filled in where empty
    """

    key: str
    source: str
    stage: str
    reason: str
    attempt: int = 0
    when: str = ""


@dataclass(frozen=True)
class Listing:
    """One run's list of the takes in a dataset. ``body`` is the sha256 of its lines."""

    name: str
    dataset: str
    origin: Mapping[str, str]
    created: str
    replaces: tuple[str, ...]
    body: str
    read: Callable[[], tuple[Take, ...]] = field(repr=False, compare=False)

    @cached_property
    def takes(self) -> tuple[Take, ...]:
        """Read when first asked for: opening a store of a million takes needs none of them.

        Raises StoreCorrupt if the lines are not those that were written.
        """
        return self.read()

    def order(self) -> tuple[str, str]:
        return (self.created, self.name)

    def to_bytes(self) -> bytes:
        """The file, but for who wrote it."""
        header = {"created": self.created, "dataset": self.dataset, "origin": dict(self.origin)}
        return sheet({**header, "replaces": list(self.replaces)}, [take.to_json() for take in self.takes])


@dataclass(frozen=True)
class Removal:
    """What was taken out on purpose.

    hidden   row and take ids
    specs    feature specs, with all their rows
    purge    whether the bytes are to go, too
    cancels  earlier removals (by uuid) that it takes back
    """

    hidden: frozenset[str]
    specs: frozenset[str]
    purge: bool
    cancels: tuple[str, ...]


class Store:
    """A store that is open. Use ``create``, ``open`` or ``open_or_create``.

    ``problems`` maps each object that could not be read to the reason, one line: its contents are
    as if absent, so that one damaged record neither hides the rest nor stops `pmm store verify`.

    Several threads may use one: a lock guards what is known, and is not held while a fragment is written.
    """

    _live: list[Fragment]
    _hidden: frozenset[str]
    _in_force: dict[str, Removal]
    _live_listings: list[Listing]
    _indexes: dict[str, _Index]
    _takes: list[Take] | None

    def __init__(self, where: Path | str, medium: Medium, indexed: bool = True, cache: Cache | None = None):
        """``indexed=False`` believes no index object: for whoever checks or deletes. With a ``cache``,
        rows are read from there, for whoever trains."""
        self.where = str(where)  # the folder or address, as messages name it
        self.medium = medium
        self.cache = cache
        self.about = _read_mark(self.where, medium)
        self._lock = threading.RLock()  # over the tables and all that is derived from them
        self._specs = _Table("specs", ".json", _SMALL_BYTES, _load_spec)
        self._records = _Records(indexed)
        self._listings = _Listings("datasets", ".jsonl", SHEET_BYTES, _load_listing)
        self._failures = _Table("failures", ".jsonl", SHEET_BYTES, _load_failures)
        self._removals = _Table("removed", ".json", _SMALL_BYTES, _load_removal)
        self._damaged = _Table("damaged", ".json", 0, lambda key, data, where: None)
        self._readers: dict[str, Reader] = {}
        self._derive()
        self.refresh()

    @property
    def path(self) -> Path:
        """The folder of a store on a disk. Raises BadInput for one in a bucket."""
        if is_address(self.where):
            raise BadInput(f"{self.where} is no folder; name a store on a disk")
        return Path(self.where)

    # -- opening

    @classmethod
    def create(cls, where: Path | str) -> Store:
        """A new store in ``where``: a folder or s3://bucket/prefix that is missing, empty or a store already.

        Raises AlreadyThere if anything else stands there, MediumError if the place cannot keep what a store
        promises (``doctor``).
        """
        if _is_store(where):
            return cls.open(where)
        if _is_file(where):
            raise AlreadyThere(f"{where} is a file; a store is a folder, name another place")
        if found := _foreign_names(where):
            raise AlreadyThere(
                f"{where} is a folder with other things in it ({found}); name an empty or a new one"
            )
        if not is_address(where):
            make_root(Path(where))
        insist(where)
        medium = medium_at(where)
        mark = {"format": FORMAT, "store": uuid4().hex, "created": now(), "pmm": pmm.__version__}
        medium.create(MARK, sealed(mark))
        return cls(where, medium, cache=_cache(where))

    @classmethod
    def open(cls, where: Path | str, cache: Cache | None = None, safe: bool | None = None) -> Store:
        """Raises NotFound, BadInput if it is no store (saying what was found), or NewerFormat.

        What is read from a bucket goes through ``cache``, the user's own unless another is given. ``safe``
        reads rather than maps what is on a disk; None does so on network disks.
        """
        if not is_there(where):
            raise NotFound(f"no store at {where}; `pmm precompute DATASET --store {where}` makes one")
        if _is_file(where):
            raise BadInput(f"{where} is a file, a store is a folder with a {MARK}; name the folder")
        if not _is_store(where):
            found = _foreign_names(where) or "nothing"
            raise BadInput(f"{where} is a folder without a {MARK} (it holds {found}), so it is no store")
        return cls(where, medium_at(where, safe), cache=_cache(where, cache))

    @classmethod
    def open_or_create(cls, where: Path | str) -> Store:
        """Raises as ``create`` and ``open`` do; a file or a foreign folder is BadInput."""
        fresh = not is_there(where) or not (_is_file(where) or _foreign_names(where))
        return cls.create(where) if fresh else cls.open(where)

    def refresh(self) -> None:
        """Learns what appeared (and what vanished) since; reads new names only."""
        with self._lock:
            before = set(self._records.items)
            tables = (
                self._specs,
                self._records,
                self._listings,
                self._failures,
                self._removals,
                self._damaged,
            )
            changed = [table.refresh(self.medium, self.where) for table in tables]
            for key in before - set(self._records.items):
                self._readers.pop(_stem(key), None)
            if any(changed):
                self._derive()

    @property
    def problems(self) -> Mapping[str, str]:
        tables = (self._specs, self._records, self._listings, self._failures, self._removals)
        found = {key: reason for table in tables for key, reason in table.problems.items()}
        told = {key: reason for key, reason in found.items() if _stem(key) not in self.damaged}
        return told | self._records.bad_indexes

    # -- features

    @property
    def specs(self) -> Mapping[str, FeatureSpec]:
        """Every feature spec in the store, by id."""
        return MappingProxyType({_stem(key): spec for key, spec in self._specs.items.items()})

    def fragments(self) -> list[Fragment]:
        """Live fragments, by spec and fragment id."""
        return sorted(self._live, key=lambda one: (one.spec_id, one.id, one.location))

    @property
    def records(self) -> Mapping[str, Fragment | None]:
        """What every readable record says, by its key: a fragment, live or not, or None (abandoned)."""
        return MappingProxyType(self._records.items)

    @property
    def damaged(self) -> frozenset[str]:
        """Names (of fragments' locations, of lists) that were marked as damaged in this store."""
        return frozenset(map(_stem, self._damaged.items))

    def mark_damaged(self, name: str, reason: str) -> None:
        """What has this name is broken here: it is neither served nor listed from now on."""
        told = {"format": FORMAT, "reason": reason, "created": now(), "writer": writer()}
        self.medium.create(f"damaged/{name}.json", sealed(told))
        self.refresh()

    def rows(self, spec_id: str) -> list[str]:
        """Row ids that are served, ascending."""
        return self._index(spec_id).row_ids()

    def has(self, spec_id: str, row_id: str) -> bool:
        return self._index(spec_id).find(row_id) is not None

    def missing(self, spec_id: str, row_ids: Iterable[str]) -> list[str]:
        """Those of ``row_ids`` that are not served, each once, in their order."""
        index = self._index(spec_id)
        return [row_id for row_id in dict.fromkeys(row_ids) if index.find(row_id) is None]

    def length(self, spec_id: str, row_id: str) -> int:
        """Rows (frames or steps) of that clip. Raises NotFound."""
        one, index = self._find(spec_id, row_id)
        return int(one.lengths[index])

    def read(self, spec_id: str, row_id: str) -> np.ndarray:
        """(n, *shape) of the spec's dtype, read-only, mapped from the disk.

        Raises NotFound, or StoreCorrupt naming the clip.
        """
        one, index = self._find(spec_id, row_id)
        if not self._proven(one):
            one, index = self._find(spec_id, row_id)
        try:
            return self.reader(one).rows(index)
        except (StoreCorrupt, NotFound) as error:
            self.refresh()  # another fragment may have replaced that one meanwhile
            if self._find(spec_id, row_id)[0].location == one.location:
                raise StoreCorrupt(f"clip {row_id} cannot be read: {error}") from None
        return self.read(spec_id, row_id)

    def find(self, spec_id: str, row_id: str) -> tuple[Fragment, int]:
        """The fragment that serves this row, and its place in there. Raises NotFound."""
        return self._find(spec_id, row_id)

    def reader(self, fragment: Fragment) -> Reader:
        """The fragment opened, checked at first touch. Raises StoreCorrupt."""
        if not self._proven(fragment):
            raise StoreCorrupt(f"{self.where}/{fragment.record} is not what an index object said; ask again")
        if fragment.location not in self._readers:
            opened = self.cache.reader if self.cache else Reader
            self._readers[fragment.location] = opened(self.medium, fragment)
        return self._readers[fragment.location]

    def fetch(
        self, rows: Iterable[tuple[str, str]], on_event: Callable[[Fetched], None] | None = None
    ) -> None:
        """Brings the fragments that serve ``rows``, (spec id, row id), to the local cache, if there is one.

        Raises BadInput, before anything is fetched, where the cache is too small for all of them.
        """
        if self.cache is None:
            return
        found = {one.location: one for one, _ in (self._find(*row) for row in rows)}
        wanted = [one for one in found.values() if self._proven(one)]  # others are found anew when read
        self.cache.fetch(self.medium, wanted, on_event)

    def _proven(self, one: Fragment) -> bool:
        """Whether the record itself says what we know of the fragment; if not, we know better now."""
        if self._records.prove(one, self.medium, self.where):
            return True
        self.refresh()
        self._derive()
        return False

    def publish(
        self,
        spec: FeatureSpec,
        rows: Sequence[tuple[str, np.ndarray]],
        made_with: Mapping[str, Any],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Fragment:
        """Writes one fragment of (row id, (n, *shape) array) and makes it known, durably.

        ``made_with`` is provenance as JSON: models, library versions, device. It goes into the
        record and decides no id. Raises BadInput if an array is not what ``spec`` says.
        """
        people = {"created": now(), "writer": writer(), "made_with": _plain_json(made_with, "made_with")}
        return self.announce(spec, lambda: fragments.write(self.medium, spec, rows, people, chunk_bytes))

    def announce(self, spec: FeatureSpec, write: Callable[[], Fragment]) -> Fragment:
        """Makes known, durably, the fragment that ``write`` puts at a new location of this store."""
        for attempt in range(_ATTEMPTS):
            try:
                one = write()
            except NotFound:  # `gc` took us for dead, and the folders went while we wrote into them
                if attempt + 1 == _ATTEMPTS:
                    raise
                continue
            self.publish_spec(spec)
            data = one.to_bytes()
            found = self.medium.create(one.record, data)
            if found == data:
                with self._lock:
                    self._records.items[one.record] = one
                    self._derive()
                return one
            where = f"{self.where}/{one.record}"
            if Fragment.from_bytes(found, spec.id, one.location, where) is not None:
                raise StoreCorrupt(f"{where} was written by somebody else under our own random name")
            # `gc` took us for dead and left "abandoned" there: once more, under another name.
        raise StoreCorrupt(f"{_ATTEMPTS} fragments in a row were abandoned by `gc` while being written")

    def publish_spec(self, spec: FeatureSpec) -> None:
        """Writes the spec down, unless it stands there: ``publish`` does, and whoever finds one missing."""
        key = f"specs/{spec.id}.json"
        if key in self._specs.items:
            return
        found = self.medium.create(key, spec.to_bytes())
        with self._lock:
            self._specs.items[key] = _load_spec(key, found, f"{self.where}/{key}")
            self._specs.problems.pop(key, None)

    # -- takes

    def publish_takes(self, dataset: str, takes: Sequence[Take], origin: Mapping[str, str]) -> bool:
        """Lists what ``dataset`` holds at ``origin`` (host, root, layout), in place of earlier listings
        of the same. Returns False, and writes nothing, where the current one says exactly this.
        """
        self.refresh()
        lines = [replace(take, dataset=dataset).to_json() for take in takes]
        origin = {key: str(text) for key, text in origin.items()}
        earlier = [one for one in self.listings() if (one.dataset, one.origin) == (dataset, origin)]
        if len(earlier) == 1 and earlier[0].body == _body(lines)[1]:
            return False
        header = {
            "dataset": dataset,
            "origin": origin,
            "replaces": sorted({name for one in earlier for name in (one.name, *one.replaces)}),
        }
        self.publish_sheet("datasets", header, lines)
        return True

    def listings(self) -> list[Listing]:
        """Live listings, the earliest first."""
        return self._live_listings

    def every_listing(self) -> list[Listing]:
        """Those that others replace, too."""
        return list(self._listings.items.values())

    def _read_listings(self) -> list[Listing]:
        """Live listings, their takes read. One that is damaged counts as absent, and is told."""
        for one in self._live_listings:
            try:
                one.takes  # noqa: B018
            except PmmError as error:
                self._listings.refuse(one, error)
                self._derive()
                return self._read_listings()  # what it replaced is live again
        return self._live_listings

    def takes(self) -> list[Take]:
        """Every take of every live listing that was not removed, once, in the order of the listings.

        A take that stands in several listings has the label and attributes of the earliest.
        """
        if self._takes is None:
            found: dict[tuple[str, str | None, str], Take] = {}  # by what decides a take's id
            for listing in self._read_listings():
                for take in listing.takes:
                    found.setdefault((take.clip.id, take.target, take.subject), take)
            self._takes = [take for take in found.values() if not self.hides(take)]
        return list(self._takes)

    def hides(self, take: Take) -> bool:
        """Whether ``take`` was removed: itself, its clip or its target."""
        return bool(self._hidden) and not self._hidden.isdisjoint((take.id, take.clip.id, take.target))

    @property
    def replaced(self) -> frozenset[str]:
        """Names of the listings that others replace, whether they are here or not."""
        return frozenset(name for one in self._listings.items.values() for name in one.replaces)

    def listed_takes(self) -> list[Take]:
        """Every take of ``takes``, under every dataset label it is listed by: who is who needs them all."""
        return [take for listing in self._read_listings() for take in listing.takes if not self.hides(take)]

    # -- removals

    @property
    def removed(self) -> frozenset[str]:
        """Row and take ids that were taken out on purpose and are not to come back by themselves."""
        return self._hidden

    @property
    def removals(self) -> Mapping[str, Removal]:
        """Removals in force, by uuid."""
        return MappingProxyType(self._in_force)

    def publish_removal(
        self,
        rows: Iterable[str] = (),
        takes: Iterable[str] = (),
        specs: Iterable[str] = (),
        purge: bool = False,
        cancels: Iterable[str] = (),
    ) -> str:
        """Takes rows, takes and specs out, durably and for all readers; returns the uuid of the removal."""
        ids = {"rows": rows, "takes": takes, "specs": specs, "cancels": cancels}
        told = {"format": FORMAT, "purge": purge, "created": now(), "writer": writer()}
        name = uuid4().hex
        self.medium.create(f"removed/{name}.json", sealed({**told, **{k: sorted(v) for k, v in ids.items()}}))
        self.refresh()
        return name

    # -- failures

    def publish_failures(self, failures: Sequence[Failure]) -> None:
        """One durable sheet for the failures of a run; nothing is written for none."""
        if not failures:
            return
        with self._lock:
            self._failures.refresh(self.medium, self.where)
        attempts: dict[str, int] = {}
        for one in self.failures():
            attempts[one.key] = max(attempts.get(one.key, 0), one.attempt)
        complete = []
        for one in failures:
            attempts[one.key] = one.attempt or attempts.get(one.key, 0) + 1
            reason = " ".join(one.reason.split())
            complete.append(replace(one, reason=reason, attempt=attempts[one.key], when=one.when or now()))
        self.publish_sheet("failures", {}, [asdict(one) for one in complete])

    def failures(self) -> list[Failure]:
        """Every failure ever recorded, once, by time."""
        with self._lock:
            found = {one for sheet in self._failures.items.values() for one in sheet}
        return sorted(found, key=lambda one: (one.when, one.key, one.attempt))

    def failure_sheets(self) -> Mapping[str, tuple[Failure, ...]]:
        """The failures each run recorded, by the key of its list."""
        return MappingProxyType(self._failures.items)

    def open_failures(self) -> list[Failure]:
        """The last failure of each key and stage that nothing has succeeded after.

        The failure of a clip is closed by a row of it written later (of its face track if that was the
        stage, of any other modality if not); that of a file, by a later listing with a take from it.
        """
        last = {(one.key, one.stage): one for one in self.failures()}
        return [one for one in last.values() if not self._closed(one)]

    def _closed(self, one: Failure) -> bool:
        if one.key in self.removed:
            return True
        if _is_row_id(one.key):
            rows = {one.key, *self._targets_of(one.key)} if one.stage == "target" else {one.key}
            return any(not rows.isdisjoint(later.row_ids) for later in self._written_since(one))
        later = (listing for listing in self._read_listings() if listing.created >= one.when)
        return any(_came_from(one.source, take, listing) for listing in later for take in listing.takes)

    def _written_since(self, one: Failure) -> Iterable[Fragment]:
        """Live fragments from after a failure that could hold what failed."""
        about_target = {name: spec.modality == "target" for name, spec in self.specs.items()}
        for later in self._live:
            if later.created >= one.when and about_target.get(later.spec_id) == (one.stage == "target"):
                yield later

    def _targets_of(self, clip_id: str) -> set[str]:
        return {take.target for take in self.takes() if take.target and take.clip.id == clip_id}

    # -- lists of other stores

    def lists(self, folder: str) -> list[str]:
        """Keys of the files in ``folder`` (specs, datasets, failures, removed) that are whole."""
        self._read_listings()
        return sorted(self._list_table(folder).items)

    def adopt(self, key: str, data: bytes) -> None:
        """Creates a list of another store here, under its own name.

        Raises StoreCorrupt if it is not what its folder holds, or if another one of that name is here.
        """
        where = f"{self.where}/{key}"
        self._list_table(key.partition("/")[0]).load(key, data, where)
        if self.medium.create(key, data) != data:
            raise StoreCorrupt(f"{where} is another file than the one of that name to be put there")

    def _list_table(self, folder: str) -> _Table[Any]:
        tables: dict[str, _Table[Any]] = {
            "specs": self._specs,
            "datasets": self._listings,
            "failures": self._failures,
            "removed": self._removals,
        }
        return tables[folder]

    # -- index objects

    def keep_index(self) -> bool:
        """Writes an index object over the records that none covers, if they are many; returns whether.

        For whoever has published, so that opening stays fast. Deletes those that no record needs any more.
        """
        self.refresh()
        sizes = {one.key: one.size for one in self.medium.list("records")}
        needed = {by for key, by in self._records.covered.items() if key in sizes}
        for name in self._records.indexes - needed:
            index.forget(self.medium, name)
        mine = {key: one for key, one in self._records.uncovered().items() if key in sizes}
        if len(mine) < max(index.WORTH_WRITING, len(self._records.covered) // 8):
            return False
        told = {key: index.Known(sizes[key], one, "") for key, one in mine.items()}
        try:
            name = index.write(self.medium, {"created": now(), "writer": writer()}, told)
        except PmmError:  # a full disk, say: what was published is published all the same
            return False
        self._records.covered |= dict.fromkeys(told, name)
        return True

    def drop_bad_indexes(self) -> dict[str, str]:
        """Deletes, where we may, the index objects that do not say what the records do; tells why.

        For a store that was opened with ``indexed=False``.
        """
        bad = index.compare(self.medium, self.where, self._records.items)
        for name in bad:
            index.forget(self.medium, name)
        return bad

    # -- below

    def publish_sheet(
        self, folder: str, header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
    ) -> None:
        key = f"{folder}/{uuid4().hex}.jsonl"
        data = sheet({"created": now(), "writer": writer(), **header}, lines)
        if self.medium.create(key, data) != data:
            raise StoreCorrupt(f"{self.where}/{key} was written by somebody else under our own random name")
        self.refresh()

    def _derive(self) -> None:
        """Everything computed from the tables, dropped or redone."""
        removals = {_stem(key): one for key, one in self._removals.items.items()}
        cancelled = {name for one in removals.values() for name in one.cancels}
        self._in_force = {name: one for name, one in removals.items() if name not in cancelled}
        self._hidden = frozenset().union(*(one.hidden for one in self._in_force.values()))
        dropped = frozenset().union(*(one.specs for one in self._in_force.values()))
        damaged = self.damaged
        records = (one for one in self._records.items.values() if one is not None)
        self._live = [one for one in records if one.location not in damaged and one.spec_id not in dropped]
        replaced = {name for one in self._listings.items.values() for name in one.replaces}
        alive = [one for one in self._listings.items.values() if one.name not in replaced]
        self._live_listings = sorted(alive, key=Listing.order)
        self._indexes = {}
        self._takes = None

    def _index(self, spec_id: str) -> _Index:
        with self._lock:
            if spec_id not in self._indexes:
                mine = [one for one in self._live if one.spec_id == spec_id]
                self._indexes[spec_id] = _Index(mine, self._hidden)
            return self._indexes[spec_id]

    def _find(self, spec_id: str, row_id: str) -> tuple[Fragment, int]:
        found = self._index(spec_id).find(row_id)
        if found is None:
            raise NotFound(
                f"clip {row_id} has no {self._called(spec_id)} in {self.where}; run `pmm precompute`"
            )
        return found

    def _called(self, spec_id: str) -> str:
        spec = self.specs.get(spec_id)
        return f"{spec.modality} ({spec.algorithm})" if spec else f"rows of spec {spec_id}"


class _Index:
    """Where each row id of one spec is served: ids sorted, 40 bytes a row."""

    def __init__(self, live: Iterable[Fragment], hidden: frozenset[str]):
        self._fragments = sorted(live, key=lambda one: (one.id, one.location))
        counts = [len(one.lengths) for one in self._fragments]
        ids = fragments.sortable(b"".join(one.ids for one in self._fragments))
        order = np.argsort(ids, kind="stable")  # of equal ids, that of the lowest fragment comes first
        if len(ids):
            first = np.concatenate([[True], ids[order][1:] != ids[order][:-1]])
            gone = fragments.sortable(b"".join(bytes.fromhex(name) for name in hidden if _is_row_id(name)))
            order = order[first & ~np.isin(ids[order], gone)]
        self._ids = ids[order]
        self._fragment = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._position = np.concatenate(
            [np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in counts)]
        )[order]

    def row_ids(self) -> list[str]:
        return fragments.hexes(self._ids.tobytes())

    def find(self, row_id: str) -> tuple[Fragment, int] | None:
        if not _is_row_id(row_id):
            raise BadInput(f"{row_id!r} is no row id; 64 hexadecimal digits were expected")
        key = fragments.sortable(bytes.fromhex(row_id))
        at = int(np.searchsorted(self._ids, key)[0])
        if at == len(self._ids) or self._ids[at] != key[0]:
            return None
        return self._fragments[self._fragment[at]], int(self._position[at])


class _Table(Generic[T]):
    """One folder of create-once files, each read once."""

    def __init__(self, folder: str, ending: str, limit: int, load: Callable[[str, bytes, str], T]):
        self.items: dict[str, T] = {}
        self.problems: dict[str, str] = {}
        self._refused: set[str] = set()  # of the problems, those of the medium: read again each time
        self._folder, self._ending, self._limit, self._load = folder, ending, limit, load

    def refresh(self, medium: Medium, where: str) -> bool:
        """Whether anything appeared or vanished."""
        found = {one.key: one.size for one in medium.list(self._folder) if one.key.endswith(self._ending)}
        known = self.items.keys() | self.problems.keys()
        for key in known - found.keys():
            self.items.pop(key, None)
            self.problems.pop(key, None)
        refused = {key: self.problems.pop(key) for key in self._refused if key in self.problems}
        self._refused.clear()
        new = sorted(found.keys() - self.items.keys() - self.problems.keys())
        self._foresee(medium, new, where)
        for key in new:
            try:
                self._read(medium, key, found[key], where)
            except PmmError as error:
                self.problems[key] = str(error)
                if isinstance(error, MediumError):  # which may have been a lost connection
                    self._refused.add(key)
        return bool(known - found.keys()) or any(key in self.items or key not in refused for key in new)

    def _foresee(self, medium: Medium, new: Sequence[str], where: str) -> None:
        """What is about to be read."""

    def _read(self, medium: Medium, key: str, size: int, where: str) -> None:
        if size > self._limit > 0:
            raise StoreCorrupt(f"{where}/{key} has {size} bytes; no more than {self._limit} are read")
        data = medium.read(key, 0, size) if self._limit else b""
        self.items[key] = self.load(key, data, f"{where}/{key}")

    def load(self, key: str, data: bytes, where: str) -> T:
        """What ``data`` says. Raises a PmmError."""
        return self._said(lambda: self._load(key, data, where), where)

    def _said(self, parse: Callable[[], T], where: str) -> T:
        try:
            return parse()
        except PmmError:
            raise
        except MALFORMED as error:  # sealed, but not what this folder holds
            raise StoreCorrupt(f"{where} is not what {self._folder}/ holds ({error})") from None


class _Records(_Table[Fragment | None]):
    """Records; in a large store as index objects tell them, until each is proven."""

    def __init__(self, indexed: bool):
        super().__init__("records", ".json", fragments.RECORD_BYTES, _load_record)
        self.covered: dict[str, str] = {}  # record key to the index object that names it
        self.indexes: set[str] = set()  # index objects that were read
        self.bad_indexes: dict[str, str] = {}
        self._indexed = indexed
        self._told: Mapping[str, index.Known] = {}
        self._unproven: set[str] = set()

    def uncovered(self) -> dict[str, Fragment | None]:
        return {key: one for key, one in self.items.items() if key not in self.covered}

    def _foresee(self, medium: Medium, new: Sequence[str], where: str) -> None:
        self._told = {}
        if self._indexed and len(new) >= index.WORTH_READING:
            self._told, seen, self.bad_indexes = index.read(medium, where, set(new))
            self.indexes |= seen

    def _read(self, medium: Medium, key: str, size: int, where: str) -> None:
        told = self._told.get(key)
        if told is None or told.size != size:
            super()._read(medium, key, size, where)
            return
        self.items[key] = told.fragment
        self.covered[key] = told.index
        self._unproven.add(key)

    def prove(self, one: Fragment, medium: Medium, where: str) -> bool:
        """Whether the record of ``one`` says just that. If not, all that its index object told is
        forgotten, so that ``refresh`` reads those records, and the object deleted where we may."""
        if one.record not in self._unproven:
            return True
        try:
            data = medium.read(one.record, 0, fragments.RECORD_BYTES)
            if index.same(self.load(one.record, data, f"{where}/{one.record}"), one):
                self._unproven.discard(one.record)
                return True
        except PmmError:
            pass  # the refresh will tell it
        self._distrust(self.covered[one.record], medium)
        return False

    def _distrust(self, name: str, medium: Medium) -> None:
        index.forget(medium, name)
        self._indexed = False
        for key in [key for key, by in self.covered.items() if by == name]:
            del self.covered[key]
            self._unproven.discard(key)
            self.items.pop(key, None)


class _Listings(_Table[Listing]):
    """Listings, of which only the header is read at first."""

    def _read(self, medium: Medium, key: str, size: int, where: str) -> None:
        path = f"{where}/{key}"
        head = medium.read(key, 0, min(size, _SMALL_BYTES)).partition(b"\n")[0] + b"\n"

        def read() -> tuple[Take, ...]:
            return self.load(key, medium.read(key, 0, SHEET_BYTES), path).takes

        self.items[key] = self._said(lambda: _listing(key, unsealed(head, path), path, read), path)

    def refuse(self, one: Listing, error: PmmError) -> None:
        key = f"datasets/{one.name}.jsonl"
        self.items.pop(key, None)
        self.problems[key] = str(error)


def now() -> str:
    """ISO 8601 in UTC, for people to read; nothing is decided by it but order in lists."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def writer() -> dict[str, Any]:
    """Who writes: for people to read."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a name
        user = str(os.getuid())
    return {"host": socket.gethostname(), "user": user, "pid": os.getpid(), "pmm": pmm.__version__}


def _stem(key: str) -> str:
    return key.rpartition("/")[2].partition(".")[0]


def _came_from(path: str, take: Take, listing: Listing) -> bool:
    """Whether ``path`` is a take's source, which may be given from the listing's root and without ending."""
    for source in (take.source, f"{listing.origin.get('root', '')}/{take.source}"):
        if take.source and path.startswith(source) and path[len(source) :][:1] in ("", "/", "."):
            return True
    return False


def _is_row_id(text: str) -> bool:
    return fragments.HEX64.fullmatch(text) is not None


def _cache(where: Path | str, chosen: Cache | None = None) -> Cache | None:
    """Files on a disk are mapped where they lie."""
    return (chosen or Cache.default()) if is_address(where) else None


def _is_store(where: Path | str) -> bool:
    if not is_address(where):
        return (Path(where) / MARK).is_file()
    try:
        return bool(medium_at(where).read(MARK, 0, 1))
    except NotFound:
        return False


def is_there(where: Path | str) -> bool:
    """Whether anything is at ``where``."""
    return _is_store(where) or bool(_foreign_names(where)) if is_address(where) else Path(where).exists()


def _is_file(where: Path | str) -> bool:
    return not is_address(where) and Path(where).exists() and not Path(where).is_dir()


def _foreign_names(where: Path | str) -> str:
    """A few of the names in ``where``; hidden ones and what a killed ``create`` leaves do not count."""
    if is_address(where):
        there = ObjectMedium(str(where)).names()
    else:
        there = tuple(os.listdir(where)) if Path(where).is_dir() else ()
    names = sorted(name for name in there if not name.startswith(".") and name != "tmp")
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_mark(root: str, medium: Medium) -> Mapping[str, Any]:
    where = f"{root}/{MARK}"
    data = medium.read(MARK, 0, _SMALL_BYTES)
    value = strict_json(data, where)
    try:
        refuse_newer(value if isinstance(value, dict) else {}, where)
    except pmm.NewerFormat:
        raise
    except ValueError as error:
        raise BadInput(f"{where} is not that of a store ({error})") from None
    return unsealed(data, where)


def _plain_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    try:
        sealed(value)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{what} is not JSON ({error})") from None
    return dict(value)


# -- what each kind of file holds


def _load_spec(key: str, data: bytes, where: str) -> FeatureSpec:
    spec = FeatureSpec.from_bytes(data, where)
    if spec.id != _stem(key):
        raise StoreCorrupt(
            f"{where} was changed: its contents do not give its name; `pmm precompute` needs it whole"
        )
    return spec


def _load_record(key: str, data: bytes, where: str) -> Fragment | None:
    names = key.split("/")
    if len(names) != 3:
        raise StoreCorrupt(f"{where} lies where no record does; a record is records/<spec>/<uuid>.json")
    return Fragment.from_bytes(data, names[1], _stem(key), where)


def sheet(header: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> bytes:
    """A header that seals itself and the lines below it."""
    body, digest = _body(lines)
    return sealed({**header, "format": FORMAT, "lines": body.count(b"\n"), "body": digest}) + body


def _body(lines: Iterable[Mapping[str, Any]]) -> tuple[bytes, str]:
    body = b"".join(json_line(one) for one in lines)
    return body, hashlib.sha256(body).hexdigest()


def unsheet(data: bytes, where: str) -> tuple[dict[str, Any], Iterator[Any]]:
    """The header and, one after another, the lines below it. Both raise StoreCorrupt or BadInput."""
    lines = BytesIO(data)  # shares the bytes
    header = unsealed(lines.readline(), where)
    refuse_newer(header, where)
    if hashlib.sha256(memoryview(data)[lines.tell() :]).hexdigest() != header.get("body"):
        raise StoreCorrupt(f"{where} is not as it was written: its lines do not match their sha256")
    return header, (strict_json(one, where) for one in lines)


def _load_listing(key: str, data: bytes, where: str) -> Listing:
    header, lines = unsheet(data, where)
    takes = tuple(Take.from_json(one, where) for one in lines)
    return _listing(key, header, where, lambda: takes)


def _listing(
    key: str, header: Mapping[str, Any], where: str, read: Callable[[], tuple[Take, ...]]
) -> Listing:
    refuse_newer(header, where)
    origin = {str(name): str(text) for name, text in header["origin"].items()}
    people = (str(header["dataset"]), origin, str(header["created"]), _texts(header, "replaces"))
    return Listing(_stem(key), *people, str(header["body"]), read)


def _load_failures(key: str, data: bytes, where: str) -> tuple[Failure, ...]:
    _, lines = unsheet(data, where)
    names = ("key", "source", "stage", "reason", "when")
    return tuple(
        Failure(**{name: str(one[name]) for name in names}, attempt=int(one["attempt"])) for one in lines
    )


def _load_removal(key: str, data: bytes, where: str) -> Removal:
    value = unsealed(data, where)
    refuse_newer(value, where)
    hidden = frozenset(_texts(value, "rows") + _texts(value, "takes"))
    specs = frozenset(_texts(value, "specs"))
    return Removal(hidden, specs, value.get("purge") is True, _texts(value, "cancels"))


def _texts(value: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of strings, which may be left out."""
    found = value.get(name, [])
    if not isinstance(found, list):
        raise TypeError(f"{name} is no list")
    return tuple(map(str, found))
