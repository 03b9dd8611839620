"""From one expert's tensor to its statistics, as a reduction's `LiftSpec` says.

In this order: values are thinned out (`merge.methods.sparsify`) and, where that was random, rescaled by 1 / keep
probability, so that their expectation stays (as in the papers of DARE and DELLA and in PEFT; mergekit by default
rescales to the L1 norm that the tensor had); they are multiplied by the expert's weight; and they become statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from infra.errors import MergeError
from merge.methods.once import Once
from merge.methods.sparsify import breadcrumbs, drop, kept, magprune, trim, uniform
from merge.methods.specs import LiftSpec
from merge.methods.statistic_table import STATISTICS, Lifted, finite
from merge.methods.statistics import TensorStatistics
from workers.adapters.support import SparseTensor

LIFT_VERSION = 2
"""Part of the key of every node: raise it when one expert gives other statistics."""


@dataclass(frozen=True)
class LiftInput:
    """One tensor of one expert and what its lift may read beside it.

    `name` is the tensor's; `identity` seeds random choices (the expert's recipe key, or its name); `weight` is the
    expert's in a weighted reduction; `reference` is this tensor of the earlier round's merged δ (None: it has none);
    `measured` is what the reduction's measurement has of the tensor (None: nothing); `once` is shared by all lifts of
    the tensor.
    """

    tensor: SparseTensor
    name: str
    identity: str
    weight: float = 1.0
    reference: SparseTensor | None = None
    measured: Tensor | None = None
    once: Once = field(default_factory=Once)


def lift(item: LiftInput, spec: LiftSpec) -> TensorStatistics:
    """One expert's statistics on one tensor.

    Raises MergeError where a value is not finite, or where what was measured is missing or does not fit the tensor.
    """
    shape = tuple(item.tensor.shape)
    values = item.tensor.values.float() + 0.0  # + 0.0 turns a stored -0.0 into 0.0, as joining does
    if not finite(values):
        raise MergeError("an expert's values contain NaN or infinity: it cannot be merged; retrain it")
    indices, values = _sparsify(item, values, spec)
    weight = item.weight if spec.weighted else None
    lifted = Lifted(
        shape, indices, values, weight, item.reference, item.measured, dict(spec.options), item.name, once=item.once
    )
    if spec.support is not None:
        lifted = spec.support(lifted)
    arrays = {name: STATISTICS[name].lift(lifted) for name in spec.statistics}
    return TensorStatistics(shape, lifted.indices, arrays, 1, spec.weighted)


def _sparsify(item: LiftInput, values: Tensor, spec: LiftSpec) -> tuple[Tensor, Tensor]:
    """Indices and values that stay, rescaled where they were drawn."""
    indices = item.tensor.indices
    if spec.sparsify == "none":
        return indices, values
    density = float(spec.option("density"))
    probabilities: Tensor | float = 1.0
    if spec.sparsify in ("trim", "breadcrumbs"):
        size = item.tensor.numel if spec.option("density_of") == "tensor" else values.numel()
        if spec.sparsify == "trim":
            keep = kept(density, size)
            if keep >= values.numel():
                return indices, values
            chosen = trim(values, keep)
        else:
            chosen = breadcrumbs(values, size, density, float(spec.option("gamma")))
        return indices[chosen], values[chosen]
    uniforms = uniform(int(spec.option("seed")), item.identity, item.name, values.numel())
    if spec.sparsify == "drop":
        chosen = drop(uniforms, density)
        return indices[chosen], values[chosen] / density
    shape = item.tensor.shape
    width = item.tensor.numel // shape[0] if len(shape) > 1 and shape[0] else max(1, item.tensor.numel)
    probabilities = magprune(values, indices // width, density, float(spec.option("epsilon")))
    chosen = drop(uniforms, probabilities)
    return indices[chosen], values[chosen] / probabilities[chosen]
