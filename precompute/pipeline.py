"""Three stages at once: decoding ahead of the models, the models, and the disk behind them.

The thread that calls is the models' own. ``ahead`` makes what comes next in a few threads; ``Behind``
does what comes after in one. Both hold a bounded number of bytes, so that a slow stage stops those
before it rather than filling the memory, and both keep the order, so that timing changes no result.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_HARDLY = 0.1
"""Models that stand still for less than this share of the time are what the run waits for."""


@dataclass(frozen=True)
class Pace:
    """How much was done in how much time, and which stage the time went to; all since a run began.

    audio     seconds of audio through the models
    elapsed   seconds by the clock
    decode    seconds that decoding was busy, summed over its threads
    models    seconds that the models were busy
    disk      seconds that the disk (hashing, writing, syncing) was busy
    for_decode, for_disk  seconds that the models stood still for either

    ``models + for_decode + for_disk`` is the whole time of the models' thread, but for trifles.
    """

    audio: float = 0.0
    elapsed: float = 0.0
    decode: float = 0.0
    models: float = 0.0
    disk: float = 0.0
    for_decode: float = 0.0
    for_disk: float = 0.0

    def __sub__(self, earlier: Pace) -> Pace:
        """What happened since ``earlier``."""
        mine, theirs = ([getattr(one, f.name) for f in fields(Pace)] for one in (self, earlier))
        return Pace(*(a - b for a, b in zip(mine, theirs)))

    def __add__(self, other: Pace) -> Pace:
        """Of two runs: ``speed`` is then that of one process, on average."""
        mine, theirs = ([getattr(one, f.name) for f in fields(Pace)] for one in (self, other))
        return Pace(*(a + b for a, b in zip(mine, theirs)))

    @property
    def speed(self) -> float:
        """Seconds of audio per second."""
        return self.audio / self.elapsed if self.elapsed else 0.0

    @property
    def bottleneck(self) -> str:
        """The stage that the others wait for: decode, models or disk."""
        still = self.for_decode + self.for_disk
        if still <= _HARDLY * (still + self.models):
            return "models"
        return "decode" if self.for_decode >= self.for_disk else "disk"

    def to_json(self) -> dict[str, float | str]:
        told = {field.name: round(getattr(self, field.name), 3) for field in fields(self)}
        return {**told, "speed": round(self.speed, 3), "bottleneck": self.bottleneck}


class Meter:
    """Where the time goes, measured: a Pace that several threads add to."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._pace = Pace()

    @property
    def pace(self) -> Pace:
        return replace(self._pace, elapsed=time.perf_counter() - self._began)

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to that field of the Pace."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._pace = replace(self._pace, **{stage: getattr(self._pace, stage) + seconds})


class _Room:
    """What may be in the making at once: so many groups, and so many bytes unless there is only one."""

    def __init__(self, groups: int, limit_bytes: int):
        self._groups, self._limit = groups, limit_bytes
        self._open, self._bytes = 0, 0
        self._closed = False
        self._changed = threading.Condition()

    def enter(self) -> bool:
        """Waits for the place of a group; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._open < self._groups)
            self._open += 1
            return not self._closed

    def fill(self, size: int) -> bool:
        """Waits for so many bytes, which a group has entered with; False once closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._bytes or self._bytes + size <= self._limit
            )
            self._bytes += size
            return not self._closed

    def leave(self, size: int) -> None:
        with self._changed:
            self._open, self._bytes = self._open - 1, self._bytes - size
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


_GROUPS_AHEAD = 2


@dataclass(frozen=True)
class _Coming(Generic[T, R]):
    group: Sequence[T]
    results: list[Future[R]]
    bytes: int


def ahead(
    groups: Iterator[Sequence[T]],
    prepare: Callable[[T], R],
    size: Callable[[T], int],
    limit_bytes: int,
    threads: int,
    meter: Meter,
) -> Generator[tuple[Sequence[T], list[R]], None, None]:
    """Each group with what ``prepare`` makes of its members, in order, made while the caller is busy.

    groups       advanced in a thread of its own, at most two groups further than the caller is
    size         bytes that ``prepare`` will make of a member; ``limit_bytes`` bounds all that is there at
                 once, the group the caller has included (a single larger group goes alone)

    What ``groups`` or ``prepare`` raise is raised here, in its turn. Close it (``contextlib.closing``).
    """
    room = _Room(_GROUPS_AHEAD + 1, limit_bytes)
    coming: SimpleQueue[_Coming[T, R] | BaseException | None] = SimpleQueue()
    pool = ThreadPoolExecutor(threads, "decode")

    def timed(item: T) -> R:
        with meter.timing("decode"):
            return prepare(item)

    def feed() -> None:
        try:
            while room.enter() and (group := next(groups, None)) is not None:
                bytes_due = sum(map(size, group))
                if not room.fill(bytes_due):
                    return
                coming.put(_Coming(group, [pool.submit(timed, item) for item in group], bytes_due))
            coming.put(None)
        except BaseException as error:  # raised again where the results are awaited
            coming.put(error)

    feeder = threading.Thread(target=feed, name="claims", daemon=True)
    feeder.start()
    try:
        while True:
            with meter.timing("for_decode"):
                one = coming.get()
                if one is None:
                    return
                if isinstance(one, BaseException):
                    raise one
                results = [future.result() for future in one.results]
            yield one.group, results
            room.leave(one.bytes)
            del one, results
    finally:
        room.close()
        feeder.join()
        pool.shutdown(cancel_futures=True)


class Behind:
    """One thread that does what it is given in order, while the caller goes on.

    limit_bytes  bounds what waits; ``do`` blocks until there is room (a single larger one goes alone)
    idle         called in that thread after each job, and once a second where there is none

    What a job raises stops all that follow, and is raised by the next ``do``, ``check`` or ``finish``.
    """

    def __init__(self, limit_bytes: int, meter: Meter, idle: Callable[[], None] = lambda: None):
        self._limit, self._meter, self._idle = limit_bytes, meter, idle
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._waiting = 0
        self._busy = self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="disk", daemon=True)
        self._thread.start()

    def do(self, job: Callable[[], None], size: int = 0) -> None:
        with self._changed:
            if self._waiting and self._waiting + size > self._limit:
                with self._meter.timing("for_disk"):
                    self._changed.wait_for(lambda: self._error or not self._waiting or self._fits(size))
            self._raise()
            self._jobs.append((job, size))
            self._waiting += size
            self._changed.notify_all()

    def check(self) -> None:
        """Raises what stopped it."""
        with self._changed:
            self._raise()

    def finish(self) -> None:
        """Waits until all is done, and ends the thread."""
        try:
            with self._meter.timing("for_disk"), self._changed:
                self._changed.wait_for(lambda: self._error or not (self._jobs or self._busy))
                self._raise()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._thread.join()

    def _fits(self, size: int) -> bool:
        return self._waiting + size <= self._limit

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while self._next():
                pass
        except BaseException as error:  # raised again by whoever waits for us
            with self._changed:
                self._error = error
                self._jobs.clear()
                self._changed.notify_all()

    def _next(self) -> bool:
        """Does the next job, or none for a second; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ended, timeout=1.0)
            if self._ended:
                return False
            job, size = self._jobs.popleft() if self._jobs else (lambda: None, 0)
            self._busy = True
        with self._meter.timing("disk"):
            job()
            self._idle()
        with self._changed:
            self._busy = False
            self._waiting -= size
            self._changed.notify_all()
        return True
