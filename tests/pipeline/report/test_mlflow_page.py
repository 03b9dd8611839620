"""What MLflow's page of a run shows: names that MLflow takes, everything by task, a description that fits."""

import pytest
from mlflow.utils.validation import MAX_TAG_VAL_LENGTH, _validate_metric_name

from pipeline.records.results import Results
from pipeline.report import mlflow_page
from tests.pipeline.report.given import changed, held_in_row, held_out_row

REPORT = ("report.html", "scores.png", "results.json")


def results(tasks: int = 3, held_out: int = 1, retention: float | None = 0.5) -> Results:
    """Results of so many tasks."""
    scores = {"base": 0.25, "base_few_shot": 0.3, "merged": 0.5}
    row = {"name": "s.merged", "version": 7, "promoted": True, "champion": 7, "reason": "superior", "opponent": None,
           "difference": None, "interval": None, "scores": None, "tasks": {}}  # fmt: skip
    inside, outside = held_in_row(**scores, expert=0.75), held_out_row(**scores)
    return changed(
        suite="s",
        held_in={f"task {at}": inside for at in range(tasks)},
        held_out={f"out {at}": outside for at in range(held_out)},
        summary={
            "held_in": {**scores, "expert": 0.75, "retention": retention, "merged_interval": [0.4, 0.6]},
            "held_out": scores if held_out else {"base": None, "merged": None},
        },
        chosen={"method": "ties", "params": {"lambda": 0.5}},
        gate={"models": {"merged": row}},
        made={"experts": 2},
        reused={"experts": 1},
        seconds={"total": 3.0},
        slot_utilisation=None,
    )


def test_metrics_have_every_score_under_its_model() -> None:
    found = mlflow_page.metrics(results())
    assert found["held_in/merged"] == 0.5
    assert found["held_out/base"] == 0.25
    assert found["run/total"] == 3.0
    for task in ("task 0", "task 1", "task 2"):
        assert (found[f"test_base/{task}"], found[f"test_expert/{task}"]) == (0.25, 0.75)
    assert found["test_merged/out 0"] == 0.5
    assert "test_expert/out 0" not in found
    assert "run/slot_utilisation" not in found  # nothing was trained
    assert "held_in/retention" not in mlflow_page.metrics(results(retention=None))


@pytest.mark.parametrize("task", ["a/b", "a:b (c) 'd' ü.x", "..", ".", "../../etc", "x" * 400, "a//b", "数学", "$%"])
def test_any_task_gives_a_name_that_mlflow_takes(task: str) -> None:
    names = mlflow_page.metric_names([task, "plain_name.1"])
    assert names["plain_name.1"] == "plain_name.1"
    _validate_metric_name(f"test_base_few_shot/{names[task]}")


def test_names_stay_apart() -> None:
    names = mlflow_page.metric_names(["a/b", "a-b", "a?b"])
    assert len(set(names.values())) == 3


def test_the_description_starts_with_the_scores_and_links_the_report() -> None:
    text = mlflow_page.description(results(), "#/experiments/3/runs/abc", REPORT)
    first, second = text.split("\n\n")[:2]
    assert first.startswith("**Merged 0.500** (95 % interval 0.400 to 0.600), experts 0.750, base 0.250")
    assert "of 1 held-out tasks" in first
    assert "[report.html](#/experiments/3/runs/abc/artifacts/report/report.html)" in second
    assert "loss.png" not in second  # of no expert is there a history
    assert "[s.merged version 7](#/models/s.merged/versions/7)" in second
    assert "| task 2 | rouge_l | 0.25 | 0.30 | 0.75 | 0.50 |" in text
    assert "held-out" not in mlflow_page.description(results(held_out=0), "#", REPORT).split("\n\n")[0]


@pytest.mark.parametrize("tasks", [20, 100, 2000])
def test_the_description_fits_and_loses_the_table_first(tasks: int) -> None:
    text = mlflow_page.description(results(tasks), "#/experiments/3/runs/abc", REPORT)
    assert len(text) <= min(5000, MAX_TAG_VAL_LENGTH)
    assert ("| task 19 |" in text) == (tasks == 20)
    assert f"means of {tasks} held-in tasks" in text


def test_tags_tell_runs_apart() -> None:
    assert mlflow_page.tags(results()) == {"chosen": "ties lambda 0.5", "experts": "2 made, 1 reused"}


def test_a_failure_fits_and_keeps_its_beginning() -> None:
    text = mlflow_page.failure("2 of 3 experts failed\n" + "  task: reason\n" * 1000)
    assert "2 of 3 experts failed" in text
    assert text.endswith("\n```")
    assert len(text) <= 5000
    assert len(mlflow_page.failure("one line " * 2000)) <= 5000


def test_the_source_of_a_run() -> None:
    found = mlflow_page.source("me", "abc", submitted=True)
    assert found["mlflow.user"] == "me"
    assert found["mlflow.source.git.commit"] == "abc"
    assert found["mlflow.source.type"] == "JOB"
    assert mlflow_page.source("", None, submitted=False).keys() == {"mlflow.source.name", "mlflow.source.type"}
