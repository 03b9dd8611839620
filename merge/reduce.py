"""What one node of the tree does, from byte sources to local files.

`reduce_node` joins children (experts' adapters, lifted on the fly, or the files of nodes below) into a statistics file.
`reduce_root` does the same for the root, but lowers each tensor for every candidate at once and writes merged adapters
instead of statistics. Both go tensor by tensor over the union of the children's tensors: memory is bounded by the
largest tensor's statistics, not by the number of experts or the size of the model.

Not here: where the bytes come from, keys, scheduling and retries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from infra.errors import AdapterError, MergeError
from merge.adapter_file import AdapterWriter
from merge.methods import LIFT_VERSION, LOWER_VERSION, Candidate, LiftSpec, group_candidates, lift, lower
from merge.node_file import NODE_FILE_VERSION, NodeMeta, StatisticsReader, StatisticsWriter
from merge.statistics import STATISTICS_VERSION, Accumulator, TensorStatistics, count_dtype
from merge.stream_file import RangedReader
from workers.adapter import AdapterReader, ByteSource
from workers.support import encode_support

NODE_VERSIONS = {"lift": LIFT_VERSION, "statistics": STATISTICS_VERSION, "file": NODE_FILE_VERSION}
"""What belongs in the key of a node beside its reduction, base and children."""

ROOT_VERSIONS = {**NODE_VERSIONS, "lower": LOWER_VERSION}
"""What belongs in the key of a merged adapter beside its candidate, base and children."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Child:
    """An input of a node: an expert's adapter or the statistics file of a node below.

    `name` is the expert's name (for a node, its label, used in errors).
    """

    kind: Literal["expert", "node"]
    name: str
    source: ByteSource

    def __post_init__(self) -> None:
        if self.kind not in ("expert", "node"):
            raise MergeError(f"child {self.name!r} of a merge node is {self.kind!r}; accepted: expert, node")


@dataclass(frozen=True)
class NodeInfo:
    """What a node joined: its experts in order, tensors, positions in all supports, and the file's bytes."""

    experts: tuple[str, ...]
    tensors: int
    positions: int
    bytes_written: int


@dataclass(frozen=True)
class MergedInfo:
    """One merged adapter.

    `nonzero` positions where δ is not 0; `norm` is ‖δ‖ over all tensors; `rounding_loss` is
    ‖round_bf16(base + δ) - base - δ‖ / ‖δ‖ over the support (None without a base; 0 for δ = 0).
    """

    candidate: Candidate
    nonzero: int
    norm: float
    rounding_loss: float | None
    bytes_written: int


@dataclass(frozen=True)
class RootInfo:
    """What the root joined and the merged adapters, in the order of the candidates.

    `experts` in the order joined; `positions` in the union support and `density`, its share of the tensors it lies in.
    """

    experts: tuple[str, ...]
    tensors: int
    positions: int
    density: float
    merged: tuple[MergedInfo, ...]


class _Expert:
    """An expert's adapter as a node's child."""

    def __init__(self, child: Child, spec: LiftSpec) -> None:
        try:
            self._reader = AdapterReader(child.source)
        except AdapterError as error:
            raise AdapterError(f"expert {child.name!r}: {error}") from error
        self._spec = spec
        self._name = child.name
        self.what = f"expert {child.name!r}"
        self.experts = (child.name,)
        self.base_sha256 = self._reader.meta.base_sha256
        self.names = list(self._reader.names)
        self.shape = self._reader.shape
        self.count = self._reader.count

    def load(self, name: str) -> TensorStatistics:
        try:
            return lift(self._reader.load(name), self._spec)
        except (AdapterError, MergeError) as error:
            raise type(error)(f"{self.what}, tensor {name}: {error}") from error


