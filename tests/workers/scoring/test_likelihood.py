"""Generation and option scores against the straightforward way of computing them."""

import importlib.util
from pathlib import Path

import pytest
import torch

from infra.errors import ConfigError, DataError
from workers.scoring.decoding import batches, by_length, generate_ids
from workers.scoring.likelihood import EvaluateSpec, answer_rows, evaluate_rows, option_logprobs_ids
from workers.text.prompt import encode_target, tokenize
from workers.text.rows import Row

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

PROMPTS = ["<s>w1w2w3</s>", "<s>w4</s>", "<s>abcabcabc?</s>", "<s>w9w8w7w6w5w4</s>", "<s>w3</s>"]
OPTIONS = [["w1", "w2w3w4"], ["a", "b", "cd"], ["w1w2", "w3w4"], ["w5"], ["w1w1w1w1", "x"]]
PREFIX = "<s>w1w7</s>w2</s>\n"


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_greedy_equals_transformers_one_row_at_a_time(model, tokenizer, prefix: str, batch_size: int) -> None:
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenize(tokenizer, prefix) + tokenize(tokenizer, prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        made = out[0, ids.shape[1] :].tolist()
        expected.append(made[: made.index(2)] if 2 in made else made)
    ids = [tokenize(tokenizer, prompt) for prompt in PROMPTS]
    assert generate_ids(model, tokenizer, ids, 12, batch_size, tokenize(tokenizer, prefix)) == expected


def test_the_prompts_above_run_in_several_passes(tokenizer) -> None:
    """So that the comparison with transformers covers caches that are joined for decoding."""
    ids = [tokenize(tokenizer, prompt) for prompt in PROMPTS]
    assert len(batches(ids, by_length(ids), 8)) > 1


def test_rows_that_end_early_leave_the_batch(model, tokenizer) -> None:
    ids = [tokenize(tokenizer, prompt) for prompt in PROMPTS]
    free = generate_ids(model, tokenizer, ids, 12)
    model.generation_config.eos_token_id = [2, free[0][2]]
    try:
        stopped = generate_ids(model, tokenizer, ids, 12)
    finally:
        model.generation_config.eos_token_id = 2
    for long, short in zip(free, stopped, strict=True):
        end = next((at for at, token in enumerate(long) if token == free[0][2]), len(long))
        assert short == long[:end]


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_options_equal_full_sequences(model, tokenizer, prefix: str, normalised: bool, batch_size: int) -> None:
    prompts, first = [tokenize(tokenizer, prompt) for prompt in PROMPTS], tokenize(tokenizer, prefix)
    scores = option_logprobs_ids(model, tokenizer, prompts, OPTIONS, normalised, batch_size, first)
    for prompt, options, row in zip(PROMPTS, OPTIONS, scores, strict=True):
        before = tokenize(tokenizer, prefix) + tokenize(tokenizer, prompt)
        for option, score in zip(options, row, strict=True):
            ids = encode_target(tokenizer, option)
            with torch.no_grad():
                logits = model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(before) - 1 + at, token]) for at, token in enumerate(ids))
            assert score == pytest.approx(expected / (len(ids) if normalised else 1), abs=2e-4)


