"""Small experts for tests of merging: adapters with dyadic values, so that every sum is exact in any order."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from merge.files.merged import AdapterDelta
from merge.methods.catalogue import METHODS
from merge.methods.specs import Candidate
from merge.tree.reduce import DeltaReader, ExpertChild
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.measuring.file import MeasuredOn
from workers.measuring.fisher import FisherWriter
from workers.measuring.gram import GramWriter
from workers.tensors.source import FileSource

BASE = "b" * 64
SHAPES = {"l0.v.weight": (6, 10), "l0.up.weight": (8, 16), "l1.v.weight": (6, 10)}


def make_experts(folder: Path, names: Iterable[str], seed: int = 0, skip: str = "") -> dict[str, Path]:
    """Adapter files by name, multiples of 1/8 on a quarter of the positions; every third lacks the tensor `skip`."""
    g = torch.Generator().manual_seed(seed)
    paths = {}
    for number, name in enumerate(names):
        tensors = {}
        for tensor, shape in SHAPES.items():
            if tensor == skip and number % 3 == 0:
                continue
            numel = shape[0] * shape[1]
            indices = torch.randperm(numel, generator=g)[: numel // 4].sort().values
            values = torch.randint(-8, 9, (indices.numel(),), generator=g) / 8
            tensors[tensor] = SparseTensor(shape, indices, values)
        paths[name] = folder / f"{name}.safetensors"
        save_adapter(paths[name], tensors, AdapterMeta(BASE))
    return paths


def make_measured(kind: str, adapter: Path) -> Path:
    """A Fisher or Gram file beside an adapter, with dyadic values; those of a Fisher file have a norm of 8."""
    reader = AdapterReader(FileSource(adapter))
    out = adapter.with_suffix(f".{kind}")
    meta = MeasuredOn(BASE, "a" * 64, 8)
    if kind == "fisher":
        with FisherWriter(out, meta, reader.names) as fisher:
            for name in reader.names:
                values = torch.ones(reader.count(name))
                if name == reader.names[0]:  # the squares of 62 values sum to 64
                    values[:5] = torch.tensor([1.5, 2.0, 0.5, 0.5, 0.5])
                fisher.add(name, values.roll(len(adapter.name)))
            fisher.close()
        return out
    g = torch.Generator().manual_seed(len(adapter.name))
    with GramWriter(out, meta, reader.names) as gram:
        for name in reader.names:
            x = torch.randint(-2, 3, (4, reader.shape(name)[1]), generator=g).float()
            gram.add([name], x.T @ x)
        gram.close()
    return out


def children(paths: Mapping[str, Path], measurement: str | None = None) -> list[ExpertChild]:
    """The experts as a node's children, in the mapping's order."""
    return [
        ExpertChild(
            name,
            AdapterDelta(FileSource(path), name),
            FileSource(make_measured(measurement, path)) if measurement else None,
        )
        for name, path in paths.items()
    ]


class Only:
    """Some tensors of a δ: what a node's file had when its tensors were split over several."""

    def __init__(self, reader: DeltaReader, names: Sequence[str]) -> None:
        self._reader = reader
        self.names = [name for name in reader.names if name in names]
        self.base_sha256, self.identity = reader.base_sha256, reader.identity
        self.shape, self.count, self.load = reader.shape, reader.count, reader.load


def only(children: Sequence[ExpertChild], names: Sequence[str]) -> list[ExpertChild]:
    """The experts with these tensors alone."""
    return [ExpertChild(child.name, Only(child.reader, names), child.measured) for child in children]


def default_candidate(method: str, names: Iterable[str]) -> Candidate:
    """A method with default parameters; where it needs weights, dyadic ones that sum to 1."""
    names = sorted(names)
    if not METHODS[method].weights_required:
        return Candidate(method)
    shares = [2.0 ** -(at + 1) for at in range(len(names))]
    shares[-1] += 1 - sum(shares)
    return Candidate(method, weights=dict(zip(names, shares, strict=True)))


def load(path: Path) -> dict[str, SparseTensor]:
    """An adapter file's tensors by name."""
    reader = AdapterReader(FileSource(path))
    return {name: reader.load(name) for name in reader.names}


def same(a: Mapping[str, SparseTensor], b: Mapping[str, SparseTensor]) -> bool:
    """Whether two adapters have the same tensors, supports and bits."""
    return list(a) == list(b) and all(
        torch.equal(a[n].indices, b[n].indices) and torch.equal(a[n].values, b[n].values) for n in a
    )
