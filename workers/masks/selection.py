"""Selection of units within one weight: seeded draws, the best scores, N of every group; and draws across weights.

All budgets are exact and ties go to the lower index. Random masks are a pure function of shape, budget, seed and the
tensor's name, drawn on the CPU: the same on every device, different for layers of one shape.
Does not cover where scores come from (``workers.masks.criteria``), nor the best units across weights
(``workers.masks.global_budget``). Source of random masks: SpaRTA, arXiv 2502.15975.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from infra.errors import ConfigError, FactoryError
from workers.adapters.support import Block, SupportSpec, unit_grid
from workers.base.seeds import tensor_seed

Keep = Literal["largest", "smallest"]
CHUNK = 2**22
"""Elements sorted at a time, which bounds the memory of the sort's int64 order."""


def budget(units: int, density: float) -> int:
    """Selected units of one tensor, or elements of one group: max(1, round(density * units))."""
    return min(units, max(1, round(density * units)))


def draw_units(total: int, count: int, seed: int) -> torch.Tensor:
    """A uniform draw of ``count`` of ``total`` units: int64 [count] on the CPU, sorted."""
    generator = torch.Generator().manual_seed(seed)
    drawn = min(count, total - count)
    ids = torch.empty(0, dtype=torch.int64)
    while ids.numel() < drawn:
        more = (drawn - ids.numel()) * 11 // 10 + 16
        ids = torch.unique(torch.cat([ids, torch.randint(total, (more,), generator=generator)]))
    ids = ids[torch.randperm(ids.numel(), generator=generator)[:drawn]]
    if drawn == count:
        return ids.sort().values
    kept = torch.ones(total, dtype=torch.bool)
    kept[ids] = False
    return kept.nonzero().view(-1)


def random_units(
    shape: tuple[int, ...], density: float, seed: int, tensor_name: str, block: Block | None = None
) -> torch.Tensor:
    """A uniform draw of exactly the budgeted units: int64 [k] on the CPU, sorted, the same on every device."""
    rows, cols = unit_grid(shape, block, tensor_name)
    return draw_units(rows * cols, budget(rows * cols, density), tensor_seed(seed, tensor_name))


