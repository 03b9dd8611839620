"""A submitted run on a cluster of three nodes that share nothing but S3 and MLflow, one of which is lost on the way.

One run serves all tests of this module.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import requests
import yaml

from infra.artifacts.manifests import Manifest
from infra.stack import processes
from infra.store.s3 import Store
from tests.e2e import nodes

ROOT = Path(__file__).resolve().parents[2]
SUITE = PREFIX = "cluster"
SECRETS = {
    "HF_TOKEN": "hf_sentinelKaXqTrWm",
    "MLFLOW_TRACKING_USERNAME": "nobody",
    "MLFLOW_TRACKING_PASSWORD": "pw-sentinel-b7Qn2",
    "FACTORY_WEBHOOK_URL": "http://127.0.0.1:9/hook/sentinel-t0k3n",
}
# More than fits into every node's object store (80 MiB), kept: Ray spills while the run is there.
FILLER = """
import numpy, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(log_to_driver=False)

@ray.remote(num_cpus=0, lifetime="detached")
class Filler:
    def fill(self):
        self.kept = [ray.put(numpy.full(20 << 20, number, numpy.uint8)) for number in range(6)]

fillers = {node["NodeID"]: Filler.options(name=node["NodeID"], scheduling_strategy=On(node["NodeID"], soft=False))
           for node in ray.nodes()}
ray.get([filler.remote().fill.remote() for filler in fillers.values()])
"""


@dataclass(frozen=True)
class Run:
    """What the run on the cluster left."""

    cluster: nodes.Cluster
    project: Path
    code: int
    output: str
    results: dict[str, Any]
    lost: nodes.Node
    started_on_lost: set[str]
    """Names of the tasks that ran on the lost node when it was lost."""

    @property
    def alive(self) -> list[nodes.Node]:
        return [node for node in self.cluster.nodes if node is not self.lost]


@pytest.fixture(scope="module")
def submitter(stack: Any) -> dict[str, str]:
    """Variables of whoever submits and looks."""
    return {**stack.env(), **SECRETS, "FACTORY_S3_PREFIX": PREFIX}


@pytest.fixture(scope="module")
def store(stack: Any) -> Store:
    """What the run writes to."""
    env = stack.env()
    keys = (env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"])
    return Store(env["FACTORY_S3_BUCKET"], env["FACTORY_S3_ENDPOINT"], PREFIX, keys)


@pytest.fixture(scope="module")
def cluster(submitter: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[nodes.Cluster]:
    if sys.platform != "linux":
        pytest.skip("nodes have addresses of their own in 127.0.0.0/8, which only Linux gives")
    base = tmp_path_factory.mktemp("cluster")
    hidden = [tmp_path_factory.getbasetemp(), ROOT, Path.home() / ".cache"]
    with nodes.cluster(base, submitter, 3, hidden) as made:
        yield made


@pytest.fixture(scope="module")
def config(tiny_config: Callable[..., dict[str, Any]], store: Store) -> dict[str, Any]:
    """Six tasks, their rows in the object store."""
    merge = {"fan_in": 2, "candidates": [{"method": "mean"}, {"method": "ties"}]}
    made = tiny_config(SUITE, held_in=6, merge=merge, evaluate={"few_shot": 0, "batch_size": 8})
    made["train"] |= {"steps": 120, "validate_every": 60}
    for name, task in {**made["held_in"], **made["held_out"]}.items():
        store.put(f"data/{name}.jsonl", Path(task["source"].removeprefix("jsonl:")).read_bytes())
        task["source"] = f"jsonl:{store.uri(f'data/{name}.jsonl')}"
    return made


@pytest.fixture(scope="module")
def run(
    cluster: nodes.Cluster, config: dict[str, Any], store: Store, tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:  # fmt: skip
    """Submit a copy of the project while every node spills, and lose the last node amid its first expert.

    What the submitter and the driver read is removed before, when the driver has read it.
    """
    head, lost = cluster.nodes[0], cluster.nodes[-1]
    shutil.copytree(tiny_base, head.folder / "base")  # only the driver's node has it
    project, log = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("log") / "submit.log"
    for folder in ("infra", "merge", "workers", "pipeline"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "run.yaml").write_text(yaml.safe_dump({**config, "base": f"path:{head.seen}/base"}, sort_keys=False))
    filler = tmp_path_factory.mktemp("filler")
    (filler / "fill.py").write_text(FILLER)
    filling = submit(cluster, filler, "fill.py", log=log.with_name("fill.log"))
    process = submit(cluster, project, "pipeline/main.py", "--config", "run.yaml", log=log)
    try:
        until(lambda: process.poll() is not None or on(cluster, lost, "expert "), "an expert on the last node")
        fetched = lambda: any((lost.folder / "cache/bases").glob("*/identity.json"))  # noqa: E731
        until(lambda: process.poll() is not None or fetched(), "its base")
        shutil.rmtree(project)
        shutil.rmtree(head.folder / "base")
        assert filling.wait(300) == 0, log.with_name("fill.log").read_text()
        running = until(lambda: process.poll() is not None or stopped(lost), "an expert on the last node")
        lost.kill()
        code = process.wait(420)
    finally:
        process.kill()
        filling.kill()
    results = [name for name in store.list("runs/") if name.endswith("/results.json")]
    assert code == 0, log.read_text()[-8000:]
    return Run(cluster, project, code, log.read_text(), json.loads(store.get(results[0])), lost, running)


def on(cluster: nodes.Cluster, node: nodes.Node, name: str) -> set[str]:
    """Tasks running on a node whose name starts so; none if Ray does not say."""
    with contextlib.suppress(requests.RequestException, KeyError, TypeError):
        return {task for task, address in cluster.running(name).items() if address == node.address}
    return set()


def stopped(node: nodes.Node) -> set[str]:
    """Names of the experts that are being trained on a node, by workers that are stopped so that they stay in it."""
    found = set()
    for worker in processes.marked([node.marker]):
        with contextlib.suppress(psutil.Error):
            if not re.match(r"ray::expert ", " ".join(worker.cmdline())):
                continue
            worker.suspend()
            if title := re.match(r"ray::(expert \S+)", " ".join(worker.cmdline())):
                found.add(title[1])
            else:  # it was about to end
                worker.resume()
    return found


def until(condition: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    """Poll for something that another process does."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)
    return found


