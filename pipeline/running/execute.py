"""A run from its inputs to its outcome: the engine, what a person sees, and how a run is stopped."""

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Protocol

from infra.engine.keyed import QUERIES, KeyedEngine, Workers
from infra.engine.once import Failed
from infra.errors import ExpertError, FactoryError
from merge.tree.reduction import MASKS, MERGES, NODES, Merges
from pipeline.flow import recipes
from pipeline.flow.context import Flow
from pipeline.flow.merges import merges_of
from pipeline.flow.run import run
from pipeline.flow.steps import EVALUATIONS, EXPERTS, REFINED, YARDSTICKS
from pipeline.records.outcome import Counters, Inputs, Outcome, span
from pipeline.report.display import Display
from workers.training.loop import StepReport

_LOOK_S = 0.25


class Stopped(Exception):
    """The run was asked to stop."""


class Crew(Workers, Protocol):
    """Who does the work of one run."""

    async def serve(self) -> None:
        """What has to go on beside the work, for ever."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


Hear = Callable[[str, Any], None]
"""Told of progress in the run's event loop: of what, and what the work reports."""
Hire = Callable[[Inputs, Hear], Crew]


def execute(
    inputs: Inputs,
    outcome: Outcome,
    display: Display,
    stop: threading.Event,
    announce: Callable[[Collection[str]], None],
    hire: Hire,
) -> None:
    """Make what is missing and fill the outcome.

    Raises Stopped; ExpertError if an expert failed and FactoryError if anything else did, when everything that does not
    depend on it is done; StoreError if the store is lost.
    """
    start = time.time()
    with display:
        asyncio.run(_execute(inputs, outcome, display, stop, announce, hire))
    outcome.seconds["total"] = time.time() - start


async def _execute(
    inputs: Inputs,
    outcome: Outcome,
    display: Display,
    stop: threading.Event,
    announce: Callable[[Collection[str]], None],
    hire: Hire,
) -> None:
    def hear(task: str, report: StepReport) -> None:
        _show(inputs, display, task, report)

    crew = hire(inputs, hear)
    engine = KeyedEngine(inputs.store, crew, inputs.config.resources.lease_seconds, display.line)
    flow = Flow(inputs, engine, outcome, display, announce)
    merges = merges_of(flow)
    beside = [asyncio.ensure_future(each) for each in (crew.serve(), _tick(flow, engine, merges))]
    try:
        await engine.run(_unless(stop, run(flow, merges)))
    except Failed:
        _raise(flow)
    finally:
        for task in beside:
            task.cancel()
        crew.close()
        engine.close()
        _fill(outcome, engine)


async def _unless(stop: threading.Event, flow: Coroutine[Any, Any, None]) -> None:
    """The flow, unless it is asked to stop: a flag, for an exception raised inside Ray's C++ calls would not reach us
    as it is. Raises Stopped."""
    task = asyncio.ensure_future(flow)
    while not task.done():
        await asyncio.wait({task}, timeout=_LOOK_S)
        if stop.is_set() and not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_LOOK_S)
            raise Stopped
    await task


def _fill(outcome: Outcome, engine: KeyedEngine) -> None:
    """What the engine counted."""
    tally = engine.tally
    for counts, found in ((outcome.made, tally.made), (outcome.reused, tally.reused)):
        for kind in vars(Counters()):
            setattr(counts, kind, found[kind])
    outcome.spans = list(tally.spans[EXPERTS])
    outcome.seconds["experts"] = span(outcome.spans)
    outcome.seconds["merge"] = tally.seconds[NODES] + tally.seconds[MASKS] + tally.seconds[MERGES]
    outcome.seconds["evaluate"] = tally.seconds[EVALUATIONS]
    for kind, name in ((REFINED, "refine"), (YARDSTICKS, "yardsticks")):
        if tally.seconds[kind]:
            outcome.seconds[name] = tally.seconds[kind]


def _raise(flow: Flow) -> None:
    """All reasons for which the run failed."""
    outcome, problems = flow.outcome, list(flow.problems)
    if outcome.failed:
        reasons = "\n".join(f"  {task}: {reason}" for task, reason in outcome.failed.items())
        text = (
            f"{len(outcome.failed)} of {len(flow.inputs.config.held_in)} experts failed, so there is no merge:\n"
            f"{reasons}\n"
            f"The other {len(outcome.experts)} are stored; the next run continues from there."
        )
        raise ExpertError("\n".join([text, *problems]))
    raise FactoryError("\n".join(problems))


# -- what a person sees -----------------------------------------------------------------------------------------


async def _tick(flow: Flow, engine: KeyedEngine, merges: Merges) -> None:
    while True:
        await asyncio.sleep(_LOOK_S)
        tally, total = engine.tally, len(flow.inputs.config.held_in)
        flow.display.tick(
            f"experts {len(flow.outcome.experts)}/{total}, merge nodes to do {merges.nodes - merges.visited}, "
            f"{_trained_on(tally.made[REFINED], engine.open[REFINED])}"
            f"evaluations done {tally.made[EVALUATIONS] + tally.reused[EVALUATIONS]}, "
            f"to do {engine.open[EVALUATIONS]}, registrations to do {engine.open[QUERIES]}, "
            f"held elsewhere {engine.held_elsewhere}"
        )


def _trained_on(done: int, open_: int) -> str:
    return f"merges refined {done}, to do {open_}, " if done or open_ else ""


def _show(inputs: Inputs, display: Display, task: str, report: StepReport) -> None:
    """A step of an expert's training; of a merge's, which is no row of the table, nothing."""
    if task not in display.rows:
        return
    if display.rows[task].state == "waiting":
        display.state(task, "training")
    steps = recipes.train_spec(inputs.config, inputs.tasks[task]).steps
    rate = report.tokens / max(report.seconds, 1e-9)
    eta = report.seconds / report.step * (steps - report.step)
    display.progress(task, report.step, steps, report.loss, rate, eta)
