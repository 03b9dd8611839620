"""The adapter file: supports and values of a sparse expert in one safetensors file.

Two tensors for each adapted weight, ``<name>.support`` (uint8, or int32 block ids; absent when every position is kept)
and ``<name>.values`` (bf16 or fp32, in flat order), and one metadata entry ``adapter`` with everything else as
canonical JSON (one entry, because safetensors writes several in no fixed order). Equal content gives equal bytes.
Reading needs the header once and then one ranged read per tensor, from a file or an object store. A file is
treated as hostile: it reads as what it says, or ``AdapterError``; never a crash, never a large allocation on a false
claim. Does not cover how a file is named, stored or registered.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from safetensors.torch import save_file

from infra.errors import AdapterError
from workers.support import MAX_NUMEL, Block, SparseTensor, decode_blocks, decode_support, encode_support, find_blocks

FORMAT_VERSION = 1
MAX_HEADER = 64 * 2**20
_ITEM = {"U8": 1, "I32": 4, "BF16": 2, "F32": 4}
_DTYPE = {"U8": torch.uint8, "I32": torch.int32, "BF16": torch.bfloat16, "F32": torch.float32}


class ByteSource(Protocol):
    """Random access to the bytes of one file or object."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


class FileSource:
    """A :class:`ByteSource` over a local file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.size = self.path.stat().st_size
        except OSError as error:
            raise AdapterError(f"{self.path}: cannot read the adapter file: {error.strerror}") from error

    def read(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as handle:
            handle.seek(offset)
            return handle.read(length)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class AdapterMeta:
    """What the tensors are: ``base_sha256`` names the base that the values are added to, ``info`` is free JSON."""

    base_sha256: str
    kind: str = "sparse"
    info: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def save_adapter(
    path: str | os.PathLike[str],
    tensors: Mapping[str, SparseTensor],
    meta: AdapterMeta,
    value_dtype: torch.dtype = torch.bfloat16,
    block: Block | None = None,
) -> None:
    """Write ``tensors`` (parameter name to delta) to ``path``, deterministic bytes.

    ``value_dtype`` is bf16 or fp32 (values are rounded to it). With ``block`` every support must be a union of whole
    aligned blocks. Raises ``AdapterError`` for invalid supports, values that are not finite, or ``info`` that is not
    JSON.
    """
    if value_dtype not in (torch.bfloat16, torch.float32):
        raise AdapterError(f"adapter values are stored as bfloat16 or float32, not {value_dtype}")
    data: dict[str, torch.Tensor] = {}
    table: dict[str, dict[str, Any]] = {}
    for name in sorted(tensors):
        tensor = SparseTensor(tensors[name].shape, tensors[name].indices.cpu(), tensors[name].values.detach().cpu())
        tensor.check(name)
        values = tensor.values.to(value_dtype).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise AdapterError(f"{name}: a value is not finite in {value_dtype}; the expert has diverged")
        encoding, support = encode_support(tensor.indices, tensor.numel)
        entry: dict[str, Any] = {"shape": list(tensor.shape), "count": tensor.indices.numel()}
        if block is not None:
            ids = find_blocks(tensor.indices, tensor.shape, block, name)
            if ids.numel() * 4 < support.numel():
                encoding, support = "blocks", ids.to(torch.int32)
                entry["block"] = list(block)
        entry["encoding"] = encoding
        table[name] = entry
        if encoding != "dense":
            data[f"{name}.support"] = support
        data[f"{name}.values"] = values
    head = {
        "format_version": meta.format_version,
        "base_sha256": meta.base_sha256,
        "kind": meta.kind,
        "info": meta.info,
        "tensors": table,
    }
    try:
        text = json.dumps(head, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"adapter info cannot be written as JSON: {error}") from None
    save_file(data, os.fspath(path), metadata={"adapter": text})


@dataclass(frozen=True)
class _Span:
    dtype: str
    begin: int
    length: int


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    count: int
    encoding: str
    block: Block | None
    support: _Span | None
    values: _Span

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class AdapterReader:
    """Reads an adapter tensor by tensor. ``names`` are sorted parameter names.

    The constructor reads and checks the header (bounds, dtypes, overlaps, sizes against counts); :meth:`load` makes one
    ranged read and checks the support. Every violation is an ``AdapterError`` that names the source.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._label = str(source) if type(source).__str__ is not object.__str__ else "adapter"
        spans, head = self._read_header()
        self.meta, table = self._read_meta(head)
        self._entries = {name: self._entry(name, row, spans) for name, row in table.items()}
        used = {f"{name}.values" for name in table} | {f"{n}.support" for n, e in self._entries.items() if e.support}
        if extra := sorted(set(spans) - used):
            raise self._bad(f"unexpected tensor {extra[0]!r}")
        self.names: list[str] = sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._get(name).shape

    def count(self, name: str) -> int:
        """Number of stored positions."""
        return self._get(name).count

    def block(self, name: str) -> Block | None:
        """The block size when the support is stored as a list of blocks."""
        return self._get(name).block

    def load(self, name: str) -> SparseTensor:
        """One tensor, values as fp32."""
        entry = self._get(name)
        begin, end = entry.values.begin, entry.values.begin + entry.values.length
        if entry.support is not None:
            begin, end = min(begin, entry.support.begin), max(end, entry.support.begin + entry.support.length)
        wanted = entry.values.length + (entry.support.length if entry.support else 0)
        if end - begin <= wanted + 2**16:
            chunk = self._read(begin, end - begin)
            values = self._tensor(entry.values, chunk, begin)
            support = self._tensor(entry.support, chunk, begin) if entry.support else None
        else:
            values = self._tensor(entry.values, self._read(entry.values.begin, entry.values.length), entry.values.begin)
            support = None
            if entry.support:
                support = self._tensor(
                    entry.support, self._read(entry.support.begin, entry.support.length), entry.support.begin
                )
        values = values.to(torch.float32)
        if not bool(torch.isfinite(values).all()):
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

    def _get(self, name: str) -> _Entry:
        if name not in self._entries:
            raise self._bad(f"holds no tensor {name!r}")
        return self._entries[name]

    def _bad(self, what: str) -> AdapterError:
        return AdapterError(f"{self._label}: {what}; not a valid adapter file, or damaged: make the expert again")

    def _read(self, offset: int, length: int) -> bytes:
        data = self._source.read(offset, length) if length else b""
        if len(data) != length:
            raise self._bad(f"{len(data)} bytes at offset {offset}, expected {length}")
        return data

    @staticmethod
    def _tensor(span: _Span, chunk: bytes, origin: int) -> torch.Tensor:
        if not span.length:
            return torch.empty(0, dtype=_DTYPE[span.dtype])
        raw = bytearray(memoryview(chunk)[span.begin - origin : span.begin - origin + span.length])
        return torch.frombuffer(raw, dtype=_DTYPE[span.dtype])

    def _read_header(self) -> tuple[dict[str, _Span], str]:
        size = self._source.size
        if size < 8:
            raise self._bad(f"only {size} bytes")
        (length,) = struct.unpack("<Q", self._read(0, 8))
        if length > min(size - 8, MAX_HEADER):
            raise self._bad(f"header of {length} bytes in a file of {size}")
        header = self._json(self._read(8, length))
        origin = 8 + length
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not isinstance(metadata.get("adapter"), str):
            raise self._bad("no adapter metadata")
        spans = {name: self._span(name, row, origin) for name, row in header.items()}
        cursor = origin
        for span in sorted(spans.values(), key=lambda s: (s.begin, s.length)):
            if span.begin != cursor:
                raise self._bad("tensors overlap or leave gaps")
            cursor += span.length
        if cursor != size:
            raise self._bad(f"{size} bytes where its header describes {cursor}")
        return spans, metadata["adapter"]

    def _json(self, text: str | bytes) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise self._bad("header is not JSON") from None
        if not isinstance(value, dict):
            raise self._bad("header is not a JSON object")
        return value

    def _span(self, name: str, row: Any, origin: int) -> _Span:
        if not isinstance(row, dict) or row.get("dtype") not in list(_ITEM):
            raise self._bad(f"{name}: dtype must be one of {', '.join(_ITEM)}")
        shape, offsets = row.get("shape"), row.get("data_offsets")
        if not _counts(shape) or len(shape) != 1 or not _counts(offsets) or len(offsets) != 2:
            raise self._bad(f"{name}: wrong shape or offsets")
        begin, end = offsets
        if end < begin or origin + end > self._source.size or end - begin != shape[0] * _ITEM[row["dtype"]]:
            raise self._bad(f"{name}: offsets {begin}..{end} do not fit its shape or the file")
        return _Span(row["dtype"], origin + begin, end - begin)

    def _read_meta(self, text: str) -> tuple[AdapterMeta, dict[str, Any]]:
        head = self._json(text)
        version, base, kind = head.get("format_version"), head.get("base_sha256"), head.get("kind")
        info, table = head.get("info"), head.get("tensors")
        if type(version) is not int or version != FORMAT_VERSION:
            raise self._bad(f"format version {version!r}, this program reads {FORMAT_VERSION}")
        if not (isinstance(base, str) and isinstance(kind, str) and isinstance(info, dict) and isinstance(table, dict)):
            raise self._bad("metadata fields have the wrong types")
        return AdapterMeta(base_sha256=base, kind=kind, info=info, format_version=version), table

    def _entry(self, name: str, row: Any, spans: Mapping[str, _Span]) -> _Entry:
        if not isinstance(row, dict) or not _counts(row.get("shape")) or not 1 <= len(row["shape"]) <= 8:
            raise self._bad(f"{name}: wrong shape")
        count, encoding, raw_block = row.get("count"), row.get("encoding"), row.get("block")
        values, support = spans.get(f"{name}.values"), spans.get(f"{name}.support")
        if type(count) is not int or encoding not in ("gap8", "bitmap", "dense", "blocks"):
            raise self._bad(f"{name}: wrong count or encoding")
        if any(side > MAX_NUMEL for side in row["shape"]) or not 0 <= count <= math.prod(row["shape"]) <= MAX_NUMEL:
            raise self._bad(f"{name}: {count} positions in a tensor of shape {row['shape']}")
        if values is None or values.dtype not in ("BF16", "F32") or values.length != count * _ITEM[values.dtype]:
            raise self._bad(f"{name}: its values do not match its count of {count}")
        block: Block | None = None
        if encoding == "blocks":
            if not _counts(raw_block) or len(raw_block) != 2 or len(row["shape"]) != 2 or min(raw_block) < 1:
                raise self._bad(f"{name}: wrong block size")
            block = (raw_block[0], raw_block[1])
            if support is None or support.dtype != "I32" or support.length // 4 * block[0] * block[1] != count:
                raise self._bad(f"{name}: its block list does not match its count of {count}")
        elif raw_block is not None or (support is None) != (encoding == "dense"):
            raise self._bad(f"{name}: encoding {encoding} does not match its tensors")
        elif support is not None and support.dtype != "U8":
            raise self._bad(f"{name}: support must be U8, is {support.dtype}")
        return _Entry(tuple(row["shape"]), count, encoding, block, support, values)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """A list of non-negative integers (not booleans)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def check_base(reader: AdapterReader, base_sha256: str) -> None:
    """Raise ``AdapterError`` unless the adapter was made for the base with this identity."""
    if reader.meta.base_sha256 != base_sha256:
        raise AdapterError(
            f"adapter made for base {reader.meta.base_sha256[:12]}…, this is {base_sha256[:12]}…: "
            "load the base it was made for, or train the expert again on this one"
        )
