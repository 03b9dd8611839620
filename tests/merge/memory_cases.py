"""Merges whose memory is measured: `python -m tests.merge.memory_cases FOLDER CASE...` prints each case's peak in bytes
beyond what the imports take. Every case runs in a fork of its own."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from merge.files.checkpoint import BaseCheckpoint, CheckpointDelta
from merge.files.checkpoint_writer import CheckpointWriter, FolderTarget
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.methods.catalogue import lower
from merge.methods.lowering import Root
from merge.methods.specs import Candidate, plan_reductions
from merge.methods.statistics import TensorStatistics
from merge.tree.reduce import ExpertChild, NodeChild, reduce_node, reduce_root
from tests.merge.experts import only
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, save_adapter
from workers.base.memory import give_back, peak_bytes, reset_peak
from workers.tensors.checkpoint import CheckpointFiles
from workers.tensors.source import FileSource

BASE = "b" * 64
SIDE = 512
FILES = 4
CANDIDATES = [Candidate("mean"), Candidate("ties")]


def adapters(folder: Path, layers: int) -> list[Path]:
    """A few adapters with four matrices a layer at 5 %, for any number of experts."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(FILES):
        paths.append(folder / f"{layers}-{number}")
        g = torch.Generator().manual_seed(number)
        tensors = {}
        for name in (
            f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(layers) for part in "qkvo"
        ):
            indices = torch.randint(SIDE * SIDE, (SIDE * SIDE // 20,), generator=g).unique()
            tensors[name] = SparseTensor((SIDE, SIDE), indices, torch.randn(indices.numel(), generator=g))
        save_adapter(paths[-1], tensors, AdapterMeta(BASE))
    return paths


def experts(folder: Path, layers: int, n: int) -> list[ExpertChild]:
    paths = [folder / f"{layers}-{number % FILES}" for number in range(n)]
    return [ExpertChild(f"e{at}", AdapterDelta(FileSource(path), f"e{at}")) for at, path in enumerate(paths)]


def root(folder: Path, children) -> None:
    (reduction,) = plan_reductions(CANDIDATES)
    sinks = {c: AdapterWriter(folder / f"{os.getpid()}-{at}") for at, c in enumerate(CANDIDATES)}
    reduce_root(children, reduction.spec, sinks, BASE)


def flat(folder: Path, n: int, layers: int, parts: int) -> None:
    """A flat merge of n adapters, of one of `parts` shares of the tensors; all headers are read and kept."""
    children = experts(folder, layers, n)
    names = children[0].reader.names
    root(folder, only(children, names[: len(names) // parts]))


def node(folder: Path, layers: int) -> None:
    """Two nodes of three experts each, and the root of the two."""
    (reduction,) = plan_reductions(CANDIDATES)
    files = []
    for number in range(2):
        files.append(folder / f"node-{os.getpid()}-{number}")
        own = experts(folder, layers, 6)[3 * number : 3 * number + 3]
        reduce_node(own, reduction.spec, files[-1], BASE)
    root(folder, [NodeChild(str(at), (FileSource(path),)) for at, path in enumerate(files)])


def checkpoint(folder: Path, seed: int, tensors: int) -> Path:
    """A base (seed 0) or a fine-tuned checkpoint of fp32 matrices."""
    where = folder / f"checkpoint-{tensors}-{seed}"
    where.mkdir(exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    save_file({f"w{at}": torch.randn(1024, 1024, generator=g) for at in range(tensors)}, where / "model.safetensors")
    return where


def full(folder: Path, n: int, tensors: int) -> None:
    """n full checkpoints merged into a full checkpoint."""
    base = BaseCheckpoint.in_folder(folder / f"checkpoint-{tensors}-0", BASE)
    children = [
        ExpertChild(
            f"e{at}",
            CheckpointDelta(CheckpointFiles.in_folder(folder / f"checkpoint-{tensors}-{1 + at % 2}"), base, f"e{at}"),
        )
        for at in range(n)
    ]
    ties = Candidate("ties")
    (reduction,) = plan_reductions([ties])
    sink = CheckpointWriter(base, FolderTarget(folder / f"out-{os.getpid()}"), torch.bfloat16, 10_000_000)
    reduce_root(children, reduction.spec, {ties: sink}, BASE)


def regmean(folder: Path, side: int, rank: int) -> None:
    """RegMean lowered for one matrix [16, side], with Gram matrices of that rank."""
    g = torch.Generator().manual_seed(0)
    inputs, delta = torch.randn(rank, side, generator=g), torch.randn(16, side, generator=g)
    gram = inputs.T @ inputs
    arrays = {"sum": delta.view(-1), "gram_product": (delta @ gram).view(-1), "gram": gram, "gram_count": torch.ones(1)}
    statistics = TensorStatistics((16, side), torch.arange(16 * side), arrays, 1)
    del inputs
    give_back()
    reset_peak()
    lower(Root(statistics, 1), Candidate("regmean"))


def spectral(folder: Path, rows: int, columns: int) -> None:
    """Four powers lowered for one dense matrix."""
    total = torch.randn(rows * columns, generator=torch.Generator().manual_seed(0))
    statistics = TensorStatistics((rows, columns), torch.arange(rows * columns), {"sum": total}, 4)
    give_back()
    reset_peak()
    root = Root(statistics, 4)
    for p in (1.0, 0.0, -0.5, -1.0):
        lower(root, Candidate("spectral_power", {"p": p}))


def run(folder: Path, case: str) -> int:
    """The peak of one case beyond the start, in bytes."""
    name, *numbers = case.split(":")
    give_back()
    reset_peak()
    before = peak_bytes()
    {"flat": flat, "node": node, "full": full, "regmean": regmean, "spectral": spectral}[name](
        folder, *map(int, numbers)
    )
    return peak_bytes() - before


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    few = torch.eye(256).double()
    torch.linalg.eigh(few @ torch.linalg.cholesky(few))  # libraries that load on first use are no case's
    for layers in {int(case.split(":")[1 + case.startswith("flat")]) for case in cases if case[:4] in ("flat", "node")}:
        adapters(folder, layers)
    for tensors in {int(case.split(":")[2]) for case in cases if case.startswith("full")}:
        for seed in range(3):
            checkpoint(folder, seed, tensors)
    for case in cases:
        reader, writer = os.pipe()
        if not os.fork():
            os.write(writer, json.dumps([case, run(folder, case)]).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            print(answer.read(), flush=True)
        os.wait()


if __name__ == "__main__":
    main()
