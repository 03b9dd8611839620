"""Pictures of a run, from its results.json: scores by task, the candidates of the merge, loss curves of the experts.

`draw` returns PNG files by name. Every picture carries its title, its axes' units and what its intervals are; models
differ by shape as well as by colour (Okabe and Ito's, which colour-blind people can tell apart). Lists longer than a
page go on in further files.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from merge.methods.catalogue import METHODS
from pipeline.records.merge_results import CandidateRow, PerTaskRow
from pipeline.records.part import Interval
from pipeline.records.results import HeldInTask, HeldOutTask, Results, scores
from pipeline.records.seed_results import Spread
from pipeline.report.candidates import listed_text, steps_text

PAGE = 100
"""Rows of scores or panels of loss curves in one picture."""
MOST_CURVES = 200
"""Experts whose loss is drawn; reading and drawing more would take minutes."""
_DPI = 110
_WIDTH = 11.0
"""Inches."""
_LONGEST = 48
"""Characters of a label; a longer one loses its middle."""
INK, PALE = "#333333", "#8c8c8c"
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_SHAPES = "osD^vPX*"


@dataclass(frozen=True)
class _Model:
    """How a model's scores are drawn."""

    name: str
    label: str
    colour: str
    shape: str


_MODELS = (
    _Model("base", "base", "#7f7f7f", "o"),
    _Model("base_few_shot", "base, few-shot", "#56B4E9", "^"),
    _Model("expert", "expert", "#009E73", "s"),
    _Model("merged", "merged", "#D55E00", "D"),
)


_METRICS = {"rouge_l": "Rouge-L", "f1": "macro F1", "matthews": "Matthews' r"}
"""Names of metrics that are not their own without underscores."""


@dataclass(frozen=True)
class Curve:
    """Loss by step of one expert: the mean training loss of each batch, and the validation loss where measured."""

    training: Sequence[tuple[int, float]]
    validation: Sequence[tuple[int, float]]


def draw(results: Results, curves: Mapping[str, Curve]) -> dict[str, bytes]:
    """All pictures of a run. `curves`: by task, of the experts whose histories are known."""
    known = [(task, curves[task]) for task in results.held_in if task in curves]
    return {
        **_numbered("scores", [png(_scores(results, *page)) for page in _pages(_score_rows(results))]),
        "candidates.png": png(_candidates(results)),
        **_numbered("loss", [png(_losses(results, *page)) for page in _pages(known)]),
    }


def _numbered(name: str, pictures: list[bytes]) -> dict[str, bytes]:
    return {f"{name}{f'-{at + 1}' if at else ''}.png": picture for at, picture in enumerate(pictures)}


def _pages(items: Sequence[Any]) -> Iterator[tuple[Sequence[Any], str]]:
    """Pages of about the same length, with what a title says of them."""
    count = math.ceil(len(items) / PAGE)
    for at in range(count):
        page = items[at * len(items) // count : (at + 1) * len(items) // count]
        yield page, f" ({at + 1} of {count})" if count > 1 else ""


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor="white", metadata={"Software": None})
    return out.getvalue()


def new_figure(height: float) -> Figure:
    """A figure without pyplot: nothing global, so any thread may draw."""
    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def _short(text: str, longest: int = _LONGEST) -> str:
    """The text without its middle where it is too long; a lone $ would start a formula."""
    keep = (longest - 1) // 2
    cut = text if len(text) <= longest else f"{text[:keep]}…{text[-keep:]}"
    return cut.replace("$", r"\$")


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)


def head(figure: Figure, title: str, handles: Sequence[Line2D]) -> None:
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9.5)


# -- scores by task ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One line of the picture of scores: a task, or the mean of a group."""

    label: str
    metric: str
    scores: dict[str, tuple[float, float, float]]
    """Model to score and ends of its interval."""
    mean: bool = False


def _score_rows(results: Results) -> list[_Row]:
    """Held-in then held-out: the mean first, then the tasks by falling score of the expert, else of the merge."""
    rows = []
    for group, title in (("held_in", "held-in"), ("held_out", "held-out")):
        tasks: Mapping[str, HeldInTask | HeldOutTask] = getattr(results, group)
        summary = getattr(results.summary, group)
        mean_spread = getattr(results.seeds.summary, group) if results.seeds else {}
        task_spread = getattr(results.seeds.tasks, group) if results.seeds else {}
        if not tasks:
            continue
        means = {name: getattr(summary, f"{name}_interval", None) for name in scores(summary)}
        known = {name: interval for name, interval in means.items() if interval is not None}
        rows.append(_Row(f"mean of {len(tasks)} {title}", "", _values(scores(summary), known, mean_spread), mean=True))
        for task, row in sorted(tasks.items(), key=lambda item: (-_height(item[1]), item[0])):
            values = _values(scores(row), row.intervals, task_spread.get(task, {}))
            rows.append(_Row(task, _METRICS.get(row.metric, row.metric.replace("_", " ")), values))
    return rows


def _height(row: HeldInTask | HeldOutTask) -> float:
    return row.expert if isinstance(row, HeldInTask) else row.merged


