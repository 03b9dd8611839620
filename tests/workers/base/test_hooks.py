"""Replacing a linear module's forward, with and without accelerate's hooks on it."""

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from infra.errors import ConfigError
from workers.base.hooks import check_module, is_plain_linear, swap_forward


class Doubling(ModelHook):
    """Doubles what goes in: whoever bypasses the hook computes something else."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * x for x in args), kwargs


def linear(hook: ModelHook | None) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    return module if hook is None else add_hook_to_module(module, hook)


@pytest.mark.parametrize("hooked", [False, True])
def test_the_inner_forward_is_replaced_and_comes_back(hooked: bool) -> None:
    module = linear(Doubling() if hooked else None)
    before, x = dict(module.__dict__), torch.randn(2, 4)
    want = module(x)
    restore = swap_forward(module, lambda x: x.sum(-1))
    torch.testing.assert_close(module(x), (2 * x if hooked else x).sum(-1))
    assert module.__dict__.get("_hf_hook") is before.get("_hf_hook")
    assert not is_plain_linear(module)
    restore()
    assert torch.equal(module(x), want)
    assert module.__dict__.keys() == before.keys()
    assert all(module.__dict__[name] is before[name] for name in before)


def test_swaps_nest() -> None:
    module = linear(Doubling())
    x = torch.randn(2, 4)
    want = module(x)
    undo = [swap_forward(module, lambda x: x), swap_forward(module, lambda x: -x)]
    assert torch.equal(module(x), -2 * x)
    undo.pop()()
    assert torch.equal(module(x), 2 * x)
    undo.pop()()
    assert torch.equal(module(x), want)


def test_modules_that_are_accepted() -> None:
    detached = linear(Doubling())
    remove_hook_from_module(detached)
    for module in (linear(None), linear(AlignDevicesHook("cpu")), linear(Doubling()), detached):
        assert check_module("m", module) is module
        assert is_plain_linear(module)


def test_modules_that_are_refused() -> None:
    replaced = linear(AlignDevicesHook("cpu"))
    swap_forward(replaced, lambda x: x)
    offloading = linear(AlignDevicesHook("cpu", offload=True))
    sequence = linear(SequentialHook(Doubling(), AlignDevicesHook("cpu", offload=True)))
    transposed = nn.Linear(4, 4)
    transposed.weight = nn.Parameter(transposed.weight.detach().t())
    cases = [
        (replaced, "already replaced"),
        (offloading, "offloaded"),
        (sequence, "offloaded"),
        (nn.Linear(2, 2, device="meta"), "offloaded"),
        (transposed, "contiguous"),
        (nn.Embedding(3, 2), "Embedding"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
    ]
    for module, message in cases:
        with pytest.raises(ConfigError, match=message):
            check_module("m", module)
