"""Settings for readers of transformers 4: what they miss is added, and transformers 5 reads the same as before."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.workers.families import FAMILIES, save_family
from workers.adapters.older_readers import for_older_readers

YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16}


def rewritten(folder: Path, name: str) -> dict[str, Any]:
    data = for_older_readers(name, (folder / name).read_bytes())
    (folder / name).write_bytes(data)
    return json.loads(data)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("GPT-2", "GPT-BigCode", "Bloom", "MPT")])
def test_transformers_reads_the_same_configuration(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    found = rewritten(tmp_path, "config.json")
    after = AutoConfig.from_pretrained(tmp_path)
    assert getattr(after, "rope_parameters", None) == getattr(before, "rope_parameters", None)
    assert after.dtype == before.dtype
    assert found["torch_dtype"] == "float32"
    assert {"rope_theta", "rotary_emb_base"} & found.keys() or not getattr(before, "rope_parameters", None)
    assert getattr(after, "num_experts", None) == getattr(before, "num_experts", None)


def test_rotary_settings_stand_where_they_used_to(tmp_path: Path) -> None:
    save_family("Llama", tmp_path, rope_parameters=YARN)
    before = AutoConfig.from_pretrained(tmp_path).rope_parameters
    found = rewritten(tmp_path, "config.json")
    assert found["rope_theta"] == 5e4
    assert found["rope_scaling"] == {name: value for name, value in before.items() if name != "rope_theta"}
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == before


def test_two_kinds_of_layers_have_two_rotary_bases(tmp_path: Path) -> None:
    save_family("Gemma 3", tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).rope_parameters
    found = rewritten(tmp_path, "config.json")
    assert found["rope_theta"] == before["full_attention"]["rope_theta"]
    assert found["rope_local_base_freq"] == before["sliding_attention"]["rope_theta"]
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == before


def test_a_tokenizer_has_a_class_that_both_know(tmp_path: Path) -> None:
    save_family("Llama", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "extra_special_tokens": ["w7"]}))
    before = AutoTokenizer.from_pretrained(tmp_path)
    found = rewritten(tmp_path, "tokenizer_config.json")
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == ["w7"]
    after = AutoTokenizer.from_pretrained(tmp_path)
    text = "w1w7 w2</s>"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert set(after.all_special_tokens) == set(before.all_special_tokens)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (
            "config.json",
            b'{"transformers_version": "4.40.0", "dtype": "float32", "rope_parameters": {"rope_theta": 1}}',
        ),
        ("config.json", b'{"hidden_size":  4}'),
        ("config.json", b"{broken"),
        ("config.json", b"[1]"),
        ("tokenizer_config.json", b'{"tokenizer_class":  "LlamaTokenizer"}'),
        ("tokenizer.json", b'{"tokenizer_class": "TokenizersBackend"}'),
    ],
)
def test_all_else_is_left_as_it_is(name: str, data: bytes) -> None:
    assert for_older_readers(name, data) == data
