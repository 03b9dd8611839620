"""The main job: checks, the run of every seed, the report. Its command is `pipeline.commands.run`.

Exit status: 0 done; 1 something failed, finished work is kept; 2 bad input; 130 stopped.
"""

import contextlib
import getpass
import signal
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from infra.environment import code_version
from infra.errors import ConfigError, FactoryError, RegistryError
from infra.registry import runs as registry
from infra.store.s3 import Store
from pipeline.config.model import dump_config, load_config
from pipeline.plan.cluster import connect_to_ray, submission_id
from pipeline.plan.preflight import Prepared, check_services, prepare_inputs, upload_inputs
from pipeline.plan.waiting import wait_for_room
from pipeline.records.outcome import Outcome
from pipeline.report import mlflow_page as run_page
from pipeline.report.display import Display
from pipeline.report.publishing import publish_report
from pipeline.report.replicates import combine
from pipeline.report.results import build_results
from pipeline.running.announcing import Announcements
from pipeline.running.execute import Stopped, execute


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
        nodes = wait_for_room(config.resources, lambda text: console.print(text, highlight=False, markup=False))
        slots = prepared.check_cluster(nodes, console)
        run_id = start_run(prepared)
    except FactoryError as error:
        _print_error(console, error)
        sys.exit(2)
    sys.exit(run(prepared, run_id, slots, report, console))


def run(prepared: Prepared, run_id: str, slots: int, report: Path | None, console: Console) -> int:
    """Run and report. Returns the exit status."""
    config = prepared.config
    stop = threading.Event()  # a flag, because an exception raised inside Ray's C++ calls would not reach us as it is
    for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which installs its own; SIGTERM is `ray job stop`
        signal.signal(number, lambda *_: stop.set())
    console.print(f"run {run_id} in MLflow experiment {config.suite!r}", highlight=False)
    status = "FAILED"
    try:
        console.print(registry.run_page(run_id), highlight=False, markup=False)
        seeds, found = config.seeds or [config.seed], []
        replicates, announced = prepared.replicates(run_id), Announcements(prepared.store, run_id)
        announced.plan(replicates)  # before anything is looked for: garbage collection spares what is announced
        upload_inputs(prepared)
        for at, inputs in enumerate(replicates):
            if len(seeds) > 1:
                console.print(f"seed {seeds[at]}, {at + 1} of {len(seeds)}", highlight=False)
            outcome = Outcome(slots=slots)
            with announced.following(outcome):
                execute(inputs, outcome, Display(list(config.held_in), console), stop, announced.add)
            found.append(build_results(inputs, outcome))
        publish_report(prepared.store, config, run_id, combine(seeds, found), report, console)
        status = "FINISHED"
        return 0
    except FactoryError as error:
        _print_error(console, error)
        with contextlib.suppress(FactoryError):  # the services themselves may be what failed
            registry.describe_run(run_id, run_page.failure(str(error)))
        return 1
    except Stopped:
        status = "KILLED"
        console.print("stopped; finished experts, nodes and scores are kept and the next run continues from there")
        return 130
    finally:
        for tidy in (
            partial(registry.finish_run, run_id, status),
            partial(registry.kill_running_children, run_id),  # of workers that were lost
        ):
            try:
                tidy()
            except RegistryError as error:  # what the run came to stands
                console.print(f"MLflow does not know the end of the run: {error}", style="yellow", markup=False)


def start_run(prepared: Prepared) -> str:
    """Start the parent run in MLflow; its id names the run."""
    suite = prepared.config.suite
    tags = {
        "suite": suite,
        "kind": "pipeline",
        **({"ray_submission_id": job} if (job := submission_id()) else {}),
        **run_page.source(_user(), code_version().get("git_commit"), submitted=bool(job)),
    }
    run_id = registry.start_run(suite, time.strftime("%Y%m%d-%H%M%S"), tags, prepared.parameters())
    try:  # now, and not after hours of training, it is seen whether the server can store files
        registry.log_text(run_id, dump_config(prepared.config), "report/config.yaml")
    except FactoryError:
        registry.finish_run(run_id, "FAILED")
        raise
    registry.describe_experiment(suite, run_page.experiment(suite))
    return run_id


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return ""


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
