"""Merge methods as pairs of small pure functions: lift one expert to statistics, lower the root's statistics to δ.

mean            Σδ / N                         N = experts merged (an absent position counts as 0)
overlap_mean    Σδ / count                     count = experts whose support holds the position, stored zeros included
task_arithmetic λ · Σδ                         Ilharco et al., arXiv 2212.04089
ties            λ · mean of the nonzero δ that agree with the elected sign, after trimming each expert
                                               Yadav et al., arXiv 2306.01708

TIES here: an expert's tensor keeps the k = max(1, ⌊density · n⌋) largest of the n values on its *support* (the product
in double precision, ties to the lower index); the sign with the larger total mass is elected, zero counting as positive
(as in mergekit and PEFT); values that are zero vote for nothing and are not averaged.

A candidate is a method with its parameters. Candidates that need the same trimming are lowered from one reduction:
`group_candidates` says how many reductions a search needs.

Not here: joining statistics (`merge.statistics`) and choosing among candidates.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.statistics import STATISTICS, TensorStatistics, count_dtype
from workers.support import SparseTensor

LIFT_VERSION = 1
"""Part of the key of every node: raise it when one expert gives other statistics."""

LOWER_VERSION = 1
"""Part of the key of every merged adapter: raise it when the same statistics give another δ."""


@dataclass(frozen=True)
class LiftSpec:
    """What one reduction computes: the statistics' names (sorted) and the share of each support that is kept."""

    statistics: tuple[str, ...]
    density: float = 1.0

    def __post_init__(self) -> None:
        for name in self.statistics:
            if name not in STATISTICS:
                raise MergeError(f"unknown statistic {name!r}{_nearest(name, STATISTICS)}")
        if not self.statistics or len(set(self.statistics)) != len(self.statistics):
            raise MergeError(f"statistics of a reduction must be distinct and at least one: {list(self.statistics)}")
        if not 0 < self.density <= 1:
            raise MergeError(f"trim density is {self.density}; accepted: above 0, at most 1")
        object.__setattr__(self, "statistics", tuple(sorted(self.statistics)))
        object.__setattr__(self, "density", float(self.density))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, also the lift's part of a node's recipe."""
        return {"statistics": list(self.statistics), "density": self.density}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> LiftSpec:
        """The inverse of `to_dict`. Raises MergeError for anything else."""
        try:
            names, density = data["statistics"], data["density"]
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or isinstance(density, bool):
                raise TypeError
            return LiftSpec(tuple(names), float(density))
        except (KeyError, TypeError, ValueError):
            raise MergeError(f"not a description of a reduction: {str(data)[:200]}") from None


@dataclass(frozen=True)
class Param:
    """A number that a method takes: its default and range."""

    default: float
    high: float
    low: float = 0.0
    low_allowed: bool = False

    def check(self, where: str, value: object) -> float:
        """The value as a float. Raises MergeError naming `where` when it is no finite number in range."""
        accepted = f"a number {'from' if self.low_allowed else 'above'} {self.low:g} to {self.high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MergeError(f"{where} is {value!r}; accepted: {accepted}")
        number = float(value)
        inside = self.low <= number <= self.high and (self.low_allowed or number != self.low)
        if not math.isfinite(number) or not inside:
            raise MergeError(f"{where} is {value!r}; accepted: {accepted}")
        return number


Lower = Callable[[TensorStatistics, int, Mapping[str, float]], Tensor]


@dataclass(frozen=True)
class Method:
    """A method: its parameters, what it needs of a reduction, and the lowering of the root's statistics.

    `needs` are statistics; "sum" and "count" may also be derived from signed ones (see `_total` and `_count`).
    """

    params: Mapping[str, Param]
    needs: tuple[str, ...]
    lower: Lower


@dataclass(frozen=True)
class Candidate:
    """A method with all its parameters, checked and completed with defaults. Hashable and picklable.

    Raises MergeError for an unknown method or parameter (with the nearest known one) or a value out of range.
    """

    method: str
    params: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MergeError(f"unknown merge method {self.method!r}{_nearest(self.method, METHODS)}")
        accepted = METHODS[self.method].params
        for name in self.params:
            if name not in accepted:
                raise MergeError(
                    f"merge method {self.method!r} has no parameter {name!r}{_nearest(str(name), accepted)}"
                )
        where = f"of merge method {self.method!r}"
        complete = {
            name: param.check(f"parameter {name!r} {where}", self.params.get(name, param.default))
            for name, param in accepted.items()
        }
        object.__setattr__(self, "params", complete)

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_dict(self) -> dict[str, Any]:
        """`{"method", "params"}`, also the candidate's part of a recipe."""
        return {"method": self.method, "params": dict(self.params)}

    def to_json(self) -> str:
        """Canonical JSON: equal for equal candidates."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Candidate:
        """A candidate from configuration or a recipe; `params` may be left out. Raises MergeError."""
        unknown = sorted(set(data) - {"method", "params"})
        params = data.get("params", {})
        if unknown or not isinstance(data.get("method"), str) or not isinstance(params, Mapping):
            raise MergeError(f"a merge candidate is {{method, params}}, got {str(dict(data))[:200]}")
        return Candidate(data["method"], params)

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v:g}" for k, v in self.params.items())
        return f"{self.method}({inner})" if inner else self.method


def group_candidates(candidates: Sequence[Candidate]) -> dict[LiftSpec, list[Candidate]]:
    """The reductions that these candidates need, each with the candidates that are lowered from it.

    One reduction per trim density, with no more statistics than its candidates read: all methods without trimming,
    TIES at density 1 included, share one. Order of first appearance; repeated candidates appear once.
    """
    by_density: dict[float, list[Candidate]] = {}
    for candidate in dict.fromkeys(candidates):
        by_density.setdefault(candidate.params.get("density", 1.0), []).append(candidate)
    groups = {}
    for density, members in by_density.items():
        needs = {name for member in members for name in METHODS[member.method].needs}
        if not needs.isdisjoint(_SIGNED):
            if "count" in needs:
                needs.add("zero_count")
            needs -= {"sum", "count"}
        groups[LiftSpec(tuple(needs), density)] = members
    return groups


def trim(values: Tensor, density: float) -> Tensor:
    """Positions (int64, ascending) of the k = max(1, ⌊density·n⌋) largest |values| [n]; ties to the lower position."""
    n = values.numel()
    k = min(n, max(1, int(density * n)))
    if k == n:
        return torch.arange(n)
    magnitude = values.abs()
    threshold = magnitude.kthvalue(n - k + 1).values
    above = magnitude > threshold
    equal = (magnitude == threshold).nonzero().view(-1)[: k - int(above.sum())]
    above[equal] = True
    return above.nonzero().view(-1)


def lift(tensor: SparseTensor, spec: LiftSpec) -> TensorStatistics:
    """One expert's statistics on one tensor. Raises MergeError where a value is not finite."""
    indices, values = tensor.indices, tensor.values.float()
    if not bool(torch.isfinite(values).all()):
        raise MergeError("an expert's values contain NaN or infinity: it cannot be merged; retrain it")
    if spec.density < 1:
        kept = trim(values, spec.density)
        indices, values = indices[kept], values[kept]
    arrays = {name: _LIFTS[name](values) for name in spec.statistics}
    return TensorStatistics(tuple(tensor.shape), indices, arrays, 1)


