"""What a run reports: results.json, report.md and the table in the terminal, all from one outcome.

Scores lie in 0-1, Matthews' correlation in -1 to 1. Summaries are unweighted means over tasks with a 95 % bootstrap
interval (rows resampled within tasks). The names in results.json are an interface: add, never rename.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from merge.methods.specs import Candidate, shown_params
from pipeline.config.search import task_order
from pipeline.data.counting import rows_json
from pipeline.data.tasks import learned_elsewhere
from pipeline.records.outcome import Inputs, Outcome, utilisation
from pipeline.records.score import ScoreKey
from pipeline.report.gate import gate_lines, gate_results, gate_section
from pipeline.report.rows import lost_lines, rows_section
from workers.scoring.metrics import bootstrap_interval


def build_results(inputs: Inputs, outcome: Outcome) -> dict[str, Any]:
    """The content of results.json."""
    assert outcome.chosen is not None
    config = inputs.config
    held_in = {task: _held_in(inputs, outcome, task) for task in config.held_in}
    held_out = {task: _held_out(inputs, outcome, task) for task in config.held_out}
    seed = config.seed
    base, expert, merged = (_mean(held_in, name) for name in ("base", "expert", "merged"))
    chosen = outcome.merged[outcome.chosen]
    summary_in: dict[str, Any] = {
        "base": base,
        "expert": expert,
        "merged": merged,
        "retention": (merged - base) / (expert - base) if expert > base + 0.01 else None,
        **{
            f"{name}_interval": interval(outcome, name, list(config.held_in), seed)
            for name in ("base", "expert", "merged")
        },
        "format_free": {name: _mean([row["format_free"] for row in held_in.values()], name) for name in _MODELS},
        "experts_above_base": sum(row["expert"] > row["base"] for row in held_in.values()),
    }
    summary_out: dict[str, Any] = {"base": None, "merged": None}
    if held_out:
        summary_out = {
            "base": _mean(held_out, "base"),
            "merged": _mean(held_out, "merged"),
            **{f"{n}_interval": interval(outcome, n, list(config.held_out), seed) for n in ("base", "merged")},
            "format_free": {
                name: _mean([row["format_free"] for row in held_out.values()], name) for name in ("base", "merged")
            },
        }
    if all("base_few_shot" in row for row in held_in.values()):
        summary_in["base_few_shot"] = _mean(held_in, "base_few_shot")
        summary_in["base_few_shot_interval"] = interval(outcome, "few_shot", list(config.held_in), seed)
        if held_out:
            summary_out["base_few_shot"] = _mean(held_out, "base_few_shot")
            summary_out["base_few_shot_interval"] = interval(outcome, "few_shot", list(config.held_out), seed)
    if config.evaluate.serving_dtype:
        summary_in["merged_serving"] = _mean(held_in, "merged_serving")
    return {
        "run_id": inputs.run_id,
        "suite": config.suite,
        "objective": config.objective,
        "expert": config.expert,
        "base": {"name": inputs.base.name, "sha256": inputs.base.sha256},
        "held_in": held_in,
        "held_out": held_out,
        "summary": {"held_in": summary_in, "held_out": summary_out},
        "candidates": [_candidate(inputs, outcome, candidate) for candidate in inputs.candidates.eligible],
        "search": {
            "budget": config.merge.search.evaluations,
            "evaluations": sum(standing.tasks for standing in outcome.standings.values()),
            "rungs": [{"candidates": rung.candidates, "tasks": rung.tasks} for rung in outcome.rungs],
        },
        "per_task": [_per_task(outcome, candidate) for candidate in inputs.candidates.per_task],
        "chosen": {
            **outcome.chosen.to_dict(),
            "key": chosen.key,
            "digest": chosen.digest,
            "uri": inputs.store.uri(chosen.files["adapter"].name),
            "density": chosen.meta["density"],
            "bytes": chosen.files["adapter"].size,
            "swap_seconds": _swap_seconds(outcome),
            "serving_dtype": config.evaluate.serving_dtype,
            "rounding_loss_bfloat16": chosen.meta["rounding_loss_bfloat16"],
        },
        "learned_elsewhere": learned_elsewhere(inputs.tasks, config.held_in),
        "rows": {task: rows_json(data) for task, data in inputs.tasks.items()},
        "export": _export(inputs, outcome),
        "gate": gate_results(inputs, outcome),
        "made": vars(outcome.made),
        "reused": vars(outcome.reused),
        "seconds": outcome.seconds,
        "slots": outcome.slots,
        "slot_utilisation": utilisation(outcome),
    }


_MODELS = ("base", "expert", "merged")


def _swap_seconds(outcome: Outcome) -> float | None:
    """Mean seconds that an evaluator took to fetch and apply the chosen merge; None of scores that are older than this
    figure."""
    assert outcome.chosen is not None
    asked = (("merged", "test"), (outcome.chosen.to_json(), "validation"))  # tested last, it may be in place already
    scores = [score for (model, split, _), score in outcome.scores.items() if (model, split) in asked]
    seconds = [score.swap_seconds for score in scores if score.swap_seconds]
    return sum(seconds) / len(seconds) if seconds else None


def _held_in(inputs: Inputs, outcome: Outcome, task: str) -> dict[str, Any]:
    manifest = outcome.experts[task]
    scores = {model: outcome.scores[ScoreKey(model, "test", task)] for model in _MODELS}
    row = {
        "metric": scores["base"].metric,
        **{model: scores[model].score for model in _MODELS},
        "intervals": _intervals(outcome, task, inputs.config.seed),
        "n_test": scores["base"].n,
        "format_free": {model: scores[model].format_free for model in _MODELS},
        "expert_run_id": manifest.meta.get("run_id"),
        "best_step": manifest.meta.get("best_step"),
        "expert_key": manifest.key,
        "expert_digest": manifest.digest,
        "expert_uri": inputs.store.uri(manifest.files["adapter"].name),
    }
    return row | _optional(outcome, task)


def _held_out(inputs: Inputs, outcome: Outcome, task: str) -> dict[str, Any]:
    scores = {model: outcome.scores[ScoreKey(model, "test", task)] for model in ("base", "merged")}
    row = {
        "metric": scores["base"].metric,
        **{model: found.score for model, found in scores.items()},
        "intervals": _intervals(outcome, task, inputs.config.seed),
        "n_test": scores["base"].n,
        "format_free": {model: found.format_free for model, found in scores.items()},
    }
    return row | _optional(outcome, task)


def _optional(outcome: Outcome, task: str) -> dict[str, float]:
    """Scores that a configuration can switch off."""
    names = {"few_shot": "base_few_shot", "serving": "merged_serving"}
    return {
        name: outcome.scores[ScoreKey(model, "test", task)].score
        for model, name in names.items()
        if ScoreKey(model, "test", task) in outcome.scores
    }


def _intervals(outcome: Outcome, task: str, seed: int) -> dict[str, list[float]]:
    """95 % intervals of a task's test scores by their names in its row."""
    named = {**{model: model for model in _MODELS}, "few_shot": "base_few_shot"}
    known = {model: name for model, name in named.items() if ScoreKey(model, "test", task) in outcome.scores}
    return {name: interval(outcome, model, [task], seed) for model, name in known.items()}


