"""Importance files: what is written is read back, equal content gives equal bytes, and damage is an AdapterError."""

import json
import math
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from infra.errors import AdapterError
from workers.measuring.file import MeasuredOn, MeasurementWriter
from workers.measuring.fisher import FLOOR, FisherReader, FisherWriter
from workers.measuring.gram import GramReader, GramWriter
from workers.tensors.source import FileSource

META = MeasuredOn("a" * 64, "b" * 64, 7)


class Bytes:
    """A source in memory that counts its reads."""

    def __init__(self, data: bytes) -> None:
        self.data, self.reads = data, 0

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        return self.data[offset : offset + length]


def fisher_file(path: Path, values: dict[str, torch.Tensor]) -> bytes:
    with FisherWriter(path, META, list(values)) as writer:
        for name, tensor in values.items():
            writer.add(name, tensor)
        writer.close()
    return path.read_bytes()


def gram_file(path: Path, grams: dict[tuple[str, ...], torch.Tensor]) -> bytes:
    with GramWriter(path, META, [name for names in grams for name in names]) as writer:
        for names, gram in grams.items():
            writer.add(names, gram)
        writer.close()
    return path.read_bytes()


# -- what was written is read back --


def test_fisher_values_are_normalised_over_all_tensors(tmp_path: Path) -> None:
    values = {"x.weight": torch.tensor([3.0, 0.0]), "y.weight": torch.tensor([4.0, 2.0**-30]), "z": torch.empty(0)}
    raw = fisher_file(tmp_path / "f", values)
    assert raw == fisher_file(tmp_path / "g", values)
    source = Bytes(raw)
    reader = FisherReader(source)
    assert reader.meta == META
    assert reader.names == ["x.weight", "y.weight", "z"]
    assert reader.norm == 5.0
    assert [reader.count(name) for name in reader.names] == [2, 2, 0]
    source.reads = 0
    floor = torch.tensor(FLOOR).item()
    assert reader.load("x.weight").tolist() == [torch.tensor(0.6).item(), floor]
    assert source.reads == 1
    assert reader.load("y.weight").tolist() == [torch.tensor(0.8).item(), floor]
    assert reader.load("y.weight").dtype == torch.float32
    assert reader.load("z").tolist() == []
    with safe_open(tmp_path / "f", "pt") as other:  # the format's own library agrees
        assert torch.equal(other.get_tensor("x.weight"), values["x.weight"].bfloat16())


def test_no_gradient_at_all_is_the_floor_everywhere(tmp_path: Path) -> None:
    fisher_file(tmp_path / "f", {"x": torch.zeros(3)})
    assert FisherReader(FileSource(tmp_path / "f")).load("x").tolist() == [torch.tensor(FLOOR).item()] * 3


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e30])
def test_values_of_any_size_keep_their_proportions(tmp_path: Path, scale: float) -> None:
    fisher_file(tmp_path / "f", {"x": torch.tensor([1.0, 2.0]) * scale})
    found = FisherReader(FileSource(tmp_path / "f")).load("x")
    assert torch.allclose(found, torch.tensor([1.0, 2.0]) / math.sqrt(5), rtol=1e-2)


@settings(max_examples=30, deadline=None)
@given(sides=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_gram_matrices_come_back(tmp_path_factory: pytest.TempPathFactory, sides: list[int], seed: int) -> None:
    path = tmp_path_factory.mktemp("gram") / "g"
    torch.manual_seed(seed)
    grams = {}
    for at, side in enumerate(sides):
        x = torch.randint(-3, 4, (5, side)).float()
        grams[f"m{at}.q", f'm{at}."ü' + "k" * 300] = x.t() @ x
    gram_file(path, grams)
    reader = GramReader(FileSource(path))
    assert reader.meta == META
    assert reader.names == sorted(name for names in grams for name in names)
    for names, gram in grams.items():
        for name in names:
            assert reader.side(name) == gram.shape[0]
            assert torch.equal(reader.load(name), gram)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**16), st.sampled_from([1e-12, 1.0, 1e12]))
