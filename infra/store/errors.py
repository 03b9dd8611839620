"""What an object store's errors mean: those of boto3, as StoreErrors that say what, where and what to do about it."""

from __future__ import annotations

import botocore.exceptions as bexc
from boto3.exceptions import Boto3Error

from infra.errors import StoreError

MISSING = frozenset({"NoSuchKey", "NotFound", "404"})
LOST_RACE = frozenset({"PreconditionFailed", "412"})
CONFLICT = frozenset({"ConditionalRequestConflict", "409"})
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


class ObjectMissing(StoreError):
    """The named object does not exist."""


class ObjectCorrupted(StoreError):
    """The object has other bytes than were stored."""


def code_of(error: Exception) -> str:
    """The code in an endpoint's answer; empty for errors that are none."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, bexc.ClientError) else ""


def retries_of(error: Exception) -> int:
    """How often botocore had asked again before it raised this."""
    if not isinstance(error, bexc.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def where(endpoint: str | None, bucket: str) -> str:
    """How messages name a place."""
    return f"{endpoint or 'the default AWS endpoint'}, bucket {bucket!r}"


def no_bucket(endpoint: str | None, bucket: str) -> StoreError:
    """The endpoint has no such bucket."""
    return StoreError(
        f"the object store at {endpoint or 'the default AWS endpoint'} has no bucket {bucket!r}; "
        "create it, or name an existing one in FACTORY_S3_BUCKET"
    )


def explained(what: str, endpoint: str | None, bucket: str, error: Exception) -> StoreError:
    """The StoreError for an error of boto3 while doing `what` ("cannot read s3://…"). Raises any other error again."""
    if isinstance(error, StoreError):
        return error
    code, text, place = code_of(error), str(error), where(endpoint, bucket)
    if code == "NoSuchBucket" or "NoSuchBucket" in text:
        return no_bucket(endpoint, bucket)
    if code in MISSING or "(404)" in text:
        return ObjectMissing(f"{what}: no such object at {place}")
    if code in _REFUSED or "Forbidden" in text:
        return StoreError(
            f"{what}: the object store at {place} refused the credentials ({code or 'forbidden'}); "
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what that identity may do"
        )
    if isinstance(error, bexc.NoCredentialsError | bexc.PartialCredentialsError):
        return StoreError(
            f"{what}: no credentials for the object store at {place}; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or configure an AWS profile"
        )
    if isinstance(error, bexc.HTTPClientError | bexc.ConnectionError):
        return StoreError(
            f"{what}: the object store at {place} is unreachable ({text}); "
            "start it (make up), or correct FACTORY_S3_ENDPOINT"
        )
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return StoreError(f"{what}: {text}; FACTORY_S3_ENDPOINT must look like http://host:port")
    if code == "InvalidRange":
        return StoreError(f"{what}: the range lies outside the object")
    if isinstance(error, bexc.BotoCoreError | bexc.ClientError | Boto3Error):
        return StoreError(f"{what} at {place}: {text}")
    raise error
