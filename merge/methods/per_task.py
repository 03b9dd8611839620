"""Task masks of the methods that know the task at inference: one merged δ for all and a light mask for each expert.

EMR (Huang et al., EMR-Merging, arXiv 2405.17461): the mask holds where the expert's δ and the unified δ have one sign;
the masked unified δ is rescaled to the expert's L1 norm. TALL (Wang et al., arXiv 2405.07813): the mask holds where
|δ| ≥ threshold · |unified - δ|; nothing is rescaled.

Masks are made tensor by tensor; the scale is one number per expert over all its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.methods.catalogue import METHODS
from merge.methods.parameters import Params, number
from merge.methods.statistic_table import tall_mask, values_at
from workers.adapters.support import SparseTensor

PER_TASK_VERSION = 1
"""Part of the key of every task mask: raise it when the same adapters give another mask or scale."""


@dataclass(frozen=True)
class TaskMask:
    """One tensor's mask of one expert.

    `bits` bool over the unified tensor's indices; `expert_mass` is Σ|δ| of the expert, `kept_mass` Σ|unified| under the
    mask, both in double precision.
    """

    bits: Tensor
    expert_mass: float
    kept_mass: float


def task_mask(method: str, unified: SparseTensor, expert: SparseTensor, params: Params) -> TaskMask:
    """The mask of `expert`'s task over the merged δ `unified` of one tensor.

    Positions where the unified δ is 0 are never in a mask: they would add nothing. Raises MergeError for a method
    without task masks and for tensors of different shapes.
    """
    _check_per_task(method)
    if tuple(unified.shape) != tuple(expert.shape):
        raise MergeError(f"task mask of a tensor of shape {list(expert.shape)} over one of {list(unified.shape)}")
    merged = unified.values.float()
    own = values_at(expert, unified.indices)
    if method == "emr":
        bits = (own * merged.sign()) > 0  # signs, as the product of two small numbers may be 0
    else:
        bits = tall_mask(own, merged, number(params, "threshold")) & (merged != 0)
    return TaskMask(bits, _mass(expert.values), _mass(merged[bits]))


def task_scale(method: str, masks: Iterable[TaskMask]) -> float:
    """What the masked δ of one expert is multiplied by, from the masks of all its tensors.

    EMR: Σ|δ| / Σ|masked unified δ| over all of them (1 where nothing is kept); TALL: 1.
    """
    _check_per_task(method)
    if method != "emr":
        return 1.0
    expert = kept = 0.0
    for mask in masks:
        expert, kept = expert + mask.expert_mass, kept + mask.kept_mass
    return expert / kept if kept else 1.0


def _check_per_task(method: str) -> None:
    if method not in METHODS or not METHODS[method].per_task:
        known = ", ".join(name for name, each in METHODS.items() if each.per_task)
        raise MergeError(f"merge method {method!r} has no task masks; methods that do: {known}")


def _mass(values: Tensor) -> float:
    return float(values.abs().sum(dtype=torch.float64))
