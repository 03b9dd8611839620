"""Safetensors files written piece by piece, with memory for one piece.

The writer reserves room for the header, streams the data behind it and fills the header in at the end, padded with
spaces (the format allows that). The same calls give the same bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from infra.errors import MergeError
from workers.adapters.ranged_file import DTYPE_NAMES, MAX_HEADER

_ENTRY_BYTES = 130  # dtype, punctuation, two offsets and two sides of up to 15 digits, beside the name


def header_room(names: Sequence[str], metadata: Mapping[str, str]) -> int:
    """Upper bound of the header's bytes for pieces of these names, of two dimensions at most, and (worst-case)
    metadata."""
    pieces = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
    return -(-(pieces + len(json.dumps({"__metadata__": dict(metadata)})) + 16) // 8) * 8


class SafetensorsWriter:
    """Streams pieces to `path` (through `path` + ".part", renamed by `publish`). A context manager."""

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

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header: the file is complete. Raises MergeError where the header outgrew its room."""
        header = {"__metadata__": dict(metadata), **self._entries}
        data = json.dumps(header, separators=(",", ":")).encode()
        if len(data) > self._room:
            raise MergeError(f"{self.path}: header of {len(data)} bytes does not fit the {self._room} reserved")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + data.ljust(self._room))
        self._file.close()

    def publish(self) -> None:
        """Give the finished file its name."""
        self._part.replace(self.path)

    def close(self, metadata: Mapping[str, str]) -> None:
        """Finish and publish."""
        self.finish(metadata)
        self.publish()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Remove what is unfinished; nothing happens after `publish`."""
        if not self._file.closed:
            self._file.close()
        self._part.unlink(missing_ok=True)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return (flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)).data
