"""What a broken disk does to a store: power that goes, writes that fail, a disk that is full."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pmm import PmmError, StoreCorrupt
from pmm.store.care import verify
from pmm.store.catalog import Failure, Store
from pmm.store.clip import Take, lossless_clip
from pmm.store.feature import FeatureSpec
from pmm.store.medium import LocalMedium, MediumError

AUDIO = FeatureSpec("audio", "test/1", "float16", (5,), None, {})
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
TAKE = Take(lossless_clip(16000, 1, "s16", 0, 2, [b"abcd"]), None, "anna")
HERE = {"host": "h", "root": "/data", "layout": "livelink"}


def rows(*keys):
    return [
        (hashlib.sha256(key.encode()).hexdigest(), np.full((30, 5), index, np.float16))
        for index, key in enumerate(keys)
    ]


def names(*keys):
    return {row for row, _ in rows(*keys)}


@pytest.fixture
def memory():
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


# -- power


class Plug:
    """Every operation on a disk, and from them the disk that a loss of power leaves: only what was fsynced.

    A name is there if its folder was fsynced since, and that folder's own name is there; a file's bytes
    are there if it was fsynced since they were written, and else it is empty. Drafts are not looked at.
    """

    def __init__(self, root):
        self.root = root
        self.done = []

    def __call__(self, operation, key):
        self.done.append((operation, key))

    def survivors(self, operations):
        """Keys of the names that are there (folders too), and of files that have their bytes."""
        seen, kept, whole, draft = {"."}, {"."}, set(), ""
        for operation, key in operations:
            if operation == "open":
                draft = key if key.startswith("tmp/") else draft
                seen.add(key)
            elif operation == "mkdir":
                seen.add(key)
            elif operation == "link":
                seen.add(key)
                if draft in whole:
                    whole.add(key)
            elif operation == "fsync":
                whole.add(key)
                kept |= {name for name in seen if str(Path(name).parent) == key}
        there = {name for name in kept if all(str(above) in kept for above in Path(name).parents)}
        return {name for name in there if not name.startswith("tmp")}, whole

    def rebuild(self, operations, target):
        there, whole = self.survivors(operations)
        for name in sorted(there):
            if (self.root / name).is_dir():
                (target / name).mkdir(exist_ok=True)
            else:
                data = (self.root / name).read_bytes() if name in whole else b""
                (target / name).write_bytes(data)


def lived_through(path, plug, monkeypatch):
    """A store's first day on the recorded disk; returns what was acknowledged after how many operations."""
    monkeypatch.setattr(LocalMedium.__init__, "__defaults__", (plug, None))
    acknowledged = []

    def acknowledge(check):
        acknowledged.append((len(plug.done), check))

    store = Store.create(path)
    acknowledge(lambda found: found.about == store.about)
    store.publish(AUDIO, rows("a", "b"), {}, chunk_bytes=300)
    acknowledge(lambda found: names("a", "b") <= set(found.rows(AUDIO.id)))
    store.publish_takes("d", [TAKE], HERE)
    acknowledge(lambda found: len(found.takes()) == 1)
    store.publish(AUDIO, rows("c"), {})
    acknowledge(lambda found: names("a", "b", "c") <= set(found.rows(AUDIO.id)))
    store.publish_failures([Failure("path:/x", "/x", "probe", "broken")])
    acknowledge(lambda found: len(found.failures()) == 1)
    monkeypatch.undo()
    return acknowledged


def broken_promises(memory, plug, acknowledged, operations):
    """When a loss of power loses something that was acknowledged, or leaves something half there."""
    earlier = None
    for count in range(len(operations) + 1):
        survivors = plug.survivors(operations[:count])
        due = [check for when, check in acknowledged if when <= count]
        if (survivors, len(due)) == earlier:
            continue
        earlier = (survivors, len(due))
        disk = memory / f"disk-{count}"
        disk.mkdir()
        plug.rebuild(operations[:count], disk)
        if not holds(disk, due):
            yield count
        shutil.rmtree(disk)


def holds(disk, due):
    if not (disk / "pmm.json").exists():
        return not due
    try:
        store = Store.open(disk)
    except PmmError:
        return False
    return verify(store).clean and all(check(store) for check in due)


def test_after_a_loss_of_power_at_any_moment_all_that_was_acknowledged_verifies(memory, monkeypatch):
    plug = Plug(memory / "store")
    acknowledged = lived_through(memory / "store", plug, monkeypatch)
    assert len(plug.done) > 150
    assert list(broken_promises(memory, plug, acknowledged, plug.done)) == []


@pytest.mark.parametrize("skipped", ["values/c/0/0", "values/c", f"records/{AUDIO.id}", "fragments", "tmp/"])
def test_the_power_test_notices_one_fsync_that_is_left_out(memory, monkeypatch, skipped):
    plug = Plug(memory / "store")
    acknowledged = lived_through(memory / "store", plug, monkeypatch)
    gone = [
        ("leave", key)
        if operation == "fsync" and (key.endswith(skipped) or (skipped == "tmp/" and key.startswith(skipped)))
        else (operation, key)
        for operation, key in plug.done
    ]
    assert gone != plug.done
    assert next(broken_promises(memory, plug, acknowledged, gone), None) is not None


# -- faults


class Fault:
    """Fails every operation from the n-th on; ``deletes`` whether those fail, too."""

    def __init__(self, number, code, deletes=True):
        self.left, self.code, self.deletes = number, code, deletes
        self.hit = False

    def __call__(self, operation, key):
        self.left -= 1
        if self.left < 0 and (self.deletes or operation != "delete"):
            self.hit = True
            raise OSError(self.code, os.strerror(self.code))


