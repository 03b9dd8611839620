"""What an adapter file says about itself: identity, kinds, low-rank tensors, table of contents.

Shared by everything that writes adapters (`workers.adapters.writer`, `merge.files.merged`) and reads them
(`workers.adapters.reader`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError
from workers.adapters.support import SparseTensor, encode_support

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
KINDS = ("sparse", "lora", "full", "support")
MAX_LIFTED = 2**31
"""Most elements that a low-rank tensor may claim. Its product is not bounded by the bytes of its factors (rank 1 turns
4 MB into 10^12 elements), and lifting takes 12 bytes for each, so the bound is what a real weight needs and a node can
hold: the largest published matrices (128256 x 16384) are just below it."""
MAX_SCALE = 2.0**20
"""Largest |scale| of a low-rank tensor: far above any alpha/r in use; beyond it a file is damaged or hostile."""
_LIFT_CHUNK = 2**22


@dataclass(frozen=True)
class AdapterMeta:
    """What the tensors are: ``base_sha256`` names the base that the values are added to, ``info`` is free JSON.

    ``kind`` is one of ``KINDS``: how the expert was trained, or ``support`` for a file of which only the positions
    count. ``format_version`` is that of the file it was read from; files are always written in the newest.
    """

    base_sha256: str
    kind: str = "sparse"
    info: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class LowRank:
    """A low-rank delta of one weight [out, in]: ``scale * b @ a`` with ``a`` [r, in] and ``b`` [out, r] (LoRA, arXiv
    2106.09685, eq. 3), floating point."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def check(self, name: str) -> None:
        """Raise ``AdapterError`` unless the factors fit each other, the bounds of a lift hold and all is finite."""
        a, b = self.a, self.b
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not min(*a.shape, *b.shape):
            raise AdapterError(f"{name}: factors {list(a.shape)} and {list(b.shape)} are not [r, in] and [out, r]")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise AdapterError(f"{name}: factors must be floating point, got {a.dtype} and {b.dtype}")
        if problem := scale_problem(self.scale) or lift_problem(self.shape):
            raise AdapterError(f"{name}: {problem}")
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise AdapterError(f"{name}: a value of its factors is not finite; the expert has diverged")

    def lift(self, name: str) -> SparseTensor:
        """The delta on every position, fp32: the product in float64, rounded once. ``AdapterError`` if it overflows.

        Takes 12 bytes for each element of the weight and a fixed amount more.
        """
        rows, cols = self.shape
        a, b = self.a.to(torch.float64), self.b.to(torch.float64)
        values = torch.empty(rows, cols, dtype=torch.float32)
        step = max(1, _LIFT_CHUNK // cols)
        for start in range(0, rows, step):
            values[start : start + step] = self.scale * (b[start : start + step] @ a)
        if not bool(torch.isfinite(values).all()):
            raise AdapterError(f"{name}: the product of its factors is not finite in fp32")
        return SparseTensor((rows, cols), torch.arange(rows * cols), values.view(-1))


def scale_problem(scale: object) -> str | None:
    """Why ``scale`` is none, or None for a finite number of at most ``MAX_SCALE`` in absolute value."""
    if type(scale) not in (int, float) or not abs(scale) <= MAX_SCALE:  # type: ignore[arg-type]
        return f"scale must be a number between ±{MAX_SCALE:.0f}"
    return None


def lift_problem(shape: Sequence[int]) -> str | None:
    """Why a low-rank tensor of this 2-D ``shape`` is refused, None when it is not."""
    if math.prod(shape) > MAX_LIFTED:
        return f"a low-rank tensor of shape {list(shape)} has more than {MAX_LIFTED} elements"
    return None


def sparse_entry(tensor: SparseTensor, encoding: str) -> dict[str, Any]:
    """A sparse tensor's row in the table of contents."""
    return {"shape": list(tensor.shape), "count": tensor.indices.numel(), "encoding": encoding}


def sparse_pieces(
    name: str, tensor: SparseTensor, values: Tensor, support: tuple[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pieces of a file (by name) and table row of a sparse tensor with ``values`` as they are to be stored.

    ``support`` is its ``encode_support``, where the caller has it already.
    """
    encoding, data = support or encode_support(tensor.indices, tensor.numel)
    pieces = {f"{name}.values": values}
    if encoding != "dense":
        pieces[f"{name}.support"] = data
    return pieces, sparse_entry(tensor, encoding)


def metadata_text(meta: AdapterMeta, tensors: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    """The metadata entry ``adapter``: canonical JSON. ``AdapterError`` for an unknown kind or ``info`` that is not
    JSON."""
    if meta.kind not in KINDS:
        raise AdapterError(f"adapters are of kind {', '.join(KINDS)}; {meta.kind!r} is none")
    content = {
        "format_version": FORMAT_VERSION,
        "base_sha256": meta.base_sha256,
        "kind": meta.kind,
        "info": meta.info,
        "tensors": tensors,
        "head": head,
    }
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"adapter info cannot be written as JSON: {error}") from None
