"""What files held when they were last read: a cache of their identities, one per user.

A clip id takes reading the whole recording; over a large dataset that is most of a second run. Here a
file is known by (path, size, times of change, inode, device), as build tools and git know it. Nothing
but speed depends on the cache: one that is missing, locked, damaged or of another version is as if
absent, and ``--rehash`` goes past it. Several processes may use it at once (SQLite).

What could deceive it, and why it does not: a file edited twice within a tick of its disk's clock (files
younger than 2 s are not trusted); one whose time was set back (its change time cannot be); a flipped bit
in the cache (each line carries its own checksum).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from pathlib import Path

_VERSION = 1
"""Counts changes of what is an identity: of ``media.probe`` or ``target_id``."""
_SETTLED_SECONDS = 2.0
_WAIT_SECONDS = 5.0
_BATCH = 500
_SCHEMA = "CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, stamp TEXT, value TEXT, sum TEXT)"

Stamp = str


def default_path() -> Path:
    """``$XDG_CACHE_HOME/pmm`` or ``~/.cache/pmm``; the version is in the name."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "pmm" / f"identities-{_VERSION}.sqlite"


def stamp(path: Path) -> Stamp | None:
    """What of a file changes when it is edited; None if it is not there or too young to tell."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    if time.time() - max(found.st_mtime, found.st_ctime) < _SETTLED_SECONDS:
        return None
    parts = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
    return " ".join(map(str, parts))


class Identities:
    """The cache at ``path``; None remembers nothing. Nothing here ever fails. Close it, or use ``with``.

    ``fresh`` trusts nothing that was found before, and writes what is found now. For one thread.
    """

    def __init__(self, path: Path | None, fresh: bool = False):
        self._path, self._fresh = path, fresh
        self._new: list[tuple[str, str, str, str]] = []
        self._database = self._open()

    def __enter__(self) -> Identities:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: Path, about: str, seen: Stamp | None) -> str | None:
        """What was found ``about`` the file when it had the stamp ``seen``."""
        if self._database is None or self._fresh or seen is None:
            return None
        name = _name(path, about)
        try:
            row = self._database.execute(
                "SELECT stamp, value, sum FROM files WHERE name = ?", (name,)
            ).fetchone()
        except sqlite3.Error as error:
            self._database = self._after(error)
            return None
        return row[1] if row and row == (seen, row[1], _sum(name, seen, row[1])) else None

    def put(self, path: Path, about: str, seen: Stamp | None, value: str) -> None:
        """Keeps ``value``, found by reading the file after it had the stamp ``seen``."""
        if self._database is None or seen is None or stamp(path) != seen:  # written to while we read
            return
        name = _name(path, about)
        self._new.append((name, seen, value, _sum(name, seen, value)))
        if len(self._new) >= _BATCH:
            self._save()

    def close(self) -> None:
        self._save()
        if self._database is not None:
            self._database.close()
            self._database = None

    def _save(self) -> None:
        """Writes what is new in one go. Where that cannot be, it is found again another time."""
        new, self._new = self._new, []
        if self._database is None or not new:
            return
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", new)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._database = self._after(error)

    def _open(self) -> sqlite3.Connection | None:
        try:
            return _connect(self._path) if self._path else None
        except (sqlite3.Error, OSError) as error:
            return self._after(error)

    def _after(self, error: Exception) -> sqlite3.Connection | None:
        """A file that is no whole database is taken away and begun anew; otherwise we do without."""
        broken = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        if broken and self._path is not None:
            with contextlib.suppress(sqlite3.Error, OSError):
                self._path.unlink()
                return _connect(self._path)
        return None


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None)
    database.execute(_SCHEMA)
    return database


def _name(path: Path, about: str) -> str:
    return hashlib.sha256(os.fsencode(about) + b"\0" + os.fsencode(os.path.abspath(path))).hexdigest()


def _sum(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
