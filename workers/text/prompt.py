"""Rows, prompts and batches: from a task's text to token ids.

Covers rendering (template inside a chat wrapper), tokenisation, truncation, length-bucketed batches and padding for
training. Training and generation share `encode_prompt`, so both see the same prompt ids: prompt and target are
tokenised apart and their ids joined. What looks like a control token in data is text (`workers.text.literal`). Reading
data and splitting it is `pipeline.data.tasks`; scoring is `workers.scoring.likelihood`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.errors import ConfigError
from workers.text.literal import Piece, holds_control, literal_ids, literal_ids_all, rendered_ids, rendered_ids_all
from workers.text.rows import Row

DEFAULT_TARGET_TOKENS = 64
ANSWER = "{answer}"
"""In a wrapper: where the answer goes, if it is to end otherwise than with eos; the text behind it is its end."""
#: Chat format of SmolLM2 without the default system prompt (which would add some 20 tokens to every example).
DEFAULT_WRAPPER = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

_FIELD = re.compile(r"\{(input|options)\}")
_OPTION_SEPARATOR = "; "


@dataclass(frozen=True)
class PromptSpec:
    """How a row becomes a prompt. `wrapper` holds `{prompt}`, and perhaps `{answer}` with what ends an answer behind
    it; `template` holds `{input}` and perhaps `{options}`.

    Raises ConfigError when a placeholder is missing. `max_input_tokens` bounds the row's input alone: longer inputs
    lose their beginning (the question usually stands at the end).
    """

    template: str = "{input}"
    wrapper: str = DEFAULT_WRAPPER
    max_input_tokens: int = 96

    def __post_init__(self) -> None:
        if "{prompt}" not in self.wrapper:
            raise ConfigError(
                f"prompt wrapper {self.wrapper!r}: it must contain {{prompt}}, where the task's text goes"
            )
        if "{input}" not in self.template:
            raise ConfigError(f"template {self.template!r}: it must contain {{input}}, where the row's input goes")
        if self.max_input_tokens < 1:
            raise ConfigError(f"max_input_tokens: {self.max_input_tokens} found, at least 1 accepted")


@dataclass(frozen=True)
class Example:
    """Token ids of prompt + target; `input_ids[target_start:]` are the target's, ending with eos unless truncated."""

    input_ids: tuple[int, ...]
    target_start: int


def answer_end(tokenizer: Any, spec: PromptSpec) -> list[int]:
    """Ids of what an answer ends with: eos, or what the wrapper says."""
    end = spec.wrapper.partition(ANSWER)[2]
    return tokenize(tokenizer, end) if end else [int(tokenizer.eos_token_id)]


def render(spec: PromptSpec, text: str, options: Sequence[str] | None = None) -> str:
    """The prompt as one string."""
    return "".join(piece.text for piece in pieces(spec, text, options))


def pieces(spec: PromptSpec, text: str, options: Sequence[str] | None = None) -> list[Piece]:
    """The prompt in pieces. Data is inserted in a single pass, so braces inside it are left alone."""
    if options is None and "{options}" in spec.template:
        raise ConfigError(f"template {spec.template!r} uses {{options}}, but the row {text[:60]!r} has none")
    values = {"input": text, "options": _OPTION_SEPARATOR.join(options or ())}
    frame = spec.wrapper.partition(ANSWER)[0].replace("{prompt}", spec.template, 1)
    parts = _FIELD.split(frame)  # text, field, text, …
    return [Piece(values[part], data=True) if at % 2 else Piece(part) for at, part in enumerate(parts)]


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that is no data, without automatic special tokens (those that are spelt out are recognised)."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def truncate_left(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The longest end of `text`, cut at a token border, that has at most `max_tokens` tokens in this context."""
    return truncate_all(tokenizer, [text], max_tokens)[0]


def truncate_all(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[str]:
    """Every text as `truncate_left` gives it."""
    if not texts:
        return []
    offsets = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        _end(text, _literal_offsets(tokenizer, text) if holds_control(tokenizer, text) else found, max_tokens)
        for text, found in zip(texts, offsets, strict=True)
    ]


def _literal_offsets(tokenizer: Any, text: str) -> Sequence[tuple[int, int]]:
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    found: Sequence[tuple[int, int]] = tokenizer(text, **options)["offset_mapping"]
    return found


