"""One run: what is missing is made, in the order in which its inputs appear.

Experts start at once; a merge node starts when its children exist, while other experts still train
(`pipeline.merging`); evaluation actors take the slots that experts leave. Validation scores are those that the race
for the best merge asks for (`pipeline.search`). What another run is making is waited for and not made again
(`infra.elsewhere`). The driver holds keys, manifests and scores, never tensors.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial

import ray

from infra.artifacts import Manifest, find_published
from infra.elsewhere import Elsewhere
from infra.errors import ExpertError, FactoryError
from merge.export import export_job
from merge.specs import Candidate
from pipeline import remote
from pipeline.cluster import GIB, ray_options, slots_of
from pipeline.display import Display
from pipeline.evaluations import Evaluations
from pipeline.experts import Experts
from pipeline.jobs import base_models
from pipeline.merging import Merging
from pipeline.outcome import Inputs, Outcome, span
from pipeline.promotion import Promotion
from pipeline.search import Race
from pipeline.work import find_or_hand_out, settle

POLL_S = 0.5


class Stopped(Exception):
    """The run was asked to stop."""


class Run:
    """The state machine of one run. `execute` drives it to the end."""

    def __init__(
        self,
        inputs: Inputs,
        display: Display,
        slots: int,
        stop: threading.Event,
        announce: Callable[[Collection[str]], None],
    ) -> None:
        """``announce`` is told keys that could not be known before the run, before they are looked for."""
        self.inputs, self.config, self.store = inputs, inputs.config, inputs.store
        self.display = display
        self._stop, self._announce = stop, announce
        self.outcome = Outcome(slots=slots)
        self._elsewhere = Elsewhere(inputs.store, self.config.resources.lease_seconds, display.line)
        self._experts = Experts(
            inputs, self.outcome, display, self._problem, self._experts_ready, self._elsewhere
        )  # fmt: skip
        self._evaluations = Evaluations(inputs, self.outcome, self._problem, self._elsewhere)
        self._promotion = Promotion(inputs, self.outcome, display, self._problem, self._evaluations)
        self._race = Race(
            len(inputs.candidates.eligible),
            list(self.config.held_in),
            self.config.merge.search.evaluations,
            self.config.seed,
        )
        self._numbers = {candidate: number for number, candidate in enumerate(inputs.candidates.eligible)}
        self._models = [candidate.to_json() for candidate in self._numbers]  # names of candidates, kept once each
        self._asked: dict[int, list[str]] = {}
        self._merged: set[int] = set()
        self._merging = Merging(
            inputs, self.outcome, display, self._problem, self._candidate_ready, self._mask_ready, self._elsewhere
        )  # fmt: skip
        self._problems: list[str] = []

    # -- the run, top to bottom ---------------------------------------------------------------------------------

    def execute(self) -> Outcome:
        """Make what is missing. Raises ExpertError after everything else is done if an expert failed."""
        start = time.time()
        with contextlib.ExitStack() as stack:
            stack.callback(self._elsewhere.release)  # last: nobody works any more
            stack.callback(self._merging.close)
            stack.callback(self._experts.close)
            stack.callback(self._evaluations.pool.close)
            stack.enter_context(self.display)
            self._ask(self._race.wanted())
            self._experts.start()
            self._start_base_evaluations()
            self._settle_until_idle()
            self.outcome.seconds["experts"] = span(list(self.outcome.spans.values()))
            self._choose()
            self._start_export()
            self._start_test_of_chosen()
            self._settle_until_idle()
            self._promotion.merge()
            self._settle_until_idle()
        self.outcome.seconds["merge"] = self._merging.seconds
        self.outcome.seconds["evaluate"] = self._evaluations.seconds
        self.outcome.seconds["total"] = time.time() - start
        return self.outcome

    def _settle_until_idle(self) -> None:
        workers = [self._experts.lane, self._merging.importances]
        lanes = [*workers, self._merging.nodes, self._promotion.lane]
        actors = self._evaluations.pool
        while True:
            self._evaluations.look_up()
            for lane in lanes:
                lane.start_ready()
            taken = sum(lane.open for lane in workers)
            actors.start_ready(self._room_for_actors(taken))
            actors.release_idle()
            works = settle(lanes, actors, POLL_S)
            moved = self._elsewhere.poll()
            still = self._evaluations.asked or self._elsewhere.open or actors.open or any(x.open for x in lanes)
            if not works and not still:
                break
            if not works and not moved:
                self._stop.wait(POLL_S)  # all that is left is made elsewhere
            if self._stop.is_set():
                for ref in [ref for lane in [*workers, self._merging.nodes] for ref in lane.running]:
                    ray.cancel(ref)  # what waits inside Ray would start while the driver tidies up
                raise Stopped
            self._show_progress()
        if self.outcome.failed:
            raise ExpertError(self._failure_report())
        if self._problems:
            raise FactoryError("\n".join(self._problems))

    def _room_for_actors(self, taken: int) -> int:
        """Evaluation actors that fit beside `taken` experts on the nodes that live now: nodes are lost, others join."""
        nodes, resources = ray.nodes(), self.config.resources
        return max(0, min(slots_of(nodes, resources.evaluator), slots_of(nodes, resources.expert) - taken))

    def _show_progress(self) -> None:
        self._experts.show_progress()
        done, total = len(self.outcome.experts), len(self.config.held_in)
        self.display.tick(
            f"experts {done}/{total}, merge nodes to do {self._merging.open}, "
            f"evaluations done {self._evaluations.done}, to do {self._evaluations.pool.open}, "
            f"registrations to do {self._promotion.lane.open}, held elsewhere {self._elsewhere.open}"
        )

    # -- experts ------------------------------------------------------------------------------------------------

    def _experts_ready(self, experts: Mapping[str, Manifest]) -> None:
        for task, manifest in experts.items():
            self._evaluations.score("expert", "test", task, manifest, then=partial(self._scored, task))
        self._merging.add_experts(experts)

    def _scored(self, task: str) -> None:
        """The test score of a task's expert or of the base is known: with both, the expert's card can be written."""
        if all((model, "test", task) in self.outcome.scores for model in ("base", "expert")):
            self._promotion.expert(task)

    def _problem(self, what: str) -> Callable[[BaseException], None]:
        """Note a failure; the run goes on with everything that does not depend on it and raises at the end."""

        def failed(error: BaseException) -> None:
            self._problems.append(f"{what} failed: {remote.reason(error)}")
            self.display.line(self._problems[-1])

        return failed

    def _failure_report(self) -> str:
        reasons = "\n".join(f"  {task}: {reason}" for task, reason in self.outcome.failed.items())
        return (
            f"{len(self.outcome.failed)} of {len(self.config.held_in)} experts failed, so there is no merge:\n"
            f"{reasons}\n"
            f"The other {len(self.outcome.experts)} are stored; the next run continues from there."
        )

    # -- the choice ---------------------------------------------------------------------------------------------

    def _candidate_ready(self, candidate: Candidate) -> None:
        """A merge exists: make the scores that the race has asked for meanwhile."""
        number = self._numbers.get(candidate)
        if number is not None:  # else a merge that is not chosen from, or that only a later round reads
            self._merged.add(number)
            for task in self._asked.pop(number, ()):
                self._score(number, task)

    def _ask(self, pairs: list[tuple[int, str]]) -> None:
        """Have the race's next scores made, now or as soon as the merge exists."""
        for number, task in pairs:
            if number in self._merged:
                self._score(number, task)
            else:
                self._asked.setdefault(number, []).append(task)

    def _score(self, number: int, task: str) -> None:
        model, manifest = self._models[number], self.outcome.merged[self.inputs.candidates.eligible[number]]

        def known() -> None:
            self._ask(self._race.record(number, task, self.outcome.scores[model, "validation", task]["score"]))

        self._evaluations.score(model, "validation", task, manifest, then=known)

    def _mask_ready(self, candidate: Candidate, task: str) -> None:
        mask = self.outcome.masks[candidate, task]
        self._evaluations.score(candidate.to_json(), "validation", task, self.outcome.merged[candidate], mask=mask)

    def _choose(self) -> None:
        """The winner of the race; of each method that needs the task at inference, its best parameters."""
        outcome, listed = self.outcome, self.inputs.candidates
        outcome.rungs = self._race.rungs
        outcome.standings = dict(zip(listed.eligible, self._race.table(), strict=True))
        outcome.chosen = listed.eligible[self._race.winner()]
        best = outcome.standings[outcome.chosen].mean
        self.display.line(f"chosen: {outcome.chosen} with mean validation score {best:.3f}")
        for candidate in listed.per_task:
            held = outcome.per_task.setdefault(candidate.method, candidate)
            if outcome.mean(candidate, "validation") > outcome.mean(held, "validation"):
                outcome.per_task[candidate.method] = candidate

    def _start_export(self) -> None:
        """The chosen merge as a full checkpoint, if one is asked for; of several seeds, the first one's."""
        export, outcome = self.config.merge.export, self.outcome
        assert outcome.chosen is not None
        if export is None or not self.inputs.registers:
            return
        merged = outcome.merged[outcome.chosen]
        job = export_job(merged, self.inputs.base.sha256, export.dtype, round(export.shard_gib * GIB))
        self._announce({job.recipe.key})

        def done(result: tuple[Manifest, bool]) -> None:
            outcome.checkpoint, made = result
            (outcome.made if made else outcome.reused).checkpoints += 1

        options = ray_options(self.config.resources.node, self.config.resources.retries)
        start = remote.export.options(name="export", **options).remote
        find_or_hand_out(
            self._elsewhere, self._merging.nodes, "export", [job.recipe.key],
            lambda claim: start(self.store, job, claim), lambda: find_published(self.store, job.recipe.key, {}),
            done, self._problem("export"),
        )  # fmt: skip

    # -- evaluation ---------------------------------------------------------------------------------------------

    def _start_base_evaluations(self) -> None:
        for task in [*self.config.held_in, *self.config.held_out]:
            for model, few_shot in base_models(self.config):
                then = partial(self._scored, task) if model == "base" else lambda: None
                self._evaluations.score(model, "test", task, None, few_shot=few_shot, then=then)

    def _start_test_of_chosen(self) -> None:
        assert self.outcome.chosen is not None
        manifest = self.outcome.merged[self.outcome.chosen]
        for task in [*self.config.held_in, *self.config.held_out]:
            self._evaluations.score("merged", "test", task, manifest)
        serving = self.config.evaluate.serving_dtype
        if serving is not None:
            for task in self.config.held_in:
                self._evaluations.score("serving", "test", task, manifest, weights_dtype=serving)
        for candidate in self.outcome.per_task.values():
            for task in self.config.held_in:  # a held-out task has no mask
                unified, mask = self.outcome.merged[candidate], self.outcome.masks[candidate, task]
                self._evaluations.score(candidate.to_json(), "test", task, unified, mask=mask)
