"""Full checkpoints: as experts of a merge, and written so that transformers loads base + δ rounded once."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.errors import BaseModelError, MergeError
from infra.store.s3 import Store
from infra.store.source import StoreSource
from infra.store.writer import StoreTarget
from merge.files.checkpoint import BaseCheckpoint, CheckpointDelta
from merge.files.checkpoint_writer import CheckpointWriter, FolderTarget, write_checkpoint
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.files.sink import Outline, Tee
from merge.methods.specs import Candidate
from merge.tree.reduce import ExpertChild, flat_merge
from tests.merge.experts import load
from tests.workers.tiny import tiny_model, tiny_tokenizer
from workers.adapters.older_readers import for_older_readers
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, save_adapter
from workers.base.prepare import prepare_base, upload_base
from workers.tensors.checkpoint import CheckpointFiles
from workers.tensors.source import FileSource

SHA = "b" * 64
TABLE = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def write_base(folder: Path, tied: bool = True, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB") -> Path:
    """A tiny Llama with its tokenizer as a checkpoint folder."""
    tiny_model(tied).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def make_delta(path: Path, base: Path, density: float = 0.3, names: tuple[str, ...] = ()) -> Path:
    """A sparse adapter on some of a base's tensors, large enough to change bf16 weights."""
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for name, weight in tensors_of(base).items():
        if name in names or "proj" in name:
            held = (torch.rand(weight.numel(), generator=g) < density).nonzero().view(-1)
            tensors[name] = SparseTensor(tuple(weight.shape), held, torch.randn(held.numel(), generator=g) / 8)
    save_adapter(path, tensors, AdapterMeta(SHA), torch.float32)
    return path


def expected(base: Path, delta: Path, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """base + δ in fp32, rounded once."""
    found, merged = {}, load(delta)
    for name, weight in tensors_of(base).items():
        wide = weight.float().view(-1).clone()
        if name in merged:
            wide[merged[name].indices] += merged[name].values
        found[name] = wide.view(weight.shape).to(dtype or weight.dtype)
    return found


def export(base: Path, delta: Path, out: Path, dtype: torch.dtype | None = None, shard: int = 10**9):
    checkpoint = BaseCheckpoint.in_folder(base, SHA)
    return write_checkpoint(AdapterDelta(FileSource(delta), "d"), checkpoint, FolderTarget(out), dtype, shard)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard", [10**9, 9000])
def test_it_is_base_plus_delta_rounded_once_and_loads(tmp_path, dtype, stored, shard):
    base = write_base(tmp_path / "base", dtype=stored, shard="20KB")
    delta = make_delta(tmp_path / "delta", base, names=(TABLE, "model.norm.weight"))
    info = export(base, delta, tmp_path / "out", dtype, shard)
    wanted = expected(base, delta, dtype)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == (dtype or stored)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = model.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tiny_tokenizer())
    assert info.files == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert info.parameters == sum(tensor.numel() for tensor in wanted.values())
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.is_file() == (shard < 10**9)
    if index.is_file():
        placed = json.loads(index.read_text())["weight_map"]
        assert len(set(placed.values())) > 3
        for name, file in placed.items():
            with safe_open(tmp_path / "out" / file, "pt") as opened:
                assert name in opened.keys()  # noqa: SIM118 - not a dict
                assert opened.metadata() == {"format": "pt"}


def test_the_rounding_loss_is_that_of_the_stored_type(tmp_path):
    base = write_base(tmp_path / "base")
    delta = make_delta(tmp_path / "delta", base)
    merged, weights = load(delta), tensors_of(base)
    for dtype in (None, torch.float16, torch.float32):
        info = export(base, delta, tmp_path / str(dtype), dtype)
        lost = square = 0.0
        for name, tensor in merged.items():
            at = weights[name].view(-1)[tensor.indices].float()
            lost += float(
                (((at + tensor.values).to(dtype or torch.bfloat16).float() - at - tensor.values).double() ** 2).sum()
            )
            square += float((tensor.values.double() ** 2).sum())
        assert info.norm == pytest.approx(square**0.5)
        assert info.rounding_loss == pytest.approx((lost / square) ** 0.5, rel=1e-6)
        assert info.dtype == (str(dtype)[6:] if dtype else None)


def test_it_repeats_byte_for_byte_and_only_adds_what_older_readers_miss(tmp_path):
    base = write_base(tmp_path / "base")
    delta = make_delta(tmp_path / "delta", base)
    for out in ("one", "two"):
        export(base, delta, tmp_path / out, None, 9000)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    small = [file for file in base.iterdir() if not file.name.startswith("model")]
    assert small
    for file in small:
        assert (tmp_path / "one" / file.name).read_bytes() == for_older_readers(file.name, file.read_bytes())


