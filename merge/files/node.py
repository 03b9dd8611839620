"""The statistics file of a node: what one combine leaves for its parent.

A safetensors file. Per tensor `t` the pieces `t#support` (encoded as in `workers.adapters.support`, whichever encoding
is smallest) and `t#<statistic>`, side by side so that one ranged read fetches a tensor. A statistic with a carrier (see
`merge.methods.statistics.Statistic`) is stored only where its carrier is not zero, which halves the masses of a node
that joins few experts (where it is not zero elsewhere, which weights that vanish in fp32 could bring about, it is
stored whole); a zero count that is zero everywhere is left out. Counts are 8 bits up to 255 experts and 16 bits above,
sums of weights fp32. A matrix statistic is stored with its own shape.

The metadata name the reduction, the earlier merge that it reads, the base and the experts, and the shape, size and
encoding of each tensor. Files are written and read tensor by tensor; the same statistics give the same bytes. A node
can be several files, each with some of its tensors. Whatever is read is checked: a corrupted or hostile file raises
MergeError (AdapterError for a support), never an index out of range.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.methods.specs import LiftSpec
from merge.methods.statistic_table import MAX_EXPERTS, STATISTICS
from merge.methods.statistics import TensorStatistics, statistic_dtype
from workers.adapters.support import MAX_NUMEL, decode_support, encode_support
from workers.tensors.header import header_room
from workers.tensors.reader import TensorReader, damaged
from workers.tensors.source import ByteSource
from workers.tensors.writer import TensorWriter

NODE_FILE_VERSION = 2
"""Part of the key of every node: raise it when the same statistics are stored in another way."""

NODE_FORMAT = "expert-statistics"

_RARE = "zero_count"
"""Left out where it is zero everywhere, which it nearly always is."""


@dataclass(frozen=True)
class NodeMeta:
    """What a node's file says about itself.

    `lift` is the reduction's `recipe`, `reference` that of the candidate it reads (None: it reads none); `experts` are
    in the order in which they were combined.
    """

    lift: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    base_sha256: str
    experts: tuple[str, ...]

    @staticmethod
    def of(spec: LiftSpec, base_sha256: str, experts: Sequence[str]) -> NodeMeta:
        """That of a node of this reduction."""
        return NodeMeta(spec.recipe(), _reference(spec), base_sha256, tuple(experts))

    def check(self, spec: LiftSpec, what: str) -> None:
        """Raise MergeError, naming `what`, unless it is of this reduction."""
        mine, asked = (self.lift, self.reference), (spec.recipe(), _reference(spec))
        if mine != asked:
            raise MergeError(f"{what} holds the reduction {_text(mine)}, this one is {_text(asked)}")


def _reference(spec: LiftSpec) -> dict[str, Any] | None:
    return spec.reference.recipe() if spec.reference else None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


class StatisticsWriter:
    """Writes a node's file tensor by tensor; nothing exists at `path` before `close`. A context manager."""

    def __init__(self, path: Path, meta: NodeMeta, shapes: Mapping[str, Sequence[int]]) -> None:
        """`shapes` holds every tensor that will be written: it bounds the header."""
        self._meta = meta
        self._table: dict[str, list[Any]] = {}
        worst = {n: [list(s), math.prod(s), "x" * 16, MAX_EXPERTS] for n, s in shapes.items()}
        pieces = [f"{name}#{part}" for name in shapes for part in ("support", *meta.lift["statistics"])]
        self._out = TensorWriter(path, header_room(pieces, self._metadata(worst)))

    def _metadata(self, table: Mapping[str, list[Any]]) -> dict[str, str]:
        return {
            "format": NODE_FORMAT,
            "version": str(NODE_FILE_VERSION),
            "lift": _text(self._meta.lift),
            "reference": _text(self._meta.reference),
            "base_sha256": self._meta.base_sha256,
            "experts": _text(list(self._meta.experts)),
            "tensors": _text(table),
        }

    def add(self, name: str, statistics: TensorStatistics) -> None:
        """Append one tensor's statistics, which must be those of the node's reduction."""
        if set(statistics.arrays) != set(self._meta.lift["statistics"]):
            raise MergeError(f"{name}: statistics {sorted(statistics.arrays)} are not those of the node's reduction")
        if statistics.weighted != self._meta.lift["weighted"]:
            raise MergeError(f"{name}: weighted and unweighted statistics do not go into one file")
        count = statistics.indices.numel()
        encoding, data = "dense", torch.empty(0, dtype=torch.uint8)
        if count != statistics.numel:
            encoding, data = encode_support(statistics.indices, statistics.numel)
        whole = [part for part in statistics.arrays if part != _RARE and _is_whole(part, statistics.arrays)]
        for part in sorted(statistics.arrays):
            stored = _stored(part, statistics.arrays)
            if part != _RARE or not whole or bool(stored.any()):
                dtype = _stored_dtype(part, statistics.experts, statistics.weighted)
                self._out.write(f"{name}#{part}", stored.to(dtype))
        self._out.write(f"{name}#support", data)
        self._table[name] = [list(statistics.shape), count, encoding, statistics.experts]

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._out.close(self._metadata(self._table))

    def __enter__(self) -> StatisticsWriter:
        self._out.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._out.__exit__(*error)


