"""Which positions stay, against sorted lists; probabilities of MAGPRUNE; the stream of random numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.methods.sparsify import breadcrumbs, drop, kept, magprune, trim, uniform


def some_values(n: int, seed: int) -> torch.Tensor:
    """With equal magnitudes and zeros."""
    return torch.randint(-4, 5, (n,), generator=torch.Generator().manual_seed(seed)) / 8


def by_magnitude(values: torch.Tensor) -> list[int]:
    return sorted(range(values.numel()), key=lambda i: (-abs(float(values[i])), i))


@given(st.integers(1, 200), st.floats(0.001, 1.0), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_trim_keeps_exactly_k_with_ties_to_the_lower_index(n, density, seed):
    values = some_values(n, seed)
    expected = sorted(by_magnitude(values)[: max(1, int(density * n))])
    assert trim(values, kept(density, n)).tolist() == expected


@given(st.integers(0, 200), st.integers(0, 300), st.floats(0.001, 0.999), st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=120, deadline=None)
def test_breadcrumbs_drop_outliers_and_the_smallest(n, zeros, density, gamma, seed):
    """`zeros` positions outside the support are the smallest values of the tensor."""
    size = n + zeros
    keep = max(1, int(density * size))
    top = max(0, min(int(gamma * size), size - keep))
    values = some_values(n, seed)
    expected = sorted(by_magnitude(values)[top : top + keep])
    assert breadcrumbs(values, size, density, gamma).tolist() == expected


@given(st.lists(st.integers(0, 6), min_size=0, max_size=60), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_magprune_ranks_each_row_on_its_own(rows, seed):
    rows = sorted(rows)
    values = some_values(len(rows), seed)
    found = magprune(values, torch.tensor(rows, dtype=torch.int64), 0.6, 0.2)
    for row in set(rows):
        places = [i for i, r in enumerate(rows) if r == row]
        ranked = sorted(places, key=lambda i: (abs(float(values[i])), i))
        for rank, place in enumerate(ranked):
            share = rank / (len(ranked) - 1) if len(ranked) > 1 else 0.5
            assert float(found[place]) == pytest.approx(0.4 + 0.4 * share, abs=1e-6)


def test_drop_keeps_where_the_draw_is_below_the_probability():
    draws = torch.tensor([0.0, 0.25, 0.5, 0.75])
    assert drop(draws, 0.5).tolist() == [0, 1]
    assert drop(draws, torch.tensor([0.0, 0.3, 0.6, 0.7])).tolist() == [1, 2]


def test_draws_are_those_of_the_seed_the_expert_and_the_tensor():
    """The stream is part of a lift: if this fails, raise LIFT_VERSION."""
    first = uniform(0, "expert", "w", 4)
    assert (first * 2**24).tolist() == [16327769.0, 5045038.0, 570294.0, 2320814.0]
    assert torch.equal(uniform(0, "expert", "w", 9)[:4], first)
    others = [uniform(1, "expert", "w", 4), uniform(0, "other", "w", 4), uniform(0, "expert", "v", 4)]
    assert all(not torch.equal(other, first) for other in others)


def test_draws_are_uniform_and_below_one():
    draws = uniform(5, "e", "w", 100_000)
    assert draws.dtype == torch.float32
    assert 0 <= float(draws.min()) < 1e-4
    assert 1 - 1e-4 < float(draws.max()) < 1
    shares = torch.histc(draws, 10, 0, 1) / draws.numel()
    assert float((shares - 0.1).abs().max()) < 0.005
