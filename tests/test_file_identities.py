"""A second run over a dataset names what has not changed without reading it."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmm.precompute import identities, media
from pmm.precompute.datasets import find
from pmm.precompute.identities import Identities, default_path, stamp
from pmm.precompute.survey import Probed, survey


@pytest.fixture
def aged(captures):
    """The captures, as if they had been recorded an hour ago."""
    for folder, _, files in os.walk(captures):
        for file in files:
            age(Path(folder) / file)
    return captures


@pytest.fixture(autouse=True)
def _change_times_age_too(monkeypatch):
    """A change time cannot be set back, so here the clock that files are compared with runs ahead."""
    really = time.time
    monkeypatch.setattr(identities.time, "time", lambda: really() + 10)


def age(path, seconds=3600):
    os.utime(path, (time.time() - seconds, time.time() - seconds))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "identities.sqlite"


def surveyed(root, cache, fresh=False):
    """What a survey found, how many recordings it had to read, and how many bytes this process read."""
    events = []
    with Identities(cache, fresh) as known:
        before = bytes_read()
        found = survey([(root, find(root, None))], events.append, known)
        read = bytes_read() - before
    assert all(isinstance(event, Probed) for event in events)
    return found, sum(not event.known for event in events), read


def bytes_read():
    """Bytes this process has read by system calls, as the kernel counts them."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_second_run_reads_no_recording(aged, cache):
    size = sum(file.stat().st_size for file in aged.rglob("*") if file.suffix in (".wav", ".csv"))
    first, read, first_bytes = surveyed(aged, cache)
    assert read == len(first.sources) == 4
    assert first_bytes >= size
    second, read, second_bytes = surveyed(aged, cache)
    assert second == first
    assert read == 0
    assert second_bytes < 50_000 < size  # the folder's csv heads and the cache itself


def test_the_names_come_from_the_cache_and_not_from_the_files(aged, cache, monkeypatch):
    first, _, _ = surveyed(aged, cache)
    monkeypatch.setattr(media, "probe", lambda path: pytest.fail(f"{path} was read"))
    second, read, _ = surveyed(aged, cache)
    assert (second, read) == (first, 0)


def test_rehash_reads_everything_and_keeps_it(aged, cache):
    first, _, _ = surveyed(aged, cache)
    again, read, _ = surveyed(aged, cache, fresh=True)
    assert (again, read) == (first, 4)
    assert surveyed(aged, cache)[1] == 0


def edit_sound(wav):
    data = bytearray(wav.read_bytes())
    data[2000] ^= 1
    wav.write_bytes(bytes(data))


