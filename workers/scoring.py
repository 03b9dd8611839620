"""Greedy generation, option log-likelihoods and the score of a set of rows under one model.

Prompts of similar length share a left-padded batch; a few-shot prefix is run once and its keys and values are
expanded over the batch; logits are computed only where they are read. Works on any causal model of transformers
with a dynamic cache. The caller swaps adapters in and out; nothing here changes the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.errors import ConfigError, DataError
from workers.metrics import METRICS, choice_correct, rouge_l, text_metric
from workers.prompt import DEFAULT_WRAPPER, PromptSpec, encode_prompt, few_shot_prefix, tokenize
from workers.rows import Row

#: Part of every evaluation's key: raise it when decoding or log-likelihoods change.
SCORING_VERSION = 1


@dataclass(frozen=True)
class EvaluateSpec:
    """What a score is a function of, besides the model and the rows; belongs in the evaluation's key."""

    metric: str
    template: str = "{input}"
    wrapper: str = DEFAULT_WRAPPER
    max_new_tokens: int = 32
    max_input_tokens: int = 96
    length_normalised: bool = False
    few_shot: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> PromptSpec:
        return PromptSpec(self.template, self.wrapper, self.max_input_tokens)


@dataclass(frozen=True)
class EvaluationResult:
    """Per row, in the order of the rows: score under the metric, what the model answered, format-free score."""

    scores: tuple[float, ...]
    outputs: tuple[str, ...]
    format_free: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def mean(self) -> float:
        return sum(self.scores) / max(1, self.n)

    @property
    def format_free_mean(self) -> float:
        return sum(self.format_free) / max(1, self.n)


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of a text that stands before every prompt, for a batch of one."""

    cache: Any
    length: int


def _device(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _select(cache: Any, index: Tensor) -> Any:
    """A cache of the rows in `index` (repeats allowed); `cache` itself is left as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(index)
    return chosen


def _run_prefix(model: Any, ids: Sequence[int]) -> _Prefix | None:
    if not ids:
        return None
    tokens = torch.tensor([list(ids)], device=_device(model))
    out = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    return _Prefix(out.past_key_values, len(ids))


