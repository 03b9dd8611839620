"""`plan` says what a run will do, and the run then does exactly that: on real services, one change after the other."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from rich.console import Console

from infra.artifacts.manifests import find
from infra.store.s3 import Store
from merge.tree.trie import build_tree, path_to, post_order
from pipeline.config.model import load_config
from pipeline.flow import recipes
from pipeline.plan.preflight import Prepared, prepare_inputs
from pipeline.plan.show import make_plan, plan_json
from tests.e2e.conftest import ROOT, pipeline_in, write_tiny_base

CONFIG = Callable[..., dict[str, Any]]
TASKS = ["in0", "in1", "in2"]
MERGE = {"fan_in": 2, "candidates": [{"method": "mean"}, {"method": "task_arithmetic", "params": {"lambda": 0.3}}]}
SCORES_OF_A_MERGE = 3 + 3 + 1 + 3
"""On the validation, test and gate rows of the held-in tasks, and on the test rows of the held-out one."""


@dataclass
class Factory:
    """The suite of this file."""

    folder: Path
    config: dict[str, Any]
    keys: dict[str, str] = field(default_factory=dict)
    """Of experts, by task, as the last run used them."""

    def prepare(self) -> Prepared:
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(self.config, sort_keys=False))
        return prepare_inputs(load_config(file), Store.from_env(), Console(file=StringIO()))

    def plan(self) -> dict[str, Any]:
        before = state(self.config["suite"])
        found = plan_json(make_plan(self.prepare()))
        assert state(self.config["suite"]) == before  # nothing was written
        return found

    def run(self) -> dict[str, Any]:
        done = pipeline_in(self.folder, self.config)
        assert done.code == 0, done.output[-4000:]
        assert done.results is not None
        return done.results

    def plan_and_run(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both, checked against each other."""
        plan = self.plan()
        versions = len(registered(self.config["suite"]))
        results = self.run()
        for kind, made in results["made"].items():
            expected, reused = plan["kinds"][kind], results["reused"][kind]
            if expected["at_most"]:
                assert made <= expected["make"], (kind, expected, made, reused)
                assert reused >= expected["reuse"], (kind, expected, made, reused)
            else:
                assert (made, reused) == (expected["make"], expected["reuse"]), kind
        made = len(registered(self.config["suite"])) - versions
        expected = plan["kinds"]["registrations"]
        assert made == expected["make"] or (expected["at_most"] and made < expected["make"])
        keys = {task: row["expert_key"] for task, row in results["held_in"].items()}
        assert {row["task"]: row["key"] for row in plan["experts"]} == keys
        self.keys = keys
        return plan, results

    def task_file(self, task: str) -> Path:
        return Path(self.config["held_in"][task]["source"].removeprefix("jsonl:"))


def registered(suite: str) -> set[tuple[str, str]]:
    """Name and version of every registered model of the suite."""
    versions = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).search_model_versions(f"name LIKE '{suite}.%'")
    return {(version.name, version.version) for version in versions}


def state(suite: str) -> tuple[Any, ...]:
    """Everything that a plan must not change."""
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiments = sorted(found.name for found in client.search_experiments())
    return sorted(Store.from_env().list()), experiments, registered(suite)


def stale(plan: dict[str, Any]) -> dict[str, list[str]]:
    return {row["task"]: row["why"] for row in plan["experts"] if row["state"] == "make"}


def makes(plan: dict[str, Any]) -> dict[str, int]:
    return {kind: count["make"] for kind, count in plan["kinds"].items() if count["make"]}


