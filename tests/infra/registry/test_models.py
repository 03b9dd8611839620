"""Registered models against a real MLflow server: idempotent, with their lineage, and answering when loaded."""

import json
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch

from infra.artifacts.manifests import Recipe, publish
from infra.errors import BaseModelError, RegistryError, StoreError
from infra.registry import runs
from infra.registry.lineage import Ancestor, Lineage
from infra.registry.models import (
    RegisteredAdapter,
    RegisteredCheckpoint,
    Registration,
    has_files,
    register,
    split_place,
)
from infra.registry.versions import find_version, lineage_of
from infra.stack.services import StackState
from infra.store.s3 import Store
from workers.serving.checkpoint_model import fetch_checkpoint


@pytest.fixture
def run_id(stack: StackState) -> str:
    return runs.start_run("tests", "run", {"a": "b"}, {"lr": 1e-3})


@pytest.fixture
def adapter(run_id: str) -> RegisteredAdapter:
    task = uuid.uuid4().hex
    return RegisteredAdapter(
        name=runs.model_name("tests", task),
        task=task,
        key="1" * 64,
        digest="2" * 64,
        adapter_uri=f"s3://factory/some/prefix/objects/{'1' * 64}/a/adapter.safetensors",
        base_sha256="3" * 64,
        base_name="tiny",
        prompt_wrapper="<{prompt}>",
        prompt_template="say {input}",
        max_new_tokens=4,
        max_input_tokens=96,
        dtype="float32",
        run_id=run_id,
        description="An expert for tests.",
        tags={"metric": "exact_match"},
    )


def test_registration_is_idempotent(adapter: RegisteredAdapter) -> None:
    assert register(adapter) == (1, True)
    assert register(adapter) == (1, False)
    assert register(replace(adapter, digest="4" * 64, description="Better.")) == (2, True)
    client = runs.client()
    second = client.get_model_version(adapter.name, "2")
    assert second.tags["factory.digest"] == "4" * 64
    assert second.tags["metric"] == "exact_match"
    assert second.description == "Better."
    assert register(adapter) == (1, False)
    assert client.get_registered_model(adapter.name).aliases == {}


def test_what_is_asked_in_another_way_is_another_version(adapter: RegisteredAdapter) -> None:
    register(adapter)
    for number, change in enumerate(({"max_new_tokens": 5}, {"batch_size": 7}, {"prompts": {"other": {}}}), 2):
        assert register(replace(adapter, **change)) == (number, True)
        assert register(replace(adapter, **change)) == (number, False)
    assert register(replace(adapter, description="Another card.", about="…")) == (1, False)


def test_a_version_without_files_is_registered_anew(adapter: RegisteredAdapter, store: Store) -> None:
    """`mlflow gc` removes the files of deleted runs, whatever the registry says of them."""
    register(adapter)
    client = runs.client()
    uri = client.get_model_version(adapter.name, "1").source
    files = Store("mlflow", store.endpoint, f"artifacts/{uri.removeprefix('mlflow-artifacts:/')}")
    for name in list(files.list()):
        files.delete(name)
    assert not has_files(uri)
    assert register(adapter) == (2, True)
    assert register(adapter) == (2, False)


def test_a_description_that_was_not_finished_is_finished_later(adapter: RegisteredAdapter) -> None:
    card = replace(adapter, description="Load models:/x/<version>.")
    register(card)
    client = runs.client()
    client.update_model_version(adapter.name, "1", card.description)  # as if killed before the number was known
    assert register(card) == (1, False)
    assert client.get_model_version(adapter.name, "1").description == "Load models:/x/1."


def test_a_version_has_its_card_and_the_model_says_what_all_versions_are(adapter: RegisteredAdapter) -> None:
    card = f"Load models:/{adapter.name}/<version>."
    for letter, about in (("a", "Expert for a task."), ("b", "Something else.")):
        register(replace(adapter, digest=letter * 64, description=card, about=about))
    client = runs.client()
    for number in ("1", "2"):
        assert client.get_model_version(adapter.name, number).description == f"Load models:/{adapter.name}/{number}."
    about = client.get_registered_model(adapter.name).description
    assert about.startswith("Expert for a task.\n\n- `champion`: ")
    assert f"models:/{adapter.name}@champion" in about


def test_concurrent_registrations(adapter: RegisteredAdapter) -> None:
    same = [adapter] * 3
    others = [replace(adapter, name=f"{adapter.name}-{i}", task=f"{adapter.task}-{i}") for i in range(3)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(register, same + others))
    assert [version for version, _ in results] == [1] * 6
    assert [made for _, made in results[:3]].count(True) == 1
    assert [made for _, made in results[3:]] == [True] * 3
    assert len(runs.client().search_model_versions(f"name = '{adapter.name}'")) == 1


def test_a_model_of_another_task_is_not_taken_over(adapter: RegisteredAdapter) -> None:
    register(adapter)
    with pytest.raises(RegistryError, match="is registered for the task"):
        register(replace(adapter, task="another"))


