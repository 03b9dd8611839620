"""Statistics form a commutative monoid, any tree of joins equals the flat one, and both kernels give the same bits."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import MergeError
from merge import statistics
from merge.methods import LiftSpec, lift
from merge.statistics import STATISTICS, TensorStatistics, combine, count_dtype, empty
from workers.support import SparseTensor

ALL = LiftSpec(tuple(STATISTICS))
SHAPE = (4, 6)


def expert(positions: dict[int, float], shape: tuple[int, ...] = SHAPE) -> SparseTensor:
    indices = torch.tensor(sorted(positions), dtype=torch.int64)
    return SparseTensor(shape, indices, torch.tensor([positions[i] for i in sorted(positions)], dtype=torch.float32))


def same(a: TensorStatistics, b: TensorStatistics) -> bool:
    return (
        (a.shape, a.experts) == (b.shape, b.experts)
        and torch.equal(a.indices, b.indices)
        and set(a.arrays) == set(b.arrays)
        and all(a.arrays[n].dtype == b.arrays[n].dtype and torch.equal(a.arrays[n], b.arrays[n]) for n in a.arrays)
    )


dyadic = st.integers(-128, 128).map(lambda k: k / 64)
supports = st.dictionaries(st.integers(0, 23), dyadic, max_size=24)
experts = st.lists(supports.map(expert), min_size=1, max_size=12)


def random_tree(items: list[TensorStatistics], rng: random.Random) -> TensorStatistics:
    """Join in a tree of random shape and fan-ins."""
    items = list(items)
    while len(items) > 1:
        rng.shuffle(items)
        take = rng.randint(2, min(5, len(items)))
        items = [*items[take:], combine(items[:take])]
    return items[0]


@given(experts)
@settings(max_examples=60, deadline=None)
def test_commutative_monoid(tensors):
    lifted = [lift(t, ALL) for t in tensors]
    a, b, c = (lifted * 3)[:3]
    assert same(combine([a, b]), combine([b, a]))
    assert same(combine([combine([a, b]), c]), combine([a, combine([b, c])]))
    assert same(combine([a, empty(SHAPE, ALL.statistics)]), combine([a]))
    assert same(combine([empty(SHAPE, ALL.statistics), a]), a)


@given(experts, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_tree_equals_the_flat_join_on_dyadic_values(tensors, seed):
    lifted = [lift(t, ALL) for t in tensors]
    assert same(random_tree(lifted, random.Random(seed)), combine(lifted))


@given(st.integers(2, 20), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_any_tree_is_within_the_rounding_bound_on_floats(n, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(n):
        indices = torch.randperm(200, generator=g)[:60].sort().values
        tensors.append(SparseTensor((10, 20), indices, torch.randn(60, generator=g)))
    lifted = [lift(t, ALL) for t in tensors]
    flat, tree = combine(lifted), random_tree(lifted, random.Random(seed))
    bound = torch.zeros(200)
    for t in tensors:
        bound.index_add_(0, t.indices, t.values.abs())
    bound = n * torch.finfo(torch.float32).eps * bound[flat.indices]
    assert torch.equal(flat.indices, tree.indices)
    for name in ALL.statistics:
        difference = (flat.arrays[name].double() - tree.arrays[name].double()).abs()
        assert bool((difference <= bound).all()), name


@given(experts)
@settings(max_examples=40, deadline=None)
def test_joining_sorted_indices_and_the_dense_scratch_give_the_same_bits(tensors):
    lifted = [lift(t, ALL) for t in tensors]
    results = []
    for threshold in (0, 10**9):  # always compact, always dense
        before, statistics._COMPACT_BELOW = statistics._COMPACT_BELOW, threshold
        try:
            results.append(combine(lifted))
        finally:
            statistics._COMPACT_BELOW = before
    assert same(*results)


def test_each_statistic():
    one, other = expert({0: 1.0, 1: -2.0, 2: 0.0}), expert({0: 3.0, 1: 0.5, 2: -0.0, 5: -1.0})
    total = combine([lift(one, ALL), lift(other, ALL)])
    assert total.indices.tolist() == [0, 1, 2, 5]
    assert {n: total.arrays[n].tolist() for n in ALL.statistics} == {
        "sum": [4.0, -1.5, 0.0, -1.0],
        "count": [2, 2, 2, 1],
        "positive_mass": [4.0, 0.5, 0.0, 0.0],
        "negative_mass": [0.0, -2.0, 0.0, -1.0],
        "positive_count": [2, 1, 0, 0],
        "negative_count": [0, 1, 0, 1],
        "zero_count": [0, 0, 2, 0],
        "largest_magnitude": [3.0, 2.0, 0.0, 1.0],
    }


def test_counts_do_not_wrap_above_255_experts():
    one = lift(expert({3: 1.0}), ALL)
    half = combine([one] * 200)
    assert half.arrays["count"].dtype == torch.uint8
    total = combine([half, half])
    assert total.arrays["count"].tolist() == [400]
    assert total.experts == 400
    assert same(total, combine([one] * 400))


def test_misuse_is_refused():
    one = lift(expert({3: 1.0}), ALL)
    with pytest.raises(MergeError, match="no statistics"):
        combine([])
    with pytest.raises(MergeError, match=r"shapes \[4, 6\] and \[6, 4\]"):
        combine([one, lift(expert({3: 1.0}, (6, 4)), ALL)])
    with pytest.raises(MergeError, match="cannot combine statistics"):
        combine([one, lift(expert({3: 1.0}), LiftSpec(("sum",)))])
    with pytest.raises(MergeError, match="65535"):
        count_dtype(70_000)
