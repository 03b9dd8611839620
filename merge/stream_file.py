"""Safetensors files written and read piece by piece, with memory for one piece.

The writer reserves room for the header, streams the data behind it and fills the header in at the end, padded with
spaces (the format allows that). The same calls give the same bytes. The reader checks the header once and then makes
one ranged read per request.

Not here: what the pieces mean (`merge.node_file`).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from infra.errors import MergeError
from workers.adapter import ByteSource

MAX_HEADER = 100_000_000
"""The safetensors library's own limit on header bytes."""

DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "F32": (torch.float32, 4),
    "BF16": (torch.bfloat16, 2),
    "F16": (torch.float16, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "U16": (torch.uint16, 2),
    "U8": (torch.uint8, 1),
}
"""Dtypes that are read and written: safetensors' name -> torch dtype and bytes."""

_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
_ENTRY_BYTES = 120  # dtype, punctuation and two offsets of up to 15 digits, beside the name and the shape


def header_room(names: Sequence[str], metadata: Mapping[str, str]) -> int:
    """Upper bound of the header's bytes for one-dimensional pieces of these names and (worst-case) metadata."""
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
        flat = tensor.detach().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)
        self._file.write(raw.data)
        end = self._offset + raw.nbytes
        shape = list(tensor.shape)
        self._entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [self._offset, end]}
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
        if not self._file.closed:
            self._file.close()
        self._part.unlink(missing_ok=True)


@dataclass(frozen=True)
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

    def read(self, name: str) -> Tensor:
        """One piece."""
        return self.read_many([name])[name]

    def read_many(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Several pieces with one ranged read from the first to the last byte: for pieces that lie side by side."""
        for name in names:
            if name not in self.pieces:
                raise self.bad(f"no entry {name[:100]!r}")
        first = min(self.pieces[name].start for name in names)
        last = max(self.pieces[name].end for name in names)
        data = self.source.read(first, last - first) if last > first else b""
        if len(data) != last - first:
            raise self.bad(f"asked for {last - first} bytes, got {len(data)}")
        return {name: _tensor(data, self.pieces[name], first) for name in names}


def _tensor(data: bytes, piece: Piece, base: int) -> Tensor:
    if piece.start == piece.end:
        return torch.zeros(piece.shape, dtype=piece.dtype)
    raw = np.frombuffer(data, np.uint8, piece.end - piece.start, piece.start - base).copy()
    return torch.from_numpy(raw).view(piece.dtype).reshape(piece.shape)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found
