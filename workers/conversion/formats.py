"""Adapters from other formats and back; the commands are those of `python -m workers.convert`.

PEFT folders (`workers.conversion.peft`), full checkpoints (their difference from the base, sparsified; or base and
adapter joined into one) and dense differences. Tensors are read one at a time; a file is written only after every name
and shape has been checked. Training and merging are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError
from workers.adapters.older_readers import for_older_readers
from workers.adapters.support import LazyTensors, SparseTensor, rounded_sum
from workers.adapters.writer import AdapterMeta, AdapterReader, check_base, save_adapter
from workers.base.cache import cache_dir
from workers.base.layout import BaseLayout, read_layout
from workers.base.prepare import PreparedBase, prepare_base
from workers.conversion.companions import compare_companions, in_folder, leftovers
from workers.conversion.peft import other_base, read_peft
from workers.conversion.peft_writer import write_peft
from workers.masks.selection import best, budget
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles, small_files, weight_files
from workers.tensors.quantised import read_settings, refuse_quantised
from workers.tensors.source import FileSource
from workers.tensors.writer import raw_bytes, write_tensors


def from_peft(
    folder: Path, base: BaseLayout, out: Path, value_dtype: torch.dtype = torch.float32, names: Collection[str] = ()
) -> list[str]:
    """A PEFT LoRA or SHiRA folder as an adapter file. Returns what of the folder is ignored, one line each.

    ``names``: what the base is called, compared with what the folder says it was made for. ``AdapterError`` for what
    such a file cannot hold, ``BaseModelError`` for another tokenizer.
    """
    told = peft_notices(folder, str(folder), base, names)
    found = read_peft(folder, base)
    save_adapter(out, found.tensors, AdapterMeta(base.sha256, found.kind, found.info), value_dtype, head=found.head)
    return told + unchanged_notices(str(folder), found.unchanged)


def peft_notices(folder: Path, what: str, base: BaseLayout, names: Collection[str]) -> list[str]:
    """What a PEFT folder says of itself that does not go with the base, ``what`` named first. ``names`` as above."""
    said = list(compare_companions(what, in_folder(folder), in_folder(base.path)))
    if names and (other := other_base(folder, names)):
        said.append(f"{what}: says it was made for {other}, this base is {min(names, key=len)}; is that the same?")
    return said


def unchanged_notices(what: str, unchanged: Collection[str]) -> list[str]:
    """What to say of tensors of the base that a PEFT folder holds as they are."""
    return [f"{what}: {', '.join(unchanged)} equal the base's and are ignored"] if unchanged else []


def to_peft(file: Path, base: BaseLayout, folder: Path, rank: int | None = None) -> list[str]:
    """An adapter file as a PEFT folder, with ``rank`` as the nearest LoRA of that rank. Returns what to say of it.

    ``AdapterError`` for another base's, or one that PEFT cannot express.
    """
    reader = AdapterReader(FileSource(file))
    check_base(reader, base.sha256)
    said = write_peft(reader, base, folder, rank)
    return [f"{folder}: {said}"] if said else []


def from_checkpoint(
    folder: Path,
    base: BaseLayout,
    density: float,
    out: Path,
    every_tensor: bool = False,
    value_dtype: torch.dtype = torch.float32,
) -> list[str]:
    """The difference of a full checkpoint from ``base``, of each tensor the share ``density`` that differs most.
    Returns what of the checkpoint is ignored, one line each.

    Density 1 keeps every position (kind ``full``). Tensors that are equal are left out. Differences outside the linear
    layers' weights are refused unless ``every_tensor`` is set, so that none is lost unnoticed. Differences are taken in
    float64 and rounded once to fp32.

    Raises:
        TensorFileError: no sound checkpoint.
        BaseModelError: quantised, or other tensors, shapes or ids of tokens than the base's.
        AdapterError: a difference that is refused, or none at all.
    """
    _check_density(density)
    refuse_quantised(str(folder), read_settings(folder / "config.json"))
    theirs, ours = CheckpointFiles.in_folder(folder), CheckpointFiles.in_file(base.path / WEIGHTS)
    refuse_quantised(str(folder), {}, theirs)
    told = [*compare_companions(str(folder), in_folder(folder), in_folder(base.path)), *_leftovers(folder)]
    stands_for = theirs.stand_ins(ours)
    pairs = ((name, theirs.read(mine), ours.read(name)) for name, mine in stands_for.items())
    changed = [name for name, new, old in pairs if not torch.equal(new.double(), old.double())]
    if (others := [name for name in changed if name not in base.linear]) and not every_tensor:
        raise AdapterError(
            f"{folder}: {len(others)} tensors differ that are no linear layer's weight: {', '.join(others[:20])}; "
            "keep them with --all"
        )
    if not changed:
        raise AdapterError(f"{folder}: does not differ from the base, there is no adapter to make")

    def difference(name: str) -> SparseTensor:
        return keep_largest((theirs.read(stands_for[name]).double() - ours.read(name).double()).float(), density)

    _save_dense(out, changed, difference, base, {"source": "checkpoint", "density": density}, value_dtype)
    return told


def _leftovers(folder: Path) -> tuple[str, ...]:
    present = {path.name for path in folder.iterdir()}
    used = weight_files(str(folder), present, lambda name: (folder / name).read_bytes())
    return leftovers(str(folder), present, used)


def from_delta(
    file: Path, base: BaseLayout, density: float, out: Path, value_dtype: torch.dtype = torch.float32
) -> None:
    """A dense state dict of differences (parameter name to delta), sparsified as by :func:`from_checkpoint`.

    ``AdapterError`` for names and shapes that are not the base's.
    """
    _check_density(density)
    if not file.is_file():
        raise AdapterError(f"{file}: no such file")
    given = CheckpointFiles.in_file(file)
    for name in given.names:
        base.check_shape(name, given.piece(name).shape, str(file))
        if name not in given.floating:
            raise AdapterError(f"{file}: {name} is {given.piece(name).dtype}, a difference must be floating point")
    changed = [name for name in given.names if bool(given.read(name).any())]
    if not changed:
        raise AdapterError(f"{file}: every difference in it is zero, there is no adapter to make")

    def difference(name: str) -> SparseTensor:
        return keep_largest(given.read(name).float(), density)

    _save_dense(out, changed, difference, base, {"source": "delta", "density": density}, value_dtype)


def to_delta(file: Path, out: Path) -> None:
    """Every tensor's difference as dense fp32 in a safetensors file. A head is not part of it."""
    reader = AdapterReader(FileSource(file))
    rows = [(name, torch.float32, reader.shape(name)) for name in reader.names]
    write_tensors(out, rows, lambda name: [raw_bytes(_dense(reader.load(name)))])


