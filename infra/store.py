"""An object store: any S3 endpoint through boto3, with clear errors, conditional writes and verified files.

Covers whole objects, byte ranges, put-if-absent and replace-if-match (the two primitives every other guarantee rests
on), multi-part file transfer with our own SHA-256, listing and a preflight check. Does not cover reading an
object piece by piece (`infra.store_source`), writing a file while it is being made (`infra.store_writer`), nor creating
buckets, access policies or life-cycle rules: the bucket must exist and the credentials come from boto3's usual chain.

All names are relative to the store's prefix. Retries are bounded (botocore's standard mode); what still fails is a
``StoreError`` that names the endpoint and the bucket.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.exceptions as bexc
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig

from infra.digests import file_sha256
from infra.errors import StoreError
from infra.store_client import make_client

if TYPE_CHECKING:
    from infra.store_writer import StoreWriter

_MIB = 1 << 20
_TRANSFER = TransferConfig(multipart_threshold=32 * _MIB, multipart_chunksize=16 * _MIB, max_concurrency=4)
_REFUSED = frozenset(
    {
        "AccessDenied",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "InvalidClientTokenId",
        "401",
        "403",
    }
)
_MISSING = frozenset({"NoSuchKey", "NotFound", "404"})
_LOST_RACE = frozenset({"PreconditionFailed", "412"})
_CONFLICT = frozenset({"ConditionalRequestConflict", "409"})
_STREAM_ATTEMPTS = 4
_CONFLICT_ATTEMPTS = 20


class ObjectMissing(StoreError):
    """The named object does not exist."""


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
        self._client_: Any = None
        self._hasty: dict[float, Store] = {}
        self._lock = threading.Lock()

    def hasty(self, seconds: float) -> Store:
        """The same store for requests that are worth nothing later: each is tried once, and for so long."""
        with self._lock:
            if seconds not in self._hasty:
                twin = type(self)(self.bucket, self.endpoint, self.prefix, self._credentials)
                twin._client_ = make_client(self.endpoint, self._credentials, attempts=1, read_timeout=seconds)
                self._hasty[seconds] = twin
            return self._hasty[seconds]

    @classmethod
    def from_env(cls) -> Store:
        """From FACTORY_S3_BUCKET (default ``factory``), FACTORY_S3_PREFIX (several factories in one bucket) and
        FACTORY_S3_ENDPOINT (or AWS_ENDPOINT_URL_S3)."""
        endpoint = os.environ.get("FACTORY_S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL_S3")
        bucket, prefix = os.environ.get("FACTORY_S3_BUCKET") or "factory", os.environ.get("FACTORY_S3_PREFIX", "")
        return cls(bucket, endpoint, prefix)

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "endpoint": self.endpoint, "prefix": self.prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._credentials = None
        self._client_ = None
        self._hasty = {}
        self._lock = threading.Lock()

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
            answer = self._client().head_object(Bucket=self.bucket, Key=self._key(name))
        except Exception as error:
            if _code(error) in _MISSING:
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
            self._client().delete_object(Bucket=self.bucket, Key=self._key(name))
        except Exception as error:
            if _code(error) not in _MISSING:
                raise self._error("delete", name, error) from error

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names (relative to the store) that start with ``prefix``, in the endpoint's order."""
        cut = len(self.prefix) + 1 if self.prefix else 0
        try:
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._key(prefix)):
                for entry in page.get("Contents", ()):
                    yield entry["Key"][cut:]
        except Exception as error:
            raise self._error("list", prefix, error) from error

    # -- files ---------------------------------------------------------------------------------------------------

    def upload_file(self, name: str, path: str | Path) -> FileRef:
        """Store a file (in parts when large) and return its reference; the stored size is checked."""
        try:
            size, sha256 = os.stat(path).st_size, file_sha256(path)
            self._client().upload_file(str(path), self.bucket, self._key(name), Config=_TRANSFER)
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
        from infra.store_writer import StoreWriter  # not above: it needs this module

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
                self._client().download_file(self.bucket, self._key(name), str(part), Config=_TRANSFER)
            except Exception as error:
                raise self._error("read", name, error) from error
            if expected is not None and (found := file_sha256(part)) != expected:
                raise StoreError(
                    f"{self.uri(name)} at {self._where()} is corrupted: SHA-256 {found}, expected {expected}; "
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
        """Prove that the endpoint answers, accepts the credentials, has the bucket and honours conditional writes."""
        probe = Store(self.bucket, self.endpoint, self.prefix)
        probe._client_ = make_client(self.endpoint, self._credentials, attempts=2, read_timeout=10)
        try:
            probe._client().head_bucket(Bucket=self.bucket)
        except Exception as error:
            if _code(error) in _MISSING | {"NoSuchBucket"}:
                raise self._no_bucket() from error
            raise self._error("reach", "", error) from error
        name = f"checks/{uuid.uuid4().hex}"
        try:
            first, second = probe.put_if_absent(name, b"first"), probe.put_if_absent(name, b"second")
            replaced = probe.replace_if_match(name, b"third", '"00000000000000000000000000000000"')
            if not first or second or replaced or probe.get(name) != b"first":
                raise StoreError(
                    f"the object store at {self._where()} ignores conditional writes (If-None-Match, If-Match), "
                    "without which two runs could overwrite each other; use an S3 server that honours them "
                    "(AWS S3, SeaweedFS, MinIO, Ceph from Tentacle on)"
                )
        finally:
            with contextlib.suppress(StoreError):
                probe.delete(name)

    def call(self, operation: str, verb: str, name: str, **arguments: Any) -> Any:
        """One request of the S3 client about one object; where it fails, a StoreError: "cannot <verb> <name>"."""
        try:
            return getattr(self._client(), operation)(Bucket=self.bucket, Key=self._key(name), **arguments)
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

    def _read(self, name: str, byte_range: str | None) -> tuple[bytes, str]:
        extra = {} if byte_range is None else {"Range": byte_range}
        for attempt in range(_STREAM_ATTEMPTS):
            try:
                answer = self._client().get_object(Bucket=self.bucket, Key=self._key(name), **extra)
                with contextlib.closing(answer["Body"]) as body:
                    return body.read(), str(answer["ETag"])
            except (bexc.IncompleteReadError, bexc.ResponseStreamingError, bexc.ReadTimeoutError) as error:
                if attempt == _STREAM_ATTEMPTS - 1:
                    raise self._error("read", name, error) from error
            except Exception as error:
                raise self._error("read", name, error) from error
        raise AssertionError("unreachable")

    def _conditional_put(self, name: str, data: bytes, condition: dict[str, str]) -> bool:
        for attempt in range(_CONFLICT_ATTEMPTS):
            try:
                self._client().put_object(Bucket=self.bucket, Key=self._key(name), Body=data, **condition)
                return True
            except Exception as error:
                code = _code(error)
                if code in _CONFLICT and attempt < _CONFLICT_ATTEMPTS - 1:
                    continue
                if code in _LOST_RACE:
                    # The first try may have been applied and its answer lost: then what is there is ours.
                    return _retries(error) > 0 and (self.get_with_etag(name) or (None,))[0] == data
                if "IfMatch" in condition and code in _MISSING:
                    return False
                raise self._error("write", name, error) from error
        raise AssertionError("unreachable")

    def _where(self) -> str:
        return f"{self.endpoint or 'the default AWS endpoint'}, bucket {self.bucket!r}"

    def _no_bucket(self) -> StoreError:
        return StoreError(
            f"the object store at {self.endpoint or 'the default AWS endpoint'} has no bucket {self.bucket!r}; "
            "create it, or name an existing one in FACTORY_S3_BUCKET"
        )

    def _error(self, verb: str, name: str, error: Exception) -> StoreError:
        if isinstance(error, StoreError):
            return error
        code = _code(error)
        text = str(error)
        what = f"cannot {verb} {self.uri(name)}"
        if code == "NoSuchBucket" or "NoSuchBucket" in text:
            return self._no_bucket()
        if code in _MISSING or "(404)" in text:
            return ObjectMissing(f"{what}: no such object at {self._where()}")
        if code in _REFUSED or "Forbidden" in text:
            return StoreError(
                f"{what}: the object store at {self._where()} refused the credentials ({code or 'forbidden'}); "
                "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what that identity may do"
            )
        if isinstance(error, bexc.NoCredentialsError | bexc.PartialCredentialsError):
            return StoreError(
                f"{what}: no credentials for the object store at {self._where()}; "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or configure an AWS profile"
            )
        if isinstance(error, bexc.HTTPClientError | bexc.ConnectionError):
            return StoreError(
                f"{what}: the object store at {self._where()} is unreachable ({text}); "
                "start it (make up), or correct FACTORY_S3_ENDPOINT"
            )
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            return StoreError(f"{what}: {text}; FACTORY_S3_ENDPOINT must look like http://host:port")
        if code == "InvalidRange":
            return StoreError(f"{what}: the range lies outside the object")
        if isinstance(error, bexc.BotoCoreError | bexc.ClientError | Boto3Error):
            return StoreError(f"{what} at {self._where()}: {text}")
        raise error


def _code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, bexc.ClientError) else ""


def _retries(error: Exception) -> int:
    if not isinstance(error, bexc.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))
