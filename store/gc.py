"""What killed writers left, and copies that others replace: found, and taken away.

Grace periods save work, a slow writer's; nothing published is lost without them (see ``retire``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

from pmm import StoreCorrupt
from pmm.store.catalog import Store
from pmm.store.fragment import Fragment
from pmm.store.medium import Entry
from pmm.store.removal import Purged, purge
from pmm.store.retire import Keepers, abandon, folders, record_of, retire

DAY = 86_400.0
_ATTEMPTS = 8


@dataclass(frozen=True)
class Collected:
    """What ``gc`` took, or would take.

    unfinished  folders of writers that were killed, and what was left of retired fragments
    replaced    folders of damaged copies, each row of which another fragment holds
    drafts      files that were about to be created
    bytes       of all of these
    young       unfinished folders, damaged copies and drafts within the grace period
    kept        damaged copies that hold the only copy of some row: `pmm precompute` replaces it
    purged      fragments and lists of which a purge was begun and not finished
    """

    unfinished: tuple[str, ...]
    replaced: tuple[str, ...]
    drafts: int
    bytes: int
    young: int
    kept: tuple[str, ...]
    purged: int
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gc(store: Store, grace_seconds: float = DAY, dry_run: bool = False) -> Collected:
    """Deletes what killed writers left and what others replace, if it is older than ``grace_seconds``.

    Ages are differences on the medium's own clock. Never deletes a row that nothing else holds, so
    neither the last undamaged copy of what a snapshot names. ``dry_run`` deletes nothing.
    """
    store = Store(store.where, store.medium, indexed=False)
    purged = Purged() if dry_run else purge(store)
    drafts, now = _drafts(store)
    old_drafts = [one for one in drafts if now - one.modified >= grace_seconds]
    lying = folders(store)
    store.refresh()  # after the folders were listed: what is published in between is no orphan
    dead = {name: one for name, one in lying.items() if _without_fragment(store, name)}
    old = {name for name, one in dead.items() if _abandoned(store, name) or one.older(now, grace_seconds)}
    marked, young = _marked(store, now, grace_seconds)
    keepers = Keepers(store)
    spare = [one for one in marked if keepers.hold(one)]
    if not dry_run:
        old = {name for name in old if abandon(store, name, dead[name].keys)}
        retire(store, spare)
        for one in old_drafts:
            store.medium.delete(one.key)
    freed = (
        [dead[name].bytes for name in old] + [one.bytes for one in spare] + [one.size for one in old_drafts]
    )
    return Collected(
        unfinished=tuple(sorted(old)),
        replaced=tuple(sorted(one.folder for one in spare)),
        drafts=len(old_drafts),
        bytes=sum(freed),
        young=len(dead) - len(old) + len(drafts) - len(old_drafts) + young,
        kept=tuple(sorted(one.folder for one in marked if one not in spare)),
        purged=purged.fragments + purged.lists,
        dry_run=dry_run,
    )


def _drafts(store: Store) -> tuple[list[Entry], float]:
    """Files about to be created, and what time it is by the clock that tells their age: a probe's."""
    for _ in range(_ATTEMPTS):
        probe = f"tmp/{uuid4().hex}"
        store.medium.write(probe, [b"probe"])
        found = {one.key: one for one in store.medium.list("tmp")}
        store.medium.delete(probe)
        if probe in found:  # if not, another gc took it for a draft
            now = found.pop(probe).modified
            return list(found.values()), now
    raise StoreCorrupt(f"a file created in {store.where}/tmp is not listed there; run `pmm store doctor`")


def _without_fragment(store: Store, folder: str) -> bool:
    """Whether no record makes this folder known; one that cannot be read might."""
    record = record_of(folder)
    return store.records.get(record) is None and record not in store.problems


def _abandoned(store: Store, folder: str) -> bool:
    return record_of(folder) in store.records and store.records[record_of(folder)] is None


def _marked(store: Store, now: float, grace_seconds: float) -> tuple[list[Fragment], int]:
    """Published fragments that were marked as damaged before the grace period, and how many within."""
    marks = {one.key: one.modified for one in store.medium.list("damaged")}
    found = [one for one in store.records.values() if one and one.location in store.damaged]
    old = [one for one in found if now - marks.get(f"damaged/{one.location}.json", now) >= grace_seconds]
    return old, len(found) - len(old)
