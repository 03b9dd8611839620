"""Workers of a Ray cluster: tasks for experts and nodes, a pool of actors for evaluations, light tasks for services.

Experts are all queued inside Ray, in the order in which they are asked for, so that a cluster that grows is used at
once; evaluators take the slots that they leave. Lost workers are started again by Ray and the pool. Ray moves keys,
manifests and scores, never tensors.
"""

import asyncio
import contextlib
import math
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from rich.console import Console

from infra.artifacts.claims import Busy, Claim
from infra.engine.step import Answer, Query, Step
from infra.errors import FactoryError
from infra.store.s3 import Store
from pipeline.config.model import ResourcesConfig, WorkerResources
from pipeline.plan.cluster import check_answers, connect_to_ray, ray_options, slots_of
from pipeline.plan.preflight import Prepared
from pipeline.plan.waiting import wait_for_room
from pipeline.records.outcome import Inputs
from pipeline.running import remote
from pipeline.running.actor_pool import ActorPool
from pipeline.running.signals import Handler, on_signals

T = TypeVar("T")
_DRAIN_S = 0.5
_DIED = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError)
"""How work ends whose process or node is gone, perhaps by Ray's memory monitor."""


class WorkerError(FactoryError):
    """What Ray says of work that it could not do."""


@dataclass(frozen=True)
class RayCluster:
    """`pipeline.running.driver.Site`: the cluster of `RAY_ADDRESS` or of the submitted job, or one on this machine."""

    def check(self) -> None:
        """See that it answers."""
        check_answers(os.environ.get("RAY_ADDRESS", ""))

    def join(self, prepared: Prepared, console: Console) -> int:
        """Join, and see that every kind of worker fits."""
        resources = prepared.config.resources
        connect_to_ray(resources.retries)
        nodes = wait_for_room(resources, lambda text: console.print(text, highlight=False, markup=False))
        return prepared.check_cluster(nodes, console)

    def hire(self, inputs: Inputs, hear: Callable[[str, Any], None]) -> "RayWorkers":
        """Workers of the cluster."""
        return RayWorkers(inputs.store, inputs.config.resources, hear)

    def heeding(self, handler: Handler) -> contextlib.AbstractContextManager[None]:
        """Also where Ray has a handler of its own, as for SIGTERM."""
        return on_signals(handler)


