"""Registration and the gate within a run: every expert and the merge become versions, and champions if they deserve it.

A version that is registered becomes challenger. Unless its bytes were judged before, it and the champion, or the base
where there is none, are scored on the gate rows of the same tasks: an expert on its own, the merge on all held-in ones.
What the gate decides is recorded with the version; a full checkpoint follows its merge. Ray tasks that ask for no CPU
do the work at the registry. Not here: the rule (`pipeline.gate`), the aliases (`infra.model_aliases`), commands for
people (`pipeline.models_command`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from infra.artifacts import Manifest
from infra.model_aliases import Conclusion, Standing
from infra.model_registry import Registration
from infra.model_versions import DECISION, PROMOTED, REASON, ROLLED_BACK, RUN
from infra.registry import CHECKPOINT, MERGED, model_name
from pipeline import jobs, remote
from pipeline.display import Display
from pipeline.evaluations import Evaluations
from pipeline.gate import GateDecision
from pipeline.opponent import Opponent, is_lasting, rows_seen, unseen
from pipeline.outcome import Inputs, Outcome, Problem, Verdict
from pipeline.registration import checkpoint_model, expert_model, merge_model
from pipeline.results import rows_of
from pipeline.tasks import LEAST_GATE, TRAINED_ON
from pipeline.work import Item, Lane


@dataclass(frozen=True)
class _Subject:
    """What is compared: the expert of a task on that task, or the merge on all held-in tasks."""

    task: str
    manifest: Manifest
    tasks: tuple[str, ...]

    @property
    def model(self) -> str:
        """What its scores are called."""
        return "merged" if self.task == MERGED else "expert"

    def opponent_model(self, opponent: Opponent) -> str:
        """What the opponent's scores are called."""
        return "base" if opponent.version is None else f"{self.model}_champion"


