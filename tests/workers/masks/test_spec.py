"""Masks: every criterion, granularity and budget against a dense reference; specs; fused weights; empty supports."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from infra.errors import ConfigError, FactoryError
from workers.masks.spec import (
    MaskSpec,
    SupportSpec,
    accumulator_bytes,
    match_modules,
    random_units,
    select_supports,
    top_indices,
    trainable_elements,
    unit_of,
)
from workers.training.in_place import InPlaceAdapter

MODULES = r".*(q_proj|v_proj|down_proj)"
DATA = ("gradient", "connection_sensitivity", "fisher")
TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))
MORE = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(4))


def tiny(tie: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
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
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype)


def loss_of(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def dense_scores(model: nn.Module, criterion: str, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The score of every adapted weight from its definition, by plain autograd on a copy."""
    model = copy.deepcopy(model)
    weights = {name: module.weight for name, module in match_modules(model, MODULES).items()}

    def grads(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss_of(model, tokens), list(weights.values()))
        return dict(zip(weights, (g.float() for g in found), strict=True))

    def mean(each: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([one[name] for one in each]).mean(0) for name in weights}

    if criterion == "fisher":
        rows = [row for tokens in batches for row in tokens.split(1)]
        return mean([{name: g.square() for name, g in grads(row).items()} for row in rows])
    values = {name: w.detach().float() for name, w in weights.items()}
    if criterion == "magnitude":
        return {name: w.abs() for name, w in values.items()}
    g = mean([grads(tokens) for tokens in batches])
    return {n: (g[n] if criterion == "gradient" else g[n] * values[n]).abs() for n in weights}


def cells(score: torch.Tensor, unit: tuple[int, int]) -> torch.Tensor:
    """Mean score of each unit, flat, row-major."""
    return score.unfold(0, unit[0], unit[0]).unfold(1, unit[1], unit[1]).mean((-1, -2)).reshape(-1)


def is_best(chosen: torch.Tensor, values: torch.Tensor, sign: float, tolerance: float) -> bool:
    """Whether no unit left out is better than a chosen one by more than ``tolerance``."""
    picked = torch.zeros(values.numel(), dtype=torch.bool)
    picked[chosen] = True
    if bool(picked.all()):
        return True
    return float((sign * values[picked]).min()) >= float((sign * values[~picked]).max()) - tolerance


