"""What one node of the tree does.

`reduce_node` joins children (experts, lifted on the fly, or the nodes below) into a statistics file. `reduce_root` does
the same for the root, but lowers each tensor for every candidate at once and hands merged δ to sinks instead of storing
statistics. Both go tensor by tensor over the union of the children's tensors: memory is bounded by the largest tensor's
statistics, not by the number of experts or the size of the model. `flat_merge` does all rounds in one process, without
a tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.files.node import NODE_FILE_VERSION, NodeMeta, StatisticsWriter
from merge.files.sink import Outline, Sink, Tee, squared_norm
from merge.methods.catalogue import LOWER_VERSION, lower
from merge.methods.lift import LIFT_VERSION
from merge.methods.lowering import Root
from merge.methods.specs import (
    Candidate,
    LiftSpec,
    check_candidate,
    check_served,
    check_without_model,
    plan_reductions,
)
from merge.methods.statistics import STATISTICS_VERSION
from merge.tree.children import Child, DeltaReader, ExpertChild, Join, NodeChild
from workers.adapters.support import SparseTensor, encode_support
from workers.tensors.reader import TensorReader, damaged
from workers.tensors.source import ByteSource, FileSource

__all__ = [
    "Child",
    "DeltaReader",
    "ExpertChild",
    "MergedInfo",
    "NodeChild",
    "NodeInfo",
    "RootInfo",
    "Sink",
    "flat_merge",
    "reduce_node",
    "reduce_root",
]

NODE_VERSIONS = {"lift": LIFT_VERSION, "statistics": STATISTICS_VERSION, "file": NODE_FILE_VERSION}
"""What belongs in the key of a node beside its reduction, base and children."""

ROOT_VERSIONS = {**NODE_VERSIONS, "lower": LOWER_VERSION}
"""What belongs in the key of a merged adapter beside its candidate, base and children."""

Progress = Callable[[int, int], None]
Fused = Mapping[str, tuple[int, ...]]
"""Tensors that stack several weights (query, key and value): the rows of each."""
NOT_FUSED: Fused = MappingProxyType({})
_CHUNK = 1 << 22


@dataclass(frozen=True)
class NodeInfo:
    """What a node joined: its experts in order, tensors, positions in all supports, and the file's bytes."""

    experts: tuple[str, ...]
    tensors: int
    positions: int
    bytes_written: int


@dataclass(frozen=True)
class MergedInfo:
    """One merged δ.

    `experts` in the order joined; `positions` of its support, in tensors of `elements`; `nonzero` positions where δ is
    not 0; `norm` is ‖δ‖ over all tensors; `rounding_loss` is ‖round_bf16(base + δ) - base - δ‖ / ‖δ‖ over the support
    (None without a base; 0 for δ = 0); `bytes_written` by its sink.
    """

    candidate: Candidate
    experts: tuple[str, ...]
    positions: int
    elements: int
    nonzero: int
    norm: float
    rounding_loss: float | None
    bytes_written: int

    @property
    def density(self) -> float:
        """The support's share of the tensors that it lies in."""
        return self.positions / max(1, self.elements)


@dataclass(frozen=True)
class RootInfo:
    """What the root joined and the merged adapters, in the order of the candidates.

    `experts` in the order joined; `positions` in the union support, of tensors with `elements` in all.
    """

    experts: tuple[str, ...]
    tensors: int
    positions: int
    elements: int
    merged: tuple[MergedInfo, ...]

    @property
    def density(self) -> float:
        """The union support's share of the tensors that it lies in."""
        return self.positions / max(1, self.elements)


def reduce_node(
    children: Sequence[Child],
    spec: LiftSpec,
    out: Path,
    base_sha256: str | None = None,
    reference: DeltaReader | None = None,
) -> NodeInfo:
    """Join the children, in their order, into the statistics file `out`.

    `base_sha256` is the base they must be made for (default: the first child's); `reference` the merged adapter that
    the reduction's lift reads. Raises MergeError for inputs that do not fit together, AdapterError for corrupted
    adapters; leaves no file behind then.
    """
    join = Join.open(children, spec, base_sha256, reference)
    meta = NodeMeta.of(spec, join.base_sha256, join.experts)
    positions = 0
    shapes = {name: join.shapes[name] for name in join.names}
    with StatisticsWriter(out, meta, shapes) as writer, closing(join.tensors()) as tensors:
        for tensor in tensors:
            writer.add(tensor.name, tensor.statistics)
            positions += tensor.statistics.indices.numel()
        writer.close()
    return NodeInfo(join.experts, len(join.names), positions, Path(out).stat().st_size)


