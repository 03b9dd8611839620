"""The table of statistics: what the experts' tensors become, how two are joined, and how one is made of an expert.

Every merge method is made of such arrays. A statistic is one object: its operator, what it holds, where it can differ
from zero, how it is lifted from one expert, and which measurement of the expert that reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.methods.directions import HEAD, NONE, leading, vectors_of
from merge.methods.once import Once
from merge.methods.parameters import Params, number
from merge.methods.sparsify import kept
from merge.methods.spectral import stacked
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
    `measured`: what the reduction's measurement has of this tensor, if anything; `options`: of the reduction; `name`:
    the tensor's. `whole` fp32 [matrices, rows, columns]: δ with its weight, where a reduction keeps no positions of it.
    `once`: what all experts' lifts of this tensor make of the reference.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    weight: float | None
    reference: SparseTensor | None
    measured: Tensor | None
    options: Params
    name: str = ""
    whole: Tensor | None = None
    once: Once = field(default_factory=Once)

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


Extent = Callable[[str, Sequence[int], Params, int], tuple[int, ...]]
"""From a tensor's name and shape, the reduction's options and how many experts are joined, to a matrix' shape."""


@dataclass(frozen=True)
class Statistic:
    """One statistic.

    A `mass` is fp32 and a `count` an integer (fp32 when weighted), one a position of the support. A `matrix` is fp32 of
    its own shape (`extent`), beside the support; one without elements means that there is nothing to join. The rows of
    one that is joined by `below` are written below each other; its extent has the most rows that there can be.
    `lift` makes it of one expert; `carrier` names a count: where it is zero, so is this statistic, and files leave it
    out. `measurement`: of which a tensor's part is read (`workers.measuring.catalogue`). `support`: what the reduction
    that has this statistic makes of an expert's positions before anything is lifted; `full` where that may be all,
    `bare` where it is none of a matrix.
    """

    name: str
    operator: Literal["sum", "max", "below"]
    kind: Literal["mass", "count", "matrix"]
    lift: Callable[[Lifted], Tensor]
    carrier: str | None = None
    measurement: str | None = None
    support: Callable[[Lifted], Lifted] | None = None
    full: bool = False
    bare: bool = False
    extent: Extent | None = None


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
    Statistic("gram", "sum", "matrix", _gram, None, "gram", _dense, full=True,
              extent=lambda name, shape, options, experts: (*shape[-1:], *shape[-1:])),
    Statistic("gram_count", "sum", "matrix", lambda x: torch.zeros(0) if x.measured is None else torch.ones(1),
              None, "gram", _dense, full=True, extent=lambda name, shape, options, experts: (1,)),
    Statistic("gram_product", "sum", "mass", _gram_product, None, "gram", _dense, full=True),
)  # fmt: skip

# -- a weight as a matrix, of which no positions are kept ---------------------------------------------------------


def as_matrices(tensor: SparseTensor, name: str) -> Tensor:
    """The matrices [matrices, rows, columns] that a tensor of two or more dimensions is, fp32."""
    flat = tensor.values.float()
    if flat.numel() != tensor.numel:
        flat = torch.zeros(tensor.numel).index_copy_(0, tensor.indices, flat)
    return flat.view(stacked(name, tensor.shape))


def _as_matrices(x: Lifted) -> Lifted:
    """δ as the matrices that the tensor is, and no positions; vectors and scalars keep theirs."""
    if len(x.shape) < 2 or not x.values.numel():
        return x
    whole = as_matrices(SparseTensor(x.shape, x.indices, x.delta), x.name)
    return replace(x, indices=x.indices[:0], values=x.values[:0], whole=whole)


def _own_regression(x: Lifted) -> Tensor:
    """δG above G = δᵀδ / ‖δ‖² for each matrix [rows, columns]: [matrices, rows + columns, columns]; 0 for δ = 0."""
    if x.whole is None:
        return torch.zeros(0)
    matrices, rows, columns = x.whole.shape
    joined = torch.zeros(matrices, rows + columns, columns)
    for delta, own in zip(x.whole, joined, strict=True):
        unit = delta / (delta.abs().max() or 1.0)  # squares of the smallest fp32 numbers are none
        unit /= torch.linalg.vector_norm(unit) or 1.0
        gram = torch.mm(unit.T, unit, out=own[rows:])
        torch.mm(delta, gram, out=own[:rows])
    return joined.add_(0.0)


def _own_regression_extent(name: str, shape: Sequence[int], options: Params, experts: int) -> tuple[int, ...]:
    if len(shape) < 2:
        return (0,)
    matrices, rows, columns = stacked(name, shape)
    return matrices, rows + columns, columns


def own_count(side: int, options: Params) -> int:
    """How many directions each expert has of a matrix with that smaller side: TSV-M's, one at least, as many as Iso-CTS
    leaves to it, if any, or all up to a rank."""
    if "rank" in options:
        return min(side, int(number(options, "rank")))
    common, share = options.get("common_share"), number({"rank_share": 1.0, **options}, "rank_share")
    return kept(share, side) if common is None else round((side - int(side * float(common))) * share)


def _directions(x: Lifted) -> Tensor:
    """The expert's leading directions (`merge.methods.directions`)."""
    if x.whole is None:
        return torch.zeros(0)
    return _leading(x, x.whole, [0.0] * len(x.whole))


