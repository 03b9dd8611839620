"""The registered models as classifiers, loaded from a real object store; generation is in test_model_registry."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from infra.digests import file_sha256
from infra.store.s3 import Store
from tests.workers.tiny import tiny_encoder, tiny_encoder_tokenizer
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.base.load import load_classifier, load_classifier_tokenizer
from workers.base.prepare import prepare_base, upload_base
from workers.scoring.classification import head_state, predict_labels, set_head
from workers.serving.adapter_model import AdapterModel
from workers.serving.checkpoint_model import CheckpointModel
from workers.serving.text_model import as_options, as_rows, as_tasks, as_texts
from workers.tensors.source import FileSource
from workers.text.prompt import PromptSpec
from workers.text.rows import Row
from workers.training.in_place import apply_delta

TEXTS = ["w1 w2 w3", "w9", "w4 w4 w11 w12 w30", "w21 w2", "w8 w7 w6 w5"]
LABELS = {"sentiment": ["bad", "fine", "good"], "topic": ["art", "music"]}
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def test_tasks_of_inputs() -> None:
    known = ["a", "b"]
    table = pd.DataFrame({"input": ["x", "y"], "task": ["b", "a"]})
    assert as_texts(table) == ["x", "y"]
    assert as_tasks(table, known, 2) == ["b", "a"]
    assert as_tasks([{"input": "x", "task": "b"}], known, 1) == ["b"]
    assert as_tasks(["x", "y"], ["a"], 2) == ["a", "a"]
    with pytest.raises(ValueError, match="'input' and 'task'; tasks: a, b"):
        as_tasks(["x"], known, 1)
    with pytest.raises(ValueError, match="not know the task 'c'"):
        as_tasks(pd.DataFrame({"input": ["x"], "task": ["c"]}), known, 1)
    with pytest.raises(ValueError, match="not know the task None"):
        as_tasks([{"input": "x", "task": "b"}, {"input": "x"}], known, 2)


def test_inputs_without_a_task_and_with_options() -> None:
    known = ["a", "b"]
    assert as_tasks(["x", "y"], known, 2, optional=True) == [None, None]
    table = pd.DataFrame([{"input": "x", "task": "b", "options": ["p", "q"]}, {"input": "y"}])
    assert as_tasks(table, known, 2, optional=True) == ["b", None]  # pandas fills the gaps with NaN
    assert as_options(table, 2) == [("p", "q"), None]
    assert as_options(["x"], 1) == [None]
    assert as_options([{"input": "x", "options": []}], 1) == [None]
    with pytest.raises(ValueError, match="options must be a list of strings, got 'p'"):
        as_options([{"input": "x", "options": "p"}], 1)
    with pytest.raises(ValueError, match="not know the task 'a'; tasks: none"):
        as_tasks([{"input": "x", "task": "a"}], [], 1, optional=True)
    assert as_rows(["x"]) == ["x"]
    assert as_rows({"input": "x", "options": ["p", "q"]}) == [{"input": "x", "options": ["p", "q"]}]
    columns = {"input": ["x", "y"], "task": ["a", "b"]}  # as MLflow's server hands them over
    assert as_rows(columns) == [{"input": "x", "task": "a"}, {"input": "y", "task": "b"}]


class _Published:
    """A base, one expert per task with a head of its own, and a merge without a head; what each predicts."""

    def __init__(self, store: Store, folder: Path) -> None:
        checkpoint = folder / "encoder"
        tiny_encoder().save_pretrained(checkpoint)
        tiny_encoder_tokenizer().save_pretrained(checkpoint)
        base = prepare_base(f"path:{checkpoint}", folder / "made")
        upload_base(store, base)
        self._store, self._folder, self.base = store, folder, base
        self.heads: dict[str, dict[str, Any]] = {}
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        torch.manual_seed(0)
        for task, labels in LABELS.items():
            state = head_state(load_classifier(base.path, len(labels), torch.float32))
            state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
            self._states[task] = state
            name, sha256 = self._save(task, state)
            self.heads[task] = {
                "adapter": name,
                "sha256": sha256,
                "labels": labels,
                "prompt_template": f"{task[0]} {{input}}",
            }
        self.merged, self.merged_sha256 = self._save("merged", {})

    def _save(self, name: str, head: dict[str, torch.Tensor]) -> tuple[str, str]:
        file = self._folder / f"{name}.safetensors"
        values = torch.randn(1024, generator=torch.Generator().manual_seed(len(name)))
        delta = {QUERY: SparseTensor((32, 32), torch.arange(1024), values)}
        save_adapter(file, delta, AdapterMeta(base_sha256=self.base.sha256), head=head)
        self._store.upload_file(f"objects/{name}", file)
        return f"objects/{name}", file_sha256(file)

    def load(self, adapter: str, sha256: str, heads: dict[str, Any]) -> AdapterModel:
        model = AdapterModel()
        config = {
            "bucket": self._store.bucket, "prefix": self._store.prefix, "adapter": adapter, "adapter_sha256": sha256,
            "adapter_uri": self._store.uri(adapter), "base_sha256": self.base.sha256, "dtype": "float32",
            "prompt_wrapper": "{prompt}?", "prompt_template": "{input}", "max_new_tokens": 4, "max_input_tokens": None,
            "heads": heads, "prompts": {}, "device": "cpu", "batch_size": 24,
        }  # fmt: skip
        model.load_context(SimpleNamespace(model_config=config))
        return model

    def load_checkpoint(self, heads: dict[str, Any]) -> CheckpointModel:
        """The merge as a full checkpoint of several shards."""
        body = tiny_encoder()
        apply_delta(body, AdapterReader(FileSource(self._folder / "merged.safetensors")))
        folder = self._folder / "checkpoint"
        body.save_pretrained(folder, max_shard_size="20KB")
        tiny_encoder_tokenizer().save_pretrained(folder)
        files = {
            path.name: asdict(self._store.upload_file(f"objects/c/{path.name}", path)) for path in folder.iterdir()
        }
        assert len([name for name in files if name.endswith(".safetensors")]) > 1
        model = CheckpointModel()
        config = {
            "bucket": self._store.bucket, "prefix": self._store.prefix, "files": files, "digest": "c" * 64,
            "base_sha256": self.base.sha256, "dtype": "float32", "prompt_wrapper": "{prompt}?",
            "prompt_template": "{input}", "max_new_tokens": 4, "max_input_tokens": None, "heads": heads,
            "prompts": {}, "device": "cpu", "batch_size": 24,
        }  # fmt: skip
        model.load_context(SimpleNamespace(model_config=config))
        return model

    def expected(self, adapter: str, task: str) -> list[str]:
        model = load_classifier(self.base.path, len(LABELS[task]), torch.float32)
        apply_delta(model, AdapterReader(FileSource(self._folder / f"{adapter}.safetensors")))
        set_head(model, self._states[task])
        rows = [Row("", text, ()) for text in TEXTS]
        spec = PromptSpec(f"{task[0]} {{input}}", "{prompt}?")
        found = predict_labels(model, load_classifier_tokenizer(self.base.path), spec, rows, LABELS[task])
        return [LABELS[task][label] for label in found]


def test_a_registered_classifier_predicts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    made = _Published(store, tmp_path)
    head = made.heads["sentiment"]
    expert = made.load(head["adapter"], head["sha256"], {"sentiment": head})
    assert expert.predict(None, TEXTS) == made.expected("sentiment", "sentiment")
    assert expert.predict(None, []) == []
    merge = made.load(made.merged, made.merged_sha256, made.heads)
    tasks = ["topic", "sentiment", "topic", "sentiment", "sentiment"]
    answers = {task: made.expected("merged", task) for task in LABELS}
    assert len({*answers["topic"], *answers["sentiment"]}) > 2  # not one answer for all
    expected = [answers[task][at] for at, task in enumerate(tasks)]
    assert merge.predict(None, pd.DataFrame({"input": TEXTS, "task": tasks})) == expected
    assert merge.predict(None, pd.DataFrame({"input": TEXTS, "task": tasks})) == expected
    whole = made.load_checkpoint(made.heads)
    assert whole.predict(None, pd.DataFrame({"input": TEXTS, "task": tasks})) == expected
    with pytest.raises(ValueError, match="tasks: sentiment, topic"):
        merge.predict(None, TEXTS)
    damaged = {**made.heads, "topic": {**made.heads["topic"], "sha256": "0" * 64}}
    with pytest.raises(Exception, match="objects/topic is corrupted"):
        made.load(made.merged, made.merged_sha256, damaged)