def reduce_root(
    children: Sequence[Child],
    spec: LiftSpec,
    sinks: Mapping[Candidate, Sink],
    base_sha256: str | None = None,
    base: ByteSource | None = None,
    reference: DeltaReader | None = None,
    progress: Progress | None = None,
    fused: Fused = NOT_FUSED,
    device: str = "cpu",
) -> RootInfo:
    """Join the children and hand each candidate's merged δ (fp32, on the union support, a part of it, or everywhere) to
    its sink.

    `base` is the base model's safetensors file (bf16, fp16 or fp32), read tensor by tensor for the rounding loss.
    `fused` and `device` are for methods that make a matrix of a weight.
    Candidates must be served by `spec` (see `merge.methods.specs.plan_reductions`). Sinks are opened, finished and,
    once all are, published here; on an error all are aborted. Raises as `reduce_node`, and MergeError for a base that
    lacks a tensor.
    """
    if not sinks:
        raise MergeError("no candidate to lower the merge for")
    join = Join.open(children, spec, base_sha256, reference)
    for candidate in sinks:
        check_served(candidate, spec, len(join.experts))
    weights = TensorReader(base, damaged("the base's safetensors file")) if base is not None else None
    if weights:
        _check_in_base(weights, join)
    tallies = {candidate: DeltaTally() for candidate in sinks}
    positions = 0
    try:
        for candidate, sink in sinks.items():
            about = {**candidate.to_dict(), "experts": list(join.experts), "versions": ROOT_VERSIONS}
            sink.open(Outline(join.base_sha256, join.shapes, about))
        with closing(join.tensors()) as tensors:
            for done, tensor in enumerate(tensors, 1):
                positions += tensor.statistics.indices.numel()
                supports = _Supports(weights.read(tensor.name).view(-1) if weights else None)
                root = Root(
                    tensor.statistics, len(join.experts), tensor.reference, tensor.name,
                    fused.get(tensor.name, ()), device, tensor.once,
                )  # fmt: skip
                for candidate, sink in sinks.items():
                    merged = lower(root, candidate)
                    support, at = supports.of(merged)
                    sink.add(tensor.name, merged, support)
                    tallies[candidate].add(merged.values, at)
                    del merged
                del tensor, supports, root
                if progress:
                    progress(done, len(join.names))
        for sink in sinks.values():
            sink.finish()
        for sink in sinks.values():
            sink.publish()
    except BaseException:
        for sink in sinks.values():
            sink.abort()
        raise
    merged_infos = tuple(
        tally.info(candidate, join.experts, join.elements, sinks[candidate].bytes_written, weights is not None)
        for candidate, tally in tallies.items()
    )
    return RootInfo(join.experts, len(join.names), positions, join.elements, merged_infos)


