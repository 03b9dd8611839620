"""A merged adapter as a full checkpoint in the object store: a job like those of `merge.tree.jobs`, after them."""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.store.layout import base_file, base_index, new_attempt
from infra.store.s3 import Store
from infra.store.source import StoreSource
from infra.store.writer import StoreTarget
from merge.files.checkpoint import BaseCheckpoint
from merge.files.checkpoint_writer import write_checkpoint
from merge.files.merged import AdapterDelta
from merge.tree.jobs import Ref
from merge.tree.keys import checkpoint_recipe
from merge.tree.licences import licences_of
from workers.tensors.source import FileSource


@dataclass(frozen=True)
class ExportJob:
    """A merged adapter as a full checkpoint."""

    recipe: Recipe
    merged: Ref
    base_sha256: str
    dtype: str
    shard_bytes: int

    def __call__(self, store: Store, place: Place) -> Made:
        return (export_checkpoint(store, self),)


def export_job(merged: Manifest, base_sha256: str, dtype: str, shard_bytes: int) -> ExportJob:
    """The job that makes a checkpoint of a merged adapter. `dtype`: float32 or bfloat16, of every floating tensor."""
    recipe = checkpoint_recipe(merged.digest, base_sha256, dtype, shard_bytes)
    return ExportJob(recipe, Ref.of(merged), base_sha256, dtype, shard_bytes)


def export_checkpoint(store: Store, job: ExportJob) -> tuple[Manifest, bool]:
    """Stream base + δ into a full checkpoint in the store and publish it: its files are labelled with their names.

    One that exists is found. Its manifest has no inputs: its key holds the digest of the merge, whatever that one's key
    is. Raises StoreError, AdapterError or MergeError.
    """
    start = time.perf_counter()
    earlier = find(store, job.recipe.key, {})
    if earlier is not None:
        return earlier, False
    index = json.loads(store.get(base_index(job.base_sha256)))
    base = BaseCheckpoint.from_index(index, lambda name: StoreSource(store, base_file(job.base_sha256, name)))
    target = StoreTarget(store, new_attempt(job.recipe.key))
    with tempfile.TemporaryDirectory(prefix="factory-export-") as scratch:
        local = store.download_file(job.merged.files[0], Path(scratch) / "adapter.safetensors")
        merged = AdapterDelta(FileSource(local), "the merge")
        info = write_checkpoint(merged, base, target, getattr(torch, job.dtype), job.shard_bytes)
    meta = {
        "dtype": job.dtype,
        "parameters": info.parameters,
        "rounding_loss": info.rounding_loss,
        "base_sha256": job.base_sha256,
        "licenses": licences_of(store, [job.merged.key]),
        "seconds": time.perf_counter() - start,
        "environment": environment(),
    }
    return publish(store, job.recipe, target.files, {}, meta)
