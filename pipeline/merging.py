"""Merging within a run: the merge schedule driven through Ray, and the Fisher and Gram artifacts that it waits for.

The run adds experts as they appear and learns of merges and task masks through callbacks; which node can run when, and
what exists already, is `merge.schedule`'s business.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from infra.artifacts import Manifest, find
from merge.jobs import FinishJob, Job, JobResult, PartOutput, Ref, TaskMaskJob, job_name, manifests_of
from merge.schedule import MASKS, NODES, MergeSchedule
from merge.specs import Candidate, plan_reductions
from pipeline import jobs, recipes, remote
from pipeline.cluster import ray_options
from pipeline.display import Display
from pipeline.outcome import Inputs, Outcome, Problem
from pipeline.work import Item, Lane


class Merging:
    """`nodes` and `importances` are lanes for the run to settle; `seconds` of work add up in `seconds`."""

    def __init__(
        self,
        inputs: Inputs,
        outcome: Outcome,
        display: Display,
        problem: Problem,
        on_merged: Callable[[Candidate], None],
        on_mask: Callable[[Candidate, str], None],
    ) -> None:
        self._inputs, self._outcome, self._display, self._problem = inputs, outcome, display, problem
        self._on_merged, self._on_mask = on_merged, on_mask
        config = inputs.config
        self._schedule = MergeSchedule(
            inputs.store,
            plan_reductions(inputs.candidates.all),
            list(config.held_in),
            config.merge.fan_in,
            inputs.base.sha256,
            inputs.base_weights,
            config.resources.node_tasks,
        )
        self.nodes = Lane(config.resources.concurrent_nodes)
        self.importances = Lane()
        self.seconds = 0.0

    @property
    def open(self) -> int:
        """Nodes that are still to do."""
        return self._schedule.open

    def add_experts(self, experts: Mapping[str, Manifest]) -> None:
        """Experts exist: measure what their merges need beside them, and start what can be merged now.

        Those that exist already come best in one call: where their merges exist too, no node is asked for then.
        """
        for task, manifest in experts.items():
            for kind in sorted(self._schedule.extras):
                self._start_importance(task, kind, manifest)
        self._start(self._schedule.add_experts({task: Ref.of(manifest) for task, manifest in experts.items()}))

    def _start_importance(self, task: str, kind: str, expert: Manifest) -> None:
        inputs, counters = self._inputs, self._outcome
        recipe = recipes.importance_recipe(inputs.config, kind, expert.key, inputs.tasks[task])

        def ready(manifest: Manifest) -> None:
            self._start(self._schedule.add_extra(task, kind, Ref.of(manifest)))

        def done(manifest: Manifest) -> None:
            counters.made.importances += 1
            self._display.line(f"{kind} of {task}: {manifest.meta['rows']} rows")
            ready(manifest)

        found = find(inputs.store, recipe.key, {expert.key: expert.digest})
        if found is not None:
            counters.reused.importances += 1
            ready(found)
            return
        job = jobs.importance_job(inputs, task, recipe, expert)
        resources = inputs.config.resources
        options = ray_options(resources.expert, resources.retries)
        start = remote.importance.options(name=f"{kind} of {task}", **options).remote
        failed = self._problem(f"measuring {kind} of {task!r}")
        self.importances.add(Item(f"{kind} of {task}", lambda: start(inputs.store, job), done, failed))

    def _start(self, found: list[Job]) -> None:
        for job in found:
            self.nodes.add(Item(job_name(job), self._starter(job), self._done(job), self._problem(job_name(job))))
        self._announce()

    def _starter(self, job: Job) -> Callable[[], Any]:
        resources = self._inputs.config.resources
        options = ray_options(resources.node, resources.retries)
        return lambda: remote.merge.options(name=job_name(job), **options).remote(self._inputs.store, job)

    def _done(self, job: Job) -> Callable[[JobResult], None]:
        def done(result: JobResult) -> None:
            if isinstance(result, PartOutput):
                self.seconds += result.seconds
            else:
                self._made(job, manifests_of(result)[-1][0])
            self._start(self._schedule.finished(job, result))

        return done

    def _made(self, job: Job, manifest: Manifest) -> None:
        """Note a finished artifact; of a node in parts, their time was added as they came."""
        seconds = manifest.meta["seconds"]
        if not isinstance(job, FinishJob):
            self.seconds += seconds
        if not isinstance(job, TaskMaskJob):
            name = job_name(job.whole if isinstance(job, FinishJob) else job)
            self._display.line(f"{name}: {manifest.meta['experts']} experts, {seconds:.1f} s")

    def _announce(self) -> None:
        """Tell the run what is new: both mappings only grow, in the order in which things were made."""
        schedule, outcome = self._schedule, self._outcome
        for what, counters in ((schedule.made, outcome.made), (schedule.reused, outcome.reused)):
            counters.merge_nodes, counters.task_masks = what[NODES], what[MASKS]
        for candidate, manifest in list(islice(schedule.merged.items(), len(outcome.merged), None)):
            outcome.merged[candidate] = manifest
            self._on_merged(candidate)
        for (candidate, task), manifest in list(islice(schedule.masks.items(), len(outcome.masks), None)):
            outcome.masks[candidate, task] = manifest
            self._on_mask(candidate, task)
