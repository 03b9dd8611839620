"""In-place training: gradients, weights, re-selection and undo against straightforward dense references."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from infra.errors import AdapterError, ConfigError, FactoryError
from workers.adapters.support import SparseTensor, SupportSpec
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.masks.sparse_linear import block_gradient
from workers.masks.spec import MaskSpec, random_units, select_supports
from workers.tensors.source import FileSource
from workers.training.in_place import InPlaceAdapter, Snapshot, apply_delta

MODULES = ".*(q_proj|o_proj|up_proj|down_proj)"
TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))
BLOCKS = [None, (4, 8), (2, 2)]


def tiny(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def spec(block: tuple[int, int] | None, density: float = 0.1, seed: int = 0, modules: str = MODULES) -> MaskSpec:
    return MaskSpec("random", "block" if block else "element", density, block or (16, 16), modules, None, seed)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def gradients(adapter: InPlaceAdapter) -> dict[str, torch.Tensor]:
    """The flat gradient in flat position order, by reading it as if it were the values."""
    read = Snapshot(torch.cat([leaf.grad for leaf in adapter.parameters()]), adapter.snapshot().parts)
    return {name: tensor.values for name, tensor in adapter.delta(read).items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("density", [0.02, 0.6])
def test_gradient_equals_the_dense_one(
    checkpointing: bool, block: tuple[int, int] | None, dtype: torch.dtype, tolerance: float, density: float
) -> None:
    reference = tiny(dtype)
    loss_of(reference).backward()
    model = tiny(dtype)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = InPlaceAdapter(model, select_supports(model, spec(block, density)))
    for _ in range(2):  # the second backward accumulates
        loss_of(model).backward()
    found = gradients(adapter)
    assert len(found) == 8
    for name, delta in adapter.delta().items():
        want = 2 * reference.get_parameter(name).grad.view(-1)[delta.indices].float()
        torch.testing.assert_close(found[name], want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    adapter.zero_grad()
    assert all(not leaf.grad.any() for leaf in adapter.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("block", [None, (2, 2)])
@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6)])
@pytest.mark.parametrize("needs", [False, True])
def test_one_linear_module(block: tuple[int, int] | None, shape: tuple[int, ...], needs: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=True))
    x = torch.randn(shape, requires_grad=needs)
    model(x).square().sum().backward()
    want, want_x = model[0].weight.grad.view(-1).clone(), x.grad
    bias = model[0].bias.grad.clone()
    model.zero_grad()
    x.grad = None
    with InPlaceAdapter(model, {"0": SupportSpec((4, 6), random_units((4, 6), 0.4, 0, "w", block), block)}) as adapter:
        model[0].bias.requires_grad_(True)
        out = model(x)
        out.square().sum().backward()
        torch.testing.assert_close(gradients(adapter)["0.weight"], want[adapter.delta()["0.weight"].indices])
        torch.testing.assert_close(model[0].bias.grad, bias)
        if needs:
            torch.testing.assert_close(x.grad, want_x)
        with torch.no_grad():
            assert torch.equal(model(x), out)
    assert "forward" not in model[0].__dict__
    assert all(p.requires_grad for p in model.parameters())


def test_batched_product_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, x = torch.randn(2, 11, 8), torch.randn(2, 11, 12)
    ids = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    loop, batched = torch.ones(4, 4, 2), torch.ones(4, 4, 2)
    block_gradient(grad, x, ids, (4, 2), loop)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr("workers.masks.sparse_linear.BMM_ELEMENTS", 200)
    block_gradient(grad, x, ids, (4, 2), batched)
    torch.testing.assert_close(loop, batched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [None, (4, 8)])
def test_weights_are_base_plus_delta_and_come_back(dtype: torch.dtype, block: tuple[int, int] | None) -> None:
    model = tiny(dtype)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = InPlaceAdapter(model, select_supports(model, spec(block)))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        adapter.write_back()
    delta = adapter.delta()
    assert all(bool(t.values.any()) for t in delta.values())
    for name, parameter in model.named_parameters():
        want = base[name].clone()
        if name in delta:
            at = delta[name].indices
            want.view(-1)[at] = (want.view(-1)[at].float() + delta[name].values).to(dtype)
        assert torch.equal(parameter, want), name
    adapter.restore()
    adapter.restore()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), base[name].view(torch.uint8)), name
    with pytest.raises(FactoryError, match="detached"):
        adapter.write_back()


def dense_adam(
    weight: torch.Tensor, state: dict[str, torch.Tensor], grad: torch.Tensor, mask: torch.Tensor, lr: float
) -> None:
    """AdamW (no decay) with a step count per position, on the delta of ``mask``."""
    b1, b2, eps = 0.9, 0.999, 1e-8
    g = grad * mask
    state["step"] += mask
    state["m"] = torch.where(mask, b1 * state["m"] + (1 - b1) * g, 0.0)
    state["v"] = torch.where(mask, b2 * state["v"] + (1 - b2) * g * g, 0.0)
    step = state["step"].clamp(min=1)
    rate = lr * (state["m"] / (1 - b1**step)) / ((state["v"] / (1 - b2**step)).sqrt() + eps)
    state["delta"] = torch.where(mask, state["delta"] - rate, 0.0)


@pytest.mark.parametrize("block", [None, (2, 2)])
@pytest.mark.parametrize("fused", [True, False])
def test_training_with_reselection_equals_dense_masked_adam(block: tuple[int, int] | None, fused: bool) -> None:
    """The dense reference keeps a step count per position; three selections that overlap, scheduler attached."""
    model = tiny(torch.float64)
    rounds = [select_supports(model, spec(block, 0.3, seed)) for seed in range(3)]
    masks = []
    for chosen in rounds:
        masks.append({f"{n}.weight": torch.zeros(s.shape, dtype=torch.bool) for n, s in chosen.items()})
        for n, s in chosen.items():
            masks[-1][f"{n}.weight"].view(-1)[s.indices()] = True
    reference = tiny(torch.float64)
    base = {n: reference.get_parameter(n).detach().clone() for n in masks[0]}
    state = {n: {k: torch.zeros_like(b) for k in ("step", "m", "v", "delta")} for n, b in base.items()}

    adapter = InPlaceAdapter(model, rounds[0])
    other = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW(
        [{"params": [other]}, {"params": adapter.parameters()}], lr=1e-2, weight_decay=0.0, fused=fused
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    taken = 0
    for number, chosen in enumerate(rounds):
        if number:
            before = {n: t.clone() for n, t in ((n, model.get_parameter(n).detach()) for n in base)}
            adapter.reselect(chosen, optimizer)
            for n, b in base.items():
                now = model.get_parameter(n)
                both = masks[number - 1][n] & masks[number][n]
                assert both.any()
                assert torch.equal(now[both], before[n][both])
                assert torch.equal(now[~both], b[~both])
            for n in state:
                for k in state[n]:
                    state[n][k] = torch.where(masks[number - 1][n] & masks[number][n], state[n][k], 0.0)
                reference.get_parameter(n).data.copy_(base[n] + state[n]["delta"])
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            adapter.write_back()
            lr = 1e-2 / (1 + taken)
            reference.zero_grad()
            loss_of(reference).backward()
            for n in base:
                dense_adam(base[n], state[n], reference.get_parameter(n).grad, masks[number][n], lr)
                reference.get_parameter(n).data.copy_(base[n] + state[n]["delta"])
            schedule.step()
            taken += 1
    assert [int(optimizer.state[leaf]["step"]) for leaf in adapter.parameters()] == [9, 6, 3]
    assert sum(adapter.generations) == adapter.num_values == sum(s.count for s in rounds[2].values())
    delta = adapter.delta()
    for n, b in base.items():
        assert torch.equal(delta[n].indices, masks[2][n].view(-1).nonzero().view(-1))
        want = state[n]["delta"].view(-1)[delta[n].indices].float()
        torch.testing.assert_close(delta[n].values, want, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(model.get_parameter(n), b + state[n]["delta"], rtol=1e-7, atol=1e-9)
    adapter.restore()
    for n, b in base.items():
        assert torch.equal(model.get_parameter(n), b)


def test_reselecting_the_same_support_changes_nothing() -> None:
    runs = []
    for again in (False, True):
        model = tiny()
        chosen = select_supports(model, spec((4, 4), 0.3))
        adapter = InPlaceAdapter(model, chosen)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, fused=True)
        for _ in range(4):
            adapter.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            adapter.write_back()
            if again:
                adapter.reselect(chosen, optimizer)
        assert len(adapter.parameters()) == 1
        runs.append(adapter.snapshot().values)
    assert torch.equal(*runs)


@pytest.mark.parametrize("block", [None, (4, 4)])
def test_a_snapshot_outlives_steps_and_selections(block: tuple[int, int] | None) -> None:
    model = tiny()
    adapter = InPlaceAdapter(model, select_supports(model, spec(block)))
    with torch.no_grad():
        adapter.parameters()[0].normal_()
    kept, expected = adapter.snapshot(), adapter.delta()
    with torch.no_grad():
        adapter.parameters()[0].add_(1.0)
    assert not equal(adapter.delta(), expected)
    adapter.reselect(select_supports(model, spec(block, seed=5)))
    assert equal(adapter.delta(kept), expected)


@pytest.mark.parametrize("block", [None, (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(block: tuple[int, int] | None, dtype: torch.dtype) -> None:
    """Generations, moments of other ages, rounding: all as in the adapter that was saved."""
    runs = []
    for interrupted in (False, True):
        model = tiny().to(dtype)
        adapter = InPlaceAdapter(model, select_supports(model, spec(block, 0.3)))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, fused=True)
        for step in range(6):
            if step == 2:
                adapter.reselect(select_supports(model, spec(block, 0.3, seed=9)), optimizer)
            if step == 4 and interrupted:
                state = {name: tensor.clone() for name, tensor in adapter.state().items()}
                moments = [copy.deepcopy(optimizer.state[leaf]) for leaf in adapter.parameters()]
                adapter.restore()
                untouched = tiny().to(dtype)
                assert all(map(torch.equal, model.parameters(), untouched.parameters()))
                model = untouched
                adapter = InPlaceAdapter(model, select_supports(model, spec(block, 0.1, seed=77)))
                adapter.load_state(state)
                optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, fused=True)
                for leaf, moment in zip(adapter.parameters(), moments, strict=True):
                    optimizer.state[leaf] = moment
            adapter.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            adapter.write_back()
        runs.append((adapter.delta(), [p.detach().clone() for p in model.parameters()], adapter.generations))
        adapter.restore()
        assert all(map(torch.equal, model.parameters(), tiny().to(dtype).parameters()))
    assert equal(runs[0][0], runs[1][0])
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
    assert runs[0][2] == runs[1][2]
    assert len(runs[0][2]) == 2


def test_the_state_of_another_adapter_is_refused() -> None:
    model = tiny()
    adapter = InPlaceAdapter(model, select_supports(model, spec(None)))
    state = adapter.state()
    with pytest.raises(FactoryError, match=r"another adapter: it differs in units model\.layers"):
        adapter.load_state({name: t for name, t in state.items() if not name.startswith("units")})


def equal(one: dict[str, SparseTensor], other: dict[str, SparseTensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n].indices, other[n].indices) and torch.equal(one[n].values, other[n].values) for n in one
    )


def test_a_stale_graph_fails_loudly() -> None:
    model = tiny()
    adapter = InPlaceAdapter(model, select_supports(model, spec(None)))
    loss = loss_of(model)
    adapter.write_back()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_modules_that_cannot_be_adapted() -> None:
    model = tiny()
    model.lm_head.weight = model.model.embed_tokens.weight
    chosen = select_supports(model, spec(None))
    some = next(iter(chosen.values()))
    with pytest.raises(ConfigError, match="tied"):
        InPlaceAdapter(model, {"lm_head": SupportSpec((40, 16), torch.tensor([1]))})
    with pytest.raises(ConfigError, match="no module 'x'"):
        InPlaceAdapter(model, {"x": some})
    with pytest.raises(ConfigError, match="its weight has"):
        InPlaceAdapter(model, {"model.layers.0.mlp.up_proj": SupportSpec((2, 2), torch.tensor([1]))})
    with pytest.raises(ConfigError, match="Embedding"):
        InPlaceAdapter(model, {"model.embed_tokens": some})
    with InPlaceAdapter(model, chosen) as adapter, pytest.raises(ConfigError, match="already replaced"):
        InPlaceAdapter(model, chosen)
    model.model.layers[0].self_attn.q_proj.double()
    with pytest.raises(ConfigError, match="share one device and dtype"):
        InPlaceAdapter(model, chosen)
    del adapter


def test_the_optimizer_must_hold_the_adapter() -> None:
    model = tiny()
    adapter = InPlaceAdapter(model, select_supports(model, spec(None)))
    stranger = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    values = adapter.snapshot().values
    with pytest.raises(ConfigError, match="one parameter group"):
        adapter.reselect(select_supports(model, spec(None, seed=1)), stranger)
    assert torch.equal(adapter.snapshot().values, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("from_file", [True, False])
def test_apply_delta_and_undo(tmp_path: Path, dtype: torch.dtype, from_file: bool) -> None:
    model = tiny(dtype)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = InPlaceAdapter(model, select_supports(model, spec(None)))
    with torch.no_grad():
        adapter.parameters()[0].copy_(torch.randn(adapter.num_values).bfloat16())
    adapter.write_back()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    delta = adapter.delta()
    adapter.restore()
    tensors: dict[str, SparseTensor] | AdapterReader = delta
    if from_file:
        save_adapter(tmp_path / "a", delta, AdapterMeta("x"))
        tensors = AdapterReader(FileSource(tmp_path / "a"))
    with apply_delta(model, tensors):
        assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


def test_apply_delta_refuses_what_does_not_fit() -> None:
    model = tiny()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    good = SparseTensor((24, 16), torch.tensor([3]), torch.tensor([1.0]))
    cases = [
        ({"nothing": good}, "does not have"),
        ({name: SparseTensor((16, 24), good.indices, good.values)}, "shape"),
        (
            {"model.layers.0.mlp.up_proj.weight": good, name: SparseTensor((24, 16), torch.tensor([384]), good.values)},
            "outside",
        ),
    ]
    for tensors, message in cases:
        with pytest.raises(AdapterError, match=message):
            apply_delta(model, tensors)
    model.lm_head.weight = model.model.embed_tokens.weight
    for tied in ("lm_head.weight", "model.embed_tokens.weight"):
        with pytest.raises(AdapterError, match="tied"):
            apply_delta(model, {tied: SparseTensor((40, 16), good.indices, good.values)})
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if "embed" not in n)
