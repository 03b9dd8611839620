"""What a finished run publishes, and where: results, report and pictures go to the object store, to MLflow and, if one
is asked for, to a folder; the scores to the terminal.

Results come first: they are stored and printed before anything is drawn. A disk that is full costs what would be on it
and nothing else.
"""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from infra.ending import summary
from infra.registry import runs
from infra.store.layout import RESULTS, run_file
from infra.store.s3 import Store
from pipeline.config.model import PipelineConfig, dump_config
from pipeline.records.results import Results
from pipeline.report import mlflow_page, plots, training_rows
from pipeline.report.candidates import candidates_csv
from pipeline.report.html import render
from pipeline.report.markdown import report_markdown
from pipeline.report.summary import summary_lines, summary_table
from workers.jobs.expert import TRAINING_LOSS, VALIDATION_LOSS


def publish_report(
    store: Store, config: PipelineConfig, run_id: str, results: Results, folder: Path | None, console: Console
) -> None:
    """Write everything that a run reports and print its scores."""

    def keep(files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            store.put(run_file(run_id, name), content)

    tables = {
        RESULTS: results.to_json().encode(),
        "candidates.csv": candidates_csv(results).encode(),
        "config.yaml": dump_config(config).encode(),
    }
    keep(tables)
    console.print(summary_table(results))
    for line in summary_lines(results):
        console.print(line, highlight=False, markup=False)
    pictures = plots.draw(results, _curves(results)) | training_rows.draw(results)
    markdown = report_markdown(results, pictures)
    page = render(markdown, f"{results.suite} {run_id}", pictures)
    report = {"report.md": markdown.encode(), "report.html": page.encode(), **pictures}
    keep(report)
    files, stored = {**tables, **report}, store.uri(run_file(run_id))

    def warn(what: str, error: OSError) -> None:
        text = f"warning: {what} ({summary(error)}); the whole report is at {stored}"
        console.print(text, style="yellow", highlight=False, markup=False)

    if folder is not None:
        try:
            write_files(folder, files)
        except OSError as error:
            warn(f"the report in {folder}/ is not complete", error)
    try:
        with tempfile.TemporaryDirectory(prefix="factory-report-") as scratch:
            write_files(Path(scratch), files)
            runs.log_folder(run_id, Path(scratch), "report")
    except OSError as error:
        warn("the run's page in MLflow has no report", error)
    runs.log_history(run_id, [{"step": 0, **mlflow_page.metrics(results)}])
    runs.set_tags(run_id, mlflow_page.tags(results))
    runs.describe_run(run_id, mlflow_page.description(results, runs.run_path(run_id), files))
    console.print(f"report: {stored}" + (f" and {folder}/" if folder else ""), markup=False)
    console.print(f"MLflow: {runs.run_page(run_id)}", markup=False, highlight=False)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name into a folder, made if absent. Raises OSError; then the file that it stopped at is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        try:
            (folder / name).write_bytes(content)
        except OSError:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
            raise


def _curves(results: Results) -> dict[str, plots.Curve]:
    """Loss curves by task, from the runs that made the experts; those of runs that MLflow no longer has are missing."""
    made_by = {task: row.expert_run_id for task, row in results.held_in.items() if row.expert_run_id}
    drawn = dict(list(made_by.items())[: plots.MOST_CURVES])
    read = runs.histories(drawn.values(), (TRAINING_LOSS, VALIDATION_LOSS))
    curves = {task: plots.Curve(read[run, TRAINING_LOSS], read[run, VALIDATION_LOSS]) for task, run in drawn.items()}
    return {task: curve for task, curve in curves.items() if curve.training}
