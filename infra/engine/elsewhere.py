"""Work that somebody else does: what is waited for, and when it is taken over.

Work that met a held key is looked at again from time to time: is the result there? else, is the lease free or expired?
Then it is handed out again. Looking happens in threads; nothing here knows what the work is.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from infra.artifacts.claims import Claim, release_claims
from infra.artifacts.leases import EXPIRY_S, Holder, Watcher
from infra.engine.in_thread import in_thread
from infra.engine.step import Made
from infra.errors import StoreError
from infra.store.s3 import Store

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
_PAUSES_PER_EXPIRY = 12  # a watcher wants three looks per expiry at least


class Elsewhere:
    """The claims of one driver, and its waiting for those of others. For one event loop."""

    def __init__(
        self,
        store: Store,
        expiry_s: float = EXPIRY_S,
        say: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`expiry_s`: of the leases taken and watched; `say` gets a line when work is found to be held elsewhere."""
        self._store, self._expiry_s, self._say, self._clock, self._sleep = store.hasty(), expiry_s, say, clock, sleep
        self._watcher, self._watching = Watcher(expiry_s, clock), asyncio.Lock()
        self._longest = min(_LONGEST_PAUSE_S, expiry_s / _PAUSES_PER_EXPIRY)
        self._out: dict[str, Claim] = {}
        self._down: float | None = None  # since when every look fails
        self.open = 0
        """How many pieces of work wait for somebody else."""

    def claim(self, keys: Sequence[str], takeover: Mapping[str, str]) -> Claim:
        """A new claim on these keys, of this driver until it is `returned`."""
        claim = Claim(tuple(keys), dict(takeover), self._expiry_s)
        self._out[claim.id] = claim
        return claim

    def returned(self, claim: Claim) -> None:
        """The claim's worker has answered, so it holds nothing any more."""
        self._out.pop(claim.id, None)

    async def wait(
        self, name: str, keys: Sequence[str], find: Callable[[], Awaitable[Made | None]]
    ) -> tuple[Made | None, Mapping[str, str]]:
        """Wait until `find` gives a result, or no key is held: then entity tags of leases that expired.

        Raises StoreError once the store has failed for the expiry, altogether or for this piece of work.
        """
        self.open += 1
        try:
            return await self._wait(name, keys, find)
        finally:
            self.open -= 1

    async def _wait(
        self, name: str, keys: Sequence[str], find: Callable[[], Awaitable[Made | None]]
    ) -> tuple[Made | None, Mapping[str, str]]:
        first = pause = min(_FIRST_PAUSE_S, self._longest)
        held, failing = 0, None
        while True:
            await self._sleep(pause)
            try:
                found = await find()
                holders, expired = ([], {}) if found is not None else await self._look(keys)
            except StoreError:
                failed = self._clock()
                failing = failed if failing is None else failing
                self._down = failed if self._down is None else self._down
                if failed - min(failing, self._down) > self._expiry_s:
                    raise
                pause = first  # its holder cannot be judged meanwhile
                continue
            failing = self._down = None
            if found is not None or not holders:
                return found, expired
            held += 1
            if held == 2:  # not at the first look, which is soon after the work was handed out
                who = f" (process {holders[0].pid} on {holders[0].host})" if holders[0] else ""
                self._say(f"{name}: being made elsewhere{who}, waiting for it")
            pause = min(2 * pause, self._longest)

    async def _look(self, keys: Sequence[str]) -> tuple[list[Holder | None], dict[str, str]]:
        """Who lives of those who hold the keys, and the entity tags of leases that expired."""
        holders: list[Holder | None] = []
        expired = {}
        async with self._watching:  # a watcher compares with what it saw before
            seen_now = await in_thread(self._watcher.observe_all, self._store, tuple(keys))
        for key, seen in zip(keys, seen_now, strict=True):
            if seen.state == "live":
                holders.append(seen.holder)
            elif seen.state == "expired" and seen.etag is not None:
                expired[key] = seen.etag
        return holders, expired

    def release(self) -> None:
        """Free what this driver's workers still hold, on the way out; what cannot be freed expires."""
        release_claims(self._store, self._out.values())
        self._out.clear()
