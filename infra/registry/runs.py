"""MLflow, through its server only: reachability, names of registered models, runs and their metrics in batches.

Covers a quick reachability check, parent and child runs with what their pages show, and marking what is still running
as killed. Registered models are `infra.registry.models`. Uses ``MlflowClient`` and no fluent global state, so threads
and Ray tasks may call it concurrently; retries are bounded by the MLFLOW_HTTP_REQUEST_* variables.
"""

import contextlib
import json
import math
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from mlflow.utils.rest_utils import http_request

from infra.errors import ConfigError, RegistryError
from infra.registry.answers import FAULTS, one_line, refusal, unreachable

# What is read are files of a few KB; MLflow reads this variable whenever it downloads one.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

_BATCH = 1000  # MLflow's limit of metrics in one log_batch call
_PARAMS = 100  # and of parameters or tags
_DIGEST = 12  # characters of a data set's digest: what its page has room for


def tracking_uri() -> str:
    """``$MLFLOW_TRACKING_URI``, which must name a server. Raises RegistryError otherwise."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if urllib.parse.urlsplit(uri).password:  # messages name the address
        raise RegistryError(
            "MLFLOW_TRACKING_URI holds a password; put it into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if not uri.startswith(("http://", "https://")):
        raise RegistryError(f"MLFLOW_TRACKING_URI is {uri!r}; accepted: the http(s) address of an MLflow server")
    return uri.rstrip("/")


def client() -> MlflowClient:
    """A client of the server that the environment names."""
    return MlflowClient(tracking_uri=tracking_uri(), registry_uri=tracking_uri())


def check(timeout: float = 5.0, retries: int = 1) -> None:
    """Prove that the server answers, accepts the credentials and lists experiments; RegistryError after about
    ``timeout * (retries + 1)`` seconds without an answer."""
    uri = tracking_uri()
    try:
        answer = http_request(
            get_default_host_creds(uri), "/api/2.0/mlflow/experiments/search", "POST", json={"max_results": 1},
            timeout=timeout, max_retries=retries, backoff_factor=1, raise_on_status=False,
        )  # fmt: skip
    except FAULTS as error:
        raise RegistryError(unreachable(uri, error)) from error
    if (wrong := refusal(uri, answer)) is not None:
        raise RegistryError(wrong)


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    """Whatever the server or the way to it fails at inside becomes a RegistryError that says what could not be done."""
    try:
        yield
    except FAULTS as error:
        text = one_line(str(error))
        raise RegistryError(f"the MLflow server at {tracking_uri()} could not {what}: {text}") from error


# -- names -------------------------------------------------------------------------------------------------------


MERGED = "merged"
"""Task name under which a suite's merge is registered."""
CHECKPOINT = "merged-checkpoint"
"""Task name under which the merge as a full checkpoint is registered."""


def model_name(suite: str, task: str) -> str:
    """``<suite>.<task>`` with ``/`` and ``:``, which MLflow refuses in names, replaced by ``-``."""
    return re.sub(r"[/:]", "-", f"{suite}.{task}")


def model_names(suite: str, tasks: Iterable[str]) -> dict[str, str]:
    """Registered name of each task. Raises ConfigError if two tasks would share one."""
    owners: dict[str, str] = {}
    for task in tasks:
        name = model_name(suite, task)
        if "'" in name:
            raise ConfigError(
                f"the task name {task!r} contains a quote, which MLflow cannot search for; rename the task"
            )
        if name in owners:
            raise ConfigError(
                f"the tasks {owners[name]!r} and {task!r} would both be registered as {name!r} "
                "('/' and ':' become '-'); rename one of them"
            )
        owners[name] = task
    return {task: name for name, task in owners.items()}


# -- runs --------------------------------------------------------------------------------------------------------


def start_run(
    experiment: str, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], parent_run_id: str | None = None
) -> str:
    """Start a run in the experiment (made if absent), a child if a parent is given; returns its id."""
    mlflow = client()
    all_tags = {key: str(value) for key, value in tags.items()}
    if parent_run_id is not None:
        all_tags[MLFLOW_PARENT_RUN_ID] = parent_run_id
    with asking(f"start the run {name!r}"):
        run = mlflow.create_run(_experiment_id(mlflow, experiment), run_name=name, tags=all_tags)
        items = [Param(key, str(value)) for key, value in params.items()]
        try:
            for start in range(0, len(items), _PARAMS):
                mlflow.log_batch(run.info.run_id, params=items[start : start + _PARAMS])
        except BaseException:
            with contextlib.suppress(*FAULTS):
                mlflow.set_terminated(run.info.run_id, "FAILED")
            raise
    return str(run.info.run_id)


def _experiment_id(mlflow: MlflowClient, name: str) -> str:
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        try:
            return str(mlflow.create_experiment(name))
        except MlflowException as error:
            found = mlflow.get_experiment_by_name(name)  # somebody else made it meanwhile
            if found is None:
                raise error
    if found.lifecycle_stage != "active":
        raise RegistryError(f"the MLflow experiment {name!r} is deleted; restore it, or choose another name")
    return str(found.experiment_id)


