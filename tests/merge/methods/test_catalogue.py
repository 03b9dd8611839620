"""Each method, through lift, combine and lower, against a dense reference, over any tree, and golden."""

import hashlib
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import MergeError
from merge.methods.catalogue import LOWER_VERSION, METHODS, lower
from merge.methods.lift import LIFT_VERSION, LiftInput, lift
from merge.methods.lowering import Root
from merge.methods.specs import Candidate, candidate_lift, check_candidate, plan_reductions
from merge.methods.statistics import STATISTICS_VERSION, TensorStatistics, combine
from tests.merge.dense_reference import NUMEL, REFERENCES, SHAPE, Expert, Experts, make_experts
from workers.adapters.support import SparseTensor

Join = Callable[[Sequence[TensorStatistics]], TensorStatistics]


def merge(experts: Experts, candidate: Candidate, join: Join = combine) -> Tensor:
    """Through all rounds, as a dense vector."""
    return together(experts, [candidate], join)[candidate]


def together(experts: Experts, candidates: Sequence[Candidate], join: Join = combine) -> dict[Candidate, Tensor]:
    """Candidates that share reductions."""
    done: dict[Candidate, SparseTensor] = {}
    for candidate in candidates:
        check_candidate(candidate, list(experts))
    for reduction in plan_reductions(candidates, len(experts)):
        spec = reduction.spec
        read = done[spec.reference] if spec.reference else None
        kind = (spec.measurement or "").removesuffix("_tokens")
        measured = {n: {"fisher": e.fisher, "gram": e.gram}.get(kind) for n, e in experts.items()}
        total = join(
            [
                lift(LiftInput(e.tensor, "w", name, spec.weight_of(name), read, measured[name]), spec)
                for name, e in experts.items()
            ]
        )
        for each in reduction.candidates:
            done[each] = lower(Root(total, len(experts), done[each.reference] if each.reference else None), each)
    merged = {}
    for candidate in candidates:
        result = done[candidate]
        assert result.values.dtype == torch.float32
        result.check()
        merged[candidate] = torch.zeros(NUMEL).index_copy_(0, result.indices, result.values)
    return merged


# Parameters that are dyadic where a tree must give the bits of the flat join.
CASES: list[tuple[str, dict, bool]] = [
    ("mean", {}, False),
    ("weighted_mean", {}, True),
    ("overlap_mean", {}, False),
    ("overlap_mean", {}, True),
    ("task_arithmetic", {"lambda": 0.75}, False),
    ("task_arithmetic", {}, True),
    ("ties", {"lambda": 1.5}, False),
    ("ties", {"density": 0.3}, False),
    ("ties", {"density": 0.4, "density_of": "tensor"}, True),
    ("dare_linear", {"seed": 3}, False),
    ("dare_linear", {"density": 0.25}, True),
    ("dare_ties", {}, False),
    ("dare_ties", {"seed": 1}, True),
    ("della", {"epsilon": 0}, True),
    ("della_linear", {"density": 0.25, "epsilon": 0}, False),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.2}, False),
    ("breadcrumbs", {"density": 0.7, "gamma": 0.6, "density_of": "tensor"}, True),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1, "density_of": "tensor"}, False),
    ("breadcrumbs_ties", {"density": 0.5}, True),
    ("magmax", {"lambda": 0.5}, False),
    ("consensus", {"threshold": 0.5}, False),
    ("consensus_ties", {"threshold": 0.5, "at_least": 1, "density": 0.4}, False),
    ("ties_sum", {"density": 0.4}, False),
    ("fisher_on_support", {}, False),
    ("fisher_on_support", {}, True),
    ("regmean", {"off_diagonal": 0.5}, False),
    ("regmean", {"off_diagonal": 0.5, "inputs": "tokens", "base": 0.5}, False),
    ("sce_selection", {"density": 0.5}, False),
    ("sce", {}, False),
    ("sce", {"density": 0.3}, False),
    ("emr", {}, False),
    ("tall", {}, False),
    ("spectral_power", {"p": -0.5, "lambda": 1.25}, False),
    ("spectral_power", {"p": 0.5, "floor": 0.25}, True),
    ("iso_c", {}, False),
    ("iso_c", {"floor": 0.01}, True),
    ("iso_c", {"trim": 0.5}, False),
    ("tsv_m", {}, False),
    ("tsv_m", {"rank_share": 0.4, "trim": 0.5}, True),
    ("iso_common", {"common_share": 0.5}, False),
    ("iso_cts", {}, False),
    ("iso_cts", {"common_share": 0.4, "trim": 0.7}, False),
    ("trimmed_sum", {"trim": 0.5}, False),
    ("knots", {}, False),
    ("knots", {"rank": 2, "trim": 0.5}, False),
    ("svc", {}, False),
    ("svc", {"alpha": 1.5, "trim": 0.5}, False),
]
NOT_DYADIC = [
    ("della", {"epsilon": 0.2}, False),
    ("della_linear", {"density": 0.7, "epsilon": 0.3}, True),
    ("wudi", {"ridge": 0.125}, False),
    ("wudi", {"lambda": 0.5, "trim": 0.5}, True),
]
LAPACK = ("regmean", "spectral_power", "iso_c", "wudi", "tsv_m", "iso_common", "iso_cts", "svc", "knots")
"""Methods that solve equations: not the same bits everywhere."""
SOLVED = {"wudi": 1e-4, "tsv_m": 1e-5, "iso_common": 1e-5, "iso_cts": 1e-4, "svc": 1e-4, "knots": 1e-4}
"""How far a method may be from the reference: statistics in fp32 are divided by small numbers."""
CUT = ("tsv_m", "iso_common", "iso_cts", "svc", "knots")
"""Methods that look at directions one by one: which vectors equal ones have is not defined."""


