"""A store in a bucket, over HTTP, with everything a network does to it.

The server is moto in a process of its own; it stands in for S3. All requests pass a small proxy, which
counts them and, when a test says so, cuts a connection, swallows a reply, denies or strips a header.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from pmm import AlreadyThere, BadInput, ExtraMissing, NotFound, PmmError, StoreCorrupt
from pmm.store.cache import Cache
from pmm.store.care import verify
from pmm.store.catalog import Store
from pmm.store.doctor import examine
from pmm.store.feature import FeatureSpec
from pmm.store.medium import LocalMedium, MediumError
from pmm.store.remote import ObjectMedium

AUDIO = FeatureSpec("audio", "test/1", "float16", (5,), None, {})
SECONDS = 60


def name(key):
    return hashlib.sha256(str(key).encode()).hexdigest()


def some(*keys, steps=20):
    return [(name(key), np.full((steps, 5), index + 1, np.float16)) for index, key in enumerate(keys)]


# -- the server and the proxy before it


class Proxy(ThreadingHTTPServer):
    """Passes requests on; ``rule(method, path)`` says what is done to one instead, if anything.

    cut    half the body goes through, then both connections are closed
    lose   the server answers, and the answer is not passed on
    deny   the server is not asked: 403
    strip  passed on without If-None-Match
    """

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), Passing)
        self.upstream = upstream
        self.one_at_a_time = threading.Lock()  # moto looks and then writes: S3 does both at once
        self.forget()

    def forget(self):
        self.rule = lambda method, path: None
        self.seen = []

    def once(self, action, pattern):
        """Does ``action`` to the first request that matches ``pattern``, such as "PUT /.*/records/"."""
        left = [action]
        self.rule = lambda *request: left.pop() if left and re.match(pattern, " ".join(request)) else None
        return lambda: not left

    def asked(self, pattern):
        return [one for one in self.seen if re.match(pattern, one)]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SECONDS
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do(self):
        self.server.seen.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        action = self.server.rule(self.command, self.path)
        if action == "deny":
            denied = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.reply(403, {"Content-Type": "application/xml"}, denied)
        elif action == "cut":
            self.close_connection = True
            with contextlib.closing(self.upstream()) as server:
                self.send(server, {}, body[: len(body) // 2])
        else:
            with self.server.one_at_a_time, contextlib.closing(self.upstream()) as server:
                self.send(server, {"If-None-Match"} if action == "strip" else {}, body)
                answer = server.getresponse()
                said = answer.read()
            if action == "lose":
                self.close_connection = True
            else:
                self.reply(answer.status, dict(answer.getheaders()), said)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

    def upstream(self):
        return http.client.HTTPConnection(*self.server.upstream, timeout=SECONDS)

    def send(self, server, without, body):
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for key, value in self.headers.items():
            if key.title() not in {"Connection", "Expect", *without}:
                server.putheader(key, value)
        server.endheaders(body)

    def reply(self, status, headers, body):
        self.send_response_only(status)
        for key, value in headers.items():
            if key.title() not in {"Connection", "Content-Length", "Transfer-Encoding"}:
                self.send_header(key, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/data.json", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < until, "moto_server did not start"
                time.sleep(0.1)
        yield "127.0.0.1", port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def proxy(server):
    with Proxy(server) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


@pytest.fixture
def bucket(proxy, monkeypatch, tmp_path):
    """The address of a new place in a bucket; credentials and endpoint are in the environment."""
    for key, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": proxy.url,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    for key in ("AWS_PROFILE", "PMM_CACHE_DIR", "PMM_CACHE_GB", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    proxy.forget()
    client().create_bucket(Bucket="team")
    yield f"s3://team/{tmp_path.name}"
    proxy.forget()


def client():
    import boto3

    return boto3.client("s3")


# -- a store like any other


def test_a_store_in_a_bucket_is_a_store(bucket):
    with pytest.raises(NotFound, match=f"^no store at {bucket}; `pmm precompute DATASET --store {bucket}`"):
        Store.open(bucket)
    store = Store.open_or_create(bucket)
    one = store.publish(AUDIO, some("a", "b"), {"model": "m"}, chunk_bytes=150)
    fresh = Store.open(bucket)
    assert Store.open_or_create(f"{bucket}/").about == fresh.about == store.about
    assert fresh.rows(AUDIO.id) == sorted([name("a"), name("b")])
    for row, values in some("a", "b"):
        np.testing.assert_array_equal(fresh.read(AUDIO.id, row), values)
    assert verify(fresh).clean
    assert [seen.location for seen in fresh.fragments()] == [one.location]
    entries = {entry.key: entry for entry in fresh.medium.list(one.folder)}
    assert {key: entry.size for key, entry in entries.items()} == {
        f"{one.folder}/{item.path}": item.size for item in one.objects
    }
    assert all(abs(entry.modified - time.time()) < 600 for entry in entries.values())
    with pytest.raises(BadInput, match=f"^{bucket} is no folder"):
        _ = store.path


def test_the_verbs_do_what_they_do_on_a_disk(bucket):
    medium = ObjectMedium(bucket)
    large = os.urandom(2_000_000) * 10  # 20 MB: two parts
    medium.write("a/large", [large[:7], memoryview(large)[7:]])
    assert medium.map("a/large", len(large))[:] == large
    assert medium.read("a/large", 0, 1 << 30) == large
    assert medium.read("a/large", len(large) - 3, 100) == large[-3:]
    assert medium.read("a/large", len(large), 100) == b""
    with pytest.raises(StoreCorrupt, match="has not the 19999999 bytes its record says"):
        medium.map("a/large", len(large) - 1)
    with pytest.raises(StoreCorrupt, match="has not the 20000001 bytes its record says"):
        medium.map("a/large", len(large) + 1)
    medium.write("a/empty", [])
    assert medium.read("a/empty", 0, 10) == b""
    assert medium.create("a/once", b"first") == medium.create("a/once", b"second") == b"first"
    assert {entry.key: entry.size for entry in medium.list("a")} == {
        "a/large": len(large), "a/empty": 0, "a/once": 5,
    }  # fmt: skip
    for _ in range(2):
        medium.delete("a/large")
    with pytest.raises(NotFound, match=f"^{bucket}/a/large is not there$"):
        medium.read("a/large", 0, 1)
    with pytest.raises(BadInput, match="no name within a store"):
        medium.write("../a", [b""])
    assert list(medium.list("nothing")) == []


@pytest.mark.parametrize("where", ["gs://bucket/x", "s3://", "s3:///x", "s3://team//x"])
def test_an_address_that_is_none_is_refused(bucket, where):
    for opening in (Store.open, Store.create):
        with pytest.raises(BadInput, match="a folder or s3://bucket/prefix was expected"):
            opening(where)


def test_what_is_no_store_says_what_it_is(bucket):
    with pytest.raises(NotFound, match="there is no bucket nobodys; make it, or check the name"):
        Store.open("s3://nobodys/store")
    client().put_object(Bucket="team", Key=f"{bucket.rpartition('/')[2]}/notes.txt", Body=b"keep me")
    for opening in (Store.open, Store.open_or_create):
        with pytest.raises(BadInput, match=r"holds notes.txt\), so it is no store$"):
            opening(bucket)
    with pytest.raises(AlreadyThere, match=r"with other things in it \(notes.txt\)"):
        Store.create(bucket)


def test_a_profile_names_the_credentials_and_the_endpoint(bucket, proxy, monkeypatch, tmp_path):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(key)
    (tmp_path / "config").write_text(
        "[profile studio]\naws_access_key_id = AKIASTUDIO\naws_secret_access_key = s\nregion = eu-west-1\n"
        f"endpoint_url = {proxy.url}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "studio")
    assert Store.create(bucket).rows(AUDIO.id) == []
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(BadInput, match=r"^AWS_PROFILE: .*nobody"):
        Store.open(bucket)


def test_the_libraries_are_asked_for_only_where_a_bucket_is(monkeypatch, tmp_path):
    code = (
        "import sys; from pmm.store import Store; Store.create(sys.argv[1]);"
        "assert not {'obstore', 'boto3', 'botocore'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code, tmp_path / "store"], check=True)
    for missing in ("obstore", "boto3"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            with pytest.raises(ExtraMissing, match=rf"needs {missing}: pip install 'pmmtalk\[s3\]'$"):
                Store.open("s3://team/store")


# -- writers that are killed, and a network that fails

WRITER = """
import sys, numpy as np
from pmm.store.catalog import Store
from pmm.store.feature import FeatureSpec
spec = FeatureSpec("audio", "test/1", "float16", (5,), None, {})
store, me = Store.open(sys.argv[1]), int(sys.argv[2])
for n in range(4):
    row = f"{me:02x}{n:02x}" * 16
    if store.missing(spec.id, [row]):
        store.publish(spec, [(row, np.full((20, 5), me, np.float16))], {}, chunk_bytes=60)
    print(row, flush=True)