def test_means_come_back_in_half_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, side: int, seed: int, scale: float
) -> None:
    """Within what fp16 keeps of a correlation; roots of the diagonal as good as in fp32, of inputs of any size."""
    path = tmp_path_factory.mktemp("gram") / "g"
    torch.manual_seed(seed)
    x = torch.randn(5, side) * torch.logspace(0, -3, side) * scale
    x[:, side // 2] *= float(side % 2)  # an input that is never seen
    gram = x.t() @ x
    with GramWriter(path, META, ["q"], "gram_tokens") as writer:
        writer.add(["q"], gram)
        writer.close()
    found = GramReader(FileSource(path), "gram_tokens").load("q")
    assert torch.allclose(found.diagonal(), gram.diagonal(), rtol=1e-4, atol=0)
    roots = gram.diagonal().sqrt()
    assert bool(((found - gram).abs() <= 4e-4 * roots * roots[:, None]).all())
    assert torch.equal(found, found.t())
    with pytest.raises(AdapterError, match="a gram file of version 1 is needed"):
        GramReader(FileSource(path))


def test_hostile_means_are_refused_or_finite(tmp_path: Path) -> None:
    """Whatever numbers stand in a file of the right length."""
    for at in range(40):
        torch.manual_seed(at)
        path = tmp_path / str(at)
        writer = MeasurementWriter(path, "gram_tokens", META, ["q"])
        writer.add(["q"], torch.randint(-(2**15), 2**15, (10,), dtype=torch.int16).view(torch.float16))
        writer.close()
        reader = GramReader(FileSource(path), "gram_tokens")
        assert reader.side("q") == 3
        with suppress(AdapterError):
            assert bool(reader.load("q").isfinite().all())


def test_shared_matrices_are_stored_once(tmp_path: Path) -> None:
    one = len(gram_file(tmp_path / "1", {("q",): torch.eye(100)}))
    three = len(gram_file(tmp_path / "3", {("q", "k", "v"): torch.eye(100)}))
    assert three < one + 1500
    assert one < 100 * 101 // 2 * 4 + 1500


# -- what cannot be written --


def test_nothing_is_left_of_what_could_not_be_written(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for values in (torch.tensor([1.0, math.nan]), torch.tensor([1e39]).double(), torch.tensor([-1.0]), torch.eye(2)):
        with pytest.raises(AdapterError, match="x: Fisher values must be"):
            fisher_file(path, {"x": values})
    for gram in (torch.ones(2, 3), torch.full((2, 2), math.inf)):
        with pytest.raises(AdapterError, match="x: a Gram matrix must be"):
            gram_file(path, {("x",): gram})
    with pytest.raises(AdapterError, match="'x' is written twice"):
        gram_file(path, {("x", "y"): torch.eye(2), ("z", "x"): torch.eye(2)})
    with pytest.raises(AdapterError, match="no tensor"):
        fisher_file(path, {})
    assert list(tmp_path.iterdir()) == []


# -- damaged and hostile files --


def split(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["importance"]), raw[8 + length :]


def joined(header: dict[str, Any], content: Any, data: bytes) -> bytes:
    header["__metadata__"]["importance"] = content if isinstance(content, str) else json.dumps(content)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


Damage = Callable[[dict[str, Any], dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda h, c: c.update(format="adapter"), "a fisher file of version 1 is needed"),
        (lambda h, c: c.update(kind="gram"), "a fisher file of version 1 is needed"),
        (lambda h, c: c.update(version=True), "a fisher file of version 1 is needed"),
        (lambda h, c: c.update(version=2), "a fisher file of version 1 is needed"),
        (lambda h, c: c.update(base_sha256=3), "base, adapter or rows"),
        (lambda h, c: c.update(rows=0), "base, adapter or rows"),
        (lambda h, c: c.pop("norm"), "norm is no number"),
        (lambda h, c: c.update(norm=-1), "norm is no number"),
        (lambda h, c: c.update(norm=10**400), "norm is no number"),
        (lambda h, c: c.update(norm=math.nan), "norm is no number"),
        (lambda h, c: c.update(norm=0.5), "larger than the norm"),
        (lambda h, c: c.update(tensors=[]), "lists no tensors"),
        (lambda h, c: c.update(tensors={}), "lists no tensors"),
        (lambda h, c: c["tensors"].update(q=3), "q: its piece is missing"),
        (lambda h, c: c["tensors"].update(q={"piece": "?"}), "q: its piece is missing"),
        (lambda h, c: c["tensors"].pop("y"), "unexpected piece 'y'"),
        (lambda h, c: h["x"].update(dtype="F16"), "x: must be BF16"),
        (lambda h, c: h["x"].update(dtype=[]), "'x' is malformed or of an unsupported dtype"),
        (lambda h, c: h["x"].update(shape=[2, 1]), r"x: must be BF16 \[n\]"),
        (lambda h, c: h["x"].update(shape=[2**62]), "'x' does not fit"),
        (lambda h, c: h["x"].update(data_offsets=[4, 0]), "'x' does not fit"),
        (lambda h, c: h["x"].update(data_offsets=[0, True]), "'x' has sizes that are no integers"),
        (lambda h, c: h["x"].update(data_offsets=[2, 6]), "overlaps another or leaves a gap"),
        (lambda h, c: h.update(y=None), "'y' is malformed"),
        (lambda h, c: (h.pop("y"), c["tensors"].pop("y")), "2 bytes behind the last entry"),
    ],
)
def test_damaged_headers(tmp_path: Path, damage: Damage, message: str) -> None:
    raw = fisher_file(tmp_path / "f", {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0])})
    header, content, data = split(raw)
    damage(header, content)
    with pytest.raises(AdapterError, match=message):
        FisherReader(Bytes(joined(header, content, data))).load("x")


