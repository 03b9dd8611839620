"""What a run reports, from an outcome made by hand: names, means, what is left out, and that people can read it."""

import csv
import io
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infra.artifacts.manifests import Manifest
from infra.store.s3 import FileRef, Store
from merge.methods.specs import Candidate
from pipeline.config.candidates import Candidates
from pipeline.config.model import PipelineConfig
from pipeline.config.search import Rung, Standing
from pipeline.data.tasks import SPLITS, TaskData
from pipeline.records.outcome import Counters, Inputs, Outcome
from pipeline.records.score import Score, ScoreKey
from pipeline.report.results import (
    build_results,
    bullets,
    candidates_csv,
    parameters_text,
    report_markdown,
    results_json,
    summary_lines,
    summary_table,
)
from workers.base.prepare import PreparedBase
from workers.text.rows import Row

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


def results(*arguments: Any, **changes: Any) -> dict[str, Any]:
    return build_results(*make(*arguments, **changes))


def text(found: dict[str, Any], width: int = 160) -> str:
    console = Console(record=True, width=width, file=StringIO())
    console.print(summary_table(found))
    return console.export_text()


def test_the_names_that_other_programs_read() -> None:
    found = results()
    assert {"run_id", "base", "held_in", "held_out", "summary", "candidates", "chosen", "made", "reused", "seconds",
            "slot_utilisation"} <= set(found)  # fmt: skip
    assert (found["run_id"], found["base"]) == ("run1", {"name": "tiny", "sha256": "b" * 64})
    assert list(found["held_in"]) == ["alpha", "beta"]
    alpha = found["held_in"]["alpha"]
    assert {name: alpha[name] for name in ("metric", "base", "expert", "merged", "n_test")} == {
        "metric": "rouge_l", "base": 0.0, "expert": 0.5, "merged": 0.25, "n_test": 2,
    }  # fmt: skip
    assert alpha["expert_key"] == "1" * 64
    assert alpha["expert_digest"] == manifest("expert", "1").digest
    assert alpha["expert_uri"] == f"s3://bucket/suite/objects/{'1' * 64}/1/adapter"
    gamma = found["held_out"]["gamma"]
    assert {name: gamma[name] for name in ("metric", "base", "merged", "n_test")} == {
        "metric": "rouge_l", "base": 0.25, "merged": 0.5, "n_test": 2,
    }  # fmt: skip
    assert not {"expert", "expert_key"} & set(gamma)
    assert {"base", "expert", "merged", "retention"} <= set(found["summary"]["held_in"])
    assert {"base", "merged"} <= set(found["summary"]["held_out"])
    assert found["candidates"] == [
        {"method": "mean", "params": {}, "validation": 0.25, "interval": [0.25, 0.25], "first_rung": 0.25, "tasks": 1,
         "rung": 1, "chosen": False},
        {"method": "ties", "params": TIES.params, "validation": 0.5, "interval": [0.5, 0.5], "first_rung": 0.5,
         "tasks": 2, "rung": 2, "chosen": True},
    ]  # fmt: skip
    rungs = [{"candidates": 2, "tasks": 1}, {"candidates": 1, "tasks": 1}]
    assert found["search"] == {"budget": None, "evaluations": 3, "rungs": rungs}
    assert (found["per_task"], found["export"]) == ([], None)
    assert (found["chosen"]["method"], found["chosen"]["params"]) == ("ties", TIES.params)
    assert (found["chosen"]["key"], found["chosen"]["rounding_loss_bfloat16"]) == ("4" * 64, 0.25)
    others = {"importances": 0, "task_masks": 0, "checkpoints": 0}
    assert found["made"] == {"experts": 1, "merge_nodes": 1, "evaluations": 9} | others
    assert found["reused"] == {"experts": 1, "merge_nodes": 0, "evaluations": 2} | others
    assert found["seconds"] == {"experts": 6.0, "merge": 1.0, "evaluate": 2.0, "total": 9.0}
    assert found["slot_utilisation"] == 6 / (2 * 6)


