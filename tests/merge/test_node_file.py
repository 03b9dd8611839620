"""Statistics files: round trip, deterministic bytes, one ranged read a tensor, and refusal of anything corrupted."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from infra.errors import AdapterError, MergeError
from merge.methods import LiftSpec, lift
from merge.node_file import NodeMeta, StatisticsReader, StatisticsWriter
from merge.statistics import STATISTICS, TensorStatistics, combine
from merge.stream_file import RangedReader, SafetensorsWriter
from workers.support import SparseTensor

SIGNED = LiftSpec(("positive_mass", "negative_mass", "positive_count", "negative_count", "zero_count"))
ALL = LiftSpec(tuple(STATISTICS))


class Memory:
    """A byte source that counts its reads."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(self.data)
        self.reads.append((offset, length))
        return self.data[offset : offset + length]


def joined(seed: int, shape: tuple[int, ...], density: float, experts: int, spec: LiftSpec) -> TensorStatistics:
    g = torch.Generator().manual_seed(seed)
    numel = int(torch.tensor(shape).prod())
    made = []
    for _ in range(experts):
        indices = (torch.rand(numel, generator=g) < density).nonzero().view(-1)
        values = torch.randint(-8, 9, (indices.numel(),), generator=g) / 64
        made.append(lift(SparseTensor(shape, indices, values), spec))
    return combine(made)


