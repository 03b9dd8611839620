"""What an object store's errors mean: those of boto3, as StoreErrors that say what, where and what to do about it."""

from __future__ import annotations

import botocore.exceptions as bexc
from boto3.exceptions import Boto3Error
from botocore.parsers import ResponseParserError

from infra.errors import StoreError

MISSING = frozenset({"NoSuchKey", "NotFound", "404"})
LOST_RACE = frozenset({"PreconditionFailed", "412"})
CONFLICT = frozenset({"ConditionalRequestConflict", "409"})
NO_CONDITIONS = frozenset({"NotImplemented", "501", "InvalidArgument", "InvalidRequest", "MethodNotAllowed", "405"})
"""What a server says that has no conditional writes, where it took the same write without a condition."""
_CREDENTIALS = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "InvalidClientTokenId",
        "TokenRefreshRequired",
        "Unauthorized",
        "401",
    }
)
_PERMISSION = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "403"})
_REGION = frozenset(
    {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "301", "307", "308"}
)
_CLOCK = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
_FULL = frozenset(
    {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage", "507"}
)
_HOST_STYLE = frozenset({"SecondLevelDomainForbidden", "VirtualHostDomainRequired", "PathStyleNotSupported"})
_CHECKSUMS = frozenset(
    {
        "InvalidArgument",
        "NotImplemented",
        "XAmzContentSHA256Mismatch",
        "MissingContentLength",
        "InvalidRequest",
        "InvalidDigest",
        "BadDigest",
        "MalformedTrailerError",
        "UnsupportedHeader",
        "411",
        "501",
    }
)
"""How servers refuse a write whose checksum, or the way in which it is sent, they do not know."""
_WRITES = frozenset({"PutObject", "UploadPart", "CreateMultipartUpload", "CompleteMultipartUpload"})
CHECKSUM_VARIABLES = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"


class ObjectMissing(StoreError):
    """The named object does not exist."""


class ObjectCorrupted(StoreError):
    """The object has other bytes than were stored."""


def code_of(error: BaseException) -> str:
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
    if _no_s3(error, code):
        return StoreError(
            f"{what}: what listens at {place} does not answer as an object store does ({text}); "
            "FACTORY_S3_ENDPOINT must be the address of S3 itself, not of a console, a proxy or another service"
        )
    if code in MISSING or "(404)" in text:
        return ObjectMissing(f"{what}: no such object at {place}")
    if (advice := _advice(code, text, _operation(error))) is not None:
        return StoreError(f"{what}: the object store at {place} {advice}")
    if isinstance(error, bexc.NoCredentialsError | bexc.PartialCredentialsError):
        return StoreError(
            f"{what}: no credentials for the object store at {place}; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or configure an AWS profile"
        )
    if isinstance(error, bexc.SSLError):
        return StoreError(
            f"{what}: no TLS connection with the object store at {place} ({text}); set AWS_CA_BUNDLE to the file of "
            "its certificate authority, or correct http and https in FACTORY_S3_ENDPOINT"
        )
    if isinstance(error, bexc.ProxyConnectionError):
        return StoreError(
            f"{what}: the proxy on the way to the object store at {place} does not answer ({text}); "
            "correct HTTP_PROXY or HTTPS_PROXY, or put the store's host into NO_PROXY"
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
    if isinstance(error, bexc.FlexibleChecksumError):
        return StoreError(f"{what} at {place}: {text}; if its checksums are of another kind, set {CHECKSUM_VARIABLES}")
    if isinstance(error, bexc.BotoCoreError | bexc.ClientError | Boto3Error):
        return StoreError(f"{what} at {place}: {text}")
    raise error


def _advice(code: str, text: str, operation: str) -> str | None:
    """What an endpoint's refusal means and what to do about it, to be read after "the object store"; None for codes
    that say it themselves."""
    if code in _CREDENTIALS:
        return (
            f"refused the credentials ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(of temporary ones AWS_SESSION_TOKEN too)"
        )
    if code in _HOST_STYLE or "virtual hosted style" in text:
        return (
            f"wants the bucket's name in the address ({code}); set FACTORY_S3_ADDRESSING_STYLE=virtual here and for "
            "the cluster's workers"
        )
    if code in _PERMISSION or "Forbidden" in text:
        reason = "does not permit it" if code == "AccessDenied" else "refused the credentials or does not permit it"
        return (
            f"{reason} ({code or 'forbidden'}); AWS_ACCESS_KEY_ID needs s3:GetObject, s3:PutObject, s3:DeleteObject, "
            "s3:AbortMultipartUpload and s3:ListBucket (without which a missing object answers 403 too); where that is "
            "granted for a prefix alone, set FACTORY_S3_PREFIX to it"
        )
    if code in _REGION:
        return f"has the bucket in another region ({text}); set AWS_REGION to that"
    if code in _CLOCK:
        return f"refused the request's time ({code}); set this machine's clock"
    if code in _FULL:
        return f"has no room left ({code}); free some, see `python -m pipeline gc`"
    if code in _CHECKSUMS and operation in _WRITES:
        return (
            f"did not take what was sent ({text}); servers that do not know the newer checksums need "
            f"{CHECKSUM_VARIABLES}, here and for the cluster's workers"
        )
    return None


def _no_s3(error: Exception, code: str) -> bool:
    """Whether the answer is none of an object store: a page instead of XML, or a refused write without a word."""
    if isinstance(error, ResponseParserError):
        return True
    return _operation(error) in _WRITES and code in ("400", "404", "405")


def _operation(error: Exception) -> str:
    return error.operation_name if isinstance(error, bexc.ClientError) else ""
