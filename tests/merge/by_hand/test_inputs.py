"""Sources of a merge by hand: what each is recognised as, and what is refused from headers alone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infra.artifacts.manifests import Recipe, publish
from infra.errors import AdapterError, BaseModelError, ConfigError, FactoryError, MergeError, TensorFileError
from infra.store.s3 import Store
from merge.by_hand.checks import Checked, check, fingerprint
from merge.by_hand.inputs import Expert, find_experts, hash_experts, locate_experts, open_checkpoint
from merge.by_hand.outputs import output, prepare
from merge.by_hand.request import MergeRequest, read_request
from merge.by_hand.sources import locate, name_experts, split_expert
from merge.commands import main
from merge.files.checkpoint import BaseCheckpoint
from tests.e2e.conftest import write_tiny_base
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.base.cache import cache_dir
from workers.base.layout import read_layout
from workers.base.prepare import PreparedBase, prepare_base
from workers.conversion.formats import from_checkpoint
from workers.measuring.catalogue import MEASUREMENTS
from workers.measuring.file import MeasuredOn
from workers.measuring.fisher import FisherWriter
from workers.measuring.gram import GramWriter
from workers.tensors.source import FileSource

Q = "model.layers.0.self_attn.q_proj.weight"
V = "model.layers.1.self_attn.v_proj.weight"
TABLE = "model.embed_tokens.weight"
SHAPES = {Q: (64, 64), V: (32, 64)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a tiny base, with a cache of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FACTORY_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield write_tiny_base(tmp_path_factory.mktemp("base") / "model")
    patch.undo()


@pytest.fixture(scope="module")
def base(model: Path) -> PreparedBase:
    return prepare_base(f"path:{model}", cache_dir())


def delta(seed: int, names: tuple[str, ...] = (Q, V), kept: int = 40) -> dict[str, SparseTensor]:
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        numel = SHAPES[name][0] * SHAPES[name][1]
        indices = torch.randperm(numel, generator=g)[:kept].sort().values
        found[name] = SparseTensor(SHAPES[name], indices, torch.randint(-8, 9, (kept,), generator=g) / 64)
    return found


def adapter(file: Path, base: PreparedBase, seed: int = 0, **fields: Any) -> Path:
    meta = {"base_sha256": base.sha256, "kind": "sparse", "info": {}} | fields
    save_adapter(file, delta(seed), AdapterMeta(**meta))
    return file


def experts(tmp_path: Path, base: PreparedBase, count: int = 2) -> dict[str, str]:
    return {f"e{at}": str(adapter(tmp_path / f"e{at}.safetensors", base, at)) for at in range(count)}


def read_experts(sources: dict[str, str], base: PreparedBase, scratch: Path) -> list[Expert]:
    return find_experts(locate_experts(sources), base, scratch)


def request(model: Path, experts: dict[str, str], tmp_path: Path, **fields: Any) -> MergeRequest:
    given = {"base": f"path:{model}", "method": "mean", "experts": experts, "out": str(tmp_path / "out.safetensors")}
    return MergeRequest(**(given | fields))


def checked(*arguments: Any, **fields: Any) -> Checked:
    scratch = arguments[2] / "scratch"
    return fingerprint(check(request(*arguments, **fields), scratch))


@pytest.fixture
def no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(AdapterReader, "load", refuse)
    monkeypatch.setattr("workers.conversion.peft.read_peft", refuse)


# -- names and kinds --


def test_names_of_sources(tmp_path: Path) -> None:
    key = "a" * 64
    assert split_expert("piqa=/x/file.safetensors") == ("piqa", "/x/file.safetensors")
    assert split_expert("/runs/lr=3/e.safetensors") == ("e", "/runs/lr=3/e.safetensors")
    assert split_expert("s3://bucket/a=b/qa.safetensors") == ("qa", "s3://bucket/a=b/qa.safetensors")
    assert split_expert(f"s3://bucket/p/objects/{key}/1/adapter") == (
        "a" * 12,
        f"s3://bucket/p/objects/{key}/1/adapter",
    )
    assert split_expert("models:/quick.piqa@champion") == ("quick.piqa", "models:/quick.piqa@champion")
    assert split_expert("checkpoints/qa/") == ("qa", "checkpoints/qa/")
    assert name_experts(["a=x", "y/b.safetensors"]) == {"a": "x", "b": "y/b.safetensors"}


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"two experts are named 'e'.*NAME=SOURCE"):
        name_experts(["x/e.safetensors", "y/e.safetensors"])


@pytest.mark.parametrize("source", ["nowhere.safetensors", "ftp://host/e", "models:/only-a-name", "hub:a b", "."])
def test_an_unknown_source_lists_what_is_accepted(source: str) -> None:
    with pytest.raises(ConfigError, match=r"PEFT|models:/<name>/<version>"):
        locate(source)


def test_local_sources(tmp_path: Path, base: PreparedBase, model: Path) -> None:
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    file = adapter(tmp_path / "e.safetensors", base)
    assert [locate(str(source)).kind for source in (file, tmp_path / "lora", model)] == [
        "adapter",
        "peft",
        "checkpoint",
    ]
    found = read_experts({"file": str(file), "lora": str(tmp_path / "lora"), "all": str(model)}, base, tmp_path)
    counts = {expert.name: sum(expert.counts.values()) for expert in found}
    weights = load_file(model / "model.safetensors")
    assert counts == {"file": 80, "lora": 2 * 64 * 64, "all": sum(w.numel() for w in weights.values())}


def test_sharded_checkpoint(tmp_path: Path, base: PreparedBase, model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    (expert,) = read_experts({"sharded": str(tmp_path / "sharded")}, base, tmp_path)
    assert expert.shapes == {n: tuple(w.shape) for n, w in load_file(model / "model.safetensors").items()}
    shard = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(TensorFileError, match=f"{shard.name} missing"):
        read_experts({"sharded": str(tmp_path / "sharded")}, base, tmp_path)


@pytest.mark.parametrize("case", ["pytorch_model", "leftovers", "head written out in the base", "and in both"])
def test_conversion_reads_the_same_checkpoint(case: str, tmp_path: Path, base: PreparedBase, model: Path) -> None:
    """Folders that one of the two refused or read wrongly: the difference is what `from-checkpoint` makes of it."""
    weights = load_file(model / "model.safetensors")
    tuned = {name: tensor + 0.5 if name in (Q, TABLE) else tensor for name, tensor in weights.items()}
    folder = shutil.copytree(model, tmp_path / "tuned")
    (folder / "model.safetensors").unlink()
    if case.startswith(("head", "and")):
        written = shutil.copytree(model, tmp_path / "written")
        save_file(weights | {"lm_head.weight": weights[TABLE].clone()}, written / "model.safetensors")
        base = prepare_base(f"path:{written}", tmp_path / "cache")
    if case == "and in both":
        tuned["lm_head.weight"] = tuned[TABLE].clone()
    prefix = "pytorch_model" if case == "pytorch_model" else "model"
    shards = {f"{prefix}-0000{at + 1}-of-00002.safetensors": sorted(tuned)[at::2] for at in range(2)}
    for shard, names in shards.items():
        save_file({name: tuned[name] for name in names}, folder / shard)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if case == "leftovers":
        save_file({name: tensor + 9 for name, tensor in tuned.items()}, folder / "model-00001-of-00003.safetensors")
    from_checkpoint(folder, read_layout(base), 1.0, tmp_path / "converted", every_tensor=True)
    converted = AdapterReader(FileSource(tmp_path / "converted"))
    (expert,) = find_experts(locate_experts({"tuned": str(folder)}), base, tmp_path)
    merged = open_checkpoint("tuned", expert.place, BaseCheckpoint.in_folder(base.path, base.sha256))
    heads = {"lm_head.weight"} & set(merged.names)
    assert set(converted.names) == {Q, TABLE} | heads == {n for n in merged.names if merged.load(n).values.any()}
    assert bool(heads) == case.startswith(("head", "and"))
    for name in converted.names:
        assert torch.equal(converted.load(name).values, merged.load(name).values)
        assert torch.allclose(merged.load(name).values, torch.tensor(0.5), atol=1e-3)


def test_sources_in_s3(tmp_path: Path, base: PreparedBase, model: Path, store: Store) -> None:
    file = adapter(tmp_path / "e.safetensors", base)
    store.upload_file("adapters/e.safetensors", file)
    manifest, _ = publish(store, Recipe("expert", 1, {}), {"adapter": adapter(tmp_path / "f", base, 1)}, {}, {})
    for name in ("config.json", "model.safetensors"):
        store.upload_file(f"models/full/{name}", model / name)
    sources = {
        "plain": store.uri("adapters/e.safetensors"),
        "artifact": store.uri(manifest.files["adapter"].name),
        "full": store.uri("models/full/"),
    }
    found = {expert.name: expert for expert in hash_experts(read_experts(sources, base, tmp_path))}
    assert {name: expert.place.kind for name, expert in found.items()} == {
        "plain": "adapter", "artifact": "adapter", "full": "checkpoint",
    }  # fmt: skip
    (local,) = hash_experts(read_experts({"e": str(file)}, base, tmp_path))
    assert found["plain"].sha256 == local.sha256
    assert found["artifact"].place.sha256 == manifest.files["adapter"].sha256, "known without reading the file"
    with pytest.raises(ConfigError, match="no such object"):
        locate(store.uri("adapters/none"))


# -- what does not fit --


@pytest.mark.usefixtures("no_tensor_is_read")
class TestRefused:
    def test_another_base(self, tmp_path: Path, base: PreparedBase, model: Path) -> None:
        given = experts(tmp_path, base) | {"odd": str(adapter(tmp_path / "odd", base, 2, base_sha256="1" * 64))}
        with pytest.raises(MergeError, match=rf"'odd'.*base 111111111111….*is {base.sha256[:12]}…"):
            checked(model, given, tmp_path)

    def test_unknown_tensor_and_other_shape(self, tmp_path: Path, base: PreparedBase, model: Path) -> None:
        one = SparseTensor((4, 4), torch.tensor([1]), torch.ones(1))
        for name, told in ((Q, r"shape \[4, 4\], the base's is \[64, 64\]"), ("lm.other", "base has no such tensor")):
            save_adapter(tmp_path / "odd", {name: one}, AdapterMeta(base.sha256))
            with pytest.raises(AdapterError, match=rf"expert 'odd'.*{told}"):
                checked(model, {"odd": str(tmp_path / "odd")}, tmp_path)

    def test_checkpoint_of_another_model(self, tmp_path: Path, base: PreparedBase, model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        folder = tmp_path / "other"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({n: w for n, w in weights.items() if n != Q}, folder / "model.safetensors")
        with pytest.raises(BaseModelError, match=rf"expert 'other'.*lacks {Q} of the base"):
            checked(model, {"other": str(folder)}, tmp_path)
        save_file(weights | {Q: torch.zeros(2, 2)}, folder / "model.safetensors")
        with pytest.raises(BaseModelError, match=r"expert 'other'.*\[2, 2\], the base's is \[64, 64\]"):
            checked(model, {"other": str(folder)}, tmp_path)

    def test_damaged_file(self, tmp_path: Path, base: PreparedBase, model: Path) -> None:
        (tmp_path / "odd").write_bytes(b"not safetensors at all")
        with pytest.raises(AdapterError, match="expert 'odd'"):
            checked(model, {"odd": str(tmp_path / "odd")}, tmp_path)

    def test_the_same_expert_twice(self, tmp_path: Path, base: PreparedBase, model: Path) -> None:
        file = adapter(tmp_path / "e.safetensors", base)
        (tmp_path / "link").symlink_to(file)
        (tmp_path / "copy").write_bytes(file.read_bytes())
        for other in ("link", "copy"):
            with pytest.raises(MergeError, match=r"'a' and 'b' are the same one"):
                checked(model, {"a": str(file), "b": str(tmp_path / other)}, tmp_path)

    def test_positions_only(self, tmp_path: Path, base: PreparedBase, model: Path) -> None:
        with pytest.raises(MergeError, match="positions only"):
            checked(model, {"odd": str(adapter(tmp_path / "odd", base, kind="support"))}, tmp_path)

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"method": "tise"}, "unknown merge method 'tise'; did you mean 'ties'"),
            ({"method": "ties", "params": {"densty": 0.5}}, "no parameter 'densty'; did you mean 'density'"),
            ({"method": "ties", "params": {"density": "1.5"}}, r"'density'.*1\.5; accepted: a number above 0 to 1"),
            ({"method": "ties", "params": {"density_of": "half"}}, "'half'; accepted: support, tensor"),
            ({"weights": {"e0": 1.0}}, "'mean' takes no weights"),
            ({"method": "weighted_mean"}, "weights .* are missing: .* e0, e1"),
            ({"method": "weighted_mean", "weights": {"e0": 0.5}}, "lack e1"),
            ({"method": "weighted_mean", "weights": {"e0": 0.5, "e9": 0.5}}, "'e9', which is not merged"),
            ({"method": "weighted_mean", "weights": {"e0": 0.5, "e1": 0.6}}, r"sum to 1\.1; accepted: 1"),
            ({"method": "fisher_on_support"}, "needs the fisher file of every expert; missing: e0, e1"),
            ({"method": "regmean", "gram": {"e0": "x"}}, "needs the gram file of every expert; missing: e1"),
            ({"fisher": {"e0": "x"}}, "'mean' reads no fisher files"),
            ({"out": None}, "no output"),
            ({"register_as": "merged"}, "--register needs the adapter in S3"),
            ({"method": "emr", "out": None, "checkpoint": "x"}, "a mask for each task"),
            ({"method": "emr", "checkpoint": "x"}, "needs the task's mask at inference"),
            ({"method": "emr", "out": "s3://b/x", "register_as": "x"}, "mask at inference, which a registered adapter"),
            ({"out": "s3://factory/objects/x"}, "among what the factory stores"),
            ({"out": None, "checkpoint": "s3://factory/bases"}, "among what the factory stores"),
            ({"out": f"s3://b/p/objects/{'a' * 64}/1/adapter"}, "among what the factory stores"),
            ({"shard_gib": 1e-10}, "--shard-gib 1e-10: accepted"),
            ({"method": "sce_selection"}, "'sce_selection'"),
            ({"base": "llama"}, "accepted are pypi:"),
        ],
    )
    def test_requests(self, tmp_path: Path, base: PreparedBase, model: Path, fields: dict[str, Any], told: str) -> None:
        with pytest.raises(FactoryError, match=told):
            checked(model, experts(tmp_path, base), tmp_path, **fields)

    def test_outputs(self, tmp_path: Path, base: PreparedBase, model: Path) -> None:
        given = experts(tmp_path, base)
        (tmp_path / "file").write_text("a diary")
        (tmp_path / "u.e1.mask.safetensors").write_text("a diary")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "thesis.tex").write_text("…")
        for name, files in (("edited", {"config.json": 3}), ("above", {"config.json": 2, "../file": 7})):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text("{}")
            (tmp_path / name / "merge.json").write_text(json.dumps({"merge": {}, "files": files}))
        for fields, told in (
            ({"out": given["e1"]}, "is the input expert 'e1'"),
            ({"out": str(tmp_path / "file")}, "holds something else than a merge"),
            ({"out": str(tmp_path)}, "is a folder"),
            ({"out": str(tmp_path / "file" / "x")}, "cannot be written"),
            ({"out": "models:/x/1"}, "accepted are a path and s3://"),
            ({"out": "s3://bucket"}, "names a bucket"),
            ({"checkpoint": str(model)}, "the input the base"),
            ({"checkpoint": str(model / "below")}, "overlaps the input the base"),
            ({"checkpoint": str(tmp_path / "folder")}, r"holds 'thesis\.tex', which is no part of a merge"),
            ({"checkpoint": str(tmp_path / "file")}, "is a file"),
            ({"checkpoint": str(tmp_path / "edited")}, r"holds 'config\.json'"),
            ({"checkpoint": str(tmp_path / "above")}, "no part of a merge"),
            ({"method": "emr", "out": str(tmp_path / "u.safetensors")}, "mask of 'e1' .*something else than a mask"),
            ({"checkpoint": str(tmp_path / "out.safetensors")}, "is the input --out"),
        ):
            with pytest.raises(ConfigError, match=told):
                checked(model, given, tmp_path, **fields)
        assert (tmp_path / "file").read_text() == "a diary"

    def test_an_unwritable_output(self) -> None:
        with pytest.raises(ConfigError, match=r"--out /proc/nothing/x: cannot be written"):
            prepare(output("/proc/nothing/x", "--out"), "--out")


# -- Fisher and Gram --


def write_fisher(
    path: Path, base: PreparedBase, adapter_sha256: str, count: int = 40, names: tuple[str, ...] = (Q, V)
) -> str:
    with FisherWriter(path, MeasuredOn(base.sha256, adapter_sha256, 8), names) as writer:
        for name in names:
            writer.add(name, torch.ones(count))
        writer.close()
    return str(path)


def test_fisher_files_are_checked(tmp_path: Path, base: PreparedBase, model: Path) -> None:
    given = experts(tmp_path, base, 1)
    (expert,) = hash_experts(read_experts(given, base, tmp_path))
    good = write_fisher(tmp_path / "good", base, expert.sha256)
    found = checked(model, given, tmp_path, method="fisher_on_support", fisher={"e0": good})
    assert found.measured["e0"].sha256
    for file, told in (
        (write_fisher(tmp_path / "of another", base, "2" * 64), "measured with the adapter 222222222222"),
        (write_fisher(tmp_path / "short", base, expert.sha256, 39), "39 values for .*, the expert's support has 40"),
        (write_fisher(tmp_path / "partial", base, expert.sha256, 40, (Q,)), f"no values for {V}"),
        (given["e0"], "not a valid importance file"),
        (str(tmp_path / "none"), "fisher of expert 'e0'.*no such file"),
        (str(model), "is no file"),
    ):
        with pytest.raises(FactoryError, match=told):
            checked(model, given, tmp_path, method="fisher_on_support", fisher={"e0": file})


def test_gram_files_are_checked(tmp_path: Path, base: PreparedBase, model: Path) -> None:
    given = experts(tmp_path, base, 1)
    (expert,) = hash_experts(read_experts(given, base, tmp_path))
    for side, fits in ((64, True), (32, False)):
        file = tmp_path / f"gram{side}"
        with GramWriter(file, MeasuredOn(base.sha256, expert.sha256, 8), (Q,)) as writer:
            writer.add((Q,), torch.eye(side))
            writer.close()
        if fits:
            checked(model, given, tmp_path, method="regmean", gram={"e0": str(file)})
        else:
            with pytest.raises(MergeError, match=r"side 32, the weight has shape \[64, 64\]"):
                checked(model, given, tmp_path, method="regmean", gram={"e0": str(file)})
    means = tmp_path / "means"
    with GramWriter(means, MeasuredOn(base.sha256, expert.sha256, 8), (Q,), "gram_tokens") as writer:
        writer.add((Q,), torch.eye(64))
        writer.close()
    checked(model, given, tmp_path, method="regmean", params={"inputs": "tokens"}, gram={"e0": str(means)})
    with pytest.raises(AdapterError, match=r"a gram_answers file of version 1 is needed"):
        checked(model, given, tmp_path, method="regmean", params={"inputs": "answers"}, gram={"e0": str(means)})


# -- the configuration file --


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(
        "base: path:x\nmethod: ties\nparams: {density: 0.5, lambda: 1}\nexperts: [a/one.safetensors, two=b]\n"
        "weights: {one: 1, two: 2}\nout: merged.safetensors\n"
    )
    read = read_request(file, {})
    assert read.experts == {"one": "a/one.safetensors", "two": "b"}
    changed = read_request(file, {"params": {"density": "0.2"}, "experts": {"three": "c"}, "out": "other"})
    assert changed.params == {"density": "0.2", "lambda": 1}
    assert list(changed.experts) == ["one", "two", "three"]
    assert changed.out == "other"
    assert read_request(file, {"method": "mean"}).params == {}, "another method's parameters"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("metod: ties", "metod: unknown field; did you mean 'method'"),
        ("method: ties", "base: missing.*experts: missing"),
        ("shard_gib: 0", "shard_gib: .*greater than 0"),
        ("experts: [a=x, a=y]", "two experts are named 'a'"),
        ("- a list", "expected a mapping"),
        ("a: [", "not readable as YAML"),
        ("dtype: float8", "dtype: "),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_request(tmp_path / "merge.yaml", {})
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_request(tmp_path / "none.yaml", {})


def test_a_record_is_json(tmp_path: Path, base: PreparedBase, model: Path) -> None:
    from merge.by_hand.checks import record_of
    from merge.by_hand.outputs import recipe_key

    record = record_of(checked(model, experts(tmp_path, base), tmp_path))
    assert json.loads(json.dumps(record)) == record
    other = record_of(checked(model, experts(tmp_path, base), tmp_path, method="task_arithmetic"))
    assert recipe_key(record) != recipe_key(other)


def test_every_measurement_can_be_given() -> None:
    """The request and the command line name each of the table, by the option that gives its files."""
    options = {each.given_by for each in MEASUREMENTS.values()}
    request = MergeRequest(base="path:x", method="mean", experts={"a": "a", "b": "b"})
    assert set(request.measurements) == options
    assert options <= {option.name for option in main.commands["run"].params}
