"""Takes, clips and feature sets taken out on purpose; and, on request, their bytes destroyed.

A removal is a small file that every reader honours at once and that travels with merges; it can be
taken back. A *purge* goes further and cannot: fragments that hold the rows are written anew without
them and retired, and lists and snapshots likewise. What was removed stays named, by ids (digests), so
that it is refused when somebody brings it back. Killed in between, it is run again; gc completes it, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from pmm import BadInput, NotFound, PmmError, StoreCorrupt
from pmm.store import snapshots
from pmm.store.catalog import Listing, Removal, Store
from pmm.store.clip import Take
from pmm.store.compact import intact, rewrite
from pmm.store.fragment import ID_BYTES, MAX_CLIPS, RECORD_BYTES, Fragment, hexes
from pmm.store.retire import abandon, folders, record_of, retire, whole_sums

_SHORTEST = 8


@dataclass(frozen=True)
class Purged:
    """What a purge did: fragments written anew without the rows, and fragments and lists deleted."""

    written: int = 0
    fragments: int = 0
    lists: int = 0


@dataclass(frozen=True)
class Removed:
    """What ``remove`` took out, by id, with the sources of the takes; and what a purge did."""

    takes: tuple[str, ...]
    sources: tuple[str, ...]
    rows: tuple[str, ...]
    specs: tuple[str, ...]
    purged: Purged | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def remove(
    store: Store,
    clips: Sequence[str] = (),
    subjects: Sequence[str] = (),
    specs: Sequence[str] = (),
    purge_bytes: bool = False,
) -> Removed:
    """Takes out what is named, for every reader, and with ``purge_bytes`` destroys its bytes.

    clips     take, clip or target ids or their first 8 digits or more, or sources as `ls` prints them
    subjects  subjects, or dataset/subject: every take of theirs; nobody else is left with its clip
    specs     feature specs, by id or its beginning: all their rows

    Raises NotFound or BadInput, with nothing changed, for a name that fits nothing or too much.
    """
    store.refresh()
    try:
        takes, rows = _named(store, clips, subjects)
        dropped = frozenset(_spec(store, text) for text in specs)
    except NotFound:
        if purge_bytes:
            purge(store)  # one that was killed may have taken the names from the lists already
        raise
    hidden = frozenset(rows).union(take.id for take in takes)
    removal = Removal(hidden, dropped, purge_bytes, ())
    if not any(_covers(one, removal) for one in store.removals.values()):
        store.publish_removal(rows, {take.id for take in takes}, removal.specs, purge_bytes)
    return Removed(
        takes=tuple(sorted({take.id for take in takes})),
        sources=tuple(sorted({take.source for take in takes})),
        rows=tuple(sorted(rows)),
        specs=tuple(sorted(removal.specs)),
        purged=purge(store) if purge_bytes else None,
    )


def readmit(store: Store, ids: Collection[str], specs: Collection[str] = ()) -> int:
    """Takes removals of these take and row ids and of these specs back, and of nothing else; returns how
    many removals were changed. What was purged has to be computed again."""
    changed = 0
    for name, one in store.removals.items():
        if one.hidden.isdisjoint(ids) and one.specs.isdisjoint(specs):
            continue
        left = one.hidden.difference(ids)
        store.publish_removal(left, (), one.specs.difference(specs), one.purge, cancels=[name])
        changed += 1
    return changed


def purge(store: Store) -> Purged:
    """Destroys the bytes of all that removals in force want purged. Does nothing where they are gone."""
    store = Store(store.where, store.medium, indexed=False)
    _settle(store)
    wanted = [one for one in store.removals.values() if one.purge]
    ids = frozenset(chain(*(one.hidden for one in wanted)))
    specs = frozenset(chain(*(one.specs for one in wanted)))
    if not ids and not specs:
        return Purged()
    mine = [one for one in store.records.values() if one and _holds(one, ids, specs)]
    written = sum(_write_without(store, one, ids, specs) for one in mine)
    retire(store, mine)
    unknown = _purge_unknown(store, ids, specs)
    lists = _purge_listings(store, ids) + _purge_failures(store, ids) + snapshots.purge(store, ids, specs)
    return Purged(written, len(mine) + unknown, lists)


# -- what is named


def _named(store: Store, clips: Sequence[str], subjects: Sequence[str]) -> tuple[list[Take], set[str]]:
    """Takes and row ids. Raises NotFound or BadInput."""
    everyone = [take for listing in store.listings() for take in listing.takes]
    takes = [*chain(*(_subject(store, everyone, who) for who in subjects))]
    rows = set()
    for text in clips:
        found = _clip(store, everyone, text)
        takes += found
        rows |= set() if found else {text}
    return takes, rows | {row for take in takes for row in (take.clip.id, take.target) if row}


def _clip(store: Store, everyone: Iterable[Take], text: str) -> list[Take]:
    """Takes that ``text`` names; none if it is an id that no listing has, of a row or removed before."""
    called = [take for take in everyone if text in (take.source, *_ids(take))]
    held = text in store.removed or any(one and text in one.row_ids for one in store.records.values())
    if called or held:
        return called
    if len(text) >= _SHORTEST:
        full = {name for take in everyone for name in _ids(take) if name.startswith(text)}
        if len(full) > 1:
            raise BadInput(f"{len(full)} ids in {store.where} begin with {text}; give more of its digits")
        if full:
            return [take for take in everyone if full & set(_ids(take))]
    raise NotFound(
        f"{text} is no take, clip or source in {store.where}; `pmm store ls {store.where}` lists them"
    )


def _ids(take: Take) -> tuple[str, ...]:
    return (take.id, take.clip.id, *([take.target] if take.target else []))


def _subject(store: Store, everyone: Iterable[Take], who: str) -> list[Take]:
    found = [take for take in everyone if who in (take.subject, f"{take.dataset}/{take.subject}")]
    if not found:
        known = ", ".join(sorted({take.subject for take in everyone})) or "none"
        raise NotFound(f"no take of subject {who!r} in {store.where}; its subjects are {known}")
    return found


def _spec(store: Store, text: str) -> str:
    found = [name for name in store.specs if name.startswith(text)]
    if len(found) != 1 or not text:
        raise NotFound(
            f"{len(found)} feature specs in {store.where} begin with {text!r}; "
            f"`pmm store info {store.where}` lists them"
        )
    return found[0]


def _covers(one: Removal, other: Removal) -> bool:
    return other.hidden <= one.hidden and other.specs <= one.specs and one.purge >= other.purge


# -- bytes destroyed


def _holds(one: Fragment, ids: Collection[str], specs: Collection[str]) -> bool:
    return one.spec_id in specs or not set(one.row_ids).isdisjoint(ids)


def _write_without(store: Store, one: Fragment, ids: Collection[str], specs: Collection[str]) -> bool:
    """Publishes the rest of a fragment, checked, so that the whole of it may go.

    A copy marked as damaged has no rest: `verify --repair` has saved what was whole of it.
    """
    if one.spec_id in specs or one.location in store.damaged:
        return False
    rest = [index for index in intact(store, one) if one.row_ids[index] not in ids]
    if not rest:
        return False
    new = rewrite(store, [(one, rest)])
    if len(whole_sums(store, new)) != len(rest):
        raise StoreCorrupt(
            f"{store.where}/{new.folder} is not what was just written to it; nothing was deleted"
        )
    return True


def _settle(store: Store) -> None:
    """Sees to it that what counts as unreadable is damaged, as nothing is deleted for a lost connection.

    Raises MediumError.
    """
    for key in store.problems:
        with suppress(NotFound):
            store.medium.read(key, 0, RECORD_BYTES)
    store.refresh()


def _purge_unknown(store: Store, ids: Collection[str], specs: Collection[str]) -> int:
    """Takes away folders that no record makes known, or an unreadable one, and that may hold these rows."""
    taken = 0
    for name, folder in folders(store).items():
        record = record_of(name)
        if store.records.get(record) or not (name.split("/")[1] in specs or _may_hold(store, name, ids)):
            continue
        if record in store.problems or name.rpartition("/")[2] in store.damaged:
            store.medium.delete(record)
        taken += abandon(store, name, folder.keys)
    return taken


def _may_hold(store: Store, folder: str, ids: Collection[str]) -> bool:
    try:
        found = store.medium.read(f"{folder}/clips/c/0/0", 0, MAX_CLIPS * ID_BYTES)
    except NotFound:  # written before any values are
        return False
    except PmmError:
        return True
    return len(found) % ID_BYTES > 0 or not set(hexes(found)).isdisjoint(ids)


def _purge_listings(store: Store, ids: Collection[str]) -> int:
    """Lists anew, without the takes that ``ids`` name, what lists them; then deletes the old lists."""
    every = {one.name: one for one in store.every_listing()}
    naming = {name for name, one in every.items() if any(not set(ids).isdisjoint(_ids(t)) for t in one.takes)}
    for one in store.listings():
        before = _history(one, every)
        if naming.isdisjoint({one.name, *before}):
            continue
        header = {"dataset": one.dataset, "origin": dict(one.origin), "created": one.created}
        rest = [take.to_json() for take in one.takes if set(ids).isdisjoint(_ids(take))]
        store.publish_sheet("datasets", {**header, "replaces": sorted({one.name, *before})}, rest)
    for name in naming:
        store.medium.delete(f"datasets/{name}.jsonl")
    store.refresh()
    return len(naming)


def _history(one: Listing, every: dict[str, Listing]) -> set[str]:
    """Every listing that ``one`` replaces, directly or not: once they go, nobody else says so."""
    found: set[str] = set()
    new = set(one.replaces)
    while new:
        found |= new
        new = {name for each in new if each in every for name in every[each].replaces} - found
    return found


def _purge_failures(store: Store, ids: Collection[str]) -> int:
    sheets = {key: lines for key, lines in store.failure_sheets().items() if any(o.key in ids for o in lines)}
    for key, lines in sheets.items():
        if rest := [asdict(one) for one in lines if one.key not in ids]:
            store.publish_sheet("failures", {}, rest)
        store.medium.delete(key)
    store.refresh()
    return len(sheets)
