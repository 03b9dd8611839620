"""The table of statistics: what the experts' tensors become, how two are joined, and how one is made of an expert.

Every merge method is made of such arrays. A statistic is one object: its operator, what it holds, where it can differ
from zero, how it is lifted from one expert, and which measurement of the expert that reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.methods.parameters import Params, number
from workers.adapters.support import SparseTensor

MAX_EXPERTS = 65_535
"""Counts are stored in at most 16 bits."""


def count_dtype(experts: int) -> torch.dtype:
    """The dtype of counts in memory for that many experts. Raises MergeError above `MAX_EXPERTS`."""
    if experts > MAX_EXPERTS:
        raise MergeError(f"{experts} experts in one merge; at most {MAX_EXPERTS} are supported (counts are 16 bits)")
    return torch.uint8 if experts <= 255 else torch.int32


def values_at(tensor: SparseTensor | None, indices: Tensor) -> Tensor:
    """A tensor's values at flat positions (int64 [n], ascending), fp32; 0 where it has none."""
    if tensor is None or not tensor.indices.numel():
        return torch.zeros(indices.numel())
    values = tensor.values.float()
    if values.numel() == tensor.numel:
        return values.index_select(0, indices)
    if torch.equal(tensor.indices, indices):
        return values
    at = torch.searchsorted(tensor.indices, indices).clamp_(max=values.numel() - 1)
    return values[at].mul_((tensor.indices[at] == indices).float()).add_(0.0)


@dataclass(frozen=True)
class Lifted:
    """One tensor of one expert, thinned out: what its statistics are made of.

    `values` fp32 [n] at `indices` int64 [n], flat row-major, ascending; `weight` is the expert's in a weighted
    reduction, else None; `reference`: this tensor of the earlier round's merged δ, if there is one that has it;
    `measured`: what the reduction's measurement has of this tensor, if anything; `options`: of the reduction.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    weight: float | None
    reference: SparseTensor | None
    measured: Tensor | None
    options: Params

    @cached_property
    def delta(self) -> Tensor:
        """The values, in a weighted reduction times the expert's weight."""
        return self.values if self.weight is None else self.values * self.weight + 0.0

    def counted(self, held: Tensor | None = None) -> Tensor:
        """1 (or the expert's weight) where `held` (bool [n]), or everywhere."""
        if self.weight is not None:
            weights = torch.full_like(self.values, self.weight)
            return weights if held is None else weights * held
        return torch.ones_like(self.values, dtype=_COUNT) if held is None else held.view(_COUNT)


@dataclass(frozen=True)
class Statistic:
    """One statistic.

    A `mass` is fp32 and a `count` an integer (fp32 when weighted), one a position of the support. A `matrix` is fp32 of
    its own shape, beside the support; one without elements means that there is nothing to join.
    `lift` makes it of one expert; `carrier` names a count: where it is zero, so is this statistic, and files leave it
    out. `measurement`: of which a tensor's part is read (`workers.measuring.catalogue`). `support`: what the reduction
    that has this statistic makes of an expert's positions before anything is lifted; `full` where that may be all.
    """

    name: str
    operator: Literal["sum", "max"]
    kind: Literal["mass", "count", "matrix"]
    lift: Callable[[Lifted], Tensor]
    carrier: str | None = None
    measurement: str | None = None
    support: Callable[[Lifted], Lifted] | None = None
    full: bool = False


# -- of δ alone, and how many experts ---------------------------------------------------------------------------

_COUNT = count_dtype(1)


def tall_mask(values: Tensor, merged: Tensor, threshold: float) -> Tensor:
    """TALL mask of a task, bool [n]: |δ| ≥ threshold · |merged - δ| (Wang et al., arXiv 2405.07813)."""
    return values.abs() >= threshold * (merged - values).abs()


def _agreement(x: Lifted) -> Tensor:
    """Where the TALL mask of the expert holds."""
    return x.counted(tall_mask(x.delta, values_at(x.reference, x.indices), number(x.options, "threshold")))


_DELTA = (
    Statistic("sum", "sum", "mass", lambda x: x.delta),
    Statistic("count", "sum", "count", lambda x: x.counted()),
    Statistic("positive_mass", "sum", "mass", lambda x: x.delta.clamp(min=0), "positive_count"),
    Statistic("negative_mass", "sum", "mass", lambda x: x.delta.clamp(max=0), "negative_count"),
    Statistic("positive_count", "sum", "count", lambda x: x.counted(x.delta > 0)),
    Statistic("negative_count", "sum", "count", lambda x: x.counted(x.delta < 0)),
    Statistic("zero_count", "sum", "count", lambda x: x.counted(x.delta == 0)),
    Statistic("square_sum", "sum", "mass", lambda x: x.delta.square()),
    Statistic("positive_max", "max", "mass", lambda x: x.delta.clamp(min=0), "positive_count"),
    Statistic("negative_max", "max", "mass", lambda x: (-x.delta).clamp(min=0) + 0.0, "negative_count"),
    Statistic("agreement_count", "sum", "count", _agreement),
)

