"""Registration and the gate within a run: every expert and the merge become versions, and champions if they deserve it.

A version that is registered becomes challenger. Unless its bytes were judged before, it and the champion, or the base
where there is none, are scored on the gate rows of the same tasks: an expert on its own, the merge on all held-in ones.
What the gate decides is recorded with the version; a full checkpoint follows its merge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from infra.artifacts.manifests import Manifest
from infra.engine.once import Failed, every
from infra.engine.step import Query
from infra.registry.aliases import Conclusion, Standing
from infra.registry.models import Registration
from infra.registry.runs import CHECKPOINT, MERGED, model_name
from infra.registry.versions import DECISION, PROMOTED, REASON, ROLLED_BACK, RUN
from pipeline.data.tasks import LEAST_GATE, TRAINED_ON
from pipeline.flow.context import Flow, reason
from pipeline.flow.queries import FindChampion, Follow, Judge, Note, Register
from pipeline.flow.registration import (
    checkpoint_model,
    expert_model,
    merge_model,
    plain_checkpoint,
    plain_expert,
    plain_merge,
)
from pipeline.flow.scoring import score, score_needed, score_of
from pipeline.flow.steps import REGISTRATIONS, opponent_job
from pipeline.gate.opponent import Opponent, is_lasting, rows_seen, unseen
from pipeline.gate.rule import GateDecision
from pipeline.records.outcome import Verdict
from pipeline.records.refined import Merge
from pipeline.records.score import ScoreKey

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
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


async def promote_expert(flow: Flow, task: str) -> None:
    """Register the expert of a task, whose test score is known, and compare it. Raises Failed."""
    inputs, outcome = flow.inputs, flow.outcome
    if not inputs.registers:
        return
    manifest, metrics = outcome.experts[task], dict[str, float]()
    model: Registration = plain_expert(inputs, task, manifest)
    if not flow.rehearsed:
        model, metrics = expert_model(inputs, outcome, task)
    standing = await _register(flow, task, model, metrics)
    await _compare(flow, Subject(task, manifest, (task,)), standing)


async def promote_merge(flow: Flow, chosen: Merge) -> None:
    """Register the chosen merge and its full checkpoint, and compare it: when all experts are registered, for the entry
    names their versions. Raises Failed."""
    inputs, outcome = flow.inputs, flow.outcome
    if not inputs.registers:
        return
    manifest, held_in = outcome.merged[chosen], tuple(inputs.config.held_in)
    plain = plain_merge(inputs, manifest, outcome.experts)
    model = plain if flow.rehearsed else merge_model(inputs, outcome)
    standing = await _register(flow, MERGED, model, {})
    await _compare(flow, Subject(MERGED, manifest, held_in), standing)
    if outcome.checkpoint is not None:
        await _promote_checkpoint(flow, outcome.checkpoint)


async def _promote_checkpoint(flow: Flow, manifest: Manifest) -> None:
    """It becomes champion if it was made of the merge that is."""
    inputs, outcome = flow.inputs, flow.outcome
    plain = plain_checkpoint(inputs, manifest, outcome.experts)
    model = plain if flow.rehearsed else checkpoint_model(inputs, outcome)
    standing = await _register(flow, CHECKPOINT, model, {})
    leader, own = model_name(inputs.config.suite, MERGED), standing.version
    champion = await _ask(flow, Follow(leader, own.name), "deciding on the full checkpoint")
    leads = champion == own.version
    why = f"made of {'the' if leads else 'no'} champion of {leader}"
    promoted = leads and not standing.leads
    before = standing.champion.version if standing.champion else None
    verdict = Verdict(own.name, own.version, promoted, before if champion is None else champion, why)
    _conclude(flow, CHECKPOINT, verdict, tell=promoted)


# -- registering ------------------------------------------------------------------------------------------------


async def _register(flow: Flow, task: str, model: Registration, metrics: Mapping[str, float]) -> Standing:
    found = await _ask(flow, Register(model, metrics, flow.inputs.run_id), f"registering {task!r} in MLflow")
    flow.engine.tally.add(REGISTRATIONS, int(found.made), int(not found.made))
    flow.outcome.versions[task] = found.standing.version.version
    if found.made:
        flow.display.line(f"registered {model.name} version {found.standing.version.version}")
    return found.standing


async def _ask(flow: Flow, query: Query[T], what: str) -> T:
    try:
        return await flow.engine.ask(query)
    except Exception as error:
        raise flow.failed(what, error) from error


def _deciding(subject: Subject) -> str:
    return f"deciding on the version of {subject.task!r}"


# -- comparing --------------------------------------------------------------------------------------------------


async def _compare(flow: Flow, subject: Subject, standing: Standing) -> None:
    """Compare a registered version with the champion or the base, if that is still to be done. Raises Failed."""
    if not standing.is_open:
        _conclude(flow, subject.task, settled_verdict(standing))
        return
    if standing.champion is None and standing.former is not None:
        former = f"version {standing.former} was, and it or its alias was removed by hand"
        hand = _by_hand(flow, subject, standing.version.version)
        await _undecided(flow, subject, standing, f"not compared: there is no champion, but {former}; {hand}")
        return
    try:
        opponent = await _opponent(flow, subject, standing)
        await _score(flow, subject, opponent)
    except Failed:
        raise
    except Exception as error:
        await _undecided(flow, subject, standing, unscorable(flow, subject, standing, error))
        return
    await _judge(flow, subject, standing, opponent)


async def _opponent(flow: Flow, subject: Subject, standing: Standing) -> Opponent:
    """Whom to compare with. Raises whatever keeps the champion from being scored."""
    if standing.champion is None:
        return Opponent()
    inputs = flow.inputs
    labels = {}
    if inputs.config.objective == "classification":
        labels = {task: inputs.tasks[task].labels for task in subject.tasks}
    gate = {task: inputs.tasks[task].fingerprints["gate"] for task in subject.tasks}
    query = FindChampion(standing.champion, inputs.config.suite, subject.task, subject.tasks, labels, gate)
    return await flow.engine.ask(query)


async def _score(flow: Flow, subject: Subject, opponent: Opponent) -> None:
    """Have both scored on the gate rows of every task. Raises Failed, or what keeps the champion from being scored."""
    theirs = subject.opponent_model(opponent)

    async def opponents() -> None:
        if opponent.version is None:
            await every(*(_base(flow, task) for task in subject.tasks))
        else:  # nothing is judged if one fails
            await every(*(score_of(flow, opponent_job(flow.inputs, theirs, t, opponent)) for t in subject.tasks))

    own = (score(flow, subject.model, "gate", task, subject.manifest) for task in subject.tasks)
    await every(every(*own), opponents())


async def _base(flow: Flow, task: str) -> None:
    """Score the base on a task's gate rows, for its expert and for the merge. Raises Failed."""

    job = opponent_job(flow.inputs, "base", task, Opponent())
    await flow.once(("base", "gate", task), lambda: score_needed(flow, job, f"scoring the base on {task!r}"))


