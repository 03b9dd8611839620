"""A tiny random Llama and a tiny random BERT, with tiny word-level tokenizers, made in memory."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workers.base.layout import BaseLayout, read_layout
from workers.base.prepare import prepare_base

WORDS = [f"w{at}" for at in range(50)] + list("abcdefghijklmnopqrstuvwxyz?.:;{}") + ["\n", " "]
WRAPPER = "<s>{prompt}</s>"


def _word_tokenizer(special: list[str], unknown: str) -> Tokenizer:
    vocabulary = {token: at for at, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"w\d+|.|\n"), "isolated")
    tokenizer.decoder = None
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _word_tokenizer(["<pad>", "<s>", "</s>", "<unk>"], "<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_model(tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4 + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_base(home: Path) -> BaseLayout:
    """The tiny Llama, its head tied, as a base: its checkpoint is in `home/model`, the cache is `home/cache`."""
    tiny_model().save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    return read_layout(prepare_base(f"path:{home / 'model'}", home / "cache"))


def tiny_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Adds CLS and SEP by itself, and has no eos."""
    tokenizer = _word_tokenizer(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=64, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_encoder(seed: int = 0) -> BertForMaskedLM:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=4 + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()
