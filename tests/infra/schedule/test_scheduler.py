import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from infra.errors import ConfigError
from infra.registry import runs
from infra.schedule import webhook
from infra.schedule.job import Scheduled, check_reachable, job_entrypoint, read_scheduled
from infra.schedule.scheduler import JobApiError, RayJobs, Scheduler, mlflow_run
from infra.schedule.ticks import ACTIVE, Cron, Job, submission_id
from infra.stack.services import StackState
from infra.store.client import is_loopback
from infra.store.s3 import Store
from pipeline.commands.schedule import schedule
from tests.infra.schedule.receiver import SECRET, Receiver, receiving

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "pipeline/configs/quickstart.yaml"
DAY = timedelta(days=1)
NIGHT = datetime(2026, 3, 2, 2, tzinfo=UTC)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def until(condition: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    """Poll for something that another process does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


# -- a scheduler's life, on the real stack -------------------------------------------------------------------------

_JOB = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
name = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
started = folder / f"{name}.started"
started.with_suffix(".part").write_text(" ".join(sorted(os.listdir("."))))
started.with_suffix(".part").rename(started)
while not (folder / f"{name}.exit").exists():
    time.sleep(0.05)
sys.exit(int((folder / f"{name}.exit").read_text()))
"""


def ray_jobs() -> dict[str, str]:
    """Status by submission id. By HTTP: in this process Ray was imported before the stack's token was there."""
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    address = f"{os.environ['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    answer = requests.get(address, headers={"Authorization": f"Bearer {token}"}, timeout=60)
    answer.raise_for_status()
    return {job["submission_id"]: job["status"] for job in answer.json() if job["submission_id"]}


def ask(what: str, suite: str, tick: datetime, folder: Path) -> str:
    """What `RayJobs.submit` or `stop` says of a tick, in a process of its own."""
    code = (
        "import os; from datetime import datetime; from pathlib import Path; "
        "from infra.schedule.scheduler import RayJobs; "
        f"jobs = RayJobs(os.environ['RAY_API_SERVER_ADDRESS'], {suite!r}, 'true', Path({str(folder)!r})); "
        f"tick = datetime.fromisoformat({tick.isoformat()!r}); started = jobs.list()[tick].started; "
        f"assert 0 <= datetime.now().timestamp() - started.timestamp() < 3600; print(jobs.{what}(tick))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def test_kills_overlap_and_missed_ticks(
    ray_stack: StackState, store: Store, receiver: Receiver, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    suite, project, folder, clock = uuid.uuid4().hex[:8], tmp_path / "project", tmp_path / "out", tmp_path / "clock"
    project.mkdir()
    folder.mkdir()
    (project / "job.py").write_text(_JOB)
    (project / "huge.bin").write_text("x")
    (project / ".rayignore").write_text("huge.bin\n")
    given = {"suite": suite, "entrypoint": f"python job.py {folder}", "folder": str(project), "prefix": store.prefix}
    given |= {"clock": str(clock), "url": receiver.url}
    first, second, third = (submission_id(suite, NIGHT + days * DAY) for days in (0, 1, 4))
    state, log = f"schedules/{suite}.json", tmp_path / "log"
    receiver.statuses = [503]
    request.addfinalizer(lambda: [ends(name, 0) for name in (first, second, third)])

    def write(file: Path, text: str) -> None:
        """Others poll: they see all of it, or no file."""
        part = file.with_suffix(".part")
        part.write_text(text)
        part.replace(file)

    def is_now(moment: datetime) -> None:
        write(clock, moment.isoformat())

    def ends(name: str, code: int) -> None:
        write(folder / f"{name}.exit", str(code))

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).with_name("scheduler_process.py")), json.dumps(given)]
        with open(log, "a") as output:
            process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=output)
        request.addfinalizer(process.kill)
        return process

    def ids() -> list[str]:
        return sorted(name for name in ray_jobs() if name.startswith(f"retrain-{suite}-"))

    def told() -> list[tuple[Any, ...]]:
        """The notices; one whose answer came late may have been sent again."""
        return list(dict.fromkeys((each["tick"], each["status"], each["exit_code"]) for each in receiver.got))

    def ended(name: str) -> bool:
        return ray_jobs()[name] not in ACTIVE

    is_now(NIGHT - timedelta(minutes=5))
    scheduler = start()
    until(lambda: store.head(state), "the state")
    assert ids() == []
    is_now(NIGHT + timedelta(seconds=5))
    until((folder / f"{first}.started").exists, "the first job")
    assert "job.py" in (folder / f"{first}.started").read_text()
    assert "huge.bin" not in (folder / f"{first}.started").read_text()
    scheduler.kill()
    scheduler.wait()

    # Nobody was there when the first job ended; the next night's tick is due, and not skipped because of it.
    is_now(NIGHT + DAY + timedelta(seconds=5))
    run_id = runs.start_run(suite, "run", {"ray_submission_id": first}, {})
    runs.finish_run(run_id, "FAILED")
    ends(first, 3)
    until(lambda: ended(first), "the end of the first job")
    scheduler = start()
    until(lambda: receiver.got, "a notice")
    until((folder / f"{second}.started").exists, "the second job")
    is_now(NIGHT + DAY + timedelta(minutes=1))  # the notice that the webhook refused is tried again
    until(lambda: len(receiver.got) >= 2, "the notice again")
    assert receiver.got[0] == receiver.got[1]
    assert {**receiver.got[0], "message": ""} == {
        "suite": suite,
        "tick": NIGHT.isoformat(),
        "submission_id": first,
        "status": "FAILED",
        "exit_code": 3,
        "message": "",
        "mlflow_run": mlflow_run(suite, first),
    }
    assert f"/runs/{run_id}" in str(receiver.got[0]["mlflow_run"])

    # The second job still runs when the third night comes.
    is_now(NIGHT + 2 * DAY)
    until(lambda: len(told()) == 2, "the notice of the skipped tick")
    assert told()[1] == ((NIGHT + 2 * DAY).isoformat(), "SKIPPED", None)
    assert ids() == [first, second]
    until(lambda: not json.loads(store.get(state))["notices"], "the state")  # killed before, it would tell again
    scheduler.kill()
    scheduler.wait()

    # Two ticks are missed while nobody is there: one run catches up.
    ends(second, 0)
    until(lambda: ended(second), "the end of the second job")
    is_now(NIGHT + 4 * DAY + timedelta(hours=5))
    scheduler = start()
    until((folder / f"{third}.started").exists, "the third job")
    until(lambda: len(told()) == 3, "the notice of the second job")
    assert told()[2] == ((NIGHT + DAY).isoformat(), "SUCCEEDED", 0)
    assert receiver.got[-1]["mlflow_run"] is None
    assert ids() == [first, second, third]
    assert ask("submit", suite, NIGHT + 4 * DAY, project) == "False"  # Ray refuses the id

    until(lambda: json.loads(store.get(state))["watched"] and not json.loads(store.get(state))["notices"], "the state")
    scheduler.send_signal(signal.SIGTERM)
    assert scheduler.wait(timeout=30) == 0, log.read_text()
    assert SECRET not in log.read_text()
    assert not ended(third)  # what runs keeps running
    ask("stop", suite, NIGHT + 4 * DAY, project)
    until(lambda: ray_jobs()[third] == "STOPPED", "the end of the third job")


