"""Running prompts in batches, and greedy answers to them.

Prompts of similar length share a left-padded pass; then all rows of a batch decode together. What every prompt begins
with (few-shot examples, the template) runs once and its keys and values are expanded over the batch; logits are
computed only where they are read. Where a model's rows cannot share passes (`workers.scoring.reach`), or are longer
than its windows, each runs alone. Sampling and beam search are not covered.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from infra.errors import ConfigError
from workers.scoring.reach import accepts, reach, rotary_reach

_STATES = ("past_key_values", "cache_params", "state")
"""What models call what they keep of a text that they have read."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a text that stands before every prompt, for a batch of one."""

    cache: Any
    length: int

    def expanded(self, rows: int, device: torch.device) -> Any:
        """A cache of `rows` copies; this one is left as it is."""
        chosen = copy.copy(self.cache)
        chosen.layers = [copy.copy(layer) for layer in self.cache.layers]
        _select_rows(chosen, torch.zeros(rows, dtype=torch.int64, device=device))
        return chosen


@dataclass(frozen=True)
class _Prompted:
    """A batch of prompts after their pass."""

    logits: Tensor
    """[rows, vocabulary], of the first answer token."""
    cache: Any
    mask: Tensor
    """int64 [rows, slots of the cache]"""
    positions: Tensor
    """int64 [rows], of the next token."""


def _select_rows(cache: Any, rows: Tensor) -> None:
    """Keep these rows of a cache, each layer of which may be on another device."""
    for layer in cache.layers:
        if layer.keys is not None:
            layer.batch_select_indices(rows.to(layer.keys.device))


def device_of(model: Any) -> torch.device:
    """Where the model's inputs go."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def padding_id(tokenizer: Any) -> int:
    """Any id serves: padded positions are masked."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def share_beginning(prompts: Sequence[Sequence[int]], prefix: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Move what all prompts begin with (the template's text) to the prefix, which runs once; a token of each stays."""
    shortest = min((len(ids) for ids in prompts), default=1)
    differs = next((at for at, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1), shortest)
    common = min(differs, shortest - 1) if len(prompts) > 1 else 0
    return [list(ids[common:]) for ids in prompts], [*prefix, *(prompts[0][:common] if common else ())]


def run_prefix(model: Any, ids: Sequence[int]) -> Prefix | None:
    """Keys and values of `ids`; None if there are none."""
    if not ids:
        return None
    tokens = torch.tensor([list(ids)], device=device_of(model))
    out = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    return Prefix(out.past_key_values, len(ids))


