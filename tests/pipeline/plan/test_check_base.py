"""Bases that cannot do what a configuration asks are refused before any training, and nothing else is."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infra.errors import FactoryError
from infra.store.s3 import Store
from pipeline.config.model import PipelineConfig
from pipeline.plan.check_base import most_positions
from pipeline.plan.preflight import Prepared, prepare_inputs
from tests.workers.base.test_load import change_json, change_weights
from tests.workers.families import save_family
from tests.workers.tiny import WRAPPER, tiny_encoder, tiny_encoder_tokenizer, tiny_tokenizer
from workers.base.load import empty_classifier
from workers.base.structure import empty_model


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "node-cache"))


def prepare(folder: Path, words: int = 2, metric: str = "exact_match", **sections: Any) -> tuple[Prepared, str]:
    """What `plan` and `run` do about a base before any service is asked, and what they print."""
    file = folder.parent / "rows.jsonl"
    rows = ["".join(f"w{(at * 7 + each) % 50}" for each in range(words)) + f"w{at // 50}" for at in range(100)]
    file.write_text("".join(json.dumps({"input": row, "target": "ab"[at % 2]}) + "\n" for at, row in enumerate(rows)))
    given: dict[str, Any] = {
        "suite": "mine",
        "base": f"path:{folder}",
        "prompt": {"wrapper": WRAPPER, "max_input_tokens": 60, "max_target_tokens": 8},
        "splits": {"train": 16, "validation": 4, "gate": 8, "test": 4},
        "held_in": {"one": {"source": f"jsonl:{file}", "metric": metric}},
        "mask": {"granularity": "element", "modules": "attention"},
        "train": {"steps": 3, "batch_size": 4, "compute_dtype": "float32"},
        "merge": {"candidates": [{"method": "mean"}]},
        "evaluate": {"few_shot": 0},
        "data": {"tolerate": {"cut": 1}},
    }
    out = StringIO()
    chosen = PipelineConfig.model_validate(given | sections)
    return prepare_inputs(chosen, Store("b", "http://127.0.0.1:9"), Console(file=out, soft_wrap=True)), out.getvalue()


def _chat(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("<s>{{ messages[0].content }}?")


def _token(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["ww"])
    tokenizer.save_pretrained(folder)
    change_json(folder / "config.json", max_position_embeddings=200)


def _pad(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    tokenizer.save_pretrained(folder)


LONG = {"words": 70, "prompt": {"wrapper": WRAPPER, "max_input_tokens": 70}}
CHATML = {"wrapper": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"}
REFUSED: dict[str, tuple[str, Callable[[Path], Any] | None, dict[str, Any], str]] = {
    "inputs longer than learned positions": ("OPT", None, LONG, r"one: .* 64 positions; lower"),
    "inputs longer than rotary positions": ("Llama", None, LONG, r"one: .* 64 positions; lower"),
    "inputs longer than ALiBi's table": ("MPT", None, LONG, r"one: .* 64 positions; lower"),
    "examples before the prompt": (
        "Llama", None, {"words": 20, "evaluate": {"few_shot": 8}}, r"with 8 examples before it.*evaluate\.few_shot",
    ),
    "a token without a row": (
        "Llama", _token, {"held_in": {"one": {"source": "jsonl:", "metric": "exact_match", "template": "ww{input}"}}},
        r"token 'ww' of number 88, the base's embedding has 88 rows",
    ),
    "padding without a row": ("Llama", _pad, {}, r"padding token '\[NEW\]' is number 88"),
    "a wrapper of another family": ("Llama", None, {"prompt": CHATML}, r"<\|im_start\|>, which is no token"),
    "a wrapper of another family, template there": ("Llama", _chat, {"prompt": CHATML}, r"prompt\.wrapper=auto"),
    "a head that the file calls otherwise": (
        "GPT-NeoX", None, {"mask": {"granularity": "element", "modules": "lm_head"}},
        r"lm_head, whose weight the base's file does not hold",
    ),
    "weights that are missing": (
        "Llama", lambda f: change_weights(f, lambda t: {n: v for n, v in t.items() if "norm" not in n}), {},
        r"base m: weights do not fit LlamaForCausalLM: missing",
    ),
    "fused layers that are no linear modules": ("GPT-2", None, {}, r"no linear module in this model"),
}  # fmt: skip
"""Family, change of its folder, configuration, message."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_that_cannot_do_it_is_refused_before_training(case: str, tmp_path: Path) -> None:
    family, change, sections, message = REFUSED[case]
    save_family(family, tmp_path / "m")
    if change:
        change(tmp_path / "m")
    if "held_in" in sections:
        tasks = {n: {**task, "source": f"jsonl:{tmp_path / 'rows.jsonl'}"} for n, task in sections["held_in"].items()}
        sections = {**sections, "held_in": tasks}
    with pytest.raises(FactoryError, match=message) as caught:
        prepare(tmp_path / "m", **sections)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["Llama", "GPT-NeoX", "Mixtral", "Qwen3-MoE", "Bloom"])
def test_what_workers_load_is_accepted(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path / "m")
    attention = ".*attention.*" if family in ("GPT-NeoX", "Bloom") else "attention"
    found, text = prepare(tmp_path / "m", mask={"granularity": "element", "modules": attention})
    assert found.cost.trainable > 0
    assert "notice" not in text


def test_keys_hold_the_chat_template_that_auto_stands_for(tmp_path: Path) -> None:
    save_family("Llama", tmp_path / "m")
    _chat(tmp_path / "m")
    found, text = prepare(tmp_path / "m", prompt={"max_input_tokens": 20})
    assert found.config.prompt.wrapper == "<s>{prompt}?"
    assert found.inputs("run").config.prompt.wrapper == "<s>{prompt}?"
    assert "'auto' is '<s>{prompt}?'" in text


def test_positions_of_encoders_count_from_behind_padding(tmp_path: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path / "m")
    tiny_encoder_tokenizer().save_pretrained(tmp_path / "m")
    model = empty_classifier(tmp_path / "m")
    assert most_positions(model) == 64
    model.bert.embeddings.position_embeddings.padding_idx = 1
    assert most_positions(model) == 62


def test_a_base_of_relative_positions_has_no_limit(tmp_path: Path) -> None:
    save_family("Bloom", tmp_path / "m")
    assert most_positions(empty_model(tmp_path / "m")) is None
