"""Masks: which linear modules are adapted and which positions of each are selected.

Criteria: ``random`` (a uniform draw, seeded per tensor from the tensor's name, the same on every device) and
``connection_sensitivity`` (largest |(W + delta) * dLoss/dW|). Granularity: single elements or whole aligned blocks
(block score = sum over the block). The budget is per tensor: k = max(1, round(density * units)), exactly k units, ties
to the lower index. Scores are streamed: each layer's dense gradient is reduced to its top units inside that layer's
backward, so one dense score is alive at a time.
Does not cover training on the support (``workers.inplace``). Sources: arXiv 2507.07140 (criteria, blocks), 2502.15975
(random).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from infra.errors import ConfigError, FactoryError
from workers.sparse_linear import swap_forward, weight_gradient
from workers.support import Block, SupportSpec, unit_grid
from workers.tying import tied_names

__all__ = [
    "MaskSpec",
    "SupportSpec",
    "match_modules",
    "random_indices",
    "random_units",
    "score_modules",
    "select_supports",
    "tensor_seed",
    "top_indices",
    "top_units",
]


@dataclass(frozen=True)
class MaskSpec:
    """How a support is chosen.

    ``density`` in (0, 1]; ``modules`` a regular expression that must match a whole module name; ``reselect_every``
    optimizer steps between selections (None: once). Raises ``ConfigError`` for values outside what is accepted.
    """

    criterion: Literal["random", "connection_sensitivity"]
    granularity: Literal["element", "block"]
    density: float
    block_size: Block = (16, 16)
    modules: str = r".*(q_proj|k_proj|v_proj|o_proj)"
    reselect_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in ("random", "connection_sensitivity"):
            raise ConfigError(f"mask criterion {self.criterion!r}: accepted are random, connection_sensitivity")
        if self.granularity not in ("element", "block"):
            raise ConfigError(f"mask granularity {self.granularity!r}: accepted are element, block")
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"mask density {self.density}: accepted is more than 0 and at most 1")
        if len(self.block_size) != 2 or min(self.block_size) < 1:
            raise ConfigError(f"mask block_size {self.block_size}: accepted are two positive sides, as [16, 16]")
        if self.reselect_every is not None and self.reselect_every < 1:
            raise ConfigError(f"mask reselect_every {self.reselect_every}: accepted is 1 or more, or null")

    @property
    def block(self) -> Block | None:
        """The block size, None for elements."""
        return self.block_size if self.granularity == "block" else None


def match_modules(model: nn.Module, pattern: str) -> dict[str, nn.Linear]:
    """Linear modules whose whole name matches ``pattern``, in model order.

    ``ConfigError`` for an invalid expression, for no match (lists some names), and for a weight shared with another
    module.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"modules {pattern!r} is not a regular expression: {error}") from None
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: module for name, module in linear.items() if regex.fullmatch(name)}
    if not found:
        some = sorted(linear, key=lambda name: (name.count("."), name))[:4] + list(linear)[:8]
        names = ", ".join(dict.fromkeys(some)) or "none"
        raise ConfigError(f"modules {pattern!r} matches no whole name of a linear module; some of them: {names}")
    for name, others in tied_names(model, [f"{name}.weight" for name in found]).items():
        raise ConfigError(
            f"modules {pattern!r} selects {name}, which shares its memory with {', '.join(others)}: "
            "a tied weight cannot be adapted; narrow the expression"
        )
    return found