def test_summaries_are_means_over_tasks_whatever_their_size() -> None:
    found = results()
    held_in, held_out = found["summary"]["held_in"], found["summary"]["held_out"]
    assert [found["held_in"][task]["n_test"] for task in ("alpha", "beta")] == [2, 8]
    assert (held_in["base"], held_in["expert"], held_in["merged"]) == (0.25, 0.75, 0.5)
    assert held_in["retention"] == 0.5
    assert (held_out["base"], held_out["merged"]) == (0.25, 0.5)
    assert held_in["format_free"] == {"base": 0.125, "expert": 0.375, "merged": 0.25}
    assert held_in["merged_interval"] == [0.5, 0.5]  # every row of a task scores the same
    assert held_in["experts_above_base"] == 2
    assert (held_in["base_few_shot"], held_in["merged_serving"]) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("expert", "expected"),
    [((0.0, 0.5), None), ((0.0, 0.25), None), ((0.0, 0.515), None), ((0.0, 0.53), 0.25 / 0.015)],
)
def test_retention_is_null_when_experts_gain_next_to_nothing(expert: tuple[float, float], expected: Any) -> None:
    found = results(expert=expert)
    retention = found["summary"]["held_in"]["retention"]
    assert retention == (pytest.approx(expected) if expected else None)
    assert json.loads(results_json(found))["summary"]["held_in"]["retention"] == retention
    assert ("undefined" in "\n".join(summary_lines(found))) == (expected is None)


def test_retention_is_null_at_the_limit() -> None:
    assert 0.51 <= 0.5 + 0.01
    assert results(base=(0.5, 0.5), expert=(0.51, 0.51))["summary"]["held_in"]["retention"] is None


def test_without_held_out_tasks() -> None:
    found = results(held_out=0)
    assert found["held_out"] == {}
    assert found["summary"]["held_out"] == {"base": None, "merged": None}
    results_json(found)
    shown = text(found) + report_markdown(found)
    assert "mean of held-in" in shown
    assert "held-out" not in shown


def test_what_is_switched_off_is_left_out() -> None:
    found = results(few_shot=0, serving=None)
    written = results_json(found)
    assert "few_shot" not in written
    assert "merged_serving" not in written
    assert json.loads(written)["chosen"]["serving_dtype"] is None
    assert not any("rounded to" in line for line in summary_lines(found))
    assert "alpha" in text(found)
    assert "| alpha | rouge_l | 0.00 |  | 0.50 | 0.25 |" in report_markdown(found)


def test_json_has_no_nan() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = results()
    assert json.loads(results_json(found), parse_constant=refuse) == json.loads(json.dumps(found))
    with pytest.raises(ValueError, match="JSON compliant"):
        results_json(results(merged=(float("nan"), 0.5)))


def test_a_run_that_made_nothing_has_no_utilisation() -> None:
    inputs, outcome = make()
    outcome.spans = []
    found = build_results(inputs, outcome)
    assert found["slot_utilisation"] is None
    assert '"slot_utilisation": null' in results_json(found)
    assert "busy" not in "\n".join(summary_lines(found))


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_shows_every_task_and_both_means(width: int) -> None:
    lines = text(results(), width).splitlines()
    cells = {line.strip("│┃| ").split("│")[0].strip(): line for line in lines if "│" in line}
    assert {"alpha", "beta", "gamma", "mean of held-in", "mean of held-out"} <= set(cells)
    assert [cell.strip() for cell in cells["alpha"].strip("│").split("│")] == [
        "alpha", "rouge_l", "0.00", "0.75", "0.50", "0.25",
    ]  # fmt: skip
    assert [cell.strip() for cell in cells["gamma"].strip("│").split("│")] == [
        "gamma", "rouge_l", "0.25", "0.75", "", "0.50",
    ]  # fmt: skip
    assert "mine: scores on the test splits" in lines[0]


def test_a_name_with_brackets_is_shown_as_it_is() -> None:
    found = results()
    found["held_in"] = {"task[bold]": found["held_in"]["alpha"]}
    assert "task[bold]" in text(found)


