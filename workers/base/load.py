"""Loading a prepared base into a process: the model mapped copy-on-write from one file per node, and its tokenizer.

As a causal language model, or as a sequence classifier: the same body with a new head. Preparing and fetching bases is
`workers.base.prepare`; changing weights in place is `workers.training.in_place`; what a classifier is used for,
`workers.scoring.classification`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from infra.errors import BaseModelError, ConfigError
from workers.base.seeds import tensor_seed
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

    Processes on a node share the pages; only those that are written (adapted weights) become private. Tied weights
    stay tied.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    tensors = map_weights(weights_file(path, dtype))
    with quiet_transformers():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with init_empty_weights(
            include_buffers=False
        ):  # non-persistent buffers (rotary frequencies) are really computed
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        outcome = model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        _set_generation_config(model, path)
    absent = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    _check_fit(path, model, absent, outcome.unexpected_keys)
    model.requires_grad_(False)
    return model.eval()


def _check_fit(path: Path, model: Any, missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        raise BaseModelError(
            f"base {path}: weights do not fit {type(model).__name__}: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}"
        )


def _set_generation_config(model: Any, path: Path) -> None:
    """Greedy decoding, without the sampling settings that a checkpoint may ship (they would warn at every call)."""
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    settings = model.generation_config
    settings.do_sample = False
    settings.temperature = settings.top_p = settings.top_k = None
    if settings.pad_token_id is None or settings.pad_token_id == settings.eos_token_id:
        settings.pad_token_id = model.config.pad_token_id


def load_classifier(path: Path, labels: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """The prepared base as a frozen sequence classifier in eval mode: its body mapped like `load_model`'s, a new head.

    The head is every parameter outside the base model, whatever head the checkpoint has, and a pooler that the
    checkpoint lacks (`head_parameters`). It is fp32 beside a body of any `dtype`, its inputs are cast, and it is drawn
    per tensor from `seed` and name as transformers would: normal, biases 0, norms 1.

    Accepted are checkpoints of a causal or masked language model or of a classifier, and of the bare body.
    BaseModelError if one lacks a weight of the body or has no classifier in transformers.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if labels < 2:
        raise ConfigError(f"a classifier needs at least 2 labels, {labels} found")
    path = Path(path)
    tensors = map_weights(weights_file(path, dtype))
    pad_id = load_classifier_tokenizer(path).pad_token_id
    with quiet_transformers():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True, num_labels=labels)
        config.problem_type = "single_label_classification"
        config.use_cache = False
        config.get_text_config().pad_token_id = pad_id  # decoders classify at the last token that is none of these
        try:
            with init_empty_weights(include_buffers=False):
                model: Any = AutoModelForSequenceClassification.from_config(
                    config, dtype=dtype, trust_remote_code=False
                )
        except ValueError as error:
            raise BaseModelError(f"base {path}: transformers has no classifier of its kind ({error})") from error
        body = _body_tensors(model, tensors)
        parameters = dict(model.named_parameters())
        prefix = f"{model.base_model_prefix}."
        head = [n for n in parameters if not n.startswith(prefix) or (_in_pooler(n) and n not in body)]
        known = {*parameters, *(name for name, _ in model.named_buffers())}
        _check_fit(
            path,
            model,
            [name for name in parameters if name not in body and name not in head],
            [name for name in body if name not in known and not _in_pooler(name)],
        )
        made = {name: _initial_tensor(model.config, name, tuple(parameters[name].shape), seed) for name in head}
        model.load_state_dict(body | made, strict=False, assign=True)
        model.tie_weights()
    model.factory_head = tuple(head)
    for owner in {name.rpartition(".")[0] for name in head}:
        model.get_submodule(owner).register_forward_pre_hook(_cast_inputs)
    model.requires_grad_(False)
    return model.eval()


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The head of a model made by `load_classifier`, by full parameter name, in the model's order."""
    names = getattr(model, "factory_head", None)
    if names is None:
        raise ConfigError(f"{type(model).__name__} was not loaded as a classifier: it has no head to train")
    return {name: model.get_parameter(name) for name in names}


def _in_pooler(name: str) -> bool:
    """Whether a weight of the body is head-like: checkpoints of masked language models lack it, or it is left over."""
    return "pooler" in name.split(".")


def _body_tensors(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under the body's names in `model`, those of the checkpoint's own heads left out."""
    prefix = f"{model.base_model_prefix}."
    bare = not any(name.startswith(prefix) for name in tensors)
    body = {}
    for name, tensor in tensors.items():
        if bare or name.startswith(prefix):
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            body[prefix + name if bare else name] = tensor
    return body


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
    """The base's tokenizer: pads on the left, pad token different from eos.

    A checkpoint that pads with eos gets another of its special tokens for padding (unknown, then bos);
    BaseModelError if none.
    """
    tokenizer = _read_tokenizer(path)
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"base {path}: its tokenizer has no eos token, so answers would never end")
    return tokenizer


def load_classifier_tokenizer(path: Path) -> Any:
    """The base's tokenizer for classification: pads on the right; eos is not needed (encoders have none).

    Padding as in `load_tokenizer`: a decoder classifies at its last token that is not padding.
    """
    tokenizer = _read_tokenizer(path)
    tokenizer.padding_side = "right"
    return tokenizer


def _read_tokenizer(path: Path) -> Any:
    """With a token to pad with that does not end texts."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        other = next((t for t in (tokenizer.unk_token, tokenizer.bos_token) if t and t != tokenizer.eos_token), None)
        if other is None:
            raise BaseModelError(f"base {path}: its tokenizer has no token to pad with other than eos; add a pad token")
        tokenizer.pad_token = other
    return tokenizer


class quiet_transformers:
    """Silences transformers' and Python's warnings and progress bars inside a `with`."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._verbosity = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error: object) -> None:
        from transformers.utils import logging

        self._caught.__exit__(None, None, None)
        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()
