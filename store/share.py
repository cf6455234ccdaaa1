"""Stores brought together: what one has and the other lacks is copied, checked on the way, each once.

Removals go first, so that nothing removed on either side is copied, and the lists of takes after the
features they need. Every step is a publish of its own: what a kill leaves is whole, and the next run
goes on with what is still missing. Marks of damage are about one copy and stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from pmm import AlreadyThere, BadInput, NotFound, StoreCorrupt
from pmm.store import fragment as fragments
from pmm.store import snapshots
from pmm.store.catalog import SHEET_BYTES, Listing, Store, sheet
from pmm.store.clip import Take
from pmm.store.digest import digest
from pmm.store.feature import FeatureSpec
from pmm.store.fragment import ID_BYTES, Fragment, object_damage
from pmm.store.removal import purge

Passed = Callable[[int], None]
OnEvent = Callable[["Copied"], None]
_NOT_WHOLE = (StoreCorrupt, NotFound)


@dataclass(frozen=True)
class Copied:
    """Bytes of fragments copied or checked so far and in all, of this run one way."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Skipped:
    """Something that is not whole in the source and so was not copied: the object and why, one line."""

    where: str
    reason: str


@dataclass(frozen=True)
class Shared:
    """What one run copied: fragments and their bytes; listings, failures, removals and snapshots."""

    fragments: int
    bytes: int
    lists: int
    skipped: tuple[Skipped, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def push(source: Store, target: Store, on_event: OnEvent = lambda event: None, check: bool = False) -> Shared:
    """Brings everything whole in ``source`` to ``target``; pulling is the same the other way round.

    What ``target`` has, by fragment id, rows or name of list, is not sent again; what was removed in
    either does not arrive. Nothing in ``source`` is changed. What is damaged in ``source`` is named in
    ``skipped``, unless a good copy of it is in either. With ``check``, every byte that ``target`` has of
    the same fragments is read, and a broken copy marked as damaged once a good one stands beside it.
    """
    source.refresh()
    target.refresh()
    run = _Push(source, target, on_event)
    run.removals()
    run.fragments(check)
    run.listings()
    run.failures()
    run.snapshots()
    target.keep_index()
    return run.result()


def merge(
    a: Store, b: Store, on_event: OnEvent = lambda event: None, check: bool = True
) -> tuple[Shared, Shared]:
    """Gives both stores the same contents; returns what was copied from ``a`` to ``b``, and back."""
    there = push(a, b, on_event, check)
    back = push(b, a, on_event, check)
    _Push(a, b, on_event).listings()  # those that came back shorter, without what a removed
    b.refresh()
    return there, back


def copy_fragment(
    source: Store, fragment: Fragment, target: Store, passed: Passed = lambda size: None
) -> Fragment:
    """The live copy of ``fragment`` in ``target``, made at a fresh location if there is none.

    Every byte is checked against the record while it is copied; ``passed`` hears of each block's size.
    Raises StoreCorrupt or NotFound, with nothing added, if the source is not as its record says. A
    broken copy in ``target`` counts until it is marked as damaged.
    """
    for held in target.fragments():
        if held.id == fragment.id:
            return held
    return _copy(_uncached(source), fragment, target, passed)


def _copy(source: Store, fragment: Fragment, target: Store, passed: Passed) -> Fragment:
    spec = _spec(source, fragment, target)
    source.reader(fragment)  # refuses what the record, or the fragment's own metadata, does not say
    return target.announce(spec, lambda: fragments.copy(source.medium, fragment, target.medium, passed))


def copy_rows(source: Store, fragment: Fragment, row_ids: Sequence[str], target: Store) -> Fragment:
    """A new fragment in ``target`` with these rows of ``fragment``, made when and by whom they were.

    Each clip is checked against its sum. Raises StoreCorrupt naming the clip, or NotFound.
    """
    spec, wanted, rows = _spec(source, fragment, target), set(row_ids), []
    reader = source.reader(fragment)
    for index, name in enumerate(fragment.row_ids):
        if name in wanted:
            if not reader.sum_matches(index):
                raise StoreCorrupt(
                    f"{fragment.folder}: clip {name} was changed: its sha256 is not the one stored"
                )
            rows.append((name, reader.rows(index)))
    people = {"created": fragment.created, "writer": fragment.writer, "made_with": fragment.made_with}
    return target.announce(spec, lambda: fragments.write(target.medium, spec, rows, people))


def _spec(source: Store, fragment: Fragment, target: Store) -> FeatureSpec:
    spec = source.specs.get(fragment.spec_id) or target.specs.get(fragment.spec_id)
    if spec is None:
        raise StoreCorrupt(f"specs/{fragment.spec_id}.json is missing or damaged; run `pmm store verify`")
    return spec


class _Push:
    """One run from ``source`` to ``target``, and what has come of it so far."""

    def __init__(self, source: Store, target: Store, on_event: OnEvent):
        self.source, self.target = _uncached(source), _uncached(target)
        self.copied: list[Fragment] = []
        self.adopted = 0
        self.skipped: list[Skipped] = []
        self._on_event, self._done, self._total = on_event, 0, 0
        self._known_sums: dict[str, list[bytes]] = {}

    def result(self) -> Shared:
        size = sum(one.bytes for one in self.copied)
        unread = [Skipped(where, reason) for where, reason in self.source.problems.items()]
        return Shared(len(self.copied), size, self.adopted, (*unread, *self.skipped))

    def removals(self) -> None:
        """Every removal; what a new one wants destroyed is destroyed in ``target``, too."""
        before = set(self.target.removals)
        self.lists("removed")
        self.target.refresh()
        if any(one.purge for name, one in self.target.removals.items() if name not in before):
            purge(self.target)
            self.target.refresh()

    def lists(self, folder: str) -> None:
        """Every whole file in ``folder``, as it is."""
        for key in sorted(set(self.source.lists(folder)) - set(self.target.lists(folder))):
            self._adopt(key, partial(self.source.medium.read, key, 0, SHEET_BYTES))

    def listings(self) -> None:
        """Every listing that none replaces, without the takes that were removed."""
        self.source.lists("datasets")  # reads them: what is damaged is no listing from then on
        held = {*self.target.lists("datasets"), *(_key(name) for name in self.target.replaced)}
        for one in self.source.listings():
            key = _key(one.name)
            rest = tuple(take for take in one.takes if not self.target.hides(take))
            if key in held or _key(_shorter(one, rest).name) in held:
                continue
            if len(rest) == len(one.takes):
                self._adopt(key, partial(self.source.medium.read, key, 0, SHEET_BYTES))
            else:
                self._adopt(_key(_shorter(one, rest).name), _shorter(one, rest).to_bytes)

    def failures(self) -> None:
        """Every list of failures, without those of clips that were removed."""
        held = set(self.target.lists("failures"))
        for key, lines in self.source.failure_sheets().items():
            rest = [asdict(one) for one in lines if one.key not in self.target.removed]
            name = key
            if len(rest) < len(lines):
                shorter = digest("failures", {"of": key, "keys": [one["key"] for one in rest]})
                name = f"failures/{shorter[:32]}.jsonl"
            if name in held:
                continue
            if name == key:
                self._adopt(key, partial(self.source.medium.read, key, 0, SHEET_BYTES))
            elif rest:
                self._adopt(name, partial(sheet, {"created": lines[0].when}, rest))

    def snapshots(self) -> None:
        """Every snapshot, without what was purged; the first of a name stays."""
        there = set(snapshots.names(self.target))
        wanted = [one for one in self.target.removals.values() if one.purge]
        ids = frozenset(chain(*(one.hidden for one in wanted)))
        specs = frozenset(chain(*(one.specs for one in wanted)))
        for name in snapshots.names(self.source):
            if name in there and snapshots.PINNED.fullmatch(name):  # which names its content
                continue
            try:
                whole = snapshots.load(self.source, name)
                snapshots.put(self.target, snapshots.without(whole, ids, specs))
                self.adopted += name not in there
            except (AlreadyThere, BadInput, *_NOT_WHOLE) as error:
                self.skipped.append(Skipped(f"snapshots/{name}", str(error)))

    def fragments(self, check: bool) -> None:
        """Every fragment that ``target`` lacks or has only broken, from whichever copy is whole."""
        offered = _by_id(self.source)
        held = [one for one in self.target.fragments() if one.id in offered]
        missing = offered.keys() - {one.id for one in held}
        self._total = sum(offered[name][0].bytes for name in missing) + check * sum(one.bytes for one in held)
        broken = [one for one in held if check and self._is_broken(one)]
        self._total += sum(one.bytes for one in broken)
        for name in sorted(missing | {one.id for one in broken}):
            self._replace(offered[name], [one for one in broken if one.id == name])
        self._name_lost()

    def _is_broken(self, one: Fragment) -> bool:
        self._passed(one.bytes)
        return any(object_damage(self.target.medium, one, stored) for stored in one.objects)

    def _replace(self, copies: Sequence[Fragment], broken: Sequence[Fragment]) -> None:
        """Sends the first whole one of ``copies``, and only then sets aside what it stands in for."""
        reasons, before = [], self._done
        for one in copies:
            try:
                self._send(one, anyway=bool(broken))
            except _NOT_WHOLE as error:
                reasons.append(Skipped(one.folder, str(error)))
                continue
            for old in broken:
                self.target.mark_damaged(old.location, f"replaced by a copy from {self.source.where}")
            break
        else:
            self.skipped += reasons
        self._passed(before + copies[0].bytes - self._done)  # also where less was read, or more than once

    def _send(self, one: Fragment, anyway: bool) -> None:
        stay = _wanted(one, self.target)
        lacking = stay if anyway else self._lacking(one, stay)
        if lacking and len(stay) == len(one.lengths):
            self.copied.append(_copy(self.source, one, self.target, self._passed))
        elif lacking:
            self.copied.append(copy_rows(self.source, one, lacking, self.target))

    def _lacking(self, one: Fragment, rows: Sequence[str]) -> list[str]:
        """Those of ``rows`` that ``target`` does not serve, or not with the very bytes of ``one``.

        A fragment that was compacted or shortened there is not to come back as it was.
        """
        missing = self.target.missing(one.spec_id, rows)
        if len(missing) == len(rows):
            return missing
        ours, absent = dict(zip(one.row_ids, _sums(self.source, one))), set(missing)
        return [row for row in rows if row in absent or self._served(one.spec_id, row) != ours[row]]

    def _served(self, spec_id: str, row: str) -> bytes:
        """The sum of what ``target`` serves; none if that cannot even be opened."""
        one, index = self.target.find(spec_id, row)
        if one.location not in self._known_sums:
            try:
                self._known_sums[one.location] = _sums(self.target, one)
            except _NOT_WHOLE:
                self._known_sums[one.location] = [b""] * len(one.lengths)
        return self._known_sums[one.location][index]

    def _passed(self, size: int) -> None:
        self._done += size
        self._on_event(Copied(self._done, self._total))

    def _name_lost(self) -> None:
        """Fragments of which only a damaged copy is known."""
        there = {one.id for one in (*self.target.fragments(), *self.source.fragments())}
        for one in filter(None, self.source.records.values()):
            if one.location in self.source.damaged and one.id not in there and _wanted(one, self.target):
                self.skipped.append(Skipped(one.folder, "marked as damaged, and no other copy is known"))

    def _adopt(self, key: str, read: Callable[[], bytes]) -> None:
        try:
            self.target.adopt(key, read())
            self.adopted += 1
        except _NOT_WHOLE as error:
            self.skipped.append(Skipped(key, str(error)))


def _uncached(store: Store) -> Store:
    """Copying a fragment once is no reason to keep it in the local cache."""
    return Store(store.where, store.medium) if store.cache else store


def _by_id(store: Store) -> dict[str, list[Fragment]]:
    """Live fragments: the copies of each id."""
    found: dict[str, list[Fragment]] = {}
    for one in store.fragments():
        found.setdefault(one.id, []).append(one)
    return found


def _sums(store: Store, one: Fragment) -> list[bytes]:
    joined = store.reader(one).sums
    return [joined[i : i + ID_BYTES] for i in range(0, len(joined), ID_BYTES)]


def _wanted(one: Fragment, target: Store) -> list[str]:
    """Row ids of the fragment that ``target`` has not removed."""
    if any(one.spec_id in removal.specs for removal in target.removals.values()):
        return []
    return [row for row in one.row_ids if row not in target.removed]


def _shorter(listing: Listing, rest: tuple[Take, ...]) -> Listing:
    """``listing`` with fewer takes, named so that leaving out the same ones again gives the same name."""
    named = digest("listing", {"of": listing.name, "takes": [take.id for take in rest]})
    return replace(listing, name=named[:32], read=lambda: rest)


def _key(listing_name: str) -> str:
    return f"datasets/{listing_name}.jsonl"
