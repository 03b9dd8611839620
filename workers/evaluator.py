"""Scoring models on tasks: what an evaluation actor holds and does.

The base is loaded once per evaluator; adapters are swapped in and out in place and undone bit-exactly. The pipeline
wraps this class in a Ray actor.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.artifacts import Manifest, Recipe, publish
from infra.environment import environment
from infra.store import FileRef, Store
from workers.adapter import AdapterReader, FileSource, check_base
from workers.base import fetch_base
from workers.cache import cache_dir
from workers.inplace import apply_delta
from workers.model import load_model, load_tokenizer
from workers.rows import load_rows
from workers.scoring import EvaluateSpec, evaluate_rows


@dataclass(frozen=True)
class EvaluationJob:
    """Score one model on one split of one task."""

    recipe: Recipe
    task: str
    split: str
    rows: str
    """Object name of the rows."""
    spec: EvaluateSpec
    model: str
    """Name for people: base, expert or a merge method."""
    adapter: FileRef | None
    """The adapter's file; None scores the base."""
    weights_dtype: str
    """Adapted weights are rounded to this type before scoring."""


class Evaluator:
    """A base in memory and at most one adapter applied to it."""

    def __init__(self, store: Store, base_sha256: str, compute_dtype: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._store = store
        self._base_sha256 = base_sha256
        path = fetch_base(store, base_sha256, cache_dir())
        self._tokenizer = load_tokenizer(path)
        self._model = load_model(path, getattr(torch, compute_dtype)).to(device)
        self._applied: tuple[str, str] | None = None
        self._undo: Callable[[], None] = lambda: None

    def evaluate(self, job: EvaluationJob, batch_size: int) -> tuple[Manifest, bool]:
        """Score and publish; the manifest's `meta` holds the scores of every row."""
        self._swap(job.adapter, job.weights_dtype)
        start = time.perf_counter()
        rows = load_rows(self._store, job.rows)
        result = evaluate_rows(self._model, self._tokenizer, rows, job.spec, batch_size)
        meta = {
            "task": job.task,
            "split": job.split,
            "model": job.model,
            "metric": job.spec.metric,
            "n": len(result.scores),
            "score": sum(result.scores) / len(result.scores),
            "format_free": sum(result.format_free) / len(result.format_free),
            "scores": list(result.scores),
            "seconds": time.perf_counter() - start,
            "environment": environment(),
        }
        with tempfile.TemporaryDirectory(prefix="factory-evaluation-") as folder:
            file = Path(folder) / "rows.jsonl"
            with file.open("w") as out:
                for row, output, score, free in zip(
                    rows, result.outputs, result.scores, result.format_free, strict=True
                ):
                    line = {"id": row.id, "output": output, "targets": row.targets, "score": score, "format_free": free}
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
            return publish(self._store, job.recipe, {"rows": file}, {}, meta)

    def _swap(self, adapter: FileRef | None, weights_dtype: str) -> None:
        """Make the model base + adapter, touching nothing if it already is."""
        wanted = (adapter.name, weights_dtype) if adapter else None
        if wanted == self._applied:
            return
        self._undo()
        self._undo, self._applied = (lambda: None), None
        if adapter is None:
            return
        with tempfile.TemporaryDirectory(prefix="factory-adapter-") as folder:
            local = Path(folder) / "adapter.safetensors"
            self._store.download_file(adapter, local)
            reader = AdapterReader(FileSource(local))
            check_base(reader, self._base_sha256)
            self._undo = apply_delta(self._model, reader, getattr(torch, weights_dtype)).restore
        self._applied = wanted
