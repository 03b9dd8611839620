"""Statistics files: round trip, deterministic bytes, one ranged read a tensor, and refusal of anything corrupted."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from infra.errors import AdapterError, MergeError, TensorFileError
from merge.files.node import NodeMeta, StatisticsReader, StatisticsWriter
from merge.methods.lift import LiftInput, lift
from merge.methods.specs import Candidate, LiftSpec
from merge.methods.statistics import TensorStatistics, combine
from workers.adapters.support import SparseTensor
from workers.tensors.header import DTYPES
from workers.tensors.reader import TensorReader, damaged
from workers.tensors.source import FileSource, ReadAhead
from workers.tensors.writer import TensorWriter

SIGNED = LiftSpec(("positive_mass", "negative_mass", "positive_count", "negative_count", "zero_count"))
ALL = LiftSpec((*SIGNED.statistics, "sum", "count", "square_sum", "positive_max", "negative_max"))
TRIMMED = LiftSpec(("count", "sum"), "trim", (("density", 0.5), ("density_of", "support")))
GRAM = LiftSpec(("gram", "gram_count", "gram_product", "sum"), options=(("off_diagonal", 0.5),))
OWN = LiftSpec(("own_regression", "sum"))
DIRECTIONS = LiftSpec(("directions", "sum"), options=(("rank_share", 0.25),))
WEIGHTED = LiftSpec(ALL.statistics, weights=tuple((f"e{i}", i / 64) for i in range(300)))
LATER = LiftSpec(
    ("agreement_count",), options=(("threshold", 0.4),), reference=Candidate("task_arithmetic", {"lambda": 1.0})
)


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
    for expert in range(experts):
        indices = (torch.rand(numel, generator=g) < density).nonzero().view(-1)
        values = torch.randint(-8, 9, (indices.numel(),), generator=g) / 64
        gram = None
        if len(shape) == 2 and spec.measurement and expert % 2:
            x = torch.randint(-2, 3, (4, shape[1]), generator=g).float()
            gram = x.T @ x
        tensor = SparseTensor(shape, indices, values)
        made.append(lift(LiftInput(tensor, "w", "e", spec.weight_of(f"e{expert}"), tensor, gram), spec))
    return combine(made)


def write(path, tensors: dict[str, TensorStatistics], spec: LiftSpec, experts: int = 3) -> bytes:
    meta = NodeMeta.of(spec, "b" * 64, [f"e{i}" for i in range(experts)])
    with StatisticsWriter(path, meta, {n: t.shape for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
    return path.read_bytes()


def check_same(a: TensorStatistics, b: TensorStatistics) -> None:
    assert (a.shape, a.experts, a.weighted) == (b.shape, b.experts, b.weighted)
    assert torch.equal(a.indices, b.indices)
    assert set(a.arrays) == set(b.arrays)
    for name in a.arrays:
        assert a.arrays[name].dtype == b.arrays[name].dtype, name
        assert torch.equal(a.arrays[name], b.arrays[name]), name


SPECS = [SIGNED, ALL, LiftSpec(("sum",)), LiftSpec(("zero_count",)), TRIMMED, GRAM, OWN, DIRECTIONS, WEIGHTED, LATER]
MANY = [spec for spec in SPECS if spec not in (OWN, DIRECTIONS)]
"""With counts of 16 bits, which those do not have."""


@pytest.mark.parametrize(("spec", "experts"), [*((s, 3) for s in SPECS), *((s, 300) for s in MANY)], ids=str)
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
    assert reader.meta == NodeMeta.of(spec, "b" * 64, [f"e{i}" for i in range(experts)])
    reader.meta.check(spec, "it")
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
    meta = NodeMeta.of(SIGNED, "b" * 64, ["a"])
    other = joined(0, (5,), 1.0, 1, LiftSpec(("sum",)))
    writer = StatisticsWriter(tmp_path / "n", meta, {"w": (5,)})
    with writer, pytest.raises(MergeError, match="not those of the node"):
        writer.add("w", other)
    signed = joined(0, (5,), 1.0, 1, SIGNED)
    writer = StatisticsWriter(tmp_path / "n", meta, {"w": (5,)})
    with writer, pytest.raises(MergeError, match="weighted and unweighted"):
        writer.add("w", TensorStatistics(signed.shape, signed.indices, signed.arrays, 1, weighted=True))
    assert list(tmp_path.iterdir()) == []


def test_masses_without_their_count_are_not_lost(tmp_path):
    """A weight can vanish in fp32 where the mass it gave does not."""
    tensor = joined(1, (30, 40), 0.3, 3, WEIGHTED)
    held = tensor.arrays["positive_mass"] > 0
    tensor.arrays["positive_count"][held.nonzero()[0]] = 0
    data = write(tmp_path / "node", {"w": tensor}, WEIGHTED)
    check_same(StatisticsReader(Memory(data)).load("w"), tensor)


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_corrupted_bytes_never_give_an_invalid_tensor(tmp_path_factory, data):
    spec = data.draw(st.sampled_from([SIGNED, GRAM, WEIGHTED]))
    tensors = {"a": joined(0, (6, 8), 0.3, 3, spec), "b": joined(1, (4,), 1.0, 3, spec)}
    good = write(tmp_path_factory.getbasetemp() / "fuzz", tensors, spec)
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
            for key, array in tensor.arrays.items():
                assert key == "gram" or key == "gram_count" or array.shape == tensor.indices.shape
                assert array.dtype != torch.float32 or bool(torch.isfinite(array).all())
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
        lambda h: h["__metadata__"].update(lift="3"),
        lambda h: h["__metadata__"].update(lift=h["__metadata__"]["lift"].replace("positive_mass", "positive_max")),
        lambda h: h["__metadata__"].update(lift=h["__metadata__"]["lift"].replace("false", "true")),
        lambda h: h["__metadata__"].update(reference="[]"),
        lambda h: h["__metadata__"].pop("reference"),
        lambda h: h.pop("w#positive_mass"),
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


@pytest.mark.parametrize("change", [{"shape": [10, 160]}, {"shape": [1600]}, {"dtype": "I32"}])
def test_hostile_matrices_are_refused(tmp_path, change):
    data = write(tmp_path / "node", {"w": joined(0, (30, 40), 0.2, 3, GRAM)}, GRAM)
    assert StatisticsReader(Memory(rewrite(data, lambda h: None))).load("w").arrays["gram"].shape == (40, 40)
    with pytest.raises(MergeError, match="gram of 'w'"):
        StatisticsReader(Memory(rewrite(data, lambda h: h["w#gram"].update(change)))).load("w")


def test_values_that_are_not_finite_are_refused(tmp_path):
    tensor = joined(0, (5,), 1.0, 3, LiftSpec(("sum",)))
    tensor.arrays["sum"][2] = float("inf")
    data = write(tmp_path / "node", {"w": tensor}, LiftSpec(("sum",)))
    with pytest.raises(MergeError, match="NaN or infinity"):
        StatisticsReader(Memory(data)).load("w")


def test_the_stream_writer_guards_its_header(tmp_path):
    with TensorWriter(tmp_path / "f", 16) as writer:
        writer.write("w", torch.zeros(3))
        with pytest.raises(TensorFileError, match="does not fit"):
            writer.close({})
        with pytest.raises(TensorFileError, match="written twice"):
            writer.write("w", torch.zeros(3))
    assert list(tmp_path.iterdir()) == []
    with TensorWriter(tmp_path / "f", 800) as writer:
        writer.write("w", torch.ones(2, 3, dtype=torch.bfloat16))
        writer.close({"a": "b"})
    for source in (Memory((tmp_path / "f").read_bytes()), FileSource(tmp_path / "f")):
        reader = TensorReader(source, damaged("f"))
        assert torch.equal(reader.read("w"), torch.ones(2, 3, dtype=torch.bfloat16))
        piece = reader.piece("w")
        data = b"".join(reader.chunks(piece.start, piece.end))
        assert data == torch.ones(6).bfloat16().view(torch.uint8).numpy().tobytes()
    assert reader.metadata == {"a": "b"}
    assert torch.equal(reader.read("w"), torch.ones(2, 3, dtype=torch.bfloat16))
    with pytest.raises(MergeError, match="no entry"):
        reader.read("x")


def test_pieces_that_lie_unaligned_are_read(tmp_path):
    pieces = {f"x{n}": torch.arange(3).to(dtype) for n, dtype in enumerate(DTYPES.values())}
    pieces["a"] = torch.zeros(1, dtype=torch.uint8)
    with TensorWriter(tmp_path / "f", 4000) as writer:
        for name, tensor in sorted(pieces.items()):
            writer.write(name, tensor)
        writer.close({})
    found = TensorReader(FileSource(tmp_path / "f"), damaged("f")).read_many(list(pieces))
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in pieces.items()
    )


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    with TensorWriter(tmp_path / "f", 800) as writer:
        writer.write("w", torch.ones(100))
        writer.close({})
    reader = TensorReader(FileSource(tmp_path / "f"), damaged("f"))
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-10])
    with pytest.raises(MergeError, match="asked for 400 bytes, got 390"):
        reader.read("w")
    with pytest.raises(MergeError, match="ends at byte"):
        list(reader.chunks(reader.piece("w").start, reader.piece("w").end))


class _Counting:
    """A source that notes what is read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size, self.reads = data, len(data), []

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        self.reads.append((offset, length))
        return self.data[offset : offset + length]


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=12), st.integers(1, 40))
def test_reading_ahead_gives_the_same_bytes(ranges, block):
    source = _Counting(bytes(range(100)))
    ahead = ReadAhead(source, block)
    for start, end in ranges:
        start, end = min(start, end), max(start, end)
        assert ahead.read(start, end - start) == source.data[start:end]


def test_reading_ahead_fetches_blocks():
    source = _Counting(bytes(100))
    ahead = ReadAhead(source, 30)
    for at in range(0, 100, 10):
        ahead.read(at, 10)
    assert source.reads == [(0, 30), (30, 30), (60, 30), (90, 10)]
