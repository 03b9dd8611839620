"""The step on singular values: its known cases, and what makes it a function of a matrix."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import MergeError
from merge.methods.catalogue import lower
from merge.methods.lift import LiftInput, lift
from merge.methods.lowering import Root
from merge.methods.specs import Candidate, candidate_lift, plan_reductions
from merge.methods.spectral import spectrum, split_rows
from merge.methods.statistics import TensorStatistics, combine
from workers.adapters.support import SparseTensor

SEEDS = st.integers(0, 2**32)
SIDES = st.integers(1, 24)
POWERS = st.sampled_from([1.0, 0.5, 0.0, -0.5, -0.75, -1.0, -2.0])


def matrix(seed: int, rows: int, columns: int, rank: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(rows, columns, generator=g)
    return torch.randn(rows, rank, generator=g) @ torch.randn(rank, columns, generator=g)


def orthogonal(seed: int, side: int) -> Tensor:
    return torch.linalg.qr(matrix(seed, side, side).double())[0]


def root(total: Tensor, experts: int = 4, name: str = "w", fused: tuple[int, ...] = ()) -> Root:
    """What is lowered where Σδ is `total`, everywhere."""
    statistics = TensorStatistics(tuple(total.shape), torch.arange(total.numel()), {"sum": total.reshape(-1)}, experts)
    return Root(statistics, experts, None, name, fused)


def step(total: Tensor, p: float, scale: float = 1.0, **params: float | str) -> Tensor:
    """Σδ to the merged δ, through the method."""
    merged = lower(root(total), Candidate("spectral_power", {"p": p, "lambda": scale, **params}))
    dense = torch.zeros(total.numel()).index_copy_(0, merged.indices, merged.values)
    return dense.view(total.shape)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Within a share of the largest entry: what is small beside the others is only as exact as those."""
    largest = float(expected.abs().max())
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * max(largest, 1e-30)


@given(SEEDS, SIDES, SIDES, st.sampled_from([1e-4, 1e-3, 0.5, 1.0]))
@settings(max_examples=30, deadline=None)
def test_power_one_is_task_arithmetic(seed, rows, columns, floor):
    total = matrix(seed, rows, columns)
    close(step(total, 1.0, 0.3, floor=floor), 0.3 * total)


@given(SEEDS, SIDES, SIDES)
@settings(max_examples=30, deadline=None)
def test_power_zero_is_the_published_iso_c(seed, rows, columns):
    """U diag(mean s) Vᵀ, as in the authors' and FusionBench's code, in double precision; of matrices whose singular
    values lie above the floor."""
    u, _, v = torch.linalg.svd(matrix(seed, rows, columns).double(), full_matrices=False)
    s = torch.linspace(1, 0.05, min(rows, columns), dtype=torch.float64)
    total = (u @ torch.diag(s) @ v).float()
    expected = u @ torch.diag(torch.full_like(s, float(s.mean()))) @ v
    close(step(total, 0.0, 1.0, floor=0.001), expected)
    merged = lower(root(total), Candidate("iso_c", {"lambda": 0.45}))
    close(merged.values.view(rows, columns), 0.45 * expected)


@given(SEEDS, SIDES, SIDES, POWERS, st.sampled_from([1e-20, 1e-3, 1e3, 1e20]))
@settings(max_examples=30, deadline=None)
def test_the_result_scales_with_the_change(seed, rows, columns, p, factor):
    total = matrix(seed, rows, columns)
    close(step(factor * total, p), factor * step(total, p).double())


@given(SEEDS, SIDES, SIDES, POWERS, st.one_of(st.none(), st.integers(1, 4)))
@settings(max_examples=40, deadline=None)
def test_rotations_of_input_and_output_carry_over(seed, rows, columns, p, rank):
    """Also where Σδ has a lower rank than its shape: what it lacks is not filled."""
    total = matrix(seed, rows, columns, rank).double()
    left, right = orthogonal(seed + 1, rows), orthogonal(seed + 2, columns)
    turned = (left @ total @ right).float()
    noise = 1e-6 * 0.03 ** min(0.0, p - 1)  # what turning rounds off, times the most that a direction gains
    close(step(turned, p), left @ step(total.float(), p).double() @ right, 1e-4 + 10 * noise)


