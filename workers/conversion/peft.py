"""PEFT adapter folders: LoRA (arXiv 2106.09685) and SHiRA (arXiv 2406.13175) adapters read
(`workers.conversion.peft_writer`: written).

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
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import AdapterError
from workers.adapters.format import LowRank
from workers.adapters.support import SparseTensor
from workers.base.layout import BaseLayout
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles, resized
from workers.tensors.reader import TensorReader
from workers.tensors.source import FileSource

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
OWN_POSITIONS = "own_positions"
MAX_ALPHA = 2.0**30
"""Largest |alpha| of a folder: JSON allows integers that no float holds."""
_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.\w+)?)\.(weight|bias)$")
"""What stands in the names of the base's own tensors where PEFT wraps their module."""
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
    """What a folder holds: ``tensors`` and ``head`` as `save_adapter` takes them, its ``kind``, what to record, and
    the tensors of the base that were ``unchanged``."""

    tensors: dict[str, SparseTensor | LowRank]
    head: dict[str, Tensor]
    kind: str
    info: dict[str, Any]
    unchanged: tuple[str, ...] = ()


@dataclass(frozen=True)
class PeftOutline:
    """What a folder holds, without its contents: ``shapes`` of the weights that it changes by name, names of its
    ``head``'s tensors, and of the tensors of the base that were saved along ``unchanged``."""

    shapes: dict[str, tuple[int, ...]]
    head: tuple[str, ...]
    unchanged: tuple[str, ...]


@dataclass(frozen=True)
class _Keys:
    """``modules``: keys of each adapted module by part; ``head``: those of the head by parameter name."""

    modules: dict[str, dict[str, str]]
    head: dict[str, str]
    unchanged: list[str]


def read_peft(folder: Path, base: BaseLayout) -> Imported:
    """The adapter in ``folder``, checked against ``base``. ``AdapterError`` for anything that cannot be kept."""
    config = _read_config(folder)
    file = _open(folder / PEFT_TENSORS)
    keys_of = _sort_keys(file, config, base, folder / PEFT_TENSORS)
    own = _own_positions(file.metadata)
    tensors: dict[str, SparseTensor | LowRank] = {}
    for module, keys in sorted(keys_of.modules.items()):
        name = f"{module}.weight"
        parts = {part: file.read(key) for part, key in keys.items()}
        if config["peft_type"] == "LORA":
            tensors[name] = LowRank(parts["lora_A"], parts["lora_B"], _scale(config, module, parts["lora_A"]))
        else:
            tensors[name] = _read_shira(name, parts, base.shapes[name], own.get(name))
    heads = {name: file.read(key) for name, key in keys_of.head.items()}
    kind = "lora" if config["peft_type"] == "LORA" else "sparse"
    info = {"source": "peft", "peft_type": config["peft_type"], "r": config["r"]}
    return Imported(tensors, heads, kind, info, tuple(sorted(keys_of.unchanged)))


def peft_outline(folder: Path, base: BaseLayout) -> PeftOutline:
    """What the adapter in ``folder`` changes, checked as by :func:`read_peft`, but for its contents: of them only what
    might be a tensor of the base, saved along, is read."""
    config = _read_config(folder)
    keys = _sort_keys(_open(folder / PEFT_TENSORS), config, base, folder / PEFT_TENSORS)
    names = sorted(f"{module}.weight" for module in keys.modules)
    shapes = {name: base.shapes[name] for name in names}
    return PeftOutline(shapes, tuple(sorted(keys.head)), tuple(sorted(keys.unchanged)))


def other_base(folder: Path, names: Collection[str]) -> str | None:
    """The model that the folder says it was made for, with its revision; None where it says none, or one of ``names``.

    Names are compared by their last part, whatever case: a repository, a folder of it and a package's model are one.
    """
    config = _read_config(folder)
    given = config.get("base_model_name_or_path")
    if not isinstance(given, str) or not given.strip():
        return None
    if _last_part(given) in {_last_part(name) for name in names}:
        return None
    return f"{given}@{config['revision']}" if isinstance(config.get("revision"), str) else given


def _last_part(name: str) -> str:
    return re.split(r"[/\\:]", name.strip().rstrip("/\\").partition("@")[0])[-1].lower()


def _open(path: Path) -> TensorReader:
    def bad(reason: str) -> AdapterError:
        return AdapterError(f"{path}: cannot be read ({reason}); pickled adapters (.bin) are not accepted")

    if not path.is_file():
        raise bad("no such file")
    return TensorReader(FileSource(path), bad)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / PEFT_CONFIG
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


def _sort_keys(file: TensorReader, config: Mapping[str, Any], base: BaseLayout, path: Path) -> _Keys:
    """The keys of a file by what they are, all checked against the base."""
    parts = ("lora_A", "lora_B") if config["peft_type"] == "LORA" else ("shira_weight", "shira_indices")
    pattern = re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(parts)})" + (r"\.weight" if "lora_A" in parts else ""))
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise AdapterError(f"{path}: {PEFT_CONFIG} has modules_to_save {saved!r}; a list of names is accepted")
    modules: dict[str, dict[str, str]] = {}
    head: dict[str, str] = {}
    unchanged: list[str] = []
    for key in file.pieces:
        name = key.removeprefix(PREFIX)
        whole = _WRAPPED.sub(r".\1", name)
        if match := pattern.fullmatch(key):
            modules.setdefault(match.group(1), {})[match.group(2)] = key
        elif (
            name != key
            and whole not in base.shapes
            and whole not in base.tied
            and any(f".{module}." in f".{whole}" for module in saved)
        ):
            head[name] = key
        elif name != key and _is_unchanged(file, key, whole, base):
            unchanged.append(whole)
        else:
            what = _strange(whole, file.piece(key).shape, base, path)
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
        raise AdapterError(f"{path}: holds no adapted module (keys start with {PREFIX}<module>.{parts[0]})")
    return _Keys(modules, head, unchanged)


def _is_unchanged(file: TensorReader, key: str, name: str, base: BaseLayout) -> bool:
    """Whether a tensor that was saved along is the base's own, as the type that it is saved in holds it."""
    own = base.tied.get(name, name)
    if own not in base.shapes or file.piece(key).shape != base.shapes[own]:
        return False
    saved, weight = file.read(key), CheckpointFiles.in_file(base.path / WEIGHTS).read(own)
    return torch.equal(saved, weight.to(saved.dtype)) or torch.equal(saved.to(weight.dtype), weight)


def _strange(name: str, shape: tuple[int, ...], base: BaseLayout, path: Path) -> str:
    """What a key is that no adapter of linear layers has. Raises AdapterError where another vocabulary explains it."""
    own = base.tied.get(name, name)
    if own in base.shapes:
        if said := resized(name, shape, base.shapes[own]):
            raise AdapterError(f"{path}: {said}")
        return "trains a tensor of the base as a whole"
    if ".lora_embedding_" in name:
        return "is LoRA on an embedding table"
    return "is no part of an adapter"


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
        raise AdapterError(f"{PEFT_CONFIG}: rank_pattern and alpha_pattern map regular expressions: {error}") from error


def _own_positions(metadata: Mapping[str, str]) -> dict[str, int]:
    try:
        own = json.loads(metadata.get(OWN_POSITIONS, "{}"))
    except (ValueError, RecursionError):
        own = None
    if not isinstance(own, dict) or any(type(count) is not int or count < 0 for count in own.values()):
        raise AdapterError(f"{PEFT_TENSORS}: its metadata {OWN_POSITIONS} is not a table of counts")
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