SHAPES: dict[str, Callable[[torch.Tensor], tuple[int, int]]] = {
    "element": lambda s: (1, 1),
    "block": lambda s: (2, 4),
    "row": lambda s: (1, s.shape[1]),
    "column": lambda s: (s.shape[0], 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("criterion", "keep", "count"),
    [
        ("magnitude", "largest", 1), ("magnitude", "smallest", 1), ("gradient", "largest", 1),
        ("gradient", "largest", 2), ("connection_sensitivity", "largest", 1), ("connection_sensitivity", "largest", 2),
        ("connection_sensitivity", "smallest", 1), ("connection_sensitivity", "smallest", 2), ("fisher", "largest", 1),
        ("fisher", "largest", 2), ("fisher", "smallest", 1),
    ],
)  # fmt: skip
def test_every_mask_equals_its_dense_reference(criterion: str, keep: str, count: int, dtype: torch.dtype) -> None:
    model, batches = tiny(dtype=dtype), [TOKENS, MORE][:count]
    scores = dense_scores(model, criterion, batches)
    total = sum(score.numel() for score in scores.values())
    sign = 1.0 if keep == "largest" else -1.0
    slack = 1e-4 if dtype == torch.float32 else 0.15
    losses = [lambda t=t: loss_of(model, t) for t in batches] if criterion in DATA else []
    for granularity, budget, density in itertools.product(
        ("element", "block", "row", "column", "n_m"), ("tensor", "global"), (0.03, 0.3, 1.0)
    ):
        if (granularity, budget) == ("n_m", "global"):
            continue
        spec = MaskSpec(
            criterion, granularity, density, (2, 4), MODULES, keep=keep, budget=budget, score_batches=count, group=8
        )
        found = select_supports(model, spec, losses)
        assert list(found) == list(scores)
        where = f"{granularity} {budget} {density}"
        for name, support in found.items():
            support.check(name)
            assert support.block == (None if granularity in ("element", "n_m") else SHAPES[granularity](scores[name]))
        if granularity == "n_m":
            kept = max(1, round(8 * density))
            for name, support in found.items():
                groups = scores[name].reshape(-1, 8)
                units = support.units.view(-1, kept)
                assert torch.equal(units // 8, torch.arange(len(groups))[:, None].expand(-1, kept)), where
                tolerance = slack * float(scores[name].mean())
                assert all(is_best(u % 8, g, sign, tolerance) for u, g in zip(units, groups, strict=True)), where
            continue
        units = {name: cells(score, SHAPES[granularity](score)) for name, score in scores.items()}
        if budget == "tensor":
            for name, support in found.items():
                assert support.units.numel() == max(1, round(density * units[name].numel())), where
                assert is_best(support.units, units[name], sign, slack * float(units[name].mean())), where
            continue
        elements, used = max(1, round(density * total)), sum(support.count for support in found.values())
        areas = [scores[name].numel() // units[name].numel() for name in scores]
        assert max(1, elements - max(areas) + 1) <= used <= max(elements, max(areas)), where
        if len(set(areas)) == 1:
            assert used == max(1, elements // areas[0]) * areas[0], where
        starts = itertools.accumulate([0, *(u.numel() for u in units.values())][:-1])
        chosen = torch.cat([s.units + start for s, start in zip(found.values(), starts, strict=True)])
        everything = torch.cat(list(units.values()))
        assert is_best(chosen, everything, sign, slack * float(everything.mean())), where


@pytest.mark.parametrize("criterion", DATA)
def test_a_global_budget_is_the_same_in_two_passes_and_from_the_accumulator(criterion: str) -> None:
    model = tiny()
    calls = []

    def loss() -> torch.Tensor:
        calls.append(0)
        return loss_of(model)

    for granularity in ("element", "block", "row"):
        spec = MaskSpec(criterion, granularity, 0.1, (2, 4), MODULES, budget="global")
        calls.clear()
        streamed = select_supports(model, spec, [loss])
        assert len(calls) == 2
        twice = MaskSpec(criterion, granularity, 0.1, (2, 4), MODULES, budget="global", score_batches=2)
        accumulated = select_supports(model, twice, [loss, loss])
        assert len(calls) == 4
        assert all(torch.equal(streamed[name].units, accumulated[name].units) for name in streamed)


@pytest.mark.parametrize("granularity", ["element", "block", "row", "column", "n_m"])
@pytest.mark.parametrize("budget", ["tensor", "global"])
@pytest.mark.parametrize("density", [1e-5, 0.05, 0.4, 1.0])
def test_random_masks(granularity: str, budget: str, density: float) -> None:
    if (granularity, budget) == ("n_m", "global"):
        return
    model = tiny()
    spec = MaskSpec("random", granularity, density, (2, 4), MODULES, seed=3, budget=budget, group=8)
    found = select_supports(model, spec)
    for name, support in found.items():
        support.check(name)
    trainable, adapted = trainable_elements(model, spec)
    assert adapted == sum(module.weight.numel() for module in match_modules(model, MODULES).values())
    used = sum(support.count for support in found.values())
    if budget == "global" and granularity in ("row", "column"):  # units of 16 and of 24 elements: an upper bound
        assert trainable - 24 < used <= trainable
    else:
        assert used == trainable
    again = select_supports(model, spec)
    assert all(torch.equal(found[name].units, again[name].units) for name in found)
    if density == 0.4:
        first, second = (found[f"model.layers.{layer}.mlp.down_proj"].units for layer in (0, 1))
        assert not torch.equal(first, second)
        other = select_supports(model, MaskSpec(**{**vars(spec), "seed": 4}))
        assert any(not torch.equal(found[name].units, other[name].units) for name in found)
    if (budget, granularity) == ("tensor", "block"):
        name = "model.layers.1.self_attn.v_proj"
        assert torch.equal(found[name].units, random_units((8, 16), density, 3, f"{name}.weight", (2, 4)))


@pytest.mark.parametrize("budget", ["tensor", "global"])
@pytest.mark.parametrize("criterion", ["random", "magnitude", "connection_sensitivity"])
@pytest.mark.parametrize("granularity", ["element", "block", "row", "n_m"])
def test_masks_of_value_rows_stay_in_them(criterion: str, granularity: str, budget: str) -> None:
    if (granularity, budget) == ("n_m", "global"):
        return
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    spec = MaskSpec(criterion, granularity, 0.25, (4, 4), "value_output", budget=budget, group=8)
    found = select_supports(model, spec, [lambda: loss_of(model)] if spec.needs_data else [])
    assert len(found) == 4
    assert trainable_elements(model, spec) == (sum(s.count for s in found.values()), 2 * (8 * 16 + 16 * 16))
    for name, support in found.items():
        support.check(name)
        if name.endswith("qkv_proj"):
            assert support.shape == (32, 16)
            assert budget == "global" or support.count == 8 * 16 // 4
            assert bool((support.indices() // 16 >= 24).all())
            if (criterion, granularity, budget) == ("magnitude", "element", "tensor"):
                weight = model.get_submodule(name).weight.detach()
                assert torch.equal(support.units, top_indices(weight[24:].abs(), 0.25) + 24 * 16)
    with pytest.raises(ConfigError, match=r"qkv_proj\.weight: only its rows 24 to 32.*columns"):
        trainable_elements(model, MaskSpec(criterion, "column", 0.25, modules="value_output"))
    with pytest.raises(ConfigError, match=r"blocks of 16x4 do not align with the rows 24 to 32"):
        select_supports(model, MaskSpec("random", "block", 0.25, (16, 4), "value_output"))


def test_a_module_may_get_no_unit_of_a_global_budget() -> None:
    """An empty support goes through training, re-selection, the saved state and the way back."""
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1e-3)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    empty, other = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"
    for granularity in ("element", "block"):
        spec = MaskSpec("magnitude", granularity, 0.05, (2, 4), MODULES, budget="global")
        found = select_supports(model, spec)
        assert found[empty].units.numel() == 0
        assert found[empty].count == 0
        with InPlaceAdapter(model, found) as adapter:
            optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, fused=True)

            def step(adapter: InPlaceAdapter, optimizer: torch.optim.Optimizer) -> None:
                adapter.zero_grad()
                loss_of(model).backward()
                optimizer.step()
                adapter.write_back()

            step(adapter, optimizer)
            assert adapter.delta()[f"{empty}.weight"].indices.numel() == 0
            assert adapter.delta()[f"{other}.weight"].values.any()
            adapter.load_state(adapter.state())
            optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, fused=True)
            step(adapter, optimizer)
            nothing = torch.empty(0, dtype=torch.int64)
            moved = found | {empty: found[other], other: SupportSpec(found[other].shape, nothing, found[other].block)}
            adapter.reselect(moved, optimizer)
            step(adapter, optimizer)
            assert adapter.delta()[f"{other}.weight"].indices.numel() == 0
            assert adapter.delta()[f"{empty}.weight"].values.any()
            adapter.reselect(found, optimizer)
            step(adapter, optimizer)
        assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_streamed_scores_equal_the_dense_reference(attached: bool, checkpointing: bool) -> None:
    """Bit for bit, at W + delta while an adapter is attached, without touching its gradient."""
    model = tiny()
    names = ".*(q_proj|up_proj)"
    adapter = InPlaceAdapter(model, select_supports(model, MaskSpec("random", "element", 0.2, modules=names)))
    state = adapter.state()
    adapter.load_state({**state, "values": torch.randn_like(state["values"]) * 0.1})
    reference = tiny()
    reference.load_state_dict(model.state_dict())
    loss_of(reference).backward()
    if not attached:
        adapter.restore()
        model.load_state_dict(reference.state_dict())
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    flags = [p.requires_grad for p in model.parameters()]
    modules = match_modules(model, names)
    assert len(modules) == 4
    for block in (None, (4, 4)):
        spec = MaskSpec("connection_sensitivity", "block" if block else "element", 0.1, block or (16, 16), names)
        chosen = select_supports(model, spec, [lambda: loss_of(model)])
        for name in modules:
            weight = reference.get_submodule(name).weight
            assert torch.equal(chosen[name].indices(), top_indices((weight * weight.grad).abs().detach(), 0.1, block))
    assert all(p.grad is None for p in model.parameters())
    assert all(not leaf.grad.any() for leaf in adapter.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert ("forward" in next(iter(modules.values())).__dict__) == attached


@pytest.mark.parametrize("budget", ["tensor", "global"])
def test_scores_that_are_not_finite(budget: str) -> None:
    model = tiny()
    spec = MaskSpec("gradient", "element", 0.1, modules=MODULES, budget=budget)
    with pytest.raises(FactoryError, match=r"layers.*not finite"):
        select_supports(model, spec, [lambda: loss_of(model) * float("inf")])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"density": 0.0}, "density 0.0"),
        ({"density": 1.5}, "density 1.5"),
        ({"criterion": "x"}, "criterion 'x': accepted are random, magnitude"),
        ({"granularity": "x"}, "granularity 'x': accepted are element, block"),
        ({"keep": "x"}, "keep 'x': accepted are largest, smallest"),
        ({"budget": "x"}, "budget 'x': accepted are tensor, global"),
        ({"block_size": (0, 4)}, "block_size"),
        ({"group": 1}, "group 1"),
        ({"score_batches": 0}, "score_batches 0"),
        ({"criterion": "gradient", "reselect_every": 0}, "reselect_every 0"),
        ({"criterion": "gradient", "reselect_every": 2, "reselect_rounds": 0}, "reselect_rounds 0"),
        ({"criterion": "gradient", "reselect_rounds": 2}, "reselect_rounds 2 needs reselect_every"),
        ({"keep": "smallest"}, "smallest is not accepted with criterion random"),
        ({"criterion": "gradient", "keep": "smallest"}, "not accepted with criterion gradient"),
        ({"score_batches": 2}, "criterion random takes no data"),
        ({"criterion": "magnitude", "score_batches": 2}, "criterion magnitude takes no data"),
        ({"reselect_every": 5}, "reselect_every 5: criterion random takes no data"),
        ({"criterion": "magnitude", "reselect_every": 5}, "reselect_every 5: criterion magnitude"),
        ({"granularity": "n_m", "budget": "global"}, "global is not accepted with granularity n_m"),
    ],
)
def test_senseless_specs_are_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        MaskSpec(**{"criterion": "random", "granularity": "block", "density": 0.1} | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"granularity": "block", "block_size": (5, 5)}, r"q_proj.*5x5.*16x16"),
        ({"granularity": "n_m", "group": 5}, r"q_proj\.weight: groups of 5 do not divide its rows of 16"),
        ({"modules": "q_proj"}, "matches no whole name"),
        ({"modules": "lm_head"}, "tied"),
    ],
)
@pytest.mark.parametrize("criterion", ["random", "magnitude", "connection_sensitivity"])
def test_masks_that_do_not_fit_are_refused_before_any_work(
    changes: dict[str, object], expected: str, criterion: str
) -> None:
    spec = MaskSpec(
        **{"criterion": criterion, "granularity": "element", "density": 0.1, "modules": ".*q_proj"} | changes
    )
    with pytest.raises(ConfigError, match=expected):
        select_supports(tiny(tie=True), spec, [lambda: pytest.fail("not to be called")] if spec.needs_data else [])
    with torch.device("meta"):
        structure = tiny(tie=True)
    structure.tie_weights()
    with pytest.raises(ConfigError, match=expected):
        trainable_elements(structure, spec)


