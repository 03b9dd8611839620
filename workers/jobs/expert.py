"""Making one expert, from data in the object store to a published adapter: what runs inside one Ray task.

A plain function of a job, a store and a progress callback. It logs its own MLflow run through the server. If its recipe
has a saved state (`workers.jobs.resume`), training goes on from there.
"""

import contextlib
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.errors import ExpertError, RegistryError
from infra.registry import runs
from infra.store.s3 import Store
from workers.adapters.writer import AdapterMeta, save_adapter
from workers.base.cache import cache_dir
from workers.base.load import (
    head_parameters,
    load_classifier,
    load_classifier_tokenizer,
    load_model,
    load_tokenizer,
)
from workers.base.memory import map_large_tensors, peak_bytes, reset_peak
from workers.base.prepare import fetch_base
from workers.jobs.resume import drop_checkpoint, find_checkpoint, keep_state
from workers.jobs.shared_support import SupportRef, load_support
from workers.masks.spec import MaskSpec, unit_of
from workers.scoring.classification import Classification, encode_labelled
from workers.text.prompt import PromptSpec, encode_example
from workers.text.rows import Row, load_rows
from workers.training.devices import algorithms, spread
from workers.training.kinds import ExpertSpec, kind_name
from workers.training.loop import StepReport, TrainedExpert, TrainSpec, train_expert
from workers.training.objectives import Objective, language_modelling
from workers.training.state import as_rows

_LOG = logging.getLogger(__name__)
TRAINING_LOSS, VALIDATION_LOSS = "loss/training", "loss/validation"
"""Metrics of an expert's run, by step."""


@dataclass(frozen=True)
class ExpertJob:
    """Everything one expert needs; only names and numbers, no tensors and no paths."""

    task: str
    recipe: Recipe
    base_sha256: str
    train_rows: str
    """Object name of the training rows."""
    validation_rows: str
    """Object name of the validation rows."""
    prompt: PromptSpec
    max_target_tokens: int
    labels: tuple[str, ...] | None
    """Labels of a classification task; None for language modelling."""
    expert: ExpertSpec
    train: TrainSpec
    support: SupportRef | None
    """Positions shared by all experts, made before; None if the expert selects its own."""
    compute_dtype: str
    value_dtype: str
    recompute: bool
    """Recompute activations in the backward pass. Changes no number."""
    save_every: int | None
    """Steps between two saved states."""
    deterministic: bool
    """Only algorithms that give the same bits every time."""
    experiment: str
    parent_run_id: str
    tags: Mapping[str, str]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Names and licences of base and data, for the manifest."""

    def __call__(self, store: Store, place: Place) -> Made:
        return (make_expert(store, self, place.devices, place.threads, partial(place.report, self.task)),)


def make_expert(
    store: Store, job: ExpertJob, devices: Sequence[str], threads: int, on_step: Callable[[StepReport], None]
) -> tuple[Manifest, bool]:
    """Train, save and publish one expert. A base is spread over all of `devices`.

    Returns the manifest and whether this call made it.

    Raises:
        ExpertError: training failed; the message names the task.
        StoreError, BaseModelError: inputs cannot be read.
    """
    started_at = time.time()
    map_large_tensors()
    reset_peak()
    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts; deterministic products need it
    consumed = {job.support.key: job.support.digest} if job.support else {}
    found = find(store, job.recipe.key, consumed)
    if found is not None:  # made meanwhile, or by a try that was lost between publishing and answering
        drop_checkpoint(store, job.recipe.key)
        return found, False
    run_id = runs.start_run(
        job.experiment, job.task, {**job.tags, "kind": "expert", "expert_key": job.recipe.key},
        _parameters(job), parent_run_id=job.parent_run_id,
    )  # fmt: skip
    status = "FAILED"
    try:
        runs.log_data(run_id, job.task, Path(job.train_rows).stem, job.tags.get("source", ""), "train")
        with algorithms(job.deterministic):
            trained = _train(store, job, devices, on_step)
        untold = _untold(run_id, _curves(as_rows(trained.history)))
        meta = _meta(job, trained, run_id, devices)
        with tempfile.TemporaryDirectory(prefix="factory-expert-") as folder:
            file = Path(folder) / "adapter.safetensors"
            _save(file, job, trained)
            meta["adapter_bytes"] = file.stat().st_size
            meta["seconds"] = time.time() - started_at
            manifest, made = publish(store, job.recipe, {"adapter": file}, consumed, meta)
        drop_checkpoint(store, job.recipe.key)
        status = "FINISHED"
        final = (
            "best_step", "trainable", "density", "delta_norm", "adapter_bytes", "train_seconds", "reselections",
            "peak_rss_bytes",
        )  # fmt: skip
        numbers = {"best_validation_loss": meta["validation_loss"], **{name: meta[name] for name in final}}
        untold = _untold(run_id, [*untold, {f"result/{name}": value for name, value in numbers.items()}])
        with contextlib.suppress(RegistryError):
            runs.set_tags(
                run_id, {"adapter_uri": store.uri(manifest.files["adapter"].name), "adapter_digest": manifest.digest}
            )
        if untold:
            _LOG.warning("the expert of %r is made, but MLflow does not have all of its curves", job.task)
        return manifest, made
    except ExpertError as error:
        with contextlib.suppress(RegistryError):
            runs.describe_run(run_id, f"**Failed**: {error}")
        raise ExpertError(f"expert {job.task!r}: {error}") from error
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        with contextlib.suppress(
            RegistryError
        ):  # the driver sweeps runs that are left open; the cause must not be hidden
            runs.finish_run(run_id, status)
        if devices[0].startswith("cuda"):
            torch.cuda.empty_cache()


def _untold(run_id: str, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log metrics; returns them if MLflow did not take them, which must not cost a finished training."""
    try:
        runs.log_history(run_id, history)
    except RegistryError:
        return history
    return []


