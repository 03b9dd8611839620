"""Statistics form a commutative monoid, any tree of joins equals the flat one, and both kernels give the same bits."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import MergeError
from merge.methods import statistics
from merge.methods.lift import LiftInput, lift
from merge.methods.specs import LiftSpec
from merge.methods.statistic_table import STATISTICS, count_dtype, values_at
from merge.methods.statistics import Accumulator, TensorStatistics, combine, empty
from workers.adapters.support import SparseTensor

OF_THE_VALUES = (
    "sum",
    "count",
    "positive_mass",
    "negative_mass",
    "positive_count",
    "negative_count",
    "zero_count",
    "square_sum",
    "positive_max",
    "negative_max",
)
ALL = LiftSpec(OF_THE_VALUES)
SHAPE = (4, 6)


def lift_tensor(tensor: SparseTensor, spec: LiftSpec, weight: float = 1.0) -> TensorStatistics:
    return lift(LiftInput(tensor, "w", "e", weight), spec)


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
    lifted = [lift_tensor(t, ALL) for t in tensors]
    a, b, c = (lifted * 3)[:3]
    assert same(combine([a, b]), combine([b, a]))
    assert same(combine([combine([a, b]), c]), combine([a, combine([b, c])]))
    assert same(combine([a, empty(SHAPE, ALL.statistics)]), combine([a]))
    assert same(combine([empty(SHAPE, ALL.statistics), a]), a)


@given(experts, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_tree_equals_the_flat_join_on_dyadic_values(tensors, seed):
    lifted = [lift_tensor(t, ALL) for t in tensors]
    assert same(random_tree(lifted, random.Random(seed)), combine(lifted))


@given(st.integers(2, 20), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_any_tree_is_within_the_rounding_bound_on_floats(n, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(n):
        indices = torch.randperm(200, generator=g)[:60].sort().values
        tensors.append(SparseTensor((10, 20), indices, torch.randn(60, generator=g)))
    lifted = [lift_tensor(t, ALL) for t in tensors]
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
    lifted = [lift_tensor(t, ALL) for t in tensors]
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
    total = combine([lift_tensor(one, ALL), lift_tensor(other, ALL)])
    assert total.indices.tolist() == [0, 1, 2, 5]
    assert {n: total.arrays[n].tolist() for n in ALL.statistics} == {
        "sum": [4.0, -1.5, 0.0, -1.0],
        "count": [2, 2, 2, 1],
        "positive_mass": [4.0, 0.5, 0.0, 0.0],
        "negative_mass": [0.0, -2.0, 0.0, -1.0],
        "positive_count": [2, 1, 0, 0],
        "negative_count": [0, 1, 0, 1],
        "zero_count": [0, 0, 2, 0],
        "square_sum": [10.0, 4.25, 0.0, 1.0],
        "positive_max": [3.0, 0.5, 0.0, 0.0],
        "negative_max": [0.0, 2.0, 0.0, 1.0],
    }


def test_weighted_counts_are_sums_of_weights():
    spec = LiftSpec(OF_THE_VALUES, weights=())
    one, other = expert({0: 1.0, 1: -2.0, 2: 0.0}), expert({0: 3.0, 1: 0.5, 2: -1.0})
    total = combine([lift_tensor(one, spec, 0.5), lift_tensor(other, spec, 0.25)])
    assert total.weighted
    assert all(array.dtype == torch.float32 for array in total.arrays.values())
    assert {
        n: total.arrays[n].tolist() for n in ("sum", "count", "positive_count", "negative_count", "zero_count")
    } == {
        "sum": [1.25, -0.875, -0.25],
        "count": [0.75, 0.75, 0.75],
        "positive_count": [0.75, 0.25, 0.0],
        "negative_count": [0.0, 0.5, 0.25],
        "zero_count": [0.0, 0.0, 0.5],
    }
    assert same(combine([total, empty(SHAPE, OF_THE_VALUES, True)]), total)
    with pytest.raises(MergeError, match="weighted statistics with unweighted"):
        combine([lift_tensor(one, spec, 0.5), lift_tensor(other, ALL)])


@given(st.lists(st.booleans(), min_size=2, max_size=5), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_full_supports_join_as_sparse_ones_do(kinds, seed):
    """The kernel without scattering, beside the one with it, in any order."""
    g = torch.Generator().manual_seed(seed)
    tensors = [
        expert({i: float(torch.randint(-64, 65, (), generator=g)) / 64 for i in range(0, 24, 1 if full else 3)})
        for full in kinds
    ]
    total = combine([lift_tensor(t, ALL) for t in tensors])
    dense = torch.zeros(len(tensors), 24)
    for row, tensor in zip(dense, tensors, strict=True):
        row[tensor.indices] = tensor.values
    assert torch.equal(total.arrays["sum"], dense.sum(0)[total.indices])
    assert torch.equal(total.arrays["negative_max"], (-dense).clamp(min=0).amax(0)[total.indices])
    assert total.indices.numel() == (24 if any(kinds) else 8)
    shuffled = random.Random(seed).sample(tensors, len(tensors))
    assert same(combine([lift_tensor(t, ALL) for t in shuffled]), total)


def test_matrices_are_summed_beside_the_support_and_an_empty_one_is_neutral():
    def part(matrix: torch.Tensor) -> TensorStatistics:
        return TensorStatistics(SHAPE, torch.tensor([1]), {"sum": torch.ones(1), "gram": matrix}, 1)

    none, two = torch.zeros(0), torch.full((6, 6), 2.0)
    for parts in ([part(two), part(none), part(two)], [part(none), combine([part(two), part(two)])]):
        assert torch.equal(combine(parts).arrays["gram"], 2 * two)
    assert torch.equal(two, torch.full((6, 6), 2.0))
    assert combine([part(none), part(none)]).arrays["gram"].numel() == 0
    with pytest.raises(MergeError, match=r"gram of shapes \[6, 6\] and \[5, 5\]"):
        combine([part(two), part(torch.ones(5, 5))])


@given(supports, st.lists(st.integers(0, 23), unique=True))
@settings(max_examples=60, deadline=None)
def test_values_at_positions(positions, wanted):
    found = values_at(expert(positions), torch.tensor(sorted(wanted), dtype=torch.int64))
    assert found.tolist() == [positions.get(i, 0.0) for i in sorted(wanted)]
    assert values_at(None, torch.arange(3)).tolist() == [0.0, 0.0, 0.0]


def test_counts_do_not_wrap_above_255_experts():
    one = lift_tensor(expert({3: 1.0}), ALL)
    half = combine([one] * 200)
    assert half.arrays["count"].dtype == torch.uint8
    total = combine([half, half])
    assert total.arrays["count"].tolist() == [400]
    assert total.experts == 400
    assert same(total, combine([one] * 400))


def test_carriers_are_counts_that_are_zero_where_the_statistic_is():
    total = combine([lift_tensor(expert({0: 1.0, 1: -2.0, 2: 0.0}), ALL), lift_tensor(expert({1: 3.0, 4: -1.0}), ALL)])
    carried = [s for s in STATISTICS.values() if s.carrier]
    assert len(carried) == 4
    for statistic in carried:
        held = total.arrays[statistic.carrier] > 0
        assert not total.arrays[statistic.name][~held].any()
        assert total.arrays[statistic.name][held].all()


def test_misuse_is_refused():
    one = lift_tensor(expert({3: 1.0}), ALL)
    with pytest.raises(MergeError, match="no statistics"):
        combine([])
    with pytest.raises(MergeError, match=r"shapes \[4, 6\] and \[6, 4\]"):
        combine([one, lift_tensor(expert({3: 1.0}, (6, 4)), ALL)])
    with pytest.raises(MergeError, match="cannot combine statistics"):
        combine([one, lift_tensor(expert({3: 1.0}), LiftSpec(("sum",)))])
    narrow = Accumulator(SHAPE, ("sum",), 1, 1)
    narrow.add(lift_tensor(expert({3: 1.0}), LiftSpec(("sum",))))
    with pytest.raises(MergeError, match="more experts than announced"):
        narrow.add(lift_tensor(expert({3: 1.0}), LiftSpec(("sum",))))
    with pytest.raises(MergeError, match="65535"):
        count_dtype(70_000)
