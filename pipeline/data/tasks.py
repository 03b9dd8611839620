"""Tasks: their configuration, their rows and their splits.

Splits are a pure function of rows, sizes and seed: independent of the order of rows, without duplicates across or
within splits, and nearly unchanged when rows are added. Where rows come from is `pipeline.data.sources`; which of them
count as one, `pipeline.data.distinct`; prompts are `workers.text.prompt`.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from infra.errors import DataError
from infra.garbage import no_search_for_cycles
from infra.store.layout import rows_name
from pipeline.data.distinct import Distinct, DistinctBy, RowCounts, distinct_rows
from pipeline.data.fields import Positive, Text, Whole, check_place, check_placeholders
from pipeline.data.hub import hub_rows
from pipeline.data.sources import (
    NOT_STATED,
    ReadBytes,
    bigbench_rows,
    extract_bigbench,
    jsonl_rows,
    source_license,
)
from pipeline.data.tolerance import TaskTolerance
from workers.scoring.classification import distinct_labels
from workers.scoring.metrics import CLASSIFICATION_METRICS
from workers.text.cuts import CutCounts
from workers.text.rows import Row, fingerprint, rows_to_jsonl

SPLITS = ("train", "validation", "gate", "test")
TRAINED_ON = ("train", "validation")
"""Splits that an expert has seen: what it learns from, and what its best step is chosen by."""
DEFAULT_SIZES: Mapping[str, int] = {"train": 512, "validation": 24, "gate": 24, "test": 48}
_KINDS = ("bigbench", "jsonl", "hub")
_MIN_TRAIN = 8
LEAST_GATE = 8
"""Rows that a gate needs: on a few, two models differ by chance more often than its confidence says."""
_CLOSED = ("choice_accuracy", *CLASSIFICATION_METRICS)
"""Metrics whose answers are among given ones."""


class TaskSizes(BaseModel):
    """Row counts of one task where they differ from the run's."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    train: Positive | None = None
    """Most training rows."""
    validation: Positive | None = None
    """Validation rows."""
    gate: Annotated[Whole, Field(ge=LEAST_GATE)] | None = None
    """Gate rows."""
    test: Positive | None = None
    """Test rows."""


class TaskConfig(BaseModel):
    """One task: a named source, a prompt template and a metric."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    source: str
    """`bigbench:<task>`, `jsonl:<path or s3 URI>` (rows input, target or targets, optional options),
    `hub:<name>[/config]`."""
    template: str = "{input}"
    """Text of the prompt; `{input}` stands for the row's input, `{options}` for its options."""
    metric: Literal["exact_match", "rouge_l", "choice_accuracy", "accuracy", "f1", "matthews"]
    """Exact match (after Unicode composition and with any whitespace as one space, on both sides) and Rouge-L score a
    generated answer, choice accuracy the log-likelihood of the row's options, each up to its end; accuracy, macro F1
    and Matthews' correlation score the labels of a classification run."""
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """Classification: the labels, in the head's order; null: the targets that occur, sorted."""
    length_normalised: bool = False
    """Choice accuracy: divide an option's log-likelihood by its tokens, its end included."""
    max_new_tokens: Positive | None = None
    """Most tokens generated; null: the 95th percentile of the training targets."""
    split: Text | None = None
    """`hub:` only: the dataset's split that rows are taken from, or several as `train+validation`; null: `train`, or
    the only one there is. The run makes splits of its own out of them."""
    columns: dict[Literal["input", "target", "targets", "options"], Text] = {}
    """`hub:` only: the dataset's column for each field, where the names differ; `choices.text` is a column's field."""
    where: dict[Text, str] = {}
    """`hub:` only: keep the rows whose columns have these values, for example `{task_name: sciq_Multiple_Choice}`; a
    label by its name."""
    distinct_by: DistinctBy = "text"
    """Rows that count as one. `text`: the same input and options to the letter; free answers are joined, of
    contradictory closed ones the majority stays, and a draw is dropped. `words`: inputs that differ in case or
    whitespace too, whatever their options; a draw, and the order of free answers, is decided by content."""
    tolerate: TaskTolerance = TaskTolerance()
    """Shares of dropped and cut rows of this task, where they differ from the run's `data.tolerate`."""
    sizes: TaskSizes = TaskSizes()
    """Sizes of this task's splits, where they differ from the run's."""
    license: Annotated[str, Field(min_length=1)] | None = None
    """Licence of the data, recorded in manifests and model cards, part of no key; null: what the source states itself
    (BIG-bench: Apache-2.0, hub: the dataset's card)."""

    @field_validator("source")
    @classmethod
    def _known_source(cls, value: str) -> str:
        kind, _, rest = value.partition(":")
        if kind not in _KINDS or not rest:
            raise ValueError(
                f"{value!r} is not a source; accepted: bigbench:<task>, jsonl:<path or s3 URI>, hub:<name>[/config]"
            )
        check_place(kind, rest)
        return value

    @field_validator("template")
    @classmethod
    def _has_input(cls, value: str) -> str:
        if "{input}" not in value:
            raise ValueError("must contain {input}, where the row's input goes")
        check_placeholders(value)
        return value

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("every label once")
        return value

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        if (self.columns or self.where or self.split) and not self.source.startswith("hub:"):
            raise ValueError(
                "split, columns and where are for hub: sources; name the fields input, target(s), options in the file "
                "itself"
            )
        if self.length_normalised and self.metric != "choice_accuracy":
            raise ValueError("length_normalised is for metric=choice_accuracy, which compares options; remove it")
        return self


