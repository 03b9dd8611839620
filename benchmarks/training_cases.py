"""The cases of the training benchmark: the frozen floor, every mask of this project, and what others offer.

Every case is built on a frozen causal language model and has the same step: forward, backward, AdamW, and whatever the
method needs to make the step take effect. Trained values, moments and gradients of adapters are fp32. The embeddings'
output asks for a gradient in every case, so all of them compute all input gradients. Does not cover timing and memory
(``benchmarks.training``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from workers.adapters.writer import AdapterMeta, save_adapter
from workers.masks.spec import Granularity, MaskSpec, match_modules, select_supports
from workers.training.in_place import InPlaceAdapter

SHAPES: Mapping[str, Mapping[str, int]] = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 1000,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 18, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 1000,
    },
}  # fmt: skip
"""SmolLM2-135M's and Llama-3.2-1B's blocks. The small vocabulary stands for logits at target positions only."""
RATE = 1e-4


@dataclass(frozen=True)
class Setup:
    """What all cases of one table share."""

    shape: str
    layers: int
    device: str
    dtype: str
    modules: str
    tokens: int
    sequences: int
    rank: int
    density: float
    block: int
    group: int

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


@dataclass(frozen=True)
class Case:
    """One method, ready to step. ``save`` writes what the method stores, a file or a folder, with bf16 values."""

    step: Callable[[], None]
    trainable: int
    save: Callable[[Path], None] | None = None


Build = Callable[[LlamaForCausalLM, torch.Tensor, Setup], Case]


def build_model(setup: Setup) -> LlamaForCausalLM:
    """A frozen model of random weights (seed 0) on the setup's device."""
    settings: dict[str, Any] = {**SHAPES[setup.shape], "num_hidden_layers": setup.layers}
    config = LlamaConfig(**settings, max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(setup.device):
        model = LlamaForCausalLM(config)
    model = model.to(getattr(torch, setup.dtype)).requires_grad_(False).eval()
    model.get_input_embeddings().register_forward_hook(_ask_for_gradient)
    return cast(LlamaForCausalLM, model)


def _ask_for_gradient(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_(True)


def build_batch(setup: Setup) -> torch.Tensor:
    """Token ids int64 [sequences, tokens / sequences]."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[setup.shape]["vocab_size"]
    shape = (setup.sequences, setup.tokens // setup.sequences)
    return torch.randint(vocabulary, shape, generator=generator).to(setup.device)


def _backward(model: nn.Module, rows: torch.Tensor) -> None:
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()


def _adamw(parameters: Sequence[torch.Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), lr=RATE, fused=True)


def floor(model: LlamaForCausalLM, rows: torch.Tensor, setup: Setup) -> Case:
    """The frozen model: forward, and backward down to the embeddings' output."""
    return Case(lambda: _backward(model, rows), 0)


def dense_gradient(model: LlamaForCausalLM, rows: torch.Tensor, setup: Setup) -> Case:
    """The floor and one dense weight gradient per adapted module, dropped as soon as autograd has it."""
    for module in match_modules(model, setup.modules).values():
        module.weight.requires_grad_(True).register_post_accumulate_grad_hook(_drop_gradient)
    return Case(lambda: _backward(model, rows), 0)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def in_place(granularity: Granularity) -> Build:
    """This project: a random mask of the setup's density, trained inside the weights."""

    def build(model: LlamaForCausalLM, rows: torch.Tensor, setup: Setup) -> Case:
        spec = MaskSpec(
            "random", granularity, setup.density, (setup.block, setup.block), setup.modules, group=setup.group
        )
        supports = select_supports(model, spec)
        blocks = {f"{name}.weight": s.block for name, s in supports.items() if s.block is not None}
        adapter = InPlaceAdapter(model, supports)
        del supports  # positions as int64, which the adapter has as int32
        optimizer = _adamw(adapter.parameters())

        def step() -> None:
            adapter.zero_grad()
            _backward(model, rows)
            optimizer.step()
            adapter.write_back()

        def save(path: Path) -> None:
            meta = AdapterMeta(base_sha256="0" * 64, kind="sparse", info={})
            save_adapter(path, adapter.delta(), meta, torch.bfloat16, blocks=blocks)

        return Case(step, adapter.num_values, save)

    return build


def _parameter_step(model: nn.Module, rows: torch.Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        _backward(model, rows)
        optimizer.step()

    return step


def _peft(model: LlamaForCausalLM, rows: torch.Tensor, config: LoraConfig | ShiraConfig) -> Case:
    wrapped: Any = get_peft_model(model, config)
    trained = [p for p in wrapped.parameters() if p.requires_grad]

    def save(path: Path) -> None:
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
        wrapped.save_pretrained(str(path), save_embedding_layers=False)

    return Case(_parameter_step(model, rows, _adamw(trained)), sum(p.numel() for p in trained), save)


def lora(model: LlamaForCausalLM, rows: torch.Tensor, setup: Setup) -> Case:
    """PEFT's LoRA."""
    names = list(match_modules(model, setup.modules))
    return _peft(model, rows, LoraConfig(r=setup.rank, lora_alpha=2 * setup.rank, target_modules=names))


def shira(model: LlamaForCausalLM, rows: torch.Tensor, setup: Setup) -> Case:
    """PEFT's SHiRA with the rank that comes closest to the number of values that the setup's density gives."""
    modules = match_modules(model, setup.modules)
    wanted = setup.density * sum(module.weight.numel() for module in modules.values())
    rank = max(1, round(wanted / sum(sum(module.weight.shape) for module in modules.values())))
    return _peft(model, rows, ShiraConfig(r=rank, random_seed=0, target_modules=list(modules)))


def dense_mask(model: LlamaForCausalLM, rows: torch.Tensor, setup: Setup) -> Case:
    """Each forward makes W + mask * delta; delta, its gradient and its moments are dense (fp32)."""
    spec = MaskSpec("random", "element", setup.density, modules=setup.modules)
    supports = select_supports(model, spec)
    deltas = []
    for name, support in supports.items():
        module = cast(nn.Linear, model.get_submodule(name))
        delta = nn.Parameter(torch.zeros_like(module.weight, dtype=torch.float32))
        mask = torch.zeros_like(delta)
        mask.view(-1)[support.indices().to(mask.device)] = 1.0
        deltas.append(delta)
        module.forward = _masked_forward(module, mask, delta)  # type: ignore[method-assign]
    return Case(_parameter_step(model, rows, _adamw(deltas)), sum(s.count for s in supports.values()))


def _masked_forward(module: nn.Linear, mask: torch.Tensor, delta: torch.Tensor) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, module.weight + (mask * delta).to(module.weight.dtype), module.bias)

    return forward


def full(model: LlamaForCausalLM, rows: torch.Tensor, setup: Setup) -> Case:
    """The modules' weights are parameters; weights that are not fp32 have fp32 copies that the optimizer updates."""
    modules = match_modules(model, setup.modules)
    weights = [module.weight.requires_grad_(True) for module in modules.values()]

    def save(path: Path) -> None:
        save_file({name: m.weight.detach().to(torch.bfloat16).contiguous() for name, m in modules.items()}, str(path))

    count = sum(weight.numel() for weight in weights)
    if setup.dtype == "float32":
        return Case(_parameter_step(model, rows, _adamw(weights)), count, save)
    masters = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = _adamw(masters)

    def step() -> None:
        _backward(model, rows)
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = cast(torch.Tensor, weight.grad).float(), None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)

    return Case(step, count, save)


REFERENCE = "floor + dW"
CASES: Mapping[str, Build] = {
    "floor": floor,
    REFERENCE: dense_gradient,
    "element": in_place("element"),
    "block": in_place("block"),
    "row": in_place("row"),
    "column": in_place("column"),
    "n_m": in_place("n_m"),
    "lora": lora,
    "shira": shira,
    "dense_mask": dense_mask,
    "full": full,
}