def _candidate(inputs: Inputs, outcome: Outcome, candidate: Candidate) -> dict[str, Any]:
    """A candidate's row: how far it came, and the mean validation score over the tasks it was scored on.

    `first_rung` is the mean over the tasks on which every candidate was scored.
    """
    standing, model, seed = outcome.standings[candidate], candidate.to_json(), inputs.config.seed
    tasks = task_order(list(inputs.config.held_in), seed)[: standing.tasks]
    first = tasks[: outcome.rungs[0].tasks]
    return {
        **candidate.to_dict(),
        "validation": standing.mean,
        "interval": interval(outcome, model, list(tasks), seed, "validation"),
        "first_rung": math.fsum(outcome.scores[ScoreKey(model, "validation", task)].score for task in first)
        / len(first),
        "tasks": standing.tasks,
        "rung": standing.rung,
        "chosen": candidate == outcome.chosen,
    }


def _per_task(outcome: Outcome, candidate: Candidate) -> dict[str, Any]:
    """A candidate that needs the task at inference; test scores for each method's best on validation."""
    row: dict[str, Any] = {**candidate.to_dict(), "validation": outcome.mean(candidate, "validation")}
    if candidate in outcome.per_task.values():
        model = candidate.to_json()
        row |= {
            "test": outcome.mean(candidate, "test"),
            "tasks": {task: outcome.scores[ScoreKey(model, "test", task)].score for task in outcome.experts},
            "mask_bytes": {task: outcome.masks[candidate, task].files["mask"].size for task in outcome.experts},
        }
    return row


