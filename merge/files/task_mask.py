"""Task masks as files, written: see `workers.adapters.task_mask` for the format and the reader,
`merge.methods.per_task` for how masks are chosen."""

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
from merge.files.delta import DeltaReader
from merge.methods.per_task import task_mask, task_scale
from merge.methods.specs import Candidate
from workers.adapters.support import SparseTensor
from workers.adapters.task_mask import MASK_FILE_VERSION, MASK_FORMAT, MAX_SCALE, MaskMeta
from workers.tensors.header import header_room
from workers.tensors.writer import TensorWriter


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
        self._out = TensorWriter(path, room)

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
        if not 0 <= scale <= MAX_SCALE:
            raise MergeError(f"the scale of a task mask is {scale}; accepted: from 0 to {MAX_SCALE:g}")
        self._out.close(self._metadata(self._table, scale))

    def __enter__(self) -> MaskWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._out.abort()
