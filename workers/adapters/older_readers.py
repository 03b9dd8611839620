"""Settings that transformers 5 wrote, so that readers of the layout before it (transformers 4, vLLM of its time) find
what they look for: they take a default without a word where a field has moved.

What version 5 itself reads stays as it is; fields are added. Other files, and those of other versions, are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"
_FAST = "PreTrainedTokenizerFast"
_RENAMED = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
"""What GPT-NeoX calls them."""
_MOVED = ("rope_theta", "partial_rotary_factor")
"""Fields that stood beside the rotary scaling and are among the rotary parameters now."""


def for_older_readers(name: str, data: bytes) -> bytes:
    """A small file of a checkpoint, by its name, with what older readers miss."""
    if name not in (_CONFIG, _TOKENIZER):
        return data
    try:
        found = json.loads(data)
    except ValueError:
        return data
    if not isinstance(found, dict):
        return data
    more = _tokenizer(found) if name == _TOKENIZER else _config(found)
    return data if more == found else json.dumps(more, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    if not str(config.get("transformers_version")).startswith("5"):
        return dict(config)
    more = dict(config)
    if "dtype" in config:
        more.setdefault("torch_dtype", config["dtype"])
    if "num_local_experts" in config:
        more.setdefault("num_experts", config["num_local_experts"])
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and isinstance(rope.get("sliding_attention"), Mapping):  # Gemma 3: two of them
        if "rope_theta" in rope["sliding_attention"]:
            more.setdefault("rope_local_base_freq", rope["sliding_attention"]["rope_theta"])
        rope = rope.get("full_attention")
    if isinstance(rope, Mapping) and not any(isinstance(value, Mapping) for value in rope.values()):
        for field in _MOVED:
            if field in rope:
                more.setdefault(_RENAMED[field] if config.get("model_type") == "gpt_neox" else field, rope[field])
        scaling = {field: value for field, value in rope.items() if field not in _MOVED}
        if scaling.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
            more["rope_scaling"] = scaling
    return more


def _tokenizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    more = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        more["tokenizer_class"] = _FAST
    if isinstance(settings.get("extra_special_tokens"), list):
        more.setdefault("additional_special_tokens", more.pop("extra_special_tokens"))
    return more
