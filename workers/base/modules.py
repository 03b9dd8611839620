"""Modules: which linear modules of a model are adapted, by regular expression or by preset.

A preset names parts of a transformer block (``attention``, ``value_output``, ``mlp``, ``value_output_mlp``) or every
linear module of the base model (``all_linear``), whatever the family calls them: Llama, Qwen, Mistral, Gemma, Phi,
Phi-3, OPT, GPT-J, GPT-NeoX, Falcon, Bloom, MPT, BERT, RoBERTa, DeBERTa, DistilBERT, ModernBERT. Where query, key and
value are one fused weight, ``value_output`` is restricted to the rows of the value.
Does not cover modules that are no ``nn.Linear`` (GPT-2's transposed convolutions, fused experts), nor which positions
of a module are chosen (``workers.masks.spec``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from infra.errors import ConfigError
from workers.base.tying import tied_names

_ATTENTION = r"(?:.*\.)?\w*(?:attn|attention)(?:\.self)?\."
_QUERY_KEY = rf"{_ATTENTION}(?:q_proj|k_proj|q_lin|k_lin|query|key|query_proj|key_proj)"
_VALUE = rf"{_ATTENTION}(?:v_proj|v_lin|value|value_proj)"
_FUSED = rf"{_ATTENTION}(?:qkv_proj|query_key_value|Wqkv|in_proj)"
_OUTPUT = rf"{_ATTENTION}(?:o_proj|out_proj|out_lin|dense|Wo|output\.dense)"
_MLP = (
    r"(?:.*\.)?(?:gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h|lin1|lin2"
    r"|(?<!\w)mlp\.(?:c_fc|c_proj|Wi|Wo)|intermediate\.dense|(?<!attention\.)output\.dense)"
)
PRESETS: Mapping[str, str] = {
    "attention": f"{_QUERY_KEY}|{_VALUE}|{_FUSED}|{_OUTPUT}",
    "value_output": f"{_VALUE}|{_FUSED}|{_OUTPUT}",
    "mlp": _MLP,
    "value_output_mlp": f"{_VALUE}|{_FUSED}|{_OUTPUT}|{_MLP}",
    "all_linear": ".*",
}
"""Preset name to the expression that a whole module name of the base model must match."""

STACKED_QKV = ("phi3", "modernbert", "mpt")
"""Model types whose fused weight stacks all query rows, then all key rows, then all value rows."""


@dataclass(frozen=True)
class Target:
    """One adapted module; ``rows``: the rows of its weight that may be chosen, None for all."""

    module: nn.Linear
    rows: range | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[rows that may be chosen, in]."""
        out, width = self.module.weight.shape
        return (out if self.rows is None else len(self.rows)), width

    @property
    def first(self) -> int:
        """The first row that may be chosen."""
        return 0 if self.rows is None else self.rows.start


def match_modules(model: nn.Module, pattern: str) -> dict[str, nn.Linear]:
    """The modules of :func:`find_targets`, in model order."""
    return {name: target.module for name, target in find_targets(model, pattern).items()}


def find_targets(model: nn.Module, modules: str) -> dict[str, Target]:
    """Linear modules selected by a preset's name, or by an expression that matches their whole name; in model order.

    Presets look at the base model only (no output embedding, no classification head) and skip poolers. Works on meta
    tensors. ``ConfigError`` for an invalid expression, for no match (lists some names), for a weight shared with
    another module, and for the value rows of a fused weight whose layout is interleaved or unknown.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if modules in PRESETS:
        targets = _preset_targets(model, modules, linear)
        what = f"the preset {modules!r} finds no linear module in this model"
    else:
        try:
            regex = re.compile(modules)
        except re.error as error:
            raise ConfigError(f"modules {modules!r} is not a regular expression: {error}") from None
        targets = {name: Target(module) for name, module in linear.items() if regex.fullmatch(name)}
        what = f"modules {modules!r} matches no whole name of a linear module (presets: {', '.join(PRESETS)})"
    if not targets:
        some = sorted(linear, key=lambda name: (name.count("."), name))[:4] + list(linear)[:8]
        raise ConfigError(f"{what}; some of them: {', '.join(dict.fromkeys(some)) or 'none'}")
    for name, others in _shared(model, [f"{name}.weight" for name in targets]).items():
        raise ConfigError(
            f"modules {modules!r} selects {name}, which shares its memory with {', '.join(others)}: "
            "a tied weight cannot be adapted; narrow the expression"
        )
    return targets


def _preset_targets(model: nn.Module, preset: str, linear: Mapping[str, nn.Linear]) -> dict[str, Target]:
    base: nn.Module = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    regex, fused = re.compile(PRESETS[preset]), re.compile(_FUSED)
    only_value = preset.startswith("value_output")
    found = {}
    for name, module in linear.items():
        skipped = id(module) not in inside or module is output or "pooler" in name.split(".")
        if skipped or not regex.fullmatch(name):
            continue
        rows = _value_rows(model, preset, name, module) if only_value and fused.fullmatch(name) else None
        found[name] = Target(module, rows)
    return found


def _value_rows(model: nn.Module, preset: str, name: str, module: nn.Linear) -> range:
    """The value rows of a weight that stacks [query; key; value], from the sizes in the model's configuration."""
    try:
        value = _stacked(getattr(model, "config", None), name, module.out_features)[2]
    except ConfigError as error:
        raise ConfigError(
            f"the preset {preset!r} cannot select the value rows of {name}: {error}; "
            "choose attention, mlp, all_linear or a regular expression"
        ) from None
    return range(module.out_features - value, module.out_features)


def stacked_rows(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int, int]]:
    """The rows of query, key and value in each fused attention weight among these tensors, by tensor name.

    ``config``: of transformers. ``ConfigError`` for a fused weight that interleaves the three by head, whose layout is
    unknown, or whose rows do not fit the configuration.
    """
    fused, end = re.compile(_FUSED), ".weight"
    names = (name for name in shapes if name.endswith(end) and fused.fullmatch(name.removesuffix(end)))
    return {name: _stacked(config, name, shapes[name][0]) for name in names}


def _stacked(config: Any, name: str, out: int) -> tuple[int, int, int]:
    """Rows of query, key and value in a fused weight of ``out`` rows."""
    kind = getattr(config, "model_type", None)
    if kind not in STACKED_QKV:
        raise ConfigError(
            f"the fused weight of model type {kind!r} interleaves query, key and value by head, or its layout is "
            f"unknown (stacked: {', '.join(STACKED_QKV)})"
        )
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if (heads + 2 * groups) * size != out:
        raise ConfigError(
            f"{name} has {out} rows, but its configuration says {heads} query heads and 2 x {groups} key and value "
            f"heads of {size} rows"
        )
    return heads * size, groups * size, groups * size


def _shared(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """Parameters that are one object or share memory with another name; the former is all that meta tensors tell."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    same = {n: [o for o in group if o != n] for group in holders.values() if len(group) > 1 for n in group}
    return tied_names(model, names) | {name: same[name] for name in names if name in same}