def test_damaged_bytes(tmp_path: Path) -> None:
    raw = fisher_file(tmp_path / "f", {"x": torch.tensor([1.0, 2.0])})
    with pytest.raises(AdapterError, match="no importance metadata"):
        FisherReader(Bytes(struct.pack("<Q", 2) + b"{}"))
    for damaged in (
        raw[:7],
        raw[:-1],
        raw + b"\0",
        struct.pack("<Q", 2**62) + raw[8:],
        raw[:8] + b"[" * 100 + raw[108:],
    ):
        with pytest.raises(AdapterError, match="damaged"):
            FisherReader(Bytes(damaged))
    for value in (math.nan, math.inf, -1.0):
        last = torch.tensor([value]).bfloat16().view(torch.uint8).numpy().tobytes()
        with pytest.raises(AdapterError, match="x: a value is"):
            FisherReader(Bytes(raw[:-2] + last)).load("x")
    header, content, data = split(raw)
    twice = json.dumps(content)[:-1] + ', "rows": 1}'
    with pytest.raises(AdapterError, match="not JSON"):
        FisherReader(Bytes(joined(header, twice, data)))
    with pytest.raises(AdapterError, match="holds no tensor 'y'"):
        FisherReader(Bytes(raw)).load("y")


def test_damaged_grams(tmp_path: Path) -> None:
    raw = gram_file(tmp_path / "g", {("x",): torch.eye(2)})
    with pytest.raises(AdapterError, match="a fisher file"):
        FisherReader(Bytes(raw))
    header, content, data = split(raw)
    header["x"].update(shape=[2], data_offsets=[0, 8])
    with pytest.raises(AdapterError, match="no triangle"):
        GramReader(Bytes(joined(header, content, data[:8])))
    with pytest.raises(AdapterError, match="diagonal"):
        GramReader(Bytes(raw[:-4] + struct.pack("<f", -1.0))).load("x")
    with pytest.raises(AdapterError, match="not finite"):
        GramReader(Bytes(raw[:-4] + struct.pack("<f", math.nan))).load("x")


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 700), bits=st.integers(1, 255))
def test_a_flipped_byte_never_crashes(tmp_path_factory: pytest.TempPathFactory, at: int, bits: int) -> None:
    path = tmp_path_factory.mktemp("flip")
    for raw, kind in (
        (fisher_file(path / "f", {"x": torch.tensor([1.0, 2.0])}), FisherReader),
        (gram_file(path / "g", {("x", "y"): torch.eye(3)}), GramReader),
    ):
        damaged = bytearray(raw)
        damaged[at % len(raw)] ^= bits
        try:
            reader = kind(Bytes(bytes(damaged)))
            for name in reader.names:
                assert bool(torch.isfinite(reader.load(name)).all())
        except AdapterError:
            pass
