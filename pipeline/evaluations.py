"""Scores within a run: found, or made by a pool of evaluation actors that take the slots which experts leave."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from infra.artifacts import Manifest, find_each, find_published
from infra.claims import Claim
from infra.elsewhere import Elsewhere
from pipeline import jobs, remote
from pipeline.cluster import ray_options
from pipeline.outcome import Inputs, Outcome, Problem
from pipeline.work import ActorItem, ActorPool
from workers.evaluator import EvaluationJob


@dataclass(frozen=True)
class _Asked:
    """A score that is wanted, and what is called when it is known or cannot be."""

    job: EvaluationJob
    then: Callable[[], None]
    failed: Callable[[BaseException], None]


class Evaluations:
    """`pool` is for the run to settle; scores go to the outcome, `seconds` of work add up in `seconds`. Scores that are
    asked for are looked for together, by `look_up`."""

    def __init__(self, inputs: Inputs, outcome: Outcome, problem: Problem, elsewhere: Elsewhere) -> None:
        self._inputs, self._outcome, self._problem, self._elsewhere = inputs, outcome, problem, elsewhere
        self.pool = ActorPool(self._create, ray.kill)
        self.seconds = 0.0
        self._asked: list[_Asked] = []

    @property
    def asked(self) -> int:
        """Scores that nobody has looked for yet."""
        return len(self._asked)

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
        """Ask for the score of one model on one split of one task; `then` runs when it is known."""
        expert = self._outcome.experts.get(task) if manifest else None
        job = jobs.evaluation_job(self._inputs, model, split, task, manifest, expert, few_shot, weights_dtype, mask)
        self.make(job, then, self._problem(f"scoring {model} on {task!r}"))

    def make(self, job: EvaluationJob, then: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """Ask for the score that a job names; one of the two is called when it is known, or cannot be."""
        self._asked.append(_Asked(job, then, failed))

    def look_up(self) -> None:
        """Find the scores that were asked for, and have made those that do not exist. Raises StoreError."""
        while self._asked:  # what is found may ask for more
            asked, self._asked = self._asked, []
            found = find_each(self._inputs.store, [(each.job.recipe.key, {}) for each in asked])
            for each, existing in zip(asked, found, strict=True):
                self._settle(each, existing)

    def _settle(self, asked: _Asked, existing: Manifest | None) -> None:
        inputs, outcome, job = self._inputs, self._outcome, asked.job

        def done(result: tuple[Manifest, bool]) -> None:
            found, made = result
            (outcome.made if made else outcome.reused).evaluations += 1
            if made:
                self.seconds += found.meta["seconds"]
            outcome.scores[job.model, job.split, job.task] = found.meta
            outcome.evaluations.add(found.key)
            asked.then()

        if existing is not None:
            done((existing, False))
            return

        def enqueue(claim: Claim, answered: Callable[[Any], None]) -> None:
            self.pool.waiting.append(
                ActorItem(
                    name=name,
                    affinity=" ".join([ref.name for ref in (job.adapter, job.mask) if ref] + [job.weights_dtype]),
                    base=job.base_sha256 or inputs.base.sha256,
                    call=lambda actor: actor.evaluate.remote(job, inputs.config.evaluate.batch_size, claim),
                    done=answered,
                    failed=asked.failed,
                )
            )

        name = f"{job.model} on {job.task}"
        key = job.recipe.key
        self._elsewhere.submit(name, [key], enqueue, lambda: find_published(inputs.store, key, {}), done)

    def _create(self) -> Any:
        config = self._inputs.config
        options = ray_options(config.resources.evaluator)
        # Not restarted by Ray: it would wait for a slot, maybe for ever, while others idle. The pool hands its call on.
        actor = remote.EvaluationActor.options(max_restarts=0, max_task_retries=-1, **options)  # type: ignore[attr-defined]
        classifies = config.objective == "classification"
        return actor.remote(self._inputs.store, self._inputs.base.sha256, config.evaluate.compute_dtype, classifies)
