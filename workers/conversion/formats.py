"""Adapters from other formats and back; the commands are those of `python -m workers.convert`.

PEFT folders (`workers.conversion.peft`), full checkpoints (their difference from the base, sparsified; or base and
adapter joined into one) and dense differences. Tensors are read one at a time; a file is written only after every name
and shape has been checked. Training and merging are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError
from workers.adapters.older_readers import for_older_readers
from workers.adapters.support import LazyTensors, SparseTensor
from workers.adapters.tensor_file import DTYPES, WEIGHTS, Entry, list_entries, read_chunks, write_tensors
from workers.adapters.writer import AdapterMeta, AdapterReader, FileSource, check_base, save_adapter
from workers.base.cache import cache_dir
from workers.base.layout import BaseLayout, read_layout
from workers.base.prepare import prepare_base
from workers.conversion.peft import read_peft, write_peft
from workers.masks.selection import best, budget
from workers.training.in_place import rounded_sum


def from_peft(folder: Path, base: BaseLayout, out: Path, value_dtype: torch.dtype = torch.float32) -> None:
    """A PEFT LoRA or SHiRA folder as an adapter file. ``AdapterError`` for what such a file cannot hold."""
    found = read_peft(folder, base)
    save_adapter(out, found.tensors, AdapterMeta(base.sha256, found.kind, found.info), value_dtype, head=found.head)


def to_peft(file: Path, base: BaseLayout, folder: Path) -> None:
    """An adapter file as a PEFT folder. ``AdapterError`` for another base's, or one that PEFT cannot express."""
    reader = AdapterReader(FileSource(file))
    check_base(reader, base.sha256)
    write_peft(reader, base, folder)


def from_checkpoint(
    folder: Path,
    base: BaseLayout,
    density: float,
    out: Path,
    every_tensor: bool = False,
    value_dtype: torch.dtype = torch.float32,
) -> None:
    """The difference of a full checkpoint from ``base``, of each tensor the share ``density`` that differs most.

    Density 1 keeps every position (kind ``full``). Tensors that are equal are left out. Differences outside the linear
    layers' weights are refused unless ``every_tensor`` is set, so that none is lost unnoticed. Differences are taken in
    float64 and rounded once to fp32.

    Raises:
        AdapterError: other tensors or shapes than the base's, a difference that is refused, or none at all.
    """
    _check_density(density)
    theirs = _checkpoint_entries(folder)
    ours = {entry.name: entry for entry in list_entries(base.path / WEIGHTS) if entry.floating}
    if missing := sorted(set(ours) - set(theirs)):
        raise AdapterError(f"{folder}: lacks {len(missing)} tensors of the base, {missing[0]} first")
    for name in sorted(set(theirs) - set(ours)):
        if not any(_same_bytes(theirs[name], theirs[other]) for other in ours):  # a tied weight, written out
            raise AdapterError(f"{folder}: holds {name}, which the base has not; is it a model of another kind?")
    for name in ours:
        base.check_shape(name, theirs[name].shape, str(folder))
    changed = [name for name in ours if not torch.equal(_read(theirs[name]).double(), _read(ours[name]).double())]
    if (others := [name for name in changed if name not in base.linear]) and not every_tensor:
        raise AdapterError(
            f"{folder}: {len(others)} tensors differ that are no linear layer's weight: {', '.join(others[:20])}; "
            "keep them with --all"
        )
    if not changed:
        raise AdapterError(f"{folder}: does not differ from the base, there is no adapter to make")

    def difference(name: str) -> SparseTensor:
        return keep_largest((_read(theirs[name]).double() - _read(ours[name]).double()).float(), density)

    _save_dense(out, changed, difference, base, {"source": "checkpoint", "density": density}, value_dtype)


