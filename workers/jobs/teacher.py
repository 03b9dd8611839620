"""What a teacher says of the answers of some rows: an expert of its own task's, or the base of rows that are to stay as
they are.

Runs where evaluations do, on the same model in memory: teachers are swapped in and out of it. What is kept of their
distributions is `workers.training.teaching`. Not covered: classification.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.store.s3 import FileRef, Store
from workers.jobs.evaluator import kept_evaluator
from workers.text.prompt import PromptSpec, encode_examples
from workers.text.rows import load_rows
from workers.training.objectives import language_modelling
from workers.training.teaching import ask, save_said

BATCH = 8
"""Rows that a teacher reads at a time. Part of no key, so it is one number everywhere: it shows in the last bits."""


@dataclass(frozen=True)
class TeacherJob:
    """Ask one teacher; only names and numbers, no tensors and no paths."""

    task: str
    recipe: Recipe
    inputs: Mapping[str, str]
    """The expert's digest by its key; nothing where the base is asked."""
    base_sha256: str
    adapter: FileRef | None
    """The expert's file; None asks the base."""
    rows: str
    """Object name of the task's training rows."""
    numbers: tuple[int, ...]
    """Which of them."""
    prompt: PromptSpec
    max_target_tokens: int
    top_k: int
    compute_dtype: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says about base and data; part of no key."""

    def __call__(self, store: Store, place: Place) -> Made:
        return (ask_teacher(store, self, place),)


def ask_teacher(store: Store, job: TeacherJob, place: Place) -> tuple[Manifest, bool]:
    """Ask and publish, unless it is known. Returns the manifest and whether this call made it.

    Raises AdapterError, BaseModelError, DataError or StoreError: inputs cannot be read.
    """
    found = find(store, job.recipe.key, job.inputs)
    if found is not None:  # made meanwhile, or by a try before this one
        return found, False
    start = time.perf_counter()
    evaluator = kept_evaluator(store, place, job.base_sha256, job.compute_dtype)
    model, tokenizer = evaluator.at(job.base_sha256, job.adapter, job.compute_dtype)
    rows = load_rows(store, job.rows)
    chosen = [rows[number] for number in job.numbers]
    examples = encode_examples(tokenizer, job.prompt, chosen, job.max_target_tokens)
    objective = language_modelling(model, int(tokenizer.pad_token_id))
    said = {job.numbers[at]: each for at, each in ask(model, objective, examples, job.top_k, BATCH)}
    with tempfile.TemporaryDirectory(prefix="factory-teacher-") as folder:
        file = Path(folder) / "teacher.safetensors"
        save_said(file, said)
        meta = {
            "task": job.task, "rows": len(said), "targets": sum(each.ids.shape[0] for each in said.values()),
            "bytes": file.stat().st_size, "seconds": time.perf_counter() - start, **job.provenance,
            "environment": environment(place.devices),
        }  # fmt: skip
        return publish(store, job.recipe, {"teacher": file}, job.inputs, meta)
