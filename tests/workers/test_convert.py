"""Conversions against PEFT itself and against dense arithmetic, on a tiny random Llama."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from infra.errors import AdapterError, BaseModelError, FactoryError, TensorFileError
from tests.workers.tiny import tiny_base
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, LowRank, save_adapter
from workers.base.layout import BaseLayout
from workers.conversion.formats import (
    from_checkpoint,
    from_delta,
    from_peft,
    keep_largest,
    to_checkpoint,
    to_delta,
    to_peft,
)
from workers.convert import main
from workers.masks.spec import random_indices
from workers.tensors.source import FileSource
from workers.training.in_place import apply_delta

TOKENS = torch.tensor([[1, 8, 15, 22, 29, 36], [1, 9, 3, 7, 40, 2]])
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base in `model` and the cache in `cache`."""
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def base(home: Path) -> BaseLayout:
    return tiny_base(home)


def fresh(base: BaseLayout) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def adapter_logits(file: Path, base: BaseLayout) -> torch.Tensor:
    model = fresh(base)
    with apply_delta(model, AdapterReader(FileSource(file))):
        return logits(model)


def randomise(model: Any, part: str) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if part in name:
                value.copy_(torch.randn(value.shape, generator=g) * 0.2)


def sparse(shape: tuple[int, ...], density: float, block: tuple[int, int] | None = None) -> SparseTensor:
    indices = random_indices((shape[0], shape[1]), density, 3, "w", block)
    return SparseTensor(shape, indices, torch.randn(indices.numel(), generator=torch.Generator().manual_seed(2)))


def test_layout(base: BaseLayout) -> None:
    assert EMBEDDING in base.shapes
    assert EMBEDDING not in base.linear
    assert "lm_head.weight" not in base.linear, "tied"
    assert base.shapes[f"{UP}.weight"] == (48, 32)
    assert len(base.linear) == 14


