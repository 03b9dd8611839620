"""The engine of real runs: find, lease, call, publish, once per key; workers of any sort do the work.

A driver holds keys, manifests and scores, never tensors. What somebody else makes is waited for and not made again
(`infra.engine.elsewhere`).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from infra.artifacts.claims import Busy, Claim
from infra.artifacts.leases import EXPIRY_S
from infra.artifacts.manifests import Manifest, find_each
from infra.engine.elsewhere import Elsewhere
from infra.engine.in_thread import in_thread
from infra.engine.once import Once
from infra.engine.step import Answer, Engine, Made, Query, Step
from infra.engine.tally import Tally
from infra.engine.together import Together
from infra.errors import StoreError
from infra.store.s3 import Store

QUERIES = "queries"
T = TypeVar("T")
_Wanted = Sequence[tuple[str, Mapping[str, str]]]


class Workers(Protocol):
    """Where work is done. Cancelling a call ends the work or keeps it from starting."""

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        """The step's work under the claim. Raises what it raised, after the retries that are due."""
        ...

    async def ask(self, query: Query[T]) -> T:
        """The query's answer, after the retries that are due."""
        ...


class KeyedEngine:
    """`infra.engine.step.Engine` over a store and workers. `close` it in the end."""

    def __init__(
        self,
        store: Store,
        workers: Workers,
        expiry_s: float = EXPIRY_S,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`expiry_s`: of leases; `say` gets a line about work that is held elsewhere."""
        self._store, self._workers = store, workers
        self._elsewhere = Elsewhere(store, expiry_s, say)
        self._steps = Once()
        self._look: Together[tuple[str, Mapping[str, str]], Manifest | None] = Together(
            lambda wanted: find_each(store, wanted)
        )
        self._lost: asyncio.Future[None] | None = None
        self.tally = Tally()
        self.open: Counter[str] = Counter()
        """By kind, steps that are awaited and not done."""

    @property
    def held_elsewhere(self) -> int:
        """Steps that wait for somebody else."""
        return self._elsewhere.open

    async def run(self, flow: Coroutine[Any, Any, T]) -> T:
        """The flow's result, unless the store is lost to the driver itself before: then its StoreError, at once."""
        self._lost = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(flow)
        either: set[asyncio.Future[Any]] = {task, self._lost}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._lost.done() and not task.done():
                self._lost.result()
            return await task
        finally:
            self._lost.cancel()
            task.cancel()
            await asyncio.wait({task})

    def close(self) -> None:
        """Give back what is claimed: nobody works any more."""
        self._elsewhere.release()

    # -- the protocol -------------------------------------------------------------------------------------------

    async def make(self, step: Step) -> Made:
        first = False

        def start() -> Coroutine[Any, Any, Made]:
            nonlocal first
            first = True
            return self._obtain(step)

        made = await self._steps(step.keys, start)
        if not first:
            made = tuple((manifest, False) for manifest, _ in made)
        self.tally.add_step(step.kind, step.each, [new for _, new in made])
        return made

    async def find(self, wanted: _Wanted) -> list[Manifest | None]:
        try:
            return await self._look(wanted) if wanted else []
        except StoreError as error:
            if self._lost is not None and not self._lost.done():
                self._lost.set_exception(error)
            raise

    async def ask(self, query: Query[T]) -> T:
        self.open[QUERIES] += 1
        try:
            return await self._workers.ask(query)
        finally:
            self.open[QUERIES] -= 1

    def known(self, *manifests: Manifest) -> bool:
        return True

    async def some_of(self, count: int, steps: Sequence[Step]) -> None:
        raise NotImplementedError("only a rehearsal leaves open which steps are wanted")

    async def alternatives(self, options: Collection[T], then: Callable[[Engine, T], Awaitable[None]]) -> None:
        (option,) = options
        await then(self, option)

    def _note(self, kind: str, answer: Answer) -> None:
        new = [manifest for manifest, made in answer.made if made]
        if new:
            self.tally.spans[kind].append((answer.began, answer.ended))
            self.tally.seconds[kind] += max(float(manifest.meta.get("seconds", 0)) for manifest in new)

    # -- making -------------------------------------------------------------------------------------------------

    async def _obtain(self, step: Step) -> Made:
        """Find the artifacts, have them made, or wait for who makes them; and again, if that one is lost."""
        self.open[step.kind] += 1
        try:
            found = _all(await self.find(_wanted(step)))
            takeover: Mapping[str, str] = {}
            while found is None:
                claim = self._elsewhere.claim(step.keys, takeover)
                answer = await self._workers.run(step, claim)
                self._elsewhere.returned(claim)
                if not isinstance(answer, Busy):
                    self._note(step.kind, answer)
                    return answer.made
                found, takeover = await self._elsewhere.wait(step.name, step.keys, lambda: self._look_again(step))
            return found
        finally:
            self.open[step.kind] -= 1

    async def _look_again(self, step: Step) -> Made | None:
        """For who looks from time to time: a store that does not answer costs nothing, and one key that cannot be read
        costs the others nothing."""
        return _all(await in_thread(find_each, self._store.hasty(), _wanted(step)))


def _wanted(step: Step) -> _Wanted:
    return [(key, step.inputs) for key in step.keys]


def _all(found: Sequence[Manifest | None]) -> Made | None:
    """What was found, if nothing is missing."""
    return None if None in found else tuple((manifest, False) for manifest in found if manifest is not None)
