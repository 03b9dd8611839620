"""What a merge is asked to do: candidates, the reductions they share, and in how many rounds. No tensors here.

A candidate is a method with its parameters and, where it takes them, a weight for each expert. What a candidate's lift
does is its `LiftSpec`; candidates with the same lift are lowered from one reduction.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from infra.errors import MergeError
from merge.methods.catalogue import METHODS, Options, Sparsify
from merge.methods.parameters import EVEN, Choice, Number, Params, Value, even_share, nearest
from merge.methods.statistic_table import STATISTICS, Lifted

__all__ = [
    "Candidate",
    "Choice",
    "LiftSpec",
    "Number",
    "Reduction",
    "candidate_lift",
    "check_candidate",
    "check_served",
    "check_without_model",
    "describe_plan",
    "plan_reductions",
    "shown_params",
]

LIFT_OPTIONS: dict[str, Number | Choice] = {
    "density": Number(1, 0, 1),
    "density_of": Choice("support", ("support", "tensor")),
    "epsilon": Number(0.1, 0, 1, low_allowed=True),
    "gamma": Number(0.01, 0, 1, low_allowed=True),
    "seed": Number(0, 0, 2**53, low_allowed=True, integer=True),
    "threshold": Number(0.4, 0, 10),
    "off_diagonal": Number(0.9, 0, 1, low_allowed=True),
    "rank_share": Number(0.05, 0, 1),
    "common_share": Number(0.8, 0, 1),
    "rank": Number(64, 1, 2**16, low_allowed=True, integer=True),
    "inputs": Choice("rows", ("rows", "tokens", "answers")),
}
"""What a lift can be told, with the widest accepted range."""

_COUNTS = {"positive_count", "negative_count", "zero_count"}
"""Their sum is the count: exactly, as long as they are whole numbers (not weighted)."""
_CONVEX_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A method with all its parameters, checked and completed with defaults. Hashable and picklable.

    `weights`: a number per expert name, or None. Raises MergeError for an unknown method or parameter (with the nearest
    known one), a value out of range, or weights that the method does not take; `check_candidate` compares it with
    the experts.
    """

    method: str
    params: Params = field(default_factory=dict)
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MergeError(f"unknown merge method {self.method!r}{nearest(self.method, _public())}")
        method = METHODS[self.method]
        for name in self.params:
            if name not in method.params:
                raise MergeError(
                    f"merge method {self.method!r} has no parameter {name!r}{nearest(str(name), method.params)}"
                )
        where = f"of merge method {self.method!r}"
        complete = {
            name: kind.check(f"parameter {name!r} {where}", self.params.get(name, kind.default))
            for name, kind in method.params.items()
        }
        wrong = method.check(complete) if method.check else None
        if wrong:
            raise MergeError(f"parameters {where}: {wrong}")
        object.__setattr__(self, "params", complete)
        if self.weights is not None:
            object.__setattr__(self, "weights", self._checked_weights(self.weights))

    def _checked_weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        kind = METHODS[self.method].weights
        if kind is None:
            takers = ", ".join(name for name in _public() if METHODS[name].weights)
            raise MergeError(f"merge method {self.method!r} takes no weights; methods that do: {takers}")
        accepted = "a finite number" if kind == "any" else "a finite number from 0"
        for name, weight in weights.items():
            good = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
            if not isinstance(name, str) or not good or (kind != "any" and weight < 0):
                raise MergeError(
                    f"weight of expert {name!r} for merge method {self.method!r} is {weight!r}; accepted: {accepted}"
                )
        return {name: float(weights[name]) for name in sorted(weights)}

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def reference(self) -> Candidate | None:
        """The candidate whose merged δ this one reads, or None for a method of one round."""
        make = METHODS[self.method].reference
        return Candidate(*make(self.params)) if make else None

    @property
    def splits_fused(self) -> bool:
        """Whether the parts of fused weights have to be known."""
        return self.params.get("parts") == "qkv"

    @property
    def rounds(self) -> int:
        """How many reductions follow one another until this candidate is merged."""
        reference = self.reference
        return 1 + (reference.rounds if reference else 0)

    def recipe(self) -> dict[str, Any]:
        """`{"method", "params"}`: the candidate's part of a key, which names no experts."""
        kinds = METHODS[self.method].params
        return {"method": self.method, "params": {k: v for k, v in self.params.items() if not kinds[k].unsaid(v)}}

    def to_dict(self) -> dict[str, Any]:
        """`recipe` with "weights" where there are any."""
        return self.recipe() | ({"weights": dict(self.weights)} if self.weights is not None else {})

    def to_json(self) -> str:
        """Canonical JSON: equal for equal candidates."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Candidate:
        """A candidate from configuration or `to_dict`; `params` and `weights` may be left out. Raises MergeError."""
        unknown = set(data) - {"method", "params", "weights"}
        params, weights = data.get("params", {}), data.get("weights")
        fits = isinstance(params, Mapping) and (weights is None or isinstance(weights, Mapping))
        if unknown or not isinstance(data.get("method"), str) or not fits:
            raise MergeError(f"a merge candidate is {{method, params, weights}}, got {str(dict(data))[:200]}")
        return Candidate(data["method"], params, weights)

    def __str__(self) -> str:
        shown = shown_params(self.method, self.params)
        parts = [f"{k}={v}" if isinstance(v, str) else f"{k}={v:g}" for k, v in shown.items()]
        if self.weights is not None:
            parts.append(f"weights {_weights_text(self.weights)}")
        return f"{self.method}({', '.join(parts)})" if parts else self.method


def shown_params(method: str, params: Params) -> dict[str, Value]:
    """The parameters that people are shown: all; of the many of a step on matrices λ, p and what is not the default."""
    known = METHODS.get(method)
    if known is None or not known.matrix:
        return dict(params)
    return {k: v for k, v in params.items() if k in ("lambda", "p") or v != known.params[k].default}


@dataclass(frozen=True)
class LiftSpec:
    """What one reduction computes: the statistics' names (sorted) and what is done to an expert's values before.

    `options` are sorted by name. `weights` multiply each expert's δ (None: none do); `reference` is the candidate whose
    merged δ the lift reads. Raises MergeError for unknown or repeated statistics or options out of range.
    """

    statistics: tuple[str, ...]
    sparsify: Sparsify = "none"
    options: Options = ()
    weights: tuple[tuple[str, float], ...] | None = None
    reference: Candidate | None = None

    def __post_init__(self) -> None:
        for name in self.statistics:
            if name not in STATISTICS:
                raise MergeError(f"unknown statistic {name!r}{nearest(name, STATISTICS)}")
        if not self.statistics or len(set(self.statistics)) != len(self.statistics):
            raise MergeError(f"statistics of a reduction must be distinct and at least one: {list(self.statistics)}")
        if self.sparsify not in get_args(Sparsify):
            raise MergeError(f"sparsify is {self.sparsify!r}; accepted: {', '.join(get_args(Sparsify))}")
        options = {}
        for name, value in self.options:
            if name not in LIFT_OPTIONS:
                raise MergeError(f"unknown option {name!r} of a reduction{nearest(name, LIFT_OPTIONS)}")
            options[name] = LIFT_OPTIONS[name].check(f"option {name!r} of a reduction", value)
        object.__setattr__(self, "statistics", tuple(sorted(self.statistics)))
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(sorted(self.weights)))

    @property
    def weighted(self) -> bool:
        """Whether each expert's δ is multiplied by a weight (counts are then sums of weights)."""
        return self.weights is not None

    def weight_of(self, name: str) -> float:
        """An expert's weight; 1 in a reduction without weights. Raises MergeError for an expert without one."""
        if self.weights is None:
            return 1.0
        for expert, weight in self.weights:
            if expert == name:
                return weight
        raise MergeError(f"expert {name!r} has no weight in this reduction")

    def option(self, name: str) -> Value:
        """An option's value. Raises MergeError where it is not set."""
        for key, value in self.options:
            if key == name:
                return value
        raise MergeError(f"this reduction sets no option {name!r}: {self}")

    @property
    def measurement(self) -> str | None:
        """Which measurement of an expert the lift reads beside its adapter."""
        kind = next((STATISTICS[name].measurement for name in self.statistics if STATISTICS[name].measurement), None)
        inputs = dict(self.options).get("inputs", "rows")
        return kind if kind is None or inputs == "rows" else f"{kind}_{inputs}"

    @property
    def support(self) -> Callable[[Lifted], Lifted] | None:
        """What becomes of an expert's positions before anything is lifted."""
        return next((STATISTICS[name].support for name in self.statistics if STATISTICS[name].support), None)

    def matrix_bytes(self, name: str, shape: Sequence[int], experts: int) -> int:
        """Bytes of the matrix statistics of one tensor, of that many experts."""
        extents = [STATISTICS[each].extent for each in self.statistics]
        return sum(4 * math.prod(extent(name, shape, dict(self.options), experts)) for extent in extents if extent)

    def recipe(self) -> dict[str, Any]:
        """JSON-able: what of this belongs in a node's key and file. Weights and reference are keyed apart."""
        return {
            "statistics": list(self.statistics),
            "sparsify": self.sparsify,
            "options": dict(self.options),
            "weighted": self.weighted,
        }

    @staticmethod
    def from_recipe(data: object) -> LiftSpec:
        """A LiftSpec with this `recipe` (no weight is known, there is no reference). Raises MergeError."""
        try:
            if not isinstance(data, Mapping) or set(data) != {"statistics", "sparsify", "options", "weighted"}:
                raise TypeError
            names, options, weighted = data["statistics"], data["options"], data["weighted"]
            if not isinstance(names, list) or not isinstance(options, dict) or not isinstance(weighted, bool):
                raise TypeError
            return LiftSpec(tuple(names), data["sparsify"], tuple(options.items()), () if weighted else None)
        except TypeError:
            raise MergeError(f"not a description of a reduction: {str(data)[:200]}") from None

    def __str__(self) -> str:
        values = ", ".join(f"{k}={v}" if isinstance(v, str) else f"{k}={v:g}" for k, v in self.options)
        parts = [f"{self.sparsify}({values})" if values else self.sparsify]
        parts += ["weighted"] if self.weighted else []
        parts += [f"after {self.reference}"] if self.reference else []
        return f"{'+'.join(self.statistics)} [{', '.join(parts)}]"


