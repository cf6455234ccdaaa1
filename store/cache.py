"""Whole fragments of a store in a bucket, kept on the local disk to be mapped.

A cache is a folder for any number of processes, runs and stores. A fragment lies in it under its own
id, which its contents decide, so nothing in it can be out of date. Each byte is checked against the
record as it comes, and the fragment gets its name only when it is whole. What was used longest ago
goes when room is needed; who has it mapped keeps what is mapped.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from pmm import BadInput, NotFound, StoreCorrupt
from pmm.store.fragment import Fragment, Reader, copy
from pmm.store.medium import LocalMedium, Medium, MediumError

DEFAULT_GB = 100.0
_STREAMS = 4
_ATTEMPTS = 3
_PATIENCE_SECONDS = 600.0
_DEAD_SECONDS = 86_400.0
_LOOK_AGAIN_SECONDS = 10.0


@dataclass(frozen=True)
class Fetched:
    """Event: bytes of fragments that are in the cache so far, and in all, for what was asked."""

    done_bytes: int
    total_bytes: int


class Cache:
    """At most ``limit`` bytes of fragments below ``folder``, which is made when first needed.

    Room is made before a fragment is fetched; what other processes fetched in the last ten seconds may
    come on top.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._needed: dict[str, int] = {}
        self._room = threading.Lock()
        self._under_way = self._used = 0
        self._look_again = 0.0

    @classmethod
    def default(cls, folder: Path | None = None, gigabytes: float | None = None) -> Cache:
        """The user's: PMM_CACHE_DIR or XDG_CACHE_HOME/pmm, of PMM_CACHE_GB (100) GB, 1e9 bytes each.

        Raises BadInput for a PMM_CACHE_GB that is no number.
        """
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pmm"
        chosen = folder or Path(os.environ.get("PMM_CACHE_DIR") or home)
        text = os.environ.get("PMM_CACHE_GB") or DEFAULT_GB
        try:
            return cls(chosen, round(1e9 * float(text if gigabytes is None else gigabytes)))
        except (ValueError, OverflowError):
            raise BadInput(f"PMM_CACHE_GB is {text!r}; a number of gigabytes was expected") from None

    def fetch(
        self, medium: Medium, wanted: Iterable[Fragment], on_event: Callable[[Fetched], None] | None = None
    ) -> None:
        """Brings all of ``wanted`` here and keeps it while this process lives.

        Raises BadInput, before anything is fetched, if there is no room for it beside what was asked
        for earlier.
        """
        distinct = {one.id: one for one in wanted}
        total = sum(one.bytes for one in distinct.values())
        needed = self._needed | {name: one.bytes for name, one in distinct.items()}
        self._refuse_more(sum(needed.values()), "one epoch reads")
        self._needed = needed
        done = 0
        with ThreadPoolExecutor(_STREAMS) as pool:
            try:
                for one in pool.map(lambda one: self._keep(medium, one), distinct.values()):
                    done += one.bytes
                    if on_event:
                        on_event(Fetched(done, total))
            finally:
                pool.shutdown(cancel_futures=True)

    def reader(self, medium: Medium, fragment: Fragment) -> Reader:
        """``fragment``, fetched from ``medium`` if it is not here, with every chunk mapped."""
        for attempt in range(_ATTEMPTS):
            kept = self._keep(medium, fragment)
            try:
                reader = Reader(LocalMedium(self.folder), kept)
                reader.map()
                return reader
            except (StoreCorrupt, NotFound):  # gone since, or changed by somebody: fetch it anew
                if attempt + 1 == _ATTEMPTS:
                    raise
                self._drop(self.folder / kept.folder)
        raise AssertionError

    def _keep(self, medium: Medium, fragment: Fragment) -> Fragment:
        """Fetches ``fragment`` unless it is here; returns it as it lies here."""
        kept = replace(fragment, location=fragment.id)
        place = self.folder / kept.folder
        if not place.is_dir():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._turn(fragment.id[:2]):
                if not place.is_dir():
                    self._fetch(medium, fragment, place)
        with suppress(FileNotFoundError):
            os.utime(place)
        return kept

    def _fetch(self, medium: Medium, fragment: Fragment, place: Path) -> None:
        self._make_room(fragment.bytes)  # counts them as under way
        try:
            draft = copy(medium, fragment, LocalMedium(self.folder))
            try:
                os.rename(self.folder / draft.folder, place)
            except OSError:  # somebody else was first
                shutil.rmtree(self.folder / draft.folder, ignore_errors=True)
        finally:
            with self._room:
                self._under_way -= fragment.bytes

    def _make_room(self, size: int) -> None:
        """Counts ``size`` bytes as taken; drops what was used longest ago if they do not fit."""
        self._refuse_more(size, "one fragment has")
        with self._room:
            self._under_way += size
            self._used += size
            if self._used > self.limit or time.monotonic() > self._look_again:
                self._look()

    def _look(self) -> None:
        """Counts what is here, by other processes too, and drops what is too much."""
        kept = sorted(self._folders(), key=lambda one: one[0])
        self._used = sum(size for _, size, _ in kept) + self._under_way
        for _, size, folder in kept:
            if self._used <= self.limit:
                break
            if folder.name not in self._needed:
                self._drop(folder)
                self._used -= size
        self._look_again = time.monotonic() + _LOOK_AGAIN_SECONDS

    def _refuse_more(self, size: int, what: str) -> None:
        if size > self.limit:
            raise BadInput(
                f"{what} {size:,} bytes, and the cache in {self.folder} may hold {self.limit:,}; "
                "give it more by --cache-gb or PMM_CACHE_GB"
            )

    def _folders(self) -> Iterator[tuple[float, int, Path]]:
        """When each fragment was last used, its bytes, where it lies. Drops what killed fetches left."""
        for folder in (one for begin in _inside(self.folder / "fragments") for one in _inside(begin)):
            with suppress(FileNotFoundError):
                used = folder.stat().st_mtime
                if len(folder.name) == 64:
                    yield used, sum(one.stat().st_size for one in folder.rglob("*") if one.is_file()), folder
                elif time.time() - used > _DEAD_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    def _drop(self, folder: Path) -> None:
        """Out of the way first: a fragment is never seen half gone."""
        away = folder.with_name(uuid4().hex)
        with suppress(FileNotFoundError):
            os.rename(folder, away)
            shutil.rmtree(away, ignore_errors=True)

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """Waits while another process fetches the same: nothing but double work depends on this lock."""
        path = self.folder / f"lock-{name}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MediumError(f"cannot use the cache in {self.folder}: {error.strerror}") from None
        try:
            until = time.monotonic() + _PATIENCE_SECONDS
            while not _lock(fd) and time.monotonic() < until:
                time.sleep(0.1)
            yield
        finally:
            os.close(fd)


def _inside(folder: Path) -> list[Path]:
    """What lies in ``folder``; nothing if it went since it was listed, as drafts of folders do."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return True
    return True
