"""What goes wrong in a run: failing experts, a stopped job, bytes that are damaged. Finished work is always kept."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.entities import Run

from infra.stack import services
from infra.store.layout import manifest_name
from infra.store.s3 import Store
from tests.e2e.background import Factory, start, wait_for

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Callable[..., dict[str, Any]]
ONE_AT_A_TIME = {"concurrent_nodes": 1, "concurrent_registrations": 1}
"""Of a driver whose work is not what a test is about: every further worker is seconds of imports."""
FEW_SCORES = {"merge": {"candidates": [{"method": "mean"}]}, "evaluate": {"few_shot": 0, "serving_dtype": None}}


def slow(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Long enough to be stopped; its leases would live for an hour, and a run after it would wait for them."""
    train = config["train"] | {"steps": steps, "validate_every": None}
    return config | {"train": train, "resources": config["resources"] | ONE_AT_A_TIME | {"lease_seconds": 3600}}


def check_stopped(log: Path, env: dict[str, str]) -> list[Run]:
    """The run is marked as killed; returns its children."""
    found = re.search(r"run ([0-9a-f]{32})", log.read_text())
    assert found
    client = mlflow.MlflowClient(env["MLFLOW_TRACKING_URI"])
    parent = client.get_run(found.group(1))
    assert parent.info.status == "KILLED", log.read_text()[-3000:]
    return list(client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found.group(1)}'"))


def until_released(factory: Factory) -> None:
    """No lease is left soon, and none would expire within the hour."""
    deadline = time.monotonic() + 60
    while factory.leases():
        assert time.monotonic() < deadline, factory.leases()
        time.sleep(0.1)


def test_sigterm_keeps_finished_work_and_marks_runs_killed(ray_stack: Any, tiny_config: CONFIG, tmp_path: Path) -> None:
    factory, log = Factory.fresh(ray_stack.env(), "stopped"), tmp_path / "log"
    process = start(slow(tiny_config("stopped", held_in=3), 200), tmp_path, factory.env)
    try:
        wait_for(lambda: re.search(r"in\d: done", log.read_text()) and factory.leases(), process, tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 130, log.read_text()[-3000:]
        until_released(factory)
    finally:
        process.kill()
    children = check_stopped(log, factory.env)
    assert {child.info.status for child in children} <= {"FINISHED", "KILLED"}
    kept = [child for child in children if child.info.status == "FINISHED"]
    assert 0 < len(kept) < 3, "it did not wait for the others"
    assert all(factory.store.head(manifest_name(child.data.tags["expert_key"])) for child in kept)


def test_ray_job_stop_marks_the_runs_killed(ray_stack: Any, tiny_config: CONFIG, tmp_path: Path) -> None:
    factory, config, log = Factory.fresh(ray_stack.env(), "job-stopped"), tmp_path / "config.yaml", tmp_path / "log"
    config.write_text(yaml.safe_dump(slow(tiny_config("job-stopped", held_in=2), 4000), sort_keys=False))
    env = {**os.environ, **factory.env}
    ray, job = str(Path(sys.executable).with_name("ray")), f"stopped-{uuid.uuid4().hex}"
    environment = json.dumps({"env_vars": {"FACTORY_S3_PREFIX": factory.store.prefix}})
    submit = [ray, "job", "submit", "--submission-id", job, "--working-dir", str(ROOT)]
    submit += ["--runtime-env-json", environment, "--"]
    main = ["python", "pipeline/main.py", "--config", str(config)]
    with log.open("w") as out:
        process = subprocess.Popen([*submit, *main], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: re.search(r"in\d: training", log.read_text()), process, tmp_path)
        assert factory.leases()
        subprocess.run([ray, "job", "stop", job], cwd=ROOT, env=env, check=True, timeout=120, capture_output=True)
        process.wait(timeout=60)
        until_released(factory)
    finally:
        process.kill()
    assert {child.info.status for child in check_stopped(log, env)} == {"KILLED"}


def test_a_restart_of_the_object_store_costs_nothing(ray_stack: Any, tiny_config: CONFIG, tmp_path: Path) -> None:
    factory, log = Factory.fresh(ray_stack.env(), "restarted"), tmp_path / "log"
    config = tiny_config("restarted", held_in=2, **FEW_SCORES)
    config["train"] |= {"steps": 100, "validate_every": None}  # done long before it is back
    config["resources"] |= ONE_AT_A_TIME
    process = start(config, tmp_path, factory.env)
    try:
        wait_for(lambda: re.search(r"in\d: training", log.read_text()), process, tmp_path)
        before = services.load(ray_stack.home)
        assert before
        os.kill(before.services["s3"].pid, signal.SIGKILL)
        time.sleep(8)  # it is away for longer than boto3 itself asks again, which is a second
        after = services.up(ray_stack.home)
        assert after.services["s3"] != before.services["s3"]
        assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        services.up(ray_stack.home)
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["made"]["experts"] == 2
    assert sorted(status for _, status in factory.trainings("restarted")) == ["FINISHED"] * 2


def test_one_failing_expert_does_not_discard_the_others(pipeline: Any, tiny_config: CONFIG, tmp_path: Path) -> None:
    config = tiny_config("failing", held_in=3, **FEW_SCORES)
    config["resources"] |= ONE_AT_A_TIME
    unreasonable = config | {"train": config["train"] | {"learning_rate": 1e38, "clip_norm": 1e30}}
    finished = pipeline(unreasonable, own_process=True)
    assert finished.code == 1, finished.output[-3000:]
    assert "experts failed" in finished.output
    assert "learning_rate" in finished.output
    broken = dict(config["held_in"])
    name = next(iter(broken))
    rows = Path(broken[name]["source"].removeprefix("jsonl:")).read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*rows, "{not json"]))
    broken[name] = broken[name] | {"source": f"jsonl:{bad}"}
    refused = pipeline(config | {"held_in": broken})
    assert refused.code == 2, refused.output[-3000:]
    assert str(bad) in refused.output


def test_a_run_continues_where_a_failed_one_ended(pipeline: Any, tiny_config: CONFIG) -> None:
    config = tiny_config("continued", held_in=3)
    first = pipeline(config | {"held_in": {"in0": config["held_in"]["in0"]}})
    assert first.code == 0, first.output[-3000:]
    second = pipeline(config)
    assert second.code == 0, second.output[-3000:]
    assert second.results["reused"]["experts"] == 1
    assert second.results["made"]["experts"] == 2


def test_a_corrupted_adapter_is_refused(pipeline: Any, tiny_config: CONFIG) -> None:
    config = tiny_config("corrupted", held_in=2)
    first = pipeline(config)
    assert first.code == 0, first.output[-3000:]
    store = Store.from_env()
    name = first.results["held_in"]["in0"]["expert_uri"].split("/", 3)[3]
    data = bytearray(store.get(name))
    data[-1] ^= 0xFF
    store.put(name, bytes(data))
    merge = {"fan_in": 4, "candidates": [{"method": "ties", "params": {"density": 0.5}}]}
    second = pipeline(config | {"merge": merge})
    assert second.code == 1, second.output[-3000:]
    assert "corrupt" in second.output


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FACTORY_S3_ENDPOINT", "http://127.0.0.1:9", "127.0.0.1:9"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "credentials"),
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:9", "MLflow"),
    ],
)
def test_services_that_cannot_be_used(
    pipeline: Any, tiny_config: CONFIG, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    refused = pipeline(tiny_config("services", held_in=1))
    assert refused.code == 2
    assert expected in refused.output
    assert "Traceback" not in refused.output
