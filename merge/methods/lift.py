"""From one expert's tensor to its statistics, as a reduction's `LiftSpec` says.

In this order: values are thinned out (`merge.methods.sparsify`) and, where that was random, rescaled by 1 / keep
probability, so that their expectation stays (as in the papers of DARE and DELLA and in PEFT; mergekit by default
rescales to the L1 norm that the tensor had); they are multiplied by the expert's weight; and they become statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.methods.sparsify import breadcrumbs, drop, kept, magprune, trim, uniform
from merge.methods.specs import LiftSpec
from merge.methods.statistics import TensorStatistics, count_dtype, values_at
from workers.adapters.support import SparseTensor

LIFT_VERSION = 2
"""Part of the key of every node: raise it when one expert gives other statistics."""


@dataclass(frozen=True)
class LiftInput:
    """One tensor of one expert and what its lift may read beside it.

    `name` is the tensor's; `identity` seeds random choices (the expert's recipe key, or its name); `weight` is the
    expert's in a weighted reduction; `reference` is this tensor of the earlier round's merged δ (None: it has none);
    `fisher` fp32 [n] on the support, above 0; `gram` fp32 [in, in] of the module's inputs (None: it has none).
    """

    tensor: SparseTensor
    name: str
    identity: str
    weight: float = 1.0
    reference: SparseTensor | None = None
    fisher: Tensor | None = None
    gram: Tensor | None = None


def lift(item: LiftInput, spec: LiftSpec) -> TensorStatistics:
    """One expert's statistics on one tensor.

    Raises MergeError where a value is not finite, where a Fisher reduction is given no Fisher information, or where
    what it is given does not fit the tensor.
    """
    shape = tuple(item.tensor.shape)
    values = item.tensor.values.float() + 0.0  # + 0.0 turns a stored -0.0 into 0.0, as joining does
    if not _finite(values):
        raise MergeError("an expert's values contain NaN or infinity: it cannot be merged; retrain it")
    if spec.extra == "gram":
        indices, arrays = _regmean(item, values, spec)
    else:
        indices, values = _sparsify(item, values, spec)
        if spec.extra == "fisher":
            arrays = _fisher(item, values, spec)
        elif "agreeing_mass" in spec.statistics:
            indices, arrays = _sce(item, indices, values)
        else:
            lifted = _Lifted(values * item.weight + 0.0 if spec.weighted else values, indices, item, spec)
            arrays = {name: _LIFTS[name](lifted) for name in spec.statistics}
    return TensorStatistics(shape, indices, arrays, 1, spec.weighted)


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


@dataclass(frozen=True)
class _Lifted:
    """What the statistics of one expert are made of: its (weighted) values and where they lie."""

    values: Tensor
    indices: Tensor
    item: LiftInput
    spec: LiftSpec

    def counted(self, held: Tensor | None) -> Tensor:
        """1 (or the expert's weight) where `held`, or everywhere."""
        if self.spec.weighted:
            weights = torch.full_like(self.values, self.item.weight)
            return weights if held is None else weights * held
        return torch.ones_like(self.values, dtype=_COUNT) if held is None else held.view(_COUNT)

    def agreement(self) -> Tensor:
        """Where the TALL mask of the expert holds: |δ| ≥ threshold · |reference - δ| (arXiv 2405.07813)."""
        reference = values_at(self.item.reference, self.indices)
        threshold = float(self.spec.option("threshold"))
        return self.counted(tall_mask(self.values, reference, threshold))


def tall_mask(values: Tensor, merged: Tensor, threshold: float) -> Tensor:
    """TALL mask of a task, bool [n]: |δ| ≥ threshold · |merged - δ| (Wang et al., arXiv 2405.07813)."""
    return values.abs() >= threshold * (merged - values).abs()


def _fisher(item: LiftInput, values: Tensor, spec: LiftSpec) -> dict[str, Tensor]:
    """Σf and Σfδ (Matena and Raffel, arXiv 2111.09832), with a diagonal Fisher on the support."""
    fisher = item.fisher
    if fisher is None:
        raise MergeError("the expert has no Fisher information: fisher_on_support needs it of every expert")
    if fisher.shape != values.shape or not _finite(fisher) or (fisher.numel() and float(fisher.min()) <= 0):
        raise MergeError(
            f"Fisher information must be {values.numel()} finite numbers above 0, one for each value; "
            f"got {list(fisher.shape)}"
        )
    weights = fisher.float() * item.weight if spec.weighted else fisher.float()
    both = {"fisher": weights, "fisher_mass": weights * values}
    return {name: both[name] for name in spec.statistics}


def _regmean(item: LiftInput, values: Tensor, spec: LiftSpec) -> tuple[Tensor, dict[str, Tensor]]:
    """Support and statistics of RegMean (Jin et al., arXiv 2212.09849) on δ: Σδ, ΣδG̃, ΣG̃, and how many had a G.

    G̃ = a·G + (1 - a)·diag(G) with a = off_diagonal. δG̃ covers every position; without G it is left 0.
    """
    none = torch.zeros(0)
    if item.gram is None:
        arrays = {"sum": values, "gram_product": torch.zeros_like(values), "gram": none, "gram_count": none}
        return item.tensor.indices, arrays
    shape = item.tensor.shape
    if len(shape) != 2 or item.gram.shape != (shape[1], shape[1]) or not _finite(item.gram):
        raise MergeError(
            f"Gram matrix must be finite and [in, in] of a tensor [out, in]; got {list(item.gram.shape)} for "
            f"{list(shape)}"
        )
    gram = item.gram.float() * float(spec.option("off_diagonal"))
    gram.diagonal().copy_(item.gram.diagonal())
    dense = values
    if values.numel() != item.tensor.numel:
        dense = torch.zeros(item.tensor.numel).index_copy_(0, item.tensor.indices, values)
    product = (dense.view(*shape) @ gram).view(-1) + 0.0
    arrays = {"sum": dense, "gram_product": product, "gram": gram, "gram_count": torch.ones(1)}
    return torch.arange(item.tensor.numel), arrays


def _sce(item: LiftInput, indices: Tensor, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Support and statistics of SCE's second round (Wan et al., FuseChat, arXiv 2408.07990).

    The reference's support is the selection and its sign the elected one (zero counts as positive). The expert's weight
    is Σδ² over the selected positions of this tensor: the paper divides it by the tensor's size and by the sum over the
    experts, which cancels where the merged δ divides by the agreeing weights.
    """
    if item.reference is None:
        none = torch.zeros(0)
        return indices[:0], {"agreeing_mass": none, "agreeing_weight": none}
    held = torch.zeros(item.tensor.numel, dtype=torch.bool).index_fill_(0, item.reference.indices, True)[indices]
    indices, values = indices[held], values[held]
    elected = values_at(item.reference, indices) >= 0
    agrees = torch.where(elected, values > 0, values < 0)
    weight = float(values.double().square().sum())
    return indices, {"agreeing_mass": values * weight * agrees + 0.0, "agreeing_weight": agrees * weight}


def _finite(values: Tensor) -> bool:
    # a finite sum has finite terms; an infinite one may have overflowed
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


_COUNT = count_dtype(1)
_LIFTS: dict[str, Callable[[_Lifted], Tensor]] = {
    "sum": lambda x: x.values,
    "count": lambda x: x.counted(None),
    "positive_mass": lambda x: x.values.clamp(min=0),
    "negative_mass": lambda x: x.values.clamp(max=0),
    "positive_count": lambda x: x.counted(x.values > 0),
    "negative_count": lambda x: x.counted(x.values < 0),
    "zero_count": lambda x: x.counted(x.values == 0),
    "square_sum": lambda x: x.values.square(),
    "positive_max": lambda x: x.values.clamp(min=0),
    "negative_max": lambda x: (-x.values).clamp(min=0) + 0.0,
    "agreement_count": lambda x: x.agreement(),
}
