"""How an object store's endpoint is reached: boto3's client, with bounded retries and no proxy to this machine.

boto3 gives up after a second of refused connections; `patiently` is for what is worth waiting for a server to restart.
"""

import ipaddress
import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.exceptions as bexc
import botocore.loaders
import botocore.session
import tenacity
from boto3.exceptions import Boto3Error, RetriesExceededError

from infra.errors import StoreError

Answer = TypeVar("Answer")

STYLE_VARIABLE = "FACTORY_S3_ADDRESSING_STYLE"
"""Where a bucket's name stands in an address: path (http://host/bucket, the default where an endpoint is given),
virtual (http://bucket.host), auto (boto3's choice)."""

OUTAGE_S = 60.0
"""How long an endpoint that has answered is waited for."""
_STATUSES = frozenset({429, 500, 502, 503, 504})  # 501 is an answer
_NOT_NOW = frozenset({"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling"})


def make_client(
    endpoint: str | None, credentials: tuple[str, ...] | None, attempts: int = 5, read_timeout: float = 60
) -> Any:
    """A client of boto3 for this endpoint; `read_timeout` in seconds. Its errors are boto3's."""
    style = os.environ.get(STYLE_VARIABLE) or ("path" if endpoint else "")
    if style not in ("", "path", "virtual", "auto"):
        raise StoreError(f"{STYLE_VARIABLE} is {style!r}; accepted: path, virtual, auto")
    options: dict[str, Any] = {"proxies": {}} if endpoint and is_loopback(endpoint) else {}
    config = botocore.config.Config(
        connect_timeout=min(5, read_timeout),
        read_timeout=read_timeout,
        retries={"mode": "standard", "total_max_attempts": attempts},
        s3={"addressing_style": style} if style else {},
        max_pool_connections=32,
        **options,
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    # A session of our own: boto3's default session is not safe to create clients from in several threads.
    own = botocore.session.Session()
    own.register_component("data_loader", _descriptions(own.get_config_variable("data_path")))
    session = boto3.session.Session(*(credentials or ()), botocore_session=own)
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


@cache
def _descriptions(folders: str | None) -> botocore.loaders.Loader:
    """botocore's descriptions of services, which every session reads anew by itself: 0.1 s of a core for each client,
    and every piece of work has a client or two."""
    return botocore.loaders.create_loader(folders)


def patiently(ask: Callable[[], Answer], seconds: float) -> Answer:
    """What `ask` returns; while the endpoint does not answer, or says that it cannot now, it is asked again for so
    long."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(passes),
        stop=tenacity.stop_after_delay(seconds),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=5),
        reraise=True,
    )
    return retrying(ask)


def passes(error: BaseException) -> bool:
    """Whether an error of boto3 is one that passes: no answer, or a fault of the server's own."""
    if isinstance(error, RetriesExceededError):  # of a download, each time for such a reason
        return True
    if isinstance(error, Boto3Error) and error.__context__ is not None:  # of a transfer: what went wrong is below it
        return passes(error.__context__)
    if isinstance(error, bexc.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status in _STATUSES or error.response.get("Error", {}).get("Code") in _NOT_NOW
    return isinstance(error, bexc.HTTPClientError | bexc.ConnectionError)


def is_loopback(address: str) -> bool:
    """Whether an address, with or without a scheme, is this machine's own."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
