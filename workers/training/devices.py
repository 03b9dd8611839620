"""A base over several devices: where its layers go, and one sparse adapter over all of them.

The decoder layers are split evenly by bytes, in model order, and run where they lie: accelerate's dispatch hooks move
activations from one device to the next. Weights are never offloaded. :func:`attach` gives a spread model the same
trainable interface that one device has. Sharded data-parallel training is not covered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from infra.errors import ConfigError, FactoryError
from workers.adapters.support import LazyTensors, SupportSpec
from workers.training.generations import find_group
from workers.training.in_place import InPlaceAdapter, Snapshot


def spread(model: Any, devices: Sequence[str | torch.device]) -> Any:
    """Move a model of transformers to ``devices``, its layers evenly by bytes; returns the same model.

    One device: a plain move, no hooks. Several: each layer runs on the device that holds it; inputs belong on that of
    the input embeddings, and the model's own outputs return to where its inputs were. A device may be named more than
    once. ``ConfigError`` for no device, or a model that does not name its layers.
    """
    from accelerate import dispatch_model

    names = [str(torch.device(device)) for device in devices]
    if not names:
        raise ConfigError("no device to put the model on; grant the task a CPU or a GPU")
    if len(names) == 1:
        return model.to(names[0])
    device_map = {block: names[index] for block, index in place(model, len(names)).items()}
    return dispatch_model(
        model,
        device_map,
        main_device="cpu" if "cpu" in names else names[0],  # with another one, accelerate offloads what the CPU holds
        skip_keys=list(model._skip_keys_device_placement or ()),  # each layer's part of a cache stays on its device
        force_hooks=True,
    )


@contextlib.contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Inside, torch uses deterministic algorithms only, if they are asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def place(model: nn.Module, count: int) -> dict[str, int]:
    """Which of ``count`` devices each block of ``model`` goes to: module name to index, not decreasing in model order.

    A block is a layer (a class that the model says must not be split) or what stands beside the layers. Exceptions to
    the order: blocks that share a parameter go to the device of the last of them (tied embeddings to that of the output
    layer), and blocks with buffers only (rotary frequencies) to the first device.
    """
    whole = frozenset(getattr(model, "_no_split_modules", None) or ())
    if not any(type(module).__name__ in whole for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} does not name its layers: it can only be put on one device")
    blocks = dict(_blocks(model, "", whole))
    owner = {id(p): name for name, block in blocks.items() for p in block.parameters()}  # the last that holds it
    if loose := [name for name, p in model.named_parameters() if id(p) not in owner]:
        raise ConfigError(
            f"{type(model).__name__} holds {loose[0]} outside its layers: it can only be put on one device"
        )
    sizes = dict.fromkeys(blocks, 0)
    for parameter in model.parameters():
        sizes[owner[id(parameter)]] += parameter.numel() * parameter.element_size()
    total, before = max(1, sum(sizes.values())), 0
    placed: dict[str, int] = {}
    for name, size in sizes.items():
        placed[name] = min(count - 1, (2 * before + size) * count // (2 * total))  # where the block's middle falls
        before += size
    for name, block in blocks.items():
        holders = {owner[id(p)] for p in block.parameters()} - {name}
        if holders:
            placed[name] = placed[max(holders, key=list(blocks).index)]
        elif next(block.parameters(), None) is None:
            placed[name] = 0
    return {name: index for name, index in placed.items() if _has_tensors(blocks[name])}


def _blocks(module: nn.Module, prefix: str, whole: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inside = any(type(part).__name__ in whole for part in child.modules())
        if inside and type(child).__name__ not in whole:
            yield from _blocks(child, f"{prefix}{name}.", whole)
        else:
            yield f"{prefix}{name}", child


def _has_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def attach(model: nn.Module, supports: Mapping[str, SupportSpec]) -> InPlaceAdapter | SplitAdapter:
    """A sparse adapter on the modules of ``supports``, wherever their weights are.

    ``ConfigError`` for unknown, tied, offloaded or otherwise unsuitable modules; the model is then as it was.
    """
    modules = dict(model.named_modules())
    groups: dict[Any, dict[str, SupportSpec]] = {}
    for name, spec in supports.items():
        device = getattr(getattr(modules.get(name), "weight", None), "device", None)
        groups.setdefault(device, {})[name] = spec
    return InPlaceAdapter(model, supports) if len(groups) <= 1 else SplitAdapter(model, list(groups.values()))


@dataclass(frozen=True)
class SplitSnapshot:
    """One snapshot for each device."""

    parts: list[Snapshot]


class SplitAdapter:
    """Several adapters, one for each device, as one: same interface and numbers as :class:`InPlaceAdapter`.

    ``groups``: the supports of each device. Norms over ``parameters()`` may differ in the last digit from those of one
    adapter, since they sum in another order. An optimizer must hold all parameters in one group.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Mapping[str, SupportSpec]]) -> None:
        self._groups = [list(group) for group in groups]
        self._order = [f"{name}.weight" for name, _ in model.named_modules() if any(name in g for g in groups)]
        self._parts: list[InPlaceAdapter] = []
        try:
            for group in groups:
                self._parts.append(InPlaceAdapter(model, group))
        except BaseException:
            self.restore()
            raise

    @property
    def num_values(self) -> int:
        """Trained values."""
        return sum(part.num_values for part in self._parts)

    @property
    def generations(self) -> list[int]:
        """Number of values in each of ``parameters()``: for each device its selection generations, oldest first."""
        return [count for part in self._parts for count in part.generations]

    def parameters(self) -> list[nn.Parameter]:
        """The leaf views of all devices; new ones after each :meth:`reselect`."""
        return [leaf for part in self._parts for leaf in part.parameters()]

    def zero_grad(self) -> None:
        """Zero the gradients in place."""
        for part in self._parts:
            part.zero_grad()

    def write_back(self) -> None:
        """Write round(base + delta) to the weights. Call after each optimizer step."""
        for part in self._parts:
            part.write_back()

    def snapshot(self) -> SplitSnapshot:
        """A copy of the values, for :meth:`delta` after further steps or another selection."""
        return SplitSnapshot([part.snapshot() for part in self._parts])

    def delta(self, snapshot: SplitSnapshot | None = None) -> LazyTensors:
        """The trained delta now, or at a snapshot, in model order, each tensor on the CPU when it is asked for."""
        chosen = snapshot.parts if snapshot else [None] * len(self._parts)
        deltas = [part.delta(one) for part, one in zip(self._parts, chosen, strict=True)]
        owners = {name: delta for delta in deltas for name in delta}
        return LazyTensors(self._order, lambda name: owners[name][name])

    def state(self, snapshot: SplitSnapshot | None = None) -> dict[str, torch.Tensor]:
        """The state of each device's adapter, its keys behind the device's number in this adapter (``"0/"``)."""
        chosen = snapshot.parts if snapshot else [None] * len(self._parts)
        states = [part.state(one) for part, one in zip(self._parts, chosen, strict=True)]
        return {f"{at}/{key}": value for at, state in enumerate(states) for key, value in state.items()}

    def read_snapshot(self, tensors: Mapping[str, torch.Tensor]) -> SplitSnapshot:
        """The snapshot that a :meth:`state` of the same modules and devices holds."""
        split = zip(self._parts, self._split(tensors), strict=True)
        return SplitSnapshot([part.read_snapshot(state) for part, state in split])

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a :meth:`state` of the same modules, split over as many devices in the same way.

        ``parameters()`` are new afterwards: make the optimizer after this. ``FactoryError`` for another adapter's
        state.
        """
        for part, state in zip(self._parts, self._split(tensors), strict=True):
            part.load_state(state)

    def _split(self, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """A state's tensors by device."""
        split: list[dict[str, torch.Tensor]] = [{} for _ in self._parts]
        for key, value in tensors.items():
            at, _, rest = key.partition("/")
            if not at.isdigit() or int(at) >= len(split):
                raise FactoryError(
                    f"the saved state has {key!r}, which this adapter over {len(split)} devices has not: "
                    "it was saved over another number of GPUs"
                )
            split[int(at)][rest] = value
        return split

    def reselect(self, supports: Mapping[str, SupportSpec], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Change the support of the same modules, as :meth:`InPlaceAdapter.reselect` does."""
        names = {name for group in self._groups for name in group}
        if set(supports) != names:
            other = sorted(set(supports) ^ names)
            raise ConfigError(f"re-selection must name the adapted modules; differs in {', '.join(other)}")
        if optimizer is not None:
            find_group(optimizer, self.parameters())
        for part, group in zip(self._parts, self._groups, strict=True):
            part.reselect({name: supports[name] for name in group}, optimizer)

    def restore(self) -> None:
        """Put weights (bit for bit), forward passes and requires_grad flags back. Idempotent."""
        for part in reversed(self._parts):  # each found the flags as the one before left them
            part.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
