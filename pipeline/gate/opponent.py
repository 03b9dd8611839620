"""Whom a challenger is compared with: the champion, found again by its registered version, or the base.

A champion is scored as it was made: on its own base, with the prompts and, for a classification, the heads that it was
trained with; rows, metric and length of answers are today's. A merge's tasks are those that it was registered with,
whatever an expert was called when it was trained; one that was made for a task which is none of today's is not compared
on the others alone. But today's gate rows may be rows that the champion was trained or validated on, for sizes, seed or
data of the splits changed since, or that another of today's experts was, for two tasks may share a source: no
comparison counts them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from infra.artifacts.manifests import Manifest
from infra.errors import FactoryError, RegistryError, StoreError
from infra.registry.runs import model_names
from infra.registry.versions import Version, lineage_of
from infra.store.errors import ObjectCorrupted, ObjectMissing
from infra.store.layout import base_index, manifest_name, rows_name
from infra.store.s3 import Store
from pipeline.gate.rule import TaskScores
from workers.scoring.metrics import LabelScores
from workers.text.prompt import PromptSpec
from workers.text.rows import Row, load_rows

_THREADS = 8
_NAMED = 5  # tasks that a reason names
_LEAST = 2  # rows of a task that a gate can resample


class Incomparable(FactoryError):
    """A champion cannot be compared, today or tomorrow: a person has to decide."""


def is_lasting(error: BaseException) -> bool:
    """Whether what kept a champion from being scored lies with the champion and its bytes: then a person has to decide.
    It may not if a service does not answer or a worker is lost."""
    if isinstance(error, StoreError):
        return isinstance(error, ObjectMissing | ObjectCorrupted)
    return isinstance(error, FactoryError) and not isinstance(error, RegistryError)


@dataclass(frozen=True)
class Opponent:
    """A model to compare with; the defaults are the base, or a classification's untrained heads."""

    version: int | None = None
    """The champion's."""
    manifest: Manifest | None = None
    base_sha256: str | None = None
    experts: Mapping[str, Manifest] = field(default_factory=dict)
    """By task: those that a champion merge was made of, or the champion expert itself."""
    seen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By task, numbers of today's gate rows that the champion was trained or validated on; not of tasks without."""

    def __str__(self) -> str:
        return "base" if self.version is None else f"champion (version {self.version})"

    def prompt(self, task: str, today: PromptSpec) -> PromptSpec:
        """How the model is asked: as it was trained, or, on a task that is new to it, by today's template in the
        wrapper that it knows."""
        if task in self.experts:
            return _prompt(self.experts[task])
        for known in self.experts.values():
            return replace(_prompt(known), template=today.template)
        return today


def _prompt(expert: Manifest) -> PromptSpec:
    prompt = expert.config["prompt"]
    return PromptSpec(prompt["template"], prompt["wrapper"], prompt["max_input_tokens"])


def find_champion(
    store: Store,
    champion: Version,
    suite: str,
    task: str,
    tasks: Collection[str],
    labels: Mapping[str, Iterable[str]],
    gate: Mapping[str, str] | None = None,
) -> Opponent:
    """The champion of an expert's `task`, or of the merge, with everything that scoring it on today's `tasks` takes.

    `labels` of a classification: those of each of today's tasks. `gate`: fingerprints of their gate rows; without them
    nobody asks which of these rows it has seen. Raises Incomparable, saying why: something was
    deleted or replaced, the champion knows other labels or does something else, or it was made for a task that is none
    of today's. StoreError or RegistryError where they do not answer; DataError if stored rows are corrupted.
    """
    manifest = _stored(store, champion.key)
    if manifest.digest != champion.digest:
        raise Incomparable(f"{store.uri(manifest_name(champion.key))} now names other bytes than were registered")
    _check_files(store, manifest)
    base = str(manifest.meta["base_sha256"])
    if store.head(base_index(base)) is None:
        raise Incomparable(f"its base {base} is not in the object store")
    named = {} if manifest.kind == "expert" else _named(champion, suite, tasks)
    made_of = [(task, manifest)] if manifest.kind == "expert" else _experts(store, manifest, bool(labels), named)
    experts, made_for = dict(made_of), {name for names in named.values() for name in names}
    if other := [name for name, each in made_of if ("labels" in each.config) != bool(labels)]:
        raise Incomparable(f"it {'generates' if labels else 'classifies'}, as its expert for {other[0]!r} does")
    if absent := sorted((made_for | experts.keys()) - set(tasks)):
        listed = ", ".join(map(repr, absent[:_NAMED]))
        raise Incomparable(f"it was made for {listed}{_more(absent)} too, which this run has no task of")
    for name, wanted in labels.items():
        if name in experts and list(experts[name].config["labels"]) != list(wanted):
            raise Incomparable(f"it was trained for other labels of the task {name!r} than today's")
    return Opponent(champion.version, manifest, base, experts, _seen(store, made_of, gate or {}))


def _named(champion: Version, suite: str, tasks: Collection[str]) -> dict[str, list[str]]:
    """By the keys of a merge's experts, for which tasks they were merged: one of today's by its registered name."""
    made_of, today = lineage_of(champion), model_names(suite, tasks)
    names = {registered: task for task, registered in today.items()}
    found: dict[str, list[str]] = {}
    for expert in made_of.experts if made_of else ():
        found.setdefault(expert.key, []).append(names.get(expert.name, expert.name.removeprefix(f"{suite}.")))
    return found