def _curves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the history under the names that MLflow groups into charts: losses first."""
    names = {"step": "step", "loss": TRAINING_LOSS, "validation_loss": VALIDATION_LOSS}
    return [{names.get(name, f"training/{name}"): value for name, value in row.items()} for row in rows]


def _train(
    store: Store, job: ExpertJob, devices: Sequence[str], on_step: Callable[[StepReport], None]
) -> TrainedExpert:
    path = fetch_base(store, job.base_sha256, cache_dir())
    dtype = getattr(torch, job.compute_dtype)
    tokenizer = load_tokenizer(path) if job.labels is None else load_classifier_tokenizer(path)
    labels, pad_id = job.labels, int(tokenizer.pad_token_id)
    objective: Objective
    head: dict[str, nn.Parameter] = {}
    if labels is None:
        model = spread(load_model(path, dtype), devices)
        objective = language_modelling(model, pad_id)
    else:
        model = spread(load_classifier(path, len(labels), dtype, job.train.seed), devices)
        objective, head = Classification(pad_id), head_parameters(model)

    def encode(row: Row) -> Any:
        if labels is not None:
            return encode_labelled(tokenizer, job.prompt, row, labels)
        return encode_example(tokenizer, job.prompt, row, max_target_tokens=job.max_target_tokens)

    train, validation = (
        [encode(row) for row in load_rows(store, name)] for name in (job.train_rows, job.validation_rows)
    )
    return train_expert(
        model,
        objective,
        train,
        validation,
        job.expert,
        job.train,
        supports=load_support(store, job.support) if job.support else None,
        head=head,
        recompute=job.recompute,
        resume=find_checkpoint(store, job.recipe.key),
        save_every=job.save_every,
        on_save=partial(keep_state, store, f"expert {job.task!r}", job.recipe.key),
        on_step=on_step,
    )


def _save(file: Path, job: ExpertJob, trained: TrainedExpert) -> None:
    """Write the adapter file."""
    info: dict[str, Any] = {"recipe": job.recipe.key, "task": job.task, "expert": dataclasses.asdict(job.expert)}
    blocks = {}
    if isinstance(job.expert, MaskSpec):
        units = {name: unit_of(job.expert, shape) for name, shape in trained.shapes.items()}
        blocks = {name: unit for name, unit in units.items() if unit is not None}
    if job.labels is not None:
        info["labels"] = list(job.labels)
    save_adapter(
        file,
        trained.delta,
        AdapterMeta(base_sha256=job.base_sha256, kind=kind_name(job.expert), info=info),
        value_dtype=getattr(torch, job.value_dtype),
        head=trained.head,
        blocks=blocks,
    )


def _meta(job: ExpertJob, trained: TrainedExpert, run_id: str, devices: Sequence[str]) -> dict[str, Any]:
    """Notes for the manifest."""
    history = trained.history
    return {
        "task": job.task,
        "run_id": run_id,
        "base_sha256": job.base_sha256,
        "expert": kind_name(job.expert),
        "steps": len(history),
        "tokens": history[-1].tokens,
        "train_seconds": history[-1].seconds,
        "first_loss": history[0].loss,
        "last_loss": history[-1].loss,
        "best_step": trained.best_step,
        "validation_loss": trained.best_validation_loss,
        "reselections": trained.reselections,
        "resumed_after": trained.resumed_after,
        "trainable": trained.trainable,
        "density": trained.density,
        "delta_norm": trained.delta_norm,
        "device": ", ".join(devices),
        "peak_rss_bytes": peak_bytes(),
        "environment": environment(devices),
        **job.provenance,
    }


def _parameters(job: ExpertJob) -> dict[str, Any]:
    """Parameters of the MLflow run, flat."""
    return {
        "task": job.task,
        "base_sha256": job.base_sha256,
        "template": job.prompt.template,
        "expert": kind_name(job.expert),
        "compute_dtype": job.compute_dtype,
        "value_dtype": job.value_dtype,
        **{f"{kind_name(job.expert)}.{name}": value for name, value in dataclasses.asdict(job.expert).items()},
        **{f"train.{name}": value for name, value in dataclasses.asdict(job.train).items()},
    }
