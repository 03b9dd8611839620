"""Delivery of one JSON document to a webhook: one bounded attempt; who calls decides about the next.

The address is a secret (it often holds a token), so messages name only its host. Redirects are not followed.
"""

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import requests

from infra.errors import ConfigError

VARIABLE = "FACTORY_WEBHOOK_URL"
_TIMEOUT = (5.0, 10.0)  # seconds to connect, and between two bytes of the answer
_TRY_AGAIN = frozenset({408, 425, 429})


def webhook_url(given: str | None) -> str | None:
    """The address given, else ``$FACTORY_WEBHOOK_URL``, else None. Raises ConfigError unless it is http(s)."""
    url = given or os.environ.get(VARIABLE) or None
    if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
        raise ConfigError(f"the webhook (--webhook or {VARIABLE}) is no http(s) address")
    return url


def host(url: str) -> str:
    """What may be shown of the address."""
    return urlsplit(url).hostname or "?"


def post(url: str, document: Mapping[str, Any]) -> tuple[bool, str]:
    """POST the document. Returns whether this was the last attempt worth making, and what happened, in words."""
    try:
        answer = requests.post(url, json=dict(document), timeout=_TIMEOUT, allow_redirects=False, stream=True)
        answer.close()
    except requests.RequestException as error:
        return False, f"{host(url)} was not reached ({type(error).__name__})"  # the error's text holds the address
    if 200 <= answer.status_code < 300:
        return True, f"{host(url)} took it"
    final = 300 <= answer.status_code < 500 and answer.status_code not in _TRY_AGAIN
    return final, f"{host(url)} answered {answer.status_code}"