def candidate_for(case: tuple[str, dict, bool], n: int) -> Candidate:
    """The case with dyadic weights of `n` experts that sum to 1, the last one 0 where there are three or more."""
    method, params, weighted = case
    if n == 1 and method == "consensus":
        params = params | {"at_least": 1}  # no more can agree
    if not weighted:
        return Candidate(method, params)
    rest = [2.0 ** -(i + 1) for i in range(n - 1)]
    weights = [*rest, 1 - sum(rest)]
    if n > 2:
        weights[-2:] = [weights[-2] + weights[-1], 0.0]
    return Candidate(method, params, {f"e{i}": w for i, w in enumerate(weights)})


def test_every_method_cites_its_paper_and_has_a_reference_and_a_case():
    assert set(REFERENCES) == set(METHODS) == {method for method, _, _ in CASES + NOT_DYADIC}
    assert all("arXiv " in method.paper for method in METHODS.values())
    for name, method in METHODS.items():
        if method.weights is not None:
            assert any(case == name and weighted for case, _, weighted in CASES + NOT_DYADIC), name


@pytest.mark.parametrize("case", CASES + NOT_DYADIC, ids=str)
@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, NUMEL), st.booleans())
@settings(max_examples=15, deadline=None)
def test_methods_equal_a_dense_reference(case, seed, n, per_expert, full):
    candidate = candidate_for(case, n)
    experts = real_experts(seed, n, per_expert) if case[0] in CUT else make_experts(seed, n, per_expert, full)
    expected = torch.tensor(REFERENCES[candidate.method](experts, candidate))
    near = SOLVED.get(candidate.method, 1e-6)
    torch.testing.assert_close(merge(experts, candidate), expected, rtol=2 * near, atol=near)


def random_tree(rng: random.Random) -> Join:
    """Joins in a tree of random shape, fan-ins and order."""

    def join(items: Sequence[TensorStatistics]) -> TensorStatistics:
        left = list(items)
        while len(left) > 1:
            rng.shuffle(left)
            take = rng.randint(2, min(4, len(left)))
            left = [*left[take:], combine(left[:take])]
        return left[0]

    return join