LORA = {
    "plain": LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"]),
    "patterns": LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"], use_rslora=True,
        rank_pattern={"up_proj": 6, r"layers\.1\.self_attn\.q_proj": 2}, alpha_pattern={"layers.0.mlp.up_proj": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", list(LORA))
def test_lora_from_peft_and_back(tmp_path: Path, base: BaseLayout, config: str) -> None:
    model = get_peft_model(fresh(base), LORA[config])
    randomise(model, "lora_")
    model.eval()
    model.save_pretrained(tmp_path / "peft")
    from_peft(tmp_path / "peft", base, tmp_path / "a")
    reader = AdapterReader(FileSource(tmp_path / "a"))
    assert (reader.meta.kind, reader.meta.base_sha256, len(reader.names)) == ("lora", base.sha256, 4)
    assert torch.allclose(adapter_logits(tmp_path / "a", base), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(fresh(base)), rtol=1e-2, atol=1e-2)
    to_peft(tmp_path / "a", base, tmp_path / "back")
    again = PeftModel.from_pretrained(fresh(base), str(tmp_path / "back")).eval()
    assert torch.allclose(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    from_peft(tmp_path / "back", base, tmp_path / "b")
    second = AdapterReader(FileSource(tmp_path / "b"))
    for name in reader.names:
        one, other = reader.low_rank(name), second.low_rank(name)
        assert one is not None
        assert other is not None
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)
        assert one.scale == pytest.approx(other.scale, rel=1e-12)


def test_shira_from_peft_and_back(tmp_path: Path, base: BaseLayout) -> None:
    model = get_peft_model(fresh(base), ShiraConfig(r=3, target_modules=["q_proj", "up_proj"], random_seed=5))
    randomise(model, "shira_weight")
    model.eval()
    model.save_pretrained(tmp_path / "peft")
    from_peft(tmp_path / "peft", base, tmp_path / "a")
    reader = AdapterReader(FileSource(tmp_path / "a"))
    assert (reader.meta.kind, reader.count(f"{Q}.weight")) == ("sparse", 3 * 64)
    assert torch.allclose(adapter_logits(tmp_path / "a", base), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(fresh(base)), rtol=1e-2, atol=1e-2)
    to_peft(tmp_path / "a", base, tmp_path / "back")
    again = PeftModel.from_pretrained(fresh(base), str(tmp_path / "back")).eval()
    assert torch.allclose(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", [None, (4, 8), "row", "column"], ids=str)
def test_any_support_goes_to_peft_and_comes_back_as_it_was(tmp_path: Path, base: BaseLayout, unit: Any) -> None:
    """Tensors of unequal counts: PEFT wants the same r for all, so some are filled up."""
    tensors, blocks = {}, {}
    for module, density in ((Q, 0.25), (UP, 0.13), ("model.layers.1.self_attn.v_proj", 0.1)):
        name = f"{module}.weight"
        rows, cols = base.shapes[name]
        block = {"row": (1, cols), "column": (rows, 1)}.get(unit, unit) if isinstance(unit, str) else unit
        tensors[name] = sparse((rows, cols), density, block)
        if block:
            blocks[name] = block
    save_adapter(tmp_path / "a", tensors, AdapterMeta(base.sha256), torch.float32, blocks=blocks)
    to_peft(tmp_path / "a", base, tmp_path / "peft")
    model = PeftModel.from_pretrained(fresh(base), str(tmp_path / "peft")).eval()
    assert torch.allclose(logits(model), adapter_logits(tmp_path / "a", base), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(fresh(base)), rtol=1e-2, atol=1e-2)
    from_peft(tmp_path / "peft", base, tmp_path / "b")
    reader = AdapterReader(FileSource(tmp_path / "b"))
    for name, tensor in tensors.items():
        assert torch.equal(reader.load(name).indices, tensor.indices)
        assert torch.equal(reader.load(name).values, tensor.values)


def test_padding_that_was_trained_since_is_kept(tmp_path: Path, base: BaseLayout) -> None:
    save_adapter(tmp_path / "a", {f"{Q}.weight": sparse((32, 32), 0.1)}, AdapterMeta(base.sha256), torch.float32)
    to_peft(tmp_path / "a", base, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    content = load_file(file)
    content[f"base_model.model.{Q}.shira_weight"][-1] = 0.5
    save_file(content, file, metadata)
    from_peft(tmp_path / "peft", base, tmp_path / "b")
    assert AdapterReader(FileSource(tmp_path / "b")).count(f"{Q}.weight") == 2 * 64


def test_positions_that_occur_twice_are_added(tmp_path: Path, base: BaseLayout) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": 1}))
    indices = torch.tensor([[2, 0, 2], [1, 3, 1]], dtype=torch.int32)
    prefix = f"base_model.model.{Q}"
    save_file(
        {f"{prefix}.shira_indices": indices, f"{prefix}.shira_weight": torch.tensor([1.0, 2.0, 0.5])},
        tmp_path / "adapter_model.safetensors",
    )
    from_peft(tmp_path, base, tmp_path / "a")
    tensor = AdapterReader(FileSource(tmp_path / "a")).load(f"{Q}.weight")
    assert (tensor.indices.tolist(), tensor.values.tolist()) == ([3, 65], [2.0, 1.5])


def test_a_classifier_and_its_head(tmp_path: Path, base: BaseLayout) -> None:
    def classifier() -> Any:
        torch.manual_seed(3)
        return AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=3, dtype=torch.float32).eval()

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = get_peft_model(classifier(), config).eval()
    randomise(model, "lora_")
    randomise(model, "modules_to_save")
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    from_peft(tmp_path / "peft", base, tmp_path / "a")
    reader = AdapterReader(FileSource(tmp_path / "a"))
    assert reader.head_names == ["score.weight"]
    head = load_file(tmp_path / "peft" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(reader.load_head("score.weight"), head)
    to_peft(tmp_path / "a", base, tmp_path / "back")
    again = PeftModel.from_pretrained(classifier(), str(tmp_path / "back")).eval()
    assert torch.allclose(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="classification head"):
        to_checkpoint(tmp_path / "a", base, tmp_path / "full")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "use_dora=True changes more than"),
        ("bias", "all", "bias='all'"),
        ("fan_in_fan_out", True, "fan_in_fan_out=True"),
        ("init_lora_weights", "pissa", "init_lora_weights='pissa'"),
        ("layer_replication", [[0, 2]], "layer_replication="),
        ("a_field_of_the_future", {"x": 1}, "a_field_of_the_future="),
        ("peft_type", "LOHA", "LORA and SHIRA are read, this is 'LOHA'"),
        ("r", 0, "r must be a positive integer"),
        ("rank_pattern", {"(": 2}, "regular expressions"),
        ("rank_pattern", {"q_proj": 3}, "do not fit its factor"),
        ("rank_pattern", [1], "regular expressions"),
        ("lora_alpha", "x", "alpha 'x'"),
    ],
)
def test_what_a_peft_configuration_may_not_ask_for(
    tmp_path: Path, base: BaseLayout, field: str, value: Any, message: str
) -> None:
    get_peft_model(fresh(base), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(AdapterError, match=message):
        from_peft(tmp_path, base, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("model.layers.9.self_attn.q_proj.lora_A.weight", (2, 32), "no lora_B"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (2, 8), r"q_proj.weight has shape \[32, 8\]"),
        ("model.embed_tokens.lora_embedding_A", (2, 8), "is LoRA on an embedding table"),
        ("model.norm.weight", (32,), "as a whole"),
        ("other.weight", (3,), "is no part of an adapter"),
    ],
)
def test_peft_tensors_that_do_not_fit(
    tmp_path: Path, base: BaseLayout, key: str, shape: tuple[int, ...], message: str
) -> None:
    get_peft_model(fresh(base), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{key}": torch.zeros(shape)}, file)
    with pytest.raises(AdapterError, match=message):
        from_peft(tmp_path, base, tmp_path / "a")


def test_damaged_peft_folders(tmp_path: Path, base: BaseLayout) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config.json: cannot be read"):
        from_peft(tmp_path / "none", base, tmp_path / "a")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": 1}))
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: cannot be read.*pickled"):
        from_peft(tmp_path, base, tmp_path / "a")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(AdapterError, match="cannot be read"):
        from_peft(tmp_path, base, tmp_path / "a")
    prefix = f"base_model.model.{Q}"
    for indices in ([[0], [32]], [[-1], [0]], [[0, 1], [0, 1]]):
        content = {f"{prefix}.shira_indices": torch.tensor(indices), f"{prefix}.shira_weight": torch.ones(1)}
        save_file(content, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="indices"):
            from_peft(tmp_path, base, tmp_path / "a")


def test_what_peft_cannot_express(tmp_path: Path, base: BaseLayout) -> None:
    name = f"{Q}.weight"
    dense = SparseTensor((32, 32), torch.arange(1024), torch.randn(1024))
    low = LowRank(torch.ones(1, 32), torch.ones(48, 1), 1.0)
    save_adapter(tmp_path / "full", {name: dense}, AdapterMeta(base.sha256, "full"))
    unequal = {f"{UP}.weight": sparse((48, 32), 0.9), "model.layers.1.self_attn.v_proj.weight": sparse((16, 32), 0.1)}
    save_adapter(tmp_path / "dense", unequal, AdapterMeta(base.sha256))
    save_adapter(tmp_path / "mixed", {name: sparse((32, 32), 0.1), f"{UP}.weight": low}, AdapterMeta(base.sha256))
    save_adapter(tmp_path / "norm", {EMBEDDING: sparse(base.shapes[EMBEDDING], 0.1)}, AdapterMeta(base.sha256))
    save_adapter(tmp_path / "empty", {}, AdapterMeta(base.sha256))
    save_adapter(tmp_path / "other", {name: dense}, AdapterMeta("c" * 64))
    for file, message in (
        ("full", "too dense for it, .* give --rank .* export it with to-checkpoint"),
        ("dense", r"v_proj.weight 18 \* 48 of 512"),
        ("mixed", "to-checkpoint"),
        ("norm", "is an embedding"),
        ("empty", "no weight"),
        ("other", "made for base cccc"),
    ):
        with pytest.raises(AdapterError, match=message):
            to_peft(tmp_path / file, base, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def tuned(base: BaseLayout, *names: str) -> Any:
    """The base with other values in the named parameters."""
    model = fresh(base)
    for name in names:
        randomise(model, name)
    return model


def test_checkpoint_difference(tmp_path: Path, base: BaseLayout) -> None:
    name = f"{Q}.weight"
    model = tuned(base, name, f"{UP}.weight")
    model.save_pretrained(tmp_path / "full", max_shard_size="20KB")
    assert len(list((tmp_path / "full").glob("model-*.safetensors"))) > 1
    from_checkpoint(tmp_path / "full", base, 1.0, tmp_path / "a")
    reader = AdapterReader(FileSource(tmp_path / "a"))
    assert (reader.meta.kind, reader.names) == ("full", [name, f"{UP}.weight"])
    assert torch.allclose(adapter_logits(tmp_path / "a", base), logits(model), rtol=1e-4, atol=1e-5)
    from_checkpoint(tmp_path / "full", base, 0.1, tmp_path / "b", value_dtype=torch.bfloat16)
    sparsified = AdapterReader(FileSource(tmp_path / "b"))
    assert sparsified.meta.kind == "sparse"
    exact = (model.get_parameter(name) - fresh(base).get_parameter(name)).detach().view(-1)
    expected = exact.abs().topk(102).indices.sort().values
    assert torch.equal(sparsified.load(name).indices, expected)
    assert torch.equal(sparsified.load(name).values, exact[expected].bfloat16().float())


def test_differences_elsewhere_are_refused_or_kept(tmp_path: Path, base: BaseLayout) -> None:
    model = tuned(base, f"{Q}.weight", "model.norm.weight")
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(AdapterError, match=r"1 tensors differ .*model\.norm\.weight; keep them with --all"):
        from_checkpoint(tmp_path / "full", base, 0.5, tmp_path / "a")
    from_checkpoint(tmp_path / "full", base, 1.0, tmp_path / "a", every_tensor=True)
    assert AdapterReader(FileSource(tmp_path / "a")).names == [f"{Q}.weight", "model.norm.weight"]
    assert torch.allclose(adapter_logits(tmp_path / "a", base), logits(model), rtol=1e-4, atol=1e-5)


def test_checkpoints_that_do_not_fit(tmp_path: Path, base: BaseLayout) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(base.path / "model.safetensors").items()}
    file = tmp_path / "model.safetensors"
    name = f"{Q}.weight"
    cases: dict[str, tuple[type[FactoryError], dict[str, torch.Tensor]]] = {
        "does not differ": (AdapterError, tensors),
        f"lacks {name}": (BaseModelError, {key: value for key, value in tensors.items() if key != name}),
        "which the base has not": (BaseModelError, {**tensors, "score.weight": torch.ones(2, 32)}),
        r"\[2, 2\], the base's is": (BaseModelError, {**tensors, name: torch.ones(2, 2)}),
        "not finite": (AdapterError, {**tensors, name: torch.full((32, 32), float("nan"))}),
    }
    for message, (kind, content) in cases.items():
        save_file(content, file)
        with pytest.raises(kind, match=message):
            from_checkpoint(tmp_path, base, 0.5, tmp_path / "a")
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(TensorFileError, match="safetensors"):
        from_checkpoint(tmp_path, base, 0.5, tmp_path / "a")
    with pytest.raises(TensorFileError, match="no such folder"):
        from_checkpoint(tmp_path / "none", base, 0.5, tmp_path / "a")
    with pytest.raises(AdapterError, match="density"):
        from_checkpoint(tmp_path, base, 0.0, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_tied_weight_that_is_written_out_is_no_difference(tmp_path: Path, base: BaseLayout) -> None:
    tensors = {key: value.clone() for key, value in load_file(base.path / "model.safetensors").items()}
    tensors[f"{Q}.weight"] += 1
    save_file({**tensors, "lm_head.weight": tensors[EMBEDDING].clone()}, tmp_path / "model.safetensors")
    from_checkpoint(tmp_path, base, 1.0, tmp_path / "a")
    assert AdapterReader(FileSource(tmp_path / "a")).names == [f"{Q}.weight"]


def test_dense_deltas_there_and_back(tmp_path: Path, base: BaseLayout) -> None:
    name = f"{Q}.weight"
    delta = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    save_file({name: delta, f"{UP}.weight": torch.zeros(48, 32)}, tmp_path / "d")
    from_delta(tmp_path / "d", base, 1.0, tmp_path / "a")
    to_delta(tmp_path / "a", tmp_path / "e")
    back = load_file(tmp_path / "e")
    assert list(back) == [name]
    assert torch.equal(back[name], delta)
    low = LowRank(torch.randn(2, 32), torch.randn(48, 2), 0.5)
    save_adapter(tmp_path / "b", {f"{UP}.weight": low}, AdapterMeta(base.sha256, "lora"), torch.float32)
    to_delta(tmp_path / "b", tmp_path / "f")
    assert torch.allclose(load_file(tmp_path / "f")[f"{UP}.weight"], 0.5 * low.b @ low.a, atol=1e-6)
    for content, message in (
        ({"x": delta}, "no such tensor"),
        ({name: delta[:2].clone()}, r"shape \[2, 32\]"),
        ({name: delta.long()}, "floating point"),
        ({name: delta * 0}, "zero"),
    ):
        save_file(content, tmp_path / "bad")
        with pytest.raises(AdapterError, match=message):
            from_delta(tmp_path / "bad", base, 0.5, tmp_path / "g")


def test_keep_largest() -> None:
    delta = torch.tensor([[1.0, -3.0, 0.0], [3.0, -1.0, 1.0]])
    for density, expected in ((1 / 6, [1]), (0.5, [0, 1, 3]), (0.9, [0, 1, 3, 4, 5]), (0.01, [1]), (1, [*range(6)])):
        kept = keep_largest(delta, density)
        assert kept.indices.tolist() == expected
        assert torch.equal(kept.values, delta.view(-1)[kept.indices])


def test_a_checkpoint_of_base_and_adapter_loads_in_transformers(tmp_path: Path, base: BaseLayout) -> None:
    save_adapter(tmp_path / "a", {f"{Q}.weight": sparse((32, 32), 0.2)}, AdapterMeta(base.sha256))
    to_checkpoint(tmp_path / "a", base, tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32).eval()
    assert torch.equal(logits(model), adapter_logits(tmp_path / "a", base))
    assert (tmp_path / "full" / "tokenizer.json").is_file()
    original = load_file(base.path / "model.safetensors")
    for name, tensor in load_file(tmp_path / "full" / "model.safetensors").items():
        assert torch.equal(tensor, original[name]) == (name != f"{Q}.weight")


def test_command_line(tmp_path: Path, home: Path, base: BaseLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(home / "cache"))
    source = ["--base", f"path:{home / 'model'}"]
    save_adapter(tmp_path / "a", {f"{Q}.weight": sparse((32, 32), 0.2)}, AdapterMeta(base.sha256), torch.float32)
    tuned(base, f"{Q}.weight").save_pretrained(tmp_path / "tuned")

    def run(*words: object) -> Any:
        return CliRunner().invoke(main, [str(word) for word in words])

    for words in (
        ("to-peft", tmp_path / "a", *source, "--out", tmp_path / "peft"),
        ("from-peft", tmp_path / "peft", *source, "--out", tmp_path / "b"),
        ("to-delta", tmp_path / "b", "--out", tmp_path / "d"),
        ("from-delta", tmp_path / "d", *source, "--density", 0.2, "--out", tmp_path / "c"),
        ("to-checkpoint", tmp_path / "c", *source, "--out", tmp_path / "full"),
        ("from-checkpoint", tmp_path / "tuned", *source, "--density", 0.1, "--all", "--out", tmp_path / "e"),
    ):
        outcome = run(*words)
        assert outcome.exit_code == 0, outcome.output
    one, other = (AdapterReader(FileSource(tmp_path / file)).load(f"{Q}.weight") for file in ("a", "c"))
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.values, other.values)
    assert AdapterReader(FileSource(tmp_path / "e")).count(f"{Q}.weight") == 102
    failed = run("to-peft", tmp_path / "none", *source, "--out", tmp_path / "x")
    assert failed.exit_code == 1
    assert "none: cannot read the file" in failed.output
    assert "base 'nonsense'" in run("to-peft", tmp_path / "a", "--base", "nonsense", "--out", tmp_path / "x").output
