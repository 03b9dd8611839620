"""A driver's list of work that somebody else does: handed out under claims, waited for where a key is held elsewhere.

What was handed out and met a held key is looked at again from time to time: is the result there? else, is the lease
free or expired? Then the work is handed out again. The driver calls `poll`; nothing here blocks, starts threads or
knows what the work is.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from infra.claims import Busy, Claim, release_claims
from infra.errors import StoreError
from infra.leases import EXPIRY_S, Holder, Watcher
from infra.store import Store

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
_PAUSES_PER_EXPIRY = 12  # a watcher wants three looks per expiry at least


@dataclass
class _Waiting:
    name: str
    keys: tuple[str, ...]
    find: Callable[[], Any]
    done: Callable[[Any], None]
    again: Callable[[Mapping[str, str]], None]
    due: float
    pause: float
    held: int = 0
    """How often a key was seen held."""
    failing: float | None = None
    """Since when the store fails for it."""


class Elsewhere:
    """Hands out keyed work of one driver. Not thread-safe."""

    def __init__(
        self,
        store: Store,
        expiry_s: float = EXPIRY_S,
        say: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`expiry_s`: of the leases taken and watched; `say` gets a line when work is found to be held elsewhere."""
        self._store, self._expiry_s, self._say, self._clock = store.hasty(), expiry_s, say, clock
        self._watcher = Watcher(expiry_s, clock)
        self._longest = min(_LONGEST_PAUSE_S, expiry_s / _PAUSES_PER_EXPIRY)
        self._waiting: list[_Waiting] = []
        self._out: dict[str, Claim] = {}
        self._down: float | None = None  # since when every look fails

    @property
    def open(self) -> int:
        """How many pieces of work wait for somebody else."""
        return len(self._waiting)

    def submit(
        self,
        name: str,
        keys: Iterable[str],
        enqueue: Callable[[Claim, Callable[[Any], None]], None],
        find: Callable[[], Any],
        done: Callable[[Any], None],
    ) -> None:
        """Have keyed work done, by this driver's workers or by somebody else.

        `enqueue` hands the work to a worker that comes back with the result or `Busy`, for the callback it is given;
        it is called again when the keys are free. `find` gives the result if it exists, else None. `done` gets the
        result once. Work that fails is the enqueuer's business: it calls nothing here.
        """

        def hand_out(takeover: Mapping[str, str]) -> None:
            claim = self.claim(keys, takeover)

            def finished(result: Any) -> None:
                self.returned(claim)
                if isinstance(result, Busy):
                    self.wait(name, claim.keys, find, done, hand_out)
                else:
                    done(result)

            enqueue(claim, finished)

        hand_out({})

    def claim(self, keys: Iterable[str], takeover: Mapping[str, str]) -> Claim:
        """A new claim on these keys, of this driver until it is `returned`."""
        claim = Claim(tuple(keys), dict(takeover), self._expiry_s)
        self._out[claim.id] = claim
        return claim

    def returned(self, claim: Claim) -> None:
        """The claim's worker has answered, so it holds nothing any more."""
        self._out.pop(claim.id, None)

    def wait(
        self,
        name: str,
        keys: tuple[str, ...],
        find: Callable[[], Any],
        done: Callable[[Any], None],
        again: Callable[[Mapping[str, str]], None],
    ) -> None:
        """Wait until `find` gives a result, for `done`, or no key is held: then `again` gets tags of expired leases."""
        pause = min(_FIRST_PAUSE_S, self._longest)
        self._waiting.append(_Waiting(name, keys, find, done, again, self._clock() + pause, pause))

    def poll(self) -> bool:
        """Look at the work that is due; whether anything was found or handed out again.

        Raises StoreError once the store has failed for the expiry, altogether or for one piece of work, and whatever
        the callbacks raise.
        """
        now, moved = self._clock(), False
        for work in [each for each in self._waiting if each.due <= now]:
            try:
                found = work.find()
                holders, expired = self._look(work) if found is None else ([], {})
            except StoreError:
                failed = self._clock()
                work.failing = failed if work.failing is None else work.failing
                self._down = failed if self._down is None else self._down
                if failed - min(work.failing, self._down) > self._expiry_s:
                    raise
                work.due = failed + min(_FIRST_PAUSE_S, self._longest)
                continue  # its holder cannot be judged meanwhile; others can
            work.failing = self._down = None
            if found is None and holders:
                self._tell(work, holders)
                work.pause = min(2 * work.pause, self._longest)
                work.due = self._clock() + work.pause
                continue
            self._waiting.remove(work)
            moved = True
            if found is not None:
                work.done(found)
            else:
                work.again(expired)
        return moved

    def _look(self, work: _Waiting) -> tuple[list[Holder | None], dict[str, str]]:
        """Who lives of those who hold the keys, and the entity tags of leases that expired."""
        holders: list[Holder | None] = []
        expired = {}
        for key, seen in zip(work.keys, self._watcher.observe_all(self._store, work.keys), strict=True):
            if seen.state == "live":
                holders.append(seen.holder)
            elif seen.state == "expired" and seen.etag is not None:
                expired[key] = seen.etag
        return holders, expired

    def _tell(self, work: _Waiting, holders: list[Holder | None]) -> None:
        """Say once who holds the key: not at the first look, which is soon after the work was handed out."""
        work.held += 1
        if work.held == 2:
            holder = holders[0]
            who = f" (process {holder.pid} on {holder.host})" if holder else ""
            self._say(f"{work.name}: being made elsewhere{who}, waiting for it")

    def release(self) -> None:
        """Free what this driver's workers still hold, on the way out; what cannot be freed expires."""
        release_claims(self._store, self._out.values())
        self._out.clear()
