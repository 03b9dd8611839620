"""The wrapper that a tokenizer's chat template stands for, and wrappers that a tokenizer cannot read."""

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from infra.errors import ConfigError
from tests.workers import tiny
from workers.text.prompt import PromptSpec, encode_example, encode_examples, encode_prompt, few_shot_ids, tokenize
from workers.text.rows import Row
from workers.text.wrapper import AUTO, check_wrapper, lacks_bos, own_wrapper, settled_wrapper

TURNS = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}<unk>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CHATML = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def made(template: str | None = None, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "stops", "wrapper"),
    [
        (made(), {2}, "{prompt}\n"),
        (made(adds_bos=True), {2}, "<s>{prompt}\n"),
        (made(TURNS), {2}, "<s>u:{prompt}<unk>a:"),
        (made(TURNS), {2, 3}, "<s>u:{prompt}<unk>a:{answer}<unk>"),  # <unk> ends a turn, and generation stops there
        (made(TURNS, adds_bos=True), {2}, "<s>u:{prompt}<unk>a:"),  # one bos
        (made(TURNS.replace("<s>", ""), adds_bos=True), {2}, "<s>u:{prompt}<unk>a:"),
        (made(TURNS.replace("<unk>", "</s>")), {2}, "<s>u:{prompt}</s>a:"),  # ends with eos in any case
        (made("{{ bos_token }}{{ messages[0].content | trim }}?"), {2}, "<s>{prompt}?"),
        (made("{{ strftime_now('%Y') }} {{ messages[0].content }}"), {2}, "2025 {prompt}"),
        (made("{{ date_string }} {{ messages[0].content }}"), {2}, "01 Jan 2025 {prompt}"),
    ],
)
def test_auto_is_what_the_chat_template_writes(
    tokenizer: PreTrainedTokenizerFast, stops: set[int], wrapper: str
) -> None:
    assert own_wrapper(tokenizer, stops) == wrapper
    assert settled_wrapper(tokenizer, AUTO, stops, classifies=False) == wrapper
    assert settled_wrapper(tokenizer, wrapper, stops, classifies=False) == wrapper  # and stands as it is
    ids = encode_prompt(tokenizer, PromptSpec("{input}", wrapper), Row("1", "w1", ("w2",)))
    assert ids.count(1) == wrapper.count("<s>")


def test_a_classification_takes_the_text_alone_and_one_bos() -> None:
    assert own_wrapper(made(TURNS), {2}, classifies=True) == "{prompt}"
    assert settled_wrapper(made(adds_bos=True), "<s>{prompt}", {2}, classifies=True) == "{prompt}"
    assert settled_wrapper(made(), "<s>{prompt}", {2}, classifies=True) == "<s>{prompt}"


REFUSED = {
    "tokens of another family": (made(), CHATML, r"has <\|im_start\|>, which is no token of this base but"),
    "where the base has a template": (made(TURNS), CHATML, r"take its own chat template \(prompt\.wrapper=auto\)"),
    "another family's bos": (made(), "<bos>{prompt}", r"<bos>, which is no token"),
    "an end that generation runs over": (made(), "<s>{prompt}{answer}<unk>", r"'<unk>', which generation does not"),
    "a template that fails": (made("{{ raise_exception('no user') }}"), AUTO, r"chat template fails \(no user\)"),
    "a template without the text": (made("hello"), AUTO, r"does not write a user's text once"),
    "a template that changes it": (made("{{ messages[0].content | upper }}"), AUTO, r"once, as it is"),
}
"""Tokenizer, wrapper, message."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrapper_that_the_tokenizer_cannot_read_is_refused(case: str) -> None:
    tokenizer, wrapper, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        settled_wrapper(tokenizer, wrapper, {2}, classifies=False)


def test_what_the_own_template_writes_is_known_token_or_not() -> None:
    check_wrapper(made("<|user|>{{ messages[0].content }}"), "<|user|>{prompt}")
    check_wrapper(made(), "<task>{prompt}</task> [INST]")  # nobody's control tokens


def test_a_missing_bos_is_noticed() -> None:
    assert lacks_bos(made(adds_bos=True), "Q: {prompt}")
    assert not lacks_bos(made(adds_bos=True), "<s>{prompt}")
    assert not lacks_bos(made(), "Q: {prompt}")


def test_answers_end_as_the_wrapper_says() -> None:
    tokenizer, row = made(), Row("1", "w1", ("w2",))
    spec = PromptSpec("{input}", "<s>{prompt}?{answer}<unk>")
    example = encode_example(tokenizer, spec, row)
    assert list(example.input_ids[example.target_start :]) == [*tokenize(tokenizer, "w2"), 3]
    assert encode_examples(tokenizer, spec, [row]) == [example]
    assert few_shot_ids(tokenizer, spec, [row]) == tokenize(tokenizer, "<s>w1?w2<unk>\n")
