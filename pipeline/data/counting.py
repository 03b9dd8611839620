"""Whether a run learns from, and is scored on, the rows that its tasks have: what was dropped, joined or is cut, by
task and reason, for machines and for people, and refused above a share.

What happens to rows is decided in `pipeline.data.distinct` and `workers.text.prompt`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from infra.errors import DataError
from pipeline.data.tasks import SPLITS, TRAINED_ON, TaskData
from workers.text.cuts import CutCounts, count_cuts

_DROPPED = ("blank_input", "blank_target", "outvoted", "undecided", "other_options")


def with_cuts(
    tasks: Mapping[str, TaskData],
    held_in: Collection[str],
    tokenizer: Any,
    max_input_tokens: int,
    max_target_tokens: int | None,
) -> dict[str, TaskData]:
    """The tasks, with what these limits take from their rows. Only held-in tasks are taught. No limit of targets: they
    are labels."""

    def cuts(data: TaskData) -> CutCounts:
        known = TRAINED_ON if data.name in held_in else ()
        taught = [row for split in SPLITS if split in known for row in data.splits[split]]
        others = [row for split in SPLITS if split not in known for row in data.splits[split]]
        return count_cuts(tokenizer, taught, others, max_input_tokens, max_target_tokens)

    return {name: replace(data, cuts=cuts(data)) for name, data in tasks.items()}


def rows_json(data: TaskData) -> dict[str, Any]:
    """The counts of one task. Names are an interface: add, never rename."""
    counts, cuts = asdict(data.counts), data.cuts
    return {
        **{name: counts[name] for name in ("read", "kept", "joined", "several_answers", "alike")},
        "dropped": {name: counts[name] for name in _DROPPED},
        "dropped_share": data.counts.dropped_share,
        "used": cuts.rows,
        "cut": {"rows": cuts.either, "inputs": cuts.inputs, "instructions": cuts.instructions, "targets": cuts.targets},
        "cut_share": cuts.share,
        "text": rows_text(data),
    }


def rows_text(data: TaskData) -> str:
    """The counts of one task in a sentence; empty if all its rows are as they were read."""
    counts, cuts = data.counts, data.cuts
    parts = [f"dropped: {count} {reason}" for reason, count in counts.dropped.items()]
    if counts.joined:
        several = f" ({counts.several_answers} with several answers, all right)" if counts.several_answers else ""
        parts.append(f"joined: {counts.joined} with the same input as another row{several}")
    if counts.alike:
        parts.append(f"{counts.alike} have the same input as another row but for case, whitespace or options")
    if cuts.inputs:
        lost = f", {cuts.instructions} lose the task's beginning {cuts.beginning!r}" if cuts.instructions else ""
        parts.append(f"cut: {cuts.inputs} of {cuts.rows} inputs lose their beginning{lost}")
    if cuts.targets:
        parts.append(f"cut: {cuts.targets} of {cuts.taught} targets lose their end")
    return f"{counts.read} rows; {'; '.join(parts)}" if parts else ""


def rows_lines(tasks: Mapping[str, TaskData]) -> Iterable[str]:
    """A line for each task of which something is to be said."""
    return [f"{name}: {text}" for name, data in tasks.items() if (text := rows_text(data))]


def check_shares(tasks: Mapping[str, TaskData], dropped: float, cut: float) -> None:
    """Raises DataError if a task loses a larger share of its rows than these, or than its own `tolerate`."""
    problems = [problem for data in tasks.values() for problem in _problems(data, dropped, cut)]
    if problems:
        more = f" (and {len(problems) - 1} more, see the counts above)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)


def _problems(data: TaskData, dropped: float, cut: float) -> Iterable[str]:
    own, counts, cuts = data.config.tolerate, data.counts, data.cuts
    most = dropped if own.dropped is None else own.dropped
    if counts.dropped_share > most:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items())
        yield (
            f"task {data.name}: {counts.dropped_share:.1%} of its {counts.read} rows would be dropped ({reasons}); at "
            f"most {most:.1%} are tolerated. Mend the data, or raise data.tolerate.dropped or the task's "
            "tolerate.dropped"
        )
    most = cut if own.cut is None else own.cut
    if cuts.share > most:
        begin = f" ({cuts.instructions} of them what half of the task's begin with)" if cuts.instructions else ""
        move = "; what all inputs begin with can stand in the task's template, which nothing cuts" if begin else ""
        yield (
            f"task {data.name}: {cuts.share:.1%} of its {cuts.rows} rows would be cut: {cuts.inputs} inputs lose their "
            f"beginning{begin}, {cuts.targets} targets their end; at most {most:.1%} are tolerated. Raise "
            f"prompt.max_input_tokens or prompt.max_target_tokens{move}; or raise data.tolerate.cut or the task's "
            "tolerate.cut"
        )