class RayWorkers:
    """`infra.engine.keyed.Workers` of a configuration. `serve` has to run beside the work; `close` it in the end."""

    def __init__(self, store: Store, resources: ResourcesConfig, hear: Callable[[str, Any], None]) -> None:
        """`hear` is told of progress: of what, and what the work reports."""
        self._store, self._resources, self._hear = store, resources, hear
        self._board = remote.ProgressBoard.remote()  # type: ignore[attr-defined]
        self._trainings = 0  # slots of experts that are asked for or taken
        self._nodes = asyncio.Semaphore(resources.concurrent_nodes)
        self._registry = asyncio.Semaphore(resources.concurrent_registrations)
        self._pool: ActorPool[ActorHandle] = ActorPool(self._create, ray.kill, self._room, _DIED)

    async def serve(self) -> None:
        """Hand out evaluations and hear of progress, for ever."""
        await asyncio.gather(self._pool.serve(), self._listen())

    def close(self) -> None:
        """Dismiss the actors."""
        self._pool.close()
        ray.kill(self._board)

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        """The step's work under the claim. Cancelled, it does not start any more, or is killed."""
        resources, needs = self._resources, step.needs
        if needs.pool == "evaluator":
            return await self._on_actor(step, claim)
        if needs.pool == "expert" or needs.pool == "refine":
            reserved = resources.expert if needs.pool == "expert" else resources.refining
            taken = expert_slots(reserved, resources.expert)
            self._trainings += taken
            try:
                return await self._task(step, claim, reserved, needs.pool)
            finally:
                self._trainings -= taken
        async with self._nodes:
            return await self._task(step, claim, resources.node, "node")

    async def ask(self, query: Query[T]) -> T:
        """The query's answer."""
        async with self._registry:
            options = {"name": query.name, "max_retries": self._resources.retries}
            answer: T = await _answer(remote.ask.options(**options).remote(self._store, query))
            return answer

    async def _task(self, step: Step, claim: Claim, reserved: WorkerResources, kind: str) -> Answer | Busy:
        options = ray_options(reserved, self._resources.retries)
        ref = remote.work.options(name=step.name, **options).remote(self._store, step.call, claim, self._board)
        try:
            answer: Answer | Busy = await _answer(ref, keep=_DIED)
            return answer
        except _DIED as error:
            raise lost(error, kind, reserved.memory_gib) from error
        except asyncio.CancelledError:
            ray.cancel(ref)  # what waits inside Ray would start while the driver tidies up
            raise

    async def _on_actor(self, step: Step, claim: Claim) -> Answer | Busy:
        def call(actor: ActorHandle) -> Awaitable[Any]:
            return _answer(actor.work.remote(step.call, claim), keep=_DIED)

        try:
            answer: Answer | Busy = await self._pool.run(call, step.needs.affinity, step.needs.base)
            return answer
        except _DIED as error:
            raise lost(error, "evaluator", self._resources.evaluator.memory_gib) from error

    def _create(self) -> ActorHandle:
        # Not restarted by Ray: it would wait for a slot, maybe for ever, while others idle. The pool hands its call on.
        options = {**ray_options(self._resources.evaluator), "max_restarts": 0, "max_task_retries": -1}
        actor: ActorHandle = remote.Resident.options(**options).remote(self._store, self._board)  # type: ignore[attr-defined]
        return actor

    def _room(self) -> int:
        """Evaluators that fit beside the trainings on the nodes that live now: nodes are lost, others join."""
        nodes, resources = ray.nodes(), self._resources
        return max(0, min(slots_of(nodes, resources.evaluator), slots_of(nodes, resources.expert) - self._trainings))

    async def _listen(self) -> None:
        while True:
            await asyncio.sleep(_DRAIN_S)
            with contextlib.suppress(RayError):  # progress that is lost is harmless
                for subject, what in await self._board.drain.remote():
                    self._hear(subject, what)


def expert_slots(asked: WorkerResources, expert: WorkerResources) -> int:
    """How many experts' slots a training takes, by its CPUs and GPUs: evaluators have to leave so many."""
    pairs = ((asked.cpus, expert.cpus), (asked.gpus, expert.gpus))
    return max([1, *(math.ceil(own / each) for own, each in pairs if each)])


async def _answer(ref: "ObjectRef[Any]", keep: tuple[type[BaseException], ...] = ()) -> Any:
    """What a call returned. Raises what it raised itself, out of what Ray wraps it in; errors of Ray's own as one line,
    but those to `keep`."""
    try:
        return await ref
    except keep:
        raise
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
        raise (_plain(cause) if isinstance(cause, RayError) else cause) from error


def lost(error: RayError, kind: str, memory_gib: float) -> WorkerError:
    """What to do about work whose workers died, the last one of `error`, as often as it was tried. `kind`: of worker,
    as in `resources`; `memory_gib`: what each of them reserves."""
    field, text = f"resources.{kind}.memory_gib", str(error)
    if isinstance(error, OutOfMemoryError):
        used = re.search(r"actual memory used=([\d.]+)GB", text)
        node = re.search(r"\(IP: ([^,)]+).*?was ([\d.]+)GB used / ([\d.]+)GB", text)
        where = f" on node {node[1]}, where {node[2]} of {node[3]} GB were in use" if node else ""
        took = f"; this one used {used[1]} GB" if used else ""
        return WorkerError(
            f"out of memory: Ray's memory monitor ended each of its workers, the last one{where}{took}, it reserves "
            f"{field}={memory_gib:g}; raise that to what a worker uses, so that fewer run at a time, or make it use "
            "less (train.micro_batch_size, prompt.max_input_tokens, evaluate.batch_size)"
        )
    return WorkerError(
        f"{_plain(error)} (its process or node was lost each time it was tried; if the kernel's log says out of "
        f"memory, raise {field}={memory_gib:g})"
    )


def _plain(error: RayError) -> WorkerError:
    if isinstance(error, TaskCancelledError):
        return WorkerError("cancelled")
    lines = str(error).strip().splitlines()
    return WorkerError(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