@pytest.mark.parametrize("case", CASES, ids=str)
@given(st.integers(0, 2**32), st.integers(2, 7), st.integers(1, NUMEL), st.booleans())
@settings(max_examples=10, deadline=None)
def test_any_tree_gives_the_bits_of_the_flat_join_on_dyadic_values(case, seed, n, per_expert, full):
    experts, candidate = make_experts(seed, n, per_expert, full), candidate_for(case, n)
    assert torch.equal(merge(experts, candidate), merge(experts, candidate, random_tree(random.Random(seed))))


def test_candidates_that_share_reductions_do_not_change_each_other():
    experts = make_experts(5, 4, 20, True)
    everything = [Candidate(method, params) for method, params, weighted in CASES if not weighted]
    beside = together(experts, everything)
    for candidate in everything:
        assert torch.equal(merge(experts, candidate), beside[candidate]), str(candidate)


def real_experts(seed: int, n: int, per_expert: int) -> Experts:
    """Values whose sums are rounded, in any order to other bits."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: Expert(
            SparseTensor(SHAPE, e.tensor.indices, torch.randn(e.tensor.values.numel(), generator=g)), e.fisher, e.gram
        )
        for name, e in make_experts(seed, n, per_expert).items()
    }


@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(10, NUMEL), st.randoms())
@settings(max_examples=10, deadline=None)
def test_no_bit_of_a_merge_depends_on_what_else_is_merged(seed, n, per_expert, rng):
    experts = real_experts(seed, n, per_expert)
    shares = [rng.random() + 0.1 for _ in experts]
    weights = {name: share / sum(shares) for name, share in zip(experts, shares, strict=True)}
    everything = [
        Candidate(method, params, weights if weighted else None)
        for method, params, weighted in CASES + NOT_DYADIC
        if int(params.get("at_least", 2)) <= n
    ]
    rng.shuffle(everything)
    beside = together(experts, everything)
    for candidate in everything:
        assert torch.equal(merge(experts, candidate), beside[candidate]), str(candidate)


def test_a_single_expert_is_kept_whole_by_sce():
    (e,) = make_experts(3, 1, 12).values()
    expected = torch.zeros(NUMEL).index_copy_(0, e.tensor.indices, e.tensor.values)
    assert torch.equal(merge({"e0": e}, Candidate("sce", {"density": 0.25})), expected)


def test_a_missing_expert_counts_in_the_mean():
    (e,) = make_experts(0, 1, 10).values()
    mean = Candidate("mean")
    merged = lower(Root(lift(LiftInput(e.tensor, "w", "e0"), candidate_lift(mean)), 4), mean)
    assert torch.equal(merged.values, e.tensor.values / 4)


def test_regmean_of_a_tensor_without_every_gram_matrix_is_the_mean():
    experts = make_experts(1, 3, 12)
    experts["e1"] = Expert(experts["e1"].tensor, experts["e1"].fisher, None)
    torch.testing.assert_close(merge(experts, Candidate("regmean")), merge(experts, Candidate("mean")))


def test_regmean_keeps_the_experts_outputs_on_separate_inputs():
    """Inputs of two experts that span different directions: each expert's outputs are kept exactly."""
    deltas = [torch.randint(-8, 9, SHAPE, generator=torch.Generator().manual_seed(i)) / 8 for i in range(2)]
    inputs = [torch.zeros(6, SHAPE[1]) for _ in range(2)]
    inputs[0][:, :4] = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    inputs[1][:, 4:] = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    experts = {
        f"e{i}": Expert(SparseTensor(SHAPE, torch.arange(NUMEL), d.view(-1)), torch.ones(NUMEL), x.T @ x)
        for i, (d, x) in enumerate(zip(deltas, inputs, strict=True))
    }
    merged = merge(experts, Candidate("regmean", {"off_diagonal": 1})).view(SHAPE)
    for delta, x in zip(deltas, inputs, strict=True):
        torch.testing.assert_close(x @ merged.T, x @ delta.T, rtol=1e-4, atol=1e-4)


