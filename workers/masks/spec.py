"""Masks: which positions of the adapted modules a sparse expert may change.

A mask is a criterion (random, or the best scores of ``workers.masks.criteria``), a granularity (element, aligned block,
whole row or column, N of every M consecutive weights of a row), a density and how the budget is spread: the same share
of every tensor, or one ranking across the model. Budgets are exact and ties go to the lower index. Does not cover
training on the support (``workers.training.in_place``), nor when a mask is selected again (``workers.training.loop``).
Sources: arXiv 2507.07140 (connection sensitivity, blocks), 2502.15975 (random), 2504.02620 (least sensitive weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from infra.errors import ConfigError
from workers.adapters.support import Block, SupportSpec, unit_grid
from workers.base.modules import Target, find_targets, match_modules
from workers.base.seeds import tensor_seed
from workers.masks.criteria import score_scan
from workers.masks.global_budget import global_units
from workers.masks.selection import (
    Keep,
    budget,
    draw_units,
    groups_of,
    random_counts,
    random_groups,
    random_indices,
    random_units,
    top_groups,
    top_indices,
    top_units,
)

__all__ = [
    "MaskSpec",
    "SupportSpec",
    "accumulator_bytes",
    "match_modules",
    "random_indices",
    "random_units",
    "select_supports",
    "top_indices",
    "top_units",
    "trainable_elements",
    "unit_of",
]

Criterion = Literal["random", "magnitude", "gradient", "connection_sensitivity", "fisher"]
Granularity = Literal["element", "block", "row", "column", "n_m"]
Budget = Literal["tensor", "global"]


@dataclass(frozen=True)
class MaskSpec:
    """How a support is chosen. Raises ``ConfigError`` for values and combinations outside what is accepted.

    ``density``: kept share, in (0, 1]. ``block_size``: rows x columns of a block, for granularity ``block``.
    ``modules``: a preset of ``workers.base.modules`` or a regular expression that must match a whole module name.
    ``reselect_every``: optimizer steps between selections (None: once), ``reselect_rounds``: re-selections before the
    mask is frozen (None: no limit). ``keep``: the units with the largest or the smallest scores. ``budget``: the share
    of every tensor, or of all adapted weights together. ``score_batches``: batches that a score is taken over.
    ``group``: M of N:M, consecutive weights of a row of which N = max(1, round(density * group)) are kept.
    """

    criterion: Criterion
    granularity: Granularity
    density: float
    block_size: Block = (16, 16)
    modules: str = r".*(q_proj|k_proj|v_proj|o_proj)"
    reselect_every: int | None = None
    seed: int = 0
    keep: Keep = "largest"
    budget: Budget = "tensor"
    score_batches: int = 1
    group: int = 16
    reselect_rounds: int | None = None

    def __post_init__(self) -> None:
        for field, accepted in (
            ("criterion", get_args(Criterion)),
            ("granularity", get_args(Granularity)),
            ("keep", get_args(Keep)),
            ("budget", get_args(Budget)),
        ):
            if getattr(self, field) not in accepted:
                raise ConfigError(f"mask {field} {getattr(self, field)!r}: accepted are {', '.join(accepted)}")
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"mask density {self.density}: accepted is more than 0 and at most 1")
        if len(self.block_size) != 2 or min(self.block_size) < 1:
            raise ConfigError(f"mask block_size {self.block_size}: accepted are two positive sides, as [16, 16]")
        if self.group < 2:
            raise ConfigError(f"mask group {self.group}: accepted is 2 or more consecutive weights")
        if self.score_batches < 1:
            raise ConfigError(f"mask score_batches {self.score_batches}: accepted is 1 or more")
        for field in ("reselect_every", "reselect_rounds"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ConfigError(f"mask {field} {getattr(self, field)}: accepted is 1 or more, or null")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.keep == "smallest" and self.criterion not in ("magnitude", "connection_sensitivity", "fisher"):
            raise ConfigError(
                f"mask keep: smallest is not accepted with criterion {self.criterion}, only with magnitude, "
                "connection_sensitivity and fisher"
            )
        if self.score_batches > 1 and not self.needs_data:
            raise ConfigError(
                f"mask score_batches {self.score_batches}: criterion {self.criterion} takes no data, leave it at 1"
            )
        if self.reselect_every is not None and not self.needs_data:
            raise ConfigError(
                f"mask reselect_every {self.reselect_every}: criterion {self.criterion} takes no data, so a later "
                "selection has nothing new to go by; leave it null, or choose a criterion that scores gradients"
            )
        if self.reselect_rounds is not None and self.reselect_every is None:
            raise ConfigError(f"mask reselect_rounds {self.reselect_rounds} needs reselect_every")
        if self.budget == "global" and self.granularity == "n_m":
            raise ConfigError(
                "mask budget: global is not accepted with granularity n_m, whose budget is fixed in every group; "
                "choose budget: tensor or granularity: element"
            )

    @property
    def needs_data(self) -> bool:
        """Whether the scores are gradients, so that a selection needs losses."""
        return self.criterion in ("gradient", "connection_sensitivity", "fisher")


def unit_of(spec: MaskSpec, shape: tuple[int, ...]) -> Block | None:
    """The selection unit of a weight [out, in] as a block, None for elements (granularities element and n_m)."""
    if spec.granularity == "block":
        return spec.block_size
    if spec.granularity == "row":
        return 1, shape[1]
    return (shape[0], 1) if spec.granularity == "column" else None


@dataclass(frozen=True)
class _Region:
    """The part of one weight in which units may be chosen: ``target.shape`` from row ``target.first`` on."""

    name: str
    target: Target
    block: Block | None

    @property
    def elements(self) -> int:
        return self.target.shape[0] * self.target.shape[1]

    @property
    def area(self) -> int:
        """Elements of a unit."""
        return 1 if self.block is None else self.block[0] * self.block[1]

    @property
    def units(self) -> int:
        return self.elements // self.area

    def support(self, ids: torch.Tensor) -> SupportSpec:
        """The support of sorted unit ids of the region, int64 [k] on the CPU."""
        out, width = self.target.module.weight.shape
        return SupportSpec((out, width), ids + self.target.first * width // self.area, self.block)


def _regions(model: nn.Module, spec: MaskSpec) -> dict[str, _Region]:
    """The regions of the adapted modules, in model order; ``ConfigError`` where units do not fit. Works on meta."""
    regions = {}
    for name, target in find_targets(model, spec.modules).items():
        shape, weight = tuple(target.module.weight.shape), f"{name}.weight"
        block = unit_of(spec, shape)
        unit_grid(shape, block, weight)
        if spec.granularity == "n_m":
            groups_of(shape, spec.group, weight)
        if target.rows is not None and spec.granularity == "column":
            raise ConfigError(
                f"{weight}: only its rows {target.rows.start} to {target.rows.stop} may be chosen, whole columns reach "
                "beyond them; choose another granularity, or modules by a regular expression"
            )
        if target.rows is not None and block is not None and (target.first % block[0] or target.shape[0] % block[0]):
            raise ConfigError(
                f"{weight}: blocks of {block[0]}x{block[1]} do not align with the rows {target.rows.start} to "
                f"{target.rows.stop} that may be chosen; choose a block_size whose rows divide both"
            )
        regions[name] = _Region(weight, target, block)
    return regions


def trainable_elements(model: nn.Module, spec: MaskSpec) -> tuple[int, int]:
    """Elements that a mask selects, and elements among which it selects; works on meta tensors.

    The first is exact, but an upper bound for a global budget over rows or columns of several lengths, whose number
    depends on the scores. Raises the ``ConfigError`` of :func:`select_supports` for modules and units that do not fit.
    """
    regions = _regions(model, spec).values()
    adapted = sum(region.elements for region in regions)
    if spec.granularity == "n_m":
        return adapted // spec.group * budget(spec.group, spec.density), adapted
    if spec.budget == "tensor":
        return sum(budget(region.units, spec.density) * region.area for region in regions), adapted
    elements, areas = budget(adapted, spec.density), {region.area for region in regions}
    if len(areas) > 1:
        return max(elements, *areas), adapted
    area = areas.pop()
    return max(1, elements // area) * area, adapted


def accumulator_bytes(model: nn.Module, spec: MaskSpec) -> int:
    """Bytes that a selection holds to add up scores over several batches (0 for one batch); works on meta tensors.

    They come on top of the memory of a training step, until the selection ends: fp32 for each element among which the
    mask selects.
    """
    if spec.score_batches == 1:
        return 0
    return 4 * sum(region.elements for region in _regions(model, spec).values())


def select_supports(
    model: nn.Module, spec: MaskSpec, losses: Sequence[Callable[[], torch.Tensor]] = ()
) -> dict[str, SupportSpec]:
    """The support of every adapted module, by module name in model order, at the current weights.

    ``losses``: one callable for each of ``spec.score_batches`` batches, which runs the model and returns the batch's
    mean loss; used by the criteria that need data, with dropout and the like as the model's mode says. A global budget
    over one batch calls it twice (three or four times if gradients are not reproducible), and may leave modules with
    an empty support. ``ConfigError`` for modules or units that do not fit, a wrong number of losses, or a module that
    cannot be scored; ``FactoryError`` for scores that are not finite.
    """
    regions = _regions(model, spec)
    if spec.criterion == "random":
        drawn = zip(regions.items(), _drawn(regions, spec), strict=True)
        return {name: region.support(ids) for (name, region), ids in drawn}
    if spec.needs_data and len(losses) != spec.score_batches:
        raise ConfigError(
            f"criterion {spec.criterion} needs a loss for each of its {spec.score_batches} batches, got {len(losses)}"
        )
    targets = {name: region.target for name, region in regions.items()}
    scan = score_scan(model, targets, spec.criterion, losses)
    if spec.budget == "global":
        elements = budget(sum(region.elements for region in regions.values()), spec.density)
        blocks = {name: region.block for name, region in regions.items()}
        chosen = global_units(scan, blocks, elements, spec.keep)
    else:
        chosen = {}

        def take(name: str, score: torch.Tensor) -> None:
            chosen[name] = _best(regions[name], score, spec).cpu()

        scan(take)
    return {name: region.support(chosen[name]) for name, region in regions.items()}


def _best(region: _Region, score: torch.Tensor, spec: MaskSpec) -> torch.Tensor:
    """The budgeted units of one region, by its fp32 score [rows, in]."""
    if spec.granularity == "n_m":
        return top_groups(score, budget(spec.group, spec.density), spec.group, region.name, spec.keep)
    return top_units(score, spec.density, region.block, region.name, spec.keep)


def _drawn(regions: dict[str, _Region], spec: MaskSpec) -> list[torch.Tensor]:
    """Random units of each region, in their order."""
    each = list(regions.values())
    if spec.granularity == "n_m":
        kept = budget(spec.group, spec.density)
        return [random_groups(r.target.shape, kept, spec.group, tensor_seed(spec.seed, r.name)) for r in each]
    if spec.budget == "tensor":
        counts = [budget(region.units, spec.density) for region in each]
    else:
        elements = budget(sum(region.elements for region in each), spec.density)
        seed = tensor_seed(spec.seed, "counts")
        counts = random_counts([r.units for r in each], [r.area for r in each], elements, seed)
    return [draw_units(r.units, k, tensor_seed(spec.seed, r.name)) for r, k in zip(each, counts, strict=True)]
