"""results.json: what a finished run reports, as one typed model. Programs that read the file get its JSON Schema from
`python -m pipeline results-schema`.

The names are an interface: add, never rename. A field of type `Maybe` is left out of the file where it has nothing to
say; any other field that may be empty stands there as null. What a file did not say is not said when it is written
again, and what a later version added is kept as it is, so a file that is read and written stays the same JSON.

Scores lie in 0-1, Matthews' correlation in -1 to 1. Means are unweighted means over tasks.
"""

import contextlib
import json
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from pipeline.records.gate_results import Gate
from pipeline.records.merge_results import CandidateRow, Chosen, Export, PerTaskRow, RoundsRow, Search
from pipeline.records.part import Interval, Maybe, Part
from pipeline.records.row_results import TaskRows
from pipeline.records.seed_results import Seeds

MODELS = ("base", "base_few_shot", "expert", "merged", "merged_serving", "multitask", "routed", "merged_few_shot")
"""What is scored on test rows, by its names in this file."""


class Base(Part):
    """The base model that every expert starts from."""

    name: str
    """Name of the base, for people."""
    sha256: str
    """Identity of the base: SHA-256 over its files."""


class HeldInTask(Part):
    """A task with an expert: scores on its test rows."""

    metric: str
    """Name of the metric that the scores are of."""
    base: float
    """Score of the base."""
    expert: float
    """Score of the task's expert."""
    merged: float
    """Score of the chosen merge."""
    intervals: dict[str, Interval]
    """Intervals of the scores, by model."""
    n_test: int
    """Test rows."""
    format_free: dict[str, float]
    """Scores by model that ask for no answer format: option log-likelihood for choices, Rouge-L for other text,
    accuracy for labels."""
    expert_run_id: str | None
    """MLflow's id of the run that trained the expert."""
    best_step: int | None
    """Optimizer step whose values were kept."""
    expert_key: str
    """Key of the expert: SHA-256 of its recipe."""
    expert_digest: str
    """SHA-256 of the expert's bytes."""
    expert_uri: str
    """Where the expert's adapter file is."""
    base_few_shot: Maybe[float] = None
    """Score of the base with examples in the prompt; left out where `evaluate.few_shot` is 0."""
    merged_serving: Maybe[float] = None
    """Score of the chosen merge with its weights rounded to `evaluate.serving_dtype`; left out without that."""
    multitask: Maybe[float] = None
    """Score of the multitask adapter; left out without `yardsticks.multitask`."""
    routed: Maybe[float] = None
    """Score of the experts behind a router; left out without `yardsticks.routed`."""
    merged_few_shot: Maybe[float] = None
    """Score of the chosen merge with examples in the prompt; left out without `yardsticks.few_shot_merge`."""


class HeldOutTask(Part):
    """A task without an expert: scores on its test rows."""

    metric: str
    """Name of the metric that the scores are of."""
    base: float
    """Score of the base."""
    merged: float
    """Score of the chosen merge."""
    intervals: dict[str, Interval]
    """Intervals of the scores, by model."""
    n_test: int
    """Test rows."""
    format_free: dict[str, float]
    """Scores by model that ask for no answer format."""
    base_few_shot: Maybe[float] = None
    """Score of the base with examples in the prompt; left out where `evaluate.few_shot` is 0."""
    multitask: Maybe[float] = None
    """Score of the multitask adapter; left out without `yardsticks.multitask`."""
    routed: Maybe[float] = None
    """Score of the experts behind a router; left out without `yardsticks.routed`."""
    merged_few_shot: Maybe[float] = None
    """Score of the chosen merge with examples in the prompt; left out without `yardsticks.few_shot_merge`."""


class Multitask(Part):
    """The yardstick of `yardsticks.multitask`: one adapter trained on rows of all held-in tasks, from the base."""

    key: str
    """Key of the adapter: SHA-256 of its recipe."""
    digest: str
    """SHA-256 of its bytes."""
    uri: str
    """Where its file is."""
    steps: int
    """Optimizer steps."""
    rows: int
    """Training rows that they saw, rows that came again counted again."""
    share: float
    """Those rows as a share of the training rows that all experts together saw."""


class HeldInSummary(Part):
    """Means over the held-in tasks."""

    base: float
    """Mean score of the base."""
    expert: float
    """Mean score of the experts, each on its own task."""
    merged: float
    """Mean score of the chosen merge."""
    retention: float | None
    """Share of the experts' gain that the merge keeps: (merged - base) / (expert - base); null where the experts gain
    0.01 or less."""
    base_interval: Interval
    """Interval of `base`."""
    expert_interval: Interval
    """Interval of `expert`."""
    merged_interval: Interval
    """Interval of `merged`."""
    format_free: dict[str, float]
    """Mean format-free scores, by model."""
    experts_above_base: int
    """Experts that score higher than the base on their task."""
    base_few_shot: Maybe[float] = None
    """Mean score of the few-shot base; left out where it is not scored on every task."""
    base_few_shot_interval: Maybe[Interval] = None
    """Interval of `base_few_shot`."""
    merged_serving: Maybe[float] = None
    """Mean score of the rounded merge; left out where it is not scored."""
    multitask: Maybe[float] = None
    """Mean score of the multitask adapter; left out without `yardsticks.multitask`."""
    multitask_interval: Maybe[Interval] = None
    """Interval of `multitask`."""
    of_multitask: Maybe[float] = None
    """Share of the multitask adapter's gain that the merge has: (merged - base) / (multitask - base); left out where
    that gains 0.01 or less."""
    routed: Maybe[float] = None
    """Mean score of the experts behind a router; left out without `yardsticks.routed`."""
    merged_few_shot: Maybe[float] = None
    """Mean score of the chosen merge with examples in the prompt; left out without `yardsticks.few_shot_merge`."""
    routed_interval: Maybe[Interval] = None
    """Interval of `routed`."""


