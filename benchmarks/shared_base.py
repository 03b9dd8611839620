"""Memory of a node on which several experts train at once on one mapped base, against the sum of its terms.

Each expert is a process of its own that loads the base as workers do, trains one step on a short batch, and holds all
memory in the middle of the next step. Memory is the proportional set size: a page that k processes share counts 1/k in
each, so the sum over processes is what the node holds. Linux only. Run `python -m benchmarks.shared_base`.
"""

from __future__ import annotations

import gc
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infra.environment import versions
from workers.base.load import load_model
from workers.base.memory import give_back, map_large_tensors
from workers.base.structure import quiet_transformers
from workers.masks.spec import MaskSpec, select_supports
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles, write_weights
from workers.text.prompt import Example
from workers.training.in_place import InPlaceAdapter
from workers.training.objectives import LanguageModelling

MIB = 1 << 20
TIMEOUT = 300
"""Seconds after which a process that does not answer is given up."""
Load = Callable[[Path, torch.dtype], Any]


@dataclass(frozen=True)
class Terms:
    """Bytes that one expert needs by itself."""

    adapted: int
    """Weight tensors that it changes; their pages become its own."""
    state: int
    """Values, gradient, moments, positions, base values, and the buffer of one layer's dense gradient."""
    activations: int
    """What autograd keeps between forward and backward, weights not counted."""


@dataclass(frozen=True)
class Usage:
    """Bytes that one process holds, from one reading of proc(5)'s smaps. The last three are of the weights' file."""

    proportional: int
    anonymous: int
    """What it wrote: heap, and its own copies of mapped pages. Nothing of it is shared, since nothing was forked."""
    written: int
    """Pages of the file that it has a copy of."""
    shared: int
    """Pages that other processes map too."""
    alone: int
    """Pages as they are in the file that no other process maps."""
    file: int
    """Its proportional part of all pages that are as they are in the file."""

    @property
    def libraries(self) -> int:
        """Its part of the pages of all other files, which depends on what else runs on the machine."""
        return self.proportional - self.anonymous - self.file


@dataclass(frozen=True)
class Measurement:
    """One node. `before`, `held`, `terms` have one entry for each expert; `base` is the file's size in bytes."""

    base: int
    before: list[Usage]
    """With interpreter, libraries, and what remains of loading and training a small base."""
    held: list[Usage]
    terms: list[Terms]

    @property
    def node(self) -> int:
        """What all experts hold together."""
        return sum(usage.proportional for usage in self.held)

    @property
    def floors(self) -> list[int]:
        """Of each process without the base. Libraries as of the later reading: other programs come and go."""
        return [one.anonymous + two.libraries for one, two in zip(self.before, self.held, strict=True)]

    @property
    def sum_of_terms(self) -> int:
        """base + for each expert (adapted weights + trainable state + activations + floor)."""
        own = sum(term.adapted + term.state + term.activations for term in self.terms)
        return self.base + own + sum(self.floors)


