"""Whether a disk or a bucket can keep the promises of a store, tried out in that very place.

Everything rests on one thing: of several writers who create the same name, one succeeds, and all
learn what it wrote. A place where that fails is refused before anything is written to it. Probes
are objects in ``tmp/``, taken away again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from uuid import uuid4

from pmm import NotFound, PmmError
from pmm.store.medium import LocalMedium, Medium, MediumError, file_system, on_network
from pmm.store.remote import ObjectMedium, is_address, medium_at

GOOD, WARNING, REFUSED = "good", "warning", "refused"
_ROUNDS = 4


@dataclass(frozen=True)
class Finding:
    """What was tried, how it went (good, warning or refused), and what was seen, one line."""

    probe: str
    state: str
    seen: str


def examine(where: Path | str) -> list[Finding]:
    """Tries everything out at ``where``. A probe that cannot be made at all is refused, with the reason.

    Raises NotFound where there is no such folder.
    """
    if not is_address(where) and not Path(where).is_dir():
        raise NotFound(f"there is no folder {where} to try out; make it, with the permissions it is to have")
    medium = medium_at(where)
    probes: list[tuple[str, Callable[[Medium], Iterator[Finding]]]] = [("write", _objects), ("create", _once)]
    if isinstance(medium, LocalMedium):
        probes += [("rename", _rename), ("permissions", _permissions), ("disk", _disk)]
    if isinstance(medium, ObjectMedium):
        probes += [("uploads", _uploads)]
    found: list[Finding] = []
    for name, probe in probes:
        try:
            found += probe(medium)
        except (PmmError, OSError) as error:
            found.append(Finding(name, REFUSED, " ".join(str(error).split())))
        if any(one.state == REFUSED for one in found):
            break  # what follows would only say it again
    return found


def insist(where: Path | str) -> None:
    """Raises MediumError where a store would not be safe."""
    for one in examine(where):
        if one.state == REFUSED:
            raise MediumError(f"no store can be kept at {where}: {one.seen}; put it in another place")


def _probe() -> str:
    return f"tmp/{uuid4().hex}"


def _objects(medium: Medium) -> Iterator[Finding]:
    """An object is there once written: whole, listed, mapped."""
    key, data = _probe(), os.urandom(70_000)
    medium.write(key, [data[:1], data[1:]])
    medium.sync("tmp")
    if medium.read(key, 0, len(data) + 1) != data or medium.map(key, len(data))[:] != data:
        yield Finding("write", REFUSED, "an object does not read as it was written")
    elif (key, len(data)) not in [(one.key, one.size) for one in medium.list("tmp")]:
        yield Finding("write", REFUSED, "an object that was written is not listed")
    else:
        yield Finding("write", GOOD, "an object is read, mapped and listed as soon as it is written")
    try:
        medium.delete(key)
    except MediumError as error:
        yield Finding("delete", WARNING, f"{error}; `pmm store gc` cannot work here")


def _once(medium: Medium) -> Iterator[Finding]:
    """A name is created once: one after the other, and two at once."""
    key = _probe()
    if medium.create(key, b"first") != b"first" or medium.create(key, b"second") != b"first":
        yield Finding("create", REFUSED, f"{_overwritten(medium)}: a name that was taken was written again")
        return
    yield Finding("create", GOOD, "a name that is taken stays as it is, and its second writer learns so")
    _forget(medium, key)
    for _ in range(_ROUNDS):
        key = _probe()
        answers = _race(medium, key)
        if answers != {medium.read(key, 0, 100)}:
            yield Finding(
                "race", REFUSED, f"{_overwritten(medium)}: two who create one name at once both succeed"
            )
            return
        _forget(medium, key)
    yield Finding("race", GOOD, f"of two who create one name at once one succeeds, {_ROUNDS} times")


def _race(medium: Medium, key: str) -> set[bytes]:
    """What two writers are told who create ``key`` at once."""
    start = Barrier(2)

    def create(data: bytes) -> bytes:
        start.wait(60)
        return medium.create(key, data)

    with ThreadPoolExecutor(2) as pool:
        return set(pool.map(create, (b"one", b"two")))


def _overwritten(medium: Medium) -> str:
    if isinstance(medium, ObjectMedium):
        return "the server does not honour `If-None-Match: *`"
    return "the disk does not keep hard links apart"


def _forget(medium: Medium, key: str) -> None:
    with suppress(MediumError):  # that was told by the first probe
        medium.delete(key)


def _rename(medium: Medium) -> Iterator[Finding]:
    """A folder never takes the place of another that is in use."""
    assert isinstance(medium, LocalMedium)
    full, other = (medium.root / _probe() for _ in range(2))
    full.mkdir(parents=True)
    other.mkdir()
    (full / "inside").touch()
    try:
        os.rename(other, full)
        yield Finding("rename", REFUSED, "a folder can be renamed over one that is not empty")
    except OSError:
        yield Finding("rename", GOOD, "a folder is not renamed over one that is not empty")
    finally:
        (full / "inside").unlink(missing_ok=True)
        for folder in (full, other):
            with suppress(OSError):
                folder.rmdir()


def _permissions(medium: Medium) -> Iterator[Finding]:
    """New folders and objects are open to whom the root is open."""
    assert isinstance(medium, LocalMedium)
    wanted = stat.S_IMODE(os.stat(medium.root).st_mode)
    key = _probe()
    medium.write(key, [b"probe"])
    object_mode = stat.S_IMODE(os.stat(medium.root / key).st_mode)
    folder_mode = stat.S_IMODE(os.stat((medium.root / key).parent).st_mode)
    _forget(medium, key)
    if (object_mode, folder_mode) != (wanted & 0o444, wanted):
        yield Finding(
            "permissions",
            WARNING,
            f"folders get mode {folder_mode:o} and not the store's {wanted:o}: who shares "
            "this disk may be locked out",
        )
    elif wanted & stat.S_IWGRP and not wanted & stat.S_ISGID:
        yield Finding(
            "permissions",
            WARNING,
            f"the group may write, and new folders get each writer's own group: chmod g+s {medium.root}",
        )
    else:
        yield Finding("permissions", GOOD, f"new folders get the store's mode {wanted:o} whatever the umask")


def _disk(medium: Medium) -> Iterator[Finding]:
    assert isinstance(medium, LocalMedium)
    kind = file_system(medium.root)
    if on_network(medium.root):
        yield Finding(
            "disk",
            WARNING,
            f"{kind}: all this was tried from one machine only; rows are read here rather than mapped",
        )
    elif kind:
        yield Finding("disk", GOOD, kind)


def _uploads(medium: Medium) -> Iterator[Finding]:
    """Uploads of killed writers, which cost money and are in no listing of objects."""
    assert isinstance(medium, ObjectMedium)
    try:
        found = medium.unfinished_uploads()
    except PmmError as error:
        yield Finding("uploads", WARNING, str(error))
        return
    if found:
        yield Finding(
            "uploads",
            WARNING,
            f"{len(found)} uploads were begun and never finished (the first: {found[0]}); they "
            "are stored and paid for until a lifecycle rule (AbortIncompleteMultipartUpload) removes them",
        )
    else:
        yield Finding("uploads", GOOD, "no unfinished uploads")
