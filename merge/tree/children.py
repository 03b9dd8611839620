"""The inputs of a node, opened and checked: experts that are lifted as they are read, and the nodes below.

Only headers are read until a tensor is asked for. Everything that does not fit together is refused here, before any
tensor is read.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

from infra.errors import AdapterError, MergeError
from merge.files.delta import DeltaReader
from merge.files.node import StatisticsReader
from merge.methods.lift import LiftInput, lift
from merge.methods.once import Once
from merge.methods.specs import LiftSpec
from merge.methods.statistic_table import count_dtype
from merge.methods.statistics import Accumulator, TensorStatistics, statistic_dtype
from merge.tree.prefetch import Load, prefetch
from workers.adapters.support import SparseTensor
from workers.measuring.catalogue import MEASUREMENTS
from workers.measuring.measurement import Measured
from workers.tensors.source import ByteSource


@dataclass(frozen=True)
class ExpertChild:
    """An expert as a node's child. `measured`: the file of its measurement, for reductions that read one."""

    name: str
    reader: DeltaReader
    measured: ByteSource | None = None


@dataclass(frozen=True)
class NodeChild:
    """A node below as a node's child: its statistics, in one file or several with some of the tensors each.

    `experts`: their names in this merge, in the order joined (default: those in the file, which may have been made
    when the same experts had other names).
    """

    label: str
    sources: tuple[ByteSource, ...]
    experts: tuple[str, ...] | None = None


Child = ExpertChild | NodeChild


@dataclass(frozen=True)
class Earlier:
    """An earlier round's δ of one tensor, if the reduction reads one that has it; read, and what is made of it found,
    by whoever asks first."""

    reader: DeltaReader | None
    what: str
    name: str
    once: Once = field(default_factory=Once)

    def __call__(self) -> SparseTensor | None:
        return self.once("reference", self._load)

    def _load(self) -> SparseTensor | None:
        if self.reader is None or not _has(self.reader.names, self.name):
            return None
        try:
            return self.reader.load(self.name)
        except AdapterError as error:
            raise MergeError(f"{self.what}, tensor {self.name}: {error}") from error


class _Expert:
    """An opened expert."""

    def __init__(self, child: ExpertChild, spec: LiftSpec) -> None:
        self.what = f"expert {child.name!r}"
        self.experts = (child.name,)
        self.names = child.reader.names
        self.base_sha256 = child.reader.base_sha256
        self.shape, self.count = child.reader.shape, child.reader.count
        self._reader, self._spec = child.reader, spec
        self._weight = spec.weight_of(child.name)
        self._measured = self._open(child, spec.measurement) if spec.measurement else None

    def _open(self, child: ExpertChild, kind: str) -> Measured:
        """The file of the expert's measurement. Raises MergeError where it is missing or another expert's."""
        if child.measured is None:
            raise MergeError(f"{self.what} has no {kind} file, which this reduction reads")
        try:
            found = MEASUREMENTS[kind].open(child.measured)
        except AdapterError as error:
            raise AdapterError(f"{self.what}: {error}") from error
        where = f"the {kind} file of {self.what}"
        if found.meta.base_sha256 != self.base_sha256:
            raise MergeError(f"{where} is for base {found.meta.base_sha256[:12]}…, not {self.base_sha256[:12]}…")
        for name in self.names:
            if wrong := found.misfit(name, self.shape(name), self.count(name)):
                raise MergeError(f"{where}: {wrong}; measure it again")
        return found

    def load(self, name: str, earlier: Earlier) -> TensorStatistics:
        try:
            item = LiftInput(
                tensor=self._reader.load(name),
                name=name,
                identity=self._reader.identity,
                weight=self._weight,
                reference=earlier(),
                measured=self._measured.load(name) if self._measured and _has(self._measured.names, name) else None,
                once=earlier.once,
            )
            return lift(item, self._spec)
        except (AdapterError, MergeError) as error:
            raise type(error)(f"{self.what}, tensor {name}: {error}") from error


class _Node:
    """An opened node."""

    def __init__(self, child: NodeChild, spec: LiftSpec) -> None:
        self.what = f"node {child.label!r}"
        if not child.sources:
            raise MergeError(f"{self.what} has no file")
        files = [StatisticsReader(source, f"the statistics file of {self.what}") for source in child.sources]
        meta = files[0].meta
        meta.check(spec, self.what)
        self._files: dict[str, StatisticsReader] = {}
        for file in files:
            if file.meta != meta:
                raise MergeError(f"the files of {self.what} are not parts of one: their metadata differ")
            for name in file.names:
                if name in self._files:
                    raise MergeError(f"the files of {self.what} are not parts of one: two hold {name}")
                self._files[name] = file
        self.names = sorted(self._files)
        self.base_sha256 = meta.base_sha256
        self.experts = meta.experts
        if child.experts is not None:
            if len(child.experts) != len(meta.experts):
                raise MergeError(f"{self.what} joins {len(meta.experts)} experts, expected {len(child.experts)}")
            self.experts = child.experts

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def count(self, name: str) -> int:
        return self._files[name].count(name)

    def load(self, name: str, earlier: Earlier) -> TensorStatistics:
        try:
            return self._files[name].load(name)
        except AdapterError as error:
            raise MergeError(f"{self.what}, tensor {name}: {error}") from error


