"""What a base is, without its weights' values: its configuration, its class in transformers, whether its tensors fit.

Everything that a worker would refuse about a base is refused here, on the meta device: a configuration that
transformers does not know, a kind of model that is not trained here, weights that are missing, left over, of other
shapes or quantised. Loading with values is `workers.base.load`, which checks the same.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infra.errors import BaseModelError
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles
from workers.tensors.header import DTYPE_NAMES

_OLD_BUFFERS = re.compile(
    r"(?:^|.*\.)(?:(?:attn|attention|self_attn|self_attention)\.(?:masked_bias|bias)|rotary_emb\.inv_freq|position_ids)"
)
"""Constants that earlier releases of transformers saved beside the weights: causal masks, rotary frequencies."""

_NOT_LEFT_TO_RIGHT = {
    "xlnet": "was trained on words in any order and reads what follows too",
    "prophetnet": "predicts several tokens ahead, in streams of its own",
}
"""Model types that transformers lists as causal language models and that do not answer token by token."""


class Loaded(NamedTuple):
    """A model as transformers' own loader makes it of tensors, and what that loader has to say."""

    model: Any
    missing: set[str]
    unexpected: set[str]
    mismatched: dict[str, tuple[list[int], list[int]]]
    """By name: the shape that the file has, and the model's."""


def is_old_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a constant that earlier releases saved, not the bias of a layer, which is a vector."""
    return _OLD_BUFFERS.fullmatch(name) is not None and not (name.endswith(".bias") and len(shape) == 1)


def first_line(error: BaseException) -> str:
    """The beginning of a library's message, for a message of one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."


def read_config(path: Path, **changes: Any) -> Any:
    """The configuration of a prepared base, as transformers reads it. BaseModelError if it does not."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True, **changes)
    except Exception as error:  # whatever a field of the file makes transformers stumble over
        raise BaseModelError(
            f"base {path}: transformers does not read its config.json as that of a model that it knows "
            f"({first_line(error)}); code that comes with a checkpoint is never run"
        ) from error


def model_class(path: Path, config: Any, classifies: bool) -> Any:
    """The class of transformers that computes with this configuration.

    BaseModelError for one that has none, that is quantised, composite (text and images), an encoder-decoder or, as a
    language model, an encoder or one that does not read from left to right.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.models.auto.auto_factory import _get_model_class
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    refuse_quantised(path, config.to_dict())
    if config.get_text_config() is not config:
        raise BaseModelError(
            f"base {path}: a {config.model_type} holds more than a language model (images, audio); give a checkpoint "
            f"of its text model alone (model type {config.get_text_config().model_type})"
        )
    what = "classifier" if classifies else "causal language model"
    auto: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise BaseModelError(f"base {path}: transformers has no {what} of its kind ({config.model_type})")
    if not classifies and getattr(config, "is_encoder_decoder", False):
        raise BaseModelError(f"base {path}: {config.model_type} is an encoder with a decoder, no {what}")
    if (
        not classifies
        and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_decoder", False)
    ):
        raise BaseModelError(
            f"base {path}: {config.model_type} is an encoder, no {what}: take objective=classification, or another base"
        )
    if not classifies and (reason := _NOT_LEFT_TO_RIGHT.get(config.model_type)):
        raise BaseModelError(
            f"base {path}: {config.model_type} {reason}, so it is no {what} as it stands; take another base"
        )
    return _get_model_class(config, auto._model_mapping)


def refuse_quantised(path: Path | str, settings: Mapping[str, Any]) -> None:
    """BaseModelError, naming the method, if a configuration says that its weights are quantised."""
    found = settings.get("quantization_config")
    if found is None and isinstance(settings.get("text_config"), Mapping):
        found = settings["text_config"].get("quantization_config")
    if found is not None:
        method = found.get("quant_method", "of an unnamed kind") if isinstance(found, Mapping) else found
        raise BaseModelError(
            f"base {path}: quantised ({method}): such weights cannot be trained or merged; give the checkpoint in "
            "bfloat16, float16 or float32"
        )


def empty_tensors(files: CheckpointFiles) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the meta device: names, shapes and types, no values."""
    pieces = {name: files.piece(name) for name in files.names}
    return {name: torch.empty(piece.shape, dtype=piece.dtype, device="meta") for name, piece in pieces.items()}


def load_tensors(
    path: Path, kind: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Loaded:
    """A model of these tensors by transformers' own loader: it renames, joins and ties as `from_pretrained` does.

    Tensors on the meta device give a model on the meta device. Others are used as they are where nothing has to be
    joined or converted, so mapped ones stay mapped. The generator of torch is left as it was. BaseModelError, with
    transformers' words, if the loader fails.
    """
    empty = any(tensor.is_meta for tensor in tensors.values())
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, said = kind.from_pretrained(
                None, config=config, state_dict=dict(tensors), dtype=dtype or torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True, **({"device_map": "meta"} if empty else {}),
            )  # fmt: skip
    except Exception as error:  # a field of the configuration, a shape, a conversion: many kinds
        raise BaseModelError(f"base {path}: transformers cannot load it ({first_line(error)})") from error
    mismatched = {name: (list(found), list(wanted)) for name, found, wanted in said["mismatched_keys"]}
    unexpected = {name for name in said["unexpected_keys"] if not _OLD_BUFFERS.fullmatch(name)}
    return Loaded(model, set(said["missing_keys"]), unexpected, mismatched)


def check_fit(path: Path, loaded: Loaded) -> None:
    """BaseModelError unless the tensors are those of the model: what is missing would be drawn at random, and what is
    left over would belong to another architecture."""
    if loaded.mismatched:
        name, (found, wanted) = min(loaded.mismatched.items())
        raise BaseModelError(
            f"base {path}: its weights do not fit its config.json: {name} is {found} in the file, {wanted} by the "
            "configuration; give the config.json that belongs to these weights"
        )
    if loaded.missing or loaded.unexpected:
        raise BaseModelError(
            f"base {path}: weights do not fit {type(loaded.model).__name__}: missing {sorted(loaded.missing)[:5]}, "
            f"unexpected {sorted(loaded.unexpected)[:5]}"
        )


def check_floating(path: Path, model: Any, files: CheckpointFiles) -> None:
    """BaseModelError if a weight is stored as integers: quantised, whatever the configuration says."""
    buffers = {name for name, _ in model.named_buffers()}
    for name in files.names:
        piece = files.piece(name)
        if not piece.dtype.is_floating_point and name not in buffers and not is_old_buffer(name, piece.shape):
            raise BaseModelError(
                f"base {path}: {name} is stored as {DTYPE_NAMES[piece.dtype]}: quantised weights cannot be trained; "
                "give the checkpoint in bfloat16, float16 or float32"
            )


def empty_model(path: Path) -> Any:
    """The base as a causal language model on the meta device, loaded and checked as a worker will load it."""
    config, files = read_config(path), CheckpointFiles.in_file(path / WEIGHTS)
    kind = model_class(path, config, classifies=False)
    loaded = load_tensors(path, kind, config, empty_tensors(files))
    check_floating(path, loaded.model, files)
    check_fit(path, loaded)
    loaded.model.tie_weights()  # both in the file: without values the loader cannot know that they are equal
    return loaded.model


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
