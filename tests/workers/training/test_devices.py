"""Layers over several devices: where they go, and training there against training on one device."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from infra.errors import ConfigError, FactoryError
from workers.adapters.support import SparseTensor, SupportSpec
from workers.masks.spec import MaskSpec, random_units
from workers.text.prompt import Example
from workers.training.devices import SplitAdapter, attach, place, spread
from workers.training.in_place import InPlaceAdapter
from workers.training.kinds import ExpertSpec, LoraSpec
from workers.training.loop import TrainSpec, train_expert
from workers.training.objectives import LanguageModelling

TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))
PARTS = ("q_proj", "o_proj", "down_proj")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Adapter = InPlaceAdapter | SplitAdapter


def tiny(dtype: torch.dtype = torch.float32, layers: int = 4, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def supports(model: nn.Module, seed: int = 0, block: tuple[int, int] | None = None) -> dict[str, SupportSpec]:
    chosen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(PARTS):
            shape = (module.out_features, module.in_features)
            chosen[name] = SupportSpec(shape, random_units(shape, 0.3, seed, name, block), block)
    return chosen


def halves(chosen: dict[str, SupportSpec]) -> list[dict[str, SupportSpec]]:
    names = list(chosen)
    middle = len(names) // 2
    return [{name: chosen[name] for name in part} for part in (names[:middle], names[middle:])]


def steps(model: nn.Module, adapter: Adapter, optimizer: torch.optim.Optimizer, clip: float | None) -> Iterator[float]:
    while True:
        adapter.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(adapter.parameters(), clip)
        optimizer.step()
        adapter.write_back()
        yield loss.item()


def train(
    model: nn.Module, adapter: Adapter, clip: float | None = None, block: tuple[int, int] | None = None
) -> tuple[list[float], dict[str, SparseTensor]]:
    """Six AdamW steps with one re-selection after three; the losses and the delta."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, fused=True)
    run = steps(model, adapter, optimizer, clip)
    losses = [next(run) for _ in range(3)]
    adapter.reselect(supports(model, seed=1, block=block), optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(adapter.parameters()) == len(adapter.generations)
    return losses + [next(run) for _ in range(3)], adapter.delta()


def assert_same(one: dict[str, SparseTensor], other: dict[str, SparseTensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name].indices, other[name].indices)
        assert torch.equal(one[name].values, other[name].values)
        assert other[name].values.any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block", [None, (4, 4)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_halves_under_dispatch_hooks_train_as_one(
    tied: bool, block: tuple[int, int] | None, checkpointing: bool
) -> None:
    single, split = tiny(tied=tied), tiny(tied=tied)
    pointers = {name: p.data_ptr() for name, p in split.named_parameters()}
    assert spread(split, ["cpu", "cpu"]) is split
    assert {name: p.data_ptr() for name, p in split.named_parameters()} == pointers
    if checkpointing:
        for model in (single, split):
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
    base = {name: p.detach().clone() for name, p in split.named_parameters()}
    before = {name: dict(module.__dict__) for name, module in split.named_modules()}
    with torch.no_grad():
        logits = split(input_ids=TOKENS).logits
    chosen = supports(split, block=block)
    with attach(split, chosen) as adapter, InPlaceAdapter(single, chosen) as reference:
        assert isinstance(adapter, InPlaceAdapter)
        want, trained = train(single, reference, 1.0, block), train(split, adapter, 1.0, block)
        assert trained[0] == want[0]
        assert_same(trained[1], want[1])
    assert all(torch.equal(p, base[name]) for name, p in split.named_parameters())
    assert all(p.requires_grad for p in split.parameters())
    for name, module in split.named_modules():
        if name in chosen:
            assert type(module._hf_hook).__name__ == "AlignDevicesHook"
        for attribute in ("forward", "_old_forward", "_hf_hook"):
            assert module.__dict__.get(attribute) is before[name].get(attribute)
    with torch.no_grad():
        assert torch.equal(split(input_ids=TOKENS).logits, logits)