def survives(path, number, error):
    """What must hold after a failed publish: one line that says why, and nothing half there."""
    message = str(error)
    assert "\n" not in message
    assert message.startswith("cannot ")
    assert message.endswith(os.strerror(error.errno))
    assert str(path) in message
    store = Store.open(path)
    assert dict(store.problems) == {}
    assert names("earlier") <= set(store.rows(AUDIO.id))
    assert store.read(AUDIO.id, *names("earlier")).shape == (30, 5)
    for one in store.fragments():
        store.reader(one)
    assert set(store.rows(AUDIO.id)) <= names("earlier") | {f"{number:064x}"}
    return store


def refusal(store, rows, chunk_bytes=200):
    """The error of a publish, or None. Any other error than a MediumError is raised."""
    try:
        store.publish(AUDIO, rows, {}, chunk_bytes=chunk_bytes)
    except MediumError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("code", "deletes"), [(errno.ENOSPC, False), (errno.EIO, True)], ids=["full", "broken"]
)
def test_whatever_operation_fails_the_publish_says_so_and_the_store_is_as_before(memory, code, deletes):
    Store.create(memory / "origin").publish(AUDIO, rows("earlier"), {})
    for number in range(1000):
        path = memory / str(number)
        shutil.copytree(memory / "origin", path)
        fault = Fault(number, code, deletes)
        store = Store(path, LocalMedium(path, before=fault))
        mine = [(f"{number:064x}", np.ones((30, 5), np.float16))]
        if error := refusal(store, mine):
            assert error.errno == code
            store = survives(path, number, error)
            store.publish(AUDIO, mine, {})
        assert store.rows(AUDIO.id) == sorted(names("earlier") | {f"{number:064x}"})
        assert verify(store).clean
        shutil.rmtree(path)
        if not fault.hit:
            break
    assert number > 50


@pytest.mark.parametrize("then_full", [False, True], ids=["short", "short, then full"])
def test_short_writes_are_gone_on_with_or_told(memory, monkeypatch, then_full):
    Store.create(memory / "origin").publish(AUDIO, rows("earlier"), {})
    write = os.write
    for number in range(1000):
        path = memory / str(number)
        shutil.copytree(memory / "origin", path)
        calls = iter(range(1000))

        def short(fd, data, calls=calls, number=number):
            call = next(calls)
            if call == number + 1 and then_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data[: len(data) // 2] if call == number and len(data) > 1 else data)

        store = Store(path, LocalMedium(path))
        monkeypatch.setattr(os, "write", short)
        error = refusal(store, [(f"{number:064x}", np.ones((30, 5), np.float16))])
        monkeypatch.undo()
        if error:
            assert then_full
            store = survives(path, number, error)
        assert verify(store).clean
        shutil.rmtree(path)
        if next(calls) < number:
            break
    assert number > 10


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here (root and CAP_SYS_ADMIN are needed)")
    try:
        store = Store.create(disk / "store")
        store.publish(AUDIO, rows("earlier"), {})
        big = [(row, np.ones((20_000, 5), np.float16)) for row, _ in rows("b", "c", "d", "e")]
        errors = [error for row in big if (error := refusal(store, [row], 1 << 20))]
        assert {error.errno for error in errors} == {errno.ENOSPC}
        assert all(str(error).endswith(": No space left on device") for error in errors)
        kept = set(Store.open(disk / "store").rows(AUDIO.id))
        assert names("earlier", "b") <= kept < names("earlier", "b", "c", "d", "e")
        assert verify(Store.open(disk / "store")).clean
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        again = Store.open(disk / "store")
        for row in big:
            if again.missing(AUDIO.id, [row[0]]):
                again.publish(AUDIO, [row], {})
        assert len(Store.open(disk / "store").rows(AUDIO.id)) == 5
        assert verify(again).clean
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


MANY_CHUNKS = """
import resource, sys
from pmm.store.catalog import Store
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
store = Store.open(sys.argv[1])
(spec,) = store.specs
kept = [store.read(spec, row) for row in store.rows(spec)]
print(sum(len(one) for one in kept))
"""


def test_a_store_may_have_more_chunks_than_a_process_may_open_files(memory):
    store = Store.create(memory / "store")
    store.publish(AUDIO, [(f"{n:064x}", np.ones((30, 5), np.float16)) for n in range(10)], {}, chunk_bytes=10)
    command = [sys.executable, "-P", "-c", MANY_CHUNKS, store.path]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "300\n"


# -- a disk that vanishes under the map


def test_a_chunk_cut_off_while_it_is_read_is_an_error_and_not_the_end(memory):
    path = memory / "store"
    Store.create(path).publish(AUDIO, rows("a", "b"), {}, chunk_bytes=400)
    store = Store.open(path, safe=True)
    whole = {row: np.array(values) for row, values in rows("a", "b")}
    for row, values in whole.items():
        np.testing.assert_array_equal(store.read(AUDIO.id, row), values)
        assert not store.read(AUDIO.id, row).flags.writeable
    (one,) = store.fragments()
    for item in one.objects:
        if item.path.startswith("values/c"):
            os.truncate(path / one.folder / item.path, 10)
    for row in whole:
        with pytest.raises(StoreCorrupt, match=f"^clip {row} cannot be read: .*cut off"):
            store.read(AUDIO.id, row)
