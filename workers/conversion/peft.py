"""PEFT adapter folders: LoRA (arXiv 2106.09685) and SHiRA (arXiv 2406.13175) adapters read and written.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Only adapters that are a delta of linear layers
(and, beside it, the new head of a classifier) are read; whatever else a configuration asks for is refused by name,
never dropped. Nothing of a folder is executed or unpickled. PEFT wants r * (in + out) positions in every SHiRA layer,
one r for all: what a support lacks is filled up with positions of value 0, and the file's metadata says how many are
the adapter's own, so that reading it back gives the same support.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterReader, LowRank
from workers.base.layout import BaseLayout
from workers.tensors.reader import TensorReader
from workers.tensors.source import FileSource
from workers.tensors.writer import PLAIN, save_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OWN_POSITIONS = "own_positions"
MAX_ALPHA = 2.0**30
"""Largest |alpha| of a folder: JSON allows integers that no float holds."""
_UNSUPPORTED_BIAS = (None, "none")
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base's weights as well
_HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "init_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "loftq_config", "mask_type", "megatron_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "random_seed", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """What a folder holds: ``tensors`` and ``head`` as `save_adapter` takes them, its ``kind`` and what to record."""

    tensors: dict[str, SparseTensor | LowRank]
    head: dict[str, Tensor]
    kind: str
    info: dict[str, Any]


def read_peft(folder: Path, base: BaseLayout) -> Imported:
    """The adapter in ``folder``, checked against ``base``. ``AdapterError`` for anything that cannot be kept."""
    config = _read_config(folder)
    file = _open(folder / TENSORS)
    modules, head = _sort_keys(file, config, base, folder / TENSORS)
    own = _own_positions(file.metadata)
    tensors: dict[str, SparseTensor | LowRank] = {}
    for module, keys in sorted(modules.items()):
        name = f"{module}.weight"
        parts = {part: file.read(key) for part, key in keys.items()}
        if config["peft_type"] == "LORA":
            tensors[name] = LowRank(parts["lora_A"], parts["lora_B"], _scale(config, module, parts["lora_A"]))
        else:
            tensors[name] = _read_shira(name, parts, base.shapes[name], own.get(name))
    heads = {name: file.read(key) for name, key in head.items()}
    kind = "lora" if config["peft_type"] == "LORA" else "sparse"
    return Imported(tensors, heads, kind, {"source": "peft", "peft_type": config["peft_type"], "r": config["r"]})


def peft_shapes(folder: Path, base: BaseLayout) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of the weights that the adapter in ``folder`` changes, by name, and the names of its head's tensors.

    Checked as by :func:`read_peft`, but for the tensors' contents, which are not read.
    """
    config = _read_config(folder)
    modules, head = _sort_keys(_open(folder / TENSORS), config, base, folder / TENSORS)
    return {name: base.shapes[name] for name in sorted(f"{module}.weight" for module in modules)}, sorted(head)


def write_peft(reader: AdapterReader, base: BaseLayout, folder: Path) -> None:
    """Write the adapter as a PEFT folder for a model of ``base``. ``AdapterError`` where PEFT has no such adapter.

    Loading it with `peft.PeftModel.from_pretrained` adds the same delta. Values are fp32.
    """
    if not reader.names:
        raise AdapterError("the adapter changes no weight, PEFT has nothing to load")
    for name in reader.names:
        base.check_linear(name, reader.shape(name), "the adapter")
    low_rank = {name: tensor for name in reader.names if (tensor := reader.low_rank(name)) is not None}
    if low_rank and len(low_rank) != len(reader.names):
        raise AdapterError(
            "the adapter has low-rank and sparse tensors, PEFT takes one kind; export it with to-checkpoint"
        )
    data, config, metadata = _lora(low_rank) if low_rank else _shira(reader)
    data |= {_PREFIX + name: reader.load_head(name) for name in reader.head_names}
    if reader.head_names:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": _head_modules(reader.head_names, base)}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / TENSORS, data, {**PLAIN, **metadata})
    _peft_config(config, base).save_pretrained(str(folder))


