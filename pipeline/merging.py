"""Merging within a run: the merge schedule driven through Ray, and the Fisher and Gram artifacts that it waits for.

The run adds experts as they appear and learns of merges and task masks through callbacks; which node can run when, and
what exists already, is `merge.schedule`'s business.
"""

from collections.abc import Callable, Mapping
from itertools import islice

from infra.artifacts import Manifest, Recipe, find_each, find_published
from infra.claims import Busy, Claim
from infra.elsewhere import Elsewhere
from merge.dispatch import Dispatch
from merge.jobs import FinishJob, Job, JobResult, PartOutput, Ref, TaskMaskJob, job_name, manifests_of
from merge.schedule import MASKS, NODES, MergeSchedule
from merge.specs import Candidate, plan_reductions
from pipeline import jobs, recipes, remote
from pipeline.cluster import ray_options
from pipeline.display import Display
from pipeline.outcome import Inputs, Outcome, Problem
from pipeline.work import Item, Lane, hand_out


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
        elsewhere: Elsewhere,
    ) -> None:
        self._inputs, self._outcome, self._display, self._problem = inputs, outcome, display, problem
        self._on_merged, self._on_mask, self._elsewhere = on_merged, on_mask, elsewhere
        config = inputs.config
        self._schedule = MergeSchedule(
            inputs.store,
            plan_reductions(inputs.candidates.all),
            list(config.held_in),
            config.merge.fan_in,
            inputs.base.sha256,
            inputs.base_weights,
            config.resources.node_tasks,
            inputs.fused,
        )
        self._dispatch = Dispatch(
            inputs.store, self._schedule, elsewhere, self._enqueue, self._done, config.resources.concurrent_nodes
        )
        self.nodes = Lane(config.resources.concurrent_nodes)
        self.importances = Lane()
        self.seconds = 0.0

    @property
    def open(self) -> int:
        """Nodes that are still to do."""
        return self._schedule.open

    def close(self) -> None:
        """Give back what the driver holds of nodes in parts."""
        self._dispatch.close()

    def add_experts(self, experts: Mapping[str, Manifest]) -> None:
        """Experts exist: measure what their merges need beside them, and start what can be merged now.

        Those that exist already come best in one call: where their merges exist too, no node is asked for then.
        """
        kinds = sorted(self._schedule.extras)
        wanted = [(task, kind, manifest) for task, manifest in experts.items() for kind in kinds]
        found = find_each(
            self._inputs.store,
            [(self._importance(*each).key, {each[2].key: each[2].digest}) for each in wanted],
        )
        for (task, kind, manifest), existing in zip(wanted, found, strict=True):
            self._start_importance(task, kind, manifest, existing)
        self._start(self._schedule.add_experts({task: Ref.of(manifest) for task, manifest in experts.items()}))

    def _importance(self, task: str, kind: str, expert: Manifest) -> Recipe:
        return recipes.importance_recipe(self._inputs.config, kind, expert.key, self._inputs.tasks[task])

    def _start_importance(self, task: str, kind: str, expert: Manifest, existing: Manifest | None) -> None:
        inputs, counters, recipe = self._inputs, self._outcome, self._importance(task, kind, expert)

        def ready(manifest: Manifest) -> None:
            self._start(self._schedule.add_extra(task, kind, Ref.of(manifest)))

        def done(result: tuple[Manifest, bool]) -> None:
            manifest, made = result
            (counters.made if made else counters.reused).importances += 1
            if made:
                self._display.line(f"{kind} of {task}: {manifest.meta['rows']} rows")
            ready(manifest)

        def look() -> tuple[Manifest, bool] | None:
            return find_published(inputs.store, recipe.key, {expert.key: expert.digest})

        if existing is not None:
            done((existing, False))
            return
        job, name = jobs.importance_job(inputs, task, recipe, expert), f"{kind} of {task}"
        resources = inputs.config.resources
        start = remote.importance.options(name=name, **ray_options(resources.expert, resources.retries)).remote
        hand_out(
            self._elsewhere, self.importances, name, [recipe.key],
            lambda claim: start(inputs.store, job, claim), look, done, self._problem(f"measuring {kind} of {task!r}"),
        )  # fmt: skip

    def _start(self, found: list[Job]) -> None:
        self._dispatch.start(found)
        self._announce()

    def _enqueue(self, job: Job, claim: Claim | None, answered: Callable[[JobResult | Busy], None]) -> None:
        resources, name = self._inputs.config.resources, job_name(job)
        start = remote.merge.options(name=name, **ray_options(resources.node, resources.retries)).remote
        problem = self._problem(name)

        def failed(error: BaseException) -> None:
            problem(error)
            self._dispatch.failed(job)

        self.nodes.add(Item(name, lambda: start(self._inputs.store, job, claim), answered, failed))

    def _done(self, job: Job, result: JobResult) -> None:
        if isinstance(result, PartOutput):
            self.seconds += result.seconds
        else:
            made = [manifest for manifest, made in manifests_of(result) if made]
            if made:
                self._made(job, made[-1])
        self._announce()

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
