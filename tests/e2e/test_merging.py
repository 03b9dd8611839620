"""Many merge methods in one run: rounds, importances, task masks, a search budget, a checkpoint; then nothing twice."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from transformers import AutoModelForCausalLM

from infra.artifacts.manifests import Manifest
from infra.store.layout import manifest_name
from infra.store.s3 import Store
from infra.store.source import StoreSource
from merge.methods.specs import Candidate, plan_reductions
from merge.tree.trie import build_tree, post_order
from workers.adapters.writer import AdapterReader

CONFIG = Callable[..., dict[str, Any]]
TASKS = [f"in{number}" for number in range(4)]
CANDIDATES: list[dict[str, Any]] = [
    {"method": "mean"},
    {"method": "weighted_mean", "weights": "training_rows"},
    {"method": "ties", "params": {"density": 0.5, "density_of": ["support", "tensor"]}},
    {"method": "dare_linear", "params": {"lambda": 0.5}},
    {"method": "consensus"},
    {"method": "fisher_on_support"},
    {"method": "regmean"},
    {"method": "emr"},
]
BUDGET = 20
GATE = 3 * 4  # scores of base, experts and merge on gate rows


def configuration(tiny_config: CONFIG) -> dict[str, Any]:
    merge = {
        "fan_in": 2,
        "candidates": CANDIDATES,
        "search": {"evaluations": BUDGET},
        "importance_rows": 8,
        "export": {"dtype": "float32", "shard_gib": 0.0001},
    }
    config = tiny_config("merging", merge=merge)
    config["evaluate"] |= {"few_shot": 0, "serving_dtype": None}
    return config


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    """Results of the first run, for the tests that look at what it left behind."""
    return {}


def test_a_run_with_many_methods(pipeline: Any, tiny_config: CONFIG, shared: dict[str, Any]) -> None:
    finished = pipeline(configuration(tiny_config))
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    shared.update(results)
    assert "9 candidates, 20 of 32 validation scores" in finished.output
    assert "2 rounds" in finished.output
    rows, search = results["candidates"], results["search"]
    assert [row["method"] for row in rows] == [
        "mean", "weighted_mean", "ties", "ties", "dare_linear", "consensus", "fisher_on_support", "regmean",
    ]  # fmt: skip
    assert rows[1]["weights"] == dict.fromkeys(TASKS, 0.25)
    assert search["evaluations"] == sum(row["tasks"] for row in rows) <= BUDGET == search["budget"]
    (chosen,) = (row for row in rows if row["chosen"])
    finalists = [row for row in rows if row["tasks"] == len(TASKS)]
    assert chosen["validation"] == max(row["validation"] for row in finalists)
    assert chosen["method"] == results["chosen"]["method"]
    candidates = [Candidate(row["method"], row["params"], row.get("weights")) for row in rows] + [Candidate("emr")]
    nodes = len(post_order(build_tree(TASKS, 2)))
    made = results["made"]
    assert made["merge_nodes"] == len(plan_reductions(candidates)) * nodes
    assert made["importances"] == 2 * len(TASKS)
    assert made["task_masks"] == len(TASKS)
    assert made["checkpoints"] == 1
    expected = 5 + 4 + search["evaluations"] + 5 + 2 * 4  # base, experts, search, merge; emr on validation and test
    assert made["evaluations"] == expected + GATE


def test_methods_that_need_the_task_stay_apart(shared: dict[str, Any]) -> None:
    (emr,) = shared["per_task"]
    assert emr["method"] == "emr"
    assert set(emr["tasks"]) == set(TASKS)
    assert emr["test"] == pytest.approx(sum(emr["tasks"].values()) / 4)
    assert all(size > 0 for size in emr["mask_bytes"].values())
    assert shared["chosen"]["method"] != "emr"
    assert not any("emr" in str(row) for row in shared["held_out"].values())


def test_the_table_is_in_the_store_and_in_mlflow(stack: Any, shared: dict[str, Any], tmp_path: Path) -> None:
    run_id = shared["run_id"]
    text = Store.from_env().get(f"runs/{run_id}/candidates.csv").decode()
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["method"] for row in table][-1] == "emr"
    assert [int(row["tasks"]) for row in table[:-1]] == [row["tasks"] for row in shared["candidates"]]
    client = mlflow.MlflowClient(stack.env()["MLFLOW_TRACKING_URI"])
    assert Path(client.download_artifacts(run_id, "report/candidates.csv", str(tmp_path))).read_text() == text


def test_lineage_names_the_experts_versions(stack: Any, shared: dict[str, Any]) -> None:
    client = mlflow.MlflowClient(stack.env()["MLFLOW_TRACKING_URI"])
    for name in ("merging.merged", "merging.merged-checkpoint"):
        version = client.get_model_version(name, "1")
        assert version.tags["factory.lineage.method"] == shared["chosen"]["method"]
        assert version.tags["factory.lineage.key"] == shared["chosen"]["key"]
        parameters = json.loads(version.tags["factory.lineage.parameters"])
        assert {name: parameters[name] for name in shared["chosen"]["params"]} == shared["chosen"]["params"]
        experts = version.tags["factory.lineage.experts"]
        assert [f"models:/merging.{task}/1" in experts for task in TASKS] == [True] * 4


def test_the_checkpoint_is_base_and_merge(stack: Any, shared: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    store, export = Store.from_env(), shared["export"]
    manifest = Manifest.from_json(store.get(manifest_name(export["key"])))
    assert sorted(manifest.files) == export["files"]
    assert sum(name.endswith(".safetensors") for name in manifest.files) > 1
    for label, file in manifest.files.items():
        store.download_file(file, tmp_path / "checkpoint" / label)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    adapter = AdapterReader(StoreSource(store, shared["chosen"]["uri"].removeprefix(store.uri("")).lstrip("/")))
    assert adapter.names
    for name, parameter in base.named_parameters():
        expected = parameter.detach().float().clone()
        if name in adapter.names:
            delta = adapter.load(name)
            expected.view(-1)[delta.indices] += delta.values
        assert torch.equal(loaded.get_parameter(name), expected), name
    model = mlflow.pyfunc.load_model("models:/merging.merged-checkpoint/1")
    assert isinstance(model.predict(["the cat sleeps"])[0], str)


def test_the_same_again_makes_nothing(pipeline: Any, tiny_config: CONFIG, shared: dict[str, Any]) -> None:
    finished = pipeline(configuration(tiny_config))
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    assert set(results["made"].values()) == {0}
    judged = shared["made"]["evaluations"] - GATE  # and not judged again
    assert results["reused"] == {**shared["made"], "evaluations": judged}
    for name in ("held_in", "held_out", "candidates", "search", "per_task", "chosen", "export", "summary"):
        assert results[name] == shared[name], name


def test_a_larger_budget_reuses_every_score(pipeline: Any, tiny_config: CONFIG, shared: dict[str, Any]) -> None:
    config = configuration(tiny_config)
    config["merge"]["search"] = {"evaluations": None}
    finished = pipeline(config)
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    assert all(row["tasks"] == len(TASKS) for row in results["candidates"])
    assert results["made"]["merge_nodes"] == 0
    more = 8 * len(TASKS) - shared["search"]["evaluations"]
    other_choice = results["chosen"]["key"] != shared["chosen"]["key"]
    assert results["made"]["evaluations"] == more + (5 + 4) * other_choice  # on test and gate rows
