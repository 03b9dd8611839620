"""Safetensors files written tensor by tensor, with memory for one; nothing exists at a path before it is complete.

Where all sizes are known beforehand the header comes first (`write_tensors`, `save_tensors`). Where they are not, room
for it is kept, and it is filled in at the end, padded with spaces, which the format allows (`TensorWriter`). The same
calls give the same bytes. Not here: reading (`workers.tensors.reader`), what the pieces mean, and files that go
elsewhere than to a path: a header alone is `workers.tensors.header`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from infra.errors import TensorFileError
from workers.tensors.header import MAX_HEADER, Row, header_bytes, library_order, widest_first

PLAIN = {"format": "pt"}
"""Metadata of a file of weights: what transformers asks for."""


def write_tensors(path: Path, rows: Sequence[Row], content: Callable[[str], Iterable[bytes | memoryview]]) -> None:
    """A file of weights; each lies aligned, so that it can be mapped. `content` gives the bytes of each in turn."""
    order = widest_first(rows)
    with _appearing(path) as file:
        file.write(header_bytes(order, PLAIN))
        for name, _, _ in order:
            for chunk in content(name):
                file.write(chunk)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The file that safetensors' own library writes of tensors on the CPU, byte for byte.

    Of several metadata, which the library writes in no fixed order, in theirs; and tensors may share memory.
    """
    order = library_order((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    with _appearing(Path(path)) as file:
        file.write(header_bytes(order, metadata, align=8, escape=False))
        for name, _, _ in order:
            file.write(raw_bytes(tensors[name]))


class TensorWriter:
    """Streams pieces to `path` (through `path` + ".part", renamed by `publish`). A context manager."""

    def __init__(self, path: Path, room: int) -> None:
        """`room`: bytes kept for the header (`workers.tensors.header.header_room`)."""
        if room > MAX_HEADER:
            raise TensorFileError(
                f"{path}: header of {room} bytes; at most {MAX_HEADER} are allowed (too many tensors)"
            )
        self.path = Path(path)
        self._part = _part_of(self.path)
        self._room = room
        self._rows: dict[str, Row] = {}
        self._file: BinaryIO = open(self._part, "wb")  # noqa: SIM115 - closed by finish() or abort()
        self._file.seek(8 + room)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one piece (CPU; any type of `DTYPES`)."""
        if name in self._rows:
            raise TensorFileError(f"{self.path}: {name!r} is written twice")
        self._file.write(raw_bytes(tensor))
        self._rows[name] = (name, tensor.dtype, tuple(tensor.shape))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header: the file is complete. Raises TensorFileError where the header outgrew its room."""
        header = header_bytes(self._rows.values(), metadata, self._room)
        self._file.seek(0)
        self._file.write(header)
        self._file.close()

    def publish(self) -> None:
        """Give the finished file its name."""
        self._part.replace(self.path)

    def close(self, metadata: Mapping[str, str]) -> None:
        """Finish and publish."""
        self.finish(metadata)
        self.publish()

    def abort(self) -> None:
        """Remove what is unfinished; nothing happens after `publish`."""
        self._file.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.abort()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return (flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)).data


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all of it is written."""
    part = _part_of(path)
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