def _pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids in sequences)
    tokens = [[pad_id] * (width - len(ids)) + list(ids) for ids in sequences]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _run_prompts(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int, prefix: _Prefix | None
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Logits [rows, vocabulary] after each prompt, the cache, the mask over its slots and the next positions [rows]."""
    device = _device(model)
    tokens, mask = _pad_left(prompts, pad_id, device)
    before = prefix.length if prefix else 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0) + before
    past = None
    if prefix:
        mask = torch.cat([mask.new_ones(len(prompts), before), mask], dim=1)
        past = _select(prefix.cache, torch.zeros(len(prompts), dtype=torch.int64, device=device))
    out = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1], out.past_key_values, mask, positions[:, -1] + 1


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos and those of the generation configuration."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    extra = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [tokenizer.eos_token_id, *extra] if i is not None})


def _greedy_batch(
    model: Any, prompts: Sequence[Sequence[int]], steps: int, pad_id: int, eos: list[int], prefix: _Prefix | None
) -> list[list[int]]:
    """Greedy continuation of each prompt without its end token; finished rows leave the batch."""
    logits, cache, mask, positions = _run_prompts(model, prompts, pad_id, prefix)
    stop = torch.tensor(eos, device=logits.device)
    alive = list(range(len(prompts)))
    made: list[list[int]] = [[] for _ in prompts]
    for step in range(steps):
        tokens = logits.argmax(-1)
        going = ~torch.isin(tokens, stop)
        for row, token, goes in zip(alive, tokens.tolist(), going.tolist(), strict=True):
            if goes:
                made[row].append(token)
        if step + 1 == steps or not going.any():
            break
        if not going.all():
            keep = going.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            alive = [alive[i] for i in keep.tolist()]
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, cache, positions = out.logits[:, -1], out.past_key_values, positions + 1
    return made


def _batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Row numbers in batches of at most `size`, lengths within a quarter of each other: padding costs like text."""
    batches: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if not batches or len(batches[-1]) == size or len(prompts[row]) > 1.25 * len(prompts[batches[-1][0]]) + 2:
            batches.append([])
        batches[-1].append(row)
    return batches


def _share_beginning(prompts: Sequence[Sequence[int]], prefix: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Move what all prompts begin with (the template's text) to the prefix, which runs once; a token of each stays."""
    shortest = min((len(ids) for ids in prompts), default=1)
    differs = next((at for at, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1), shortest)
    common = min(differs, shortest - 1) if len(prompts) > 1 else 0
    return [list(ids[common:]) for ids in prompts], [*prefix, *(prompts[0][:common] if common else ())]


@torch.inference_mode()
def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 24,
    prefix_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Greedy continuation ids of each prompt's ids, in the order given, without the token that ended them."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens} found, at least 1 accepted")
    made: list[list[int]] = [[] for _ in prompts]
    prompts, before = _share_beginning(prompts, prefix_ids)
    shared = _run_prefix(model, before)
    eos = _eos_ids(model, tokenizer)
    for rows in _batches(prompts, batch_size):
        batch = [prompts[i] for i in rows]
        for i, ids in zip(
            rows, _greedy_batch(model, batch, max_new_tokens, _pad_id(tokenizer), eos, shared), strict=True
        ):
            made[i] = ids
    return made


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 24,
    prefix: str | None = None,
) -> list[str]:
    """Greedy answers to rendered prompts, special tokens removed. `prefix` stands before every prompt and runs once."""
    ids = [tokenize(tokenizer, prompt) for prompt in prompts]
    made = generate_ids(
        model, tokenizer, ids, max_new_tokens, batch_size, tokenize(tokenizer, prefix) if prefix else ()
    )
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in made]


@torch.inference_mode()
def option_logprobs_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[str]],
    length_normalised: bool = False,
    batch_size: int = 24,
    prefix_ids: Sequence[int] = (),
) -> list[list[float]]:
    """For each prompt's ids, the log-probability of each option: the sum over its tokens, eos not included.

    With `length_normalised`, the sum divided by the number of tokens. Prompt and options share one pass.
    """
    scores: list[list[float]] = [[] for _ in prompts]
    prompts, before = _share_beginning(prompts, prefix_ids)
    shared = _run_prefix(model, before)
    encoded = [[tokenize(tokenizer, option) for option in row] for row in options]
    for row in encoded:
        if not row or not all(row):
            raise DataError("options: every row needs at least one option, and every option at least one token")
    joined = [
        [*prompt, *(token for ids in row for token in ids[:-1])] for prompt, row in zip(prompts, encoded, strict=True)
    ]
    for rows in _batches(joined, batch_size):
        batch = [(prompts[i], encoded[i]) for i in rows]
        for i, sums in zip(rows, _option_batch(model, batch, _pad_id(tokenizer), shared), strict=True):
            lengths = [len(ids) if length_normalised else 1 for ids in encoded[i]]
            scores[i] = [value / length for value, length in zip(sums, lengths, strict=True)]
    return scores


def _option_batch(
    model: Any, batch: Sequence[tuple[Sequence[int], list[list[int]]]], pad_id: int, prefix: _Prefix | None
) -> list[list[float]]:
    """Summed log-probabilities of the options of each (prompt, options) pair, in one forward pass without any
    repetition.

    A row is the prompt, padded on the left, then its options without their last tokens, one after the other, padded
    on the right. A mask lets an option's tokens see the prompt and their own option only, at the positions they
    would have alone.
    """
    device = _device(model)
    before = prefix.length if prefix else 0
    head = max(len(prompt) for prompt, _ in batch)
    tail = max(sum(len(ids) - 1 for ids in options) for _, options in batch)
    width = head + tail
    tokens = torch.full((len(batch), width), pad_id, dtype=torch.int64)
    positions = torch.zeros((len(batch), width), dtype=torch.int64)
    visible = torch.zeros((len(batch), width, before + width), dtype=torch.bool)
    visible[:, :, before:] |= torch.eye(
        width, dtype=torch.bool
    )  # padding sees itself, so that no row of the mask is empty
    reads: list[tuple[int, int, int, int]] = []  # batch row, option, position counted from the last prompt token, token
    for row, (prompt, options) in enumerate(batch):
        start = head - len(prompt)
        tokens[row, start:head] = torch.tensor(list(prompt))
        positions[row, start:head] = torch.arange(len(prompt))
        visible[row, start:, :before] = True
        visible[row, start:head, before + start : before + head] = torch.ones(len(prompt), len(prompt)).tril().bool()
        at = head
        for option, ids in enumerate(options):
            reads.append((row, option, 0, ids[0]))
            reads += [(row, option, at - head + 1 + step, token) for step, token in enumerate(ids[1:])]
            more = len(ids) - 1
            tokens[row, at : at + more] = torch.tensor(ids[:-1], dtype=torch.int64)
            positions[row, at : at + more] = len(prompt) + torch.arange(more)
            visible[row, at : at + more, before + start : before + head] = True
            visible[row, at : at + more, before + at : before + at + more] = torch.ones(more, more).tril().bool()
            at += more
    dtype = model.get_input_embeddings().weight.dtype
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    past = _select(prefix.cache, torch.zeros(len(batch), dtype=torch.int64, device=device)) if prefix else None
    logits = model(
        input_ids=tokens.to(device),
        attention_mask=mask[:, None].to(device),
        position_ids=(positions + before).to(device),
        past_key_values=past,
        use_cache=past is not None,
        logits_to_keep=tail + 1,
    ).logits
    row_at, _, read_at, token_at = (torch.tensor(column, device=device) for column in zip(*reads, strict=True))
    needed = logits[row_at, read_at].float()
    picked = needed.gather(1, token_at[:, None]).squeeze(1) - needed.logsumexp(-1)
    sums = [[0.0] * len(options) for _, options in batch]
    for (row, option, _, _), value in zip(reads, picked.tolist(), strict=True):
        sums[row][option] += value
    return sums


