"""Work that is held elsewhere, against a real store and a clock of the test's own: waiting, takeover, outages."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from infra.artifacts.claims import Busy, under_claim
from infra.artifacts.leases import Watcher, holding, new_owner, try_acquire
from infra.engine.elsewhere import Elsewhere
from infra.errors import StoreError
from infra.store.s3 import Store

Waited = tuple[Any, Mapping[str, str]]


class Clock:
    """Time that passes when a test says so: `advance` returns when everybody who woke waits again or is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.awake = 0
        self._sleeping: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleeping.append((self.now + seconds, woken))
        self.awake -= 1
        await woken

    async def advance(self, seconds: float, step: float = 0.1) -> None:
        for _ in range(round(seconds / step)):
            self.now += step
            due = [woken for at, woken in self._sleeping if at <= self.now]
            self._sleeping = [(at, woken) for at, woken in self._sleeping if at > self.now]
            self.awake += len(due)
            for woken in due:
                woken.set_result(None)
            await self.settled()

    async def settled(self) -> None:
        while self.awake:
            await asyncio.sleep(0.001)


class Driver:
    """A driver that waits: for what, how often it looked, and what it found."""

    def __init__(self, store: Store, clock: Clock, expiry_s: float = 6.0) -> None:
        self.said: list[str] = []
        self.clock = clock
        self.elsewhere = Elsewhere(store, expiry_s, self.said.append, lambda: clock.now, clock.sleep)
        self.existing: Any = None
        self.looks = 0

    async def find(self) -> Any:
        self.looks += 1
        return self.existing

    async def wait(self, *keys: str, find: Callable[[], Awaitable[Any]] | None = None) -> "asyncio.Task[Waited]":
        """Begin to wait."""

        async def waiting() -> Waited:
            try:
                return await self.elsewhere.wait("it", keys, find or self.find)
            finally:
                self.clock.awake -= 1

        self.clock.awake += 1
        task = asyncio.create_task(waiting())
        await self.clock.settled()
        return task


def test_what_somebody_else_publishes_is_used(store: Store) -> None:
    async def flow() -> None:
        driver = Driver(store, clock := Clock())
        with holding(store, "a"):
            task = await driver.wait("a")
            await clock.advance(0.2)
            assert (task.done(), driver.elsewhere.open) == (False, 1)
            driver.existing = "theirs"  # published, although the lease is still held
            await clock.advance(5)
        assert (task.result(), driver.elsewhere.open) == (("theirs", {}), 0)

    asyncio.run(flow())


def test_what_somebody_else_gave_up_is_handed_out_again(store: Store) -> None:
    async def flow() -> None:
        driver = Driver(store, clock := Clock())
        with holding(store, "b"):
            task = await driver.wait("a", "b")
            await clock.advance(30)  # half of the expiry that the lease names
            assert not task.done()
        await clock.advance(5)
        assert task.result() == (None, {})

    asyncio.run(flow())


def test_what_a_dead_one_held_is_taken_over_after_the_expiry(store: Store) -> None:
    async def flow() -> None:
        driver = Driver(store, clock := Clock())
        assert all(try_acquire(store, key, new_owner(), expiry_s=6.0) for key in "ab")
        task = await driver.wait("a", "b", "c")
        await clock.advance(5.5)
        assert not task.done()
        await clock.advance(2.0)
        found, takeover = task.result()
        assert (found, set(takeover)) == (None, {"a", "b"})
        claim = driver.elsewhere.claim(["a", "b", "c"], takeover)
        assert under_claim(store, claim, lambda: "mine") == "mine"
        assert list(store.list("leases/")) == []

    asyncio.run(flow())


def test_of_two_drivers_that_take_over_one_works_and_the_other_waits_for_it(store: Store) -> None:
    async def flow() -> None:
        assert try_acquire(store, "a", new_owner(), expiry_s=6.0) is not None
        clock = Clock()
        first, second = Driver(store, clock), Driver(store, clock)
        tasks = [await driver.wait("a") for driver in (first, second)]
        await clock.advance(10)
        claims = [d.elsewhere.claim(["a"], t.result()[1]) for d, t in zip((first, second), tasks, strict=True)]

        def meanwhile() -> object:
            return under_claim(store, claims[1], lambda: "both")

        assert under_claim(store, claims[0], meanwhile) == Busy("a")
        later = await second.wait("a")
        second.existing = "theirs"
        await clock.advance(2)
        assert later.result() == ("theirs", {})

    asyncio.run(flow())


def test_who_beats_is_waited_for(store: Store) -> None:
    async def flow() -> None:
        driver = Driver(store, clock := Clock())
        alive = try_acquire(store, "a", new_owner(), expiry_s=6.0)
        assert alive is not None
        task = await driver.wait("a")
        for _ in range(12):
            await clock.advance(3.0)
            assert not task.done()
            assert alive.beat()
        assert driver.looks < 12 * 3.0 / 0.4  # it is not asked for all the time
        assert len(driver.said) == 1
        assert "it: being made elsewhere (process " in driver.said[0]
        task.cancel()

    asyncio.run(flow())


def test_an_outage_of_the_store_is_survived_up_to_the_expiry(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise StoreError("down")

    async def flow() -> None:
        driver = Driver(store, clock := Clock())
        assert try_acquire(store, "a", new_owner(), expiry_s=6.0) is not None
        task = await driver.wait("a")
        await clock.advance(4)
        with monkeypatch.context() as down:
            down.setattr(store.hasty(), "get_with_etag", fail)
            await clock.advance(4)
        await clock.advance(4)
        assert not task.done()  # nobody could beat meanwhile
        monkeypatch.setattr(store.hasty(), "get_with_etag", fail)
        await clock.advance(8)
        with pytest.raises(StoreError, match="down"):
            task.result()

    asyncio.run(flow())


def test_work_beside_work_that_fails_is_looked_at_and_the_failing_one_raises_in_time(store: Store) -> None:
    async def fails() -> Any:
        raise StoreError("not readable")

    async def flow() -> None:
        driver = Driver(store, clock := Clock())
        bad = await driver.wait("a", find=fails)
        driver.existing = "theirs"
        good = await driver.wait("b")
        await clock.advance(1)
        assert good.result() == ("theirs", {})
        driver.existing = None
        alive = try_acquire(store, "b", new_owner(), expiry_s=6.0)
        assert alive is not None
        long = await driver.wait("b")
        for _ in range(4):  # others that succeed do not make it start anew
            await clock.advance(1)
            assert not bad.done()
            assert alive.beat()
        await clock.advance(3)
        with pytest.raises(StoreError, match="not readable"):
            bad.result()
        assert driver.elsewhere.open == 1
        long.cancel()

    asyncio.run(flow())


def test_a_driver_that_ends_frees_what_its_workers_hold(store: Store) -> None:
    driver = Driver(store, Clock())
    claims = [driver.elsewhere.claim([key], {}) for key in "abc"]
    driver.elsewhere.returned(claims[2])
    for claim in claims[:2]:
        assert try_acquire(store, claim.keys[0], new_owner(), claim=claim.id) is not None
    assert try_acquire(store, "c", new_owner()) is not None
    driver.elsewhere.release()
    assert [Watcher().observe(store, key).state for key in "abc"] == ["free", "free", "live"]
