"""Ray's side of every worker: thin wrappers that pick device and threads and call plain functions.

Keyed work comes with a claim and runs under the leases of its keys; if somebody else holds one, the answer is `Busy`.
Imports of the heavy libraries happen when Ray unpickles these functions in a worker, before any of them starts, so the
time a task reports is work.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from infra import model_aliases, model_registry, registry
from infra.artifacts import Manifest
from infra.claims import Busy, Claim, under_claim
from infra.errors import FactoryError
from infra.model_aliases import Conclusion, Decision, Standing
from infra.model_registry import Registration
from infra.model_versions import Version
from infra.store import Store
from merge.export import ExportJob, export_checkpoint
from merge.jobs import Job, JobResult, run_job
from pipeline import opponent
from pipeline.config import GateConfig
from pipeline.gate import GateDecision, TaskScores, decide
from pipeline.opponent import Opponent
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
def expert(store: Store, job: ExpertJob, board: ActorHandle, claim: Claim) -> ExpertOutcome | Busy:
    """Train one expert."""

    def report(step: StepReport) -> None:
        board.report.remote(job.task, step)

    with freed_afterwards():
        return under_claim(store, claim, lambda: make_expert(store, job, granted_devices(), granted_threads(), report))


@ray.remote(max_calls=0)
def support(store: Store, job: SupportJob, claim: Claim) -> Manifest | Busy:
    """Select the support that all experts share."""
    with freed_afterwards():
        return under_claim(store, claim, lambda: make_support(store, job, granted_devices(), granted_threads()))


@ray.remote(max_calls=0)
def importance(store: Store, job: ImportanceJob, claim: Claim) -> tuple[Manifest, bool] | Busy:
    """Measure an expert's Fisher diagonal or Gram matrices."""
    with freed_afterwards():
        return under_claim(store, claim, lambda: make_importance(store, job, granted_devices(), granted_threads()))


@ray.remote
def merge(store: Store, job: Job, claim: Claim | None) -> JobResult | Busy:
    """Do one job of the merge schedule; without a claim, one of a node whose leases the driver holds."""
    with freed_afterwards():
        return run_job(store, job) if claim is None else under_claim(store, claim, lambda: run_job(store, job))


@ray.remote
def export(store: Store, job: ExportJob, claim: Claim) -> tuple[Manifest, bool] | Busy:
    """Write a merged model as a full checkpoint."""
    with freed_afterwards():
        return under_claim(store, claim, lambda: export_checkpoint(store, job))


@ray.remote
class EvaluationActor:
    """An evaluator that stays alive between calls, so that the base is loaded once."""

    def __init__(self, store: Store, base_sha256: str, compute_dtype: str, classifies: bool) -> None:
        self._store, threads = store, granted_threads()
        self._evaluator = Evaluator(store, base_sha256, compute_dtype, classifies, granted_devices(), threads)

    def evaluate(self, job: EvaluationJob, batch_size: int, claim: Claim) -> tuple[Manifest, bool] | Busy:
        """Score one model on one split of one task."""
        return under_claim(self._store, claim, lambda: self._evaluator.evaluate(job, batch_size))


@dataclass(frozen=True)
class Registered:
    """Where a registered version stands, and whether this call made it."""

    standing: Standing
    made: bool


@ray.remote(num_cpus=0, memory=512 << 20)
def register(store: Store, model: Registration, metrics: dict[str, float], suite_run: str) -> Registered:
    """Register the model as challenger, or find its version; a new version's metrics and description go to its run.

    The run that trained a reused expert may be another suite's, or deleted since: then it gets one below `suite_run`.
    """
    version, made = model_registry.reuse(model), False
    if version is None:
        model = replace(model, run_id=registry.run_of_suite(model.run_id, suite_run, model.task))
        if metrics:  # before there is a version: a call that is repeated must not miss them
            registry.log_history(model.run_id, [{"step": 0, **metrics}])
        version, made = model_registry.register(model)
        if made and metrics:
            registry.describe_run(model.run_id, model_registry.numbered(model.description, version))
    return Registered(model_aliases.enter(store, model.name, version), made)


@ray.remote(num_cpus=0, memory=512 << 20)
def find_champion(
    store: Store,
    champion: Version,
    suite: str,
    task: str,
    tasks: Collection[str],
    labels: Mapping[str, Iterable[str]],
    gate: Mapping[str, str],
) -> Opponent:
    """What scoring a champion takes, and which of the gate rows it has seen."""
    return opponent.find_champion(store, champion, suite, task, tasks, labels, gate)


@ray.remote(num_cpus=0, memory=512 << 20)
def judge(
    store: Store,
    version: Version,
    against: Opponent,
    before: Mapping[str, TaskScores],
    after: Mapping[str, TaskScores],
    config: GateConfig,
    run_id: str,
    remark: str,
) -> tuple[GateDecision, Conclusion]:
    """Compare a version's gate scores (`after`) with its opponent's and record what follows. `remark` ends the
    reason."""
    found = decide(before, after, config, str(against))
    found = replace(found, reason=found.reason + remark)
    decision = Decision(found.promoted, found.reason, str(against), run_id)
    return found, model_aliases.conclude(store, version.name, version.version, against.version, decision)


@ray.remote(num_cpus=0, memory=512 << 20)
def note(store: Store, name: str, version: int, reason: str) -> None:
    """Say with a version why no gate could decide."""
    model_aliases.note(store, name, version, reason)


@ray.remote(num_cpus=0, memory=512 << 20)
def follow(store: Store, leader: str, follower: str) -> int | None:
    """Let one model's champion be what was made of the other's."""
    return model_aliases.follow(store, leader, follower, strict=False)


def cause_of(error: BaseException) -> BaseException:
    """What remote work raised, out of what Ray wraps it in."""
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


def reason(error: BaseException) -> str:
    """Why remote work failed, in one line: the message of a FactoryError as it is, anything else with its type."""
    cause: Any = cause_of(error)
    if isinstance(cause, FactoryError):
        return str(cause)
    if isinstance(cause, TaskCancelledError):
        return "cancelled"
    kind = type(cause).__name__
    text = str(cause).strip() or "no message"
    lines = text.splitlines()
    return f"{kind}: {lines[0] if isinstance(cause, RayError) else lines[-1]}"
