"""MLflow, through its server only: runs, metrics in batches, and adapters as registered models.

Covers a quick reachability check, parent and child runs, idempotent registration with tags, a description and the
alias ``champion``, and marking what is still running as killed. Does not cover promotion: ``champion`` points at the
version that was registered last. Uses ``MlflowClient`` and no fluent global state, so threads and Ray tasks may call
it concurrently; retries are bounded by the MLFLOW_HTTP_REQUEST_* variables.
"""

import importlib.metadata
import math
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from infra import adapter_model
from infra.errors import ConfigError, RegistryError
from infra.store import split_uri

ALIAS = "champion"
KEY_TAG, DIGEST_TAG = "factory.key", "factory.digest"
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("infra", "workers")
_REQUIREMENTS = (
    "mlflow", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "boto3", "filelock",
    "psutil", "requests", "rouge-score",
)  # fmt: skip
_SAVE_LOCK = threading.Lock()  # MLflow's loader of models from code keeps global state
_BATCH = 1000  # MLflow's limit of metrics in one log_batch call
_PARAMS = 100  # and of parameters or tags


@dataclass(frozen=True)
class RegisteredAdapter:
    """An adapter to register: which, how it is prompted, and where it came from.

    ``name`` is the registered model's (see ``model_name``); ``adapter_uri`` the ``s3://`` URI of the adapter file, of
    which only a reference is kept; ``digest`` the artifact's; ``adapter_sha256`` (optional) that of the adapter file,
    verified on loading. ``heads`` of a classifier: task to ``adapter`` (URI of the file that holds its head),
    ``sha256``, ``labels`` and ``prompt_template``. ``max_input_tokens`` truncates an input on the left, as in training.
    ``prompt_wrapper`` holds ``{prompt}``, ``prompt_template`` holds ``{input}``.
    """

    name: str
    task: str
    key: str
    digest: str
    adapter_uri: str
    base_sha256: str
    base_name: str
    prompt_wrapper: str
    prompt_template: str
    max_new_tokens: int
    dtype: str
    run_id: str
    description: str
    tags: dict[str, str] = field(default_factory=dict)
    adapter_sha256: str = ""
    max_input_tokens: int | None = None
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)


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


def check(timeout: float = 5.0, attempts: int = 2) -> None:
    """Prove that the server answers and accepts the credentials; RegistryError after ``timeout * attempts`` s."""
    uri = tracking_uri()
    for attempt in range(attempts):
        try:
            answer = requests.get(f"{uri}/health", timeout=timeout)
            break
        except requests.RequestException as error:
            if attempt == attempts - 1:
                raise RegistryError(
                    f"the MLflow server at {uri} is unreachable ({error}); start it (make up), "
                    "or correct MLFLOW_TRACKING_URI"
                ) from error
    if answer.status_code in (401, 403):
        raise _refused(uri)
    if answer.status_code != 200:
        raise RegistryError(f"{uri} answers {answer.status_code} to /health: not a healthy MLflow server")
    try:
        client().search_experiments(max_results=1, view_type=ViewType.ACTIVE_ONLY)
    except MlflowException as error:
        if error.get_http_status_code() in (401, 403) or "401" in str(error) or "403" in str(error):
            raise _refused(uri) from error
        raise RegistryError(f"the MLflow server at {uri} does not list its experiments: {error}") from error


def _refused(uri: str) -> RegistryError:
    return RegistryError(
        f"the MLflow server at {uri} refused the credentials; "
        "check MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN"
    )


# -- names -------------------------------------------------------------------------------------------------------


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
    try:
        run = mlflow.create_run(_experiment_id(mlflow, experiment), run_name=name, tags=all_tags)
        items = [Param(key, str(value)) for key, value in params.items()]
        try:
            for start in range(0, len(items), _PARAMS):
                mlflow.log_batch(run.info.run_id, params=items[start : start + _PARAMS])
        except MlflowException:
            mlflow.set_terminated(run.info.run_id, "FAILED")
            raise
    except MlflowException as error:
        raise _failed(f"start the run {name!r}", error) from error
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
    try:
        for start in range(0, len(rows), _BATCH):
            mlflow.log_batch(run_id, metrics=rows[start : start + _BATCH])
    except MlflowException as error:
        raise _failed(f"log metrics of run {run_id}", error) from error


