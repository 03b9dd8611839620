"""What training rows beyond the experts' bring: a picture of scores against them, and what refining brought a task.

Both are there only where something was trained on rows of all tasks (`refine`, `yardsticks.multitask`). Of a run of
several seeds, both are the first one's.
"""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pipeline.records.merge_results import CandidateRow
from pipeline.records.results import Results
from pipeline.report.candidates import parameters_text
from pipeline.report.plots import INK, head, new_figure, plain, png

_TESTED = (
    ("base", "base", "#7f7f7f", "o"),
    ("base_few_shot", "base, few-shot", "#56B4E9", "^"),
    ("merged", "merged", "#D55E00", "D"),
    ("multitask", "multitask", "#0072B2", "s"),
)
_EXPERT = "#009E73"


def draw(results: Results) -> dict[str, bytes]:
    """training-rows.png; nothing where no rows but the experts' were trained on."""
    refines = any(row.refined is not None for row in results.candidates)
    if not refines and results.multitask is None:
        return {}
    panels: list[tuple[str, Callable[[Axes], None]]] = [("Test rows", lambda axes: _tested(axes, results))]
    if refines:
        few, tasks = results.search.rungs[0].tasks, len(results.held_in)
        last = [row for row in results.candidates if row.tasks == tasks]
        if few < tasks:
            title = f"Validation rows, {few} tasks: all candidates"
            panels.append((title, lambda axes: _validated(axes, results.candidates, lambda row: row.first_rung)))
        title = f"Validation rows, all {tasks} tasks"
        panels.append((title, lambda axes: _validated(axes, last, lambda row: row.validation)))
    figure = new_figure(4.6)
    for axes, (title, fill) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        fill(axes)
        plain(axes)
        axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
        axes.set_title(title, loc="left", fontsize=9.5, color=INK)
        axes.set_xlabel("training rows beyond the experts'", color=INK)
        axes.set_ylabel("mean score", color=INK)
    shown = [each for each in _TESTED if getattr(results.summary.held_in, each[0], None) is not None]
    handles = [Line2D([], [], color=c, marker=shape, linestyle="", label=label) for _, label, c, shape in shown]
    handles.append(Line2D([], [], color=_EXPERT, linestyle="--", label="experts"))
    head(figure, f"{results.suite}: score against training rows", handles)
    note = "Filled: held-in tasks; hollow: held-out tasks. A line leads from a merge to what it became by training on."
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=INK)
    return {"training-rows.png": png(figure)}


def _rows(row: CandidateRow) -> int:
    return row.refined.rows if row.refined is not None else 0


def _tested(axes: Axes, results: Results) -> None:
    """Test scores: held-in filled, held-out hollow."""
    chosen, yardstick = results.chosen.refined, results.multitask
    trained = {"merged": chosen.rows if chosen else 0, "multitask": yardstick.rows if yardstick else 0}
    for summary, fill in ((results.summary.held_in, "full"), (results.summary.held_out, "none")):
        for name, _, colour, shape in _TESTED:
            score = getattr(summary, name, None)
            if score is not None:
                at = trained.get(name, 0)
                axes.plot(at, score, shape, color=colour, fillstyle=fill, markersize=7, clip_on=False, zorder=3)
    axes.axhline(results.summary.held_in.expert, color=_EXPERT, linestyle="--", linewidth=1.2)
    _scale(axes, [0, *trained.values()])


def _validated(axes: Axes, rows: Sequence[CandidateRow], score: Callable[[CandidateRow], float]) -> None:
    """Candidates that were scored on the same tasks."""
    starts = {_merge(row): row for row in rows if row.refined is None}
    for row in rows:
        start = starts.get(_merge(row))
        if row.refined is not None and start is not None:
            axes.plot([0, _rows(row)], [score(start), score(row)], color="#bbbbbb", linewidth=1.2, zorder=1)
    for row in rows:
        axes.plot(
            _rows(row), score(row), "D" if row.chosen else "o", color="#D55E00" if row.chosen else "#0072B2",
            markersize=7 if row.chosen else 6, clip_on=False, zorder=3,
        )  # fmt: skip
    _scale(axes, [_rows(row) for row in rows])


def _merge(row: CandidateRow) -> tuple[str, str]:
    """Which merge a candidate is, or started from."""
    return row.method, parameters_text(row)


def _scale(axes: Axes, rows: Sequence[int]) -> None:
    """The axis of rows: 0, then by factors; marked where something is."""
    ticks = sorted(set(rows))
    linear = min((tick for tick in ticks if tick), default=2) / 2
    if ticks[-1]:
        axes.set_xscale("symlog", linthresh=linear)
        axes.minorticks_off()
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_xlim(-linear / 10, max(1, ticks[-1]) * 1.2)


def by_task_section(results: Results) -> list[str]:
    """The section of report.md: per task what merging lost, and what refining brought back; tasks with the largest
    loss first. Nothing where nothing was refined."""
    refined = [row for row in results.candidates if row.refined is not None and row.by_task is not None]
    if not refined:
        return []
    best = next((row for row in refined if row.chosen), max(refined, key=lambda row: row.validation))
    start = next((row for row in results.candidates if row.refined is None and _merge(row) == _merge(best)), None)
    before, after = start.by_task if start is not None else None, best.by_task
    if before is None or after is None or best.refined is None:
        return []
    lines = [
        "## What merging lost, and what refining brought back",
        "",
        "Lost: the expert's score less the chosen merge's, on test rows. Brought back by "
        f"{best.refined.steps} steps from {best.method}: on validation rows, which experts are not scored on.",
        "",
        "| task | expert | merged | lost | merge as it was, validation | refined, validation | brought back |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task, row in sorted(results.held_in.items(), key=lambda item: item[1].merged - item[1].expert):
        scores = (row.expert, row.merged, row.expert - row.merged, before[task], after[task])
        cells = [*(f"{score:.2f}" for score in scores), f"{after[task] - before[task]:+.2f}"]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return [*lines, ""]
