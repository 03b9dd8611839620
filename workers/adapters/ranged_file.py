"""Safetensors files read by range: the header is checked once, then each request is one ranged read.

What the formats of importance files, task masks, nodes and checkpoints have in common when they are read. Whatever the
bytes are, the answer is what they say or an error. Adapters keep a smaller
table in memory instead (`workers.adapters.reader`).
"""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.errors import FactoryError, MergeError
from workers.adapters.format import ByteSource, FileSource

MAX_HEADER = 100_000_000
"""The safetensors library's own limit on header bytes."""

DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "BF16": (torch.bfloat16, 2),
    "F16": (torch.float16, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "I16": (torch.int16, 2),
    "U16": (torch.uint16, 2),
    "I8": (torch.int8, 1),
    "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1),
}
"""Dtypes that are read and written: safetensors' name -> torch dtype and bytes."""

DTYPE_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
"""The inverse of `DTYPES`."""

_CHUNK = 8 << 20
_BLOCK = 8 << 20


class LocalFile(FileSource):
    """A file whose ranges are read into memory that the reader provides: one copy less for large tensors."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`; returns the bytes read. Raises AdapterError for a file that cannot be read."""
        try:
            with self.path.open("rb", buffering=0) as handle:
                handle.seek(offset)
                done = 0
                while done < len(buffer):
                    got = handle.readinto(buffer[done:])
                    if not got:
                        break
                    done += got
                return done
        except OSError as error:
            raise self._unreadable(error) from error


class ReadAhead:
    """Ranged reads of a remote file in blocks: its tensors are small and are asked for in the order in which they lie.

    A read inside the last block fetched costs nothing; any other fetches a block from its beginning. Holds one block.
    """

    def __init__(self, source: ByteSource, block: int = _BLOCK) -> None:
        self.source, self.size, self._block = source, source.size, block
        self._start, self._held = 0, b""
        self._lock = threading.Lock()  # several threads read the tensors of one file

    def __str__(self) -> str:
        return str(self.source)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises what the source raises."""
        with self._lock:
            at = offset - self._start
            if at < 0 or at + length > len(self._held):
                if length >= self._block:
                    return self.source.read(offset, length)
                self._held = self.source.read(offset, max(length, min(self._block, self.size - offset)))
                self._start, at = offset, 0
            return self._held[at : at + length]


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of a header; `start` and `end` are absolute."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class RangedReader:
    """Reads pieces of a safetensors file by range. Raises MergeError, or what `bad` of a subclass returns, for any file
    that is not one."""

    def __init__(self, source: ByteSource, what: str) -> None:
        self.source = source
        self.what = what
        if source.size < 8:
            raise self.bad(f"{source.size} bytes are too short for a safetensors file")
        (length,) = struct.unpack("<Q", self._fetch(0, 8).tobytes())
        if length > min(MAX_HEADER, source.size - 8):
            raise self.bad(f"header of {length} bytes in a file of {source.size}")
        self._data = 8 + length
        header = self.json_object(self._fetch(8, length).tobytes(), "header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self.bad("metadata is not a table of strings")
        self.metadata: dict[str, str] = metadata
        self.pieces = {name: self._piece(name, entry) for name, entry in header.items()}
        self._check_layout()

    def bad(self, reason: str) -> FactoryError:
        """The error for this file."""
        return MergeError(f"{self.what} is corrupted or not what it claims to be: {reason}")

    def json_object(self, text: str | bytes, where: str) -> dict[str, Any]:
        """A JSON object that stands in the file at `where`; names that appear twice are refused."""
        try:
            found = json.loads(text, object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self.bad(f"{where} is not JSON ({str(error)[:80]})") from None
        if not isinstance(found, dict):
            raise self.bad(f"{where} is not a JSON object")
        return found

    def _piece(self, name: str, entry: Any) -> Piece:
        try:
            dtype, width = DTYPES[entry["dtype"]]
            shape = entry["shape"]
            start, end = entry["data_offsets"]
            numbers = [*shape, start, end]
        except (KeyError, TypeError, ValueError):
            raise self.bad(f"entry {name[:100]!r} is malformed or of an unsupported dtype") from None
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers):
            raise self.bad(f"entry {name[:100]!r} has sizes that are no integers from 0 to 2⁶³ − 1")
        if end - start != math.prod(shape) * width or self._data + end > self.source.size:
            raise self.bad(f"entry {name[:100]!r} does not fit its shape or the file")
        return Piece(dtype, tuple(shape), self._data + start, self._data + end)

    def _check_layout(self) -> None:
        at = self._data
        for name, piece in sorted(self.pieces.items(), key=lambda item: (item[1].start, item[1].end)):
            if piece.start != at:
                raise self.bad(f"entry {name[:100]!r} overlaps another or leaves a gap")
            at = piece.end
        if at != self.source.size:
            raise self.bad(f"{self.source.size - at} bytes behind the last entry")

    @property
    def data_range(self) -> tuple[int, int]:
        """First byte of the data and the end of the file: the pieces, without gaps."""
        return self._data, self.source.size

    def piece(self, name: str) -> Piece:
        """The entry of that name. Raises MergeError where there is none."""
        if name not in self.pieces:
            raise self.bad(f"no entry {name[:100]!r}")
        return self.pieces[name]

    def read(self, name: str) -> Tensor:
        """One piece."""
        return self.read_many([name])[name]

    def read_many(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Several pieces with one ranged read from the first to the last byte: for pieces that lie side by side."""
        pieces = {name: self.piece(name) for name in names}
        first = min(piece.start for piece in pieces.values())
        last = max(piece.end for piece in pieces.values())
        data = self._fetch(first, last - first)
        return {name: _tensor(data, piece, first) for name, piece in pieces.items()}

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        """The file's bytes from `start` to `end`, a few MiB at a time."""
        while start < end:
            data = self.source.read(start, min(_CHUNK, end - start))
            if len(data) != min(_CHUNK, end - start):
                raise self.bad(f"it ends at byte {start + len(data)}, expected {end}")
            yield data
            start += len(data)

    def _fetch(self, start: int, length: int) -> np.ndarray:
        """Bytes as a writable array."""
        into = np.empty(length, np.uint8)
        if not length:
            return into
        if isinstance(self.source, LocalFile):
            got = self.source.read_into(start, into.data)
        else:
            data = self.source.read(start, length)
            got = len(data)
            if got == length:
                into[:] = np.frombuffer(data, np.uint8)
        if got != length:
            raise self.bad(f"asked for {length} bytes, got {got}")
        return into


def _tensor(data: np.ndarray, piece: Piece, base: int) -> Tensor:
    if piece.start == piece.end:
        return torch.zeros(piece.shape, dtype=piece.dtype)
    raw = torch.from_numpy(data[piece.start - base : piece.end - base])
    if raw.data_ptr() % piece.dtype.itemsize:
        raw = raw.clone()
    return raw.view(piece.dtype).reshape(piece.shape)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found
