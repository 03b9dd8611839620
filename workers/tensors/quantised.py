"""Checkpoints whose weights are quantised: recognised by their configuration, by the names beside their weights and by
the weights' types, and refused by name. Their numbers are codes, so no difference or sum of them means anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from infra.errors import BaseModelError
from workers.tensors.checkpoint import CheckpointFiles

_CONFIGURED = ("quantization_config", "compression_config")
_STATE = re.compile(
    r"(?:^|[._])(?:SCB|qweight|qzeros|g_idx|weight_packed|weight_scale(?:_inv)?|weight_zero_point|"
    r"W_q|weight_scales|input_scale|(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.[\w.]+|codebooks|weight_blocks|\w*proj_blocks)$"
)
"""Names of what bitsandbytes, GPTQ, AWQ, compressed-tensors, fine-grained fp8, AQLM, HQQ, EETQ and MXFP4 keep beside or
instead of a weight."""
_CODES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def refuse_quantised(what: str, settings: Mapping[str, Any], files: CheckpointFiles | None = None) -> None:
    """Raise BaseModelError, naming the method or a tensor that shows it, if a checkpoint is quantised.

    `what` names it in the error, `settings` is its configuration, `files` are its tensors, of which headers are read.
    """
    found = _method(settings) or (_sign(files) if files is not None else "")
    if found:
        raise BaseModelError(
            f"{what}: is quantised ({found}): its numbers are codes, which cannot be added or merged; give the "
            "checkpoint in bfloat16, float16 or float32"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """A configuration's fields, {} where there is no such file or no JSON object in it."""
    return settings_of(path.read_bytes()) if path.is_file() else {}


def settings_of(content: bytes | None) -> dict[str, Any]:
    """The fields of a configuration's bytes; {} for None, and for what is no JSON object."""
    try:
        found = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _method(settings: Mapping[str, Any]) -> str:
    """The method that a configuration names, also that of the language part of a composite one; "" for none."""
    for part in (settings, settings.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        for key in _CONFIGURED:
            if given := part.get(key):
                method = given.get("quant_method") if isinstance(given, Mapping) else given
                return f"{method or key} in config.json"
    return ""


def _sign(files: CheckpointFiles) -> str:
    for name in files.names:
        piece = files.piece(name)
        if _STATE.search(name):
            return f"it holds {name}"
        if piece.dtype in _CODES and name.endswith(".weight") and len(piece.shape) >= 2:
            return f"{name} is {str(piece.dtype).removeprefix('torch.')}"
    return ""