async def _judge(flow: Flow, subject: Subject, standing: Standing, opponent: Opponent) -> None:
    inputs, scores, theirs = flow.inputs, flow.outcome.scores, subject.opponent_model(opponent)
    if not all(ScoreKey(model, "gate", t) in scores for model in (theirs, subject.model) for t in subject.tasks):
        return  # only rehearsed
    before, after = (
        {task: scores[ScoreKey(model, "gate", task)].resampled for task in subject.tasks}
        for model in (theirs, subject.model)
    )
    rows = unseen(before, after, opponent.seen, rows_learned(flow, subject.tasks))
    if sum(len(scores) for scores in rows.before.values()) < LEAST_GATE:
        why = f"not compared with {opponent}: there are fewer than {LEAST_GATE} gate rows{rows.remark}"
        await _undecided(flow, subject, standing, why)
        return
    query = Judge(
        subject.task, standing.version, opponent, rows.before, rows.after, inputs.config.gate, inputs.run_id,
        rows.remark,
    )  # fmt: skip
    found = await _ask(flow, query, _deciding(subject))
    if found is not None:
        _conclude(flow, subject.task, _judged(opponent, *found), tell=True)


def rows_learned(flow: Flow, tasks: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Gate rows of these tasks that experts of others of them were trained or validated on."""
    data = {task: flow.inputs.tasks[task].splits for task in tasks}
    used = ((task, row) for task, splits in data.items() for name in TRAINED_ON for row in splits[name])
    return rows_seen(used, {task: splits["gate"] for task, splits in data.items()})


def _judged(opponent: Opponent, decision: GateDecision, conclusion: Conclusion) -> Verdict:
    standing = conclusion.standing
    if conclusion.how == "known":
        return settled_verdict(standing)
    if conclusion.how == "changed":
        why = f"compared with {opponent}, but the champion changed meanwhile: the next run compares again"
        return _verdict_of(standing, why)
    return _verdict_of(standing, decision.reason, decision.promoted, str(opponent), decision)


def unscorable(flow: Flow, subject: Subject, standing: Standing, error: Exception) -> str:
    """The champion cannot be scored any more, so that a person has to decide, or could not this time."""
    assert standing.champion is not None
    champion = f"champion (version {standing.champion.version})"
    if is_lasting(error):
        hand = _by_hand(flow, subject, standing.version.version)
        return f"not compared: {champion} cannot be scored ({reason(error)}); {hand}"
    return f"not compared: {champion} could not be scored ({reason(error)}); the next run tries again"


def _by_hand(flow: Flow, subject: Subject, version: int) -> str:
    """How a person decides."""
    command = f"python -m pipeline promote {flow.inputs.config.suite} --version {version}"
    task = "" if subject.task == MERGED else f" --task {subject.task}"
    return f"to make version {version} champion: {command}{task}"


async def _undecided(flow: Flow, subject: Subject, standing: Standing, why: str) -> None:
    """Nothing is decided, so the next run asks again; the version says why."""
    version = standing.version
    await _ask(flow, Note(subject.task, version.name, version.version, why), _deciding(subject))
    _conclude(flow, subject.task, _verdict_of(standing, why), tell=True)


# -- what became of it ------------------------------------------------------------------------------------------


def _conclude(flow: Flow, task: str, verdict: Verdict, tell: bool = False) -> None:
    flow.outcome.gate[task] = verdict
    if tell:
        state = "is champion" if verdict.promoted else "stays challenger"
        flow.display.line(f"{verdict.name} version {verdict.version} {state}: {verdict.reason}")


def _verdict_of(
    standing: Standing,
    why: str,
    promoted: bool = False,
    opponent: str | None = None,
    decision: GateDecision | None = None,
) -> Verdict:
    champion = standing.champion.version if standing.champion else None
    return Verdict(standing.version.name, standing.version.version, promoted, champion, why, opponent, decision)


def settled_verdict(standing: Standing) -> Verdict:
    """The verdict on a version that no gate has to look at (`standing` is not open)."""
    judged, champion = standing.judged, standing.champion
    if standing.replaced is not None:
        why = f"champion in place of version {standing.replaced}: {standing.version.tags[REASON]}"
    elif standing.leads:
        why = "champion already"
    elif standing.is_same:
        assert champion is not None
        why = f"not compared: the same bytes as the champion, version {champion.version}"
    elif judged is not None and ROLLED_BACK in judged.tags:
        why = f"not compared again: version {judged.version} was rolled back ({judged.tags[ROLLED_BACK]})"
    else:
        assert judged is not None
        since = ", and replaced since" if judged.tags.get(DECISION) == PROMOTED else ""
        why = f"not compared again: {judged.tags.get(REASON)} (run {judged.tags.get(RUN)}{since})"
    return _verdict_of(standing, why)
