"""Full checkpoints read without holding them: their tensors, a base, and a checkpoint's δ as the input of a merge.

A checkpoint is read through its safetensors files' headers and ranges. As an expert its δ is dense: checkpoint − base
in fp32 for every floating tensor of the base.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from infra.errors import MergeError
from workers.adapters.ranged_file import LocalFile, Piece, RangedReader
from workers.adapters.support import SparseTensor
from workers.adapters.tensor_file import WEIGHTS
from workers.adapters.writer import ByteSource

INDEX = WEIGHTS + ".index.json"
"""Name of the file that says which shard holds which tensor."""

_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_NOT_COPIED = ("identity.json", "index.json", INDEX)


def weight_files(what: str, exists: Callable[[str], bool], read: Callable[[str], bytes]) -> list[str]:
    """Names of the files with a checkpoint's tensors, sorted: `model.safetensors`, or the shards in its index.

    `exists` and `read` take a name in the checkpoint's folder. Raises MergeError, which names `what`, where there is
    neither, for an index that is none, and for a shard that is missing or not in that folder.
    """
    if exists(WEIGHTS):
        return [WEIGHTS]
    if not exists(INDEX):
        raise MergeError(f"{what}: holds no {WEIGHTS} and no {INDEX}; pickled weights are not accepted")
    try:
        shards = sorted(set(json.loads(read(INDEX))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise MergeError(f"{what}: {INDEX} is no index of a sharded checkpoint") from None
    for shard in shards:
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or not exists(shard):
            raise MergeError(f"{what}: {str(shard)[:100]} missing: its index lists a file which is not there")
    return shards


class CheckpointFiles:
    """The tensors of one checkpoint in one or several safetensors files. Headers are read at once, tensors on demand.

    `names` are sorted. Raises MergeError for files that are not sound or hold one tensor twice.
    """

    def __init__(self, sources: Sequence[ByteSource], what: str) -> None:
        """`what` names the checkpoint in errors."""
        if not sources:
            raise MergeError(f"{what}: has no safetensors file; pickled weights are not accepted")
        self.what = what
        self._of: dict[str, RangedReader] = {}
        for source in sources:
            reader = RangedReader(source, f"{what}: {source}")
            for name in reader.pieces:
                if name in self._of:
                    raise MergeError(f"{what}: two of its files hold {name}; keep one checkpoint there")
                self._of[name] = reader
        self.names = sorted(self._of)

    @staticmethod
    def in_folder(folder: Path) -> CheckpointFiles:
        """`model.safetensors`, or the shards that `model.safetensors.index.json` lists."""
        folder = Path(folder)
        names = weight_files(str(folder), lambda n: (folder / n).is_file(), lambda n: (folder / n).read_bytes())
        return CheckpointFiles([LocalFile(folder / name) for name in names], str(folder))

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def piece(self, name: str) -> Piece:
        """A tensor's type and shape."""
        return self._of[name].piece(name)

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self._of[name].read(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, a few MiB at a time."""
        piece = self.piece(name)
        return self._of[name].chunks(piece.start, piece.end)

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal byte for byte; reads no further than to the first difference."""
        a, b = self.piece(name), self.piece(other)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return all(x == y for x, y in zip(self.chunks(name), self.chunks(other), strict=True))

    def twin(self, name: str) -> str | None:
        """Another matrix that is equal byte for byte (a tied weight, written out), or None.

        Vectors have none: those of all normalisation layers can be equal without being tied.
        """
        if len(self.piece(name).shape) < 2:
            return None
        return next((other for other in self.names if other != name and self.same(name, other)), None)


class BaseCheckpoint:
    """A base: its tensors, its identity, and the small files beside them (configuration, tokenizer).

    `names` are those of the floating tensors, which can have a δ, sorted. What several experts read of it is read once:
    the newest tensors are kept. Safe to share between threads.
    """

    def __init__(self, weights: CheckpointFiles, sha256: str, small: Mapping[str, ByteSource] | None = None) -> None:
        self.weights, self.sha256 = weights, sha256
        self.small = dict(sorted((small or {}).items()))
        self.names = [name for name in weights.names if weights.piece(name).dtype.is_floating_point]
        self._lock = threading.Lock()
        self._wide: dict[str, Tensor] = {}
        self._positions: dict[int, Tensor] = {}

    @staticmethod
    def in_folder(folder: Path, sha256: str) -> BaseCheckpoint:
        """A checkpoint folder, for example a prepared base's."""
        small = {
            path.name: LocalFile(path)
            for path in Path(folder).iterdir()
            if path.suffix in _SMALL_SUFFIXES and path.name not in _NOT_COPIED and path.is_file()
        }
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

    Every floating tensor of the base has a δ, also where nothing differs. A tensor that only one side holds must be
    tied there to another one (a matrix equal to it byte for byte). Raises MergeError for other tensors or shapes.
    """

    def __init__(self, files: CheckpointFiles, base: BaseCheckpoint, name: str, identity: str | None = None) -> None:
        """`identity` names the checkpoint's content; default: `name`."""
        self.base_sha256 = base.sha256
        self.identity = identity or name
        self._files, self._base = files, base
        self.names = base.names
        missing = [each for each in self.names if each not in files]
        self._stands_for = {each: self._tied(each) for each in missing}
        for each in self.names:
            found, own = files.piece(self._stands_for.get(each, each)), base.weights.piece(each)
            if found.shape != own.shape or not found.dtype.is_floating_point:
                raise MergeError(
                    f"{files.what}: {each} is {found.dtype} {list(found.shape)}, the base's is {list(own.shape)}, "
                    "floating point; was it fine-tuned from this base?"
                )
        for each in files.names:
            if each not in base.weights and files.piece(each).dtype.is_floating_point and files.twin(each) is None:
                raise MergeError(f"{files.what}: holds {each}, which the base has not; is it a model of another kind?")

    def _tied(self, name: str) -> str:
        """The tensor of the checkpoint that stands for one it lacks."""
        twin = self._base.weights.twin(name)
        if twin is None or twin not in self._files:
            raise MergeError(f"{self._files.what}: lacks {name} of the base; was it fine-tuned from this base?")
        return twin

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._base.weights.piece(name).shape

    def count(self, name: str) -> int:
        """Every position."""
        return math.prod(self.shape(name))

    def load(self, name: str) -> SparseTensor:
        """One tensor's δ on every position, fp32."""
        theirs, own = self._files.read(self._stands_for.get(name, name)).view(-1), self._base.wide(name)
        if theirs.dtype == own.dtype == torch.float32:
            values = theirs.sub_(own)  # memory of our own, just read
        else:
            wide = torch.promote_types(torch.promote_types(theirs.dtype, own.dtype), torch.float32)
            values = (theirs.to(wide) - own.to(wide)).float()
        return SparseTensor(self.shape(name), self._base.positions(values.numel()), values)
