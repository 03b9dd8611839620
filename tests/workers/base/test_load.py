"""A prepared base computes what `from_pretrained` of transformers computes, for every family; or it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.errors import BaseModelError, TensorFileError
from tests.workers import tiny
from tests.workers.families import FAMILIES, save_family
from workers.base.load import empty_classifier, load_classifier, load_model, load_tokenizer, stop_ids
from workers.base.prepare import prepare_base
from workers.base.structure import empty_model
from workers.tensors.checkpoint import WEIGHTS

IDS = torch.tensor([[5, 10, 20, 30, 40, 17, 33]])


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def assert_as_transformers(folder: Path, cache: Path, *dtypes: torch.dtype) -> Any:
    """The loaded model of the last type."""
    path = prepare_base(f"path:{folder}", cache).path
    empty = {name: tuple(value.shape) for name, value in empty_model(path).named_parameters()}
    for dtype in dtypes:
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model = load_model(path, dtype)
        assert torch.equal(logits(model), logits(reference))
        assert {name: tuple(value.shape) for name, value in model.named_parameters()} == empty
        assert not any(value.requires_grad for value in model.parameters())
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path / "m")
    assert_as_transformers(tmp_path / "m", tmp_path / "cache", torch.bfloat16, torch.float32)


@pytest.mark.parametrize("family", ["Llama", "GPT-NeoX", "Mixtral", "Bloom"])
def test_a_classifier_has_the_body_that_transformers_gives_it(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path / "m")
    path = prepare_base(f"path:{tmp_path / 'm'}", tmp_path / "cache").path
    model = load_classifier(path, 3, torch.float32)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", num_labels=3, dtype=torch.float32
    )
    prefix, theirs = f"{model.base_model_prefix}.", reference.state_dict()
    body = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
    assert body
    assert all(torch.equal(value, theirs[name]) for name, value in body.items())
    assert {n for n, _ in empty_classifier(path).named_parameters()} == {n for n, _ in model.named_parameters()}


def test_fp32_weights_that_a_family_never_rounds_are_not_rounded(tmp_path: Path) -> None:
    save_family("DeepSeek-V3", tmp_path / "m")
    change_weights(
        tmp_path / "m",
        lambda tensors: {n: t + 1 / 3 if "e_score_correction_bias" in n else t for n, t in tensors.items()},
    )
    assert_as_transformers(tmp_path / "m", tmp_path / "cache", torch.bfloat16)


def test_the_generator_is_left_as_it_was(tmp_path: Path) -> None:
    save_family("Llama", tmp_path / "m")
    path = prepare_base(f"path:{tmp_path / 'm'}", tmp_path / "cache").path
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load_classifier(path, 3)
    load_model(path)
    assert torch.equal(torch.get_rng_state(), state)


# -- checkpoints that are written otherwise --


def test_constants_of_earlier_releases_are_left_out(tmp_path: Path) -> None:
    for family, buffers in {
        "GPT-NeoX": {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.rand(4),
        },
        "Llama": {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(4)},
    }.items():
        folder = tmp_path / family
        save_family(family, folder)
        plain = prepare_base(f"path:{folder}", tmp_path / "cache").sha256
        change_weights(folder, lambda tensors, more=buffers: tensors | more)
        assert_as_transformers(folder, tmp_path / "cache", torch.float32)
        assert prepare_base(f"path:{folder}", tmp_path / "cache").sha256 == plain


@pytest.mark.parametrize(("family", "prefix"), [("Bloom", "transformer."), ("GPT-2", "transformer.")])
def test_a_body_without_prefix_gets_it(family: str, prefix: str, tmp_path: Path) -> None:
    save_family(family, tmp_path / "m")
    plain = prepare_base(f"path:{tmp_path / 'm'}", tmp_path / "cache").sha256
    change_weights(tmp_path / "m", lambda tensors: {n.removeprefix(prefix): t for n, t in tensors.items()})
    assert_as_transformers(tmp_path / "m", tmp_path / "cache", torch.float32)
    assert prepare_base(f"path:{tmp_path / 'm'}", tmp_path / "cache").sha256 == plain


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_a_tied_embedding_is_tied_only_if_it_is_equal(equal: bool, tmp_path: Path) -> None:
    save_family("Llama, tied", tmp_path / "m")

    def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding = tensors["model.embed_tokens.weight"]
        return {**tensors, "lm_head.weight": embedding.clone() if equal else embedding * 0.9}

    change_weights(tmp_path / "m", with_head)
    model = assert_as_transformers(tmp_path / "m", tmp_path / "cache", torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    assert model.config.tie_word_embeddings == equal


# -- refused --


def _int8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to(torch.int8) if n.endswith("q_proj.weight") else t for n, t in tensors.items()}


def _fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to(torch.float8_e4m3fn) if n.endswith("q_proj.weight") else t for n, t in tensors.items()}


def _config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **fields)


def _kind(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(transformers.AutoConfig.for_model(name).to_json_string())


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda t: {n: v for n, v in t.items() if n != name})


def _damage(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)  # type: ignore[return-value]


def _index(text: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(text)

    return change


def _composite(folder: Path) -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    images = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=images)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "quantised by GPTQ": (_config(quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "fp8 with its configuration": (_config(quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    "int8 weights": (lambda f: change_weights(f, _int8), r"q_proj\.weight is stored as I8: quantised"),
    "fp8 weights": (lambda f: change_weights(f, _fp8), r"q_proj\.weight: F8_E4M3 is a type of quantised"),
    "a vocabulary of one more": (_config(vocab_size=89), r"lm_head\.weight is \[88, 32\] in the file, \[89, 32\]"),
    "a weight is missing": (_without("model.norm.weight"), r"missing \['model\.norm\.weight'\]"),
    "a head is missing": (_without("lm_head.weight"), r"missing \['lm_head\.weight'\]"),
    "weights of another architecture": (
        lambda f: change_weights(f, lambda t: {**t, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        r"unexpected \['model\.layers\.0\.self_attn\.q_norm\.weight'\]",
    ),
    "an unknown kind of model": (_config(model_type="foo9"), r"does not read its config\.json .*foo9"),
    "no kind of model": (_damage("config.json", "{}"), r"does not read its config\.json"),
    "code of its own": (
        _config(model_type="foo10", auto_map={"AutoConfig": "configuration_foo.Foo"}),
        r"code that comes with a checkpoint is never run",
    ),
    "a broken config.json": (_damage("config.json", "{not json"), r"config\.json: not readable as JSON"),
    "a config.json that is a list": (_damage("config.json", "[1]"), r"config\.json: a JSON object is needed"),
    "a broken generation_config.json": (_damage("generation_config.json", "{"), r"generation_config\.json: not read"),
    "a broken index": (_index("{"), r"model\.safetensors\.index\.json is no index of a sharded checkpoint"),
    "an index of nothing": (_index('{"metadata": {}}'), r"index\.json is no index of a sharded checkpoint"),
    "text and images": (_composite, r"gemma3 holds more than a language model .*gemma3_text"),
    "an encoder": (_config(model_type="bert", architectures=["BertModel"]), r"bert is an encoder, .*classification"),
    "an encoder with a decoder": (_config(model_type="t5"), r"no causal language model of its kind \(t5\)"),
    "words in any order": (_kind("xlnet"), r"xlnet .* reads what follows too, .*another base"),
    "several tokens ahead": (_kind("prophetnet"), r"prophetnet .*no causal language model"),
    "a field that makes no sense": (_config(num_attention_heads=0), r"does not read its config|cannot load it"),
    "a broken tokenizer": (_damage("tokenizer.json", "{"), r"transformers does not read its tokenizer"),
}
"""Changes of a Llama's folder, and what is said before anything is trained."""


