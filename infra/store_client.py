"""How an object store's endpoint is reached: boto3's client, with bounded retries and no proxy to this machine."""

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.config


def make_client(
    endpoint: str | None, credentials: tuple[str, ...] | None, attempts: int = 5, read_timeout: float = 60
) -> Any:
    """A client of boto3 for this endpoint; `read_timeout` in seconds. Its errors are boto3's."""
    options: dict[str, Any] = {"proxies": {}} if endpoint and is_loopback(endpoint) else {}
    config = botocore.config.Config(
        connect_timeout=min(5, read_timeout),
        read_timeout=read_timeout,
        retries={"mode": "standard", "total_max_attempts": attempts},
        s3={"addressing_style": "path"} if endpoint else {},
        max_pool_connections=32,
        **options,
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    # A session of our own: boto3's default session is not safe to create clients from in several threads.
    session = boto3.session.Session(*(credentials or ()))
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


def is_loopback(address: str) -> bool:
    """Whether an address, with or without a scheme, is this machine's own."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
