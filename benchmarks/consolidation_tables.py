"""Tables and picture of benchmarks/consolidation.py, from results.json files. Means and standard errors are over seeds;
a paired difference also has that over tasks, each with its mean over seeds."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pipeline_runs import spread, standard_error
from pipeline.records.results import Results
from pipeline.report.candidates import parameters_text

MERGED, FROM_BASE = "merged", "multitask"
"""What a run trains on: the best merge, or the base; names of their scores in results.json."""


@dataclass(frozen=True)
class Measured:
    """One run: a part of a suite with one seed."""

    suite: str
    part: str
    seed: int
    results: Results
    seconds: Mapping[str, float] | None = None
    """Of what it made anew, by kind of artifact."""


@dataclass(frozen=True)
class Row:
    """One model of one suite, a result for each of its seeds."""

    label: str
    model: str
    """Name of its scores."""
    found: Sequence[Measured]

    @property
    def rows(self) -> list[int]:
        """Training rows beyond the experts'; of the experts, and of what has no experts, all of them."""
        return [_trained(each.results, self.model)[0] for each in self.found]

    @property
    def share(self) -> list[float]:
        """The same as a share of the experts' rows."""
        return [_trained(each.results, self.model)[1] for each in self.found]

    @property
    def held_in(self) -> list[float]:
        return [getattr(each.results.summary.held_in, self.model) for each in self.found]

    @property
    def gain(self) -> list[float]:
        """Shares of the experts' gain, by seed."""
        means = [each.results.summary.held_in for each in self.found]
        return [(getattr(mean, self.model) - mean.base) / (mean.expert - mean.base) for mean in means]

    @property
    def held_out(self) -> list[float] | None:
        """None of models that are not scored there."""
        found = [getattr(each.results.summary.held_out, self.model, None) for each in self.found]
        return None if None in found else found

    @property
    def beyond_base(self) -> list[float] | None:
        """Held-out, the difference to the base."""
        bases = [each.results.summary.held_out.base for each in self.found]
        if self.held_out is None or None in bases:
            return None
        return [score - base for score, base in zip(self.held_out, bases, strict=True) if base is not None]


def _trained(results: Results, model: str) -> tuple[int, float]:
    """Rows and their share."""
    told = results.chosen.refined if model == MERGED else results.multitask if model == FROM_BASE else None
    return (told.rows, told.share) if told is not None else (0, 0.0)


def rows_of(found: Sequence[Measured]) -> list[Row]:
    """The models of one suite, in the order in which a table has them. What every run has is read of one run a seed."""
    once = list({each.seed: each for each in found}.values())
    rows = [Row("base", "base", once[:1])]  # seeds do not change it
    if all(each.results.summary.held_in.base_few_shot is not None for each in once):
        rows.append(Row("few-shot base", "base_few_shot", once[:1]))
    as_it_is = {each.seed: each for each in found if not refined([each])}
    if as_it_is:
        rows.append(Row("best merge", MERGED, list(as_it_is.values())))
    for part in dict.fromkeys(each.part for each in found):
        own = [each for each in found if each.part == part]
        if refined(own):
            rows.append(Row(f"best merge + {part}", MERGED, own))
        if all(each.results.multitask is not None for each in own):
            steps = sorted({each.results.multitask.steps for each in own if each.results.multitask is not None})
            rows.append(Row(f"base + {' or '.join(map(str, steps))} steps", FROM_BASE, own))
    return [*rows, Row("experts", "expert", once)]


def refined(found: Iterable[Measured]) -> bool:
    """Whether these runs had refined merges to choose among."""
    return any(row.refined is not None for each in found for row in each.results.candidates)


def by_suite(found: Iterable[Measured]) -> dict[str, list[Measured]]:
    suites: dict[str, list[Measured]] = {}
    for each in found:
        suites.setdefault(each.suite, []).append(each)
    return suites


# -- tables -----------------------------------------------------------------------------------------------------