def is_active(run_id: str) -> bool:
    """Whether the server knows the run and it is not deleted."""
    try:
        return client().get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


def log_folder(run_id: str, folder: Path, name: str) -> None:
    """Store the files of a local folder as artifacts of a run, under ``name``."""
    try:
        client().log_artifacts(run_id, str(folder), name)
    except MlflowException as error:
        raise _failed(f"store {name!r} with run {run_id}", error) from error


def set_tags(run_id: str, tags: Mapping[str, Any]) -> None:
    """Set tags of a run in one call per 100."""
    items = [RunTag(key, str(value)) for key, value in tags.items()]
    mlflow = client()
    try:
        for start in range(0, len(items), _PARAMS):
            mlflow.log_batch(run_id, tags=items[start : start + _PARAMS])
    except MlflowException as error:
        raise _failed(f"tag run {run_id}", error) from error


def finish_run(run_id: str, status: str) -> None:
    """End a run as FINISHED, FAILED or KILLED."""
    if status not in ("FINISHED", "FAILED", "KILLED"):
        raise ValueError(f"bad status {status!r}: FINISHED, FAILED or KILLED")
    try:
        client().set_terminated(run_id, status)
    except MlflowException as error:
        raise _failed(f"finish run {run_id}", error) from error


def kill_running_children(parent_run_id: str) -> int:
    """Mark the parent's RUNNING children as KILLED, concurrently; returns how many. Made for the way out."""
    mlflow = client()
    try:
        experiment = mlflow.get_run(parent_run_id).info.experiment_id
        where = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent_run_id}' and attributes.status = 'RUNNING'"
        runs = mlflow.search_runs([experiment], where, max_results=1000)
        killed = RunStatus.to_string(RunStatus.KILLED)
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda run: mlflow.set_terminated(run.info.run_id, killed), runs))
    except MlflowException as error:
        raise _failed(f"mark the children of run {parent_run_id} as killed", error) from error
    return len(runs)


# -- models ------------------------------------------------------------------------------------------------------


def register(adapter: RegisteredAdapter) -> tuple[int, bool]:
    """Register the adapter, or find the version that already has its key and digest; alias it.

    Returns the version and whether this call made it.

    Raises RegistryError, naming the model.
    """
    mlflow = client()
    try:
        _ensure_model(mlflow, adapter)
        found, made = _find(mlflow, adapter), None
        if found is None:
            source = _log_model(mlflow, adapter)
            made = mlflow.create_model_version(
                adapter.name,
                source,
                run_id=adapter.run_id,
                tags=_tags(adapter),
                description=adapter.description,
                await_creation_for=30,
            )
            # Two that registered the same at once agree on the first; the other goes.
            found = _find(mlflow, adapter)
            if found is None:
                raise RegistryError(f"version {made.version} of the model {adapter.name!r} vanished meanwhile")
            if int(found.version) != int(made.version):
                mlflow.delete_model_version(adapter.name, made.version)
        mlflow.set_registered_model_alias(adapter.name, ALIAS, found.version)
    except MlflowException as error:
        raise _failed(f"register the model {adapter.name!r}", error) from error
    return int(found.version), made is not None and int(found.version) == int(made.version)