class _Node:
    """A node's statistics file as a child."""

    def __init__(self, child: Child, spec: LiftSpec) -> None:
        self.what = f"node {child.name!r}"
        self._reader = StatisticsReader(child.source, f"the statistics file of {self.what}")
        if self._reader.meta.lift != spec:
            raise MergeError(f"{self.what} holds the reduction {self._reader.meta.lift}, this one is {spec}")
        self.experts = self._reader.meta.experts
        self.base_sha256 = self._reader.meta.base_sha256
        self.names = self._reader.names
        self.shape = self._reader.shape
        self.count = self._reader.count

    def load(self, name: str) -> TensorStatistics:
        try:
            return self._reader.load(name)
        except AdapterError as error:
            raise MergeError(f"{self.what}, tensor {name}: {error}") from error


@dataclass(frozen=True)
class _Join:
    """Opened and checked children: one base, one shape per tensor, no expert twice."""

    children: tuple[_Expert | _Node, ...]
    spec: LiftSpec
    base_sha256: str
    experts: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]

    @staticmethod
    def open(children: Sequence[Child], spec: LiftSpec, base_sha256: str | None) -> _Join:
        """Reads headers only. Raises MergeError naming the two inputs that do not fit, AdapterError for a bad file."""
        if not children:
            raise MergeError("a merge node needs at least one child")
        opened = tuple(_Expert(c, spec) if c.kind == "expert" else _Node(c, spec) for c in children)
        first = opened[0]
        expected = base_sha256 or first.base_sha256
        shapes: dict[str, tuple[int, ...]] = {}
        owner: dict[str, str] = {}
        seen: dict[str, str] = {}
        for child in opened:
            if child.base_sha256 != expected:
                other = "the base of this merge is" if base_sha256 else f"{first.what} for"
                raise MergeError(
                    f"experts of different bases cannot be merged: {child.what} was made for base "
                    f"{child.base_sha256[:12]}…, {other} {expected[:12]}…"
                )
            for expert in child.experts:
                if expert in seen:
                    raise MergeError(f"expert {expert!r} is merged twice: by {seen[expert]} and {child.what}")
                seen[expert] = child.what
            for name in child.names:
                shape = tuple(child.shape(name))
                if shapes.setdefault(name, shape) != shape:
                    raise MergeError(
                        f"tensor {name} has shape {list(shape)} in {child.what}, {list(shapes[name])} in {owner[name]}"
                    )
                owner.setdefault(name, child.what)
        experts = tuple(e for child in opened for e in child.experts)
        count_dtype(len(experts))
        return _Join(opened, spec, expected, experts, dict(sorted(shapes.items())))

    def tensors(self) -> Iterator[tuple[str, TensorStatistics]]:
        """Each tensor's joined statistics, by name; one child's tensor is in memory beside the joined one."""
        for name, shape in self.shapes.items():
            holders = [child for child in self.children if name in child.names]
            entries = sum(child.count(name) for child in holders)
            total = Accumulator(shape, self.spec.statistics, len(self.experts), entries)
            for child in holders:
                total.add(child.load(name))
            yield name, total.result()


def reduce_node(
    children: Sequence[Child],
    spec: LiftSpec,
    out: Path,
    base_sha256: str | None = None,
    progress: Progress | None = None,
) -> NodeInfo:
    """Join the children, in their order, into the statistics file `out`.

    `base_sha256` is the base they must be made for (default: the first child's). `progress(done, all)` is called after
    each tensor. Raises MergeError for inputs that do not fit together, AdapterError for corrupted adapters; leaves no
    file behind then.
    """
    join = _Join.open(children, spec, base_sha256)
    positions = 0
    with StatisticsWriter(out, NodeMeta(spec, join.base_sha256, join.experts), join.shapes) as writer:
        for done, (name, statistics) in enumerate(join.tensors(), 1):
            writer.add(name, statistics)
            positions += statistics.indices.numel()
            if progress:
                progress(done, len(join.shapes))
        writer.close()
    return NodeInfo(join.experts, len(join.shapes), positions, Path(out).stat().st_size)


