"""What an MLflow server refuses, in words, and a fault at every request of everything that is asked of one."""

import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra.errors import RegistryError
from infra.registry import history, roots, runs, versions
from tests.infra.registry.mlflow_process import FAULTS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.infra.registry.mlflow_process", str(tmp_path_factory.mktemp("mlflow"))],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(address: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Asks the server's own pages; the environment names it, and nothing is asked again."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return lambda path: urllib.request.urlopen(f"{address}/{path}").read().decode()


def a_run(folder: Path) -> None:
    run = runs.start_run("faults", "run", {"kind": "pipeline"}, {"lr": 1})
    runs.log_history(run, [{"step": 0, "loss": 1.0}])
    runs.log_text(run, "text", "report/text.txt")
    (folder / "report").mkdir(exist_ok=True)
    (folder / "report" / "a.txt").write_text("a")
    runs.log_folder(run, folder / "report", "report")
    runs.log_data(run, "data", "0" * 64, "jsonl:x", "train")
    runs.set_tags(run, {"a": 1})
    runs.describe_run(run, "text")
    assert runs.histories([run], ["loss"]) == {(run, "loss"): [(0, 1.0)]}
    runs.run_page(run)
    child = runs.start_run("faults", "child", {}, {}, run)
    assert runs.kill_running_children(run) == 1
    runs.run_of_suite(child, run, "child")
    runs.finish_run(run, "FINISHED")


def looking(folder: Path) -> None:
    history.expert_keys("faults", "task")
    roots.pipeline_runs()
    assert versions.models_of("faults") == []
    assert versions.champion("faults.merged") is None


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scene", [a_run, looking])
def test_a_fault_at_any_request_is_one_line_that_names_the_server(
    scene: Callable[[Path], None], fault: str, server: Callable[[str], str], address: str, tmp_path: Path
) -> None:
    server("fail/host/-1")
    scene(tmp_path)
    said = []
    for number in range(int(server("asked"))):
        server(f"fail/{fault}/{number}")
        began = time.monotonic()
        try:
            scene(tmp_path)
        except RegistryError as error:
            said.append(str(error))
        except AssertionError:  # an answer that was lost is nothing that was found
            assert fault in ("login", "cut")
        assert time.monotonic() - began < 60
    assert said
    assert [text for text in said if "\n" in text or address not in text] == []


class Answers:
    """A server that answers everything alike."""

    def __init__(self, status: int, body: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


HOST = "Invalid Host header - possible DNS rebinding attack detected"
REFUSED = {
    "a host name that the server does not know": (403, HOST, r"by the name 127\.0\.0\.1:\d+ .*--allowed-hosts"),
    "a wrong password": (401, "", r"refused the credentials \(401\); check MLFLOW_TRACKING_USERNAME"),
    "no permission": (403, "Permission denied", r"refused the credentials \(403: Permission denied\)"),
    "a page to log in": (200, "<html>\nSign in</html>", r"something else than MLflow's API.*MLFLOW_TRACKING_TOKEN"),
    "another service": (404, "nothing here", "no MLflow server, or one below another path"),
    "a server that is unwell": (500, "<html>\nError</html>", "does not list its experiments \\(500: <html> Error"),
}
"""What is refused before any work: status and body of an answer, and what is read of it."""


@pytest.mark.parametrize("case", REFUSED)
def test_the_check_names_the_cause(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, body, text = REFUSED[case]
    answers = Answers(status, body)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{answers.server.server_port}")
    with pytest.raises(RegistryError, match=text) as refused:
        runs.check(retries=0)
    answers.server.shutdown()
    assert "\n" not in str(refused.value)
    assert ("credentials" in str(refused.value)) == (status in (401, 403) and body != HOST)


def test_a_server_that_says_nothing_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(RegistryError, match="is unreachable"):
            runs.check(timeout=1)
        assert time.monotonic() - began < 20