def _end(text: str, offsets: Sequence[tuple[int, int]], max_tokens: int) -> str:
    if len(offsets) <= max_tokens:
        return text
    if len(text) <= max_tokens:  # a token is at least one character, except for byte fallbacks
        return text[-max(1, max_tokens // 4) :]
    return text[offsets[-max_tokens][0] :].lstrip()


def encode_prompt(tokenizer: Any, spec: PromptSpec, row: Row) -> list[int]:
    """Ids of the row's prompt, its input left-truncated to `spec.max_input_tokens`."""
    text = truncate_left(tokenizer, row.input, spec.max_input_tokens)
    return rendered_ids(tokenizer, pieces(spec, text, row.options))


def encode_target(
    tokenizer: Any, target: str, max_tokens: int | None = None, end: Sequence[int] | None = None
) -> list[int]:
    """Ids of a target followed by `end` (eos); cut after `max_tokens` (then without an end: the model is not taught to
    stop there)."""
    ids = [*literal_ids(tokenizer, target), *([int(tokenizer.eos_token_id)] if end is None else end)]
    return ids if max_tokens is None else ids[:max_tokens]


def encode_example(tokenizer: Any, spec: PromptSpec, row: Row, max_target_tokens: int | None = None) -> Example:
    """Prompt and the row's first target, tokenised apart and joined."""
    prompt = encode_prompt(tokenizer, spec, row)
    target = encode_target(tokenizer, row.targets[0], max_target_tokens, answer_end(tokenizer, spec))
    return Example(tuple(prompt + target), len(prompt))


def encode_examples(
    tokenizer: Any, spec: PromptSpec, rows: Sequence[Row], max_target_tokens: int | None = None
) -> list[Example]:
    """Every row as `encode_example` gives it, tokenised together."""
    texts = truncate_all(tokenizer, [row.input for row in rows], spec.max_input_tokens)
    prompts = rendered_ids_all(
        tokenizer, [pieces(spec, text, row.options) for text, row in zip(texts, rows, strict=True)]
    )  # fmt: skip
    targets = literal_ids_all(tokenizer, [row.targets[0] for row in rows])
    end = answer_end(tokenizer, spec)
    return [
        Example(tuple(prompt + [*target, *end][:max_target_tokens]), len(prompt))
        for prompt, target in zip(prompts, targets, strict=True)
    ]


def few_shot_ids(tokenizer: Any, spec: PromptSpec, shots: Sequence[Row]) -> list[int]:
    """Solved examples as finished turns, to stand before every prompt of a task; nothing without shots."""
    turns: list[Piece] = []
    for row in shots:
        text = truncate_left(tokenizer, row.input, spec.max_input_tokens)
        end = spec.wrapper.partition(ANSWER)[2] or tokenizer.eos_token or ""
        turns += pieces(spec, text, row.options)
        turns += [Piece(row.targets[0], data=True), Piece(end + "\n")]
    return rendered_ids(tokenizer, turns)


def target_token_cap(tokenizer: Any, rows: Sequence[Row]) -> int:
    """Tokens (eos included) that hold the first target of 95 % of the rows: the default `max_new_tokens`."""
    lengths = sorted(len(ids) + 1 for ids in literal_ids_all(tokenizer, [row.targets[0] for row in rows]))
    return lengths[max(0, math.ceil(0.95 * len(lengths)) - 1)] if lengths else 1


def length_bucketed_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of one epoch in batches of similar length: every index once, in an order fixed by seed and epoch.

    Rows are shuffled, sorted by length inside pools of eight batches, cut into batches, and the batches shuffled.
    The last batch may be smaller.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} found, at least 1 accepted")
    order = list(range(len(lengths)))
    shuffler = random.Random(f"batches:{seed}:{epoch}")
    shuffler.shuffle(order)
    pool = batch_size * 8
    ordered = [i for at in range(0, len(order), pool) for i in sorted(order[at : at + pool], key=lambda i: lengths[i])]
    batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    shuffler.shuffle(batches)
    return batches


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded int64 `input_ids` [batch, longest], and what is predicted where.

    `reads` int64 [targets]: flat positions (row * longest + column) whose logits predict `targets` int64 [targets],
    each one column before its token.
    """
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    reads: list[Tensor] = []
    targets: list[int] = []
    for at, example in enumerate(examples):
        ids, start = example.input_ids, max(1, example.target_start)
        input_ids[at, : len(ids)] = torch.tensor(ids)
        reads.append(torch.arange(at * width + start - 1, at * width + len(ids) - 1))
        targets.extend(ids[start:])
    return {
        "input_ids": input_ids,
        "reads": torch.cat(reads),
        "targets": torch.tensor(targets, dtype=torch.int64),
    }
