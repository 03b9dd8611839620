"""report.md: table, candidates and figures of a run, and the Markdown that MLflow's page of the run shares with it."""

from collections.abc import Iterable

from pipeline.records.results import Results
from pipeline.report.candidates import candidates_section
from pipeline.report.gate import gate_section
from pipeline.report.rows import rows_section
from pipeline.report.summary import MEAN, MODELS, TITLES, score_rows, summary_lines
from pipeline.report.training_rows import by_task_section


def bullets(lines: Iterable[str]) -> list[str]:
    """A Markdown list; an indented line belongs to the one before."""
    return [f"  - {line.strip()}" if line.startswith(" ") else f"- {line}" for line in lines]


def markdown_table(results: Results) -> list[str]:
    """Lines of the table of scores."""
    lines = ["| " + " | ".join(TITLES) + " |", "|---|---|" + "---:|" * len(MODELS)]
    for row in score_rows(results):
        cells = [f"**{cell}**" if row[0].startswith(MEAN) and cell else cell for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report_markdown(results: Results, pictures: Iterable[str] = ()) -> str:
    """report.md. `pictures`: names of files beside it, scores….png, candidates….png, training-rows.png and
    loss….png."""
    pictures = list(pictures)
    shown = {
        about: [f"![{about}]({name})" for name in pictures if name.startswith(about)]
        for about in ("scores", "candidates", "training-rows", "loss")
    }
    lines = [
        f"# {results.suite}",
        "",
        f"Run `{results.run_id}`, base {results.base.name} (`{results.base.sha256[:12]}`). "
        "Scores on the test splits, 0-1.",
        "",
        *markdown_table(results),
        "",
        *bullets(summary_lines(results)),
        "",
        *shown["scores"],
        "",
        *gate_section(results.gate),
        *candidates_section(results),
        "",
        *shown["candidates"],
        "",
        *shown["training-rows"],
        "",
        *by_task_section(results),
        *_intervals_section(results),
        *rows_section(results.rows),
    ]
    if shown["loss"]:
        lines += ["", "## Loss of the experts", "", *shown["loss"]]
    return "\n".join([*lines, ""])


def _intervals_section(results: Results) -> list[str]:
    lines = [
        "## Intervals (95 %, rows resampled within tasks)",
        "",
        "| mean of | score | interval |",
        "|---|---:|---|",
    ]
    for group, summary in (("held-in", results.summary.held_in), ("held-out", results.summary.held_out)):
        for model in ("base", "expert", "merged", "multitask", "routed"):
            mean, interval = getattr(summary, model, None), getattr(summary, f"{model}_interval", None)
            if mean is not None and interval is not None:
                lines.append(f"| {group}, {model} | {mean:.3f} | {interval[0]:.3f} to {interval[1]:.3f} |")
    return lines
