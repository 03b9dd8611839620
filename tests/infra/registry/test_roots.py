"""What a real MLflow server says is to be kept."""

import uuid
from dataclasses import replace
from typing import Any

import pytest

from infra.registry import runs
from infra.registry.lineage import Ancestor, Lineage
from infra.registry.models import HEADS_TAG, RegisteredAdapter, RegisteredCheckpoint, register
from infra.registry.roots import pipeline_runs, referred
from infra.stack.services import StackState
from infra.store.s3 import FileRef, Store


def key() -> str:
    return uuid.uuid4().hex * 2


@pytest.fixture
def run_id(stack: StackState) -> str:
    return runs.start_run("roots", "run", {"kind": "pipeline"}, {})


def adapter(store: Store, run_id: str, artifact: str, attempt: str = "a") -> RegisteredAdapter:
    task = uuid.uuid4().hex
    return RegisteredAdapter(
        name=runs.model_name("roots", task), task=task, key=artifact, digest=key(),
        adapter_uri=store.uri(f"objects/{artifact}/{attempt}/adapter"), base_sha256=key(), base_name="tiny",
        prompt_wrapper="{prompt}", prompt_template="{input}", max_new_tokens=4, dtype="float32", run_id=run_id,
        description="For tests.",
    )  # fmt: skip


def test_versions_refer_to_keys_bytes_bases_and_heads(store: Store, run_id: str) -> None:
    expert, merged, head, checkpoint = key(), key(), key(), key()
    before = referred(store)
    own = adapter(store, run_id, expert, "replaced")
    register(own)
    merge = replace(
        adapter(store, run_id, merged),
        heads={"t": {"adapter": store.uri(f"objects/{head}/h/adapter"), "sha256": "", "labels": ["x", "y"],
                     "prompt_template": "{input}"}},
        lineage=Lineage("mean", {}, merged, (Ancestor("t", head, key()),)),
    )  # fmt: skip
    register(merge)
    whole = RegisteredCheckpoint(
        **{name: getattr(merge, name) for name in (
            "base_sha256", "base_name", "prompt_wrapper", "prompt_template", "max_new_tokens", "dtype", "run_id",
            "description", "lineage")},
        name=f"{merge.name}-whole", task=f"{merge.task}-whole", key=checkpoint, digest=key(),
        checkpoint_uri=store.uri(f"objects/{checkpoint}/c"), files={"a": FileRef(f"objects/{checkpoint}/c/a", "", 1)},
    )  # fmt: skip
    register(whole)
    elsewhere = replace(own, name=f"{own.name}-x", task=f"{own.task}-x", adapter_uri=f"s3://other/objects/{head}/z/w")
    register(elsewhere)
    runs.client().create_registered_model(foreign := f"foreign-{uuid.uuid4().hex}")
    runs.client().create_model_version(foreign, "s3://anywhere/model")

    found = referred(store)
    assert found.versions - before.versions == 4
    assert found.keys - before.keys == {expert, merged, checkpoint, own.base_sha256, merge.base_sha256}
    assert found.attempts - before.attempts == {
        f"objects/{expert}/replaced", f"objects/{merged}/a", f"objects/{head}/h", f"objects/{checkpoint}/c"
    }  # fmt: skip
    runs.client().delete_model_version(own.name, "1")
    runs.client().delete_model_version(elsewhere.name, "1")
    assert found.keys - referred(store).keys == {expert, own.base_sha256}


def test_heads_are_read_unless_the_version_says_that_it_has_none(store: Store, run_id: str, monkeypatch: Any) -> None:
    merged, head = key(), key()
    model = replace(adapter(store, run_id, merged), lineage=Lineage("mean", {}, merged, ()))
    register(model)
    monkeypatch.setattr("infra.registry.roots._heads", lambda version: [f"objects/{head}/of-{version.name}/adapter"])
    pinned = f"objects/{head}/of-{model.name}"
    assert pinned not in referred(store).attempts
    runs.client().delete_model_version_tag(model.name, "1", HEADS_TAG)  # registered before there was the tag
    assert pinned in referred(store).attempts


def test_a_version_whose_files_are_gone_keeps_what_its_tags_name(store: Store, run_id: str) -> None:
    merged = key()
    heads = {"t": {"adapter": store.uri(f"objects/{key()}/h/adapter"), "sha256": "", "labels": ["x", "y"],
                   "prompt_template": "{input}"}}  # fmt: skip
    model = replace(adapter(store, run_id, merged), lineage=Lineage("mean", {}, merged, ()), heads=heads)
    register(model)
    version = runs.client().get_model_version(model.name, "1")
    name = str(version.source).partition("mlflow-artifacts:/")[2]
    files = Store("mlflow", store.endpoint, "artifacts")
    gone = list(files.list(f"{name}/"))
    assert gone
    for each in gone:
        files.delete(each)
    assert f"objects/{merged}/a" in referred(store).attempts


def test_runs_are_known_with_their_state(stack: StackState) -> None:
    client = runs.client()
    ids = {
        name: runs.start_run(f"roots-{name}", name, {"kind": "pipeline"}, {})
        for name in ("running", "finished", "deleted", "experiment")
    }
    child = runs.start_run("roots-running", "expert", {"kind": "expert"}, {}, ids["running"])
    runs.finish_run(ids["finished"], "FINISHED")
    client.delete_run(ids["deleted"])
    client.delete_experiment(client.get_run(ids["experiment"]).info.experiment_id)
    known = pipeline_runs()
    states = {name: (known[run].deleted, known[run].running) for name, run in ids.items()}
    assert states == {
        "running": (False, True), "finished": (False, False), "deleted": (True, True), "experiment": (True, True)
    }  # fmt: skip
    info = client.get_run(ids["finished"]).info
    assert known[ids["finished"]].last == info.end_time / 1000
    assert child not in known


def test_all_pages_are_read(monkeypatch: pytest.MonkeyPatch, stack: StackState) -> None:
    ids = {runs.start_run("roots-pages", str(number), {"kind": "pipeline"}, {}) for number in range(5)}
    monkeypatch.setattr("infra.registry.roots._PAGE", 2)
    assert ids <= pipeline_runs().keys()