@dataclass(frozen=True)
class Reduction:
    """One pass over all experts: its lift, the candidates lowered from its root, and the round (from 1) it runs in."""

    spec: LiftSpec
    candidates: tuple[Candidate, ...]
    round: int


def candidate_lift(candidate: Candidate, experts: int | None = None) -> LiftSpec:
    """The reduction that this candidate alone needs, of that many experts (None: not known).

    Raises MergeError where required weights are missing, or where it depends on the number of experts and that is not
    known.
    """
    return _joint_lift([candidate], experts)


def _joint_lift(candidates: Sequence[Candidate], experts: int | None) -> LiftSpec:
    """One reduction for candidates that differ in the statistics they need only."""
    first = candidates[0]
    if METHODS[first.method].weights_required and first.weights is None:
        raise MergeError(f"merge method {first.method!r} needs a weight for each expert")
    sparsify, options = METHODS[first.method].lift(_for_experts(first, experts))
    needs = {name for candidate in candidates for name in METHODS[candidate.method].needs}
    # sums are never derived from masses: a candidate's bits must not depend on what it is merged beside
    if "count" in needs and first.weights is None and needs >= _COUNTS - {"zero_count"}:
        needs = (needs | _COUNTS) - {"count"}
    weights = tuple(first.weights.items()) if first.weights is not None else None
    return LiftSpec(tuple(needs), sparsify, options, weights, first.reference)


