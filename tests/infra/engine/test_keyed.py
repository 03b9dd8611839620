"""The engine of real runs over a real store: once per key, failures, a lost store, work that others hold."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts.claims import Busy, Claim
from infra.artifacts.leases import holding
from infra.artifacts.manifests import Manifest, Recipe
from infra.engine.keyed import KeyedEngine
from infra.engine.once import Failed, Once, every
from infra.engine.step import Answer, Needs, Place, Query, Step, make_one
from infra.engine.threads import Threads
from infra.errors import StoreError
from infra.store.s3 import Store
from tests.pretend import Empty


def nothing(store: Store, place: Place) -> tuple[tuple[Manifest, bool], ...]:
    raise AssertionError("the workers decide what is done")


def step(*numbers: int) -> Step:
    recipes = tuple(Recipe("thing", 1, {"number": number}) for number in numbers)
    return Step("things", f"thing {numbers}", recipes, {}, nothing, Needs("node"), "file", each="parts")


def run(engine: KeyedEngine, flow: Any) -> Any:
    try:
        return asyncio.run(engine.run(flow))
    finally:
        engine.close()


def test_a_step_is_made_once_however_often_it_is_awaited_and_found_later(store: Store, tmp_path: Path) -> None:
    workers = Empty(store, tmp_path, lambda step: {"seconds": 2.5})
    engine = KeyedEngine(store, workers)

    async def flow() -> list[Any]:
        return await every(*(engine.make(step(1, 2)) for _ in range(3)), engine.make(step(3)))

    first, second, third, other = run(engine, flow())
    assert [made for _, made in first] == [True, True]
    assert [made for _, made in second + third] == [False] * 4
    assert first[0][0] == second[0][0] == third[0][0] != other[0][0]
    assert len(workers.steps) == 2
    assert (engine.tally.made, engine.tally.reused) == ({"things": 2, "parts": 3}, {"things": 2, "parts": 4})
    assert (engine.tally.seconds["things"], engine.tally.spans["things"]) == (5.0, [(1.0, 2.0)] * 2)
    again = KeyedEngine(store, workers)
    found = run(again, again.make(step(1, 2)))
    assert [manifest for manifest, _ in found] == [manifest for manifest, _ in first]
    assert +again.tally.made == {}
    assert len(workers.steps) == 2
    assert list(store.list("leases/")) == []


class Noting(Empty):
    """Notes the order in which work is handed out."""

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        self.order = [*getattr(self, "order", []), step.recipes[0].config["number"]]
        return await super().run(step, claim)


def test_what_is_asked_for_first_is_handed_out_first(store: Store, tmp_path: Path) -> None:
    engine = KeyedEngine(store, workers := Noting(store, tmp_path))
    numbers = [5, 3, 9, 1]
    run(engine, every(*(engine.make(step(number)) for number in numbers)))
    assert workers.order == numbers


class Answering:
    """Workers that fail, or answer that somebody else holds the key."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.claims: list[Claim] = []

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        self.claims.append(claim)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        found: Answer | Busy = answer
        return found

    async def ask(self, query: Query[Any]) -> Any:
        raise NotImplementedError


def test_everybody_who_awaits_a_step_that_failed_hears_why_and_it_is_not_tried_again(store: Store) -> None:
    engine = KeyedEngine(store, Answering(ZeroDivisionError("no")))

    async def flow() -> list[BaseException | Any]:
        return await asyncio.gather(*(make_one(engine, step(1)) for _ in range(3)), return_exceptions=True)

    assert [str(each) for each in run(engine, flow())] == ["no"] * 3
    assert +engine.tally.made == +engine.tally.reused == {}


def test_work_that_somebody_else_holds_is_waited_for_and_then_handed_out_again(store: Store, tmp_path: Path) -> None:
    made = Answer(((Empty(store, tmp_path).put(step(7).recipes[0], {}, "file")[0], True),), 0.0, 0.0)
    key = step(1).keys[0]
    workers = Answering(Busy(key), made)
    engine = KeyedEngine(store, workers)

    async def flow() -> Any:
        with holding(store, key):
            task = asyncio.ensure_future(engine.make(step(1)))
            while not engine.held_elsewhere:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.6)
            assert not task.done()
        return await task

    assert run(engine, flow()) == made.made
    assert [claim.keys for claim in workers.claims] == [(key,)] * 2
    assert workers.claims[0].id != workers.claims[1].id


def test_a_store_that_is_lost_to_the_driver_ends_the_run_at_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Step] = []

    class Long(Empty):
        async def run(self, step: Step, claim: Claim) -> Answer | Busy:
            begun.append(step)
            await asyncio.sleep(3600)
            raise AssertionError

    engine = KeyedEngine(store, Long(store, tmp_path))

    def fail(name: str) -> Any:
        raise StoreError("gone")

    async def flow() -> None:
        long = asyncio.ensure_future(engine.make(step(1)))
        while not begun:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(store, "get_with_etag", fail)
        await every(long, engine.make(step(2)))

    with pytest.raises(StoreError, match="gone"):
        run(engine, flow())


def test_threads_do_so_many_at_a_time_and_keep_one_thing_in_memory(store: Store) -> None:
    loaded: list[str] = []
    running = [0, 0]

    class Count:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, store: Store, place: Place) -> Any:
            running[0] += 1
            running[1] = max(running)
            place.keep(self.name, lambda: loaded.append(self.name))
            running[0] -= 1
            return ()

    async def flow() -> None:
        workers = Threads(store, {"node": 1})
        for name in ("a", "a", "b", "a"):
            one = Step("things", name, (), {}, Count(name), Needs("evaluator"), "file")
            await workers.run(one, Claim(()))
        many = Step("things", "n", (), {}, Count("c"), Needs("node"), "file")
        await every(*(workers.run(many, Claim(())) for _ in range(4)))

    asyncio.run(flow())
    assert loaded == ["a", "b", "a", "c"]
    assert running == [0, 1]


def test_every_waits_for_all_and_raises_what_nobody_has_noted_first() -> None:
    done: list[str] = []

    async def part(name: str, error: Exception | None = None) -> str:
        await asyncio.sleep(0)
        done.append(name)
        if error:
            raise error
        return name

    async def flow() -> None:
        assert await every(part("a"), part("b")) == ["a", "b"]
        with pytest.raises(ZeroDivisionError):
            await every(part("c", Failed("noted")), part("d", ZeroDivisionError()), part("e"))
        assert done == list("abcde")

    asyncio.run(flow())


def test_once_starts_what_is_asked_for_first_and_copies_share_it() -> None:
    started: list[str] = []

    async def start(name: str) -> str:
        started.append(name)
        return name

    async def flow() -> None:
        once = Once()
        assert await once("x", lambda: start("first")) == "first"
        assert await once("x", lambda: start("second")) == "first"
        copied = once.copy()
        assert await copied("x", lambda: start("third")) == "first"
        assert await copied("y", lambda: start("fourth")) == "fourth"
        assert await once("y", lambda: start("fifth")) == "fifth"

    asyncio.run(flow())
    assert started == ["first", "fourth", "fifth"]
