"""What a run says of versions that are not compared, and when one is judged; the rest is tests/e2e/test_promotion.py.

The scores come from a stand-in for `pipeline.evaluations`: only what is asked for and answered matters here.
"""

from collections.abc import Callable
from itertools import permutations
from typing import Any, cast

import pytest

from infra.errors import StoreError
from infra.model_aliases import Standing
from infra.model_versions import DECISION, REASON, ROLLED_BACK, RUN, Version
from infra.store_errors import ObjectMissing
from pipeline.display import Display
from pipeline.evaluations import Evaluations
from pipeline.opponent import Opponent
from pipeline.promotion import Promotion, _Subject, settled_verdict
from tests.pipeline.test_model_card import make
from workers.evaluator import EvaluationJob
from workers.rows import Row

GATED = {REASON: "better", RUN: "run1"}


def version(number: int, digest: str = "a", **tags: str) -> Version:
    return Version("mine.x", number, {"factory.digest": digest} | tags)


@pytest.mark.parametrize(
    ("standing", "reason", "champion"),
    [
        (Standing(version(2), version(2), version(2, **{DECISION: "promoted"} | GATED)), "champion already", 2),
        (Standing(version(2), version(1, "b"), version(2, **{DECISION: "challenger"} | GATED)),
         "not compared again: better (run run1)", 1),
        (Standing(version(2), version(3, "b"), version(2, **{DECISION: "promoted"} | GATED)),
         "not compared again: better (run run1, and replaced since)", 3),
        (Standing(version(2), None, version(1, **{ROLLED_BACK: "today: rude", DECISION: "promoted"} | GATED)),
         "not compared again: version 1 was rolled back (today: rude)", None),
        (Standing(version(2), version(1), version(1, **{DECISION: "promoted"} | GATED)),
         "not compared: the same bytes as the champion, version 1", 1),
        (Standing(version(2, **{REASON: "same bytes, and so on"}), version(2), version(1, **{DECISION: "promoted"}), 1),
         "champion in place of version 1: same bytes, and so on", 2),
        (Standing(version(2), version(1), None), "not compared: the same bytes as the champion, version 1", 1),
    ],
)  # fmt: skip
def test_why_a_version_is_not_compared(standing: Standing, reason: str, champion: int | None) -> None:
    assert not standing.is_open
    verdict = settled_verdict(standing)
    assert (verdict.reason, verdict.champion, verdict.promoted) == (reason, champion, False)
    assert (verdict.name, verdict.version, verdict.opponent, verdict.decision) == ("mine.x", 2, None, None)


def promotion_of(done: list[str]) -> tuple[Promotion, _Subject]:
    inputs, outcome = make(2)
    found = Promotion(inputs, outcome, cast(Display, None), lambda what: lambda _: None, cast(Evaluations, Asked()))
    found._undecided = lambda subject, standing, reason: done.append(reason)  # type: ignore[method-assign]
    return found, _Subject("merged", next(iter(outcome.merged.values())), TASKS)


def test_without_a_champion_that_there_was_a_person_decides() -> None:
    """The base is no opponent for what follows a champion that was deleted."""
    done: list[str] = []
    promotion, subject = promotion_of(done)
    promotion._entered(subject, Standing(version(3), None, None, former=1))
    (reason,) = done
    assert reason.startswith("not compared: there is no champion, but version 1 was")
    assert reason.endswith("to make version 3 champion: python -m pipeline promote mine --version 3")


@pytest.mark.parametrize("error", [StoreError("unreachable"), ObjectMissing("its adapter is gone")])
def test_only_for_a_fault_that_lasts_a_person_is_asked_to_decide(error: StoreError) -> None:
    done: list[str] = []
    promotion, subject = promotion_of(done)
    promotion._unscorable(subject, Standing(version(3), version(1, "b"), None), error)
    (reason,) = done
    if isinstance(error, ObjectMissing):
        assert reason.startswith("not compared: champion (version 1) cannot be scored (its adapter is gone); to make")
    else:
        assert reason == (
            "not compared: champion (version 1) could not be scored (unreachable); the next run tries again"
        )


