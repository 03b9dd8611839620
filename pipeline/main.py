"""The entrypoint: N tasks + one base model in, N sparse experts + one merged model out.

    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python pipeline/main.py --config …
    python -m pipeline.main --config … [section.field=value …]

Exit status: 0 done; 1 something failed, finished work is kept; 2 bad input; 130 stopped.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if str(Path(__file__).resolve().parent.parent) not in sys.path:  # `python pipeline/main.py` puts only pipeline/ there
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import click
import ray
from rich.console import Console

from infra import registry
from infra.errors import ConfigError, FactoryError
from infra.store import Store
from pipeline.cluster import connect_to_ray
from pipeline.config import dump_config, load_config
from pipeline.display import Display
from pipeline.preflight import Prepared, check_services, prepare_inputs
from pipeline.replicates import combine
from pipeline.results import (
    build_results,
    candidates_csv,
    report_markdown,
    results_json,
    summary_lines,
    summary_table,
)
from pipeline.run import Run, Stopped


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_path", required=True, help="Configuration file (see pipeline/configs/).")
@click.option(
    "--report", type=click.Path(file_okay=False, path_type=Path), help="Also write the report to this folder."
)
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
def main(config_path: str, report: Path | None, overrides: tuple[str, ...]) -> None:
    """Train an expert per held-in task, merge them, score everything, register the results."""
    wide = None if sys.stdout.isatty() else 120
    console = Console(soft_wrap=True, width=wide)
    try:
        config = load_config(config_path, list(overrides))
        check_report_folder(report)
        store = Store.from_env()
        check_services(config, store)
        prepared = prepare_inputs(config, store, console)
        connect_to_ray()
        slots, seats = prepared.check_cluster(ray.nodes(), console)
        run_id = start_run(prepared)
    except FactoryError as error:
        _print_error(console, error)
        sys.exit(2)
    sys.exit(run(prepared, run_id, slots, seats, report, console))


def run(prepared: Prepared, run_id: str, slots: int, seats: int, report: Path | None, console: Console) -> int:
    """Run and report. Returns the exit status."""
    config = prepared.config
    stop = threading.Event()  # a flag, because an exception raised inside Ray's C++ calls would not reach us as it is
    for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which installs its own; SIGTERM is `ray job stop`
        signal.signal(number, lambda *_: stop.set())
    console.print(f"run {run_id} in MLflow experiment {config.suite!r}", highlight=False)
    status = "FAILED"
    try:
        seeds, found = config.seeds or [config.seed], []
        for at, inputs in enumerate(prepared.replicates(run_id)):
            if len(seeds) > 1:
                console.print(f"seed {seeds[at]}, {at + 1} of {len(seeds)}", highlight=False)
            display = Display(list(config.held_in), console)
            found.append(build_results(inputs, Run(inputs, display, slots, seats, stop).execute()))
        publish_report(prepared, run_id, combine(seeds, found), report, console)
        status = "FINISHED"
        return 0
    except FactoryError as error:
        _print_error(console, error)
        return 1
    except Stopped:
        status = "KILLED"
        console.print("stopped; finished experts, nodes and scores are kept and the next run continues from there")
        return 130
    finally:
        registry.finish_run(run_id, status)
        registry.kill_running_children(run_id)  # of workers that were lost


def start_run(prepared: Prepared) -> str:
    """Start the parent run in MLflow; its id names the run."""
    suite = prepared.config.suite
    tags = {"suite": suite, "kind": "pipeline", "ray_submission_id": os.environ.get("RAY_JOB_SUBMISSION_ID", "")}
    return registry.start_run(suite, time.strftime(f"{suite}-%Y%m%d-%H%M%S"), tags, prepared.parameters())


def publish_report(
    prepared: Prepared, run_id: str, results: dict[str, Any], folder: Path | None, console: Console
) -> None:
    """Write results, report, candidates and configuration to the store, MLflow and `folder`; print the scores."""
    files = {
        "results.json": results_json(results),
        "report.md": report_markdown(results),
        "candidates.csv": candidates_csv(results),
        "config.yaml": dump_config(prepared.config),
    }
    for name, text in files.items():
        prepared.store.put(f"runs/{run_id}/{name}", text.encode())
    with tempfile.TemporaryDirectory(prefix="factory-report-") as scratch:
        for target in [Path(scratch), *([folder] if folder else [])]:
            target.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (target / name).write_text(text)
        registry.log_folder(run_id, Path(scratch), "report")
    registry.log_history(run_id, [{"step": 0, **_summary_metrics(results)}])
    console.print(summary_table(results))
    for line in summary_lines(results):
        console.print(line, highlight=False, markup=False)
    console.print(
        f"report: {prepared.store.uri(f'runs/{run_id}/')}" + (f" and {folder}/" if folder else ""), markup=False
    )


def _summary_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Numbers of the summary for the parent run in MLflow."""
    metrics = {}
    for group, summary in results["summary"].items():
        for name, value in summary.items():
            if isinstance(value, int | float):
                metrics[f"{group}.{name}"] = float(value)
    for name, value in {**results["seconds"], "slot_utilisation": results["slot_utilisation"]}.items():
        if value is not None:
            metrics[f"run.{name}"] = float(value)
    return metrics


def check_report_folder(folder: Path | None) -> None:
    """Raises ConfigError now if the report could not be written at the end."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"--report {folder}: cannot be written ({error.strerror}); name another folder"
            ) from error


def _print_error(console: Console, error: FactoryError) -> None:
    console.print(f"error: {error}", style="bold red", markup=False, highlight=False)


if __name__ == "__main__":
    main()
