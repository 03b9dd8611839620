"""The experts of a run: a shared support if they share a scored one, then one Ray task for each expert that is missing.

Those that exist are reported in one call, the others as they finish. What is made of them is the run's business.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from infra.artifacts import Manifest, Recipe, find, find_each
from infra.elsewhere import Elsewhere
from pipeline import jobs, recipes, remote
from pipeline.cluster import ray_options
from pipeline.display import Display
from pipeline.outcome import Inputs, Outcome, Problem
from pipeline.work import Lane, find_or_hand_out, hand_out
from workers.expert import ExpertOutcome
from workers.shared_support import SupportRef


class Experts:
    """`lane` is for the run to settle; `on_ready` gets experts by task. What failed stands in the outcome."""

    def __init__(
        self,
        inputs: Inputs,
        outcome: Outcome,
        display: Display,
        problem: Problem,
        on_ready: Callable[[Mapping[str, Manifest]], None],
        elsewhere: Elsewhere,
    ) -> None:
        self._inputs, self._outcome, self._display = inputs, outcome, display
        self._problem, self._on_ready, self._elsewhere = problem, on_ready, elsewhere
        self.lane = Lane()
        self._board = remote.ProgressBoard.remote()  # type: ignore[attr-defined]
        self._drain: Any = None

    def close(self) -> None:
        """Dismiss the actor that collects progress."""
        ray.kill(self._board)

    def start(self) -> None:
        """Find or start what is missing: the support first, then the experts."""
        inputs, config = self._inputs, self._inputs.config
        if not recipes.shares_scored_support(config):
            self._start(None)
            return
        recipe = recipes.support_recipe(config, inputs.base.sha256, inputs.tasks)

        def ready(manifest: Manifest) -> None:
            self._start(jobs.support_ref(config, manifest))

        job, name = jobs.support_job(inputs, recipe), "shared support"
        options = ray_options(config.resources.expert, config.resources.retries)
        start = remote.support.options(name=name, **options).remote
        failed = self._problem("selecting the shared support")
        find_or_hand_out(
            self._elsewhere, self.lane, name, [recipe.key],
            lambda claim: start(inputs.store, job, claim), lambda: find(inputs.store, recipe.key, {}), ready, failed,
        )  # fmt: skip

    def _start(self, support: SupportRef | None) -> None:
        inputs, config = self._inputs, self._inputs.config
        missing: list[tuple[float, str, Recipe]] = []
        existing: dict[str, Manifest] = {}
        consumed = {support.key: support.digest} if support else {}
        shared = support.key if support else None
        planned = {
            t: recipes.expert_recipe(config, inputs.base.sha256, inputs.tasks[t], shared) for t in config.held_in
        }
        looked = find_each(inputs.store, [(recipe.key, consumed) for recipe in planned.values()])
        for (task, recipe), found in zip(planned.items(), looked, strict=True):
            data = inputs.tasks[task]
            if found is not None:
                self._outcome.reused.experts += 1
                self._display.state(task, "reused", recipe.key[:12])
                existing[task] = found
            else:
                steps = recipes.train_spec(config, data).steps
                missing.append((steps * data.mean_tokens, task, recipe))
        for _, task, recipe in sorted(missing, key=lambda item: -item[0]):  # longest expected first
            self._hand_out(task, recipe, support, consumed)
        self._ready(existing)

    def _hand_out(self, task: str, recipe: Recipe, support: SupportRef | None, consumed: Mapping[str, str]) -> None:
        inputs, resources, name = self._inputs, self._inputs.config.resources, f"expert {task}"
        job = jobs.expert_job(inputs, task, recipe, support)
        start = remote.expert.options(name=name, **ray_options(resources.expert, resources.retries)).remote

        def look() -> ExpertOutcome | None:
            found = find(inputs.store, recipe.key, consumed)
            return None if found is None else ExpertOutcome(found, False, time.time(), time.time())

        hand_out(
            self._elsewhere, self.lane, name, [recipe.key],
            lambda claim: start(inputs.store, job, self._board, claim), look, self._done(task), self._failed(task),
        )  # fmt: skip

    def _done(self, task: str) -> Callable[[ExpertOutcome], None]:
        def done(outcome: ExpertOutcome) -> None:
            loss, seconds = outcome.manifest.meta["validation_loss"], outcome.ended_at - outcome.started_at
            if outcome.made:
                self._outcome.made.experts += 1
                self._outcome.spans[task] = (outcome.started_at, outcome.ended_at)
                self._display.state(task, "done", f"validation loss {loss:.3f}, {seconds:.0f} s")
            else:
                self._outcome.reused.experts += 1
                self._display.state(task, "reused", outcome.manifest.key[:12])
            self._ready({task: outcome.manifest})

        return done

    def _failed(self, task: str) -> Callable[[BaseException], None]:
        def failed(error: BaseException) -> None:
            self._outcome.failed[task] = remote.reason(error)
            self._display.state(task, "failed", self._outcome.failed[task])

        return failed

    def _ready(self, experts: Mapping[str, Manifest]) -> None:
        self._outcome.experts |= experts
        self._on_ready(experts)

    def show_progress(self) -> None:
        """Display the steps reported since the last call, if they have arrived."""
        if self._drain is None:
            self._drain = self._board.drain.remote()
        arrived, _ = ray.wait([self._drain], timeout=0)  # never block: a stop must be noticed at once
        if not arrived:
            return
        reports = ray.get(self._drain)
        self._drain = None
        for task, report in reports:
            if self._display.rows[task].state == "waiting":
                self._display.state(task, "training")
            steps = recipes.train_spec(self._inputs.config, self._inputs.tasks[task]).steps
            rate = report.tokens / max(report.seconds, 1e-9)
            eta = report.seconds / report.step * (steps - report.step)
            self._display.progress(task, report.step, steps, report.loss, rate, eta)
