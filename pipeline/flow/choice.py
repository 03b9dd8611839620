"""The choice among merge candidates: a race on validation rows, told by `pipeline.config.search`.

Candidates that need the task at inference are scored beside, and the best parameters of each such method reported.
"""

import math
from collections.abc import Sequence
from itertools import islice

from infra.engine.once import every
from infra.engine.step import Step
from merge.methods.specs import Candidate
from merge.tree.reduction import Merges
from pipeline.config.search import Race, task_order
from pipeline.flow import refining
from pipeline.flow.context import Flow
from pipeline.flow.merges import mask, merged
from pipeline.flow.scoring import score
from pipeline.flow.steps import evaluation_job, evaluation_step
from pipeline.records.refined import Merge
from pipeline.records.score import Score


async def choose(flow: Flow, merges: Merges) -> list[Merge]:
    """The candidate that wins the race, or the best of those that are refined from its winners; where a flow is only
    rehearsed and scores are missing, all that might."""
    config, eligible, outcome = flow.inputs.config, flow.inputs.candidates.eligible, flow.outcome
    race = Race(len(eligible), list(config.held_in), config.merge.search.evaluations, config.seed)
    pairs = race.wanted()
    while pairs:
        scores = await every(*(_validate(flow, merges, eligible[number], task) for number, task in pairs))
        known = [(pair, found) for pair, found in zip(pairs, scores, strict=True) if found is not None]
        following = [race.record(number, task, found.score) for (number, task), found in known]
        if len(known) < len(pairs):
            break
        pairs = following[-1]
    if not race.over:
        survivors = await _open(flow, race, [eligible[number] for number in race.survivors])
        return [*survivors, *await refining.possible(flow, survivors)]
    outcome.rungs = race.rungs
    outcome.standings = dict(zip(eligible, race.table(), strict=True))
    ranked = [eligible[number] for number in race.ranking()]
    refined = await refining.refine(flow, ranked)
    options: list[Merge] = [ranked[0], *refined]
    if any(option not in outcome.standings for option in options):
        return options
    chosen = max(options, key=lambda option: outcome.standings[option].mean)  # of equals the one without training
    flow.display.line(f"chosen: {chosen} with mean validation score {outcome.standings[chosen].mean:.3f}")
    return [chosen]


async def _validate(flow: Flow, merges: Merges, candidate: Candidate, task: str) -> Score | None:
    manifest = await merged(flow, merges, candidate)
    own = await mask(flow, merges, candidate, task)
    return await score(flow, candidate.to_json(), "validation", task, manifest, mask=own)


async def _open(flow: Flow, race: Race, survivors: list[Candidate]) -> list[Candidate]:
    """Count the scores of rungs after the one that could not be decided."""
    config = flow.inputs.config
    tasks, reached = iter(task_order(list(config.held_in), config.seed)), len(survivors)
    for rung in race.rungs:
        for task in islice(tasks, rung.tasks):
            if rung.candidates < reached:
                await flow.engine.some_of(rung.candidates, [_step(flow, each, task) for each in survivors])
    return survivors


def _step(flow: Flow, candidate: Candidate, task: str) -> Step:
    outcome = flow.outcome
    manifest, expert = outcome.merged[candidate], outcome.experts[task]
    return evaluation_step(evaluation_job(flow.inputs, candidate.to_json(), "validation", task, manifest, expert))


async def best_per_task(flow: Flow, merges: Merges) -> list[list[Candidate]]:
    """Of each method that needs the task at inference the candidate with the best mean; if scores are missing, all."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in flow.inputs.candidates.per_task:
        groups.setdefault(candidate.method, []).append(candidate)
    return await every(*(_best(flow, merges, group) for group in groups.values()))


async def _best(flow: Flow, merges: Merges, group: Sequence[Candidate]) -> list[Candidate]:
    tasks = list(flow.inputs.config.held_in)
    found = await every(*(every(*(_validate(flow, merges, each, task) for task in tasks)) for each in group))
    if any(None in scores for scores in found):
        return list(group)
    means = [math.fsum(each.score for each in scores if each is not None) for scores in found]
    best = group[means.index(max(means))]
    flow.outcome.per_task[best.method] = best
    return [best]
