"""Loading a prepared base into a process: the model mapped copy-on-write from one file per node, and its tokenizer.

As a causal language model, or as a sequence classifier: the same body with a new head. Preparing and fetching bases is
`workers.base.prepare`; changing weights in place is `workers.training.in_place`; what a classifier is used for,
`workers.scoring.classification`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from infra.errors import BaseModelError, ConfigError
from workers.base.identity import GENERATION
from workers.base.seeds import tensor_seed
from workers.base.structure import (
    Loaded,
    check_fit,
    check_floating,
    empty_tensors,
    first_line,
    load_tensors,
    model_class,
    quiet_transformers,
    read_config,
)
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles, map_weights, write_weights


def weights_file(path: Path, dtype: torch.dtype) -> Path:
    """The base's weights in `dtype`: the cached file itself, or one derived from it once per node, under a lock."""
    weights = CheckpointFiles.in_file(path / WEIGHTS)
    if all(weights.piece(name).dtype == dtype for name in weights.floating):
        return path / WEIGHTS
    derived = path / f"weights.{str(dtype).removeprefix('torch.')}.safetensors"
    if not derived.is_file():
        with FileLock(str(derived) + ".lock"):
            if not derived.is_file():
                temporary = derived.with_name(f".{derived.name}.{os.getpid()}")
                write_weights(temporary, weights, dtype)
                os.replace(temporary, derived)
    return derived


