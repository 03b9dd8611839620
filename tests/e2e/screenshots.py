"""The pages of a run that a person looks at, and pictures of them for the documentation.

    python -m tests.e2e.screenshots --run RUN_ID --out docs/screenshots
    python -m tests.e2e.screenshots --experiment NAME --out docs/screenshots     # its latest finished run

The server is the one that MLFLOW_TRACKING_URI names (`eval "$(python -m infra.stack env)"`), on this machine.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run

from infra.errors import FactoryError
from infra.registry import runs
from tests.e2e.browser import NoBrowser, Pages, chromium, window

LARGEST = 300_000
"""Bytes of a picture."""


@dataclass(frozen=True)
class Stop:
    """A page: where it is, and the texts that are visible when it is complete. `press` and `ready` are CSS selectors:
    of what is clicked first, and of what else must be visible."""

    name: str
    path: str
    texts: tuple[str, ...]
    press: str = ""
    ready: str = ""


def find_run(run_id: str | None, experiment: str | None) -> Run:
    """The run with this id, else the latest finished run of the experiment. Raises FactoryError."""
    client = runs.client()
    if run_id:
        return client.get_run(run_id)
    found = client.get_experiment_by_name(str(experiment))
    where = "tags.kind = 'pipeline' and attributes.status = 'FINISHED'"
    latest = client.search_runs([found.experiment_id], where, max_results=1) if found else []
    if not latest:
        raise FactoryError(f"the experiment {experiment!r} has no finished run")
    return latest[0]


def stops(run: Run) -> list[Stop]:
    """Where somebody goes who wants to know what a run did."""
    client = runs.client()
    experiment, parent, name = run.info.experiment_id, run.info.run_id, run.info.run_name
    suite = client.get_experiment(experiment).name
    expert = _an_expert(run)
    task, listed = expert.info.run_name, f"experiments/{experiment}/runs"
    maker = client.get_run(expert.data.tags["mlflow.parentRunId"]).info.run_name
    merged, single = runs.model_name(suite, runs.MERGED), runs.model_name(suite, task)
    version = max(int(each.version) for each in client.search_model_versions(f"name = '{merged}'"))
    first = max(int(each.version) for each in client.search_model_versions(f"name = '{single}'"))
    curve, report = ".js-plotly-plot .scatterlayer path.js-line", f"{listed}/{parent}/artifacts/report"
    return [
        Stop("experiments", "experiments", (suite, "Each run makes or reuses an expert")),
        Stop("runs", listed, (name, task, "matching run"), press='[data-component-id*="runnamecellrenderer"]'),
        Stop("run", f"{listed}/{parent}", ("Merged", "report.html", "held_in/merged", "main.py")),
        Stop("run-metrics", f"{listed}/{parent}/model-metrics", ("held_in", "merged"), ready=".js-plotly-plot .bars"),
        Stop("expert", f"{listed}/{expert.info.run_id}", (f"expert for {task}", "loss/training", maker, "Train")),
        Stop("expert-loss", f"{listed}/{expert.info.run_id}/model-metrics", ("training", "validation"), ready=curve),
        Stop("report", f"{report}/report.html", ("report/report.html", "loss.png"), ready="iframe.mlflow-html-iframe"),
        Stop("scores", f"{report}/scores.png", ("report/scores.png",), ready="img[alt='report/scores.png']"),
        Stop("models", f"models?searchInput={suite}", (merged, single, "champion")),
        Stop("model", f"models/{merged}", ("Description", "Versions", f"Version {version}")),
        Stop("merge", f"models/{merged}/versions/{version}", ("Merge of", "Aliases", "factory.lineage.method")),
        Stop("expert-model", f"models/{single}/versions/{first}", ("expert for", "Aliases", "factory.digest")),
    ]


def _an_expert(run: Run) -> Run:
    """An expert that this run made, else the latest of the experiment."""
    client, experiment = runs.client(), [run.info.experiment_id]
    for where in (f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", "tags.kind = 'expert'"):
        found = client.search_runs(experiment, f"{where} and attributes.status = 'FINISHED'", max_results=1)
        if found:
            return found[0]
    raise FactoryError(f"the experiment of run {run.info.run_id} has no finished expert")


def visit(pages: Pages, address: str, stop: Stop, picture: Path | None = None, seconds: float = 60) -> str:
    """Go there, wait until everything that belongs to it is visible, photograph it; returns the page's text."""
    pages.page.goto("about:blank")  # within a page, MLflow would keep what was open before
    pages.page.goto(f"{address}/#/{stop.path}", timeout=seconds * 1000)
    if stop.press:
        pages.page.locator(stop.press).first.click(timeout=seconds * 1000)
    if stop.ready:
        pages.page.locator(stop.ready).first.wait_for(timeout=seconds * 1000)
    return pages.wait(*stop.texts, picture=picture, seconds=seconds)


def take(pages: Pages, run: Run, folder: Path) -> None:
    """A picture of every page, `<name>.png`, where nothing moves any more. Raises FactoryError for one too large."""
    for stop in stops(run):
        visit(pages, runs.tracking_uri(), stop)
        picture, content = folder / f"{stop.name}.png", still(pages)
        if len(content) > LARGEST:
            raise FactoryError(f"{picture} would have {len(content)} bytes; {LARGEST} are the most for a document")
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(content)
        print(f"{picture} {len(content)}")


def still(pages: Pages, seconds: float = 30) -> bytes:
    """A picture of the page as soon as two in a row are the same, at the latest after so many seconds."""
    deadline, before = time.monotonic() + seconds, pages.page.screenshot()
    while time.monotonic() < deadline:
        pages.page.wait_for_timeout(500)
        now = pages.page.screenshot()
        if now == before:
            break
        before = now
    return before


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.screenshots", description="Pictures of a run's pages.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", help="id of a finished run")
    which.add_argument("--experiment", help="experiment (suite) whose latest finished run is taken")
    parser.add_argument("--out", required=True, type=Path, help="folder of the pictures")
    given = parser.parse_args()
    try:
        run = find_run(given.run, given.experiment)
        with window(chromium()) as pages:
            take(pages, run, given.out)
    except (FactoryError, NoBrowser) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