@pytest.fixture(scope="module")
def factory(stack: Any, tiny_config: CONFIG, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    config = tiny_config("planned", held_in=3, merge=MERGE)
    config["evaluate"] |= {"few_shot": 0, "serving_dtype": None}
    config["resources"]["lease_seconds"] = 6
    return Factory(tmp_path_factory.mktemp("planned"), config)


def test_the_first_plan_is_of_everything(factory: Factory) -> None:
    plan, results = factory.plan_and_run()
    assert stale(plan) == {task: ["new task"] for task in TASKS}
    assert plan["kinds"]["experts"] == {"make": 3, "reuse": 0, "at_most": False}
    nodes = len(post_order(build_tree(TASKS, 2)))
    assert makes(plan) == {
        "experts": 3, "merge_nodes": nodes, "merges": 2, "registrations": 4,
        # base: test of 4 tasks, gate of 3; experts: test, gate; two merges on validation; the chosen on test and gate
        "evaluations": 4 + 3 + 3 * 2 + 2 * 3 + 4 + 3,
    }  # fmt: skip
    assert not any(count["at_most"] for count in plan["kinds"].values())
    assert results["slots"] == 1
    assert "calculated" in plan["estimate"]["stages"]["experts"]["from"]


def test_then_there_is_nothing_to_do_and_that_takes_seconds(factory: Factory) -> None:
    plan = factory.plan()
    assert makes(plan) == {}
    assert plan["estimate"]["seconds"] == 0
    _, results = factory.plan_and_run()
    assert set(results["made"].values()) == {0}
    assert results["seconds"]["total"] < 60  # a few, on a machine that does nothing else


def test_the_command_starts_no_ray_and_prints_json_alone(factory: Factory, ray_stack: Any) -> None:
    factory.prepare()
    program = (
        "import ray, sys; ray.init = lambda *a, **k: sys.exit('a plan joined Ray')\n"
        "from pipeline.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", "--json", "--config", str(factory.folder / "config.yaml"),
         "merge.candidates.1.params.lambda=0.7"],
        cwd=ROOT, env={**os.environ, **ray_stack.env()}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(done.stdout)
    assert makes(plan).keys() == {"merge_nodes", "merges", "evaluations", "registrations"}
    assert plan["estimate"]["slots"] == 1  # the cluster's, not this machine's
    for secret in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert ray_stack.env()[secret] not in done.stdout + done.stderr


def test_another_parameter_of_the_merge_remakes_its_root_alone(factory: Factory) -> None:
    factory.config["merge"]["candidates"][1]["params"]["lambda"] = 0.7
    plan, results = factory.plan_and_run()
    assert stale(plan) == {}
    kinds = plan["kinds"]
    assert (kinds["merge_nodes"]["make"], kinds["merges"]["make"]) == (1, 1)
    assert kinds["evaluations"]["at_most"]  # which of the two is chosen depends on the new scores
    assert kinds["evaluations"]["make"] == SCORES_OF_A_MERGE
    assert results["made"]["evaluations"] >= 3
    assert factory.plan()["estimate"]["stages"] == {}


def test_a_new_task_makes_its_expert_and_its_path(factory: Factory, tiny_config: CONFIG) -> None:
    factory.config["held_in"]["in3"] = tiny_config("planned", held_in=4)["held_in"]["in3"]
    before = dict(factory.keys)
    plan, results = factory.plan_and_run()
    assert stale(plan) == {"in3": ["new task"]}
    assert {task: factory.keys[task] for task in TASKS} == before
    path = len(path_to(build_tree([*TASKS, "in3"], 2), "in3"))
    assert results["made"]["experts"] == 1
    assert results["made"]["merge_nodes"] <= path  # a node of two leaves that an earlier tree had stays
    assert "other experts" in plan["estimate"]["stages"]["experts"]["from"]
    assert plan["estimate"]["stages"]["experts"]["seconds"] > 0


def test_changed_rows_remake_the_expert_of_their_task(factory: Factory) -> None:
    data = factory.prepare().tasks["in1"]
    file, training = factory.task_file("in1"), {row.input for row in data.splits["train"]}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    changed = next(line for line in lines if line["input"] in training)
    changed["target"] = "another word"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = dict(factory.keys)
    plan, results = factory.plan_and_run()
    assert stale(plan) == {"in1": ["data: 1 row changed in train"]}
    assert results["made"]["experts"] == 1
    tree = build_tree(sorted(before), 2)
    assert results["made"]["merge_nodes"] == len(path_to(tree, "in1"))
    assert {task for task in before if factory.keys[task] != before[task]} == {"in1"}
    assert "the expert before (1)" in plan["estimate"]["stages"]["experts"]["from"]


def test_a_field_of_one_expert_remakes_that_expert(factory: Factory) -> None:
    factory.config["held_in"]["in2"] |= {"template": "Tell me.\n{input}", "sizes": {"train": 60}}
    before = dict(factory.keys)
    plan, results = factory.plan_and_run()
    assert stale(plan) == {
        "in2": ["data: 4 rows removed from train",
                'held_in.in2.template "Say it.\\n{input}" → "Tell me.\\n{input}"']
    }  # fmt: skip
    assert results["made"]["experts"] == 1
    assert {task for task in before if factory.keys[task] != before[task]} == {"in2"}


def test_lost_bytes_are_made_again_under_the_same_key(factory: Factory) -> None:
    store, key = Store.from_env(), factory.keys["in0"]
    manifest = find(store, key, {})
    assert manifest is not None
    store.delete(manifest.files["adapter"].name)
    before = dict(factory.keys)
    plan, results = factory.plan_and_run()
    assert stale(plan) == {"in0": ["its file is gone"]}
    assert plan["kinds"]["merge_nodes"]["at_most"]  # training may give the very same bytes
    assert results["made"]["experts"] == 1
    assert factory.keys == before


def test_a_new_algorithm_remakes_every_expert(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    version = recipes.TRAIN_VERSION
    monkeypatch.setattr(recipes, "TRAIN_VERSION", version + 1)
    factory.config["train"]["learning_rate"] = 0.01
    plan, results = factory.plan_and_run()
    why = [f"algorithm version {version} → {version + 1}", "train.learning_rate 0.02 → 0.01"]
    assert stale(plan) == dict.fromkeys(factory.keys, why)
    assert results["made"]["experts"] == len(factory.keys)


def test_another_base_remakes_everything(factory: Factory, tmp_path: Path) -> None:
    old = factory.prepare().base
    factory.config["base"] = f"path:{write_tiny_base(tmp_path / 'other-base', seed=1)}"
    plan, results = factory.plan_and_run()
    new = factory.prepare().base
    why = f"base {old.name} ({old.sha256[:12]}) → {new.name} ({new.sha256[:12]})"
    assert {task: reasons[0] for task, reasons in stale(plan).items()} == dict.fromkeys(factory.keys, why)
    assert results["made"]["experts"] == len(factory.keys)
    assert results["reused"]["merge_nodes"] == 0
