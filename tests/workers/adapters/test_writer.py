"""The adapter file: round trip, size, determinism, and hostile files."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import AdapterError
from workers.adapters.format import MAX_LIFTED, MAX_SCALE
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, LowRank, check_base, save_adapter
from workers.masks.spec import random_indices
from workers.tensors.source import FileSource

META = AdapterMeta(base_sha256="ab" * 32, info={"task": "t", "density": 0.05})
OLDER = Path(__file__).parent / "data"


class MemorySource:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads = 0

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        assert length <= len(self.data), "asked for more than the file holds"
        self.reads += 1
        return self.data[offset : offset + length]


def sparse(shape: tuple[int, int], density: float, block: tuple[int, int] | None = None, seed: int = 0) -> SparseTensor:
    indices = random_indices(shape, density, seed, "w", block)
    return SparseTensor(shape, indices, torch.randn(indices.numel(), generator=torch.Generator().manual_seed(seed)))


def low_rank(shape: tuple[int, int], rank: int, seed: int = 0, scale: float = 0.5) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, shape[1], generator=g), torch.randn(shape[0], rank, generator=g), scale)


def small_file(folder: Path) -> bytes:
    """Every encoding, a low-rank tensor and a head."""
    tensors: dict[str, SparseTensor | LowRank] = {
        "a.weight": sparse((32, 48), 0.05),
        "b.weight": sparse((16, 16), 0.6),
        "c.weight": sparse((8, 8), 1.0),
        "d.weight": sparse((32, 32), 0.2, (4, 8)),
        "e.weight": low_rank((6, 8), 2),
    }
    head = {"score.weight": torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), "score.bias": torch.ones(2)}
    save_adapter(folder / "x", tensors, META, head=head, blocks={"d.weight": (4, 8)})
    return (folder / "x").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [None, (4, 8)])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, block: tuple[int, int] | None) -> None:
    tensors = {f"l{i}.weight": sparse((32, 64), d, block, i) for i, d in enumerate((0.02, 0.3, 1.0))}
    save_adapter(tmp_path / "a", tensors, META, dtype, blocks=dict.fromkeys(tensors, block) if block else None)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_rank_and_head_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"q.weight": low_rank((24, 40), 3), "v.weight": low_rank((8, 16), 20, 1, -2.0)}
    head = {"score.weight": torch.randn(3, 40), "scalar": torch.tensor(0.1)}
    save_adapter(tmp_path / "a", tensors, AdapterMeta("x", "lora"), dtype, head)
    source = MemorySource((tmp_path / "a").read_bytes())
    reader = AdapterReader(source)
    assert (reader.meta.kind, reader.meta.format_version) == ("lora", 2)
    assert reader.names == ["q.weight", "v.weight"]
    for name, tensor in tensors.items():
        stored = reader.low_rank(name)
        assert stored is not None
        assert torch.equal(stored.a, tensor.a.to(dtype).float())
        assert torch.equal(stored.b, tensor.b.to(dtype).float())
        assert stored.scale == tensor.scale
        lifted = reader.load(name)
        exact = (tensor.scale * (stored.b.double() @ stored.a.double())).float()
        assert torch.equal(lifted.indices, torch.arange(exact.numel()))
        assert torch.allclose(lifted.values, exact.view(-1), rtol=2**-23, atol=0)
        assert (reader.count(name), reader.shape(name), reader.block(name)) == (exact.numel(), exact.shape, None)
    assert reader.head_names == ["scalar", "score.weight"]
    assert all(torch.equal(reader.load_head(name), value) for name, value in head.items())
    with pytest.raises(AdapterError, match=r"no tensor 'score\.weight'"):
        reader.load("score.weight")
    with pytest.raises(AdapterError, match=r"no head tensor 'q\.weight'"):
        reader.load_head("q.weight")


def test_a_lift_in_several_chunks_is_the_whole_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = low_rank((37, 10), 4)
    whole = tensor.lift("w").values
    monkeypatch.setattr("workers.adapters.format._LIFT_CHUNK", 40)
    assert torch.allclose(tensor.lift("w").values, whole, rtol=2**-23, atol=0)


def test_header_once_then_one_read_for_each_stored_tensor(tmp_path: Path) -> None:
    source = MemorySource(small_file(tmp_path))
    reader = AdapterReader(source)
    assert source.reads == 2  # its length, itself
    for name in reader.names:
        reader.load(name)
    for name in reader.head_names:
        reader.load_head(name)
    assert source.reads == 2 + 5 + 2


def test_version_1_files_stay_readable() -> None:
    """Files of the version 1 writer; value of position i is (37 i mod 129 - 64) / 64."""
    expected = {
        "gap8.weight": ((8, 48), [3, 4, 300, 383]),
        "bitmap.weight": ((4, 16), list(range(0, 64, 2))),
        "dense.weight": ((4, 4), list(range(16))),
        "blocks.weight": ((16, 32), [row * 32 + column for row in range(8, 16) for column in range(16, 24)]),
    }
    seen = set()
    for file, dtype in (("adapter_v1.safetensors", torch.bfloat16), ("adapter_v1_blocks.safetensors", torch.float32)):
        reader = AdapterReader(FileSource(OLDER / file))
        assert reader.meta == AdapterMeta("ab" * 32, "sparse", {"task": "t"}, 1)
        assert reader.head_names == []
        for name in reader.names:
            shape, indices = expected[name]
            tensor = reader.load(name)
            assert tensor.shape == shape
            assert tensor.indices.tolist() == indices
            assert torch.equal(tensor.values, ((tensor.indices * 37 % 129 - 64) / 64).to(dtype).float())
            assert reader.low_rank(name) is None
            seen.add(name)
    assert seen == set(expected)
    assert reader.block("blocks.weight") == (8, 8)


def test_version_2_files_stay_readable() -> None:
    """A file of the version 2 writer: the same values as above, low-rank factors and a head; fp32 head, bf16 values."""
    reader = AdapterReader(FileSource(OLDER / "adapter_v2.safetensors"))
    assert reader.meta == AdapterMeta("ab" * 32, "sparse", {"task": "t"}, 2)

    def value(count: int) -> torch.Tensor:
        return (torch.arange(count) * 37 % 129 - 64) / 64

    expected = {
        "bitmap.weight": list(range(0, 64, 2)),
        "blocks.weight": [row * 32 + column for row in range(8, 16) for column in range(16, 24)],
        "dense.weight": list(range(16)),
        "gap8.weight": [3, 4, 300, 383],
    }
    for name, indices in expected.items():
        tensor = reader.load(name)
        assert tensor.indices.tolist() == indices
        assert torch.equal(tensor.values, value(512)[tensor.indices].bfloat16().float())
    assert reader.block("blocks.weight") == (8, 8)
    assert reader.names == sorted([*expected, "lora.weight"])
    factors = reader.low_rank("lora.weight")
    assert factors is not None
    assert factors.scale == 0.5
    assert torch.equal(factors.a.float(), value(12).view(2, 6).bfloat16().float())
    assert torch.equal(factors.b.float(), value(8).view(4, 2).bfloat16().float())
    assert torch.equal(reader.load_head("score.weight"), value(6).view(2, 3))
    assert torch.equal(reader.load_head("score.bias"), torch.ones(2))


def test_a_version_1_file_is_written_again_as_version_2(tmp_path: Path) -> None:
    old = AdapterReader(FileSource(OLDER / "adapter_v1.safetensors"))
    save_adapter(tmp_path / "a", {name: old.load(name) for name in old.names}, old.meta)
    new = AdapterReader(FileSource(tmp_path / "a"))
    assert new.meta.format_version == 2
    assert all(torch.equal(new.load(name).values, old.load(name).values) for name in old.names)


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    tensors: dict[str, SparseTensor | LowRank] = {f"l{i}": sparse((32, 64), 0.1, None, i) for i in range(5)}
    tensors["lora"] = low_rank((8, 8), 2)
    head = {"b": torch.ones(2), "a": torch.zeros(3)}
    save_adapter(tmp_path / "a", tensors, META, head=head)
    save_adapter(tmp_path / "b", dict(reversed(tensors.items())), META, head=dict(reversed(head.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    values, ids = torch.arange(8.0), torch.arange(4)
    tensors = {"a": SparseTensor((8,), ids, values[:4]), "b": SparseTensor((8,), ids, values[4:])}
    save_adapter(tmp_path / "a", tensors, META, torch.float32, {"h": values, "i": values})
    reader = AdapterReader(FileSource(tmp_path / "a"))
    assert torch.equal(reader.load("b").values, values[4:])
    assert torch.equal(reader.load_head("i"), values)


def test_bytes_per_nonzero(tmp_path: Path) -> None:
    shape = (576, 1536)
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": sparse(shape, 0.05, None, i) for i in range(4)}
    save_adapter(tmp_path / "a", tensors, META)
    count = sum(t.indices.numel() for t in tensors.values())
    assert (tmp_path / "a").stat().st_size / count <= 3.2


@pytest.mark.parametrize("unit", [(16, 16), (1, 1536), (576, 1)], ids=["block", "row", "column"])
def test_bytes_of_blocks_rows_and_columns(tmp_path: Path, unit: tuple[int, int]) -> None:
    tensor = sparse((576, 1536), 0.05, unit)
    save_adapter(tmp_path / "b", {"w": tensor}, META, blocks={"w": unit})
    assert (tmp_path / "b").stat().st_size / tensor.indices.numel() <= 2.05
    reader = AdapterReader(FileSource(tmp_path / "b"))
    assert reader.block("w") == unit
    assert torch.equal(reader.load("w").indices, tensor.indices)


def test_each_tensor_has_its_own_block(tmp_path: Path) -> None:
    tensors = {"a": sparse((16, 32), 0.25, (1, 32)), "b": sparse((16, 64), 0.25, (1, 64)), "c": sparse((16, 16), 0.1)}
    save_adapter(tmp_path / "a", tensors, META, blocks={"a": (1, 32), "b": (1, 64)})
    reader = AdapterReader(FileSource(tmp_path / "a"))
    assert [reader.block(name) for name in reader.names] == [(1, 32), (1, 64), None]
    assert all(torch.equal(reader.load(name).indices, tensor.indices) for name, tensor in tensors.items())
    with pytest.raises(AdapterError, match="c: its support is not a union of whole aligned 2x2 blocks"):
        save_adapter(tmp_path / "b", tensors, META, blocks={"c": (2, 2)})


def test_values_that_cannot_be_stored(tmp_path: Path) -> None:
    bad = SparseTensor((2, 2), torch.tensor([0]), torch.tensor([float("nan")]))
    with pytest.raises(AdapterError, match="not finite"):
        save_adapter(tmp_path / "a", {"w": bad}, META)
    with pytest.raises(AdapterError, match="JSON"):
        save_adapter(tmp_path / "a", {}, AdapterMeta("x", info={"a": float("inf")}))
    with pytest.raises(AdapterError, match="cannot read"):
        FileSource(tmp_path / "missing")
    with pytest.raises(AdapterError, match="cannot read"):
        AdapterReader(FileSource(tmp_path))
    good = sparse((4, 4), 0.5)
    with pytest.raises(AdapterError, match="kind"):
        save_adapter(tmp_path / "a", {"w": good}, AdapterMeta("x", kind="dora"))
    with pytest.raises(AdapterError, match="head"):
        save_adapter(tmp_path / "a", {"w": good}, META, head={"w": torch.ones(1)})
    with pytest.raises(AdapterError, match="h: a value is not finite"):
        save_adapter(tmp_path / "a", {"w": good}, META, head={"h": torch.tensor([float("inf")])})
    with pytest.raises(AdapterError, match="other"):
        save_adapter(tmp_path / "a", {"w": good}, META, blocks={"other": (1, 4)})


@pytest.mark.parametrize(
    ("a", "b", "scale"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), 1.0),
        (torch.ones(3), torch.ones(4, 3), 1.0),
        (torch.ones(0, 3), torch.ones(4, 0), 1.0),
        (torch.ones(1, 3), torch.full((4, 1), float("inf")), 1.0),
        (torch.ones(1, 3), torch.ones(4, 1), float("nan")),
        (torch.ones(1, 3), torch.ones(4, 1), 2 * MAX_SCALE),
        (torch.ones(1, 3, dtype=torch.int32), torch.ones(4, 1), 1.0),
        (torch.ones(1, 1).expand(1, 2**16), torch.ones(1, 1).expand(2**15 + 1, 1), 1.0),
    ],
)
def test_low_rank_tensors_that_cannot_be_stored(tmp_path: Path, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    with pytest.raises(AdapterError, match="w: "):
        save_adapter(tmp_path / "a", {"w": LowRank(a, b, scale)}, META)
    assert not (tmp_path / "a").exists()


def test_a_product_that_overflows_is_refused(tmp_path: Path) -> None:
    large = torch.full((1, 1), 3e38)
    save_adapter(tmp_path / "a", {"w": LowRank(large, large, 1.0)}, META)
    with pytest.raises(AdapterError, match="w: the product of its factors is not finite"):
        AdapterReader(FileSource(tmp_path / "a")).load("w")


def read_all(data: bytes) -> None:
    reader = AdapterReader(MemorySource(data))
    for name in reader.names:
        tensor = reader.load(name)
        tensor.check(name)
        assert bool(torch.isfinite(tensor.values).all())
        assert (tensor.shape, tensor.indices.numel()) == (reader.shape(name), reader.count(name))
    for name in reader.head_names:
        assert bool(torch.isfinite(reader.load_head(name)).all())


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
        spot = data.draw(st.sampled_from(["head", "meta", "entry", "table", "span", "classifier"]))
        if spot == "head":
            header[data.draw(st.sampled_from([*header, "new"]))] = value
            header["__metadata__"] = header["__metadata__"] if isinstance(header["__metadata__"], dict) else {}
        elif spot == "meta":
            meta[data.draw(st.sampled_from(list(meta)))] = value
        elif spot == "table":
            meta["tensors"][data.draw(st.sampled_from([*meta["tensors"], "new"]))] = value
        elif spot == "classifier":
            meta["head"][data.draw(st.sampled_from([*meta["head"], "new", "a.weight"]))] = value
        else:
            rows = meta["tensors"] if spot == "entry" else {k: v for k, v in header.items() if k != "__metadata__"}
            row = rows[data.draw(st.sampled_from(list(rows)))]
            row[data.draw(st.sampled_from([*row, "block", "rank", "scale"]))] = value

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
    meta["format_version"] = 3


def claimed_version_1(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["format_version"] = 1


def unknown_kind(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["kind"] = "magic"


def other_rank(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["tensors"]["e.weight"]["rank"] = 1


def other_shape(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["tensors"]["e.weight"]["shape"] = [8, 6]


def huge_scale(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["tensors"]["e.weight"]["scale"] = 10**400


def scale_not_a_number(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["tensors"]["e.weight"]["scale"] = float("nan")


def head_of_another_shape(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["head"]["score.weight"]["shape"] = [8, 2]


def head_missing(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    del meta["head"]["score.weight"]


def no_head_table(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    del meta["head"]


def low_rank_as_sparse(header: dict, meta: dict) -> None:  # type: ignore[type-arg]
    meta["tensors"]["e.weight"].update(encoding="dense", count=48)


CONTRADICTIONS = [
    overlapping, huge_count, wrong_dtype, smaller_tensor, future_version, claimed_version_1, unknown_kind, other_rank,
    other_shape, huge_scale, scale_not_a_number, head_of_another_shape, head_missing, no_head_table, low_rank_as_sparse,
]  # fmt: skip


@pytest.mark.parametrize("edit", CONTRADICTIONS)
def test_contradicting_headers(tmp_path: Path, edit: object) -> None:
    with pytest.raises(AdapterError):
        read_all(rewrite(small_file(tmp_path), edit))


def test_a_small_file_cannot_claim_a_huge_product() -> None:
    """Factors of a few hundred KB, all bytes present, whose product would take terabytes."""
    side = 2**20
    spans = {"w.lora_a": ([1, side], 0), "w.lora_b": ([side, 1], 2 * side)}
    table = {"w": {"shape": [side, side], "encoding": "lora", "rank": 1, "scale": 1.0}}
    meta = {"format_version": 2, "base_sha256": "x", "kind": "lora", "info": {}, "tensors": table, "head": {}}
    header: dict[str, object] = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * side]}
        for name, (shape, at) in spans.items()
    }
    header["__metadata__"] = {"adapter": json.dumps(meta)}
    text = json.dumps(header).encode()
    with pytest.raises(AdapterError, match=f"more than {MAX_LIFTED} elements"):
        AdapterReader(MemorySource(struct.pack("<Q", len(text)) + text + bytes(4 * side)))
