"""Selection generations: how flat values are laid out, and how a re-selection moves values and optimizer state.

The flat vectors are ordered by generation, then module, then unit: a generation is one contiguous range (one leaf
parameter, one step count), a module has one range in each generation that still holds some of its units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from infra.errors import ConfigError
from workers.adapters.support import SupportSpec
from workers.masks.sparse_linear import Part, Slot


@dataclass
class Layout:
    """Flat ``values`` and ``grad`` (fp32) and ``base`` (weight dtype), all [n], with the ranges in them.

    ``sources``: for each generation, (index of its generation before, positions in that generation's old range), or
    None for a new one; used once to move optimizer state.
    """

    values: torch.Tensor
    grad: torch.Tensor
    base: torch.Tensor
    generations: list[tuple[int, int]]
    parts: dict[str, list[Part]]
    sources: list[tuple[int, torch.Tensor] | None] = field(default_factory=list)


def empty_layout(dtype: torch.dtype, value_dtype: torch.dtype, device: torch.device) -> Layout:
    """A layout that holds nothing, from which the first selection is built."""
    nothing = torch.empty(0, dtype=value_dtype, device=device)
    return Layout(nothing, nothing.clone(), torch.empty(0, dtype=dtype, device=device), [], {})


def rebuild(old: Layout, slots: Mapping[str, Slot], supports: Mapping[str, SupportSpec]) -> Layout:
    """The layout for new ``supports``; deselected positions of the weights are set to their base value on the way."""
    device = old.base.device
    values, bases, generations = [], [], []
    parts: dict[str, list[Part]] = {name: [] for name in slots}
    sources: list[tuple[int, torch.Tensor] | None] = []
    wanted = {
        name: spec.units.to(device, torch.int32 if spec.shape[0] * spec.shape[1] < 2**31 else torch.int64)
        for name, spec in supports.items()
    }
    held: dict[str, list[torch.Tensor]] = {name: [] for name in slots}
    cursor = 0
    for generation, (begin, end) in enumerate(old.generations):
        first, picked = cursor, []
        for name, slot in slots.items():
            for part in old.parts[name]:
                if not begin <= part.start < end:
                    continue
                held[name].append(part.units)
                keep = torch.isin(part.units, wanted[name])
                gone = ~keep
                old_base = old.base[part.start : part.stop].view(-1, slot.area)
                slot.write(part.units[gone], old_base[gone].reshape(-1))
                where = keep.nonzero() * slot.area + (part.start - begin) + torch.arange(slot.area, device=device)
                if where.numel():
                    picked.append(where.view(-1))
                    parts[name].append(Part(part.units[keep], cursor, cursor + where.numel()))
                    cursor += where.numel()
        if picked:
            index = torch.cat(picked)
            values.append(old.values.detach()[begin:end][index])
            bases.append(old.base[begin:end][index])
            sources.append((generation, index))
            generations.append((first, cursor))
    first = cursor
    for name, slot in slots.items():
        units = wanted[name]
        if held[name]:
            units = units[~torch.isin(units, torch.cat(held[name]))]
        if units.numel():
            base = slot.gather(slot.weight.detach(), units)
            bases.append(base)
            values.append(torch.zeros(base.numel(), dtype=old.values.dtype, device=device))
            parts[name].append(Part(units.contiguous(), cursor, cursor + base.numel()))
            cursor += base.numel()
    if cursor > first:
        generations.append((first, cursor))
        sources.append(None)
    flat, base = torch.cat([old.values.detach()[:0], *values]), torch.cat([old.base[:0], *bases])
    return Layout(flat, torch.zeros_like(flat), base, generations, parts, sources)


def find_group(optimizer: torch.optim.Optimizer, leaves: list[nn.Parameter]) -> dict[str, Any]:
    """The optimizer's parameter group that holds all ``leaves``; ``ConfigError`` when there is no such group."""
    ids = {id(leaf) for leaf in leaves}
    for group in optimizer.param_groups:
        if ids <= {id(p) for p in group["params"]}:
            return group
    raise ConfigError("the optimizer must hold all parameters of the adapter in one parameter group")


def transplant(
    optimizer: torch.optim.Optimizer,
    old_leaves: list[nn.Parameter],
    new_leaves: list[nn.Parameter],
    sources: list[tuple[int, torch.Tensor] | None],
) -> None:
    """Replace ``old_leaves`` by ``new_leaves`` in the optimizer's one group that holds them, and move their state.

    State tensors of a leaf's shape (moments) are gathered at the kept positions, others (step counts) are kept as they
    are; a new leaf has no state, so the optimizer starts it at step 0. Group dictionaries stay the same objects.
    """
    old_ids = {id(leaf) for leaf in old_leaves}
    group = find_group(optimizer, old_leaves)
    states: list[dict[str, Any]] = [optimizer.state.pop(leaf, {}) for leaf in old_leaves]
    for leaf, source in zip(new_leaves, sources, strict=True):
        if source is None:
            continue
        generation, index = source
        shape = old_leaves[generation].shape
        moved = {
            key: item[index] if isinstance(item, torch.Tensor) and item.shape == shape and item.ndim else item
            for key, item in states[generation].items()
        }
        if moved:
            optimizer.state[leaf] = moved
    params = group["params"]
    at = next((i for i, p in enumerate(params) if id(p) in old_ids), len(params))
    others_before = [p for p in params[:at] if id(p) not in old_ids]
    others_after = [p for p in params[at:] if id(p) not in old_ids]
    group["params"] = others_before + new_leaves + others_after