def test_regmean_with_singular_gram_matrices_is_finite_and_keeps_equal_experts():
    """One input example for eight inputs: all directions but one are free; experts that agree are not changed."""
    x = torch.randn(1, SHAPE[1], generator=torch.Generator().manual_seed(0))
    delta = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))
    one = Expert(SparseTensor(SHAPE, torch.arange(NUMEL), delta), torch.ones(NUMEL), x.T @ x)
    merged = merge({"e0": one, "e1": one}, Candidate("regmean", {"off_diagonal": 1}))
    torch.testing.assert_close(merged, delta, rtol=1e-5, atol=1e-5)


def test_the_base_holds_regmean_back_and_its_inputs_are_another_reduction():
    """c₀ of the base: with a diagonal alone it divides; merges without it, and of sums over rows, keep their keys."""
    experts = make_experts(2, 3, 20)
    free, held = (merge(experts, Candidate("regmean", {"off_diagonal": 0, "base": x})).view(SHAPE) for x in (0, 3))
    seen = sum(e.gram for e in experts.values()).diagonal() > 0
    torch.testing.assert_close(held[:, seen], free[:, seen] / 4)
    plain = Candidate("regmean")
    assert plain.recipe()["params"] == {"off_diagonal": 0.9}
    assert candidate_lift(plain).recipe()["options"] == {"off_diagonal": 0.9}
    assert candidate_lift(Candidate("regmean", {"base": 2})) == candidate_lift(plain)
    kinds = [candidate_lift(Candidate("regmean", {"inputs": x})).measurement for x in ("rows", "tokens", "answers")]
    assert kinds == ["gram", "gram_tokens", "gram_answers"]


def test_sce_reads_nothing_where_the_selection_lacks_the_tensor():
    (e,) = make_experts(0, 1, 10).values()
    candidate = Candidate("sce")
    lifted = lift(LiftInput(e.tensor, "w", "e0"), candidate_lift(candidate))
    assert lifted.indices.numel() == lower(Root(lifted, 1), candidate).indices.numel() == 0


