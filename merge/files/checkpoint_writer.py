"""Merges as full checkpoints, written tensor by tensor: base + δ in fp32, rounded once to the type it is stored in.

All other tensors are copied, into shards whose headers are known before their data, so that the files can go to a
folder or straight into an object store. The same inputs give the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from infra.errors import MergeError
from merge.files.checkpoint import BaseCheckpoint
from merge.files.delta import DeltaReader
from merge.files.sink import Outline, squared_norm
from workers.adapters.older_readers import for_older_readers
from workers.adapters.support import SparseTensor, rounded_sum
from workers.tensors.checkpoint import INDEX, WEIGHTS
from workers.tensors.header import Row, header_bytes
from workers.tensors.writer import PLAIN, raw_bytes

CHECKPOINT_VERSION = 1
"""Part of the key of every checkpoint: raise it when the same merge gives other bytes."""

SHARD_BYTES = 5_000_000_000
"""Default size of a shard."""

_STORED = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK = 1 << 22


class Stream(Protocol):
    """A file that is written from front to back."""

    def write(self, data: bytes | memoryview, /) -> object: ...


class Target(Protocol):
    """Where a checkpoint's files go: a folder (`FolderTarget`) or the object store (`infra.store.writer`)."""

    def open(self, name: str) -> Stream:
        """Begin a file."""

    def finish(self, name: str) -> None:
        """Complete a file."""

    def commit(self) -> None:
        """All files are complete."""

    def abort(self) -> None:
        """Leave nothing behind."""


