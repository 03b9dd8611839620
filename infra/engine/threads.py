"""Workers that are threads of this process: for merging by hand, notebooks and tests.

Torch and the object store release the interpreter's lock in what takes time.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import TypeVar

from infra.artifacts.claims import Busy, Claim, under_claim
from infra.engine.in_thread import in_thread
from infra.engine.step import Answer, Made, Place, Pool, Query, Step
from infra.store.s3 import Store

T = TypeVar("T")


class Threads:
    """`infra.engine.keyed.Workers`: so many pieces of work at a time in each pool. What an evaluator loads stays."""

    def __init__(self, store: Store, limits: Mapping[Pool, int], place: Place | None = None) -> None:
        """`limits`: work of other pools is done one at a time. An evaluator holds a model, so there is one."""
        self._store, self._place = store, place or Place()
        self._pools: dict[Pool, asyncio.Semaphore] = {
            pool: asyncio.Semaphore(1 if pool == "evaluator" else limits.get(pool, 1))
            for pool in ("expert", "evaluator", "refine", "node", "registry")
        }

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        """The step's work."""
        async with self._pools[step.needs.pool]:
            began = time.time()
            made: Made | Busy = await in_thread(
                under_claim, self._store, claim, lambda: step.call(self._store, self._place)
            )
            return made if isinstance(made, Busy) else Answer(made, began, time.time())

    async def ask(self, query: Query[T]) -> T:
        """The query's answer."""
        async with self._pools["registry"]:
            return await in_thread(query, self._store)