def write(path, tensors: dict[str, TensorStatistics], spec: LiftSpec, experts: int = 3) -> bytes:
    meta = NodeMeta(spec, "b" * 64, tuple(f"e{i}" for i in range(experts)))
    with StatisticsWriter(path, meta, {n: t.shape for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
    return path.read_bytes()


def check_same(a: TensorStatistics, b: TensorStatistics) -> None:
    assert (a.shape, a.experts) == (b.shape, b.experts)
    assert torch.equal(a.indices, b.indices)
    assert set(a.arrays) == set(b.arrays)
    for name in a.arrays:
        assert a.arrays[name].dtype == b.arrays[name].dtype, name
        assert torch.equal(a.arrays[name], b.arrays[name]), name


SPECS = [SIGNED, ALL, LiftSpec(("sum",)), LiftSpec(("zero_count",)), LiftSpec(("count", "sum"), 0.5)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("experts", [3, 300])
def test_round_trip(tmp_path, spec, experts):
    tensors = {
        "sparse.weight": joined(0, (30, 40), 0.001, experts, spec),
        "half.weight": joined(1, (30, 40), 0.3, experts, spec),
        "full.weight": joined(2, (7, 9), 1.0, experts, spec),
        "none.weight": joined(3, (7, 9), 0.0, experts, spec),
        'odd "name" é': joined(4, (5,), 0.5, experts, spec),
    }
    data = write(tmp_path / "node", tensors, spec, experts)
    assert data == write(tmp_path / "again", tensors, spec, experts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "node"]
    source = Memory(data)
    reader = StatisticsReader(source)
    assert reader.meta == NodeMeta(spec, "b" * 64, tuple(f"e{i}" for i in range(experts)))
    assert reader.names == sorted(tensors)
    for name, tensor in tensors.items():
        before = len(source.reads)
        assert (reader.shape(name), reader.count(name)) == (tensor.shape, tensor.indices.numel())
        check_same(reader.load(name), tensor)
        assert len(source.reads) - before <= 1


def test_the_safetensors_library_reads_it(tmp_path):
    write(tmp_path / "node", {"w": joined(1, (30, 40), 0.3, 3, SIGNED)}, SIGNED)
    with safe_open(tmp_path / "node", "pt") as file:
        assert "w#positive_mass" in file.keys()  # noqa: SIM118 - not a dict
        assert file.get_tensor("w#positive_mass").dtype == torch.float32


def test_masses_are_stored_where_their_count_is_not_zero(tmp_path):
    tensor = joined(1, (30, 40), 0.05, 3, SIGNED)
    write(tmp_path / "node", {"w": tensor}, SIGNED)
    with safe_open(tmp_path / "node", "pt") as file:
        stored = file.get_slice("w#positive_mass").get_shape()[0]
    assert stored == int((tensor.arrays["positive_count"] > 0).sum()) < tensor.indices.numel()


def test_an_error_leaves_no_file(tmp_path):
    meta = NodeMeta(SIGNED, "b" * 64, ("a",))
    other = joined(0, (5,), 1.0, 1, LiftSpec(("sum",)))
    writer = StatisticsWriter(tmp_path / "n", meta, {"w": (5,)})
    with writer, pytest.raises(MergeError, match="not those of the node"):
        writer.add("w", other)
    assert list(tmp_path.iterdir()) == []


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_corrupted_bytes_never_give_an_invalid_tensor(tmp_path_factory, data):
    tensors = {"a": joined(0, (6, 8), 0.3, 3, SIGNED), "b": joined(1, (4,), 1.0, 3, SIGNED)}
    good = write(tmp_path_factory.getbasetemp() / "fuzz", tensors, SIGNED)
    bad = bytearray(good)
    if data.draw(st.booleans()):
        bad = bad[: data.draw(st.integers(0, len(good) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            bad[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        reader = StatisticsReader(Memory(bytes(bad)))
        for name in reader.names:
            tensor = reader.load(name)
            assert tensor.indices.numel() == 0 or 0 <= int(tensor.indices[0]) <= int(tensor.indices[-1]) < tensor.numel
            assert all(a.numel() == tensor.indices.numel() for a in tensor.arrays.values())
    except (MergeError, AdapterError):
        pass


def rewrite(data: bytes, change) -> bytes:
    """The file with its header changed by `change(header)`."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def table(header, name, position, value):
    rows = json.loads(header["__metadata__"]["tensors"])
    rows[name][position] = value
    header["__metadata__"]["tensors"] = json.dumps(rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: table(h, "w", 0, [2**40]),
        lambda h: table(h, "w", 0, [2**40, 2**40]),
        lambda h: table(h, "w", 1, 2**40),
        lambda h: table(h, "w", 1, -1),
        lambda h: table(h, "w", 2, "dense"),
        lambda h: table(h, "w", 2, "unknown"),
        lambda h: table(h, "w", 3, 1),
        lambda h: table(h, "w", 3, 99),
        lambda h: h["w#support"].update(dtype="F64"),
        lambda h: h["w#support"].update(data_offsets=[0, 1]),
        lambda h: h["w#support"].update(data_offsets=[-1, 2]),
        lambda h: h.pop("w#positive_count"),
        lambda h: h["__metadata__"].update(format="other"),
        lambda h: h["__metadata__"].update(version="999"),
        lambda h: h["__metadata__"].update(lift="{}"),
        lambda h: h["__metadata__"].update(experts="[]"),
        lambda h: h["__metadata__"].pop("tensors"),
        lambda h: h["__metadata__"].update(tensors="["),
        lambda h: h.update(__metadata__=3),
    ],
)
def test_hostile_headers_are_refused(tmp_path, change):
    data = write(tmp_path / "node", {"w": joined(0, (30, 40), 0.2, 3, SIGNED)}, SIGNED)
    assert StatisticsReader(Memory(rewrite(data, lambda h: None))).load("w").experts == 3
    with pytest.raises((MergeError, AdapterError)):
        StatisticsReader(Memory(rewrite(data, change))).load("w")


def test_values_that_are_not_finite_are_refused(tmp_path):
    tensor = joined(0, (5,), 1.0, 3, LiftSpec(("sum",)))
    tensor.arrays["sum"][2] = float("inf")
    data = write(tmp_path / "node", {"w": tensor}, LiftSpec(("sum",)))
    with pytest.raises(MergeError, match="NaN or infinity"):
        StatisticsReader(Memory(data)).load("w")


def test_the_stream_writer_guards_its_header(tmp_path):
    with SafetensorsWriter(tmp_path / "f", 16) as writer:
        writer.write("w", torch.zeros(3))
        with pytest.raises(MergeError, match="does not fit"):
            writer.close({})
        with pytest.raises(MergeError, match="written twice"):
            writer.write("w", torch.zeros(3))
    assert list(tmp_path.iterdir()) == []
    with SafetensorsWriter(tmp_path / "f", 800) as writer:
        writer.write("w", torch.ones(2, 3, dtype=torch.bfloat16))
        writer.close({"a": "b"})
    reader = RangedReader(Memory((tmp_path / "f").read_bytes()), "f")
    assert reader.metadata == {"a": "b"}
    assert torch.equal(reader.read("w"), torch.ones(2, 3, dtype=torch.bfloat16))
    with pytest.raises(MergeError, match="no entry"):
        reader.read("x")
