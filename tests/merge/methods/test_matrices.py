"""Methods that read each expert's own matrix: WUDI solved, TSV-M, Iso-CTS, KnOTS, SVC; what they share with Iso-C."""

import hashlib
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import MergeError
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.methods.catalogue import lower
from merge.methods.directions import common_directions, in_order, leading, orthogonal
from merge.methods.lift import LiftInput, lift
from merge.methods.lowering import Root
from merge.methods.specs import Candidate, candidate_lift, check_served, plan_reductions
from merge.methods.statistics import TensorStatistics, combine
from merge.tree.reduce import ExpertChild, flat_merge
from tests.merge.methods.test_spectral import close, matrix
from tests.merge.methods.test_spectral import orthogonal as rotation
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, save_adapter
from workers.tensors.source import FileSource

SEEDS = st.integers(0, 2**32)
SIDES = st.integers(6, 20)
METHODS = ["wudi", "tsv_m", "iso_cts", "svc"]
"""Those that turn with inputs and outputs, and trim before."""
ALL = [*METHODS, "knots"]
SHARE = {"tsv_m": {"rank_share": 0.2}, "iso_cts": {"common_share": 0.5}}


def full(delta: Tensor) -> SparseTensor:
    return SparseTensor(tuple(delta.shape), torch.arange(delta.numel()), delta.reshape(-1))


def merge(deltas: Sequence[Tensor | SparseTensor], candidate: Candidate, name: str = "w", joined=combine) -> Tensor:
    """The merged δ of one tensor, dense, through lift, combine and lower and all rounds."""
    experts = [delta if isinstance(delta, SparseTensor) else full(delta) for delta in deltas]
    done: dict[Candidate, SparseTensor] = {}
    for reduction in plan_reductions([candidate], len(experts)):
        read = done.get(reduction.spec.reference) if reduction.spec.reference else None
        parts = [lift(LiftInput(each, name, "e", reference=read), reduction.spec) for each in experts]
        for each in reduction.candidates:
            done[each] = lower(Root(joined(parts), len(experts), read, name), each)
    merged = done[candidate]
    merged.check()
    return torch.zeros(merged.numel).index_copy_(0, merged.indices, merged.values).view(merged.shape)


def by(method: str, scale: float = 1.0) -> Candidate:
    return Candidate(method, {"lambda": scale, **SHARE.get(method, {})})


def some(seed: int, rows: int, columns: int, n: int = 4) -> list[Tensor]:
    """Experts of unlike sizes with a direction in common."""
    shared = matrix(seed, rows, columns, 1)
    return [(1 + at) * matrix(seed + at + 1, rows, columns) + 2 * shared for at in range(n)]


@pytest.mark.parametrize("method", ALL)
@given(SEEDS, SIDES, SIDES, st.sampled_from([1e-20, 1e-3, 1e10]))
@settings(max_examples=10, deadline=None)
def test_the_result_scales_with_the_changes_and_lambda(method, seed, rows, columns, factor):
    deltas = some(seed, rows, columns)
    expected = merge(deltas, by(method))
    close(merge([factor * d for d in deltas], by(method, 0.5)), 0.5 * factor * expected.double(), 1e-3)


@pytest.mark.parametrize("method", METHODS)
@given(SEEDS, SIDES, SIDES)
@settings(max_examples=10, deadline=None)
def test_rotations_of_input_and_output_carry_over(method, seed, rows, columns):
    """WUDI's ridge is one for all directions, so that it turns as well."""
    deltas = some(seed, rows, columns)
    left, right = rotation(seed + 11, rows), rotation(seed + 12, columns)
    turned = merge([(left @ d.double() @ right).float() for d in deltas], by(method))
    close(turned, left @ merge(deltas, by(method)).double() @ right, 1e-3)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (8, 8)])
def test_neither_the_order_of_experts_nor_the_tree_can_be_seen(method, shape):
    """WUDI adds up numbers that are rounded: the same within rounding."""
    deltas = [(d * 64).round() / 64 for d in some(3, *shape, n=5)]
    expected = merge(deltas, by(method))

    def tree(parts: Sequence[TensorStatistics]) -> TensorStatistics:
        mixed = list(parts)
        random.Random(1).shuffle(mixed)
        return combine([combine(mixed[:2]), combine([mixed[2], combine(mixed[3:])])])

    found = merge(deltas, by(method), joined=tree)
    if method == "wudi":
        close(found, expected, 1e-4)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (6, 6), (3, 40), (40, 3)])
