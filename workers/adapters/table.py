"""The table of contents of an adapter file in memory: what lies where, in few bytes.

A merge keeps a thousand adapters of hundreds of tensors open; as objects their tables would take more memory than the
tensors in work. Each row is a dozen integers in one array, and becomes an object when it is asked for.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from workers.adapters.support import Block
from workers.tensors.header import Piece

ENCODINGS = ("gap8", "bitmap", "dense", "blocks")
"""How a support is stored."""

STORED = (torch.uint8, torch.int32, torch.bfloat16, torch.float32)
"""Types of stored tensors."""

_NONE = -1


@dataclass(frozen=True, slots=True)
class SparseRow:
    """A weight with a sparse δ."""

    shape: tuple[int, ...]
    count: int
    encoding: str
    block: Block | None
    support: Piece | None
    values: Piece

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class LowRankRow:
    """A weight with a low-rank δ."""

    shape: tuple[int, ...]
    scale: float
    a: Piece
    b: Piece


Row = SparseRow | LowRankRow


class Table(Mapping[str, Row]):
    """Rows by name, sorted; each is made when it is asked for."""

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self.names = [sys.intern(name) for name in sorted(rows)]
        self._numbers = array("q")
        self._starts = array("q")
        for name in self.names:
            self._starts.append(len(self._numbers))
            self._numbers.extend(_pack(rows[name]))

    def __getitem__(self, name: str) -> Row:
        return _unpack(self._numbers, self._start(name))

    def __contains__(self, name: object) -> bool:
        """Without making the row, as `Mapping` would."""
        at = bisect_left(self.names, name) if isinstance(name, str) else len(self.names)
        return at < len(self.names) and self.names[at] == name

    def shape(self, name: str) -> tuple[int, ...]:
        """A row's shape, without the rest of it."""
        at = self._start(name)
        return tuple(self._numbers[at + 1 : at + 1 + abs(self._numbers[at])])

    def count(self, name: str) -> int:
        """Positions that a row's δ covers, without the rest of it."""
        at = self._start(name)
        sides = self._numbers[at]
        return math.prod(self.shape(name)) if sides < 0 else self._numbers[at + 1 + sides]

    def _start(self, name: str) -> int:
        at = bisect_left(self.names, name)
        if at == len(self.names) or self.names[at] != name:
            raise KeyError(name)
        return self._starts[at]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _pack(row: Row) -> list[int]:
    """Dimensions, shape, then what the kind of row needs; a low-rank one has a negative number of dimensions."""
    if isinstance(row, LowRankRow):
        (scale,) = struct.unpack("<q", struct.pack("<d", row.scale))
        factors = [number for span in (row.a, row.b) for number in (STORED.index(span.dtype), span.start)]
        return [-len(row.shape), *row.shape, row.a.shape[0], scale, *factors]
    height, width = row.block or (_NONE, _NONE)
    encoding = ENCODINGS.index(row.encoding)
    numbers = [len(row.shape), *row.shape, row.count, encoding, height, width]
    numbers += [STORED.index(row.values.dtype), row.values.start]
    if row.support is None:
        return [*numbers, _NONE]
    return [*numbers, STORED.index(row.support.dtype), row.support.start, row.support.shape[0]]


def _unpack(numbers: array[int], at: int) -> Row:
    sides = abs(numbers[at])
    shape, rest = tuple(numbers[at + 1 : at + 1 + sides]), at + 1 + sides
    if numbers[at] < 0:
        rank, bits, a, a_begin, b, b_begin = numbers[rest : rest + 6]
        (scale,) = struct.unpack("<d", struct.pack("<q", bits))
        first = Piece(STORED[a], (rank, shape[1]), a_begin)
        return LowRankRow(shape, scale, first, Piece(STORED[b], (shape[0], rank), b_begin))
    count, encoding, height, width, kind, begin, held = numbers[rest : rest + 7]
    support = None
    if held != _NONE:
        support = Piece(STORED[held], (numbers[rest + 8],), numbers[rest + 7])
    block = None if height == _NONE else (height, width)
    return SparseRow(shape, count, ENCODINGS[encoding], block, support, Piece(STORED[kind], (count,), begin))