def from_delta(
    file: Path, base: BaseLayout, density: float, out: Path, value_dtype: torch.dtype = torch.float32
) -> None:
    """A dense state dict of differences (parameter name to delta), sparsified as by :func:`from_checkpoint`.

    ``AdapterError`` for names and shapes that are not the base's.
    """
    _check_density(density)
    if not file.is_file():
        raise AdapterError(f"{file}: no such file")
    entries = {entry.name: entry for entry in list_entries(file)}
    for name, entry in entries.items():
        base.check_shape(name, entry.shape, str(file))
        if not entry.floating:
            raise AdapterError(f"{file}: {name} is {entry.dtype}, a difference must be floating point")
    changed = [name for name, entry in entries.items() if bool(_read(entry).any())]
    if not changed:
        raise AdapterError(f"{file}: every difference in it is zero, there is no adapter to make")

    def difference(name: str) -> SparseTensor:
        return keep_largest(_read(entries[name]).float(), density)

    _save_dense(out, changed, difference, base, {"source": "delta", "density": density}, value_dtype)


def to_delta(file: Path, out: Path) -> None:
    """Every tensor's difference as dense fp32 in a safetensors file. A head is not part of it."""
    reader = AdapterReader(FileSource(file))
    rows = [(name, "F32", reader.shape(name)) for name in reader.names]
    write_tensors(out, rows, lambda name: [_raw(_dense(reader.load(name)))])


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
    entries = {entry.name: entry for entry in list_entries(base.path / WEIGHTS)}

    def content(name: str) -> Iterable[bytes]:
        if name not in reader.names:
            return read_chunks(entries[name])
        weight, delta = _read(entries[name]), reader.load(name)
        flat = weight.view(-1)
        flat[delta.indices] = rounded_sum(flat[delta.indices], delta.values)
        return [_raw(weight)]

    folder.mkdir(parents=True, exist_ok=True)
    for kept in base.path.iterdir():
        if kept.suffix in (".json", ".jinja", ".txt", ".model") and kept.name != "identity.json":
            (folder / kept.name).write_bytes(for_older_readers(kept.name, kept.read_bytes()))
    write_tensors(folder / WEIGHTS, [(e.name, e.dtype, e.shape) for e in entries.values()], content)


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


def _checkpoint_entries(folder: Path) -> dict[str, Entry]:
    """Floating tensors of a checkpoint folder, sharded or not."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder; give one with model.safetensors")
    single = folder / WEIGHTS
    files = [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not files:
        raise AdapterError(f"{folder}: no model.safetensors and no shards of it; pickled weights are not accepted")
    return {entry.name: entry for file in files for entry in list_entries(file) if entry.floating}


def _same_bytes(one: Entry, other: Entry) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(a == b for a, b in zip(read_chunks(one), read_chunks(other), strict=True))


def _read(entry: Entry) -> Tensor:
    raw = bytearray(b"".join(read_chunks(entry)))
    dtype = DTYPES[entry.dtype]
    return torch.frombuffer(raw, dtype=dtype).view(entry.shape) if raw else torch.empty(entry.shape, dtype=dtype)


def _dense(tensor: SparseTensor) -> Tensor:
    """fp32, zero off the support."""
    flat = torch.zeros(tensor.numel).index_copy_(0, tensor.indices, tensor.values.float())
    return flat.view(tensor.shape)


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# -- commands --


def _layout(source: str) -> BaseLayout:
    return read_layout(prepare_base(source, cache_dir()))


def convert_from_peft(folder: Path, source: str, out: Path, value_dtype: str) -> None:
    """`from_peft` with the base and the type by name."""
    from_peft(folder, _layout(source), out, getattr(torch, value_dtype))


def convert_to_peft(file: Path, source: str, out: Path) -> None:
    """`to_peft` with the base by name."""
    to_peft(file, _layout(source), out)


def convert_from_checkpoint(
    folder: Path, source: str, density: float, out: Path, value_dtype: str, every_tensor: bool
) -> None:
    """`from_checkpoint` with the base and the type by name."""
    from_checkpoint(folder, _layout(source), density, out, every_tensor, getattr(torch, value_dtype))


def convert_to_checkpoint(file: Path, source: str, out: Path) -> None:
    """`to_checkpoint` with the base by name."""
    to_checkpoint(file, _layout(source), out)


def convert_from_delta(file: Path, source: str, density: float, out: Path, value_dtype: str) -> None:
    """`from_delta` with the base and the type by name."""
    from_delta(file, _layout(source), density, out, getattr(torch, value_dtype))