def write_base(folder: Path, layers: int, vocabulary: int) -> Path:
    """A base of random fp32 weights in SmolLM2-135M's shape (which has 30 layers and 49,152 tokens), as prepared."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(folder / "unaligned")
    write_weights(folder / WEIGHTS, CheckpointFiles.in_folder(folder / "unaligned"))
    shutil.rmtree(folder / "unaligned")
    config.save_pretrained(folder)
    return folder


def measure(folder: Path, experts: int, tokens: int, load: Load = load_model) -> Measurement:
    """Run `experts` processes on the base in `folder` at once. `load` stands in for `workers.base.load.load_model`."""
    context = multiprocessing.get_context("spawn")
    running: list[tuple[Any, Connection]] = []
    small = folder / "small"
    if not small.exists():
        write_base(small, layers=1, vocabulary=64)
    try:
        for _ in range(experts):
            here, there = context.Pipe()
            process = context.Process(target=_expert, args=([small, folder], tokens, load, there), daemon=True)
            process.start()
            there.close()
            running.append((process, here))
        for _, pipe in running:
            _receive(pipe)
        before = [_usage(process.pid, folder / WEIGHTS) for process, _ in running]
        for _, pipe in running:
            pipe.send("load and train")
        terms = [_receive(pipe) for _, pipe in running]
        held = [_usage(process.pid, folder / WEIGHTS) for process, _ in running]
        return Measurement((folder / WEIGHTS).stat().st_size, before, held, terms)
    finally:
        for process, pipe in running:
            pipe.close()  # ends its wait
            process.join(TIMEOUT)


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(TIMEOUT):
        raise TimeoutError(f"an expert did not answer for {TIMEOUT} s")
    return pipe.recv()  # EOFError if it failed; its traceback is on stderr


def _expert(folders: list[Path], tokens: int, load: Load, pipe: Connection) -> None:
    """Train on the first folder's base for the floor, then on the second's."""
    torch.set_num_threads(1)
    map_large_tensors()
    _train(load(folders[0], torch.float32), tokens)
    _tidy()
    pipe.send("ready")
    pipe.recv()
    terms, held = _train(load(folders[1], torch.float32), tokens)
    _tidy()
    pipe.send(terms)
    try:
        pipe.recv()
    except EOFError:
        del held


def _tidy() -> None:
    gc.collect()
    give_back()


def _train(model: Any, tokens: int) -> tuple[Terms, Any]:
    """One step, then the forward pass of another; the terms, and what keeps them in memory."""
    supports = select_supports(model, MaskSpec("random", "element", 0.05))
    adapter = InPlaceAdapter(model, supports)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, fused=True)
    objective = LanguageModelling(pad_id=0)
    examples = [Example(tuple(at % 60 for at in range(tokens)), tokens // 2)]
    (objective.loss_sum(model, examples) / tokens).backward()
    optimizer.step()
    adapter.write_back()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = objective.loss_sum(model, examples)
    adapted = [model.get_submodule(name).weight for name in supports]
    positions = sum(tensor.nbytes for key, tensor in adapter.state().items() if key != "values")
    moments = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    values = sum(2 * leaf.nbytes for leaf in adapter.parameters())  # with their gradient
    originals = adapter.num_values * adapted[0].element_size()
    dense = max(weight.nbytes for weight in adapted)
    state = values + moments + positions + originals + dense
    return Terms(sum(weight.nbytes for weight in adapted), state, sum(saved.values())), (adapter, optimizer, loss)


def _usage(pid: int, weights: Path) -> Usage:
    """What the process `pid` holds now."""
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    of_file: list[str] = []
    inside = False
    for line in smaps.splitlines():
        if not line.split(None, 1)[0].endswith(":"):  # the head of a mapping: addresses, ..., path
            inside = line.endswith(str(weights.resolve()))
        elif inside:
            of_file.append(line)
    text = "\n".join(of_file)
    written = _field(text, "Anonymous")
    own = _field(text, "Private_Clean") + _field(text, "Private_Dirty")  # dirty: copied, or not on the disk yet
    return Usage(
        proportional=_field(smaps, "Pss"),
        anonymous=_field(smaps, "Anonymous"),
        written=written,
        shared=_field(text, "Shared_Clean") + _field(text, "Shared_Dirty"),
        alone=own - written,
        file=_field(text, "Pss") - written,
    )


def _field(smaps: str, name: str) -> int:
    """Sum of a field of proc(5)'s smaps over all mappings in the text, in bytes."""
    return sum(int(line.split()[1]) for line in smaps.splitlines() if line.startswith(f"{name}:")) * 1024


@click.command()
@click.option("--experts", default=3, show_default=True, help="Measures with 1 to this many.")
@click.option("--tokens", default=256, show_default=True, help="Length of the one row of a batch.")
@click.option("--layers", default=30, show_default=True)
@click.option("--vocabulary", default=49152, show_default=True)
def main(experts: int, tokens: int, layers: int, vocabulary: int) -> None:
    """Node memory of 1 to EXPERTS experts on one base, 5 % of the elements of q, k, v, o trained; MiB."""
    print(versions())
    head = (
        "experts",
        "base",
        "floor",
        "adapted",
        "state",
        "activations",
        "sum of terms",
        "measured",
        "base still shared",
    )
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    with tempfile.TemporaryDirectory(prefix="shared-base-") as name:
        folder = write_base(Path(name), layers, vocabulary)
        for count in range(1, experts + 1):
            found = measure(folder, count, tokens)
            term = found.terms[0]
            numbers = (
                found.base, sum(found.floors) // count, term.adapted, term.state, term.activations,
                found.sum_of_terms, found.node, found.held[0].shared,
            )  # fmt: skip
            print(f"| {count} | " + " | ".join(f"{number / MIB:.0f}" for number in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