def random_groups(shape: tuple[int, int], kept: int, group: int, seed: int) -> torch.Tensor:
    """``kept`` uniformly drawn elements of every ``group`` consecutive ones of a row: sorted positions, int64 [k]."""
    groups = groups_of(shape, group, "mask")
    generator = torch.Generator().manual_seed(seed)
    step = max(1, CHUNK // group)
    drawn = [
        _best_of_groups(torch.rand(min(step, groups - at), group, generator=generator), kept) + at * group
        for at in range(0, groups, step)
    ]
    return torch.cat(drawn)


def random_counts(sizes: Sequence[int], areas: Sequence[int], elements: int, seed: int) -> list[int]:
    """How many units of each tensor a uniform draw across tensors takes.

    ``sizes``: units of each tensor; ``areas``: elements of one of its units; ``elements``: the budget. Units of one
    area: floor(budget / area) of all units, so counts are multivariate hypergeometric. Units of several areas: the
    longest prefix of a random order of all units whose elements fit. At least one unit.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    each = np.asarray(sizes, dtype=np.int64)
    total = int(each.sum())
    if len(set(areas)) > 1:
        owner = rng.permutation(np.repeat(np.arange(len(sizes)), each))
        fitting = int((np.cumsum(np.asarray(areas, dtype=np.int64)[owner]) <= elements).sum())
        counts: list[int] = np.bincount(owner[: max(1, fitting)], minlength=len(sizes)).tolist()
        return counts
    count = min(total, max(1, elements // areas[0]))
    # Independent binomial counts belong to a uniform subset of random size; uniform additions or removals make the
    # size exact and keep it uniform. numpy's own multivariate hypergeometric ends at 10^9 units.
    drawn = rng.binomial(each, count / total)
    excess = int(drawn.sum()) - count
    pool = drawn if excess > 0 else each - drawn
    moved = rng.choice(int(pool.sum()), abs(excess), replace=False) if excess else np.empty(0, dtype=np.int64)
    change = np.bincount(np.searchsorted(np.cumsum(pool), moved, side="right"), minlength=len(sizes))
    exact: list[int] = (drawn - np.sign(excess) * change).tolist()
    return exact


def unit_scores(score: torch.Tensor, block: Block | None, name: str = "score") -> torch.Tensor:
    """Scores of the units, flat [units]: of a [out, in] score's elements, or the sums over its blocks."""
    rows, cols = unit_grid(tuple(score.shape), block, name)
    if block is not None:
        score = score.view(rows, block[0], cols, block[1]).sum((1, 3))
    return score.reshape(-1)


def check_finite(score: torch.Tensor, name: str) -> None:
    """``FactoryError`` when one of the scores (not negative) is infinite or not a number."""
    if not bool(torch.isfinite(score.max())):
        raise FactoryError(f"{name}: the mask scores are not finite; lower the learning rate or check the data")


def best(flat: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest entries of ``flat`` [n], ties to the lower index: int64 [count], sorted."""
    threshold = torch.topk(flat, count, sorted=False).values.min()
    above = (flat > threshold).nonzero().view(-1)
    level = (flat == threshold).nonzero().view(-1)[: count - above.numel()]
    return torch.cat([above, level]).sort().values


def top_units(
    score: torch.Tensor, density: float, block: Block | None = None, name: str = "score", keep: Keep = "largest"
) -> torch.Tensor:
    """The budgeted units with the best score, ties to the lower index: int64 [k], sorted, on the score's device.

    ``score``: [out, in], not negative. ``FactoryError`` when a score is not finite (the loss or its gradient is not).
    """
    flat = unit_scores(score, block, name)
    check_finite(flat, name)
    return best(flat if keep == "largest" else -flat, budget(flat.numel(), density))


def top_groups(score: torch.Tensor, kept: int, group: int, name: str = "score", keep: Keep = "largest") -> torch.Tensor:
    """The ``kept`` best of every ``group`` consecutive elements of a row (N:M): sorted positions, int64 [k].

    ``score``: [out, in], not negative; ties to the lower index. ``FactoryError`` when a score is not finite.
    """
    groups = groups_of(tuple(score.shape), group, name)
    check_finite(score, name)
    table, step = score.reshape(groups, group), max(1, CHUNK // group)
    sign = 1.0 if keep == "largest" else -1.0
    parts = [_best_of_groups(table[at : at + step] * sign, kept) + at * group for at in range(0, groups, step)]
    return torch.cat(parts)


def groups_of(shape: tuple[int, ...], group: int, name: str) -> int:
    """Groups of ``group`` consecutive elements in the rows of a 2-D shape; ``ConfigError`` when they do not divide."""
    rows, cols = unit_grid(shape, None, name)
    if cols % group:
        raise ConfigError(
            f"{name}: groups of {group} do not divide its rows of {cols} elements; choose a mask.group that divides"
        )
    return rows * (cols // group)


def _best_of_groups(table: torch.Tensor, kept: int) -> torch.Tensor:
    """Flat positions of the ``kept`` largest of each row of ``table`` [groups, group], sorted, ties to the lower."""
    order = torch.sort(table, dim=1, descending=True, stable=True).indices[:, :kept].sort(dim=1).values
    starts = torch.arange(table.shape[0], device=table.device) * table.shape[1]
    return (order + starts[:, None]).view(-1)


def random_indices(
    shape: tuple[int, ...], density: float, seed: int, tensor_name: str, block: Block | None = None
) -> torch.Tensor:
    """:func:`random_units` as sorted flat element positions."""
    units = random_units(shape, density, seed, tensor_name, block)
    return SupportSpec((shape[0], shape[1]), units, block).indices()


def top_indices(score: torch.Tensor, density: float, block: Block | None = None) -> torch.Tensor:
    """:func:`top_units` as sorted flat element positions, on the CPU."""
    return SupportSpec((score.shape[0], score.shape[1]), top_units(score, density, block).cpu(), block).indices()