@pytest.mark.parametrize("shorter_first", [True, False])
def test_an_option_does_not_win_by_being_the_beginning_of_another(tokenizer, shorter_first: bool) -> None:
    """A model that goes on with w1, w2, end whatever it is asked: without their ends, "w1" cannot lose to "w1w2"."""
    step = {tokenize(tokenizer, "w1")[0]: tokenize(tokenizer, "w2")[0], tokenize(tokenizer, "w2")[0]: 2}
    model = tiny.tiny_model(tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[:, 0] = 0.5
        rows = torch.eye(32)[1:]  # what the last token was, and what comes after it
        model.model.embed_tokens.weight[:] = rows[0]
        model.lm_head.weight[tokenize(tokenizer, "w1")[0]] = 2 * rows[0]
        for at, (token, after) in enumerate(step.items(), 1):
            model.model.embed_tokens.weight[token] = rows[at]
            model.lm_head.weight[after] = 2 * rows[at]
    options = ("w1", "w1w2", "w2w1") if shorter_first else ("w1w2", "w2w1", "w1")
    rows_ = [Row(str(at), f"w{at + 5}w3", ("w1w2",), options) for at in range(3)]
    for normalised in (False, True):
        spec = EvaluateSpec("choice_accuracy", wrapper=tiny.WRAPPER, length_normalised=normalised)
        assert evaluate_rows(model, tokenizer, rows_, spec).outputs == ("w1w2",) * 3
    text = evaluate_rows(model, tokenizer, rows_, EvaluateSpec("exact_match", wrapper=tiny.WRAPPER, max_new_tokens=4))
    assert text.format_free == (1.0,) * 3
    assert {output.replace(" ", "") for output in text.outputs} == {"w1w2"}  # as it answers freely


def test_evaluate_text_choice_and_format_free(model, tokenizer) -> None:
    rows = [Row(str(at), f"w{at}w3", ("w1w2",), ("w1w2", "w5")) for at in range(5)]
    choice = evaluate_rows(model, tokenizer, rows, EvaluateSpec("choice_accuracy", wrapper=tiny.WRAPPER))
    assert len(choice.scores) == 5
    assert choice.format_free == choice.scores
    assert all((output == "w1w2") == bool(score) for output, score in zip(choice.outputs, choice.scores, strict=True))
    text = evaluate_rows(model, tokenizer, rows, EvaluateSpec("exact_match", wrapper=tiny.WRAPPER, max_new_tokens=4))
    assert text.format_free == choice.scores
    open_rows = [Row(row.id, row.input, row.targets) for row in rows]
    shots = (Row("shot", "w8", ("w9",)),)
    spec = EvaluateSpec("rouge_l", wrapper=tiny.WRAPPER, max_new_tokens=4, few_shot=shots)
    shown = evaluate_rows(model, tokenizer, open_rows, spec)
    assert shown.format_free == shown.scores
    prompts, before = [tokenize(tokenizer, f"<s>{row.input}</s>") for row in rows], "<s>w8</s>w9</s>\n"
    answers = generate_ids(model, tokenizer, prompts, 4, prefix_ids=tokenize(tokenizer, before))
    assert list(shown.outputs) == [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


@pytest.mark.parametrize("batch_size", [2, 24])
def test_answers_are_the_evaluations_outputs(model, tokenizer, batch_size: int) -> None:
    rows = [Row(str(at), f"w{at}w3w{at}", ("w1w2",), ("w1w2", "w5", f"w{at}")) for at in range(9)]
    template = "w7 {input} of {options}"
    for spec in (
        EvaluateSpec("choice_accuracy", template, tiny.WRAPPER, max_input_tokens=2),
        EvaluateSpec("choice_accuracy", template, tiny.WRAPPER, length_normalised=True, few_shot=tuple(rows[:1])),
        EvaluateSpec("rouge_l", template, tiny.WRAPPER, max_new_tokens=4, few_shot=tuple(rows[:1])),
    ):
        found = answer_rows(model, tokenizer, rows, spec, batch_size)
        assert tuple(found) == evaluate_rows(model, tokenizer, rows, spec, batch_size).outputs
        untold = [Row(row.id, row.input, (), row.options) for row in rows]
        assert answer_rows(model, tokenizer, untold, spec, batch_size) == found
    assert len(set(found)) > 1


def test_refusals(model, tokenizer) -> None:
    row = Row("1", "w1", ("w2",))
    with pytest.raises(DataError, match="options"):
        evaluate_rows(model, tokenizer, [row], EvaluateSpec("choice_accuracy", wrapper=tiny.WRAPPER))
    with pytest.raises(ConfigError, match="bleu"):
        evaluate_rows(model, tokenizer, [row], EvaluateSpec("bleu", wrapper=tiny.WRAPPER))
    with pytest.raises(DataError, match="token"):
        option_logprobs_ids(model, tokenizer, [[4]], [["w1", ""]])
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate_ids(model, tokenizer, [[4]], 0)
