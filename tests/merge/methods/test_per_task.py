"""Task masks of EMR and TALL against the papers' formulas on dense rows, and what makes them light."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import MergeError
from merge.methods.per_task import PER_TASK_VERSION, TaskMask, task_mask, task_scale
from merge.methods.specs import Candidate
from tests.merge.dense_reference import NUMEL, REFERENCES, SHAPE, Experts, make_experts
from workers.adapters.support import SparseTensor
from workers.adapters.task_mask import apply_mask


def unify(experts: Experts, method: str) -> SparseTensor:
    """The merged δ on the union of the supports."""
    merged = torch.tensor(REFERENCES[method](experts, Candidate(method)))
    union = torch.tensor(sorted(set().union(*(e.held for e in experts.values()))), dtype=torch.int64)
    return SparseTensor(SHAPE, union, merged[union])


def dense(tensor: SparseTensor) -> list[float]:
    return torch.zeros(NUMEL).index_copy_(0, tensor.indices, tensor.values.float()).tolist()


many = given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, NUMEL), st.booleans())


@many
@settings(max_examples=40, deadline=None)
def test_emr_masks_by_sign_and_keeps_the_experts_l1_norm(seed, n, per_expert, full):
    experts = make_experts(seed, n, per_expert, full)
    unified = unify(experts, "emr")
    target = dense(unified)
    for e in experts.values():
        mask = task_mask("emr", unified, e.tensor, {})
        scale = task_scale("emr", [mask])
        kept = [abs(u) for u, v in zip(target, e.dense, strict=True) if u * v > 0]
        assert scale == pytest.approx(sum(map(abs, e.dense)) / sum(kept) if kept else 1.0)
        expected = [u * scale if u * v > 0 else 0.0 for u, v in zip(target, e.dense, strict=True)]
        assert dense(apply_mask(unified, mask.bits, scale)) == pytest.approx(expected)
        if kept:
            assert sum(map(abs, expected)) == pytest.approx(sum(map(abs, e.dense)))


@many
@settings(max_examples=40, deadline=None)
def test_tall_masks_where_the_expert_outweighs_the_rest(seed, n, per_expert, full):
    experts = make_experts(seed, n, per_expert, full)
    unified = unify(experts, "tall")
    for e in experts.values():
        mask = task_mask("tall", unified, e.tensor, {"threshold": 0.5})
        assert task_scale("tall", [mask]) == 1.0
        expected = [u if abs(v) >= 0.5 * abs(u - v) else 0.0 for u, v in zip(dense(unified), e.dense, strict=True)]
        assert dense(apply_mask(unified, mask.bits, 1.0)) == expected
        assert bool((apply_mask(unified, mask.bits, 1.0).values != 0).all())  # zeros are not worth a bit


def test_one_expert_is_restored_exactly():
    experts = make_experts(3, 1, 20)
    (e,) = experts.values()
    for method, params in (("emr", {}), ("tall", {"threshold": 0.4})):
        unified = unify(experts, method)
        mask = task_mask(method, unified, e.tensor, params)
        assert dense(apply_mask(unified, mask.bits, task_scale(method, [mask]))) == e.dense


def test_the_scale_of_emr_is_over_all_tensors():
    masks = [TaskMask(torch.ones(1, dtype=torch.bool), 3.0, 1.0), TaskMask(torch.ones(1, dtype=torch.bool), 1.0, 1.0)]
    assert task_scale("emr", masks) == 2.0
    assert task_scale("emr", iter(masks)) == 2.0
    assert task_scale("emr", [TaskMask(torch.zeros(1, dtype=torch.bool), 0.0, 0.0)]) == 1.0


def test_signs_of_tiny_values_are_seen():
    """Their product is 0 in fp32."""
    tiny = SparseTensor((1,), torch.arange(1), torch.tensor([1e-30]))
    assert task_mask("emr", tiny, tiny, {}).bits.tolist() == [True]


def test_masks_do_not_change_without_a_version():
    """If this fails, raise PER_TASK_VERSION."""
    assert PER_TASK_VERSION == 1
    experts = make_experts(8, 3, 25)
    digests = []
    for method, params in (("emr", {}), ("tall", {"threshold": 0.5})):
        masks = [task_mask(method, unify(experts, method), e.tensor, params) for e in experts.values()]
        bits = torch.cat([m.bits for m in masks]).numpy().tobytes()
        digests.append((hashlib.sha256(bits).hexdigest()[:12], [task_scale(method, [m]) for m in masks]))
    assert digests == [
        ("610974502bf9", [1.037190082644628, 1.1686046511627908, 0.9696969696969697]),
        ("a445682425d6", [1.0, 1.0, 1.0]),
    ]


def test_misfits_are_refused():
    one = SparseTensor((2, 2), torch.arange(1), torch.ones(1))
    with pytest.raises(MergeError, match="'ties' has no task masks; methods that do: emr, tall"):
        task_mask("ties", one, one, {})
    with pytest.raises(MergeError, match="no task masks"):
        task_scale("mean", [])
    with pytest.raises(MergeError, match=r"shape \[2, 2\] over one of \[4\]"):
        task_mask("emr", SparseTensor((4,), one.indices, one.values), one, {})
