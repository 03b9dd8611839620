"""Reads an adapter file tensor by tensor; whatever its bytes are, the answer is what they say or ``AdapterError``.

The format is described in `workers.adapters.writer`; versions 1 and 2 are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from infra.errors import AdapterError, TensorFileError
from workers.adapters.format import (
    KINDS,
    READABLE_VERSIONS,
    AdapterMeta,
    LowRank,
    lift_problem,
    scale_problem,
)
from workers.adapters.support import MAX_NUMEL, Block, SparseTensor, decode_blocks, decode_support
from workers.adapters.table import ENCODINGS, STORED, LowRankRow, Row, SparseRow, Table
from workers.tensors.header import DTYPE_NAMES, Piece, json_object, read_header
from workers.tensors.source import ByteSource

_MAX_GAP = 2**16
_MAX_DIMENSIONS = 8
_VALUES = (torch.bfloat16, torch.float32)


class AdapterReader:
    """Reads an adapter tensor by tensor. ``names`` are the sorted names of the parameters that have a delta,
    ``head_names`` those of a classification head, which is stored whole and belongs to no delta.

    The constructor reads and checks the header (bounds, dtypes, overlaps, sizes against counts); :meth:`load` reads
    one tensor and checks its support. Every violation is an ``AdapterError`` that names the source.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._label = str(source) if type(source).__str__ is not object.__str__ else "adapter"
        try:
            spans, content = self._read_header()
        except TensorFileError as error:
            raise self._bad(str(error)) from None
        self.meta, table, head = self._read_meta(content)
        self._entries = Table({name: self._entry(name, row, spans) for name, row in table.items()})
        self._head = {name: self._head_span(name, row, spans) for name, row in head.items()}
        if twice := sorted(set(table) & set(head)):
            raise self._bad(f"{twice[0]} is both adapted and part of the head")
        used = {f"{name}.head" for name in head}
        for name, entry in self._entries.items():
            if isinstance(entry, LowRankRow):
                used |= {f"{name}.lora_a", f"{name}.lora_b"}
            else:
                used |= {f"{name}.values"} | ({f"{name}.support"} if entry.support else set())
        if extra := sorted(set(spans) - used):
            raise self._bad(f"unexpected tensor {extra[0]!r}")
        self.names: list[str] = self._entries.names
        self.head_names: list[str] = sorted(self._head)

    def shape(self, name: str) -> tuple[int, ...]:
        self._check_name(name)
        return self._entries.shape(name)

    def count(self, name: str) -> int:
        """Number of positions that :meth:`load` returns."""
        self._check_name(name)
        return self._entries.count(name)

    def block(self, name: str) -> Block | None:
        """The block size when the support is stored as a list of blocks."""
        entry = self._get(name)
        return None if isinstance(entry, LowRankRow) else entry.block

    def load(self, name: str) -> SparseTensor:
        """One tensor, values as fp32. A low-rank one comes lifted: on every position, rounded once (12 bytes each)."""
        entry = self._get(name)
        if isinstance(entry, LowRankRow):
            try:
                return self._low_rank(name, entry).lift(name)
            except AdapterError as error:
                raise self._bad(str(error)) from None
        values, support = self._tensors(entry.values, entry.support)
        assert values is not None
        values = values.to(torch.float32)
        # a finite sum has finite terms; an infinite one may have overflowed
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            raise self._bad(f"{name}: a value is not finite")
        try:
            if support is None:
                indices = decode_support("dense", torch.empty(0, dtype=torch.uint8), entry.numel, entry.count)
            elif entry.block is not None:
                indices = decode_blocks(support, entry.shape, entry.block)
            else:
                indices = decode_support(entry.encoding, support, entry.numel, entry.count)
        except AdapterError as error:
            raise self._bad(f"{name}: {error}") from None
        return SparseTensor(entry.shape, indices, values)

    def low_rank(self, name: str) -> LowRank | None:
        """The factors (fp32) of a low-rank tensor, None for a sparse one."""
        entry = self._get(name)
        return self._low_rank(name, entry) if isinstance(entry, LowRankRow) else None

    def load_head(self, name: str) -> Tensor:
        """One whole tensor of the head, fp32."""
        if name not in self._head:
            raise self._bad(f"holds no head tensor {name!r}")
        span = self._head[name]
        tensor = self._tensor(span, self._read(span.start, span.length), span.start)
        if not bool(torch.isfinite(tensor).all()):
            raise self._bad(f"{name}: a value is not finite")
        return tensor

    def _low_rank(self, name: str, entry: LowRankRow) -> LowRank:
        a, b = self._tensors(entry.a, entry.b)
        assert a is not None
        assert b is not None
        low_rank = LowRank(a.to(torch.float32), b.to(torch.float32), entry.scale)
        try:
            low_rank.check(name)
        except AdapterError as error:
            raise self._bad(str(error)) from None
        return low_rank

    def _get(self, name: str) -> Row:
        self._check_name(name)
        return self._entries[name]

    def _check_name(self, name: str) -> None:
        if name not in self._entries:
            raise self._bad(f"holds no tensor {name!r}")

    def _bad(self, what: str) -> AdapterError:
        return AdapterError(f"{self._label}: {what}; not a valid adapter file, or damaged: make the expert again")

    def _read(self, offset: int, length: int) -> bytes:
        data = self._source.read(offset, length) if length else b""
        if len(data) != length:
            raise self._bad(f"{len(data)} bytes at offset {offset}, expected {length}")
        return data

    def _tensors(self, *spans: Piece | None) -> list[Tensor | None]:
        """The spans' tensors, in one read where they lie close together."""
        some = [span for span in spans if span is not None]
        begin, end = min(span.start for span in some), max(span.end for span in some)
        if end - begin <= sum(span.length for span in some) + _MAX_GAP:
            chunk = self._read(begin, end - begin)
            return [None if span is None else self._tensor(span, chunk, begin) for span in spans]
        return [
            None if span is None else self._tensor(span, self._read(span.start, span.length), span.start)
            for span in spans
        ]

    @staticmethod
    def _tensor(span: Piece, chunk: bytes, origin: int) -> Tensor:
        if not span.length:
            return torch.empty(span.shape, dtype=span.dtype)
        raw = bytearray(memoryview(chunk)[span.start - origin : span.end - origin])
        return torch.frombuffer(raw, dtype=span.dtype).view(span.shape)

    def _read_header(self) -> tuple[dict[str, Piece], dict[str, Any]]:
        """The pieces, and the one metadata entry. Raises TensorFileError."""
        header = read_header(self._source.read, self._source.size)
        if "adapter" not in header.metadata:
            raise TensorFileError("no adapter metadata")
        for name, piece in header.pieces.items():
            if piece.dtype not in STORED:
                raise TensorFileError(f"{name}: {DTYPE_NAMES[piece.dtype]} is no type of an adapter's tensors")
        return header.pieces, json_object(header.metadata["adapter"], "adapter metadata")

    def _read_meta(self, content: Mapping[str, Any]) -> tuple[AdapterMeta, dict[str, Any], dict[str, Any]]:
        version, base, kind = content.get("format_version"), content.get("base_sha256"), content.get("kind")
        if type(version) is not int or version not in READABLE_VERSIONS:
            read = " and ".join(map(str, READABLE_VERSIONS))
            raise self._bad(f"format version {version!r}, this program reads {read}")
        info, table = content.get("info"), content.get("tensors")
        head = content.get("head") if version > 1 else {}
        if not (isinstance(base, str) and isinstance(kind, str) and isinstance(info, dict)):
            raise self._bad("metadata fields have the wrong types")
        if not isinstance(table, dict) or not isinstance(head, dict) or (version > 1 and kind not in KINDS):
            raise self._bad("kind or tables of contents are not valid")
        return AdapterMeta(base_sha256=base, kind=kind, info=info, format_version=version), table, head

    def _entry(self, name: str, row: Any, spans: Mapping[str, Piece]) -> Row:
        if not isinstance(row, dict) or not _is_shape(row.get("shape")) or not row["shape"]:
            raise self._bad(f"{name}: wrong shape")
        if math.prod(row["shape"]) > MAX_NUMEL:
            raise self._bad(f"{name}: shape {row['shape']} has more than {MAX_NUMEL} elements")
        if self.meta.format_version > 1 and row.get("encoding") == "lora":
            return self._low_rank_entry(name, row, spans)
        return self._sparse_entry(name, row, spans)

    def _sparse_entry(self, name: str, row: Mapping[str, Any], spans: Mapping[str, Piece]) -> SparseRow:
        count, encoding, raw_block = row.get("count"), row.get("encoding"), row.get("block")
        values, support = spans.get(f"{name}.values"), spans.get(f"{name}.support")
        if type(count) is not int or encoding not in ENCODINGS:
            raise self._bad(f"{name}: wrong count or encoding")
        if not 0 <= count <= math.prod(row["shape"]):
            raise self._bad(f"{name}: {count} positions in a tensor of shape {row['shape']}")
        if values is None or values.dtype not in _VALUES or values.shape != (count,):
            raise self._bad(f"{name}: its values do not match its count of {count}")
        if support is not None and len(support.shape) != 1:
            raise self._bad(f"{name}: support must have one dimension")
        block: Block | None = None
        if encoding == "blocks":
            if not _is_shape(raw_block) or len(raw_block) != 2 or len(row["shape"]) != 2 or min(raw_block) < 1:
                raise self._bad(f"{name}: wrong block size")
            block = (raw_block[0], raw_block[1])
            if support is None or support.dtype != torch.int32 or support.length // 4 * block[0] * block[1] != count:
                raise self._bad(f"{name}: its block list does not match its count of {count}")
        elif raw_block is not None or (support is None) != (encoding == "dense"):
            raise self._bad(f"{name}: encoding {encoding} does not match its tensors")
        elif support is not None and support.dtype != torch.uint8:
            raise self._bad(f"{name}: support must be U8, is {DTYPE_NAMES[support.dtype]}")
        return SparseRow(tuple(row["shape"]), count, encoding, block, support, values)

    def _low_rank_entry(self, name: str, row: Mapping[str, Any], spans: Mapping[str, Piece]) -> LowRankRow:
        shape, rank, scale = row["shape"], row.get("rank"), row.get("scale")
        if len(shape) != 2 or type(rank) is not int or rank < 1 or min(shape) < 1:
            raise self._bad(f"{name}: wrong shape or rank of a low-rank tensor")
        if problem := scale_problem(scale) or lift_problem(shape):
            raise self._bad(f"{name}: {problem}")
        a, b = spans.get(f"{name}.lora_a"), spans.get(f"{name}.lora_b")
        for factor, wanted in ((a, (rank, shape[1])), (b, (shape[0], rank))):
            if factor is None or factor.dtype not in _VALUES or factor.shape != wanted:
                raise self._bad(f"{name}: its factors do not match its shape {shape} and rank {rank}")
        assert a is not None
        assert b is not None
        return LowRankRow(tuple(shape), float(scale), a, b)  # type: ignore[arg-type]

    def _head_span(self, name: str, row: Any, spans: Mapping[str, Piece]) -> Piece:
        shape = row.get("shape") if isinstance(row, dict) else None
        span = spans.get(f"{name}.head")
        if not _is_shape(shape) or span is None or span.dtype != torch.float32 or span.shape != tuple(shape):
            raise self._bad(f"{name}: the head's tensor does not match its shape")
        return span


def _is_shape(value: Any) -> TypeGuard[list[int]]:
    """Sides (integers, no booleans) of a tensor of few dimensions, each no larger than a whole tensor may be."""
    sides = isinstance(value, list) and len(value) <= _MAX_DIMENSIONS
    return sides and all(type(side) is int and 0 <= side <= MAX_NUMEL for side in value)


def check_base(reader: AdapterReader, base_sha256: str) -> None:
    """Raise ``AdapterError`` unless the adapter was made for the base with this identity."""
    if reader.meta.base_sha256 != base_sha256:
        raise AdapterError(
            f"adapter made for base {reader.meta.base_sha256[:12]}…, this is {base_sha256[:12]}…: "
            "load the base it was made for, or train the expert again on this one"
        )