def _experts(
    store: Store, merged: Manifest, heads: bool, named: Mapping[str, Sequence[str]]
) -> list[tuple[str, Manifest]]:
    """The experts of a merge, each after its task: by its key in `named`, else as it was called in training. Of those
    that are gone only prompts and rows are missed, unless `heads` are needed."""

    def look(key: str) -> Manifest | None:
        try:
            found = _stored(store, key)
            if heads and found.kind == "expert":
                if found.digest != merged.inputs[key]:
                    raise Incomparable(f"its expert {key} now has other bytes")
                _check_files(store, found)
        except Incomparable:
            if heads:
                raise
            return None
        return found if found.kind == "expert" else None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [manifest for manifest in pool.map(look, merged.inputs) if manifest is not None]
    return [(task, manifest) for manifest in found for task in named.get(manifest.key) or [_task(manifest)]]


def rows_seen(used: Iterable[tuple[str, Row]], gate: Mapping[str, Sequence[Row]]) -> dict[str, tuple[int, ...]]:
    """By task, which of its gate rows are among those that experts were trained or validated on, each after its task:
    one of the same input in an expert of that task, one of the same input and answers in an expert of any other (a task
    may have been renamed, and two tasks may share a source). Tasks without are left out."""
    ids = {row.id for rows in gate.values() for row in rows}
    found = [(task, row.id, row.targets) for task, row in used if row.id in ids]
    own, any_task = {(task, row) for task, row, _ in found}, {(row, targets) for _, row, targets in found}
    numbers = {
        task: tuple(at for at, row in enumerate(rows) if (task, row.id) in own or (row.id, row.targets) in any_task)
        for task, rows in gate.items()
    }
    return {task: each for task, each in numbers.items() if each}


def _seen(store: Store, experts: Iterable[tuple[str, Manifest]], gate: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """`rows_seen` of experts that are stored. Rows that are no longer in the store cannot be checked."""
    used = {(task, str(each)) for task, expert in experts for each in dict(expert.config.get("data", {})).values()}

    def read(fingerprint: str) -> list[Row]:
        try:
            return load_rows(store, rows_name(fingerprint))
        except ObjectMissing:
            return []

    with ThreadPoolExecutor(_THREADS) as pool:
        today = dict(zip(gate, pool.map(read, gate.values()), strict=True))
        uses = sorted(used)
        rows = pool.map(lambda use: read(use[1]), uses)
        return rows_seen(((task, row) for (task, _), part in zip(uses, rows, strict=True) for row in part), today)


@dataclass(frozen=True)
class Comparable:
    """Scores of two models on the rows that neither has seen, and what is to be said about the others."""

    before: dict[str, TaskScores]
    after: dict[str, TaskScores]
    remark: str
    """The end of a sentence, or nothing."""


def unseen(
    before: Mapping[str, TaskScores],
    after: Mapping[str, TaskScores],
    by_opponent: Mapping[str, tuple[int, ...]],
    by_challenger: Mapping[str, tuple[int, ...]],
) -> Comparable:
    """Leave out the rows of the gate that one of the two has seen, and tasks that have fewer than 2 left then."""
    seen = {
        task: tuple(sorted({*by_opponent.get(task, ()), *by_challenger.get(task, ())}))
        for task in before
        if task in by_opponent or task in by_challenger
    }
    count = sum(len(seen.get(task, ())) for task in before)
    if not count:
        return Comparable(dict(before), dict(after), "")
    few = sorted(task for task, scores in before.items() if task in seen and len(scores) - len(seen[task]) < _LEAST)
    kept = [task for task in before if task not in few]
    rows, them = ("row", "it") if count == 1 else ("rows", "them")
    theirs, ours = (any(task in rows for task in before) for rows in (by_opponent, by_challenger))
    who = "one of the two" if theirs and ours else "the champion" if theirs else "the challenger"
    remark = f"; {count} gate {rows} left out: {who} was trained on {them}"
    if few:
        remark += f"; not compared on {', '.join(map(repr, few[:_NAMED]))}{_more(few)}: too few gate rows are left"
    before, after = ({task: _without(scores[task], seen.get(task, ())) for task in kept} for scores in (before, after))
    return Comparable(before, after, remark)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""


def _without(scores: TaskScores, rows: Iterable[int]) -> TaskScores:
    without = set(rows)
    left = [at for at in range(len(scores)) if at not in without]
    if isinstance(scores, LabelScores):
        predicted, target = (tuple(labels[at] for at in left) for labels in (scores.predicted, scores.target))
        return LabelScores(predicted, target, scores.metric)
    return [scores[at] for at in left]


def _task(expert: Manifest) -> str:
    meta: dict[str, Any] = expert.meta
    return str(meta["task"])


def _stored(store: Store, key: str) -> Manifest:
    """The manifest of a key, whatever its inputs are by now."""
    found = store.get_with_etag(manifest_name(key)) if key else None
    if found is None:
        raise Incomparable(f"the object store has no artifact {key or 'of it'}")
    try:
        return Manifest.from_json(found[0])
    except StoreError as error:
        raise Incomparable(str(error)) from error


def _check_files(store: Store, manifest: Manifest) -> None:
    for ref in manifest.files.values():
        info = store.head(ref.name)
        if info is None or info.size != ref.size:
            raise Incomparable(f"{store.uri(ref.name)} is gone")