def test_the_lines_below_the_table() -> None:
    lines = "\n".join(summary_lines(results()))
    assert "chosen on validation: ties (lambda 0.5, density 1, density_of support)" in lines
    assert "keeps 50% of the experts' gain (merged 0.500, 95 % interval 0.500 to 0.500)" in lines
    assert "experts above base: 2 of 2" in lines
    assert "merged weights rounded to bfloat16: score 0.250; rounding to bfloat16 loses 25%" in lines
    assert "merged adapter: 0 MB, 10% of the adapted weights" in lines
    assert "made:   1 experts, 1 merge nodes, 9 evaluations" in lines
    assert "reused: 1 experts, 0 merge nodes, 2 evaluations" in lines
    assert "total 9; 2 slots 50% busy with experts" in lines


def test_the_report_says_how_long_the_merge_takes_to_apply() -> None:
    inputs, outcome = make()
    assert build_results(inputs, outcome)["chosen"]["swap_seconds"] is None  # of scores from before this was measured
    for task, seconds in (("alpha", 2.0), ("beta", None), ("gamma", 3.0)):  # for beta it was in place already
        key = ScoreKey("merged", "test", task)
        outcome.scores[key] = replace(outcome.scores[key], swap_seconds=seconds)
    found = build_results(inputs, outcome)
    assert found["chosen"]["swap_seconds"] == 2.5
    assert "10% of the adapted weights, 2.5 s to fetch and apply in an evaluator" in "\n".join(summary_lines(found))


def test_of_a_step_on_matrices_people_see_what_differs() -> None:
    plain = Candidate("spectral_power", {"p": -1, "lambda": 1.2})
    assert parameters_text(plain.to_dict()) == "p -1, lambda 1.2"
    assert str(Candidate("iso_c", {"density": 0.5})) == "iso_c(lambda=0.45, density=0.5)"


def test_the_report_is_well_formed_markdown() -> None:
    report = report_markdown(results())
    assert report.startswith("# mine\n")
    assert report.endswith("\n")
    tables: list[list[str]] = [[]]
    for line in report.splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    tables = [table for table in tables if table]
    assert [len(table) - 2 for table in tables] == [5, 2, 5]  # scores, candidates, intervals
    for table in tables:
        assert len({line.count("|") for line in table}) == 1, table
    for name in ("| alpha |", "| beta |", "| gamma |", "**mean of held-in**", "**mean of held-out**"):
        assert name in report
    assert "3 validation scores of 2 tasks: 2 candidates on 1 tasks; 1 candidates on 1 tasks." in report
    assert "| mean |  | 1 | 1 | 0.250 |  |" in report
    assert "| ties | lambda 0.5, density 1, density_of support | 2 | 2 | 0.500 | yes |" in report
    assert "| held-out, merged | 0.500 | 0.500 to 0.500 |" in report


def test_pictures_stand_where_they_belong_and_indented_lines_belong_to_the_one_before() -> None:
    report = report_markdown(results(), {"loss.png": b"", "scores.png": b"", "scores-2.png": b""})
    order = ["![scores](scores.png)", "![scores](scores-2.png)", "## Candidates", "## Loss", "![loss](loss.png)"]
    positions = [report.index(text) for text in order]
    assert positions == sorted(positions)
    assert "candidates.png" not in report
    assert "## Loss" not in report_markdown(results())
    assert bullets(["one", "  of it", "two"]) == ["- one", "  - of it", "- two"]


def test_every_score_has_an_interval() -> None:
    inputs, outcome = make()
    key = ScoreKey("expert", "test", "alpha")
    outcome.scores[key] = replace(outcome.scores[key], score=0.5, rows=(0.0, 1.0))
    found = build_results(inputs, outcome)
    alpha = found["held_in"]["alpha"]
    assert alpha["intervals"].keys() == {"base", "base_few_shot", "expert", "merged"}
    assert alpha["intervals"]["expert"] == [0.0, 1.0]
    assert alpha["intervals"]["merged"] == [0.25, 0.25]
    assert found["held_out"]["gamma"]["intervals"].keys() == {"base", "base_few_shot", "merged"}
    assert found["summary"]["held_in"]["base_few_shot_interval"] == [0.75, 0.75]


