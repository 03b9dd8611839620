"""Full checkpoints in merges: a base, and a checkpoint's δ as an input.

As an expert its δ is dense: checkpoint − base in fp32 for every floating tensor of the base.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import MergeError
from workers.adapters.support import SparseTensor
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles, small_files
from workers.tensors.source import ByteSource, FileSource


class BaseCheckpoint:
    """A base: its tensors, its identity, and the small files beside them (configuration, tokenizer).

    `names` are those of the floating tensors, which can have a δ, sorted. What several experts read of it is read once:
    the newest tensors are kept. Safe to share between threads.
    """

    def __init__(self, weights: CheckpointFiles, sha256: str, small: Mapping[str, ByteSource] | None = None) -> None:
        self.weights, self.sha256 = weights, sha256
        self.small = dict(sorted((small or {}).items()))
        self.names = weights.floating
        self._lock = threading.Lock()
        self._wide: dict[str, Tensor] = {}
        self._positions: dict[int, Tensor] = {}

    @staticmethod
    def in_folder(folder: Path, sha256: str) -> BaseCheckpoint:
        """A checkpoint folder, for example a prepared base's."""
        small = {path.name: FileSource(path) for path in small_files(Path(folder))}
        return BaseCheckpoint(CheckpointFiles.in_folder(folder), sha256, small)

    @staticmethod
    def from_index(index: Mapping[str, Any], source: Callable[[str], ByteSource]) -> BaseCheckpoint:
        """A base in the object store: its `index.json` and how to read a file of its folder."""
        try:
            sha256, names = str(index["sha256"]), sorted(index["files"])
        except (KeyError, TypeError):
            raise MergeError(f"not the index of a stored base: {str(index)[:100]}") from None
        small = {name: source(name) for name in names if name != WEIGHTS}
        return BaseCheckpoint(CheckpointFiles([source(WEIGHTS)], f"base {sha256[:12]}…"), sha256, small)

    def wide(self, name: str) -> Tensor:
        """A tensor, flat and in fp32 (fp64 stays), not to be written to."""
        with self._lock:
            if name not in self._wide:
                found = self.weights.read(name).view(-1)
                self._wide[name] = found if found.dtype == torch.float64 else found.float()
                _keep_newest(self._wide)
            return self._wide[name]

    def positions(self, numel: int) -> Tensor:
        """0 … numel − 1, int64, not to be written to: the support of every dense δ of that size."""
        with self._lock:
            if numel not in self._positions:
                self._positions[numel] = torch.arange(numel)
                _keep_newest(self._positions)
            return self._positions[numel]


def _keep_newest(cache: dict[Any, Tensor]) -> None:
    """Two: that of the tensor in work and that of the next one."""
    while len(cache) > 2:
        del cache[next(iter(cache))]


class CheckpointDelta:
    """A full checkpoint minus its base as the input of a merge (a `merge.tree.children.DeltaReader`), dense, in fp32.

    Every floating tensor of the base has a δ, also where nothing differs. Raises BaseModelError for a checkpoint of
    other tensors or shapes (`CheckpointFiles.stand_ins`).
    """

    def __init__(self, files: CheckpointFiles, base: BaseCheckpoint, name: str, identity: str | None = None) -> None:
        """`identity` names the checkpoint's content; default: `name`."""
        self.base_sha256 = base.sha256
        self.identity = identity or name
        self._files, self._base = files, base
        self.names = base.names
        self._stands_for = files.stand_ins(base.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._base.weights.piece(name).shape

    def count(self, name: str) -> int:
        """Every position."""
        return math.prod(self.shape(name))

    def load(self, name: str) -> SparseTensor:
        """One tensor's δ on every position, fp32."""
        theirs, own = self._files.read(self._stands_for[name]).view(-1), self._base.wide(name)
        if theirs.dtype == own.dtype == torch.float32:
            values = theirs.sub_(own)  # memory of our own, just read
        else:
            wide = torch.promote_types(torch.promote_types(theirs.dtype, own.dtype), torch.float32)
            values = (theirs.to(wide) - own.to(wide)).float()
        return SparseTensor(self.shape(name), self._base.positions(values.numel()), values)
