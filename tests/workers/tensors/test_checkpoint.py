"""Checkpoint folders: which files count, what is no checkpoint, and which tensors stand for which of a base."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import BaseModelError, TensorFileError
from workers.tensors.checkpoint import CheckpointFiles, hash_weights, map_weights, write_weights
from workers.tensors.source import FileSource

A, B, TABLE, HEAD = "a.weight", "b.weight", "embed.weight", "head.weight"


def folder_of(folder: Path, files: dict[str, dict[str, float]], index: dict[str, str] | None = None) -> Path:
    """Vectors of one value each, by file and tensor."""
    folder.mkdir()
    for file, tensors in files.items():
        save_file({name: torch.full((2,), value) for name, value in tensors.items()}, folder / file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def values(folder: Path) -> dict[str, float]:
    files = CheckpointFiles.in_folder(folder)
    return {name: float(files.read(name)[0]) for name in files.names}


def shards(of: int, prefix: str = "model") -> list[str]:
    return [f"{prefix}-{number:05d}-of-{of:05d}.safetensors" for number in range(1, of + 1)]


def test_one_file_shards_and_what_an_earlier_save_left(tmp_path: Path) -> None:
    wanted = {A: 1.0, B: 2.0}
    assert values(folder_of(tmp_path / "one", {"model.safetensors": wanted, "other.safetensors": {A: 9}})) == wanted
    for prefix in ("model", "pytorch_model"):
        first, second = shards(2, prefix)
        old = dict(zip(shards(3), ({A: 9.0}, {B: 9.0}, {"c": 9.0}), strict=True))
        files = {first: {A: 1.0}, second: {B: 2.0}, **old}
        assert values(folder_of(tmp_path / prefix, files, {A: first, B: second})) == wanted
    assert values(folder_of(tmp_path / "bare", {"x.safetensors": {A: 1.0}, "y.safetensors": {B: 2.0}})) == wanted


def test_no_sound_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="no such folder"):
        CheckpointFiles.in_folder(tmp_path / "none")
    twice = folder_of(tmp_path / "twice", {shard: {A: 1.0} for shard in shards(2)})
    with pytest.raises(TensorFileError, match=f"two of its files hold {A}"):
        CheckpointFiles.in_folder(twice)
    folder = folder_of(tmp_path / "empty", {})
    with pytest.raises(TensorFileError, match="pickled weights are not accepted"):
        CheckpointFiles.in_folder(folder)
    with pytest.raises(TensorFileError, match="has no safetensors file"):
        CheckpointFiles([], "it")
    for text, message in (
        ("[", "no index"),
        ('{"weight_map": {"x": ["model"]}}', "no index"),
        ('{"weight_map": {"x": "../twice/model-00001-of-00002.safetensors"}}', "which is not there"),
        ('{"weight_map": {"x": "absent.safetensors"}}', "which is not there"),
    ):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(TensorFileError, match=message):
            CheckpointFiles.in_folder(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(TensorFileError, match="not a sound safetensors file"):
        CheckpointFiles.in_folder(folder)


def checkpoint(path: Path, tensors: dict[str, torch.Tensor]) -> CheckpointFiles:
    save_file(tensors, path)
    return CheckpointFiles.in_file(path)


def test_tied_tensors_may_be_written_out_on_one_side(tmp_path: Path) -> None:
    table = torch.arange(6.0).view(3, 2)
    tied = checkpoint(tmp_path / "tied", {TABLE: table, A: torch.ones(2)})
    written = checkpoint(tmp_path / "written", {TABLE: table, A: torch.ones(2), HEAD: table.clone()})
    assert tied.stand_ins(tied) == {A: A, TABLE: TABLE}
    assert written.stand_ins(tied) == {A: A, TABLE: TABLE}
    assert tied.stand_ins(written) == {A: A, TABLE: TABLE, HEAD: TABLE}
    other = checkpoint(tmp_path / "other", {TABLE: table, A: torch.ones(2), HEAD: table + 1})
    with pytest.raises(BaseModelError, match=f"holds {HEAD}, which the base has not"):
        other.stand_ins(tied)
    with pytest.raises(BaseModelError, match=f"lacks {HEAD} of the base"):
        tied.stand_ins(other)


def test_other_tensors_than_the_bases(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {A: torch.ones(2), "steps": torch.arange(3)})
    assert base.floating == [A]
    for tensors, message in (
        ({B: torch.ones(2)}, f"lacks {A}"),
        ({A: torch.ones(3)}, r"\[3\], the base's is \[2\]"),
        ({A: torch.ones(2, dtype=torch.int64)}, "is torch.int64"),
        ({A: torch.ones(2), B: torch.ones(2)}, f"holds {B}"),  # equal vectors need not be tied
    ):
        with pytest.raises(BaseModelError, match=message):
            checkpoint(tmp_path / "other", tensors).stand_ins(base)
    assert checkpoint(tmp_path / "more", {A: torch.ones(2), "more": torch.arange(4)}).stand_ins(base) == {A: A}


def test_rewritten_weights_can_be_mapped_and_have_the_same_hash(tmp_path: Path) -> None:
    odd = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.randn(4, 5), "c": torch.empty(0), "d": torch.tensor(2.0)}
    save_file({"a": odd["a"], "b": odd["b"]}, tmp_path / "1")
    save_file({"c": odd["c"], "d": odd["d"]}, tmp_path / "2")
    files = CheckpointFiles([FileSource(tmp_path / "1"), FileSource(tmp_path / "2")], "it")
    write_weights(tmp_path / "same", files)
    write_weights(tmp_path / "half", files, torch.float16)
    one, two = hashlib.sha256(), hashlib.sha256()
    hash_weights(one, files)
    hash_weights(two, CheckpointFiles.in_file(tmp_path / "same"))
    assert one.digest() == two.digest() != hashlib.sha256().digest()
    mapped = map_weights(tmp_path / "same")
    assert all(torch.equal(mapped[name], tensor) for name, tensor in odd.items())
    before = (tmp_path / "same").read_bytes()
    mapped["b"] += 1
    assert (tmp_path / "same").read_bytes() == before
    found = load_file(tmp_path / "half")
    assert all(torch.equal(found[name], t.half() if t.is_floating_point() else t) for name, t in odd.items())
