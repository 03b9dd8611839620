"""What a run would make and what it would reuse, found out by going through the run without making anything.

Existing artifacts are looked up as the run would; for a missing one an empty manifest stands in, whose bytes nothing
knows, and the run goes on: merging in the same state machine (`merge.schedule`), the choice in the same race
(`pipeline.search`). Scores that exist decide the race as they would in the run; where one is missing, what depends on
the choice is counted at most. It is assumed that what is made does not have the bytes of something that exists.

Not here: why an expert is stale (`pipeline.staleness`), what a run costs (`pipeline.estimate`).
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from infra.artifacts import Manifest, Recipe, find, peek
from infra.model_versions import Model
from infra.registry import CHECKPOINT, MERGED, model_name
from infra.snapshot import Snapshot
from infra.store import FileRef
from merge.export import export_job
from merge.jobs import Job, NodeJob, Ref, RootJob, TaskMaskJob, consumed
from merge.schedule import MASKS, NODES, MergeSchedule
from merge.specs import Candidate, plan_reductions
from pipeline.cluster import GIB
from pipeline.gate_forecast import gate_jobs, is_registered
from pipeline.jobs import base_models, evaluation_job
from pipeline.outcome import Inputs
from pipeline.planning import Planned, plan_recipes
from pipeline.search import Race, task_order
from workers.evaluator import EvaluationJob

KINDS = (
    "support", "experts", "importances", "merge_nodes", "merges", "task_masks", "evaluations", "checkpoints",
    "registrations",
)  # fmt: skip
"""In the order of a run. Merge nodes count the roots too, and merges the candidates that roots are lowered to."""


@dataclass
class Count:
    """How many artifacts of a kind a run would make and reuse; `at_most`: it may make fewer and reuse more."""

    make: int = 0
    reuse: int = 0
    at_most: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a run of one seed would do."""

    inputs: Inputs
    planned: Planned
    support: Manifest | None
    """The shared support, if there is one and it exists."""
    counts: Mapping[str, Count]
    stale: tuple[str, ...]
    """Tasks whose expert would be made, in the order of the configuration."""
    found: tuple[Manifest, ...]
    """What would be reused, scores included."""


def forecast(
    inputs: Inputs, snapshot: Snapshot, models: Mapping[str, Model], expected: set[str] | None = None
) -> Forecast:
    """What a run of these inputs would do. `models` are the suite's registered models by name; `expected`: keys that
    runs of other seeds make before, to which those of this one are added. Raises StoreError."""
    return _Walk(inputs, snapshot, models, set() if expected is None else expected).forecast()


def unmade(recipe: Recipe, label: str = "adapter") -> Manifest:
    """Stands for an artifact that does not exist: its digest is that of no bytes."""
    file = FileRef(f"objects/{recipe.key}/-/{label}", f"unmade {recipe.key}", 0)
    return Manifest(recipe.key, recipe.kind, recipe.version, {}, {label: file}, {}, {})


