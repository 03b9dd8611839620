"""Scores of the weights of linear modules: how much each one matters, by one of four measures.

All scores are taken at the current weights (W + delta while an adapter is attached) and are not negative:

- ``magnitude`` |W|; needs no data.
- ``gradient`` |dL/dW| and ``connection_sensitivity`` |W * dL/dW| (arXiv 2507.07140), L being the mean of the batches'
  losses.
- ``fisher``: the diagonal of the empirical Fisher matrix, the mean over examples of the squared gradient of an
  example's loss, exact from one backward: each module's backward forms the gradient of one example at a time. A
  batch's loss is taken to be the mean over its examples; where it is a mean over tokens, an example's gradient is
  weighted by its share of the tokens.

One batch: scores are streamed, each layer's dense score lives in that layer's backward only. Several batches: an fp32
accumulator of each module's weight lives until the scores are dropped.
Does not cover the choice of units by their scores (``workers.masks.selection``, ``workers.masks.global_budget``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from infra.errors import ConfigError
from workers.base.hooks import swap_forward
from workers.base.modules import Target
from workers.masks.global_budget import Scan, Take
from workers.masks.sparse_linear import ObservedLinear, weight_gradient

Criterion = Literal["magnitude", "gradient", "connection_sensitivity", "fisher"]
Loss = Callable[[], torch.Tensor]
Measure = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""(module name, output gradient [..., rows], input [..., in]) to fp32 [rows, in]."""


def score_scan(model: nn.Module, targets: Mapping[str, Target], criterion: Criterion, losses: Sequence[Loss]) -> Scan:
    """A function that passes the fp32 score [rows, in] of each target, one at a time, to its argument.

    With one loss every call runs it forward and backward through frozen weights; with several they run now, once. No
    gradient is left on the model, and an attached adapter's gradient is unchanged when it adapts no module outside
    ``targets``. The receiver may not change a score. ``ConfigError`` for a module that a loss does not reach or
    reaches twice, and, for ``fisher``, for an input without a rows dimension.
    """
    if criterion == "magnitude":
        return lambda take: _each_weight(targets, take)
    measure: Measure = _squares if criterion == "fisher" else _gradient

    def finish(name: str, measured: torch.Tensor) -> torch.Tensor:
        """Score of the accumulated measure, in its memory."""
        if criterion == "connection_sensitivity":
            measured.mul_(_weight(targets[name]))
        return measured if criterion == "fisher" else measured.abs_()

    if len(losses) == 1:
        return lambda take: _backward(model, targets, losses[0], measure, lambda n, m: take(n, finish(n, m)))
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, measured: torch.Tensor) -> None:
        if name in sums:
            sums[name].add_(measured)
        else:
            sums[name] = measured

    for loss in losses:
        _backward(model, targets, loss, measure, add)
    for name, measured in sums.items():
        finish(name, measured)

    def accumulated(take: Take) -> None:
        for name in targets:
            take(name, sums[name])

    return accumulated


def _weight(target: Target) -> torch.Tensor:
    """The rows of the weight that may be chosen, [rows, in]."""
    weight = target.module.weight.detach()
    return weight if target.rows is None else weight[target.rows.start : target.rows.stop]


def _each_weight(targets: Mapping[str, Target], take: Take) -> None:
    for name, target in targets.items():
        take(name, _weight(target).float().abs())


def _gradient(name: str, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return weight_gradient(grad, x).float()


def _squares(name: str, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sum over the examples of the squared gradient of an example's loss; the number of examples undoes the mean."""
    if x.ndim < 3:
        raise ConfigError(
            f"{name}: its input has shape {list(x.shape)}, not [rows, length, in], so its gradient cannot be told "
            "apart by example; leave this module out, or choose another criterion than fisher"
        )
    total = torch.zeros(grad.shape[-1], x.shape[-1], dtype=torch.float32, device=grad.device)
    product = torch.empty(total.shape, dtype=grad.dtype, device=grad.device)
    for row_grad, row_x in zip(grad, x, strict=True):
        weight_gradient(row_grad, row_x, product)
        total.addcmul_(product, product, value=float(x.shape[0]) ** 2)
    return total


def _backward(model: nn.Module, targets: Mapping[str, Target], loss: Loss, measure: Measure, take: Take) -> None:
    """One forward and backward; ``take`` gets each target's measure inside that module's backward."""
    done: set[str] = set()
    anchor = torch.zeros((), requires_grad=True)

    def scored(name: str, target: Target) -> Callable[[torch.Tensor], torch.Tensor]:
        rows, module = target.rows, target.module

        def seen(grad: torch.Tensor, x: torch.Tensor) -> None:
            if name in done:
                raise ConfigError(f"{name} is used more than once in a forward pass: it cannot be scored")
            done.add(name)
            take(name, measure(name, grad if rows is None else grad[..., rows.start : rows.stop], x))

        return lambda x: ObservedLinear.apply(x, anchor, module.weight, module.bias, seen)

    undo: list[Callable[[], None]] = []
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for name, target in targets.items():
            undo.append(swap_forward(target.module, scored(name, target)))
        with torch.enable_grad():
            loss().backward()
    finally:
        for step in reversed(undo):
            step()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if missing := [name for name in targets if name not in done]:
        raise ConfigError(f"the loss does not depend on {missing[0]}: it cannot be scored")
