"""The methods against the packages that people use: mergekit on fp32 base + δ, PEFT's merge utilities on dense δ.

Values are real numbers without ties of magnitude. mergekit trims over the whole tensor (`density_of: tensor`), and by
default rescales what DARE and DELLA keep to the L1 norm of the tensor; the papers, PEFT and this project divide by the
keep probability, so those two are compared by their masks, injected through `torch.bernoulli`.
"""

import warnings

import peft.utils.merge_utils as peft_merge
import pytest
import torch
from mergekit import sparsify as kit_sparsify
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorBatch, TensorGroup
from torch import Tensor

from merge.methods.catalogue import lower
from merge.methods.lift import LiftInput, lift
from merge.methods.lowering import Root
from merge.methods.sparsify import drop, magprune, uniform
from merge.methods.specs import Candidate, plan_reductions
from merge.methods.statistics import combine
from workers.adapters.support import SparseTensor

SHAPE = (12, 20)
NUMEL = 240
NAMES = ["a", "b", "c", "d", "e"]


def make(density: float, seed: int = 0) -> dict[str, SparseTensor]:
    """Experts with supports of that density (1: full)."""
    g = torch.Generator().manual_seed(seed)
    count = int(density * NUMEL)
    made = {}
    for name in NAMES:
        magnitudes = (torch.randperm(2**19, generator=g)[:count] + 1) / 2**20  # no ties, and base + δ is exact
        values = magnitudes * (torch.randint(0, 2, (count,), generator=g) * 2 - 1)
        made[name] = SparseTensor(SHAPE, torch.randperm(NUMEL, generator=g)[:count].sort().values, values)
    return made


def dense(tensor: SparseTensor) -> Tensor:
    return torch.zeros(NUMEL).index_copy_(0, tensor.indices, tensor.values.float()).view(tensor.shape)


def merge(experts: dict[str, SparseTensor], candidate: Candidate) -> Tensor:
    done: dict[Candidate, SparseTensor] = {}
    for r in plan_reductions([candidate]):
        read = done[r.spec.reference] if r.spec.reference else None
        parts = [
            lift(LiftInput(t, "w", n, r.spec.weight_of(n), read, torch.ones(t.values.numel())), r.spec)
            for n, t in experts.items()
        ]
        for c in r.candidates:
            done[c] = lower(Root(combine(parts), len(experts), read), c)
    return dense(done[candidate])


def base() -> Tensor:
    """The weights that mergekit's checkpoints start from: multiples of 2**-10, so that base + δ is exact in fp32."""
    return torch.randint(-1024, 1025, SHAPE, generator=torch.Generator().manual_seed(9)) / 1024


def mergekit(method: str, experts: dict[str, SparseTensor], weights: dict[str, float] | None = None, **options: object):
    """The merged δ of mergekit's own method on fp32 checkpoints base + δ; `density`, `gamma`, `epsilon` for all."""
    group = TensorGroup.from_tensors(
        [base(), *(base() + dense(t) for t in experts.values())], ids=["base", *experts], base_index=0
    )
    each = {key: dict.fromkeys(experts, options.pop(key)) for key in ("density", "gamma", "epsilon") if key in options}
    settings = {"int8_mask": False, "normalize": False, "rescale": False, "lambda": 1.0, "density": each.get("density")}
    settings = {**settings, "density": dict.fromkeys(experts, 1.0), **each, **options}
    weight = weights or dict.fromkeys(experts, 1.0)
    return registry.get(method).merge_group(group, weight=weight, **settings) - base()


WEIGHTS = {"a": 0.5, "b": 1.0, "c": 2.0, "d": 0.25, "e": 0.0}


@pytest.mark.parametrize("support", [1.0, 0.3])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_ties_is_mergekits(support, weights, density):
    experts = make(support)
    ours = merge(experts, Candidate("ties", {"density": density, "density_of": "tensor", "lambda": 0.7}, weights))
    theirs = mergekit("ties", experts, weights, density=density, normalize=True, **{"lambda": 0.7})
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("support", [1.0, 0.3])
@pytest.mark.parametrize("weights", [None, {**WEIGHTS, "e": -1.0}])
def test_task_arithmetic_is_mergekits(support, weights):
    experts = make(support)
    ours = merge(experts, Candidate("task_arithmetic", {"lambda": 0.4}, weights))
    torch.testing.assert_close(ours, mergekit("task_arithmetic", experts, weights, **{"lambda": 0.4}))


def test_means_are_mergekits_linear_on_checkpoints():
    """mergekit averages checkpoints, and the base cancels up to fp32 rounding."""
    experts, start = make(0.3), base()
    shares = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.0}
    batch = TensorBatch(tuple((start + dense(t))[None] for t in experts.values()))
    linear = registry.get("linear").merge_batch
    for ours, weights in (
        (Candidate("mean"), torch.ones(1, 5)),
        (Candidate("weighted_mean", {}, shares), torch.tensor([list(shares.values())])),
    ):
        theirs = linear(batch, weight=weights, normalize=True)[0]
        torch.testing.assert_close(start + merge(experts, ours), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("support", [1.0, 0.3])
@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.2, 0.05), (0.1, 0.1), (0.7, 0.5)])
def test_breadcrumbs_are_mergekits(support, density, gamma):
    experts = make(support)
    params = {"density": density, "gamma": gamma, "density_of": "tensor"}
    ours = merge(experts, Candidate("breadcrumbs", {**params, "lambda": 0.6}, WEIGHTS))
    theirs = mergekit("breadcrumbs", experts, WEIGHTS, density=density, gamma=gamma, **{"lambda": 0.6})
    torch.testing.assert_close(ours, theirs)
    ours = merge(experts, Candidate("breadcrumbs_ties", params))
    torch.testing.assert_close(
        ours, mergekit("breadcrumbs_ties", experts, density=density, gamma=gamma, normalize=True)
    )


