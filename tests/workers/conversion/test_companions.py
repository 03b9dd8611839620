"""What lies beside an expert's weights, compared with the base's: what is refused, what is told, what is fine."""

import json
import re
from typing import Any

import pytest

from infra.errors import BaseModelError
from workers.conversion.companions import Read, compare_companions

VOCABULARY = {"<s>": 0, "a": 1, "b": 2, "ab": 3}
TEMPLATE = "{{ messages }}"


def reader(**files: Any) -> Read:
    """Files by name, `__` for a dot; what is no text is JSON."""
    texts = {name.replace("__", "."): v if isinstance(v, str) else json.dumps(v) for name, v in files.items()}
    return lambda name: texts[name].encode() if name in texts else None


def tokenizer(vocabulary: Any = VOCABULARY, merges: Any = ("a b",), **more: Any) -> dict[str, Any]:
    return {"model": {"vocab": vocabulary, "merges": list(merges)}, "added_tokens": [], **more}


def base(without: str = "", **changes: Any) -> Read:
    files = {
        "tokenizer__json": tokenizer(),
        "chat_template__jinja": TEMPLATE,
        "tokenizer_config__json": {"eos_token": "ab"},
        "config__json": {"eos_token_id": 2, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "dtype": "bfloat16"},
        "generation_config__json": {"eos_token_id": 2, "transformers_version": "4"},
    }
    return reader(**{name: content for name, content in (files | changes).items() if name != without})


def words(*tokens: str) -> dict[str, int]:
    return {token: at for at, token in enumerate(tokens)}


@pytest.mark.parametrize(
    "theirs",
    [
        pytest.param(base(), id="the base's"),
        pytest.param(reader(), id="none"),
        pytest.param(base(tokenizer__json=tokenizer(merges=[["a", "b"]])), id="merges as pairs"),
        pytest.param(base(tokenizer__json=tokenizer(truncation=None, normalizer=None)), id="fields of other releases"),
        pytest.param(base(generation_config__json={"eos_token_id": [2]}), id="a list of one"),
        pytest.param(base(config__json={"rope_theta": 10000, "rms_norm_eps": 9.99999974e-06}), id="rounded"),
        pytest.param(base(config__json={"rope_parameters": {"rope_theta": 10000.0}}), id="newer configuration"),
        pytest.param(base(config__json={"dtype": "float32", "vocab_size": 9, "_name_or_path": "x"}), id="bookkeeping"),
        pytest.param(
            base("chat_template__jinja", tokenizer_config__json={"chat_template": TEMPLATE}), id="template elsewhere"
        ),
        pytest.param(base(tokenizer_config__json={"eos_token": {"content": "ab"}}), id="a token described"),
        pytest.param(reader(vocab__json=VOCABULARY, merges__txt="a b"), id="older files"),
        pytest.param(reader(vocab__txt="<s>\na\nb\nab\n"), id="one token a line"),
        pytest.param(
            reader(tokenizer__json=tokenizer([["<s>", 0], ["a", -1], ["b", -2], ["ab", -3]], ["a b"])), id="unigrams"
        ),
    ],
)
def test_nothing_is_told_of_the_same(theirs: Read) -> None:
    assert compare_companions("e", theirs, base()) == ()


TOLD = {
    "new tokens": (base(tokenizer__json=tokenizer({**VOCABULARY, "<tool>": 4})), r"1 tokens .*'<tool>' is 4"),
    "a reserved token renamed": (base(tokenizer__json=tokenizer(words("<x>", "a", "b", "ab"))), r"'<x>' is 0"),
    "added tokens": (
        base(tokenizer__json=tokenizer(added_tokens=[{"content": "<pad>", "id": 4}])), r"'<pad>' is 4",
    ),
    "other merges": (base(tokenizer__json=tokenizer(merges=())), r"splits text in another way \(merges\)"),
    "other normalisation": (base(tokenizer__json=tokenizer(normalizer={"type": "NFC"})), "normalizer"),
    "another kind of file": (reader(tokenizer__model="spm"), "tokenizer.model.*not compared"),
    "a damaged tokenizer": (reader(tokenizer__json="{"), "tokenizer.json.*not compared"),
    "a chat template": (base(chat_template__jinja="{{ other }}"), "another chat template, which is ignored"),
    "named templates": (
        base("chat_template__jinja", tokenizer_config__json={"chat_template": [{"name": "x"}]}), "chat template",
    ),
    "another end": (base(generation_config__json={"eos_token_id": 40}), r"eos_token_id 40, the base's 2"),
    "another end of its tokenizer": (
        base(tokenizer_config__json={"eos_token": {"content": "b"}}), 'eos_token "b", the base\'s "ab"',
    ),
    "several ends": (base(generation_config__json={"eos_token_id": [2, 40]}), r"eos_token_id \[2, 40\]"),
    "sampling": (base(generation_config__json={"temperature": 0.6}), "temperature 0.6, the base's not set"),
    "another rotation": (base(config__json={"rope_theta": 5e5}), "rope_theta 500000.0, the base's 10000.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_what_stays_behind_is_told(case: str) -> None:
    theirs, message = TOLD[case]
    (line,) = compare_companions("expert 'e'", theirs, base())
    assert line.startswith("expert 'e': ")
    assert line.endswith("; the base's are kept")
    assert re.search(message, line), line


REFUSED = {
    "two tokens swapped": base(tokenizer__json=tokenizer(words("<s>", "b", "a", "ab"))),
    "all moved by one": base(tokenizer__json=tokenizer(words("<unk>", *VOCABULARY))),
    "an added token over another": base(tokenizer__json=tokenizer(added_tokens=[{"content": "a", "id": 9}])),
    "older files": reader(vocab__json=words("a", "<s>", "b", "ab")),
    "unigrams": reader(tokenizer__json=tokenizer([["a", 0.0], ["<s>", 0.0]])),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_ids_of_tokens_are_refused(case: str) -> None:
    with pytest.raises(BaseModelError, match=r"^expert 'e': its tokenizer gives \d of the base's tokens other ids, '"):
        compare_companions("expert 'e'", REFUSED[case], base())
