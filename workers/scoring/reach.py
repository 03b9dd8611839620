"""How far rows may share a pass of a model and still get what each would get alone.

A shared pass pads on the left, reads a common beginning from a cache, puts the options of a prompt one after the other
and lets a mask and position numbers say what belongs together. That is right for a model only if nothing but mask and
position numbers tells its tokens apart: softmax attention over a plain cache, with positions that come from
`position_ids`. These traits are read off the model itself, or tried on it; whatever lacks one of them runs row by row.

Sources: `transformers.masking_utils` (what is done with a given mask), `transformers.cache_utils` (layers of a cache),
`transformers.modeling_rope_utils` (frequencies that depend on the longest row of a pass).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

UNBOUNDED = 1 << 62
"""Reach of a model without windows."""
_ASKED = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
"""Arguments of a shared pass."""
_STEADY = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary frequencies that are the same whatever the length of the texts in a pass."""


def accepts(model: Any) -> set[str]:
    """Names of the arguments that the model's `forward` takes."""
    return set(inspect.signature(model.forward).parameters)


def reach(model: Any) -> int:
    """Most slots of a shared pass (beginning, padding, prompt, options or answer) in which rows do not disturb each
    other: all with full attention, the window where a layer has one, 0 where rows have to run alone.

    Found out once for a model, in two passes over three tokens, and noted with it.
    """
    known: int | None = getattr(model, "factory_reach", None)
    if known is None:
        known = model.factory_reach = _reach(model)
    return known


def _reach(model: Any) -> int:
    suits = (
        accepts(model) >= _ASKED
        and getattr(model, "_supports_attention_backend", False)  # attention is a function of queries, keys and a mask
        and not getattr(model, "_is_stateful", False)
        and getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")  # others take no mask of ours
        and _counts_from_zero(model)
    )
    return min(_cache_reach(model.config), rotary_reach(model)) if suits else 0


@torch.inference_mode()
def _counts_from_zero(model: Any) -> bool:
    """Whether the model's own position numbers are those of a shared pass: with them given, its bits are the same."""
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([[5, 6, 7]], device=device) % model.get_input_embeddings().weight.shape[0]
    given = torch.arange(3, device=device)[None]
    own, told = (model(input_ids=tokens, use_cache=False, **more).logits for more in ({}, {"position_ids": given}))
    return bool(torch.equal(own, told))


def _cache_reach(config: Any) -> int:
    """The narrowest window of the model's own cache; 0 if a layer keeps anything but keys and values."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    found = UNBOUNDED
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            found = min(found, layer.sliding_window)
        elif type(layer) is not DynamicLayer:
            return 0
    return found


def rotary_reach(model: Any) -> int:
    """Tokens up to which a text's rotary frequencies do not depend on its length: beyond, keys of a shorter text are
    none of a longer one."""
    return min(_rotary_reaches(model), default=UNBOUNDED)


def _rotary_reaches(model: Any) -> Iterator[int]:
    for module in model.modules():
        kinds = getattr(module, "rope_type", "default")
        for layer, kind in kinds.items() if isinstance(kinds, dict) else ((None, kinds),):
            if kind not in _STEADY:
                yield _original_length(module, layer)


def _original_length(module: Any, layer: str | None) -> int:
    """Tokens up to which a module's frequencies are those that the model starts with; 0 if it does not say."""
    parameters = getattr(module.config, "rope_parameters", None) or {}
    stated = (parameters.get(layer) or {}) if layer else parameters
    return int(stated.get("original_max_position_embeddings") or getattr(module, "original_max_seq_len", 0) or 0)
