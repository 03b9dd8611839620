"""Joins the parts of a root, partial adapter files with some of the tensors each, into one adapter file.

Bytes are copied, nothing is decoded: the result is the file that one writer would have made, byte for byte. The header
is known before the data, so the file can be streamed anywhere.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.errors import MergeError
from merge.adapter_file import adapter_metadata, adapter_room
from merge.sink import Outline
from workers.adapter import AdapterReader, ByteSource
from workers.ranged_file import DTYPE_NAMES, RangedReader


def assemble(parts: Sequence[ByteSource], write: Callable[[bytes], object]) -> int:
    """Write one adapter file of all parts, in their order; returns its size in bytes.

    Raises MergeError for parts that are not of one merge, AdapterError for one that is no adapter; both before anything
    is written.
    """
    if not parts:
        raise MergeError("a merged adapter is assembled from at least one part")
    metas = [AdapterReader(part).meta for part in parts]  # checks everything in the header
    files = [RangedReader(part, f"part {number} of a merge") for number, part in enumerate(parts)]
    table: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    shift = 0
    for number, (file, meta) in enumerate(zip(files, metas, strict=True)):
        if (meta.base_sha256, meta.kind, meta.info) != (metas[0].base_sha256, metas[0].kind, metas[0].info):
            raise MergeError(f"part {number} of a merge is another merge's: base or description differ from part 0's")
        own = json.loads(file.metadata["adapter"])["tensors"]
        if twice := sorted(set(own) & set(table)):
            raise MergeError(f"part {number} of a merge holds {twice[0]}, which an earlier part holds too")
        table.update(own)
        start, end = file.data_range
        for name, piece in file.pieces.items():
            offsets = [piece.start - start + shift, piece.end - start + shift]
            entries[name] = {"dtype": DTYPE_NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": offsets}
        shift += end - start
    head = _header(Outline(metas[0].base_sha256, _shapes(table), metas[0].info), table, entries)
    write(head)
    for file in files:
        for chunk in file.chunks(*file.data_range):
            write(chunk)
    return len(head) + shift


def _shapes(table: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(row["shape"]) for name, row in table.items()}


def _header(outline: Outline, table: Mapping[str, Any], entries: Mapping[str, Any]) -> bytes:
    room = adapter_room(outline)
    text = json.dumps({"__metadata__": adapter_metadata(outline, table), **entries}, separators=(",", ":")).encode()
    if len(text) > room:
        raise MergeError(f"header of {len(text)} bytes does not fit the {room} reserved")
    return struct.pack("<Q", room) + text.ljust(room)
