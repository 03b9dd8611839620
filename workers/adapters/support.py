"""Supports: which positions of a weight a sparse adapter may change, and how they are written as bytes.

Covers the two selection units (element, whole aligned block), the sparse tensor that merges and evaluations exchange,
and three encodings of a support, chosen by size: ``gap8`` (one byte per gap), ``bitmap`` and ``dense`` (every
position). Does not cover the file around them (``workers.adapters.writer``) nor how positions are chosen
(``workers.masks.spec``). Decoding treats its input as hostile: whatever the bytes are, it returns valid indices or
raises ``AdapterError``, and allocates no more than a small multiple of the bytes it was given (8 bytes per claimed
index once the claim is checked).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from infra.errors import AdapterError, ConfigError

Block = tuple[int, int]
MAX_NUMEL = 2**48
"""Largest number of elements of one tensor that a file may claim: far above any real weight, far below int64
overflow."""


@dataclass(frozen=True)
class SparseTensor:
    """A sparse delta of one weight.

    ``indices``: int64 [n], sorted, unique, flat row-major positions in ``shape``. ``values``: fp32 or bf16 [n]. A
    position that is stored belongs to the support, also when its value is zero.
    """

    shape: tuple[int, ...]
    indices: torch.Tensor
    values: torch.Tensor

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def check(self, name: str = "tensor") -> None:
        """Raise ``AdapterError`` unless indices are int64, sorted, unique and in range, one value for each."""
        idx = self.indices
        if idx.ndim != 1 or idx.dtype != torch.int64 or self.values.shape != idx.shape:
            raise AdapterError(
                f"{name}: indices must be int64 [n] with values [n], got {idx.dtype} {list(idx.shape)} "
                f"with values {list(self.values.shape)}"
            )
        if not self.values.is_floating_point():
            raise AdapterError(f"{name}: values must be floating point, got {self.values.dtype}")
        _check_sorted(idx, self.numel, name)


def rounded_sum(base: torch.Tensor, delta: torch.Tensor, stored: torch.dtype | None = None) -> torch.Tensor:
    """round(base + delta) in the type ``stored`` (default: that of ``base``): the sum in fp32 (fp64 for fp64 weights),
    rounded once. What every join of a base and an adapter writes."""
    wide = torch.promote_types(base.dtype, torch.float32)
    return (base.to(wide) + delta.to(wide)).to(stored or base.dtype)


def added(parts: Sequence[SparseTensor]) -> SparseTensor:
    """The sum of changes of one weight, fp32, on every position that one of them holds; one alone as it is."""
    if len(parts) == 1:
        return parts[0]
    every = next((part.indices for part in parts if part.indices.numel() == part.numel), None)
    indices = torch.unique(torch.cat([part.indices for part in parts])) if every is None else every
    values = torch.zeros(indices.numel())
    for part in parts:
        at = torch.searchsorted(indices, part.indices) if every is None else part.indices
        values.index_add_(0, at, part.values.float())
    return SparseTensor(parts[0].shape, indices, values)


class LazyTensors(Mapping[str, SparseTensor]):
    """Sparse tensors by name, each made when it is asked for, and again each time."""

    def __init__(self, names: Iterable[str], make: Callable[[str], SparseTensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> SparseTensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class SupportSpec:
    """The selected units of one 2-D weight.

    ``shape``: [out, in] of the weight. ``units``: int64 [k] on the CPU, sorted and unique: flat element positions when
    ``block`` is None, else row-major ids in the grid of aligned ``block`` = (rows, columns) blocks.
    """

    shape: tuple[int, int]
    units: torch.Tensor
    block: Block | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.units.numel() * (1 if self.block is None else self.block[0] * self.block[1])

    @property
    def density(self) -> float:
        return self.count / (self.shape[0] * self.shape[1])

    def indices(self) -> torch.Tensor:
        """Sorted flat element positions, int64 [count]."""
        if self.block is None:
            return self.units
        return expand_blocks(self.units, self.shape, self.block)

    def check(self, name: str) -> None:
        """Raise ``ConfigError`` unless the units are sorted, unique and inside the shape, and blocks divide it."""
        units = unit_grid(self.shape, self.block, name)
        try:
            if self.units.ndim != 1 or self.units.dtype != torch.int64:
                raise AdapterError(f"{name}: units must be int64 [k], got {self.units.dtype} {list(self.units.shape)}")
            _check_sorted(self.units, units[0] * units[1], name)
        except AdapterError as error:
            raise ConfigError(f"support of {error}") from None


def unit_grid(shape: tuple[int, ...], block: Block | None, name: str) -> tuple[int, int]:
    """Rows and columns of selection units of a 2-D ``shape``; ``ConfigError`` when blocks do not divide it."""
    if len(shape) != 2:
        raise ConfigError(f"{name}: only 2-D weights take a mask, got shape {list(shape)}")
    rows, cols = shape
    if block is None:
        return rows, cols
    height, width = block
    if height < 1 or width < 1 or rows % height or cols % width:
        raise ConfigError(
            f"{name}: blocks of {height}x{width} do not divide its shape {rows}x{cols}; "
            "choose a block_size whose sides divide both, or granularity: element"
        )
    return rows // height, cols // width


def block_runs(ids: torch.Tensor, shape: tuple[int, ...], block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Row segments of blocks, in flat order.

    For block ids [k] (any order) returns ``starts`` int64 [k*rows], the sorted flat position of each run of ``columns``
    elements, and ``order`` int64 [k*rows] with ``values.view(k*rows, columns)[order]`` in flat order when ``values`` is
    laid out [k, rows, columns].
    """
    height, width = block
    grid_cols = shape[1] // width
    corner = (ids // grid_cols) * (height * shape[1]) + (ids % grid_cols) * width
    starts = (corner[:, None] + torch.arange(height, device=ids.device) * shape[1]).reshape(-1)
    order = torch.argsort(starts)
    return starts[order], order


def expand_blocks(ids: torch.Tensor, shape: tuple[int, ...], block: Block) -> torch.Tensor:
    """Sorted flat element positions, int64 [k*rows*columns], of the blocks ``ids`` [k]."""
    starts, _ = block_runs(ids.to(torch.int64), shape, block)
    return (starts[:, None] + torch.arange(block[1], device=ids.device)).reshape(-1)


def find_blocks(indices: torch.Tensor, shape: tuple[int, ...], block: Block, name: str) -> torch.Tensor:
    """Sorted block ids whose union is exactly ``indices`` (sorted, unique); ``AdapterError`` when there is none."""
    try:
        _, grid_cols = unit_grid(shape, block, name)
    except ConfigError as error:
        raise AdapterError(str(error)) from None
    height, width = block
    ids = torch.unique((indices // shape[1]) // height * grid_cols + (indices % shape[1]) // width)
    if ids.numel() * height * width != indices.numel():
        raise AdapterError(f"{name}: its support is not a union of whole aligned {height}x{width} blocks")
    return ids


def encode_support(indices: torch.Tensor, numel: int) -> tuple[str, torch.Tensor]:
    """Encode sorted unique ``indices`` int64 [n] below ``numel`` as (encoding, uint8 [bytes]), the smallest of three.

    ``dense`` (n == numel) takes no byte. ``bitmap``: bit ``i % 8`` (least significant first) of byte ``i // 8``.
    ``gap8``: the number of skipped positions before each index, 255 meaning "skip 255 and go on".
    """
    _check_sorted(indices, numel, "support")
    count = indices.numel()
    if count == numel:
        return "dense", torch.empty(0, dtype=torch.uint8)
    bitmap_bytes = (numel + 7) // 8
    if count < bitmap_bytes:
        gaps = indices.clone()
        gaps[1:] -= indices[:-1] + 1
        carries = gaps // 255
        extra = int(carries.sum())
        if count + extra < bitmap_bytes:
            if extra == 0:
                return "gap8", gaps.to(torch.uint8)
            data = torch.full((count + extra,), 255, dtype=torch.uint8)
            data[torch.cumsum(carries + 1, 0) - 1] = (gaps - carries * 255).to(torch.uint8)
            return "gap8", data
    bits = np.zeros(numel, dtype=np.uint8)
    bits[indices.numpy()] = 1
    return "bitmap", torch.from_numpy(np.packbits(bits, bitorder="little"))


def decode_support(encoding: str, data: torch.Tensor, numel: int, count: int) -> torch.Tensor:
    """Inverse of :func:`encode_support`: int64 [count], sorted, unique, below ``numel``; ``AdapterError`` otherwise."""
    if not 0 <= count <= numel <= MAX_NUMEL or data.dtype != torch.uint8 or data.ndim != 1:
        raise AdapterError(f"support of {count} positions out of {numel} in {data.dtype} data: not a valid support")
    size = data.numel()
    if encoding == "dense":
        if count != numel or size:
            raise AdapterError(f"dense support holds {count} of {numel} positions in {size} bytes, expected all in 0")
        return torch.arange(numel)
    if encoding == "bitmap":
        return _decode_bitmap(data, numel, count)
    if encoding == "gap8":
        return _decode_gap8(data, numel, count)
    raise AdapterError(f"unknown support encoding {encoding!r}; known: gap8, bitmap, dense, blocks")


def decode_blocks(ids: torch.Tensor, shape: tuple[int, ...], block: Block) -> torch.Tensor:
    """Element positions of block ids int32 [k] read from a file; ``AdapterError`` when unsorted or out of range."""
    try:
        rows, cols = unit_grid(shape, block, "block support")
    except ConfigError as error:
        raise AdapterError(str(error)) from None
    _check_sorted(ids.to(torch.int64), rows * cols, "block support")
    return expand_blocks(ids, shape, block)


def _decode_bitmap(data: torch.Tensor, numel: int, count: int) -> torch.Tensor:
    if data.numel() != (numel + 7) // 8:
        raise AdapterError(f"bitmap of {data.numel()} bytes for {numel} positions, expected {(numel + 7) // 8}")
    bits = np.unpackbits(data.numpy(), bitorder="little")
    if bits[numel:].any():
        raise AdapterError(f"bitmap has bits set past its {numel} positions")
    found = torch.from_numpy(np.flatnonzero(bits).astype(np.int64, copy=False))
    if found.numel() != count:
        raise AdapterError(f"bitmap has {found.numel()} bits set, its header says {count}")
    return found


def _decode_gap8(data: torch.Tensor, numel: int, count: int) -> torch.Tensor:
    size = data.numel()
    if size < count:
        raise AdapterError(f"gap8 support of {size} bytes cannot hold {count} positions")
    ends = torch.cumsum(data, 0, dtype=torch.int64)
    if size > count or (size and int(data.max()) == 255):
        last = data != 255
        if size and not bool(last[-1]):
            raise AdapterError("gap8 support ends in the middle of a gap")
        ends = ends[last]
        if ends.numel() != count:
            raise AdapterError(f"gap8 support holds {ends.numel()} positions, its header says {count}")
    ends += torch.arange(count)
    if count and int(ends[-1]) >= numel:
        raise AdapterError(f"gap8 support reaches position {int(ends[-1])} of a tensor of {numel}")
    return ends


def _check_sorted(ids: torch.Tensor, limit: int, name: str) -> None:
    """Strictly increasing and in [0, limit)."""
    if not ids.numel():
        return
    low, high = int(ids[0]), int(ids[-1])
    if low < 0 or high >= limit:
        raise AdapterError(f"{name}: positions {low}..{high} are outside 0..{limit - 1}")
    if ids.numel() > 1 and not bool((ids[1:] > ids[:-1]).all()):
        raise AdapterError(f"{name}: positions are not strictly increasing")
