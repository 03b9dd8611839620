"""Scores within a run: found, or made by a pool of evaluation actors that take the slots which experts leave."""

from collections.abc import Callable
from typing import Any

import ray

from infra.artifacts import Manifest, find
from pipeline import jobs, remote
from pipeline.cluster import ray_options
from pipeline.outcome import Inputs, Outcome, Problem
from pipeline.work import ActorItem, ActorPool


class Evaluations:
    """`pool` is for the run to settle; scores go to the outcome, `seconds` of work add up in `seconds`."""

    def __init__(self, inputs: Inputs, outcome: Outcome, problem: Problem) -> None:
        self._inputs, self._outcome, self._problem = inputs, outcome, problem
        self.pool = ActorPool(self._create, ray.kill)
        self.seconds = 0.0

    @property
    def done(self) -> int:
        """Scores known so far."""
        return self._outcome.made.evaluations + self._outcome.reused.evaluations

    def score(
        self,
        model: str,
        split: str,
        task: str,
        manifest: Manifest | None,
        *,
        few_shot: int = 0,
        weights_dtype: str | None = None,
        mask: Manifest | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Find the score of one model on one split of one task, or have it made; `then` runs when it is known."""
        inputs, outcome = self._inputs, self._outcome
        expert = outcome.experts.get(task) if manifest else None
        job = jobs.evaluation_job(inputs, model, split, task, manifest, expert, few_shot, weights_dtype, mask)

        def known(found: Manifest, made: bool) -> None:
            (outcome.made if made else outcome.reused).evaluations += 1
            outcome.scores[model, split, task] = found.meta
            then()

        found = find(inputs.store, job.recipe.key, {})
        if found is not None:
            known(found, made=False)
            return

        def done(result: tuple[Manifest, bool]) -> None:
            self.seconds += result[0].meta["seconds"]
            known(*result)

        self.pool.waiting.append(
            ActorItem(
                name=f"{model} on {task}",
                affinity=" ".join([ref.name for ref in (job.adapter, job.mask) if ref] + [job.weights_dtype]),
                call=lambda actor: actor.evaluate.remote(job, inputs.config.evaluate.batch_size),
                done=done,
                failed=self._problem(f"scoring {model} on {task!r}"),
            )
        )

    def _create(self) -> Any:
        config = self._inputs.config
        options = ray_options(config.resources.evaluator)
        actor = remote.EvaluationActor.options(max_restarts=3, max_task_retries=-1, **options)  # type: ignore[attr-defined]
        classifies = config.objective == "classification"
        return actor.remote(self._inputs.store, self._inputs.base.sha256, config.evaluate.compute_dtype, classifies)
