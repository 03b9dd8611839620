"""Whole checkpoints as safetensors files, without loading them: raw listing, streaming rewrite, private mapping.

Every file written here is aligned (header padded to 64 bytes, wide types first), so that its tensors can be mapped
in place. The adapter format is `workers.adapters.writer`; this module knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import BaseModelError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS = "model.safetensors"
"""Name of the weights in a prepared base."""
_CHUNK = 1 << 22
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: type by its safetensors name, byte range absolute in `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def floating(self) -> bool:
        return DTYPES[self.dtype].is_floating_point


def list_entries(path: Path) -> list[Entry]:
    """The tensors of a safetensors file, by name. BaseModelError if the header is damaged or out of bounds."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        entries = []
        for name, value in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + int(at) for at in value["data_offsets"])
            shape = tuple(int(at) for at in value["shape"])
            if value["dtype"] not in DTYPES:
                raise BaseModelError(
                    f"{path}: {name} has type {value['dtype']}: quantised, or of a kind that is not read here; give "
                    "the checkpoint in bfloat16, float16 or float32"
                )
            if not 8 + length <= start <= end <= size or end - start != prod(shape) * DTYPES[value["dtype"]].itemsize:
                raise ValueError(f"{name}: byte range {start}-{end} does not fit")
            entries.append(Entry(name, value["dtype"], shape, path, start, end))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BaseModelError(f"{path}: not a sound safetensors file ({error}); fetch it again") from error
    return sorted(entries, key=lambda entry: entry.name)


def read_chunks(entry: Entry) -> Iterator[bytes]:
    """The tensor's bytes, a few MiB at a time."""
    with entry.path.open("rb") as stream:
        stream.seek(entry.start)
        left = entry.end - entry.start
        while left:
            chunk = stream.read(min(_CHUNK, left))
            if not chunk:
                raise BaseModelError(f"{entry.path}: ends inside {entry.name}; fetch it again")
            left -= len(chunk)
            yield chunk


def write_tensors(
    path: Path, rows: Sequence[tuple[str, str, tuple[int, ...]]], content: Callable[[str], Iterable[bytes]]
) -> None:
    """A safetensors file of `rows` (name, type, shape), aligned; `content` gives each tensor's bytes in turn.

    Nothing exists at `path` before it is complete.
    """
    order = sorted(rows, key=lambda row: (-DTYPES[row[1]].itemsize, row[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, kind, shape in order:
        size = prod(shape) * DTYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for name, _, _ in order:
                for chunk in content(name):
                    stream.write(chunk)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_entries(path: Path, entries: Sequence[Entry], dtype: torch.dtype | None = None) -> None:
    """One file of all `entries` (from any number of files), streamed; floating tensors converted if `dtype` is
    given."""
    by_name = {entry.name: entry for entry in entries}

    def stored(entry: Entry) -> str:
        return NAMES[dtype] if dtype is not None and entry.floating else entry.dtype

    def content(name: str) -> Iterator[bytes]:
        entry = by_name[name]
        for chunk in read_chunks(entry):
            if stored(entry) == entry.dtype:
                yield chunk
            else:
                values = torch.frombuffer(bytearray(chunk), dtype=DTYPES[entry.dtype]).to(DTYPES[stored(entry)])
                yield values.view(torch.uint8).numpy().tobytes()

    write_tensors(path, [(entry.name, stored(entry), entry.shape) for entry in entries], content)


def hash_entries(digest: hashlib._Hash, entries: Sequence[Entry]) -> None:
    """Feed names, types, shapes and bytes of the tensors, sorted by name: independent of sharding and of the header."""
    for entry in sorted(entries, key=lambda entry: entry.name):
        digest.update(json.dumps([entry.name, entry.dtype, list(entry.shape)]).encode() + b"\n")
        for chunk in read_chunks(entry):
            digest.update(chunk)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors mapped from an aligned file, copy-on-write: pages are shared until written, and the file never
    changes."""
    entries = list_entries(path)
    storage: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    tensors = {}
    for entry in entries:
        dtype = DTYPES[entry.dtype]
        if entry.start % dtype.itemsize:
            raise BaseModelError(f"{path}: {entry.name} is not aligned; remove the file, it will be made again")
        strides = [prod(entry.shape[at + 1 :]) for at in range(len(entry.shape))]
        tensors[entry.name] = torch.empty(0, dtype=dtype).set_(
            storage, entry.start // dtype.itemsize, entry.shape, strides
        )
    return tensors
