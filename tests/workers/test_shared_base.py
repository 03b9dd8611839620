"""What several processes on one mapped base hold together, measured from outside."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.shared_base import MIB, Measurement, measure, write_base
from workers.base.load import load_model

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's proportional set size"
)
EXPERTS = 2


def load_copy(path: Path, dtype: torch.dtype) -> Any:
    """A base whose weights are copies of the file's: what `load_model` must not become."""
    model = load_model(path, dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), layers=12, vocabulary=4096)


def assert_frozen_pages_are_shared(found: Measurement) -> None:
    for term, usage in zip(found.terms, found.held, strict=True):
        assert 0.9 * term.adapted < usage.written < term.adapted + MIB  # whole pages, and tensors begin inside one
        assert usage.shared > 0.95 * (found.base - term.adapted)
        assert usage.alone < MIB


def test_experts_hold_one_base_and_their_own_terms(base: Path) -> None:
    found = measure(base, EXPERTS, tokens=64)
    assert found.base > 150 * MIB
    assert found.node <= found.sum_of_terms
    assert_frozen_pages_are_shared(found)


def test_a_base_that_is_copied_is_noticed(base: Path) -> None:
    found = measure(base, EXPERTS, tokens=64, load=load_copy)
    assert found.node > found.sum_of_terms
    with pytest.raises(AssertionError):
        assert_frozen_pages_are_shared(found)
