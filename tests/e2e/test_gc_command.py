"""Garbage collection after whole runs: `python -m pipeline gc`, against the stack's own store and MLflow."""

import contextlib
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest

from infra.artifacts.announcements import announce
from infra.artifacts.leases import holding
from infra.artifacts.manifests import peek
from infra.registry import runs
from infra.registry.roots import referred
from infra.store.admin import list_uploads
from infra.store.s3 import Store
from tests.e2e.conftest import pipeline_in
from tests.e2e.here import Finished, command

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Callable[..., dict[str, Any]]
SUITE = "collected"


@dataclass
class Scene:
    """A store of its own with two finished runs: they share the experts of in0 and in1, and the base."""

    store: Store
    config: dict[str, Any]
    """Of the second run."""
    first: dict[str, Any]
    second: dict[str, Any]
    said: tuple[set[str], set[str]]
    """What they announced."""

    def names(self) -> set[str]:
        return set(self.store.list())

    def only_first(self, kind: str) -> set[str]:
        """Keys of the artifacts of a kind that only the first run uses, in the store now."""
        return {
            key
            for key in self.said[0] - self.said[1]
            if (found := peek(self.store, key)) is not None and found.kind == kind
        }

    def hashes(self) -> set[str]:
        """Artifacts, rows and bases that are in the store."""
        places = [re.match(r"(artifacts|data|bases)/([0-9a-f]{64})", name) for name in self.names()]
        return {place[2] for place in places if place}


def collect(*options: str) -> Finished:
    return command("gc", *options)


def collect_in_its_own_process(*options: str) -> Finished:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "gc", *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, None)


def collected(by: Callable[..., Finished] = collect) -> str:
    """The output of a collection that removes what is as old as a second."""
    done = by("--remove", "--min-age-hours", "0")
    assert done.code == 0, done.output
    return done.output


def rows(output: str) -> list[tuple[str, str, int, str]]:
    """The table: goes or stays, what, how many, why."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    return [(word, what, int(count), why) for word, what, count, _, why in cells if word]


@pytest.fixture(scope="module")
def environment(stack: Any) -> Iterator[pytest.MonkeyPatch]:
    """A factory of its own in the stack's bucket: nothing that other tests made is in reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACTORY_S3_PREFIX", f"gc/{uuid.uuid4().hex}")
        yield patch


