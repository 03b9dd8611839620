"""A router: one centroid for each task, the mean over training rows of the base's mean hidden state over the prompt."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.store.s3 import Store
from workers.jobs.evaluator import Evaluator, kept_evaluator
from workers.jobs.shared_support import PooledTask
from workers.scoring.routing import mean_states
from workers.tensors.writer import PLAIN, save_tensors
from workers.text.prompt import encode_prompt
from workers.text.rows import load_rows


@dataclass(frozen=True)
class RouterJob:
    """Take the centroids of these tasks, in this order."""

    recipe: Recipe
    base_sha256: str
    tasks: tuple[PooledTask, ...]
    rows: int
    """Training rows of each, at most."""
    compute_dtype: str
    batch_size: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says about base and data (licences); part of no key."""

    def __call__(self, store: Store, place: Place) -> Made:
        return (make_router(store, self, kept_evaluator(store, place, self.base_sha256, self.compute_dtype)),)


def make_router(store: Store, job: RouterJob, evaluator: Evaluator) -> tuple[Manifest, bool]:
    """Measure and publish the centroids, fp32 [tasks, width], unless they exist."""
    found = find(store, job.recipe.key, {})
    if found is not None:  # made meanwhile, or by a try before this one
        return found, False
    start = time.perf_counter()
    model, tokenizer = evaluator.at(job.base_sha256, None, "")
    centroids, count = [], 0
    for task in job.tasks:
        prompts = [encode_prompt(tokenizer, task.prompt, row) for row in load_rows(store, task.rows)[: job.rows]]
        centroids.append(mean_states(model, tokenizer, prompts, job.batch_size).mean(0))
        count += len(prompts)
    meta = {
        "tasks": len(job.tasks),
        "rows": count,
        "seconds": time.perf_counter() - start,
        **job.provenance,
        "environment": environment(evaluator.devices),
    }
    with tempfile.TemporaryDirectory(prefix="factory-router-") as folder:
        file = Path(folder) / "router.safetensors"
        save_tensors(file, {"centroids": torch.stack(centroids)}, PLAIN)
        return publish(store, job.recipe, {"router": file}, {}, meta)
