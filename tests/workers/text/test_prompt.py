"""Prompts, truncation, batches and padding."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from workers.text.prompt import (
    PromptSpec,
    collate,
    encode_example,
    encode_examples,
    encode_prompt,
    few_shot_ids,
    length_bucketed_batches,
    render,
    target_token_cap,
    tokenize,
)
from workers.text.rows import Row

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

SPEC = PromptSpec("q:\n{input}", tiny.WRAPPER, 8)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def test_braces_in_data_are_left_alone() -> None:
    spec = PromptSpec("{input} of {options}", "<s>{prompt}</s>")
    assert render(spec, "{options} {prompt} {", ["{input}", "b"]) == "<s>{options} {prompt} { of {input}; b</s>"


def test_missing_placeholders_are_refused() -> None:
    for broken in ({"template": "x"}, {"wrapper": "x"}, {"max_input_tokens": 0}):
        with pytest.raises(ConfigError):
            PromptSpec(**broken)
    with pytest.raises(ConfigError, match="options"):
        render(PromptSpec("{input}{options}"), "x")


def test_training_and_generation_see_the_same_prompt(tokenizer) -> None:
    row = Row("1", "w1w2w3", ("w5w6", "w4"))
    example = encode_example(tokenizer, SPEC, row)
    assert list(example.input_ids[: example.target_start]) == encode_prompt(tokenizer, SPEC, row)
    assert tokenizer.convert_ids_to_tokens(example.input_ids[example.target_start :]) == ["w5", "w6", "</s>"]
    assert len(encode_example(tokenizer, SPEC, row, max_target_tokens=1).input_ids) == example.target_start + 1


words = st.lists(st.sampled_from(["w1", "w2", "w30", "nothing", "</s>", "é", "日本", " ", "\n"]), max_size=12).map(
    " ".join
)


@given(st.lists(st.tuples(words, words), max_size=6), st.integers(1, 20), st.integers(1, 5))
def test_rows_that_are_encoded_together_are_encoded_as_one_by_one(texts, longest, target) -> None:
    tokenizer, spec = tiny.tiny_tokenizer(), replace(SPEC, max_input_tokens=longest)
    rows = [Row(str(at), text, (answer,)) for at, (text, answer) in enumerate(texts)]
    alone = [encode_example(tokenizer, spec, row, max_target_tokens=target) for row in rows]
    assert encode_examples(tokenizer, spec, rows, target) == alone


def test_long_inputs_lose_their_beginning_only(tokenizer) -> None:
    text = "".join(f"w{at}" for at in range(30))
    ids = encode_prompt(tokenizer, SPEC, Row("1", text, ("w1",)))
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "q", ":", "\n", *(f"w{at}" for at in range(22, 30)), "</s>"]


def test_few_shot_prefix_holds_finished_turns(tokenizer) -> None:
    assert few_shot_ids(tokenizer, SPEC, [Row("1", "w1", ("w2",))]) == tokenize(tokenizer, "<s>q:\nw1</s>w2</s>\n")
    assert few_shot_ids(tokenizer, SPEC, []) == []


def test_target_cap_counts_eos(tokenizer) -> None:
    rows = [Row(str(at), "w1", ("w1" * (at + 1),)) for at in range(20)]
    assert target_token_cap(tokenizer, rows) == 20


def test_batches_cover_every_row_once_with_little_padding() -> None:
    lengths = [(at * 37) % 100 + 1 for at in range(130)]
    batches = length_bucketed_batches(lengths, 16, seed=3, epoch=0)
    assert sorted(at for batch in batches for at in batch) == list(range(130))
    assert batches == length_bucketed_batches(lengths, 16, seed=3, epoch=0)
    assert batches != length_bucketed_batches(lengths, 16, seed=3, epoch=1)
    padded = sum(len(batch) * max(lengths[at] for at in batch) for batch in batches)
    assert padded < 1.25 * sum(lengths)


def test_collate_pads_right_and_reads_one_position_before_each_target(tokenizer) -> None:
    rows = [Row("1", "w1", ("w4",)), Row("2", "w1w2w3", ("w5w6",))]
    examples = [encode_example(tokenizer, SPEC, row) for row in rows]
    batch = collate(examples, 0)
    assert batch["input_ids"].shape == (2, 11)
    assert batch["input_ids"][0, 8:].tolist() == [0, 0, 0]
    assert batch["targets"].tolist() == [i for e in examples for i in e.input_ids[e.target_start :]]
    assert batch["input_ids"].view(-1)[batch["reads"] + 1].tolist() == batch["targets"].tolist()
    assert (batch["reads"] // 11).tolist() == [0, 0, 1, 1, 1]
