"""Merged adapters as files: written tensor by tensor in the format of `workers.adapters.writer`, and adapters as merge
inputs.

`workers.adapters.writer.save_adapter` needs all tensors at once; the writer here does not, at the price of a padded
header. `AdapterReader` reads both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError, MergeError
from merge.files.sink import Outline
from workers.adapters.format import AdapterMeta, metadata_text, sparse_pieces
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterReader
from workers.tensors.header import header_room
from workers.tensors.source import ByteSource
from workers.tensors.writer import TensorWriter


class AdapterDelta:
    """An expert's adapter as the input of a merge (a `merge.tree.reduce.DeltaReader`); a head is no part of it.

    `names` are sorted. `identity` seeds random choices: the one given, else the recipe key that the file carries, else
    `name`. Raises AdapterError, which names the expert, for a file that is no adapter.
    """

    def __init__(self, source: ByteSource, name: str, identity: str | None = None) -> None:
        try:
            self._reader = AdapterReader(source)
        except AdapterError as error:
            raise AdapterError(f"expert {name!r}: {error}") from error
        recipe = self._reader.meta.info.get("recipe")
        self.identity = identity or (recipe if isinstance(recipe, str) else name)
        self.base_sha256 = self._reader.meta.base_sha256

    @property
    def names(self) -> Sequence[str]:
        """The tensors that have a δ, sorted."""
        return self._reader.names

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._reader.shape(name)

    def count(self, name: str) -> int:
        """Positions in a tensor's support."""
        return self._reader.count(name)

    def load(self, name: str) -> SparseTensor:
        """One tensor's δ, fp32; low-rank ones multiplied out."""
        return self._reader.load(name)


def adapter_metadata(outline: Outline, table: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a merged adapter's file. Raises MergeError where the outline's info is no JSON."""
    meta = AdapterMeta(base_sha256=outline.base_sha256, kind="sparse", info=dict(outline.info))
    try:
        return {"adapter": metadata_text(meta, table, {})}
    except AdapterError as error:
        raise MergeError(f"information about a merge: {error}") from None


def adapter_room(outline: Outline) -> int:
    """Bytes kept for the header of a merged adapter's file."""
    worst = {
        n: {"shape": list(s), "count": math.prod(s), "encoding": "x" * 16} for n, s in sorted(outline.shapes.items())
    }
    pieces = [f"{name}.{part}" for name in worst for part in ("values", "support")]
    return header_room(pieces, adapter_metadata(outline, worst))


class AdapterWriter:
    """A sink that streams fp32 values and supports to `path`; nothing exists there before `publish`."""

    def __init__(self, path: Path, info: Mapping[str, Any] | None = None) -> None:
        """`info` (JSON) is added to what the merge says about itself."""
        self.path = Path(path)
        self._extra = dict(info or {})
        self._table: dict[str, dict[str, Any]] = {}
        self._outline = Outline("", {}, {})
        self._out: TensorWriter | None = None

    def open(self, outline: Outline) -> None:
        """The outline bounds the header. Raises MergeError for too many tensors or info that is no JSON."""
        self._outline = Outline(outline.base_sha256, outline.shapes, {**self._extra, **outline.info})
        self._out = TensorWriter(self.path, adapter_room(self._outline))

    def add(self, name: str, tensor: SparseTensor, support: tuple[str, Tensor] | None = None) -> None:
        """Append one tensor. Raises MergeError for a δ that is not finite."""
        values = tensor.values.float()
        if not bool(torch.isfinite(values).all()):
            raise MergeError(f"{name}: the merged δ overflows fp32; lower λ or look for a diverged expert")
        pieces, self._table[name] = sparse_pieces(name, tensor, values, support)
        for piece, data in pieces.items():
            self._file.write(piece, data)

    def finish(self) -> None:
        """Complete the file beside its name."""
        self._file.finish(adapter_metadata(self._outline, self._table))

    def publish(self) -> None:
        """Give the file its name."""
        self._file.publish()

    def close(self) -> None:
        """Finish and publish."""
        self.finish()
        self.publish()

    def abort(self) -> None:
        """Remove what is unfinished."""
        if self._out is not None:
            self._out.abort()

    @property
    def bytes_written(self) -> int:
        """Size of the finished file."""
        return self.path.stat().st_size

    @property
    def _file(self) -> TensorWriter:
        if self._out is None:
            raise MergeError(f"{self.path}: written to before it was opened")
        return self._out