def _values(
    found: Mapping[str, float], intervals: Mapping[str, Interval], spread: Mapping[str, Spread]
) -> dict[str, tuple[float, float, float]]:
    """Scores with intervals: of several seeds mean and standard deviation, else the rows' bootstrap."""
    values = {}
    for model in _MODELS:
        if model.name in spread:
            mean, deviation = spread[model.name].mean, spread[model.name].sd
            values[model.name] = (mean, mean - deviation, mean + deviation)
        elif model.name in found:
            low, high = intervals.get(model.name, (found[model.name], found[model.name]))
            values[model.name] = (found[model.name], low, high)
    return values


def _scores(results: Results, rows: Sequence[_Row], part: str) -> Figure:
    """One line a task, one mark a model."""
    pitch = 0.4 if len(rows) <= 40 else 0.32
    figure = new_figure(1.5 + pitch * len(rows))
    axes = figure.add_subplot()
    models = [model for model in _MODELS if any(model.name in row.scores for row in rows)]
    offsets = {model.name: (at - (len(models) - 1) / 2) * 0.2 for at, model in enumerate(models)}
    for at, row in enumerate(rows):
        if row.mean:
            axes.axhspan(at - 0.5, at + 0.5, color="#f0f0f0", zorder=0)
        elif at % 2:
            axes.axhspan(at - 0.5, at + 0.5, color="#fafafa", zorder=0)
    for model in models:
        drawn = [(at + offsets[model.name], row) for at, row in enumerate(rows) if model.name in row.scores]
        scores = [row.scores[model.name] for _, row in drawn]
        heights = [y for y, _ in drawn]
        axes.hlines(
            heights, [low for _, low, _ in scores], [high for _, _, high in scores], color=model.colour, alpha=0.45,
            linewidth=1.6, zorder=2,
        )  # fmt: skip
        axes.scatter(
            [score for score, _, _ in scores], heights, s=[42 if row.mean else 26 for _, row in drawn], c=model.colour,
            marker=model.shape, edgecolors="white", linewidths=0.6, zorder=3, clip_on=False,
        )  # fmt: skip
    axes.set_ylim(len(rows) - 0.5, -0.5)
    lowest = min((low for row in rows for _, low, _ in row.scores.values()), default=0.0)
    axes.set_xlim(min(0.0, math.floor(lowest * 10) / 10), 1.0)
    axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.mean else "normal")
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), [row.metric for row in rows])
    right.tick_params(colors=PALE, length=0, labelsize=8)
    right.spines["right"].set_visible(False)
    plain(axes)
    axes.tick_params(axis="x", labeltop=len(rows) > 20)
    axes.set_xlabel("score on the test split", color=INK)
    handles = [
        Line2D([], [], marker=model.shape, color=model.colour, label=model.label, markersize=6) for model in models
    ]
    head(figure, f"{results.suite}: scores by task{part}", handles)
    figure.supxlabel(_interval_note(results), x=0.01, ha="left", fontsize=8.5, color=INK)
    return figure


def _interval_note(results: Results) -> str:
    if results.seeds:
        return f"Marks: mean over {len(results.seeds.values)} seeds; lines: ± 1 standard deviation."
    return "Lines: 95 % intervals, rows resampled within tasks."


# -- candidates -------------------------------------------------------------------------------------------------


def _candidates(results: Results) -> Figure:
    """Validation scores of every candidate, best first, and by λ where a method was tried with several."""
    listed = sorted(results.candidates, key=lambda row: (-row.tasks, -row.validation))
    apart = sorted(results.per_task, key=lambda row: -row.validation)
    families = _families(results.candidates)
    heights = [1.0 + 0.3 * (len(listed) + len(apart)), *([4.2] if families else [])]
    figure = new_figure(0.9 + sum(heights))
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    handles = _candidate_list(panels[0], listed, apart, len(results.held_in))
    if families:
        _by_lambda(panels[1], families, results.search.rungs[0].tasks)
    head(figure, f"{results.suite}: merge candidates", handles)
    figure.supxlabel("Lines: 95 % intervals, rows resampled within tasks.", x=0.01, ha="left", fontsize=8.5, color=INK)
    return figure


