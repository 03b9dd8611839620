"""Refining within a run: the best merges are trained on, and scored on every held-in task beside the race's winner.

Like every candidate they are judged by validation rows, which they are not trained on.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence

from infra.artifacts.manifests import Manifest
from infra.engine.in_thread import in_thread
from infra.engine.once import Failed, every
from infra.engine.rehearsal import unmade
from infra.engine.step import Step
from merge.methods.specs import Candidate
from pipeline.config.refine import RefineConfig
from pipeline.config.search import Standing
from pipeline.flow import experts
from pipeline.flow.context import Flow
from pipeline.flow.recipes import RowsRead, rows_read
from pipeline.flow.scoring import score
from pipeline.flow.steps import MULTITASK, evaluation_job, evaluation_step, multitask_step, refine_step, teacher_step
from pipeline.records.refined import Refined


async def refine(flow: Flow, ranked: Sequence[Candidate]) -> list[Refined]:
    """Every budget of steps from each of the best merges (`ranked`: best first). Those whose scores are known have a
    standing. Nothing where a configuration does not refine. Raises Failed."""
    config = flow.inputs.config
    if config.refine is None:
        return []
    wanted = [Refined(start, steps) for start in ranked[: config.refine.merges] for steps in config.refine.steps]
    teachers = await _teachers(flow, config.refine)
    means = await every(*(_refined(flow, each, teachers) for each in wanted))
    outcome, tasks = flow.outcome, len(config.held_in)
    for each, mean in zip(wanted, means, strict=True):
        if mean is not None:
            outcome.standings[each] = Standing(len(outcome.standings), len(outcome.rungs) + 1, tasks, mean)
    return wanted


async def _teachers(flow: Flow, refine: RefineConfig) -> dict[str, Manifest]:
    """What is said of each task's rows, asked once for all refined merges, by task. Raises Failed."""
    read = rows_read(flow.inputs.config, refine, flow.inputs.tasks) if refine.asks else []
    said = await every(*(_teacher(flow, each) for each in read))
    return {each.task: manifest for each, manifest in zip(read, said, strict=True)}


async def _teacher(flow: Flow, read: RowsRead) -> Manifest:
    expert = None if read.kept else await experts.expert(flow, read.task)
    return await flow.need(teacher_step(flow.inputs, read, expert), f"asking the teacher of {read.task!r}")


async def _refined(flow: Flow, refined: Refined, teachers: Mapping[str, Manifest]) -> float | None:
    """Make and score one; returns its mean score on validation rows, if it is known."""
    step = _step(flow, refined, teachers)
    await in_thread(flow.announce, set(step.keys))  # which merge is the best was not known before
    manifest, made = await flow.make(step, f"refining {refined}")
    flow.outcome.merged[refined] = manifest
    if made and flow.engine.known(manifest):
        meta = manifest.meta
        flow.display.line(
            f"{refined}: {meta['refined']['rows']} training rows, loss {meta['first_loss']:.3f} to "
            f"{meta['last_loss']:.3f}, {meta['seconds']:.0f} s"
        )
    tasks, model = list(flow.inputs.config.held_in), refined.to_json()
    scores = await every(*(score(flow, model, "validation", task, manifest) for task in tasks))
    known = [found.score for found in scores if found is not None]
    return math.fsum(known) / len(tasks) if len(known) == len(tasks) else None


def _step(flow: Flow, refined: Refined, teachers: Mapping[str, Manifest]) -> Step:
    outcome = flow.outcome
    return refine_step(flow.inputs, refined, outcome.merged[refined.start], outcome.experts, teachers)


async def multitask(flow: Flow) -> None:
    """One adapter for all tasks, as a yardstick: made, and scored on the test rows of every task. Raises Failed.

    Experts come first: merging waits for them, and nobody waits for a yardstick.
    """
    step = multitask_step(flow.inputs)
    if step is None:
        return
    with contextlib.suppress(Failed):
        await every(*(experts.expert(flow, task) for task in flow.inputs.config.held_in))
    manifest, made = await flow.make(step, f"training the {MULTITASK} adapter")
    flow.outcome.multitask = manifest
    if made and flow.engine.known(manifest):
        flow.display.line(f"{MULTITASK}: {manifest.meta['refined']['rows']} rows, {manifest.meta['seconds']:.0f} s")
    tasks = (*flow.inputs.config.held_in, *flow.inputs.config.held_out)
    await every(*(score(flow, MULTITASK, "test", task, manifest) for task in tasks))


async def possible(flow: Flow, survivors: Sequence[Candidate]) -> list[Refined]:
    """Count what refining takes where nobody knows yet which of these merges are the best; returns what might win, of
    all that would have to be made one, for each takes the same from there. Only in a rehearsal."""
    config = flow.inputs.config
    if config.refine is None:
        return []
    starts = survivors if len(survivors) >= config.refine.merges else flow.inputs.candidates.eligible
    options: list[Refined] = []
    lacking = 0
    teachers = await _teachers(flow, config.refine)
    for steps in config.refine.steps:
        work = {each: _step(flow, each, teachers) for each in (Refined(start, steps) for start in starts)}
        found = await flow.engine.find([(step.keys[0], step.inputs) for step in work.values()])
        await flow.engine.some_of(config.refine.merges, list(work.values()))
        made = {
            each: manifest or unmade(step.recipes[0])
            for (each, step), manifest in zip(work.items(), found, strict=True)
        }
        for task in config.held_in:
            jobs = [
                evaluation_job(flow.inputs, each.to_json(), "validation", task, manifest, flow.outcome.experts[task])
                for each, manifest in made.items()
            ]
            await flow.engine.some_of(config.refine.merges, [evaluation_step(job) for job in jobs])
        for each, manifest in zip(work, found, strict=True):
            flow.outcome.merged[each] = made[each]
            lacking += manifest is None
            if manifest is not None or lacking == 1:
                options.append(each)
    return options
