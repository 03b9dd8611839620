"""The importance files of an expert: the diagonal of its Fisher matrix on its support, or its inputs' Gram matrices.

Both are safetensors files with one metadata entry ``importance`` (canonical JSON: format, version, kind, the base's
identity, the SHA-256 of the adapter file they were measured with, the number of training rows, a table of tensors).
Equal content gives equal bytes. Writers stream tensor by tensor; readers read the header once and then one range a
tensor. A file is treated as hostile: it reads as what it says, or ``AdapterError``.

- Fisher (:class:`FisherWriter`, :class:`FisherReader`): per adapted weight the bf16 values [n] of its n support
  positions, in the adapter's own order. bf16: the exponents of fp32 at half its bytes, and a rounding of 0.4 % where
  the mean over some hundred rows is known to several percent. The file holds the L2 norm of all stored values.
- Gram (:class:`GramWriter`, :class:`GramReader`): per adapted linear weight [out, in] the fp32 sum of xᵀx [in, in]
  over tokens, its upper triangle stored row by row. Weights that share one input (query, key and value) share one
  stored piece.

How they are measured is `workers.jobs.importance`. Not here: where the files are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from infra.errors import AdapterError
from workers.tensors.header import DTYPES
from workers.tensors.reader import TensorReader
from workers.tensors.source import ByteSource
from workers.tensors.writer import TensorWriter

IMPORTANCE_FORMAT = "expert-importance"
IMPORTANCE_FILE_VERSION = 1
IMPORTANCE_READ_VERSION = 1
"""Part of the key of every node that reads such a file: raise it when the same file reads as other numbers."""
FLOOR = 1e-6
"""Least value that :meth:`FisherReader.load` returns: no position of a support is without weight."""
_ENTRY_BYTES = 160  # dtype, shape, offsets and punctuation of a piece beside its name; a share of it is for the norm
_MAX_NORM = 1e60  # any number of the largest values of bf16


@dataclass(frozen=True)
class ImportanceMeta:
    """What a file was measured on: base identity, SHA-256 of the adapter file, and how many training rows."""

    base_sha256: str
    adapter_sha256: str
    rows: int


# -- writing -----------------------------------------------------------------------------------------------------


class _Writer:
    """Streams pieces to `path` through `path` + ".part"; nothing exists at `path` before `close`. A context manager."""

    kind: Literal["fisher", "gram"]

    def __init__(self, path: Path, meta: ImportanceMeta, names: Sequence[str]) -> None:
        self.path, self._meta = Path(path), meta
        self._table: dict[str, dict[str, Any]] = {}
        if not names:
            raise AdapterError(f"{self.path}: there is no tensor to write the {self.kind} of")
        longest = max(names, key=lambda name: len(json.dumps(name)))  # any piece may have any of the names
        text = json.dumps(self._text({name: {"piece": longest} for name in names}, 0.0))
        room = len(text) + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._out = TensorWriter(self.path, -(-(8 + room) // 64) * 64 - 8)

    def _text(self, table: Mapping[str, Any], norm: float) -> str:
        content = {
            "format": IMPORTANCE_FORMAT,
            "version": IMPORTANCE_FILE_VERSION,
            "kind": self.kind,
            "base_sha256": self._meta.base_sha256,
            "adapter_sha256": self._meta.adapter_sha256,
            "rows": self._meta.rows,
            "tensors": table,
            **({"norm": norm} if self.kind == "fisher" else {}),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def _close(self, norm: float) -> None:
        self._out.close({"importance": self._text(self._table, norm)})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._out.abort()


class FisherWriter(_Writer):
    """Writes Fisher values tensor by tensor. `names`: all weights that may be added."""

    kind = "fisher"

    def __init__(self, path: Path, meta: ImportanceMeta, names: Sequence[str]) -> None:
        super().__init__(path, meta, names)
        self._square = 0.0

    def add(self, name: str, values: Tensor) -> None:
        """Append one weight's values: floating point [n], finite and not negative, in the adapter's order."""
        stored = values.detach().to("cpu", torch.bfloat16)
        if stored.ndim != 1 or not bool((torch.isfinite(stored) & (stored >= 0)).all()):
            raise AdapterError(f"{name}: Fisher values must be [n], finite in bf16 and not negative")
        self._square += float(stored.double().square().sum())
        self._table[name] = {"piece": name}
        self._out.write(name, stored)

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._close(math.sqrt(self._square))


class GramWriter(_Writer):
    """Writes Gram matrices one after the other. `names`: all weights that may be added."""

    kind = "gram"

    def add(self, names: Sequence[str], gram: Tensor) -> None:
        """Append the matrix [in, in] (floating point, symmetric up to rounding) of the inputs that `names` share."""
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not bool(torch.isfinite(gram).all()):
            raise AdapterError(f"{names[0]}: a Gram matrix must be [in, in] and finite, got shape {list(gram.shape)}")
        for name in names:
            if name in self._table:
                raise AdapterError(f"{self.path}: {name!r} is written twice")
            self._table[name] = {"piece": names[0]}
        self._out.write(names[0], _pack(gram.detach().to("cpu", torch.float32)))

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._close(0.0)


def _pack(matrix: Tensor) -> Tensor:
    """The upper triangle of [n, n], row by row: [n (n + 1) / 2]."""
    return torch.cat([torch.empty(0), *(row[at:] for at, row in enumerate(matrix.unbind()))])


def _unpack(packed: Tensor, side: int) -> Tensor:
    """Inverse of `_pack` for a symmetric matrix."""
    matrix = torch.empty(side, side, dtype=packed.dtype)
    for at, row in enumerate(packed.split(list(range(side, 0, -1)))):
        matrix[at, at:] = row
        matrix[at:, at] = row
    return matrix


# -- reading -----------------------------------------------------------------------------------------------------


class _Reader:
    """Header checks that both kinds share. `names` are the sorted names of the weights."""

    kind: Literal["fisher", "gram"]
    _dtype: Literal["BF16", "F32"]

    def __init__(self, source: ByteSource) -> None:
        label = str(source) if type(source).__str__ is not object.__str__ else f"{self.kind} file"
        self._bad = lambda reason: AdapterError(
            f"{label}: {reason}; not a valid importance file, or damaged: delete it and run again"
        )
        self._file = TensorReader(source, self._bad)
        if "importance" not in self._file.metadata:
            raise self._bad("no importance metadata")
        content = self._file.json_object(self._file.metadata["importance"], "importance metadata")
        found = (content.get("format"), content.get("kind"), content.get("version"))
        if found != (IMPORTANCE_FORMAT, self.kind, IMPORTANCE_FILE_VERSION) or type(found[2]) is not int:
            raise self._bad(f"it is {found!s:.100}, a {self.kind} file of version {IMPORTANCE_FILE_VERSION} is needed")
        base, adapter, rows = (content.get(key) for key in ("base_sha256", "adapter_sha256", "rows"))
        if not isinstance(base, str) or not isinstance(adapter, str) or type(rows) is not int or rows < 1:
            raise self._bad("base, adapter or rows are missing")
        self.meta = ImportanceMeta(base, adapter, rows)
        for name, piece in self._file.pieces.items():
            if piece.dtype != DTYPES[self._dtype] or len(piece.shape) != 1:
                raise self._bad(f"{name:.100}: must be {self._dtype} [n], is {piece.dtype} {list(piece.shape)!s:.100}")
        table = content.get("tensors")
        if not isinstance(table, dict) or not table:
            raise self._bad("it lists no tensors")
        self._pieces: dict[str, str] = {}
        for name, row in table.items():
            stored = row.get("piece") if isinstance(row, dict) else None
            if not isinstance(stored, str) or stored not in self._file.pieces:
                raise self._bad(f"{name:.100}: its piece is missing")
            self._pieces[name] = stored
        if extra := sorted(set(self._file.pieces) - set(self._pieces.values())):
            raise self._bad(f"unexpected piece {extra[0]!r:.100}")
        self.names: list[str] = sorted(self._pieces)
        self._content = content

    def _count(self, name: str) -> int:
        """How many numbers are stored."""
        if name not in self._pieces:
            raise self._bad(f"holds no tensor {name!r:.100}")
        return self._file.piece(self._pieces[name]).shape[0]

    def _values(self, name: str) -> Tensor:
        """The stored numbers, fp32 [n]; all finite."""
        self._count(name)
        values = self._file.read(self._pieces[name]).to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise self._bad(f"{name}: a value is not finite")
        return values


class FisherReader(_Reader):
    """Reads Fisher values. ``names``: sorted; ``meta``; ``norm``: L2 norm of all stored values."""

    kind = "fisher"
    _dtype = "BF16"

    def __init__(self, source: ByteSource) -> None:
        super().__init__(source)
        norm = self._content.get("norm")
        if type(norm) not in (int, float) or not 0 <= norm <= _MAX_NORM:  # type: ignore[operator]
            raise self._bad(f"its norm is no number from 0 to {_MAX_NORM}")
        self.norm = float(norm)  # type: ignore[arg-type]

    def count(self, name: str) -> int:
        """Number of values of a weight: that of the adapter's support."""
        return self._count(name)

    def load(self, name: str) -> Tensor:
        """fp32 [n]: the values divided by ``norm``, at least ``FLOOR``; all ``FLOOR`` where every value is zero."""
        values = self._values(name)
        if values.numel() and (float(values.min()) < 0 or float(values.max()) > self.norm * (1 + 1e-6)):
            raise self._bad(f"{name}: a value is negative or larger than the norm {self.norm}")
        # fp64: of the smallest norms the reciprocal, of the smallest values the quotient would be lost
        return (values.double() / (self.norm or 1.0)).clamp_(min=FLOOR).to(torch.float32)


class GramReader(_Reader):
    """Reads Gram matrices. ``names``: sorted, those of weights that share a matrix included; ``meta``."""

    kind = "gram"
    _dtype = "F32"

    def __init__(self, source: ByteSource) -> None:
        super().__init__(source)
        for name in self.names:
            count, side = self._count(name), self.side(name)
            if side * (side + 1) // 2 != count:
                raise self._bad(f"{name:.100}: {count} values are no triangle of a matrix")

    def side(self, name: str) -> int:
        """``in`` of a weight [out, in]."""
        return _side(self._count(name))

    def load(self, name: str) -> Tensor:
        """fp32 [in, in], symmetric, its diagonal not negative."""
        matrix = _unpack(self._values(name), self.side(name))
        if bool((matrix.diagonal() < 0).any()):
            raise self._bad(f"{name}: its diagonal has a negative value")
        return matrix


def _side(count: int) -> int:
    """n of n (n + 1) / 2 = count, rounded down."""
    return (math.isqrt(8 * count + 1) - 1) // 2
