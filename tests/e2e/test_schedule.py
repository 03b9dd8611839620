"""Retraining on a schedule: real ticks, a minute apart, submit real runs; the scheduler is killed on the way."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from infra.store.s3 import Store
from tests.e2e.conftest import ROOT, write_task
from tests.infra.schedule.receiver import SECRET, Receiver, receiving

SUITE = "nightly"


def until(condition: Callable[[], Any], what: str, log: Path, seconds: float = 900) -> Any:
    """Poll for something that the schedule does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds:.0f} s\n{log.read_text()}")


def finished(receiver: Receiver, store: Store, client: mlflow.MlflowClient) -> list[dict[str, Any]]:
    """Results of the runs whose end was told, in the order of their ticks. A tick may be skipped on a slow machine."""
    ran = {told["submission_id"]: told for told in receiver.got if told["status"] != "SKIPPED"}
    for told in ran.values():
        assert (told["status"], told["exit_code"]) == ("SUCCEEDED", 0), told
    found = pipeline_runs(client)
    ids = [found[name] for name in sorted(ran, key=lambda name: ran[name]["tick"])]
    return [json.loads(store.get(f"runs/{run_id}/results.json")) for run_id in ids]


def pipeline_runs(client: mlflow.MlflowClient) -> dict[str, str]:
    """Id of every run that began, by its submission; each began once."""
    experiment = client.get_experiment_by_name(SUITE)
    ids = [experiment.experiment_id] if experiment else []
    found = client.search_runs(ids, "tags.kind = 'pipeline'") if ids else []
    runs = {run.data.tags["ray_submission_id"]: run.info.run_id for run in found}
    assert len(runs) == len(found), "a tick ran twice"
    return runs


def test_ticks_retrain_what_changed_and_nothing_else(
    ray_stack: Any, tiny_config: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    merge = {"fan_in": 2, "candidates": [{"method": "mean"}]}
    config = tiny_config(SUITE, held_in=2, held_out={}, merge=merge, evaluate={"few_shot": 0})
    config["resources"] |= {"concurrent_nodes": 1, "concurrent_registrations": 1}  # every worker is seconds of imports
    file, log = tmp_path / "nightly.yaml", tmp_path / "log"
    file.write_text(yaml.safe_dump(config))
    store, client = Store.from_env(), mlflow.MlflowClient(ray_stack.env()["MLFLOW_TRACKING_URI"])

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pipeline", "schedule", "--cron", "* * * * *", "--config", str(file)]
        env = {**os.environ, **ray_stack.env(), "FACTORY_WEBHOOK_URL": receiver.url}
        with open(log, "ab") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=output)
        request.addfinalizer(process.kill)
        return process

    with receiving() as receiver:
        scheduler = start()
        until(lambda: pipeline_runs(client), "the first run", log)
        scheduler.kill()
        scheduler.wait()
        scheduler = start()
        until(lambda: len(finished(receiver, store, client)) >= 2, "the second run", log)
        grown = write_task(tmp_path / "grown.jsonl", f"{SUITE}-in1-grown", rows=140)
        grown.replace(config["held_in"]["in1"]["source"].removeprefix("jsonl:"))  # a run may be reading
        retrained = lambda: [run for run in finished(receiver, store, client) if run["made"]["experts"] == 1]  # noqa: E731
        until(retrained, "the retraining", log)
        scheduler.terminate()
        assert scheduler.wait(30) == 0, log.read_text()
        first, *others, last = finished(receiver, store, client)

    assert first["made"]["experts"] == 2
    assert others
    for run in others:
        assert set(run["made"].values()) == {0}, run["made"]
        assert run["held_in"] == first["held_in"]
    assert (last["made"]["experts"], last["reused"]["experts"]) == (1, 1)
    before, now = ({task: row["expert_key"] for task, row in run["held_in"].items()} for run in (first, last))
    assert before["in0"] == now["in0"]
    assert before["in1"] != now["in1"]
    submissions = pipeline_runs(client)
    assert {told["submission_id"] for told in receiver.got if told["mlflow_run"]} <= set(submissions)
    assert all(name.startswith(f"retrain-{SUITE}-") for name in submissions)
    assert SECRET not in log.read_text()
