"""Safetensors files read by range: the header is checked once, then each request is one ranged read.

Whatever the bytes are, the answer is what they say or an error. Not here: writing (`workers.tensors.writer`), adapters,
which keep a smaller table in memory (`workers.adapters.reader`), and what the pieces mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.errors import FactoryError, MergeError, TensorFileError
from workers.tensors.header import Piece, json_object, read_header
from workers.tensors.source import ByteSource, FileSource

Bad = Callable[[str], FactoryError]
"""The error about a file, of a reason: names the file and says what to do."""

_CHUNK = 8 << 20


def damaged(what: str) -> Bad:
    """Errors about what merges read and write, where `what` names the file."""
    return lambda reason: MergeError(f"{what} is corrupted or not what it claims to be: {reason}")


class TensorReader:
    """Reads pieces of a safetensors file by range. `metadata` and `pieces` (by name) are what its header says.

    Raises what `bad` makes of the reason for any file that is not one.
    """

    def __init__(self, source: ByteSource, bad: Bad) -> None:
        self.source = source
        self.bad = bad
        try:
            header = read_header(source.read, source.size)
        except TensorFileError as error:
            raise bad(str(error)) from None
        self.metadata, self.pieces, self._data = header.metadata, header.pieces, header.start

    def json_object(self, text: str, where: str) -> dict[str, Any]:
        """A JSON object that stands in the file at `where`; names that appear twice are refused."""
        try:
            return json_object(text, where)
        except TensorFileError as error:
            raise self.bad(str(error)) from None

    def piece(self, name: str) -> Piece:
        """The entry of that name. Raises the file's error where there is none."""
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
        if isinstance(self.source, FileSource):
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