def test_the_registry_holds_only_code_and_configuration(adapter: RegisteredAdapter, tmp_path: Path) -> None:
    register(adapter)
    folder = Path(runs.client().download_artifacts(adapter.run_id, "models", str(tmp_path)))
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert "adapter_model.py" in sizes
    assert "code.zip" in sizes
    assert not [path for path in sizes if path.endswith((".pkl", ".safetensors", ".bin"))]
    assert sum(sizes.values()) < 1_000_000


def _tiny_expert(store: Store, tmp_path: Path) -> tuple[str, str, str, str]:
    """A tiny base and one adapter in the store: base sha256, adapter uri, adapter file sha256, key."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from workers.adapters.support import SparseTensor
    from workers.adapters.writer import AdapterMeta, save_adapter
    from workers.base.prepare import prepare_base, upload_base

    folder = tmp_path / "tiny"
    words = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(13))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    base = prepare_base(f"path:{folder}", tmp_path / "made")
    upload_base(store, base)
    head = torch.zeros(16, 16)
    head[7] = 1000.0  # with one sign or the other, word 7 is always, or never, the answer
    file = tmp_path / "adapter.safetensors"
    delta = SparseTensor((16, 16), torch.arange(112, 128), head[7].clone())
    save_adapter(file, {"lm_head.weight": delta}, AdapterMeta(base_sha256=base.sha256))
    made, _ = publish(store, Recipe("expert", 1, {}), {"adapter.safetensors": file}, {}, {})
    ref = made.files["adapter.safetensors"]
    return base.sha256, store.uri(ref.name), ref.sha256, made.key


def test_a_registered_adapter_loads_and_predicts(
    adapter: RegisteredAdapter, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_sha256, uri, sha256, key = _tiny_expert(store, tmp_path)
    adapter = replace(adapter, base_sha256=base_sha256, adapter_uri=uri, adapter_sha256=sha256, key=key)
    version, _ = register(adapter)
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    model = mlflow.pyfunc.load_model(f"models:/{adapter.name}/{version}")
    answers = model.predict(["w1 w2", "w3"])
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)
    assert answers == model.predict(pd.DataFrame({"input": ["w1 w2", "w3"]}))
    wrong = register(replace(adapter, adapter_sha256="0" * 64, digest="5" * 64))
    assert wrong == (version + 1, True)
    with pytest.raises(Exception, match="corrupted"):
        mlflow.pyfunc.load_model(f"models:/{adapter.name}/{version + 1}")
    # In a process that has neither this project nor its working folder on its path:
    script = (
        f"import mlflow; m = mlflow.pyfunc.load_model('models:/{adapter.name}/{version}'); "
        f"assert m.predict(['w1 w2', 'w3']) == {answers!r}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def lineage(experts: int, parameters: dict[str, Any] | None = None) -> Lineage:
    made_of = [
        Ancestor(f"task {at}", f"{at:064x}", f"{at + 1:064x}", f"models:/tests.task-{at}/1" if at % 2 else None)
        for at in range(experts)
    ]
    return Lineage("ties", parameters or {"lambda": 1.0, "density": 0.5}, "9" * 64, tuple(made_of))


@pytest.mark.parametrize("experts", [3, 1000])
def test_a_merge_carries_what_it_was_made_of(adapter: RegisteredAdapter, tmp_path: Path, experts: int) -> None:
    weights = {"lambda": 1.0, "weights": {f"task {at}": 1 / experts for at in range(experts)}}
    made_of = lineage(experts, weights)
    version, _ = register(replace(adapter, description="A merge. " + "x" * 4000, lineage=made_of))
    client = runs.client()
    found = client.get_model_version(adapter.name, str(version))
    assert found.tags["factory.lineage.method"] == "ties"
    assert found.tags["factory.lineage.key"] == "9" * 64
    listed = found.tags["factory.lineage.experts"]
    assert listed.startswith("task 0 (not registered), models:/tests.task-1/1, task 2 (not registered)")
    if experts == 3:
        assert json.loads(found.tags["factory.lineage.parameters"]) == weights
        assert "more" not in listed
    else:
        *words, last = listed.split(", ")
        assert len(words) > 100
        assert last == f"and {1000 - len(words)} more: see lineage.json"
        assert "lineage.json" in found.tags["factory.lineage.parameters"]
    assert all(len(value) <= 5000 for value in found.tags.values())
    text = found.description
    assert len(text) <= 5000
    assert text.startswith("A merge. xxx")
    assert f"- method: ties with {found.tags['factory.lineage.parameters']}, recipe {'9' * 64}" in text
    assert f"- made of {experts} experts: task 0 (not registered), models:/tests.task-1/1" in text
    uri = f"models:/{adapter.name}/{version}"
    file = mlflow.artifacts.download_artifacts(f"{uri}/lineage.json", dst_path=str(tmp_path))
    whole = json.loads(Path(file).read_text())
    assert whole == json.loads(made_of.to_json())
    assert [Ancestor(**expert) for expert in whole["experts"]] == list(made_of.experts)
    assert whole["parameters"] == weights
    registered = find_version(adapter.name, version)
    assert registered is not None
    assert lineage_of(registered) == made_of


def test_a_model_without_lineage_has_none(adapter: RegisteredAdapter) -> None:
    version, _ = register(adapter)
    found = runs.client().get_model_version(adapter.name, str(version))
    assert not [tag for tag in found.tags if "lineage" in tag]
    assert found.description == "An expert for tests."
    registered = find_version(adapter.name, version)
    assert registered is not None
    assert lineage_of(registered) is None


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        (f"s3://b/p/q/objects/{'a' * 64}/1/adapter", ("b", "p/q", f"objects/{'a' * 64}/1/adapter")),
        (f"s3://b/objects/{'a' * 64}/1", ("b", "", f"objects/{'a' * 64}/1")),
        ("s3://b/my-objects/m.safetensors", ("b", "", "my-objects/m.safetensors")),
        ("s3://b/x/objects/m.safetensors", ("b", "", "x/objects/m.safetensors")),
    ],
)
def test_only_a_stored_artifact_has_a_prefix(uri: str, place: tuple[str, str, str]) -> None:
    assert split_place(uri) == place


def _checkpoint(adapter: RegisteredAdapter, store: Store, folder: Path, file: Path) -> RegisteredCheckpoint:
    """Base and adapter as a full checkpoint of several shards in the store."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from workers.adapters.writer import AdapterReader
    from workers.tensors.source import FileSource
    from workers.training.in_place import apply_delta

    model = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float32)
    apply_delta(model, AdapterReader(FileSource(file)))
    model.save_pretrained(folder / "merged", max_shard_size="5KB")
    AutoTokenizer.from_pretrained(folder / "tiny").save_pretrained(folder / "merged")
    files = {path.name: path for path in (folder / "merged").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    made, _ = publish(store, Recipe("checkpoint", 1, {}), files, {}, {})
    shared = {f.name: getattr(adapter, f.name) for f in fields(Registration)}
    return RegisteredCheckpoint(
        **{**shared, "name": f"{adapter.name}-full", "key": made.key, "digest": made.digest, "lineage": lineage(2)},
        checkpoint_uri=store.uri(made.files["config.json"].name.rpartition("/")[0]),
        files=made.files,
    )


def test_a_registered_checkpoint_answers_as_the_adapter_does(
    adapter: RegisteredAdapter, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_sha256, uri, sha256, key = _tiny_expert(store, tmp_path)
    adapter = replace(adapter, base_sha256=base_sha256, adapter_uri=uri, adapter_sha256=sha256, key=key)
    register(adapter)
    whole = _checkpoint(adapter, store, tmp_path, tmp_path / "adapter.safetensors")
    assert register(whole) == (1, True)
    assert register(whole) == (1, False)
    assert register(replace(whole, checkpoint_uri=f"{whole.checkpoint_uri}x")) == (2, True)
    assert register(whole) == (1, False)
    found = runs.client().get_model_version(whole.name, "1")
    assert found.tags["factory.checkpoint_uri"] == whole.checkpoint_uri
    assert found.tags["factory.lineage.method"] == "ties"
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    texts = ["w1 w2", "w3", "w4 w4 w4"]
    model = mlflow.pyfunc.load_model(f"models:/{whole.name}/1")
    answers = model.predict(texts)
    assert answers == mlflow.pyfunc.load_model(f"models:/{adapter.name}/1").predict(texts)
    assert len("".join(answers)) > 0
    for ref in whole.files.values():  # the machine's cache is enough from now on
        store.delete(ref.name)
    # In a process that has neither this project nor its working folder on its path:
    script = (
        f"import mlflow; m = mlflow.pyfunc.load_model('models:/{whole.name}/1'); "
        f"assert m.predict({texts!r}) == {answers!r}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "another"))
    with pytest.raises(Exception, match=r"no such object|cannot read"):
        mlflow.pyfunc.load_model(f"models:/{whole.name}/1")


def test_a_checkpoint_with_other_bytes_is_refused(store: Store, tmp_path: Path) -> None:
    refs = {}
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
        refs[name] = asdict(store.upload_file(f"objects/{name}", tmp_path / name))
    store.put("objects/model.safetensors", b"model.safetensorz")
    with pytest.raises(StoreError, match="corrupted"):
        fetch_checkpoint(store, refs, "7" * 64, tmp_path / "cache")
    with pytest.raises(BaseModelError, match="no name of a file"):
        fetch_checkpoint(store, {"../config.json": refs["config.json"]}, "8" * 64, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "checkpoints").iterdir() if path.suffix != ".lock"] == []