def log_history(run_id: str, metrics: Iterable[Mapping[str, float]]) -> None:
    """Log rows ``{"step": …, name: value, …}`` in as few calls as MLflow allows; NaN and infinities are skipped."""
    now = int(time.time() * 1000)
    rows = [
        Metric(name, float(value), now, int(row.get("step", 0)))
        for row in metrics
        for name, value in row.items()
        if name != "step" and math.isfinite(value)
    ]
    mlflow = client()
    with asking(f"log metrics of run {run_id}"):
        for start in range(0, len(rows), _BATCH):
            mlflow.log_batch(run_id, metrics=rows[start : start + _BATCH])


def histories(run_ids: Iterable[str], names: Iterable[str]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(step, value) of each metric of each run, by step; empty for a metric or a run that the server does not have."""
    mlflow, keys = client(), [(run_id, name) for run_id in run_ids for name in names]

    def read(key: tuple[str, str]) -> list[tuple[int, float]]:
        try:
            return sorted((metric.step, metric.value) for metric in mlflow.get_metric_history(*key))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # a run that was removed for good
                return []
            raise

    with asking("read the metrics of runs"), ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(keys, pool.map(read, keys), strict=True))


def log_data(run_id: str, name: str, digest: str, source: str, use: str) -> None:
    """Note a data set that a run reads: its name, digest (shortened) and source, and what it is used for, for example
    train. MLflow shows it with the run."""
    about = Dataset(name, digest[:_DIGEST], "reference", json.dumps({"uri": source}))
    with asking(f"note the data of run {run_id}"):
        client().log_inputs(run_id, datasets=[DatasetInput(about, [InputTag(MLFLOW_DATASET_CONTEXT, use)])])


def describe_run(run_id: str, text: str) -> None:
    """Set the run's description: Markdown, shown on its page."""
    set_tags(run_id, {MLFLOW_RUN_NOTE: text})


def describe_experiment(name: str, text: str) -> None:
    """Set the experiment's description (Markdown) if it has none: what somebody wrote there stays."""
    mlflow = client()
    with asking(f"describe the experiment {name!r}"):
        found = mlflow.get_experiment_by_name(name)
        if found is not None and not found.tags.get(MLFLOW_RUN_NOTE):
            mlflow.set_experiment_tag(found.experiment_id, MLFLOW_RUN_NOTE, text)


def run_path(run_id: str) -> str:
    """Where the run's page is, below the server's address: ``#/experiments/…/runs/…``."""
    with asking(f"find run {run_id}"):
        return f"#/experiments/{client().get_run(run_id).info.experiment_id}/runs/{run_id}"


def run_page(run_id: str) -> str:
    """The address of a run's page, in MLflow's view of model training (a newcomer would get that of language model
    applications, which hides runs)."""
    return f"{tracking_uri()}/{run_path(run_id)}?workflowType=machine_learning"


def run_of_suite(run_id: str, parent_run_id: str, name: str) -> str:
    """The run, if it is in the parent's experiment and not deleted; else the id of a new, finished child of the parent.

    Raises RegistryError.
    """
    mlflow = client()
    with asking(f"find run {run_id}"):
        experiment = mlflow.get_experiment(mlflow.get_run(parent_run_id).info.experiment_id)
        try:
            found = mlflow.get_run(run_id).info
            if found.lifecycle_stage == "active" and found.experiment_id == experiment.experiment_id:
                return run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    made = start_run(experiment.name, name, {"kind": "reused"}, {}, parent_run_id)
    finish_run(made, "FINISHED")
    return made


def log_folder(run_id: str, folder: Path, name: str) -> None:
    """Store the files of a local folder as artifacts of a run, under ``name``."""
    with asking(f"store {name!r} with run {run_id}"):
        client().log_artifacts(run_id, str(folder), name)


def log_text(run_id: str, text: str, name: str) -> None:
    """Store a text as an artifact of a run."""
    with asking(f"store {name!r} with run {run_id}"):
        client().log_text(run_id, text, name)


def set_tags(run_id: str, tags: Mapping[str, Any]) -> None:
    """Set tags of a run in one call per 100."""
    items = [RunTag(key, str(value)) for key, value in tags.items()]
    mlflow = client()
    with asking(f"tag run {run_id}"):
        for start in range(0, len(items), _PARAMS):
            mlflow.log_batch(run_id, tags=items[start : start + _PARAMS])


def finish_run(run_id: str, status: str) -> None:
    """End a run as FINISHED, FAILED or KILLED."""
    if status not in ("FINISHED", "FAILED", "KILLED"):
        raise ValueError(f"bad status {status!r}: FINISHED, FAILED or KILLED")
    with asking(f"finish run {run_id}"):
        client().set_terminated(run_id, status)


def kill_running_children(parent_run_id: str) -> int:
    """Mark the parent's RUNNING children as KILLED, concurrently; returns how many. Made for the way out."""
    mlflow = client()
    with asking(f"mark the children of run {parent_run_id} as killed"):
        experiment = mlflow.get_run(parent_run_id).info.experiment_id
        where = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent_run_id}' and attributes.status = 'RUNNING'"
        runs = mlflow.search_runs([experiment], where, max_results=1000)
        killed = RunStatus.to_string(RunStatus.KILLED)
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda run: mlflow.set_terminated(run.info.run_id, killed), runs))
    return len(runs)


def pages(search: Callable[[str | None], Iterable[Any]]) -> Iterator[Any]:
    """Everything that a search of MLflow's finds, page by page. ``search`` gets the token of the page."""
    token = None
    while True:
        found: Any = search(token)
        yield from found
        token = found.token
        if not token:
            return