@pytest.mark.parametrize("support", [1.0, 0.3])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_sce_is_mergekits(support, density):
    experts = make(support, 3)
    group = TensorGroup.from_tensors(
        [base(), *(base() + dense(t) for t in experts.values())], ids=["base", *experts], base_index=0
    )
    theirs = registry.get("sce").merge_group(group, int8_mask=False, select_topk=density) - base()
    torch.testing.assert_close(merge(experts, Candidate("sce", {"density": density})), theirs)


@pytest.fixture
def injected(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """`torch.bernoulli` draws with this project's uniform numbers, expert after expert; lists the probabilities."""
    seen: list[Tensor] = []
    experts = iter(NAMES)

    def bernoulli(probabilities: Tensor) -> Tensor:
        seen.append(probabilities)
        draws = uniform(7, next(experts), "w", probabilities.numel())
        return (draws.view(probabilities.shape) < probabilities).to(probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return seen


@pytest.mark.parametrize("ours", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_with_the_same_masks(injected, ours):
    experts = make(1.0)
    theirs = getattr(peft_merge, ours)([dense(t) for t in experts.values()], torch.ones(5), 0.3)
    assert len(injected) == 5
    torch.testing.assert_close(merge(experts, Candidate(ours, {"density": 0.3, "seed": 7, "lambda": 1})), theirs)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_mergekits_with_the_same_masks_and_no_rescaling_there(injected, method):
    experts = make(1.0)
    theirs = mergekit(method, experts, density=0.3, normalize=method == "dare_ties")
    ours = merge(experts, Candidate(method, {"density": 0.3, "seed": 7, "lambda": 1}))
    torch.testing.assert_close(ours, theirs / 0.3)


def test_dares_rescaling_keeps_the_expectation_and_mergekits_the_l1_norm(injected):
    (values,) = [dense(t) for n, t in make(1.0).items() if n == "a"]
    theirs = kit_sparsify.bernoulli(values, 0.3, kit_sparsify.RescaleNorm.l1)
    kept = drop(uniform(7, "a", "w", NUMEL), 0.3)
    assert theirs.view(-1).nonzero().view(-1).tolist() == kept.tolist()
    torch.testing.assert_close(theirs.abs().sum(), values.abs().sum())
    ratio = theirs.view(-1)[kept] / (values.view(-1)[kept] / 0.3)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert abs(float(ratio[0]) - 1) > 1e-3


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_has_mergekits_probabilities_and_kept_positions(injected, method):
    """Per kept value ours is mergekit's (not rescaled) divided by its own keep probability."""
    experts = make(1.0)
    rows = torch.arange(NUMEL) // SHAPE[1]
    for name, tensor in experts.items():
        theirs = kit_sparsify.della_magprune(dense(tensor), 0.6, 0.2)
        ours = magprune(tensor.values, rows, 0.6, 0.2)
        torch.testing.assert_close(injected[-1].view(-1), ours)
        kept = drop(uniform(7, name, "w", NUMEL), ours)
        assert theirs.view(-1).nonzero().view(-1).tolist() == kept.tolist()
    candidate = Candidate(method, {"density": 0.6, "epsilon": 0.2, "seed": 7, "lambda": 1})
    rescaled = {}
    for (name, tensor), probabilities in zip(experts.items(), injected, strict=True):
        kept = drop(uniform(7, name, "w", NUMEL), probabilities.view(-1))
        rescaled[name] = SparseTensor(SHAPE, kept, tensor.values[kept] / probabilities.view(-1)[kept])
    theirs = mergekit("ties" if method == "della" else "task_arithmetic", rescaled, normalize=method == "della")
    torch.testing.assert_close(merge(experts, candidate), theirs)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_ties_and_trimmed_sums_are_pefts_on_full_supports(density):
    """PEFT elects signs without the weights and divides by the count: compared with equal weights."""
    experts = make(1.0)
    if density == 1:  # exact cancellation (a zero total) and stored zeros
        experts["b"] = SparseTensor(SHAPE, experts["a"].indices, -experts["a"].values)
        experts = {"a": experts["a"], "b": experts["b"], "c": SparseTensor(SHAPE, torch.arange(240), torch.zeros(240))}
    rows, ones = [dense(t) for t in experts.values()], torch.ones(len(experts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that density 1 prunes nothing
        theirs = peft_merge.ties(rows, ones, density)
        pruned = peft_merge.magnitude_prune(rows, ones, density)
    torch.testing.assert_close(merge(experts, Candidate("ties", {"density": density})), theirs)
    # breadcrumbs without outliers are a trimmed sum
    crumbs = Candidate("breadcrumbs", {"density": density, "gamma": 0, "lambda": 1})
    torch.testing.assert_close(merge(experts, crumbs), pruned)


def test_task_arithmetic_is_pefts():
    experts, weights = make(0.3), torch.tensor([0.5, -1.0, 2.0, 0.25, 1.0])
    theirs = peft_merge.task_arithmetic([dense(t) for t in experts.values()], weights)
    candidate = Candidate("task_arithmetic", {"lambda": 1}, dict(zip(NAMES, weights.tolist(), strict=True)))
    torch.testing.assert_close(merge(experts, candidate), theirs)