class StatisticsReader:
    """Reads a node's file: the header once, then one ranged read a tensor."""

    def __init__(self, source: ByteSource, what: str = "statistics file") -> None:
        """`what` names the file in errors. Raises MergeError for anything but a node's file of this version."""
        self._file = TensorReader(source, damaged(what))
        metadata = self._file.metadata
        if metadata.get("format") != NODE_FORMAT:
            raise self._file.bad(f"its format is {metadata.get('format')!r}, expected {NODE_FORMAT!r}")
        if metadata.get("version") != str(NODE_FILE_VERSION):
            raise self._file.bad(f"its version is {metadata.get('version')!r}, expected {NODE_FILE_VERSION}")
        try:
            lift, experts = json.loads(metadata["lift"]), json.loads(metadata["experts"])
            reference = json.loads(metadata["reference"])
            table, base = json.loads(metadata["tensors"]), metadata["base_sha256"]
        except (KeyError, ValueError, RecursionError):
            raise self._file.bad("its metadata are incomplete or no JSON") from None
        if not isinstance(experts, list) or not experts or not all(isinstance(n, str) for n in experts):
            raise self._file.bad("its experts are not a list of names")
        if not isinstance(table, dict) or not isinstance(reference, dict | None):
            raise self._file.bad("its metadata are malformed")
        spec = LiftSpec.from_recipe(lift)
        self._statistics, self._weighted, self._options = spec.statistics, spec.weighted, dict(spec.options)
        self.meta = NodeMeta(lift, reference, base, tuple(experts))
        self._table = {name: self._entry(name, entry) for name, entry in table.items()}

    def _entry(self, name: str, entry: Any) -> tuple[tuple[int, ...], int, str, int]:
        if not isinstance(entry, list) or len(entry) != 4 or not isinstance(entry[0], list):
            raise self._file.bad(f"tensor {name[:100]!r} is malformed")
        shape, count, encoding, experts = entry
        if not all(type(n) is int and n >= 0 for n in [*shape, count, experts]) or not isinstance(encoding, str):
            raise self._file.bad(f"tensor {name[:100]!r} has malformed sizes")
        if not count <= math.prod(shape) <= MAX_NUMEL or not 1 <= experts <= len(self.meta.experts):
            raise self._file.bad(f"tensor {name[:100]!r} has {count} positions of {experts} experts, more than can be")
        stored = {part: self._file.pieces.get(f"{name}#{part}") for part in self._statistics}
        # an array of that size bounds what a claimed count can make the reader allocate
        whole = any(p and p.shape == (count,) for part, p in stored.items() if STATISTICS[part].kind != "matrix")
        if f"{name}#support" not in self._file.pieces or not whole:
            raise self._file.bad(f"tensor {name[:100]!r} lacks its support, or an array for its {count} positions")
        return tuple(shape), count, encoding, experts

    @property
    def names(self) -> list[str]:
        """The tensors, sorted."""
        return sorted(self._table)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._table[name][0]

    def count(self, name: str) -> int:
        """Positions in a tensor's support."""
        return self._table[name][1]

    def load(self, name: str) -> TensorStatistics:
        """One tensor's statistics."""
        shape, count, encoding, experts = self._table[name]
        present = [p for p in self._statistics if f"{name}#{p}" in self._file.pieces]
        raw = self._file.read_many([f"{name}#{part}" for part in ("support", *present)])
        support = raw[f"{name}#support"]
        if support.dtype != torch.uint8 or support.dim() != 1:
            raise self._file.bad(f"support of {name[:100]!r} is {support.dtype}")
        indices = decode_support(encoding, support, math.prod(shape), count)
        arrays: dict[str, Tensor] = {}
        # counts first: they say where the masses are
        for part in sorted(self._statistics, key=lambda n: (STATISTICS[n].kind != "count", n)):
            arrays[part] = self._array(name, part, raw.get(f"{name}#{part}"), arrays, count, experts)
            statistic = STATISTICS[part]
            if statistic.extent and not _fits(
                arrays[part].shape, statistic.extent(name, shape, self._options, experts), statistic.operator == "below"
            ):
                raise self._file.bad(f"{part} of {name[:100]!r} has shape {list(arrays[part].shape)}")
        return TensorStatistics(shape, indices, arrays, experts, self._weighted)

    def _array(
        self, name: str, part: str, stored: Tensor | None, arrays: Mapping[str, Tensor], count: int, experts: int
    ) -> Tensor:
        dtype = statistic_dtype(part, experts, self._weighted)
        where = f"{part} of {name[:100]!r}"
        matrix = STATISTICS[part].kind == "matrix"
        if stored is None:
            if part != _RARE:
                raise self._file.bad(f"{where} is missing")
            return torch.zeros(count, dtype=dtype)
        expected = _stored_dtype(part, experts, self._weighted)
        if stored.dtype != expected or (stored.dim() != 1 and not matrix):
            raise self._file.bad(f"{where} is {stored.dtype} of shape {list(stored.shape)}")
        stored = stored.to(dtype)
        if expected == torch.float32:
            if not bool(torch.isfinite(stored.sum())) and not bool(torch.isfinite(stored).all()):
                raise self._file.bad(f"{where} holds NaN or infinity")
        elif stored.numel() and int(stored.max()) > experts:
            raise self._file.bad(f"{where} counts more than {experts} experts")
        if matrix or stored.numel() == count:
            return stored
        carrier = STATISTICS[part].carrier
        if carrier is None or carrier not in arrays:
            raise self._file.bad(f"{where} has {stored.numel()} values for {count} positions")
        at = arrays[carrier].nonzero().view(-1)
        if at.numel() != stored.numel():
            raise self._file.bad(f"{where} has {stored.numel()} values for {at.numel()} positions")
        return torch.zeros(count, dtype=dtype).index_copy_(0, at, stored)


def _fits(found: Sequence[int], extent: tuple[int, ...], fewer: bool) -> bool:
    """Whether a matrix statistic can have this shape, or `fewer` rows; [0] is none."""
    if fewer and len(found) == len(extent) and found[0] <= extent[0]:
        extent = (found[0], *extent[1:])
    return tuple(found) in ((0,), extent)


def _is_whole(part: str, arrays: Mapping[str, Tensor]) -> bool:
    """Whether a statistic is surely stored at every position of the support."""
    statistic = STATISTICS[part]
    return statistic.kind != "matrix" and (statistic.carrier is None or statistic.carrier not in arrays)


def _stored(part: str, arrays: Mapping[str, Tensor]) -> Tensor:
    array, carrier = arrays[part], STATISTICS[part].carrier
    if carrier is None or carrier not in arrays:
        return array
    carried = arrays[carrier] != 0
    compact = array[carried]
    return array if int(torch.count_nonzero(compact)) != int(torch.count_nonzero(array)) else compact


def _stored_dtype(part: str, experts: int, weighted: bool) -> torch.dtype:
    if statistic_dtype(part, experts, weighted) == torch.float32:
        return torch.float32
    return torch.uint8 if experts <= 255 else torch.uint16