def test_an_empty_support_lifts_to_nothing_in_every_method():
    empty = SparseTensor(SHAPE, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    for case in CASES + NOT_DYADIC:
        candidate = candidate_for(case, 1)
        merged = merge({"e0": Expert(empty, torch.zeros(0), None)}, candidate)
        assert not merged.any(), str(candidate)


def golden_experts() -> Experts:
    made = {}
    for number in range(3):
        indices = torch.tensor([i for i in range(NUMEL) if (i * 7 + number) % 5 < 3])
        values = ((indices * 37 + number * 11) % 129 - 64) / 64
        fisher = (indices % 7 + 1 + number) / 8
        gram = torch.eye(SHAPE[1]) * (number + 1) + torch.ones(SHAPE[1], SHAPE[1]) / 4
        made[f"e{number}"] = Expert(SparseTensor(SHAPE, indices, values), fisher, gram)
    return made


GOLDEN = {
    "mean {}": "1b4a166fee8b",
    "weighted_mean {} weighted": "316d309f427d",
    "overlap_mean {}": "cdd5796213ad",
    "overlap_mean {} weighted": "974a6de0ce71",
    "task_arithmetic {'lambda': 0.75}": "55044a583f56",
    "task_arithmetic {} weighted": "35cc403cf29b",
    "ties {'lambda': 1.5}": "99bc35deb36c",
    "ties {'density': 0.3}": "7425a73b0ed4",
    "ties {'density': 0.4, 'density_of': 'tensor'} weighted": "b9c9b66974d8",
    "dare_linear {'seed': 3}": "ff10e15cd75f",
    "dare_linear {'density': 0.25} weighted": "0f297f44bcaa",
    "dare_ties {}": "3866e0c277b3",
    "dare_ties {'seed': 1} weighted": "5b66a44138eb",
    "della {'epsilon': 0} weighted": "7375e0c45187",
    "della_linear {'density': 0.25, 'epsilon': 0}": "452ccf8ff91e",
    "breadcrumbs {'density': 0.5, 'gamma': 0.2}": "ad0eeb45f2d2",
    "breadcrumbs {'density': 0.7, 'gamma': 0.6, 'density_of': 'tensor'} weighted": "c3fface9e848",
    "breadcrumbs_ties {'density': 0.5, 'gamma': 0.1, 'density_of': 'tensor'}": "7d87c7ce3d08",
    "breadcrumbs_ties {'density': 0.5} weighted": "7b0a3a1cdff6",
    "magmax {'lambda': 0.5}": "34e4ddb127fd",
    "consensus {'threshold': 0.5}": "c41a39980032",
    "consensus_ties {'threshold': 0.5, 'at_least': 1, 'density': 0.4}": "015f72bbfafb",
    "ties_sum {'density': 0.4}": "54c8397c78f5",
    "fisher_on_support {}": "309cf1f0fa91",
    "fisher_on_support {} weighted": "2bc2e390b92f",
    "regmean {'off_diagonal': 0.5}": "acceb05cfc4a",
    "regmean {'off_diagonal': 0.5, 'inputs': 'tokens', 'base': 0.5}": "dc89df0ecba4",
    "sce_selection {'density': 0.5}": "21b0a5c876b1",
    "sce {}": "0c011ed3b810",
    "sce {'density': 0.3}": "64c8a00ea58d",
    "emr {}": "b02fc1e253f9",
    "tall {}": "e240f504d677",
    "spectral_power {'p': -0.5, 'lambda': 1.25}": "481d83007bb3",
    "spectral_power {'p': 0.5, 'floor': 0.25} weighted": "cefed6ce68f1",
    "iso_c {}": "3e4d751da210",
    "iso_c {'floor': 0.01} weighted": "5fe3f7a5635d",
    "della {'epsilon': 0.2}": "b366a5e7709c",
    "della_linear {'density': 0.7, 'epsilon': 0.3} weighted": "b25af4e0d009",
    "iso_c {'trim': 0.5}": "4199e1c1cabb",
    "tsv_m {}": "561adf1f364a",
    "tsv_m {'rank_share': 0.4, 'trim': 0.5} weighted": "488a7398a3ad",
    "iso_common {'common_share': 0.5}": "75191966ed84",
    "iso_cts {}": "3e4d751da210",
    "iso_cts {'common_share': 0.4, 'trim': 0.7}": "9ad1d10e8dad",
    "trimmed_sum {'trim': 0.5}": "8013e866c2b5",
    "knots {}": "febf462b182c",
    "knots {'rank': 2, 'trim': 0.5}": "640dd52b4893",
    "svc {}": "887c34a19f97",
    "svc {'alpha': 1.5, 'trim': 0.5}": "53a9b456377e",
    "wudi {'ridge': 0.125}": "b711e1a3e5b3",
    "wudi {'lambda': 0.5, 'trim': 0.5} weighted": "f1258e344b26",
}


def test_results_do_not_change_without_a_version():
    """If this fails, raise LIFT_VERSION, STATISTICS_VERSION or LOWER_VERSION, whichever changed, and the digests."""
    assert (LIFT_VERSION, STATISTICS_VERSION, LOWER_VERSION) == (2, 2, 3)
    digests = {}
    for case in CASES + NOT_DYADIC:
        candidate = candidate_for(case, 3)
        merged = merge(golden_experts(), candidate)
        if candidate.method in LAPACK:
            merged = (merged * 2**12).round() + 0.0
        key = f"{candidate.method} {case[1]}{' weighted' if case[2] else ''}"
        digests[key] = hashlib.sha256(merged.numpy().tobytes()).hexdigest()[:12]
    assert digests == GOLDEN


def test_values_that_are_not_finite_are_refused():
    spec = candidate_lift(Candidate("mean"))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(MergeError, match="NaN or infinity"):
            lift(LiftInput(SparseTensor((2,), torch.arange(2), torch.tensor([1.0, bad])), "w", "e"), spec)
    huge = SparseTensor((2,), torch.arange(2), torch.tensor([3e38, 3e38]))  # the sum overflows, the values do not
    assert lift(LiftInput(huge, "w", "e"), spec).arrays["sum"].tolist() == huge.values.tolist()