def to_checkpoint(file: Path, base: BaseLayout, folder: Path) -> None:
    """Base and adapter joined into one checkpoint in the base's types, W := round(W + delta) on the support.

    ``AdapterError`` for another base's adapter, or one with a classification head (its base has no place for it).
    """
    reader = AdapterReader(FileSource(file))
    check_base(reader, base.sha256)
    if reader.head_names:
        raise AdapterError(
            f"{file}: has a classification head ({reader.head_names[0]}), which this base has no place for"
        )
    for name in reader.names:
        base.check_shape(name, reader.shape(name), str(file))
    weights = CheckpointFiles.in_file(base.path / WEIGHTS)

    def content(name: str) -> Iterable[bytes | memoryview]:
        if name not in reader.names:
            return weights.chunks(name)
        weight, delta = weights.read(name), reader.load(name)
        flat = weight.view(-1)
        flat[delta.indices] = rounded_sum(flat[delta.indices], delta.values)
        return [raw_bytes(weight)]

    folder.mkdir(parents=True, exist_ok=True)
    for kept in small_files(base.path):
        (folder / kept.name).write_bytes(for_older_readers(kept.name, kept.read_bytes()))
    pieces = {name: weights.piece(name) for name in weights.names}
    write_tensors(folder / WEIGHTS, [(name, piece.dtype, piece.shape) for name, piece in pieces.items()], content)


def keep_largest(delta: Tensor, density: float) -> SparseTensor:
    """The share ``density`` (at least one) of ``delta``'s positions with the largest absolute values, zeros left out.

    Equal values: the lower position first. Density 1 keeps every position, zeros included. ``delta``: fp32;
    ``AdapterError`` unless it is finite.
    """
    flat = delta.reshape(-1)
    shape = tuple(delta.shape)
    if not bool(torch.isfinite(flat).all()):
        raise AdapterError(f"a difference of shape {list(shape)} is not finite; the checkpoint is damaged or diverged")
    if density == 1:
        return SparseTensor(shape, torch.arange(flat.numel()), flat)
    kept = best(flat.abs(), budget(flat.numel(), density))
    kept = kept[flat[kept] != 0]
    return SparseTensor(shape, kept, flat[kept])


def _save_dense(
    out: Path,
    names: Sequence[str],
    difference: Callable[[str], SparseTensor],
    base: BaseLayout,
    info: dict[str, Any],
    value_dtype: torch.dtype,
) -> None:
    kind = "full" if info["density"] == 1 else "sparse"
    save_adapter(out, LazyTensors(names, difference), AdapterMeta(base.sha256, kind, info), value_dtype)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise AdapterError(f"density must be above 0 and at most 1, is {density}")


def _dense(tensor: SparseTensor) -> Tensor:
    """fp32, zero off the support."""
    flat = torch.zeros(tensor.numel).index_copy_(0, tensor.indices, tensor.values.float())
    return flat.view(tensor.shape)


# -- commands --
# Each returns what is to be told of what it read and wrote, one line each.


def _base(source: str) -> PreparedBase:
    """BaseModelError for one whose weights are quantised: nothing can be added to them."""
    base = prepare_base(source, cache_dir())
    refuse_quantised(
        f"base {source}", read_settings(base.path / "config.json"), CheckpointFiles.in_file(base.path / WEIGHTS)
    )
    return base


def convert_from_peft(folder: Path, source: str, out: Path, value_dtype: str) -> list[str]:
    """`from_peft` with the base and the type by name."""
    base = _base(source)
    return from_peft(folder, read_layout(base), out, getattr(torch, value_dtype), base_names(base, source))


def base_names(base: PreparedBase, source: str) -> set[str]:
    """What a base is called: by whoever cached these bytes first, and as it is given now."""
    return {base.name, source.partition(":")[2]}


def convert_to_peft(file: Path, source: str, out: Path, rank: int | None) -> list[str]:
    """`to_peft` with the base by name."""
    return to_peft(file, read_layout(_base(source)), out, rank)


def convert_from_checkpoint(
    folder: Path, source: str, density: float, out: Path, value_dtype: str, every_tensor: bool
) -> list[str]:
    """`from_checkpoint` with the base and the type by name."""
    return from_checkpoint(folder, read_layout(_base(source)), density, out, every_tensor, getattr(torch, value_dtype))


def convert_to_checkpoint(file: Path, source: str, out: Path) -> None:
    """`to_checkpoint` with the base by name."""
    to_checkpoint(file, read_layout(_base(source)), out)


def convert_from_delta(file: Path, source: str, density: float, out: Path, value_dtype: str) -> None:
    """`from_delta` with the base and the type by name."""
    from_delta(file, read_layout(_base(source)), density, out, getattr(torch, value_dtype))
