"""An object store: any S3 endpoint through boto3, with clear errors, conditional writes and verified files.

Covers whole objects, byte ranges, put-if-absent and replace-if-match (the two primitives every other guarantee rests
on), multi-part file transfer with our own SHA-256, listing and a preflight check. Does not cover reading an
object piece by piece (`infra.store.source`), writing a file while it is being made (`infra.store.writer`), nor creating
buckets, access policies or life-cycle rules: the bucket must exist and the credentials come from boto3's usual chain.

All names are relative to the store's prefix. Retries are bounded: an endpoint that has answered is given a minute to
come back (`hasty` is for what need not), one that never did a second. What still fails is a ``StoreError`` that names
endpoint and bucket.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.exceptions as bexc
from boto3.s3.transfer import TransferConfig

from infra.digests import file_sha256
from infra.errors import StoreError
from infra.store.client import OUTAGE_S, Answer, make_client, passes, patiently
from infra.store.errors import (
    CONFLICT,
    LOST_RACE,
    MISSING,
    ObjectCorrupted,
    ObjectMissing,
    code_of,
    explained,
    retries_of,
    where,
)

if TYPE_CHECKING:
    from infra.store.writer import StoreWriter

_MIB = 1 << 20
_TRANSFER = TransferConfig(multipart_threshold=32 * _MIB, multipart_chunksize=16 * _MIB, max_concurrency=4)
_STREAM_ATTEMPTS = 4
_CONFLICT_ATTEMPTS = 20


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes and entity tag of an object, as the endpoint reports them."""

    size: int
    etag: str


@dataclass(frozen=True)
class FileRef:
    """A stored file: its name inside the store, the SHA-256 of its bytes and its size."""

    name: str
    sha256: str
    size: int


def split_uri(uri: str) -> tuple[str, str]:
    """``s3://bucket/some/key`` -> (``bucket``, ``some/key``). Raises StoreError for anything else."""
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
        raise StoreError(f"not an object URI: {uri!r}; accepted: s3://<bucket>/<name>")
    return parts.netloc, parts.path.lstrip("/")


