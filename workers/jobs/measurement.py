"""One measurement of one expert: at W + δ in fp32, on training rows of its own task, with its prompt and objective.

Rows go through the model one at a time. What is measured of them is `workers.measuring`'s business.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.errors import AdapterError, ConfigError, ExpertError
from infra.store.s3 import FileRef, Store
from workers.adapters.writer import AdapterReader, check_base
from workers.base.cache import cache_dir
from workers.base.load import load_classifier, load_classifier_tokenizer, load_model, load_tokenizer
from workers.base.prepare import fetch_base
from workers.measuring.catalogue import MEASUREMENTS
from workers.measuring.file import MeasuredOn
from workers.measuring.measurement import RowLoss, Subject
from workers.scoring.classification import Classification, encode_labelled, set_head
from workers.tensors.source import FileSource
from workers.text.prompt import Example, PromptSpec, encode_example
from workers.text.rows import Row, load_rows
from workers.training.devices import spread
from workers.training.in_place import apply_delta
from workers.training.objectives import Objective, language_modelling


@dataclass(frozen=True)
class TrainingRows:
    """Training rows of a task as models are shown them; only names and numbers."""

    name: str
    """Object name of the rows."""
    count: int
    """Most rows that are taken, evenly spaced over all."""
    prompt: PromptSpec
    max_target_tokens: int
    labels: tuple[str, ...] | None
    """Labels of a classification task; None for language modelling."""


@dataclass(frozen=True)
class MeasurementJob:
    """Measure one expert; only names and numbers, no tensors and no paths."""

    task: str
    recipe: Recipe
    """Its kind is the measurement's name."""
    base_sha256: str
    adapter: FileRef
    """The expert's adapter file."""
    expert_key: str
    expert_digest: str
    rows: TrainingRows
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says about base and data (name, source, licence); part of no key."""

    def __post_init__(self) -> None:
        if self.recipe.kind not in MEASUREMENTS:
            raise ConfigError(f"measurement {self.recipe.kind!r}; accepted: {', '.join(MEASUREMENTS)}")
        if self.rows.count < 1:
            raise ConfigError(f"{self.recipe.kind} of {self.rows.count} rows: accepted is 1 or more")

    def __call__(self, store: Store, place: Place) -> Made:
        return (make_measurement(store, self, place.devices, place.threads),)


def make_measurement(store: Store, job: MeasurementJob, devices: Sequence[str], threads: int) -> tuple[Manifest, bool]:
    """Measure, save and publish: the manifest's file is labelled with the kind, its input is the expert.

    Returns the manifest and whether this call made it.

    Raises:
        AdapterError: the adapter is damaged or of another base, or a measured value is not finite.
        ConfigError, ExpertError: the model cannot be measured.
        StoreError, BaseModelError: inputs cannot be read.
    """
    consumed = {job.expert_key: job.expert_digest}
    found = find(store, job.recipe.key, consumed)
    if found is not None:  # made meanwhile, or by a try before this one
        return found, False
    start = time.perf_counter()
    torch.set_num_threads(threads)
    kind = job.recipe.kind
    with tempfile.TemporaryDirectory(prefix="factory-measurement-") as folder:
        local = Path(folder) / "adapter.safetensors"
        store.download_file(job.adapter, local)
        reader = AdapterReader(FileSource(local))
        check_base(reader, job.base_sha256)
        file = Path(folder) / f"{kind}.safetensors"
        try:
            subject = _subject(store, job, reader, devices)
            about = MeasuredOn(job.base_sha256, job.adapter.sha256, len(subject.losses))
            MEASUREMENTS[kind].measure(subject, file, about)
        except (AdapterError, ConfigError, ExpertError) as error:
            raise type(error)(f"{kind} of the expert {job.task!r}: {error}") from error
        finally:
            if devices[0].startswith("cuda"):
                torch.cuda.empty_cache()
        meta = {
            "task": job.task, "rows": about.rows, "bytes": file.stat().st_size, "device": ", ".join(devices),
            "seconds": time.perf_counter() - start, **job.provenance, "environment": environment(devices),
        }  # fmt: skip
        return publish(store, job.recipe, {kind: file}, consumed, meta)


def _subject(store: Store, job: MeasurementJob, reader: AdapterReader, devices: Sequence[str]) -> Subject:
    """The expert in memory, and the loss of each row."""
    path, labels = fetch_base(store, job.base_sha256, cache_dir()), job.rows.labels
    if labels is None:
        tokenizer, model = load_tokenizer(path), spread(load_model(path, torch.float32), devices)
    else:
        tokenizer = load_classifier_tokenizer(path)
        model = spread(load_classifier(path, len(labels), torch.float32), devices)
        set_head(model, {name: reader.load_head(name) for name in reader.head_names})
    apply_delta(model, reader)
    return Subject(model, row_losses(store, model, tokenizer, job.rows), reader)


def row_losses(store: Store, model: Any, tokenizer: Any, given: TrainingRows) -> list[RowLoss]:
    """For each row a function that runs the model on it alone and returns the summed cross-entropy of its answer."""
    rows, labels = spaced(load_rows(store, given.name), given.count), given.labels
    objective: Objective
    if labels is None:
        objective = language_modelling(model, int(tokenizer.pad_token_id))
        examples: list[Any] = [
            encode_example(tokenizer, given.prompt, row, max_target_tokens=given.max_target_tokens) for row in rows
        ]
    else:
        objective = Classification(int(tokenizer.pad_token_id))
        examples = [encode_labelled(tokenizer, given.prompt, row, labels) for row in rows]
    return [
        RowLoss(partial(objective.loss_sum, model, [example]), _predicts(example) if labels is None else None)
        for example in examples
    ]


def _predicts(example: Example) -> torch.Tensor:
    at = torch.arange(len(example.input_ids))
    return (at >= max(1, example.target_start) - 1) & (at < len(at) - 1)


def spaced(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` of `rows`, evenly spaced, in order: every part of rows that are sorted is among them."""
    kept = min(count, len(rows))
    return [rows[at * len(rows) // kept] for at in range(kept)]
