"""Scoring models on tasks: what an evaluation actor holds and does.

The base is loaded once per evaluator; adapters are swapped in and out in place and undone bit-exactly. The pipeline
wraps this class in a Ray actor.
"""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.store.s3 import FileRef, Store
from workers.adapters.task_mask import MaskedAdapter, MaskReader
from workers.adapters.writer import AdapterReader, check_base
from workers.base.cache import cache_dir
from workers.base.load import load_classifier, load_classifier_tokenizer, load_model, load_tokenizer
from workers.base.prepare import fetch_base
from workers.scoring.classification import ClassifySpec, evaluate_labels, head_state, set_head
from workers.scoring.likelihood import EvaluateSpec, EvaluationResult, evaluate_rows
from workers.scoring.routing import mean_states, nearest
from workers.tensors.reader import TensorReader, damaged
from workers.tensors.source import FileSource
from workers.text.prompt import encode_prompt
from workers.text.rows import Row, load_rows
from workers.training.devices import spread
from workers.training.in_place import DeltaSource, apply_delta

KEPT_HEADS = 64
"""Heads of classification that an evaluator remembers, with the files they came from."""


@dataclass(frozen=True)
class Routes:
    """A model that is several experts: each row is answered by the one whose centroid its prompt is nearest to."""

    router: FileRef
    experts: tuple[FileRef, ...]
    """In the order of the router's centroids."""


@dataclass(frozen=True)
class EvaluationJob:
    """Score one model on one split of one task."""

    recipe: Recipe
    base_sha256: str
    task: str
    split: str
    rows: str
    """Object name of the rows."""
    spec: EvaluateSpec | ClassifySpec
    model: str
    """Name for people: base, expert or a merge method."""
    adapter: FileRef | None
    """The adapter's file; None scores the base, or what `routes` names."""
    compute_dtype: str
    weights_dtype: str
    """Adapted weights are rounded to this type before scoring."""
    batch_size: int
    """Rows at a time; changes no score."""
    head: FileRef | None = None
    """Classification: the adapter file whose head is used; None takes the untrained head that an expert starts from."""
    head_seed: int = 0
    """Classification: seed of the untrained head."""
    mask: FileRef | None = None
    """A task's mask file of `adapter` (EMR, TALL): only what the mask keeps is added, scaled as it says."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the manifest says about base and data (name, source, licence); part of no key."""
    routes: Routes | None = None
    """Experts that share the rows among them; only for language models."""

    @property
    def classifies(self) -> bool:
        """Whether it is labels that are scored."""
        return isinstance(self.spec, ClassifySpec)

    def __call__(self, store: Store, place: Place) -> Made:
        evaluator = kept_evaluator(store, place, self.base_sha256, self.compute_dtype, self.classifies)
        return (evaluator.evaluate(self, self.batch_size),)


def kept_evaluator(
    store: Store, place: Place, base_sha256: str, compute_dtype: str, classifies: bool = False
) -> "Evaluator":
    """The evaluator that stays in a worker's memory; it may hold another base."""

    def load() -> Evaluator:
        return Evaluator(store, base_sha256, compute_dtype, classifies, place.devices, place.threads)

    return place.keep(("evaluator", compute_dtype, classifies), load)


