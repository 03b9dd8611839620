"""An S3 endpoint in memory, as much of boto3's client as `infra.store` asks of one.

A `Store` over it passes the contract of the real one (tests/infra/store), so tests that are about something else need
no server. Not here: what a network does, credentials, and other processes.
"""

import email.utils
import hashlib
import io
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

BUCKET = "factory"


@dataclass(frozen=True)
class Kept:
    """An object's bytes, their entity tag, and when they were written."""

    data: bytes
    etag: str
    modified: datetime


@dataclass
class Upload:
    """An unfinished multi-part upload."""

    key: str
    started: datetime
    parts: dict[int, bytes] = field(default_factory=dict)


class MemoryS3:
    """One bucket. Thread-safe. Names and arguments are boto3's."""

    def __init__(self) -> None:
        self._objects: dict[str, Kept] = {}
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.RLock()

    # -- objects -------------------------------------------------------------------------------------------------

    def head_bucket(self, Bucket: str) -> dict[str, Any]:
        if Bucket != BUCKET:
            raise refused("HeadBucket", "NoSuchBucket", 404)
        return {"ResponseMetadata": {"HTTPHeaders": {"date": email.utils.format_datetime(_now(), usegmt=True)}}}

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        kept = self._found("HeadObject", Bucket, Key)
        return {"ContentLength": len(kept.data), "ETag": kept.etag}

    def get_object(self, Bucket: str, Key: str, Range: str = "") -> dict[str, Any]:
        kept = self._found("GetObject", Bucket, Key)
        data = kept.data
        if Range:
            first, last = map(int, Range.removeprefix("bytes=").split("-"))
            if first >= len(data):
                raise refused("GetObject", "InvalidRange", 416)
            data = data[first : last + 1]
        return {"Body": io.BytesIO(data), "ETag": kept.etag}

    def put_object(
        self, Bucket: str, Key: str, Body: bytes = b"", IfNoneMatch: str = "", IfMatch: str = ""
    ) -> dict[str, Any]:
        self.head_bucket(Bucket)
        with self._lock:
            there = self._objects.get(Key)
            if IfMatch and there is None:
                raise refused("PutObject", "NoSuchKey", 404)
            if (IfNoneMatch and there) or (IfMatch and there and there.etag != IfMatch):
                raise refused("PutObject", "PreconditionFailed", 412)
            return {"ETag": self._keep(Key, bytes(Body))}

    def delete_object(self, Bucket: str, Key: str, IfMatch: str = "") -> dict[str, Any]:
        with self._lock:
            if IfMatch and self._found("DeleteObject", Bucket, Key).etag != IfMatch:
                raise refused("DeleteObject", "PreconditionFailed", 412)
            self._objects.pop(Key, None)
        return {}

    def upload_file(self, path: str, Bucket: str, Key: str, Config: Any = None) -> None:
        self.put_object(Bucket, Key, Path(path).read_bytes())

    def download_file(self, Bucket: str, Key: str, path: str, Config: Any = None) -> None:
        Path(path).write_bytes(self._found("GetObject", Bucket, Key).data)

    # -- multi-part uploads --------------------------------------------------------------------------------------

    def create_multipart_upload(self, Bucket: str, Key: str) -> dict[str, Any]:
        self.head_bucket(Bucket)
        upload = uuid.uuid4().hex
        with self._lock:
            self._uploads[upload] = Upload(Key, _now())
        return {"UploadId": upload}

    def upload_part(self, Bucket: str, Key: str, UploadId: str, PartNumber: int, Body: bytes) -> dict[str, Any]:
        with self._lock:
            self._begun("UploadPart", UploadId).parts[PartNumber] = bytes(Body)
        return {"ETag": _etag(Body)}

    def complete_multipart_upload(
        self, Bucket: str, Key: str, UploadId: str, MultipartUpload: dict[str, Sequence[dict[str, Any]]]
    ) -> dict[str, Any]:
        with self._lock:
            parts = self._begun("CompleteMultipartUpload", UploadId).parts
            named = [part["PartNumber"] for part in MultipartUpload["Parts"]]
            if any(_etag(parts[part["PartNumber"]]) != part["ETag"] for part in MultipartUpload["Parts"]):
                raise refused("CompleteMultipartUpload", "InvalidPart", 400)
            if named != sorted(named):
                raise refused("CompleteMultipartUpload", "InvalidPartOrder", 400)
            del self._uploads[UploadId]
            return {"ETag": self._keep(Key, b"".join(parts[number] for number in named))}

    def abort_multipart_upload(self, Bucket: str, Key: str, UploadId: str) -> dict[str, Any]:
        with self._lock:
            self._begun("AbortMultipartUpload", UploadId)
            del self._uploads[UploadId]
        return {}

    def list_multipart_uploads(self, Bucket: str, Prefix: str = "") -> dict[str, Any]:
        with self._lock:
            found = sorted(
                (upload.key, number, upload.started)
                for number, upload in self._uploads.items()
                if upload.key.startswith(Prefix)
            )
        return {"Uploads": [{"Key": key, "UploadId": number, "Initiated": at} for key, number, at in found]}

    # -- listings ------------------------------------------------------------------------------------------------

    def get_paginator(self, operation: str) -> "Pages":
        return Pages(self, operation)

    def list_objects_v2(self, Bucket: str, Prefix: str = "", MaxKeys: int | None = None) -> dict[str, Any]:
        answer = self.head_bucket(Bucket)
        with self._lock:
            found = sorted((key, kept) for key, kept in self._objects.items() if key.startswith(Prefix))[:MaxKeys]
        return answer | {
            "Contents": [
                {"Key": key, "Size": len(kept.data), "ETag": kept.etag, "LastModified": kept.modified}
                for key, kept in found
            ]
        }

    def list_parts(self, Bucket: str, Key: str, UploadId: str) -> dict[str, Any]:
        with self._lock:
            parts = self._begun("ListParts", UploadId).parts
            return {"Parts": [{"PartNumber": number, "Size": len(parts[number])} for number in sorted(parts)]}

    # -- internals -----------------------------------------------------------------------------------------------

    def _found(self, operation: str, bucket: str, key: str) -> Kept:
        if bucket != BUCKET:
            raise refused(operation, "NoSuchBucket", 404)
        with self._lock:
            if key not in self._objects:
                raise refused(operation, "NoSuchKey", 404)
            return self._objects[key]

    def _begun(self, operation: str, upload: str) -> Upload:
        if upload not in self._uploads:
            raise refused(operation, "NoSuchUpload", 404)
        return self._uploads[upload]

    def _keep(self, key: str, data: bytes) -> str:
        self._objects[key] = Kept(data, _etag(data), _now())
        return self._objects[key].etag


@dataclass(frozen=True)
class Pages:
    """A listing of boto3, all on one page."""

    client: MemoryS3
    operation: str

    def paginate(self, **where: Any) -> Iterator[dict[str, Any]]:
        yield getattr(self.client, self.operation)(**where)


def refused(operation: str, code: str, status: int) -> ClientError:
    """boto3's error for an endpoint's answer."""
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, operation)


def _now() -> datetime:
    return datetime.now(UTC)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