def _leading(x: Lifted, matrices: Tensor, norms: Sequence[float]) -> Tensor:
    keep = own_count(min(matrices.shape[1:]), x.options)
    parts = [leading(each, keep, at, norm) for at, (each, norm) in enumerate(zip(matrices, norms, strict=True))]
    return torch.cat(parts).add_(0.0)


def _own_directions(x: Lifted) -> Tensor:
    """Those of what the expert has outside of the common left directions, which the reference R = c U Vᵀ holds: of
    δ - U Uᵀ δ, with c² = ‖Rᵀ R‖² / ‖R‖²."""
    if x.whole is None or x.reference is None or not x.reference.values.any():
        return _directions(x)
    rest = []
    for delta, isotropic in zip(x.whole, as_matrices(x.reference, x.name), strict=True):
        unit = isotropic / (float(torch.linalg.vector_norm(isotropic, dtype=torch.float64)) or 1.0)
        upright = unit.shape[0] > unit.shape[1]
        gram = unit.T @ unit if upright else unit @ unit.T
        scale = float(gram.double().square().sum()) or 1.0
        shared = unit @ (unit.T @ delta) if upright else gram @ delta
        rest.append(delta - shared / scale)
    return _leading(x, torch.stack(rest), [float(torch.linalg.vector_norm(delta)) for delta in x.whole])


def _directions_extent(name: str, shape: Sequence[int], options: Params, experts: int) -> tuple[int, ...]:
    if len(shape) < 2:
        return (0,)
    matrices, rows, columns = stacked(name, shape)
    return experts * matrices * own_count(min(rows, columns), options), HEAD + rows + columns


def _factors(x: Lifted) -> Tensor:
    """The expert's directions up to the rank, below a row [-1, 0, …] that tells it from others."""
    found = _directions(x)
    return found if x.whole is None else torch.cat([found.new_tensor([[-1.0] + [0.0] * (found.shape[1] - 1)]), found])


def _factors_extent(name: str, shape: Sequence[int], options: Params, experts: int) -> tuple[int, ...]:
    held, *width = _directions_extent(name, shape, options, experts)
    return (held + experts, *width) if width else (0,)


def bases(merge: SparseTensor, name: str, once: Once) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Singular values [k], left [k, rows] and right vectors [k, columns], fp64, of each matrix of an earlier round's
    merge; without those that are rounding. On the CPU: all who read one merge have to find the same vectors."""

    def find() -> list[tuple[Tensor, Tensor, Tensor]]:
        matrices = as_matrices(merge, name)
        return [vectors_of(leading(each, min(each.shape)), 0, each.shape[0]) for each in matrices]

    return once("bases", find)


def _amplified(x: Lifted) -> Tensor:
    """⟨u_rᵀ Σδ, u_rᵀ δ⟩ / ‖u_rᵀ δ‖² for each left singular vector u_r of the reference, which is Σδ: [1, matrices ·
    min(rows, columns)], by falling singular value. 0 where the expert has no part in a direction."""
    if x.whole is None or x.reference is None:
        return torch.zeros(0)
    rows = torch.zeros(len(x.whole), min(x.whole.shape[1:]))
    for row, delta, (values, left, right) in zip(rows, x.whole, bases(x.reference, x.name, x.once), strict=True):
        size = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) or 1.0
        own = left @ delta.double().div_(size)
        squares = own.square().sum(1)
        shared = (own * right).sum(1).mul_(values / size)
        row[: len(values)] = torch.where(squares > NONE**2, shared / squares.clamp(min=NONE**2), 0.0)
    return rows.view(1, -1)


def _amplified_extent(name: str, shape: Sequence[int], options: Params, experts: int) -> tuple[int, ...]:
    if len(shape) < 2:
        return (0,)
    matrices, rows, columns = stacked(name, shape)
    return experts, matrices * min(rows, columns)


_MATRICES = (
    Statistic("directions", "below", "matrix", _directions, support=_as_matrices, bare=True,
              extent=_directions_extent),
    Statistic("own_directions", "below", "matrix", _own_directions, support=_as_matrices, bare=True,
              extent=_directions_extent),
    Statistic("own_regression", "sum", "matrix", _own_regression, support=_as_matrices, bare=True,
              extent=_own_regression_extent),
    Statistic("factors", "below", "matrix", _factors, support=_as_matrices, bare=True, extent=_factors_extent),
    Statistic("amplified", "below", "matrix", _amplified, support=_as_matrices, bare=True, extent=_amplified_extent),
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


STATISTICS: dict[str, Statistic] = {each.name: each for each in (*_DELTA, *_FISHER, *_GRAM, *_MATRICES, *_SCE)}
"""All statistics that can be asked for.

Of δ: `sum`, `positive_mass` and `negative_mass` (the negative sum of negatives), `square_sum`, `positive_max` (largest
max(δ, 0)), `negative_max` (largest max(-δ, 0)). Experts: `count` (whose support holds the position), `positive_count`,
`negative_count`, `zero_count`. Σf and Σfδ: `fisher`, `fisher_mass`. Against the result of an earlier round:
`agreement_count` (consensus), `agreeing_mass` and `agreeing_weight` (SCE). RegMean: `gram` [in, in], `gram_count` []
(experts that have one) and `gram_product` (Σ δG). Of weights as matrices: `own_regression` (Σ δG above Σ G, G the
expert's own δᵀδ / ‖δ‖²), `directions` (each expert's leading ones), `factors` (those and whose they are) and, after an
earlier round that found the common ones, `own_directions`; after one that found Σδ, `amplified` (how much each of its
directions is more than each expert's own).
"""