def _export(inputs: Inputs, outcome: Outcome) -> dict[str, Any] | None:
    """The chosen merge as a full checkpoint, if one was made."""
    checkpoint = outcome.checkpoint
    if checkpoint is None:
        return None
    first = next(iter(checkpoint.files.values()))
    return {
        "key": checkpoint.key,
        "digest": checkpoint.digest,
        "uri": inputs.store.uri(first.name.rpartition("/")[0] + "/"),
        "dtype": checkpoint.config["dtype"],
        "bytes": sum(file.size for file in checkpoint.files.values()),
        "files": sorted(checkpoint.files),
    }


def _mean(rows: dict[str, dict[str, Any]] | Sequence[dict[str, float]], name: str) -> float:
    values = [row[name] for row in (rows.values() if isinstance(rows, dict) else rows)]
    return float(sum(values) / len(values))


def interval(outcome: Outcome, model: str, tasks: list[str], seed: int, split: str = "test") -> list[float]:
    """95 % bootstrap interval of a model's mean score over tasks."""
    return list(
        bootstrap_interval([outcome.scores[ScoreKey(model, split, task)].resampled for task in tasks], seed=seed)
    )


# -- for people -------------------------------------------------------------------------------------------------


def _rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Task, metric, base, few-shot base, expert, merged - as text, held-in first, means after each group."""
    rows = []
    for group, title in (("held_in", "mean of held-in"), ("held_out", "mean of held-out")):
        tasks, summary = results[group], results["summary"][group]
        seeds = results.get("seeds", {"tasks": {group: {}}, "summary": {group: {}}})
        for task, row in tasks.items():
            spread = seeds["tasks"][group].get(task, {})
            rows.append((task, row["metric"], *(_score(row.get(c), spread.get(c)) for c in _COLUMNS)))
        if tasks:
            rows.append((title, "", *(_score(summary.get(c), seeds["summary"][group].get(c)) for c in _COLUMNS)))
    return rows


_COLUMNS = ("base", "base_few_shot", "expert", "merged")
_TITLES = ("task", "metric", "base", "base few-shot", "expert", "merged")


def _score(value: float | None, spread: dict[str, Any] | None = None) -> str:
    """A score, or its mean and standard deviation over seeds; the base has none."""
    if value is None:
        return ""
    return f"{spread['mean']:.2f} ± {spread['sd']:.2f}" if spread and spread["sd"] else f"{value:.2f}"


def summary_table(results: dict[str, Any]) -> Table:
    """The table for the terminal."""
    table = Table(title=f"{results['suite']}: scores on the test splits", title_justify="left")
    for title in _TITLES:
        table.add_column(title, justify="left" if title in ("task", "metric") else "right", no_wrap=True)
    for row in _rows(results):
        mean = row[0].startswith("mean of ")
        table.add_row(*(Text(cell) for cell in row), style="bold" if mean else None, end_section=mean)
    return table


def summary_lines(results: dict[str, Any]) -> list[str]:
    """What stands under the table."""
    held_in, chosen = results["summary"]["held_in"], results["chosen"]
    low, high = held_in["merged_interval"]
    params = parameters_text(chosen)
    retention = "undefined" if held_in["retention"] is None else f"{held_in['retention']:.0%}"
    lines = [
        f"chosen on validation: {chosen['method']}{f' ({params})' if params else ''}; the merge keeps {retention} of "
        f"the experts' gain (merged {held_in['merged']:.3f}, 95 % interval {low:.3f} to {high:.3f})",
        f"experts above base: {held_in['experts_above_base']} of {len(results['held_in'])}",
        "format-free scores, held-in: "
        + ", ".join(f"{model} {held_in['format_free'][model]:.3f}" for model in _MODELS),
    ]
    if "merged_serving" in held_in:
        lines.append(
            f"merged weights rounded to {chosen['serving_dtype']}: score {held_in['merged_serving']:.3f}; "
            f"rounding to bfloat16 loses {chosen['rounding_loss_bfloat16']:.0%} of the merged change's norm"
        )
    lines.append(_size_line(chosen))
    best = [row for row in results["per_task"] if "test" in row]
    if best:
        lines.append(
            "with the task known at inference, held-in: "
            + ", ".join(f"{row['method']} {row['test']:.3f}" for row in best)
            + " (beside the choice, not registered)"
        )
    if results["export"]:
        lines.append(f"full checkpoint in {results['export']['dtype']}: {results['export']['uri']}")
    if learned := results["learned_elsewhere"]:
        counts = ", ".join(f"{count} of {task}" for task, count in learned.items())
        lines.append(f"test rows that another task's expert has learned from, which favours the merge: {counts}")
    lines += lost_lines(results)
    if "seeds" in results:
        spread = results["seeds"]["summary"]["held_in"]
        lines.append(
            f"over seeds {', '.join(map(str, results['seeds']['values']))} (mean ± sd; lines above: the first): "
            + ", ".join(f"{name} {of['mean']:.3f} ± {of['sd']:.3f}" for name, of in spread.items() if of["sd"])
        )
    lines += gate_lines(results)
    made, reused, seconds = results["made"], results["reused"], results["seconds"]
    lines.append("made:   " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in made.items()))
    lines.append("reused: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in reused.items()))
    used = results["slot_utilisation"]
    lines.append(
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        + (f"; {results['slots']} slots {used:.0%} busy with experts" if used is not None else "")
    )  # fmt: skip
    return lines


def _size_line(chosen: dict[str, Any]) -> str:
    """What the chosen merge takes to keep and to load."""
    swap = f", {chosen['swap_seconds']:.1f} s to fetch and apply in an evaluator" if chosen["swap_seconds"] else ""
    return f"merged adapter: {chosen['bytes'] / 1e6:.0f} MB, {chosen['density']:.0%} of the adapted weights{swap}"


def parameters_text(row: Mapping[str, Any]) -> str:
    """Parameters and weights of a candidate for people."""
    return listed_text(shown_params(row["method"], row["params"]), row.get("weights"))


def listed_text(params: Mapping[str, Any], weights: Mapping[str, float] | None = None) -> str:
    """Parameters as they are, and weights."""
    parts = [f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in params.items()]
    if weights is not None:
        parts.append("weights " + " ".join(f"{name}:{weight:.3g}" for name, weight in weights.items()))
    return ", ".join(parts)


def candidates_csv(results: dict[str, Any]) -> str:
    """The whole table of the search, those that need the task at inference last (they are in no rung)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "params", "weights", "rung", "tasks", "validation", "chosen"])
    for row in [*results["candidates"], *results["per_task"]]:
        scored = len(results["held_in"]) if "rung" not in row else row["tasks"]
        weights = json.dumps(row["weights"]) if "weights" in row else ""
        cells = [row["method"], json.dumps(row["params"]), weights, row.get("rung", ""), scored, row["validation"]]
        writer.writerow([*cells, row.get("chosen", False)])
    return out.getvalue()


