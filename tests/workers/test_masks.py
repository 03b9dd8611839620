"""Masks: exact budgets, per-tensor seeds, top selection against a dense reference, streamed scores."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from infra.errors import ConfigError, FactoryError
from workers.inplace import InPlaceAdapter
from workers.masks import (
    MaskSpec,
    match_modules,
    random_indices,
    random_units,
    score_modules,
    select_supports,
    top_indices,
    top_units,
)


def tiny(tie: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config)


TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("density", [0.001, 0.05, 0.37, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("block", [None, (2, 4)])
def test_budgets_are_exact(density: float, block: tuple[int, int] | None) -> None:
    shape = (32, 24)
    total = 32 * 24 // (8 if block else 1)
    count = max(1, round(density * total))
    units = random_units(shape, density, 0, "w", block)
    assert units.tolist() == sorted(set(units.tolist()))
    assert units.numel() == count
    assert int(units[-1]) < total
    best = top_units(torch.rand(shape), density, block)
    assert best.numel() == count


def test_random_masks_differ_by_tensor_and_seed_and_are_stable() -> None:
    base = random_indices((64, 64), 0.05, 0, "layers.0.w")
    assert torch.equal(base, random_indices((64, 64), 0.05, 0, "layers.0.w"))
    assert not torch.equal(base, random_indices((64, 64), 0.05, 0, "layers.1.w"))
    assert not torch.equal(base, random_indices((64, 64), 0.05, 1, "layers.0.w"))
    # The draw is part of every expert's identity: this changes only together with the mask's algorithm version.
    assert random_units((20, 10), 0.05, 7, "golden").tolist() == GOLDEN
    assert random_units((64, 32), 0.9, 7, "golden", (8, 8)).numel() == 29


GOLDEN = [7, 40, 71, 82, 96, 97, 124, 163, 167, 169]


def test_random_masks_are_uniform() -> None:
    hits = torch.zeros(40)
    for seed in range(600):
        hits[random_units((8, 5), 0.4, seed, "w")] += 1
    assert hits.sum() == 600 * 16
    assert hits.min() > 180
    assert hits.max() < 300


@pytest.mark.parametrize("block", [None, (2, 4)])
def test_top_matches_a_full_sort_with_ties_by_index(block: tuple[int, int] | None) -> None:
    score = torch.randint(0, 4, (12, 16), generator=torch.Generator().manual_seed(1)).float()
    units = score if block is None else score.view(6, 2, 4, 4).sum((1, 3))
    order = torch.sort(units.reshape(-1), descending=True, stable=True).indices
    for density in (0.05, 0.3, 0.77, 1.0):
        want = order[: max(1, round(density * order.numel()))].sort().values
        assert torch.equal(top_units(score, density, block), want)
    assert top_indices(score, 0.25, block).numel() == 48


def test_scores_that_are_not_finite() -> None:
    with pytest.raises(FactoryError, match="not finite"):
        top_units(torch.tensor([[1.0, float("nan")]]), 0.5)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_streamed_scores_equal_the_dense_reference(attached: bool, checkpointing: bool) -> None:
    model = tiny()
    spec = MaskSpec("connection_sensitivity", "element", 0.1, modules=".*(q_proj|up_proj)")
    modules = match_modules(model, spec.modules)
    assert len(modules) == 4
    adapter = InPlaceAdapter(model, select_supports(model, MaskSpec("random", "element", 0.2, modules=spec.modules)))
    values = adapter.values()
    adapter.load_values(type(values)(torch.randn_like(values.tensor) * 0.1, values.selection))
    reference = tiny()
    reference.load_state_dict(model.state_dict())
    reference(input_ids=TOKENS, labels=TOKENS).loss.backward()
    if not attached:
        adapter.restore()
        model.load_state_dict(reference.state_dict())
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    flags = [p.requires_grad for p in model.parameters()]
    for block in (None, (4, 4)):
        spec = MaskSpec("connection_sensitivity", "block" if block else "element", 0.1, block or (16, 16), spec.modules)
        chosen = score_modules(model, modules, lambda: model(input_ids=TOKENS, labels=TOKENS).loss, spec)
        for name in modules:
            weight = reference.get_submodule(name).weight
            assert torch.equal(chosen[name].indices(), top_indices((weight * weight.grad).abs().detach(), 0.1, block))
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert ("forward" in next(iter(modules.values())).__dict__) == attached


def test_matching() -> None:
    model = tiny(tie=True)
    with pytest.raises(ConfigError, match=r"matches no.*q_proj"):
        match_modules(model, "q_proj")
    with pytest.raises(ConfigError, match="not a regular expression"):
        match_modules(model, "(")
    with pytest.raises(ConfigError, match=r"lm_head\.weight.*embed_tokens.*tied"):
        match_modules(model, "lm_head")
    assert "lm_head" in match_modules(tiny(), ".*")


def test_specs_and_shapes_are_checked() -> None:
    for bad in ({"density": 0.0}, {"density": 1.5}, {"criterion": "x"}, {"granularity": "row"}, {"block_size": (0, 4)}):
        with pytest.raises(ConfigError):
            MaskSpec(**{"criterion": "random", "granularity": "block", "density": 0.1} | bad)
    spec = MaskSpec("random", "block", 0.1, (5, 5), ".*q_proj")
    with pytest.raises(ConfigError, match=r"q_proj.*5x5.*16x16"):
        select_supports(tiny(), spec)
    spec = MaskSpec("connection_sensitivity", "block", 0.1, (5, 5), ".*q_proj")
    with pytest.raises(ConfigError, match=r"q_proj.*5x5.*16x16"):
        select_supports(tiny(), spec, lambda: torch.zeros(()))
    with pytest.raises(ConfigError, match="needs a loss"):
        select_supports(tiny(), MaskSpec("connection_sensitivity", "element", 0.1))


def test_modules_the_loss_reaches_wrongly() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    model = Twice()
    spec = MaskSpec("connection_sensitivity", "element", 0.5, modules="a|b")
    x = torch.randn(3, 4)
    with pytest.raises(ConfigError, match="more than once"):
        select_supports(model, spec, lambda: (model.b(model.a(model.a(x)))).sum())
    with pytest.raises(ConfigError, match="does not depend on b"):
        select_supports(model, spec, lambda: model.a(x).sum())
    assert "forward" not in model.a.__dict__
