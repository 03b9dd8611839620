"""Each method against a dense reference written here, TIES also against PEFT's; candidates, grouping and trimming."""

import pickle
import warnings

import peft.utils.merge_utils as peft_merge
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import MergeError
from merge.methods import METHODS, Candidate, LiftSpec, group_candidates, lift, lower, trim
from merge.statistics import combine
from workers.support import SparseTensor

SHAPE = (5, 8)
NUMEL = 40


def make_experts(seed: int, n: int, per_expert: int) -> list[SparseTensor]:
    """Dyadic values, zeros and equal magnitudes among them."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        indices = torch.randperm(NUMEL, generator=g)[:per_expert].sort().values
        values = torch.randint(-16, 17, (per_expert,), generator=g) / 64
        made.append(SparseTensor(SHAPE, indices, values))
    return made


def merge(experts: list[SparseTensor], candidate: Candidate, spec: LiftSpec | None = None) -> torch.Tensor:
    """Through statistics, as a dense vector."""
    if spec is None:
        (spec,) = group_candidates([candidate])
    result = lower(combine([lift(e, spec) for e in experts]), len(experts), candidate)
    assert result.values.dtype == torch.float32
    return torch.zeros(NUMEL).index_copy_(0, result.indices, result.values)


def dense(e: SparseTensor) -> torch.Tensor:
    return torch.zeros(NUMEL).index_copy_(0, e.indices, e.values)


def reference_trim(e: SparseTensor, density: float) -> SparseTensor:
    """The k largest by (magnitude, earlier index), one by one."""
    pairs = sorted(zip(e.indices.tolist(), e.values.tolist(), strict=True), key=lambda p: (-abs(p[1]), p[0]))
    kept = sorted(pairs[: max(1, int(density * len(pairs)))])
    return SparseTensor(e.shape, torch.tensor([i for i, _ in kept]), torch.tensor([v for _, v in kept]))


def reference_ties(experts: list[SparseTensor], scale: float, density: float) -> torch.Tensor:
    out = torch.zeros(NUMEL)
    stack = [dense(reference_trim(e, density)).tolist() for e in experts]
    for position in range(NUMEL):
        values = [row[position] for row in stack]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [v for v in values if v * sign > 0]
        if agreeing:
            out[position] = scale * (sum(agreeing) / len(agreeing))
    return out


def reference(experts: list[SparseTensor], candidate: Candidate) -> torch.Tensor:
    total = torch.stack([dense(e) for e in experts]).sum(0)
    if candidate.method == "mean":
        return total / len(experts)
    if candidate.method == "overlap_mean":
        held = torch.zeros(NUMEL)
        for e in experts:
            held[e.indices] += 1
        return torch.where(held > 0, total / held.clamp(min=1), 0)
    if candidate.method == "task_arithmetic":
        return candidate.params["lambda"] * total
    return reference_ties(experts, candidate.params["lambda"], candidate.params["density"])


CANDIDATES = [
    Candidate("mean"),
    Candidate("overlap_mean"),
    Candidate("task_arithmetic", {"lambda": 0.75}),
    Candidate("ties", {"lambda": 1.5}),
    Candidate("ties", {"density": 0.3}),
    Candidate("ties", {"density": 0.01}),
]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, NUMEL))
@settings(max_examples=25, deadline=None)
def test_methods_equal_a_dense_reference(candidate, seed, n, per_expert):
    experts = make_experts(seed, n, per_expert)
    expected = reference(experts, candidate)
    torch.testing.assert_close(merge(experts, candidate), expected, rtol=1e-6, atol=1e-9)
    for spec, members in group_candidates(CANDIDATES).items():
        if candidate in members:  # the reduction shared by all gives the same
            torch.testing.assert_close(merge(experts, candidate, spec), expected, rtol=1e-6, atol=1e-9)


def test_a_missing_expert_counts_in_the_mean():
    (e,) = make_experts(0, 1, 10)
    (spec,) = group_candidates([Candidate("mean")])
    merged = lower(lift(e, spec), 4, Candidate("mean"))
    assert torch.equal(merged.values, e.values / 4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_ties_equals_peft_on_full_supports(seed, density):
    """PEFT trims over the whole tensor, breaks ties of magnitude in no fixed order and has no λ: with full supports,
    distinct magnitudes and λ = 1 its definition (zero total elects +, zeros vote for nothing) is ours."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(NUMEL, generator=g) for _ in range(5)]
    if density == 1:  # exact cancellation (a zero total) and stored zeros
        rows = [rows[0], -rows[0], torch.zeros(NUMEL)]
    full = [SparseTensor(SHAPE, torch.arange(NUMEL), row) for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that density 1 prunes nothing
        theirs = peft_merge.ties(rows, torch.ones(len(rows)), density)
    torch.testing.assert_close(merge(full, Candidate("ties", {"density": density})), theirs)


@given(st.integers(1, 200), st.floats(0.001, 1.0), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_trim_keeps_exactly_k_with_ties_to_the_lower_index(n, density, seed):
    values = torch.randint(-4, 5, (n,), generator=torch.Generator().manual_seed(seed)) / 8
    kept = trim(values, density)
    order = sorted(range(n), key=lambda i: (-abs(float(values[i])), i))
    assert kept.tolist() == sorted(order[: max(1, int(density * n))])


def test_empty_support_lifts_to_nothing():
    e = SparseTensor(SHAPE, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    for density in (1.0, 0.2):
        assert lift(e, LiftSpec(("sum",), density)).indices.numel() == 0


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(MergeError, match="NaN or infinity"):
        lift(SparseTensor((2,), torch.arange(2), torch.tensor([1.0, float("nan")])), LiftSpec(("sum",)))


def test_candidates_without_trimming_share_one_reduction():
    groups = group_candidates(CANDIDATES)
    assert [spec.density for spec in groups] == [1.0, 0.3, 0.01]
    first = next(iter(groups))
    assert groups[first] == CANDIDATES[:4]
    assert set(first.statistics) == {
        "positive_mass",
        "negative_mass",
        "positive_count",
        "negative_count",
        "zero_count",
    }
    assert LiftSpec.from_dict(first.to_dict()) == first


def test_a_reduction_holds_no_more_than_its_candidates_read():
    def needs(*methods: str) -> list[tuple[str, ...]]:
        return [spec.statistics for spec in group_candidates([Candidate(m) for m in methods])]

    assert needs("mean", "task_arithmetic") == [("sum",)]
    assert needs("mean", "overlap_mean") == [("count", "sum")]
    assert needs("ties", "mean") == [("negative_count", "negative_mass", "positive_count", "positive_mass")]
    assert list(group_candidates([Candidate("mean"), Candidate("mean")]).values()) == [[Candidate("mean")]]


def test_candidates_are_canonical_hashable_and_picklable():
    a = Candidate("ties", {"density": 1, "lambda": 1})
    assert a == Candidate("ties")
    assert hash(a) == hash(Candidate("ties"))
    assert a.to_json() == '{"method":"ties","params":{"density":1.0,"lambda":1.0}}'
    assert Candidate.from_dict(a.to_dict()) == a
    assert Candidate.from_dict({"method": "mean"}) == Candidate("mean")
    assert pickle.loads(pickle.dumps(a)) == a
    assert Candidate("ties", {"lambda": 0.5}) != a
    assert all(Candidate(method) for method in METHODS)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("tie", {}, "unknown merge method 'tie'; did you mean 'ties'"),
        ("slerp-x", {}, "Accepted: mean, overlap_mean"),
        ("ties", {"lamda": 1}, "no parameter 'lamda'; did you mean 'lambda'"),
        ("mean", {"lambda": 1}, "Accepted: none"),
        ("ties", {"density": 0}, "above 0 to 1"),
        ("ties", {"density": 1.5}, "above 0 to 1"),
        ("ties", {"lambda": float("nan")}, "accepted: a number"),
        ("ties", {"lambda": "big"}, "accepted: a number"),
        ("ties", {"lambda": True}, "accepted: a number"),
    ],
)
def test_bad_candidates_are_refused(method, params, message):
    with pytest.raises(MergeError, match=message):
        Candidate(method, params)


@pytest.mark.parametrize("data", [{}, {"statistics": "sum", "density": 1}, {"statistics": ["sum"], "density": True}])
def test_bad_lift_descriptions_are_refused(data):
    with pytest.raises(MergeError, match="not a description"):
        LiftSpec.from_dict(data)


def test_bad_lift_specs_are_refused():
    with pytest.raises(MergeError, match="did you mean 'count'"):
        LiftSpec(("counts",))
    with pytest.raises(MergeError, match="trim density"):
        LiftSpec(("sum",), 0.0)
    with pytest.raises(MergeError, match="distinct"):
        LiftSpec(())
    with pytest.raises(MergeError, match="method, params"):
        Candidate.from_dict({"method": "ties", "lambda": 1})