@dataclass
class _Walk:
    """One passage through a run, step by step in its order; every step counts what it finds and what it lacks."""

    inputs: Inputs
    snapshot: Snapshot
    models: Mapping[str, Model]
    expected: set[str]
    counts: dict[str, Count] = field(default_factory=lambda: {kind: Count() for kind in KINDS})
    experts: dict[str, Manifest] = field(default_factory=dict)
    merged: dict[Candidate, Manifest] = field(default_factory=dict)
    masks: dict[tuple[Candidate, str], Manifest] = field(default_factory=dict)
    checkpoint: Manifest | None = None
    """That of the chosen merge, if one is asked for and the choice is known."""
    lacking: set[str] = field(default_factory=set)
    """Keys of what would be made."""
    base_at_gate: set[tuple[str, str]] = field(default_factory=set)
    """(base, task) whose gate score a run holds already."""
    found: list[Manifest] = field(default_factory=list)
    doubt: bool = False
    """Whether something is made again under a key that has a manifest: it may get the bytes that it had, and then what
    was made of those is found after all."""

    def forecast(self) -> Forecast:
        planned = plan_recipes(self.inputs)
        self.snapshot.read_ahead(recipe.key for recipe in planned.recipes())
        support = self._look("support", planned.support, {}, "support") if planned.support else None
        consumed = {support.key: support.digest} if support else {}
        self.experts = {task: self._look("experts", recipe, consumed) for task, recipe in planned.experts.items()}
        self._merge(planned)
        self._score_base_and_experts()
        contenders = self._race()
        self._test(contenders, self._per_task())
        self._export(contenders)
        self._register(contenders)
        return Forecast(
            inputs=self.inputs,
            planned=planned,
            support=support if support is not None and support.key not in self.lacking else None,
            counts=self.counts,
            stale=tuple(task for task, expert in self.experts.items() if expert.key in self.lacking),
            found=tuple(self.found),
        )

    # -- counting -----------------------------------------------------------------------------------------------

    def _look(self, kind: str, recipe: Recipe, inputs: Mapping[str, str], label: str = "adapter") -> Manifest:
        """The artifact or what stands for it, counted."""
        found = find(self.snapshot, recipe.key, inputs)
        made = False
        if found is None:
            found, made = self._stand_in(kind, recipe, inputs, label)
        else:
            self.found.append(found)
        count = self.counts[kind]
        count.make += made
        count.reuse += not made
        return found

    def _stand_in(self, kind: str, recipe: Recipe, inputs: Iterable[str], label: str) -> tuple[Manifest, bool]:
        """For something missing, and whether it is this that makes it: of two that need one key, the first."""
        made = recipe.key not in self.expected
        self.expected.add(recipe.key)
        self.lacking.add(recipe.key)
        if self.snapshot.holds(recipe.key):
            self.doubt = True
            self.counts[kind].at_most |= not self.lacking.isdisjoint(inputs)
        return unmade(recipe, label), made

    def _doubtful(self, *kinds: str) -> None:
        for kind in kinds:
            self.counts[kind].at_most |= self.doubt

    def _count(self, kind: str, total: int, missing: Sequence[int | bool]) -> None:
        """Count `total` things of which one of the numbers `missing` is missing."""
        count, most = self.counts[kind], max(missing)
        count.make += most
        count.reuse += total - most
        count.at_most |= min(missing) < most

    # -- merging ------------------------------------------------------------------------------------------------

    def _merge(self, planned: Planned) -> None:
        """As `pipeline.merging` does: the experts that exist come first, in one call, after what else they have."""
        inputs = self.inputs
        self._doubtful("importances")
        extras = {}
        for (kind, task), recipe in planned.importances.items():
            expert = self.experts[task]
            extras[kind, task] = self._look("importances", recipe, {expert.key: expert.digest}, kind)
        self._doubtful("merge_nodes", "merges", "task_masks")
        schedule = MergeSchedule(
            self.snapshot, plan_reductions(inputs.candidates.all), list(self.experts), inputs.config.merge.fan_in,
            inputs.base.sha256, inputs.base_weights,
        )  # fmt: skip
        for there in (True, False):
            experts = {t: Ref.of(m) for t, m in self.experts.items() if (m.key not in self.lacking) == there}
            late = []
            for (kind, task), extra in extras.items():
                if task in experts and extra.key not in self.lacking:
                    schedule.add_extra(task, kind, Ref.of(extra))
                elif task in experts:
                    late.append((task, kind, Ref.of(extra)))
            if experts:
                self._drive(schedule, schedule.add_experts(experts))
            for task, kind, ref in late:
                self._drive(schedule, schedule.add_extra(task, kind, ref))
        self.merged, self.masks = schedule.merged, schedule.masks
        made = sum(merge.key in self.lacking for merge in self.merged.values())
        for kind, make, reuse in (
            ("merge_nodes", schedule.made[NODES], schedule.reused[NODES]),
            ("merges", made, len(self.merged) - made),
            ("task_masks", schedule.made[MASKS], schedule.reused[MASKS]),
        ):
            self.counts[kind].make, self.counts[kind].reuse = make, reuse
        reused = [peek(self.snapshot, recipe.key) for recipe in planned.nodes]
        reused += [*self.merged.values(), *self.masks.values()]
        self.found += [found for found in reused if found is not None and found.key not in self.lacking]

    def _drive(self, schedule: MergeSchedule, jobs: list[Job]) -> None:
        """Answer every job with stand-ins, until there are no more."""
        todo = deque(jobs)
        while todo:
            job = todo.popleft()
            if isinstance(job, RootJob):
                result = [self._stand_in("merges", recipe, job.inputs, "adapter") for _, recipe in job.candidates]
                self.counts["merge_nodes"].at_most |= self.counts["merges"].at_most
            elif isinstance(job, TaskMaskJob):
                read = (job.unified.key, job.adapter.key)
                result = [self._stand_in("task_masks", job.recipe, read, "mask")]
            else:
                assert isinstance(job, NodeJob)  # a schedule of whole nodes has no parts to join
                read_by = consumed(job.children, job.reference)
                result = [self._stand_in("merge_nodes", job.recipe, read_by, "statistics")]
            todo += schedule.finished(job, tuple(result))

    # -- scores -------------------------------------------------------------------------------------------------

    def _job(
        self, model: str, split: str, task: str, manifest: Manifest | None, *, few_shot: int = 0,
        weights_dtype: str | None = None, mask: Manifest | None = None,
    ) -> EvaluationJob:  # fmt: skip
        expert = self.experts.get(task) if manifest else None
        return evaluation_job(self.inputs, model, split, task, manifest, expert, few_shot, weights_dtype, mask)

    def _score(self, jobs: Sequence[EvaluationJob]) -> list[Manifest | None]:
        """The scores, counted; None for what would be made."""
        self.snapshot.read_ahead(job.recipe.key for job in jobs)
        found = [self._look("evaluations", job.recipe, {}, "rows") for job in jobs]
        return [None if score.key in self.lacking else score for score in found]

    def _missing(self, jobs: Sequence[EvaluationJob]) -> list[bool]:
        """Whether each score would be made, not counted: whether it is wanted is not known.

        Of several that are one (the weights' type may be the type that is computed in) the first is made.
        """
        self.snapshot.read_ahead(job.recipe.key for job in jobs)
        keys = [job.recipe.key for job in jobs]
        return [
            key not in self.expected and key not in keys[:at] and find(self.snapshot, key, {}) is None
            for at, key in enumerate(keys)
        ]

    def _score_base_and_experts(self) -> None:
        config = self.inputs.config
        self._score(
            [
                self._job(model, "test", task, None, few_shot=few_shot)
                for task in [*config.held_in, *config.held_out]
                for model, few_shot in base_models(config)
            ]
        )
        self._doubtful("evaluations")
        self._score([self._job("expert", "test", task, expert) for task, expert in self.experts.items()])

    def _validation(self, candidate: Candidate, task: str) -> EvaluationJob:
        mask = self.masks.get((candidate, task))
        return self._job(candidate.to_json(), "validation", task, self.merged[candidate], mask=mask)

    def _race(self) -> list[Candidate]:
        """Count the scores of the race; returns who may win it, which is one if every score exists."""
        config, eligible = self.inputs.config, self.inputs.candidates.eligible
        race = Race(len(eligible), list(self.experts), config.merge.search.evaluations, config.seed)
        pairs = race.wanted()
        while pairs:
            scores = self._score([self._validation(eligible[number], task) for number, task in pairs])
            following: list[tuple[int, str]] = []
            for (number, task), score in zip(pairs, scores, strict=True):
                if score is not None:
                    following += race.record(number, task, score.meta["score"])
            if None in scores:
                break
            pairs = following
        if race.over:
            return [eligible[race.winner()]]
        survivors = [eligible[number] for number in race.survivors]
        tasks = iter(task_order(list(self.experts), config.seed))
        reached = len(survivors)
        for rung in race.rungs:
            for task in islice(tasks, rung.tasks):
                if rung.candidates < reached:  # rungs after the one that could not be decided
                    lacking = sum(self._missing([self._validation(candidate, task) for candidate in survivors]))
                    least = max(0, lacking - (reached - rung.candidates))
                    self._count("evaluations", rung.candidates, [least, min(lacking, rung.candidates)])
        return survivors

    def _per_task(self) -> list[list[Candidate]]:
        """Count the validation scores of methods that need the task; of each, who may be the best of its kind."""
        groups: dict[str, list[Candidate]] = {}
        for candidate in self.inputs.candidates.per_task:
            groups.setdefault(candidate.method, []).append(candidate)
        best = []
        for group in groups.values():
            means: dict[Candidate, float] = {}
            for candidate in group:
                scores = self._score([self._validation(candidate, task) for task in self.experts])
                known = [score.meta["score"] for score in scores if score is not None]
                if len(known) == len(scores):
                    means[candidate] = math.fsum(known) / len(known)
            best.append([max(means, key=lambda c: means[c])] if len(means) == len(group) else group)
        return best

    def _test(self, contenders: Sequence[Candidate], best: Sequence[Sequence[Candidate]]) -> None:
        """Count the test scores of whoever is chosen, and of the best of each method that needs the task."""
        config, serving = self.inputs.config, self.inputs.config.evaluate.serving_dtype

        def chosen(candidate: Candidate) -> list[EvaluationJob]:
            merged = self.merged[candidate]
            jobs = [self._job("merged", "test", task, merged) for task in [*config.held_in, *config.held_out]]
            if serving is not None:
                jobs += [self._job("serving", "test", t, merged, weights_dtype=serving) for t in config.held_in]
            return jobs

        def own(candidate: Candidate) -> list[EvaluationJob]:
            name, merged = candidate.to_json(), self.merged[candidate]
            return [self._job(name, "test", t, merged, mask=self.masks[candidate, t]) for t in self.experts]

        for group, jobs_of in [(contenders, chosen), *((group, own) for group in best)]:
            if len(group) == 1:
                self._score(jobs_of(group[0]))
            else:
                jobs = [jobs_of(candidate) for candidate in group]
                self._count("evaluations", len(jobs[0]), [sum(self._missing(each)) for each in jobs])

    # -- what follows the choice --------------------------------------------------------------------------------

    def _export(self, contenders: Sequence[Candidate]) -> None:
        export, base = self.inputs.config.merge.export, self.inputs.base.sha256
        if export is None or not self.inputs.registers:
            return
        shard = round(export.shard_gib * GIB)
        recipes = [export_job(self.merged[c], base, export.dtype, shard).recipe for c in contenders]
        self.snapshot.read_ahead(recipe.key for recipe in recipes)
        self._doubtful("checkpoints")
        if len(recipes) == 1:
            self.checkpoint = self._look("checkpoints", recipes[0], {}, "checkpoint")
            return
        missing = [find(self.snapshot, recipe.key, {}) is None for recipe in recipes]
        self._count("checkpoints", 1, [int(each) for each in missing])

    def _register(self, contenders: Sequence[Candidate]) -> None:
        """Count registered versions of experts, merge and checkpoint, and the scores that the gate asks for."""
        if not self.inputs.registers:
            return
        self._doubtful("registrations")
        for task, expert in self.experts.items():
            self._enter(task, [expert])
        self._enter(MERGED, [self.merged[candidate] for candidate in contenders])
        if self.checkpoint is not None:
            self._enter(CHECKPOINT, [self.checkpoint])
        elif self.inputs.config.merge.export is not None:
            self._count("registrations", 1, [0, 1])

    def _enter(self, task: str, artifacts: Sequence[Manifest]) -> None:
        """Count the version of one of these artifacts, and its scores at the gate."""
        model = self.models.get(model_name(self.inputs.config.suite, task))
        there = [is_registered(self.inputs, model, task, artifact, self.experts) for artifact in artifacts]
        self._count("registrations", 1, [not each for each in there])
        if task == CHECKPOINT:
            return
        asked = [gate_jobs(self.inputs, model, task, artifact, self.experts) for artifact in artifacts]
        wanted = [[job for job in jobs if (job.model, job.task) not in self.base_at_gate] for jobs in asked]
        self.base_at_gate |= {(job.model, job.task) for jobs in asked for job in jobs if job.model == "base"}
        if len(wanted) == 1:
            self._score(wanted[0])
            return
        missing = [sum(self._missing(jobs)) for jobs in wanted]
        count = self.counts["evaluations"]
        count.make += max(missing)
        count.reuse += min(len(jobs) - lacking for jobs, lacking in zip(wanted, missing, strict=True))
        count.at_most |= len({(len(jobs), lacking) for jobs, lacking in zip(wanted, missing, strict=True)}) > 1
