import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.errors import ConfigError, RegistryError
from infra.registry import runs
from infra.stack import processes
from infra.stack.services import StackState


@pytest.fixture
def run_id(stack: StackState) -> str:
    return runs.start_run("tests", "run", {"a": "b"}, {"lr": 1e-3})


def test_names() -> None:
    assert runs.model_name("quick", "gem/e2e:nlg") == "quick.gem-e2e-nlg"
    assert runs.model_names("s", ["a/b", "c"]) == {"a/b": "s.a-b", "c": "s.c"}
    with pytest.raises(ConfigError, match=r"'a/b' and 'a:b'.*'s.a-b'"):
        runs.model_names("s", ["a/b", "a:b"])


def test_check(stack: StackState, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.check()
    port = processes.choose_ports({"x": 21998}, frozenset())["x"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(RegistryError, match=f"127.0.0.1:{port} is unreachable"):
        runs.check()
    assert time.monotonic() - began < 10
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    with pytest.raises(RegistryError, match="sqlite"):
        runs.check()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@example.org")
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        runs.check()
    assert "secret" not in str(refused.value)


def test_runs_and_history(run_id: str) -> None:
    rows = [{"step": step, "loss": 1.0 / (step + 1), "nothing": float("nan")} for step in range(1200)]
    runs.log_history(run_id, rows)
    runs.set_tags(run_id, {"x": 1})
    runs.finish_run(run_id, "FINISHED")
    client = runs.client()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.001"}
    assert run.data.tags["x"] == "1"
    assert run.data.metrics == {"loss": pytest.approx(1 / 1200)}
    assert len(client.get_metric_history(run_id, "loss")) == 1200
    with pytest.raises(ValueError, match="bad status"):
        runs.finish_run(run_id, "RUNNING")


def test_a_run_of_another_experiment_or_a_deleted_one_is_replaced_by_a_child(run_id: str) -> None:
    client = runs.client()
    own, other = runs.start_run("tests", "own", {}, {}), runs.start_run("tests-elsewhere", "other", {}, {})
    assert runs.run_of_suite(own, run_id, "task") == own
    client.delete_run(own)
    for replaced in (own, other, "0" * 32):
        child = client.get_run(runs.run_of_suite(replaced, run_id, "task"))
        assert (child.info.run_name, child.info.status) == ("task", "FINISHED")
        assert child.info.experiment_id == client.get_run(run_id).info.experiment_id
        assert child.data.tags["mlflow.parentRunId"] == run_id


def test_a_text_is_stored_or_the_reason_said(run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.log_text(run_id, "a: 1", "report/config.yaml")
    assert [file.path for file in runs.client().list_artifacts(run_id, "report")] == ["report/config.yaml"]
    with pytest.raises(RegistryError, match=r"could not store 'x' with run 0000"):
        runs.log_text("0" * 32, "a", "x")


def test_histories_of_several_runs(run_id: str) -> None:
    other = runs.start_run("tests", "other", {}, {})
    runs.log_history(run_id, [{"step": step, "loss": 2.0 * step} for step in (3, 1, 2)])
    runs.log_history(other, [{"step": 1, "gain": 0.5}])
    gone = uuid.uuid4().hex
    found = runs.histories([run_id, other, gone], ["loss", "gain"])
    assert found[run_id, "loss"] == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert found[other, "gain"] == [(1, 0.5)]
    assert [found[key] for key in ((run_id, "gain"), (other, "loss"), (gone, "loss"))] == [[], [], []]


def test_what_a_page_says_about_a_run(run_id: str) -> None:
    runs.log_data(run_id, "a task", "0123456789abcdef" * 4, "jsonl:rows.jsonl", "train")
    runs.describe_run(run_id, "**better**")
    run = runs.client().get_run(run_id)
    assert run.data.tags["mlflow.note.content"] == "**better**"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("a task", "0123456789ab")
    assert "jsonl:rows.jsonl" in data.dataset.source
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "train")]
    page = runs.run_page(run_id)
    assert page.startswith(f"{runs.tracking_uri()}/#/experiments/{run.info.experiment_id}/runs/{run_id}?")


def test_a_description_that_somebody_wrote_stays(stack: StackState) -> None:
    name = uuid.uuid4().hex
    runs.start_run(name, "run", {}, {})
    runs.describe_experiment(name, "first")
    runs.describe_experiment(name, "second")
    found = runs.client().get_experiment_by_name(name)
    assert found is not None
    assert found.tags["mlflow.note.content"] == "first"
    runs.describe_experiment(uuid.uuid4().hex, "no such experiment")


def test_experiments_are_made_once_by_racing_starters(stack: StackState) -> None:
    name = uuid.uuid4().hex
    barrier = threading.Barrier(4)

    def start(_: int) -> str:
        barrier.wait()
        return runs.start_run(name, "run", {}, {})

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(start, range(4)))) == 4


def test_kill_running_children(run_id: str) -> None:
    children = [runs.start_run("tests", f"child {i}", {}, {}, parent_run_id=run_id) for i in range(6)]
    stranger = runs.start_run("tests", "stranger", {}, {})
    runs.finish_run(children[0], "FINISHED")
    assert runs.kill_running_children(run_id) == 5
    client = runs.client()
    statuses = [client.get_run(child).info.status for child in children]
    assert statuses == ["FINISHED"] + ["KILLED"] * 5
    assert client.get_run(stranger).info.status == "RUNNING"
    assert client.get_run(children[1]).info.end_time is not None
    assert runs.kill_running_children(run_id) == 0
