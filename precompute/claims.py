"""Who is at which clips right now, so that several runs over one dataset share the work.

A claim is a small object in the store's ``tmp/``, where nothing is ever needed: it names a run and the
clips of one batch. Before a batch, a run looks which clips the others claim and leaves those for the end.
Only speed depends on claims. One that is missed, or left by a run that was killed, means that a clip is
computed twice or a while later; the store serves one of the copies, and they are equal.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import uuid4

from pmm import PmmError
from pmm.store.catalog import Store
from pmm.store.digest import sealed, unsealed
from pmm.store.fragment import MALFORMED

_FOLDER, _PREFIX, _ENDING = "tmp", "claim-", ".json"
_LARGEST = 16 << 20


@dataclass(frozen=True)
class Claim:
    """Clips that a run, process ``pid`` of ``host``, is about to compute under some of ``specs``."""

    host: str
    pid: int
    specs: frozenset[str]
    clips: frozenset[str]
    party: str = ""

    @property
    def abandoned(self) -> bool:
        """Whether its process is known to be gone: only that of this machine can be asked for."""
        if self.host != _host():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


class Claims:
    """This run's claims on clips of one store, and its view of the others'.

    ``quiet_seconds`` is how long the others have been seen to claim nothing new: by our own clock, no
    two of which need agree. One thread may take while another releases.

    Processes of one ``party`` have shared the work out among themselves: they ignore each other's claims,
    so that what one of them left when it died holds nobody up.
    """

    def __init__(self, store: Store, specs: Iterable[str], party: str = ""):
        self._store, self._specs, self._party = store, frozenset(specs), party
        self._mine: dict[str, frozenset[str]] = {}
        self._others: dict[str, Claim | None] = {}
        self._partners: set[str] = set()
        self._outwaited: frozenset[str] = frozenset()
        self._changed = time.monotonic()
        self._lock = threading.RLock()

    @property
    def quiet_seconds(self) -> float:
        return time.monotonic() - self._changed

    def taken(self) -> frozenset[str]:
        """Clips that other runs, as far as we know alive, have claimed under any of our specs."""
        with self._lock:
            self._look()
            return self._theirs(self._others)

    def take(self, clips: Sequence[str]) -> frozenset[str]:
        """Claims those of ``clips`` that nobody has; returns them. Of two at once the lower name wins."""
        with self._lock:
            return self._take(clips)

    def _take(self, clips: Sequence[str]) -> frozenset[str]:
        free = frozenset(clips) - self.taken()
        if not free:
            return free
        key = f"{_FOLDER}/{_PREFIX}{uuid4().hex}{_ENDING}"
        told = {
            "host": _host(),
            "pid": os.getpid(),
            "specs": sorted(self._specs),
            "clips": sorted(free),
            "party": self._party,
        }
        with suppress(PmmError):  # where claims cannot be written, work is shared less
            self._store.medium.create(key, sealed(told))
            self._mine[key] = free
        self._look()
        return free - self._theirs(name for name in self._others if name < key)

    def release(self, clips: Iterable[str]) -> None:
        """Lets go of the claims all of whose clips are among ``clips``: published, or failed."""
        done = frozenset(clips)
        with self._lock:
            for key in [key for key, held in self._mine.items() if held <= done]:
                del self._mine[key]
                self._delete(key)

    def release_all(self) -> None:
        with self._lock:
            self.release(frozenset().union(*self._mine.values()))

    def outwaited(self) -> None:
        """The claims that stand now are not respected any more, if the others are quiet."""
        self._outwaited = frozenset(self._others)

    def _theirs(self, names: Iterable[str]) -> frozenset[str]:
        claims = [claim for name in names if name not in self._outwaited and (claim := self._others[name])]
        live = [one for one in claims if not one.specs.isdisjoint(self._specs) and not one.abandoned]
        return frozenset().union(*(one.clips for one in live))

    def _look(self) -> None:
        names = {entry.key for entry in self._store.medium.list(_FOLDER) if _is_claim(entry.key)}
        names -= self._mine.keys() | self._partners
        read = {key: self._read(key) for key in names - self._others.keys()}
        self._partners |= {
            key for key, one in read.items() if one and self._party and one.party == self._party
        }
        names -= self._partners
        if names != self._others.keys():
            self._changed = time.monotonic()
        self._others = {key: one for key, one in (self._others | read).items() if key in names}
        for key in [key for key, one in self._others.items() if one and one.abandoned]:
            del self._others[key]
            self._delete(key)

    def _read(self, key: str) -> Claim | None:
        try:
            value = unsealed(self._store.medium.read(key, 0, _LARGEST), key)
            specs, clips = frozenset(value["specs"]), frozenset(value["clips"])
            host, pid, party = str(value["host"]), int(value["pid"]), str(value.get("party", ""))
            return Claim(host, pid, specs, clips, party)
        except (PmmError, *MALFORMED):
            return None

    def _delete(self, key: str) -> None:
        with suppress(PmmError):
            self._store.medium.delete(key)


def _is_claim(key: str) -> bool:
    return key.startswith(f"{_FOLDER}/{_PREFIX}") and key.endswith(_ENDING)


def _host() -> str:
    """The machine and, in containers, the namespace in which a process id means something."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