class Manual:
    """A clock that a test moves."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def now(self) -> datetime:
        return self.moment

    def wait(self, seconds: float) -> bool:
        raise AssertionError("a step does not wait")


class Listed:
    """Jobs that end as soon as they are looked at a second time; a reused id is refused, as Ray does."""

    def __init__(self) -> None:
        self.jobs: dict[datetime, Job] = {}
        self.submitted: list[datetime] = []
        self.stopped: list[datetime] = []
        self.away = False
        self._lock = threading.Lock()

    def list(self) -> Mapping[datetime, Job]:
        if self.away:
            raise JobApiError("Ray is away")
        return dict(self.jobs)

    def stop(self, tick: datetime) -> None:
        self.stopped.append(tick)
        self.jobs[tick] = Job("STOPPED")

    def submit(self, tick: datetime) -> bool:
        with self._lock:
            if tick in self.jobs:
                return False
            self.submitted.append(tick)
            self.jobs[tick] = Job("SUCCEEDED", 0)
            return True


def test_schedulers_of_one_suite_stand_in_for_each_other(store: Store, receiver: Receiver) -> None:
    clock, jobs = Manual(NIGHT - DAY / 2), Listed()
    several = [
        Scheduler("s", Cron("0 2 * * *"), DAY / 2, jobs, store, clock, receiver.url) for _ in range(3)
    ]  # fmt: skip
    for scheduler in several:
        scheduler.step()
    for night in range(3):
        clock.moment = NIGHT + night * DAY
        for _ in range(4):
            threads = [threading.Thread(target=scheduler.step) for scheduler in several]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert jobs.submitted == [NIGHT + night * DAY for night in range(3)]
    told = [(notice["tick"], notice["status"]) for notice in receiver.got]
    assert sorted(told) == [((NIGHT + night * DAY).isoformat(), "SUCCEEDED") for night in range(3)]


def test_a_dead_webhook_never_stops_the_schedule(store: Store, receiver: Receiver) -> None:
    clock, jobs = Manual(NIGHT - DAY / 2), Listed()
    receiver.statuses = [500] * 100
    scheduler = Scheduler("s", Cron("0 2 * * *"), DAY / 2, jobs, store, clock, receiver.url)
    for minutes in range(0, 3 * 24 * 60, 20):
        clock.moment = NIGHT - DAY / 2 + timedelta(minutes=minutes)
        scheduler.step()
    assert len(jobs.submitted) == 3
    ticks = [notice["tick"] for notice in receiver.got]
    assert {ticks.count(tick) for tick in ticks} == {5}  # bounded
    assert json.loads(store.get("schedules/s.json"))["notices"] == []


def test_nights_without_ray_are_told_one_by_one(store: Store, receiver: Receiver) -> None:
    """They do not wait for Ray to come back, when only the latest of them would be told."""
    clock, jobs = Manual(NIGHT - DAY / 2), Listed()
    scheduler = Scheduler("s", Cron("0 2 * * *"), DAY / 2, jobs, store, clock, receiver.url)
    scheduler.step()
    jobs.away = True
    for night in range(3):
        for hours in (0, 11, 13):
            clock.moment = NIGHT + night * DAY + timedelta(hours=hours)
            with pytest.raises(JobApiError, match="Ray is away"):
                scheduler.step()
            assert len(receiver.got) == night + (hours > 12)
    assert [(each["tick"], each["status"]) for each in receiver.got] == [
        ((NIGHT + night * DAY).isoformat(), "MISSED") for night in range(3)
    ]
    jobs.away, clock.moment = False, NIGHT + 3 * DAY
    scheduler.step()
    assert jobs.submitted == [NIGHT + 3 * DAY]


def test_a_run_that_does_not_end_is_stopped(store: Store, receiver: Receiver) -> None:
    clock, jobs = Manual(NIGHT - DAY / 2), Listed()
    limit = timedelta(hours=6)
    scheduler = Scheduler("s", Cron("0 2 * * *"), DAY / 2, jobs, store, clock, receiver.url, limit)
    scheduler.step()
    clock.moment = NIGHT + timedelta(minutes=5)
    scheduler.step()
    jobs.jobs[NIGHT] = Job("RUNNING", started=clock.moment)
    clock.moment += limit
    scheduler.step()
    assert jobs.stopped == []
    clock.moment += timedelta(seconds=1)
    for _ in range(3):
        scheduler.step()
    assert jobs.stopped == [NIGHT]
    assert [(each["tick"], each["status"]) for each in receiver.got] == [(NIGHT.isoformat(), "STOPPED")]


# -- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "final", "says"), [(204, True, "took"), (302, True, "302"), (404, True, "404"), (429, False, "429"),
                                  (500, False, "500")],
)  # fmt: skip
def test_webhook_answers(receiver: Receiver, status: int, final: bool, says: str) -> None:
    receiver.statuses = [status]
    found, words = webhook.post(receiver.url, {"a": 1})
    assert found is final
    assert says in words
    assert "s3cret" not in words
    assert receiver.got == [{"a": 1}]  # the redirect was not followed


def test_unreachable_webhook() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        final, words = webhook.post(f"http://127.0.0.1:{taken.getsockname()[1]}/s3cret", {})
    assert not final
    assert "s3cret" not in words


def test_a_ray_that_hangs_or_is_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.schedule.scheduler._REQUEST_SECONDS", 0.3)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(JobApiError, match=f"{address} could not list its jobs"):
            RayJobs(address, "s", "true").list()
    with pytest.raises(JobApiError, match=r"could not (take the submission|list its jobs)"):
        RayJobs(address, "s", "true").submit(NIGHT)


def test_entrypoint() -> None:
    assert job_entrypoint(QUICKSTART, ["a=[1, 2]"]) == (
        "python pipeline/main.py --config pipeline/configs/quickstart.yaml 'a=[1, 2]'"
    )
    assert job_entrypoint(Path("/data/my config.yaml"), []) == (
        "python pipeline/main.py --config '/data/my config.yaml'"
    )
    found = read_scheduled(QUICKSTART, ["suite=other"])
    assert found.suite == "other"
    assert found.sources[0] == "pypi:SmolLM2-135M-Instruct"
    assert len(found.sources) == 31
    assert all(source.startswith("bigbench:") for source in found.sources[1:])


def test_a_cluster_elsewhere_is_given_no_files_of_this_machine(tmp_path: Path) -> None:
    away, outside = "http://ray.example.org:8265", tmp_path / "nightly.yaml"
    inside = Scheduled("s", ("pypi:x", "jsonl:s3://bucket/rows.jsonl", "jsonl:pipeline/configs/quickstart.yaml"))
    assert check_reachable(away, QUICKSTART, inside) == ()
    with pytest.raises(ConfigError, match=r"nightly.yaml is a file of this machine.*into the checkout.*s3://"):
        check_reachable(away, outside, inside)
    for wrong in ("jsonl:../rows.jsonl", "jsonl:no/such/rows.jsonl", f"path:{ROOT}/pipeline"):
        with pytest.raises(ConfigError, match="names no file of the checkout's copy"):
            check_reachable(away, QUICKSTART, Scheduled("s", (wrong,)))
    mounted = Scheduled("s", ("path:/mnt/models/base",))
    assert check_reachable(away, QUICKSTART, mounted) == mounted.sources  # a disk of the cluster, perhaps
    for here in ("http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265", "127.0.0.1:8265"):
        assert is_loopback(here)
        assert check_reachable(here, outside, Scheduled("s", ("jsonl:../rows.jsonl",))) == ()


LEFT_OUT: dict[str, tuple[str, str, str, str]] = {
    "a folder": (".gitignore", "data/\n", "data/t.jsonl", ".gitignore names data/t.jsonl"),
    "a file": (".gitignore", "*.jsonl\n", "t.jsonl", ".gitignore names t.jsonl"),
    "a file that Ray ignores": (".rayignore", "rows\n", "rows/t.jsonl", ".rayignore names rows/t.jsonl"),
    "a file, by its folder's list": ("data/.gitignore", "t.*\n", "data/t.jsonl", "data/.gitignore names data/t.jsonl"),
    "a base's weights": (".gitignore", "*.safetensors\n", "base/m.safetensors", ".gitignore names base/m.safetensors"),
    "what Ray never takes": (".gitignore", "\n", "venv/t.jsonl", "Ray leaves venv/t.jsonl out by itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
@pytest.mark.parametrize("address", ["http://10.0.0.9:8265", "http://127.0.0.1:8265"])
def test_what_a_jobs_copy_lacks_is_refused(
    case: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_file, ignored, name, reason = LEFT_OUT[case]
    monkeypatch.setattr("infra.schedule.job.ROOT", tmp_path)
    for file, text in {"my.yaml": "", name: "{}", list_file: ignored, "kept.jsonl.txt": "{}"}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    source = "path:base" if name.startswith("base/") else f"jsonl:{name}"
    config = tmp_path / "my.yaml"
    with pytest.raises(ConfigError) as caught:
        check_reachable(address, config, Scheduled("s", ("pypi:x", source)))
    assert f"{config}: {source} is not in the copy of the checkout that a job runs in ({reason})" in str(caught.value)
    assert check_reachable(address, config, Scheduled("s", ("pypi:x", "jsonl:kept.jsonl.txt"))) == ()
    (tmp_path / ".gitignore").write_text("my.yaml\n")
    with pytest.raises(ConfigError, match=r"--config .*my.yaml is not in the copy .*\.gitignore names my.yaml"):
        check_reachable(address, config, Scheduled("s", ()))


def test_candidates_that_cannot_be_merged_are_refused_before_the_first_tick() -> None:
    with pytest.raises(ConfigError, match="unknown merge method 'men'"):
        read_scheduled(QUICKSTART, ["merge.candidates[0].method=men"])


def test_a_clock_that_was_ahead_does_not_stop_the_schedule(store: Store, receiver: Receiver) -> None:
    clock, jobs = Manual(NIGHT + 100 * DAY), Listed()
    scheduler = Scheduler("s", Cron("0 2 * * *"), DAY / 2, jobs, store, clock, receiver.url)
    scheduler.step()
    clock.moment = NIGHT - DAY / 2
    for _ in range(3):
        scheduler.step()
    assert [(notice["status"], notice["mlflow_run"]) for notice in receiver.got] == [("CLOCK", None)]
    assert jobs.submitted == []
    clock.moment = NIGHT
    scheduler.step()
    assert jobs.submitted == [NIGHT]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"--cron": "0 2 * *"}, "five fields"),
        ({"--timezone": "Mars/Base"}, "time zone 'Mars/Base'"),
        ({"--config": "nowhere.yaml"}, "no such configuration file"),
        ({"--webhook": "ftp://token@host/"}, "no http"),
        ({"--grace-hours": "0"}, "more than 0"),
        ({"--max-hours": "-1"}, "--max-hours -1: more than 0"),
        ({"--address": "http://127.0.0.1:9"}, "Ray at http://127.0.0.1:9 could not list its jobs"),
        ({"--address": ""}, "give --address"),
        ({"--address": "http://192.0.2.1:9", "--config": "outside.yaml"}, "is a file of this machine"),
    ],
)
def test_wrong_options_are_refused_at_once(
    changed: dict[str, str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # the command sets them; here they are put back
    shutil.copy(QUICKSTART, tmp_path / "outside.yaml")
    monkeypatch.chdir(tmp_path)
    options = {"--cron": "0 2 * * *", "--config": str(QUICKSTART), "--address": "http://127.0.0.1:9", **changed}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit, match="2"):
            schedule.main([word for pair in options.items() for word in pair])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    error = capsys.readouterr().err
    assert says in error
    assert "token" not in error


def test_the_command_ends_cleanly(ray_stack: StackState) -> None:
    suite = uuid.uuid4().hex[:8]
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.schedule", "--cron", "0 2 1 1 *", "--timezone", "Europe/Berlin",
         "--config", str(QUICKSTART), f"suite={suite}"],
        cwd=ROOT, env={**os.environ, webhook.VARIABLE: "http://127.0.0.1:9/s3cret"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        name = f"schedules/{suite}.json"
        until(lambda: Store.from_env().head(name), "the state")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert "-01-01T01:00:00+00:00" in log  # two in the morning in Berlin
    assert "s3cret" not in log
