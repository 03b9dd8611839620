"""Statistics of one tensor and the one kernel that joins them.

A tensor's statistics are a support (the union of the experts' supports) and one array per statistic on it. Every merge
method is made of such arrays; joining two of them is a sum or a maximum per position, so that any tree of joins gives
what one join of all experts gives (exactly where floating-point addition is exact, else within rounding). Beside them
there are matrices, which are added up or written below each other.

Masses are fp32. Counts are uint8 as long as the experts joined number at most 255 and int32 above (uint16 in files): 20
experts cost one byte a count, and a count never wraps because it cannot exceed the number of experts. In a weighted
reduction every δ is multiplied by its expert's weight, and counts hold sums of weights and are fp32.

Which there are, and how they are made of an expert, is `merge.methods.statistic_table`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infra.errors import MergeError
from merge.methods.statistic_table import STATISTICS, count_dtype

STATISTICS_VERSION = 2
"""Part of the key of every node: raise it when the same experts give other statistics."""

_COMPACT_BELOW = 16
"""With fewer entries than numel / 16 in all children, joining sorted indices beats a scratch of the tensor's size."""


def statistic_dtype(name: str, experts: int, weighted: bool = False) -> torch.dtype:
    """The dtype of one statistic in memory."""
    return count_dtype(experts) if STATISTICS[name].kind == "count" and not weighted else torch.float32


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of one tensor over `experts` experts.

    `indices` int64 [n], sorted, unique, flat row-major; `arrays` name -> [n] of `statistic_dtype(name, experts,
    weighted)`, or a matrix of its own shape.
    """

    shape: tuple[int, ...]
    indices: Tensor
    arrays: Mapping[str, Tensor]
    experts: int
    weighted: bool = False

    @property
    def numel(self) -> int:
        """Positions of the dense tensor."""
        return math.prod(self.shape)


def empty(shape: Sequence[int], names: Sequence[str], weighted: bool = False) -> TensorStatistics:
    """The neutral element of `combine` for one shape: no expert, no position."""
    arrays = {name: torch.zeros(0, dtype=statistic_dtype(name, 0, weighted)) for name in names}
    return TensorStatistics(tuple(shape), torch.zeros(0, dtype=torch.int64), arrays, 0, weighted)


def combine(children: Sequence[TensorStatistics]) -> TensorStatistics:
    """Join the statistics of several children, in their order.

    Raises MergeError where shapes or statistics differ, or where there is nothing to join.
    """
    if not children:
        raise MergeError("no statistics to combine")
    first = children[0]
    experts, entries = sum(c.experts for c in children), sum(c.indices.numel() for c in children)
    accumulator = Accumulator(first.shape, tuple(first.arrays), experts, entries, first.weighted)
    for child in children:
        accumulator.add(child)
    return accumulator.result()


class Accumulator:
    """Joins children one at a time, so that only one child and the result are in memory.

    Dense supports use a scratch of the tensor's size; sparse ones (`entries`, the children's positions in all, far
    below the tensor's size) keep the children and join their indices at the end. Both add in the order of the calls and
    so give the same bits.
    """

    def __init__(
        self, shape: Sequence[int], names: Sequence[str], experts: int, entries: int, weighted: bool = False
    ) -> None:
        """`experts` bounds the experts of all children. Raises MergeError above `MAX_EXPERTS`."""
        self.shape = tuple(shape)
        self.names = tuple(names)
        self.numel = math.prod(self.shape)
        self.weighted = weighted
        self._bound = experts
        self._dtypes = {name: statistic_dtype(name, experts, weighted) for name in self.names}
        self._elementwise = tuple(n for n in self.names if STATISTICS[n].kind != "matrix")
        self._matrices: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._experts = 0
        self._compact: list[TensorStatistics] | None = [] if entries * _COMPACT_BELOW < self.numel else None
        self._full = False
        self._present = torch.zeros(0 if self._compact is not None else self.numel, dtype=torch.bool)
        self._scratch = self._new_scratch(self._present.numel())

    def _new_scratch(self, size: int) -> dict[str, Tensor]:
        # zero is neutral for maxima as well: they are of values that are not negative
        return {name: torch.zeros(size, dtype=self._dtypes[name]) for name in self._elementwise}

    def add(self, child: TensorStatistics) -> None:
        """Join one child. Raises MergeError where it has another shape, other statistics or too many experts."""
        if child.shape != self.shape:
            raise MergeError(f"cannot combine statistics of shapes {list(self.shape)} and {list(child.shape)}")
        if set(child.arrays) != set(self.names):
            raise MergeError(f"cannot combine statistics {sorted(self.names)} with {sorted(child.arrays)}")
        if child.weighted != self.weighted:
            raise MergeError("cannot combine weighted statistics with unweighted ones")
        self._experts += child.experts
        if self._experts > self._bound:
            raise MergeError(f"more experts than announced in one combine: {self._experts} > {self._bound}")
        self._add_matrices(child)
        if self._compact is not None:
            self._compact.append(child)
            return
        if child.indices.numel() == self.numel:
            self._full = True
            self._join(self._scratch, None, child)
        else:
            if not self._full:
                self._present.index_fill_(0, child.indices, True)
            self._join(self._scratch, child.indices, child)

    def _add_matrices(self, child: TensorStatistics) -> None:
        for name in self.names:
            matrix = child.arrays[name]
            if name in self._elementwise or not matrix.numel():
                continue
            known = self._matrices.get(name)
            if STATISTICS[name].operator == "below":
                below = self._rows.setdefault(name, [])
                if below and below[0].shape[1:] != matrix.shape[1:]:
                    raise MergeError(f"cannot combine {name} of {below[0].shape[1]} and {matrix.shape[1]} columns")
                below.append(matrix)
            elif known is None:
                self._matrices[name] = matrix.clone()
            elif known.shape != matrix.shape:
                raise MergeError(f"cannot combine {name} of shapes {list(known.shape)} and {list(matrix.shape)}")
            else:
                known.add_(matrix)

    def _join(self, scratch: Mapping[str, Tensor], positions: Tensor | None, child: TensorStatistics) -> None:
        """Add one child at these positions of the scratch, or at all of them."""
        for name in self._elementwise:
            into = scratch[name]
            values = child.arrays[name].to(into.dtype)
            if STATISTICS[name].operator == "sum":
                if positions is None:
                    into.add_(values)
                else:
                    into.index_add_(0, positions, values)
            elif positions is None:
                torch.maximum(into, values, out=into)
            else:
                into.index_copy_(0, positions, torch.maximum(into.index_select(0, positions), values))

    def result(self) -> TensorStatistics:
        """The joined statistics. The accumulator must not be used afterwards."""
        if self._compact is not None:
            indices, arrays = self._join_compact(self._compact)
        else:
            # numpy finds positions ten times as fast as torch here
            present = np.arange(self.numel) if self._full else np.flatnonzero(self._present.numpy())
            indices = torch.from_numpy(present)
            full = indices.numel() == self.numel
            arrays = {n: a if full else a.index_select(0, indices) for n, a in self._scratch.items()}
        none = torch.zeros(0)
        self._matrices |= {name: torch.cat(rows) for name, rows in self._rows.items()}
        joined = {
            name: arrays[name].to(statistic_dtype(name, self._experts, self.weighted))
            if name in arrays
            else self._matrices.get(name, none)
            for name in self.names
        }
        return TensorStatistics(self.shape, indices, joined, self._experts, self.weighted)

    def _join_compact(self, children: list[TensorStatistics]) -> tuple[Tensor, dict[str, Tensor]]:
        if not children:
            return torch.zeros(0, dtype=torch.int64), self._new_scratch(0)
        indices = torch.unique(torch.cat([c.indices for c in children]), sorted=True)
        scratch = self._new_scratch(indices.numel())
        for child in children:
            self._join(scratch, torch.searchsorted(indices, child.indices), child)
        return indices, scratch
