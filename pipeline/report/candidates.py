"""Merge candidates for people: their parameters in words, their section in report.md, and candidates.csv."""

import csv
import io
import json
from collections.abc import Mapping

from merge.methods.specs import shown_params
from pipeline.records.merge_results import CandidateRow, Chosen, PerTaskRow, RefinedRow, RoundsRow
from pipeline.records.results import Results


def parameters_text(row: CandidateRow | PerTaskRow | Chosen | RoundsRow) -> str:
    """Parameters and weights of a candidate for people."""
    return listed_text(shown_params(row.method, row.params), row.weights)


def steps_text(row: CandidateRow | PerTaskRow | Chosen) -> str:
    """How a merge was trained on, to be put behind its name; "" for one as it is."""
    refined = row.refined if isinstance(row, CandidateRow | Chosen) else None
    return f" + {refined.steps} steps" if refined is not None else ""


def rounds_text(rounds: RoundsRow) -> str:
    """How experts were trained in several rounds."""
    by = f"{rounds.method}{f' ({params})' if (params := parameters_text(rounds)) else ''}"
    return (
        f"experts in {rounds.count} rounds, each from the merge of the one before by {by}; positions of later rounds: "
        f"{rounds.support}"
    )


def rows_text(refined: RefinedRow) -> str:
    """What training on took, beside the experts'."""
    return f"{refined.rows} training rows, {refined.share:.0%} of the experts'"


def listed_text(params: Mapping[str, float | str], weights: Mapping[str, float] | None = None) -> str:
    """Parameters as they are, and weights."""
    parts = [f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in params.items()]
    if weights is not None:
        parts.append("weights " + " ".join(f"{name}:{weight:.3g}" for name, weight in weights.items()))
    return ", ".join(parts)


def candidates_csv(results: Results) -> str:
    """The whole table of the search, those that need the task at inference last (they are in no rung)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    refines = any(row.refined for row in results.candidates)
    more = ["steps", "training_rows"] if refines else []
    writer.writerow(["method", "params", "weights", "rung", "tasks", "validation", "chosen", *more])
    for row in results.candidates:
        trained = [row.refined.steps, row.refined.rows] if row.refined is not None else [0, 0]
        writer.writerow([*_named(row), row.rung, row.tasks, row.validation, row.chosen, *(trained if refines else [])])
    for beside in results.per_task:
        cells = [*_named(beside), "", len(results.held_in), beside.validation, False]
        writer.writerow([*cells, *([0, 0] if refines else [])])
    return out.getvalue()


def _named(row: CandidateRow | PerTaskRow) -> list[str]:
    return [row.method, json.dumps(row.params), "" if row.weights is None else json.dumps(row.weights)]


def candidates_section(results: Results) -> list[str]:
    """The section of report.md: the candidates, and apart from them those that need the task at inference."""
    search, tasks = results.search, len(results.held_in)
    rungs = "; ".join(f"{rung.candidates} candidates on {rung.tasks} tasks" for rung in search.rungs)
    lines = ["## Candidates", "", f"{search.evaluations} validation scores of {tasks} tasks: {rungs}.", ""]
    lines += ["| method | parameters | rung | tasks | mean validation score | chosen |", "|---|---|---:|---:|---:|---|"]
    for row in results.candidates:
        name, rung = f"{row.method}{steps_text(row)}", "" if row.refined else str(row.rung)
        cells = [name, parameters_text(row), rung, str(row.tasks), f"{row.validation:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {'yes' if row.chosen else ''} |")
    if refined := [row.refined for row in results.candidates if row.refined]:
        lines += [
            "",
            "Refined after the search, on rows of all held-in tasks mixed evenly: "
            + "; ".join(f"+ {each.steps} steps, {rows_text(each)}" for each in dict.fromkeys(refined))
            + ".",
        ]
    if results.per_task:
        lines += ["", "## Needs the task at inference", ""]
        lines += ["Never chosen or registered, and not scored on held-out tasks, which have no mask.", ""]
        lines += ["| method | parameters | mean validation score | mean test score, held-in |", "|---|---|---:|---:|"]
        for beside in results.per_task:
            test = "" if beside.test is None else f"{beside.test:.3f}"
            lines.append(f"| {beside.method} | {parameters_text(beside)} | {beside.validation:.3f} | {test} |")
    return lines
