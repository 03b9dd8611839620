"""The adapter file: round trip, size, determinism, and hostile files."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import AdapterError
from workers.adapter import AdapterMeta, AdapterReader, FileSource, check_base, save_adapter
from workers.masks import random_indices
from workers.support import SparseTensor

META = AdapterMeta(base_sha256="ab" * 32, info={"task": "t", "density": 0.05})


class MemorySource:
    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        assert length <= len(self.data), "asked for more than the file holds"
        return self.data[offset : offset + length]


def sparse(shape: tuple[int, int], density: float, block: tuple[int, int] | None = None, seed: int = 0) -> SparseTensor:
    indices = random_indices(shape, density, seed, "w", block)
    return SparseTensor(shape, indices, torch.randn(indices.numel(), generator=torch.Generator().manual_seed(seed)))


def small_file(tmp_path: Path) -> bytes:
    tensors = {
        "a.weight": sparse((32, 48), 0.05),
        "b.weight": sparse((16, 16), 0.6),
        "c.weight": sparse((8, 8), 1.0),
        "d.weight": sparse((32, 32), 0.2, (4, 8)),
    }
    save_adapter(tmp_path / "x", {k: v for k, v in tensors.items() if k != "d.weight"}, META)
    return (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [None, (4, 8)])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, block: tuple[int, int] | None) -> None:
    tensors = {f"l{i}.weight": sparse((32, 64), d, block, i) for i, d in enumerate((0.02, 0.3, 1.0))}
    save_adapter(tmp_path / "a", tensors, META, dtype, block)
    reader = AdapterReader(FileSource(tmp_path / "a"))
    assert reader.meta == META
    assert reader.names == sorted(tensors)
    check_base(reader, META.base_sha256)
    for name, tensor in tensors.items():
        loaded = reader.load(name)
        assert reader.shape(name) == loaded.shape == tensor.shape
        assert reader.count(name) == tensor.indices.numel()
        assert torch.equal(loaded.indices, tensor.indices)
        assert torch.equal(loaded.values, tensor.values.to(dtype).float())
    assert reader.block("l0.weight") == block
    with pytest.raises(AdapterError, match="made for base abab"):
        check_base(reader, "cd" * 32)


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    tensors = {f"l{i}": sparse((32, 64), 0.1, None, i) for i in range(5)}
    save_adapter(tmp_path / "a", tensors, META)
    save_adapter(tmp_path / "b", dict(reversed(tensors.items())), META)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bytes_per_nonzero(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": sparse((1536, 576), 0.05, None, i) for i in range(4)}
    save_adapter(tmp_path / "a", tensors, META)
    count = sum(t.indices.numel() for t in tensors.values())
    assert (tmp_path / "a").stat().st_size / count <= 3.2
    block = {"w": sparse((1536, 576), 0.05, (16, 16))}
    save_adapter(tmp_path / "b", block, META, block=(16, 16))
    assert (tmp_path / "b").stat().st_size / block["w"].indices.numel() <= 2.05


def test_values_that_cannot_be_stored(tmp_path: Path) -> None:
    bad = SparseTensor((2, 2), torch.tensor([0]), torch.tensor([float("nan")]))
    with pytest.raises(AdapterError, match="not finite"):
        save_adapter(tmp_path / "a", {"w": bad}, META)
    with pytest.raises(AdapterError, match="JSON"):
        save_adapter(tmp_path / "a", {}, AdapterMeta("x", info={"a": float("inf")}))
    with pytest.raises(AdapterError, match="cannot read"):
        FileSource(tmp_path / "missing")


def read_all(data: bytes) -> None:
    reader = AdapterReader(MemorySource(data))
    for name in reader.names:
        tensor = reader.load(name)
        tensor.check(name)
        assert bool(torch.isfinite(tensor.values).all())


def rewrite(data: bytes, edit: object) -> bytes:
    """Apply ``edit(header, meta)`` to the decoded header and metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    meta = json.loads(header["__metadata__"]["adapter"])
    edit(header, meta)  # type: ignore[operator]
    header["__metadata__"]["adapter"] = json.dumps(meta)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_flipped_and_cut_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw = bytearray(small_file(tmp_path_factory.getbasetemp()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    try:
        read_all(bytes(raw[:cut]))
    except AdapterError:
        return


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=True), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@given(data=st.data(), value=JSON)
@settings(max_examples=200, deadline=None)
def test_json_of_the_wrong_shape(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: object) -> None:
    def edit(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
        spot = data.draw(st.sampled_from(["head", "meta", "entry", "table", "span"]))
        if spot == "head":
            header[data.draw(st.sampled_from([*header, "new"]))] = value
            header["__metadata__"] = header["__metadata__"] if isinstance(header["__metadata__"], dict) else {}
        elif spot == "meta":
            meta[data.draw(st.sampled_from(list(meta)))] = value
        elif spot == "table":
            meta["tensors"][data.draw(st.sampled_from([*meta["tensors"], "new"]))] = value
        else:
            rows = meta["tensors"] if spot == "entry" else {k: v for k, v in header.items() if k != "__metadata__"}
            row = rows[data.draw(st.sampled_from(list(rows)))]
            row[data.draw(st.sampled_from([*row, "block"]))] = value

    raw = rewrite(small_file(tmp_path_factory.getbasetemp()), edit)
    try:
        read_all(raw)
    except AdapterError:
        return


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 50_000) + b"[" * 50_000,
        struct.pack("<Q", 2**63) + b"{}",
    ],
)
def test_not_an_adapter(raw: bytes) -> None:
    with pytest.raises(AdapterError, match="adapter"):
        read_all(raw)


def overlapping(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    header["a.weight.support"]["data_offsets"] = [0, header["a.weight.support"]["shape"][0]]


def huge_count(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["tensors"]["c.weight"].update(count=2**40, shape=[2**20, 2**20])


def wrong_dtype(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    header["b.weight.support"]["dtype"] = "F64"


def smaller_tensor(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["tensors"]["a.weight"]["shape"] = [10, 10]


def future_version(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["format_version"] = 2


@pytest.mark.parametrize("edit", [overlapping, huge_count, wrong_dtype, smaller_tensor, future_version])
def test_contradicting_headers(tmp_path: Path, edit: object) -> None:
    with pytest.raises(AdapterError):
        read_all(rewrite(small_file(tmp_path), edit))
