"""The linear map of a weight that is trained on a support, and the products behind its gradient.

The forward is the frozen model's own. The backward returns the input gradient and adds the gradient of the values into
the module's ranges of one flat buffer: for elements by one dense product that lives as long as this layer's backward,
then a gather; for blocks by products of the two strips that meet in each block, never a dense gradient unless the
density is so high that the dense product is cheaper (see :func:`dense_is_cheaper`).
Does not cover who owns the buffers (``workers.inplace``). Gradients of gradients are not supported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from infra.errors import ConfigError
from workers.support import Block

BMM_ELEMENTS = 2**24
"""Gathered elements of one batched product, which bounds its memory."""


def dense_is_cheaper(block: Block, density: float) -> bool:
    """Whether one dense product beats products per block.

    Small blocks use a core at side / (side + 80) of its dense speed: 17 % at 16x16 and 29 % at 32x32 were
    measured with fp32 on the CPU for 400 to 1000 tokens, so 16x16 blocks are cheaper up to a density of about 0.17.
    """
    side = (block[0] * block[1]) ** 0.5
    return density >= side / (side + 80.0)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Dense gradient [out, in] of a linear weight from the output gradient [..., out] and the input [..., in]."""
    g = grad.reshape(-1, grad.shape[-1])
    return torch.mm(g.t(), x.reshape(-1, x.shape[-1]).to(g.dtype), out=out)


def block_gradient(grad: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, block: Block, into: torch.Tensor) -> None:
    """Add the gradient of the blocks ``ids`` (integers [k]) into ``into`` [k, rows, columns].

    On a CPU with few threads: one product of two strided strips per block, nothing gathered. Else batched products of
    gathered strips, in chunks of at most ``BMM_ELEMENTS``.
    """
    height, width = block
    g = grad.reshape(-1, grad.shape[-1])
    x = x.reshape(-1, x.shape[-1]).to(g.dtype)
    rows, cols = ids // (x.shape[1] // width), ids % (x.shape[1] // width)
    if g.device.type == "cpu" and torch.get_num_threads() <= 4:
        g_strips, x_strips = g.t().split(height), x.split(width, 1)
        direct = into.dtype == g.dtype
        out = into if direct else torch.empty(into.shape, dtype=g.dtype)
        for row, col, target in zip(rows.tolist(), cols.tolist(), out.unbind(), strict=True):
            if direct:
                target.addmm_(g_strips[row], x_strips[col])
            else:
                torch.mm(g_strips[row], x_strips[col], out=target)
        if not direct:
            into.add_(out)
        return
    tokens = g.shape[0]
    chunk = max(1, BMM_ELEMENTS // max(1, tokens * (height + width)))
    g_strips3, x_strips3 = g.view(tokens, -1, height), x.view(tokens, -1, width)
    for begin in range(0, ids.numel(), chunk):
        part = slice(begin, begin + chunk)
        left = g_strips3.index_select(1, rows[part]).permute(1, 2, 0)
        right = x_strips3.index_select(1, cols[part]).transpose(0, 1)
        into[part].add_(torch.bmm(left, right))


@dataclass
class Part:
    """Units of one module in one selection generation: flat positions ``start:stop`` hold their values.

    ``units``: int32 (int64 for weights of 2**31 elements or more) on the weight's device, element positions or block
    ids.
    """

    units: torch.Tensor
    start: int
    stop: int


@dataclass
class Slot:
    """One adapted module: where its values are, and how its weight is read and written on the support."""

    name: str
    module: nn.Linear
    block: Block | None
    parts: list[Part]
    flat_grad: torch.Tensor
    before_backward: Callable[[], None]
    scratch: Callable[[torch.Tensor, torch.dtype], torch.Tensor | None]
    restore_forward: Callable[[], None] = field(default=lambda: None)

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight

    @property
    def area(self) -> int:
        """Elements of one unit."""
        return 1 if self.block is None else self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        return sum(part.stop - part.start for part in self.parts) / max(1, self.weight.numel())

    def _grid(self, tensor: torch.Tensor, block: Block) -> torch.Tensor:
        """View [out, in] as [block rows, block columns, rows, columns]."""
        height, width = block
        return tensor.view(tensor.shape[0] // height, height, tensor.shape[1] // width, width).permute(0, 2, 1, 3)

    def gather(self, tensor: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Elements of contiguous [out, in] ``tensor`` at ``units`` as [k] (element) or [k * area] (block layout)."""
        if self.block is None:
            return tensor.view(-1).index_select(0, units)
        cols = tensor.shape[1] // self.block[1]
        return self._grid(tensor, self.block)[units // cols, units % cols].reshape(-1)

    def write(self, units: torch.Tensor, values: torch.Tensor) -> None:
        """Set the weight at ``units``; bumps its version, so a graph that still needs the old weight fails loudly."""
        with torch.no_grad():
            if self.block is None:
                self.weight.detach().view(-1).index_put_((units,), values)
                return
            cols = self.weight.shape[1] // self.block[1]
            grid = self._grid(self.weight.detach(), self.block)
            grid.index_put_((units // cols, units % cols), values.view(units.numel(), *self.block))

    def accumulate(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Add this call's gradient of the values to the flat gradient."""
        self.before_backward()
        if self.block is not None and not dense_is_cheaper(self.block, self.density):
            for part in self.parts:
                into = self.flat_grad[part.start : part.stop].view(-1, *self.block)
                block_gradient(grad, x, part.units, self.block, into)
            return
        dense = weight_gradient(grad, x, self.scratch(self.weight, grad.dtype))
        for part in self.parts:
            self.flat_grad[part.start : part.stop].add_(self.gather(dense, part.units))


class SparseLinear(torch.autograd.Function):
    """``linear(x, weight, bias)`` whose weight gradient goes to ``slot``.

    ``values`` takes no part in the product: being an input that requires a gradient, it makes autograd call the
    backward of every adapted module, also of the ones whose input needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, slot: Slot
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.slot = slot
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        ctx.slot.accumulate(grad, x)
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias, None


def swap_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace ``module.forward`` on the instance; returns what puts the previous one back."""
    own = "forward" in module.__dict__
    previous = module.__dict__.get("forward")
    object.__setattr__(module, "forward", forward)

    def restore() -> None:
        if own:
            object.__setattr__(module, "forward", previous)
        else:
            module.__dict__.pop("forward", None)

    return restore


def check_module(name: str, module: nn.Module) -> nn.Linear:
    """The module as a plain linear module that can be trained in place, or ``ConfigError`` with the reason."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ConfigError(f"{name} is a {type(module).__name__}: only plain linear modules can be trained in place")
    if "forward" in module.__dict__:
        raise ConfigError(f"{name}: its forward is already replaced; detach the other adapter first")
    weight = module.weight
    if weight.device.type == "meta" or not weight.is_floating_point() or not weight.is_contiguous():
        raise ConfigError(
            f"{name}: its weight must be a contiguous floating point tensor in memory, "
            f"got {weight.dtype} on {weight.device}"
        )
    return module
