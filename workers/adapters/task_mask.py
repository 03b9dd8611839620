"""Task masks as files, read: for the methods that know the task at inference, what one task keeps of the merged δ.

A safetensors file with, per tensor of the unified adapter, `t#mask` (uint8): one bit for each position of its support,
least significant bit first. The metadata hold the scale, the method, the task, the base and the SHA-256 of the unified
adapter's file, without which a mask means nothing. `MaskedAdapter` reads the two together as one adapter. Whatever is
read is checked: a corrupted or hostile file raises MergeError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.errors import MergeError
from workers.adapters.format import AdapterMeta, LowRank
from workers.adapters.reader import AdapterReader
from workers.adapters.support import Block, SparseTensor
from workers.tensors.reader import TensorReader, damaged
from workers.tensors.source import ByteSource

MASK_FILE_VERSION = 1
"""Part of the key of every task mask: raise it when the same mask is stored in another way."""

MASK_FORMAT = "expert-task-mask"
MAX_SCALE = 1e30
"""Largest scale that a file may have."""


@dataclass(frozen=True)
class MaskMeta:
    """Whose mask it is: the task's expert, the method that made it, the base, and the unified adapter's file."""

    task: str
    candidate: Mapping[str, Any]
    base_sha256: str
    unified_sha256: str


def apply_mask(unified: SparseTensor, bits: Tensor, scale: float) -> SparseTensor:
    """The expert's δ as its mask restores it, fp32, on the kept positions only."""
    return SparseTensor(unified.shape, unified.indices[bits], unified.values.float()[bits] * scale)


class MaskReader:
    """Reads a mask file: the header once, then one range a tensor. `names` are sorted. Raises MergeError."""

    def __init__(self, source: ByteSource, what: str = "task mask") -> None:
        self._file = TensorReader(source, damaged(what))
        found = self._file.metadata
        if (found.get("format"), found.get("version")) != (MASK_FORMAT, str(MASK_FILE_VERSION)):
            raise self._file.bad(f"its format is {found.get('format')!r:.100}, version {found.get('version')!r:.100}")
        try:
            candidate, table = (self._file.json_object(found[key], key) for key in ("candidate", "tensors"))
            self.meta = MaskMeta(found["task"], candidate, found["base_sha256"], found["unified_sha256"])
            self.scale = float(found["scale"])
        except (KeyError, ValueError):
            raise self._file.bad("its metadata are incomplete") from None
        if not 0 <= self.scale <= MAX_SCALE:
            raise self._file.bad(f"its scale is {self.scale}")
        self._table: dict[str, tuple[int, int]] = {}
        for name, row in table.items():
            if not isinstance(row, list) or len(row) != 2 or not all(type(n) is int and n >= 0 for n in row):
                raise self._file.bad(f"tensor {name[:100]!r} is malformed")
            piece = self._file.pieces.get(f"{name}#mask")
            if piece is None or piece.dtype != torch.uint8 or piece.shape != (-(-row[0] // 8),):
                raise self._file.bad(f"tensor {name[:100]!r} has no mask over {row[0]} positions")
            self._table[name] = (row[0], row[1])
        self.names: list[str] = sorted(self._table)

    def positions(self, name: str) -> int:
        """Positions of the unified support that the mask is over."""
        return self._get(name)[0]

    def count(self, name: str) -> int:
        """Positions that the mask keeps."""
        return self._get(name)[1]

    def load(self, name: str) -> Tensor:
        """The mask, bool [positions]."""
        positions, count = self._get(name)
        bits = np.unpackbits(self._file.read(f"{name}#mask").numpy(), bitorder="little")
        if int(bits[positions:].sum()) or int(bits.sum(dtype=np.int64)) != count:
            raise self._file.bad(f"the mask of {name[:100]!r} does not keep {count} of {positions} positions")
        return torch.from_numpy(bits[:positions].astype(np.bool_))

    def _get(self, name: str) -> tuple[int, int]:
        if name not in self._table:
            raise self._file.bad(f"no mask for {name[:100]!r}")
        return self._table[name]


class MaskedAdapter:
    """A unified adapter as one task sees it: read like `workers.adapters.writer.AdapterReader`, δ is scale · mask ∘
    unified.

    Only kept positions are returned. It is a `merge.tree.children.DeltaReader`, too. Raises MergeError where the mask
    was made over another adapter.
    """

    def __init__(self, unified: AdapterReader, mask: MaskReader, unified_sha256: str | None = None) -> None:
        """`unified_sha256`, where known, is compared with the mask's; names and sizes always are."""
        if unified_sha256 is not None and unified_sha256 != mask.meta.unified_sha256:
            raise MergeError(
                f"the mask of task {mask.meta.task!r} is over the merged adapter {mask.meta.unified_sha256[:12]}…, "
                f"this is {unified_sha256[:12]}…"
            )
        same = unified.names == mask.names and all(unified.count(name) == mask.positions(name) for name in mask.names)
        if not same or unified.meta.base_sha256 != mask.meta.base_sha256:
            raise MergeError(f"the mask of task {mask.meta.task!r} does not fit this merged adapter: tensors differ")
        self._unified, self._mask = unified, mask
        info = {**unified.meta.info, "task": mask.meta.task, "scale": mask.scale}
        self.meta = AdapterMeta(unified.meta.base_sha256, "sparse", info)
        self.names = unified.names
        self.head_names: list[str] = []
        self.base_sha256 = mask.meta.base_sha256
        self.identity = mask.meta.task

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._unified.shape(name)

    def count(self, name: str) -> int:
        """Number of positions that `load` returns."""
        return self._mask.count(name)

    def block(self, name: str) -> Block | None:
        """Never: a mask does not keep whole blocks."""
        return None

    def low_rank(self, name: str) -> LowRank | None:
        """Never: a mask has no factors."""
        return None

    def load(self, name: str) -> SparseTensor:
        """One tensor's δ, fp32."""
        masked = apply_mask(self._unified.load(name), self._mask.load(name), self._mask.scale)
        if not bool(torch.isfinite(masked.values).all()):
            raise MergeError(f"{name}: the task's δ overflows fp32 at scale {self._mask.scale}")
        return masked
