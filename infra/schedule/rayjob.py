"""One scheduled retraining on Kubernetes: creates a RayJob, waits for its end, reports it.

The RayJob is named after the Kubernetes Job that this pod belongs to, whose name Kubernetes derives from the tick, so
a pod that replaces a lost one finds the RayJob there and waits for it. (The very same name would not do: KubeRay's
submitter is a Job named as its RayJob.) Waiting is what makes the CronJob's
``concurrencyPolicy: Forbid`` mean that two retrainings never overlap. The Job owns the RayJob, so that the CronJob's
history limits remove both. Covers one RayJob; KubeRay runs it. The command is ``infra.rayjob``.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
import yaml

from infra.errors import ConfigError, FactoryError
from infra.schedule import webhook
from infra.schedule.scheduler import mlflow_run

SUITE_LABEL = "expert-factory/suite"
_ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})
_JOB_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_POLL = 15.0  # seconds
_TIMEOUT = (5.0, 30.0)
_ATTEMPTS = 5  # of the webhook
_REFUSALS = 8  # of the token, one after the other: until then it may have just been replaced


class KubernetesError(FactoryError):
    """The Kubernetes API refused what was asked."""


class Cluster:
    """RayJobs of one namespace, through the Kubernetes API and the pod's service account."""

    def __init__(self, address: str, namespace: str, account: Path) -> None:
        """``account``: folder with ``token`` and ``ca.crt``."""
        self._url = f"{address}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account
        self._refused = 0

    @classmethod
    def of_this_pod(cls) -> "Cluster":
        """The cluster that this pod runs in. Raises ConfigError outside one."""
        account = Path("/var/run/secrets/kubernetes.io/serviceaccount")
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (account / "token").is_file():
            raise ConfigError("not in a Kubernetes pod with a service account; see infra/kubernetes/cronjob.yaml")
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", (account / "namespace").read_text(), account)

    def create(self, body: Mapping[str, Any]) -> bool:
        """Create a RayJob; False if one of that name exists. Raises KubernetesError, or requests' errors."""
        answer = self._request("POST", self._url, json=dict(body))
        if answer.status_code == 409:
            return False
        self._check(answer, "create", body["metadata"]["name"])
        return True

    def status(self, name: str) -> dict[str, Any]:
        """The RayJob's status. Raises KubernetesError, or requests' errors when trying again may help."""
        answer = self._request("GET", f"{self._url}/{name}")
        self._check(answer, "look at", name)
        return dict(answer.json().get("status") or {})

    def _request(self, method: str, url: str, **options: Any) -> requests.Response:
        token = (self._account / "token").read_text().strip()  # each time: Kubernetes rotates it
        headers, authority = {"Authorization": f"Bearer {token}"}, self._account / "ca.crt"
        verify: str | bool = str(authority) if authority.is_file() else True
        return requests.request(method, url, headers=headers, verify=verify, timeout=_TIMEOUT, **options)

    def _check(self, answer: requests.Response, verb: str, name: str) -> None:
        if answer.status_code == 429 or answer.status_code >= 500:
            answer.raise_for_status()
        self._refused = self._refused + 1 if answer.status_code == 401 else 0
        if 0 < self._refused < _REFUSALS:
            answer.raise_for_status()
        if not answer.ok:
            raise KubernetesError(
                f"Kubernetes did not {verb} the RayJob {name}: {answer.status_code} {answer.text[:500]}"
            )


def scheduled(manifest: Mapping[str, Any], job: str, uid: str) -> dict[str, Any]:
    """The RayJob of one tick: the manifest, named after the Job, and owned by it if ``uid`` is given."""
    metadata: dict[str, Any] = {key: value for key, value in manifest["metadata"].items() if key != "generateName"}
    metadata["name"] = f"{job}-run"
    if uid:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid, "blockOwnerDeletion": False}
        metadata["ownerReferences"] = [owner]
    return {**manifest, "metadata": metadata}


