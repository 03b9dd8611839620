"""What a lift does beside the statistics of plain values: thinning out, weights, Fisher, Gram matrices, references."""

import pytest
import torch

from infra.errors import MergeError
from merge.methods.lift import LiftInput, lift
from merge.methods.sparsify import uniform
from merge.methods.specs import Candidate, LiftSpec, candidate_lift
from merge.methods.statistic_table import tall_mask
from workers.adapters.support import SparseTensor

SHAPE = (3, 4)


def tensor(positions: dict[int, float], dtype: torch.dtype = torch.float32) -> SparseTensor:
    values = torch.tensor([positions[i] for i in sorted(positions)], dtype=dtype)
    return SparseTensor(SHAPE, torch.tensor(sorted(positions), dtype=torch.int64), values)


ONE = tensor({0: 1.0, 3: -2.0, 5: 0.0, 8: 0.5, 11: -0.25})


def spec_of(method: str, **params: object) -> LiftSpec:
    return candidate_lift(Candidate(method, params))


def item(t: SparseTensor = ONE, **more: object) -> LiftInput:
    return LiftInput(t, "w", "e", **more)


def test_trimming_counts_on_the_support_or_the_tensor():
    support = lift(item(), spec_of("ties", density=0.5))  # 2 of 5
    assert support.indices.tolist() == [0, 3]
    whole = lift(item(), spec_of("ties", density=0.25, density_of="tensor"))  # 3 of 12
    assert whole.indices.tolist() == [0, 3, 8]
    more = lift(item(), spec_of("ties", density=0.9, density_of="tensor"))  # 10 of 12, of which 5 are held
    assert more.indices.tolist() == ONE.indices.tolist()


def test_what_was_drawn_is_rescaled_by_its_keep_probability():
    full = SparseTensor(SHAPE, torch.arange(12), torch.arange(1, 13) / 4)
    found = lift(item(full), spec_of("dare_linear", density=0.25, seed=3))
    draws = uniform(3, "e", "w", 12)
    assert found.indices.tolist() == (draws < 0.25).nonzero().view(-1).tolist()
    assert torch.equal(found.arrays["sum"], full.values[found.indices] * 4)
    other = lift(LiftInput(full, "w", "another expert"), spec_of("dare_linear", density=0.25, seed=3))
    assert other.indices.tolist() != found.indices.tolist()
    pruned = lift(item(full), spec_of("della", density=0.5, epsilon=0.25, seed=3))
    probabilities = torch.tensor([0.25, 0.25 + 1 / 6, 0.25 + 2 / 6, 0.75]).repeat(3)  # ranks rise within each row
    assert pruned.indices.tolist() == (draws < probabilities).nonzero().view(-1).tolist()
    expected = full.values[pruned.indices] / probabilities[pruned.indices]
    torch.testing.assert_close(pruned.arrays["positive_mass"], expected)


def test_a_one_dimensional_tensor_is_one_row_of_magprune():
    vector = SparseTensor((4,), torch.arange(4), torch.tensor([4.0, 3.0, 2.0, 1.0]))
    spec = spec_of("della_linear", density=0.5, epsilon=0.5 - 2**-20)
    assert 0 in lift(item(vector), spec).indices.tolist()  # the largest stays almost surely, the smallest hardly ever
    assert 3 not in lift(item(vector), spec).indices.tolist()


def test_stored_zeros_have_no_sign_whatever_their_bits_or_weight():
    for spec, weight in ((LiftSpec(("sum",)), 1.0), (LiftSpec(("sum",), weights=()), 0.0)):
        (found,) = lift(item(tensor({1: -0.0}), weight=weight), spec).arrays.values()
        assert not bool(torch.signbit(found).any())


def test_values_are_read_in_fp32():
    assert lift(item(tensor({1: 1.5}, torch.bfloat16)), LiftSpec(("sum",))).arrays["sum"].dtype == torch.float32


def test_fisher_masses_and_their_refusals():
    spec = spec_of("fisher_on_support")
    f = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    found = lift(item(measured=f), spec).arrays
    assert found["fisher"].tolist() == f.tolist()
    assert found["fisher_mass"].tolist() == [1.0, -4.0, 0.0, 2.0, -1.25]
    weighted = lift(item(measured=f, weight=0.5), candidate_lift(Candidate("fisher_on_support", {}, {"e": 0.5})))
    assert weighted.weighted
    assert weighted.arrays["fisher_mass"].tolist() == [0.5, -2.0, 0.0, 1.0, -0.625]
    with pytest.raises(MergeError, match="no Fisher information"):
        lift(item(), spec)
    for bad in (f[:3], f - 1, f * float("nan")):
        with pytest.raises(MergeError, match="5 finite numbers above 0"):
            lift(item(measured=bad), spec)


def test_gram_products_cover_the_tensor_and_shrink_off_the_diagonal():
    gram = torch.tensor([[4.0, 2.0, 0.0, 0.0], [2.0, 4.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = lift(item(measured=gram), spec_of("regmean", off_diagonal=0.5))
    shrunk = gram.clone()
    shrunk[0, 1] = shrunk[1, 0] = 1.0
    dense = torch.zeros(12).index_copy_(0, ONE.indices, ONE.values)
    assert found.indices.tolist() == list(range(12))
    assert torch.equal(found.arrays["gram"], shrunk)
    assert torch.equal(found.arrays["sum"], dense)
    assert torch.equal(found.arrays["gram_product"], (dense.view(SHAPE) @ shrunk).view(-1))
    assert found.arrays["gram_count"].tolist() == [1.0]
    assert gram[0, 1] == 2.0
    without = lift(item(), spec_of("regmean"))
    assert without.indices.tolist() == ONE.indices.tolist()
    assert without.arrays["gram"].numel() == without.arrays["gram_count"].numel() == 0
    for bad in (torch.eye(3), torch.eye(4) * float("inf")):
        with pytest.raises(MergeError, match=r"finite and \[in, in\] of a tensor \[out, in\]"):
            lift(item(measured=bad), spec_of("regmean"))


def test_agreement_is_the_tall_mask_against_the_reference():
    reference = tensor({0: 1.5, 3: 5.0, 8: 1.0, 9: 7.0})
    found = lift(item(reference=reference), spec_of("consensus", threshold=0.5)).arrays["agreement_count"]
    # |1| ≥ ½|½|, |2| < ½|7|, 0 ≥ ½|0|, |½| ≥ ½|½|, |¼| ≥ ½|¼| (11 is not in the reference)
    assert found.tolist() == [1, 0, 1, 1, 1]
    assert tall_mask(torch.tensor([1.0]), torch.tensor([3.5]), 0.4).tolist() == [True]


def test_sce_weighs_an_expert_by_its_energy_on_the_selection():
    reference = tensor({0: 2.0, 3: 1.0, 8: 0.0, 9: 7.0})
    found = lift(item(reference=reference), spec_of("sce"))
    energy = 1.0 + 4.0 + 0.25
    assert found.indices.tolist() == [0, 3, 8]
    assert found.arrays["agreeing_weight"].tolist() == [energy, 0.0, energy]  # an elected zero counts as positive
    assert found.arrays["agreeing_mass"].tolist() == [energy, 0.0, 0.5 * energy]
