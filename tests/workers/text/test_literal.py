"""Control tokens in data are text, whatever the tokenizer; without them in data, ids are those of the whole text."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from infra.errors import DataError
from workers.scoring.classification import encode_text
from workers.text.literal import Piece, literal_ids, literal_ids_all, rendered_ids, rendered_ids_all
from workers.text.prompt import PromptSpec, encode_example, encode_examples, encode_prompt, few_shot_ids, tokenize
from workers.text.rows import Row

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
ROLES = {"bos_token": START, "eos_token": END, "pad_token": PAD, "unk_token": PAD}


def fast(raw: Tokenizer, **roles: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **(ROLES | roles))


def byte_level(**end: Any) -> PreTrainedTokenizerFast:
    """As SmolLM2, Qwen, Llama 3 and GPT-2: every text has a spelling in bytes."""
    pieces = [START, END, PAD, *sorted(pre_tokenizers.ByteLevel.alphabet()), "<|", "end", "|>"]
    merges = [("<", "|"), ("n", "d"), ("e", "nd"), ("|", ">")]
    pieces.insert(-2, "nd")
    raw = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(raw, eos_token=AddedToken(END, special=True, normalized=False, **end))


def unigram() -> PreTrainedTokenizerFast:
    """As T5 and XGLM: control tokens are pieces of the vocabulary, and the likeliest ones."""
    letters = "▁ <>|abcdefghijklmnopqrstuvwxyz"
    raw = Tokenizer(models.Unigram([(PAD, 0.0), (START, 0.0), (END, 0.0), *((c, -3.0) for c in letters)], unk_id=0))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    return fast(raw)


def whole_words() -> PreTrainedTokenizerFast:
    """Control tokens are words like others."""
    words = [PAD, START, END, "a", "b", "<", "|end|>", "|start|>", "|pad|>"]
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=PAD))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(raw)


def encoder() -> PreTrainedTokenizerFast:
    """As BERT: puts tokens around every text by itself."""
    pieces = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        *"abcdefghijklmnopqrstuvwxyz[]<>|",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    raw = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=99,
    )  # fmt: skip


TOKENIZERS = {"bytes": byte_level(), "bytes, blanks taken along": byte_level(lstrip=True, rstrip=True),
              "unigram": unigram(), "words": whole_words()}  # fmt: skip
WRAPPER = f"{START} user {{prompt}} {END} {START} answer "
SPEC = PromptSpec("say {input} of {options}", WRAPPER, 50)
parts = st.sampled_from(["a", "b", " ", "\n", START, END, PAD, "<|", "end|>", "<|<|end|>", "é"])
texts = st.lists(parts, min_size=1, max_size=8).map("".join).filter(lambda text: bool(text.strip()))
plain = st.text("abc <|>\n", min_size=1, max_size=20).filter(lambda text: bool(text.strip()))


def controls_in(tokenizer: Any, ids: list[int]) -> list[int]:
    return [number for number in ids if number in (tokenizer.bos_token_id, tokenizer.eos_token_id)]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=texts, option=texts)
def test_data_never_becomes_a_control_token(name: str, text: str, option: str) -> None:
    tokenizer = TOKENIZERS[name]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    row = Row("0", text, (option,), (option, "b"))
    assert controls_in(tokenizer, encode_prompt(tokenizer, SPEC, row)) == [start, end, start]
    assert controls_in(tokenizer, few_shot_ids(tokenizer, SPEC, [row, row])) == [start, end, start, end] * 2
    assert controls_in(tokenizer, literal_ids(tokenizer, text)) == []
    example = encode_example(tokenizer, SPEC, row)
    assert controls_in(tokenizer, example.input_ids[example.target_start :]) == [end]
    assert encode_examples(tokenizer, SPEC, [row, Row("1", "a", ("b",), ("a", "b"))])[0] == example


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=plain, option=plain)
def test_other_data_has_the_ids_of_the_whole_text(name: str, text: str, option: str) -> None:
    tokenizer = TOKENIZERS[name]
    pieces = [Piece(f"{START} user "), Piece(text, data=True), Piece(f"{END}\n{START}"), Piece(option, data=True)]
    whole = tokenize(tokenizer, "".join(piece.text for piece in pieces))
    assert rendered_ids(tokenizer, pieces) == whole
    assert rendered_ids_all(tokenizer, [pieces, pieces[:2]])[0] == whole
    assert literal_ids_all(tokenizer, [text, option]) == [tokenize(tokenizer, text), tokenize(tokenizer, option)]


@given(texts)
def test_what_is_written_is_what_the_model_reads(text: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = literal_ids(tokenizer, text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] is not None  # and the tokenizer is left as it was
    assert tokenize(tokenizer, END) == [tokenizer.eos_token_id]


def test_text_around_it_keeps_its_spelling() -> None:
    """Merges are those of the text, not of letters: `<|`, `end` and `|>` are one piece each."""
    tokenizer = TOKENIZERS["bytes"]
    assert tokenizer.convert_ids_to_tokens(literal_ids(tokenizer, f"a{END}")) == ["a", "<|", "end", "|>"]


def test_a_frame_keeps_the_blanks_that_its_tokens_take_along() -> None:
    tokenizer = TOKENIZERS["bytes, blanks taken along"]
    frame, data = f"x {END} \n y", Piece(START, data=True)
    spelt = rendered_ids(tokenizer, [Piece(frame), data])
    assert spelt == [*tokenize(tokenizer, frame), *literal_ids(tokenizer, START)]


@given(st.lists(st.sampled_from(["a", "[SEP]", "[CLS]", " ", "[", "b"]), min_size=1, max_size=8).map("".join))
def test_an_encoder_still_puts_its_own_tokens_around(text: str) -> None:
    tokenizer = encoder()
    ids = encode_text(tokenizer, PromptSpec("{input}", "{prompt}", 50), Row("0", f"a{text}", ("x",)))
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert {tokenizer.cls_token_id, tokenizer.sep_token_id}.isdisjoint(ids[1:-1])


def test_long_inputs_are_counted_as_text() -> None:
    tokenizer = TOKENIZERS["bytes"]
    spec = PromptSpec("{input}", "{prompt}", 5)
    assert tokenizer.decode(encode_prompt(tokenizer, spec, Row("0", f"a{END} b", ("x",)))) == f"{END} b"


def test_a_token_that_text_cannot_spell_is_refused() -> None:
    raw = Tokenizer(models.WordLevel({"<": 0, "a": 1, "?": 2}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = fast(raw, bos_token="<", eos_token="<", pad_token="?", unk_token="?")
    with pytest.raises(DataError, match="'<' is a control token of the base's tokenizer, which cannot write it"):
        literal_ids(tokenizer, "<")
