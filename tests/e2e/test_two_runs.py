"""Two whole runs at the same time over one store: every key is worked on once, and both end with the same bytes."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from infra.artifacts.leases import holding, new_owner, try_acquire
from pipeline.flow.rehearse import expert_recipes
from tests.e2e.background import Factory, start, wait_for
from tests.e2e.conftest import pipeline_in

CONFIG = Callable[..., dict[str, Any]]
COUNTED = {
    "experts": ("expert",),
    "importances": ("fisher", "gram"),
    "task_masks": ("task_mask",),
    "evaluations": ("evaluation",),
    "checkpoints": ("checkpoint",),
}
"""Kinds of artifacts by what results.json counts. A merge root counts once for all merges that it makes."""


def run_both(factory: Factory, configs: list[dict[str, Any]], folder: Path, held: str) -> list[dict[str, Any]]:
    """Results of runs that were started together, and that both met one expert's key held, which nobody makes."""
    folders = [folder / str(number) for number in range(len(configs))]
    processes = [start(config, own, factory.env, ray=False) for config, own in zip(configs, folders, strict=True)]
    try:
        with holding(factory.store, held) as lease:
            assert lease is not None
            for process, own in zip(processes, folders, strict=True):
                wait_for(lambda own=own: "being made elsewhere" in (own / "log").read_text(), process, own)  # type: ignore[misc]
        for process, own in zip(processes, folders, strict=True):
            assert process.wait(timeout=900) == 0, (own / "log").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((own / "report" / "results.json").read_text()) for own in folders]


def check_worked_once(factory: Factory, suite: str, results: list[dict[str, Any]]) -> None:
    """One published result per key, and nobody worked on a key that somebody else worked on."""
    assert factory.leases() == []
    assert factory.orphans() == set(), "bytes of a second attempt that lost"
    assert list(factory.store.list("checkpoints/")) == []
    kinds = Counter(manifest.kind for manifest in factory.manifests().values())
    made = {name: sum(found["made"][name] for found in results) for name in COUNTED}
    assert made == {name: sum(kinds[kind] for kind in of) for name, of in COUNTED.items()}
    experts = [key for key, manifest in factory.manifests().items() if manifest.kind == "expert"]
    assert sorted(factory.trainings(suite)) == sorted((key, "FINISHED") for key in experts)


def test_two_runs_of_one_configuration(
    stack: Any, tiny_config: CONFIG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything that has a key: a shared support, importances, masks, a checkpoint."""
    factory = Factory.fresh(stack.env(), "twins")
    mask = {"criterion": "connection_sensitivity", "density": 0.2, "shared": True, "reselect_every": None,
            "modules": r".*\.(v_proj|o_proj|up_proj)"}  # fmt: skip
    candidates = [{"method": "mean"}, {"method": "fisher_on_support"}, {"method": "emr"}]
    merge = {"fan_in": 2, "candidates": candidates, "importance_rows": 8, "export": {"dtype": "float32"}}
    config = tiny_config("twins", held_in=3, mask=mask, merge=merge)
    config["evaluate"] |= {"few_shot": 0}
    held = expert_recipes(factory.inputs(config, tmp_path))["in0"].key
    results = run_both(factory, [config, config], tmp_path, held)
    check_worked_once(factory, "twins", results)
    kinds = Counter(manifest.kind for manifest in factory.manifests().values())
    assert {"expert", "fisher", "node", "merged", "task_mask", "evaluation", "checkpoint"} < set(kinds)
    first, second = results
    for name in ("held_in", "held_out", "summary"):
        assert first[name] == second[name]
    for name in ("method", "params", "key", "digest"):
        assert first["chosen"][name] == second["chosen"][name]
    client = mlflow.MlflowClient(factory.env["MLFLOW_TRACKING_URI"])
    for model in ("twins.in0", "twins.in1", "twins.in2", "twins.merged"):
        assert len(client.search_model_versions(f"name = '{model}'")) == 1
    for key in factory.manifests():  # a third run could not work on any of them
        assert try_acquire(factory.store, key, new_owner(), expiry_s=3600.0) is not None
    monkeypatch.setenv("FACTORY_S3_PREFIX", factory.store.prefix)
    third = pipeline_in(tmp_path, config)
    assert third.code == 0, third.output[-4000:]
    assert third.results is not None
    assert set(third.results["made"].values()) == {0}
    assert third.results["held_in"] == first["held_in"]


def test_two_runs_that_overlap(stack: Any, tiny_config: CONFIG, tmp_path: Path) -> None:
    """Other tasks, other candidates, other split: what they have in common is made once."""
    factory = Factory.fresh(stack.env(), "overlap")
    whole = tiny_config("overlap", held_in=3, held_out={})
    whole["evaluate"] |= {"few_shot": 0}
    tasks = whole["held_in"]
    left = whole | {"held_in": {name: tasks[name] for name in ("in0", "in1")}}
    merge = {"fan_in": 2, "candidates": [{"method": "mean"}, {"method": "task_arithmetic", "params": {"lambda": 0.6}}]}
    right = whole | {"held_in": {name: tasks[name] for name in ("in1", "in2")}, "merge": merge}
    held = expert_recipes(factory.inputs(left, tmp_path))["in1"].key
    results = run_both(factory, [left, right], tmp_path, held)
    check_worked_once(factory, "overlap", results)
    kinds = Counter(manifest.kind for manifest in factory.manifests().values())
    assert kinds["expert"] == 3
    assert results[0]["held_in"]["in1"]["expert_key"] == results[1]["held_in"]["in1"]["expert_key"]
    assert results[0]["held_in"]["in1"]["expert_uri"] == results[1]["held_in"]["in1"]["expert_uri"]
    assert results[0]["made"]["experts"] + results[1]["made"]["experts"] == 3