def submit(cluster: nodes.Cluster, folder: Path, *command: str, log: Path) -> subprocess.Popen[bytes]:
    """Submit a job from a folder, as a person does; the process ends when the job does."""
    ray = str(Path(sys.executable).with_name("ray"))
    with open(log, "ab") as output:
        return subprocess.Popen(
            [ray, "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--", "python", *command],
            cwd=folder, env={**os.environ, **cluster.env}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def manifests(store: Store) -> list[Manifest]:
    return [Manifest.from_json(store.get(name)) for name in store.list("artifacts/")]


def test_the_run_ends_well_though_a_node_is_lost(run: Run) -> None:
    assert any(name.startswith("expert ") for name in run.started_on_lost)
    assert f"Node IP: {run.lost.address}" in run.output  # Ray says which task it starts again
    assert run.results["made"]["experts"] == 6
    assert set(run.results["reused"].values()) == {0}
    assert run.results["summary"]["held_in"]["expert"] > run.results["summary"]["held_in"]["base"]
    assert set(run.cluster.alive().values()) == {node.address for node in run.alive}


def test_work_spreads(run: Run, store: Store) -> None:
    """Of merge nodes this small, one worker may make all before Ray has started another."""
    made_on = {made.meta["environment"]["ray_node"] for made in manifests(store) if made.kind == "expert"}
    assert len(made_on) >= 2, made_on


def test_each_node_fetches_the_base_once(run: Run) -> None:
    """Whole, that is: merge roots read ranges of it, to see what rounding does to the merged weights."""
    if not run.cluster.isolated:
        pytest.skip("without mount namespaces, nodes have no names of their own for the object store")
    head, *workers = run.cluster.nodes
    assert any("/rows/" in name or "/data/" in name for name in head.gateway.whole), head.gateway.whole
    for node in run.cluster.nodes:
        fetched = {name: count for name, count in node.gateway.whole.items() if "/bases/" in name}
        assert set(fetched.values()) <= {1}, (node.name, fetched)
        assert sum(name.endswith(".safetensors") for name in fetched) == (node in workers), (node.name, fetched)


def test_no_node_sees_a_path_of_another(run: Run, tiny_base: Path) -> None:
    if not run.cluster.isolated:
        pytest.skip("no mount namespaces here; what the submitter read was removed before the work began")
    foreign = [ROOT / "pyproject.toml", run.project.parent, tiny_base, Path.home() / ".cache"]
    foreign += [node.folder for node in run.cluster.nodes]
    assert [path for path in foreign if not path.exists()] == []
    for node in run.alive:
        for process in processes.marked([node.marker]):
            seen = [str(path) for path in foreign if list(Path(f"/proc/{process.pid}/root{path}").glob("*"))]
            assert seen == [], (node.name, process)


def test_the_object_stores_spilled(run: Run) -> None:
    for node in run.alive:
        assert any(path.is_file() for path in (node.folder / "ray").glob("*/ray_spilled_objects_*/**/*")), node.name


def test_a_run_on_one_node_finds_every_key(
    run: Run, pipeline: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTORY_S3_PREFIX", PREFIX)
    finished = pipeline(config)
    assert finished.code == 0, finished.output[-4000:]
    assert set(finished.results["made"].values()) == {0}
    made, reused = run.results["made"], finished.results["reused"]
    assert 0 < reused.pop("evaluations") <= made["evaluations"]  # nothing is gated again
    assert reused == {name: count for name, count in made.items() if name in reused}
    assert finished.results["held_in"] == run.results["held_in"]


def test_mlflow_names_the_submission(run: Run, stack: Any) -> None:
    client = mlflow.MlflowClient(stack.env()["MLFLOW_TRACKING_URI"])
    tags = client.get_run(run.results["run_id"]).data.tags
    [submitted] = re.findall(r"Job '(raysubmit_\w+)' submitted", run.output)
    assert tags["ray_submission_id"] == submitted


def test_no_secret_is_written_anywhere(
    run: Run,
    submitter: dict[str, str],
    store: Store,
    stack: Any,
    config: dict[str, Any],
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    """Where the run, Ray and MLflow write, no credential is; that the search finds some is seen on the token files."""
    token = Path(submitter["RAY_AUTH_TOKEN_PATH"]).read_text()
    values = [*SECRETS.values(), token, submitter["AWS_SECRET_ACCESS_KEY"], submitter["AWS_ACCESS_KEY_ID"]]
    secrets = [value.encode() for value in values if value != "nobody"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "base": f"path:{tiny_base}"}, sort_keys=False))
    command = [sys.executable, "-m", "pipeline", "plan", "--config", str(tmp_path / "run.yaml")]
    plan = subprocess.run(command, cwd=ROOT, env={**os.environ, **submitter}, capture_output=True, check=False)
    assert plan.returncode == 0, plan.stdout + plan.stderr
    client = mlflow.MlflowClient(submitter["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(SUITE)
    assert experiment is not None
    written = {"output": run.output.encode(), "plan": plan.stdout + plan.stderr}
    folders = [*(node.folder for node in run.cluster.nodes), Path(stack.home) / "logs", Path(stack.home) / "mlflow"]
    for path in (Path(where) / name for folder in folders for where, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(OSError):  # nodes and servers live, and tidy up; sockets cannot be read
            written[str(path)] = path.read_bytes()
    artifacts = Store("mlflow", store.endpoint, f"artifacts/{experiment.experiment_id}", credentials=store._credentials)
    for place in (store, artifacts):
        written |= {place.uri(name): place.get(name) for name in place.list()}
    for node in run.alive:
        for process in processes.marked([node.marker]):
            with contextlib.suppress(psutil.Error):
                written[f"command line of {process.pid}"] = " ".join(process.cmdline()).encode()
    holding = {name for name, text in written.items() if any(secret in text for secret in secrets)}
    assert holding == {str(node.folder / "token") for node in run.cluster.nodes}
    kinds = ("/logs/job-driver-", "mlflow.db", f"s3://mlflow/artifacts/{experiment.experiment_id}/", "s3://factory/")
    assert all(any(kind in name for name in written) for kind in kinds)
