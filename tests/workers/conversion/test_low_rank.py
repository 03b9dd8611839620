"""Dense deltas as factors: exact where the rank is low, else as near as the decomposition that tells it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.conversion.low_rank import EXACT, factorise, factorise_exactly, relative_error

sides = st.integers(2, 40)


def of_rank(rows: int, cols: int, rank: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=g) @ torch.randn(rank, cols, generator=g)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 40), st.integers(0, 99))
def test_a_low_rank_is_found_exactly_and_no_smaller_than_it_is(rows: int, cols: int, rank: int, seed: int) -> None:
    delta = of_rank(rows, cols, min(rank, rows, cols), seed)
    own = int(torch.linalg.matrix_rank(delta.double(), rtol=1e-5))
    found = factorise_exactly(delta)
    if own * (rows + cols) < rows * cols:
        assert found is not None
        assert found.rank <= own
        assert relative_error(delta, found) <= EXACT
    else:
        assert found is None or relative_error(delta, found) <= EXACT


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 12), st.integers(0, 99))
def test_a_truncation_is_as_near_as_the_decomposition(rows: int, cols: int, rank: int, seed: int) -> None:
    delta = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(delta.double())
    best = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
    found = factorise(delta, rank)
    assert found.rank <= rank
    assert best - 1e-6 <= relative_error(delta, found) <= best * 1.01 + 1e-6


@pytest.mark.parametrize("make", [factorise_exactly, lambda delta: factorise(delta, 3)])
def test_zero_and_the_same_draws(make) -> None:
    zero = make(torch.zeros(8, 6))
    assert zero is not None
    assert relative_error(torch.zeros(8, 6), zero) == 0
    delta = of_rank(12, 9, 2, 0)
    one, other = make(delta), make(delta)
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)