@given(SEEDS, SIDES, SIDES, POWERS)
@settings(max_examples=20, deadline=None)
def test_a_transposed_change_gives_the_transposed_result(seed, rows, columns, p):
    total = matrix(seed, rows, columns)
    close(step(total.T.contiguous(), p), step(total, p).T)


@given(SEEDS, st.integers(2, 16), st.integers(2, 16), POWERS)
@settings(max_examples=20, deadline=None)
def test_signs_of_singular_vectors_do_not_matter(seed, rows, columns, p):
    found = spectrum(matrix(seed, rows, columns))
    signs = torch.where(torch.arange(found.values.numel()) % 2 == 0, 1.0, -1.0)
    flipped = type(found)(found.values, found.vectors * signs, found.projected * signs, found.wide)
    assert torch.equal(found.reweighted(p, 1e-3), flipped.reweighted(p, 1e-3))


@given(SEEDS, st.integers(1, 6), st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_experts_does_not_matter(seed, n, order):
    """Dyadic changes, whose sums are exact in any order: the same bits."""
    g = torch.Generator().manual_seed(seed)
    deltas = [torch.randint(-16, 17, (5, 7), generator=g) / 64 for _ in range(n)]
    candidate = Candidate("spectral_power", {"p": -0.75})
    spec = candidate_lift(candidate)
    lifted = [lift(LiftInput(SparseTensor((5, 7), torch.arange(35), d.view(-1)), "w", "e"), spec) for d in deltas]
    ordered = lower(Root(combine(lifted), n), candidate)
    shuffled = lower(Root(combine([lifted[at] for at in order if at < n]), n), candidate)
    assert torch.equal(ordered.values, shuffled.values)


@pytest.mark.parametrize("p", [1.0, 0.0, -0.75, -2.0])
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (6, 6), (3, 40), (40, 3)])
def test_zero_and_rank_one_changes(shape, p):
    """A rank-one change has one direction, which only λ scales."""
    assert not step(torch.zeros(shape), p).any()
    one = torch.outer(torch.arange(1.0, shape[0] + 1), torch.arange(1.0, shape[1] + 1))
    close(step(one, p, 0.5), 0.5 * one, 1e-4)


def test_a_direction_that_rounding_alone_fills_stays_small():
    """320 of 400 directions, as 20 LoRA of rank 16 have: the other 80 hold less than a hundredth of the result."""
    total = matrix(0, 400, 500, 320)
    merged = step(total, -0.75).double()
    _, _, right = torch.linalg.svd(total.double())
    assert float((merged @ right[320:].T).norm() / merged.norm()) < 0.01


def test_more_rows_than_fit_at_once_give_the_same(monkeypatch):
    total = matrix(1, 60, 20)
    whole = step(total, -0.5)
    monkeypatch.setattr("merge.methods.spectral.CHUNK_BYTES", 8 * 20 * 7)
    close(step(total, -0.5), whole, 1e-6)


def test_vectors_and_scalars_are_the_mean_or_have_a_scale_of_their_own():
    vector, scalar = torch.arange(6.0), torch.tensor(3.0)
    for total in (vector, scalar):
        assert torch.equal(step(total, -0.75, 7.0), total / 4)  # 4 experts; λ is the matrices'
        assert torch.equal(step(total, -0.75, 7.0, vector_lambda=0.5), total * 0.5)


def test_a_vector_on_a_part_of_its_positions_stays_there():
    statistics = TensorStatistics((6,), torch.tensor([1, 4]), {"sum": torch.tensor([2.0, -4.0])}, 2)
    merged = lower(Root(statistics, 2), Candidate("iso_c"))
    assert merged.indices.tolist() == [1, 4]
    assert merged.values.tolist() == [1.0, -2.0]


