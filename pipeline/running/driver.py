"""The main job: checks, the run of every seed, the report. Its command is `pipeline.commands.run`.

Exit status: 0 done; 1 something failed, finished work is kept; 2 bad input; 130 stopped.
"""

import contextlib
import getpass
import signal
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Protocol

from rich.console import Console

from infra.ending import message
from infra.environment import code_version
from infra.errors import FactoryError, RegistryError
from infra.outputs import check_output
from infra.registry import runs
from infra.store.s3 import Store
from pipeline.config.model import dump_config, load_config
from pipeline.plan.cluster import submission_id
from pipeline.plan.preflight import Prepared, check_services, prepare_inputs, upload_inputs
from pipeline.records.outcome import Inputs, Outcome
from pipeline.records.replicates import combine
from pipeline.report import mlflow_page
from pipeline.report.display import Display
from pipeline.report.publishing import publish_report
from pipeline.report.results import build_results
from pipeline.running.announcing import Announcements
from pipeline.running.execute import Crew, Hear, Stopped, execute
from pipeline.running.ray_workers import RayCluster
from pipeline.running.signals import Handler

DONE, FAILED, REFUSED, STOPPED = 0, 1, 2, 130
"""Exit statuses."""


class Site(Protocol):
    """Where a run's work is done."""

    def check(self) -> None:
        """See that it can be reached, before anything is read. Raises FactoryError."""
        ...

    def join(self, prepared: Prepared, console: Console) -> int:
        """Get ready; returns how many experts run at a time. Raises ConfigError if some work fits nowhere."""
        ...

    def hire(self, inputs: Inputs, hear: Hear) -> Crew:
        """Who works for one seed; called in the run's event loop."""
        ...

    def heeding(self, handler: Handler) -> contextlib.AbstractContextManager[None]:
        """Inside the block signals to stop are handled so, where the site takes any."""
        ...


def main(config_path: str, report: Path | None, overrides: tuple[str, ...]) -> None:
    """Train an expert per held-in task, merge them, score everything, register the results: on a Ray cluster."""
    wide = None if sys.stdout.isatty() else 120
    stop = threading.Event()  # a flag, because an exception raised inside Ray's C++ calls would not reach us as it is
    sys.exit(drive(config_path, report, overrides, RayCluster(), stop, Console(soft_wrap=True, width=wide)))


def drive(
    config_path: str, report: Path | None, overrides: tuple[str, ...], site: Site, stop: threading.Event,
    console: Console,
) -> int:  # fmt: skip
    """Check, run and report. Returns the exit status."""
    try:
        config = load_config(config_path, list(overrides))
        if report is not None:
            check_output(report, "--report", folder=True)
        store = Store.from_env()
        check_services(config, store)
        site.check()
        prepared = prepare_inputs(config, store, console)
        slots = site.join(prepared, console)
        with site.heeding(signal.default_int_handler):
            run_id = start_run(prepared)
    except Exception as error:
        _print_error(console, message(error))
        return REFUSED
    with site.heeding(signal.default_int_handler):
        return run(prepared, run_id, slots, site, stop, report, console)


def run(
    prepared: Prepared, run_id: str, slots: int, site: Site, stop: threading.Event, report: Path | None,
    console: Console,
) -> int:  # fmt: skip
    """Run and report. Returns the exit status."""
    config, status = prepared.config, "FAILED"
    try:
        console.print(f"run {run_id} in MLflow experiment {config.suite!r}", highlight=False)
        console.print(runs.run_page(run_id), highlight=False, markup=False)
        seeds, found = config.seeds or [config.seed], []
        replicates, announced = prepared.replicates(run_id), Announcements(prepared.store, run_id)
        announced.plan(replicates)  # before anything is looked for: garbage collection spares what is announced
        upload_inputs(prepared)
        for at, inputs in enumerate(replicates):
            if len(seeds) > 1:
                console.print(f"seed {seeds[at]}, {at + 1} of {len(seeds)}", highlight=False)
            outcome = Outcome(slots=slots)
            with announced.following(outcome), site.heeding(lambda *_: stop.set()):
                execute(inputs, outcome, Display(list(config.held_in), console), stop, announced.add, site.hire)
            if stop.is_set():
                raise Stopped
            found.append(build_results(inputs, outcome))
        publish_report(prepared.store, config, run_id, combine(seeds, found), report, console)
        status = "FINISHED"
        return DONE
    except (Stopped, KeyboardInterrupt):
        status = "KILLED"
        console.print("stopped; finished experts, nodes and scores are kept and the next run continues from there")
        return STOPPED
    except Exception as error:
        said = message(error)
        _print_error(console, said)
        with contextlib.suppress(FactoryError):  # the services themselves may be what failed
            runs.describe_run(run_id, mlflow_page.failure(said))
            if not isinstance(error, FactoryError):  # a job's driver may have been on a machine that goes away
                runs.log_text(run_id, "".join(traceback.format_exception(error)), "report/traceback.txt")
        return FAILED
    finally:
        with site.heeding(signal.SIG_IGN):  # a second one does not keep the run from being marked
            for tidy in (
                partial(runs.finish_run, run_id, status),
                partial(runs.kill_running_children, run_id),  # of workers that were lost
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
        **mlflow_page.source(_user(), code_version().get("git_commit"), submitted=bool(job)),
    }
    run_id = runs.start_run(suite, time.strftime("%Y%m%d-%H%M%S"), tags, prepared.parameters())
    try:  # now, and not after hours of training, it is seen whether the server can store files
        runs.log_text(run_id, dump_config(prepared.config), "report/config.yaml")
        runs.describe_experiment(suite, mlflow_page.experiment(suite))
    except BaseException as error:
        runs.finish_run(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    return run_id


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return ""


def _print_error(console: Console, said: str) -> None:
    console.print(f"error: {said}", style="bold red", markup=False, highlight=False)
