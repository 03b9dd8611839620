"""Making one expert, from data in the object store to a published adapter: what runs inside one Ray task.

A plain function of a job, a store and a progress callback. It logs its own MLflow run through the server. If its recipe
has a saved state (`workers.jobs.resume`), training goes on from there.

An expert of a later round starts from a merge: the base with that in it, frozen. What it trains is the file `change`,
which the next merge reads; the expert of the last round is the file `adapter` beside it, merge and change added up, a
change of the base as any expert is.
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
from infra.store.s3 import FileRef, Store
from workers.adapters.format import LowRank
from workers.adapters.reader import AdapterReader, check_base
from workers.adapters.support import LazyTensors, SparseTensor, added
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
from workers.tensors.source import FileSource
from workers.text.prompt import PromptSpec, encode_example
from workers.text.rows import Row, load_rows
from workers.training.devices import algorithms, spread
from workers.training.in_place import apply_delta
from workers.training.kinds import ExpertSpec, kind_name
from workers.training.loop import StepReport, TrainedExpert, TrainSpec, train_expert
from workers.training.objectives import Objective, language_modelling
from workers.training.state import as_rows

_LOG = logging.getLogger(__name__)
TRAINING_LOSS, VALIDATION_LOSS = "loss/training", "loss/validation"
"""Metrics of an expert's run, by step."""


@dataclass(frozen=True)
class StartRef:
    """The merge that an expert of a later round starts from, in the object store."""

    key: str
    digest: str
    file: FileRef


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
    """Positions that were chosen before: shared by all experts, or those of the round before; None if the expert
    selects its own."""
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
    round: int = 1
    start: StartRef | None = None
    """None: the base."""
    last: bool = True
    """Whether no round follows."""

    @property
    def inputs(self) -> dict[str, str]:
        """Digests by key of what the expert is a function of, beside base and rows."""
        return {ref.key: ref.digest for ref in (self.support, self.start) if ref}

    @property
    def title(self) -> str:
        """For people."""
        return self.task if self.round == 1 else f"{self.task}, round {self.round}"

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
    found = find(store, job.recipe.key, job.inputs)
    if found is not None:  # made meanwhile, or by a try that was lost between publishing and answering
        drop_checkpoint(store, job.recipe.key)
        return found, False
    run_id = runs.start_run(
        job.experiment, job.title, {**job.tags, "kind": "expert", "expert_key": job.recipe.key},
        _parameters(job), parent_run_id=job.parent_run_id,
    )  # fmt: skip
    status = "FAILED"
    try:
        runs.log_data(run_id, job.task, Path(job.train_rows).stem, job.tags.get("source", ""), "train")
        with tempfile.TemporaryDirectory(prefix="factory-expert-") as folder:
            start = _start(store, job, Path(folder))
            with algorithms(job.deterministic):
                trained = _train(store, job, start, devices, on_step)
            untold = _untold(run_id, _curves(as_rows(trained.history)))
            meta = _meta(job, trained, run_id, devices)
            files = _save(Path(folder), job, trained, start)
            meta["adapter_bytes"] = next(iter(files.values())).stat().st_size
            meta["seconds"] = time.time() - started_at
            manifest, made = publish(store, job.recipe, files, job.inputs, meta)
        drop_checkpoint(store, job.recipe.key)
        status = "FINISHED"
        final = (
            "best_step", "trainable", "density", "delta_norm", "adapter_bytes", "train_seconds", "reselections",
            "peak_rss_bytes",
        )  # fmt: skip
        numbers = {"best_validation_loss": meta["validation_loss"], **{name: meta[name] for name in final}}
        untold = _untold(run_id, [*untold, {f"result/{name}": value for name, value in numbers.items()}])
        with contextlib.suppress(RegistryError):
            stored = store.uri(manifest.files[next(iter(files))].name)
            runs.set_tags(run_id, {"adapter_uri": stored, "adapter_digest": manifest.digest})
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


def _start(store: Store, job: ExpertJob, folder: Path) -> AdapterReader | None:
    """The merge that training starts from, if it does."""
    if job.start is None:
        return None
    start = AdapterReader(FileSource(store.download_file(job.start.file, folder / "start.safetensors")))
    check_base(start, job.base_sha256)
    return start


def _train(
    store: Store, job: ExpertJob, start: AdapterReader | None, devices: Sequence[str],
    on_step: Callable[[StepReport], None],
) -> TrainedExpert:  # fmt: skip
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
    if start is not None:
        apply_delta(model, start)

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


def _save(folder: Path, job: ExpertJob, trained: TrainedExpert, start: AdapterReader | None) -> dict[str, Path]:
    """Write the expert's files; returns them by label, what people are shown first."""
    info: dict[str, Any] = {"recipe": job.recipe.key, "task": job.task, "expert": dataclasses.asdict(job.expert)}
    blocks = {}
    if isinstance(job.expert, MaskSpec):
        units = {name: unit_of(job.expert, shape) for name, shape in trained.shapes.items()}
        blocks = {name: unit for name, unit in units.items() if unit is not None}
    if job.labels is not None:
        info["labels"] = list(job.labels)
    adapter, change = folder / "adapter.safetensors", folder / "change.safetensors"
    dtype = getattr(torch, job.value_dtype)
    if job.start is not None:
        info["start"] = job.start.key
    save_adapter(
        adapter if start is None else change,
        trained.delta,
        AdapterMeta(base_sha256=job.base_sha256, kind=kind_name(job.expert), info=info),
        value_dtype=dtype,
        head=trained.head,
        blocks=blocks,
    )
    if start is None:
        return {"adapter": adapter}
    if not job.last:
        return {"change": change}
    save_adapter(adapter, _whole(start, trained), AdapterMeta(job.base_sha256, info=info), value_dtype=dtype)
    return {"adapter": adapter, "change": change}


def _whole(start: AdapterReader, trained: TrainedExpert) -> LazyTensors:
    """The merge that was the start and what was trained on it, added up."""

    def make(name: str) -> SparseTensor:
        parts = [start.load(name)] if name in start.names else []
        if name in trained.delta:
            change = trained.delta[name]
            parts.append(change.lift(name) if isinstance(change, LowRank) else change)
        return added(parts)

    return LazyTensors({*start.names, *trained.delta}, make)


def _meta(job: ExpertJob, trained: TrainedExpert, run_id: str, devices: Sequence[str]) -> dict[str, Any]:
    """Notes for the manifest."""
    history = trained.history
    return {
        "task": job.task,
        "run_id": run_id,
        "base_sha256": job.base_sha256,
        "expert": kind_name(job.expert),
        "steps": len(history),
        **({"round": job.round, "start": job.start.key} if job.start is not None else {}),
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
        **({"round": job.round} if job.start is not None else {}),
        "compute_dtype": job.compute_dtype,
        "value_dtype": job.value_dtype,
        **{f"{kind_name(job.expert)}.{name}": value for name, value in dataclasses.asdict(job.expert).items()},
        **{f"train.{name}": value for name, value in dataclasses.asdict(job.train).items()},
    }
