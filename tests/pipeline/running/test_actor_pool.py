"""Which actor gets which call. Nothing here reaches Ray: actors are numbers, and calls end when a test says so."""

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from pipeline.running.actor_pool import MOST_ATTEMPTS, ActorPool


class Died(Exception):
    """An actor's process is gone."""


class Bench:
    """A pool whose actors are numbers; running calls by (actor, name)."""

    def __init__(self) -> None:
        self.created = 0
        self.log: list[tuple[int, str]] = []
        self.dismissed: list[int] = []
        self.running: dict[tuple[int, str], asyncio.Future[str]] = {}
        self.answers: dict[str, asyncio.Task[Any]] = {}
        self.pool: ActorPool[int] = ActorPool(self.create, self.dismissed.append, lambda: 0, Died)

    def create(self) -> int:
        self.created += 1
        return self.created - 1

    async def add(self, *names: str, base: str = "") -> None:
        """Queue calls named `<affinity><number>`."""
        for name in names:
            self.answers[name] = asyncio.ensure_future(self.pool.run(self.caller(name), name[0], base))
        await settle()

    def caller(self, name: str) -> Callable[[int], Coroutine[Any, Any, str]]:
        async def call(actor: int) -> str:
            self.log.append((actor, name))
            future = self.running[actor, name] = asyncio.get_running_loop().create_future()
            return await future

        return call

    async def start(self, room: int) -> list[tuple[int, str]]:
        """What one round started."""
        before = len(self.log)
        self.pool.hand_out(room)
        await settle()
        return self.log[before:]

    async def finish(self, *which: tuple[int, str], error: Exception | None = None) -> None:
        for each in which:
            future = self.running.pop(each)
            if error is None:
                future.set_result(each[1])
            else:
                future.set_exception(error)
        await settle()


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def on_bench(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in an event loop, on a bench of its own."""

    async def run() -> None:
        bench = Bench()
        await test(bench)
        for task in bench.answers.values():
            task.cancel()

    def wrapped() -> None:
        asyncio.run(run())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


@on_bench
async def test_idle_actors_beyond_what_there_is_room_for_go_before_they_get_another_call(bench: Bench) -> None:
    """An expert waits for their slots, however many scores are still to be made."""
    await bench.add("a1", "b1", "c1")
    running = await bench.start(3)
    assert len(running) == 3
    await bench.add("b2", "x1", "y1")
    await bench.finish(*running[:2])
    assert await bench.start(2) == [(1, "b2")], "the one that has the model stays"
    assert bench.dismissed == [0]
    await bench.finish(running[2])
    assert await bench.start(1) == []
    assert bench.dismissed == [0, 2]
    assert await bench.start(2) == [(3, "x1")]


@on_bench
async def test_actors_are_created_one_by_one_as_slots_free(bench: Bench) -> None:
    await bench.add("a1", "b1", "c1")
    assert await bench.start(0) == []
    assert bench.created == 0
    assert await bench.start(1) == [(0, "a1")]
    assert await bench.start(1) == []
    assert await bench.start(2) == [(1, "b1")]
    assert bench.created == 2


@on_bench
async def test_no_actor_is_created_without_work(bench: Bench) -> None:
    assert await bench.start(8) == []
    await bench.add("a1")
    await bench.start(8)
    assert bench.created == 1


@on_bench
async def test_an_idle_actor_is_used_before_another_is_created(bench: Bench) -> None:
    await bench.add("a1")
    await bench.start(1)
    await bench.finish((0, "a1"))
    await bench.add("b1")
    assert await bench.start(4) == [(0, "b1")]
    assert bench.created == 1


@on_bench
async def test_an_actor_keeps_to_the_base_it_has(bench: Bench) -> None:
    """Loading another base takes longest: models of the present one come first, though another actor has them too."""
    for name, base in (("a1", "x"), ("b1", "y"), ("c1", "x"), ("c2", "x"), ("d1", "y")):
        await bench.add(name, base=base)
    assert await bench.start(2) == [(0, "a1"), (1, "b1")]
    for actor, before, expected in ((0, "a1", "c1"), (1, "b1", "d1"), (1, "d1", "c2")):
        await bench.finish((actor, before))
        assert await bench.start(2) == [(actor, expected)]


@on_bench
async def test_an_actor_keeps_to_the_model_it_has(bench: Bench) -> None:
    await bench.add("a1", "b1", "b2", "a2", "a3")
    await bench.start(1)
    for expected in ("a2", "a3", "b1", "b2"):
        await bench.finish(bench.log[-1])
        assert await bench.start(1) == [(0, expected)]


@on_bench
async def test_a_second_actor_takes_a_model_that_nobody_has(bench: Bench) -> None:
    await bench.add("a1", "a2", "b1", "c1")
    assert await bench.start(2) == [(0, "a1"), (1, "b1")]
    await bench.finish((1, "b1"))
    assert await bench.start(2) == [(1, "c1")]
    await bench.finish((0, "a1"))
    assert await bench.start(2) == [(0, "a2")]


@on_bench
async def test_rather_a_model_that_is_busy_elsewhere_than_no_work(bench: Bench) -> None:
    await bench.add("a1", "a2", "a3")
    assert await bench.start(2) == [(0, "a1"), (1, "a2")]
    await bench.finish((1, "a2"))
    assert await bench.start(2) == [(1, "a3")]


@on_bench
async def test_calls_of_one_model_run_in_the_order_they_came_and_are_answered(bench: Bench) -> None:
    names = [f"a{number}" for number in range(5)]
    await bench.add(*names)
    for _ in names:
        await bench.start(1)
        await bench.finish(bench.log[-1])
    assert [name for _, name in bench.log] == names
    assert [await bench.answers[name] for name in names] == names


@on_bench
async def test_every_call_runs_once_and_no_actor_has_two(bench: Bench) -> None:
    names = [f"{model}{number}" for model in "abcde" for number in range(7)]
    await bench.add(*names)
    await bench.start(3)
    rounds = 0
    while bench.running:
        actors = [actor for actor, _ in bench.running]
        assert len(actors) == len(set(actors)) <= 3
        await bench.finish(list(bench.running)[rounds % len(actors)])
        await bench.start(3)
        rounds += 1
    assert sorted(name for _, name in bench.log) == sorted(names)
    assert (bench.created, rounds) == (3, len(names))


@on_bench
async def test_two_actors_change_models_as_rarely_as_they_can(bench: Bench) -> None:
    await bench.add(*(f"{model}{number}" for number in range(4) for model in "abcd"))
    await bench.start(2)
    while bench.running:
        await bench.finish(next(iter(bench.running)))
        await bench.start(2)
    changes = 0
    for actor in range(2):
        models = [name[0] for who, name in bench.log if who == actor]
        changes += 1 + sum(before != after for before, after in pairwise(models))
    assert changes <= 5  # four models, and one of them shared at the very end


@on_bench
async def test_of_two_idle_actors_the_one_that_has_the_model_works(bench: Bench) -> None:
    await bench.add("a1", "b1")
    await bench.start(2)
    await bench.finish((0, "a1"), (1, "b1"))
    await bench.add("b2")
    assert await bench.start(2) == [(1, "b2")]


@on_bench
async def test_a_call_whose_actor_died_goes_to_a_new_one_but_not_for_ever(bench: Bench) -> None:
    await bench.add("a1")
    for attempt in range(MOST_ATTEMPTS):
        assert await bench.start(1) == [(attempt, "a1")]
        await bench.finish((attempt, "a1"), error=Died(f"attempt {attempt}"))
    with pytest.raises(Died, match=f"attempt {MOST_ATTEMPTS - 1}"):
        await bench.answers["a1"]
    assert bench.dismissed == list(range(MOST_ATTEMPTS))
    await bench.add("a2")
    assert await bench.start(1) == [(MOST_ATTEMPTS, "a2")], "not on the one that died last"


@on_bench
async def test_a_call_that_fails_by_itself_costs_no_actor(bench: Bench) -> None:
    await bench.add("a1", "a2")
    await bench.start(1)
    await bench.finish((0, "a1"), error=ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        await bench.answers["a1"]
    assert await bench.start(1) == [(0, "a2")]


@on_bench
async def test_a_call_that_nobody_waits_for_any_more_is_not_made(bench: Bench) -> None:
    await bench.add("a1", "a2", "a3")
    await bench.start(1)
    bench.answers["a1"].cancel()  # it runs already
    bench.answers["a2"].cancel()
    await bench.finish((0, "a1"))
    assert await bench.start(1) == [(0, "a3")]


@on_bench
async def test_an_actor_that_was_idle_for_long_gives_its_slot_back(bench: Bench) -> None:
    await bench.add("a1", "b1")
    await bench.start(2)
    await bench.finish((0, "a1"))
    bench.pool.release_idle()
    assert bench.dismissed == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.running.actor_pool.IDLE_S", -1.0)
        bench.pool.release_idle()
    assert bench.dismissed == [0]
    await bench.add("a2")
    assert await bench.start(2) == [(2, "a2")]


def test_served_calls_run_as_soon_as_there_is_room() -> None:
    async def flow() -> None:
        room = [0]
        dismissed: list[int] = []
        pool: ActorPool[int] = ActorPool(lambda: 1, dismissed.append, lambda: room[0], Died)
        serving = asyncio.ensure_future(pool.serve())

        async def double(actor: int) -> int:
            return 2 * actor

        task = asyncio.ensure_future(pool.run(double))
        await asyncio.sleep(0.05)
        assert not task.done()
        room[0] = 1
        assert await asyncio.wait_for(task, 30) == 2
        assert await asyncio.wait_for(pool.run(double), 30) == 2
        serving.cancel()
        pool.close()
        assert dismissed == [1]

    asyncio.run(flow())
