"""What a run's results come to: the table of scores and the lines below it, in the terminal and in every report."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from pipeline.records.merge_results import Chosen
from pipeline.records.results import Results, scores
from pipeline.records.seed_results import Spread
from pipeline.report.candidates import parameters_text, rounds_text, rows_text, steps_text
from pipeline.report.gate import gate_lines
from pipeline.report.rows import lost_lines

TITLES = ("task", "metric", "base", "base few-shot", "expert", "merged")
"""Columns of the table of scores."""
MODELS = ("base", "base_few_shot", "expert", "merged")
"""What the columns after the metric hold."""
MEAN = "mean of "
"""What the rows of means begin with."""


def score_rows(results: Results) -> list[tuple[str, ...]]:
    """Cells of the table of scores as text: held-in tasks first, the mean after each group."""
    groups = (
        ("held-in", results.held_in, results.summary.held_in),
        ("held-out", results.held_out, results.summary.held_out),
    )
    tasks_spread: dict[str, Mapping[str, Mapping[str, Spread]]] = {}
    mean_spread: dict[str, Mapping[str, Spread]] = {}
    if results.seeds is not None:
        tasks_spread = {"held-in": results.seeds.tasks.held_in, "held-out": results.seeds.tasks.held_out}
        mean_spread = {"held-in": results.seeds.summary.held_in, "held-out": results.seeds.summary.held_out}
    rows: list[tuple[str, ...]] = []
    for group, tasks, summary in groups:
        for task, row in tasks.items():
            rows.append((task, row.metric, *_cells(scores(row), tasks_spread.get(group, {}).get(task, {}))))
        if tasks:
            rows.append((f"{MEAN}{group}", "", *_cells(scores(summary), mean_spread.get(group, {}))))
    return rows


def _cells(found: Mapping[str, float], spread: Mapping[str, Spread]) -> list[str]:
    return [_score(found.get(model), spread.get(model)) for model in MODELS]


def _score(value: float | None, spread: Spread | None) -> str:
    """A score, or its mean and standard deviation over seeds; the base has none."""
    if value is None:
        return ""
    return f"{spread.mean:.2f} ± {spread.sd:.2f}" if spread and spread.sd else f"{value:.2f}"


def summary_table(results: Results) -> Table:
    """The table for the terminal."""
    table = Table(title=f"{results.suite}: scores on the test splits", title_justify="left")
    for title in TITLES:
        table.add_column(title, justify="left" if title in ("task", "metric") else "right", no_wrap=True)
    for row in score_rows(results):
        mean = row[0].startswith(MEAN)
        table.add_row(*(Text(cell) for cell in row), style="bold" if mean else None, end_section=mean)
    return table


def summary_lines(results: Results) -> list[str]:
    """What stands under the table."""
    return [
        *_merge_lines(results),
        *_more_lines(results),
        *gate_lines(results.gate),
        *_work_lines(results),
    ]


def _merge_lines(results: Results) -> list[str]:
    """The chosen merge and what it does."""
    held_in, chosen = results.summary.held_in, results.chosen
    low, high = held_in.merged_interval
    params = parameters_text(chosen)
    steps = f"{steps_text(chosen)} ({rows_text(chosen.refined)})" if chosen.refined is not None else ""
    retention = "undefined" if held_in.retention is None else f"{held_in.retention:.0%}"
    beside = "" if held_in.of_multitask is None else f" and {held_in.of_multitask:.0%} of the multitask adapter's"
    lines = [
        f"chosen on validation: {chosen.method}{f' ({params})' if params else ''}{steps}; the merge keeps "
        f"{retention} of the experts' gain{beside} "
        f"(merged {held_in.merged:.3f}, 95 % interval {low:.3f} to {high:.3f})",
        f"experts above base: {held_in.experts_above_base} of {len(results.held_in)}",
        "format-free scores, held-in: "
        + ", ".join(f"{model} {held_in.format_free[model]:.3f}" for model in ("base", "expert", "merged")),
    ]
    if held_in.merged_serving is not None:
        lines.append(
            f"merged weights rounded to {chosen.serving_dtype}: score {held_in.merged_serving:.3f}; "
            f"rounding to bfloat16 loses {chosen.rounding_loss_bfloat16:.0%} of the merged change's norm"
        )
    rounds = [rounds_text(results.rounds)] if results.rounds is not None else []
    yardsticks = [*_multitask_lines(results), *_routed_lines(results), *_few_shot_lines(results)]
    return [*lines, *rounds, *yardsticks, _size_line(chosen)]


def _multitask_lines(results: Results) -> list[str]:
    """One adapter for all tasks, as a yardstick."""
    yardstick, held_in, held_out = results.multitask, results.summary.held_in, results.summary.held_out
    if yardstick is None or held_in.multitask is None or held_in.multitask_interval is None:
        return []
    low, high = held_in.multitask_interval
    outside = f", held-out {held_out.multitask:.3f}" if held_out.multitask is not None else ""
    return [
        f"multitask, one adapter trained on all tasks from the base ({yardstick.steps} steps, {yardstick.rows} "
        f"training rows, {yardstick.share:.0%} of the experts'): held-in {held_in.multitask:.3f} (95 % interval "
        f"{low:.3f} to {high:.3f}){outside}"
    ]


def _routed_lines(results: Results) -> list[str]:
    """The experts behind a router, as a yardstick."""
    held_in, held_out = results.summary.held_in, results.summary.held_out
    if held_in.routed is None or held_in.routed_interval is None:
        return []
    low, high = held_in.routed_interval
    outside = f", held-out {held_out.routed:.3f}" if held_out.routed is not None else ""
    return [
        f"routed, each row by the expert that a router picks from its prompt: held-in {held_in.routed:.3f} (95 % "
        f"interval {low:.3f} to {high:.3f}){outside}; the experts, each on its own task, {held_in.expert:.3f}"
    ]


def _few_shot_lines(results: Results) -> list[str]:
    """The merge with examples in its prompt, as a yardstick."""
    merged, base = results.summary.held_in.merged_few_shot, results.summary.held_in.base_few_shot
    if merged is None:
        return []
    outside = results.summary.held_out.merged_few_shot
    beside = f"; the base with them {base:.3f}" if base is not None else ""
    return [
        f"merged with examples in the prompt: held-in {merged:.3f}"
        + (f", held-out {outside:.3f}" if outside is not None else "")
        + beside
    ]


def _size_line(chosen: Chosen) -> str:
    """What the chosen merge takes to keep and to load."""
    swap = f", {chosen.swap_seconds:.1f} s to fetch and apply in an evaluator" if chosen.swap_seconds else ""
    return f"merged adapter: {chosen.bytes / 1e6:.0f} MB, {chosen.density:.0%} of the adapted weights{swap}"


def _more_lines(results: Results) -> list[str]:
    """What not every run has."""
    lines = []
    tested = [f"{row.method} {row.test:.3f}" for row in results.per_task if row.test is not None]
    if tested:
        lines.append(
            f"with the task known at inference, held-in: {', '.join(tested)} (beside the choice, not registered)"
        )
    if results.export:
        lines.append(f"full checkpoint in {results.export.dtype}: {results.export.uri}")
    if learned := results.learned_elsewhere:
        counts = ", ".join(f"{count} of {task}" for task, count in learned.items())
        lines.append(f"test rows that another task's expert has learned from, which favours the merge: {counts}")
    lines += lost_lines(results.rows)
    if seeds := results.seeds:
        spread = [f"{name} {of.mean:.3f} ± {of.sd:.3f}" for name, of in seeds.summary.held_in.items() if of.sd]
        values = ", ".join(map(str, seeds.values))
        lines.append(f"over seeds {values} (mean ± sd; lines above: the first): {', '.join(spread)}")
    return lines


def _work_lines(results: Results) -> list[str]:
    """What was made and found, and how long that took."""
    made, reused = (
        ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts if count is not None)
        for counts in (results.made, results.reused)
    )
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in results.seconds if value is not None)
    used = results.slot_utilisation
    busy = f"; {results.slots} slots {used:.0%} busy with experts" if used is not None else ""
    return [f"made:   {made}", f"reused: {reused}", f"seconds: {seconds}{busy}"]
