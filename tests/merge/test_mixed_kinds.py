"""Experts of different kinds merge as their dense deltas do: a LoRA, a full and a sparse one, heads left out."""

from pathlib import Path

import pytest
import torch

from merge.files.merged import AdapterDelta, AdapterWriter
from merge.methods.specs import Candidate
from merge.tree.reduce import ExpertChild, flat_merge
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, LowRank, save_adapter
from workers.tensors.source import FileSource

BASE = "b" * 64
SHAPES = {"q.weight": (6, 10), "up.weight": (8, 4)}


def dyadic(*shape: int, seed: int) -> torch.Tensor:
    """Multiples of 1/8, so that sums and products are exact."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(seed)) / 8


def make(folder: Path) -> tuple[dict[str, FileSource], dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """Three adapters, their dense deltas and their supports (0 or 1) by tensor; the LoRA one has a head."""
    kinds: dict[str, dict[str, SparseTensor | LowRank]] = {"full": {}, "lora": {}, "sparse": {}}
    deltas: dict[str, list[torch.Tensor]] = {}
    supports: dict[str, list[torch.Tensor]] = {}
    for at, (name, shape) in enumerate(SHAPES.items()):
        full = dyadic(*shape, seed=at)
        low = LowRank(dyadic(2, shape[1], seed=at + 10), dyadic(shape[0], 2, seed=at + 20), 0.25)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(at)) < 0.3
        indices = mask.view(-1).nonzero().view(-1)
        values = dyadic(indices.numel(), seed=at + 30)
        kinds["full"][name] = SparseTensor(shape, torch.arange(full.numel()), full.view(-1))
        kinds["lora"][name] = low
        kinds["sparse"][name] = SparseTensor(shape, indices, values)
        dense = torch.zeros(shape)
        dense.view(-1)[indices] = values
        deltas[name] = [full, 0.25 * low.b @ low.a, dense]
        supports[name] = [torch.ones(shape), torch.ones(shape), mask.float()]
    for kind, tensors in kinds.items():
        head = {"score.weight": torch.ones(2, 6)} if kind == "lora" else None
        save_adapter(folder / kind, tensors, AdapterMeta(BASE, kind), torch.float32, head)
    return {kind: FileSource(folder / kind) for kind in kinds}, deltas, supports


def ties(deltas: list[torch.Tensor]) -> torch.Tensor:
    """TIES (arXiv 2306.01708) at density 1 and lambda 1: the mean of the values whose sign is the larger mass'."""
    stack = torch.stack(deltas)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = (stack * sign > 0).float()
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("method", ["mean", "overlap_mean", "task_arithmetic", "ties"])
def test_kinds_merge_as_their_dense_deltas(tmp_path: Path, method: str) -> None:
    sources, deltas, supports = make(tmp_path)
    candidate = Candidate(method, {"lambda": 0.5} if method == "task_arithmetic" else {})
    experts = [ExpertChild(name, AdapterDelta(source, name)) for name, source in sources.items()]
    info = flat_merge(experts, [candidate], lambda c: AdapterWriter(tmp_path / "out"))[candidate]
    assert info.experts == ("full", "lora", "sparse")
    merged = AdapterReader(FileSource(tmp_path / "out"))
    assert (merged.meta.kind, merged.meta.format_version) == ("sparse", 2)
    assert merged.names == sorted(SHAPES)
    assert merged.head_names == []
    for name, shape in SHAPES.items():
        total = torch.stack(deltas[name]).sum(0)
        expected = {
            "mean": total / 3,
            "overlap_mean": total / torch.stack(supports[name]).sum(0),
            "task_arithmetic": total * 0.5,
            "ties": ties(deltas[name]),
        }[method]
        tensor = merged.load(name)
        assert tensor.indices.numel() == tensor.numel
        assert torch.allclose(tensor.values.view(shape), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["spectral_power", "iso_c", "wudi", "tsv_m", "iso_cts", "svc", "knots"])
def test_a_weight_as_a_matrix_is_the_same_for_every_kind(tmp_path: Path, method: str) -> None:
    """Adapters of all kinds against full ones of the same δ: the same bits."""
    sources, deltas, _ = make(tmp_path)
    full = {}
    for at, kind in enumerate(sources):
        tensors = {}
        for name, shape in SHAPES.items():
            dense = deltas[name][at].reshape(-1)
            tensors[name] = SparseTensor(shape, torch.arange(dense.numel()), dense)
        save_adapter(tmp_path / f"dense-{kind}", tensors, AdapterMeta(BASE), torch.float32)
        full[kind] = FileSource(tmp_path / f"dense-{kind}")
    found = []
    for given in (sources, full):
        experts = [ExpertChild(name, AdapterDelta(source, name)) for name, source in given.items()]
        out = tmp_path / f"out-{len(found)}"
        flat_merge(experts, [Candidate(method)], lambda c, out=out: AdapterWriter(out), scratch=tmp_path)
        found.append(AdapterReader(FileSource(out)))
    for name in SHAPES:
        merged, expected = found[0].load(name), found[1].load(name)
        assert merged.values.any()
        assert torch.equal(merged.indices, expected.indices)
        assert torch.equal(merged.values, expected.values)