@dataclass(frozen=True)
class JoinedTensor:
    """One tensor's joined statistics, the earlier round's δ of it, if the reduction reads one that has it, and what its
    lifts made of that."""

    name: str
    statistics: TensorStatistics
    reference: SparseTensor | None
    once: Once


@dataclass(frozen=True)
class Join:
    """Opened children that fit together: one base, one shape per tensor, no expert twice.

    `experts` in the order joined; `shapes` of all tensors by sorted name, which are `names`.
    """

    spec: LiftSpec
    base_sha256: str
    experts: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    names: Sequence[str]
    _children: tuple[_Expert | _Node, ...]
    _reference: DeltaReader | None

    @staticmethod
    def open(
        children: Sequence[Child],
        spec: LiftSpec,
        base_sha256: str | None = None,
        reference: DeltaReader | None = None,
    ) -> Join:
        """Reads headers only. Raises MergeError naming the two inputs that do not fit, AdapterError for a bad file."""
        if not children:
            raise MergeError("a merge node needs at least one child")
        opened = tuple(_Expert(c, spec) if isinstance(c, ExpertChild) else _Node(c, spec) for c in children)
        expected = base_sha256 or opened[0].base_sha256
        other = "the base of this merge is" if base_sha256 else f"{opened[0].what} for"
        shapes: dict[str, tuple[int, ...]] = {}
        owner: dict[str, str] = {}
        seen: dict[str, str] = {}
        for child in opened:
            _check_base(child.what, child.base_sha256, expected, other)
            for expert in child.experts:
                if expert in seen:
                    raise MergeError(f"expert {expert!r} is merged twice: by {seen[expert]} and {child.what}")
                seen[expert] = child.what
            for name in child.names:
                _check_shape(name, child.shape(name), child.what, shapes, owner)
        if (reference is None) != (spec.reference is None):
            raise MergeError(
                f"the reduction {spec} reads the merge {spec.reference}: "
                f"{'none was' if reference is None else 'another was'} given"
            )
        if reference is not None:
            what = f"the merge {spec.reference}"
            _check_base(what, reference.base_sha256, expected, other)
            for name in reference.names:
                if name in shapes:
                    _check_shape(name, reference.shape(name), what, shapes, owner)
        count_dtype(len(seen))
        shapes = dict(sorted(shapes.items()))
        return Join(spec, expected, tuple(seen), shapes, list(shapes), opened, reference)

    def tensors(self) -> Generator[JoinedTensor]:
        """Each tensor, by name. In memory are the joined statistics, the child's that is being added and
        those that threads read ahead."""
        holders = {name: [c for c in self._children if _has(c.names, name)] for name in self.names}
        references: deque[Earlier] = deque()
        spec = self.spec
        with closing(prefetch(self._loads(holders, references))) as loaded:
            for name, having in holders.items():
                entries = sum(child.count(name) for child in having)
                total = Accumulator(self.shapes[name], spec.statistics, len(self.experts), entries, spec.weighted)
                for _ in having:
                    total.add(next(loaded))
                earlier = references.popleft()
                joined = JoinedTensor(name, total.result(), earlier(), earlier.once)
                del total, earlier
                yield joined
                del joined

    def _loads(
        self,
        holders: Mapping[str, Sequence[_Expert | _Node]],
        references: deque[Earlier],
    ) -> Iterator[Load[TensorStatistics]]:
        experts, weighted = len(self.experts), self.spec.weighted
        width = 8 + sum(statistic_dtype(n, experts, weighted).itemsize for n in self.spec.statistics)
        for name, having in holders.items():
            earlier = Earlier(self._reference, f"the merge {self.spec.reference}", name)
            references.append(earlier)
            shape = self.shapes[name]
            for child in having:
                matrices = self.spec.matrix_bytes(name, shape, len(child.experts))
                yield Load(partial(child.load, name, earlier), child.count(name) * width + matrices)

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(self.shapes[name]) for name in self.names)


def _has(names: Sequence[str], name: str) -> bool:
    """Whether sorted names hold this one: a set for each of a thousand experts would be larger than their tables."""
    at = bisect_left(names, name)
    return at < len(names) and names[at] == name


def _check_base(what: str, found: str, expected: str, other: str) -> None:
    if found != expected:
        raise MergeError(
            f"experts of different bases cannot be merged: {what} was made for base {found[:12]}…, "
            f"{other} {expected[:12]}…"
        )


def _check_shape(
    name: str, shape: Sequence[int], what: str, shapes: dict[str, tuple[int, ...]], owner: dict[str, str]
) -> None:
    if shapes.setdefault(name, tuple(shape)) != tuple(shape):
        raise MergeError(f"tensor {name} has shape {list(shape)} in {what}, {list(shapes[name])} in {owner[name]}")
    owner.setdefault(name, what)
