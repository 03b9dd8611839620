"""Replacing the forward of a linear module and putting it back, also under accelerate's dispatch hooks.

A dispatched module's ``forward`` moves the inputs to the module's device and then calls ``_old_forward``; there the
inner one is replaced, so inputs still arrive on the right device and the hooks stay in place. Does not cover where
layers go (``workers.training.devices``), nor weights that hooks load for each pass (offloading): those are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from infra.errors import ConfigError


def swap_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace what ``module`` computes, on the instance; returns what puts the previous forward back."""
    name = _inner(module)
    own = name in module.__dict__
    previous = module.__dict__.get(name)
    object.__setattr__(module, name, forward)

    def restore() -> None:
        if own:
            object.__setattr__(module, name, previous)
        else:
            module.__dict__.pop(name, None)

    return restore


def check_module(name: str, module: nn.Module) -> nn.Linear:
    """The module as a plain linear module that can be trained in place, or ``ConfigError`` with the reason."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ConfigError(f"{name} is a {type(module).__name__}: only plain linear modules can be trained in place")
    weight = module.weight
    if weight.device.type == "meta" or _offloads(module.__dict__.get("_hf_hook")):
        raise ConfigError(
            f"{name}: its weight is offloaded and only loaded for each pass; "
            "grant the task more GPUs or memory, so that all weights stay on a device"
        )
    if not is_plain_linear(module):
        raise ConfigError(f"{name}: its forward is already replaced; detach the other adapter first")
    if not weight.is_floating_point() or not weight.is_contiguous():
        raise ConfigError(
            f"{name}: its weight must be a contiguous floating point tensor in memory, "
            f"got {weight.dtype} on {weight.device}"
        )
    return module


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes ``linear(x, weight, bias)`` and nobody replaced that; dispatch hooks may be on it."""
    forward = module.__dict__.get(_inner(module))  # accelerate leaves the plain one on the instance when it detaches
    plain = forward is None or forward == nn.Linear.forward.__get__(module)
    return plain and type(module).forward is nn.Linear.forward


def _inner(module: nn.Module) -> str:
    """The instance attribute that holds the module's own computation."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def _offloads(hook: Any) -> bool:
    """Whether an accelerate hook (or one of a sequence) loads the weights for each pass."""
    return bool(getattr(hook, "offload", False)) or any(_offloads(one) for one in getattr(hook, "hooks", ()))
