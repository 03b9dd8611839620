"""The real base on three real tasks for a few steps: experts learn, results are sound, registered models answer."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from rich.console import Console

from infra.artifacts.manifests import Manifest, find
from infra.store.s3 import Store
from merge.tree.trie import build_tree, post_order
from pipeline.config.model import PipelineConfig
from pipeline.data.tasks import load_tasks
from pipeline.flow.recipes import evaluation_recipe, expert_recipe
from pipeline.plan.preflight import Prepared, prepare_inputs
from workers.base.cache import cache_dir
from workers.scoring.likelihood import EvaluateSpec
from workers.text.rows import rows_from_jsonl

QUICKSTART = Path(__file__).resolve().parents[2] / "pipeline" / "configs" / "quickstart.yaml"
TASKS = ("past_tense", "unnatural_dates", "question_formation")
STEPS = 6


def configuration() -> dict[str, Any]:
    """Three short tasks of the quickstart with its base and prompt, a few steps each."""
    quickstart = yaml.safe_load(QUICKSTART.read_text())
    return {
        "suite": "smollm2",
        "base": "pypi:SmolLM2-135M-Instruct",
        "prompt": quickstart["prompt"],
        "splits": {"train": 64, "validation": 8, "gate": 8, "test": 8},
        "held_in": {name: quickstart["held_in"][name] for name in TASKS},
        "mask": quickstart["mask"],
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 5.0e-3, "compute_dtype": "float32",
                  "schedule": "constant_with_warmup", "warmup_ratio": 0.0},
        "merge": {"fan_in": 4, "candidates": [{"method": "mean"}, {"method": "ties"}]},
        "evaluate": {"few_shot": 0, "serving_dtype": None, "compute_dtype": "float32", "batch_size": 8},
        "resources": quickstart["resources"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    """Results of the run, for the tests that look at what it left behind."""
    return {}


@pytest.fixture
def prepared(stack: Any) -> Prepared:
    """The run's inputs as the run itself prepared them; everything is in the cache by then."""
    config = PipelineConfig.model_validate(configuration())
    return prepare_inputs(config, Store.from_env(), Console(file=StringIO()))


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As many threads as an evaluation actor has: another number may round sums otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def expert(prepared: Prepared, task: str) -> Manifest:
    """The manifest of a task's expert, found by its recipe."""
    recipe = expert_recipe(prepared.config, prepared.base.sha256, prepared.tasks[task])
    found = find(prepared.store, recipe.key, {})
    assert found is not None
    return found


def test_a_few_steps_on_real_tasks(pipeline: Any, shared: dict[str, Any]) -> None:
    finished = pipeline(configuration())
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    assert results["base"]["name"] == "SmolLM2-135M-Instruct"
    assert tuple(results["held_in"]) == TASKS
    assert results["held_out"] == {}
    for row in results["held_in"].values():
        assert all(0 <= row[model] <= 1 for model in ("base", "expert", "merged"))
        assert (row["metric"], row["n_test"]) == ("exact_match", 8)
        assert not {"base_few_shot", "merged_serving"} & set(row)
    assert [candidate["method"] for candidate in results["candidates"]] == ["mean", "ties"]
    assert all(0 <= candidate["validation"] <= 1 for candidate in results["candidates"])
    best = max(results["candidates"], key=lambda candidate: candidate["validation"])
    assert results["chosen"]["method"] == best["method"]
    nodes = len(post_order(build_tree(TASKS, 4)))
    made = {"experts": 3, "merge_nodes": nodes, "evaluations": 3 + 3 + 2 * 3 + 3 + 3 * 3}  # the last: gate
    assert {name: count for name, count in results["made"].items() if count} == made
    assert all(task in finished.output for task in TASKS)
    shared.update(results)


def test_the_loss_of_every_expert_falls(prepared: Prepared, shared: dict[str, Any]) -> None:
    for task in TASKS:
        manifest = expert(prepared, task)
        row = shared["held_in"][task]
        assert (manifest.key, manifest.digest) == (row["expert_key"], row["expert_digest"])
        assert manifest.meta["steps"] == STEPS
        assert manifest.meta["last_loss"] < manifest.meta["first_loss"], (task, manifest.meta)
        assert manifest.meta["trainable"] == prepared.cost.trainable


@pytest.mark.usefixtures("_one_thread")
def test_the_registered_expert_answers_as_it_was_scored(stack: Any, prepared: Prepared, shared: dict[str, Any]) -> None:
    config, data = prepared.config, prepared.tasks["past_tense"]
    spec = EvaluateSpec(
        metric=data.config.metric,
        template=data.config.template,
        wrapper=config.prompt.wrapper,
        max_input_tokens=config.prompt.max_input_tokens,
        max_new_tokens=prepared.max_new_tokens["past_tense"],
    )
    digest = shared["held_in"]["past_tense"]["expert_digest"]
    recipe = evaluation_recipe(digest, data, "test", spec, "float32", "float32")
    scored = find(prepared.store, recipe.key, {})
    assert scored is not None
    lines = [json.loads(line) for line in prepared.store.get(scored.files["rows"].name).decode().splitlines()]
    rows = rows_from_jsonl(prepared.store.get(data.object_name("test")))
    assert [line["id"] for line in lines] == [row.id for row in rows]
    assert scored.meta["score"] == shared["held_in"]["past_tense"]["expert"]

    mlflow.set_tracking_uri(stack.env()["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model("models:/smollm2.past_tense/1")
    answers = model.predict([row.input for row in rows])
    assert all(isinstance(answer, str) for answer in answers)
    assert list(answers) == [line["output"] for line in lines]


def test_the_registered_merge_answers(stack: Any, shared: dict[str, Any]) -> None:
    assert shared["chosen"]["digest"]
    mlflow.set_tracking_uri(stack.env()["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model("models:/smollm2.merged/1")
    (answer,) = model.predict(["Past tense?\nI walk home."])
    assert isinstance(answer, str)


@pytest.mark.usefixtures("_one_thread")
def test_a_sparse_classifier_learns_a_real_task(stack: Any, pipeline: Any) -> None:
    """SpaRTA's setting: a random share of value and output projections and a whole head, seven intents."""
    config = yaml.safe_load(QUICKSTART.with_name("classification.yaml").read_text())
    config |= {
        "suite": "smollm2-intents",
        "splits": {"train": 256, "validation": 16, "gate": 16, "test": 64},
        "held_in": {"intent_recognition": config["held_in"]["intent_recognition"]},
        "merge": {"candidates": [{"method": "mean"}]},
        "evaluate": {"compute_dtype": "float32", "serving_dtype": None},
    }
    config["train"] |= {"steps": 30, "batch_size": 8, "patience": None}
    finished = pipeline(config)
    assert finished.code == 0, finished.output[-4000:]
    assert finished.results is not None
    row = finished.results["held_in"]["intent_recognition"]
    assert row["base"] < 0.4
    assert row["expert"] > 0.75
    mlflow.set_tracking_uri(stack.env()["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model("models:/smollm2-intents.intent_recognition/1")
    parsed = PipelineConfig.model_validate(config)
    data = load_tasks(parsed.held_in, cache_dir(), parsed.splits.model_dump(), parsed.seed)["intent_recognition"]
    rows = data.splits["test"]
    right = [label == test.targets[0] for label, test in zip(model.predict([r.input for r in rows]), rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(row["expert"])
