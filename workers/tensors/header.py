"""The header of a safetensors file, read and written: what every format of this project that is one has in common.

A file is eight bytes with the header's length (little-endian), the header as JSON (per tensor its type, shape and byte
range behind the header; `__metadata__` with strings), padded with spaces, and the tensors' bytes without gaps
(huggingface.co/docs/safetensors). Whatever the bytes are, the answer is what they say or one error, TensorFileError,
which gives the reason; who knows what the file is for adds the name and what to do. Not here: the data
(`workers.tensors.reader`, `workers.tensors.writer`).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infra.errors import TensorFileError

MAX_HEADER = 100_000_000
"""The safetensors library's own limit on header bytes."""

DTYPES: Mapping[str, torch.dtype] = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Types that are read and written, by their names in a file."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""The inverse of `DTYPES`."""

QUANTISED = "is a type of quantised weights"
"""What the error about a sound file of such a type says."""

_NARROW = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"})

Row = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor to be written: its name, type and shape."""

_ENTRY_BYTES = 130  # dtype, punctuation, two offsets and two sides of up to 15 digits, beside the name
_MAX_SIDE = 2**63


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor in a file: its type, its shape, and where its bytes begin in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.start + self.length


@dataclass(frozen=True)
class Header:
    """What a header says, checked: the pieces lie from `start`, the first byte behind it, without gaps to the end."""

    metadata: dict[str, str]
    pieces: dict[str, Piece]
    start: int


_OTHER = {
    b"version ": "a pointer of Git LFS without the file itself (run git lfs pull)",
    b"GGUF": "a GGUF file",
    b"PK\3\4": "pickled weights of torch.save",
    b"<": "a page of the web in place of the file",
}
"""How other files begin that stand in its place."""

# -- reading --


def read_header(read: Callable[[int, int], bytes], size: int) -> Header:
    """The header of a file of `size` bytes, of which `read` gives a range (offset, length).

    Raises TensorFileError for anything but a sound header with data of just that size behind it.
    """
    if size < 8:
        raise TensorFileError(f"{size} bytes are too short for a safetensors file")
    begin = _whole(read, 0, 8)
    (length,) = struct.unpack("<Q", begin)
    if length > min(MAX_HEADER, size - 8):
        other = next((f"{what}; " for sign, what in _OTHER.items() if begin.startswith(sign)), "")
        raise TensorFileError(f"{other}header of {length} bytes in a file of {size}")
    entries = json_object(_whole(read, 8, length), "header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError("metadata is not a table of strings")
    start = 8 + length
    pieces = {name: _piece(name, entry, start, size) for name, entry in entries.items()}
    _check_gapless(pieces, start, size)
    return Header(metadata, pieces, start)


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object that stands in a file at `where`. Raises TensorFileError for anything else, and for a name that
    appears twice."""
    try:
        found = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"{where} is not JSON ({str(error)[:80]})") from None
    if not isinstance(found, dict):
        raise TensorFileError(f"{where} is not a JSON object")
    return found


def _whole(read: Callable[[int, int], bytes], start: int, length: int) -> bytes:
    data = read(start, length) if length else b""
    if len(data) != length:
        raise TensorFileError(f"asked for {length} bytes, got {len(data)}")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _piece(name: str, entry: Any, data: int, size: int) -> Piece:
    if isinstance(entry, dict) and (given := str(entry.get("dtype"))) in _NARROW:
        raise TensorFileError(f"{name[:100]}: {given} {QUANTISED}; give the checkpoint in bfloat16, float16 or float32")
    try:
        kind, shape = entry["dtype"], entry["shape"]
        start, end = entry["data_offsets"]
        numbers = [*shape, start, end]
    except (KeyError, TypeError, ValueError):
        raise TensorFileError(f"entry {name[:100]!r} is malformed or of an unsupported dtype") from None
    if not isinstance(kind, str) or kind not in DTYPES:
        raise TensorFileError(f"entry {name[:100]!r} is malformed or of an unsupported dtype ({str(kind)[:20]})")
    dtype = DTYPES[kind]
    if not all(type(n) is int and 0 <= n < _MAX_SIDE for n in numbers):
        raise TensorFileError(f"entry {name[:100]!r} has sizes that are no integers from 0 to 2⁶³ − 1")
    if end - start != _bytes_up_to(size, shape, dtype) or data + end > size:
        raise TensorFileError(f"entry {name[:100]!r} does not fit its shape or the file")
    return Piece(dtype, tuple(shape), data + start)


def _bytes_up_to(most: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor; of one with more than `most`, some number above it: a product of many sides is not taken."""
    total = 0 if 0 in shape else dtype.itemsize
    for side in shape:
        total *= side
        if total > most:
            break
    return total


def _check_gapless(pieces: Mapping[str, Piece], start: int, size: int) -> None:
    at = start
    for name, piece in sorted(pieces.items(), key=lambda item: (item[1].start, item[1].end)):
        if piece.start != at:
            raise TensorFileError(f"entry {name[:100]!r} overlaps another or leaves a gap")
        at = piece.end
    if at != size:
        raise TensorFileError(f"{size - at} bytes behind the last entry")


# -- writing --


def header_bytes(
    rows: Iterable[Row], metadata: Mapping[str, str], room: int | None = None, align: int = 64, escape: bool = True
) -> bytes:
    """Length and header of a file whose tensors lie in the order of `rows`.

    It takes `room` bytes beside its length; without, as few as let the data begin at a multiple of `align`. `escape`
    says whether other characters than ASCII are (the library writes them as they are). Raises TensorFileError where it
    does not fit, or is larger than any reader accepts.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape in rows:
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=escape).encode()
    if room is None:
        room = len(text) + -(8 + len(text)) % align
    if len(text) > room or room > MAX_HEADER:
        raise TensorFileError(f"header of {len(text)} bytes does not fit the {room} reserved; at most {MAX_HEADER}")
    return struct.pack("<Q", room) + text.ljust(room)


def header_room(names: Sequence[str], metadata: Mapping[str, str]) -> int:
    """Upper bound of the header's bytes for pieces of these names, of two dimensions at most, and (worst-case)
    metadata."""
    pieces = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
    return -(-(pieces + len(json.dumps({"__metadata__": dict(metadata)})) + 16) // 8) * 8


def widest_first(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order in which every tensor lies aligned: widest types first, by name."""
    return sorted(rows, key=lambda row: (-row[1].itemsize, row[0]))


def library_order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of safetensors' own library: by type, widest first, then by name."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
    return sorted(rows, key=lambda row: (ranks[row[1]], row[0]))