def test_nothing_changes_and_one_expert_of_one_direction(method, shape):
    assert not merge([torch.zeros(shape)] * 3, by(method)).any()
    one = torch.outer(torch.arange(1.0, shape[0] + 1), torch.arange(1.0, shape[1] + 1))
    params = {"tsv_m": {"rank_share": 1.0}, "iso_cts": {"common_share": 1.0}, "wudi": {"ridge": 1e-3}}.get(method, {})
    share = 1 / min(shape) if method == "iso_cts" else 1.0  # the mean over all directions that there could be
    close(
        merge([one], Candidate(method, {"lambda": 0.5, **params})),
        0.5 * share * one,
        1e-2 if method == "wudi" else 1e-4,
    )


def test_experts_of_one_direction_each_that_do_not_meet_are_kept_whole():
    """Of TSV-M and WUDI: their inputs and outputs do not overlap."""
    first, second = torch.zeros(6, 8), torch.zeros(6, 8)
    first[:2, :3] = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0, 2.0]))
    second[3:, 4:] = torch.outer(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 0.0, 1.0]))
    close(merge([first, second], Candidate("tsv_m", {"rank_share": 0.5})), first + second, 1e-5)
    close(merge([first, second], Candidate("wudi", {"ridge": 1e-4})), first + second, 2e-3)


def test_equal_experts_of_tsv_m_are_not_counted_many_times():
    delta = matrix(1, 8, 6, 2)
    close(merge([delta] * 4, Candidate("tsv_m", {"rank_share": 0.5})), delta, 1e-4)


def lora(seed: int, rows: int, columns: int, rank: int = 2, n: int = 3) -> list[Tensor]:
    return [(1 + at) * matrix(seed + at, rows, columns, rank) for at in range(n)]


@given(SEEDS, SIDES, SIDES)
@settings(max_examples=10, deadline=None)
def test_knots_turn_with_the_outputs_and_do_not_see_the_sign_of_all_experts(seed, rows, columns):
    deltas, left = lora(seed, rows, columns), rotation(seed + 11, rows)
    expected = merge(deltas, by("knots")).double()
    close(merge([(left @ d.double()).float() for d in deltas], by("knots")), left @ expected, 1e-3)
    close(merge([-d for d in deltas], by("knots")), -expected, 1e-4)


def test_knots_of_experts_without_common_outputs_are_their_sum_and_of_equal_ones_one():
    first, second = torch.zeros(7, 8), torch.zeros(7, 8)
    first[:3], second[4:] = matrix(1, 3, 8, 2), matrix(2, 3, 8, 2)
    close(merge([first, second], by("knots")), first + second, 1e-5)
    close(merge([first] * 3, by("knots")), first, 1e-5)


def test_knots_of_a_higher_rank_are_cut_to_their_largest_directions():
    deltas = some(4, 9, 12)
    cut = [(u[:, :2] * s[:2]) @ v[:2] for u, s, v in (torch.linalg.svd(d, full_matrices=False) for d in deltas)]
    found = merge(deltas, Candidate("knots", {"rank": 2}))
    close(found, merge(cut, Candidate("knots")), 1e-4)
    assert float((found - merge(deltas, Candidate("knots"))).abs().max()) > 0.1


def test_knots_trim_where_they_elect_and_lift_once_for_all_shares():
    deltas = lora(5, 8, 10)
    shares = [Candidate("knots", {"trim": x}) for x in (0.1, 1.0)]
    assert len(plan_reductions(shares, 3)) == 1
    thin, whole = (merge(deltas, each) for each in shares)
    assert 0 < float(thin.norm()) != float(whole.norm())


def test_svc_of_equal_experts_is_one_of_them_and_of_strangers_their_sum():
    """What all have alike is counted once; experts that share neither inputs nor outputs stay as they are, and grow
    where α lets them."""
    delta = matrix(1, 8, 6)
    close(merge([delta] * 4, Candidate("svc", {"alpha": 0.5})), delta, 1e-5)
    first, second = torch.zeros(6, 8), torch.zeros(6, 8)
    first[:2, :3], second[3:, 4:] = matrix(2, 2, 3), matrix(3, 3, 4)
    for alpha, gain in ((1.0, 1.0), (0.5, 2 / 1.5)):
        close(merge([first, second], Candidate("svc", {"alpha": alpha})), gain * (first + second), 1e-5)


@given(SEEDS, SIDES, SIDES, st.floats(0.01, 3))
@settings(max_examples=10, deadline=None)
def test_svc_keeps_the_sums_directions_and_with_alpha_one_none_grows(seed, rows, columns, alpha):
    deltas = some(seed, rows, columns)
    u, s, v = torch.linalg.svd(sum(deltas).double(), full_matrices=False)
    turned = u.T @ merge(deltas, Candidate("svc", {"alpha": alpha})).double() @ v.T
    assert float((turned - torch.diag(turned.diagonal())).abs().max()) <= 1e-4 * float(s[0])
    gains = turned.diagonal() / s
    assert bool((gains >= 0).all())
    assert float(gains.max()) <= 1 / alpha + 1e-4