def _peft_config(config: dict[str, Any], base: BaseLayout) -> Any:
    """PEFT's own configuration object, so that the file is what the installed release writes."""
    from peft import LoraConfig, ShiraConfig

    kind = config.pop("peft_type")
    made: Any = (LoraConfig if kind == "LORA" else ShiraConfig)(inference_mode=True, **config)
    made.base_model_name_or_path = None
    return made


# -- reading --


def _open(path: Path) -> TensorReader:
    def bad(reason: str) -> AdapterError:
        return AdapterError(f"{path}: cannot be read ({reason}); pickled adapters (.bin) are not accepted")

    if not path.is_file():
        raise bad("no such file")
    return TensorReader(FileSource(path), bad)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror}); give the folder that PEFT saved") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "SHIRA"):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path}: adapters of type LORA and SHIRA are read, this is {kind!r}")
    if type(config.get("r")) is not int or config["r"] < 1:
        raise AdapterError(f"{path}: r must be a positive integer, is {config.get('r')!r}")
    asked = {name for name, value in config.items() if value not in (None, False, [], {}) and name not in _HARMLESS}
    if config.get("bias") not in _UNSUPPORTED_BIAS:
        asked.add("bias")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        asked.add("init_lora_weights")
    if asked:
        found = ", ".join(f"{name}={config[name]!r}" for name in sorted(asked))
        raise AdapterError(
            f"{path}: {found} changes more than a low-rank or sparse delta of linear weights holds; merge it into a "
            "full checkpoint with PEFT (merge_and_unload) and convert that with from-checkpoint"
        )
    return config


