"""The driver's bookkeeping of Ray work: lanes of tasks with bounded concurrency, and a pool of evaluation actors.

Keyed work goes through `hand_out` or `find_or_hand_out`: it is given to a worker under a claim, or waited for where
somebody else makes it.

Results reach the run through callbacks; nothing here knows what the work is. Only keys, manifests and scores pass
through the driver, never tensors.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

from infra.claims import Claim
from infra.elsewhere import Elsewhere


@dataclass
class Item:
    """A unit of work: `start` hands it to Ray, then exactly one of the callbacks is called."""

    name: str
    start: Callable[[], ObjectRef]
    done: Callable[[Any], None]
    failed: Callable[[BaseException], None]


@dataclass
class Lane:
    """Work of one kind, at most `limit` items at a time (None: all at once, queued inside Ray)."""

    limit: int | None = None
    waiting: deque[Item] = field(default_factory=deque)
    running: dict[ObjectRef, Item] = field(default_factory=dict)

    def add(self, item: Item) -> None:
        self.waiting.append(item)

    def start_ready(self) -> None:
        while self.waiting and (self.limit is None or len(self.running) < self.limit):
            item = self.waiting.popleft()
            self.running[item.start()] = item

    @property
    def open(self) -> int:
        return len(self.waiting) + len(self.running)


def hand_out(
    elsewhere: Elsewhere,
    lane: Lane,
    name: str,
    keys: Iterable[str],
    start: Callable[[Claim], ObjectRef],
    find: Callable[[], Any],
    done: Callable[[Any], None],
    failed: Callable[[BaseException], None],
) -> None:
    """Have keyed work done in a lane; `start` gives it to Ray under a claim, `find` gives what exists of it or None."""

    def enqueue(claim: Claim, answered: Callable[[Any], None]) -> None:
        lane.add(Item(name, lambda: start(claim), answered, failed))

    elsewhere.submit(name, keys, enqueue, find, done)


def find_or_hand_out(
    elsewhere: Elsewhere,
    lane: Lane,
    name: str,
    keys: Iterable[str],
    start: Callable[[Claim], ObjectRef],
    find: Callable[[], Any],
    done: Callable[[Any], None],
    failed: Callable[[BaseException], None],
) -> None:
    """As `hand_out`, unless `find` gives something at once: then that is `done`."""
    existing = find()
    if existing is not None:
        done(existing)
    else:
        hand_out(elsewhere, lane, name, keys, start, find, done, failed)


@dataclass
class ActorItem:
    """One call for the evaluation pool. Calls prefer an actor that had the same `affinity` last, then the same `base`:
    another one takes longest to load."""

    name: str
    affinity: str
    call: Callable[[ActorHandle], ObjectRef]
    done: Callable[[Any], None]
    failed: Callable[[BaseException], None]
    attempts: int = 0
    base: str = ""


@dataclass
class _Seat:
    actor: ActorHandle
    affinity: str = ""
    base: str = ""
    item: ActorItem | None = None
    idle_since: float = 0.0


_DIED = (RayActorError, OutOfMemoryError, NodeDiedError)
"""How an actor's call ends when its process or node is gone, perhaps by Ray's memory monitor."""
MOST_ATTEMPTS = 3
"""How many actors may die on one call before it counts as failed."""
IDLE_S = 30.0
"""An actor without calls keeps its slot this long while other work could use it."""


class ActorPool:
    """Actors created one by one as `allowed` grows, each working on one call at a time."""

    def __init__(self, create: Callable[[], ActorHandle], dismiss: Callable[[ActorHandle], None]) -> None:
        self._create = create
        self._dismiss = dismiss
        self._seats: list[_Seat] = []
        self._running: dict[ObjectRef, _Seat] = {}
        self.waiting: list[ActorItem] = []

    @property
    def open(self) -> int:
        return len(self.waiting) + len(self._running)

    @property
    def refs(self) -> list[ObjectRef]:
        return list(self._running)

    def start_ready(self, allowed: int) -> None:
        """Give every idle actor a call; create actors up to `allowed` while calls are waiting.

        Idle actors beyond that are dismissed: an expert waits for their slots.
        """
        wanted = {item.affinity for item in self.waiting}
        idle = [seat for seat in self._seats if seat.item is None]
        idle.sort(key=lambda seat: seat.affinity not in wanted)  # who has a wanted model stays, and chooses first
        for _ in range(min(len(idle), max(0, len(self._seats) - allowed))):
            self._dismiss_seat(idle.pop())
        for seat in idle:
            if self.waiting:
                self._assign(seat)
        while self.waiting and len(self._seats) < allowed:
            seat = _Seat(self._create())
            self._seats.append(seat)
            self._assign(seat)

    def release_idle(self) -> None:
        """Give the slots of actors that had nothing to do for a while back to whatever else waits for them."""
        for seat in [s for s in self._seats if s.item is None and time.monotonic() - s.idle_since > IDLE_S]:
            self._dismiss_seat(seat)

    def close(self) -> None:
        """Dismiss every actor: what follows needs their slots."""
        for seat in self._seats:
            self._dismiss(seat.actor)
        self._seats = []

    def finish(self, ref: ObjectRef) -> ActorItem:
        """Free the actor whose call ended and return the call."""
        seat = self._running.pop(ref)
        item, seat.item = seat.item, None
        seat.idle_since = time.monotonic()
        assert item is not None
        return item

    def retry(self, ref: ObjectRef) -> bool:
        """The actor died: remove it and queue its call again. False if that was the call's last attempt."""
        seat = self._running[ref]
        item = seat.item
        assert item is not None
        self._dismiss_seat(seat)  # in any case: the next call on it would fail, too
        item.attempts += 1
        if item.attempts >= MOST_ATTEMPTS:
            return False
        del self._running[ref]
        self.waiting.insert(0, item)
        return True

    def _dismiss_seat(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        self._dismiss(seat.actor)

    def _assign(self, seat: _Seat) -> None:
        """Same model first; else the same base, and there a model that no other actor is busy with; else whatever
        waits longest."""
        busy = {other.affinity for other in self._seats if other.item is not None}

        def rank(index: int) -> tuple[bool, bool, bool]:
            item = self.waiting[index]
            return item.affinity != seat.affinity, item.base != seat.base, item.affinity in busy

        item = self.waiting.pop(min(range(len(self.waiting)), key=rank))
        seat.affinity, seat.base, seat.item = item.affinity, item.base, item
        self._running[item.call(seat.actor)] = seat


def settle(lanes: list[Lane], pool: ActorPool, timeout_s: float) -> bool:
    """Wait up to `timeout_s` for any running work and call the callbacks of what ended. False if nothing runs."""
    owners: dict[ObjectRef, Lane | ActorPool] = {ref: lane for lane in lanes for ref in lane.running}
    owners.update({ref: pool for ref in pool.refs})
    if not owners:
        return False
    ready, _ = ray.wait(list(owners), num_returns=1, timeout=timeout_s)
    if ready:  # take everything else that is ready as well, without waiting
        ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
    for ref in ready:
        owner = owners[ref]
        error: BaseException | None = None
        try:
            result = ray.get(ref)
        except _DIED as died:
            if isinstance(owner, ActorPool) and owner.retry(ref):
                continue
            error = died
        except Exception as other:
            error = other
        item: Item | ActorItem = owner.running.pop(ref) if isinstance(owner, Lane) else owner.finish(ref)
        if error is None:
            item.done(result)
        else:
            item.failed(error)
    return True