def test_sizes_of_a_structure_are_those_of_the_model() -> None:
    with torch.device("meta"):
        structure = tiny()
    spec = MaskSpec("fisher", "row", 0.1, modules="value_output_mlp", score_batches=4)
    adapted = 2 * (8 * 16 + 16 * 16 + 3 * 16 * 24)
    assert trainable_elements(structure, spec) == (2 * (16 + 2 * 16 + 2 * 2 * 16 + 2 * 24), adapted)
    assert accumulator_bytes(structure, spec) == 4 * adapted
    assert accumulator_bytes(structure, MaskSpec("fisher", "row", 0.1, modules="value_output_mlp")) == 0
    assert unit_of(spec, (8, 16)) == (1, 16)
    assert unit_of(MaskSpec("random", "column", 0.1), (8, 16)) == (8, 1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_batch_needs_a_loss(count: int) -> None:
    model = tiny()
    spec = MaskSpec("gradient", "element", 0.1, score_batches=2)
    with pytest.raises(ConfigError, match=rf"gradient needs a loss for each of its 2 batches, got {count}"):
        select_supports(model, spec, [lambda: loss_of(model)] * count)


def test_modules_the_loss_reaches_wrongly() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    model = Twice()
    spec = MaskSpec("connection_sensitivity", "element", 0.5, modules="a|b")
    x = torch.randn(3, 4)
    with pytest.raises(ConfigError, match="more than once"):
        select_supports(model, spec, [lambda: (model.b(model.a(model.a(x)))).sum()])
    with pytest.raises(ConfigError, match="does not depend on b"):
        select_supports(model, spec, [lambda: model.a(x).sum()])
    assert "forward" not in model.a.__dict__
