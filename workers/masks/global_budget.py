"""One budget across all adapted weights: the best units of the whole model, without holding all scores.

Two passes over the scores (each a backward, or a walk over an accumulator). The first adds, layer by layer, a histogram
of the unit scores: the exponent and upper mantissa bits of the fp32 pattern are the bin, because patterns of numbers
that are not negative order as the numbers do. That gives the bin in which the budget ends. The second collects the
units of the bins that can matter, and an exact cut follows. Does not cover the budget of a single tensor
(``workers.masks.selection``), nor where scores come from (``workers.masks.criteria``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from workers.adapters.support import Block
from workers.masks.selection import Keep, best, check_finite, unit_scores

Take = Callable[[str, torch.Tensor], None]
Scan = Callable[[Take], None]
"""Calls its argument once for each adapted module, in any order, with the name and the fp32 scores [rows, in]."""

_SHIFT = 16
"""Bits below the bin: what is left are 8 of the exponent and 7 of the mantissa, bins 0.4 to 0.8 % wide."""
_INFINITY = 0x7F800000
_BINS = (_INFINITY >> _SHIFT) + 1
_CHUNK = 2**22


@dataclass(frozen=True)
class _Candidates:
    """Units of one module: ``ids`` int64 [n] sorted, ``keys`` int32 [n] (larger is better), elements of a unit."""

    ids: torch.Tensor
    keys: torch.Tensor
    area: int


def global_units(
    scan: Scan, blocks: Mapping[str, Block | None], elements: int, keep: Keep = "largest"
) -> dict[str, torch.Tensor]:
    """The best units across modules within a budget of ``elements``: for each module sorted int64 ids on the CPU.

    ``blocks``: the unit of each module (None: one element), in model order. Units are ranked by their mean score per
    element, ties to the earlier module and then to the lower index; the longest prefix of that ranking whose elements
    fit is kept, and at least one unit. A module may get none. ``scan`` is called twice; once or twice more if the
    scores changed so much between the two calls (atomics on CUDA) that too few were collected. Memory: one layer's
    keys, and 12 bytes for each collected unit (the chosen ones and those of the last two bins).
    ``FactoryError`` for scores that are not finite.
    """
    histogram = torch.zeros(_BINS, dtype=torch.int64)

    def count(name: str, score: torch.Tensor) -> None:
        keys, area = _keys(name, score, blocks[name], keep)
        for part in keys.split(_CHUNK):
            histogram.add_(torch.bincount(part >> _SHIFT, minlength=_BINS).cpu(), alpha=area)

    scan(count)
    reached = histogram.flip(0).cumsum(0).flip(0)  # elements in this bin and the better ones
    last = int((reached >= min(elements, int(reached[0]))).nonzero()[-1])
    slack = 1
    while True:
        lowest = max(0, last - slack)
        found = _collect(scan, blocks, lowest, keep)
        if lowest == 0 or sum(one.ids.numel() * one.area for one in found.values()) >= elements:
            return _cut(found, elements)
        slack *= 64


def _keys(name: str, score: torch.Tensor, block: Block | None, keep: Keep) -> tuple[torch.Tensor, int]:
    """Ranks of a module's units as int32 [units], larger is better, and the elements of a unit."""
    area = 1 if block is None else block[0] * block[1]
    means = unit_scores(score, block, name)
    if area > 1:
        means = means / area
    check_finite(means, name)
    bits = means.view(torch.int32)
    return (bits if keep == "largest" else _INFINITY - bits), area


def _collect(scan: Scan, blocks: Mapping[str, Block | None], lowest: int, keep: Keep) -> dict[str, _Candidates]:
    """The units in bin ``lowest`` and better ones, by module in the order of ``blocks``, on the CPU."""
    found: dict[str, _Candidates] = {}

    def take(name: str, score: torch.Tensor) -> None:
        keys, area = _keys(name, score, blocks[name], keep)
        ids = (keys >= lowest << _SHIFT).nonzero().view(-1)
        found[name] = _Candidates(ids.cpu(), keys[ids].cpu(), area)

    scan(take)
    return {name: found[name] for name in blocks}


def _cut(found: Mapping[str, _Candidates], elements: int) -> dict[str, torch.Tensor]:
    keys = torch.cat([one.keys for one in found.values()])
    sizes = [one.ids.numel() for one in found.values()]
    areas = {one.area for one in found.values()}
    if len(areas) == 1:
        chosen = best(keys, min(keys.numel(), max(1, elements // areas.pop())))
    else:
        each = torch.cat([torch.full((one.ids.numel(),), one.area) for one in found.values()])
        order = torch.sort(keys, descending=True, stable=True).indices
        fitting = int((each[order].cumsum(0) <= elements).sum())
        chosen = order[: max(1, fitting)].sort().values
    kept = torch.zeros(keys.numel(), dtype=torch.bool)
    kept[chosen] = True
    parts = zip(found.items(), kept.split(sizes), strict=True)
    return {name: one.ids[part] for (name, one), part in parts}