class FolderTarget:
    """A local folder that appears when it is complete: written beside, then renamed."""

    def __init__(self, folder: Path) -> None:
        """Raises MergeError for a folder that holds something."""
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise MergeError(f"{self.folder} exists and is not empty: a checkpoint needs a folder of its own")
        self._part = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}.part")
        self._open: dict[str, BinaryIO] = {}

    def open(self, name: str) -> BinaryIO:
        """Begin a file."""
        self._part.mkdir(parents=True, exist_ok=True)
        self._open[name] = stream = open(self._part / name, "wb")  # noqa: SIM115 - closed by finish or abort
        return stream

    def finish(self, name: str) -> None:
        """Complete a file."""
        self._open.pop(name).close()

    def commit(self) -> None:
        """Give the folder its name."""
        self._part.replace(self.folder)  # an empty folder there is replaced

    def abort(self) -> None:
        """Leave nothing behind."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()
        shutil.rmtree(self._part, ignore_errors=True)


@dataclass(frozen=True)
class CheckpointInfo:
    """A written checkpoint.

    `files`: bytes by name; `parameters` in all tensors; `dtype` of the floating ones (None: as in the base); `norm` is
    ‖δ‖ and `rounding_loss` ‖round(base + δ) − base − δ‖ / ‖δ‖ over the support (0 for δ = 0).
    """

    files: Mapping[str, int]
    parameters: int
    dtype: str | None
    norm: float
    rounding_loss: float


@dataclass
class _Shard:
    """One file of tensors of one item size, so that each lies aligned; names in the order written."""

    rows: list[Row]
    file: str = ""
    size: int = 0
    stream: Stream | None = None


class CheckpointWriter:
    """A sink that writes base + δ as a full checkpoint. `info` tells what was written, once it is published.

    A tensor of the base that is tied to one with a δ (the configuration ties word embeddings, and both are equal byte
    for byte) is left out: loading ties it again, with the δ.
    """

    def __init__(
        self, base: BaseCheckpoint, target: Target, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """`dtype` of all floating tensors: bf16, fp16 or fp32 (None: as in the base). A shard holds `shard_bytes` at
        most, or one tensor. Raises MergeError for another type or a size below 1."""
        if dtype is not None and dtype not in _STORED:
            raise MergeError(f"a checkpoint is stored as bfloat16, float16 or float32, not {dtype}")
        if shard_bytes < 1:
            raise MergeError(f"shards of {shard_bytes} bytes; accepted: from 1")
        self._base, self._target, self._dtype, self._shard_bytes = base, target, dtype, shard_bytes
        self._config: dict[str, Any] = {}
        self._shards: list[_Shard] = []
        self._order: list[tuple[str, _Shard]] = []
        self._at = 0
        self._files: dict[str, int] = {}
        self._square = self._lost = 0.0
        self.info: CheckpointInfo | None = None

    def open(self, outline: Outline) -> None:
        """Plan the shards. Raises MergeError for another base's δ, or one of tensors or shapes that it has not."""
        weights = self._base.weights
        if outline.base_sha256 != self._base.sha256:
            raise MergeError(
                f"the merge was made for base {outline.base_sha256[:12]}…, this is {self._base.sha256[:12]}…"
            )
        for name, shape in outline.shapes.items():
            own = weights.piece(name) if name in weights else None
            if own is None or own.shape != tuple(shape) or not own.dtype.is_floating_point:
                found = "is missing" if own is None else f"is {own.dtype} {list(own.shape)}"
                raise MergeError(f"tensor {name} {found} in the base; the merge's is {list(shape)}, floating point")
        self._config = self._read_config()
        left_out = self._tied(set(outline.shapes))
        rows = [(n, self._stored(n), weights.piece(n).shape) for n in weights.names if n not in left_out]
        self._shards = _plan_shards(rows, self._shard_bytes)
        shard_of = {name: shard for shard in self._shards for name, _, _ in shard.rows}
        self._order = [(name, shard_of[name]) for name, _, _ in rows]

    def add(self, name: str, tensor: SparseTensor, support: tuple[str, Tensor] | None = None) -> None:
        """Write base + δ, and before it the tensors of the base whose names come first."""
        self._copy_until(name)
        flat = self._base.weights.read(name).view(-1)
        own = flat if flat.dtype == torch.float64 else flat.float()
        full = tensor.indices.numel() == own.numel()
        before = own if full else own.index_select(0, tensor.indices)
        stored = self._stored(name)
        after = rounded_sum(before, tensor.values, stored)
        self._check_finite(name, after)
        self._tally(before, tensor.values.float(), after)
        out = after if full else own.to(stored).index_copy_(0, tensor.indices, after)
        self._write(raw_bytes(out))
        self._next()

    def finish(self) -> None:
        """Write what is left, the index and the small files."""
        self._copy_until(None)
        if len(self._shards) > 1:
            total = sum(shard.size for shard in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": {name: shard.file for name, shard in self._order}}
            self._put(INDEX, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
        for name, source in self._base.small.items():
            data = source.read(0, source.size)
            data = self._with_dtype(data) if name == "config.json" else data
            self._put(name, for_older_readers(name, data))

    def publish(self) -> None:
        """Make all of it appear."""
        self._target.commit()
        self.info = CheckpointInfo(
            files=dict(sorted(self._files.items())),
            parameters=sum(math.prod(shape) for shard in self._shards for _, _, shape in shard.rows),
            dtype=str(self._dtype).removeprefix("torch.") if self._dtype else None,
            norm=math.sqrt(self._square),
            rounding_loss=math.sqrt(self._lost / self._square) if self._square else 0.0,
        )

    def abort(self) -> None:
        """Leave nothing behind; harmless after `publish`."""
        if self.info is None:
            self._target.abort()

    @property
    def bytes_written(self) -> int:
        """Bytes of all files."""
        return sum(self._files.values())

    def _stored(self, name: str) -> torch.dtype:
        own = self._base.weights.piece(name).dtype
        return self._dtype if self._dtype is not None and own.is_floating_point else own

    def _read_config(self) -> dict[str, Any]:
        source = self._base.small.get("config.json")
        if source is None:
            return {}
        try:
            config = json.loads(source.read(0, source.size))
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise MergeError("the base's config.json is no JSON object")
        return config

    def _tied(self, with_delta: set[str]) -> set[str]:
        """Tensors without a δ that loading will tie to one with a δ."""
        if not self._config.get("tie_word_embeddings"):
            return set()
        weights, rows = self._base.weights, self._config.get("vocab_size")
        tables = [n for n in weights.names if len(weights.piece(n).shape) == 2 and weights.piece(n).shape[0] == rows]
        changed = [name for name in tables if name in with_delta]
        return {n for n in tables if n not in with_delta and any(weights.same(n, other) for other in changed)}

    def _with_dtype(self, config: bytes) -> bytes:
        """The configuration as it is, or with the type that the tensors are stored in now."""
        names = [key for key in ("dtype", "torch_dtype") if key in self._config] or ["dtype"]
        value = str(self._dtype).removeprefix("torch.")
        if self._dtype is None or all(self._config.get(key) == value for key in names):
            return config
        return json.dumps({**self._config, **dict.fromkeys(names, value)}, indent=2, sort_keys=True).encode() + b"\n"

    def _copy_until(self, stop: str | None) -> None:
        """Copy tensors of the base up to this one (None: all)."""
        while self._at < len(self._order) and self._order[self._at][0] != stop:
            name = self._order[self._at][0]
            stored, own = self._stored(name), self._base.weights.piece(name).dtype
            for chunk in self._base.weights.chunks(name):
                if stored == own:
                    self._write(chunk)
                else:
                    values = torch.frombuffer(bytearray(chunk), dtype=own).to(stored)
                    self._check_finite(name, values)
                    self._write(raw_bytes(values))
            self._next()
        if stop is not None and self._at == len(self._order):
            raise MergeError(f"{stop}: not announced, or added out of order")

    def _write(self, data: bytes | memoryview) -> None:
        shard = self._order[self._at][1]
        self._stream(shard).write(data)

    def _stream(self, shard: _Shard) -> Stream:
        if shard.stream is None:
            shard.stream = self._target.open(shard.file)
            head = header_bytes(shard.rows, PLAIN)
            shard.stream.write(head)
            self._files[shard.file] = len(head) + shard.size
        return shard.stream

    def _next(self) -> None:
        """The present tensor is complete; its shard is, after its last one."""
        name, shard = self._order[self._at]
        self._stream(shard)  # an empty tensor alone in its shard writes nothing else
        if shard.rows[-1][0] == name:
            self._target.finish(shard.file)
        self._at += 1

    def _put(self, name: str, data: bytes) -> None:
        self._target.open(name).write(data)
        self._target.finish(name)
        self._files[name] = len(data)

    def _check_finite(self, name: str, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise MergeError(f"{name}: not finite in {values.dtype}; lower λ, or store the checkpoint as float32")

    def _tally(self, before: Tensor, delta: Tensor, after: Tensor) -> None:
        for start in range(0, delta.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            self._square += squared_norm(delta[part])
            self._lost += squared_norm(after[part].to(before.dtype) - before[part] - delta[part])


def write_checkpoint(
    merged: DeltaReader,
    base: BaseCheckpoint,
    target: Target,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> CheckpointInfo:
    """A merged adapter (or any δ) on its base as a full checkpoint. Raises as `CheckpointWriter`."""
    writer = CheckpointWriter(base, target, dtype, shard_bytes)
    try:
        writer.open(Outline(merged.base_sha256, {name: merged.shape(name) for name in merged.names}, {}))
        for name in merged.names:
            writer.add(name, merged.load(name))
        writer.finish()
        writer.publish()
    except BaseException:
        writer.abort()
        raise
    assert writer.info is not None
    return writer.info


def _plan_shards(rows: Sequence[Row], limit: int) -> list[_Shard]:
    """Tensors in their order, filled up greedily; one item size in a file, so that no tensor lies unaligned."""
    shards: list[_Shard] = []
    filling: dict[int, _Shard] = {}
    for row in rows:
        size = math.prod(row[2]) * row[1].itemsize
        shard = filling.get(row[1].itemsize)
        if shard is None or (shard.size and shard.size + size > limit):
            shard = filling[row[1].itemsize] = _Shard([])
            shards.append(shard)
        shard.rows.append(row)
        shard.size += size
    for number, shard in enumerate(shards, 1):
        shard.file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards
