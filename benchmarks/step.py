"""What a training step costs beside the frozen model's forward and input-gradient backward (the floor).

    python -m benchmarks.step [--tokens 512] [--layers 6] [--rounds 7] [--threads 1] [--dtype float32]

A Llama of SmolLM2-135M's shape with a small vocabulary and random weights. Rounds are interleaved: every case runs
once per round, medians are compared. A step includes AdamW and writing the weights back. Baselines of other packages
are not covered here.
"""

import statistics
import time
from collections.abc import Callable

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infra.environment import environment
from workers.inplace import InPlaceAdapter
from workers.masks import MaskSpec, select_supports

VALUE_MLP = r".*(v_proj|o_proj|gate_proj|up_proj|down_proj)"
ATTENTION = r".*(q_proj|k_proj|v_proj|o_proj)"
CASES = {
    "v,o,MLP, elements": (VALUE_MLP, "element"),
    "v,o,MLP, blocks 16x16": (VALUE_MLP, "block"),
    "q,k,v,o, elements": (ATTENTION, "element"),
    "q,k,v,o, blocks 16x16": (ATTENTION, "block"),
}
Timed = tuple[Callable[[], None], Callable[[], object]]


@click.command()
@click.option("--tokens", default=512, show_default=True, help="Tokens per step, in four rows.")
@click.option("--layers", default=6, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def main(tokens: int, layers: int, rounds: int, threads: int, dtype: str) -> None:
    """Print milliseconds and the ratio to the floor for every case."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).requires_grad_(False)
    rows = torch.randint(1000, (4, tokens // 4))
    seconds: dict[str, list[float]] = {name: [] for name in ("floor", *CASES)}
    for number in range(rounds + 1):
        for name in seconds:
            step, restore = floor(model, rows) if name == "floor" else sparse(model, rows, *CASES[name])
            step()  # allocations of the first step do not count
            start = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - start)
            restore()
    base = statistics.median(seconds["floor"])
    found = environment()
    print(f"{found['machine']}, torch {found['torch']}, {threads} threads, {dtype}, {tokens} tokens, {layers} layers")
    print("\n| step | ms | / floor |\n|---|---:|---:|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values) * 1e3:.0f} | {statistics.median(values) / base:.2f} |")


def floor(model: LlamaForCausalLM, rows: torch.Tensor) -> Timed:
    """The frozen model: forward, and backward down to the embeddings' output."""
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_(True)
    )
    return lambda: model(input_ids=rows, labels=rows).loss.backward(), hook.remove


def sparse(model: LlamaForCausalLM, rows: torch.Tensor, modules: str, granularity: str) -> Timed:
    """A whole training step with a random mask of 5 %."""
    spec = MaskSpec("random", granularity, 0.05, (16, 16), modules)
    adapter = InPlaceAdapter(model, select_supports(model, spec))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        adapter.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        adapter.write_back()

    return step, adapter.restore


if __name__ == "__main__":
    main()