def test_the_store_holds_the_same_bytes_as_a_folder(tmp_path, store: Store):
    prepared = prepare_base(f"path:{write_base(tmp_path / 'base')}", tmp_path / "cache")
    upload_base(store, prepared)
    delta = make_delta(tmp_path / "delta", prepared.path)
    export(prepared.path, delta, tmp_path / "out", torch.float32, 30_000)
    prefix = f"bases/{prepared.sha256}"
    index = json.loads(store.get(f"{prefix}/index.json")) | {"sha256": SHA}
    base = BaseCheckpoint.from_index(index, lambda name: StoreSource(store, f"{prefix}/{name}"))
    target = StoreTarget(store, "objects/x")
    info = write_checkpoint(AdapterDelta(FileSource(delta), "d"), base, target, torch.float32, 30_000)
    assert {name: ref.sha256 for name, ref in target.files.items()} == digests(tmp_path / "out")
    assert {name: ref.size for name, ref in target.files.items()} == info.files
    assert all(store.get(ref.name) == (tmp_path / "out" / name).read_bytes() for name, ref in target.files.items())


def test_a_tied_weight_that_is_written_out_follows_its_twin(tmp_path):
    """Loading ties it again; its old bytes would untie it."""
    base = write_base(tmp_path / "base")
    written = tensors_of(base)
    written[HEAD] = written[TABLE].clone()
    save_file(written, base / "model.safetensors", metadata={"format": "pt"})
    delta = make_delta(tmp_path / "delta", base, names=(TABLE,))
    export(base, delta, tmp_path / "out")
    assert HEAD not in tensors_of(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, expected(base, delta, None)[TABLE])
    untouched = make_delta(tmp_path / "untouched", base)
    export(base, untouched, tmp_path / "both")
    assert torch.equal(tensors_of(tmp_path / "both")[HEAD], written[TABLE])


def test_an_untied_head_has_its_own_delta(tmp_path):
    base = write_base(tmp_path / "base", tied=False)
    delta = make_delta(tmp_path / "delta", base, names=(HEAD,))
    export(base, delta, tmp_path / "out")
    wanted = expected(base, delta, None)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert not torch.equal(state[HEAD], state[TABLE])


