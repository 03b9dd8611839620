"""Matching modules: expressions, presets on tiny random models of several families, fused weights, tied weights."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from infra.errors import ConfigError
from workers.base.modules import Target, find_targets, match_modules, stacked_rows

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NAMED = {
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": False},
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "gptj": {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 4},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "num_labels": 3},
    "phi3": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
}
SEPARATE, GATED = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
BERT = {"query", "key", "value", "attention.output.dense"}
BERT_MLP = {"intermediate.dense", "output.dense"}
NEOX_MLP = {"dense_h_to_4h", "dense_4h_to_h"}
FAMILIES: dict[str, tuple[set[str], set[str] | None, set[str]]] = {
    # model type: attention, value and output (None: refused), mlp
    "llama": (SEPARATE, {"v_proj", "o_proj"}, GATED),
    "qwen2": (SEPARATE, {"v_proj", "o_proj"}, GATED),
    "mistral": (SEPARATE, {"v_proj", "o_proj"}, GATED),
    "gemma2": (SEPARATE, {"v_proj", "o_proj"}, GATED),
    "phi": ({"q_proj", "k_proj", "v_proj", "dense"}, {"v_proj", "dense"}, {"fc1", "fc2"}),
    "phi3": ({"qkv_proj", "o_proj"}, {"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
    "gpt_neox": ({"query_key_value", "attention.dense"}, None, NEOX_MLP),
    "falcon": ({"query_key_value", "self_attention.dense"}, None, NEOX_MLP),
    "bloom": ({"query_key_value", "self_attention.dense"}, None, NEOX_MLP),
    "opt": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"v_proj", "out_proj"}, {"fc1", "fc2"}),
    "gptj": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"v_proj", "out_proj"}, {"fc_in", "fc_out"}),
    "mpt": ({"Wqkv", "attn.out_proj"}, {"Wqkv", "attn.out_proj"}, {"up_proj", "down_proj"}),
    "starcoder2": (SEPARATE, {"v_proj", "o_proj"}, {"c_fc", "c_proj"}),
    "bert": (BERT, {"value", "attention.output.dense"}, BERT_MLP),
    "roberta": (BERT, {"value", "attention.output.dense"}, BERT_MLP),
    "electra": (BERT, {"value", "attention.output.dense"}, BERT_MLP),
    "deberta-v2": (
        {"query_proj", "key_proj", "value_proj", "attention.output.dense"},
        {"value_proj", "attention.output.dense"},
        BERT_MLP,
    ),
    "deberta": ({"in_proj", "attention.output.dense"}, None, BERT_MLP),
    "distilbert": ({"q_lin", "k_lin", "v_lin", "out_lin"}, {"v_lin", "out_lin"}, {"lin1", "lin2"}),
    "modernbert": ({"Wqkv", "attn.Wo"}, {"Wqkv", "attn.Wo"}, {"mlp.Wi", "mlp.Wo"}),
}
ENCODERS = {"bert", "roberta", "electra", "deberta-v2", "deberta", "distilbert", "modernbert"}


def tiny(kind: str, device: str = "meta", classifier: bool | None = None, **changes: object) -> PreTrainedModel:
    """A random model of two layers from its configuration alone."""
    config = AutoConfig.for_model(kind, **{**SMALL, **NAMED.get(kind, {}), **changes})
    head = kind in ENCODERS if classifier is None else classifier
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    if device != "meta":
        return auto.from_config(config, attn_implementation="eager").eval()
    with torch.device("meta"), no_init_weights():
        return auto.from_config(config)


def parts(targets: dict[str, Target], ends: set[str]) -> dict[str, int]:
    """How many targets end in each of ``ends``; every target must, in the longest that fits."""
    counts = dict.fromkeys(ends, 0)
    for name in targets:
        counts[max((end for end in ends if f".{name}".endswith(f".{end}")), key=len)] += 1
    return counts


@pytest.mark.parametrize("kind", FAMILIES)
def test_presets_find_the_parts_of_every_layer(kind: str) -> None:
    attention, value_output, mlp = FAMILIES[kind]
    model = tiny(kind)
    assert parts(find_targets(model, "attention"), attention) == dict.fromkeys(attention, 2)
    assert parts(find_targets(model, "mlp"), mlp) == dict.fromkeys(mlp, 2)
    if value_output is None:
        for preset in ("value_output", "value_output_mlp"):
            with pytest.raises(ConfigError, match=rf"{preset}.*value rows of .*{kind}.*interleaves"):
                find_targets(model, preset)
    else:
        assert parts(find_targets(model, "value_output"), value_output) == dict.fromkeys(value_output, 2)
        both = value_output | mlp
        assert parts(find_targets(model, "value_output_mlp"), both) == dict.fromkeys(both, 2)
    everything = find_targets(model, "all_linear")
    assert set(everything) >= set(find_targets(model, "attention")) | set(find_targets(model, "mlp"))
    other = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - set(everything)
    allowed = ("lm_head", "classifier", "score", "pooler", "head.dense")
    assert other
    assert all(any(word in name for word in allowed) for name in other)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_the_head_of_a_decoder_that_classifies_is_left_out(kind: str) -> None:
    model = tiny(kind, classifier=True, num_labels=3)
    assert isinstance(model.score, nn.Linear)
    assert "score" not in find_targets(model, "all_linear")


@pytest.mark.parametrize("kind", ["phi3", "mpt", "modernbert"])
def test_value_rows_are_those_that_leave_the_attention_pattern_alone(kind: str) -> None:
    model = tiny(kind, device="cpu")
    name, target = next((n, t) for n, t in find_targets(model, "value_output").items() if t.rows is not None)
    rows = target.rows
    assert rows is not None
    assert len(rows) == (8 if kind == "phi3" else 16)
    assert target.shape == (len(rows), 16)
    assert target.first == rows.start
    tokens = torch.tensor([[3, 5, 7, 9]])

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            out = model(input_ids=tokens, output_attentions=True)
        return out.attentions[0], out.logits

    before, logits = run()
    with torch.no_grad():
        target.module.weight[rows.start : rows.stop] *= -2
    after, changed = run()
    assert torch.equal(before, after)
    assert not torch.allclose(logits, changed)
    with torch.no_grad():
        target.module.weight[rows.start - 1] += torch.randn(16)
    assert not torch.equal(before, run()[0])
    assert name in match_modules(model, "value_output")


def test_a_fused_weight_of_other_sizes_than_the_configuration_says() -> None:
    model = tiny("phi3")
    model.config.num_key_value_heads = 1
    with pytest.raises(ConfigError, match=r"qkv_proj has 32 rows.*2 x 1"):
        find_targets(model, "value_output")
    assert all(target.rows is None for target in find_targets(model, ".*qkv_proj").values())


def test_expressions_and_presets_that_find_nothing() -> None:
    model = tiny("llama", device="cpu", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"matches no whole name.*value_output.*lm_head.*q_proj"):
        match_modules(model, "q_proj")
    with pytest.raises(ConfigError, match="not a regular expression"):
        match_modules(model, "(")
    with pytest.raises(ConfigError, match=r"preset 'mlp' finds no linear module.*: 0, 1"):
        match_modules(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "mlp")
    with pytest.raises(ConfigError, match="none"):
        match_modules(nn.Sequential(nn.ReLU()), "all_linear")
    assert list(match_modules(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "all_linear")) == ["0", "1"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_are_refused(device: str) -> None:
    model = tiny("llama", device=device, tie_word_embeddings=True)
    model.tie_weights()
    with pytest.raises(ConfigError, match=r"lm_head\.weight.*embed_tokens.*tied"):
        match_modules(model, "lm_head")
    assert "lm_head" not in match_modules(model, "all_linear")
    assert "lm_head" in match_modules(tiny("llama", device=device), ".*")


def test_the_rows_of_a_stacked_weight_are_query_key_and_value() -> None:
    model = tiny("phi3")
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    found = stacked_rows(model.config, shapes)
    assert sorted(found) == [f"model.layers.{layer}.self_attn.qkv_proj.weight" for layer in range(2)]
    for name, rows in found.items():
        assert sum(rows) == shapes[name][0]
        values = find_targets(model, "value_output")[name.removesuffix(".weight")].rows
        assert values == range(sum(rows[:2]), sum(rows))
    llama = tiny("llama")
    assert stacked_rows(llama.config, {n: tuple(p.shape) for n, p in llama.named_parameters()}) == {}


def test_the_rows_of_an_interleaved_weight_are_refused() -> None:
    model = tiny("gpt_neox")
    with pytest.raises(ConfigError, match="'gpt_neox' interleaves"):
        stacked_rows(model.config, {name: tuple(value.shape) for name, value in model.named_parameters()})
    phi = tiny("phi3")
    with pytest.raises(ConfigError, match="has 7 rows"):
        stacked_rows(phi.config, {"model.layers.0.self_attn.qkv_proj.weight": (7, 8)})
