"""Safetensors files written and read piece by piece, with memory for one piece.

The writer reserves room for the header, streams the data behind it and fills the header in at the end, padded with
spaces (the format allows that). The same calls give the same bytes. The reader checks the header once and then makes
one ranged read per request.

Not here: what the pieces mean (`merge.node_file`), and files whose header is known before the data
(`merge.checkpoint_file`).
"""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from infra.errors import MergeError
from workers.adapter import ByteSource, FileSource

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

_ENTRY_BYTES = 130  # dtype, punctuation, two offsets and two sides of up to 15 digits, beside the name
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


def header_room(names: Sequence[str], metadata: Mapping[str, str]) -> int:
    """Upper bound of the header's bytes for pieces of these names, of two dimensions at most, and (worst-case)
    metadata."""
    pieces = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
    return -(-(pieces + len(json.dumps({"__metadata__": dict(metadata)})) + 16) // 8) * 8


class SafetensorsWriter:
    """Streams pieces to `path` (through `path` + ".part", renamed by `close`). A context manager."""

    def __init__(self, path: Path, room: int) -> None:
        if room > MAX_HEADER:
            raise MergeError(f"{path}: header of {room} bytes; at most {MAX_HEADER} are allowed (too many tensors)")
        self.path = Path(path)
        self._part = self.path.with_name(self.path.name + ".part")
        self._room = room
        self._entries: dict[str, Any] = {}
        self._offset = 0
        self._file: BinaryIO = open(self._part, "wb")  # noqa: SIM115 - closed by close() or __exit__
        self._file.seek(8 + room)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one piece (CPU; any dtype of `DTYPES`)."""
        if name in self._entries:
            raise MergeError(f"{self.path}: {name!r} written twice")
        raw = raw_bytes(tensor)
        self._file.write(raw)
        end = self._offset + raw.nbytes
        shape = list(tensor.shape)
        self._entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [self._offset, end]}
        self._offset = end

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the header and give the file its name. Raises MergeError where the header outgrew its room."""
        header = {"__metadata__": dict(metadata), **self._entries}
        data = json.dumps(header, separators=(",", ":")).encode()
        if len(data) > self._room:
            raise MergeError(f"{self.path}: header of {len(data)} bytes does not fit the {self._room} reserved")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + data.ljust(self._room))
        self._file.close()
        self._part.replace(self.path)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Remove what is unfinished; nothing happens after `close`."""
        if not self._file.closed:
            self._file.close()
        self._part.unlink(missing_ok=True)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return (flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)).data


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of a header; `start` and `end` are absolute."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class RangedReader:
    """Reads pieces of a safetensors file by range. Raises MergeError for any file that is not one."""

    def __init__(self, source: ByteSource, what: str) -> None:
        self.source = source
        self.what = what
        if source.size < 8:
            raise self.bad(f"{source.size} bytes are too short for a safetensors file")
        (length,) = struct.unpack("<Q", source.read(0, 8))
        if length > min(MAX_HEADER, source.size - 8):
            raise self.bad(f"header of {length} bytes in a file of {source.size}")
        self._data = 8 + length
        try:
            header = json.loads(source.read(8, length), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self.bad(f"header is not JSON ({str(error)[:80]})") from None
        if not isinstance(header, dict):
            raise self.bad("header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self.bad("metadata is not a table of strings")
        self.metadata: dict[str, str] = metadata
        self.pieces = {name: self._piece(name, entry) for name, entry in header.items()}
        self._check_layout()

    def bad(self, reason: str) -> MergeError:
        """The error for this file."""
        return MergeError(f"{self.what} is corrupted or not what it claims to be: {reason}")

    def _piece(self, name: str, entry: Any) -> Piece:
        try:
            dtype, width = DTYPES[entry["dtype"]]
            shape = entry["shape"]
            start, end = entry["data_offsets"]
            numbers = [*shape, start, end]
        except (KeyError, TypeError, ValueError):
            raise self.bad(f"entry {name[:100]!r} is malformed or of an unsupported dtype") from None
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise self.bad(f"entry {name[:100]!r} has sizes that are no non-negative integers")
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
