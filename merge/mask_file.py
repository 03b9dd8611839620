"""Task masks as files: for the methods that know the task at inference, what one task keeps of the merged δ.

A safetensors file with, per tensor of the unified adapter, `t#mask` (uint8): one bit for each position of its support,
least significant bit first. The metadata hold the scale, the method, the task, the base and the SHA-256 of the unified
adapter's file, without which a mask means nothing. `MaskedAdapter` reads the two together as one adapter. Whatever is
read is checked: a corrupted or hostile file raises MergeError. How masks are chosen is `merge.per_task`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.errors import MergeError
from merge.children import DeltaReader
from merge.per_task import apply_mask, task_mask, task_scale
from merge.specs import Candidate
from merge.stream_file import RangedReader, SafetensorsWriter, header_room
from workers.adapter import AdapterReader, ByteSource
from workers.adapter_format import AdapterMeta, LowRank
from workers.support import Block, SparseTensor

MASK_FILE_VERSION = 1
"""Part of the key of every task mask: raise it when the same mask is stored in another way."""

MASK_FORMAT = "expert-task-mask"
_MAX_SCALE = 1e30


@dataclass(frozen=True)
class MaskMeta:
    """Whose mask it is: the task's expert, the method that made it, the base, and the unified adapter's file."""

    task: str
    candidate: Mapping[str, Any]
    base_sha256: str
    unified_sha256: str


@dataclass(frozen=True)
class MaskInfo:
    """What was written: the scale, the positions kept of all the unified support's, and the file's bytes."""

    scale: float
    kept: int
    positions: int
    bytes_written: int


def write_task_mask(
    path: Path, candidate: Candidate, unified: DeltaReader, expert: DeltaReader, unified_sha256: str, task: str
) -> MaskInfo:
    """Make and store the mask of one expert over the unified adapter that `candidate` gave, tensor by tensor.

    `unified_sha256` is that of the unified adapter's file. A tensor that the expert lacks keeps nothing. Raises
    MergeError for another base or shapes, before tensors are read.
    """
    if unified.base_sha256 != expert.base_sha256:
        raise MergeError(
            f"expert {task!r} was made for base {expert.base_sha256[:12]}…, the merge for {unified.base_sha256[:12]}…"
        )
    own = set(expert.names)
    for name in unified.names:
        if name in own and tuple(expert.shape(name)) != tuple(unified.shape(name)):
            raise MergeError(
                f"tensor {name} has shape {list(expert.shape(name))} in expert {task!r}, "
                f"{list(unified.shape(name))} in the merge"
            )
    meta = MaskMeta(task, candidate.recipe(), unified.base_sha256, unified_sha256)
    masks = []
    kept = 0
    with MaskWriter(path, meta, {name: unified.count(name) for name in unified.names}) as writer:
        for name in unified.names:
            merged = unified.load(name)
            none = torch.empty(0, dtype=torch.int64)
            delta = expert.load(name) if name in own else SparseTensor(merged.shape, none, torch.empty(0))
            mask = task_mask(candidate.method, merged, delta, candidate.params)
            kept += writer.add(name, mask.bits)
            masks.append(replace(mask, bits=mask.bits[:0]))  # the masses are all that the scale needs
        scale = task_scale(candidate.method, masks)
        writer.close(scale)
    return MaskInfo(scale, kept, sum(map(unified.count, unified.names)), Path(path).stat().st_size)


class MaskWriter:
    """Streams masks to `path`; nothing exists there before `close`. A context manager."""

    def __init__(self, path: Path, meta: MaskMeta, counts: Mapping[str, int]) -> None:
        """`counts`: positions of the unified support, for every tensor that will be written."""
        self._meta, self._counts = meta, dict(counts)
        self._table: dict[str, list[int]] = {}
        worst = {name: [count, count] for name, count in self._counts.items()}
        room = header_room([f"{name}#mask" for name in counts], self._metadata(worst, 1 / 3 * 1e-300))
        self._out = SafetensorsWriter(path, room)

    def _metadata(self, table: Mapping[str, Sequence[int]], scale: float) -> dict[str, str]:
        return {
            "format": MASK_FORMAT,
            "version": str(MASK_FILE_VERSION),
            "task": self._meta.task,
            "candidate": json.dumps(dict(self._meta.candidate), sort_keys=True, separators=(",", ":")),
            "base_sha256": self._meta.base_sha256,
            "unified_sha256": self._meta.unified_sha256,
            "scale": repr(scale),
            "tensors": json.dumps(table, separators=(",", ":")),
        }

    def add(self, name: str, bits: Tensor) -> int:
        """Append a mask, bool [positions]; returns how many it keeps."""
        if bits.dtype != torch.bool or bits.shape != (self._counts.get(name, -1),):
            raise MergeError(f"{name}: its mask is {bits.dtype} {list(bits.shape)}, not bool over the unified support")
        packed = np.packbits(bits.numpy(), bitorder="little")
        self._out.write(f"{name}#mask", torch.from_numpy(packed))
        self._table[name] = [bits.numel(), int(bits.sum())]
        return self._table[name][1]

    def close(self, scale: float) -> None:
        """Finish the file. `scale` multiplies what is kept. Raises MergeError where it is no number of a sane size."""
        if not 0 <= scale <= _MAX_SCALE:
            raise MergeError(f"the scale of a task mask is {scale}; accepted: from 0 to {_MAX_SCALE:g}")
        self._out.close(self._metadata(self._table, scale))

    def __enter__(self) -> MaskWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._out.abort()


class MaskReader:
    """Reads a mask file: the header once, then one range a tensor. `names` are sorted. Raises MergeError."""

    def __init__(self, source: ByteSource, what: str = "task mask") -> None:
        self._file = RangedReader(source, what)
        found = self._file.metadata
        if (found.get("format"), found.get("version")) != (MASK_FORMAT, str(MASK_FILE_VERSION)):
            raise self._file.bad(f"its format is {found.get('format')!r:.100}, version {found.get('version')!r:.100}")
        try:
            candidate, table = json.loads(found["candidate"]), json.loads(found["tensors"])
            self.meta = MaskMeta(found["task"], candidate, found["base_sha256"], found["unified_sha256"])
            self.scale = float(found["scale"])
        except (KeyError, ValueError, RecursionError):
            raise self._file.bad("its metadata are incomplete or no JSON") from None
        if not isinstance(candidate, dict) or not isinstance(table, dict) or not 0 <= self.scale <= _MAX_SCALE:
            raise self._file.bad("its metadata are malformed")
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
    """A unified adapter as one task sees it: read like `workers.adapter.AdapterReader`, δ is scale · mask ∘ unified.

    Only kept positions are returned. It is a `merge.children.DeltaReader`, too. Raises MergeError where the mask was
    made over another adapter.
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
