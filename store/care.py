"""Care of a store: every byte checked, what is in it told, what is broken set aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pmm import NotFound, PmmError, StoreCorrupt
from pmm.store import clock
from pmm.store import fragment as fragments
from pmm.store.catalog import Store
from pmm.store.clip import Take
from pmm.store.compact import intact, rewrite
from pmm.store.digest import canonical_json, strict_json
from pmm.store.feature import FeatureSpec
from pmm.store.fragment import ID_BYTES, MALFORMED, MAX_CLIPS, Fragment, Object, hexes
from pmm.store.retire import Keepers

_HEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written.

    where    the object, as a path within the store
    reason   one line
    rows     row ids of the clips that are lost by it; none where only padding or a list is hit
    sources  where those clips came from, as far as the listings tell
    """

    where: str
    reason: str
    rows: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What ``verify`` found. ``orphans`` are folders that no record names: writers that were killed."""

    damaged: tuple[Damage, ...]
    fragments: int
    objects: int
    bytes: int
    rows: int
    listings: int
    takes: int
    orphans: int

    @property
    def clean(self) -> bool:
        return not self.damaged

    def to_json(self) -> dict[str, Any]:
        return {"clean": self.clean, **asdict(self)}


@dataclass(frozen=True)
class Verified:
    """One object was read: bytes so far and in all, of this check."""

    done_bytes: int
    total_bytes: int


def verify(store: Store, on_event: Callable[[Verified], None] | None = None, quick: bool = False) -> Report:
    """Reads every byte of the store's objects and checks it against what was recorded.

    With ``quick`` the rows themselves are not read: only the sizes of their objects are checked.

    Objects against size and sha256; each clip's rows against its sum; zarr metadata, offsets and ids
    against the record; specs against their names; listings, failures and removals against their own
    sums. Reads everything anew: what ``store`` has in memory or mapped is not trusted. Changes nothing
    but that index objects which do not say what the records do are deleted, where we may.
    """
    fresh = Store(store.where, store.medium, indexed=False)
    found = fresh.fragments()
    total = sum(one.bytes for one in found)
    sources = _sources(fresh)
    damaged = [
        _told(Damage(key, reason, _rows_behind(fresh, key)), sources)
        for key, reason in fresh.problems.items()
    ]
    damaged += _missing_specs(fresh, found)
    damaged += [Damage(key, reason) for key, reason in fresh.drop_bad_indexes().items()]
    done = 0

    def passed(size: int) -> None:
        nonlocal done
        done += size
        if on_event:
            on_event(Verified(done, total))

    for one in found:
        check = _check_quickly(fresh, one, passed) if quick else _check(fresh, one, passed)
        damaged += [_told(damage, sources) for damage in check]
    return Report(
        damaged=tuple(damaged),
        fragments=len(found),
        objects=sum(len(one.objects) for one in found),
        bytes=total,
        rows=sum(len(one.lengths) for one in found),
        listings=len(fresh.listings()),
        takes=len(fresh.takes()),
        orphans=_orphans(fresh),
    )


@dataclass(frozen=True)
class Repaired:
    """What ``repair`` did.

    marked   what is not served from now on: fragments' folders, records and lists
    saved    rows that were whole in a damaged fragment and are served from another now
    lost     row ids that nothing serves any more: `pmm precompute` computes them, `pull` fetches them
    written  specs that were written anew
    left     what could not be mended, and stays in the report
    """

    marked: tuple[str, ...]
    saved: int
    lost: tuple[str, ...]
    written: tuple[str, ...]
    left: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def repair(store: Store, report: Report) -> Repaired:
    """Sets aside what ``verify`` found broken, so that whole copies serve and lost rows are missed.

    Rows that are still whole in a damaged fragment are written to another first. Nothing is deleted
    but specs, which are written anew; gc takes damaged copies once others hold all their rows. Raises
    MediumError, with that fragment as it was, where the disk cannot be read right now.
    """
    store = Store(store.where, store.medium, indexed=False)
    wheres = [damage.where for damage in report.damaged]
    folders = {"/".join(where.split("/")[:3]) for where in wheres if where.startswith("fragments/")}
    broken = [one for one in store.fragments() if one.folder in folders]
    saved = sum(_set_aside(store, one) for one in broken)
    lists = [w for w in wheres if w.startswith(("records/", "datasets/", "failures/"))]
    for where in lists:
        store.mark_damaged(where.rpartition("/")[2].partition(".")[0], "found damaged by verify")
    specs = {where for where in wheres if where.startswith("specs/")}
    written = {where for where in specs if _write_spec(store, where)}
    mended = {*folders, *lists, *written}
    return Repaired(
        marked=tuple(sorted([one.folder for one in broken] + lists)),
        saved=saved,
        lost=_unserved(store, report, broken),
        written=tuple(sorted(written)),
        left=tuple(sorted(w for w in set(wheres) if not any(w.startswith(done) for done in mended))),
    )


def _set_aside(store: Store, one: Fragment) -> int:
    """Marks a fragment that is broken, once its whole rows are in others; returns how many were written."""
    for stored in one.objects:
        with suppress(StoreCorrupt, NotFound):
            store.medium.read(f"{one.folder}/{stored.path}", 0, 1)  # a disk that is away is no damage
    if whole := Keepers(store).unheld(one, intact(store, one)):
        rewrite(store, [(one, whole)])
    store.mark_damaged(one.location, "found damaged by verify")
    return len(whole)


def _unserved(store: Store, report: Report, broken: Iterable[Fragment]) -> tuple[str, ...]:
    rows = {(one.spec_id, row) for one in broken for row in one.row_ids}
    for damage in report.damaged:
        if damage.where.startswith("records/"):
            rows |= {(damage.where.split("/")[1], row) for row in damage.rows}
    return tuple(sorted({row for spec, row in rows if row not in store.removed and not store.has(spec, row)}))


def _write_spec(store: Store, key: str) -> bool:
    """Writes a damaged spec anew from what a fragment of it says of itself."""
    spec_id = key.split("/")[1].removesuffix(".json")
    for one in store.fragments():
        if one.spec_id == spec_id:
            with suppress(PmmError, *MALFORMED):
                about = strict_json(store.medium.read(f"{one.folder}/zarr.json", 0, _HEAD_BYTES), one.folder)
                feature = canonical_json(about["attributes"]["pmm"]["feature"])
                spec = FeatureSpec.from_bytes(feature, one.folder)
                if spec.id == spec_id:
                    store.medium.delete(key)
                    return store.medium.create(key, spec.to_bytes()) == spec.to_bytes()
    return False


def _check_quickly(store: Store, one: Fragment, passed: Callable[[int], None]) -> Iterator[Damage]:
    """What is wrong with one fragment, as far as can be told without its rows."""
    passed(one.bytes)
    try:
        store.reader(one)
    except PmmError as error:
        yield Damage(one.folder, str(error), tuple(one.row_ids))


def _check(store: Store, one: Fragment, passed: Callable[[int], None]) -> Iterator[Damage]:
    """What is wrong with one fragment."""
    whole = True
    for stored in one.objects:
        reason = object_damage(store, one, stored)
        passed(stored.size)
        if reason:
            whole = False
            yield Damage(f"{one.folder}/{stored.path}", reason)
    lost, reason = _lost_rows(store, one)
    if lost:
        yield Damage(one.folder, reason, lost)
    elif not whole:
        yield Damage(one.folder, "all clips read as they were written; only padding or metadata is hit")


def object_damage(store: Store, one: Fragment, stored: Object) -> str:
    """Why this object is not the recorded one; empty if it is."""
    return fragments.object_damage(store.medium, one, stored)


def _lost_rows(store: Store, one: Fragment) -> tuple[tuple[str, ...], str]:
    """Row ids whose rows cannot be read or are not those that were written, and why."""
    names = one.row_ids
    try:
        reader = store.reader(one)
        lost = tuple(name for index, name in enumerate(names) if not reader.sum_matches(index))
    except PmmError as error:
        return tuple(names), f"no clip of this fragment can be read: {error}"
    return lost, "rows changed since they were written"


def _rows_behind(store: Store, key: str) -> tuple[str, ...]:
    """Row ids of the fragment that an unreadable record stood for, as far as its folder still tells."""
    if not key.startswith("records/"):
        return ()
    folder = f"fragments/{key.removeprefix('records/').removesuffix('.json')}"
    try:
        ids = store.medium.read(f"{folder}/clips/c/0/0", 0, MAX_CLIPS * ID_BYTES)
    except PmmError:
        return ()
    return tuple(hexes(ids[: len(ids) // ID_BYTES * ID_BYTES]))


def _missing_specs(store: Store, found: Iterable[Fragment]) -> list[Damage]:
    absent = {one.spec_id for one in found} - store.specs.keys()
    keys = [f"specs/{name}.json" for name in sorted(absent)]
    return [
        Damage(key, "missing, though fragments of this spec are there")
        for key in keys
        if key not in store.problems
    ]


def _sources(store: Store) -> dict[str, set[str]]:
    """Row id to the sources of the takes that have it."""
    found: dict[str, set[str]] = {}
    for take in store.takes():
        for row in filter(None, (take.clip.id, take.target)):
            found.setdefault(row, set()).add(take.source)
    return found


def _told(damage: Damage, sources: dict[str, set[str]]) -> Damage:
    known = sorted({source for row in damage.rows for source in sources.get(row, ())})
    return Damage(damage.where, damage.reason, damage.rows, tuple(known))


def _orphans(store: Store) -> int:
    """Fragment folders without a record, readable or not."""
    named = {entry.key.removesuffix(".json").split("/", 1)[1] for entry in store.medium.list("records")}
    folders = {"/".join(entry.key.split("/")[1:3]) for entry in store.medium.list("fragments")}
    return len(folders - named)


def contents(store: Store) -> list[tuple[Take, tuple[str, ...]]]:
    """Every listed take with the modalities that the store holds of it, in the order of ``Store.takes``."""
    specs = list(store.specs.items())

    def present(take: Take, name: str, spec: FeatureSpec) -> bool:
        bare = spec.modality == "target" and take.target is None
        return not bare and store.has(name, spec.row_id(take.clip.id, take.target))

    return [
        (take, tuple(sorted({spec.modality for name, spec in specs if present(take, name, spec)})))
        for take in store.takes()
    ]


def info(store: Store) -> dict[str, Any]:
    """What is in the store, since when, by whom and how large: JSON-able, for `pmm store info`."""
    found = store.fragments()
    takes = store.takes()
    return {
        "path": store.where,
        "format": store.about["format"],
        "created": store.about.get("created", ""),
        "bytes": sum(one.bytes for one in found),
        "features": [_feature(store, name, found) for name in _by_modality(store)],
        "takes": len(takes),
        "clips": len({take.clip.id for take in takes}),
        "hours": _hours(sum(clip.seconds for clip in {take.clip.id: take.clip for take in takes}.values())),
        "subjects": len({(take.dataset, take.subject) for take in takes}),
        "datasets": [_dataset(name, takes) for name in sorted({take.dataset for take in takes})],
        "failures": [asdict(one) for one in store.open_failures()],
        "problems": dict(store.problems),
    }


def _by_modality(store: Store) -> list[str]:
    return sorted(
        store.specs, key=lambda name: (store.specs[name].modality, store.specs[name].algorithm, name)
    )


def _feature(store: Store, name: str, found: Iterable[Fragment]) -> dict[str, Any]:
    spec = store.specs[name]
    mine = sorted((one for one in found if one.spec_id == name), key=lambda one: one.created)
    rows = store.rows(name)
    writers = Counter(f"{one.writer.get('user')}@{one.writer.get('host')}" for one in mine)
    return {
        "spec": name,
        "modality": spec.modality,
        "algorithm": spec.algorithm,
        "form": _form(spec),
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "fps": spec.fps,
        "made_with": _distinct([dict(one.made_with) for one in mine]),
        "clips": len(rows),
        "hours": _hours(_seconds(spec, sum(store.length(name, row) for row in rows))),
        "bytes": sum(one.bytes for one in mine),
        "fragments": len(mine),
        "first_written": mine[0].created if mine else "",
        "last_written": mine[-1].created if mine else "",
        "writers": sorted(writers),
    }


def _form(spec: FeatureSpec) -> str:
    """What sets this feature apart from its fullest form, for people: ``32 largest of 3503, bf16``."""
    settings, parts = spec.settings, []
    if "kept" in settings:
        parts.append(f"{settings['kept']} largest of {settings.get('vocabulary_size', '?')}")
    if "latent" in spec.algorithm:
        parts.append("latent")
    if settings.get("precision", "fp32") != "fp32":
        parts.append(str(settings["precision"]))
    return ", ".join(parts)


def _dataset(name: str, takes: Iterable[Any]) -> dict[str, Any]:
    mine = [take for take in takes if take.dataset == name]
    return {"dataset": name, "takes": len(mine), "subjects": sorted({take.subject for take in mine})}


def _seconds(spec: FeatureSpec, rows: int) -> float:
    return clock.seconds(rows, spec.fps or clock.STEPS_PER_SECOND)


def _hours(seconds: float) -> float:
    return round(seconds / 3600, 4)


def _distinct(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