def test_svc_finds_the_sums_directions_once_for_all_experts_and_candidates(monkeypatch, tmp_path):
    import merge.methods.statistic_table as module

    calls = []
    monkeypatch.setattr(module, "leading", lambda *given: calls.append(given) or leading(*given))
    children = []
    for at, delta in enumerate(some(1, 6, 8)):
        save_adapter(tmp_path / f"e{at}", {"w": full(delta)}, AdapterMeta("b" * 64))
        children.append(ExpertChild(f"e{at}", AdapterDelta(FileSource(tmp_path / f"e{at}"), f"e{at}")))
    many = [Candidate("svc", {"alpha": x}) for x in (0.5, 1)]
    flat_merge(children, many, lambda c: AdapterWriter(tmp_path / str(c)), scratch=tmp_path)
    assert len(calls) == 1


def test_wudi_is_the_least_of_its_objective():
    """Any step away from it, with hardly a ridge, costs more."""
    deltas = [d.double() for d in some(5, 7, 9, 5)]

    def objective(w: Tensor) -> float:
        return float(sum(((w - d) @ d.T).square().sum() / d.square().sum() for d in deltas))

    found = merge([d.float() for d in deltas], Candidate("wudi", {"ridge": 1e-4})).double()
    for seed in range(5):
        assert objective(found + 0.05 * matrix(seed, 7, 9).double()) > objective(found)
    assert objective(found) < objective(sum(deltas))
    assert objective(found) < objective(sum(deltas) / 5)


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_leading_directions_are_those_of_the_singular_value_decomposition(seed, rows, columns, keep):
    delta = matrix(seed, rows, columns)
    found = leading(delta, keep, 3).double()
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    kept = min(keep, len(s))
    assert found.shape == (kept, 2 + rows + columns)
    assert bool((found[:, 0] == 3).all())
    close(found[:, 1], s[:kept], 1e-5) if kept else None
    left, right = found[:, 2 : 2 + rows], found[:, 2 + rows :]
    close((left.T * found[:, 1]) @ right, u[:, :kept] @ torch.diag(s[:kept]) @ v[:kept], 1e-4)
    for row in right:  # the sign is the vectors' own
        assert float(row[row.abs().argmax()]) > 0
    assert torch.equal(leading(-delta, keep, 3)[:, 2 + rows :], found[:, 2 + rows :].float())


def test_what_rounding_leaves_of_an_expert_is_no_direction_of_its_own():
    """One expert of rank 2, all of whose directions are common."""
    delta = matrix(4, 8, 12, 2)
    found = merge([delta], Candidate("iso_cts", {"lambda": 1, "common_share": 0.5}))
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    close(found, float(s.sum()) / 8 * u[:, :2] @ v[:2], 1e-5)


def test_a_lower_rank_has_fewer_directions():
    assert leading(matrix(2, 30, 20, 3), 9).shape[0] == 3
    assert leading(torch.zeros(5, 4), 9).shape[0] == 0