def _for_experts(candidate: Candidate, experts: int | None) -> Params:
    """The parameters with 1/N for the share `even`."""
    if EVEN not in candidate.params.values():
        return candidate.params
    if experts is None:
        raise MergeError(f"what {candidate} lifts depends on how many experts are merged, which is not known here")
    return {name: even_share(value, experts) if value == EVEN else value for name, value in candidate.params.items()}


def plan_reductions(candidates: Sequence[Candidate], experts: int | None = None) -> tuple[Reduction, ...]:
    """The fewest reductions that these candidates need of that many experts (None: not known, see `candidate_lift`), by
    round; within a round in order of first appearance.

    Candidates share a reduction where their lifts differ in the statistics only and read the same of an expert (its
    adapter, or a measurement too: nobody else waits for that). Candidates of earlier rounds that others read are
    included, repeated ones appear once; those that are made by running a model are in none. Every reduction holds no
    more statistics than its candidates read.
    """
    wanted: dict[Candidate, None] = {}
    for candidate in candidates:
        step: Candidate | None = candidate
        while step is not None:
            if not METHODS[step.method].by_model:
                wanted.setdefault(step)
            step = step.reference
    groups: dict[Hashable, list[Candidate]] = {}
    for candidate in sorted(wanted, key=lambda c: c.rounds):
        own = candidate_lift(candidate, experts)
        alike = replace(own, statistics=("sum",)), own.measurement, own.support
        groups.setdefault(alike, []).append(candidate)
    return tuple(
        Reduction(_joint_lift(members, experts), tuple(members), members[0].rounds) for members in groups.values()
    )


