"""Every kind of expert and of support, several seeds, and classification, through the whole pipeline."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch

from infra.store.s3 import Store
from infra.store.source import StoreSource
from tests.workers.tiny import tiny_encoder, tiny_encoder_tokenizer
from workers.adapters.writer import AdapterReader

CONFIG = Callable[..., dict[str, Any]]
MODULES = r".*\.(v_proj|o_proj|up_proj)"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"expert": "lora", "lora": {"rank": 4, "alpha": 8}, "mask": {"modules": MODULES}},
    "full": {"expert": "full", "mask": {"modules": MODULES}},
    "rows": {"mask": {"modules": "value_output_mlp", "granularity": "row", "criterion": "fisher", "density": 0.2}},
    "shared": {
        "mask": {"modules": MODULES, "granularity": "element", "density": 0.2, "shared": True, "budget": "global",
                 "criterion": "connection_sensitivity"},
    },
}  # fmt: skip


def reader(uri: str) -> AdapterReader:
    """An adapter in the store, by its URI."""
    store = Store.from_env()
    return AdapterReader(StoreSource(store, uri.removeprefix(store.uri("")).lstrip("/")))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_through_the_whole_pipeline(pipeline: Any, tiny_config: CONFIG, kind: str) -> None:
    rate = 0.005 if kind == "full" else 0.02
    train = {"steps": 8, "batch_size": 8, "learning_rate": rate, "validate_every": 4, "compute_dtype": "float32"}
    config = tiny_config(f"kind-{kind}", 3, train=train, **KINDS[kind])
    finished = pipeline(config)
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    assert results["made"]["experts"] == 3
    assert results["summary"]["held_in"]["expert"] > results["summary"]["held_in"]["base"]
    adapters = [reader(row["expert_uri"]) for row in results["held_in"].values()]
    expected = {"lora": "lora", "full": "full"}.get(kind, "sparse")
    assert [adapter.meta.kind for adapter in adapters] == [expected] * 3
    merged = reader(results["chosen"]["uri"])
    for name in merged.names:
        tensors = [adapter.load(name) for adapter in adapters]
        if kind in ("lora", "full", "shared"):  # the merge lies where every expert lies
            assert all(torch.equal(tensor.indices, tensors[0].indices) for tensor in tensors)
            assert torch.equal(merged.load(name).indices, tensors[0].indices)
        else:
            union = torch.unique(torch.cat([tensor.indices for tensor in tensors]))
            assert torch.equal(merged.load(name).indices, union)
    version = mlflow.MlflowClient().get_model_version(f"kind-{kind}.in0", "1")
    assert version.description.startswith(f"{expected.capitalize()} expert for in0")
    predicted = mlflow.pyfunc.load_model(f"models:/kind-{kind}.in0/1").predict(["the red cat sleeps a"])
    assert isinstance(predicted[0], str)
    if kind == "shared":  # the support is an input of every expert, found and not selected again
        again = pipeline(config)
        assert again.results is not None
        assert set(again.results["made"].values()) == {0}
        assert again.results["held_in"] == results["held_in"]


def test_seeds_give_mean_and_standard_deviation(pipeline: Any, tiny_config: CONFIG) -> None:
    config = tiny_config("seeds", 2, seeds=[3, 4])
    finished = pipeline(config)
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    assert results["made"]["experts"] == 4
    assert results["seeds"]["values"] == [3, 4]
    for group, model in (("held_in", "expert"), ("held_in", "merged"), ("held_out", "merged")):
        spread = results["seeds"]["summary"][group][model]
        assert spread["values"][0] == results["summary"][group][model]
        assert spread["mean"] == pytest.approx(sum(spread["values"]) / 2)
        assert spread["sd"] == pytest.approx(abs(spread["values"][0] - spread["values"][1]) / 2**0.5)
    assert "over seeds 3, 4" in finished.output
    versions = mlflow.MlflowClient().search_model_versions("name='seeds.in0'")
    assert len(versions) == 1
    one = pipeline(tiny_config("seeds", 2, seed=0, seeds=[4]))
    assert one.results is not None
    assert one.results["made"]["experts"] == 0
    assert one.results["summary"]["held_in"]["expert"] == results["seeds"]["summary"]["held_in"]["expert"]["values"][1]


# -- classification --


def write_labelled(path: Path, labels: dict[str, str], rows: int = 160) -> Path:
    """Rows of letters, the last of which tells the label."""
    rng = random.Random(path.name)
    lines = {}
    while len(lines) < rows:
        marker = rng.choice(list(labels))
        lines["".join([*rng.choices("abcdef", k=5), marker])] = labels[marker]
    path.write_text("".join(json.dumps({"input": i, "target": t}) + "\n" for i, t in sorted(lines.items())))
    return path


@pytest.mark.parametrize("base", ["decoder", "encoder"])
def test_classification_goes_through_the_whole_pipeline(
    pipeline: Any, tiny_config: CONFIG, tmp_path: Path, base: str
) -> None:
    suite = f"labels-{base}"
    config = tiny_config(suite, 2, objective="classification", held_out={})
    files = {
        "two": write_labelled(tmp_path / f"{suite}-two.jsonl", {"x": "yes", "y": "no"}),
        "three": write_labelled(tmp_path / f"{suite}-three.jsonl", {"x": "one", "y": "two", "z": "three"}),
    }
    metrics = {"two": "matthews", "three": "f1"}
    config["held_in"] = {name: {"source": f"jsonl:{file}", "metric": metrics[name]} for name, file in files.items()}
    config["prompt"]["wrapper"] = "{prompt}"
    config["mask"] = {"modules": "all_linear", "granularity": "element", "density": 0.2}
    config["train"] |= {"steps": 40, "learning_rate": 0.02, "validate_every": 20}
    config["splits"] = {"train": 96, "validation": 16, "gate": 16, "test": 32}
    if base == "encoder":
        folder = tmp_path / "encoder"
        tiny_encoder().save_pretrained(folder)
        tiny_encoder_tokenizer().save_pretrained(folder)
        config["base"] = f"path:{folder}"
    finished = pipeline(config)
    assert finished.code == 0, finished.output[-4000:]
    results = finished.results
    assert results is not None
    assert results["objective"] == "classification"
    for name, row in results["held_in"].items():
        assert row["metric"] == metrics[name]
        assert row["expert"] > 0.8 > row["base"]
        assert reader(row["expert_uri"]).head_names
    low, high = results["summary"]["held_in"]["expert_interval"]
    assert low <= results["summary"]["held_in"]["expert"] <= high
    merged = reader(results["chosen"]["uri"])
    assert not merged.head_names
    rows = pd.DataFrame({"task": ["three", "two"], "input": ["abcdez", "fedcby"]})
    answers = mlflow.pyfunc.load_model(f"models:/{suite}.merged/1").predict(rows)
    assert answers[0] in ("one", "two", "three")
    assert answers[1] in ("yes", "no")
    expert = mlflow.pyfunc.load_model(f"models:/{suite}.three/1")
    assert list(expert.predict(["abcdex", "fedcby"])) == ["one", "two"]


def test_a_classification_that_cannot_work_is_refused(pipeline: Any, tiny_config: CONFIG, tmp_path: Path) -> None:
    config = tiny_config("labels-wrong", 1, objective="classification")
    finished = pipeline(config)
    assert finished.code == 2
    assert "metric exact_match; classification takes accuracy, f1, matthews" in finished.output
    config = tiny_config("labels-wrong", 1, objective="classification", held_out={})
    config["held_in"]["in0"]["metric"] = "accuracy"
    finished = pipeline(config)
    assert finished.code == 2
    assert "one target only" in finished.output
    file = write_labelled(tmp_path / "wrong.jsonl", {"x": "yes", "y": "no"})
    config["held_in"]["in0"] |= {"source": f"jsonl:{file}"}
    config["mask"] = {"modules": ".*"}
    finished = pipeline(config)
    assert finished.code == 2
    assert "the head is trained in full" in finished.output
