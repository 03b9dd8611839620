"""Choosing among merge candidates with a budget: successive halving over tasks (arXiv 1502.07943).

A candidate's score on a task's whole validation split is one evaluation. The tasks are put into a seeded order; every
rung scores all surviving candidates on the next share of them, then drops the worse half by the mean over the tasks
that all of them have been scored on. Survivors of the last rung are scored on every task; the best mean wins, ties to
the earlier candidate. What a race asks for does not depend on the order in which scores arrive.

Scores are cached by content, so a race with a larger budget finds those of a smaller one.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from infra.errors import ConfigError


@dataclass(frozen=True)
class Rung:
    """How many candidates are scored on how many further tasks."""

    candidates: int
    tasks: int


def plan_rungs(candidates: int, tasks: int, budget: int | None) -> tuple[Rung, ...]:
    """The rungs of a race: sum(candidates x tasks) <= budget, all tasks in the end.

    As few rungs as the budget allows. Rungs cost about the same where it suffices for that, else every rung but the
    last has one task; what is left over goes to the first rung, whose decision rests on the fewest scores. None: one
    rung, everything is scored.

    Raises ConfigError naming the smallest budget that would do.
    """
    survivors = [candidates]
    while survivors[-1] > 1 and len(survivors) < tasks:
        survivors.append(-(-survivors[-1] // 2))
    full = candidates * tasks
    budget = full if budget is None else budget
    options = [survivors[:rungs] for rungs in range(1, len(survivors) + 1)]
    smallest = full
    for shares in (_equal_work, _one_each):
        for option in options:
            sizes = shares(option, tasks)
            cost = _cost(option, sizes)
            smallest = min(smallest, cost)
            if cost <= budget:
                return tuple(map(Rung, option, _spend(option, sizes, budget - cost)))
    raise ConfigError(
        f"merge.search.evaluations is {budget}, too few to choose among {candidates} candidates on {tasks} held-in "
        f"tasks: at least {smallest} are needed, {full} score everything"
    )


def _equal_work(survivors: Sequence[int], tasks: int) -> list[int]:
    """Tasks per rung, in inverse proportion to the survivors; the last rung takes what is left."""
    total = sum(1 / count for count in survivors)
    sizes = [max(1, math.floor(tasks / count / total)) for count in survivors[:-1]]
    return [*sizes, tasks - sum(sizes)] if sum(sizes) < tasks else _one_each(survivors, tasks)


def _one_each(survivors: Sequence[int], tasks: int) -> list[int]:
    return [1] * (len(survivors) - 1) + [tasks - len(survivors) + 1]


def _cost(survivors: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(survivors, sizes, strict=True))


def _spend(survivors: Sequence[int], sizes: Sequence[int], left: int) -> list[int]:
    """Move tasks from the last rung to the first while they can be paid."""
    dearer = survivors[0] - survivors[-1]
    moved = min(sizes[-1] - 1, left // dearer) if dearer else 0
    return [size + (at == 0) * moved - (at == len(sizes) - 1) * moved for at, size in enumerate(sizes)]


def task_order(tasks: Sequence[str], seed: int) -> tuple[str, ...]:
    """The order in which tasks are scored: a function of their names and the seed, not of the order given."""
    order = sorted(tasks)
    random.Random(seed).shuffle(order)
    return tuple(order)


@dataclass(frozen=True)
class Standing:
    """What a race knows of one candidate: the last rung it was in (from 1), how many tasks it has been scored on, and
    the mean score over them."""

    candidate: int
    rung: int
    tasks: int
    mean: float


class Race:
    """A race of `candidates`, named by their numbers, for the best mean score. Pure bookkeeping.

    `wanted` and `record` return the (candidate, task) pairs to score next; the race is over when all are recorded.
    """

    def __init__(self, candidates: int, tasks: Sequence[str], budget: int | None = None, seed: int = 0) -> None:
        """Raises ConfigError for a budget that does not suffice."""
        self.rungs = plan_rungs(candidates, len(tasks), budget)
        self._tasks = task_order(tasks, seed)
        self._ends = list(accumulate(rung.tasks for rung in self.rungs))
        self._scores: list[dict[str, float]] = [{} for _ in range(candidates)]
        self._reached = [0] * candidates
        self._rung = 0
        self.survivors = list(range(candidates))
        self._missing = set(self.wanted())

    @property
    def over(self) -> bool:
        """Whether the winner is known."""
        return not self._missing

    def wanted(self) -> list[tuple[int, str]]:
        """The present rung's pairs, task by task."""
        begin = self._ends[self._rung - 1] if self._rung else 0
        tasks = self._tasks[begin : self._ends[self._rung]]
        return [(candidate, task) for task in tasks for candidate in self.survivors]

    def record(self, candidate: int, task: str, score: float) -> list[tuple[int, str]]:
        """Take one score that was asked for; returns the next rung's pairs when it was the last of its rung."""
        self._missing.remove((candidate, task))
        self._scores[candidate][task] = score
        if self._missing or self._rung == len(self.rungs) - 1:
            return []
        self._rung += 1
        self.survivors = sorted(self._ranked()[: self.rungs[self._rung].candidates])
        for survivor in self.survivors:
            self._reached[survivor] = self._rung
        self._missing = set(pairs := self.wanted())
        return pairs

    def winner(self) -> int:
        """The best of the last rung's survivors. Only when the race is over."""
        return self.ranking()[0]

    def ranking(self) -> list[int]:
        """Every candidate, best first: by the rung that it came to, then by its mean, the earlier of equals in front.
        Only when the race is over."""
        if not self.over:
            raise ValueError(f"{len(self._missing)} scores of the present rung are missing")
        return sorted(range(len(self._scores)), key=lambda each: (-self._reached[each], -self._mean(each)))

    def table(self) -> list[Standing]:
        """Every candidate, in the order given. Only after each has a score."""
        return [
            Standing(candidate, self._reached[candidate] + 1, len(self._scores[candidate]), self._mean(candidate))
            for candidate in range(len(self._scores))
        ]

    def _mean(self, candidate: int) -> float:
        """Over the candidate's own tasks, which are those of every candidate that came as far. Exactly summed: the
        order in which scores arrived does not matter."""
        scores = self._scores[candidate].values()
        return math.fsum(scores) / len(scores)

    def _ranked(self) -> list[int]:
        """Survivors, best first; a stable sort keeps the earlier of equals in front."""
        return sorted(self.survivors, key=lambda candidate: -self._mean(candidate))
