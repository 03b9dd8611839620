"""In-place sparse training and evaluation: the effective weight W + delta sits in the model's own weight tensor.

:class:`InPlaceAdapter` trains the values on a support: one flat fp32 vector with one preallocated flat gradient, one
leaf parameter (a view) per selection generation so that a library optimizer counts each generation's steps, the base
values on the support kept, and one scatter of round(base + delta) after each step. Undo puts the kept originals back,
bit for bit. :func:`apply_delta` swaps a finished delta in and out for evaluation.
Does not cover the choice of positions (``workers.masks.spec``), nor the training loop. One device and one weight dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn

from infra.errors import AdapterError, ConfigError, FactoryError
from workers.adapters.support import Block, LazyTensors, SparseTensor, SupportSpec, block_runs, rounded_sum
from workers.base.hooks import check_module, swap_forward
from workers.base.tying import tied_names
from workers.masks.sparse_linear import ObservedLinear, Part, Slot
from workers.training.generations import Layout, empty_layout, find_group, rebuild, transplant


@dataclass(frozen=True)
class Snapshot:
    """A copy of the trained ``values`` (flat, in the adapter's own order) and the ``parts`` that they belong to."""

    values: torch.Tensor
    parts: Mapping[str, list[Part]]


class InPlaceAdapter:
    """Trains a sparse delta inside the weights of ``model``.

    ``supports``: module name to its support. All parameters of the model are frozen while the adapter is attached. Use:

        adapter = InPlaceAdapter(model, supports)
        optimizer = torch.optim.AdamW(adapter.parameters(), fused=True)
        adapter.zero_grad(); loss.backward(); optimizer.step(); adapter.write_back()

    Values and gradient are fp32 (fp64 for fp64 weights). Works with ``checkpoint(use_reentrant=False)``, gradient
    accumulation, and clipping over ``parameters()``. ``ConfigError`` for unknown, tied or unsuitable modules.
    """

    def __init__(self, model: nn.Module, supports: Mapping[str, SupportSpec]) -> None:
        self._model = model
        modules = dict(model.named_modules())
        linear: dict[str, nn.Linear] = {}
        if not supports:
            raise ConfigError("an adapter needs at least one module")
        for name, spec in supports.items():
            if name not in modules:
                raise ConfigError(f"the model has no module {name!r}")
            linear[name] = check_module(name, modules[name])
            self._check_spec(name, linear[name], spec)
        for name, others in tied_names(model, [f"{n}.weight" for n in supports]).items():
            raise ConfigError(f"{name} shares its memory with {', '.join(others)}: a tied weight cannot be adapted")
        kinds = {(module.weight.device, module.weight.dtype) for module in linear.values()}
        if len(kinds) > 1:
            raise ConfigError(f"adapted weights must share one device and dtype, got {sorted(map(str, kinds))}")
        (self._device, self._dtype) = kinds.pop()
        self._value_dtype = torch.promote_types(self._dtype, torch.float32)
        self._scratch_buffer: torch.Tensor | None = None
        self._attached = True
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        empty = torch.empty(0, dtype=self._value_dtype, device=self._device)
        self._slots = {
            name: Slot(name, linear[name], spec.block, [], empty, self._attach_grads, self._scratch)
            for name, spec in supports.items()
        }
        self._install(rebuild(empty_layout(self._dtype, self._value_dtype, self._device), self._slots, supports))
        for slot in self._slots.values():
            slot.restore_forward = swap_forward(slot.module, self._forward_of(slot))

    @staticmethod
    def _check_spec(name: str, module: nn.Linear, spec: SupportSpec) -> None:
        shape = tuple(module.weight.shape)
        if tuple(spec.shape) != shape:
            raise ConfigError(f"{name}: its support is for shape {list(spec.shape)}, its weight has {list(shape)}")
        spec.check(f"{name}.weight")

    def _forward_of(self, slot: Slot) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return nn.functional.linear(x, slot.module.weight, slot.module.bias)
            module = slot.module
            return ObservedLinear.apply(x, self._layout.values, module.weight, module.bias, slot.accumulate)

        return forward

    def _install(self, layout: Layout) -> None:
        """Make ``layout`` current: leaf views with their gradients, and each module's ranges."""
        self._layout = layout
        layout.values.requires_grad_(True)
        self._leaves: list[nn.Parameter] = []
        for start, stop in layout.generations:
            leaf = nn.Parameter(layout.values.detach()[start:stop])
            leaf.grad = layout.grad[start:stop]
            self._leaves.append(leaf)
        for name, slot in self._slots.items():
            slot.parts = layout.parts[name]
            slot.flat_grad = layout.grad

    def _attach_grads(self) -> None:
        """A gradient that was set to None (``optimizer.zero_grad()``) becomes zeros in its range again."""
        for leaf, (start, stop) in zip(self._leaves, self._layout.generations, strict=True):
            if leaf.grad is None:
                leaf.grad = self._layout.grad[start:stop].zero_()

    def _scratch(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """On the CPU one reused buffer for a layer's dense gradient: fresh pages would cost as much as its gather."""
        if weight.device.type != "cpu":
            return None
        if self._scratch_buffer is None or self._scratch_buffer.dtype != dtype:
            size = max(slot.weight.numel() for slot in self._slots.values())
            self._scratch_buffer = torch.empty(size, dtype=dtype)
        return self._scratch_buffer[: weight.numel()].view(weight.shape)

    @property
    def num_values(self) -> int:
        """Trained values."""
        return self._layout.values.numel()

    @property
    def generations(self) -> list[int]:
        """Number of values in each selection generation, oldest first."""
        return [stop - start for start, stop in self._layout.generations]

    def parameters(self) -> list[nn.Parameter]:
        """Leaf views of the flat values, one per selection generation; new ones after each :meth:`reselect`."""
        return list(self._leaves)

    def zero_grad(self) -> None:
        """Zero the flat gradient in place. ``optimizer.zero_grad()`` has the same effect."""
        self._layout.grad.zero_()
        self._attach_grads()

    def write_back(self) -> None:
        """Write round(base + delta) to the weights. Call after each optimizer step."""
        self._need_attached()
        values, base = self._layout.values.detach(), self._layout.base
        for slot in self._slots.values():
            for part in slot.parts:
                span = slice(part.start, part.stop)
                slot.write(part.units, rounded_sum(base[span], values[span]))

    def snapshot(self) -> Snapshot:
        """A copy of the values, for :meth:`delta` after further steps or another selection."""
        return Snapshot(self._layout.values.detach().clone(), self._layout.parts)

    def delta(self, snapshot: Snapshot | None = None) -> LazyTensors:
        """The trained delta now, or at a snapshot: parameter name to fp32 values in flat order, on the CPU.

        Does not depend on the model any more. Holds 4 bytes for each value; all tensors at once take another 12.
        """
        chosen = snapshot or self.snapshot()
        flat = chosen.values.float().cpu()
        weights = {f"{name}.weight": (name, tuple(slot.weight.shape), slot.block) for name, slot in self._slots.items()}

        def make(parameter: str) -> SparseTensor:
            name, shape, block = weights[parameter]
            return _in_flat_order(shape, block, chosen.parts[name], flat)

        return LazyTensors(weights, make)

    def state(self, snapshot: Snapshot | None = None) -> dict[str, torch.Tensor]:
        """Everything that :meth:`load_state` needs to go on, or that :meth:`read_snapshot` needs.

        ``values`` fp32 [n]; ``generations`` int64 [g, 2], none of a snapshot; for each module ``units <name>`` (all its
        parts joined) and ``parts <name>`` int64 [p, 2], the ranges of the parts in ``values``.
        """
        chosen = snapshot or Snapshot(self._layout.values.detach(), self._layout.parts)
        generations = [] if snapshot else self._layout.generations
        tensors = {
            "values": chosen.values,
            "generations": torch.tensor(generations, dtype=torch.int64).view(-1, 2),
        }
        for name, parts in chosen.parts.items():
            tensors[f"parts {name}"] = torch.tensor([(p.start, p.stop) for p in parts], dtype=torch.int64).view(-1, 2)
            empty = torch.empty(0, dtype=torch.int32, device=self._device)
            tensors[f"units {name}"] = torch.cat([empty, *(part.units for part in parts)])
        return tensors

    def read_snapshot(self, tensors: Mapping[str, torch.Tensor]) -> Snapshot:
        """The snapshot that a :meth:`state` of the same modules holds. ``FactoryError`` for another adapter's."""
        expected = {"values", "generations"} | {f"{kind} {name}" for name in self._slots for kind in ("units", "parts")}
        if set(tensors) != expected:
            other = sorted(set(tensors) ^ expected)
            raise FactoryError(f"the saved state is of another adapter: it differs in {', '.join(other[:4])}")
        parts: dict[str, list[Part]] = {}
        for name, slot in self._slots.items():
            ranges: list[list[int]] = tensors[f"parts {name}"].tolist()
            lengths = [(stop - start) // slot.area for start, stop in ranges]
            units = tensors[f"units {name}"].to(self._device).split(lengths)
            parts[name] = [Part(u.contiguous(), start, stop) for u, (start, stop) in zip(units, ranges, strict=True)]
        return Snapshot(tensors["values"].to(self._device, self._value_dtype).clone(), parts)

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over the positions, generations and values of a :meth:`state` of the same modules and granularity.

        ``parameters()`` are new afterwards: make the optimizer later. ``FactoryError`` for another adapter's state.
        """
        self._need_attached()
        saved = self.read_snapshot(tensors)
        self._write_base()
        base = torch.empty(saved.values.numel(), dtype=self._dtype, device=self._device)
        for name, slot in self._slots.items():
            for part in saved.parts[name]:
                base[part.start : part.stop] = slot.gather(slot.weight.detach(), part.units)
        generations = [(start, stop) for start, stop in tensors["generations"].tolist()]
        parts = dict(saved.parts)
        self._install(Layout(saved.values, torch.zeros_like(saved.values), base, generations, parts))
        self.write_back()

    def reselect(self, supports: Mapping[str, SupportSpec], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Change the support of the same modules (same granularity).

        Positions in both keep value, moments and step count; deselected ones return to their base value bit for bit and
        are forgotten; new ones start at zero as a generation with its own step count. ``optimizer``'s parameter groups
        and state are moved to the new leaf views in place, so schedulers attached to it go on. The gradient is zeroed.
        """
        self._need_attached()
        if set(supports) != set(self._slots):
            other = sorted(set(supports) ^ set(self._slots))
            raise ConfigError(f"re-selection must name the adapted modules; differs in {', '.join(other)}")
        for name, spec in supports.items():
            self._check_spec(name, self._slots[name].module, spec)
            block = self._slots[name].block
            if spec.block != block:
                raise ConfigError(f"{name}: re-selection with block {spec.block}, the adapter has {block}")
        old_leaves = self._leaves
        if optimizer is not None:
            find_group(optimizer, old_leaves)
        layout = rebuild(self._layout, self._slots, supports)
        self._install(layout)
        if optimizer is not None:
            transplant(optimizer, old_leaves, self._leaves, layout.sources)
        layout.sources = []
        self.write_back()

    def restore(self) -> None:
        """Put the base weights (bit for bit), the forward passes and the requires_grad flags back. Idempotent."""
        if not self._attached:
            return
        self._write_base()
        for slot in self._slots.values():
            slot.restore_forward()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._attached = False

    def _write_base(self) -> None:
        for slot in self._slots.values():
            for part in slot.parts:
                slot.write(part.units, self._layout.base[part.start : part.stop])

    def _need_attached(self) -> None:
        if not self._attached:
            raise FactoryError("the adapter was detached by restore()")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _in_flat_order(shape: tuple[int, ...], block: Block | None, parts: list[Part], flat: torch.Tensor) -> SparseTensor:
    """One module's values, whatever its parts' order, as a sparse tensor on the CPU."""
    units = torch.cat([torch.empty(0, dtype=torch.int64), *(part.units.cpu().to(torch.int64) for part in parts)])
    values = torch.cat([flat[:0], *(flat[part.start : part.stop] for part in parts)])
    if block is None:
        indices, order = torch.sort(units)
        return SparseTensor(shape, indices, values[order])
    starts, order = block_runs(units, shape, block)
    indices = (starts[:, None] + torch.arange(block[1])).reshape(-1)
    return SparseTensor(shape, indices, values.view(-1, block[1])[order].reshape(-1))


class DeltaSource(Protocol):
    """An open file with a delta of each of its ``names``: an adapter, or a merged one under a task's mask."""

    @property
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def load(self, name: str) -> SparseTensor: ...


class Undo:
    """The originals that :func:`apply_delta` replaced; a context manager that restores on leaving."""

    def __init__(self) -> None:
        self._saved: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []

    def keep(self, weight: torch.Tensor, indices: torch.Tensor | None, originals: torch.Tensor) -> None:
        """Remember a flat weight's originals at ``indices``, None for all of them."""
        self._saved.append((weight, indices, originals))

    def restore(self) -> None:
        """Put the originals back, bit for bit, last change first. Idempotent."""
        with torch.no_grad():
            while self._saved:
                weight, indices, originals = self._saved.pop()
                _put(weight, indices, originals)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def apply_delta(
    model: nn.Module, tensors: Mapping[str, SparseTensor] | DeltaSource, round_to: torch.dtype | None = None
) -> Undo:
    """Swap a delta into the weights for evaluation: W := round(W + delta) on the support, tensor by tensor.

    ``tensors``: parameter name to delta, or an open file of them. With ``round_to``, changed weights take the values
    that they would have in that dtype, whatever the model's own. Keeps the originals of the support only.
    ``AdapterError`` for unknown, tied or differently shaped parameters and invalid positions; the model is then left
    as it was.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = sorted(tensors) if isinstance(tensors, Mapping) else tensors.names
    for name in names:
        shape = tuple(tensors[name].shape if isinstance(tensors, Mapping) else tensors.shape(name))
        if name not in parameters:
            raise AdapterError(f"the adapter changes {name!r}, which the model does not have")
        weight = parameters[name]
        if tuple(weight.shape) != shape:
            raise AdapterError(f"{name}: the adapter is for shape {list(shape)}, the model has {list(weight.shape)}")
        if not weight.is_floating_point() or not weight.is_contiguous() or weight.device.type == "meta":
            raise AdapterError(f"{name}: the model's tensor is not a contiguous floating point tensor in memory")
    for name, others in tied_names(model, names).items():
        raise AdapterError(f"{name} shares its memory with {', '.join(others)}: a delta of a tied tensor is refused")
    undo = Undo()
    try:
        for name in names:
            tensor = tensors[name] if isinstance(tensors, Mapping) else tensors.load(name)
            tensor.check(name)
            flat = parameters[name].detach().view(-1)
            small = torch.int32 if tensor.numel < 2**31 else torch.int64
            every = tensor.indices.numel() == tensor.numel
            indices = None if every else tensor.indices.to(device=flat.device, dtype=small)
            originals = flat.clone() if indices is None else flat.index_select(0, indices)
            undo.keep(flat, indices, originals)
            changed = rounded_sum(originals, tensor.values.to(flat.device))
            if round_to is not None:
                changed = rounded_sum(originals.float(), tensor.values.to(flat.device), round_to).to(flat.dtype)
            _put(flat, indices, changed)
    except BaseException:
        undo.restore()
        raise
    return undo


def _put(flat: torch.Tensor, indices: torch.Tensor | None, values: torch.Tensor) -> None:
    if indices is None:
        flat.copy_(values)
    else:
        flat.index_put_((indices,), values)