def _as_preflight(source: str, cache: Path) -> None:
    path = prepare_base(source, cache).path
    empty_model(path)
    load_tokenizer(path)


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_worker_could_load_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    save_family("Llama", tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises((BaseModelError, TensorFileError), match=message) as caught:
        _as_preflight(f"path:{tmp_path / 'm'}", tmp_path / "cache")
    assert "\n" not in str(caught.value)


# -- tokenizers --


def test_a_tokenizer_that_pads_with_its_only_special_token_is_accepted(tmp_path: Path) -> None:
    save_family("Llama", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"pad_token": "</s>", "unk_token": "</s>"}
    file.write_text(json.dumps({name: value for name, value in settings.items() if name != "bos_token"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    with pytest.raises((BaseModelError, TensorFileError), match="no token to pad with other than eos"):
        empty_classifier(tmp_path)


def test_answers_end_where_the_generation_settings_say(tmp_path: Path) -> None:
    save_family("Llama", tmp_path)
    tokenizer = tiny.tiny_tokenizer()
    assert stop_ids(tmp_path, tokenizer) == {2}
    change_json(tmp_path / "generation_config.json", eos_token_id=[2, 40])
    assert stop_ids(tmp_path, tokenizer) == {2, 40}
    (tmp_path / "generation_config.json").unlink()
    change_json(tmp_path / "config.json", eos_token_id=7)
    assert stop_ids(tmp_path, tokenizer) == {2, 7}