def reduce_root(
    children: Sequence[Child],
    spec: LiftSpec,
    outs: Mapping[Candidate, Path],
    base_sha256: str | None = None,
    base: ByteSource | None = None,
    info: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RootInfo:
    """Join the children and write one merged adapter per candidate to its path (fp32 values on the union support).

    `base` is the base model's safetensors file (bf16, fp16 or fp32), read tensor by tensor for the rounding loss.
    `info` is added to each adapter's own (method, params, experts, versions). Candidates must be those that
    `group_candidates` puts under `spec`. Raises as `reduce_node`, and MergeError for a base that lacks a tensor.
    """
    if not outs:
        raise MergeError("no candidate to lower the merge for")
    for candidate in outs:
        _check_served(candidate, spec)
    join = _Join.open(children, spec, base_sha256)
    weights = RangedReader(base, "the base's safetensors file") if base is not None else None
    tallies = {candidate: _Tally() for candidate in outs}
    positions = 0
    with ExitStack() as stack:
        writers = {}
        for candidate, path in outs.items():
            about = {**(info or {}), **candidate.to_dict(), "experts": list(join.experts), "versions": ROOT_VERSIONS}
            writers[candidate] = stack.enter_context(AdapterWriter(path, join.base_sha256, about, join.shapes))
        for done, (name, statistics) in enumerate(join.tensors(), 1):
            positions += statistics.indices.numel()
            support = encode_support(statistics.indices, statistics.numel)
            at = _base_values(weights, name, statistics) if weights else None
            for candidate, writer in writers.items():
                merged = lower(statistics, len(join.experts), candidate)
                writer.add(name, merged, support)
                tallies[candidate].add(merged.values, at)
            if progress:
                progress(done, len(join.shapes))
        for writer in writers.values():
            writer.close()
    numel = sum(math.prod(shape) for shape in join.shapes.values())
    merged_infos = tuple(
        MergedInfo(
            candidate=candidate,
            nonzero=tally.nonzero,
            norm=math.sqrt(tally.square),
            rounding_loss=tally.loss() if weights else None,
            bytes_written=Path(outs[candidate]).stat().st_size,
        )
        for candidate, tally in tallies.items()
    )
    return RootInfo(join.experts, len(join.shapes), positions, positions / max(1, numel), merged_infos)


def flat_merge(
    adapters: Mapping[str, ByteSource],
    candidate: Candidate,
    out: Path,
    base_sha256: str | None = None,
    base: ByteSource | None = None,
) -> RootInfo:
    """Merge named adapters with one candidate in a single node. Raises as `reduce_root`."""
    (spec,) = group_candidates([candidate])
    children = [Child("expert", name, source) for name, source in sorted(adapters.items())]
    return reduce_root(children, spec, {candidate: out}, base_sha256, base)


@dataclass
class _Tally:
    """Sums over tensors for one candidate, in double precision."""

    square: float = 0.0
    lost: float = 0.0
    nonzero: int = 0

    def add(self, delta: Tensor, base: Tensor | None) -> None:
        self.square += _square(delta)
        self.nonzero += int(torch.count_nonzero(delta))
        if base is not None:
            self.lost += _square((base + delta).bfloat16().float() - base - delta)

    def loss(self) -> float:
        return math.sqrt(self.lost / self.square) if self.square else 0.0


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _base_values(weights: RangedReader, name: str, statistics: TensorStatistics) -> Tensor:
    """The base's fp32 values on the support."""
    piece = weights.pieces.get(name)
    if piece is None or piece.shape != statistics.shape or not piece.dtype.is_floating_point:
        found = "is missing" if piece is None else f"is {piece.dtype} {list(piece.shape)}"
        raise MergeError(f"tensor {name} {found} in the base; the experts' is {list(statistics.shape)}, floating point")
    return weights.read(name).view(-1).index_select(0, statistics.indices).float()


def _check_served(candidate: Candidate, spec: LiftSpec) -> None:
    ((own, _),) = group_candidates([candidate]).items()
    served = set(spec.statistics)
    if "positive_mass" in served:
        served |= {"sum"} | ({"count"} if "zero_count" in served else set())
    missing = {s for s in own.statistics if s not in served}
    if own.density != spec.density or missing:
        raise MergeError(f"{candidate} cannot be lowered from the reduction {spec}: it needs {own}")
