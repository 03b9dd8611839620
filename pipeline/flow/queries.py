"""What a run asks of the model registry, each as one call of a worker; and what a plan expects it to answer.

Every query is harmless to repeat.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from infra.registry import aliases, models, runs
from infra.registry.aliases import Conclusion, Decision, Standing
from infra.registry.models import DIGEST_TAG, KEY_TAG, Registration, identity
from infra.registry.versions import CHAMPION, Model, Version, barred, former_champion
from infra.store.s3 import Store
from pipeline.config.model import GateConfig
from pipeline.gate import opponent
from pipeline.gate.opponent import Opponent
from pipeline.gate.rule import GateDecision, TaskScores, decide


@dataclass(frozen=True)
class Registry:
    """What a rehearsal knows: a suite's registered models by name, and the store."""

    models: Mapping[str, Model]
    store: Store


@dataclass(frozen=True)
class Registered:
    """Where a registered version stands, and whether this call made it."""

    standing: Standing
    made: bool


@dataclass(frozen=True)
class Register:
    """Register the model as challenger, or find its version; a new version's metrics and description go to its run.

    The run that trained a reused expert may be another suite's, or deleted since: then it gets one below `suite_run`.
    """

    model: Registration
    metrics: Mapping[str, float]
    suite_run: str

    @property
    def name(self) -> str:
        """For people."""
        return f"register {self.model.task}"

    def __call__(self, store: Store) -> Registered:
        model = self.model
        version, made = models.reuse(model), False
        if version is None:
            model = replace(model, run_id=runs.run_of_suite(model.run_id, self.suite_run, model.task))
            if self.metrics:  # before there is a version: a call that is repeated must not miss them
                runs.log_history(model.run_id, [{"step": 0, **self.metrics}])
            version, made = models.register(model)
            if made and self.metrics:
                runs.describe_run(model.run_id, models.numbered(model.description, version))
        return Registered(aliases.enter(store, model.name, version), made)

    def expected(self, known: Registry) -> Registered:
        """Where the version stands once it is registered: a version with these bytes, asked in this way, is reused."""
        model, mine = known.models.get(self.model.name), self.model
        versions = model.versions if model else ()
        own = next((v for v in versions if (v.key, v.digest) == (mine.key, mine.digest)), None)
        there = own is not None and any(v.tags.items() >= identity(mine).items() for v in versions)
        own = own or Version(mine.name, 0, {KEY_TAG: mine.key, DIGEST_TAG: mine.digest})
        number = model.aliases.get(CHAMPION) if model else None
        champion = next((version for version in versions if version.version == number), None)
        same = [version for version in versions if version.digest == own.digest]
        judged = next((version for version in same if version.is_judged), None)
        if model is not None and barred(own.digest) in model.tags:
            judged = own
        former = former_champion(model.tags, versions, own.version) if model is not None and champion is None else None
        return Registered(Standing(own, champion, judged, former=former), not there)


@dataclass(frozen=True)
class FindChampion:
    """What scoring a champion takes, and which of the gate rows it has seen."""

    champion: Version
    suite: str
    task: str
    tasks: tuple[str, ...]
    labels: Mapping[str, Iterable[str]]
    gate: Mapping[str, str]

    @property
    def name(self) -> str:
        """For people."""
        return f"gate {self.task}"

    def __call__(self, store: Store) -> Opponent:
        return self._find(store, self.gate)

    def expected(self, known: Registry) -> Opponent:
        """The champion as it is; rows that it has seen change no plan."""
        return self._find(known.store, {})

    def _find(self, store: Store, gate: Mapping[str, str]) -> Opponent:
        return opponent.find_champion(store, self.champion, self.suite, self.task, self.tasks, self.labels, gate)


@dataclass(frozen=True)
class Judge:
    """Compare a version's gate scores (`after`) with its opponent's and record what follows. `remark` ends the
    reason."""

    task: str
    version: Version
    against: Opponent
    before: Mapping[str, TaskScores]
    after: Mapping[str, TaskScores]
    gate: GateConfig
    run_id: str
    remark: str

    @property
    def name(self) -> str:
        """For people."""
        return f"gate {self.task}"

    def __call__(self, store: Store) -> tuple[GateDecision, Conclusion] | None:
        found = decide(self.before, self.after, self.gate, str(self.against))
        found = replace(found, reason=found.reason + self.remark)
        decision = Decision(found.promoted, found.reason, str(self.against), self.run_id)
        version = self.version
        return found, aliases.conclude(store, version.name, version.version, self.against.version, decision)

    def expected(self, known: Any) -> None:
        """Nothing is decided."""


@dataclass(frozen=True)
class Note:
    """Say with a version why no gate could decide."""

    task: str
    model: str
    version: int
    reason: str

    @property
    def name(self) -> str:
        """For people."""
        return f"gate {self.task}"

    def __call__(self, store: Store) -> None:
        aliases.note(store, self.model, self.version, self.reason)

    def expected(self, known: Any) -> None:
        """Nothing is said."""


@dataclass(frozen=True)
class Follow:
    """Let one model's champion be what was made of the other's."""

    leader: str
    follower: str

    @property
    def name(self) -> str:
        """For people."""
        return "gate checkpoint"

    def __call__(self, store: Store) -> int | None:
        return aliases.follow(store, self.leader, self.follower, strict=False)

    def expected(self, known: Any) -> None:
        """Nothing moves."""
