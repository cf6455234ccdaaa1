"""Fewer, larger fragments of the same rows: faster to open, to list and to copy.

A larger fragment is written of small ones, checked row by row, and published like any other; then each
small one is retired once others hold all its rows, byte for byte (see ``retire``). Killed in between, both
are there, and the next run takes the small ones away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from pmm import PmmError
from pmm.store import fragment as fragments
from pmm.store.catalog import Store, now, writer
from pmm.store.fragment import Fragment
from pmm.store.retire import Keepers, age, retire

TARGET_BYTES = 512 << 20

Part = tuple[Fragment, Sequence[int]]
"""A fragment and the places of some clips in it."""


@dataclass(frozen=True)
class Compacted:
    """What ``compact`` did: fragments written and retired, bytes read for it, and what it left alone."""

    written: tuple[str, ...]
    retired: tuple[str, ...]
    bytes: int
    damaged: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rewritten:
    """Event: bytes of small fragments written anew, so far and in all."""

    done_bytes: int
    total_bytes: int


def compact(
    store: Store, target_bytes: int = TARGET_BYTES, on_event: Callable[[Rewritten], None] | None = None
) -> Compacted:
    """Joins fragments of less than half of ``target_bytes`` into ones of at most that.

    Only what one and the same thing made is joined, so that every row keeps its account. All that any
    snapshot names is kept, byte for byte. A damaged fragment is left alone for `verify --repair`.
    """
    store = Store(store.where, store.medium, indexed=False)
    retired = _retire_held(store, store.fragments())
    written, damaged, done = [], [], 0
    groups = _groups(store, target_bytes)
    total = sum(one.bytes for group in groups for one in group)
    for group in groups:
        parts = [(one, intact(store, one)) for one in group]
        whole = [part for part in parts if len(part[1]) == len(part[0].lengths)]
        damaged += [one.folder for one, rows in parts if len(rows) < len(one.lengths)]
        if len(whole) > 1:
            written.append(rewrite(store, whole).folder)
            retired += _retire_held(store, [one for one, _ in whole])
        done += sum(one.bytes for one in group)
        if on_event:
            on_event(Rewritten(done, total))
    Store(store.where, store.medium).keep_index()
    return Compacted(tuple(written), tuple(retired), done, tuple(damaged))


def rewrite(store: Store, parts: Sequence[Part]) -> Fragment:
    """Publishes the rows of ``parts``, fragments of one spec, as one fragment that is newer than them."""
    spec = store.specs[parts[0][0].spec_id]
    rows = [(one.row_ids[index], store.reader(one).rows(index)) for one, places in parts for index in places]
    made_with = dict(parts[0][0].made_with)
    people = {"created": _after(one for one, _ in parts), "writer": writer(), "made_with": made_with}
    return store.announce(spec, lambda: fragments.write(store.medium, spec, rows, people))


def intact(store: Store, one: Fragment) -> list[int]:
    """Places of the clips in ``one`` whose rows are those that were written; none if it cannot be opened."""
    try:
        reader = store.reader(one)
        return [index for index in range(len(one.lengths)) if reader.sum_matches(index)]
    except PmmError:
        return []


def _retire_held(store: Store, candidates: Iterable[Fragment]) -> list[str]:
    """Retires those of which every row is held by others; returns their folders."""
    store.refresh()
    keepers = Keepers(store)
    spare = [one for one in sorted(candidates, key=age) if keepers.hold(one)]
    retire(store, spare)
    return [one.folder for one in spare]


def _groups(store: Store, target_bytes: int) -> list[list[Fragment]]:
    """Small fragments that are to become one: of one spec and one account, no row twice, oldest first."""
    groups: list[list[Fragment]] = []
    open_group: dict[tuple[str, str], tuple[list[Fragment], set[str], int]] = {}
    for one in sorted(store.fragments(), key=age):
        if one.bytes >= target_bytes / 2:
            continue
        kind = (one.spec_id, json.dumps(one.made_with, sort_keys=True))
        group, rows, size = open_group.get(kind, ([], set(), 0))
        if not group or size + one.bytes > target_bytes or not rows.isdisjoint(one.row_ids):
            group, rows, size = [], set(), 0
            groups.append(group)
        group.append(one)
        open_group[kind] = (group, rows | set(one.row_ids), size + one.bytes)
    return [group for group in groups if len(group) > 1]


def _after(sources: Iterable[Fragment]) -> str:
    """A time of creation later than that of ``sources``, whatever the clocks of their writers said."""
    latest = max(one.created for one in sources)
    if now() > latest:
        return now()
    try:
        return (datetime.fromisoformat(latest) + timedelta(milliseconds=1)).isoformat(timespec="milliseconds")
    except ValueError:  # not a time at all; any text that sorts behind it
        return f"{latest}~"
