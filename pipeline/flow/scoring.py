"""Scores within a run: what is asked of the evaluators, and where it is noted.

None in a score's place: it is not known, for the flow is only rehearsed.
"""

from infra.artifacts.manifests import Manifest
from infra.engine.once import every
from infra.engine.step import make_one
from merge.methods.specs import Candidate
from pipeline.flow import experts
from pipeline.flow.context import Flow
from pipeline.flow.steps import base_models, evaluation_job, evaluation_step, routed_job, router_step
from pipeline.records.score import Score, ScoreKey
from workers.jobs.evaluator import EvaluationJob


async def score(
    flow: Flow,
    model: str,
    split: str,
    task: str,
    manifest: Manifest | None,
    *,
    few_shot: int = 0,
    weights_dtype: str | None = None,
    mask: Manifest | None = None,
) -> Score | None:
    """The score of one model on one split of one task. Raises Failed."""
    expert = flow.outcome.experts.get(task) if manifest else None
    job = evaluation_job(flow.inputs, model, split, task, manifest, expert, few_shot, weights_dtype, mask)
    return await score_needed(flow, job, f"scoring {model} on {task!r}")


async def score_needed(flow: Flow, job: EvaluationJob, what: str) -> Score | None:
    """The score that a job names, without which the run fails. Raises Failed."""
    return note(flow, job, await flow.need(evaluation_step(job), what))


async def score_of(flow: Flow, job: EvaluationJob) -> Score | None:
    """The score that a job names. Raises whatever the evaluator raised."""
    return note(flow, job, await make_one(flow.engine, evaluation_step(job)))


def note(flow: Flow, job: EvaluationJob, found: Manifest) -> Score | None:
    """Keep a score, if it is one."""
    if not flow.engine.known(found):
        return None
    known = flow.outcome.scores[ScoreKey(job.model, job.split, job.task)] = Score.of(found.meta)
    flow.outcome.evaluations.add(found.key)
    return known


async def base_test(flow: Flow, task: str, model: str, few_shot: int) -> Score | None:
    """Score the base on the test rows of a task."""
    return await flow.once((model, "test", task), lambda: score(flow, model, "test", task, None, few_shot=few_shot))


async def base_tests(flow: Flow) -> None:
    """Score the base on every task in every way."""
    config = flow.inputs.config
    tasks = [*config.held_in, *config.held_out]
    await every(*(base_test(flow, task, *way) for task in tasks for way in base_models(config)))


async def test_routed(flow: Flow) -> None:
    """Score the experts behind a router on every task, as a yardstick, where a configuration asks for it. Raises
    Failed."""
    step = router_step(flow.inputs)
    if step is None:
        return
    router, config = await flow.need(step, "making the router"), flow.inputs.config
    made = dict(zip(config.held_in, await every(*(experts.expert(flow, task) for task in config.held_in)), strict=True))
    jobs = (routed_job(flow.inputs, task, router, made) for task in (*config.held_in, *config.held_out))
    await every(*(score_needed(flow, job, f"scoring {job.model} experts on {job.task!r}") for job in jobs))


async def test_merge(flow: Flow, manifest: Manifest) -> None:
    """Score the chosen merge on every task, on held-in ones as it would be served, and with examples if asked for."""
    config = flow.inputs.config
    serving = config.evaluate.serving_dtype
    tasks, shots = [*config.held_in, *config.held_out], config.evaluate.few_shot
    await every(
        *(score(flow, "merged", "test", task, manifest) for task in tasks),
        *(
            score(flow, "merged_few_shot", "test", task, manifest, few_shot=shots)
            for task in (tasks if config.yardsticks.few_shot_merge else ())
        ),
        *(
            score(flow, "serving", "test", task, manifest, weights_dtype=serving)
            for task in (config.held_in if serving is not None else ())
        ),
    )


async def test_per_task(flow: Flow, candidate: Candidate) -> None:
    """Score a method that needs the task at inference; a held-out task has no mask."""
    name, outcome = candidate.to_json(), flow.outcome
    await every(
        *(
            score(flow, name, "test", task, outcome.merged[candidate], mask=outcome.masks[candidate, task])
            for task in flow.inputs.config.held_in
        )
    )
