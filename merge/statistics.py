"""Statistics of one tensor and the one kernel that joins them.

A tensor's statistics are a support (the union of the experts' supports) and one array per statistic on it. Every merge
method is made of such arrays; joining two of them is a sum or a maximum per position, so that any tree of joins gives
what one join of all experts gives (exactly where floating-point addition is exact, else within rounding).

Masses are fp32. Counts are uint8 as long as the experts joined number at most 255 and int32 above (uint16 in files):
20 experts cost one byte a count, and a count never wraps because it cannot exceed the number of experts.

Not here: what the arrays mean to a method (`merge.methods`) and how they are stored (`merge.node_file`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infra.errors import MergeError

STATISTICS_VERSION = 1
"""Part of the key of every node: raise it when the same experts give other statistics."""

MAX_EXPERTS = 65_535
"""Counts are stored in at most 16 bits."""

_COMPACT_BELOW = 16
"""With fewer entries than numel / 16 in all children, joining sorted indices beats a scratch of the tensor's size."""


@dataclass(frozen=True)
class Statistic:
    """One statistic: how it is joined, what it holds, and where it can differ from zero.

    `carrier` names a count: where it is zero, so is this statistic, and files leave it out.
    """

    name: str
    operator: Literal["sum", "max"]
    kind: Literal["mass", "count"]
    carrier: str | None = None


STATISTICS: dict[str, Statistic] = {
    s.name: s
    for s in (
        Statistic("sum", "sum", "mass"),
        Statistic("count", "sum", "count"),
        Statistic("positive_mass", "sum", "mass", "positive_count"),
        Statistic("negative_mass", "sum", "mass", "negative_count"),
        Statistic("positive_count", "sum", "count"),
        Statistic("negative_count", "sum", "count"),
        Statistic("zero_count", "sum", "count"),
        Statistic("largest_magnitude", "max", "mass"),
    )
}
"""All statistics that can be asked for. A count counts experts; `negative_mass` is the (negative) sum of negatives."""


def count_dtype(experts: int) -> torch.dtype:
    """The dtype of counts in memory for that many experts. Raises MergeError above `MAX_EXPERTS`."""
    if experts > MAX_EXPERTS:
        raise MergeError(f"{experts} experts in one merge; at most {MAX_EXPERTS} are supported (counts are 16 bits)")
    return torch.uint8 if experts <= 255 else torch.int32


def statistic_dtype(name: str, experts: int) -> torch.dtype:
    """The dtype of one statistic in memory."""
    return torch.float32 if STATISTICS[name].kind == "mass" else count_dtype(experts)


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of one tensor over `experts` experts.

    `indices` int64 [n], sorted, unique, flat row-major; `arrays` name -> [n] (fp32, or `count_dtype(experts)`).
    """

    shape: tuple[int, ...]
    indices: Tensor
    arrays: Mapping[str, Tensor]
    experts: int

    @property
    def numel(self) -> int:
        """Positions of the dense tensor."""
        return math.prod(self.shape)


def empty(shape: Sequence[int], names: Sequence[str]) -> TensorStatistics:
    """The neutral element of `combine` for one shape: no expert, no position."""
    arrays = {name: torch.zeros(0, dtype=statistic_dtype(name, 0)) for name in names}
    return TensorStatistics(tuple(shape), torch.zeros(0, dtype=torch.int64), arrays, 0)


def combine(children: Sequence[TensorStatistics]) -> TensorStatistics:
    """Join the statistics of several children, in their order.

    Raises MergeError where shapes or statistics differ, or where there is nothing to join.
    """
    if not children:
        raise MergeError("no statistics to combine")
    first = children[0]
    accumulator = Accumulator(
        first.shape, tuple(first.arrays), sum(c.experts for c in children), sum(c.indices.numel() for c in children)
    )
    for child in children:
        accumulator.add(child)
    return accumulator.result()


class Accumulator:
    """Joins children one at a time, so that only one child and the result are in memory.

    Dense supports use a scratch of the tensor's size; sparse ones (`entries`, the children's positions in all, far
    below the tensor's size) keep the children and join their indices at the end. Both add in the order of the calls and
    so give the same bits.
    """

    def __init__(self, shape: Sequence[int], names: Sequence[str], experts: int, entries: int) -> None:
        self.shape = tuple(shape)
        self.names = tuple(names)
        self.numel = math.prod(self.shape)
        self._bound = experts
        self._count = count_dtype(experts)
        self._experts = 0
        self._compact: list[TensorStatistics] | None = [] if entries * _COMPACT_BELOW < self.numel else None
        self._present = torch.zeros(0 if self._compact is not None else self.numel, dtype=torch.bool)
        self._scratch = self._new_scratch(self._present.numel())

    def _new_scratch(self, size: int) -> dict[str, Tensor]:
        scratch = {}
        for name in self.names:
            start = 0 if STATISTICS[name].operator == "sum" else -math.inf
            dtype = torch.float32 if STATISTICS[name].kind == "mass" else self._count
            scratch[name] = torch.full((size,), start, dtype=dtype) if start else torch.zeros(size, dtype=dtype)
        return scratch

    def add(self, child: TensorStatistics) -> None:
        """Join one child. Raises MergeError where it has another shape, other statistics or too many experts."""
        if child.shape != self.shape:
            raise MergeError(f"cannot combine statistics of shapes {list(self.shape)} and {list(child.shape)}")
        if set(child.arrays) != set(self.names):
            raise MergeError(f"cannot combine statistics {sorted(self.names)} with {sorted(child.arrays)}")
        self._experts += child.experts
        if self._experts > self._bound:
            raise MergeError(f"more experts than announced in one combine: {self._experts} > {self._bound}")
        if self._compact is not None:
            self._compact.append(child)
            return
        self._present[child.indices] = True
        self._scatter(self._scratch, child.indices, child)

    def _scatter(self, scratch: Mapping[str, Tensor], positions: Tensor, child: TensorStatistics) -> None:
        for name in self.names:
            into = scratch[name]
            values = child.arrays[name].to(into.dtype)
            if STATISTICS[name].operator == "sum":
                into.index_add_(0, positions, values)
            else:
                into[positions] = torch.maximum(into[positions], values)

    def result(self) -> TensorStatistics:
        """The joined statistics. The accumulator must not be used afterwards."""
        if self._compact is not None:
            indices, arrays = self._join_compact(self._compact)
        else:
            indices = self._present.nonzero().view(-1)
            full = indices.numel() == self.numel
            arrays = {n: a if full else a.index_select(0, indices) for n, a in self._scratch.items()}
        dtypes = {name: statistic_dtype(name, self._experts) for name in self.names}
        return TensorStatistics(self.shape, indices, {n: arrays[n].to(dtypes[n]) for n in self.names}, self._experts)

    def _join_compact(self, children: list[TensorStatistics]) -> tuple[Tensor, dict[str, Tensor]]:
        if not children:
            return torch.zeros(0, dtype=torch.int64), self._new_scratch(0)
        indices = torch.unique(torch.cat([c.indices for c in children]), sorted=True)
        scratch = self._new_scratch(indices.numel())
        for child in children:
            self._scatter(scratch, torch.searchsorted(indices, child.indices), child)
        return indices, scratch
