"""Successive halving: the budget holds, survivors are complete, a clear winner wins, arrival order does not matter."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from pipeline.config.search import Race, Rung, plan_rungs, task_order

candidate_counts = st.integers(1, 40)
task_counts = st.integers(1, 25)


def smallest(candidates: int, tasks: int) -> int:
    """The smallest budget that is accepted, by trying."""
    for budget in range(1, candidates * tasks + 1):
        try:
            plan_rungs(candidates, tasks, budget)
        except ConfigError:
            continue
        return budget
    raise AssertionError


def run(race: Race, scores: dict[tuple[int, str], float], rng: random.Random) -> list[tuple[int, str]]:
    """Score whatever is wanted, in random order; returns what was scored."""
    waiting, done = race.wanted(), []
    while waiting:
        pair = waiting.pop(rng.randrange(len(waiting)))
        done.append(pair)
        waiting += race.record(*pair, scores[pair])
    assert race.over
    return done


@given(candidate_counts, task_counts, st.data())
@settings(max_examples=150, deadline=None)
def test_a_race_stays_in_its_budget_and_its_survivors_are_complete(candidates, tasks, data):
    names = [f"task{number}" for number in range(tasks)]
    budget = data.draw(st.integers(smallest(candidates, tasks), candidates * tasks + 5) | st.none())
    rng = random.Random(data.draw(st.integers(0, 99)))
    scores = {(c, t): rng.choice([0.0, 0.25, 0.5, rng.random()]) for c in range(candidates) for t in names}
    race = Race(candidates, names, budget, seed=data.draw(st.integers(0, 3)))
    done = run(race, scores, rng)
    assert len(done) == len(set(done)) <= (candidates * tasks if budget is None else budget)
    table = race.table()
    assert sum(standing.tasks for standing in table) == len(done)
    assert {s.candidate for s in table if s.tasks == tasks} >= set(race.survivors)
    assert all(s.rung == len(race.rungs) for s in table if s.candidate in race.survivors)
    assert all(s.tasks >= race.rungs[0].tasks for s in table)
    best = max(table[c].mean for c in race.survivors)
    assert race.winner() == min(c for c in race.survivors if table[c].mean == best)
    ranking = race.ranking()
    assert sorted(ranking) == list(range(candidates))
    places = [(-table[c].rung, -table[c].mean, c) for c in ranking]
    assert places == sorted(places)


@given(candidate_counts, task_counts, st.data())
@settings(max_examples=100, deadline=None)
def test_who_is_best_on_every_task_wins_with_any_budget(candidates, tasks, data):
    names = [f"task{number}" for number in range(tasks)]
    best = data.draw(st.integers(0, candidates - 1))
    rng = random.Random(0)
    scores = {(c, t): rng.random() / 2 + (c == best) / 2 for c in range(candidates) for t in names}
    race = Race(candidates, names, smallest(candidates, tasks), seed=1)
    run(race, scores, rng)
    assert race.winner() == best


@given(candidate_counts, task_counts, st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_order_of_arrival_and_of_the_tasks_changes_nothing(candidates, tasks, rng):
    names = [f"task{number}" for number in range(tasks)]
    scores = {(c, t): rng.random() for c in range(candidates) for t in names}
    budget = smallest(candidates, tasks) + candidates
    one = Race(candidates, names, budget)
    run(one, scores, random.Random(1))
    other = Race(candidates, rng.sample(names, tasks), budget)
    run(other, scores, random.Random(2))
    assert (one.table(), one.winner()) == (other.table(), other.winner())


@given(candidate_counts, task_counts, st.data())
@settings(max_examples=60, deadline=None)
def test_rungs_cover_every_task_once_with_ever_fewer_candidates(candidates, tasks, data):
    least = smallest(candidates, tasks)
    budget = data.draw(st.integers(least, candidates * tasks))
    rungs = plan_rungs(candidates, tasks, budget)
    assert sum(rung.tasks for rung in rungs) == tasks
    assert all(rung.tasks >= 1 for rung in rungs)
    assert [rung.candidates for rung in rungs] == sorted((rung.candidates for rung in rungs), reverse=True)
    assert plan_rungs(candidates, tasks, None) == (Rung(candidates, tasks),)


def test_a_plan_by_hand():
    assert plan_rungs(16, 20, None) == (Rung(16, 20),)
    assert plan_rungs(16, 20, 320) == (Rung(16, 20),)
    assert plan_rungs(16, 20, 240) == (Rung(16, 10), Rung(8, 10))
    assert plan_rungs(16, 20, 140) == (Rung(16, 3), Rung(8, 5), Rung(4, 12))
    assert plan_rungs(16, 20, 46) == (Rung(16, 1), Rung(8, 1), Rung(4, 1), Rung(2, 1), Rung(1, 16))


def test_an_impossible_budget_is_refused_with_the_one_that_would_do():
    with pytest.raises(ConfigError, match=r"evaluations is 45, too few .* 16 candidates on 20 .* at least 46 .* 320 "):
        plan_rungs(16, 20, 45)
    with pytest.raises(ConfigError, match="at least 5 are needed"):
        plan_rungs(5, 1, 4)


def test_tasks_are_in_an_order_of_their_own():
    names = [f"task{number}" for number in range(8)]
    assert task_order(names, 0) == task_order(names[::-1], 0)
    assert task_order(names, 0) != task_order(names, 1)
    assert sorted(task_order(names, 0)) == names


def test_a_score_that_was_not_asked_for_is_a_mistake():
    race = Race(2, ["a"])
    with pytest.raises(ValueError, match=r"2 scores .* missing"):
        race.winner()
    with pytest.raises(KeyError):
        race.record(0, "b", 1.0)
