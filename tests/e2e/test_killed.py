"""Runs and workers that are killed: the next one makes what is missing, under the same keys, and nothing twice."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import psutil

from infra.artifacts.leases import Holder
from infra.artifacts.manifests import Manifest
from infra.registry.versions import models_of
from pipeline.flow.rehearse import known_keys
from tests.e2e.background import Factory, start, wait_for, workers

CONFIG = Callable[..., dict[str, Any]]
EXPIRY_S = 6.0


def small(tiny_config: CONFIG, suite: str, lease_s: float, steps: int = 40, **sections: Any) -> dict[str, Any]:
    """Few candidates, scores and workers; enough steps for a moment to kill in."""
    merge = {"fan_in": 2, "candidates": [{"method": "mean"}, {"method": "ties", "params": {"density": 0.5}}]}
    config = tiny_config(suite, held_in=3, held_out={}, **({"merge": merge} | sections))
    config["train"] |= {"steps": steps}
    config["evaluate"] |= {"few_shot": 0}
    config["resources"] |= {"lease_seconds": lease_s, "concurrent_nodes": 1, "concurrent_registrations": 1}
    return config


def results_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report" / "results.json").read_text()))


def etags(factory: Factory) -> dict[str, str]:
    """Entity tags of all manifests by name: what is replaced gets another one."""
    found = {name: factory.store.head(name) for name in factory.store.list("artifacts/")}
    return {name: info.etag for name, info in found.items() if info}


def until_idle(stack: Any) -> None:
    """Ray ends the workers of a driver that was killed; until then one may still publish."""
    deadline = time.monotonic() + 120
    while busy := workers(stack, ""):
        assert time.monotonic() < deadline, busy
        time.sleep(0.2)


def test_a_driver_killed_at_any_point_is_continued(ray_stack: Any, tiny_config: CONFIG, tmp_path: Path) -> None:
    factory = Factory.fresh(ray_stack.env(), "continued")
    config = small(tiny_config, "driver-killed", EXPIRY_S)
    expected = known_keys(factory.inputs(config, tmp_path))

    def published(kind: str) -> Callable[[], bool]:
        return lambda: any(manifest.kind == kind for manifest in factory.manifests().values())

    def at_the_gate() -> bool:
        found = factory.manifests().values()
        return any(manifest.kind == "evaluation" and manifest.config["split"] == "gate" for manifest in found)

    points = {
        "working": lambda: bool(factory.leases()),
        "node": published("node"),
        "merged": published("merged"),
        "gate": at_the_gate,
    }
    kept: dict[str, str] = {}
    trained: set[str] = set()
    for name, reached in points.items():
        process = start(config, tmp_path / name, factory.env)
        try:
            wait_for(reached, process, tmp_path / name)
            process.send_signal(signal.SIGKILL)
            process.wait()
        finally:
            process.kill()
        until_idle(ray_stack)
        assert kept.items() <= etags(factory).items(), "what was published stays what it is"
        kept = etags(factory)
        trained |= {key for key, manifest in factory.manifests().items() if manifest.kind == "expert"}
    assert trained
    kept_keys = factory.manifests()
    last = tmp_path / "last"
    process = start(config, last, factory.env)
    try:
        assert process.wait(timeout=900) == 0, (last / "log").read_text()[-3000:]
    finally:
        process.kill()
    manifests = factory.manifests()
    assert kept.items() <= etags(factory).items()
    assert expected <= set(manifests)
    assert {manifest.kind for key, manifest in manifests.items() if key not in expected} == {"evaluation"}
    results = results_of(last)
    before = {key: Manifest.from_json(factory.store.get(name)).kind for name in kept for key in [name[10:74]]}
    for counted, kind in (("experts", "expert"), ("evaluations", "evaluation")):
        there = sum(1 for found in before.values() if found == kind)
        in_all = sum(1 for manifest in manifests.values() if manifest.kind == kind)
        assert results["made"][counted] == in_all - there, counted
    # A worker that was killed between publishing and releasing leaves its lease, which nobody needs any more.
    assert {name.removeprefix("leases/").removesuffix(".json") for name in factory.leases()} <= set(kept_keys)
    assert list(factory.store.list("checkpoints/")) == []
    models = {model.task: model for model in models_of(config["suite"])}
    assert set(models) == {*config["held_in"], "merged"}
    assert all(len(model.versions) == 1 for model in models.values()), "each is registered once"
    assert all(model.aliases for model in models.values())


def test_a_killed_worker_is_replaced_without_waiting_for_its_lease(
    ray_stack: Any, tiny_config: CONFIG, tmp_path: Path
) -> None:
    """The leases would live for an hour. An expert and an evaluation lose their worker; a merge node of this size is
    made too fast to be caught (tests/merge/test_drivers.py has a dead holder of one)."""
    factory = Factory.fresh(ray_stack.env(), "worker")
    config = small(tiny_config, "worker-killed", 3600.0, steps=120)
    config["splits"] |= {"test": 40}  # evaluations that last long enough to be caught
    process, log = start(config, tmp_path, factory.env), tmp_path / "log"
    try:

        def held() -> dict[int, str]:
            """Keys that are worked on by process."""
            found = {name: factory.store.get_with_etag(name) for name in factory.leases()}
            parsed = {name: Holder.from_json(each[0]) for name, each in found.items() if each}
            return {h.pid: name.removeprefix("leases/").removesuffix(".json") for name, h in parsed.items() if h}

        def stopped(title: str) -> psutil.Process | None:
            """A worker in the middle of its work, which it does not end while we look."""
            for worker in workers(ray_stack, title):
                worker.suspend()
                if (key := held().get(worker.pid)) is not None and key not in factory.manifests():
                    return worker
                worker.resume()
            return None

        for title in ("expert", "Resident.work"):
            wait_for(lambda title=title: stopped(title), process, tmp_path).kill()  # type: ignore[misc]
        assert process.wait(timeout=900) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    results = results_of(tmp_path)
    assert results["made"]["experts"] == 3
    assert factory.leases() == []
    assert "being made elsewhere" not in log.read_text()
    client = mlflow.MlflowClient(factory.env["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(config["suite"])
    assert experiment
    left = client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
    assert not left, "the run of the killed attempt must not stay open"
