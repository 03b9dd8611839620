"""MLflow's pages of finished runs, as a person finds them: runs by name, curves, scores, the report, the registry."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run

from infra.stack.services import StackState
from tests.e2e.browser import Pages, newcomer
from tests.e2e.conftest import pipeline_in
from tests.e2e.screenshots import LARGEST, Stop, find_run, stops, take, visit

SUITE = "browsing"


@pytest.fixture(scope="module")
def outputs(
    stack: StackState,
    tiny_config: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """What two runs printed. The first one's models all become champions, the second one's merge stays challenger."""
    folder = tmp_path_factory.mktemp(SUITE)
    merges = [
        [{"method": "mean"}, {"method": "ties", "params": {"lambda": [0.5, 1.0]}}],
        [{"method": "task_arithmetic", "params": {"lambda": 0.5}}],
    ]
    found = []
    for candidates, gate in zip(merges, ({"rule": "not_worse", "margin": 1}, {"margin": 1}), strict=True):
        config = tiny_config(
            SUITE, held_in=2, merge={"fan_in": 2, "candidates": candidates}, gate=gate,
            evaluate={"few_shot": 0, "batch_size": 8, "serving_dtype": None},
        )  # fmt: skip
        finished = pipeline_in(folder, config)
        assert finished.code == 0, finished.output[-4000:]
        found.append(finished.output)
    return found


@pytest.fixture(scope="module")
def run(outputs: list[str]) -> Run:
    """The second run."""
    return find_run(None, SUITE)


@pytest.fixture
def at(stack: StackState, pages: Pages, run: Run, tmp_path: Path) -> Callable[[str], str]:
    """Visit a stop by name; returns the page's text."""
    found = {stop.name: stop for stop in stops(run)}

    def go(name: str) -> str:
        return visit(pages, stack.urls()["mlflow"], found[name], tmp_path / f"{name}.png", seconds=120)

    return go


def test_runs_have_names_and_their_experts_below_them(at: Callable[[str], str], run: Run) -> None:
    assert "Each run makes or reuses an expert" in at("experiments")
    listed = at("runs")
    assert len(re.findall(r"^\d{8}-\d{6}$", listed, re.MULTILINE)) == 2
    assert run.info.run_name in listed
    for task in ("in0", "in1"):
        assert re.search(rf"^{task}$", listed, re.MULTILINE)
        assert re.search(rf"^{task} \([0-9a-f]{{12}}\)", listed, re.MULTILINE)  # the data that it was trained on
    assert "4 matching runs" in listed


def test_a_run_says_what_came_out(at: Callable[[str], str], pages: Pages, run: Run) -> None:
    shown = at("run")
    for text in ("Finished", "means of 2 held-in tasks", "browsing.merged", "task_arithmetic",
                 "0 made, 2 reused", "test_base/in0", "test_expert/in0"):  # fmt: skip
        assert text in shown, shown
    pages.page.get_by_text("Show more").first.click()
    assert "browsing.merged version 2, challenger" in pages.wait("mean of held-out")
    link = pages.page.get_by_role("link", name="report.html").first.get_attribute("href")
    assert link.endswith(f"/runs/{run.info.run_id}/artifacts/report/report.html")
    charts = at("run-metrics")
    assert re.search(r"held_in\s*\(\d+\)", charts)


def test_an_expert_shows_its_loss_curves(at: Callable[[str], str], pages: Pages) -> None:
    shown = at("expert")
    assert re.search(r"Parent run\s+\d{8}-\d{6}", shown)
    assert "test/exact_match" in shown
    at("expert-loss")
    first = pages.page.locator(".js-plotly-plot .scatterlayer path.js-line").first
    assert first.get_attribute("d").count("L") >= 4  # of eight steps; points that add nothing to a line are left out


def test_the_report_is_shown_with_its_pictures(at: Callable[[str], str], pages: Pages) -> None:
    listed = at("report")
    for name in ("candidates.csv", "candidates.png", "config.yaml", "loss.png", "report.md", "results.json"):
        assert name in listed
    report = pages.page.frame_locator("iframe.mlflow-html-iframe")
    report.get_by_text("mean of held-in").first.wait_for()
    assert report.get_by_role("heading", name="Registered models").count() == 1
    widths = report.locator("img").evaluate_all("found => found.map(each => each.naturalWidth)")
    assert len(widths) == 3
    assert min(widths) > 1000
    at("scores")
    picture = pages.page.locator("img[alt='report/scores.png']")
    assert picture.evaluate("shown => shown.naturalWidth") > 1000


def test_the_registry_tells_champion_from_challenger(at: Callable[[str], str], pages: Pages, stack: StackState) -> None:
    listed = re.sub(r"\s+", " ", at("models"))
    assert re.search(r"browsing\.in0 Version 1 @ champion ?: Version 1", listed), listed
    assert re.search(r"browsing\.merged Version 2 @ (champion ?: Version 1|challenger ?: Version 2)", listed), listed
    versions = at("model")
    assert all(text in versions for text in ("Version 1", "Version 2", "@ champion", "@ challenger"))
    merge = at("merge")
    for text in ("@ challenger", "Merge of 2 sparse experts", "Gate", "models:/browsing.in0/1", "factory.gate."):
        assert text in merge, merge
    expert = at("expert-model")
    for text in ("@ champion", "Sparse expert for in", "Training", "Lineage", "test rows"):
        assert text in expert, expert
    champion = Stop("champion", "models/browsing.merged/versions/1", ("@ champion", "Merge of", "Gate"))
    assert "@ challenger" not in visit(pages, stack.urls()["mlflow"], champion)


def test_the_printed_address_leads_a_newcomer_to_the_run(outputs: list[str], pages: Pages, run: Run) -> None:
    addresses = re.findall(r"http\S+workflowType=machine_learning", outputs[1])
    assert len(addresses) == 2  # at the start and at the end
    assert f"/runs/{run.info.run_id}" in addresses[0]
    with newcomer(pages) as fresh:
        shown = fresh.open(addresses[1], "Merged", "held_in/merged", seconds=120)
    assert "Model registry" in shown


def test_pictures_for_the_documentation(run: Run, pages: Pages, tmp_path: Path) -> None:
    take(pages, run, tmp_path)
    taken = {path.stem: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert taken.keys() == {stop.name for stop in stops(run)}
    assert min(taken.values()) > 20_000  # an empty page makes a smaller one
    assert max(taken.values()) <= LARGEST
