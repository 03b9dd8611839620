"""The linear map of a weight that is trained on a support, and the products behind its gradient.

The forward is the frozen model's own. The backward returns the input gradient and adds the gradient of the values into
the module's ranges of one flat buffer. Which products make it depends on the support:

- whole rows, whole columns, every position: one product of exactly the gradient's size, straight into the buffer;
- blocks: products of the two strips that meet in each block, never a dense gradient unless the density is so high
  that the dense product is cheaper (see :func:`dense_is_cheaper`);
- elements: one dense product that lives as long as this layer's backward, then a gather.

Nothing here waits for a CUDA device. Does not cover who owns the buffers (``workers.training.in_place``). Gradients of
gradients are not supported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from workers.adapters.support import Block

BMM_ELEMENTS = 2**24
"""Gathered elements of one batched product, which bounds its memory."""
CPU_BMM_ELEMENTS = 2**19
"""The same on the CPU: buffers of 2 MiB and more come as fresh pages each time (see ``workers.base.memory``)."""
CPU_BMM_TOKENS = 256
"""Tokens of one batched product on the CPU, so that the gathered strips stay in its caches."""
CPU_LOOP_TOKENS = 256
"""Beyond it, one product per block is not slower than batched ones on a CPU with few threads. In whole steps, 16x16 on
all linear modules of SmolLM2's shape: batched 8 % of the floor faster at 128 tokens, 1 % at 256, equal at 384."""


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


