import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from infra.stack import command, processes, services
from infra.stack.home import StackError, marker, other_factory


def test_up_again_leaves_running_services_alone(ray_stack: services.StackState) -> None:
    before = services.load(ray_stack.home)  # other tests may have killed a service and started it again
    assert services.up(ray_stack.home) == before == services.load(ray_stack.home)
    assert before is not None
    assert all(before.running().values())


def test_credentials_are_private(ray_stack: services.StackState) -> None:
    for name in ("credentials.json", "s3.json", "stack.json"):
        assert stat.S_IMODE((Path(ray_stack.home) / name).stat().st_mode) == 0o600
    secret = ray_stack.env()["AWS_SECRET_ACCESS_KEY"]
    for process in processes.marked([marker(Path(ray_stack.home), "")]):
        assert secret not in " ".join(process.cmdline())


def test_a_dead_service_is_restarted_and_keeps_its_data(ray_stack: services.StackState) -> None:
    from infra.store.s3 import Store

    store = Store("factory", ray_stack.urls()["s3"], "survives")
    store.put("x", b"still here")
    before = services.load(ray_stack.home)
    assert before is not None
    os.kill(before.services["s3"].pid, 9)
    after = services.up(ray_stack.home)
    assert after.services["s3"] != before.services["s3"]
    assert after.services["ray"] == before.services["ray"]
    assert after.ports == before.ports
    assert store.get("x") == b"still here"


def test_second_stack_beside_the_first_leaves_no_process(ray_stack: services.StackState, tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)  # Ray's sockets must not be below this
    mark = marker(home, "")
    state = services.up(home, num_cpus=1, object_store_mib=100)
    try:
        assert not set(state.ports.values()) & set(ray_stack.ports.values())
        stack_command = [sys.executable, "-m", "infra.stack"]
        env = subprocess.run([*stack_command, "env", "--home", str(home)], capture_output=True, text=True, check=True)
        exported = dict(shlex.split(line)[1].split("=", 1) for line in env.stdout.splitlines())
        assert exported == state.env()
        assert subprocess.run([*stack_command, "status", "--home", str(home)], check=False).returncode == 0
        submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--", "python", "-c"]
        names = ("FACTORY_S3_ENDPOINT", "MLFLOW_TRACKING_URI")
        script = f"import os, sys; print(sys.prefix, *map(os.environ.get, {names}))"
        job = subprocess.run(
            [*submit, script],
            env={**os.environ, **state.env()},
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"{sys.prefix} {state.urls()['s3']} {state.urls()['mlflow']}" in job.stdout, job.stdout + job.stderr
        assert job.returncode == 0
        assert len(processes.marked([mark])) > 5
    finally:
        services.down(home)
    assert processes.marked([mark]) == []
    assert all(map(processes.port_free, state.ports.values()))
    assert not any(state.running().values())
    services.down(home)
    first = services.load(ray_stack.home)
    assert first is not None
    assert all(first.running().values())


def test_a_recycled_pid_is_not_killed(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        service = services.Service(bystander.pid, "another start")
        services._save(services.StackState(str(tmp_path), dict.fromkeys(_all_ports(), 1), {"s3": service}))
        services.down(tmp_path)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def _all_ports() -> list[str]:
    return [name for ports in services._PORTS.values() for name in ports]


def test_failure_shows_the_log_and_stops_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = services._command

    def broken(state: services.StackState, name: str) -> list[str]:
        failing = [sys.executable, "-c", "raise SystemExit('no database today')"]
        return failing if name == "mlflow" else real(state, name)

    monkeypatch.setattr(services, "_command", broken)
    try:
        with pytest.raises(StackError, match=r"mlflow ended while starting(.|\n)*no database today"):
            services.up(tmp_path, num_cpus=1, object_store_mib=100)
        assert processes.marked([marker(tmp_path, "")]) == []
    finally:
        services.down(tmp_path)


def test_ports_stay_clear_of_ray_and_of_each_other() -> None:
    names = {name: 6379 for name in "abcdef"}
    chosen = processes.choose_ports(names, frozenset("abc"))
    numbers = [*chosen.values(), *(chosen[name] + 10000 for name in "abc" if name in chosen)]
    assert len(set(numbers)) == 9
    assert not [port for port in numbers[1:] if 10002 <= port <= 19999 and port != 16379]


def test_down_and_status_without_a_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run("down", tmp_path / "none", None, 512) == 0
    assert command.run("status", tmp_path / "none", None, 512) == 1
    assert "start it with" in capsys.readouterr().err
    (tmp_path / "stack.json").write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(StackError, match="unreadable"):
        services.load(tmp_path)
    shutil.rmtree(tmp_path)


def test_a_stack_says_which_factory_of_the_shell_it_does_not_take_over() -> None:
    assert other_factory({"FACTORY_S3_BUCKET": "factory", "FACTORY_S3_PREFIX": "", "HOME": "/"}) == []
    chosen = {"FACTORY_S3_BUCKET": "models", "FACTORY_S3_PREFIX": "team"}
    assert other_factory(chosen) == ["FACTORY_S3_BUCKET=models", "FACTORY_S3_PREFIX=team"]