def edit_and_set_the_time_back(wav):
    before = wav.stat()
    edit_sound(wav)
    os.utime(wav, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_another_of_the_same_time(wav):
    other = wav.with_name("other")
    shutil.copy2(wav, other)
    edit_and_set_the_time_back(other)
    other.rename(wav)


CHANGES = [edit_sound, edit_and_set_the_time_back, replace_by_another_of_the_same_time]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_is_read_again(aged, cache, change):
    first, _, _ = surveyed(aged, cache)
    (wav,) = (aged / "bob" / "take_2").glob("*.wav")
    change(wav)
    second, read, _ = surveyed(aged, cache)
    assert read == 1
    ids = [{source.take.source: source.take.clip.id for source in found.sources} for found in (first, second)]
    assert [source for source in ids[0] if ids[0][source] != ids[1][source]] == ["bob/take_2/take_2_bob"]
    assert second == surveyed(aged, None)[0]


def test_an_edited_face_track_is_read_again_and_its_sound_is_not(aged, cache):
    first, _, _ = surveyed(aged, cache)
    (track,) = (aged / "bob" / "take_2").glob("*.csv")
    track.write_text(track.read_text().replace("0.3", "0.4", 1))
    second, read, size = surveyed(aged, cache)
    assert read == 1
    assert size < 400_000
    assert {s.take.clip.id for s in first.sources} == {s.take.clip.id for s in second.sources}
    assert len({s.take.target for s in first.sources} - {s.take.target for s in second.sources}) == 1
    assert second == surveyed(aged, None)[0]


def test_young_files_are_not_trusted(aged, cache, monkeypatch):
    surveyed(aged, cache)
    monkeypatch.undo()  # the clock is right again, and the files are seconds old
    young = next(aged.rglob("*.wav"))
    young.touch()
    assert stamp(young) is None
    with Identities(cache) as known:
        known.put(young, "clip", stamp(young), "x")
        assert known.get(young, "clip", stamp(young)) is None
    os.utime(young, (time.time() + 3600,) * 2)  # a disk whose clock is ahead
    assert stamp(young) is None


def test_a_file_written_to_while_it_was_read_is_not_kept(aged, cache):
    wav = next(aged.rglob("*.wav"))
    with Identities(cache) as known:
        seen = stamp(wav)
        edit_sound(wav)
        known.put(wav, "clip", seen, "the sound before")
    with Identities(cache) as known:
        assert known.get(wav, "clip", seen) is None
        assert known.get(wav, "clip", stamp(wav)) is None


BROKEN = {
    "garbage": lambda file: file.write_bytes(b"not a database " * 1000),
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:5000]),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "other table": lambda file: (file.unlink(), sqlite3.connect(file).execute("CREATE TABLE files (x)")),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_cache_is_as_if_absent(aged, cache, how):
    first, _, _ = surveyed(aged, cache)
    BROKEN[how](cache)
    second, read, _ = surveyed(aged, cache)
    assert (second, read) == (first, 4)
    third, read, _ = surveyed(aged, cache)
    assert third == first
    assert read == (0 if how in ("garbage", "empty", "cut off") else 4)  # the first two started anew


def test_a_flipped_bit_in_the_cache_is_a_miss(aged, cache):
    first, _, _ = surveyed(aged, cache)
    database = sqlite3.connect(cache, isolation_level=None)
    database.execute("UPDATE files SET value = replace(value, '48000', '48001')")
    database.close()
    second, read, _ = surveyed(aged, cache)
    assert (second, read) == (first, 4)


def test_a_cache_that_cannot_be_written_stops_nobody(aged, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "below" / "x.sqlite", Path("/proc/nowhere/x.sqlite")):
        assert surveyed(aged, path)[1] == 4


def test_two_processes_fill_one_cache(aged, cache):
    code = """
import sys, json
from pathlib import Path
from pmm.precompute import identities
identities._SETTLED_SECONDS = -60
from pmm.precompute.identities import Identities, stamp
for turn in range(30):
    with Identities(Path(sys.argv[1])) as known:
        for wav in map(Path, sys.argv[3:]):
            about = f"{sys.argv[2]} {turn}"
            known.put(wav, about, stamp(wav), about)
"""
    files = sorted(map(str, aged.rglob("*.wav")))
    runs = [subprocess.Popen([sys.executable, "-P", "-c", code, cache, who, *files]) for who in "ab"]
    assert [run.wait() for run in runs] == [0, 0]
    with Identities(cache) as known:
        for who in "ab":
            for turn in range(30):
                about = f"{who} {turn}"
                assert {known.get(Path(file), about, stamp(Path(file))) for file in files} == {about}


def test_the_command_keeps_names_where_caches_go_and_rehashes_when_asked(aged, pmm, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_path() == tmp_path / "xdg" / "pmm" / "identities-1.sqlite"
    args = ("precompute", aged, "--store", tmp_path / "store", "--json")
    done = pmm(*args)
    assert done.code == 0, done.err
    assert default_path().is_file()
    before = bytes_read()
    assert json.loads(pmm(*args).out)["plan"]["clips_to_compute"] == 0
    kept = bytes_read() - before
    before = bytes_read()
    assert json.loads(pmm(*args, "--rehash").out)["plan"]["clips_to_compute"] == 0
    size = sum(file.stat().st_size for file in aged.rglob("*.wav"))
    assert bytes_read() - before - kept > size * 0.9
