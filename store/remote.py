"""A store in a bucket: the Medium verbs over S3 and whatever speaks it.

obstore carries the bytes (measured against s3fs: docs/store.md); boto3 says who we are, in which
region and at which endpoint, by the usual AWS_* variables and profiles. Every request is bounded in
time and number. An object is seen whole or not at all, and is durable once its PUT is acknowledged,
so there is nothing to sync; a record is created by a PUT with ``If-None-Match: *``.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from pmm import AlreadyThere, BadInput, ExtraMissing, NotFound, PmmError, StoreCorrupt
from pmm.store.medium import Buffer, Entry, LocalMedium, Medium, MediumError, check_key, is_key, nothing

SCHEME = "s3://"
PART_BYTES = 16 << 20
_SMALL = 1 << 16
_STREAMS = 4
_PAUSES = (0, 0.1, 0.4, 1.6)
"""Seconds before each attempt to create a name, where the network may have lost a reply."""
_CLIENT = {"timeout": "120s", "connect_timeout": "10s"}
_RETRY = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}


def is_address(where: Path | str) -> bool:
    """Whether a store named so lies in a bucket rather than in a folder."""
    return isinstance(where, str) and "://" in where


def place(text: str) -> Path | str:
    """A folder or an address, from how a user writes it."""
    return text if is_address(text) else Path(text)


def medium_at(where: Path | str, safe: bool | None = None) -> Medium:
    """``safe``: read rather than map, on a disk; None leaves it to the kind of disk."""
    return ObjectMedium(str(where)) if is_address(where) else LocalMedium(Path(where), safe=safe)


class ObjectMedium:
    """A prefix of a bucket, ``s3://bucket/prefix``.

    ``before`` is called with the name of each request and its key before it is made; counting and
    faults go there. Raises BadInput for another address, ExtraMissing without the libraries.
    """

    safe = False  # what is mapped is a copy

    def __init__(self, address: str, before: Callable[[str, str], None] = nothing):
        self.bucket, _, prefix = address.removeprefix(SCHEME).rstrip("/").partition("/")
        self.address = f"{SCHEME}{self.bucket}/{prefix}".rstrip("/")
        if not address.startswith(SCHEME) or not self.bucket or "" in (prefix or "-").split("/"):
            raise BadInput(f"{address} is no place for a store; a folder or s3://bucket/prefix was expected")
        self._before = before
        self._obstore, self._session = _libraries()
        self._store = _connect(self._session, self.bucket, prefix)

    def list(self, prefix: str) -> Iterator[Entry]:
        self._before("list", prefix)
        with self._told("list", prefix):
            for batch in self._obstore.list(self._store, prefix or None):
                for one in batch:
                    if is_key(one["path"]):
                        yield Entry(one["path"], one["size"], one["last_modified"].timestamp())

    def read(self, key: str, start: int, length: int) -> bytes:
        parts = []
        while length > 0:
            part = self._get(key, start, min(length, PART_BYTES))
            parts.append(part)
            start, length = start + len(part), length - len(part)
            if len(part) < PART_BYTES:  # a range comes short at the end of the object only
                break
        return b"".join(parts)

    def map(self, key: str, size: int) -> mmap.mmap:
        """The whole object in memory; what is read often goes through a cache of files instead."""
        whole = mmap.mmap(-1, size)
        while whole.tell() < size and (
            part := self._get(key, whole.tell(), min(PART_BYTES, size - whole.tell()))
        ):
            whole.write(part)
        if whole.tell() < size or self._get(key, size, 1):
            raise StoreCorrupt(f"{self.address}/{key} has not the {size} bytes its record says")
        return whole

    def write(self, key: str, blocks: Iterable[Buffer]) -> None:
        parts = _parts(blocks)
        first, second = next(parts, b""), next(parts, None)
        self._before("put", key)
        with self._told("write", key):
            if second is None:
                self._put(key, first, use_multipart=False)
            else:  # obstore abandons the upload if anything fails before its end
                self._put(key, chain((first, second), parts), chunk_size=PART_BYTES, max_concurrency=_STREAMS)

    def sync(self, prefix: str) -> None:
        """What was acknowledged is durable."""

    def create(self, key: str, data: bytes) -> bytes:
        refused: PmmError | None = None
        for pause in _PAUSES:
            time.sleep(pause)
            try:
                self._before("create", key)
                with self._told("create", key):
                    self._put(key, data, mode="create")
                return data
            except AlreadyThere:  # perhaps by ourselves, when a reply was lost: the caller compares
                return self.read(key, 0, max(len(data), _SMALL) + 1)
            except MediumError as error:  # the request may have succeeded all the same: ask again
                refused = error
                if error.errno == errno.EACCES:
                    break
        assert refused is not None
        raise refused

    def delete(self, key: str) -> None:
        self._before("delete", key)
        with self._told("delete", key):
            self._obstore.delete(self._store, check_key(key))

    # -- beside the verbs

    def names(self) -> tuple[str, ...]:
        """What lies directly in the prefix, whoever put it there."""
        self._before("list", "")
        with self._told("list", ""):
            found = self._obstore.list_with_delimiter(self._store, None)
        return (*found["common_prefixes"], *(one["path"] for one in found["objects"]))

    def unfinished_uploads(self) -> tuple[str, ...]:
        """Keys of uploads that were begun and neither finished nor abandoned, 1000 at most."""
        from botocore.config import Config  # type: ignore[import-untyped]
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

        patience = Config(connect_timeout=10, read_timeout=30, retries={"max_attempts": 2})
        prefix = self.address.removeprefix(f"{SCHEME}{self.bucket}").strip("/")
        try:
            found = self._session.client("s3", config=patience).list_multipart_uploads(
                Bucket=self.bucket, Prefix=prefix and f"{prefix}/"
            )
        except (BotoCoreError, ClientError) as error:
            raise MediumError(f"cannot list the uploads in {self.address}: {error}") from None
        return tuple(one["Key"] for one in found.get("Uploads", ()))

    # -- below the verbs

    def _get(self, key: str, start: int, length: int) -> bytes:
        self._before("get", key)
        with self._told("read", key):
            try:
                return bytes(self._obstore.get_range(self._store, check_key(key), start=start, length=length))
            except self._obstore.exceptions.GenericError as error:
                if "416 Range Not Satisfiable" not in str(error):
                    raise
                return b""  # the object ends before `start`

    def _put(self, key: str, data: Buffer | Iterable[Buffer], **options: Any) -> None:
        self._obstore.put(self._store, check_key(key), data, **options)

    @contextmanager
    def _told(self, doing: str, key: str) -> Iterator[None]:
        kinds = self._obstore.exceptions
        where = f"{self.address}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            if isinstance(error, PmmError):
                raise
            raise NotFound(self._no_bucket(error) or f"{where} is not there") from None
        except kinds.AlreadyExistsError:
            raise AlreadyThere(f"{where} is there already") from None
        except (kinds.PermissionDeniedError, kinds.UnauthenticatedError) as error:
            refused = MediumError(
                f"cannot {doing} {where}: {_reason(error)}; check AWS_PROFILE or AWS_ACCESS_KEY_ID and what "
                "they may do"
            )
            refused.errno = errno.EACCES
            raise refused from None
        except kinds.BaseError as error:
            if missing := self._no_bucket(error):
                raise NotFound(missing) from None
            raise MediumError(f"cannot {doing} {where}: {_reason(error)}") from None

    def _no_bucket(self, error: Exception) -> str:
        if "NoSuchBucket" not in str(error):
            return ""
        return f"there is no bucket {self.bucket}; make it, or check the name and AWS_ENDPOINT_URL"


def _parts(blocks: Iterable[Buffer]) -> Iterator[bytes]:
    """The same bytes in parts of PART_BYTES, the last as it comes."""
    waiting: list[memoryview] = []
    room = PART_BYTES
    for block in blocks:
        view = memoryview(block).cast("B")
        while len(view) >= room:
            yield b"".join([*waiting, view[:room]])
            waiting, view, room = [], view[room:], PART_BYTES
        waiting.append(view)
        room -= len(view)
    if room < PART_BYTES:
        yield b"".join(waiting)


def _libraries() -> tuple[Any, Any]:
    """obstore and a boto3 session."""
    try:
        import boto3  # type: ignore[import-untyped]
        import obstore
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session  # type: ignore[import-untyped]
    except ImportError as error:
        raise ExtraMissing(f"a store in a bucket needs {error.name}: pip install 'pmmtalk[s3]'") from None
    try:
        return obstore, boto3.Session(botocore_session=Session())
    except BotoCoreError as error:
        raise BadInput(f"AWS_PROFILE: {error}; see ~/.aws/config") from None


def _connect(session: Any, bucket: str, prefix: str) -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    region = session.region_name or "us-east-1"
    endpoint = _endpoint(session)
    options: dict[str, Any] = {
        "region": region,
        "client_options": {**_CLIENT, "allow_http": endpoint.startswith("http://")},
        "retry_config": _RETRY,
        "disable_bulk_delete": True,  # not every provider has it
    }
    if endpoint:
        options["endpoint"] = endpoint
    if session.get_credentials() is None:
        options["skip_signature"] = True  # a public bucket can be read without
    else:
        options["credential_provider"] = Boto3CredentialProvider(session)
    return S3Store(bucket, prefix=prefix or None, **options)


def _endpoint(session: Any) -> str:
    """Where requests go if not to AWS itself: by environment, or else by profile."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    named = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return named or session._session.get_scoped_config().get("endpoint_url", "")


def _reason(error: Exception) -> str:
    """One line of what the server, or else the library, says."""
    text = str(error)
    if said := re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL):
        return f"{said[1]}: {said[2]}"
    return " ".join(text.partition("Debug source")[0].split())[:300]
