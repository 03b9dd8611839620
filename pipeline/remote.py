"""Ray's side of every worker: thin wrappers that pick device and threads and call plain functions.

Imports of the heavy libraries happen when Ray unpickles these functions in a worker, before any of them starts, so the
time a task reports is work.
"""

from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from infra import model_registry, registry
from infra.artifacts import Manifest
from infra.errors import FactoryError
from infra.model_registry import Registration
from infra.store import Store
from merge.jobs import ExportJob, Job, JobResult, export_checkpoint, run_job
from workers.evaluator import EvaluationJob, Evaluator
from workers.expert import ExpertJob, ExpertOutcome, make_expert
from workers.importance import ImportanceJob, make_importance
from workers.memory import freed_afterwards
from workers.shared_support import SupportJob, make_support
from workers.train import StepReport


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ProgressBoard:
    """Collects step reports from experts; the driver drains it. Lost reports are harmless."""

    def __init__(self) -> None:
        self._latest: dict[str, StepReport] = {}

    def report(self, task: str, step: StepReport) -> None:
        self._latest[task] = step

    def drain(self) -> list[tuple[str, StepReport]]:
        latest, self._latest = self._latest, {}
        return list(latest.items())


def granted_threads() -> int:
    """Threads for torch: the CPUs that Ray granted to this worker, at least one."""
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0)))


def granted_devices() -> list[str]:
    """The GPUs that Ray granted, which a worker sees counted from 0, else the CPU."""
    return [f"cuda:{number}" for number in range(len(ray.get_gpu_ids()))] or ["cpu"]


@ray.remote(max_calls=0)  # a GPU worker is kept for the next expert instead of importing everything anew
def expert(store: Store, job: ExpertJob, board: ActorHandle) -> ExpertOutcome:
    """Train one expert."""
    with freed_afterwards():
        return make_expert(
            store, job, granted_devices(), granted_threads(), lambda report: board.report.remote(job.task, report)
        )


@ray.remote(max_calls=0)
def support(store: Store, job: SupportJob) -> Manifest:
    """Select the support that all experts share."""
    with freed_afterwards():
        return make_support(store, job, granted_devices(), granted_threads())


@ray.remote(max_calls=0)
def importance(store: Store, job: ImportanceJob) -> Manifest:
    """Measure an expert's Fisher diagonal or Gram matrices."""
    with freed_afterwards():
        return make_importance(store, job, granted_devices(), granted_threads())


@ray.remote
def merge(store: Store, job: Job) -> JobResult:
    """Do one job of the merge schedule."""
    with freed_afterwards():
        return run_job(store, job)


@ray.remote
def export(store: Store, job: ExportJob) -> tuple[Manifest, bool]:
    """Write a merged model as a full checkpoint."""
    with freed_afterwards():
        return export_checkpoint(store, job)


@ray.remote
class EvaluationActor:
    """An evaluator that stays alive between calls, so that the base is loaded once."""

    def __init__(self, store: Store, base_sha256: str, compute_dtype: str, classifies: bool) -> None:
        threads = granted_threads()
        self._evaluator = Evaluator(store, base_sha256, compute_dtype, classifies, granted_devices(), threads)

    def evaluate(self, job: EvaluationJob, batch_size: int) -> tuple[Manifest, bool]:
        """Score one model on one split of one task."""
        return self._evaluator.evaluate(job, batch_size)


@dataclass(frozen=True)
class Registered:
    """A registered version and whether this call made it."""

    name: str
    version: int
    made: bool


@ray.remote(num_cpus=0, memory=512 << 20)
def register(model: Registration, metrics: dict[str, float], fallback_run: str) -> Registered:
    """Register the model, or find the version that is registered already; a new version's metrics go to its run.

    The run that trained a reused expert may have been deleted since; then `fallback_run` takes its place.
    """
    if not registry.is_active(model.run_id):
        model = replace(model, run_id=fallback_run)
    version, made = model_registry.register(model)
    if made and metrics:
        registry.log_history(model.run_id, [{"step": 0, **metrics}])
    return Registered(model.name, version, made)


def reason(error: BaseException) -> str:
    """Why remote work failed, in one line: the message of a FactoryError as it is, anything else with its type."""
    cause: Any = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    if isinstance(cause, FactoryError):
        return str(cause)
    if isinstance(cause, TaskCancelledError):
        return "cancelled"
    kind = type(cause).__name__
    text = str(cause).strip() or "no message"
    lines = text.splitlines()
    return f"{kind}: {lines[0] if isinstance(cause, RayError) else lines[-1]}"