def bullets(lines: Iterable[str]) -> list[str]:
    """A Markdown list; an indented line belongs to the one before."""
    return [f"  - {line.strip()}" if line.startswith(" ") else f"- {line}" for line in lines]


def markdown_table(results: dict[str, Any]) -> list[str]:
    """Lines of the table of scores."""
    lines = ["| " + " | ".join(_TITLES) + " |", "|---|---|" + "---:|" * len(_COLUMNS)]
    for row in _rows(results):
        cells = [f"**{cell}**" if row[0].startswith("mean of ") and cell else cell for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report_markdown(results: dict[str, Any], pictures: Iterable[str] = ()) -> str:
    """report.md: table, candidates and figures of the run. `pictures`: names of files beside it, scores….png,
    candidates….png and loss….png."""
    pictures = list(pictures)
    shown = {
        about: [f"![{about}]({name})" for name in pictures if name.startswith(about)]
        for about in ("scores", "candidates", "loss")
    }
    lines = [
        f"# {results['suite']}",
        "",
        f"Run `{results['run_id']}`, base {results['base']['name']} (`{results['base']['sha256'][:12]}`). "
        "Scores on the test splits, 0-1.",
        "",
        *markdown_table(results),
        "",
        *bullets(summary_lines(results)),
        "",
        *shown["scores"],
        "",
        *gate_section(results),
        *_search_section(results),
        "",
        *shown["candidates"],
    ]
    lines += [
        "",
        "## Intervals (95 %, rows resampled within tasks)",
        "",
        "| mean of | score | interval |",
        "|---|---:|---|",
    ]
    for group, summary in results["summary"].items():
        for model in _MODELS:
            if summary.get(model) is not None:
                low, high = summary[f"{model}_interval"]
                lines.append(f"| {group.replace('_', '-')}, {model} | {summary[model]:.3f} | {low:.3f} to {high:.3f} |")
    lines += rows_section(results)
    if shown["loss"]:
        lines += ["", "## Loss of the experts", "", *shown["loss"]]
    return "\n".join([*lines, ""])


def _search_section(results: dict[str, Any]) -> list[str]:
    """The candidates, and apart from them those that need the task at inference."""
    search, tasks = results["search"], len(results["held_in"])
    rungs = "; ".join(f"{rung['candidates']} candidates on {rung['tasks']} tasks" for rung in search["rungs"])
    lines = ["## Candidates", "", f"{search['evaluations']} validation scores of {tasks} tasks: {rungs}.", ""]
    lines += ["| method | parameters | rung | tasks | mean validation score | chosen |", "|---|---|---:|---:|---:|---|"]
    for row in results["candidates"]:
        cells = [row["method"], parameters_text(row), str(row["rung"]), str(row["tasks"]), f"{row['validation']:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {'yes' if row['chosen'] else ''} |")
    if results["per_task"]:
        lines += ["", "## Needs the task at inference", ""]
        lines += ["Never chosen or registered, and not scored on held-out tasks, which have no mask.", ""]
        lines += ["| method | parameters | mean validation score | mean test score, held-in |", "|---|---|---:|---:|"]
        for row in results["per_task"]:
            test = f"{row['test']:.3f}" if "test" in row else ""
            lines.append(f"| {row['method']} | {parameters_text(row)} | {row['validation']:.3f} | {test} |")
    return lines


def results_json(results: dict[str, Any]) -> str:
    """results.json as text; NaN would not be JSON and is an error."""
    return json.dumps(results, indent=2, allow_nan=False) + "\n"
