"""The whole pipeline on a tiny random Llama (tests/e2e/test_loads_anywhere.py submits one to Ray)."""

import json
from collections.abc import Callable
from typing import Any

import mlflow
import pytest

from infra.store.s3 import Store

CONFIG = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    """Results of the first run, for the tests that look at what it left behind."""
    return {}


def test_first_run_makes_everything(pipeline: Any, tiny_config: CONFIG, shared: dict[str, Any]) -> None:
    config = tiny_config("tiny")
    finished = pipeline(config)
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    assert set(results["held_in"]) == {"in0", "in1", "in2", "in3"}
    assert results["made"]["experts"] == 4
    assert set(results["reused"].values()) == {0}
    assert results["summary"]["held_in"]["expert"] > results["summary"]["held_in"]["base"]
    best = max(candidate["validation"] for candidate in results["candidates"])
    first_best = next(c for c in results["candidates"] if c["validation"] == best)
    assert (results["chosen"]["method"], results["chosen"]["params"]) == (first_best["method"], first_best["params"])
    assert len(results["candidates"]) == 4
    for row in results["held_in"].values():
        assert len(row["expert_key"]) == 64
        assert row["n_test"] == 8
    assert 0 < results["slot_utilisation"] <= 1
    store = Store.from_env()
    stored = json.loads(store.get(f"runs/{results['run_id']}/results.json"))
    assert stored == results
    for name in ("report.md", "candidates.csv", "config.yaml"):
        assert store.head(f"runs/{results['run_id']}/{name}")
    shared.update(results)


def test_second_run_reuses_everything(pipeline: Any, tiny_config: CONFIG, shared: dict[str, Any]) -> None:
    finished = pipeline(tiny_config("tiny"))
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    assert set(results["made"].values()) == {0}
    gated = 3 * len(
        results["held_in"]
    )  # base, expert and merge on every task's gate rows: what was judged is not again
    assert results["reused"] == {**shared["made"], "evaluations": shared["made"]["evaluations"] - gated}
    assert results["held_in"] == shared["held_in"]
    assert results["summary"] == shared["summary"]


def test_changing_one_merge_parameter_trains_nothing(
    pipeline: Any, tiny_config: CONFIG, shared: dict[str, Any]
) -> None:
    merge = {"fan_in": 2, "candidates": [{"method": "mean"}, {"method": "task_arithmetic", "params": {"lambda": 0.9}}]}
    finished = pipeline(tiny_config("tiny", merge=merge))
    assert finished.code == 0, finished.output[-4000:]
    assert finished.results is not None
    assert finished.results["made"]["experts"] == 0
    assert finished.results["reused"]["experts"] == 4


def test_mlflow_shows_parent_children_and_models(stack: Any, shared: dict[str, Any]) -> None:
    client = mlflow.MlflowClient(stack.env()["MLFLOW_TRACKING_URI"])
    run_id = shared["run_id"]
    parent = client.get_run(run_id)
    assert parent.info.status == "FINISHED"
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert {run.info.run_name for run in children} == {"in0", "in1", "in2", "in3"}
    for child in children:
        assert child.info.status == "FINISHED"
        assert len(client.get_metric_history(child.info.run_id, "loss/training")) == 8
        assert "loss/validation" in child.data.metrics
        assert any(name.startswith("test") for name in child.data.metrics)
    for name in ("tiny.in0", "tiny.merged"):
        version = client.get_model_version(name, "1")
        assert "**Gate**: " in version.description
        assert client.get_registered_model(name).aliases


def test_registered_expert_predicts(stack: Any, shared: dict[str, Any]) -> None:
    mlflow.set_tracking_uri(stack.env()["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model("models:/tiny.in0/1")
    answers = model.predict(["the cat sleeps", "a big dog runs"])
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)
    merged = mlflow.pyfunc.load_model("models:/tiny.merged/1")
    assert len(merged.predict(["the cat sleeps"])) == 1


def test_bad_input_is_refused_before_training(pipeline: Any, tiny_config: CONFIG) -> None:
    config = tiny_config("refused")
    cases = [
        (["train.learning_rat=0.1"], "learning_rate"),
        (["mask.modules=nothing_like_this"], "nothing_like_this"),
        (["splits.test=100000"], "in0"),
        (["base=path:/no/such/base"], "/no/such/base"),
        (["resources.expert.cpus=4096"], "4096"),
        (["merge.candidates.0.method=men"], "mean"),
    ]
    for overrides, expected in cases:
        asks_the_cluster = expected == "4096"
        finished = pipeline(config, *overrides, own_process=asks_the_cluster, timeout=120)
        assert finished.code == 2, (overrides, finished.output[-2000:])
        assert expected in finished.output, (overrides, finished.output[-2000:])
        assert "Traceback" not in finished.output, finished.output[-2000:]
