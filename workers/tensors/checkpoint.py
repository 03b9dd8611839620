"""Checkpoints of models as safetensors: which files one consists of, and its tensors, read and rewritten without
holding them.

The one reader of checkpoints, whatever they are for: to prepare a base, to map it into a process, to convert, to merge.
Raises TensorFileError for what is no sound checkpoint, and BaseModelError for one that is not of a base. Knows nothing
of models and configurations.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import BaseModelError, TensorFileError
from workers.tensors.header import DTYPE_NAMES, QUANTISED, Piece
from workers.tensors.reader import Bad, TensorReader
from workers.tensors.source import ByteSource, FileSource
from workers.tensors.writer import raw_bytes, write_tensors

WEIGHTS = "model.safetensors"
"""Name of the weights where they are one file, as in a prepared base."""

INDEX = WEIGHTS + ".index.json"
"""Name of the file that says which shard holds which tensor."""

_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_NOT_COPIED = ("identity.json", "index.json", INDEX)
_TOKEN_TABLE = re.compile(r"embed|wte|lm_head|(?:^|\.)output\.weight$")
"""Names of input and output embeddings: one row for each token."""


def weight_files(what: str, names: Collection[str], read: Callable[[str], bytes]) -> list[str]:
    """Those of the files `names` in a checkpoint's folder that hold its tensors, sorted: `model.safetensors`, else what
    the index lists and nothing else (an earlier save may lie beside), else, without an index, all safetensors files.

    `read` gives a file's content. Raises TensorFileError, which names `what`, where there is none, for an index that is
    none, and for a shard that is missing.
    """
    if WEIGHTS in names:
        return [WEIGHTS]
    if INDEX not in names:
        found = sorted(name for name in names if name.endswith(".safetensors"))
        if not found:
            raise TensorFileError(f"{what}: holds no *.safetensors; pickled weights are not accepted")
        return found
    try:
        shards = sorted(set(json.loads(read(INDEX))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise TensorFileError(f"{what}: {INDEX} is no index of a sharded checkpoint") from None
    for shard in shards:
        if shard not in names:
            raise TensorFileError(f"{what}: {str(shard)[:100]} missing: its index lists a file which is not there")
    return shards


def small_files(folder: Path) -> list[Path]:
    """Files beside the weights that belong to a checkpoint: configuration and tokenizer."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _SMALL_SUFFIXES and path.name not in _NOT_COPIED and path.is_file()
    )


class CheckpointFiles:
    """The tensors of one checkpoint in one or several safetensors files. Headers are read at once, tensors on demand.

    `names` are sorted, `floating` those of floating tensors. Raises TensorFileError for files that are not sound or
    hold one tensor twice.
    """

    def __init__(self, sources: Sequence[ByteSource], what: str) -> None:
        """`what` names the checkpoint in errors."""
        if not sources:
            raise TensorFileError(f"{what}: has no safetensors file; pickled weights are not accepted")
        self.what = what
        self._of: dict[str, TensorReader] = {}
        for source in sources:
            reader = TensorReader(source, _unsound(what if what == str(source) else f"{what}: {source}"))
            for name in reader.pieces:
                if name in self._of:
                    raise TensorFileError(f"{what}: two of its files hold {name}; keep one checkpoint there")
                self._of[name] = reader
        self.names = sorted(self._of)
        self.floating = [name for name in self.names if self.piece(name).dtype.is_floating_point]

    @staticmethod
    def in_folder(folder: Path) -> CheckpointFiles:
        """`model.safetensors`, or the shards in its index, or all safetensors files there (see `weight_files`)."""
        folder = Path(folder)
        if not folder.is_dir():
            raise TensorFileError(f"{folder}: no such folder; give one with {WEIGHTS}")
        present = {path.name for path in folder.iterdir()}
        names = weight_files(str(folder), present, lambda name: (folder / name).read_bytes())
        return CheckpointFiles([FileSource(folder / name) for name in names], str(folder))

    @staticmethod
    def in_file(path: Path) -> CheckpointFiles:
        """One file."""
        return CheckpointFiles([FileSource(path)], str(path))

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

    def stand_ins(self, base: CheckpointFiles) -> dict[str, str]:
        """The tensor here that each floating tensor of `base` became in a fine-tuning: that of the same name.

        A tensor that only one side holds must be tied there to another one (see `twin`). Raises BaseModelError for
        other tensors or shapes.
        """
        found = {name: name if name in self else self._tied(name, base) for name in base.floating}
        for name, mine in found.items():
            piece, own = self.piece(mine), base.piece(name)
            if said := resized(name, piece.shape, own.shape):
                raise BaseModelError(f"{self.what}: {said}")
            if piece.shape != own.shape or not piece.dtype.is_floating_point:
                raise BaseModelError(
                    f"{self.what}: {name} is {piece.dtype} {list(piece.shape)}, the base's is {list(own.shape)}, "
                    "floating point; was it fine-tuned from this base?"
                )
        for name in self.floating:
            if name not in base and self.twin(name) is None:
                if table := self._untied(name, base):
                    raise BaseModelError(
                        f"{self.what}: {name} differs from {table}, which stands for both in the base (tied); give a "
                        "base with the two untied (tie_word_embeddings false), or train the expert with them tied"
                    )
                raise BaseModelError(
                    f"{self.what}: holds {name}, which the base has not; is it a model of another kind?"
                )
        return found

    def _untied(self, name: str, base: CheckpointFiles) -> str | None:
        """The base's table of tokens that an output layer of the same shape, which only this one has, was tied to."""
        if not _TOKEN_TABLE.search(name):
            return None
        tables = (table for table in base.floating if _TOKEN_TABLE.search(table))
        return next((table for table in tables if base.piece(table).shape == self.piece(name).shape), None)

    def _tied(self, name: str, base: CheckpointFiles) -> str:
        twin = base.twin(name)
        if twin is None or twin not in self:
            raise BaseModelError(f"{self.what}: lacks {name} of the base; was it fine-tuned from this base?")
        return twin


