"""Task masks as files: what one task keeps of a merged δ, read together with it as one adapter."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import AdapterError, MergeError
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.files.task_mask import MaskWriter, write_task_mask
from merge.methods.per_task import task_mask, task_scale
from merge.methods.specs import Candidate
from merge.tree.reduce import flat_merge
from tests.merge.experts import BASE, SHAPES, children, load, make_experts
from workers.adapters.support import SparseTensor
from workers.adapters.task_mask import MaskedAdapter, MaskMeta, MaskReader, apply_mask
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.tensors.source import FileSource

SHA = "f" * 64


class Memory:
    """A byte source in memory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        return self.data[offset : offset + length]


def make(folder, method: str):
    """Three experts, their merge, and the first one's mask file."""
    paths = make_experts(folder, ["a", "b", "c"], skip="l1.v.weight")
    candidate = Candidate(method)
    flat_merge(children(paths), [candidate], lambda c: AdapterWriter(folder / "unified"))
    unified = AdapterDelta(FileSource(folder / "unified"), "unified")
    info = write_task_mask(folder / "mask", candidate, unified, AdapterDelta(FileSource(paths["a"]), "a"), SHA, "a")
    return paths, candidate, info


@pytest.mark.parametrize("method", ["emr", "tall"])
def test_a_masked_adapter_is_the_mask_of_the_merge(tmp_path, method):
    paths, candidate, info = make(tmp_path, method)
    unified, expert = load(tmp_path / "unified"), load(paths["a"])
    assert "l1.v.weight" in unified
    assert "l1.v.weight" not in expert
    none = SparseTensor((6, 10), torch.empty(0, dtype=torch.int64), torch.empty(0))
    masks = {n: task_mask(method, t, expert.get(n, none), candidate.params) for n, t in unified.items()}
    scale = task_scale(method, masks.values())
    reader = AdapterReader(FileSource(tmp_path / "unified"))
    masked = MaskedAdapter(reader, MaskReader(FileSource(tmp_path / "mask")), SHA)
    assert masked.names == reader.names == sorted(SHAPES)
    assert (masked.meta.base_sha256, masked.meta.info["task"], masked.head_names) == (BASE, "a", [])
    for name, tensor in unified.items():
        wanted, found = apply_mask(tensor, masks[name].bits, scale), masked.load(name)
        assert torch.equal(found.indices, wanted.indices)
        assert torch.equal(found.values, wanted.values)
        assert (masked.shape(name), masked.count(name)) == (tensor.shape, wanted.indices.numel())
        assert (masked.block(name), masked.low_rank(name)) == (None, None)
    assert info.scale == scale
    assert 0 < info.kept == sum(masked.count(name) for name in masked.names) < info.positions
    assert info.positions == sum(t.indices.numel() for t in unified.values())
    data = (tmp_path / "mask").read_bytes()
    assert info.bytes_written == len(data)
    make(tmp_path, method)
    assert (tmp_path / "mask").read_bytes() == data


def test_a_mask_of_another_merge_is_refused(tmp_path):
    paths, candidate, _ = make(tmp_path, "emr")
    mask = MaskReader(FileSource(tmp_path / "mask"))
    with pytest.raises(MergeError, match="is over the merged adapter ffff"):
        MaskedAdapter(AdapterReader(FileSource(tmp_path / "unified")), mask, "0" * 64)
    with pytest.raises(MergeError, match="tensors differ"):
        MaskedAdapter(AdapterReader(FileSource(paths["b"])), mask)
    unified = AdapterDelta(FileSource(tmp_path / "unified"), "unified")
    one = SparseTensor((2, 2), torch.arange(2), torch.ones(2))
    save_adapter(tmp_path / "shape", {"l0.v.weight": one}, AdapterMeta(BASE))
    save_adapter(tmp_path / "base", {"l0.v.weight": one}, AdapterMeta("c" * 64))
    for file, message in (("shape", r"has shape \[2, 2\] in expert 'x'"), ("base", "made for base cccc")):
        expert = AdapterDelta(FileSource(tmp_path / file), "x")
        with pytest.raises(MergeError, match=message):
            write_task_mask(tmp_path / "out", candidate, unified, expert, SHA, "x")
    with pytest.raises(MergeError, match="no task masks"):
        write_task_mask(tmp_path / "out", Candidate("mean"), unified, unified, SHA, "x")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


def small(path) -> bytes:
    with MaskWriter(path, MaskMeta("t", {"method": "emr", "params": {}}, BASE, SHA), {"a": 13, "b": 0}) as writer:
        assert writer.add("a", torch.arange(13) % 3 == 0) == 5
        writer.add("b", torch.zeros(0, dtype=torch.bool))
        writer.close(1.25)
    return path.read_bytes()


def test_the_writer_guards_what_it_stores(tmp_path):
    reader = MaskReader(Memory(small(tmp_path / "m")))
    assert (reader.scale, reader.positions("a"), reader.count("a"), reader.names) == (1.25, 13, 5, ["a", "b"])
    assert reader.load("a").tolist() == [at % 3 == 0 for at in range(13)]
    with pytest.raises(MergeError, match="no mask for"):
        reader.load("x")
    with MaskWriter(tmp_path / "n", MaskMeta("t", {}, BASE, SHA), {"a": 13}) as writer:
        for bits in (torch.zeros(12, dtype=torch.bool), torch.zeros(13)):
            with pytest.raises(MergeError, match="not bool over the unified support"):
                writer.add("a", bits)
        for scale in (float("nan"), -1.0, float("inf")):
            with pytest.raises(MergeError, match="scale"):
                writer.close(scale)
    assert not (tmp_path / "n").exists()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_corrupted_bytes_never_give_an_invalid_mask(tmp_path_factory, data):
    good = small(tmp_path_factory.getbasetemp() / "mask-fuzz")
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        reader = MaskReader(Memory(bytes(bad[: data.draw(st.sampled_from([len(bad), len(bad), len(bad) - 1, 40]))])))
        for name in reader.names:
            mask = reader.load(name)
            assert mask.dtype == torch.bool
            assert (mask.numel(), int(mask.sum())) == (reader.positions(name), reader.count(name))
        assert 0 <= reader.scale <= 1e30
    except (MergeError, AdapterError):
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": "2"},
        {"scale": "nan"},
        {"scale": "x"},
        {"candidate": "[]"},
        {"tensors": "[]"},
        {"tensors": '{"a": [13]}'},
        {"tensors": '{"a": [17, 5]}'},
        {"tensors": '{"a": [13, 6]}'},
        {"tensors": '{"a": [12, 5]}'},
        {"tensors": '{"c": [13, 5]}'},
        {"task": None},
    ],
)
def test_hostile_headers_are_refused(tmp_path, change):
    data = small(tmp_path / "m")
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"].update(change)
    text = json.dumps(header).encode()

    def read() -> None:
        MaskReader(Memory(struct.pack("<Q", len(text)) + text + data[8 + length :])).load("a")

    with pytest.raises(MergeError):
        read()
