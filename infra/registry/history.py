"""What MLflow and the store remember of earlier runs of a suite: finished runs, and the experts that a task has had.

Reads only; an experiment or a model that does not exist has no history. Runs and models are those that
`infra.registry.runs` and `infra.registry.models` write.
"""

from collections.abc import Iterator

from mlflow import MlflowClient

from infra.registry.runs import asking, client, model_name
from infra.registry.versions import versions_where
from infra.store.layout import RESULTS, run_file
from infra.store.s3 import Store


def results_of_runs(store: Store, suite: str) -> Iterator[bytes]:
    """results.json of the suite's ten latest finished runs, the latest first. Raises RegistryError, StoreError."""
    mlflow = client()
    with asking(f"list the runs of {suite!r}"):
        experiment = mlflow.get_experiment_by_name(suite)
        runs = [] if experiment is None else mlflow.search_runs(
            [experiment.experiment_id], "tags.kind = 'pipeline' and attributes.status = 'FINISHED'",
            max_results=10, order_by=["attributes.start_time DESC"],
        )  # fmt: skip
    for run in runs:
        found = store.get_with_etag(run_file(run.info.run_id, RESULTS))
        if found is not None:
            yield found[0]


def expert_keys(suite: str, task: str, limit: int = 5) -> list[str]:
    """Keys of experts that the task has had, the likeliest present one first: of its latest registered version, then of
    its latest finished runs. Raises RegistryError."""
    mlflow = client()
    with asking(f"look for experts of {task!r}"):
        found = [*_registered(mlflow, model_name(suite, task)), *_trained(mlflow, suite, task, limit)]
    return list(dict.fromkeys(found))


def _registered(mlflow: MlflowClient, name: str) -> list[str]:
    return [version.key for version in versions_where(mlflow, f"name = '{name}'") if version.key][:1]


def _trained(mlflow: MlflowClient, suite: str, task: str, limit: int) -> list[str]:
    experiment = mlflow.get_experiment_by_name(suite)
    if experiment is None:
        return []
    runs = mlflow.search_runs(
        [experiment.experiment_id],
        f"tags.kind = 'expert' and params.task = '{task}' and attributes.status = 'FINISHED'",
        max_results=limit, order_by=["attributes.start_time DESC"],
    )  # fmt: skip
    return [run.data.tags["expert_key"] for run in runs if "expert_key" in run.data.tags]
