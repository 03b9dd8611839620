"""What an MLflow server's answers and failures mean, in one line for a person: what it refused, and what to do."""

import json
from urllib.parse import urlsplit

import requests
import urllib3
from mlflow.exceptions import MlflowException

FAULTS = (MlflowException, requests.RequestException, urllib3.exceptions.HTTPError)
"""What MLflow's client raises where a server or the network fails: files travel past its own exceptions."""
_CHARACTERS = 600  # why a connection failed stands at the end


def refusal(uri: str, answer: requests.Response) -> str | None:
    """What is wrong with an answer to a search of experiments; None for one as it should be."""
    status, text = answer.status_code, one_line(answer.text)
    if status == 200:
        if _is_object(answer.text):
            return None
        return (
            f"what listens at {uri} answers with something else than MLflow's API does ({text!r}): a page to log in, "
            "or another service; correct MLFLOW_TRACKING_URI, or set MLFLOW_TRACKING_TOKEN"
        )
    if "host header" in text.lower() or "rebinding" in text.lower():
        return (
            f"the MLflow server at {uri} does not know itself by the name {urlsplit(uri).netloc} ({status}: {text}); "
            "start it with --allowed-hosts and that name (MLFLOW_SERVER_ALLOWED_HOSTS), or use a name that it knows"
        )
    if status == 401:
        return _credentials(uri, "401")
    if status == 403:
        return _credentials(uri, f"403: {text}" if text else "403")
    if status == 407:
        return f"the proxy on the way to {uri} wants credentials (407); put the server's host into NO_PROXY"
    if status in (404, 405):
        return (
            f"{uri} answers {status} to a search of experiments: no MLflow server, or one below another path; correct "
            "MLFLOW_TRACKING_URI"
        )
    return f"the MLflow server at {uri} does not list its experiments ({status}: {text}); see its log"


def unreachable(uri: str, error: Exception) -> str:
    """No answer at all."""
    text = one_line(str(error))
    if isinstance(error, requests.exceptions.SSLError) or "SSLError" in text or "CERTIFICATE_VERIFY" in text:
        return (
            f"no TLS connection with the MLflow server at {uri} ({text}); set MLFLOW_TRACKING_SERVER_CERT_PATH to its "
            "certificate authority, or correct http and https in MLFLOW_TRACKING_URI"
        )
    if isinstance(error, requests.exceptions.ProxyError) or "ProxyError" in text:
        return f"the proxy on the way to {uri} does not answer ({text}); put the server's host into NO_PROXY"
    return f"the MLflow server at {uri} is unreachable ({text}); start it (make up), or correct MLFLOW_TRACKING_URI"


def one_line(text: str) -> str:
    """The beginning of a text, or of a page, as one line."""
    line = " ".join(text.split())
    return line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS]} …"


def _credentials(uri: str, what: str) -> str:
    return (
        f"the MLflow server at {uri} refused the credentials ({what}); "
        "check MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN"
    )


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
