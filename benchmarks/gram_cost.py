"""What Gram matrices cost an expert, and what their rounding does to a merge by RegMean.

    python -m benchmarks.gram_cost [--base pypi:SmolLM2-135M-Instruct] [--rows 16] [--tokens 100]

Rows are parts of this repository's pages, as many tokens each, for all linear modules of the base, one thread. Counted
are CPU seconds a row, beside those of the forward passes alone. The merge is of four experts with random δ, each with a
page of its own, in the modules of one layer: ‖δ(rounded) - δ(fp32)‖ / ‖δ(fp32)‖, rounded as in a file (correlations in
fp16) or to bf16 as they are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from merge.methods.catalogue import lower
from merge.methods.lift import LiftInput, lift
from merge.methods.lowering import Root
from merge.methods.specs import Candidate, candidate_lift
from merge.methods.statistics import combine
from workers.adapters.support import SparseTensor
from workers.base.cache import cache_dir
from workers.base.load import load_model, load_tokenizer
from workers.base.prepare import prepare_base
from workers.measuring.file import MeasuredOn
from workers.measuring.gram import ANSWERS, NAME, TOKENS, GramReader, GramWriter, gram_matrices, gram_means
from workers.tensors.source import FileSource

PAGES = ("merging.md", "operations.md", "configuration.md", "performance.md")
ABOUT = MeasuredOn("b" * 64, "a" * 64, 1)
Measure = Callable[[], Iterator[tuple[list[str], Tensor]]]


def passes(model: Any, tokenizer: Any, page: str, rows: int, tokens: int) -> list[Callable[[], Any]]:
    """A forward pass for each row of a page."""
    text = (Path(__file__).resolve().parents[1] / "docs" / page).read_text()
    ids = tokenizer(text)["input_ids"][: rows * tokens]
    parts = [torch.tensor([ids[at : at + tokens]]) for at in range(0, len(ids) - tokens + 1, tokens)]
    return [lambda part=part: model.model(input_ids=part, use_cache=False) for part in parts]


def forward(runs: Sequence[Callable[[], Any]]) -> float:
    """CPU seconds a row."""
    start = time.process_time()
    with torch.no_grad():
        for run in runs:
            run()
    return (time.process_time() - start) / len(runs)


def cost(measure: Measure, names: Sequence[str], kind: str, file: Path, rows: int) -> tuple[float, int]:
    """CPU seconds a row, writing included, and bytes of the file."""
    start = time.process_time()
    with GramWriter(file, ABOUT, names, kind) as writer:
        for group, matrix in measure():
            writer.add(group, matrix)
        writer.close()
    return (time.process_time() - start) / rows, file.stat().st_size


def merged(deltas: Sequence[Tensor], grams: Sequence[Tensor], off_diagonal: float) -> Tensor:
    candidate = Candidate("regmean", {"off_diagonal": off_diagonal, "inputs": "tokens"})
    spec = candidate_lift(candidate)
    lifted = []
    for delta, gram in zip(deltas, grams, strict=True):
        tensor = SparseTensor(tuple(delta.shape), torch.arange(delta.numel()), delta.view(-1))
        lifted.append(lift(LiftInput(tensor, "w", "e", measured=gram), spec))
    return lower(Root(combine(lifted), len(deltas)), candidate).values


@click.command()
@click.option("--base", default="pypi:SmolLM2-135M-Instruct", show_default=True)
@click.option("--rows", default=16, show_default=True)
@click.option("--tokens", default=100, show_default=True)
@click.option("--answer", default=8, show_default=True, help="Of these, tokens that predict an answer.")
def main(base: str, rows: int, tokens: int, answer: int) -> None:
    """Print two Markdown tables."""
    torch.set_num_threads(1)
    path = prepare_base(base, cache_dir()).path
    model, tokenizer = load_model(path, torch.float32), load_tokenizer(path)
    modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    names = list(modules)
    runs = passes(model, tokenizer, PAGES[0], rows, tokens)
    forward(runs[:2])
    print(f"{len(runs)} rows of {tokens} tokens\n\n| | CPU s a row | file, MB |\n|---|---:|---:|")
    print(f"| forward passes alone | {forward(runs):.2f} | |")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gram"
        last = [torch.arange(tokens) >= tokens - answer for _ in runs]
        kinds: dict[str, Measure] = {
            NAME: lambda: gram_matrices(model, runs, names),
            TOKENS: lambda: gram_means(model, runs, names),
            ANSWERS: lambda: gram_means(model, runs, names, last),
        }
        for kind, measure in kinds.items():
            seconds, size = cost(measure, names, kind, file, len(runs))
            print(f"| {kind} | {seconds:.2f} | {size / 1e6:.0f} |", flush=True)
        layer = [name for name in names if ".layers.10." in name]
        exact: list[dict[str, Tensor]] = []
        rounded: list[GramReader] = []
        for at, page in enumerate(PAGES):
            own = {n: g for group, g in gram_means(model, passes(model, tokenizer, page, rows, tokens), layer)
                   for n in group}  # fmt: skip
            cost(lambda own=own: (([n], g) for n, g in own.items()), layer, TOKENS, Path(folder) / str(at), 1)
            exact.append(own)
            rounded.append(GramReader(FileSource(Path(folder) / str(at)), TOKENS))
        modules_of = {name: name.split(".")[-2] for name in layer}
        print("\n| off_diagonal, rounded | " + " | ".join(modules_of.values()) + " |")
        print("|---|" + "---:|" * len(layer))
        for off_diagonal in (1.0, 0.9, 0.5):
            cells: dict[str, list[str]] = {"fp16": [], "bf16": []}
            for name in layer:
                deltas = [torch.randn(modules[name].weight.shape, generator=torch.Generator().manual_seed(at))
                          for at in range(len(PAGES))]  # fmt: skip
                fine = merged(deltas, [own[name] for own in exact], off_diagonal)
                stored = [reader.load(name) for reader in rounded], [own[name].bfloat16().float() for own in exact]
                for row, grams in zip(cells.values(), stored, strict=True):
                    off = merged(deltas, grams, off_diagonal) - fine
                    row.append(f"{float(off.norm() / fine.norm()):.1e}")
            for how, row in cells.items():
                print(f"| {off_diagonal}, {how} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