def test_a_method_that_needs_the_task_is_reported_apart() -> None:
    inputs, outcome = make()
    inputs = replace(inputs, candidates=Candidates((MEAN, TIES, EMR)))
    mask = Manifest("5" * 64, "task_mask", 1, {}, {"mask": FileRef(f"objects/{'5' * 64}/1/mask", "0" * 64, 7)}, {}, {})
    outcome.per_task = {"emr": EMR}
    outcome.masks = {(EMR, task): mask for task in ("alpha", "beta")}
    for split, values in (("validation", (0.5, 1.0)), ("test", (0.25, 1.0))):
        for task, value in zip(("alpha", "beta"), values, strict=True):
            outcome.scores[EMR.to_json(), split, task] = score(value, 2)
    found = build_results(inputs, outcome)
    (row,) = found["per_task"]
    assert row == {
        "method": "emr", "params": dict(EMR.params), "validation": 0.75, "test": 0.625,
        "tasks": {"alpha": 0.25, "beta": 1.0}, "mask_bytes": {"alpha": 7, "beta": 7},
    }  # fmt: skip
    assert [candidate["method"] for candidate in found["candidates"]] == ["mean", "ties"]
    report = report_markdown(found)
    assert "## Needs the task at inference" in report
    assert "| emr |  | 0.750 | 0.625 |" in report
    assert "with the task known at inference, held-in: emr 0.625" in "\n".join(summary_lines(found))
    table = list(csv.DictReader(io.StringIO(candidates_csv(found))))
    assert [(line["method"], line["rung"], line["tasks"], line["chosen"]) for line in table] == [
        ("mean", "1", "1", "False"), ("ties", "2", "2", "True"), ("emr", "", "2", "False"),
    ]  # fmt: skip
    assert json.loads(table[1]["params"]) == TIES.params


def test_weights_and_an_exported_checkpoint_are_reported() -> None:
    inputs, outcome = make()
    weighted = Candidate("weighted_mean", {}, {"alpha": 0.25, "beta": 0.75})
    inputs = replace(inputs, candidates=Candidates((weighted,)))
    outcome.merged[weighted], outcome.chosen = outcome.merged[TIES], weighted
    outcome.standings = {weighted: Standing(0, 1, 2, 0.5)}
    outcome.scores |= {(weighted.to_json(), "validation", task): score(0.5, 2) for task in ("alpha", "beta")}
    key = "6" * 64
    files = {name: FileRef(f"objects/{key}/1/{name}", "0" * 64, 10) for name in ("config.json", "model.safetensors")}
    outcome.checkpoint = Manifest(key, "checkpoint", 1, {"dtype": "bfloat16"}, files, {}, {})
    found = build_results(inputs, outcome)
    assert found["chosen"]["weights"] == {"alpha": 0.25, "beta": 0.75}
    assert found["export"]["uri"] == f"s3://bucket/suite/objects/{key}/1/"
    assert (found["export"]["bytes"], found["export"]["files"]) == (20, ["config.json", "model.safetensors"])
    lines = "\n".join(summary_lines(found))
    assert "weighted_mean (weights alpha:0.25 beta:0.75)" in lines
    assert f"full checkpoint in bfloat16: s3://bucket/suite/objects/{key}/1/" in lines
    json.loads(results_json(found))


def test_test_rows_that_another_expert_learned_from_are_told() -> None:
    inputs, outcome = make()
    assert results()["learned_elsewhere"] == {}
    one, two = list(inputs.config.held_in)[:2]
    row = Row("1", "x", ("y",))
    for task, split in ((one, "train"), (two, "test")):
        object.__setattr__(inputs.tasks[task], "splits", inputs.tasks[task].splits | {split: (row,)})
    found = build_results(inputs, outcome)
    assert found["learned_elsewhere"] == {two: 1}
    assert f"which favours the merge: 1 of {two}" in "\n".join(summary_lines(found))
