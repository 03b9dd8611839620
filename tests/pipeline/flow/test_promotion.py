"""What a run says of versions that are not compared, and when one is judged; the rest is tests/e2e/test_promotion.py.

The engine is a stand-in that answers what a test says: only what is asked for matters here.
"""

import asyncio
from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any, cast

import pytest
from rich.console import Console

from infra.artifacts.manifests import Manifest
from infra.engine.once import Failed
from infra.engine.step import Engine, Step
from infra.errors import StoreError
from infra.registry.aliases import Standing
from infra.registry.versions import DECISION, REASON, ROLLED_BACK, RUN, Version
from infra.store.errors import ObjectMissing
from infra.store.s3 import FileRef
from pipeline.flow import promotion
from pipeline.flow.context import Flow
from pipeline.flow.promotion import Subject, settled_verdict, unscorable
from pipeline.flow.queries import FindChampion, Judge, Note
from pipeline.gate.opponent import Opponent
from pipeline.report.display import Display
from tests.pipeline.report.test_cards import make
from workers.jobs.evaluator import EvaluationJob
from workers.text.rows import Row

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


class Asked:
    """Stands for an engine: scores are answered when a test lets them, queries by `answer`."""

    def __init__(self, answer: Callable[[Any], Any] = lambda query: None, free: bool = True) -> None:
        self.queries: list[Any] = []
        self._answer, self._free = answer, free
        self.scores: dict[tuple[str, str], asyncio.Future[Manifest]] = {}

    async def ask(self, query: Any) -> Any:
        self.queries.append(query)
        return self._answer(query)

    def known(self, *manifests: Manifest) -> bool:
        return True

    async def make(self, step: Step) -> Any:
        job = cast(EvaluationJob, step.call)
        future = self.scores[job.model, job.task] = asyncio.get_running_loop().create_future()
        if self._free:
            future.set_result(score_of())
        return ((await future, True),)


def score_of(rows: int = 12, **meta: Any) -> Manifest:
    files = {"rows": FileRef("objects/x/1/rows", "0" * 64, 1)}
    scores = {"scores": [1.0] * rows, "metric": "exact_match", "score": 1.0, "n": rows, "format_free": 1.0}
    return Manifest("a" * 64, "evaluation", 1, {}, files, {}, scores | meta)


TASKS = ("task0000", "task0001")
SCORES = [(model, task) for model in ("merged", "merged_champion") for task in TASKS]


def flow_of(engine: Asked) -> tuple[Flow, Subject]:
    inputs, outcome = make(2)
    display = Display(list(inputs.config.held_in), Console(quiet=True))
    flow = Flow(inputs, cast(Engine, engine), outcome, display, lambda keys: None)
    return flow, Subject("merged", next(iter(outcome.merged.values())), TASKS)


def compare(engine: Asked, standing: Standing, prepare: Callable[[Flow], None] = lambda flow: None) -> Flow:
    async def comparing() -> Flow:
        flow, subject = flow_of(engine)
        prepare(flow)
        await promotion._compare(flow, subject, standing)
        return flow

    return asyncio.run(comparing())


def reason_of(engine: Asked) -> str:
    """Of the note that was left."""
    (note,) = [query for query in engine.queries if isinstance(query, Note)]
    return note.reason


def test_without_a_champion_that_there_was_a_person_decides() -> None:
    """The base is no opponent for what follows a champion that was deleted."""
    engine = Asked()
    flow = compare(engine, Standing(version(3), None, None, former=1))
    reason = reason_of(engine)
    assert reason.startswith("not compared: there is no champion, but version 1 was")
    assert reason.endswith("to make version 3 champion: python -m pipeline promote mine --version 3")
    assert flow.outcome.gate["merged"].reason == reason
    assert engine.scores == {}


@pytest.mark.parametrize("error", [StoreError("unreachable"), ObjectMissing("its adapter is gone")])
def test_only_for_a_fault_that_lasts_a_person_is_asked_to_decide(error: StoreError) -> None:
    def answer(query: Any) -> Any:
        if isinstance(query, FindChampion):
            raise error

    engine = Asked(answer)
    flow = compare(engine, Standing(version(3), version(1, "b"), None))
    reason = reason_of(engine)
    assert reason == unscorable(*flow_of(engine), Standing(version(3), version(1, "b"), None), error)
    if isinstance(error, ObjectMissing):
        assert reason.startswith("not compared: champion (version 1) cannot be scored (its adapter is gone); to make")
    else:
        assert reason == (
            "not compared: champion (version 1) could not be scored (unreachable); the next run tries again"
        )
    assert not flow.problems


