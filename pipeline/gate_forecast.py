"""Which scores the gate of a run would ask for, told from the registered versions as they are now.

The counterpart of `pipeline.promotion`, which asks for them. Nothing is registered here, and nothing decided.
"""

from collections.abc import Mapping, Sequence

from infra.artifacts import Manifest
from infra.errors import StoreError
from infra.model_aliases import Standing
from infra.model_registry import DIGEST_TAG, KEY_TAG
from infra.model_versions import CHAMPION, Model, Version
from infra.registry import MERGED
from pipeline.jobs import evaluation_job, opponent_job
from pipeline.opponent import Opponent, find_champion
from pipeline.outcome import Inputs
from workers.evaluator import EvaluationJob


def is_registered(model: Model | None, artifact: Manifest) -> bool:
    """Whether the registered model has a version of this artifact."""
    return _version_of(model, artifact) is not None


def gate_jobs(
    inputs: Inputs, model: Model | None, task: str, subject: Manifest, experts: Mapping[str, Manifest]
) -> list[EvaluationJob]:
    """The scores on gate rows that decide on a version of `subject`, the expert of `task` or the merge: its own and
    then its opponent's; none if nothing has to be decided, or its champion cannot be scored. Raises RegistryError."""
    champion = _champion(model)
    if not _standing(model, subject, champion).is_open:
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
        return find_champion(inputs.store, champion, task, labels)
    except StoreError:
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
    same = [version for version in (model.versions if model else ()) if version.digest == own.digest]
    return Standing(own, champion, next((version for version in same if version.is_judged), None))
