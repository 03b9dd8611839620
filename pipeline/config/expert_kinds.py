"""The kinds of experts that a configuration can ask for, each in one object: what it trains, at which rate and
cost.

How a kind is attached to a model and trained is `workers.training.kinds`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config.model import PipelineConfig
from workers.base.modules import find_targets
from workers.masks.spec import MaskSpec, accumulator_bytes, trainable_elements, unit_of
from workers.training.kinds import ExpertSpec, FullSpec, LoraSpec, check_whole


def derived_seed(seed: int, *parts: str) -> int:
    """A 63-bit seed that is a pure function of its arguments."""
    digest = hashlib.sha256("\n".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Size:
    """Of one expert, from its base's shapes alone: trained values, weights in the adapted modules, bytes of training
    state for each trained value, and bytes beside those."""

    trainable: int
    adapted: int
    per_value: int
    beside: int = 0


@dataclass(frozen=True)
class ExpertKind:
    """One kind of expert."""

    learning_rate: float
    """Default peak, the best on validation splits (docs/performance.md says of what)."""
    section: str
    """Of the configuration, where its own fields are; modules are named in `mask` for all kinds."""
    spec: Callable[[PipelineConfig, str], ExpertSpec]
    """What is trained; `own` (the fingerprint of the expert's training rows) seeds what is drawn."""
    size: Callable[[Any, PipelineConfig], Size]
    """Of a model without weights. Raises ConfigError where the modules do not suit."""
    describe: Callable[[PipelineConfig], str]
    """What an expert changes, in words."""
    in_place: bool
    """Trained in the weights themselves: only plain linear modules."""
    everywhere: bool
    """Changes every position of the adapted weights."""


# -- sparse: a share of the adapted weights ---------------------------------------------------------------------


def mask_spec(config: PipelineConfig, seeded_by: str) -> MaskSpec:
    """The mask of a sparse expert."""
    return config.mask.spec(derived_seed(config.seed, "mask", seeded_by))


def shares_scored_support(config: PipelineConfig) -> bool:
    """Whether a support has to be made before the experts: a common seed is enough for criteria that need no data."""
    return config.mask.shared and config.mask.spec(0).needs_data


def _sparse(config: PipelineConfig, own: str) -> MaskSpec:
    return mask_spec(config, "shared" if config.mask.shared else own)


def _sparse_size(model: Any, config: PipelineConfig) -> Size:
    spec = config.mask.spec(0)
    trainable, adapted = trainable_elements(model, spec)
    selecting = 4 * adapted if shares_scored_support(config) else accumulator_bytes(model, spec)
    return Size(trainable, adapted, 24 if unit_of(spec, (1, 1)) is None else 20, selecting)


def _sparse_words(config: PipelineConfig) -> str:
    mask = config.mask
    shared = "one support for all experts, " if mask.shared else ""
    return (
        f"{shared}{mask.criterion} ({mask.keep}), {mask.granularity}, density {mask.density:g} ({mask.budget} budget)"
    )


# -- lora: low-rank factors beside the weights ------------------------------------------------------------------


def _lora(config: PipelineConfig, own: str) -> LoraSpec:
    lora = config.lora
    return LoraSpec(config.mask.modules, lora.rank, lora.alpha, lora.dropout, derived_seed(config.seed, "lora", own))


def _lora_size(model: Any, config: PipelineConfig) -> Size:
    targets = find_targets(model, config.mask.modules)
    for name, target in targets.items():
        check_whole(name, target, config.mask.modules)
    trainable = sum(config.lora.rank * sum(target.module.weight.shape) for target in targets.values())
    return Size(trainable, sum(t.shape[0] * t.shape[1] for t in targets.values()), 16)


# -- full: every adapted weight ---------------------------------------------------------------------------------


def _full_size(model: Any, config: PipelineConfig) -> Size:
    adapted = sum(t.shape[0] * t.shape[1] for t in find_targets(model, config.mask.modules).values())
    return Size(adapted, adapted, 20)


EXPERT_KINDS: dict[str, ExpertKind] = {
    "sparse": ExpertKind(
        2e-3, "mask", _sparse, _sparse_size, _sparse_words, in_place=True, everywhere=False,
    ),
    "lora": ExpertKind(
        2e-3, "lora", _lora, _lora_size,
        lambda config: f"factors of rank {config.lora.rank}, alpha {config.lora.alpha:g}",
        in_place=False, everywhere=True,
    ),
    "full": ExpertKind(
        1e-4, "mask", lambda config, own: FullSpec(config.mask.modules), _full_size, lambda config: "every weight",
        in_place=True, everywhere=True,
    ),
}  # fmt: skip
"""All kinds by the name that a configuration has for them. Training state per trained value: value, gradient, two
moments (16 bytes); in place the original too (20); for single elements the index (24)."""
