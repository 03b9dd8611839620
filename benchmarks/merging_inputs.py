"""The merging benchmark's inputs: a base and experts of SmolLM2-135M's names and shapes, made from seeds, kept on disk.

A base of random weights (bf16 values in an fp32 checkpoint); of every expert an adapter file (bf16 values, random
positions) and, for the programs that merge whole models, an fp32 checkpoint base + δ. Nothing is downloaded. A file
that exists is not made again, so an interrupted run resumes. Does not cover trained weights: only names, shapes,
density and scale of the values are those of real experts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from workers.adapters.support import LazyTensors, SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.base.prepare import base_identity
from workers.masks.spec import match_modules
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles, map_weights, write_weights
from workers.tensors.source import FileSource
from workers.tensors.writer import raw_bytes, write_tensors

SUPPORT = 0.05
"""Share of the positions of an adapted weight that an expert's support holds."""
BASE_SCALE, DELTA_SCALE = 0.04, 1e-3
"""Standard deviations of base weights and of δ, as of SmolLM2 and of an expert after some hundred steps."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inputs:
    """Where the files of one set of modules lie; paths of experts exist once they were asked for."""

    folder: Path
    modules: str

    @property
    def base(self) -> Path:
        """A checkpoint folder."""
        return self.folder / "base"

    @property
    def base_weights(self) -> Path:
        return self.base / WEIGHTS

    @property
    def base_bfloat16(self) -> Path:
        """The same weights (exactly) in bf16, as the pipeline keeps a base in the object store."""
        return self.folder / "base-bfloat16.safetensors"

    def adapter(self, number: int) -> Path:
        return self.folder / self.modules / "adapters" / f"{expert_name(number)}.safetensors"

    def changed(self) -> Path:
        """Another adapter for expert 0, as after it was trained again."""
        return self.folder / self.modules / "changed.safetensors"

    def checkpoint(self, number: int) -> Path:
        """A checkpoint folder."""
        return self.folder / self.modules / "checkpoints" / expert_name(number)


def expert_name(number: int) -> str:
    return f"expert-{number:04d}"


def config() -> LlamaConfig:
    """SmolLM2-135M's."""
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="float32",
    )  # fmt: skip


def model_shapes(modules: str) -> tuple[Shapes, list[str]]:
    """Shapes of all tensors of a checkpoint, and the names of those that an expert changes."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    linear: Iterable[str] = match_modules(model, modules)
    return shapes, [f"{name}.weight" for name in linear if isinstance(model.get_submodule(name), nn.Linear)]


def make_inputs(folder: Path, modules: str, adapters: int, checkpoints: int) -> Inputs:
    """Make what is missing of the base, the experts' adapters, the changed one and the experts' checkpoints."""
    inputs = Inputs(folder, modules)
    shapes, adapted = model_shapes(modules)
    chosen = {name: shapes[name] for name in adapted}
    if not inputs.base_weights.exists():
        _write_checkpoint(inputs.base, shapes, {name: _base_tensor(name, shape) for name, shape in shapes.items()})
    if not inputs.base_bfloat16.exists():
        write_weights(inputs.base_bfloat16, CheckpointFiles.in_file(inputs.base_weights), torch.bfloat16)
    sha256 = base_sha256(inputs)
    inputs.changed().parent.mkdir(parents=True, exist_ok=True)
    inputs.adapter(0).parent.mkdir(exist_ok=True)
    for path, seed in [(inputs.adapter(n), f"{n}") for n in range(adapters)] + [(inputs.changed(), "changed")]:
        if not path.exists():
            _write_adapter(path, chosen, seed, sha256)
    base = map_weights(inputs.base_weights) if checkpoints else {}
    for number in range(checkpoints):
        if not (inputs.checkpoint(number) / WEIGHTS).exists():
            reader = AdapterReader(FileSource(inputs.adapter(number)))
            _write_checkpoint(inputs.checkpoint(number), shapes, _Applied(base, reader))
    return inputs


def base_sha256(inputs: Inputs) -> str:
    """The base's identity, as `workers.base.prepare` defines it; kept beside it, since it takes reading every byte."""
    note = inputs.folder / "base.sha256"
    if not note.exists():
        note.write_text(base_identity(inputs.base))
    return note.read_text()


def needed_bytes(modules: str, adapters: int, checkpoints: int) -> int:
    """Disk that the inputs take: 4 bytes a weight of a checkpoint, 3 a value of an adapter."""
    shapes, adapted = model_shapes(modules)
    total = sum(math.prod(shape) for shape in shapes.values())
    values = sum(math.prod(shapes[name]) for name in adapted) * SUPPORT
    return round(4 * total * (checkpoints + 1.5) + 3.05 * values * (adapters + 1))


def dense(tensor: SparseTensor) -> Tensor:
    """fp32, zero outside the support."""
    flat = torch.zeros(tensor.numel)
    flat[tensor.indices] = tensor.values.float()
    return flat.view(tensor.shape)


class _Applied(Mapping[str, Tensor]):
    """base + δ, fp32, each tensor made when it is asked for."""

    def __init__(self, base: Mapping[str, Tensor], reader: AdapterReader) -> None:
        self._base, self._reader, self._adapted = base, reader, set(reader.names)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name]
        return weight + dense(self._reader.load(name)) if name in self._adapted else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def _generator(*parts: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(hashlib.sha256("/".join(parts).encode()).hexdigest()[:15], 16))


def _base_tensor(name: str, shape: Sequence[int]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(*shape)
    return (torch.randn(*shape, generator=_generator("base", name)) * BASE_SCALE).bfloat16().float()


def _sparse_tensor(name: str, shape: tuple[int, ...], seed: str) -> SparseTensor:
    """Every position is drawn on its own with probability SUPPORT; the gaps between the drawn are geometric."""
    generator, total = _generator("expert", seed, name), math.prod(shape)
    draws = round(total * SUPPORT * 1.1) + 100
    indices = torch.empty(draws, dtype=torch.int64).geometric_(SUPPORT, generator=generator).cumsum(0) - 1
    indices = indices[indices < total]
    values = torch.randn(indices.numel(), generator=generator) * DELTA_SCALE
    return SparseTensor(shape, indices, values)


def _write_adapter(path: Path, shapes: Shapes, seed: str, sha256: str) -> None:
    tensors = LazyTensors(shapes, lambda name: _sparse_tensor(name, shapes[name], seed))
    meta = AdapterMeta(base_sha256=sha256, kind="sparse", info={"recipe": hashlib.sha256(seed.encode()).hexdigest()})
    part = path.with_suffix(".part")
    save_adapter(part, tensors, meta)
    part.replace(path)


def _write_checkpoint(folder: Path, shapes: Shapes, tensors: Mapping[str, Tensor]) -> None:
    """config.json first: the weights' name appears last, and says that the folder is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {**config().to_diff_dict(), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(text, indent=1))
    rows = [(name, torch.float32, shape) for name, shape in shapes.items()]
    write_tensors(folder / WEIGHTS, rows, lambda name: [raw_bytes(tensors[name])])
