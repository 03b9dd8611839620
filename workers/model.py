"""Loading a prepared base into a process: the model mapped copy-on-write from one file per node, and its tokenizer.

Preparing and fetching bases is `workers.base`; changing weights in place is `workers.inplace`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from infra.errors import BaseModelError
from workers.tensorfile import NAMES, WEIGHTS, list_entries, map_tensors, write_entries


def weights_file(path: Path, dtype: torch.dtype) -> Path:
    """The base's weights in `dtype`: the cached file itself, or one derived from it once per node, under a lock."""
    entries = list_entries(path / WEIGHTS)
    if all(entry.dtype == NAMES[dtype] for entry in entries if entry.floating):
        return path / WEIGHTS
    derived = path / f"weights.{str(dtype).removeprefix('torch.')}.safetensors"
    if not derived.is_file():
        with FileLock(str(derived) + ".lock"):
            if not derived.is_file():
                temporary = derived.with_name(f".{derived.name}.{os.getpid()}")
                write_entries(temporary, entries, dtype)
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
    tensors = map_tensors(weights_file(path, dtype))
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
    if absent or outcome.unexpected_keys:
        raise BaseModelError(
            f"base {path}: weights do not fit {type(model).__name__}: missing {absent[:5]}, "
            f"unexpected {outcome.unexpected_keys[:5]}"
        )
    model.requires_grad_(False)
    return model.eval()


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


def load_tokenizer(path: Path) -> Any:
    """The base's tokenizer: pads on the left, pad token different from eos.

    A checkpoint that pads with eos gets another of its special tokens for padding (unknown, then bos);
    BaseModelError if none.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"base {path}: its tokenizer has no eos token, so answers would never end")
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
