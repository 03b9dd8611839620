"""Looking after an object store: objects with their ages, the store's own clock, unfinished uploads, careful deletes.

What `infra/artifacts/gc.py` and `infra/artifacts/leases.py` need beyond reading and writing. Does not cover life-cycle
rules; a rule that aborts unfinished multipart uploads is a good idea anyway, because some endpoints (MinIO) list an
upload only to those who name its exact object, and so hide it from `list_uploads`.
"""

import email.utils
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from infra.errors import StoreError
from infra.store.errors import code_of
from infra.store.s3 import Store

_CHANGED = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "NotFound", "404"})
_NO_UPLOAD = frozenset({"NoSuchUpload", "NoSuchKey", "NotFound", "404"})


@dataclass(frozen=True)
class StoredObject:
    """One object: name relative to the store, bytes, when the store says it was written, entity tag."""

    name: str
    size: int
    modified: datetime
    etag: str


@dataclass(frozen=True)
class PendingUpload:
    """A multipart upload that was neither completed nor aborted, and when the store says it began."""

    name: str
    upload_id: str
    started: datetime


def server_time(store: Store) -> datetime:
    """The store's present time, from the Date header of an answer (whole seconds). Raises StoreError."""
    try:
        # not of the bucket itself: a policy for a prefix does not permit that
        asked = {"Bucket": store.bucket, "Prefix": store._key(""), "MaxKeys": 1}
        answer = store._ask(lambda client: client.list_objects_v2(**asked))
    except Exception as error:
        raise store._error("reach", "", error) from error
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        return email.utils.parsedate_to_datetime(date).astimezone(UTC)
    except ValueError as error:
        raise StoreError(f"the object store answers with the date {date!r}, so ages cannot be told") from error


def list_objects(store: Store, prefix: str = "") -> Iterator[StoredObject]:
    """The objects whose names start with ``prefix``, in the endpoint's order. Raises StoreError."""
    for entry in _listed(store, "list_objects_v2", "Contents", prefix):
        modified = entry["LastModified"].astimezone(UTC)
        yield StoredObject(_relative(store, entry["Key"]), int(entry["Size"]), modified, str(entry["ETag"]))


def list_uploads(store: Store, prefix: str = "") -> Iterator[PendingUpload]:
    """The unfinished multipart uploads under ``prefix``, in the endpoint's order. Raises StoreError."""
    for entry in _listed(store, "list_multipart_uploads", "Uploads", prefix):
        yield PendingUpload(_relative(store, entry["Key"]), entry["UploadId"], entry["Initiated"].astimezone(UTC))


def upload_size(store: Store, upload: PendingUpload) -> int:
    """Bytes that the parts of an unfinished upload hold; 0 once it is over. Raises StoreError."""
    try:
        named = {"Key": store._key(upload.name), "UploadId": upload.upload_id}
        return sum(int(part["Size"]) for part in store._entries("list_parts", "Parts", **named))
    except Exception as error:
        if code_of(error) in _NO_UPLOAD:
            return 0
        raise store._error("list the parts of", upload.name, error) from error


def abort_upload(store: Store, upload: PendingUpload) -> None:
    """Give up an unfinished upload and its parts; one that is over already is fine. Raises StoreError."""
    try:
        store._ask(
            lambda client: client.abort_multipart_upload(
                Bucket=store.bucket, Key=store._key(upload.name), UploadId=upload.upload_id
            )
        )
    except Exception as error:
        if code_of(error) not in _NO_UPLOAD:
            raise store._error("abort the upload of", upload.name, error) from error


def delete_if_match(store: Store, name: str, etag: str) -> bool:
    """Delete the object only if it still has this entity tag; False if it changed or vanished. Raises StoreError.

    AWS S3 (since 2025) and SeaweedFS honour the condition. An endpoint that ignores it deletes whatever is there, so
    callers must survive that.
    """
    try:
        store._ask(lambda client: client.delete_object(Bucket=store.bucket, Key=store._key(name), IfMatch=etag))
        return True
    except Exception as error:
        if code_of(error) in _CHANGED:
            return False
        raise store._error("delete", name, error) from error


def _listed(store: Store, operation: str, field: str, prefix: str) -> Sequence[dict[str, Any]]:
    try:
        return store._entries(operation, field, Prefix=store._key(prefix))
    except Exception as error:
        raise store._error("list", prefix, error) from error


def _relative(store: Store, key: str) -> str:
    return key[len(store.prefix) + 1 :] if store.prefix else key