def _candidate_list(
    axes: Axes, listed: Sequence[CandidateRow], apart: Sequence[PerTaskRow], tasks: int
) -> list[Line2D]:
    """One line a candidate; returns what the legend shows."""
    blue, pink, red = "#0072B2", "#CC79A7", "#D55E00"
    rows: list[CandidateRow | PerTaskRow] = [*listed, *apart]
    for at, row in enumerate(listed):
        if row.chosen:
            axes.axhspan(at - 0.5, at + 0.5, color="#f6ece6", zorder=0)
        axes.plot(row.interval, [at, at], color=red if row.chosen else blue, alpha=0.45, linewidth=1.6)
        axes.plot(
            [row.validation], [at], "D" if row.chosen else "o", color=red if row.chosen else blue,
            markersize=7 if row.chosen else 6, fillstyle="full" if row.tasks == tasks else "none", zorder=3,
        )  # fmt: skip
    axes.plot([row.validation for row in apart], range(len(listed), len(rows)), "o", color=pink, markersize=6, zorder=3)
    names = [_short(_name(row), 64) for row in rows]
    axes.set_yticks(range(len(rows)), names)
    for tick, row in zip(axes.get_yticklabels(), listed, strict=False):
        tick.set_fontweight("bold" if row.chosen else "normal")
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), [f"{row.tasks} tasks" for row in listed] + ["needs the task"] * len(apart))
    right.tick_params(colors=PALE, length=0, labelsize=8)
    right.spines["right"].set_visible(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    plain(axes)
    axes.set_xlabel("mean validation score over the tasks that a candidate was scored on", color=INK)
    shown = {"chosen": Line2D([], [], marker="D", linestyle="", color=red)}
    if any(row.tasks == tasks and not row.chosen for row in listed):
        shown["scored on all tasks"] = Line2D([], [], marker="o", linestyle="", color=blue)
    if any(row.tasks < tasks for row in listed):
        shown["dropped earlier"] = Line2D([], [], marker="o", linestyle="", color=blue, fillstyle="none")
    if apart:
        shown["needs the task, never chosen"] = Line2D([], [], marker="o", linestyle="", color=pink)
    for label, handle in shown.items():
        handle.set_label(label)
    return list(shown.values())


def _name(row: CandidateRow | PerTaskRow, without: str = "") -> str:
    """The method with λ, p and the parameters that are not its defaults."""
    defaults = {name: taken.default for name, taken in METHODS[row.method].params.items()}
    told = {
        "λ" if name == "lambda" else name: value
        for name, value in row.params.items()
        if name != without and (name in ("lambda", "p") or value != defaults[name])
    }
    return f"{row.method}  {listed_text(told, row.weights)}".strip() + steps_text(row)


def _families(candidates: Sequence[CandidateRow]) -> dict[str, list[tuple[float, float]]]:
    """Candidates that differ in λ alone: name to (λ, mean validation score over the first rung's tasks)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in candidates:
        if row.refined is None and isinstance(value := row.params.get("lambda"), int | float):
            found.setdefault(_name(row, without="lambda"), []).append((value, row.first_rung))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def _by_lambda(axes: Axes, families: Mapping[str, Sequence[tuple[float, float]]], tasks: int) -> None:
    for at, (name, points) in enumerate(families.items()):
        axes.plot(
            *zip(*points, strict=True), color=_CYCLE[at % len(_CYCLE)], marker=_SHAPES[at % len(_SHAPES)],
            linestyle=_DASHES[at // len(_CYCLE) % len(_DASHES)], markersize=6, label=_short(name),
        )  # fmt: skip
    plain(axes)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_xlabel("λ", color=INK)
    axes.set_ylabel("mean validation score", color=INK)
    axes.set_title(f"By λ, on the {tasks} tasks that every candidate was scored on", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2, borderaxespad=0)


# -- loss curves ------------------------------------------------------------------------------------------------


def _losses(results: Results, curves: Sequence[tuple[str, Curve]], part: str) -> Figure:
    """A panel for each expert."""
    columns, height = min(5, len(curves)), 1.85
    lines = math.ceil(len(curves) / columns)
    total = height * lines + 1.0
    # A constrained layout of a hundred panels would take longer than their lines.
    figure = Figure(figsize=(_WIDTH, total), dpi=_DPI)
    panels = figure.subplots(lines, columns, squeeze=False)
    figure.subplots_adjust(0.07, 0.6 / total, 0.99, 1 - 0.65 / total, wspace=0.25, hspace=0.45)
    for axes in panels.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (task, curve) in zip(panels.flat, curves, strict=False):
        axes.plot(*_columns(curve.training), color="#56B4E9", linewidth=1.0, zorder=2)
        axes.plot(
            *_columns(curve.validation), color="#D55E00", linewidth=1.6, marker="o",
            markersize=3.5 if len(curve.validation) <= 20 else 0, zorder=3,
        )  # fmt: skip
        best = results.held_in[task].best_step
        if best is not None:
            axes.axvline(best, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axes.set_title(_short(task, 27), fontsize=8.5, loc="left", pad=3, color=INK)
        plain(axes)
        axes.grid(axis="y", color="#e9e9e9", linewidth=0.8)
        axes.tick_params(labelsize=7.5)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.locator_params(axis="y", nbins=4)
    handles = [
        Line2D([], [], color="#56B4E9", label="training, each batch"),
        Line2D([], [], color="#D55E00", marker="o", markersize=4, label="validation"),
        Line2D([], [], color=INK, linestyle=":", label="step that was kept"),
    ]
    figure.legend(handles=handles, loc="upper right", ncols=3, frameon=False, fontsize=9.5)
    title = f"{results.suite}: loss of the experts{part}".replace("$", r"\$")
    figure.text(0.01, 1 - 0.1 / total, title, va="top", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.53, 0.1 / total, "optimizer step", ha="center", fontsize=9.5, color=INK)
    unit = "an example" if results.objective == "classification" else "a target token"
    figure.text(0.012, 0.5, f"loss, nats {unit}", va="center", rotation="vertical", fontsize=9.5, color=INK)
    return figure


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]
