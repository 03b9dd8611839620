"""The driver's bookkeeping: lanes with a limit, and which actor gets which call. Nothing here reaches Ray."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from infra.claims import Busy, Claim
from infra.elsewhere import Elsewhere
from infra.store import Store
from pipeline.work import MOST_ATTEMPTS, ActorItem, ActorPool, Item, Lane, hand_out, settle


def ignore(_: Any) -> None:
    pass


class Bench:
    """A pool whose actors are numbers and whose references are (actor, call)."""

    def __init__(self) -> None:
        self.created = 0
        self.log: list[tuple[int, str]] = []
        self.dismissed: list[int] = []
        self.pool = ActorPool(self.create, self.dismissed.append)

    def create(self) -> int:
        self.created += 1
        return self.created - 1

    def add(self, *names: str) -> None:
        """Queue calls named `<affinity><number>`."""
        for name in names:
            self.pool.waiting.append(ActorItem(name, name[0], self.caller(name), ignore, ignore))

    def caller(self, name: str) -> Callable[[Any], Any]:
        def call(actor: int) -> tuple[int, str]:
            self.log.append((actor, name))
            return actor, name

        return call

    def start(self, allowed: int) -> list[tuple[int, str]]:
        """What one round started."""
        before = len(self.log)
        self.pool.start_ready(allowed)
        return self.log[before:]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def lane_of(limit: int | None, names: str) -> tuple[Lane, list[str]]:
    lane, started = Lane(limit), []

    def start(name: str) -> Callable[[], Any]:
        def begin() -> str:
            started.append(name)
            return f"ref {name}"

        return begin

    for name in names:
        lane.add(Item(name, start(name), ignore, ignore))
    return lane, started


def test_a_lane_starts_in_order_and_keeps_its_limit() -> None:
    lane, started = lane_of(2, "abcd")
    assert (lane.open, started) == (4, [])
    lane.start_ready()
    lane.start_ready()
    assert (started, lane.open, len(lane.running)) == (["a", "b"], 4, 2)
    assert lane.running.pop("ref a").name == "a"
    lane.start_ready()
    assert (started, lane.open) == (["a", "b", "c"], 3)
    lane.running.clear()
    lane.start_ready()
    assert (started, lane.open, list(lane.running)) == (["a", "b", "c", "d"], 1, ["ref d"])


def test_a_lane_without_a_limit_starts_everything() -> None:
    lane, started = lane_of(None, "abcdefgh")
    lane.start_ready()
    assert started == list("abcdefgh")
    assert (len(lane.waiting), lane.open) == (0, 8)


def test_work_added_by_a_finished_item_is_started_in_the_next_round() -> None:
    lane, started = lane_of(1, "a")
    lane.start_ready()
    lane.running.pop("ref a")
    assert lane.open == 0
    lane.add(Item("b", lambda: "ref b", ignore, ignore))
    lane.start_ready()
    assert (started, list(lane.running)) == (["a"], ["ref b"])


def test_keyed_work_that_somebody_else_holds_leaves_its_lane_until_the_key_is_free(store: Store) -> None:
    now, lane, results = [0.0], Lane(), []
    claims: list[Claim] = []
    elsewhere = Elsewhere(store, 6.0, clock=lambda: now[0])

    def start(claim: Claim) -> Any:
        claims.append(claim)
        return f"ref {len(claims)}"

    hand_out(elsewhere, lane, "it", ["k"], start, lambda: None, results.append, ignore)
    lane.start_ready()
    lane.running.pop("ref 1").done(Busy("k"))
    assert (lane.open, elsewhere.open, results) == (0, 1, [])
    assert not elsewhere.poll()
    now[0] += 1.0
    assert elsewhere.poll()
    assert (lane.open, elsewhere.open) == (1, 0)
    lane.start_ready()
    lane.running.pop("ref 2").done("made")
    assert (lane.open, elsewhere.open, results) == (0, 0, ["made"])
    assert [claim.keys for claim in claims] == [("k",)] * 2
    assert claims[0].id != claims[1].id


def test_idle_actors_beyond_what_is_allowed_go_before_they_get_another_call(bench: Bench) -> None:
    """An expert waits for their slots, however many scores are still to be made."""
    bench.add("a1", "b1", "c1")
    running = bench.start(3)
    assert len(running) == 3
    bench.add("b2", "x1", "y1")
    for ref in running[:2]:
        bench.pool.finish(ref)
    assert bench.start(2) == [(1, "b2")], "the one that has the model stays"
    assert bench.dismissed == [0]
    bench.pool.finish(running[2])
    assert bench.start(1) == []
    assert bench.dismissed == [0, 2]
    assert bench.start(2) == [(3, "x1")]


def test_nothing_to_settle_without_running_work(bench: Bench) -> None:
    lane, _ = lane_of(1, "a")
    bench.add("a1")
    assert settle([lane], bench.pool, 0.0) is False


def test_actors_are_created_one_by_one_as_slots_free(bench: Bench) -> None:
    bench.add("a1", "b1", "c1")
    assert bench.start(0) == []
    assert (bench.created, bench.pool.open) == (0, 3)
    assert bench.start(1) == [(0, "a1")]
    assert bench.start(1) == []
    assert bench.start(2) == [(1, "b1")]
    assert (bench.created, bench.pool.open) == (2, 3)
    assert bench.pool.refs == [(0, "a1"), (1, "b1")]


def test_no_actor_is_created_without_work(bench: Bench) -> None:
    assert bench.start(8) == []
    bench.add("a1")
    bench.start(8)
    assert bench.created == 1


def test_an_idle_actor_is_used_before_another_is_created(bench: Bench) -> None:
    bench.add("a1")
    bench.start(1)
    bench.pool.finish((0, "a1"))
    bench.add("b1")
    assert bench.start(4) == [(0, "b1")]
    assert bench.created == 1


def test_an_actor_keeps_to_the_base_it_has(bench: Bench) -> None:
    """Loading another base takes longest: models of the present one come first, though another actor has them too."""
    for name, base in (("a1", "x"), ("b1", "y"), ("c1", "x"), ("c2", "x"), ("d1", "y")):
        bench.pool.waiting.append(ActorItem(name, name[0], bench.caller(name), ignore, ignore, base=base))
    assert bench.start(2) == [(0, "a1"), (1, "b1")]
    for actor, before, expected in ((0, "a1", "c1"), (1, "b1", "d1"), (1, "d1", "c2")):
        bench.pool.finish((actor, before))
        assert bench.start(2) == [(actor, expected)]


def test_an_actor_keeps_to_the_model_it_has(bench: Bench) -> None:
    bench.add("a1", "b1", "b2", "a2", "a3")
    bench.start(1)
    for expected in ("a2", "a3", "b1", "b2"):
        actor, name = bench.log[-1]
        bench.pool.finish((actor, name))
        assert bench.start(1) == [(0, expected)]


def test_a_second_actor_takes_a_model_that_nobody_has(bench: Bench) -> None:
    bench.add("a1", "a2", "b1", "c1")
    assert bench.start(2) == [(0, "a1"), (1, "b1")]
    bench.pool.finish((1, "b1"))
    assert bench.start(2) == [(1, "c1")]
    bench.pool.finish((0, "a1"))
    assert bench.start(2) == [(0, "a2")]


def test_rather_a_model_that_is_busy_elsewhere_than_no_work(bench: Bench) -> None:
    bench.add("a1", "a2", "a3")
    assert bench.start(2) == [(0, "a1"), (1, "a2")]
    bench.pool.finish((1, "a2"))
    assert bench.start(2) == [(1, "a3")]


def test_calls_of_one_model_run_in_the_order_they_came(bench: Bench) -> None:
    bench.add(*(f"a{number}" for number in range(5)))
    bench.start(1)
    for _ in range(4):
        bench.pool.finish(bench.log[-1])
        bench.start(1)
    assert [name for _, name in bench.log] == ["a0", "a1", "a2", "a3", "a4"]


def test_finishing_returns_the_call_and_frees_the_actor(bench: Bench) -> None:
    bench.add("a1", "b1")
    bench.start(1)
    assert bench.pool.finish((0, "a1")).name == "a1"
    assert (bench.pool.refs, bench.pool.open) == ([], 1)
    with pytest.raises(KeyError):
        bench.pool.finish((0, "a1"))
    bench.start(1)
    assert bench.pool.finish((0, "b1")).name == "b1"
    assert bench.pool.open == 0


def test_every_call_runs_once_and_no_actor_has_two(bench: Bench) -> None:
    names = [f"{model}{number}" for model in "abcde" for number in range(7)]
    bench.add(*names)
    rounds = 0
    while bench.pool.open:
        bench.start(3)
        actors = [actor for actor, _ in bench.pool.refs]
        assert len(actors) == len(set(actors)) <= 3
        bench.pool.finish(bench.pool.refs[rounds % len(actors)])
        rounds += 1
    assert sorted(name for _, name in bench.log) == sorted(names)
    assert (bench.created, rounds) == (3, len(names))


def test_two_actors_change_models_as_rarely_as_they_can(bench: Bench) -> None:
    bench.add(*(f"{model}{number}" for number in range(4) for model in "abcd"))
    while bench.pool.open:
        bench.start(2)
        bench.pool.finish(bench.pool.refs[0])
    changes = 0
    for actor in range(2):
        models = [name[0] for who, name in bench.log if who == actor]
        changes += 1 + sum(before != after for before, after in pairwise(models))
    assert changes <= 5  # four models, and one of them shared at the very end


def test_of_two_idle_actors_the_one_that_has_the_model_works(bench: Bench) -> None:
    bench.add("a1", "b1")
    bench.start(2)
    bench.pool.finish((0, "a1"))
    bench.pool.finish((1, "b1"))
    bench.add("b2")
    assert bench.start(2) == [(1, "b2")]


def test_a_call_whose_actor_died_goes_to_a_new_one_but_not_for_ever(bench: Bench) -> None:
    bench.add("a1")
    for attempt in range(MOST_ATTEMPTS):
        (started,) = bench.start(1)
        assert started == (attempt, "a1")
        assert bench.pool.retry(started) is (attempt + 1 < MOST_ATTEMPTS)
    assert bench.pool.finish(started).name == "a1"
    assert bench.pool.open == 0
    assert bench.dismissed == list(range(MOST_ATTEMPTS))
    bench.add("a2")
    assert bench.start(1) == [(MOST_ATTEMPTS, "a2")], "not on the one that died last"


def test_an_actor_that_was_idle_for_long_gives_its_slot_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("a1", "b1")
    bench.start(2)
    bench.pool.finish((0, "a1"))
    bench.pool.release_idle()
    assert bench.dismissed == []
    monkeypatch.setattr("pipeline.work.IDLE_S", -1.0)
    bench.pool.release_idle()
    assert bench.dismissed == [0]
    bench.add("a2")
    assert bench.start(2) == [(2, "a2")]