class Store:
    """One bucket (and prefix) of an S3 endpoint.

    Safe to share between threads. Picklable: the client, and with it the credentials, stays behind; the copy creates
    its own from the environment of the process it lands in.
    """

    def __init__(
        self,
        bucket: str,
        endpoint: str | None = None,
        prefix: str = "",
        credentials: tuple[str, ...] | None = None,
    ) -> None:
        """``credentials`` (access key, secret key) override boto3's chain in this process; they are not pickled."""
        self.bucket = bucket
        self.endpoint = endpoint or None
        self.prefix = prefix.strip("/")
        self._credentials = credentials
        self._reset()

    def _reset(self) -> None:
        """What no copy takes along."""
        self._client_: Any = None
        self._answered = False
        self._patience = OUTAGE_S
        self._hasty: dict[float | None, Store] = {}
        self._lock = threading.Lock()

    def hasty(self, seconds: float | None = None) -> Store:
        """The same store for requests that are worth nothing later: none waits for an endpoint to come back, and with
        ``seconds`` each is tried once, and for so long."""
        if seconds not in self._hasty:
            client = self._client()
            if seconds is not None:
                client = make_client(self.endpoint, self._credentials, attempts=1, read_timeout=seconds)
            twin = type(self)(self.bucket, self.endpoint, self.prefix, self._credentials)
            twin._client_, twin._patience = client, 0.0
            self._hasty.setdefault(seconds, twin)  # of two threads the first
        return self._hasty[seconds]

    @classmethod
    def from_env(cls) -> Store:
        """From FACTORY_S3_BUCKET (default ``factory``), FACTORY_S3_PREFIX (several factories in one bucket) and
        FACTORY_S3_ENDPOINT (or AWS_ENDPOINT_URL_S3)."""
        endpoint = os.environ.get("FACTORY_S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL_S3")
        bucket, prefix = os.environ.get("FACTORY_S3_BUCKET") or "factory", os.environ.get("FACTORY_S3_PREFIX", "")
        return cls(bucket, endpoint, prefix)

    def beside(self, bucket: str) -> Store:
        """Another bucket of the same endpoint, without a prefix."""
        other = Store(bucket, self.endpoint, "", self._credentials)
        other._answered = self._answered
        return other

    def __getstate__(self) -> dict[str, Any]:
        # Whoever sends a task has spoken with the endpoint, so a worker that starts in an outage waits too.
        return {
            "bucket": self.bucket, "endpoint": self.endpoint, "prefix": self.prefix, "_answered": self._answered,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._credentials = None
        self._reset()
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"Store({self.uri('')!r}, endpoint={self.endpoint!r})"

    # -- names ---------------------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def uri(self, name: str) -> str:
        """``s3://bucket/prefix/name``."""
        return f"s3://{self.bucket}/{self._key(name)}"

    # -- whole objects -------------------------------------------------------------------------------------------

    def get(self, name: str) -> bytes:
        """The object's bytes. Raises ObjectMissing or StoreError."""
        return self._read(name, None)[0]

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``start``; a range outside the object is a StoreError, never a short read."""
        if start < 0 or length < 0:
            raise StoreError(f"bad range {start}+{length} of {self.uri(name)}: both numbers must be 0 or more")
        if length == 0:
            return b""
        data = self._read(name, f"bytes={start}-{start + length - 1}")[0]
        if len(data) != length:
            raise StoreError(f"{self.uri(name)} ends inside the range {start}+{length}: got {len(data)} bytes")
        return data

    def get_with_etag(self, name: str) -> tuple[bytes, str] | None:
        """The bytes and the entity tag they had, or None if there is no such object."""
        try:
            return self._read(name, None)
        except ObjectMissing:
            return None

    def head(self, name: str) -> ObjectInfo | None:
        """Size and entity tag, or None if there is no such object."""
        try:
            answer = self._ask(lambda client: client.head_object(Bucket=self.bucket, Key=self._key(name)))
        except Exception as error:
            if code_of(error) in MISSING:
                return None
            raise self._error("look at", name, error) from error
        return ObjectInfo(int(answer["ContentLength"]), str(answer["ETag"]))

    def put(self, name: str, data: bytes) -> None:
        """Store the bytes, replacing what was there."""
        self.call("put_object", "write", name, Body=data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Store the bytes unless the object exists; of any number of racing writers exactly one gets True.

        When an answer got lost and the retry meets the object, its bytes decide whose it is, so writers who must
        be told apart write different bytes.
        """
        return self._conditional_put(name, data, {"IfNoneMatch": "*"})

    def replace_if_match(self, name: str, data: bytes, etag: str) -> bool:
        """Replace the object only if it still has this entity tag; False if it changed or vanished."""
        return self._conditional_put(name, data, {"IfMatch": etag})

    def delete(self, name: str) -> None:
        """Delete the object; deleting what does not exist is fine."""
        try:
            self._ask(lambda client: client.delete_object(Bucket=self.bucket, Key=self._key(name)))
        except Exception as error:
            if code_of(error) not in MISSING:
                raise self._error("delete", name, error) from error

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names (relative to the store) that start with ``prefix``, in the endpoint's order."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        try:
            entries = self._entries("list_objects_v2", "Contents", Prefix=self._key(prefix))
        except Exception as error:
            raise self._error("list", prefix, error) from error
        yield from (entry["Key"][cut:] for entry in entries)

    # -- files ---------------------------------------------------------------------------------------------------

    def upload_file(self, name: str, path: str | Path) -> FileRef:
        """Store a file (in parts when large) and return its reference; the stored size is checked."""
        try:
            size, sha256 = os.stat(path).st_size, file_sha256(path)
            self._ask(lambda client: client.upload_file(str(path), self.bucket, self._key(name), Config=_TRANSFER))
        except OSError as error:
            raise StoreError(f"cannot read {path} to store it as {self.uri(name)}: {error}") from error
        except Exception as error:
            raise self._error("write", name, error) from error
        info = self.head(name)
        if info is None or info.size != size:
            found = "nothing" if info is None else f"{info.size} bytes"
            raise StoreError(f"{self.uri(name)} holds {found} after uploading {size} bytes from {path}")
        return FileRef(name, sha256, size)

    def open_write(self, name: str) -> StoreWriter:
        """A file to write from front to back; the object appears when it is closed."""
        from infra.store.writer import StoreWriter  # not above: it needs this module

        return StoreWriter(self, name)

    def download_file(self, ref_or_name: FileRef | str, path: str | Path, sha256: str | None = None) -> Path:
        """Fetch an object to ``path``: complete and verified, or not there at all (atomic rename).

        The SHA-256 is that of the reference, or the one given; without either only the transfer is checked.
        Raises StoreError on corruption, ObjectMissing if there is no such object.
        """
        name = ref_or_name.name if isinstance(ref_or_name, FileRef) else ref_or_name
        expected = sha256 or (ref_or_name.sha256 if isinstance(ref_or_name, FileRef) else None)
        target = Path(path)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._ask(
                    lambda client: client.download_file(self.bucket, self._key(name), str(part), Config=_TRANSFER)
                )
            except Exception as error:
                raise self._error("read", name, error) from error
            if expected is not None and (found := file_sha256(part)) != expected:
                raise ObjectCorrupted(
                    f"{self.uri(name)} at {where(self.endpoint, self.bucket)} is corrupted: SHA-256 {found}, "
                    f"expected {expected}; "
                    "delete the object (it will be made again) and check the disk behind the store"
                )
            os.replace(part, target)
        except OSError as error:
            raise StoreError(f"cannot write {target}: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        return target

    # -- preflight -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove that the endpoint answers, accepts the credentials, has the bucket, keeps what it is sent, and honours
        conditional writes, also at the same moment. Raises StoreError, within half a minute where it does not answer.
        """
        from infra.store.check import check  # not above: it needs this module

        probe = Store(self.bucket, self.endpoint, self.prefix)
        probe._client_ = make_client(self.endpoint, self._credentials, attempts=2, read_timeout=10)
        probe._patience = 0.0
        check(probe)

    def call(self, operation: str, verb: str, name: str, **arguments: Any) -> Any:
        """One request of the S3 client about one object; where it fails, a StoreError: "cannot <verb> <name>"."""
        try:
            return self._ask(
                lambda client: getattr(client, operation)(Bucket=self.bucket, Key=self._key(name), **arguments)
            )
        except Exception as error:
            raise self._error(verb, name, error) from error

    # -- internals -----------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        if self._client_ is None:
            with self._lock:
                if self._client_ is None:
                    try:
                        self._client_ = make_client(self.endpoint, self._credentials)
                    except Exception as error:
                        raise self._error("use", "", error) from error
        return self._client_

    def _ask(self, request: Callable[[Any], Answer]) -> Answer:
        """The answer to a request; an endpoint that has answered before is given time to come back."""
        client = self._client()
        try:
            answer = patiently(lambda: request(client), self._patience if self._answered else 0.0)
        except bexc.ClientError as error:
            self._answered = self._answered or not passes(error)
            raise
        self._answered = True
        return answer

    def _entries(self, operation: str, field: str, **where: Any) -> Sequence[dict[str, Any]]:
        """What the pages of a listing hold. Errors are boto3's."""

        def ask(client: Any) -> Sequence[dict[str, Any]]:
            pages = client.get_paginator(operation).paginate(Bucket=self.bucket, **where)
            return [entry for page in pages for entry in page.get(field, ())]

        return self._ask(ask)

    def _read(self, name: str, byte_range: str | None) -> tuple[bytes, str]:
        extra = {} if byte_range is None else {"Range": byte_range}
        for attempt in range(_STREAM_ATTEMPTS):
            try:
                answer = self._ask(lambda client: client.get_object(Bucket=self.bucket, Key=self._key(name), **extra))
                with contextlib.closing(answer["Body"]) as body:
                    return body.read(), str(answer["ETag"])
            except (bexc.IncompleteReadError, bexc.ResponseStreamingError, bexc.ReadTimeoutError) as error:
                if attempt == _STREAM_ATTEMPTS - 1:
                    raise self._error("read", name, error) from error
            except Exception as error:
                raise self._error("read", name, error) from error
        raise AssertionError("unreachable")

    def _conditional_put(self, name: str, data: bytes, condition: dict[str, str]) -> bool:
        asked = 0

        def put(client: Any) -> None:
            nonlocal asked
            asked += 1
            client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, **condition)

        for attempt in range(_CONFLICT_ATTEMPTS):
            try:
                self._ask(put)
                return True
            except Exception as error:
                code = code_of(error)
                if code in CONFLICT and attempt < _CONFLICT_ATTEMPTS - 1:
                    continue
                if code in LOST_RACE:
                    # An earlier try may have been applied and its answer lost: then what is there is ours.
                    return asked + retries_of(error) > 1 and (self.get_with_etag(name) or (None,))[0] == data
                if "IfMatch" in condition and code in MISSING:
                    return False
                raise self._error("write", name, error) from error
        raise AssertionError("unreachable")

    def _error(self, verb: str, name: str, error: Exception) -> StoreError:
        return explained(f"cannot {verb} {self.uri(name)}", self.endpoint, self.bucket, error)
