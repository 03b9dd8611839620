"""Memory and file size of the cases of the training benchmark.

The peak of two steps after a first one, above the size before the case was built: the trained state, activations that
the floor does not keep, and temporary tensors. On the CPU it is the resident size of a process of the case's own, so
it counts what the allocator holds back as well.
"""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.training_cases import CASES, Case, Setup, build_batch, build_model
from workers.base.memory import give_back, map_large_tensors, peak_bytes, reset_peak


@dataclass(frozen=True)
class Footprint:
    """``peak``: bytes above the process's size before the case; ``kept``: bytes of activations that autograd keeps."""

    peak: int
    kept: int
    trainable: int
    file_bytes: int | None


def measure_footprints(names: list[str], setup: Setup, threads: int) -> dict[str, Footprint]:
    """On the CPU every case has a process of its own, all forked from one that has imported everything."""
    if setup.on_cuda:
        return {name: measure_footprint(name, setup, threads) for name in names}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return {name: pool.submit(measure_footprint, name, setup, threads).result() for name in names}


def measure_footprint(name: str, setup: Setup, threads: int) -> Footprint:
    """Peak of two steps after a first one, which leaves its optimizer state, and the size of what is saved."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    if not setup.on_cuda:
        map_large_tensors()  # as the workers do
    model, batch = build_model(setup), build_batch(setup)
    CASES["floor"](model, batch, setup).step()
    _load_optimizer(setup)
    _reset(setup)
    before = _peak(setup)
    case = CASES[name](model, batch, setup)
    with kept_activations(model) as kept:
        case.step()
    _reset(setup)
    for _ in range(2):
        case.step()
    return Footprint(_peak(setup) - before, kept[0], case.trainable, _file_bytes(case))


def _load_optimizer(setup: Setup) -> None:
    """One step of nothing much, so that the optimizer's code is in memory before it counts."""
    parameter = nn.Parameter(torch.zeros(1, device=setup.device))
    parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW([parameter], fused=True).step()


def _reset(setup: Setup) -> None:
    gc.collect()
    if setup.on_cuda:
        torch.cuda.synchronize(setup.device)
        torch.cuda.reset_peak_memory_stats(setup.device)
    else:
        give_back()
        reset_peak()


def _peak(setup: Setup) -> int:
    return torch.cuda.max_memory_allocated(setup.device) if setup.on_cuda else peak_bytes()


@contextmanager
def kept_activations(model: nn.Module) -> Iterator[list[int]]:
    """Counts the bytes of different tensors, parameters aside, that forward passes inside keep for their backward."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: list[torch.Tensor] = []  # so that no address is used twice
    total = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            alive.append(tensor.detach())
            total[0] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def _file_bytes(case: Case) -> int | None:
    if case.save is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        case.save(path)
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix == ".safetensors"]
        return sum(file.stat().st_size for file in files)