def check_without_model(candidate: Candidate) -> None:
    """Raise MergeError for a candidate that only a run of the pipeline can make."""
    if METHODS[candidate.method].by_model:
        raise MergeError(
            f"merge method {candidate.method!r} runs a model on rows of the experts' tasks: name it in "
            "merge.candidates of a run (`python -m pipeline run`), which has them"
        )


def describe_plan(reductions: Sequence[Reduction]) -> str:
    """The plan in words: how many reductions and rounds, and which candidates each reduction serves."""
    rounds = max((r.round for r in reductions), default=0)
    lines = [f"{_plural(len(reductions), 'reduction')}, {_plural(rounds, 'round')}:"]
    lines += [f"  round {r.round}: {r.spec} -> {', '.join(map(str, r.candidates))}" for r in reductions]
    if rounds > 1:
        lines.append("later rounds re-lift every expert when one of them changes")
    return "\n".join(lines)


def check_served(candidate: Candidate, spec: LiftSpec, experts: int | None = None) -> None:
    """Raise MergeError unless this candidate can be lowered from the reduction of that many experts."""
    own = candidate_lift(candidate, experts)
    served = set(spec.statistics)
    if served >= _COUNTS and not spec.weighted:
        served |= {"count"}
    if replace(own, statistics=spec.statistics) != spec or not set(own.statistics) <= served:
        raise MergeError(f"{candidate} cannot be lowered from the reduction {spec}: it needs {own}")


def check_candidate(candidate: Candidate, experts: Sequence[str]) -> None:
    """Raise MergeError where a candidate does not fit the experts.

    Weights that are missing, name other experts, lack some, or do not sum as they must; or an `at_least` that no
    position can reach.
    """
    method = METHODS[candidate.method]
    at_least = candidate.params.get("at_least", 0)
    if not isinstance(at_least, str) and at_least > len(experts):
        raise MergeError(
            f"parameter 'at_least' of merge method {candidate.method!r} is {at_least:g}, but "
            f"{_plural(len(experts), 'expert')} can agree at most: accepted are 1 to {len(experts)}"
        )
    what = f"weights of merge method {candidate.method!r}"
    if candidate.weights is None:
        if method.weights_required:
            raise MergeError(f"{what} are missing: give one for each of {', '.join(sorted(experts))}")
        return
    unknown = sorted(set(candidate.weights) - set(experts))
    if unknown:
        raise MergeError(f"{what} name {unknown[0]!r}, which is not merged{nearest(unknown[0], sorted(experts))}")
    lacking = sorted(set(experts) - set(candidate.weights))
    if lacking:
        raise MergeError(f"{what} lack {', '.join(lacking)}: every expert needs one")
    total = math.fsum(candidate.weights.values())
    if method.weights == "convex" and abs(total - 1) > _CONVEX_TOLERANCE:
        raise MergeError(f"{what} sum to {total:g}; accepted: 1 (within {_CONVEX_TOLERANCE:g})")
    if not any(candidate.weights.values()):
        raise MergeError(f"{what} are all 0: at least one must differ")


def _weights_text(weights: Mapping[str, float]) -> str:
    """The weights in words, abridged where they are many."""
    if len(weights) <= 4:
        return " ".join(f"{name}:{weight:g}" for name, weight in weights.items())
    text = json.dumps(dict(weights), sort_keys=True)
    return f"#{hashlib.sha256(text.encode()).hexdigest()[:8]} of {len(weights)} experts"


def _public() -> list[str]:
    return [name for name, method in METHODS.items() if not method.internal]


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"
