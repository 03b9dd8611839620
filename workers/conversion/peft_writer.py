"""Adapter files as PEFT adapter folders: LoRA where an adapter is low-rank, SHiRA where it is sparse.

What a folder holds and how it is read back: `workers.conversion.peft`. PEFT wants r * (in + out) positions in every
SHiRA layer, one r for all: what a support lacks is filled up with positions of value 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError
from workers.adapters.format import LowRank
from workers.adapters.reader import AdapterReader
from workers.adapters.support import SparseTensor
from workers.base.layout import BaseLayout
from workers.conversion.low_rank import EXACT, factorise, factorise_exactly, relative_error
from workers.conversion.peft import OWN_POSITIONS, PEFT_TENSORS, PREFIX
from workers.tensors.writer import PLAIN, save_tensors


def write_peft(reader: AdapterReader, base: BaseLayout, folder: Path, rank: int | None = None) -> str:
    """Write the adapter as a PEFT folder for a model of ``base``. Returns what to say of it, "" for nothing.

    Loading it with `peft.PeftModel.from_pretrained` adds the same delta: low-rank tensors as LoRA, sparse ones as
    SHiRA, and dense ones as LoRA where their rank is low, as that of a linear merge of LoRA experts is. With ``rank``,
    every tensor becomes the nearest LoRA of that rank at most, and what that changes is said. Values are fp32.
    ``AdapterError`` where PEFT has no such adapter.
    """
    if rank is not None and rank < 1:
        raise AdapterError(f"rank {rank}: a LoRA has rank 1 or more")
    if not reader.names:
        raise AdapterError("the adapter changes no weight, PEFT has nothing to load")
    for name in reader.names:
        base.check_linear(name, reader.shape(name), "the adapter")
    low_rank, said = _low_rank(reader, rank)
    data, config, metadata = _lora(low_rank) if low_rank else _shira(reader)
    data |= {PREFIX + name: reader.load_head(name) for name in reader.head_names}
    if reader.head_names:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": _head_modules(reader.head_names, base)}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / PEFT_TENSORS, data, {**PLAIN, **metadata})
    _peft_config(config, base).save_pretrained(str(folder))
    return said


def _peft_config(config: dict[str, Any], base: BaseLayout) -> Any:
    """PEFT's own configuration object, so that the file is what the installed release writes."""
    from peft import LoraConfig, ShiraConfig

    kind = config.pop("peft_type")
    made: Any = (LoraConfig if kind == "LORA" else ShiraConfig)(inference_mode=True, **config)
    made.base_model_name_or_path = None
    return made


_Folder = tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]
"""Tensors, configuration and metadata of a folder."""


def _low_rank(reader: AdapterReader, rank: int | None) -> tuple[dict[str, LowRank], str]:
    """Every tensor as low-rank, and what that changes; {} for an adapter that is sparse and is to stay so."""
    own = {name: reader.low_rank(name) for name in reader.names}
    sparse = [name for name, tensor in own.items() if tensor is None]
    if rank is None and len(sparse) == len(own) and not _dense_for_shira(reader):
        return {}, ""
    found: dict[str, LowRank] = {}
    error = norm = 0.0
    for name, tensor in own.items():
        if tensor is not None and (rank is None or tensor.rank <= rank):
            found[name] = tensor
            continue
        delta = _dense(reader.load(name))
        made = factorise_exactly(delta) if rank is None else factorise(delta, rank)
        if made is None:
            why = _dense_for_shira(reader) or f"{name} is sparse where others are low-rank, PEFT takes one kind"
            raise AdapterError(
                f"{why}, and the rank of {name} is not low either: give --rank for the nearest LoRA of that rank, or "
                "export it with to-checkpoint"
            )
        found[name] = made
        size = float(torch.linalg.vector_norm(delta.double()))
        error, norm = math.hypot(error, relative_error(delta, made) * size), math.hypot(norm, size)
    if not norm:
        return found, ""
    lost = error / norm
    exact = "exact up to rounding" if lost <= EXACT else "the nearest of that rank"
    return found, (
        f"LoRA of rank {max(tensor.rank for tensor in found.values())} at most, {exact}: "
        f"{lost:.2g} of ‖δ‖ differs in the tensors that were not low-rank before"
    )


def _dense(tensor: SparseTensor) -> Tensor:
    flat = torch.zeros(tensor.numel).index_copy_(0, tensor.indices, tensor.values.float())
    return flat.view(tensor.shape)


def _lora(tensors: Mapping[str, LowRank]) -> _Folder:
    """One r and alpha for all, patterns for the modules that differ from the first."""
    data: dict[str, Tensor] = {}
    settings = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        data[f"{PREFIX}{module}.lora_A.weight"] = tensor.a
        data[f"{PREFIX}{module}.lora_B.weight"] = tensor.b
        alpha = tensor.scale * tensor.rank
        settings[module] = (tensor.rank, int(alpha) if alpha == int(alpha) else alpha)
    rank, alpha = next(iter(settings.values()))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(settings),
        "rank_pattern": {re.escape(module): r for module, (r, _) in settings.items() if r != rank},
        "alpha_pattern": {re.escape(module): a for module, (_, a) in settings.items() if a != alpha},
    }
    return data, config, {}


def _shira_rank(reader: AdapterReader) -> int:
    """The r that holds every tensor's positions."""
    return max(1, *(-(-reader.count(name) // sum(reader.shape(name))) for name in reader.names))


def _dense_for_shira(reader: AdapterReader) -> str:
    """Why the adapter is no SHiRA, "" if it is one."""
    rank = _shira_rank(reader)
    for name in reader.names:
        sides, numel = sum(reader.shape(name)), math.prod(reader.shape(name))
        if rank * sides > numel or reader.count(name) == numel:
            return (
                f"PEFT's SHiRA wants r * (in + out) positions in every layer, of {name} {rank} * {sides} of {numel}; "
                "this adapter is too dense for it"
            )
    return ""


def _shira(reader: AdapterReader) -> _Folder:
    """Supports filled up to r * (in + out) positions of value 0, which is what PEFT's layer holds."""
    sides, rank = {name: sum(reader.shape(name)) for name in reader.names}, _shira_rank(reader)
    data: dict[str, Tensor] = {}
    for name in reader.names:
        tensor = reader.load(name)
        cols = tensor.shape[1]
        free = torch.ones(tensor.numel, dtype=torch.bool).index_fill_(0, tensor.indices, False)
        padding = torch.nonzero(free).view(-1)[: rank * sides[name] - tensor.indices.numel()]
        flat = torch.cat([tensor.indices, padding])
        module = PREFIX + name.removesuffix(".weight")
        data[f"{module}.shira_indices"] = torch.stack([flat // cols, flat % cols]).to(torch.int32)
        data[f"{module}.shira_weight"] = torch.cat([tensor.values, torch.zeros(padding.numel())])
    config = {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",  # drawn when PEFT makes the layers, then replaced by the saved indices
        "random_seed": 0,
        "target_modules": sorted(name.removesuffix(".weight") for name in reader.names),
    }
    own = json.dumps({name: reader.count(name) for name in reader.names}, sort_keys=True)
    return data, config, {OWN_POSITIONS: own}


def _head_modules(names: list[str], base: BaseLayout) -> list[str]:
    """The smallest list of modules that hold the head and nothing of the base: outermost ones."""
    found = set()
    for name in names:
        path = name.split(".")[:-1]
        outer = [".".join(path[: at + 1]) for at in range(len(path))]
        found.add(next((m for m in outer if not any(t.startswith(f"{m}.") for t in base.shapes)), name))
    return sorted(found)