def flat_merge(
    experts: Sequence[ExpertChild],
    candidates: Sequence[Candidate],
    make_sink: Callable[[Candidate], Sink],
    base_sha256: str | None = None,
    base: ByteSource | None = None,
    scratch: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    fused: Fused = NOT_FUSED,
    device: str = "cpu",
) -> dict[Candidate, MergedInfo]:
    """Merge experts with any candidates, each reduction in a single node; experts are joined by sorted name.

    Candidates that need an earlier round's result get it through an adapter file in `scratch` (an existing folder;
    needed for those only), also where it is not asked for itself. `progress(which reduction, done, all)`. `fused`,
    `device` and errors as for `reduce_root`; MergeError for weights that do not fit the experts, too.
    """
    children = sorted(experts, key=lambda child: child.name)
    for candidate in candidates:
        check_candidate(candidate, [child.name for child in children])
        check_without_model(candidate)
    plan = plan_reductions(candidates, len(children))
    read_later = {reduction.spec.reference for reduction in plan} - {None}
    if read_later and scratch is None:
        raise MergeError("methods of several rounds need a folder for the earlier rounds' results")
    files: dict[Candidate, Path] = {}
    found: dict[Candidate, MergedInfo] = {}
    for number, reduction in enumerate(plan, 1):
        sinks: dict[Candidate, Sink] = {}
        for candidate in reduction.candidates:
            own = [make_sink(candidate)] if candidate in candidates else []
            if candidate in read_later:
                assert scratch is not None
                files[candidate] = scratch / f"round-{reduction.round}-{len(files)}.safetensors"
                own.append(AdapterWriter(files[candidate]))
            sinks[candidate] = own[0] if len(own) == 1 else Tee(own)
        reference = None
        if reduction.spec.reference is not None:
            reference = AdapterDelta(FileSource(files[reduction.spec.reference]), "the earlier round's merge")
        step = f"reduction {number} of {len(plan)}"
        info = reduce_root(
            children,
            reduction.spec,
            sinks,
            base_sha256,
            base,
            reference,
            progress=_named(progress, step) if progress else None,
            fused=fused,
            device=device,
        )
        found.update((each.candidate, each) for each in info.merged)
    return {candidate: found[candidate] for candidate in dict.fromkeys(candidates)}


def _named(progress: Callable[[str, int, int], None], step: str) -> Progress:
    return lambda done, all_of_them: progress(step, done, all_of_them)


class _Supports:
    """Encoded supports and the base's values on them for one tensor; most candidates share one support."""

    def __init__(self, base: Tensor | None) -> None:
        """`base`: the whole tensor, flat, in its own dtype."""
        self._base = base
        self._last: tuple[Tensor, tuple[str, Tensor], Tensor | None] | None = None

    def of(self, merged: SparseTensor) -> tuple[tuple[str, Tensor], Tensor | None]:
        if self._last is None or self._last[0] is not merged.indices:
            full = merged.indices.numel() == merged.numel
            support = ("dense", torch.empty(0, dtype=torch.uint8)) if full else None
            at = self._base
            if at is not None and not full:
                at = at.index_select(0, merged.indices)
            self._last = merged.indices, support or encode_support(merged.indices, merged.numel), at
        return self._last[1:]


@dataclass
class DeltaTally:
    """Sums over the tensors of one merged δ, in double precision."""

    square: float = 0.0
    lost: float = 0.0
    nonzero: int = 0
    positions: int = 0

    def add(self, delta: Tensor, base: Tensor | None) -> None:
        """`delta` fp32 [n] and the base's values there, in any dtype."""
        self.positions += delta.numel()
        self.nonzero += int(torch.count_nonzero(delta))
        for start in range(0, delta.numel(), _CHUNK):
            own = delta[start : start + _CHUNK]
            self.square += squared_norm(own)
            if base is not None:
                at = base[start : start + _CHUNK].float()
                self.lost += squared_norm((at + own).bfloat16().float() - at - own)

    def info(
        self, candidate: Candidate, experts: tuple[str, ...], elements: int, bytes_written: int, with_base: bool
    ) -> MergedInfo:
        """What is known once all tensors of `elements` in all are added; `with_base`: each with the base's values."""
        return MergedInfo(
            candidate=candidate,
            experts=experts,
            positions=self.positions,
            elements=elements,
            nonzero=self.nonzero,
            norm=self.norm,
            rounding_loss=self.rounding_loss if with_base else None,
            bytes_written=bytes_written,
        )

    @property
    def norm(self) -> float:
        """‖δ‖."""
        return math.sqrt(self.square)

    @property
    def rounding_loss(self) -> float:
        """‖round_bf16(base + δ) - base - δ‖ / ‖δ‖; 0 for δ = 0."""
        return math.sqrt(self.lost / self.square) if self.square else 0.0


def _check_in_base(weights: TensorReader, join: Join) -> None:
    for name in join.names:
        piece, shape = weights.pieces.get(name), join.shapes[name]
        if piece is None or piece.shape != shape or not piece.dtype.is_floating_point:
            found = "is missing" if piece is None else f"is {piece.dtype} {list(piece.shape)}"
            raise MergeError(f"tensor {name} {found} in the base; the experts' is {list(shape)}, floating point")