class Evaluator:
    """A base in memory, the one that the last job named, and at most one adapter applied to it.

    `classifies`: with a head for labels.
    """

    def __init__(
        self, store: Store, base_sha256: str, compute_dtype: str, classifies: bool, devices: Sequence[str], threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._store = store
        self._dtype = getattr(torch, compute_dtype)
        self._classifies, self.devices = classifies, devices
        self._applied: tuple[str, str | None, str] | None = None
        self._heads: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self._undo: Callable[[], None] = lambda: None
        self._load(base_sha256)

    def evaluate(self, job: EvaluationJob, batch_size: int) -> tuple[Manifest, bool]:
        """Score and publish, unless the scores exist; the manifest's `meta` holds those of every row."""
        earlier = find(self._store, job.recipe.key, {})
        if earlier is not None:  # made meanwhile, or by a try before this one
            return earlier, False
        self._rebase(job.base_sha256)
        before = time.perf_counter()
        swapped = self._swap(job.adapter, job.mask, job.weights_dtype)
        start = time.perf_counter()
        rows = load_rows(self._store, job.rows)
        if isinstance(job.spec, ClassifySpec):
            set_head(self._model, self._head(job, len(job.spec.labels)))
            labelled = evaluate_labels(self._model, self._tokenizer, rows, job.spec, batch_size)
            scores, outputs, free = labelled.scores, labelled.outputs, labelled.scores
            found = {"score": labelled.score, **dataclasses.asdict(labelled.label_scores)}
        else:
            routes, ask = job.routes, partial(self._asked, job.spec, batch_size)
            result = ask(rows) if routes is None else self._routed(routes, rows, ask, job)
            scores, outputs, free = result.scores, result.outputs, result.format_free
            found = {"score": sum(scores) / len(scores)}
        meta = {
            "task": job.task,
            "split": job.split,
            "model": job.model,
            **found,
            "metric": job.spec.metric,
            "n": len(scores),
            "format_free": sum(free) / len(free),
            "scores": list(scores),
            "seconds": time.perf_counter() - start,
            "swap_seconds": start - before if swapped else None,
            "batch_size": batch_size,
            **job.provenance,
            "environment": environment(self.devices),
        }
        with tempfile.TemporaryDirectory(prefix="factory-evaluation-") as folder:
            file = Path(folder) / "rows.jsonl"
            with file.open("w") as out:
                for row, output, score, plain in zip(rows, outputs, scores, free, strict=True):
                    line = {"id": row.id, "output": output, "targets": row.targets, "score": score}
                    out.write(json.dumps({**line, "format_free": plain}, ensure_ascii=False) + "\n")
            return publish(self._store, job.recipe, {"rows": file}, {}, meta)

    def at(self, base_sha256: str, adapter: FileRef | None, weights_dtype: str) -> tuple[Any, Any]:
        """A base with an adapter in it, nobody else's until the next call, and its tokenizer."""
        self._rebase(base_sha256)
        self._swap(adapter, None, weights_dtype)
        return self._model, self._tokenizer

    def _asked(self, spec: EvaluateSpec, batch_size: int, rows: Sequence[Row]) -> EvaluationResult:
        return evaluate_rows(self._model, self._tokenizer, rows, spec, batch_size)

    def _routed(
        self, routes: Routes, rows: Sequence[Row], ask: Callable[[Sequence[Row]], EvaluationResult], job: EvaluationJob
    ) -> EvaluationResult:
        """Each row by its expert, one expert after the other. The model is the base when this is called."""
        assert isinstance(job.spec, EvaluateSpec)
        with tempfile.TemporaryDirectory(prefix="factory-router-") as folder:
            source = self._fetched(routes.router, Path(folder))
            centroids = TensorReader(source, damaged(routes.router.name)).read("centroids")
        prompts = [encode_prompt(self._tokenizer, job.spec.prompt, row) for row in rows]
        chosen = nearest(mean_states(self._model, self._tokenizer, prompts, job.batch_size), centroids)
        found: dict[int, tuple[float, str, float]] = {}
        for expert in sorted(set(chosen)):
            own = [at for at, number in enumerate(chosen) if number == expert]
            self._swap(routes.experts[expert], None, job.weights_dtype)
            answered = ask([rows[at] for at in own])
            told = zip(answered.scores, answered.outputs, answered.format_free, strict=True)
            found |= dict(zip(own, told, strict=True))
        scores, outputs, free = zip(*(found[at] for at in range(len(rows))), strict=True)
        return EvaluationResult(scores, outputs, free)

    def _load(self, base_sha256: str) -> None:
        path, dtype = fetch_base(self._store, base_sha256, cache_dir()), self._dtype
        self._tokenizer = load_classifier_tokenizer(path) if self._classifies else load_tokenizer(path)
        model = load_classifier(path, 2, dtype) if self._classifies else load_model(path, dtype)
        self._model = spread(model, self.devices)
        self._path, self._loaded = path, base_sha256

    def _rebase(self, base_sha256: str) -> None:
        """Hold this base instead of the present one, never both."""
        if base_sha256 == self._loaded:
            return
        self._undo, self._applied, self._loaded = (lambda: None), None, ""
        self._model = torch.nn.Module()
        self._load(base_sha256)

    def _head(self, job: EvaluationJob, labels: int) -> dict[str, torch.Tensor]:
        """The tensors of the head that the job names."""
        if job.head is None:
            return head_state(load_classifier(self._path, labels, self._dtype, job.head_seed))
        if job.head.name not in self._heads:
            with self._opened(job.head):
                pass
        return self._heads[job.head.name]

    @contextlib.contextmanager
    def _opened(self, adapter: FileRef) -> Iterator[AdapterReader]:
        """A verified local copy of an adapter of this base. Its head is kept, so that the file is not fetched again."""
        with tempfile.TemporaryDirectory(prefix="factory-adapter-") as folder:
            reader = AdapterReader(self._fetched(adapter, Path(folder)))
            check_base(reader, self._loaded)
            self._heads[adapter.name] = {name: reader.load_head(name) for name in reader.head_names}
            if len(self._heads) > KEPT_HEADS:
                self._heads.popitem(last=False)
            yield reader

    def _fetched(self, ref: FileRef, folder: Path) -> FileSource:
        return FileSource(self._store.download_file(ref, folder / Path(ref.name).name))

    def _swap(self, adapter: FileRef | None, mask: FileRef | None, weights_dtype: str) -> bool:
        """Make the model base + adapter, touching nothing if it already is; whether an adapter was fetched for that."""
        wanted = (adapter.name, mask.name if mask else None, weights_dtype) if adapter else None
        if wanted == self._applied:
            return False
        self._undo()
        self._undo, self._applied = (lambda: None), None
        if adapter is None:
            return False
        with self._opened(adapter) as reader, self._masked(reader, adapter, mask) as changes:
            self._undo = apply_delta(self._model, changes, getattr(torch, weights_dtype)).restore
        self._applied = wanted
        return True

    @contextlib.contextmanager
    def _masked(self, reader: AdapterReader, adapter: FileRef, mask: FileRef | None) -> Iterator[DeltaSource]:
        """The adapter as it is, or only what the task's mask keeps of it."""
        if mask is None:
            yield reader
            return
        with tempfile.TemporaryDirectory(prefix="factory-mask-") as folder:
            yield MaskedAdapter(reader, MaskReader(self._fetched(mask, Path(folder))), adapter.sha256)
