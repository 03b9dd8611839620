"""What MLflow says is to be kept: which runs are not deleted, and what registered versions refer to.

Nothing is changed. Runs that the server does not know, because they were purged (``mlflow gc``) or because it is
another server, are not "deleted": the caller decides. What runs used is `infra.artifacts.announcements`.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.entities.model_registry import ModelVersion

from infra.registry import lineage
from infra.registry.models import ADAPTER_TAG, BASE_TAG, CHECKPOINT_TAG, HEADS_TAG, KEY_TAG
from infra.registry.runs import asking, client, pages
from infra.registry.versions import told
from infra.store.layout import attempt_of
from infra.store.s3 import Store

_PAGE = 1000
_EXPERIMENTS = 100  # asked for in one search
_THREADS = 8


@dataclass(frozen=True)
class RunState:
    """A pipeline run as MLflow knows it. ``last``: its end, or its start while it runs, in seconds since the epoch."""

    deleted: bool
    running: bool
    last: float


@dataclass(frozen=True)
class Referred:
    """What registered versions refer to: hashes (artifacts, bases) and folders ``objects/<key>/<attempt>``."""

    versions: int
    keys: frozenset[str]
    attempts: frozenset[str]


def pipeline_runs() -> dict[str, RunState]:
    """Every run of the pipeline that the server knows, deleted ones too, by id. Raises RegistryError."""
    mlflow = client()
    with asking("list its runs"):
        experiments = {
            found.experiment_id: found.lifecycle_stage == "active"
            for found in pages(lambda token: mlflow.search_experiments(ViewType.ALL, _PAGE, page_token=token))
        }
        ids = list(experiments)
        return {
            run.info.run_id: _state(run, experiments[run.info.experiment_id])
            for start in range(0, len(ids), _EXPERIMENTS)
            for run in _runs(mlflow, ids[start : start + _EXPERIMENTS])
        }


def _runs(mlflow: MlflowClient, experiments: list[str]) -> Iterator[Run]:
    where = "tags.`kind` = 'pipeline'"
    yield from pages(
        lambda token: mlflow.search_runs(experiments, where, ViewType.ALL, max_results=_PAGE, page_token=token)
    )


def _state(run: Run, experiment_active: bool) -> RunState:
    info = run.info
    deleted = info.lifecycle_stage != "active" or not experiment_active
    running = info.status in ("RUNNING", "SCHEDULED")
    return RunState(deleted, running, (info.end_time or info.start_time or 0) / 1000)


def referred(store: Store, known: dict[str, list[str]] | None = None) -> Referred:
    """What the server's registered versions refer to in this store. Raises RegistryError.

    ``known``: heads by the versions' sources, which never change; what is not in it is fetched and added.

    A version's artifact is kept by its key, and the very bytes that it loads by their place: a key may have got other
    bytes since. The heads of a merged classifier are its experts' files, which only the version's own configuration
    names.
    """
    mlflow = client()
    with asking("say what its registered models refer to"):
        versions = list(pages(lambda token: mlflow.search_model_versions(max_results=_PAGE, page_token=token)))
        ours = [version for version in versions if KEY_TAG in version.tags]
        merges = [v for v in ours if lineage.KEY_TAG in v.tags and v.tags.get(HEADS_TAG) != "0"]
        known = {} if known is None else known
        new = [version for version in merges if version.source not in known]
        with ThreadPoolExecutor(_THREADS) as pool:
            known.update(zip((version.source for version in new), pool.map(_heads, new), strict=True))
        heads = [head for version in merges for head in known[version.source]]
    tags = [version.tags[tag] for version in ours for tag in (ADAPTER_TAG, CHECKPOINT_TAG) if tag in version.tags]
    places = [*(_name(store, uri) for uri in tags), *heads]
    return Referred(
        len(ours),
        frozenset(v.tags[tag] for v in ours for tag in (KEY_TAG, lineage.KEY_TAG, BASE_TAG) if tag in v.tags),
        frozenset(found for place in places if (found := attempt_of(place))),
    )


def _name(store: Store, uri: str) -> str:
    """Name inside this store of an object at an ``s3://`` URI; "" for one that lies elsewhere."""
    root = store.uri("")
    return uri[len(root) :] if uri.startswith(root) else ""


def _heads(version: ModelVersion) -> list[str]:
    """Object names of the adapters whose heads a version uses; none if its files are gone: then it cannot be loaded."""
    return [str(head["adapter"]) for head in told(version.source or "").get("heads", {}).values()]
