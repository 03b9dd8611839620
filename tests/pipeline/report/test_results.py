"""results.json of an outcome made by hand: names, means, what is left out, and that reports say the same."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from infra.artifacts.manifests import Manifest
from infra.store.s3 import FileRef
from merge.methods.specs import Candidate
from pipeline.config.candidates import Candidates
from pipeline.config.search import Standing
from pipeline.records.score import ScoreKey
from pipeline.report.candidates import candidates_csv
from pipeline.report.markdown import report_markdown
from pipeline.report.results import build_results
from pipeline.report.summary import summary_lines
from tests.pipeline.report.given import EMR, MEAN, TIES, make, manifest, results, score, terminal, told
from workers.text.rows import Row


def test_the_names_that_other_programs_read() -> None:
    found = told(results())
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
    found = told(results())
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
    retention = told(found)["summary"]["held_in"]["retention"]
    assert retention == (pytest.approx(expected) if expected else None)
    assert ("undefined" in "\n".join(summary_lines(found))) == (expected is None)


def test_retention_is_null_at_the_limit() -> None:
    assert 0.51 <= 0.5 + 0.01
    assert results(base=(0.5, 0.5), expert=(0.51, 0.51)).summary.held_in.retention is None


def test_what_is_switched_off_is_left_out() -> None:
    found = results(few_shot=0, serving=None)
    written = found.to_json()
    assert "few_shot" not in written
    assert "merged_serving" not in written
    assert json.loads(written)["chosen"]["serving_dtype"] is None
    assert not any("rounded to" in line for line in summary_lines(found))
    assert "alpha" in terminal(found)
    assert "| alpha | rouge_l | 0.00 |  | 0.50 | 0.25 |" in report_markdown(found)


def test_json_has_no_nan() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = results()
    assert json.loads(found.to_json(), parse_constant=refuse) == told(found)
    with pytest.raises(ValueError, match="merged\n  Input should be a finite number"):
        results(merged=(float("nan"), 0.5))


def test_a_run_that_made_nothing_has_no_utilisation() -> None:
    inputs, outcome = make()
    outcome.spans = []
    found = build_results(inputs, outcome)
    assert '"slot_utilisation": null' in found.to_json()
    assert "busy" not in "\n".join(summary_lines(found))


def test_every_score_has_an_interval() -> None:
    inputs, outcome = make()
    key = ScoreKey("expert", "test", "alpha")
    outcome.scores[key] = replace(outcome.scores[key], score=0.5, rows=(0.0, 1.0))
    found = told(build_results(inputs, outcome))
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
    (row,) = told(found)["per_task"]
    assert row == {
        "method": "emr", "params": dict(EMR.params), "validation": 0.75, "test": 0.625,
        "tasks": {"alpha": 0.25, "beta": 1.0}, "mask_bytes": {"alpha": 7, "beta": 7},
    }  # fmt: skip
    assert [candidate.method for candidate in found.candidates] == ["mean", "ties"]
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
    written = told(found)
    assert written["chosen"]["weights"] == {"alpha": 0.25, "beta": 0.75}
    assert written["export"]["uri"] == f"s3://bucket/suite/objects/{key}/1/"
    assert (written["export"]["bytes"], written["export"]["files"]) == (20, ["config.json", "model.safetensors"])
    lines = "\n".join(summary_lines(found))
    assert "weighted_mean (weights alpha:0.25 beta:0.75)" in lines
    assert f"full checkpoint in bfloat16: s3://bucket/suite/objects/{key}/1/" in lines


def test_test_rows_that_another_expert_learned_from_are_told() -> None:
    inputs, outcome = make()
    assert told(results())["learned_elsewhere"] == {}
    one, two = list(inputs.config.held_in)[:2]
    row = Row("1", "x", ("y",))
    for task, split in ((one, "train"), (two, "test")):
        object.__setattr__(inputs.tasks[task], "splits", inputs.tasks[task].splits | {split: (row,)})
    found = build_results(inputs, outcome)
    assert found.learned_elsewhere == {two: 1}
    assert f"which favours the merge: 1 of {two}" in "\n".join(summary_lines(found))


def test_the_report_says_how_long_the_merge_takes_to_apply() -> None:
    inputs, outcome = make()
    assert (
        told(build_results(inputs, outcome))["chosen"]["swap_seconds"] is None
    )  # of scores from before this was measured
    for task, seconds in (("alpha", 2.0), ("beta", None), ("gamma", 3.0)):  # for beta it was in place already
        key = ScoreKey("merged", "test", task)
        outcome.scores[key] = replace(outcome.scores[key], swap_seconds=seconds)
    found = build_results(inputs, outcome)
    assert found.chosen.swap_seconds == 2.5
    assert "10% of the adapted weights, 2.5 s to fetch and apply in an evaluator" in "\n".join(summary_lines(found))


def test_without_held_out_tasks() -> None:
    found = results(held_out=0)
    assert told(found)["held_out"] == {}
    assert told(found)["summary"]["held_out"] == {"base": None, "merged": None}
    shown = terminal(found) + report_markdown(found)
    assert "mean of held-in" in shown
    assert "held-out" not in shown