@dataclass(frozen=True)
class TaskData:
    """A task's rows in splits, each with a fingerprint: the SHA-256 of its canonical JSON lines."""

    name: str
    config: TaskConfig
    splits: Mapping[str, Sequence[Row]]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    license: str = NOT_STATED
    """Licence of the data, for manifests and model cards."""
    counts: RowCounts = field(default_factory=RowCounts)
    """What became of the source's rows."""
    cuts: CutCounts = field(default_factory=CutCounts)
    """What length limits take from the rows; known once there is a tokenizer (`pipeline.data.counting`)."""

    @property
    def mean_tokens(self) -> float:
        """Rough tokens of a training example (4 characters each), for estimates and ordering only."""
        rows = self.splits["train"]
        characters = sum(len(row.input) + len(row.targets[0]) for row in rows) / max(1, len(rows))
        return (characters + len(self.config.template)) / 4 + 10

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of a classification task. DataError if there are fewer than two."""
        found = set(distinct_labels(row for rows in self.splits.values() for row in rows))
        if self.config.labels is not None:
            if unknown := sorted(found - set(self.config.labels)):
                raise DataError(f"task {self.name}: target {unknown[0]!r} is none of labels {self.config.labels}")
            return tuple(self.config.labels)
        if len(found) < 2:
            raise DataError(
                f"task {self.name}: its rows have one target only ({sorted(found)}); classification needs two"
            )
        return tuple(sorted(found))

    def object_name(self, split: str) -> str:
        """Where the split's rows are in the object store; a function of their content."""
        return rows_name(self.fingerprints[split])

    def to_jsonl(self, split: str) -> bytes:
        return rows_to_jsonl(self.splits[split])


def learned_elsewhere(tasks: Mapping[str, TaskData], held_in: Iterable[str]) -> dict[str, int]:
    """By task, how many of its test rows (same input and answers) the expert of another held-in task was trained or
    validated on, so that a merge knows them; tasks without are left out."""
    known: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for task in held_in:
        for row in (row for split in TRAINED_ON for row in tasks[task].splits[split]):
            known.setdefault((row.id, row.targets), set()).add(task)
    counts = {
        task: sum(bool(known.get((row.id, row.targets), set()) - {task}) for row in data.splits["test"])
        for task, data in tasks.items()
    }
    return {task: count for task, count in counts.items() if count}


def _first(found: Iterable[Distinct], seed: str, count: int) -> list[Distinct]:
    """The first ones in the order of a hash of seed and normalised input, `count` at most: of many rows few are used.
    Alike ones stay together."""
    begun = hashlib.sha256(seed.encode() + b"\x00")

    def rank(each: Distinct) -> bytes:
        digest = begun.copy()
        digest.update(each.words.encode())
        return digest.digest()  # bytes have the order of their hexadecimal digits

    return heapq.nsmallest(count, found, key=rank)