def load_model(path: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The prepared base as a frozen model in eval mode, its weights mapped copy-on-write from one file per node and
    type.

    It is what `from_pretrained` of transformers makes of the folder: its loader does the work, on mapped tensors. So
    processes on a node share the pages; only those that are written (adapted weights), and tensors that the loader has
    to join (one matrix an expert on disk, one for all in memory), are private. Tied weights stay tied, unless the
    file's differ. BaseModelError if the file and the configuration do not belong together.
    """
    path = Path(path)
    config = read_config(path)
    kind = model_class(path, config, classifies=False)
    loaded = load_tensors(path, kind, config, _mapped(path, kind, dtype), dtype)
    check_floating(path, loaded.model, CheckpointFiles.in_file(path / WEIGHTS))
    check_fit(path, loaded)
    _set_generation_config(loaded.model, path)
    loaded.model.requires_grad_(False)
    return loaded.model.eval()


def _mapped(path: Path, kind: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in `dtype`; in the file's own types where the model keeps some in fp32 whatever its type: the loader
    then converts the others, into memory of the process's own."""
    keeps = dtype != torch.float32 and getattr(kind, "_keep_in_fp32_modules_strict", None)
    return map_weights(path / WEIGHTS if keeps else weights_file(path, dtype))


def stop_ids(path: Path, tokenizer: Any) -> set[int]:
    """The tokens at which the base's answers end: the tokenizer's eos and those of the generation settings, or without
    such settings those of the configuration."""
    from transformers import GenerationConfig

    try:
        with quiet_transformers():
            if (path / GENERATION).is_file():
                settings = GenerationConfig.from_pretrained(path, local_files_only=True)
            else:
                settings = GenerationConfig.from_model_config(read_config(path))
    except Exception as error:  # whatever a field of the file makes transformers stumble over
        raise BaseModelError(f"base {path}: {GENERATION} is not readable ({first_line(error)})") from error
    found = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return {int(token) for token in [tokenizer.eos_token_id, *found] if token is not None}


def _set_generation_config(model: Any, path: Path) -> None:
    """Greedy decoding, without the sampling settings that a checkpoint may ship (they would warn at every call)."""
    from transformers import GenerationConfig

    if (path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    settings = model.generation_config
    settings.do_sample = False
    settings.temperature = settings.top_p = settings.top_k = None
    if settings.pad_token_id is None or settings.pad_token_id == settings.eos_token_id:
        settings.pad_token_id = getattr(model.config, "pad_token_id", None)  # some families state none


def load_classifier(path: Path, labels: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """The prepared base as a frozen sequence classifier in eval mode: its body mapped like `load_model`'s, a new head.

    The head is every parameter outside the base model, whatever head the checkpoint has, and a pooler that the
    checkpoint lacks (`head_parameters`). It is fp32 beside a body of any `dtype`, its inputs are cast, and it is drawn
    per tensor from `seed` and name as transformers would: normal, biases 0, norms 1.

    Accepted are checkpoints of a causal or masked language model or of a classifier, and of the bare body.
    BaseModelError if one lacks a weight of the body or has no classifier in transformers.
    """
    if labels < 2:
        raise ConfigError(f"a classifier needs at least 2 labels, {labels} found")
    path = Path(path)
    config, kind = _classifier(path, labels)
    model, head = _with_body(path, kind, config, _mapped(path, kind, dtype), dtype)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in head}
    made = {name: _initial_tensor(model.config, name, shape, seed) for name, shape in shapes.items()}
    model.load_state_dict(made, strict=False, assign=True)
    model.factory_head = tuple(head)
    for owner in {name.rpartition(".")[0] for name in head}:
        model.get_submodule(owner).register_forward_pre_hook(_cast_inputs)
    model.requires_grad_(False)
    return model.eval()


def empty_classifier(path: Path) -> Any:
    """The base as a sequence classifier of two labels on the meta device, checked as `load_classifier` checks it."""
    config, kind = _classifier(path, 2)
    return _with_body(path, kind, config, empty_tensors(CheckpointFiles.in_file(path / WEIGHTS)), torch.float32)[0]


def _classifier(path: Path, labels: int) -> tuple[Any, Any]:
    """Configuration and class of a classifier."""
    config = read_config(path, num_labels=labels)
    config.problem_type = "single_label_classification"
    config.use_cache = False
    # decoders classify at the last token that is none of these
    config.get_text_config().pad_token_id = load_classifier_tokenizer(path).pad_token_id
    return config, model_class(path, config, classifies=True)


def _with_body(
    path: Path, kind: Any, config: Any, tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """A classifier with the checkpoint's body, and the names of its head's parameters, whose values mean nothing."""
    loaded = load_tensors(path, kind, config, tensors, dtype)
    model, prefix = loaded.model, f"{loaded.model.base_model_prefix}."
    parameters = [name for name, _ in model.named_parameters()]
    head = [n for n in parameters if not n.startswith(prefix) or (_in_pooler(n) and n in loaded.missing)]
    bare = not any(name.startswith(prefix) for name in tensors)
    check_floating(path, model, CheckpointFiles.in_file(path / WEIGHTS))
    body = Loaded(
        model,
        missing=loaded.missing - set(head),
        unexpected={n for n in loaded.unexpected if (bare or n.startswith(prefix)) and not _in_pooler(n)},
        mismatched={name: shapes for name, shapes in loaded.mismatched.items() if name not in head},
    )
    check_fit(path, body)
    return model, head


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The head of a model made by `load_classifier`, by full parameter name, in the model's order."""
    names = getattr(model, "factory_head", None)
    if names is None:
        raise ConfigError(f"{type(model).__name__} was not loaded as a classifier: it has no head to train")
    return {name: model.get_parameter(name) for name in names}


def _in_pooler(name: str) -> bool:
    """Whether a weight of the body is head-like: checkpoints of masked language models lack it, or it is left over."""
    return "pooler" in name.split(".")


def _initial_tensor(config: Any, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """fp32, on the CPU: the same bits wherever the model goes."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:  # a norm's scale
        return torch.ones(shape)
    spread = getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02
    generator = torch.Generator().manual_seed(tensor_seed(seed, name))
    return torch.empty(shape).normal_(0.0, spread, generator=generator)


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def load_tokenizer(path: Path) -> Any:
    """The base's tokenizer: pads on the left, if possible with another token than eos.

    A checkpoint that pads with eos gets another of its special tokens for padding (unknown, then bos); one that has
    none pads with eos: padded positions are masked, and only the end of a target is learned.
    """
    tokenizer = _read_tokenizer(path)
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"base {path}: its tokenizer has no eos token, so answers would never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier_tokenizer(path: Path) -> Any:
    """The base's tokenizer for classification: pads on the right; eos is not needed (encoders have none).

    Padding as in `load_tokenizer`, but with another token than eos in any case: a decoder classifies at its last token
    that is not padding. BaseModelError if there is none.
    """
    tokenizer = _read_tokenizer(path)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise BaseModelError(f"base {path}: its tokenizer has no token to pad with other than eos; add a pad token")
    return tokenizer


def _read_tokenizer(path: Path) -> Any:
    """With a token to pad with that does not end texts, if it has one. BaseModelError if transformers reads none."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # damaged files, unknown classes, code of its own: many kinds
        raise BaseModelError(f"base {path}: transformers does not read its tokenizer ({first_line(error)})") from error
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        other = next((t for t in (tokenizer.unk_token, tokenizer.bos_token) if t and t != tokenizer.eos_token), None)
        if other is not None:
            tokenizer.pad_token = other
    return tokenizer
