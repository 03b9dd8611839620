"""The modules whose weights can be measured."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from infra.errors import ConfigError
from workers.base.hooks import check_module


def linear_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The plain linear modules whose weights have these names, by weight; ``ConfigError`` if one is none."""
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        owner = name.removesuffix(".weight")
        if owner == name or owner not in modules:
            raise ConfigError(f"{name} is not the weight of a linear module: its importance cannot be measured")
        found[name] = check_module(owner, modules[owner])
    return found