def option_logprobs(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    length_normalised: bool = False,
    prefix: str | None = None,
    batch_size: int = 24,
) -> list[list[float]]:
    """`option_logprobs_ids` for rendered prompts, with an optional prefix text before all of them."""
    ids = [tokenize(tokenizer, prompt) for prompt in prompts]
    before = tokenize(tokenizer, prefix) if prefix else ()
    return option_logprobs_ids(model, tokenizer, ids, options, length_normalised, batch_size, before)


def evaluate_rows(
    model: Any, tokenizer: Any, rows: Sequence[Row], spec: EvaluateSpec, batch_size: int = 24
) -> EvaluationResult:
    """Score `rows` under `spec`.

    Choice accuracy is decided by log-likelihood, without generation; other metrics score a greedy answer. The
    format-free score is the choice accuracy of rows with options and Rouge-L of the rest. DataError if a row of a
    choice task has no options.
    """
    if spec.metric not in METRICS:
        raise ConfigError(f"metric {spec.metric!r} is unknown; accepted: {', '.join(METRICS)}")
    shots = [Row(str(at), text, (target,)) for at, (text, target) in enumerate(spec.few_shot)]
    bare = PromptSpec(spec.template.replace("{options}", ""), spec.wrapper, spec.max_input_tokens)
    before = tokenize(tokenizer, few_shot_prefix(tokenizer, bare, shots))
    prompts = [encode_prompt(tokenizer, spec.prompt, row) for row in rows]
    outputs = [""] * len(rows)
    scores = [0.0] * len(rows)
    free: list[float | None] = [None] * len(rows)
    closed = [i for i, row in enumerate(rows) if row.options]
    if closed:
        options = [rows[i].options or () for i in closed]
        chosen = [prompts[i] for i in closed]
        likely = option_logprobs_ids(model, tokenizer, chosen, options, spec.length_normalised, batch_size, before)
        for i, names, values in zip(closed, options, likely, strict=True):
            free[i] = scores[i] = choice_correct(values, names, rows[i].targets)
            outputs[i] = names[values.index(max(values))]
    if spec.metric == "choice_accuracy":
        if len(closed) != len(rows):
            raise DataError("choice_accuracy: every row needs `options`; use exact_match or rouge_l for free answers")
    else:
        score = text_metric(spec.metric)
        answers = generate_ids(model, tokenizer, prompts, spec.max_new_tokens, batch_size, before)
        for i, (row, ids) in enumerate(zip(rows, answers, strict=True)):
            outputs[i] = tokenizer.decode(ids, skip_special_tokens=True)
            scores[i] = score(outputs[i], row.targets)
            if free[i] is None:
                free[i] = scores[i] if spec.metric == "rouge_l" else rouge_l(outputs[i], row.targets)
    return EvaluationResult(tuple(scores), tuple(outputs), tuple(value or 0.0 for value in free))


def _pad_id(tokenizer: Any) -> int:
    """Any id serves: padded positions are masked."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