def test_types_of_several_widths_stay_aligned(tmp_path):
    weights = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(5), "c": torch.arange(3), "d": torch.ones(0)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    tensor = SparseTensor((3,), torch.tensor([1]), torch.tensor([2.0]))
    save_adapter(tmp_path / "delta", {"a": tensor}, AdapterMeta(SHA))
    export(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == weights.keys()
    assert torch.equal(found["a"], torch.tensor([1, 3, 1]).bfloat16())
    assert all(torch.equal(found[name], weights[name]) for name in "bcd")


def test_misfits_are_refused_and_leave_nothing(tmp_path):
    base = write_base(tmp_path / "base")
    delta = make_delta(tmp_path / "delta", base)
    checkpoint = BaseCheckpoint.in_folder(base, SHA)
    out = tmp_path / "out"

    def refuse(message: str, outline: Outline) -> None:
        with pytest.raises(MergeError, match=message):
            CheckpointWriter(checkpoint, FolderTarget(out)).open(outline)

    refuse("made for base cccc", Outline("c" * 64, {}, {}))
    refuse("tensor x is missing", Outline(SHA, {"x": (2,)}, {}))
    refuse(r"the merge's is \[2, 3\]", Outline(SHA, {TABLE: (2, 3)}, {}))
    with pytest.raises(MergeError, match="float32, not"):
        CheckpointWriter(checkpoint, FolderTarget(out), torch.int8)
    with pytest.raises(MergeError, match="shards of 0 bytes"):
        CheckpointWriter(checkpoint, FolderTarget(out), None, 0)
    huge = SparseTensor((32,), torch.arange(32), torch.full((32,), 1e38))
    save_adapter(tmp_path / "huge", {"model.norm.weight": huge}, AdapterMeta(SHA), torch.float32)
    with pytest.raises(MergeError, match="not finite in"):
        export(base, tmp_path / "huge", out, torch.float16, 9000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "huge"]
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(MergeError, match="not empty"):
        export(base, delta, out)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_an_adapter_beside_a_checkpoint_that_cannot_be_finished_is_not_left(tmp_path):
    """The tensor that fails in fp16 is one without δ, copied when everything else is written."""
    (tmp_path / "base").mkdir()
    save_file({"a": torch.ones(4), "z": torch.full((4,), 1e30)}, tmp_path / "base" / "model.safetensors")
    tensor = SparseTensor((4,), torch.tensor([1]), torch.tensor([2.0]))
    save_adapter(tmp_path / "delta", {"a": tensor}, AdapterMeta(SHA))
    experts = [ExpertChild("d", AdapterDelta(FileSource(tmp_path / "delta"), "d"))]
    base = BaseCheckpoint.in_folder(tmp_path / "base", SHA)

    def merge(dtype: torch.dtype) -> None:
        sinks = [AdapterWriter(tmp_path / "merged"), CheckpointWriter(base, FolderTarget(tmp_path / "out"), dtype)]
        flat_merge(experts, [Candidate("mean")], lambda _: Tee(sinks), SHA)

    with pytest.raises(MergeError, match=r"z: not finite in torch\.float16"):
        merge(torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]
    merge(torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "merged", "out"]


def test_a_failed_export_to_the_store_leaves_nothing(tmp_path, store: Store):
    base = write_base(tmp_path / "base")
    huge = SparseTensor((32,), torch.arange(32), torch.full((32,), 1e38))
    save_adapter(tmp_path / "huge", {"model.norm.weight": huge}, AdapterMeta(SHA), torch.float32)
    checkpoint = BaseCheckpoint.in_folder(base, SHA)
    merged = AdapterDelta(FileSource(tmp_path / "huge"), "h")
    with pytest.raises(MergeError, match="not finite"):
        write_checkpoint(merged, checkpoint, StoreTarget(store, "out"), torch.float16, 9000)
    assert list(store.list()) == []


# -- as experts --------------------------------------------------------------------------------------------------


def fine_tune(base: Path, folder: Path, seed: int, dtype: torch.dtype, shard: str = "5GB") -> Path:
    """The base with every tensor moved by multiples of 1/16 that no type rounds, as a checkpoint folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-16, 17, parameter.shape, generator=g) / 16)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def round_base(base: Path) -> Path:
    """Its weights as multiples of 1/16."""
    weights = {name: (tensor.float() * 16).round() / 16 for name, tensor in tensors_of(base).items()}
    save_file({n: t.bfloat16() for n, t in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    return base


def test_full_checkpoints_merge_as_their_differences(tmp_path):
    base = round_base(write_base(tmp_path / "base"))
    kinds = {"a": (torch.float32, "5GB"), "b": (torch.bfloat16, "20KB"), "c": (torch.float16, "5GB")}
    shared = BaseCheckpoint.in_folder(base, SHA)
    experts = []
    deltas: list[dict[str, torch.Tensor]] = []
    for seed, (name, (dtype, shard)) in enumerate(kinds.items()):
        folder = fine_tune(base, tmp_path / name, seed, dtype, shard)
        experts.append(ExpertChild(name, CheckpointDelta(CheckpointFiles.in_folder(folder), shared, name)))
        theirs, ours = tensors_of(folder), tensors_of(base)
        deltas.append({key: theirs[key].float() - ours[key].float() for key in ours})
    mean, ties = Candidate("task_arithmetic", {"lambda": 0.5}), Candidate("ties")
    outs = {mean: tmp_path / "mean", ties: tmp_path / "ties"}
    infos = flat_merge(
        experts, list(outs), lambda c: AdapterWriter(outs[c]), SHA, FileSource(base / "model.safetensors")
    )
    assert infos[mean].density == 1
    for name, tensor in load(outs[mean]).items():
        assert torch.equal(tensor.values.view(tensor.shape), sum(d[name] for d in deltas) * 0.5)
    assert load(outs[mean]).keys() == tensors_of(base).keys()
    folder = tmp_path / "merged"
    sink = CheckpointWriter(shared, FolderTarget(folder))
    flat_merge(experts, [mean], lambda c: sink, SHA)
    assert all(torch.equal(t, expected(base, outs[mean], None)[n]) for n, t in tensors_of(folder).items())


def test_tied_tensors_may_be_written_out_on_one_side(tmp_path):
    base = write_base(tmp_path / "base")
    plain = fine_tune(base, tmp_path / "plain", 0, torch.float32)
    written = Path(shutil.copytree(plain, tmp_path / "written"))
    tensors = tensors_of(plain)
    save_file({**tensors, HEAD: tensors[TABLE].clone()}, written / "model.safetensors")
    wide = Path(shutil.copytree(base, tmp_path / "wide"))
    weights = tensors_of(base)
    save_file({**weights, HEAD: weights[TABLE].clone()}, wide / "model.safetensors")
    for checkpoint, against, names in ((written, base, weights.keys()), (plain, wide, weights.keys() | {HEAD})):
        delta = CheckpointDelta(CheckpointFiles.in_folder(checkpoint), BaseCheckpoint.in_folder(against, SHA), "e")
        assert delta.names == sorted(names)
        for name in names:
            own = TABLE if name == HEAD else name
            assert torch.equal(delta.load(name).values, (tensors[own] - weights[own].float()).view(-1))


def test_checkpoints_of_other_models_are_refused_before_reading(tmp_path):
    base = BaseCheckpoint.in_folder(write_base(tmp_path / "base"), SHA)
    good = tensors_of(tmp_path / "base")

    def check(message: str, change: dict[str, torch.Tensor | None]) -> None:
        folder = tmp_path / "other"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tensors = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(BaseModelError, match=message):
            CheckpointDelta(CheckpointFiles.in_folder(folder), base, "other")

    check("lacks model.norm.weight of the base", {"model.norm.weight": None})
    check(r"model.norm.weight is torch.float32 \[33\], the base's is \[32\]", {"model.norm.weight": torch.ones(33)})
    check("is torch.int64", {"model.norm.weight": torch.ones(32, dtype=torch.int64)})
    check("holds extra, which the base has not", {"extra": torch.ones(3)})
    with pytest.raises(MergeError, match="not the index of a stored base"):
        BaseCheckpoint.from_index({}, FileSource)