@given(SEEDS, st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_orthogonal_rows_are_the_procrustes_solution(seed, rows, columns):
    given_rows = matrix(seed, rows, columns).double()
    u, _, v = torch.linalg.svd(given_rows, full_matrices=False)
    close(orthogonal(given_rows), u @ v, 1e-6)


def test_dependent_rows_stay_on_what_they_span():
    row = torch.tensor([[3.0, 4.0]], dtype=torch.float64) / 5
    close(orthogonal(row.repeat(4, 1)), row.repeat(4, 1) / 2, 1e-12)
    assert orthogonal(torch.zeros(0, 3)).shape == (0, 3)


def test_common_directions_of_an_isotropic_matrix():
    u, v = rotation(1, 7)[:, :3], rotation(2, 5)[:, :3]
    for isotropic in (2.5 * u @ v.T, 2.5 * v @ u.T):
        scale, left, right = common_directions(isotropic.float())
        assert scale == pytest.approx(2.5, rel=1e-6)
        close(left.T @ right, isotropic / 2.5, 1e-6)
    assert common_directions(torch.zeros(4, 6))[1].shape == (0, 4)


def test_rows_have_one_order():
    rows = torch.randint(0, 2, (30, 6), generator=torch.Generator().manual_seed(0)).float()
    expected = in_order(rows)
    assert torch.equal(in_order(rows[torch.randperm(30)]), expected)
    assert bool((expected[:-1, 1] >= expected[1:, 1]).all())


@pytest.mark.parametrize("method", ALL)
def test_vectors_convolutions_and_stacked_experts(method):
    vectors = [torch.arange(6.0), torch.ones(6), torch.zeros(6), torch.ones(6)]
    candidate = by(method, 3.0)
    assert torch.equal(merge(vectors, candidate), sum(vectors) / 4)  # λ is the matrices'
    own = Candidate(method, {**candidate.params, "vector_lambda": 0.5})
    assert torch.equal(merge(vectors, own), sum(vectors) * 0.5)
    kernels = some(2, 6, 20)
    expected = merge(kernels, candidate)
    assert torch.equal(merge([k.view(6, 5, 2, 2) for k in kernels], candidate), expected.view(6, 5, 2, 2))
    stacks = [torch.stack([a, b]) for a, b in zip(some(3, 6, 7), some(4, 6, 7), strict=True)]
    merged = merge(stacks, candidate, "model.layers.0.mlp.experts.gate_up_proj")
    for at in range(2):
        assert torch.equal(merged[at], merge([stack[at] for stack in stacks], candidate))


@pytest.mark.parametrize("method", [*METHODS, "iso_c", "spectral_power"])
def test_trim_keeps_the_largest_of_each_experts_own_values(method):
    deltas = some(6, 8, 10)
    thin = []
    for delta in deltas:
        flat = delta.view(-1)
        at = flat.abs().topk(24).indices.sort().values
        thin.append(SparseTensor((8, 10), at, flat[at]))
    trimmed = Candidate(method, {**by(method).params, "trim": 0.3})
    assert torch.equal(merge(deltas, trimmed), merge(thin, by(method)))


@pytest.mark.parametrize("method", ALL)
def test_density_keeps_the_largest_of_the_merge(method):
    deltas, candidate = some(7, 9, 11), by(method)
    whole = merge(deltas, candidate).view(-1)
    thin = merge(deltas, Candidate(method, {**candidate.params, "density": 0.2})).view(-1)
    kept = thin.nonzero().view(-1)
    assert kept.numel() == int(0.2 * 99)
    assert torch.equal(thin[kept], whole[kept])


@pytest.mark.parametrize("method", ALL)
def test_experts_without_the_tensor_or_with_an_empty_support(method):
    none = SparseTensor((6, 8), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert not merge([none, none], by(method)).any()
    deltas = some(8, 6, 8)
    expected = merge([*deltas, torch.zeros(6, 8)], by(method))
    close(merge([*deltas, none], by(method)), expected, 1e-6)


@pytest.mark.parametrize("method", ALL)
def test_the_same_bits_on_one_machine(method):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        deltas = some(9, 48, 32)
        found = {hashlib.sha256(merge(deltas, by(method)).numpy().tobytes()).hexdigest() for _ in range(3)}
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_ridges_and_scales_share_one_reduction_and_its_equations(monkeypatch):
    import merge.methods.matrices as module

    calls = []
    solve = module._regressions
    monkeypatch.setattr(module, "_regressions", lambda root, ridge: calls.append(ridge) or solve(root, ridge))
    many = [Candidate("wudi", {"ridge": r, "lambda": x}) for r in (0.001, 0.01) for x in (0.5, 1)]
    (reduction,) = plan_reductions(many, 4)
    parts = [lift(LiftInput(full(d), "w", "e"), reduction.spec) for d in some(1, 6, 8)]
    root = Root(combine(parts), 4, None, "w")
    merged = [lower(root, each) for each in many]
    assert calls == [0.001, 0.01]
    torch.testing.assert_close(merged[1].values, 2 * merged[0].values)


def test_an_even_share_needs_the_number_of_experts():
    even, fixed = Candidate("tsv_m"), Candidate("tsv_m", {"rank_share": 0.25})
    with pytest.raises(MergeError, match="how many experts"):
        candidate_lift(even)
    assert candidate_lift(even, 4) == candidate_lift(fixed)
    assert candidate_lift(fixed, 3) == candidate_lift(fixed, 4)
    check_served(even, candidate_lift(fixed), 4)
    with pytest.raises(MergeError, match="cannot be lowered"):
        check_served(even, candidate_lift(fixed), 5)
    assert Candidate.from_dict(even.to_dict()) == even


def test_a_parameter_that_came_later_is_in_no_recipe_at_its_default():
    assert "trim" not in Candidate("spectral_power").recipe()["params"]
    assert "trim" not in Candidate("iso_c").to_dict()["params"]
    assert Candidate("iso_c", {"trim": 0.5}).recipe()["params"]["trim"] == 0.5
    assert Candidate.from_dict(Candidate("iso_c").to_dict()) == Candidate("iso_c")


@pytest.mark.parametrize("method", ALL)
def test_what_is_not_finite_is_refused(method):
    with pytest.raises(MergeError, match=r"diverged expert|overflows"):
        merge([torch.full((6, 6), 3e38)] * 8, by(method, 10.0))
