"""Which scores the gate of a run would ask for, told from the registered versions as they are now.

The counterpart of `pipeline.promotion`, which asks for them. Nothing is registered here, and nothing decided.
"""

from collections.abc import Mapping, Sequence

from infra.artifacts import Manifest
from infra.model_aliases import Standing
from infra.model_registry import DIGEST_TAG, KEY_TAG, Registration, identity
from infra.model_versions import CHAMPION, Model, Version, barred, former_champion
from infra.registry import CHECKPOINT, MERGED
from pipeline.jobs import evaluation_job, opponent_job
from pipeline.opponent import Incomparable, Opponent, find_champion
from pipeline.outcome import Inputs
from pipeline.registration import plain_checkpoint, plain_expert, plain_merge
from workers.evaluator import EvaluationJob

Experts = Mapping[str, Manifest]
"""The held-in tasks' experts."""


def is_registered(inputs: Inputs, model: Model | None, task: str, artifact: Manifest, experts: Experts) -> bool:
    """Whether the registered model has the version that a run would register: of this artifact, asked in this way."""
    if model is None or _version_of(model, artifact) is None:
        return False
    plain: Registration
    if task == MERGED:
        plain = plain_merge(inputs, artifact, experts)
    elif task == CHECKPOINT:
        plain = plain_checkpoint(inputs, artifact, experts)
    else:
        plain = plain_expert(inputs, task, artifact)
    return any(version.tags.items() >= identity(plain).items() for version in model.versions)


def gate_jobs(
    inputs: Inputs, model: Model | None, task: str, subject: Manifest, experts: Experts
) -> list[EvaluationJob]:
    """The scores on gate rows that decide on a version of `subject`, the expert of `task` or the merge: its own and
    then its opponent's; none if nothing has to be decided, or its champion cannot be scored. Raises RegistryError."""
    champion = _champion(model)
    standing = _standing(model, subject, champion)
    if not standing.is_open or standing.former is not None:
        return []
    tasks = list(inputs.config.held_in) if task == MERGED else [task]
    name = "merged" if task == MERGED else "expert"
    opponent = _opponent(inputs, champion, task, tasks)
    if opponent is None:
        return []
    theirs = "base" if opponent.version is None else f"{name}_champion"
    return [
        *(evaluation_job(inputs, name, "gate", each, subject, experts[each]) for each in tasks),
        *(opponent_job(inputs, theirs, each, opponent) for each in tasks),
    ]


def _opponent(inputs: Inputs, champion: Version | None, task: str, tasks: Sequence[str]) -> Opponent | None:
    if champion is None:
        return Opponent()
    labels = {}
    if inputs.config.objective == "classification":
        labels = {each: inputs.tasks[each].labels for each in tasks}
    try:
        return find_champion(inputs.store, champion, inputs.config.suite, task, tasks, labels)
    except Incomparable:
        return None


def _champion(model: Model | None) -> Version | None:
    number = model.aliases.get(CHAMPION) if model else None
    return next((version for version in model.versions if version.version == number), None) if model else None


def _version_of(model: Model | None, artifact: Manifest) -> Version | None:
    versions = model.versions if model else ()
    return next((v for v in versions if (v.key, v.digest) == (artifact.key, artifact.digest)), None)


def _standing(model: Model | None, subject: Manifest, champion: Version | None) -> Standing:
    """Where the version stands once it is registered."""
    tags = {KEY_TAG: subject.key, DIGEST_TAG: subject.digest}
    own = _version_of(model, subject) or Version(model.name if model else "", 0, tags)
    versions = model.versions if model else ()
    same = [version for version in versions if version.digest == own.digest]
    judged = next((version for version in same if version.is_judged), None)
    if model is not None and barred(own.digest) in model.tags:
        judged = own
    former = former_champion(model.tags, versions, own.version) if model is not None and champion is None else None
    return Standing(own, champion, judged, former=former)