def tensor_seed(seed: int, tensor_name: str) -> int:
    """63-bit seed of one tensor: the head of SHA-256 of ``"<seed>:<tensor name>"``."""
    digest = hashlib.sha256(f"{seed}:{tensor_name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def budget(units: int, density: float) -> int:
    """Selected units of one tensor: max(1, round(density * units))."""
    return min(units, max(1, round(density * units)))


def random_units(
    shape: tuple[int, ...], density: float, seed: int, tensor_name: str, block: Block | None = None
) -> torch.Tensor:
    """A uniform draw of exactly the budgeted units: int64 [k] on the CPU, sorted, the same on every device."""
    rows, cols = unit_grid(shape, block, tensor_name)
    total = rows * cols
    count = budget(total, density)
    generator = torch.Generator().manual_seed(tensor_seed(seed, tensor_name))
    drawn = min(count, total - count)
    ids = torch.empty(0, dtype=torch.int64)
    while ids.numel() < drawn:
        more = (drawn - ids.numel()) * 11 // 10 + 16
        ids = torch.unique(torch.cat([ids, torch.randint(total, (more,), generator=generator)]))
    ids = ids[torch.randperm(ids.numel(), generator=generator)[:drawn]]
    if drawn == count:
        return ids.sort().values
    kept = torch.ones(total, dtype=torch.bool)
    kept[ids] = False
    return kept.nonzero().view(-1)


def top_units(score: torch.Tensor, density: float, block: Block | None = None, name: str = "score") -> torch.Tensor:
    """The budgeted units with the largest score, ties to the lower index: int64 [k], sorted, on the score's device.

    ``score``: [out, in], not negative. ``FactoryError`` when a score is not finite (the loss or its gradient is not).
    """
    rows, cols = unit_grid(tuple(score.shape), block, name)
    if block is not None:
        score = score.view(rows, block[0], cols, block[1]).sum((1, 3))
    flat = score.reshape(-1)
    count = budget(flat.numel(), density)
    top = torch.topk(flat, count, sorted=False).values
    if not bool(torch.isfinite(top).all()):
        raise FactoryError(f"{name}: the mask scores are not finite; lower the learning rate or check the data")
    threshold = top.min()
    above = (flat > threshold).nonzero().view(-1)
    level = (flat == threshold).nonzero().view(-1)[: count - above.numel()]
    return torch.cat([above, level]).sort().values


def random_indices(
    shape: tuple[int, ...], density: float, seed: int, tensor_name: str, block: Block | None = None
) -> torch.Tensor:
    """:func:`random_units` as sorted flat element positions."""
    return _elements(shape, random_units(shape, density, seed, tensor_name, block), block)


def top_indices(score: torch.Tensor, density: float, block: Block | None = None) -> torch.Tensor:
    """:func:`top_units` as sorted flat element positions, on the CPU."""
    return _elements(tuple(score.shape), top_units(score, density, block).cpu(), block)


def _elements(shape: tuple[int, ...], units: torch.Tensor, block: Block | None) -> torch.Tensor:
    return SupportSpec((shape[0], shape[1]), units, block).indices()


class _ScoreLinear(torch.autograd.Function):
    """The linear map of a frozen weight; its backward selects the units of this layer and keeps only them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        take: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.take = take
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.take(weight_gradient(grad, x).float().mul_(weight).abs_())
        return grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None, None, None, None, None


def score_modules(
    model: nn.Module, modules: Mapping[str, nn.Linear], loss_fn: Callable[[], torch.Tensor], spec: MaskSpec
) -> dict[str, SupportSpec]:
    """Supports by connection sensitivity at the current weights (W + delta while an adapter is attached).

    Runs ``loss_fn`` and one backward through frozen weights. No gradient is left on the model, and an attached
    adapter's gradient is unchanged when it adapts no module outside ``modules``. ``ConfigError`` for blocks that do
    not divide a shape, or a module that the loss does not reach or reaches twice.
    """
    for name, module in modules.items():
        unit_grid(tuple(module.weight.shape), spec.block, f"{name}.weight")
    chosen: dict[str, SupportSpec] = {}
    anchor = torch.zeros((), requires_grad=True)

    def taker(name: str) -> Callable[[torch.Tensor], None]:
        def take(score: torch.Tensor) -> None:
            if name in chosen:
                raise ConfigError(f"{name} is used more than once in a forward pass: it cannot be scored")
            units = top_units(score, spec.density, spec.block, f"{name}.weight").cpu()
            chosen[name] = SupportSpec((score.shape[0], score.shape[1]), units, spec.block)

        return take

    def scored(module: nn.Linear, take: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: _ScoreLinear.apply(x, anchor, module.weight, module.bias, take)

    undo: list[Callable[[], None]] = []
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for name, module in modules.items():
            undo.append(swap_forward(module, scored(module, taker(name))))
        with torch.enable_grad():
            loss_fn().backward()
    finally:
        for step in reversed(undo):
            step()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if missing := [name for name in modules if name not in chosen]:
        raise ConfigError(f"the loss does not depend on {missing[0]}: it cannot be scored")
    return {name: chosen[name] for name in modules}


def select_supports(
    model: nn.Module, spec: MaskSpec, loss_fn: Callable[[], torch.Tensor] | None = None
) -> dict[str, SupportSpec]:
    """Match modules and choose their supports as ``spec`` says; ``loss_fn`` is needed by connection sensitivity."""
    modules = match_modules(model, spec.modules)
    if spec.criterion == "random":
        return {
            name: SupportSpec(
                (module.weight.shape[0], module.weight.shape[1]),
                random_units(tuple(module.weight.shape), spec.density, spec.seed, f"{name}.weight", spec.block),
                spec.block,
            )
            for name, module in modules.items()
        }
    if loss_fn is None:
        raise ConfigError("criterion connection_sensitivity needs a loss to score the weights with")
    return score_modules(model, modules, loss_fn, spec)
