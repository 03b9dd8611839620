"""The files of measurements, whatever is measured: pieces [n] of numbers, and a table of which weight has which.

A safetensors file with one metadata entry ``importance`` (canonical JSON: format, version, the measurement's name as
``kind``, the base's identity, the SHA-256 of the adapter file that was measured, the number of training rows, a table
of tensors). Equal content gives equal bytes. Writers stream tensor by tensor; readers read the header once and then one
range a tensor. A file is treated as hostile: it reads as what it says, or ``AdapterError``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError
from workers.tensors.header import DTYPE_NAMES
from workers.tensors.reader import TensorReader
from workers.tensors.source import ByteSource
from workers.tensors.writer import TensorWriter

IMPORTANCE_FORMAT = "expert-importance"
IMPORTANCE_FILE_VERSION = 1
IMPORTANCE_READ_VERSION = 1
"""Part of the key of every node that reads such a file: raise it when the same file reads as other numbers."""
_ENTRY_BYTES = 160  # dtype, shape, offsets and punctuation of a piece beside its name; a share of it is for the norm


@dataclass(frozen=True)
class MeasuredOn:
    """What a file was measured on: base identity, SHA-256 of the adapter file, and how many training rows."""

    base_sha256: str
    adapter_sha256: str
    rows: int


# -- writing -----------------------------------------------------------------------------------------------------


class MeasurementWriter:
    """Streams pieces to `path` through `path` + ".part"; nothing exists at `path` before `close`."""

    def __init__(self, path: Path, kind: str, meta: MeasuredOn, names: Sequence[str], more: Sequence[str] = ()) -> None:
        """`kind`: the measurement's name; `names`: all weights that may be added; `more`: of the numbers that
        `close` adds to the metadata."""
        self.path, self.kind, self._meta = Path(path), kind, meta
        self._table: dict[str, dict[str, Any]] = {}
        if not names:
            raise AdapterError(f"{self.path}: there is no tensor to write the {self.kind} of")
        longest = max(names, key=lambda name: len(json.dumps(name)))  # any piece may have any of the names
        text = json.dumps(self._text({name: {"piece": longest} for name in names}, dict.fromkeys(more, 0.0)))
        room = len(text) + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._out = TensorWriter(self.path, -(-(8 + room) // 64) * 64 - 8)

    def _text(self, table: Mapping[str, Any], more: Mapping[str, Any]) -> str:
        content = {
            "format": IMPORTANCE_FORMAT,
            "version": IMPORTANCE_FILE_VERSION,
            "kind": self.kind,
            "base_sha256": self._meta.base_sha256,
            "adapter_sha256": self._meta.adapter_sha256,
            "rows": self._meta.rows,
            "tensors": table,
            **more,
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def add(self, names: Sequence[str], tensor: Tensor) -> None:
        """Append a piece [n], fp16, bf16 or fp32 on the CPU, that these weights share."""
        for name in names:
            if name in self._table:
                raise AdapterError(f"{self.path}: {name!r} is written twice")
            self._table[name] = {"piece": names[0]}
        self._out.write(names[0], tensor)

    def close(self, **more: float) -> None:
        """Finish the file and give it its name. `more` belongs in its metadata."""
        self._out.close({"importance": self._text(self._table, more)})

    def discard(self) -> None:
        """Remove what is unfinished; harmless after `close`."""
        self._out.abort()


# -- reading -----------------------------------------------------------------------------------------------------


class MeasurementFile:
    """An opened file of one measurement. ``names``: sorted names of weights; ``meta``; ``content``: all metadata."""

    def __init__(self, source: ByteSource, kind: str, dtype: torch.dtype) -> None:
        """`dtype`: that of all pieces. Raises AdapterError for anything else than a sound file of this kind."""
        self.kind = kind
        self._label = str(source) if type(source).__str__ is not object.__str__ else f"{self.kind} file"
        self._file = TensorReader(source, self.bad)
        if "importance" not in self._file.metadata:
            raise self.bad("no importance metadata")
        content = self._file.json_object(self._file.metadata["importance"], "importance metadata")
        found = (content.get("format"), content.get("kind"), content.get("version"))
        if found != (IMPORTANCE_FORMAT, self.kind, IMPORTANCE_FILE_VERSION) or type(found[2]) is not int:
            raise self.bad(f"it is {found!s:.100}, a {self.kind} file of version {IMPORTANCE_FILE_VERSION} is needed")
        base, adapter, rows = (content.get(key) for key in ("base_sha256", "adapter_sha256", "rows"))
        if not isinstance(base, str) or not isinstance(adapter, str) or type(rows) is not int or rows < 1:
            raise self.bad("base, adapter or rows are missing")
        self.meta = MeasuredOn(base, adapter, rows)
        for name, piece in self._file.pieces.items():
            if piece.dtype != dtype or len(piece.shape) != 1:
                found_as = f"{piece.dtype} {list(piece.shape)!s:.100}"
                raise self.bad(f"{name:.100}: must be {DTYPE_NAMES[dtype]} [n], is {found_as}")
        table = content.get("tensors")
        if not isinstance(table, dict) or not table:
            raise self.bad("it lists no tensors")
        self._pieces: dict[str, str] = {}
        for name, row in table.items():
            stored = row.get("piece") if isinstance(row, dict) else None
            if not isinstance(stored, str) or stored not in self._file.pieces:
                raise self.bad(f"{name:.100}: its piece is missing")
            self._pieces[name] = stored
        if extra := sorted(set(self._file.pieces) - set(self._pieces.values())):
            raise self.bad(f"unexpected piece {extra[0]!r:.100}")
        self.names: list[str] = sorted(self._pieces)
        self.content = content

    def bad(self, reason: str) -> AdapterError:
        """What to raise, and so what to do."""
        return AdapterError(
            f"{self._label}: {reason}; not a valid importance file, or damaged: delete it and run again"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def count(self, name: str) -> int:
        """How many numbers are stored of a weight."""
        if name not in self._pieces:
            raise self.bad(f"holds no tensor {name!r:.100}")
        return self._file.piece(self._pieces[name]).shape[0]

    def values(self, name: str) -> Tensor:
        """The stored numbers, fp32 [n]; all finite."""
        self.count(name)
        values = self._file.read(self._pieces[name]).to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise self.bad(f"{name}: a value is not finite")
        return values