class HeldOutSummary(Part):
    """Means over the held-out tasks; null without any."""

    base: float | None
    """Mean score of the base."""
    merged: float | None
    """Mean score of the chosen merge."""
    base_interval: Maybe[Interval] = None
    """Interval of `base`."""
    merged_interval: Maybe[Interval] = None
    """Interval of `merged`."""
    format_free: Maybe[dict[str, float]] = None
    """Mean format-free scores, by model."""
    base_few_shot: Maybe[float] = None
    """Mean score of the few-shot base; left out where it is not scored on every task."""
    base_few_shot_interval: Maybe[Interval] = None
    """Interval of `base_few_shot`."""
    multitask: Maybe[float] = None
    """Mean score of the multitask adapter; left out without `yardsticks.multitask`."""
    routed: Maybe[float] = None
    """Mean score of the experts behind a router; left out without `yardsticks.routed`."""
    merged_few_shot: Maybe[float] = None
    """Mean score of the chosen merge with examples in the prompt; left out without `yardsticks.few_shot_merge`."""


class Summary(Part):
    """Means over tasks."""

    held_in: HeldInSummary
    """Of the tasks with an expert."""
    held_out: HeldOutSummary
    """Of the tasks without."""


class Counts(Part):
    """Artifacts of each kind."""

    experts: int
    """Trained experts."""
    merge_nodes: int
    """Nodes of merge trees."""
    evaluations: int
    """Scores of a model on one split of one task."""
    importances: int
    """Fisher diagonals and Gram matrices of experts."""
    task_masks: int
    """Task masks of merges that need the task at inference."""
    checkpoints: int
    """Full checkpoints."""
    refined: Maybe[int] = None
    """Merges that were trained on; left out without `refine`."""
    yardsticks: Maybe[int] = None
    """Multitask adapters; left out without `yardsticks`."""
    routers: Maybe[int] = None
    """Routers; left out without `yardsticks.routed`."""
    teachers: Maybe[int] = None
    """What experts, or the base, say of a task's rows; left out where refining asks nobody."""


class Seconds(Part):
    """Where the time went. Kinds of work overlap, so they do not add up to the total."""

    experts: float
    """From the first expert's start to the last one's end."""
    merge: float
    """Of all merge nodes and task masks together."""
    evaluate: float
    """Of all evaluations together."""
    refine: Maybe[float] = None
    """Of all trainings of merges together; left out where there was none."""
    yardsticks: Maybe[float] = None
    """Of the multitask adapter's training; left out where there was none."""
    total: float
    """From the start of the run to its end, report left out."""


class Results(Part):
    """Everything that a finished run reports."""

    run_id: str
    """MLflow's id of the run, and the name of its folder in the store."""
    suite: str
    """Name of the set of tasks."""
    objective: Literal["language_modelling", "classification"]
    """What was trained: text, or labels with a head."""
    expert: Literal["sparse", "lora", "full"]
    """Kind of the experts."""
    base: Base
    """The base model."""
    held_in: dict[str, HeldInTask]
    """Tasks with an expert."""
    held_out: dict[str, HeldOutTask]
    """Tasks that are only scored."""
    summary: Summary
    """Means over the tasks of each group."""
    candidates: tuple[CandidateRow, ...]
    """All merges that could be chosen."""
    search: Search
    """How one of them was chosen."""
    per_task: tuple[PerTaskRow, ...]
    """Merges that have to know the task at inference."""
    chosen: Chosen
    """The merge that was chosen on validation rows."""
    learned_elsewhere: dict[str, int] = Field(default_factory=dict)
    """Test rows of a task that another task's expert was trained on, where there are any; not in files of earlier
    versions."""
    rows: dict[str, TaskRows] = Field(default_factory=dict)
    """What became of each task's rows; not in files of earlier versions."""
    rounds: Maybe[RoundsRow] = None
    """How the experts were trained in several rounds; left out for one."""
    multitask: Maybe[Multitask] = None
    """The multitask adapter; left out without `yardsticks.multitask`."""
    export: Export | None
    """The chosen merge as a full checkpoint; null: not asked for."""
    gate: Gate
    """What became of the registered versions."""
    made: Counts
    """Artifacts that this run made."""
    reused: Counts
    """Artifacts that this run found."""
    seconds: Seconds
    """Where the time went."""
    slots: int
    """Experts that could be trained at the same time."""
    slot_utilisation: float | None
    """Share of the slots' time, from the first expert's start to the last one's end, in which experts were trained;
    null: none was."""
    seeds: Maybe[Seeds] = None
    """Of a run of several seeds their spread; all fields above are the first seed's then, but for `made`, `reused` and
    `seconds`, which are added up, and `slot_utilisation`, which is the mean."""

    def to_json(self) -> str:
        """The file's text. Raises ValueError for a number that is not JSON."""
        return json.dumps(self.model_dump(exclude_unset=True), indent=2, allow_nan=False) + "\n"


def scores(row: HeldInTask | HeldOutTask | HeldInSummary | HeldOutSummary) -> dict[str, float]:
    """The scores that a row has, by model, in the order of `MODELS`."""
    found = ((name, getattr(row, name, None)) for name in MODELS)
    return {name: value for name, value in found if value is not None}


def readable(texts: Iterable[bytes]) -> list[Results]:
    """The results.json files that can be read, in their order; those that are damaged or of before there was a gate
    are left out."""
    found = []
    for text in texts:
        with contextlib.suppress(ValueError):
            found.append(Results.model_validate_json(text))
    return found


def print_schema() -> None:
    """Print the JSON Schema of results.json."""
    print(json.dumps(Results.model_json_schema(), indent=2))