def test_gate_rows_that_another_tasks_expert_learned_from_decide_nothing() -> None:
    """Two tasks over one source: one's gate rows are the other's training rows, and the merge has both experts."""
    done: list[Any] = []
    promotion, subject = promotion_of(done)
    rows = {task: tuple(Row(f"{task}{at}", "", ("y",)) for at in range(12)) for task in TASKS}
    shared = rows[TASKS[0]][:3]
    for task in TASKS:
        data = promotion._inputs.tasks[task]
        train = (Row("own", "", ("y",)), *(shared if task == TASKS[1] else ()))
        splits = {"train": train, "validation": (), "gate": rows[task], "test": ()}
        object.__setattr__(data, "splits", splits)
    promotion._ask = lambda _, __, arguments, ___: done.append(arguments)  # type: ignore[method-assign]
    score = {"rows": {"metric": [1.0] * 12}, "metric": "exact_match"}
    for model, task in [(model, task) for model in ("merged", "base") for task in TASKS]:
        promotion._outcome.scores[model, "gate", task] = score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.promotion.rows_of", lambda found: found["rows"]["metric"])
        promotion._judge(subject, Standing(version(2), None, None), Opponent())
    ((*_, before, after, _, _, remark),) = done
    assert [[len(scores[task]) for task in TASKS] for scores in (before, after)] == [[9, 12]] * 2
    assert remark == "; 3 gate rows left out: the challenger was trained on them"


@pytest.mark.parametrize(("rows", "judges"), [(3, False), (4, True)])
def test_a_few_rows_decide_nothing(rows: int, judges: bool) -> None:
    done: list[str] = []
    promotion, subject = promotion_of(done)
    promotion._ask = lambda *_: done.append("judged")  # type: ignore[method-assign]
    score = {"rows": {"metric": [1.0] * rows}, "metric": "exact_match"}
    for model, task in [(model, task) for model in ("merged", "base") for task in TASKS]:
        promotion._outcome.scores[model, "gate", task] = score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.promotion.rows_of", lambda found: found["rows"]["metric"])
        promotion._judge(subject, Standing(version(2), None, None), Opponent())
    assert done == (["judged"] if judges else ["not compared with base: there are fewer than 8 gate rows"])


class Asked:
    """Stands for `Evaluations`: notes what is asked for, to be answered by a test."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Callable[[], None]] = {}
        self.failed: dict[str, Callable[[BaseException], None]] = {}

    def score(self, model: str, split: str, task: str, manifest: Any, then: Callable[[], None]) -> None:
        self.known[model, task] = then

    def make(self, job: EvaluationJob, then: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        self.known[job.model, job.task], self.failed[job.task] = then, failed


TASKS = ("task0000", "task0001")
SCORES = [(model, task) for model in ("merged", "merged_champion") for task in TASKS]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> tuple[Asked, list[str]]:
    """A merge of two tasks whose scores against a champion are asked for, and what was done with them."""
    done: list[str] = []
    inputs, outcome = make(2)
    asked, merged = Asked(), next(iter(outcome.merged.values()))
    monkeypatch.setattr(Promotion, "_judge", lambda *_: done.append("judged"))
    monkeypatch.setattr(Promotion, "_unscorable", lambda self, subject, standing, error: done.append(str(error)))

    def problem(what: str) -> Callable[[BaseException], None]:
        return lambda error: done.append(f"{what}: {error}")

    promotion = Promotion(inputs, outcome, cast(Display, None), problem, cast(Evaluations, asked))
    standing = Standing(version(2), version(1, "b"), None)
    promotion._score(_Subject("merged", merged, TASKS), standing, Opponent(1, merged, "b" * 64, {}))
    return asked, done


@pytest.mark.parametrize("order", list(permutations(SCORES)))
def test_a_version_is_judged_once_with_the_last_score(compared: tuple[Asked, list[str]], order: Any) -> None:
    asked, done = compared
    for pair in order:
        assert done == []
        asked.known[pair]()
    assert done == ["judged"]


@pytest.mark.parametrize("order", list(permutations(SCORES)))
@pytest.mark.parametrize("fails", [TASKS[:1], TASKS[1:], TASKS], ids=["first", "second", "both"])
def test_what_cannot_be_scored_on_a_task_is_not_judged_whatever_comes_first(
    compared: tuple[Asked, list[str]], order: Any, fails: tuple[str, ...]
) -> None:
    asked, done = compared
    failed = []
    for model, task in order:
        if model == "merged_champion" and task in fails:
            failed.append(f"gone for {task}")
            asked.failed[task](StoreError(failed[-1]))
        else:
            asked.known[model, task]()
    assert done == failed[:1], "one reason, and no judgement"