@pytest.mark.parametrize("block", [None, (4, 4)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_two_adapters_train_as_one(clip: float | None, block: tuple[int, int] | None) -> None:
    single, split = tiny(), tiny()
    base = {name: p.detach().clone() for name, p in split.named_parameters()}
    split.lm_head.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in split.named_parameters()}
    chosen = supports(single, block=block)
    with InPlaceAdapter(single, chosen) as reference, SplitAdapter(split, halves(chosen)) as adapter:
        assert adapter.num_values == reference.num_values == sum(adapter.generations)
        want, trained = train(single, reference, clip, block), train(split, adapter, clip, block)
        if clip is None and block is not None:  # whole vectors of 16 values: AdamW rounds the rest of a range otherwise
            assert trained[0] == want[0]
            assert_same(trained[1], want[1])
        for name, tensor in want[1].items():
            assert torch.equal(trained[1][name].indices, tensor.indices)
            torch.testing.assert_close(trained[1][name].values, tensor.values, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, base[name]) for name, p in split.named_parameters())
    assert {name: p.requires_grad for name, p in split.named_parameters()} == flags
    assert all("forward" not in module.__dict__ for module in split.modules())


def test_snapshots_and_state_of_two_adapters() -> None:
    model, other = tiny(), tiny()
    chosen = supports(model)
    adapter = SplitAdapter(model, halves(chosen))
    snapshot = adapter.snapshot()
    train(model, adapter)
    assert all(not tensor.values.any() for tensor in adapter.delta(snapshot).values())
    assert all(t.indices.tolist() == chosen[n[:-7]].indices().tolist() for n, t in adapter.delta(snapshot).items())
    state = {key: value.clone() for key, value in adapter.state().items()}
    again = SplitAdapter(other, halves(chosen))
    again.load_state(state)
    assert again.generations == adapter.generations
    assert_same(again.delta(), adapter.delta())
    runs = []
    for one, of in ((model, adapter), (other, again)):
        run = steps(one, of, torch.optim.AdamW(of.parameters(), lr=1e-2, fused=True), None)
        runs.append(([next(run), next(run)], of.delta()))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])
    with pytest.raises(FactoryError, match="another adapter"):
        again.load_state({key: value for key, value in state.items() if key.startswith("0/")})
    with pytest.raises(FactoryError, match="number of GPUs"):
        again.load_state({**state, "2/values": torch.zeros(1)})
    with pytest.raises(FactoryError, match="number of GPUs"):
        again.load_state(InPlaceAdapter(tiny(), chosen).state())


def test_an_adapter_that_cannot_be_attached_leaves_the_model_alone() -> None:
    model = tiny()
    chosen = supports(model)
    model.model.layers[3].to("meta")
    with pytest.raises(ConfigError, match="offloaded"):
        attach(model, chosen)
    with pytest.raises(ConfigError, match="no module 'x'"):
        attach(model, {**{n: s for n, s in chosen.items() if "layers.0" in n}, "x": chosen[next(iter(chosen))]})
    assert all(p.requires_grad for p in model.parameters())
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_reselection_names_the_same_modules_and_one_group() -> None:
    model = tiny()
    chosen = supports(model)
    with SplitAdapter(model, halves(chosen)) as adapter:
        kept = [leaf.data_ptr() for leaf in adapter.parameters()]
        with pytest.raises(ConfigError, match="name the adapted modules"):
            adapter.reselect(halves(chosen)[0])
        groups = [{"params": [leaf]} for leaf in adapter.parameters()]
        with pytest.raises(ConfigError, match="one parameter group"):
            adapter.reselect(supports(model, seed=1), torch.optim.AdamW(groups))
        assert [leaf.data_ptr() for leaf in adapter.parameters()] == kept


