"""Carry out a plan: hear each clip once, publish what the frozen models say of it.

Everything that is published stays published: a run that is killed is run again and computes only
what is missing. One bad clip never stops the others; it leaves a Failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmm import BadInput, PmmError
from pmm.precompute import media
from pmm.precompute.claims import Claims
from pmm.precompute.datasets import find, livelink
from pmm.precompute.identities import Identities, default_path
from pmm.precompute.plan import Plan, Source, Work, batches, make_plan
from pmm.precompute.survey import Probed, Survey, one_line, survey
from pmm.store import clock, fragment, removal
from pmm.store.catalog import Failure, Store, is_there
from pmm.store.clip import target_id
from pmm.store.feature import FeatureSpec

if TYPE_CHECKING:
    from pmm.precompute.models import FrozenModels, ModelSet


@dataclass(frozen=True)
class Limits:
    """When a batch is full, when a fragment closes, and how long a run waits for clips that others claim
    while they claim nothing new."""

    batch_seconds: float = 60.0
    fragment_bytes: int = 512 << 20
    fragment_seconds: float = 600.0
    patience_seconds: float = 60.0


_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Planned:
    """Event: what is about to be done, with models called ``label``."""

    plan: Plan
    label: str


@dataclass(frozen=True)
class ClipDone:
    """Event: one clip is computed (published with its fragment). ``seconds`` of audio."""

    clip: str
    seconds: float


@dataclass(frozen=True)
class ClipFailed:
    """Event: one clip was set aside."""

    failure: Failure
    seconds: float


@dataclass(frozen=True)
class Published:
    """Event: a fragment is in the store for good."""

    modality: str
    rows: int
    bytes: int


Event = Probed | Planned | ClipDone | ClipFailed | Published


@dataclass(frozen=True)
class Outcome:
    """What a run did: clips computed, rows published by modality, fragments, bytes, failures."""

    clips: int
    rows: Mapping[str, int]
    fragments: int
    bytes: int
    failures: tuple[Failure, ...]
    clipped: int

    def to_json(self) -> dict[str, Any]:
        return {
            "clips": self.clips,
            "rows": dict(self.rows),
            "fragments": self.fragments,
            "bytes": self.bytes,
            "clipped_values": self.clipped,
            "failures": [
                {"source": one.source, "stage": one.stage, "reason": one.reason} for one in self.failures
            ],
        }


class Outbox:
    """Rows waiting to be published, one fragment in the making per spec."""

    def __init__(
        self, store: Store, made_with: Mapping[str, Any], limits: Limits, on_event: Callable[[Event], None]
    ):
        self.store, self.made_with, self.limits, self.on_event = store, made_with, limits, on_event
        self.rows: dict[str, int] = {}
        self.fragments = 0
        self.bytes = 0
        self._waiting: dict[str, tuple[FeatureSpec, list[tuple[str, np.ndarray]]]] = {}
        self._since = time.monotonic()

    def add(self, spec: FeatureSpec, row_id: str, values: np.ndarray) -> None:
        _, rows = self._waiting.setdefault(spec.id, (spec, []))
        rows.append((row_id, values))
        if sum(array.nbytes for _, array in rows) >= self.limits.fragment_bytes:
            self._publish(spec.id)

    def tick(self) -> bool:
        """Close every fragment once the oldest row has waited ``fragment_seconds``; whether that was now."""
        due = time.monotonic() - self._since >= self.limits.fragment_seconds
        if due:
            self.flush()
        return due

    def flush(self) -> None:
        for spec_id in list(self._waiting):
            self._publish(spec_id)
        self._since = time.monotonic()

    def _publish(self, spec_id: str) -> None:
        spec, rows = self._waiting[spec_id]
        del self._waiting[spec_id]
        rows = [row for row in rows if row[0] not in self.store.removed]  # while they waited
        if not rows:
            return
        self.store.publish(spec, rows, self.made_with)
        size = sum(array.nbytes for _, array in rows)
        self.rows[spec.modality] = self.rows.get(spec.modality, 0) + len(rows)
        self.fragments += 1
        self.bytes += size
        self.on_event(Published(spec.modality, len(rows), size))


def precompute(
    folders: Sequence[Path],
    store_path: Path | str,
    models: ModelSet,
    *,
    fps: int = 30,
    device: str = "auto",
    layout: str | None = None,
    limits: Limits = Limits(),
    dry_run: bool = False,
    rehash: bool = False,
    readmit: bool = False,
    on_event: Callable[[Event], None] = lambda _: None,
) -> tuple[Plan, Outcome | None]:
    """Cache what ``models`` say of every clip in ``folders``: find, plan, and (unless ``dry_run``) compute.

    Recordings that this user has named before and that have not changed since are not read again to be
    named, unless ``rehash``. Several runs over one dataset at once share the work. What was removed from
    the store on purpose is refused, unless ``readmit`` takes it back.
    What can be refused is refused before anything is read or written: missing folders, a place that
    is no store, models that cannot be had. Raises PmmError kinds; returns no Outcome for a dry run.
    """
    from pmm.precompute.models import load

    founds = [(folder, find(folder, layout)) for folder in folders]
    fresh = dry_run and not is_there(store_path)
    store = None if fresh else Store.open_or_create(store_path)
    frozen = load(models, fps=fps, device=device)
    with Identities(default_path(), fresh=rehash) as identities:
        seen = survey(founds, on_event, identities)
    specs = {**frozen.specs, "target": livelink.target_spec(fps)}
    refused: list[Failure] = []
    if store is not None:
        store.refresh()
        if readmit and not dry_run:
            _readmit(store, seen, specs)
        elif not readmit:
            seen, refused = _admitted(store, seen, specs)
    plan = make_plan(seen.sources, specs, lambda spec, row: store is not None and store.has(spec, row))
    on_event(Planned(plan, frozen.label))
    if dry_run or store is None:
        return plan, None
    for listing in seen.listings:
        store.publish_takes(listing.dataset, [source.take for source in listing.sources], listing.origin)
    done = execute(plan, store, frozen, seen.failures, limits, on_event)
    return plan, replace(done, failures=(*refused, *done.failures))


def _admitted(store: Store, seen: Survey, specs: Mapping[str, FeatureSpec]) -> tuple[Survey, list[Failure]]:
    """What was found, less the takes that were removed from the store on purpose; and those, refused.

    Raises BadInput if a whole feature set was.
    """
    for modality, spec in specs.items():
        if any(spec.id in removal.specs for removal in store.removals.values()):
            raise BadInput(
                f"the {modality} features {spec.id[:12]} were removed from {store.where} on purpose; "
                "take them back with --readmit, or choose other models"
            )
    reason = f"removed from {store.where} on purpose; --readmit takes it back"
    refused = [one for one in seen.sources if store.hides(one.take)]
    listings = tuple(
        replace(one, sources=tuple(source for source in one.sources if not store.hides(source.take)))
        for one in seen.listings
    )
    told = [Failure(one.take.clip.id, one.take.source, "refused", reason) for one in refused]
    return replace(seen, listings=listings), told


def _readmit(store: Store, seen: Survey, specs: Mapping[str, FeatureSpec]) -> None:
    hidden = [one.take for one in seen.sources if store.hides(one.take)]
    ids = {name for take in hidden for name in (take.id, take.clip.id, take.target) if name}
    removal.readmit(store, ids, {spec.id for spec in specs.values()})


def execute(
    plan: Plan,
    store: Store,
    models: FrozenModels,
    earlier_failures: Sequence[Failure] = (),
    limits: Limits = Limits(),
    on_event: Callable[[Event], None] = lambda _: None,
) -> Outcome:
    """Compute and publish the work of ``plan``.

    models            the frozen models whose specs the plan was made with
    earlier_failures  what the survey could not use: recorded durably with this run's own failures

    Interrupted (KeyboardInterrupt), it publishes what is computed, records the failures and re-raises.
    """
    run = _Run(plan, store, models, Outbox(store, models.description, limits, on_event), on_event)
    run.failures += earlier_failures
    try:
        left = run.all(plan.work)
        while left := run.not_done_elsewhere(left):
            left = run.all(left)
    finally:
        run.finish()
    box = run.outbox
    return Outcome(run.clips, box.rows, box.fragments, box.bytes, tuple(run.failures), run.clipped)


Decoded = Mapping[str, np.ndarray | Exception]


def _decoded(todo: Iterable[tuple[Work, ...]]) -> Iterator[tuple[tuple[Work, ...], Decoded]]:
    """Each batch with its audio by clip id, (n,) float32 at 16 kHz, decoded one batch ahead of the models."""
    with ThreadPoolExecutor(1) as pool:
        last: tuple[tuple[Work, ...], Future[Decoded]] | None = None
        for batch in todo:
            coming = (batch, pool.submit(_decode_batch, batch))
            if last is not None:
                yield last[0], last[1].result()
            last = coming
        if last is not None:
            yield last[0], last[1].result()


def _decode_batch(batch: Sequence[Work]) -> Decoded:
    return {item.clip.id: _try_decode(item) for item in batch if item.features}


def _try_decode(item: Work) -> np.ndarray | Exception:
    try:
        return media.decode(item.audio, item.clip)
    except (PmmError, OSError) as error:
        return error


class _Run:
    def __init__(
        self,
        plan: Plan,
        store: Store,
        models: FrozenModels,
        outbox: Outbox,
        on_event: Callable[[Event], None],
    ):
        self.specs = {share.spec.modality: share.spec for share in plan.shares}
        self.store, self.models, self.outbox, self.on_event = store, models, outbox, on_event
        self.failures: list[Failure] = []
        self.clips = 0
        self.clipped = 0
        self._claims = Claims(store, (share.spec.id for share in plan.shares))
        self._finished: set[str] = set()
        self._told = 0
        self._known_failures = frozenset(store.failures())

    def all(self, work: Sequence[Work]) -> list[Work]:
        """Computes and publishes ``work``, except what another run is at; returns that."""
        left: list[Work] = []
        for batch, waves in _decoded(self._claimed(work, left)):
            self.batch(batch, waves)
            self._finished.update(item.clip.id for item in batch)
            if self.outbox.tick():
                self._claims.release(self._finished)
        self.finish()
        return left

    def finish(self) -> None:
        """What was computed is published, what failed is recorded, and others may have the rest."""
        try:
            self.outbox.flush()
        finally:
            self.store.publish_failures(self.failures[self._told :])
            self._told = len(self.failures)
            self._claims.release_all()
        self.store.keep_index()

    def _claimed(self, work: Sequence[Work], left: list[Work]) -> Iterator[tuple[Work, ...]]:
        """Batches of what nobody else is at, each claimed when it is asked for; the others go to ``left``."""
        for batch in batches(work, self.outbox.limits.batch_seconds):
            self.store.refresh()
            missing = [item for item in batch if self._still_missing(item)]
            mine = self._claims.take([item.clip.id for item in missing])
            left += [item for item in missing if item.clip.id not in mine]
            if mine:
                yield tuple(item for item in missing if item.clip.id in mine)

    def not_done_elsewhere(self, left: Sequence[Work]) -> list[Work]:
        """What others left undone of ``left``, once they no longer claim it or do not get on."""
        while left:
            taken = self._claims.taken()
            self.store.refresh()
            failed = {one.key for one in frozenset(self.store.failures()) - self._known_failures}
            left = [one for one in left if self._still_missing(one) and one.clip.id not in failed]
            if not taken.issuperset(one.clip.id for one in left):
                return left
            if self._claims.quiet_seconds > self.outbox.limits.patience_seconds:
                self._claims.outwaited()
                return left
            time.sleep(_POLL_SECONDS)
        return []

    def batch(self, batch: Sequence[Work], waves: Decoded) -> None:
        """One batch: face tracks first (cheap; a bad one saves its clip the models), then the models."""
        batch = [fresh for item in batch if (fresh := self._still_missing(item))]
        failed: dict[str, Failure] = {}
        for item in batch:
            for source in item.targets:
                if (failure := self._target(item, source)) is not None:
                    failed[item.clip.id] = failure
        heard = [item for item in batch if item.features and item.clip.id not in failed]
        failed.update(self._features(heard, waves))
        for item in batch:
            if (failure := failed.get(item.clip.id)) is None:
                self.clips += 1
                self.on_event(ClipDone(item.clip.id, item.clip.seconds))
            else:
                self.failures.append(failure)
                self.on_event(ClipFailed(failure, item.clip.seconds))

    def _still_missing(self, item: Work) -> Work | None:
        """The part of ``item`` that no other writer has published since the plan was made."""
        has, removed = self.store.has, self.store.removed
        features = frozenset(m for m in item.features if not has(self.specs[m].id, item.clip.id))
        targets = tuple(s for s in item.targets if not has(self.specs["target"].id, s.take.target or ""))
        if item.clip.id in removed:  # since the plan was made
            return None
        targets = tuple(s for s in targets if not self.store.hides(s.take))
        return replace(item, features=features, targets=targets) if features or targets else None

    def _target(self, item: Work, source: Source) -> Failure | None:
        spec = self.specs["target"]
        assert source.target is not None
        assert source.take.target is not None
        assert spec.fps is not None
        try:
            data = livelink.read_bytes(source.target)
            if target_id(item.clip, data) != source.take.target:
                raise BadInput(
                    f"{source.target} changed while the run was under way; run pmm precompute again"
                )
            track = livelink.read_targets(source.target, spec.fps, data=data)
            livelink.check_durations(item.clip, track, source.audio, source.target)
            fragment.check(spec, [(source.take.target, track.values)])
        except (PmmError, OSError) as error:
            return Failure(item.clip.id, source.take.source, "target", one_line(error))
        self.outbox.add(spec, source.take.target, track.values)
        self.clipped += track.clipped
        return None

    def _features(self, items: Sequence[Work], waves: Decoded) -> dict[str, Failure]:
        """Run the frozen models on the clips of one batch; returns the failures by clip id."""
        failed: dict[str, Failure] = {}
        ready: list[tuple[Work, np.ndarray]] = []
        for item in items:
            wave = waves[item.clip.id]
            if isinstance(wave, Exception):
                failed[item.clip.id] = _failure(item, "decode", wave)
            else:
                ready.append((item, wave))
        for (item, wave), values in zip(ready, self._hear(ready)):
            try:
                rows = {**self._paint(item, wave), **_unwrap(values)}
                for modality in sorted(item.features):
                    fragment.check(self.specs[modality], [(item.clip.id, rows[modality])])
            except PmmError as error:
                failed[item.clip.id] = _failure(item, "features", error)
                continue
            for modality in sorted(item.features):
                self.outbox.add(self.specs[modality], item.clip.id, rows[modality])
        return failed

    def _hear(self, ready: Sequence[tuple[Work, np.ndarray]]) -> list[dict[str, np.ndarray] | Exception]:
        """Audio (S, D) and text (S, V) of every clip in the batch, or what went wrong with it."""
        if not any(item.features & {"audio", "text"} for item, _ in ready):
            return [{} for _ in ready]
        heard = self.models.speech([wave for _, wave in ready])
        return [v if isinstance(v, Exception) else {"audio": v.audio, "text": v.text} for v in heard]

    def _paint(self, item: Work, wave: np.ndarray) -> dict[str, np.ndarray]:
        """Lip frames (T, 96, 96, 3) of one clip."""
        if "image" not in item.features:
            return {}
        fps = self.specs["image"].fps
        assert fps is not None
        return {"image": self.models.lips(wave, clock.frames(item.clip.samples, item.clip.rate, fps))}


def _unwrap(values: dict[str, np.ndarray] | Exception) -> dict[str, np.ndarray]:
    if isinstance(values, Exception):
        raise values
    return values


def _failure(item: Work, stage: str, error: BaseException) -> Failure:
    return Failure(item.clip.id, item.source, stage, one_line(error))
