"""What MLflow's page of a finished run shows besides its artifacts: metrics by task, description, tags.

Pure functions of results.json. MLflow makes a section of charts of what stands before a metric's slash and sorts the
sections by name: means first (`held_in/…`), then the tasks (`test_expert/…`).
"""

import re
from collections.abc import Collection, Iterable

from mlflow.entities import SourceType
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER

from infra.registry.runs import MERGED
from pipeline.records.results import MODELS, Results, scores
from pipeline.report.candidates import parameters_text, steps_text
from pipeline.report.markdown import bullets, markdown_table
from pipeline.report.summary import summary_lines

_ROOM = 4900
"""Characters of a description; MLflow takes 5000."""


def metrics(results: Results) -> dict[str, float]:
    """Numbers of the parent run: means of the groups, scores by task, seconds."""
    found: dict[str, float] = {}
    for group, summary in results.summary:
        for name, value in summary:
            if isinstance(value, int | float):
                found[f"{group}/{name}"] = float(value)
    rows = {task: scores(row) for task, row in results.held_in.items()}
    rows |= {task: scores(row) for task, row in results.held_out.items()}
    names = metric_names(rows)
    for model in MODELS:
        found |= {f"test_{model}/{names[task]}": row[model] for task, row in rows.items() if model in row}
    found |= {f"run/{name}": float(value) for name, value in results.seconds if value is not None}
    if results.slot_utilisation is not None:
        found["run/slot_utilisation"] = results.slot_utilisation
    return found


def metric_names(tasks: Iterable[str]) -> dict[str, str]:
    """The tasks' names with what MLflow refuses in a metric's name replaced by `-`; each is another one."""
    names: dict[str, str] = {}
    for task in tasks:
        name = re.sub(r"[^\w.\- ]|^\.+$", "-", task)[:150]
        while name in names.values():
            name += "-"
        names[task] = name
    return names


def tags(results: Results) -> dict[str, str]:
    """What helps to tell runs apart in a table of them."""
    return {
        "chosen": f"{results.chosen.method} {parameters_text(results.chosen)}{steps_text(results.chosen)}".strip()[
            :500
        ],
        "experts": f"{results.made.experts} made, {results.reused.experts} reused",
    }


def description(results: Results, path: str, report: Collection[str]) -> str:
    """Markdown of the parent run. `path`: of the run's page (`infra.registry.runs.run_path`); `report`: the files in
    it.

    The first lines are what is seen before "Show more". The table is left out where it does not fit.
    """
    held_in, held_out = results.summary.held_in, results.summary.held_out
    low, high = held_in.merged_interval
    means = (
        f"**Merged {held_in.merged:.3f}** (95 % interval {low:.3f} to {high:.3f}), experts {held_in.expert:.3f}, "
        f"base {held_in.base:.3f}: means of {len(results.held_in)} held-in tasks"
    )
    if held_out.merged is not None and held_out.base is not None:
        means += f"; of {len(results.held_out)} held-out tasks: merged {held_out.merged:.3f}, base {held_out.base:.3f}"
    files = ("report.html", "scores.png", "candidates.png", "training-rows.png", "loss.png", "results.json")
    links = " · ".join(f"[{name}]({path}/artifacts/report/{name})" for name in files if name in report)
    if merge := results.gate.models.get(MERGED):
        links += f" · [{merge.name} version {merge.version}](#/models/{merge.name}/versions/{merge.version})"
    head = [f"{means}.", links, "\n".join(bullets(summary_lines(results)))]
    whole = "\n\n".join([*head, "\n".join(markdown_table(results))])
    return whole if len(whole) <= _ROOM else _cut("\n\n".join(head))


def _cut(text: str) -> str:
    """At most what MLflow takes, in whole lines where they are not too long."""
    if len(text) <= _ROOM:
        return text
    end = text.rfind("\n", _ROOM // 2, _ROOM)
    return text[: end if end > 0 else _ROOM]


def failure(error: str) -> str:
    """Markdown of a run that failed: what the terminal said."""
    text = f"**Failed.** Finished work is kept; the next run continues from there.\n\n```\n{error}"
    return f"{_cut(text)}\n```"


def source(user: str, commit: str | None, submitted: bool) -> dict[str, str]:
    """Tags that fill the columns of MLflow's table of runs: who started a run, and which code it runs."""
    found = {
        MLFLOW_USER: user,
        MLFLOW_SOURCE_NAME: "pipeline/main.py",
        MLFLOW_SOURCE_TYPE: SourceType.to_string(SourceType.JOB if submitted else SourceType.LOCAL),
        MLFLOW_GIT_COMMIT: commit or "",
    }
    return {name: value for name, value in found.items() if value}


def experiment(suite: str) -> str:
    """What explains the experiment to who finds it; plain text, because the list of experiments shows it as it is."""
    return (
        "Each run makes or reuses an expert per task, merges them and scores everything; below it stand the experts "
        f"that it made. Registered models: {suite}.{MERGED} and one per task."
    )
