"""Writes a merged adapter tensor by tensor, in the format of `workers.adapter`, with memory for one tensor.

`workers.adapter.save_adapter` needs all tensors at once; this writer does not, at the price of a padded header.
`AdapterReader` reads both. Not here: reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError, MergeError
from merge.stream_file import SafetensorsWriter, header_room
from workers.adapter_format import AdapterMeta, metadata_text, sparse_pieces
from workers.support import SparseTensor


class AdapterWriter:
    """Streams fp32 values and supports to `path`; nothing exists there before `close`. A context manager."""

    def __init__(
        self, path: Path, base_sha256: str, info: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        """`shapes` holds every tensor that will be written: it bounds the header. `info` must be JSON."""
        self._meta = AdapterMeta(base_sha256=base_sha256, kind="sparse", info=dict(info))
        self._table: dict[str, dict[str, Any]] = {}
        worst = {n: {"shape": list(s), "count": math.prod(s), "encoding": "x" * 16} for n, s in shapes.items()}
        pieces = [f"{name}.{part}" for name in shapes for part in ("values", "support")]
        self._out = SafetensorsWriter(path, header_room(pieces, self._metadata(worst)))

    def _metadata(self, table: Mapping[str, Any]) -> dict[str, str]:
        try:
            return {"adapter": metadata_text(self._meta, table, {})}
        except AdapterError as error:
            raise MergeError(f"information about a merge: {error}") from None

    def add(self, name: str, tensor: SparseTensor, support: tuple[str, Tensor] | None = None) -> None:
        """Append one tensor. `support` is its `encode_support`, where the caller has it already."""
        values = tensor.values.float()
        if not bool(torch.isfinite(values).all()):
            raise MergeError(f"{name}: the merged δ overflows fp32; lower λ or look for a diverged expert")
        pieces, self._table[name] = sparse_pieces(name, tensor, values, support)
        for piece, data in pieces.items():
            self._out.write(piece, data)

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._out.close(self._metadata(self._table))

    def __enter__(self) -> AdapterWriter:
        self._out.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._out.__exit__(*error)
