import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch

from infra import processes, registry
from infra.artifacts import Recipe, publish
from infra.errors import ConfigError, RegistryError
from infra.stack import StackState
from infra.store import Store


@pytest.fixture
def run_id(stack: StackState) -> str:
    return registry.start_run("tests", "run", {"a": "b"}, {"lr": 1e-3})


@pytest.fixture
def adapter(run_id: str) -> registry.RegisteredAdapter:
    task = uuid.uuid4().hex
    return registry.RegisteredAdapter(
        name=registry.model_name("tests", task),
        task=task,
        key="1" * 64,
        digest="2" * 64,
        adapter_uri="s3://factory/some/prefix/objects/k/a/adapter.safetensors",
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


def test_names() -> None:
    assert registry.model_name("quick", "gem/e2e:nlg") == "quick.gem-e2e-nlg"
    assert registry.model_names("s", ["a/b", "c"]) == {"a/b": "s.a-b", "c": "s.c"}
    with pytest.raises(ConfigError, match=r"'a/b' and 'a:b'.*'s.a-b'"):
        registry.model_names("s", ["a/b", "a:b"])


def test_check(stack: StackState, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.check()
    port = processes.choose_ports({"x": 21998}, frozenset())["x"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(RegistryError, match=f"127.0.0.1:{port} is unreachable"):
        registry.check()
    assert time.monotonic() - began < 10
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    with pytest.raises(RegistryError, match="sqlite"):
        registry.check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@example.org")
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        registry.check()
    assert "secret" not in str(refused.value)


def test_registration_is_idempotent(adapter: registry.RegisteredAdapter) -> None:
    assert registry.register(adapter) == (1, True)
    assert registry.register(adapter) == (1, False)
    assert registry.register(replace(adapter, digest="4" * 64, description="Better.")) == (2, True)
    client = registry.client()
    champion = client.get_model_version_by_alias(adapter.name, "champion")
    assert int(champion.version) == 2
    assert champion.tags["factory.digest"] == "4" * 64
    assert champion.tags["metric"] == "exact_match"
    assert client.get_registered_model(adapter.name).description == "Better."
    assert registry.register(adapter) == (1, False)
    assert int(client.get_model_version_by_alias(adapter.name, "champion").version) == 1


def test_concurrent_registrations(adapter: registry.RegisteredAdapter) -> None:
    same = [adapter] * 3
    others = [replace(adapter, name=f"{adapter.name}-{i}", task=f"{adapter.task}-{i}") for i in range(3)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(registry.register, same + others))
    assert [version for version, _ in results] == [1] * 6
    assert [made for _, made in results[:3]].count(True) == 1
    assert [made for _, made in results[3:]] == [True] * 3
    assert len(registry.client().search_model_versions(f"name = '{adapter.name}'")) == 1


def test_a_model_of_another_task_is_not_taken_over(adapter: registry.RegisteredAdapter) -> None:
    registry.register(adapter)
    with pytest.raises(RegistryError, match="is registered for the task"):
        registry.register(replace(adapter, task="another"))


def test_the_registry_holds_only_code_and_configuration(adapter: registry.RegisteredAdapter, tmp_path: Path) -> None:
    registry.register(adapter)
    folder = Path(registry.client().download_artifacts(adapter.run_id, "models", str(tmp_path)))
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert "adapter_model.py" in sizes
    assert "store.py" in sizes
    assert not [path for path in sizes if path.endswith((".pkl", ".safetensors", ".bin"))]
    assert sum(sizes.values()) < 1_000_000


def _tiny_expert(store: Store, tmp_path: Path) -> tuple[str, str, str, str]:
    """A tiny base and one adapter in the store: base sha256, adapter uri, adapter file sha256, key."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from workers.adapter import AdapterMeta, save_adapter
    from workers.base import prepare_base, upload_base
    from workers.support import SparseTensor

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
    adapter: registry.RegisteredAdapter, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_sha256, uri, sha256, key = _tiny_expert(store, tmp_path)
    adapter = replace(adapter, base_sha256=base_sha256, adapter_uri=uri, adapter_sha256=sha256, key=key)
    version, _ = registry.register(adapter)
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    model = mlflow.pyfunc.load_model(f"models:/{adapter.name}@champion")
    answers = model.predict(["w1 w2", "w3"])
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)
    assert answers == model.predict(pd.DataFrame({"input": ["w1 w2", "w3"]}))
    wrong = registry.register(replace(adapter, adapter_sha256="0" * 64, digest="5" * 64))
    assert wrong == (version + 1, True)
    with pytest.raises(Exception, match="corrupted"):
        mlflow.pyfunc.load_model(f"models:/{adapter.name}@champion")
    # In a process that has neither this project nor its working folder on its path:
    script = (
        f"import mlflow; m = mlflow.pyfunc.load_model('models:/{adapter.name}/{version}'); "
        f"assert m.predict(['w1 w2', 'w3']) == {answers!r}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_runs_and_history(run_id: str) -> None:
    rows = [{"step": step, "loss": 1.0 / (step + 1), "nothing": float("nan")} for step in range(1200)]
    registry.log_history(run_id, rows)
    registry.set_tags(run_id, {"x": 1})
    registry.finish_run(run_id, "FINISHED")
    client = registry.client()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.001"}
    assert run.data.tags["x"] == "1"
    assert run.data.metrics == {"loss": pytest.approx(1 / 1200)}
    assert len(client.get_metric_history(run_id, "loss")) == 1200
    with pytest.raises(ValueError, match="bad status"):
        registry.finish_run(run_id, "RUNNING")


def test_experiments_are_made_once_by_racing_starters(stack: StackState) -> None:
    name = uuid.uuid4().hex
    barrier = threading.Barrier(4)

    def start(_: int) -> str:
        barrier.wait()
        return registry.start_run(name, "run", {}, {})

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(start, range(4)))) == 4


def test_kill_running_children(run_id: str) -> None:
    children = [registry.start_run("tests", f"child {i}", {}, {}, parent_run_id=run_id) for i in range(6)]
    stranger = registry.start_run("tests", "stranger", {}, {})
    registry.finish_run(children[0], "FINISHED")
    assert registry.kill_running_children(run_id) == 5
    client = registry.client()
    statuses = [client.get_run(child).info.status for child in children]
    assert statuses == ["FINISHED"] + ["KILLED"] * 5
    assert client.get_run(stranger).info.status == "RUNNING"
    assert client.get_run(children[1]).info.end_time is not None
    assert registry.kill_running_children(run_id) == 0
