"""A run's outcome made by hand, and results.json files: of that outcome, or with what a test asks for."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from infra.artifacts.manifests import Manifest
from infra.store.s3 import FileRef, Store
from merge.methods.specs import Candidate
from pipeline.config.candidates import Candidates
from pipeline.config.model import PipelineConfig
from pipeline.config.search import Rung, Standing
from pipeline.data.tasks import SPLITS, TaskData
from pipeline.records.outcome import Counters, Inputs, Outcome
from pipeline.records.results import Results
from pipeline.records.score import Score
from pipeline.report.results import build_results
from pipeline.report.summary import summary_table
from workers.base.prepare import PreparedBase

MEAN, TIES, EMR = Candidate("mean"), Candidate("ties", {"lambda": 0.5}), Candidate("emr")
BASE = PreparedBase(Path("/nowhere"), "tiny", "b" * 64, "mit")
ROWS = {"held_in": {"base": (0.0, 0.5), "expert": (0.5, 1.0), "merged": (0.25, 0.75)},
        "held_out": {"base": (0.25,), "merged": (0.5,)}}  # fmt: skip


def manifest(kind: str, letter: str, **meta: Any) -> Manifest:
    key = letter * 64
    return Manifest(key, kind, 1, {}, {"adapter": FileRef(f"objects/{key}/1/adapter", "0" * 64, 10)}, {}, meta)


def score(value: float, n: int) -> Score:
    """`n` is not the same for all tasks, so that a mean over rows would differ."""
    return Score("rouge_l", value, n, value / 2, (value,) * n)


def make(few_shot: int = 2, serving: str | None = "bfloat16", held_out: int = 1, **held_in: Any) -> tuple[Any, Any]:
    """Inputs and outcome of two held-in tasks and one held-out task; `expert=(…)` replaces the experts' scores."""
    tasks = {"held_in": ["alpha", "beta"], "held_out": ["gamma"][:held_out]}
    task = {"source": "jsonl:rows.jsonl", "metric": "rouge_l"}
    config = PipelineConfig.model_validate(
        {
            "suite": "mine",
            "base": "path:/nowhere",
            "held_in": {name: task for name in tasks["held_in"]},
            "held_out": {name: task for name in tasks["held_out"]},
            "train": {"steps": 1},
            "merge": {"candidates": [{"method": "mean"}, {"method": "ties", "params": {"lambda": 0.5}}]},
            "evaluate": {"few_shot": few_shot, "serving_dtype": serving},
        }
    )
    outcome = Outcome(
        experts={"alpha": manifest("expert", "1"), "beta": manifest("expert", "2")},
        merged={MEAN: manifest("merged", "3"),
                TIES: manifest("merged", "4", density=0.1, rounding_loss_bfloat16=0.25)},
        chosen=TIES,
        rungs=(Rung(2, 1), Rung(1, 1)),
        standings={MEAN: Standing(0, 1, 1, 0.25), TIES: Standing(1, 2, 2, 0.5)},
        made=Counters(experts=1, merge_nodes=1, evaluations=9),
        reused=Counters(experts=1, evaluations=2),
        spans=[(100.0, 104.0), (104.0, 106.0)],
        seconds={"experts": 6.0, "merge": 1.0, "evaluate": 2.0, "total": 9.0},
        slots=2,
    )  # fmt: skip
    for group, names in tasks.items():
        for model, values in (ROWS[group] | (held_in if group == "held_in" else {})).items():
            for at, name in enumerate(names):
                outcome.scores[model, "test", name] = score(values[at], 2 + 6 * at)
        for name in names:
            if few_shot:
                outcome.scores["few_shot", "test", name] = score(0.75, 2)
            if serving and group == "held_in":
                outcome.scores["serving", "test", name] = score(0.25, 2)
    for name in tasks["held_in"]:
        for candidate, value in ((MEAN, 0.25), (TIES, 0.5)):
            outcome.scores[candidate.to_json(), "validation", name] = score(value, 2)
    store = Store("bucket", "http://127.0.0.1:9", "suite")
    data = {
        name: TaskData(name, task, dict.fromkeys(SPLITS, ()))
        for name, task in {**config.held_in, **config.held_out}.items()
    }
    inputs = Inputs(config, store, BASE, "bases/b/model.safetensors", data, {}, Candidates((MEAN, TIES)), "run1")
    return inputs, outcome


def results(*arguments: Any, **changes: Any) -> Results:
    """Of the outcome of `make`."""
    return build_results(*make(*arguments, **changes))


def told(found: Results) -> dict[str, Any]:
    """The file, as programs read it."""
    written: dict[str, Any] = json.loads(found.to_json())
    return written


def terminal(found: Results, width: int = 160) -> str:
    """The table as a terminal of that width shows it."""
    console = Console(record=True, width=width, file=StringIO())
    console.print(summary_table(found))
    return console.export_text()


def changed(**changes: Any) -> Results:
    """The results of `make` with other contents, given as JSON: tasks, lists and parameters instead of its own, fields
    of other sections beside its own."""
    tasks = {group: changes.pop(group) for group in ("held_in", "held_out") if group in changes}
    return Results.model_validate(_merged(told(results()), changes) | tasks)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return old | {
        name: _merged(old[name], value) if isinstance(value, dict) and name in old and name != "params" else value
        for name, value in new.items()
    }


def held_in_row(**scores: float) -> dict[str, Any]:
    """A held-in task as JSON."""
    return told(results(few_shot=0, serving=None))["held_in"]["alpha"] | {"intervals": {}} | scores


def held_out_row(**scores: float) -> dict[str, Any]:
    """A held-out task as JSON."""
    return told(results(few_shot=0, serving=None))["held_out"]["gamma"] | {"intervals": {}} | scores