def test_gate_rows_that_another_tasks_expert_learned_from_decide_nothing() -> None:
    """Two tasks over one source: one's gate rows are the other's training rows, and the merge has both experts."""

    def prepare(flow: Flow) -> None:
        rows = {task: tuple(Row(f"{task}{at}", "", ("y",)) for at in range(12)) for task in TASKS}
        shared = rows[TASKS[0]][:3]
        for task in TASKS:
            train = (Row("own", "", ("y",)), *(shared if task == TASKS[1] else ()))
            splits = {"train": train, "validation": (), "gate": rows[task], "test": ()}
            object.__setattr__(flow.inputs.tasks[task], "splits", splits)

    engine = Asked()
    compare(engine, Standing(version(2), None, None), prepare)
    (judged,) = [query for query in engine.queries if isinstance(query, Judge)]
    assert [[len(scores[task]) for task in TASKS] for scores in (judged.before, judged.after)] == [[9, 12]] * 2
    assert judged.remark == "; 3 gate rows left out: the challenger was trained on them"


@pytest.mark.parametrize(("rows", "judges"), [(3, False), (4, True)])
def test_a_few_rows_decide_nothing(rows: int, judges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.pipeline.flow.test_promotion.score_of.__defaults__", (rows,))
    engine = Asked()
    compare(engine, Standing(version(2), None, None))
    assert [type(query) for query in engine.queries] == [Judge if judges else Note]
    if not judges:
        assert reason_of(engine) == "not compared with base: there are fewer than 8 gate rows"


def answered(order: Any, fails: Mapping[tuple[str, str], Exception]) -> tuple[Asked, list[type], Flow]:
    """Scores become known in this order; what was asked of the registry before the last one, and after all."""

    async def comparing() -> tuple[Asked, list[type], Flow]:
        merged = make(2)[1].merged
        manifest = next(iter(merged.values()))
        champion = Opponent(1, manifest, "b" * 64, {})
        engine = Asked(lambda query: champion if isinstance(query, FindChampion) else None, free=False)
        flow, subject = flow_of(engine)
        task = asyncio.ensure_future(promotion._compare(flow, subject, Standing(version(2), version(1, "b"), None)))
        while len(engine.scores) < len(SCORES):
            assert not task.done(), task.exception()
            await asyncio.sleep(0)
        early: list[type] = []
        for pair in order:
            early = [type(query) for query in engine.queries]
            if pair in fails:
                engine.scores[pair].set_exception(fails[pair])
            else:
                engine.scores[pair].set_result(score_of())
            for _ in range(20):
                await asyncio.sleep(0)
        await asyncio.wait({task})
        if not isinstance(task.exception(), Failed | None):
            await task
        return engine, early, flow

    return asyncio.run(comparing())


@pytest.mark.parametrize("order", list(permutations(SCORES)))
def test_a_version_is_judged_once_with_the_last_score(order: Any) -> None:
    engine, early, _ = answered(order, {})
    assert early == [FindChampion]
    assert [type(query) for query in engine.queries] == [FindChampion, Judge]


@pytest.mark.parametrize("order", list(permutations(SCORES)))
@pytest.mark.parametrize("fails", [TASKS[:1], TASKS[1:], TASKS], ids=["first", "second", "both"])
def test_a_champion_that_cannot_be_scored_on_a_task_is_not_judged_whatever_comes_first(
    order: Any, fails: tuple[str, ...]
) -> None:
    errors = {("merged_champion", task): StoreError(f"gone for {task}") for task in fails}
    engine, _, flow = answered(order, errors)
    assert [type(query) for query in engine.queries] == [FindChampion, Note], "one reason, and no judgement"
    assert reason_of(engine).count("gone for") == 1
    assert not flow.problems


@pytest.mark.parametrize("order", list(permutations(SCORES))[::5])
def test_a_challenger_that_cannot_be_scored_fails_the_run(order: Any) -> None:
    engine, _, flow = answered(order, {("merged", TASKS[0]): StoreError("no memory")})
    assert [type(query) for query in engine.queries] == [FindChampion]
    assert list(flow.problems) == [f"scoring merged on {TASKS[0]!r} failed: no memory"]
