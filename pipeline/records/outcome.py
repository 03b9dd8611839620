"""What a run starts from and what it ends with: plain records between preflight, run, registration and results."""

import copy
import math
from dataclasses import dataclass, field

from infra.artifacts.manifests import Manifest
from infra.store.s3 import Store
from merge.methods.specs import Candidate
from merge.tree.reduce import Fused
from pipeline.config.candidates import Candidates
from pipeline.config.model import PipelineConfig
from pipeline.config.search import Rung, Standing
from pipeline.data.tasks import TaskData
from pipeline.gate.rule import GateDecision
from pipeline.records.refined import Merge
from pipeline.records.score import Score, ScoreKey
from workers.base.prepare import PreparedBase


@dataclass(frozen=True)
class Inputs:
    """Everything a run needs, checked before it starts (`pipeline/plan/preflight.py`)."""

    config: PipelineConfig
    store: Store
    base: PreparedBase
    base_weights: str
    """Object name of the base's weights."""
    tasks: dict[str, TaskData]
    max_new_tokens: dict[str, int]
    candidates: Candidates
    run_id: str
    """MLflow's id of the parent run, also the name of the run's folder in the store."""
    fused: Fused = field(default_factory=dict)
    """Rows of the parts of fused weights, where a candidate asks for them."""
    registers: bool = True
    """Whether experts and merge become registered models: not those of further seeds."""


@dataclass
class Counters:
    """How many artifacts of each kind a run made or found."""

    experts: int = 0
    merge_nodes: int = 0
    evaluations: int = 0
    importances: int = 0
    """Fisher and Gram artifacts of experts."""
    task_masks: int = 0
    checkpoints: int = 0
    refined: int = 0
    """Merges that were trained on."""
    yardsticks: int = 0
    """Multitask adapters."""
    routers: int = 0
    teachers: int = 0
    """What teachers say of a task's rows."""


@dataclass(frozen=True)
class Verdict:
    """What became of a registered version in this run, and why."""

    name: str
    """The registered model's."""
    version: int
    promoted: bool
    """Whether it became champion in this run."""
    champion: int | None
    """The version that is champion now."""
    reason: str
    opponent: str | None = None
    """What it was compared with in this run, if it was."""
    decision: GateDecision | None = None
    """Of this run's gate."""


@dataclass
class Outcome:
    """What a run produced; `pipeline/report/results.py` turns it into results.json."""

    experts: dict[str, Manifest] = field(default_factory=dict)
    merged: dict[Merge, Manifest] = field(default_factory=dict)
    scores: dict[ScoreKey, Score] = field(default_factory=dict)
    evaluations: set[str] = field(default_factory=set)
    """Keys of the scores."""
    masks: dict[tuple[Candidate, str], Manifest] = field(default_factory=dict)
    """Task masks of candidates that need the task at inference."""
    rungs: tuple[Rung, ...] = ()
    standings: dict[Merge, Standing] = field(default_factory=dict)
    """Of the candidates that may be chosen; refined ones last."""
    chosen: Merge | None = None
    per_task: dict[str, Candidate] = field(default_factory=dict)
    """Of each method that needs the task at inference the candidate with the best mean validation score."""
    checkpoint: Manifest | None = None
    """The chosen merge as a full checkpoint."""
    multitask: Manifest | None = None
    """One adapter for all tasks, where a configuration asks for it."""
    versions: dict[str, int] = field(default_factory=dict)
    """Registered version of each expert and, as `merged`, of the merge."""
    gate: dict[str, Verdict] = field(default_factory=dict)
    """What became of those versions."""
    made: Counters = field(default_factory=Counters)
    reused: Counters = field(default_factory=Counters)
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the epoch in which each expert that was made held its slot."""
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    slots: int = 1

    def copy(self) -> "Outcome":
        """What is added to either one is not in the other."""
        plain = {name: copy.copy(value) for name, value in vars(self).items()}
        return Outcome(**plain)

    def mean(self, candidate: Merge, split: str) -> float:
        """Mean score of a candidate over all held-in tasks, each with an expert."""
        return math.fsum(self.scores[ScoreKey(candidate.to_json(), split, t)].score for t in self.experts) / len(
            self.experts
        )


def span(spans: list[tuple[float, float]]) -> float:
    return max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0.0


def utilisation(outcome: Outcome) -> float | None:
    """Share of the slot-seconds between first start and last end that experts filled; None if none was made."""
    total = span(outcome.spans)
    return sum(end - start for start, end in outcome.spans) / (outcome.slots * total) if total else None
