"""What merges that see a weight as a matrix cost: CPU seconds and peak memory of a merge of adapters, by method.

    python -m benchmarks.matrix_methods [--layers 1] [--experts 20] [--only NAME …]

Adapters of random 16×16 blocks, 5 % of each linear module of a layer of SmolLM2-135M's shapes (30 such layers are the
model: seconds grow with them, memory does not). Every method merges the same files in a process of its own, one thread
a tensor and two read ahead, as a flat merge does; counted is the merge without imports. Scores are not measured here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from merge.files.merged import AdapterDelta, AdapterWriter
from merge.methods.specs import Candidate, plan_reductions
from merge.tree.reduce import ExpertChild, flat_merge, reduce_node
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, save_adapter
from workers.base.memory import give_back, peak_bytes, reset_peak
from workers.tensors.source import FileSource

SHAPES = {
    "q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
    "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536),
}  # fmt: skip
METHODS = ["task_arithmetic", "ties", "iso_c", "spectral_power", "wudi", "tsv_m", "iso_cts", "svc", "knots"]
BASE, BLOCK, DENSITY = "b" * 64, 16, 0.05


def make(folder: Path, layers: int, experts: int) -> None:
    """An adapter file for each expert."""
    for expert in range(experts):
        g = torch.Generator().manual_seed(expert)
        tensors = {}
        for layer in range(layers):
            for name, shape in SHAPES.items():
                chosen = torch.rand(shape[0] // BLOCK, shape[1] // BLOCK, generator=g) < DENSITY
                held = chosen.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1).view(-1).nonzero().view(-1)
                values = 1e-3 * torch.randn(held.numel(), generator=g)
                tensors[f"layers.{layer}.{name}.weight"] = SparseTensor(shape, held, values)
        save_adapter(folder / f"e{expert:03}.safetensors", tensors, AdapterMeta(BASE))


def children(folder: Path) -> list[ExpertChild]:
    return [ExpertChild(p.stem, AdapterDelta(FileSource(p), p.stem)) for p in sorted(folder.glob("e*.safetensors"))]


def measure(folder: Path, method: str) -> None:
    """Merge once and print CPU seconds, wall seconds and the peak beyond the start, in bytes."""
    torch.set_num_threads(1)
    torch.linalg.eigh(torch.eye(64).double() @ torch.linalg.cholesky(torch.eye(64).double()))  # loads on first use
    give_back()
    reset_peak()
    before, cpu, wall = peak_bytes(), time.process_time(), time.perf_counter()
    flat_merge(children(folder), [Candidate(method)], lambda _: AdapterWriter(folder / "out"), scratch=folder)
    print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall, peak_bytes() - before]))


def node_bytes(folder: Path, method: str, experts: int) -> int:
    """Bytes of a node of two experts in the last round, which a merge of `experts` has; `out` is there. Where that
    round reads an earlier merge, `out` stands for it: it has the same size."""
    last = plan_reductions([Candidate(method)], experts)[-1]
    reference = AdapterDelta(FileSource(folder / "out"), "out") if last.spec.reference else None
    reduce_node(children(folder)[:2], last.spec, folder / "node", BASE, reference)
    return (folder / "node").stat().st_size


@click.command()
@click.option("--layers", default=1, show_default=True)
@click.option("--experts", default=20, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(METHODS), help="Default: all.")
@click.option("--in", "folder", type=click.Path(path_type=Path), hidden=True, help="Measure one method, here.")
def main(layers: int, experts: int, only: tuple[str, ...], folder: Path | None) -> None:
    """Print a Markdown table."""
    if folder is not None:
        measure(folder, only[0])
        return
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary)
        make(inputs, layers, experts)
        print(f"{experts} experts, {layers} of 30 layers\n")
        print("| method | CPU s | wall s | peak, MB | node of two experts, MB |\n|---|---:|---:|---:|---:|")
        for method in only or METHODS:
            command = [sys.executable, "-m", "benchmarks.matrix_methods", "--in", str(inputs), "--only", method]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            cpu, wall, peak = json.loads(done.stdout)
            node = node_bytes(inputs, method, experts)
            print(f"| {method} | {cpu:.1f} | {wall:.1f} | {peak / 1e6:.0f} | {node / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
