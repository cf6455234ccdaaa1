"""How a fragment is taken away. Nothing else in pmm deletes one.

An *orphan* is a fragment folder without a record: its writer was killed, or is slow. Before any of
it is deleted, the very record its writer would create is created as ``abandoned``. Whoever creates
that name first wins: a writer that comes too late finds it taken and publishes elsewhere, and a gc
that comes too late finds a fragment and leaves it. No clock decides.

A published fragment is *retired*: its record is deleted first, durably, and then its objects. Killed
in between, it is an orphan like any other. It is only retired once other fragments hold each of its
rows, byte for byte, and were read back whole. They must be *newer* than it (``created``, then ids): in
one fixed order two who retire at once cannot each rely on what the other takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from pmm import PmmError
from pmm.store.catalog import Store
from pmm.store.digest import sealed
from pmm.store.fragment import FORMAT, ID_BYTES, Fragment, object_damage

ABANDONED = sealed({"format": FORMAT, "state": "abandoned"})
"""Everybody spells it alike, so that two who abandon the same folder agree."""


def abandon(store: Store, folder: str, keys: Iterable[str]) -> bool:
    """Takes an orphan away; False, with nothing touched, if its writer published it meanwhile."""
    if store.medium.create(record_of(folder), ABANDONED) != ABANDONED:
        return False
    for key in keys:
        store.medium.delete(key)
    return True


def retire(store: Store, fragments: Collection[Fragment]) -> None:
    """Takes published fragments away that nobody needs any more: the records, then the objects.

    What replaces them is durable before anything is deleted. A reader that has one mapped goes on
    reading it; one that only knows its record looks for the rows anew.
    """
    for spec_id in {one.spec_id for one in fragments}:
        store.medium.sync(f"records/{spec_id}")
    for one in fragments:
        store.medium.delete(one.record)
    for spec_id in {one.spec_id for one in fragments}:
        store.medium.sync(f"records/{spec_id}")
    for one in fragments:
        for entry in list(store.medium.list(one.folder)):
            store.medium.delete(entry.key)
    if fragments:
        store.refresh()


class Keepers:
    """Live fragments by the rows they hold; one is relied on only after every byte of it was read."""

    def __init__(self, store: Store):
        self._store = store
        self._holding: dict[str, dict[bytes, list[Fragment]]] = {}
        self._whole: dict[str, dict[bytes, bytes]] = {}

    def hold(self, one: Fragment, but_for: Collection[str] = ()) -> bool:
        """Whether every row of ``one``, except ``but_for``, is in other whole fragments, byte for byte.

        Only newer ones count if ``one`` is live. Of a damaged copy, a row that is itself damaged may
        have any other bytes there.
        """
        live = one.location not in self._store.damaged
        rows = [row for row in _split(one.ids) if row.hex() not in but_for]
        if not all(any(True for _ in self._of(one, row, live)) for row in rows):
            return False  # told by the records alone: most fragments hold what no other does
        try:
            needs = [row for row in _needs(self._store, one, live) if row[0].hex() not in but_for]
        except PmmError:
            return False
        return all(any(self._has(keeper, *row) for keeper in self._of(one, row[0], live)) for row in needs)

    def unheld(self, one: Fragment, places: Iterable[int]) -> list[int]:
        """Those of the clips at ``places`` in ``one`` that no other whole fragment has, byte for byte."""
        known = list(sums(self._store, one).items()) if places else []
        return [
            index
            for index in places
            if not any(self._has(keeper, *known[index]) for keeper in self._of(one, known[index][0], False))
        ]

    def _of(self, one: Fragment, row: bytes, newer: bool) -> Iterator[Fragment]:
        holding = self._holding.setdefault(one.spec_id, {})
        if not holding:
            for keeper in self._store.fragments():
                if keeper.spec_id == one.spec_id:
                    for each in _split(keeper.ids):
                        holding.setdefault(each, []).append(keeper)
        for keeper in holding.get(row, ()):
            if keeper.location != one.location and (not newer or age(keeper) > age(one)):
                yield keeper

    def _has(self, keeper: Fragment, row: bytes, total: bytes | None) -> bool:
        if keeper.location not in self._whole:
            self._whole[keeper.location] = whole_sums(self._store, keeper)
        found = self._whole[keeper.location].get(row)
        return found is not None and total in (None, found)


def age(one: Fragment) -> tuple[str, str, str]:
    """The one order in which fragments replace each other: the greater is the newer."""
    return (one.created, one.id, one.location)


def sums(store: Store, one: Fragment) -> dict[bytes, bytes]:
    """Row id to the sha256 of its rows, as ``one`` has them, ids ascending. Raises StoreCorrupt."""
    return dict(zip(_split(one.ids), _split(store.reader(one).sums)))


def _needs(store: Store, one: Fragment, live: bool) -> list[tuple[bytes, bytes | None]]:
    """Rows of a fragment with the sum that must be kept; None where any will do.

    Raises StoreCorrupt if ``one`` is live and cannot be read: then it is no time to delete it.
    """
    try:
        reader = store.reader(one)
        known = sums(store, one).items()
        return [
            (row, total if live or reader.sum_matches(index) else None)
            for index, (row, total) in enumerate(known)
        ]
    except PmmError:
        if live:
            raise
        return [(row, None) for row in _split(one.ids)]


def whole_sums(store: Store, one: Fragment) -> dict[bytes, bytes]:
    """``sums`` of a fragment, each object of which was just read and is as recorded; else nothing."""
    if any(object_damage(store.medium, one, stored) for stored in one.objects):
        return {}
    try:
        return sums(store, one)
    except PmmError:
        return {}


def _split(ids: bytes) -> list[bytes]:
    return [ids[i : i + ID_BYTES] for i in range(0, len(ids), ID_BYTES)]


# -- what lies there


@dataclass
class Folder:
    """One fragment's folder: keys and bytes of its objects, and when the last was written."""

    keys: list[str]
    bytes: int = 0
    modified: float = 0.0

    def older(self, now: float, seconds: float) -> bool:
        return now - self.modified >= seconds


def folders(store: Store) -> dict[str, Folder]:
    """Every fragment folder with an object in it, known or not, by its path."""
    found: dict[str, Folder] = {}
    for entry in store.medium.list("fragments"):
        names = entry.key.split("/")
        if len(names) > 3:
            one = found.setdefault("/".join(names[:3]), Folder([]))
            one.keys.append(entry.key)
            one.bytes += entry.size
            one.modified = max(one.modified, entry.modified)
    return found


def record_of(folder: str) -> str:
    """The key of the record that makes a fragment folder known."""
    return f"records/{folder.removeprefix('fragments/')}.json"
