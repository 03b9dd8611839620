"""The adapter file: what an expert adds to a base, in one safetensors file (format version 2; version 1 is read too).

For each sparse weight ``<name>.support`` (uint8, or int32 block ids; absent when every position is kept) and
``<name>.values`` (bf16 or fp32, in flat order); for each low-rank weight ``<name>.lora_a`` [r, in] and
``<name>.lora_b`` [out, r]; for each tensor of a classification head, which is never part of the delta, ``<name>.head``
(fp32). One metadata entry ``adapter`` holds everything else as canonical JSON (one entry, because safetensors writes
several in no fixed order). Equal content gives equal bytes. A random support is stored as positions, never as its seed
alone: torch does not promise its generator's stream across releases.

Reading needs the header once and then one ranged read per stored tensor (a weight's neighbouring ones in one), from a
file or an object store. A file is treated as hostile: it reads as what it says, or ``AdapterError``; never a crash,
never a large allocation on a false claim. Does not cover how a file is named, stored or registered, nor other formats
(``workers.conversion.formats``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError
from workers.adapters.format import (
    FORMAT_VERSION,
    AdapterMeta,
    LowRank,
    metadata_text,
    sparse_entry,
    sparse_pieces,
)
from workers.adapters.reader import AdapterReader, check_base
from workers.adapters.support import Block, SparseTensor, find_blocks
from workers.tensors.writer import save_tensors

__all__ = [
    "FORMAT_VERSION",
    "AdapterMeta",
    "AdapterReader",
    "LowRank",
    "check_base",
    "save_adapter",
]


def save_adapter(
    path: str | os.PathLike[str],
    tensors: Mapping[str, SparseTensor | LowRank],
    meta: AdapterMeta,
    value_dtype: torch.dtype = torch.bfloat16,
    head: Mapping[str, Tensor] | None = None,
    blocks: Mapping[str, Block] | None = None,
) -> None:
    """Write ``tensors`` (parameter name to delta) to ``path``, deterministic bytes.

    Each tensor is taken from the mapping once, so a lazy one needs memory for the file's content and one tensor.
    ``value_dtype`` is bf16 or fp32 (values and factors are rounded to it). ``head``: whole tensors, stored as fp32.
    ``blocks`` names the block of each sparse tensor whose support is a union of whole aligned blocks (rows are blocks
    (1, in), columns (out, 1)); their list is stored where it is smaller. Raises ``AdapterError`` for invalid supports
    or factors, values that are not finite, names that do not fit together, or ``info`` that is not JSON.
    """
    head, blocks = head or {}, blocks or {}
    if value_dtype not in (torch.bfloat16, torch.float32):
        raise AdapterError(f"adapter values are stored as bfloat16 or float32, not {value_dtype}")
    if misfits := sorted(set(blocks) - set(tensors)) + sorted(set(head) & set(tensors)):
        raise AdapterError(f"{misfits[0]}: blocks belong to sparse tensors, and a head's tensor has no delta beside it")
    data: dict[str, Tensor] = {}
    table: dict[str, dict[str, Any]] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, LowRank) and name in blocks:
            raise AdapterError(f"{name}: a low-rank tensor has no blocks")
        if isinstance(tensor, LowRank):
            pieces, table[name] = _low_rank(name, tensor, value_dtype)
        else:
            pieces, table[name] = _sparse(name, tensor, value_dtype, blocks.get(name))
        data.update(pieces)
    rows = {}
    for name in sorted(head):
        data[f"{name}.head"] = _finite(name, head[name], torch.float32)
        rows[name] = {"shape": list(head[name].shape)}
    save_tensors(path, data, {"adapter": metadata_text(meta, table, rows)})


def _sparse(
    name: str, given: SparseTensor, dtype: torch.dtype, block: Block | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pieces and table row of a sparse tensor."""
    tensor = SparseTensor(given.shape, given.indices.cpu(), given.values)
    tensor.check(name)
    pieces, entry = sparse_pieces(name, tensor, _finite(name, given.values, dtype))
    if block is not None:
        ids = find_blocks(tensor.indices, tensor.shape, block, name)
        support = pieces.get(f"{name}.support")
        if support is not None and ids.numel() * 4 < support.numel():
            pieces[f"{name}.support"] = ids.to(torch.int32)
            entry = {**sparse_entry(tensor, "blocks"), "block": list(block)}
    return pieces, entry


def _low_rank(name: str, tensor: LowRank, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pieces and table row of a low-rank tensor."""
    tensor.check(name)
    pieces = {f"{name}.lora_a": _finite(name, tensor.a, dtype), f"{name}.lora_b": _finite(name, tensor.b, dtype)}
    entry = {"shape": list(tensor.shape), "encoding": "lora", "rank": tensor.rank, "scale": float(tensor.scale)}
    return pieces, entry


def _finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is stored; ``AdapterError`` unless every value is finite in ``dtype``."""
    stored = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise AdapterError(f"{name}: a value is not finite in {dtype}; the expert has diverged")
    return stored