def test_convolutions_are_matrices_and_stacked_experts_one_each():
    kernel = matrix(2, 6, 20)
    assert torch.equal(step(kernel.view(6, 5, 2, 2), -0.5), step(kernel, -0.5).view(6, 5, 2, 2))
    stack = torch.stack([matrix(3, 4, 5), matrix(4, 4, 5)])
    candidate = Candidate("spectral_power", {"p": -0.5})
    merged = lower(root(stack, name="model.layers.0.mlp.experts.gate_up_proj"), candidate).values.view(stack.shape)
    for found, own in zip(merged, stack, strict=True):
        assert torch.equal(found, step(own, -0.5))
    assert split_rows("conv.weight", (6, 5, 3)) == (6,)
    assert split_rows("mlp.experts.down_proj", (2, 4, 5)) == (4, 4)


def test_a_fused_weight_is_one_matrix_or_its_parts():
    total, rows = matrix(5, 16, 8), (8, 4, 4)
    parts = lower(root(total, fused=rows), Candidate("spectral_power", {"p": -0.5, "parts": "qkv"}))
    for found, own in zip(parts.values.view(16, 8).split(rows), total.split(rows), strict=True):
        assert torch.equal(found, step(own, -0.5))
    stored = lower(root(total, fused=rows), Candidate("spectral_power", {"p": -0.5}))
    assert torch.equal(stored.values.view(16, 8), step(total, -0.5))


@given(SEEDS, st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_density_keeps_the_largest(seed, density):
    total = matrix(seed, 9, 11)
    whole, thin = step(total, -0.75).view(-1), step(total, -0.75, density=density).view(-1)
    kept = thin.nonzero().view(-1)
    assert kept.numel() == max(1, int(density * 99))
    assert torch.equal(thin[kept], whole[kept])
    assert float(whole[kept].abs().min()) >= float(whole[thin == 0].abs().max())


def test_sums_that_are_not_finite_are_refused():
    for bad in (float("inf"), float("nan")):
        total = matrix(6, 4, 4)
        total[1, 2] = bad
        with pytest.raises(MergeError, match="diverged expert"):
            step(total, -0.5)
    with pytest.raises(MergeError, match="lower λ"):
        step(torch.full((4, 4), 3e38), 1.0, 10.0)


def test_one_root_finds_its_singular_vectors_once(monkeypatch):
    calls = []
    monkeypatch.setattr("merge.methods.lowering.spectrum", lambda part: calls.append(1) or spectrum(part))
    shared = root(matrix(7, 12, 10))
    candidates = [Candidate("spectral_power", {"p": p, "lambda": x}) for p in (-0.5, -1) for x in (1, 1.5)]
    merged = [lower(shared, candidate) for candidate in [*candidates, Candidate("iso_c")]]
    assert len(calls) == 1
    assert all(each.indices is merged[0].indices for each in merged)
    torch.testing.assert_close(merged[1].values, 1.5 * merged[0].values)


def test_candidates_of_any_power_share_the_reduction_of_sums():
    many = [Candidate("task_arithmetic"), Candidate("iso_c"), Candidate("spectral_power", {"p": -1}), Candidate("mean")]
    (reduction,) = plan_reductions(many)
    assert reduction.spec.statistics == ("sum",)
    assert len({candidate_lift(candidate) for candidate in many}) == 1


def test_the_same_bits_on_one_machine():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {hashlib.sha256(step(matrix(8, 96, 64), -0.75).numpy().tobytes()).hexdigest() for _ in range(3)}
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"p": 5}, "a number from -4 to 4"),
        ({"floor": 0}, "a number above 0 to 1"),
        ({"density": 0}, "a number above 0 to 1"),
        ({"parts": "q"}, "stored, qkv"),
        ({"vector_lambda": "sum"}, "a number above 0 to 10, or mean"),
        ({"power": -1}, "accepted|Accepted: p, lambda"),
    ],
)
def test_wrong_parameters_are_told_what_is_accepted(params, message):
    with pytest.raises(MergeError, match=message):
        Candidate("spectral_power", params)


def test_a_candidate_with_a_word_survives_json():
    candidate = Candidate("spectral_power", {"p": -0.5})
    assert candidate.params["vector_lambda"] == "mean"
    assert Candidate.from_dict(json.loads(candidate.to_json())) == candidate