def tables(found: Sequence[Measured]) -> str:
    """Markdown: scores, paired differences, what was chosen, and the work of a night where one was measured."""
    suites = by_suite(found)
    parts = [_scores(suites), _paired(suites), _chosen(found), _nights(found)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _scores(suites: Mapping[str, Sequence[Measured]]) -> list[str]:
    lines = [
        "| suite | model | training rows beyond the experts' | of the experts' rows | held-in | of the experts' gain | "
        "held-out | beyond the base |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for suite, found in suites.items():
        seeds = sorted({each.seed for each in found})
        lines.append(f"| **{suite}** (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}) | | | | | | | |")
        for row in rows_of(found):
            label = row.label + _fewer(row, len(seeds))
            cells = [_rows_cell(row), _share_cell(row), spread(row.held_in), spread(row.gain, percent=True)]
            cells += [spread(row.held_out) if row.held_out else ""]
            cells += [spread(row.beyond_base, signed=True) if row.beyond_base and row.model != "base" else ""]
            lines.append(f"| | {label} | {' | '.join(cells)} |")
    return lines


def _fewer(row: Row, seeds: int) -> str:
    """What a row's label has to say of its seeds: how many, and whether the merge was chosen as it was."""
    own, kept = len(row.found), sum(each.results.chosen.refined is None for each in row.found)
    notes = [f"{own} of {seeds} seeds"] if own < seeds and row.model in (MERGED, FROM_BASE) else []
    if row.model == MERGED and "+" in row.label and kept:
        notes.append(f"in {kept} of {own} the merge as it was had the better validation score")
    return f" ({'; '.join(notes)})" if notes else ""


def _rows_cell(row: Row) -> str:
    return f"{statistics.fmean(row.rows):.0f}" if row.model in (MERGED, FROM_BASE) else ""


def _share_cell(row: Row) -> str:
    return f"{statistics.fmean(row.share):.0%}".replace("%", " %") if row.model in (MERGED, FROM_BASE) else ""


def _paired(suites: Mapping[str, Sequence[Measured]]) -> list[str]:
    """Refined merge against the same steps from the base, in the same run."""
    lines = []
    for suite, found in suites.items():
        for part in dict.fromkeys(each.part for each in found):
            own = [each for each in found if each.part == part]
            if refined(own) and all(each.results.multitask is not None for each in own):
                by_task, by_seed = differences([each.results for each in own])
                cells = [part, spread(by_task, signed=True), _ratio(by_task), spread(by_seed, signed=True)]
                lines.append(f"| {suite} | {' | '.join(cells)} |")
    head = [
        "The best merge after so many steps, less the same steps from the base (held-in; mean ± standard error):",
        "",
        "| suite | steps | difference, over tasks | in standard errors | over seeds |",
        "|---|---|---:|---:|---:|",
    ]
    return [*head, *lines] if lines else []


def differences(results: Sequence[Results]) -> tuple[list[float], list[float]]:
    """Score of the merge less that of the adapter from the base: of each held-in task, its mean over seeds; of each
    seed, its mean over tasks."""
    table = [[row.merged - (row.multitask or 0.0) for row in each.held_in.values()] for each in results]
    return [statistics.fmean(column) for column in zip(*table, strict=True)], [statistics.fmean(row) for row in table]


def _ratio(values: Sequence[float]) -> str:
    error = standard_error(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values) / error:.1f}" if error else ""


def _chosen(found: Sequence[Measured]) -> list[str]:
    lines = ["| suite | seed | part | chosen on validation |", "|---|---:|---|---|"]
    for each in found:
        chosen = each.results.chosen
        steps = f" + {chosen.refined.steps} steps" if chosen.refined is not None else ""
        text = f"{chosen.method} {parameters_text(chosen)}{steps}"
        lines.append(f"| {each.suite} | {each.seed} | {each.part} | {text} |")
    return lines


def _nights(found: Sequence[Measured]) -> list[str]:
    """Work of the night after a task changed, by way; seconds as the manifests have them, scores of candidates on
    validation rows among them."""
    lines = [
        "After one task changed: seconds of work by kind, and the score.",
        "",
        "| suite | seed | way | seconds | of these | held-in |",
        "|---|---:|---|---:|---|---:|",
    ]
    for each in found:
        if each.seconds is None:
            continue
        scratch = {kind: value for kind, value in each.seconds.items() if kind == FROM_BASE}
        rest = {kind: value for kind, value in each.seconds.items() if kind != FROM_BASE}
        summary = each.results.summary.held_in
        ways = [(f"retrain, merge, {each.part}", rest, summary.merged)] if refined([each]) else []
        if scratch and summary.multitask is not None:
            ways.append(("multitask from the base", scratch, summary.multitask))
        for way, seconds, score in ways:
            kinds = ", ".join(f"{kind} {value:.0f}" for kind, value in seconds.items())
            lines.append(
                f"| {each.suite} | {each.seed} | {way} | {sum(seconds.values()):.0f} | {kinds} | {score:.3f} |"
            )
    return lines if len(lines) > 4 else []


# -- picture ----------------------------------------------------------------------------------------------------

_WAYS: tuple[tuple[str, str, str, str], ...] = (
    (MERGED, "best merge, then steps", "#D55E00", "D"),
    (FROM_BASE, "base, then the same steps", "#0072B2", "o"),
)
_LEVELS = (("base_few_shot", "few-shot base", ":"), ("expert", "experts", "--"))


def picture(found: Sequence[Measured]) -> bytes:
    """Score against training rows, a line of panels for each suite: held-in left, held-out right."""
    suites = by_suite(found)
    figure = Figure(figsize=(11, 0.5 + 3.4 * len(suites)), dpi=110, layout="constrained")
    grid = figure.subplots(len(suites), 2, squeeze=False)
    for (suite, own), panels in zip(suites.items(), grid, strict=True):
        rows = rows_of(own)
        _panel(panels[0], rows, f"{suite}: held-in", lambda row: row.held_in)
        _panel(panels[1], rows, f"{suite}: held-out", lambda row: row.held_out)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.supxlabel(
        "Lines at marks: ± 1 standard error over seeds, where there are several.", fontsize=8.5, x=0.01, ha="left"
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panel(axes: Axes, rows: Sequence[Row], title: str, scores: Callable[[Row], Sequence[float] | None]) -> None:
    for model, label, colour, shape in _WAYS:
        points: list[tuple[float, float, float]] = []
        for row in rows:
            values = scores(row)
            if values and (row.model == model or (model == FROM_BASE and row.model == "base")):
                error = standard_error(values) if len(values) > 1 else 0.0
                points.append((statistics.fmean(row.rows), statistics.fmean(values), error))
        if points:
            x, y, errors = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, errors, color=colour, marker=shape, label=label, capsize=2, clip_on=False)
    for model, label, dashes in _LEVELS:
        levels = [values for row in rows if row.model == model and (values := scores(row))]
        if levels:
            axes.axhline(statistics.fmean(levels[0]), color="#333333", linestyle=dashes, linewidth=1, label=label)
    largest = max(max(row.rows) for row in rows)
    axes.set_xscale("symlog", linthresh=max(1, largest / 20))
    ticks = sorted({round(statistics.fmean(row.rows)) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("training rows, those of the experts left out")
    axes.set_ylabel("mean score on test rows")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e3e3", linewidth=0.8)