def add_product(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
    """``into`` += left @ right; with ``into`` of another dtype the product is rounded to the operands' dtype first."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into.add_(left @ right)


def row_gradient(grad: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None, into: torch.Tensor) -> None:
    """Add the gradient of the weight's ``rows`` (integers [k], None for all) into ``into`` [k, in]."""
    g = grad.reshape(-1, grad.shape[-1])
    left = g if rows is None else g.index_select(1, rows)
    add_product(left.t(), x.reshape(-1, x.shape[-1]).to(g.dtype), into)


def column_gradient(grad: torch.Tensor, x: torch.Tensor, columns: torch.Tensor, into: torch.Tensor) -> None:
    """Add the gradient of the weight's ``columns`` (integers [k]) into ``into`` [k, out]."""
    g = grad.reshape(-1, grad.shape[-1])
    chosen = x.reshape(-1, x.shape[-1]).index_select(1, columns).to(g.dtype)
    add_product(chosen.t(), g, into)


def block_gradient(grad: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, block: Block, into: torch.Tensor) -> None:
    """Add the gradient of the blocks ``ids`` (integers [k]) into ``into`` [k, rows, columns].

    On a CPU with few threads and many tokens: one product of two strided strips per block, nothing gathered. Else
    batched products of gathered strips.
    """
    g = grad.reshape(-1, grad.shape[-1])
    x = x.reshape(-1, x.shape[-1]).to(g.dtype)
    grid_columns = x.shape[1] // block[1]
    rows, columns = ids // grid_columns, ids % grid_columns
    few_threads = g.device.type == "cpu" and torch.get_num_threads() <= 4
    if few_threads and g.shape[0] > CPU_LOOP_TOKENS:
        _looped(g, x, rows, columns, block, into)
    else:
        _batched(g, x, rows, columns, block, into)


def _looped(
    g: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, block: Block, into: torch.Tensor
) -> None:
    direct = into.dtype == g.dtype
    out = into if direct else torch.zeros(into.shape, dtype=g.dtype)
    g_strips = g.t().view(-1, block[0], g.shape[0]).unbind()  # half the cost of split
    x_strips = x.view(x.shape[0], -1, block[1]).unbind(1)
    for row, column, target in zip(rows.tolist(), columns.tolist(), out.unbind(), strict=True):
        target.addmm_(g_strips[row], x_strips[column])
    if not direct:
        into.add_(out)


def _batched(
    g: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, block: Block, into: torch.Tensor
) -> None:
    tokens, cpu = g.shape[0], g.device.type == "cpu"
    span = min(tokens, CPU_BMM_TOKENS) if cpu else tokens
    limit = CPU_BMM_ELEMENTS if cpu else BMM_ELEMENTS
    # odd: rows of a gathered matrix whose length is a power of two would share a few sets of the CPU's caches
    chunk = (limit // max(1, span * sum(block))) | 1
    g_strips = g.view(tokens, g.shape[1] // block[0], block[0])
    x_strips = x.view(tokens, x.shape[1] // block[1], block[1])
    for first in range(0, tokens, max(1, span)):
        some = slice(first, first + span)
        for begin in range(0, rows.numel(), chunk):
            part = slice(begin, begin + chunk)
            left = g_strips[some].index_select(1, rows[part]).permute(1, 2, 0)
            right = x_strips[some].index_select(1, columns[part]).transpose(0, 1)
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

    def _is_whole(self, units: torch.Tensor) -> bool:
        """Whether ``units`` (sorted) are all rows or all elements: their values then have the weight's own layout."""
        by_row = self.block is None or self.block == (1, self.weight.shape[1])
        return by_row and units.numel() * self.area == self.weight.numel()

    def _grid(self, tensor: torch.Tensor, block: Block) -> torch.Tensor:
        """View [out, in] as [block rows, block columns, rows, columns]."""
        height, width = block
        return tensor.view(tensor.shape[0] // height, height, tensor.shape[1] // width, width).permute(0, 2, 1, 3)

    def gather(self, tensor: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """A copy of contiguous [out, in] ``tensor`` at ``units``: [k] (element) or [k * area] (block layout)."""
        height, width = tensor.shape
        if self._is_whole(units):
            return tensor.reshape(-1).clone()
        if self.block is None:
            return tensor.view(-1).index_select(0, units)
        if self.block == (1, width):
            return tensor.index_select(0, units).view(-1)
        if self.block == (height, 1):
            return tensor.t().index_select(0, units).reshape(-1)
        columns = width // self.block[1]
        return self._grid(tensor, self.block)[units // columns, units % columns].reshape(-1)

    def write(self, units: torch.Tensor, values: torch.Tensor) -> None:
        """Set the weight at ``units``; bumps its version, so a graph that still needs the old weight fails loudly."""
        weight = self.weight.detach()
        height, width = weight.shape
        if self._is_whole(units):
            weight.copy_(values.view(weight.shape))
        elif self.block is None:
            weight.view(-1).scatter_(0, units.long(), values)  # 2.5 x faster than index_put_ on the CPU
        elif self.block == (1, width):
            weight.index_put_((units,), values.view(-1, width))
        elif self.block == (height, 1):
            weight.t().index_put_((units,), values.view(-1, height))
        else:
            columns = width // self.block[1]
            target = self._grid(weight, self.block)
            target.index_put_((units // columns, units % columns), values.view(units.numel(), *self.block))

    def accumulate(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Add this call's gradient of the values to the flat gradient.

        ``grad`` [..., out] and ``x`` [..., in] with the same leading dimensions.
        """
        self.before_backward()
        dense: torch.Tensor | None = None
        height, width = self.weight.shape
        for part in self.parts:
            into = self.flat_grad[part.start : part.stop]
            if self._is_whole(part.units):
                row_gradient(grad, x, None, into.view(height, width))
            elif self.block == (1, width):
                row_gradient(grad, x, part.units, into.view(-1, width))
            elif self.block == (height, 1):
                column_gradient(grad, x, part.units, into.view(-1, height))
            elif self.block is not None and not dense_is_cheaper(self.block, self.density):
                block_gradient(grad, x, part.units, self.block, into.view(-1, *self.block))
            else:
                if dense is None:
                    dense = weight_gradient(grad, x, self.scratch(self.weight, grad.dtype))
                into.add_(self.gather(dense, part.units))


class ObservedLinear(torch.autograd.Function):
    """``linear(x, weight, bias)`` of a frozen weight, whose backward hands the output gradient and the input on.

    ``observe(gradient [..., out], x [..., in])`` gets what a weight gradient is made of. ``anchor`` takes no part in
    the product: being an input that requires a gradient, it makes autograd call the backward of every observed module,
    also of the ones whose input needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        observe: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.observe = observe
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        ctx.observe(grad, x)
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias, None
