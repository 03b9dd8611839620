"""Making one expert, from data in the object store to a published adapter: what runs inside one Ray task.

A plain function of a job, a store and a progress callback. It logs its own MLflow run through the server.
"""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra import registry
from infra.artifacts import Manifest, Recipe, find, publish
from infra.environment import environment
from infra.errors import ExpertError, RegistryError
from infra.store import Store
from workers.adapter import AdapterMeta, save_adapter
from workers.base import fetch_base
from workers.cache import cache_dir
from workers.masks import MaskSpec
from workers.memory import map_large_tensors, peak_bytes, reset_peak
from workers.model import load_model, load_tokenizer
from workers.prompt import PromptSpec, encode_example
from workers.rows import load_rows
from workers.train import StepReport, TrainSpec, history_as_rows, train_expert


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
    mask: MaskSpec
    train: TrainSpec
    compute_dtype: str
    value_dtype: str
    experiment: str
    parent_run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class ExpertOutcome:
    """What the driver learns about a finished expert."""

    manifest: Manifest
    made: bool
    started_at: float
    """Seconds since the epoch, after the task's imports."""
    ended_at: float


def make_expert(
    store: Store, job: ExpertJob, device: str, threads: int, on_step: Callable[[StepReport], None]
) -> ExpertOutcome:
    """Train, save and publish one expert.

    Raises:
        ExpertError: training failed; the message names the task.
        StoreError, BaseModelError: inputs cannot be read.
    """
    started_at = time.time()
    map_large_tensors()
    reset_peak()
    torch.set_num_threads(threads)
    found = find(store, job.recipe.key, {})
    if found is not None:  # a retry after the worker was lost between publishing and answering
        return ExpertOutcome(found, False, started_at, time.time())
    run_id = registry.start_run(
        job.experiment, job.task, {**job.tags, "kind": "expert", "expert_key": job.recipe.key},
        _parameters(job), parent_run_id=job.parent_run_id,
    )  # fmt: skip
    status = "FAILED"
    try:
        path = fetch_base(store, job.base_sha256, cache_dir())
        tokenizer = load_tokenizer(path)
        model = load_model(path, getattr(torch, job.compute_dtype)).to(device)
        encoded = {
            split: [
                encode_example(tokenizer, job.prompt, row, max_target_tokens=job.max_target_tokens)
                for row in load_rows(store, name)
            ]
            for split, name in (("train", job.train_rows), ("validation", job.validation_rows))
        }
        trained = train_expert(
            model, encoded["train"], encoded["validation"], job.mask, job.train, tokenizer.pad_token_id, on_step
        )
        history = history_as_rows(trained.history)
        registry.log_history(run_id, history)
        meta = {
            "task": job.task,
            "run_id": run_id,
            "base_sha256": job.base_sha256,
            "steps": len(history),
            "tokens": trained.history[-1].tokens,
            "train_seconds": trained.history[-1].seconds,
            "first_loss": trained.history[0].loss,
            "last_loss": trained.history[-1].loss,
            "best_step": trained.best_step,
            "validation_loss": trained.best_validation_loss,
            "reselections": trained.reselections,
            "trainable": trained.trainable,
            "density": trained.density,
            "delta_norm": sum(float(t.values.double().square().sum()) for t in trained.delta.values()) ** 0.5,
            "device": device,
            "peak_rss_bytes": peak_bytes(),
            "environment": environment(),
        }
        with tempfile.TemporaryDirectory(prefix="factory-expert-") as folder:
            file = Path(folder) / "adapter.safetensors"
            block = job.mask.block_size if job.mask.granularity == "block" else None
            info = {
                "recipe": job.recipe.key,
                "criterion": job.mask.criterion,
                "granularity": job.mask.granularity,
                "density": job.mask.density,
            }
            save_adapter(
                file,
                trained.delta,
                AdapterMeta(base_sha256=job.base_sha256, kind="sparse", info=info),
                value_dtype=getattr(torch, job.value_dtype),
                block=block,
            )
            meta["adapter_bytes"] = file.stat().st_size
            manifest, made = publish(store, job.recipe, {"adapter": file}, {}, meta)
        final = (
            "best_step", "trainable", "density", "delta_norm", "adapter_bytes", "train_seconds", "reselections",
            "peak_rss_bytes",
        )  # fmt: skip
        registry.log_history(
            run_id,
            [{"step": 0, "best_validation_loss": meta["validation_loss"], **{name: meta[name] for name in final}}],
        )
        registry.set_tags(
            run_id, {"adapter_uri": store.uri(manifest.files["adapter"].name), "adapter_digest": manifest.digest}
        )
        status = "FINISHED"
        return ExpertOutcome(manifest, made, started_at, time.time())
    except ExpertError as error:
        raise ExpertError(f"expert {job.task!r}: {error}") from error
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        with contextlib.suppress(
            RegistryError
        ):  # the driver sweeps runs that are left open; the cause must not be hidden
            registry.finish_run(run_id, status)
        if device == "cuda":
            torch.cuda.empty_cache()


def _parameters(job: ExpertJob) -> dict[str, Any]:
    """Parameters of the MLflow run, flat."""
    return {
        "task": job.task,
        "base_sha256": job.base_sha256,
        "template": job.prompt.template,
        "compute_dtype": job.compute_dtype,
        "value_dtype": job.value_dtype,
        **{f"mask.{name}": value for name, value in dataclasses.asdict(job.mask).items()},
        **{f"train.{name}": value for name, value in dataclasses.asdict(job.train).items()},
    }
