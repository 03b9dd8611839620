"""Options and answers of tiny random models of many architectures against one pass without a cache for each."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.tiny import tiny_tokenizer
from workers.scoring.decoding import generate_ids
from workers.scoring.likelihood import option_logprobs_ids
from workers.scoring.reach import UNBOUNDED, reach
from workers.text.prompt import encode_target

WINDOW = 24
OPTIONS = ["w1w2w3", "w1", "w1w2"]
EOS = 2
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 40,
}  # fmt: skip
NTK = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("Llama", SIZES, UNBOUNDED),
    "gpt-neox": ("GPTNeoX", {**SMALL, "intermediate_size": 48}, UNBOUNDED),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, UNBOUNDED),
    "opt": ("OPT", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, UNBOUNDED),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 8}, UNBOUNDED),
    "mistral": ("Mistral", {**SIZES, **SLIDING}, WINDOW),
    "gemma3": ("Gemma3Text", {**SIZES, **MIXED, "head_dim": 8}, WINDOW),
    "qwen2": ("Qwen2", {**SIZES, **MIXED, "use_sliding_window": True, "max_window_layers": 1}, WINDOW),
    "phi3 longrope": ("Phi3", {**SIZES, "rope_parameters": LONGROPE, "original_max_position_embeddings": 40}, 40),
    "llama dynamic ntk": ("Llama", {**SIZES, "rope_parameters": NTK}, 256),
    "gpt-neo": (
        "GPTNeo",
        {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW, "max_position_embeddings": 256,
        },
        0,
    ),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, 0),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, 0),
    "falcon alibi": ("Falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}, 0),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256}, 0),
    "roberta": ("Roberta", {**SMALL, "intermediate_size": 48, "is_decoder": True}, 0),
    "qwen3-next": (
        "Qwen3Next",
        {**SIZES, **EXPERTS, **DELTA, **LINEAR, "head_dim": 8, "shared_expert_intermediate_size": 16},
        0,
    ),
    "lfm2": ("Lfm2", {**SIZES, "layer_types": ["conv", "full_attention"]}, 0),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, 0),
}  # fmt: skip
"""Class, sizes, and how many slots a shared pass may have."""


@functools.cache
def architecture(name: str) -> Any:
    kind, sizes, _ = ARCHITECTURES[name]
    configure: Callable[..., Any] = getattr(transformers, f"{kind}Config")
    stem = kind.removesuffix("Text")
    suffix = {"GPT2": "LMHeadModel"}.get(kind, "ForCausalLM")
    torch.manual_seed(0)
    config = configure(vocab_size=90, bos_token_id=1, eos_token_id=EOS, pad_token_id=0, **sizes)
    model = getattr(transformers, f"{stem}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
        if (bias := model.get_output_embeddings().bias) is not None:
            bias[0] = -1e4  # RoBERTa does not count padding in its positions, where a random model would write it
    return model


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """What the model says of a text alone, without any cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def slow_option(model: Any, prompt: list[int], option: list[int]) -> float:
    found = logits(model, [*prompt, *option]).log_softmax(-1)
    return sum(float(found[len(prompt) - 1 + at, token]) for at, token in enumerate(option))


def slow_answer(model: Any, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        token = int(logits(model, ids)[-1].argmax())
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]


def texts(most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(3, 89), min_size=1, max_size=most)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_how_far_rows_may_share_a_pass(name: str) -> None:
    assert reach(architecture(name)) == ARCHITECTURES[name][2]


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=3, deadline=None)
@given(beginning=st.one_of(st.just([]), texts(40)), prompts=st.lists(texts(50), min_size=2, max_size=3))
def test_rows_get_what_they_would_get_alone(name: str, beginning: list[int], prompts: list[list[int]]) -> None:
    """Whatever their lengths and what they begin with; shorter and longer than windows in one batch."""
    model, tokenizer = architecture(name), tiny_tokenizer()
    options = [OPTIONS[: 1 + at % 3] for at in range(len(prompts))]
    found = option_logprobs_ids(model, tokenizer, prompts, options, batch_size=2, prefix_ids=beginning)
    for prompt, row, scores in zip(prompts, options, found, strict=True):
        alone = [slow_option(model, [*beginning, *prompt], encode_target(tokenizer, option)) for option in row]
        assert scores == pytest.approx(alone, abs=2e-3)
    answers = generate_ids(model, tokenizer, prompts, 4, batch_size=2, prefix_ids=beginning)
    assert answers == [slow_answer(model, [*beginning, *prompt], 4) for prompt in prompts]


def test_a_window_is_no_reason_to_run_short_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = architecture("mistral"), []
    reach(model)
    monkeypatch.setattr(model, "forward", counted(model.forward, passes))
    prompts = [[5, 6, 7], [8, 9], [10]]
    generate_ids(model, tiny_tokenizer(), prompts, 1)
    assert passes == [3]
    generate_ids(model, tiny_tokenizer(), [*prompts, list(range(3, 3 + WINDOW))], 1)
    assert passes == [3, 1, 3]


def counted(forward: Callable[..., Any], rows: list[int]) -> Callable[..., Any]:
    """`forward` that notes how many rows each pass has, with the signature that it had."""

    @functools.wraps(forward)
    def inner(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    return inner
