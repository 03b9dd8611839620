"""Ray's side of every worker: work under its claim, questions to services, and actors that keep a model in memory.

What is called comes as an argument. Its heavy libraries are imported when Ray unpickles it in a worker, before the
call starts, so the time that a call reports is work; a worker that only asks a service imports none of them.
"""

import time
from typing import Any

import ray
from ray.actor import ActorHandle

from infra.artifacts.claims import Busy, Claim, under_claim
from infra.engine.step import Answer, Made, Place, Query, Work
from infra.store.s3 import Store
from workers.base.memory import freed_afterwards


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ProgressBoard:
    """Collects what workers report; the driver drains it. Lost reports are harmless."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}

    def report(self, subject: str, what: Any) -> None:
        self._latest[subject] = what

    def drain(self) -> list[tuple[str, Any]]:
        latest, self._latest = self._latest, {}
        return list(latest.items())


def granted_place(board: ActorHandle) -> Place:
    """The CPUs that Ray granted to this worker as threads, at least one; its GPUs, which it sees counted from 0, else
    the CPU."""
    granted = ray.get_runtime_context().get_assigned_resources()
    devices = tuple(f"cuda:{number}" for number in range(len(ray.get_gpu_ids()))) or ("cpu",)

    def report(subject: str, what: Any) -> None:
        board.report.remote(subject, what)

    return Place(devices, max(1, int(granted.get("CPU", 0))), report)


def _do(store: Store, call: Work, place: Place, claim: Claim) -> Answer | Busy:
    began = time.time()
    made: Made | Busy = under_claim(store, claim, lambda: call(store, place))
    return made if isinstance(made, Busy) else Answer(made, began, time.time())


@ray.remote(max_calls=0)  # a GPU worker is kept for the next expert instead of importing everything anew
def work(store: Store, call: Work, claim: Claim, board: ActorHandle) -> Answer | Busy:
    """One piece of work."""
    with freed_afterwards():
        return _do(store, call, granted_place(board), claim)


@ray.remote
class Resident:
    """A worker that stays alive between calls, so that a base is loaded once."""

    def __init__(self, store: Store, board: ActorHandle) -> None:
        self._store, self._place = store, granted_place(board)

    def work(self, call: Work, claim: Claim) -> Answer | Busy:
        """One piece of work, which may keep something for the next."""
        return _do(self._store, call, self._place, claim)


@ray.remote(num_cpus=0, memory=512 << 20)
def ask(store: Store, query: Query[Any]) -> Any:
    """A service's answer."""
    return query(store)