def by_length(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Row numbers, shortest first."""
    return sorted(range(len(prompts)), key=lambda i: len(prompts[i]))


def batches(prompts: Sequence[Sequence[int]], order: Sequence[int], size: int) -> list[list[int]]:
    """`order`, shortest first, in batches of at most `size`, lengths within a quarter: padding costs like text."""
    made: list[list[int]] = []
    for row in order:
        if not made or len(made[-1]) == size or len(prompts[row]) > 1.25 * len(prompts[made[-1][0]]) + 2:
            made.append([])
        made[-1].append(row)
    return made


def _run_prompts(model: Any, prompts: Sequence[Sequence[int]], pad_id: int, prefix: Prefix | None) -> _Prompted:
    """One pass over a batch of prompts, padded on the left."""
    device = device_of(model)
    width = max(len(ids) for ids in prompts)
    tokens = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    before = prefix.length if prefix else 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0) + before
    if prefix:
        mask = torch.cat([mask.new_ones(len(prompts), before), mask], dim=1)
    out = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=prefix.expanded(len(prompts), device) if prefix else None,
        use_cache=True,
        logits_to_keep=1,
    )
    return _Prompted(out.logits[:, -1], out.past_key_values, mask, positions[:, -1] + 1)


def _join(parts: Sequence[_Prompted]) -> list[_Prompted]:
    """All rows as one batch: a decoding step reads every weight, so one large batch is cheaper than many small ones.

    Shorter caches are padded on the left. Caches with other layers than plain ones (sliding windows, recurrent
    states) stay apart.
    """
    from transformers.cache_utils import DynamicLayer

    plain = all(type(layer) is DynamicLayer for part in parts for layer in part.cache.layers)
    if len(parts) == 1 or not plain:
        return list(parts)
    width = max(part.mask.shape[1] for part in parts)

    def stack(tensors: Sequence[Tensor]) -> Tensor:  # each [rows, heads, slots, head size]
        return torch.cat([pad(tensor, (0, 0, width - tensor.shape[2], 0)) for tensor in tensors])

    cache = copy.copy(parts[0].cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer, same in zip(cache.layers, zip(*(part.cache.layers for part in parts), strict=True), strict=True):
        layer.keys = stack([one.keys for one in same])
        layer.values = stack([one.values for one in same])
    return [
        _Prompted(
            logits=torch.cat([part.logits for part in parts]),
            cache=cache,
            mask=torch.cat([pad(part.mask, (width - part.mask.shape[1], 0)) for part in parts]),
            positions=torch.cat([part.positions for part in parts]),
        )
    ]


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos and those of the generation configuration."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    extra = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [tokenizer.eos_token_id, *extra] if i is not None})


def _greedy(model: Any, start: _Prompted, steps: int, eos: list[int]) -> list[list[int]]:
    """Greedy continuation of each row without its end token; finished rows leave the batch."""
    logits, cache, mask, positions = start.logits, start.cache, start.mask, start.positions
    stop = torch.tensor(eos, device=logits.device)
    alive = list(range(len(mask)))
    made: list[list[int]] = [[] for _ in alive]
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
            _select_rows(cache, keep)
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


def _greedy_alone(model: Any, ids: Sequence[int], steps: int, eos: list[int]) -> list[int]:
    """Greedy continuation of one row, by whatever cache the model makes of its own accord; by none if it makes none, or
    if what it keeps of a text changes when the text grows."""
    device, known = device_of(model), accepts(model)
    ask = {"use_cache": len(ids) + steps <= rotary_reach(model)} if "use_cache" in known else {}
    keep = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    made: list[int] = []
    fresh = list(ids)
    state: dict[str, Any] = {}
    while True:
        out = model(input_ids=torch.tensor([fresh], device=device), **state, **ask, **keep)
        token = int(out.logits[0, -1].argmax())
        if token in eos:
            return made
        made.append(token)
        if len(made) == steps:
            return made
        state = {name: out[name] for name in _STATES if name in known and out.get(name) is not None}
        if not state:
            ask = dict.fromkeys(ask, False)
        fresh = [token] if state else [*ids, *made]


@torch.inference_mode()
def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 24,
    prefix_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Greedy continuation ids of each prompt's ids, in the order given, without the token that ended them.

    `batch_size` bounds the rows that decode together, and so the memory of their cache.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens} found, at least 1 accepted")
    made: list[list[int]] = [[] for _ in prompts]
    prompts, before = share_beginning(prompts, prefix_ids)
    eos, pad_id = _eos_ids(model, tokenizer), padding_id(tokenizer)
    room = reach(model) - len(before) - max_new_tokens
    order = [i for i in by_length(prompts) if len(prompts[i]) <= room]
    for i in {*range(len(prompts))} - {*order}:
        made[i] = _greedy_alone(model, [*before, *prompts[i]], max_new_tokens, eos)
    shared = run_prefix(model, before) if order else None
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        parts = [
            _run_prompts(model, [prompts[i] for i in batch], pad_id, shared)
            for batch in batches(prompts, rows, batch_size)
        ]
        answers = [ids for part in _join(parts) for ids in _greedy(model, part, max_new_tokens, eos)]
        for i, ids in zip(rows, answers, strict=True):
            made[i] = ids
    return made