def make_splits(
    rows: Sequence[Row],
    sizes: Mapping[str, int],
    seed: int,
    task: str = "task",
    closed: bool = False,
    by: DistinctBy = "text",
) -> tuple[dict[str, tuple[Row, ...]], RowCounts]:
    """Disjoint train, validation, gate and test rows, in an order given by a hash of seed and normalised input; and
    what became of the rows before that (`pipeline.data.distinct`, with `closed` and `by`).

    Test, gate and validation are filled in this order, train takes at most `sizes["train"]` of the rest: when rows are
    added, a row only ever moves towards train, so no former training or validation row is tested or gated on. Ids
    become content hashes. DataError with too few rows.
    """
    found, counts = distinct_rows(rows, closed, by)
    training = min(_MIN_TRAIN, sizes["train"])
    least = sizes["test"] + sizes["gate"] + sizes["validation"] + training
    if len(found) < least:
        lost = (
            "; " + ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items()) if counts.dropped else ""
        )
        raise DataError(
            f"task {task}: {len(found)} distinct rows ({len(rows)} in all{lost}); at least {least} are needed for "
            f"{sizes['test']} test, {sizes['gate']} gate, {sizes['validation']} validation and {training} training rows"
        )
    ordered = _first(found, str(seed), sum(sizes[name] for name in SPLITS))
    splits, start = {}, 0
    for name in ("test", "gate", "validation", "train"):
        splits[name] = tuple(each.named() for each in ordered[start : start + sizes[name]])
        start += sizes[name]
    return {name: splits[name] for name in SPLITS}, counts


def load_tasks(
    tasks: Mapping[str, TaskConfig],
    cache: Path,
    sizes: Mapping[str, int] = DEFAULT_SIZES,
    seed: int = 0,
    *,
    archive: Path | None = None,
    read_bytes: ReadBytes | None = None,
) -> dict[str, TaskData]:
    """Every task's rows, split. All BIG-bench tasks come from one pass over the archive (`archive` replaces the
    download).

    DataError naming the task when its source is missing, malformed, too small, or does not suit its metric.
    """
    sources = [config.source.partition(":") for config in tasks.values()]
    named = [rest for kind, _, rest in sources if kind == "bigbench"]
    try:
        paths = extract_bigbench(named, cache, archive) if named else {}
    except DataError as error:
        wrong = [name for name, config in tasks.items() if f"{config.source}: " in str(error)]
        raise DataError(f"task {', '.join(wrong)}: {error}" if wrong else str(error)) from error
    with no_search_for_cycles():
        return {name: _load(name, config, paths, sizes, seed, read_bytes) for name, config in tasks.items()}


def _load(
    name: str,
    config: TaskConfig,
    bigbench: Mapping[str, Path],
    sizes: Mapping[str, int],
    seed: int,
    read_bytes: ReadBytes | None,
) -> TaskData:
    kind, _, rest = config.source.partition(":")
    try:
        if kind == "bigbench":
            rows = bigbench_rows(bigbench[rest], config.source, config.metric in _CLOSED)
        elif kind == "jsonl":
            rows = jsonl_rows(rest, read_bytes)
        else:
            columns = {str(key): column for key, column in config.columns.items()}
            rows = hub_rows(rest, columns, config.where, config.split)
        _check_rows(rows, config)
    except DataError as error:
        raise DataError(f"task {name}: {error}") from error
    wanted = {**sizes, **{key: size for key, size in config.sizes.model_dump().items() if size is not None}}
    closed = config.metric in CLASSIFICATION_METRICS
    splits, counts = make_splits(rows, wanted, seed, name, closed, config.distinct_by)
    prints = {split: fingerprint(splits[split]) for split in SPLITS}
    licence = config.license or source_license(config.source)
    return TaskData(name, config, splits, prints, licence, counts)


def _check_rows(rows: Sequence[Row], config: TaskConfig) -> None:
    if not rows:
        raise DataError(f"{config.source} has no rows")
    without = sum(row.options is None for row in rows)
    if without and config.metric == "choice_accuracy":
        raise DataError(f"{config.source}: {without} of {len(rows)} rows have no options; choice_accuracy needs them")
    if config.metric == "choice_accuracy" and all(set(row.options or ()) <= set(row.targets) for row in rows):
        raise DataError(f"{config.source}: every option of its rows is right, and no wrong one could be chosen")
    if without and "{options}" in config.template:
        raise DataError(f"{config.source}: template uses {{options}}, but {without} of {len(rows)} rows have none")