# -- Fisher: Σf and Σfδ (Matena and Raffel, arXiv 2111.09832), with a diagonal on the support -------------------


def _fisher(x: Lifted) -> Tensor:
    fisher = x.measured
    if fisher is None:
        raise MergeError("the expert has no Fisher information: fisher_on_support needs it of every expert")
    if fisher.shape != x.values.shape or not finite(fisher) or (fisher.numel() and float(fisher.min()) <= 0):
        raise MergeError(
            f"Fisher information must be {x.values.numel()} finite numbers above 0, one for each value; "
            f"got {list(fisher.shape)}"
        )
    return fisher.float() if x.weight is None else fisher.float() * x.weight


_FISHER = (
    Statistic("fisher", "sum", "mass", _fisher, measurement="fisher"),
    Statistic("fisher_mass", "sum", "mass", lambda x: _fisher(x) * x.values, measurement="fisher"),
)

# -- RegMean (Jin et al., arXiv 2212.09849) on δ: Σδ, ΣδG̃, ΣG̃, and how many experts had a G --------------------


def _dense(x: Lifted) -> Lifted:
    """δG covers every position; without G it is left 0."""
    size = math.prod(x.shape)
    if x.measured is None or x.values.numel() == size:
        return x
    values = torch.zeros(size).index_copy_(0, x.indices, x.values)
    return replace(x, indices=torch.arange(size), values=values)


def _gram(x: Lifted) -> Tensor:
    """G̃ = a·G + (1 - a)·diag(G) with a = off_diagonal, [in, in]; no elements without G."""
    if x.measured is None:
        return torch.zeros(0)
    if len(x.shape) != 2 or x.measured.shape != (x.shape[1], x.shape[1]) or not finite(x.measured):
        raise MergeError(
            f"Gram matrix must be finite and [in, in] of a tensor [out, in]; got {list(x.measured.shape)} for "
            f"{list(x.shape)}"
        )
    gram = x.measured.float() * number(x.options, "off_diagonal")
    gram.diagonal().copy_(x.measured.diagonal())
    return gram


def _gram_product(x: Lifted) -> Tensor:
    if x.measured is None:
        return torch.zeros_like(x.values)
    return (x.values.view(*x.shape) @ _gram(x)).view(-1) + 0.0


_GRAM = (
    Statistic("gram", "sum", "matrix", _gram, None, "gram", _dense, full=True),
    Statistic("gram_count", "sum", "matrix", lambda x: torch.zeros(0) if x.measured is None else torch.ones(1),
              None, "gram", _dense, full=True),
    Statistic("gram_product", "sum", "mass", _gram_product, None, "gram", _dense, full=True),
)  # fmt: skip

# -- SCE's second round (Wan et al., FuseChat, arXiv 2408.07990) ------------------------------------------------


def _selected(x: Lifted) -> Lifted:
    """The positions that the reference, which is the selection, holds."""
    if x.reference is None:
        return replace(x, indices=x.indices[:0], values=x.values[:0])
    held = torch.zeros(math.prod(x.shape), dtype=torch.bool).index_fill_(0, x.reference.indices, True)[x.indices]
    return replace(x, indices=x.indices[held], values=x.values[held])


def _agrees(x: Lifted) -> Tensor:
    """Where the expert has the elected sign, bool [n]: the reference's, of which zero counts as positive."""
    return torch.where(values_at(x.reference, x.indices) >= 0, x.values > 0, x.values < 0)


def _sce_weight(x: Lifted) -> float:
    """Σδ² over the selected positions of this tensor: the paper divides it by the tensor's size and by the sum over the
    experts, which cancels where the merged δ divides by the agreeing weights."""
    return float(x.values.double().square().sum())


_SCE = (
    Statistic("agreeing_mass", "sum", "mass", lambda x: x.values * _sce_weight(x) * _agrees(x) + 0.0,
              support=_selected),
    Statistic("agreeing_weight", "sum", "mass", lambda x: _agrees(x) * _sce_weight(x), support=_selected),
)  # fmt: skip


def finite(values: Tensor) -> bool:
    """Whether all values are."""
    # a finite sum has finite terms; an infinite one may have overflowed
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


STATISTICS: dict[str, Statistic] = {each.name: each for each in (*_DELTA, *_FISHER, *_GRAM, *_SCE)}
"""All statistics that can be asked for.

Of δ: `sum`, `positive_mass` and `negative_mass` (the negative sum of negatives), `square_sum`, `positive_max` (largest
max(δ, 0)), `negative_max` (largest max(-δ, 0)). Experts: `count` (whose support holds the position), `positive_count`,
`negative_count`, `zero_count`. Σf and Σfδ: `fisher`, `fisher_mass`. Against the result of an earlier round:
`agreement_count` (consensus), `agreeing_mass` and `agreeing_weight` (SCE). RegMean: `gram` [in, in], `gram_count` []
(experts that have one) and `gram_product` (Σ δG).
"""