def _sort_keys(
    file: TensorReader, config: Mapping[str, Any], base: BaseLayout, path: Path
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Keys of each adapted module by part, and those of the head by parameter name, all checked against the base."""
    parts = ("lora_A", "lora_B") if config["peft_type"] == "LORA" else ("shira_weight", "shira_indices")
    pattern = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(parts)})" + (r"\.weight" if "lora_A" in parts else ""))
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise AdapterError(f"{path}: {CONFIG} has modules_to_save {saved!r}; a list of names is accepted")
    modules: dict[str, dict[str, str]] = {}
    head: dict[str, str] = {}
    for key in file.pieces:
        name = key.removeprefix(_PREFIX)
        if match := pattern.fullmatch(key):
            modules.setdefault(match.group(1), {})[match.group(2)] = key
        elif name != key and name not in base.shapes and any(f".{module}." in f".{name}" for module in saved):
            head[name] = key
        else:
            what = "trains a tensor of the base as a whole" if name in base.shapes else "is no part of an adapter"
            raise AdapterError(
                f"{path}: {key} {what}; only deltas of linear layers and a new head (modules_to_save) are read: merge "
                "it with PEFT (merge_and_unload) and convert the result with from-checkpoint"
            )
    for module, keys in modules.items():
        if missing := sorted(set(parts) - set(keys)):
            raise AdapterError(f"{path}: module {module} has no {missing[0]}")
        name = f"{module}.weight"
        delta = base.shapes.get(name, ())
        if config["peft_type"] == "LORA":
            delta = (*file.piece(keys["lora_B"]).shape[:1], *file.piece(keys["lora_A"]).shape[1:])
        base.check_linear(name, delta, str(path))
    if not modules:
        raise AdapterError(f"{path}: holds no adapted module (keys start with {_PREFIX}<module>.{parts[0]})")
    return modules, head


def _scale(config: Mapping[str, Any], module: str, a: Tensor) -> float:
    """alpha/r, or alpha/sqrt(r) with rank stabilisation (arXiv 2312.03732); patterns match as in PEFT."""
    rank = _of_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    fits = type(rank) is int and a.ndim == 2 and a.shape[0] == rank > 0
    if not fits or type(alpha) not in (int, float) or not abs(alpha) < MAX_ALPHA:
        raise AdapterError(f"{module}: rank {rank!r} and alpha {alpha!r} do not fit its factor {list(a.shape)}")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_pattern(patterns: Any, module: str, default: Any) -> Any:
    try:
        return next(
            (r for pattern, r in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default
        )
    except (re.error, AttributeError) as error:
        raise AdapterError(f"{CONFIG}: rank_pattern and alpha_pattern map regular expressions: {error}") from error


def _own_positions(metadata: Mapping[str, str]) -> dict[str, int]:
    try:
        own = json.loads(metadata.get(_OWN_POSITIONS, "{}"))
    except (ValueError, RecursionError):
        own = None
    if not isinstance(own, dict) or any(type(count) is not int or count < 0 for count in own.values()):
        raise AdapterError(f"{TENSORS}: its metadata {_OWN_POSITIONS} is not a table of counts")
    return own


def _read_shira(name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...], own: int | None) -> SparseTensor:
    """Positions sorted; the values of a position that occurs twice are added, as PEFT does."""
    values, pairs = parts["shira_weight"], parts["shira_indices"].to(torch.int64)
    if values.ndim != 1 or not values.is_floating_point() or pairs.shape != (2, values.numel()):
        raise AdapterError(
            f"{name}: {list(values.shape)} values at indices {list(pairs.shape)}, expected [n] and [2, n]"
        )
    if own is not None and not bool(values[own:].any()):  # else it was trained on since, and all positions are its own
        values, pairs = values[:own], pairs[:, :own]
    if pairs.numel() and (int(pairs.min()) < 0 or int(pairs[0].max()) >= shape[0] or int(pairs[1].max()) >= shape[1]):
        raise AdapterError(f"{name}: indices reach outside its shape {list(shape)}; was it made for another base?")
    indices, place = torch.unique(pairs[0] * shape[1] + pairs[1], return_inverse=True)
    total = torch.zeros(indices.numel(), dtype=torch.float64).index_add_(0, place, values.to(torch.float64))
    return SparseTensor(shape, indices, total.to(torch.float32))


# -- writing --

_Folder = tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]
"""Tensors, configuration and metadata of a folder."""


def _lora(tensors: Mapping[str, LowRank]) -> _Folder:
    """One r and alpha for all, patterns for the modules that differ from the first."""
    data: dict[str, Tensor] = {}
    settings = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        data[f"{_PREFIX}{module}.lora_A.weight"] = tensor.a
        data[f"{_PREFIX}{module}.lora_B.weight"] = tensor.b
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


def _shira(reader: AdapterReader) -> _Folder:
    """Supports filled up to r * (in + out) positions of value 0, which is what PEFT's layer holds."""
    sides = {name: sum(reader.shape(name)) for name in reader.names}
    rank = max(1, *(-(-reader.count(name) // sides[name]) for name in reader.names))
    for name in reader.names:
        numel = math.prod(reader.shape(name))
        if rank * sides[name] > numel or reader.count(name) == numel:
            raise AdapterError(
                f"{name}: PEFT's SHiRA wants r * (in + out) positions in every layer, here {rank} * {sides[name]} of "
                f"{numel}; this adapter is too dense for it: export it with to-checkpoint"
            )
    data: dict[str, Tensor] = {}
    for name in reader.names:
        tensor = reader.load(name)
        cols = tensor.shape[1]
        free = torch.ones(tensor.numel, dtype=torch.bool).index_fill_(0, tensor.indices, False)
        padding = torch.nonzero(free).view(-1)[: rank * sides[name] - tensor.indices.numel()]
        flat = torch.cat([tensor.indices, padding])
        module = _PREFIX + name.removesuffix(".weight")
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
    return data, config, {_OWN_POSITIONS: own}


def _head_modules(names: list[str], base: BaseLayout) -> list[str]:
    """The smallest list of modules that hold the head and nothing of the base: outermost ones."""
    found = set()
    for name in names:
        path = name.split(".")[:-1]
        outer = [".".join(path[: at + 1]) for at in range(len(path))]
        found.add(next((m for m in outer if not any(t.startswith(f"{m}.") for t in base.shapes)), name))
    return sorted(found)