def tick_of_job(job: str) -> str | None:
    """The tick that a CronJob's Job is named after (minutes since 1970), as ISO 8601; None for other names."""
    suffix = job.rpartition("-")[2]
    return datetime.fromtimestamp(int(suffix) * 60, UTC).isoformat() if suffix.isdigit() and len(suffix) > 6 else None


def run(cluster: Cluster, body: Mapping[str, Any], wait: Callable[[float], None]) -> dict[str, Any]:
    """Create the RayJob, or find it, and wait for its end; returns its last status. Passing faults are waited out."""
    name, created = str(body["metadata"]["name"]), False
    while True:
        try:
            if not created:
                _say(f"created the RayJob {name}" if cluster.create(body) else f"the RayJob {name} exists; waiting")
                created = True
            status = cluster.status(name)
            if status.get("jobDeploymentStatus") in _ENDED:
                return status
        except requests.RequestException as error:
            _say(f"the Kubernetes API does not answer ({type(error).__name__}); trying again")
        wait(_POLL)


def outcome_of(status: Mapping[str, Any]) -> tuple[str, str]:
    """How an ended RayJob ended, and why. One that KubeRay gave up (its deadline passed) may say RUNNING of its job."""
    job, deployment = str(status.get("jobStatus", "")), str(status.get("jobDeploymentStatus", ""))
    words = [str(status[name]) for name in ("reason", "message") if status.get(name)]
    return (job if job in _JOB_ENDED else deployment.upper()), ": ".join(words)


def notify(url: str, document: Mapping[str, Any], wait: Callable[[float], None]) -> None:
    """Deliver the outcome; what fails is said and changes nothing."""
    for attempt in range(_ATTEMPTS):
        final, what = webhook.post(url, document)
        _say(f"webhook, attempt {attempt + 1} of {_ATTEMPTS}: {what}")
        if final:
            return
        if attempt < _ATTEMPTS - 1:
            wait(5.0 * 2**attempt)


def _document(suite: str, job: str, submission: str, status: str, message: str) -> dict[str, Any]:
    """What the webhook is told of a tick; `submission` is empty if there was none."""
    return {
        "suite": suite,
        "tick": tick_of_job(job),
        "submission_id": submission,
        "status": status,
        "exit_code": None,
        "message": message,
        "mlflow_run": mlflow_run(suite, submission) if submission else None,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def retrain(manifest: Path, wait: Callable[[float], None] = time.sleep) -> int:
    """Run the RayJob of a manifest file to its end and tell the webhook. Returns the exit status: 0 it succeeded; 1 it
    did not, or is gone; 2 bad input."""
    url, suite = None, ""
    try:
        job, uid = os.environ.get("FACTORY_JOB_NAME", ""), os.environ.get("FACTORY_JOB_UID", "")
        if not job:
            raise ConfigError(
                "FACTORY_JOB_NAME is not set; infra/kubernetes/cronjob.yaml takes it from the pod's label"
            )
        url, cluster = webhook.webhook_url(None), Cluster.of_this_pod()
        made = yaml.safe_load(manifest.read_text(encoding="utf-8"))
        suite = str(made["metadata"].get("labels", {}).get(SUITE_LABEL, ""))
        body = scheduled(made, job, uid)
        status = run(cluster, body, wait)
    except (FactoryError, OSError, yaml.YAMLError) as error:
        _say(f"error: {error}")
        if url is not None:
            notify(url, _document(suite, job, "", "FAILED", str(error)), wait)
        return 2 if isinstance(error, ConfigError | yaml.YAMLError) else 1
    outcome, message = outcome_of(status)
    _say(f"the RayJob {body['metadata']['name']} ended: {outcome} {message}")
    if url is not None:
        notify(url, _document(suite, job, str(status.get("jobId", "")), outcome, message), wait)
    return 0 if outcome == "SUCCEEDED" else 1
