"""Carry out a plan: hear each clip once, publish what the frozen models say of it.

Decoding, the models and the disk work at the same time (``pipeline``). Everything that is published
stays published: a run that is killed is run again and computes only what is missing. One bad clip
never stops the others; it leaves a Failure.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmm import BadInput, PmmError
from pmm.precompute import media
from pmm.precompute.claims import Claims
from pmm.precompute.datasets import find, livelink
from pmm.precompute.forecast import Forecast, forecast, refuse_too_large
from pmm.precompute.identities import Identities, default_path
from pmm.precompute.models import Options
from pmm.precompute.pipeline import Behind, Meter, Pace, ahead
from pmm.precompute.plan import Choice, Plan, Source, Work, batches, failed_before, make_plan
from pmm.precompute.survey import Probed, Survey, labelled, one_line, survey
from pmm.store import clock, fragment, removal
from pmm.store.catalog import Failure, Store, is_there
from pmm.store.clip import target_id
from pmm.store.feature import FeatureSpec
from pmm.store.medium import MediumError

if TYPE_CHECKING:
    from pmm.precompute.models import FrozenModels, ModelSet


@dataclass(frozen=True)
class Limits:
    """When a batch is full, when a fragment closes, how long a run waits for clips that others claim
    while they claim nothing new, and how much may wait between its stages.

    decoded_bytes  audio for the models, that of the current batch included
    waiting_bytes  rows for the disk, beside those gathered for the fragments in the making
    decoders       threads that read and decode
    """

    batch_seconds: float = 60.0
    fragment_bytes: int = 512 << 20
    fragment_seconds: float = 600.0
    patience_seconds: float = 60.0
    decoded_bytes: int = 256 << 20
    waiting_bytes: int = 256 << 20
    decoders: int = 2


_POLL_SECONDS = 0.5
_LIMITS, _OPTIONS, _EVERYTHING = Limits(), Options(), Choice()


@dataclass(frozen=True)
class Planned:
    """Event: what is about to be done, with models called ``label``, and what it will take."""

    plan: Plan
    label: str
    forecast: Forecast


@dataclass(frozen=True)
class ClipDone:
    """Event: one clip of ``seconds`` is computed (published with its fragment), or set aside with why."""

    clip: str
    seconds: float
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class BatchDone:
    """Event: a batch is through the models; how the run has got on, and where its time went."""

    pace: Pace


@dataclass(frozen=True)
class Published:
    """Event: a fragment is in the store for good."""

    modality: str
    rows: int
    bytes: int


Event = Probed | Planned | ClipDone | BatchDone | Published


@dataclass(frozen=True)
class Outcome:
    """What a run did: clips computed, rows published by modality, fragments, bytes, failures.

    Of the face tracks: ``clipped`` values outside [0, 1], ``dropped`` frames that were interpolated.
    ``left`` counts the clips of the plan that a run asked to stop did not come to. ``pace`` says where
    the time went.
    """

    clips: int
    rows: Mapping[str, int]
    fragments: int
    bytes: int
    failures: tuple[Failure, ...]
    clipped: int
    dropped: int
    left: int = 0
    pace: Pace = field(default_factory=Pace)

    def to_json(self) -> dict[str, Any]:
        return {
            "clips": self.clips,
            "rows": dict(self.rows),
            "fragments": self.fragments,
            "bytes": self.bytes,
            "clipped_values": self.clipped,
            "dropped_frames": self.dropped,
            "failures": [
                {"source": one.source, "stage": one.stage, "reason": one.reason} for one in self.failures
            ],
            "clips_left": self.left,
            "pace": self.pace.to_json(),
        }


TARGETS_MADE_WITH = {"reader": "Live Link Face CSV", "libraries": {"numpy": np.__version__}}
"""Provenance of face tracks, which no model has touched."""


class Outbox:
    """Rows waiting to be published, one fragment in the making per spec. For the thread of the disk.

    published  what is in the store by now, for whoever tells the user
    """

    def __init__(
        self,
        store: Store,
        made_with: Mapping[str, Any],
        limits: Limits,
        release: Callable[[Iterable[str]], None],
    ):
        self.store, self.made_with, self.limits = store, made_with, limits
        self.rows: dict[str, int] = {}
        self.fragments = 0
        self.bytes = 0
        self.published: deque[Published] = deque()
        self._release, self._finished = release, set[str]()
        self._waiting: dict[str, tuple[FeatureSpec, list[tuple[str, np.ndarray]]]] = {}
        self._waiting_bytes: dict[str, int] = {}
        self._since = time.monotonic()

    def add(self, spec: FeatureSpec, row_id: str, values: np.ndarray) -> None:
        _, rows = self._waiting.setdefault(spec.id, (spec, []))
        rows.append((row_id, values))
        self._waiting_bytes[spec.id] = self._waiting_bytes.get(spec.id, 0) + values.nbytes
        if self._waiting_bytes[spec.id] >= self.limits.fragment_bytes:
            self._publish(spec.id)

    def done_with(self, clips: Iterable[str]) -> None:
        """All rows of these clips were added: others may know of them once those are published."""
        self._finished.update(clips)

    def tick(self) -> None:
        """Close every fragment once the oldest row has waited ``fragment_seconds``."""
        if time.monotonic() - self._since >= self.limits.fragment_seconds:
            self.flush()

    def flush(self) -> None:
        for spec_id in list(self._waiting):
            self._publish(spec_id)
        self._since = time.monotonic()
        self._release(self._finished)

    def _publish(self, spec_id: str) -> None:
        spec, rows = self._waiting[spec_id]
        admitted = [row for row in rows if row[0] not in self.store.removed]  # while they waited
        if admitted:
            made_with = TARGETS_MADE_WITH if spec.modality == "target" else self.made_with
            self.store.publish(spec, admitted, made_with)
        del self._waiting[spec_id], self._waiting_bytes[spec_id]
        if not admitted:
            return
        size = sum(array.nbytes for _, array in admitted)
        self.rows[spec.modality] = self.rows.get(spec.modality, 0) + len(admitted)
        self.fragments += 1
        self.bytes += size
        self.published.append(Published(spec.modality, len(admitted), size))


CarryOut = Callable[[Plan, Store, Sequence[Failure]], Outcome]
"""Computes and publishes the work of a plan; records the failures of the survey with its own."""


def precompute(
    folders: Sequence[Path],
    store_path: Path | str,
    models: ModelSet,
    options: Options = _OPTIONS,
    *,
    layout: str | None = None,
    choice: Choice = _EVERYTHING,
    limits: Limits = _LIMITS,
    dry_run: bool = False,
    rehash: bool = False,
    readmit: bool = False,
    on_event: Callable[[Any], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
    carry_out: CarryOut | None = None,
) -> tuple[Plan, Outcome | None]:
    """Cache what ``models`` say of every clip in ``folders``: find, plan, and (unless ``dry_run``) compute.

    Recordings that this user has named before and that have not changed since are not read again to be
    named, unless ``rehash``. Several runs over one dataset at once share the work. What was removed from
    the store on purpose is refused, unless ``readmit`` takes it back. ``choice`` says which part is to be
    computed, ``stopping`` whether to stop after the batch that is under way, ``carry_out`` who computes
    (else this process).

    What can be refused is refused before anything is read or written: missing folders, a place that
    is no store, models that cannot be had; and once the plan is made, a disk that cannot hold it.
    Raises PmmError kinds; returns no Outcome for a dry run.
    """
    founds = [(folder, find(folder, layout)) for folder in folders]
    there = is_there(store_path)
    store = Store.open_or_create(store_path) if there else None
    frozen = _load(models, options, choice)
    with Identities(default_path(), fresh=rehash) as identities:
        seen = survey(founds, on_event, identities)
    every = {**(frozen.specs if frozen else {}), "target": livelink.target_spec(options.fps)}
    specs = {modality: spec for modality, spec in every.items() if modality in choice.only}
    refused: list[Failure] = []
    if store is not None:
        store.refresh()
    seen = labelled(seen, store.listings() if store else ())
    if store is not None:
        if readmit and not dry_run:
            _readmit(store, seen, specs)
        elif not readmit:
            seen, refused = _admitted(store, seen, specs)
    by_failure = choice.retry_failed or choice.skip_failed
    open_failures = store.open_failures() if store and by_failure else []
    plan = _plan(seen, specs, store, choice, open_failures)
    wanted = forecast(plan, store_path, frozen)
    on_event(Planned(plan, frozen.label if frozen else "none are needed", wanted))
    refuse_too_large(wanted, store_path)
    if dry_run:
        return plan, None
    store = store or Store.create(store_path)
    failures = _reported(seen.failures, choice, open_failures)
    with _full_disk_explained(store):
        for share in plan.shares:
            if share.cached:
                store.publish_spec(share.spec)  # a copy of the store may have lost it
        for listing in seen.listings:
            store.publish_takes(listing.dataset, listing.takes, listing.origin)
        if carry_out is None:
            done = execute(plan, store, frozen, failures, limits, on_event, stopping)
        else:
            frozen = None  # the room is for who computes
            done = carry_out(plan, store, failures)
    return plan, replace(done, failures=(*refused, *done.failures))


@contextmanager
def _full_disk_explained(store: Store) -> Iterator[None]:
    """Adds to the error of a disk without room what to do about it."""
    try:
        yield
    except MediumError as error:
        full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
        if not full:
            raise
        raise MediumError(
            f"{one_line(error)}; what was published before is kept: free some space for {store.where} and "
            "run the same command again to go on"
        ) from None


def _load(models: ModelSet, options: Options, choice: Choice) -> FrozenModels | None:
    """The models, if what is to be computed needs any."""
    if choice.only == {"target"}:
        return None
    from pmm.precompute.models import load

    return load(models, options)


def _plan(
    seen: Survey,
    specs: Mapping[str, FeatureSpec],
    store: Store | None,
    choice: Choice,
    open_failures: Sequence[Failure],
) -> Plan:
    failed = failed_before(open_failures)

    def wanted(source: Source) -> bool:
        return failed(source) if choice.retry_failed else not (choice.skip_failed and failed(source))

    def has(spec: str, row: str) -> bool:
        return store is not None and store.has(spec, row)

    return make_plan(seen.sources, specs, has, wanted, choice.limit)


def _reported(
    failures: Sequence[Failure], choice: Choice, open_failures: Sequence[Failure]
) -> tuple[Failure, ...]:
    """What the survey could not use, less what failed just so before if that is to be skipped."""
    before = {one.key for one in open_failures} if choice.skip_failed else set()
    return tuple(one for one in failures if one.key not in before)


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
    models: FrozenModels | None,
    earlier_failures: Sequence[Failure] = (),
    limits: Limits = _LIMITS,
    on_event: Callable[[Event], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
    party: str = "",
) -> Outcome:
    """Compute and publish the work of ``plan``.

    models            the frozen models whose specs the plan was made with; None for a plan of targets only
    earlier_failures  what the survey could not use: recorded durably with this run's own failures
    stopping          asked before each batch: once true, what is computed is published and the rest left
    party             a name that processes share which have shared out one plan, and so need not claim it

    Events come in the thread that calls. Interrupted (KeyboardInterrupt), it publishes what is computed,
    records the failures and re-raises. Raises MediumError, with what was published before in place, where
    the disk is full or gone.
    """
    run = _Run(plan, store, models, limits, on_event, stopping, party)
    run.failures += earlier_failures
    try:
        left = run.all(plan.work)
        while left := run.not_done_elsewhere(left):
            left = run.all(left)
    finally:
        run.finish()
    return run.outcome()


@dataclass(frozen=True)
class _Heard:
    """What is ready for the models: a clip's face tracks or why there are none, and its sound.

    ``wave`` is (n,) float32 at 16 kHz, what went wrong with it, or None where nobody needs it.
    """

    tracks: tuple[tuple[str, livelink.Track] | Failure, ...]
    wave: np.ndarray | Exception | None

    @property
    def failures(self) -> list[Failure]:
        return [one for one in self.tracks if isinstance(one, Failure)]


class _Run:
    def __init__(
        self,
        plan: Plan,
        store: Store,
        models: FrozenModels | None,
        limits: Limits,
        on_event: Callable[[Event], None],
        stopping: Callable[[], bool],
        party: str,
    ):
        self.specs = {share.spec.modality: share.spec for share in plan.shares}
        self.store, self.models, self.limits, self.on_event = store, models, limits, on_event
        self.stopping = stopping
        self.failures: list[Failure] = []
        self.clips = 0
        self.clipped = self.dropped = 0
        self._work, self._through = plan.work, set[str]()
        self._told = 0
        self._known_failures = frozenset(store.failures())
        self._meter = Meter()
        self._claims = Claims(store, (share.spec.id for share in plan.shares), party)
        description = models.description if models else {}
        self.outbox = Outbox(store, description, limits, self._claims.release)
        self._disk = Behind(limits.waiting_bytes, self._meter, self.outbox.tick)

    def outcome(self) -> Outcome:
        box = self.outbox
        left = sum(map(self._not_come_to, self._work)) if self.stopping() else 0
        made = (self.clips, box.rows, box.fragments, box.bytes, tuple(self.failures))
        return Outcome(*made, self.clipped, self.dropped, left, self._meter.pace)

    def _not_come_to(self, item: Work) -> bool:
        return item.clip.id not in self._through and self._still_missing(item) is not None

    def all(self, work: Sequence[Work]) -> list[Work]:
        """Computes ``work`` and has it published, except what another run is at; returns that."""
        left: list[Work] = []
        groups = self._claimed(work, left)
        limits = (self.limits.decoded_bytes, self.limits.decoders)
        with closing(ahead(groups, self._prepare, _wave_bytes, *limits, self._meter)) as ready:
            for batch, heard in ready:
                if self.stopping():
                    return []
                self.batch(batch, heard)
                self._tell()
                self._through.update(item.clip.id for item in batch)
                self.on_event(BatchDone(self._meter.pace))
        self._disk.do(self.outbox.flush)
        return left

    def finish(self) -> None:
        """What was computed is published, what failed is recorded, and others may have the rest."""
        try:
            self._publish_all()
        except BaseException:
            with suppress(PmmError):  # the disk is full, say: that is the error to tell
                self._record_failures()
            raise
        else:
            self._record_failures()
        finally:
            self._claims.release_all()
        self.store.keep_index()

    def _publish_all(self) -> None:
        try:
            self._disk.do(self.outbox.flush)
        finally:
            try:
                self._disk.finish()
            finally:
                self._tell()

    def _record_failures(self) -> None:
        self.store.publish_failures(self.failures[self._told :])
        self._told = len(self.failures)

    def _tell(self) -> None:
        while self.outbox.published:
            self.on_event(self.outbox.published.popleft())

    def _claimed(self, work: Sequence[Work], left: list[Work]) -> Iterator[tuple[Work, ...]]:
        """Batches of what nobody else is at, each claimed when it is asked for; the others go to ``left``."""
        for batch in batches(work, self.limits.batch_seconds):
            self.store.refresh()
            missing = [fresh for item in batch if (fresh := self._still_missing(item))]
            mine = self._claims.take([item.clip.id for item in missing])
            left += [item for item in missing if item.clip.id not in mine]
            if mine:
                yield tuple(item for item in missing if item.clip.id in mine)

    def not_done_elsewhere(self, left: Sequence[Work]) -> list[Work]:
        """What others left undone of ``left``, once they no longer claim it or do not get on."""
        while left and not self.stopping():
            taken = self._claims.taken()
            self.store.refresh()
            failed = {one.key for one in frozenset(self.store.failures()) - self._known_failures}
            left = [one for one in left if self._still_missing(one) and one.clip.id not in failed]
            if not taken.issuperset(one.clip.id for one in left):
                return left
            if self._claims.quiet_seconds > self.limits.patience_seconds:
                self._claims.outwaited()
                return left
            time.sleep(_POLL_SECONDS)
        return []

    def batch(self, batch: Sequence[Work], heard: Sequence[_Heard]) -> None:
        """One batch through the models and on to the disk, beside its face tracks."""
        failed = {item.clip.id: ready.failures for item, ready in zip(batch, heard)}
        for ready in heard:
            self._add_tracks(ready)
        for clip_id, failure in self._features(batch, heard).items():
            failed[clip_id].append(failure)
        self._disk.do(partial(self.outbox.done_with, [item.clip.id for item in batch]))
        for item in batch:
            self.failures += failed[item.clip.id]
            self.clips += not failed[item.clip.id]
            self.on_event(ClipDone(item.clip.id, item.clip.seconds, tuple(failed[item.clip.id])))

    def _add(self, spec: FeatureSpec, row_id: str, values: np.ndarray) -> None:
        self._disk.do(partial(self.outbox.add, spec, row_id, values), values.nbytes)

    def _add_tracks(self, ready: _Heard) -> None:
        for one in ready.tracks:
            if not isinstance(one, Failure):
                name, track = one
                self._add(self.specs["target"], name, track.values)
                self.clipped += track.clipped
                self.dropped += len(track.drops)

    def _prepare(self, item: Work) -> _Heard:
        """Face tracks first (cheap): where all are bad, the models need not hear the clip."""
        tracks = tuple(self._target(item, source) for source in item.targets)
        bad = sum(isinstance(one, Failure) for one in tracks)
        needed = item.features and (item.other_takes or not tracks or bad < len(tracks))
        return _Heard(tracks, _try_decode(item) if needed else None)

    def _still_missing(self, item: Work) -> Work | None:
        """The part of ``item`` that no other writer has published since the plan was made."""
        has, removed = self.store.has, self.store.removed
        features = frozenset(m for m in item.features if not has(self.specs[m].id, item.clip.id))
        targets = tuple(s for s in item.targets if not has(self.specs["target"].id, s.take.target or ""))
        if item.clip.id in removed:  # since the plan was made
            return None
        targets = tuple(s for s in targets if not self.store.hides(s.take))
        return replace(item, features=features, targets=targets) if features or targets else None

    def _target(self, item: Work, source: Source) -> tuple[str, livelink.Track] | Failure:
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
        except Exception as error:  # whatever is wrong with one file, the others go on
            return Failure(item.clip.id, source.take.source, "target", one_line(error))
        return source.take.target, track

    def _features(self, items: Sequence[Work], heard: Sequence[_Heard]) -> dict[str, Failure]:
        """Run the frozen models on the clips of one batch; returns the failures by clip id."""
        failed: dict[str, Failure] = {}
        ready: list[tuple[Work, np.ndarray]] = []
        for item, one in zip(items, heard):
            if isinstance(one.wave, Exception):
                failed[item.clip.id] = _failure(item, "decode", one.wave)
            elif one.wave is not None:
                ready.append((item, one.wave))
        for (item, wave), values in zip(ready, self._hear(ready)):
            rows = values if isinstance(values, Exception) else self._complete(item, wave, values)
            if isinstance(rows, Exception):
                failed[item.clip.id] = _failure(item, "features", rows)
                continue
            for modality in sorted(item.features):
                self._add(self.specs[modality], item.clip.id, rows[modality])
        return failed

    def _hear(self, ready: Sequence[tuple[Work, np.ndarray]]) -> list[dict[str, np.ndarray] | Exception]:
        """Audio (S, D) and text (S, V) of every clip in the batch, or what went wrong with it.

        A batch that fails as a whole is heard clip by clip, so that only the guilty one is set aside.
        """
        if not any(item.features & {"audio", "text"} for item, _ in ready):
            return [{} for _ in ready]
        assert self.models is not None
        try:
            with self._meter.timing("models"):
                heard = self.models.speech([wave for _, wave in ready])
        except Exception as error:
            _refuse_lost_device(error)
            if len(ready) == 1:
                return [error]
            return [self._hear([one])[0] for one in ready]
        return [v if isinstance(v, Exception) else {"audio": v.audio, "text": v.text} for v in heard]

    def _complete(
        self, item: Work, wave: np.ndarray, rows: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray] | Exception:
        """The rows with the clip's lip frames, each as its spec says; or what went wrong."""
        try:
            with self._meter.timing("models"):
                rows = {**self._paint(item, wave), **rows}
            for modality in item.features:
                fragment.check(self.specs[modality], [(item.clip.id, rows[modality])])
        except Exception as error:
            _refuse_lost_device(error)
            return error
        self._meter.add("audio", item.clip.seconds)
        return rows

    def _paint(self, item: Work, wave: np.ndarray) -> dict[str, np.ndarray]:
        """Lip frames (T, 96, 96, 3) of one clip."""
        if "image" not in item.features:
            return {}
        fps = self.specs["image"].fps
        assert fps is not None
        assert self.models is not None
        return {"image": self.models.lips(wave, clock.frames(item.clip.samples, item.clip.rate, fps))}


def _try_decode(item: Work) -> np.ndarray | Exception:
    try:
        return media.decode(item.audio, item.clip)
    except Exception as error:  # whatever is wrong with one file, the others go on
        return error


def _wave_bytes(item: Work) -> int:
    return clock.resampled(item.clip.samples, item.clip.rate) * 4 if item.features else 0


def _failure(item: Work, stage: str, error: BaseException) -> Failure:
    reason = one_line(error)
    if isinstance(error, MemoryError):
        reason = (
            f"not enough memory for {item.clip.seconds:.0f} s of audio; give it more, or cut the recording"
        )
    return Failure(item.clip.id, item.source, stage, reason)


def _refuse_lost_device(error: Exception) -> None:
    """After such an error nothing runs on the device any more: no clip is to blame. Raises PmmError."""
    message = " ".join(str(error).split())[:200]
    if "CUDA error" in message:
        raise PmmError(
            f"the GPU failed ({message}); what was computed is kept: run the same command again"
        ) from error
