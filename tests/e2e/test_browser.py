"""The browser against MLflow's pages of one small logged run."""

import uuid
from pathlib import Path

import pytest

from infra.registry import runs
from infra.stack.services import StackState
from tests.e2e.browser import Pages


def test_a_run_is_where_a_person_looks_for_it(stack: StackState, pages: Pages, tmp_path: Path) -> None:
    experiment = f"browser-{uuid.uuid4().hex[:6]}"
    run_id = runs.start_run(experiment, "the-named-run", {"kind": "pipeline"}, {"learning_rate": 0.25})
    runs.log_history(run_id, [{"step": step, "train_loss": 1 / (step + 1)} for step in range(20)])
    runs.finish_run(run_id, "FINISHED")
    found = runs.client().get_experiment_by_name(experiment)
    assert found is not None
    address = f"{stack.urls()['mlflow']}/#/experiments/{found.experiment_id}"
    texts = (experiment, "the-named-run", "1 matching run")
    listed = pages.open(f"{address}/runs", *texts, picture=tmp_path / "experiment.png")
    assert "Model registry" in listed  # the view of model training, not the one of generative AI
    texts = ("learning_rate", "0.25", "train_loss", "Finished")
    assert "the-named-run" in pages.open(f"{address}/runs/{run_id}", *texts, picture=tmp_path / "run.png")
    pages.open(f"{address}/runs/{run_id}/model-metrics", "train_loss", "Step", picture=tmp_path / "curve.png")
    curve = pages.page.locator(".js-plotly-plot .scatterlayer path.js-line").first
    assert curve.get_attribute("d").count("L") > 5  # a curve; points that add nothing to it are left out
    picture = (tmp_path / "run.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000  # an empty page makes a smaller one


def test_a_missing_text_is_named(stack: StackState, pages: Pages) -> None:
    pages.open(stack.urls()["mlflow"])
    with pytest.raises(AssertionError, match=r"'no such text' is not on .*which says:\n"):
        pages.wait("no such text", seconds=3)
