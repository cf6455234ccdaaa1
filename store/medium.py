"""The one layer every byte of a store passes: seven verbs, here for a local disk.

Keys are paths within the store with ``/`` between names. Nothing here knows what a fragment or a
record is, and nothing above here opens a file: another medium (an object store) or injected faults
need no change elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import resource
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from pmm import BadInput, NotFound, PmmError, StoreCorrupt

Buffer = bytes | memoryview
_KEY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DRAFTS = "tmp"
_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "fuse",
    "9p",
    "afs",
    "virtiofs",
)
_SMALL = 1 << 16
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no links, no waiting on a pipe


class MediumError(PmmError, OSError):
    """The disk refused: full, read-only, not permitted, or broken."""


@dataclass(frozen=True)
class Entry:
    """One object: its key, its size in bytes, and when it was last written.

    ``modified`` is in seconds by the clock of the medium itself, and compares only with that of
    another object of the same medium: no clock of ours need agree with it.
    """

    key: str
    size: int
    modified: float


class Medium(Protocol):
    """Where a store lies. ``safe``: rows are read rather than mapped, as it may vanish under the map."""

    safe: bool

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object below ``prefix``, in no order. Foreign names, links and drafts are not shown."""

    def read(self, key: str, start: int, length: int) -> bytes:
        """At most ``length`` bytes from ``start``. Raises NotFound."""

    def map(self, key: str, size: int) -> mmap.mmap:
        """The whole object, mapped to be read. Raises StoreCorrupt unless it has ``size`` bytes."""

    def write(self, key: str, blocks: Iterable[Buffer]) -> None:
        """A new object, on the disk when this returns. Only for names that nobody else may choose."""

    def sync(self, prefix: str) -> None:
        """Every folder at, below and above ``prefix`` is on the disk when this returns."""

    def create(self, key: str, data: bytes) -> bytes:
        """The create-once verb: returns what ``key`` holds now, ``data`` or what stood there before.

        Afterwards the whole of it is durable; at no instant can a part of it be seen. A lost reply
        to our own success looks like a name already taken, so the caller compares the bytes.
        """

    def delete(self, key: str) -> None:
        """Removes one object; it is no error if it is gone already."""


def is_key(key: str) -> bool:
    """Whether ``key`` can be a name of ours, and then only within the store."""
    return all(_KEY_NAME.fullmatch(name) for name in key.split("/"))


def check_key(key: str) -> str:
    """``key`` if it can only lie within the store. Raises BadInput."""
    if not is_key(key):
        raise BadInput(f"{key!r} is no name within a store: only a-z 0-9 . _ - and / between names")
    return key


def nothing(operation: str, key: str) -> None:
    """What happens before an operation on the disk, unless a test asks for more."""


def file_system(path: Path) -> str:
    """The kind of file system ``path`` lies on; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        above = [mount for mount in mounts if path.is_relative_to(_unescaped(mount[4]))]
        nearest = max(above, key=lambda mount: len(mount[4]))
        return nearest[nearest.index("-") + 1]
    return ""


def on_network(path: Path) -> bool:
    return file_system(path).startswith(_NETWORK)


def _unescaped(mount: str) -> str:
    """A path as /proc spells it: blanks and backslashes as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount)


