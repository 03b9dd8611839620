"""A pool of actors that keep a model in memory: which one gets which call, and what happens when one dies.

Actors are created one by one as there is room, each works on one call at a time, and who has nothing to do gives its
slot back. Nothing here reaches Ray or knows what a call is.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

A = TypeVar("A")

MOST_ATTEMPTS = 3
"""How many actors may die on one call before it counts as failed."""
IDLE_S = 30.0
"""An actor without calls keeps its slot this long while other work could use it."""
_LOOK_S = 0.5  # at room that comes and goes


@dataclass(eq=False)
class Call(Generic[A]):
    """One call. It prefers an actor that had the same `affinity` last, then the same `base`: another one takes longest
    to load."""

    affinity: str
    base: str
    call: Callable[[A], Awaitable[Any]]
    answer: "asyncio.Future[Any]"
    attempts: int = 0


@dataclass(eq=False)
class _Seat(Generic[A]):
    actor: A
    affinity: str = ""
    base: str = ""
    call: Call[A] | None = None
    idle_since: float = field(default_factory=time.monotonic)


class ActorPool(Generic[A]):
    """For one event loop: `serve` has to run beside the calls."""

    def __init__(
        self,
        create: Callable[[], A],
        dismiss: Callable[[A], None],
        room: Callable[[], int],
        died: type[BaseException] | tuple[type[BaseException], ...],
    ) -> None:
        """`room`: how many actors there may be now; `died`: how a call ends whose actor is gone."""
        self._create, self._dismiss, self._room, self._died = create, dismiss, room, died
        self._seats: list[_Seat[A]] = []
        self._waiting: list[Call[A]] = []
        self._watching: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()

    async def run(self, call: Callable[[A], Awaitable[Any]], affinity: str = "", base: str = "") -> Any:
        """The call's answer, or what it raised, by the actor that suits it best. It is called again elsewhere if that
        one dies."""
        waiting = Call(affinity, base, call, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._wake.set()
        try:
            return await waiting.answer
        finally:
            if waiting in self._waiting:  # nobody wants it any more
                self._waiting.remove(waiting)

    async def serve(self) -> None:
        """Hand out calls, for ever."""
        while True:
            if self._waiting or any(seat.call is None for seat in self._seats):
                self.hand_out(self._room())
                self.release_idle()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _LOOK_S)
            self._wake.clear()

    def close(self) -> None:
        """Dismiss every actor."""
        for seat in self._seats:
            self._dismiss(seat.actor)
        self._seats = []

    def hand_out(self, room: int) -> None:
        """Give every idle actor a call; create actors up to `room` while calls are waiting.

        Idle actors beyond that are dismissed: something else waits for their slots.
        """
        wanted = {call.affinity for call in self._waiting}
        idle = [seat for seat in self._seats if seat.call is None]
        idle.sort(key=lambda seat: seat.affinity not in wanted)  # who has a wanted model stays, and chooses first
        for _ in range(min(len(idle), max(0, len(self._seats) - room))):
            self._remove(idle.pop())
        for seat in idle:
            if self._waiting:
                self._assign(seat)
        while self._waiting and len(self._seats) < room:
            seat = _Seat(self._create())
            self._seats.append(seat)
            self._assign(seat)

    def release_idle(self) -> None:
        """Give the slots of actors that had nothing to do for a while back to whatever else waits for them."""
        for seat in [s for s in self._seats if s.call is None and time.monotonic() - s.idle_since > IDLE_S]:
            self._remove(seat)

    def _remove(self, seat: _Seat[A]) -> None:
        self._seats.remove(seat)
        self._dismiss(seat.actor)

    def _assign(self, seat: _Seat[A]) -> None:
        """Same model first; else the same base, and there a model that no other actor is busy with; else whatever
        waits longest."""
        busy = {other.affinity for other in self._seats if other.call is not None}

        def rank(index: int) -> tuple[bool, bool, bool]:
            call = self._waiting[index]
            return call.affinity != seat.affinity, call.base != seat.base, call.affinity in busy

        call = self._waiting.pop(min(range(len(self._waiting)), key=rank))
        seat.affinity, seat.base, seat.call = call.affinity, call.base, call
        task = asyncio.ensure_future(self._watch(seat, call))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _watch(self, seat: _Seat[A], call: Call[A]) -> None:
        """Wait for a call's end. An actor that died is removed in any case: the next call on it would fail, too."""
        result, error = None, None
        try:
            result = await call.call(seat.actor)
        except self._died as died:
            self._remove(seat)
            call.attempts += 1
            if call.attempts < MOST_ATTEMPTS:
                self._waiting.insert(0, call)
                self._wake.set()
                return
            error = died
        except Exception as other:
            error = other
        seat.call, seat.idle_since = None, time.monotonic()
        self._wake.set()
        if call.answer.done():  # nobody waits for it any more
            return
        if error is None:
            call.answer.set_result(result)
        else:
            call.answer.set_exception(error)
