"""One support for all experts: positions scored on the rows of all tasks together, made once and shared by reference.

Random supports of many experts fill the merge up (20 of 5 % cover 64 % of the weights); one shared support stays as
sparse as each expert. Criteria that need no data (random, magnitude) need no such artifact: a common seed is enough.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.store.s3 import FileRef, Store
from infra.store.source import StoreSource
from workers.adapters.support import Block, SparseTensor, SupportSpec, find_blocks
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.base.cache import cache_dir
from workers.base.load import load_model, load_tokenizer
from workers.base.prepare import fetch_base
from workers.masks.spec import MaskSpec, select_supports, unit_of
from workers.text.prompt import Example, PromptSpec, encode_example
from workers.text.rows import load_rows
from workers.training.devices import spread
from workers.training.loop import recompute_layers
from workers.training.objectives import language_modelling


@dataclass(frozen=True)
class PooledTask:
    """Training rows of one task and their prompt."""

    rows: str
    prompt: PromptSpec


@dataclass(frozen=True)
class SupportJob:
    """Score the positions on rows of all tasks."""

    recipe: Recipe
    base_sha256: str
    tasks: tuple[PooledTask, ...]
    max_target_tokens: int
    mask: MaskSpec
    batch_size: int
    compute_dtype: str
    recompute: bool
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the manifest says about base and data (licences); part of no key."""

    def __call__(self, store: Store, place: Place) -> Made:
        return (make_support(store, self, place.devices, place.threads),)


@dataclass(frozen=True)
class SupportRef:
    """A support in the object store."""

    key: str
    digest: str
    file: FileRef
    mask: MaskSpec


def make_support(store: Store, job: SupportJob, devices: Sequence[str], threads: int) -> tuple[Manifest, bool]:
    """Select, save and publish the support, unless it exists. Returns its manifest and whether this call made it."""
    found = find(store, job.recipe.key, {})
    if found is not None:  # made meanwhile, or by a try before this one
        return found, False
    start = time.perf_counter()
    torch.set_num_threads(threads)
    path = fetch_base(store, job.base_sha256, cache_dir())
    tokenizer = load_tokenizer(path)
    model = spread(load_model(path, getattr(torch, job.compute_dtype)), devices)
    per_task = math.ceil(job.mask.score_batches * job.batch_size / len(job.tasks))
    pools = [
        [
            encode_example(tokenizer, task.prompt, row, max_target_tokens=job.max_target_tokens)
            for row in load_rows(store, task.rows)[:per_task]
        ]
        for task in job.tasks
    ]
    if job.recompute:
        recompute_layers(model)
    supports = pooled_supports(model, pools, job.mask, job.batch_size, tokenizer.pad_token_id)
    tensors, blocks = {}, {}
    for name, support in supports.items():
        indices = support.indices()
        tensors[f"{name}.weight"] = SparseTensor(support.shape, indices, torch.zeros(indices.numel()))
        if support.block is not None:
            blocks[f"{name}.weight"] = support.block
    meta = {
        "tasks": len(job.tasks),
        "rows": sum(map(len, pools)),
        "seconds": time.perf_counter() - start,
        **job.provenance,
        "environment": environment(devices),
    }
    with tempfile.TemporaryDirectory(prefix="factory-support-") as folder:
        file = Path(folder) / "support.safetensors"
        about = AdapterMeta(job.base_sha256, kind="support", info={"recipe": job.recipe.key})
        save_adapter(file, tensors, about, blocks=blocks)
        return publish(store, job.recipe, {"support": file}, {}, meta)


def pooled_supports(
    model: torch.nn.Module, pools: Sequence[Sequence[Example]], mask: MaskSpec, batch_size: int, pad_id: int
) -> dict[str, SupportSpec]:
    """Supports scored on all examples, the tasks taking turns, in batches of `batch_size`.

    Every prediction weighs the same, whatever the size of the last batch.
    """
    turns = max(map(len, pools))
    mixed = [pool[turn] for turn in range(turns) for pool in pools if turn < len(pool)]
    objective = language_modelling(model, pad_id)
    batches = [mixed[at : at + batch_size] for at in range(0, len(mixed), batch_size)]
    per_batch = sum(map(objective.count, mixed)) / len(batches)

    def loss_of(batch: Sequence[Example]) -> Callable[[], torch.Tensor]:
        return lambda: objective.loss_sum(model, batch) / per_batch

    whole = dataclasses.replace(mask, score_batches=len(batches))
    return select_supports(model, whole, [loss_of(batch) for batch in batches])


def load_support(store: Store, ref: SupportRef) -> dict[str, SupportSpec]:
    """The shared support: module name to its positions."""
    reader = AdapterReader(StoreSource(store, ref.file.name, ref.file.size))
    supports = {}
    for name in reader.names:
        tensor = reader.load(name)
        rows, columns = tensor.shape
        block: Block | None = unit_of(ref.mask, (rows, columns))
        units = tensor.indices if block is None else find_blocks(tensor.indices, tensor.shape, block, name)
        supports[name.removesuffix(".weight")] = SupportSpec((rows, columns), units, block)
    return supports