def make_root(path: Path) -> None:
    """Makes the folder that is to hold a store, and its name durable. Raises MediumError."""
    try:
        new = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for one in new:
            fd = os.open(one.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise MediumError(f"cannot make a store at {path}: {error.strerror}") from None


class LocalMedium:
    """A folder on a POSIX disk.

    New folders take the mode of the root with its setgid bit, objects its read bits: what the
    umask of one writer would hide stays open to the team. ``before`` is called with the name of each
    operation and its key before the disk is touched; recording and faults go there. ``safe`` is for
    network disks, and taken for granted on those we know: what was mapped there ends the process
    (SIGBUS) when the server is lost or somebody truncates a file.
    """

    def __init__(self, root: Path, before: Callable[[str, str], None] = nothing, safe: bool | None = None):
        self.root = Path(os.path.realpath(root))
        self.safe = on_network(self.root) if safe is None else safe
        self._before = before

    def list(self, prefix: str) -> Iterator[Entry]:
        yield from self._walk(self._inside(prefix), prefix)

    def read(self, key: str, start: int, length: int) -> bytes:
        with self._opened(key) as fd:
            return _pread(fd, start, length)

    def map(self, key: str, size: int) -> mmap.mmap:
        with self._opened(key) as fd:
            found = os.fstat(fd).st_size
            if found != size:
                raise StoreCorrupt(f"{self.root / key} has {found} bytes, its record says {size}")
            _leave_room(fd)
            return mmap.mmap(fd, size, access=mmap.ACCESS_READ)

    def write(self, key: str, blocks: Iterable[Buffer]) -> None:
        path = self._inside(key)
        self._folder(path.parent)
        with self._told("write", key):
            self._before("open", key)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                self._fill(fd, key, blocks)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                raise
            finally:
                os.close(fd)

    def sync(self, prefix: str) -> None:
        top = self._inside(prefix)
        with self._told("sync", prefix):
            for folder, _, _ in os.walk(top, topdown=False):
                self._sync_folder(Path(folder))
        self._sync_above(top)

    def create(self, key: str, data: bytes) -> bytes:
        final = self._inside(key)
        self._folder(final.parent)
        draft = f"{_DRAFTS}/{uuid4().hex}"
        self.write(draft, [data])
        with self._told("create", key):
            try:
                self._before("link", key)
                os.link(self.root / draft, final)
            except FileExistsError:
                data = self.read(key, 0, max(len(data), _SMALL) + 1)  # a longer one is another one anyway
            except FileNotFoundError:  # `gc` took the draft for a dead writer's
                return self.create(key, data)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise
                raise MediumError(
                    f"{self.root} is on a disk without hard links, on which no record can be created "
                    "safely; put the store on another disk"
                ) from None
            finally:
                with contextlib.suppress(OSError):  # a draft left behind is only litter
                    os.unlink(self.root / draft)
        self._sync_above(final)
        return data

    def delete(self, key: str) -> None:
        path = self._inside(key)
        with self._told("delete", key), contextlib.suppress(FileNotFoundError):
            self._before("delete", key)
            os.unlink(path)
        with contextlib.suppress(OSError):  # folders of one fragment go with their last object
            for folder in list(path.relative_to(self.root).parents)[:-3]:
                os.rmdir(self.root / folder)

    # -- below the verbs

    def _walk(self, folder: Path | str, prefix: str) -> Iterator[Entry]:
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._refused("list", prefix, error) from None
        for entry in entries:
            key = f"{prefix}/{entry.name}"
            if not _KEY_NAME.fullmatch(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(entry.path, key)
            elif entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                    found = entry.stat(follow_symlinks=False)
                    yield Entry(key, found.st_size, found.st_mtime)

    def _inside(self, key: str) -> Path:
        """The path of ``key``. Raises StoreCorrupt if a link on the way leads elsewhere."""
        at = str(self.root)
        for name in check_key(key).split("/")[:-1]:
            at = f"{at}/{name}"
            if os.path.islink(at):
                raise StoreCorrupt(f"{self.root / key} lies behind a symbolic link, {at}; remove the link")
        return self.root / key

    def _mode(self) -> int:
        return stat.S_IMODE(os.stat(self.root).st_mode)

    def _folder(self, path: Path) -> None:
        """Makes ``path`` and its parents. Each is moved into place once its mode is right, so that a
        kill in between locks nobody out."""
        if path == self.root or path.is_dir():
            return
        self._folder(path.parent)
        key = str(path.relative_to(self.root))
        draft = path.parent / f".{uuid4().hex}"
        with self._told("make a folder at", key):
            self._before("mkdir", key)
            os.mkdir(draft)
            try:
                with contextlib.suppress(PermissionError):
                    os.chmod(draft, self._mode())
                os.rename(draft, path)
            except OSError as error:
                os.rmdir(draft)
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # these: another writer was first
                    raise

    def _fill(self, fd: int, key: str, blocks: Iterable[Buffer]) -> None:
        for block in blocks:
            self._before("write", key)
            _write_all(fd, block)
        with contextlib.suppress(PermissionError):  # disks without modes
            os.fchmod(fd, self._mode() & 0o444)
        self._fsync(fd, key)

    def _fsync(self, fd: int, key: str) -> None:
        self._before("fsync", key)
        if sys.platform == "darwin":  # where fsync alone stops at the drive's cache
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def _sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._fsync(fd, str(path.relative_to(self.root)))
        finally:
            os.close(fd)

    def _sync_above(self, path: Path) -> None:
        with self._told("sync", str(path.relative_to(self.root))):
            while path != self.root:
                path = path.parent
                self._sync_folder(path)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        path = self._inside(key)
        with self._told("read", key):
            fd = os.open(path, _READ)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise StoreCorrupt(f"{path} is not a regular file")
                yield fd
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _told(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._refused(doing, key, error) from None

    def _refused(self, doing: str, key: str, error: OSError) -> PmmError:
        if isinstance(error, PmmError):
            return error
        if isinstance(error, FileNotFoundError):
            return NotFound(f"{self.root / key} is not there")
        reason = os.strerror(error.errno) if error.errno else str(error)
        refused = MediumError(f"cannot {doing} {self.root / key}: {reason}")
        refused.errno = error.errno
        return refused


def _leave_room(fd: int) -> None:
    """A mapping keeps its file open: before those run out, asks the system for as many again."""
    next_free = os.dup(fd)  # about as many as are open
    os.close(next_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if next_free > soft - 64 and soft != hard:
        most = 2 * soft if hard == resource.RLIM_INFINITY else min(2 * soft, hard)
        with contextlib.suppress(OSError, ValueError):  # the mapping itself will tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _write_all(fd: int, block: Buffer) -> None:
    view = memoryview(block).cast("B")
    while view:
        written = os.write(fd, view)  # may come short, on a disk that fills or a signal
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[written:]


def _pread(fd: int, start: int, length: int) -> bytes:
    """A read may come short before the end (signals, network disks): ask until nothing more comes."""
    length = max(0, min(length, os.fstat(fd).st_size - start))
    parts = []
    while length and (part := os.pread(fd, length, start)):
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return b"".join(parts)