@pytest.fixture(scope="module")
def scene(environment: pytest.MonkeyPatch, tiny_config: CONFIG, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Both runs, the second with in3 instead of in2; the first one is deleted in MLflow, and what it registered too."""
    config = tiny_config(
        SUITE, 4, evaluate={"few_shot": 0, "batch_size": 8},
        merge={"fan_in": 2, "candidates": [{"method": "mean"}, {"method": "ties"}], "export": {}},
    )  # fmt: skip
    config["train"] |= {"steps": 4, "validate_every": 2}
    finished = []
    for number, dropped in enumerate(("in3", "in2")):
        own = config | {"held_in": {task: of for task, of in config["held_in"].items() if task != dropped}}
        finished.append(run(own, tmp_path_factory.mktemp(f"run{number}")))
    first, second = finished
    store = Store.from_env()
    said, other = (set(json.loads(store.get(f"runs/{results['run_id']}/keys.json"))) for results in finished)
    return Scene(store, own, first, second, (said, other))


def run(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    done = pipeline_in(folder, config)
    assert done.code == 0, done.output[-4000:]
    assert done.results is not None
    return done.results


def test_nothing_goes_while_both_runs_are_kept(scene: Scene) -> None:
    before = scene.names()
    for results, said in zip((scene.first, scene.second), scene.said, strict=True):
        assert {row["expert_key"] for row in results["held_in"].values()} <= said
        assert results["chosen"]["key"] in said
    assert scene.hashes() <= scene.said[0] | scene.said[1]  # everything that a run left is what it said
    assert not {name for name in before if name.startswith(("leases/", "checkpoints/", "checks/"))}
    output = collected()
    assert "removed nothing" in output
    assert "2 of 2 runs" in output
    assert scene.names() == before


def test_a_deleted_run_goes_but_for_what_registered_versions_were_made_of(scene: Scene) -> None:
    client = runs.client()
    client.delete_run(scene.first["run_id"])
    before = scene.names()

    nodes = len(scene.only_first("node"))
    assert nodes

    young = collect()
    assert young.code == 0, young.output
    assert "goes" not in {row[0] for row in rows(young.output)}  # nothing is a day old
    assert ("stays", "artifact: node", nodes, "younger than the minimal age") in rows(young.output)
    assert collect("--remove").code == 0
    assert scene.names() == before

    looked = collect("--min-age-hours", "0", "--list")
    assert looked.code == 0, looked.output
    assert scene.names() == before
    found = rows(looked.output)
    assert ("goes", "artifact: node", nodes, "nothing kept needs it") in found
    assert not {"artifact: expert", "artifact: checkpoint", "base"} & {what for _, what, _, _ in found}
    assert "nothing was removed; --remove does it" in looked.output
    assert "1 of 2 runs (1 deleted in MLflow)" in looked.output
    assert f"run {scene.first['run_id']}" in looked.output


def test_exactly_what_only_the_first_run_reached_goes(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> None:
    store, client, before = scene.store, runs.client(), scene.hashes()
    kept, only_first = scene.said[1], scene.said[0] - scene.said[1]
    in2 = scene.first["held_in"]["in2"]["expert_key"]
    assert in2 in only_first
    for version in client.search_model_versions(f"run_id = '{scene.first['run_id']}'"):
        client.delete_model_version(version.name, version.version)
    client.delete_model_version(runs.model_name(SUITE, "in2"), "1")
    expert = scene.second["held_in"]["in0"]["expert_key"]
    lost = [f"objects/{expert}/{'0' * 32}/adapter", f"objects/{'a' * 64}/{'1' * 32}/w", f"checkpoints/{in2}.json"]
    for name in lost:
        store.put(name, b"killed in the middle")
    s3, where = store._client(), {"Bucket": store.bucket, "Key": store._key(f"objects/{expert}/{'2' * 32}/adapter")}
    s3.upload_part(**where, UploadId=s3.create_multipart_upload(**where)["UploadId"], PartNumber=1, Body=b"123")

    # Spared for the time being: what is being made, and what a run in progress announced.
    merged, (node, *_) = scene.first["chosen"]["key"], scene.only_first("node")
    running = runs.start_run(SUITE, "in progress", {"kind": "pipeline"}, {})
    announce(store, running, {merged})
    with holding(store, node):
        output = collected()
    assert ("stays", "artifact: node", 1, "live lease") in rows(output)
    assert {merged, in2, node} <= scene.hashes()  # a merge with all that it was made of
    assert scene.only_first("evaluation") == set()
    assert {row["expert_key"] for row in scene.first["held_in"].values()} <= scene.hashes()
    runs.finish_run(running, "FINISHED")
    client.delete_run(running)

    output = collected(collect_in_its_own_process)
    assert scene.hashes() == before & kept
    assert before - scene.hashes() == before & only_first
    assert not {merged, in2, node} & scene.hashes()
    assert not scene.names() & set(lost)
    assert not list(list_uploads(store))
    assert {name.split("/")[1] for name in scene.names() if name.startswith("runs/")} == {scene.second["run_id"]}
    attempts = {name.split("/")[1] for name in scene.names() if name.startswith("objects/")}
    assert attempts <= scene.hashes()  # no data without a manifest
    assert "freed" in output
    assert "removed nothing" in collected()

    again = run(scene.config, tmp_path_factory.mktemp("again"))
    assert set(again["made"].values()) == {0}, again["made"]
    assert again["reused"]["experts"] == len(scene.second["held_in"])
    assert again["summary"] == scene.second["summary"]


def test_registered_versions_load_and_predict_afterwards(scene: Scene) -> None:
    versions = runs.client().search_model_versions(f"run_id = '{scene.second['run_id']}'")
    assert {version.tags["factory.task"] for version in versions} == {"merged", "merged-checkpoint"}
    for name in (*(v.name for v in versions), *(runs.model_name(SUITE, task) for task in scene.config["held_in"])):
        (newest, *_) = runs.client().search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])
        model = mlflow.pyfunc.load_model(f"models:/{name}/{newest.version}")
        assert len(model.predict(["red cat"])) == 1
    assert referred(scene.store).versions >= 5


def test_bad_input_is_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scene.names()
    assert collect("--keep-days", "-1").code == 2
    with contextlib.suppress(KeyError):
        monkeypatch.delenv("FACTORY_S3_BUCKET")
    monkeypatch.setenv("FACTORY_S3_BUCKET", "no-such-bucket")
    refused = collect("--remove")
    assert (refused.code, "no-such-bucket" in refused.output) == (2, True)
    monkeypatch.setenv("FACTORY_S3_BUCKET", scene.store.bucket)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    refused = collect_in_its_own_process("--remove")
    assert (refused.code, "MLflow" in refused.output) == (2, True)
    assert "Traceback" not in refused.output
    assert scene.names() == before
    assert os.environ["FACTORY_S3_PREFIX"] in scene.store.uri("")