"""


def writer(bucket, me):
    return subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, bucket, str(me)], stdout=subprocess.PIPE, text=True
    )


def test_of_two_writers_one_is_killed_and_nothing_acknowledged_is_lost(bucket):
    Store.create(bucket)
    victim, other = writer(bucket, 1), writer(bucket, 2)
    told = [victim.stdout.readline().strip(), victim.stdout.readline().strip()]
    time.sleep(0.03)  # into the third
    victim.send_signal(signal.SIGKILL)
    told += victim.stdout.read().split()
    assert victim.wait() == -signal.SIGKILL
    told += other.communicate(timeout=SECONDS)[0].split()
    assert other.returncode == 0
    store = Store.open(bucket)
    assert set(told) <= set(store.rows(AUDIO.id))
    assert len(store.rows(AUDIO.id)) < 8
    assert verify(store).clean
    again = writer(bucket, 1)
    assert len(again.communicate(timeout=SECONDS)[0].split()) == 4
    store.refresh()
    assert len(store.rows(AUDIO.id)) == len(store.fragments()) == 8
    assert verify(store).clean


@pytest.mark.parametrize("what", ["fragments", "records"])
def test_a_connection_cut_in_the_middle_of_an_upload_is_taken_up_again(bucket, proxy, what):
    store = Store.create(bucket)
    cut = proxy.once("cut", f"PUT /.*/{what}/")
    one = store.publish(AUDIO, some("a", steps=4000), {})
    assert cut()
    assert [seen.location for seen in Store.open(bucket).fragments()] == [one.location]
    assert verify(store).clean


def test_the_reply_to_a_record_may_be_lost(bucket, proxy):
    store = Store.create(bucket)
    lost = proxy.once("lose", "PUT /.*/records/")
    one = store.publish(AUDIO, some("a"), {})
    assert lost()
    assert len(proxy.asked("PUT /.*/records/")) == 2  # asked again, and told that it was there
    fresh = Store.open(bucket)
    assert [seen.location for seen in fresh.fragments()] == [one.location]
    assert verify(fresh).clean


def test_a_network_that_stays_away_is_one_error_and_nothing_is_half_there(bucket, proxy, monkeypatch):
    monkeypatch.setattr("pmm.store.remote._RETRY", {"max_retries": 1})
    monkeypatch.setattr("pmm.store.remote._PAUSES", (0, 0.1))
    store = Store.create(bucket)
    store.publish(AUDIO, some("earlier"), {})
    for what in ("fragments", "records"):
        proxy.rule = lambda method, path, what=what: (
            "cut" if method == "PUT" and f"/{what}/" in path else None
        )
        with pytest.raises(MediumError, match=f"^cannot (write|create) {bucket}/{what}/") as caught:
            store.publish(AUDIO, some("a"), {})
        assert "\n" not in str(caught.value)
        proxy.forget()
        fresh = Store.open(bucket)
        assert fresh.rows(AUDIO.id) == [name("earlier")]
        assert verify(fresh).clean
    store.publish(AUDIO, some("a"), {})
    assert len(Store.open(bucket).rows(AUDIO.id)) == 2


def test_what_may_not_be_written_can_be_read(bucket, proxy):
    Store.create(bucket).publish(AUDIO, some("a"), {})
    proxy.rule = lambda method, path: "deny" if method != "GET" else None
    store = Store.open(bucket)
    assert store.read(AUDIO.id, name("a"))[0, 0] == 1
    assert verify(store).clean
    with pytest.raises(
        MediumError, match=r"^cannot write .*: AccessDenied: Access Denied; check AWS_PROFILE"
    ):
        store.publish(AUDIO, some("b"), {})
    (finding,) = examine(bucket)
    assert (finding.probe, finding.state) == ("write", "refused")
    proxy.rule = lambda method, path: "deny"
    with pytest.raises(
        MediumError, match=f"^cannot read {bucket}/pmm.json: AccessDenied: Access Denied; check"
    ):
        Store.open(bucket)


# -- the doctor


def test_the_doctor_finds_a_good_bucket_good_and_leaves_nothing(bucket, pmm):
    done = pmm("store", "doctor", bucket)
    assert (done.code, done.err) == (0, "")
    assert [line.split()[:2] for line in done.out.splitlines()] == [
        ["good", "write"], ["good", "create"], ["good", "race"], ["good", "uploads"],
    ]  # fmt: skip
    assert list(ObjectMedium(bucket).list("tmp")) == []


def test_a_server_that_does_not_honour_if_none_match_is_refused(bucket, proxy, pmm):
    proxy.rule = lambda method, path: "strip"
    done = pmm("store", "doctor", bucket, "--json")
    assert done.code == 1
    assert [(one["probe"], one["state"]) for one in json.loads(done.out)] == [
        ("write", "good"), ("create", "refused"),
    ]  # fmt: skip
    with pytest.raises(
        MediumError,
        match=f"^no store can be kept at {bucket}: the server does not honour `If-None-Match: \\*`",
    ):
        Store.create(bucket)
    proxy.forget()
    with pytest.raises(NotFound):
        Store.open(bucket)


def test_a_server_that_looks_and_then_writes_is_refused(bucket, proxy):
    meeting = {}

    def rule(method, path):  # two requests for one name that come at once both find it free
        try:
            meeting.setdefault(path, threading.Barrier(2)).wait(0.3 if method == "PUT" else 0)
        except threading.BrokenBarrierError:
            meeting.pop(path, None)
            return None
        return "strip"

    proxy.rule = rule
    *good, race = examine(bucket)
    assert [one.state for one in good] == ["good", "good"]
    assert (race.probe, race.state) == ("race", "refused")
    assert race.seen.endswith("two who create one name at once both succeed")


def test_unfinished_uploads_are_warned_of(bucket, pmm):
    key = f"{bucket.rpartition('/')[2]}/fragments/left"
    upload = client().create_multipart_upload(Bucket="team", Key=key)
    done = pmm("store", "doctor", bucket)
    assert done.code == 0
    assert f"warning  uploads      1 uploads were begun and never finished (the first: {key})" in done.out
    client().abort_multipart_upload(Bucket="team", Key=key, UploadId=upload["UploadId"])


def test_the_doctor_on_a_disk(tmp_path, pmm):
    done = pmm("store", "doctor", tmp_path)
    assert done.code == 0
    assert [line.split()[1] for line in done.out.splitlines()][:5] == [
        "write", "create", "race", "rename", "permissions",
    ]  # fmt: skip
    assert list((tmp_path / "tmp").iterdir()) == []
    assert pmm("store", "doctor", tmp_path / "none").complaint.startswith(
        f"there is no folder {tmp_path}/none"
    )


# -- reading through the cache


def test_the_second_fit_reads_nothing_remote_but_the_catalogue(bucket, proxy, fitted, pmm, tmp_path):
    assert pmm("store", "push", fitted / "store", bucket).code == 0
    fit = ("fit", bucket, "--epochs", 1, "--cache-dir", tmp_path / "kept", "--run")
    small = pmm(*fit, tmp_path / "none", "--cache-gb", 0.001)
    assert small.code == 1
    needed = sum(one.bytes for one in Store.open(bucket).fragments())
    assert re.fullmatch(
        f"one epoch reads {needed:,} bytes, and the cache in {tmp_path}/kept may hold 1,000,000; "
        "give it more by --cache-gb or PMM_CACHE_GB",
        small.complaint,
    )
    assert not (tmp_path / "kept").exists()
    proxy.forget()
    assert pmm(*fit, tmp_path / "one").code == 0
    first = proxy.asked("GET /team/.*/fragments/")
    proxy.forget()
    proxy.rule = lambda method, path: "deny" if method != "GET" else None  # reading is enough
    assert pmm(*fit, tmp_path / "two").code == 0
    assert len(first) > 30
    assert proxy.asked("GET /team/.*/fragments/") == []
    assert proxy.asked("GET /team/.*/records/") != []
    scores = pmm("eval", tmp_path / "two", "--json", "--cache-dir", tmp_path / "kept")
    assert json.loads(scores.out)["clips"] == 2
    assert proxy.asked("GET /team/.*/fragments/") == []
    assert all("/snapshots/" in one for one in proxy.asked("PUT|POST|DELETE"))  # what pins the run: denied


@pytest.fixture
def source(tmp_path):
    """Four fragments of one size somewhere else: what a cache keeps of them does not depend on where."""
    store = Store.create(tmp_path / "source")
    for key in "abcd":
        store.publish(AUDIO, some(key), {})
    return store


def opened(source, folder, limit):
    asked = []
    medium = LocalMedium(source.path)
    copy = Store(source.where, medium, cache=Cache(folder, limit))
    read = medium.read
    medium.read = lambda key, *span: (asked.append(key), read(key, *span))[1]
    return copy, asked


def held(folder):
    return sum(path.stat().st_size for path in (folder / "fragments").rglob("*") if path.is_file())


def test_what_was_used_longest_ago_makes_room(source, tmp_path):
    size = source.fragments()[0].bytes
    store, asked = opened(source, tmp_path / "cache", 3 * size)
    for key in "abcabd":  # d takes the place of c
        assert store.read(AUDIO.id, name(key)).shape == (20, 5)
        store._readers.clear()
        time.sleep(0.01)
    assert held(tmp_path / "cache") == 3 * size
    asked.clear()
    for key in "abd":
        store.read(AUDIO.id, name(key))
    assert [key for key in asked if key.startswith("fragments")] == []
    kept = store.read(AUDIO.id, name("a"))
    store.read(AUDIO.id, name("c"))
    assert kept[0, 0] == 1  # mapped, whatever was dropped
    assert held(tmp_path / "cache") == 3 * size
    with pytest.raises(
        BadInput, match=rf"^one fragment has {size:,} bytes, and the cache in .* may hold 99;"
    ):
        opened(source, tmp_path / "small", 99)[0].read(AUDIO.id, name("a"))
    rows = [(AUDIO.id, name(key)) for key in "abcd"]
    with pytest.raises(BadInput, match=rf"one epoch reads {4 * size:,} bytes, .* may hold {3 * size:,};"):
        store.fetch(rows)
    store.fetch(rows[:3])
    with pytest.raises(BadInput, match=rf"one epoch reads {4 * size:,} bytes"):
        store.fetch(rows[3:])


def test_nothing_damaged_is_kept_and_what_is_damaged_in_the_cache_is_fetched_again(source, tmp_path):
    store, _ = opened(source, tmp_path / "cache", 1 << 20)
    store.read(AUDIO.id, name("a"))
    (chunk,) = (tmp_path / "cache").rglob("values/c/0/0")
    chunk.chmod(0o644)
    os.truncate(chunk, 7)
    fresh, _ = opened(source, tmp_path / "cache", 1 << 20)
    assert fresh.read(AUDIO.id, name("a"))[0, 0] == 1
    (one,) = [one for one in source.fragments() if one.row_ids == [name("b")]]
    flipped = source.path / one.folder / "values/c/0/0"
    flipped.chmod(0o644)
    flipped.write_bytes(bytes([1]) + flipped.read_bytes()[1:])
    with pytest.raises(StoreCorrupt, match=f"^clip {name('b')} cannot be read: .*values/c/0/0"):
        fresh.read(AUDIO.id, name("b"))
    assert len(list((tmp_path / "cache/fragments").glob(f"*/{'?' * 64}"))) == 1


SHARED = """
import sys
from pathlib import Path
from pmm.store.cache import Cache
from pmm.store.catalog import Store
from pmm.store.medium import LocalMedium
medium = LocalMedium(Path(sys.argv[1]))
asked, read = [], medium.read
medium.read = lambda key, *span: (asked.append(key), read(key, *span))[1]
store = Store(sys.argv[1], medium, cache=Cache(Path(sys.argv[2]), 1 << 20))
spec, = store.specs
print("ready", flush=True)
sys.stdin.readline()
store.fetch([(spec, row) for row in store.rows(spec)])
assert all(store.read(spec, row).shape == (20, 5) for row in store.rows(spec))
print(len({key.rsplit("/", 1)[0] for key in asked if key.endswith("values/zarr.json")}))
"""


def test_a_folder_that_another_reader_moves_away_while_the_cache_is_counted(source, tmp_path):
    store, _ = opened(source, tmp_path / "cache", 1 << 20)
    store.read(AUDIO.id, name("a"))
    draft = tmp_path / "cache" / "fragments" / f".{uuid4().hex}"
    draft.mkdir()

    def vanish(event, args):
        if event in ("os.listdir", "os.scandir") and str(args[0]) == str(draft) and draft.exists():
            draft.rmdir()

    sys.addaudithook(vanish)
    another, _ = opened(source, tmp_path / "cache", 1 << 20)
    assert another.read(AUDIO.id, name("b")).shape == (20, 5)
    assert not draft.exists()


def test_processes_that_share_a_cache_fetch_each_fragment_once(source, tmp_path):
    command = [sys.executable, "-P", "-c", SHARED, source.path, tmp_path / "cache"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("\n")
        one.stdin.flush()
    fetched = [int(one.communicate(timeout=SECONDS)[0]) for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert sum(fetched) == 4


def test_the_cache_lies_where_the_platform_and_the_user_say(monkeypatch, tmp_path):
    for key in ("PMM_CACHE_DIR", "PMM_CACHE_GB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (Cache.default().folder, Cache.default().limit) == (tmp_path / ".cache/pmm", 10**11)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert Cache.default().folder == Path("/xdg/pmm")
    monkeypatch.setenv("PMM_CACHE_DIR", "/fast")
    monkeypatch.setenv("PMM_CACHE_GB", "2.5")
    assert (Cache.default().folder, Cache.default().limit) == (Path("/fast"), 2_500_000_000)
    assert Cache.default(Path("/chosen"), 1).limit == 10**9
    monkeypatch.setenv("PMM_CACHE_GB", "lots")
    with pytest.raises(PmmError, match="PMM_CACHE_GB is 'lots'; a number of gigabytes was expected"):
        Cache.default()
