"""Tied weights: finds parameters that share memory under several names, which in-place changes must refuse."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def tied_names(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """For each of the parameter ``names`` whose memory overlaps another name's: the other names.

    Compares byte ranges, not storages: tensors read from one mapped file share a storage without being tied.
    """
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.numel() and p.device.type != "meta"
    )
    groups: list[list[str]] = []
    limit = -1
    for begin, end, name in spans:
        if begin < limit:
            groups[-1].append(name)
        else:
            groups.append([name])
        limit = max(limit, end)
    others = {name: [o for o in group if o != name] for group in groups if len(group) > 1 for name in group}
    return {name: others[name] for name in names if name in others}
