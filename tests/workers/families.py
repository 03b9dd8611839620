"""Tiny random models of many families, as their checkpoints come: for what must hold whatever the architecture."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.workers import tiny

_IDS = {"vocab_size": 4 + len(tiny.WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PLAIN = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS}
_DEEPSEEK = {
    **_PLAIN, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _GROUPED),
    "Llama, tied": ("LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "Mistral": ("MistralForCausalLM", {**_GROUPED, "head_dim": 8}),
    "Gemma": ("GemmaForCausalLM", {**_GROUPED, "head_dim": 8}),
    "Gemma 2": ("Gemma2ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "Phi": ("PhiForCausalLM", _GROUPED),
    "Phi-3": ("Phi3ForCausalLM", _GROUPED),
    "OPT": ("OPTForCausalLM", {**_PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "GPT-2": ("GPT2LMHeadModel", _OLD),
    "GPT-J": ("GPTJForCausalLM", {**_OLD, "rotary_dim": 4, "tie_word_embeddings": False}),
    "CodeGen": ("CodeGenForCausalLM", {**_OLD, "rotary_dim": 4}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", _PLAIN),
    "GPT-BigCode": ("GPTBigCodeForCausalLM", _OLD),
    "Falcon": ("FalconForCausalLM", {k: v for k, v in _PLAIN.items() if k != "intermediate_size"}),
    "Bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **_IDS}),
    "MPT": ("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **_IDS}),
    "Granite": ("GraniteForCausalLM", {**_GROUPED, "logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "Cohere": ("CohereForCausalLM", _GROUPED),
    "OLMo": ("OlmoForCausalLM", _GROUPED),
    "OLMo 2": ("Olmo2ForCausalLM", _GROUPED),
    "StableLM": ("StableLmForCausalLM", _GROUPED),
    "SmolLM3": ("SmolLM3ForCausalLM", _GROUPED),
    "Starcoder2": ("Starcoder2ForCausalLM", _GROUPED),
    "GLM-4": ("Glm4ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "Mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "Qwen2-MoE": (
        "Qwen2MoeForCausalLM",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "shared_expert_intermediate_size": 24},
    ),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "OLMoE": ("OlmoeForCausalLM", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "GPT-OSS": ("GptOssForCausalLM", {**_GROUPED, "head_dim": 8, "num_local_experts": 4}),
    "Inkling": (
        "InklingForCausalLM",
        {**_GROUPED, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "n_shared_experts": 1},
    ),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", _DEEPSEEK),
}  # fmt: skip
"""By name: class of transformers and its configuration's fields."""


def save_family(name: str, folder: Path, **changes: Any) -> Any:
    """The family's model with a tiny tokenizer in `folder`, as `save_pretrained` writes it; the model."""
    kind, settings = FAMILIES[name]
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    model = made(made.config_class(**settings | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return model