@given(layers=st.integers(1, 9), count=st.integers(1, 5), tied=st.booleans())
@settings(max_examples=20, deadline=None)
def test_layers_are_placed_evenly_in_order(layers: int, count: int, tied: bool) -> None:
    with torch.device("meta"):
        model = tiny(layers=layers, tied=tied)
    placed = place(model, count)
    sizes = {name: sum(p.nbytes for p in model.get_submodule(name).parameters()) for name in placed}
    if tied:
        assert placed["model.embed_tokens"] == placed["lm_head"]
        sizes["model.embed_tokens"] = 0
    assert sum(sizes.values()) == sum(p.nbytes for p in model.parameters())
    order = [placed[name] for name in placed if name != "model.rotary_emb" and (not tied or "embed" not in name)]
    assert order == sorted(order)
    assert placed["model.rotary_emb"] == 0
    assert max(placed.values()) < count
    loads = [sum(sizes[name] for name in placed if placed[name] == index) for index in range(count)]
    assert max(loads) <= sum(sizes.values()) / count + max(sizes.values())


def test_other_models() -> None:
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    placed = place(model, 2)
    assert placed["bert.encoder.layer.0"] == 0
    assert placed["bert.encoder.layer.3"] == placed["classifier"] == 1
    want = model(input_ids=TOKENS % 30).logits
    assert torch.equal(spread(model, ["cpu", "cpu"])(input_ids=TOKENS % 30).logits, want)
    with pytest.raises(ConfigError, match="does not name its layers"):
        place(nn.Sequential(nn.Linear(2, 2)), 2)
    llama = tiny()
    llama.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="extra outside its layers"):
        spread(llama, ["cpu", "cpu"])


def test_one_device_needs_no_hooks() -> None:
    model = spread(tiny(), ["cpu"])
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    with pytest.raises(ConfigError, match="no device"):
        spread(model, [])


def test_generation_with_a_cache_is_unchanged() -> None:
    single, split = tiny(), spread(tiny(), ["cpu", "cpu"])
    made = [model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (single, split)]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "kind",
    [
        MaskSpec("connection_sensitivity", "element", 0.2, modules=r".*\.(v_proj|up_proj)", reselect_every=2),
        LoraSpec(r".*\.(v_proj|up_proj)", rank=2),
    ],
    ids=["sparse", "lora"],
)
def test_the_training_loop_does_not_see_the_difference(kind: ExpertSpec) -> None:
    examples = [Example(tuple((7 * at + step) % 40 for step in range(5 + at % 4)), 3) for at in range(12)]
    spec = TrainSpec(
        steps=5, batch_size=4, learning_rate=1e-2, weight_decay=0.0, warmup_ratio=0.0, schedule="linear",
        clip_norm=1.0, validate_every=None, seed=0,
    )  # fmt: skip
    runs = []
    for model in (tiny(), spread(tiny(), ["cpu", "cpu"])):
        model.requires_grad_(False)
        runs.append(train_expert(model, LanguageModelling(0), examples[:8], examples[8:], kind, spec))
    assert [report.loss for report in runs[0].history] == [report.loss for report in runs[1].history]
    assert runs[0].best_validation_loss == runs[1].best_validation_loss


@cuda
@pytest.mark.parametrize("devices", [["cpu", "cuda:0"], ["cuda:0", "cpu"]])
@pytest.mark.parametrize("block", [None, (4, 4)])
def test_cpu_and_gpu_train_as_one(devices: list[str], block: tuple[int, int] | None) -> None:
    single, split = tiny(torch.float64), spread(tiny(torch.float64), devices)
    assert {p.device.type for p in split.parameters()} == {"cpu", "cuda"}
    base = {name: p.detach().clone() for name, p in split.named_parameters()}
    chosen = supports(single, block=block)
    with InPlaceAdapter(single, chosen) as reference, attach(split, chosen) as adapter:
        assert isinstance(adapter, SplitAdapter)
        want, trained = train(single, reference, 0.5, block), train(split, adapter, 0.5, block)
        torch.testing.assert_close(trained[0], want[0], rtol=1e-6, atol=0.0)
        for name, tensor in want[1].items():
            assert torch.equal(trained[1][name].indices, tensor.indices)
            torch.testing.assert_close(trained[1][name].values, tensor.values, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(p, base[name]) for name, p in split.named_parameters())