class Promotion:
    """`lane` is for the run to settle; versions and verdicts go to the outcome."""

    def __init__(
        self, inputs: Inputs, outcome: Outcome, display: Display, problem: Problem, evaluations: Evaluations
    ) -> None:
        self._inputs, self._outcome, self._display = inputs, outcome, display
        self._problem, self._evaluations = problem, evaluations
        self.lane = Lane(inputs.config.resources.concurrent_registrations)

    def expert(self, task: str) -> None:
        """Register the expert of a task, whose test score is known, and compare it."""
        if self._inputs.registers:
            model, metrics = expert_model(self._inputs, self._outcome, task)
            subject = _Subject(task, self._outcome.experts[task], (task,))
            self._register(task, model, metrics, partial(self._entered, subject))

    def merge(self) -> None:
        """Register the chosen merge and its full checkpoint, and compare it: when all experts are registered, for the
        entry names their versions."""
        outcome = self._outcome
        if self._inputs.registers:
            assert outcome.chosen is not None
            subject = _Subject(MERGED, outcome.merged[outcome.chosen], tuple(self._inputs.config.held_in))
            self._register(MERGED, merge_model(self._inputs, outcome), {}, partial(self._entered, subject))

    # -- registering --------------------------------------------------------------------------------------------

    def _register(
        self, task: str, model: Registration, metrics: dict[str, float], entered: Callable[[Standing], None]
    ) -> None:
        inputs, store = self._inputs, self._inputs.store

        def done(result: remote.Registered) -> None:
            self._outcome.versions[task] = result.standing.version.version
            if result.made:
                self._display.line(f"registered {model.name} version {result.standing.version.version}")
            entered(result.standing)

        start = remote.register.options(name=f"register {task}", max_retries=inputs.config.resources.retries).remote
        failed = self._problem(f"registering {task!r} in MLflow")
        self.lane.add(Item(f"register {task}", lambda: start(store, model, metrics, inputs.run_id), done, failed))

    def _entered(self, subject: _Subject, standing: Standing) -> None:
        """A version is registered: compare it if that is still to be done."""
        if not standing.is_open:
            self._verdict(subject.task, settled_verdict(standing))
            return
        if standing.champion is None:
            if standing.former is None:
                self._score(subject, standing, Opponent())
            else:
                former = f"version {standing.former} was, and it or its alias was removed by hand"
                hand = self._by_hand(subject, standing.version.version)
                self._undecided(subject, standing, f"not compared: there is no champion, but {former}; {hand}")
            return
        labels = {}
        if self._inputs.config.objective == "classification":
            labels = {task: self._inputs.tasks[task].labels for task in subject.tasks}
        gate = {task: self._inputs.tasks[task].fingerprints["gate"] for task in subject.tasks}
        suite = self._inputs.config.suite
        arguments = (self._inputs.store, standing.champion, suite, subject.task, subject.tasks, labels, gate)
        self._ask(
            subject, remote.find_champion, arguments,
            partial(self._score, subject, standing), partial(self._unscorable, subject, standing),
        )  # fmt: skip

    def _ask(
        self,
        subject: _Subject,
        task: Any,
        arguments: tuple[Any, ...],
        done: Callable[[Any], None],
        failed: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Have something done at the registry."""
        retries = self._inputs.config.resources.retries
        start = task.options(name=f"gate {subject.task}", max_retries=retries).remote
        failed = failed or self._problem(f"deciding on the version of {subject.task!r}")
        self.lane.add(Item(f"gate {subject.task}", lambda: start(*arguments), done, failed))

    # -- comparing ----------------------------------------------------------------------------------------------

    def _score(self, subject: _Subject, standing: Standing, opponent: Opponent) -> None:
        """Have both scored on the gate rows of every task; judge when the last score is known."""
        theirs = subject.opponent_model(opponent)
        missing = {(model, task) for model in (subject.model, theirs) for task in subject.tasks}
        errors: list[BaseException] = []

        def known(model: str, task: str) -> None:
            missing.discard((model, task))
            if not missing and not errors:
                self._judge(subject, standing, opponent)

        def failed(error: BaseException) -> None:
            errors.append(error)
            if len(errors) == 1:  # nothing is judged, and one reason is enough
                self._unscorable(subject, standing, error)

        for task in subject.tasks:
            self._evaluations.score(
                subject.model, "gate", task, subject.manifest, then=partial(known, subject.model, task)
            )
            if (theirs, "gate", task) in self._outcome.scores:  # of the base, for the task's expert
                known(theirs, task)
                continue
            job = jobs.opponent_job(self._inputs, theirs, task, opponent)
            fails = self._problem(f"scoring the base on {task!r}") if opponent.version is None else failed
            self._evaluations.make(job, partial(known, theirs, task), fails)

    def _judge(self, subject: _Subject, standing: Standing, opponent: Opponent) -> None:
        inputs, scores = self._inputs, self._outcome.scores
        before, after = (
            {task: rows_of(scores[model, "gate", task]) for task in subject.tasks}
            for model in (subject.opponent_model(opponent), subject.model)
        )
        rows = unseen(before, after, opponent.seen, self._seen(subject.tasks))
        if sum(len(scores) for scores in rows.before.values()) < LEAST_GATE:
            reason = f"not compared with {opponent}: there are fewer than {LEAST_GATE} gate rows{rows.remark}"
            self._undecided(subject, standing, reason)
            return
        arguments = (
            inputs.store, standing.version, opponent, rows.before, rows.after, inputs.config.gate, inputs.run_id,
            rows.remark,
        )  # fmt: skip
        self._ask(subject, remote.judge, arguments, partial(self._judged, subject, opponent))

    def _seen(self, tasks: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """Gate rows of these tasks that experts of others of them were trained or validated on."""
        data = {task: self._inputs.tasks[task].splits for task in tasks}
        used = ((task, row) for task, splits in data.items() for name in TRAINED_ON for row in splits[name])
        return rows_seen(used, {task: splits["gate"] for task, splits in data.items()})

    def _judged(self, subject: _Subject, opponent: Opponent, result: tuple[GateDecision, Conclusion]) -> None:
        decision, conclusion = result
        standing = conclusion.standing
        if conclusion.how == "known":
            verdict = settled_verdict(standing)
        elif conclusion.how == "changed":
            reason = f"compared with {opponent}, but the champion changed meanwhile: the next run compares again"
            verdict = _verdict_of(standing, reason)
        else:
            verdict = _verdict_of(standing, decision.reason, decision.promoted, str(opponent), decision)
        self._verdict(subject.task, verdict, tell=True)

    def _unscorable(self, subject: _Subject, standing: Standing, error: BaseException) -> None:
        """The champion cannot be scored any more, so that a person has to decide, or could not this time."""
        assert standing.champion is not None
        champion = f"champion (version {standing.champion.version})"
        if is_lasting(remote.cause_of(error)):
            hand = self._by_hand(subject, standing.version.version)
            reason = f"not compared: {champion} cannot be scored ({remote.reason(error)}); {hand}"
        else:
            reason = f"not compared: {champion} could not be scored ({remote.reason(error)}); the next run tries again"
        self._undecided(subject, standing, reason)

    def _by_hand(self, subject: _Subject, version: int) -> str:
        """How a person decides."""
        command = f"python -m pipeline promote {self._inputs.config.suite} --version {version}"
        task = "" if subject.task == MERGED else f" --task {subject.task}"
        return f"to make version {version} champion: {command}{task}"

    def _undecided(self, subject: _Subject, standing: Standing, reason: str) -> None:
        """Nothing is decided, so the next run asks again; the version says why."""
        version, verdict = standing.version, _verdict_of(standing, reason)
        arguments = (self._inputs.store, version.name, version.version, reason)
        self._ask(subject, remote.note, arguments, lambda _: self._verdict(subject.task, verdict, tell=True))

    # -- what became of it --------------------------------------------------------------------------------------

    def _verdict(self, task: str, verdict: Verdict, tell: bool = False) -> None:
        self._outcome.gate[task] = verdict
        if tell:
            state = "is champion" if verdict.promoted else "stays challenger"
            self._display.line(f"{verdict.name} version {verdict.version} {state}: {verdict.reason}")
        if task == MERGED and self._outcome.checkpoint is not None:
            model = checkpoint_model(self._inputs, self._outcome)
            self._register(CHECKPOINT, model, {}, self._checkpoint_entered)

    def _checkpoint_entered(self, standing: Standing) -> None:
        """It becomes champion if it was made of the merge that is."""
        leader = model_name(self._inputs.config.suite, MERGED)
        own = standing.version

        def followed(champion: int | None) -> None:
            leads = champion == own.version
            reason = f"made of {'the' if leads else 'no'} champion of {leader}"
            promoted = leads and not standing.leads
            before = standing.champion.version if standing.champion else None
            verdict = Verdict(own.name, own.version, promoted, before if champion is None else champion, reason)
            self._verdict(CHECKPOINT, verdict, tell=promoted)

        retries = self._inputs.config.resources.retries
        start = remote.follow.options(name="gate checkpoint", max_retries=retries).remote
        failed = self._problem("deciding on the full checkpoint")
        self.lane.add(
            Item("gate checkpoint", lambda: start(self._inputs.store, leader, own.name), followed, failed)
        )  # fmt: skip


def _verdict_of(
    standing: Standing,
    reason: str,
    promoted: bool = False,
    opponent: str | None = None,
    decision: GateDecision | None = None,
) -> Verdict:
    champion = standing.champion.version if standing.champion else None
    return Verdict(standing.version.name, standing.version.version, promoted, champion, reason, opponent, decision)


def settled_verdict(standing: Standing) -> Verdict:
    """The verdict on a version that no gate has to look at (`standing` is not open)."""
    judged, champion = standing.judged, standing.champion
    if standing.replaced is not None:
        reason = f"champion in place of version {standing.replaced}: {standing.version.tags[REASON]}"
    elif standing.leads:
        reason = "champion already"
    elif standing.is_same:
        assert champion is not None
        reason = f"not compared: the same bytes as the champion, version {champion.version}"
    elif judged is not None and ROLLED_BACK in judged.tags:
        reason = f"not compared again: version {judged.version} was rolled back ({judged.tags[ROLLED_BACK]})"
    else:
        assert judged is not None
        since = ", and replaced since" if judged.tags[DECISION] == PROMOTED else ""
        reason = f"not compared again: {judged.tags.get(REASON)} (run {judged.tags.get(RUN)}{since})"
    return _verdict_of(standing, reason)