def resized(name: str, found: Sequence[int], own: Sequence[int]) -> str:
    """What to say of a table of tokens whose rows are others than the base's, "" for any other difference of shapes.

    `found` and `own`: shapes of the tensor `name`, there and in the base.
    """
    same_columns = len(found) == len(own) == 2 and found[1] == own[1] and found[0] != own[0]
    if not (same_columns and _TOKEN_TABLE.search(name)):
        return ""
    more = abs(found[0] - own[0])
    how = f"{more} more rows, tokens were added" if found[0] > own[0] else f"{more} fewer rows, tokens were taken away"
    return (
        f"{name} has {found[0]} rows, the base's has {own[0]}: {how} (a resized vocabulary); resize it to {own[0]} "
        "rows (resize_token_embeddings) if it can do without them, or resize the base likewise and give that"
    )


def _unsound(what: str) -> Bad:
    def bad(reason: str) -> TensorFileError:
        if QUANTISED in reason:  # sound, but nothing that is read
            return TensorFileError(f"{what}: {reason}")
        return TensorFileError(f"{what}: not a sound safetensors file ({reason}); fetch it again")

    return bad


# -- rewritten, hashed, mapped --


def write_weights(
    path: Path, files: CheckpointFiles, dtype: torch.dtype | None = None, names: Mapping[str, str] | None = None
) -> None:
    """Tensors of a checkpoint as one aligned file, streamed; floating ones converted if `dtype` is given.

    `names`: those that are written, each with the name that it has in `files` (default: all under their own).
    """
    of = names if names is not None else {name: name for name in files.names}

    def stored(name: str) -> torch.dtype:
        own = files.piece(of[name]).dtype
        return dtype if dtype is not None and own.is_floating_point else own

    def content(name: str) -> Iterator[bytes | memoryview]:
        own = files.piece(of[name]).dtype
        for chunk in files.chunks(of[name]):
            same = stored(name) == own
            yield chunk if same else raw_bytes(torch.frombuffer(bytearray(chunk), dtype=own).to(stored(name)))

    write_tensors(path, [(name, stored(name), files.piece(of[name]).shape) for name in sorted(of)], content)


def hash_weights(digest: hashlib._Hash, files: CheckpointFiles) -> None:
    """Feed names, types, shapes and bytes of the tensors, by name: independent of sharding and of the header."""
    for name in files.names:
        piece = files.piece(name)
        digest.update(json.dumps([name, DTYPE_NAMES[piece.dtype], list(piece.shape)]).encode() + b"\n")
        for chunk in files.chunks(name):
            digest.update(chunk)


def map_weights(path: Path) -> dict[str, Tensor]:
    """Tensors mapped from an aligned file, copy-on-write: pages are shared until written, and the file never
    changes."""
    files = CheckpointFiles.in_file(path)
    storage: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    tensors = {}
    for name in files.names:
        piece = files.piece(name)
        if piece.start % piece.dtype.itemsize:
            raise BaseModelError(f"{path}: {name} is not aligned; remove the file, it will be made again")
        strides = [math.prod(piece.shape[at + 1 :]) for at in range(len(piece.shape))]
        tensors[name] = torch.empty(0, dtype=piece.dtype).set_(
            storage, piece.start // piece.dtype.itemsize, piece.shape, strides
        )
    return tensors