def lower(statistics: TensorStatistics, n_experts: int, candidate: Candidate) -> SparseTensor:
    """The merged δ of one tensor on the union support, fp32.

    `n_experts` is the number of experts merged, those without this tensor included.
    """
    values = METHODS[candidate.method].lower(statistics, n_experts, candidate.params)
    return SparseTensor(statistics.shape, statistics.indices, values)


def _total(s: TensorStatistics) -> Tensor:
    return s.arrays["sum"] if "sum" in s.arrays else s.arrays["positive_mass"] + s.arrays["negative_mass"]


def _count(s: TensorStatistics) -> Tensor:
    if "count" in s.arrays:
        return s.arrays["count"].float()
    return s.arrays["positive_count"].float() + s.arrays["negative_count"].float() + s.arrays["zero_count"].float()


def _mean(s: TensorStatistics, n_experts: int, params: Mapping[str, float]) -> Tensor:
    return _total(s) / n_experts


def _overlap_mean(s: TensorStatistics, n_experts: int, params: Mapping[str, float]) -> Tensor:
    return _total(s) / _count(s)


def _task_arithmetic(s: TensorStatistics, n_experts: int, params: Mapping[str, float]) -> Tensor:
    return params["lambda"] * _total(s)


def _ties(s: TensorStatistics, n_experts: int, params: Mapping[str, float]) -> Tensor:
    a = s.arrays
    positive = a["positive_mass"] >= -a["negative_mass"]
    mass = torch.where(positive, a["positive_mass"], a["negative_mass"])
    count = torch.where(positive, a["positive_count"], a["negative_count"])
    return params["lambda"] * (mass / count.float().clamp_(min=1))


_SIGNED = ("positive_mass", "negative_mass", "positive_count", "negative_count")
_COUNT = count_dtype(1)
_LIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda v: v + 0.0,  # + 0.0 turns a stored -0.0 into 0.0, as joining does
    "count": lambda v: torch.ones_like(v, dtype=_COUNT),
    "positive_mass": lambda v: v.clamp(min=0) + 0.0,
    "negative_mass": lambda v: v.clamp(max=0) + 0.0,
    "positive_count": lambda v: (v > 0).to(_COUNT),
    "negative_count": lambda v: (v < 0).to(_COUNT),
    "zero_count": lambda v: (v == 0).to(_COUNT),
    "largest_magnitude": lambda v: v.abs(),
}

_LAMBDA = Param(default=1.0, high=10.0)
METHODS: dict[str, Method] = {
    "mean": Method({}, ("sum",), _mean),
    "overlap_mean": Method({}, ("sum", "count"), _overlap_mean),
    "task_arithmetic": Method({"lambda": Param(default=0.4, high=10.0)}, ("sum",), _task_arithmetic),
    "ties": Method({"lambda": _LAMBDA, "density": Param(default=1.0, high=1.0)}, _SIGNED, _ties),
}
"""All methods by name. Defaults without a validation set as in the TIES paper: λ 0.4 for task arithmetic, 1 for TIES.
TIES does not trim by default (an expert's support is sparse already), so that all methods share one reduction."""


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    """The end of an error message: the nearest known name, if any, and all known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Accepted: {', '.join(known) or 'none'}"
