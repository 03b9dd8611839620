"""Pipeline processes in the background, and what they leave in a store of their own: runs that race or are killed."""

import contextlib
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import yaml
from rich.console import Console

from infra.artifacts.manifests import Manifest
from infra.stack.services import StackState
from infra.store.s3 import Store
from pipeline.config.model import load_config
from pipeline.plan.preflight import prepare_inputs
from pipeline.records.outcome import Inputs

ROOT = Path(__file__).resolve().parents[2]


def start(config: dict[str, Any], folder: Path, env: dict[str, str], ray: bool = True) -> subprocess.Popen[str]:
    """The main job as a background process that logs to `folder`/log and reports to `folder`/report; without Ray, it
    does all of the work itself."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "pipeline/main.py", "--config", str(file), "--report", str(folder / "report")]
    if not ray:
        command = [sys.executable, "-m", "tests.e2e.here", str(file), str(folder / "report")]
    log = (folder / "log").open("w")
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], folder: Path, seconds: float = 600) -> Any:
    """Poll until `condition` gives something true; fails if the job ends or the time runs out before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"nothing within {seconds} s: {(folder / 'log').read_text()[-3000:]}")


def workers(stack: StackState, title: str) -> list[psutil.Process]:
    """This stack's Ray workers that are busy with it right now (Ray sets the title of a busy worker: `ray::<name>`).

    Those that watch over submitted jobs are not work.
    """
    found = []
    for process in psutil.Process(stack.services["ray"].pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            shown = " ".join(process.cmdline())
            if re.match(r"ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent|JobSupervisor)", shown) and title in shown:
                found.append(process)
    return found


@dataclass(frozen=True)
class Factory:
    """A store of its own (a prefix) and what runs need to use it."""

    store: Store
    env: dict[str, str]

    @staticmethod
    def fresh(stack_env: dict[str, str], name: str) -> "Factory":
        prefix = f"{name}-{uuid.uuid4().hex[:8]}"
        store = Store(stack_env["FACTORY_S3_BUCKET"], stack_env["FACTORY_S3_ENDPOINT"], prefix)
        return Factory(store, {**stack_env, "FACTORY_S3_PREFIX": prefix})

    def inputs(self, config: dict[str, Any], folder: Path) -> Inputs:
        """What a run will start from, for asking what it will use or make."""
        file = folder / "planned.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        return prepare_inputs(load_config(file), self.store, Console(quiet=True)).inputs("none")

    def manifests(self) -> dict[str, Manifest]:
        """Everything that is published, by key."""
        found = (Manifest.from_json(self.store.get(name)) for name in self.store.list("artifacts/"))
        return {manifest.key: manifest for manifest in found}

    def orphans(self) -> set[str]:
        """Bytes that belong to no published artifact: left by attempts that came too late or were killed."""
        published = {ref.name for manifest in self.manifests().values() for ref in manifest.files.values()}
        return set(self.store.list("objects/")) - published

    def leases(self) -> list[str]:
        return list(self.store.list("leases/"))

    def trainings(self, suite: str) -> Iterator[tuple[str, str]]:
        """Expert key and status of every training that MLflow knows of."""
        client = mlflow.MlflowClient(self.env["MLFLOW_TRACKING_URI"])
        experiment = client.get_experiment_by_name(suite)
        assert experiment
        for run in client.search_runs([experiment.experiment_id], "tags.kind = 'expert'", max_results=1000):
            yield run.data.tags["expert_key"], run.info.status