def _ensure_model(mlflow: MlflowClient, adapter: RegisteredAdapter) -> None:
    tags = {"factory.task": adapter.task, "factory.base": adapter.base_name}
    try:
        mlflow.create_registered_model(adapter.name, tags=tags, description=adapter.description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        task = mlflow.get_registered_model(adapter.name).tags.get("factory.task")
        if task is not None and task != adapter.task:
            raise RegistryError(
                f"the model {adapter.name!r} is registered for the task {task!r}, not for {adapter.task!r}; "
                "rename the task or choose another suite name"
            ) from error
        mlflow.update_registered_model(adapter.name, adapter.description)


def _find(mlflow: MlflowClient, adapter: RegisteredAdapter) -> ModelVersion | None:
    where = f"name = '{_quoted(adapter.name)}' and tags.`{KEY_TAG}` = '{_quoted(adapter.key)}'"
    versions = [
        version
        for version in mlflow.search_model_versions(where, max_results=1000)
        if version.status == "READY"
        and version.tags.get(DIGEST_TAG) == adapter.digest
        and version.tags.get("factory.adapter_uri") == adapter.adapter_uri
    ]
    return min(versions, key=lambda version: int(version.version), default=None)


def _quoted(text: str) -> str:
    if "'" in text:
        raise RegistryError(f"the name {text!r} contains a quote; names without one are accepted")
    return text


def _tags(adapter: RegisteredAdapter) -> dict[str, str]:
    return {
        **adapter.tags,
        KEY_TAG: adapter.key,
        DIGEST_TAG: adapter.digest,
        "factory.task": adapter.task,
        "factory.adapter_uri": adapter.adapter_uri,
        "factory.base": adapter.base_name,
        "factory.base_sha256": adapter.base_sha256,
    }


def model_config(adapter: RegisteredAdapter) -> dict[str, Any]:
    """What ``infra.adapter_model`` needs to load the adapter: references and prompting, no bytes."""
    bucket, name = split_uri(adapter.adapter_uri)
    prefix, found, _ = name.rpartition("objects/")
    heads = {task: {**head, "adapter": _object_name(head["adapter"])} for task, head in adapter.heads.items()}
    return {
        "bucket": bucket,
        "prefix": prefix.strip("/") if found else "",
        "adapter": _object_name(adapter.adapter_uri),
        "adapter_uri": adapter.adapter_uri,
        "adapter_sha256": adapter.adapter_sha256,
        "digest": adapter.digest,
        "base_sha256": adapter.base_sha256,
        "prompt_wrapper": adapter.prompt_wrapper,
        "prompt_template": adapter.prompt_template,
        "max_new_tokens": adapter.max_new_tokens,
        "max_input_tokens": adapter.max_input_tokens,
        "dtype": adapter.dtype,
        "heads": heads,
    }


def _object_name(uri: str) -> str:
    """Name of an object inside its store: from ``objects/`` on, where the URI has that."""
    _, name = split_uri(uri)
    _, found, rest = name.rpartition("objects/")
    return f"objects/{rest}" if found else name


def _log_model(mlflow: MlflowClient, adapter: RegisteredAdapter) -> str:
    """Store the pyfunc model (code and configuration, a few KB) with the run; returns its URI."""
    import mlflow.pyfunc as pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    columns = ["task", "input"] if len(adapter.heads) > 1 else [None]
    inputs = Schema([ColSpec("string", name) for name in columns])
    folder = tempfile.mkdtemp(prefix="factory-model-")
    target = f"models/{adapter.digest[:16]}-{uuid.uuid4().hex[:8]}"  # never the place of another version of this run
    try:
        path = Path(folder) / "model"
        with _SAVE_LOCK:
            pyfunc.save_model(
                path,
                python_model=adapter_model.__file__,
                code_paths=[str(_ROOT / package) for package in _PACKAGES],
                model_config=model_config(adapter),
                signature=ModelSignature(inputs, Schema([ColSpec("string")])),
                pip_requirements=requirements(),
                metadata={"key": adapter.key, "digest": adapter.digest, "task": adapter.task},
            )
        mlflow.log_artifacts(adapter.run_id, str(path), target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return f"{mlflow.get_run(adapter.run_id).info.artifact_uri}/{target}"


def requirements() -> list[str]:
    """Pinned requirements of a registered model, as installed here, without local version labels (``+cpu``)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def _failed(what: str, error: MlflowException) -> RegistryError:
    return RegistryError(f"the MLflow server at {tracking_uri()} could not {what}: {error}")
