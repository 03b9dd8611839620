"""A Ray cluster of several nodes on this machine that share nothing but what they reach by network.

Every node has an address, an environment, working, temporary, home and cache folders of its own. Where Linux allows
it, a node also lives in a mount namespace in which its folder is /tmp, and the checkout, the submitter's folders and
the other nodes' folders do not exist: code that uses a path of another machine fails there as it would on a real one.
Elsewhere (no `unshare`) the folders are merely apart. Does not cover separate kernels, clocks and page caches.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from infra.stack import processes

ROOT = Path(__file__).resolve().parents[2]
_GET = re.compile(rb"GET (/[^ ?]+)[^ ]* HTTP/1.1\r\n(.*?)\r\n\r\n", re.DOTALL)
_READY_SECONDS = 120.0
_ATTEMPTS = 3  # of a node; Ray gives it 30 seconds to start
_S3 = "s3.factory.internal"
# $1 is the node's folder, $2 the virtual environment; the paths up to -- are hidden; then the command.
_ENTER = """
set -e
folder=$1 venv=$2; shift 2
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$venv" "$folder/venv"
mount --rbind "$folder" /tmp
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mount -t tmpfs none "$1"; fi
  shift
done
shift
if [ ! -d "$venv" ]; then mkdir -p "$venv"; mount --bind /tmp/venv "$venv"; fi
umount /tmp/venv
cd /tmp/work
exec "$@"
"""


def unshare() -> list[str] | None:
    """The command that gives a process mounts of its own, or None where that is not allowed."""
    for command in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        if shutil.which("unshare") and os.path.isdir("/proc/self/ns"):
            probe = [*command, "mount", "-t", "tmpfs", "none", "/mnt"]
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                return command
    return None


class Gateway:
    """A TCP relay between one node and the object store that counts what is read through it, by path: objects that are
    fetched whole, and reads of a range of one. The next `swallow` requests never arrive, nor are they refused."""

    def __init__(self, address: tuple[str, int], target: tuple[str, int]) -> None:
        self.whole: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self.swallow = 0
        self._target = target
        self._listener = socket.create_server(address)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or it would listen for as long as the thread waits
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                threading.Thread(target=self._relay, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._relay, args=(server, client, False), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if asks:  # a request without a body is one packet
                    for path, headers in _GET.findall(data):
                        (self.parts if b"\r\nrange:" in headers.lower() else self.whole)[path.decode()] += 1
                    if self.swallow:
                        self.swallow -= 1
                        continue
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Node:
    """One node. `seen` is its folder as the node itself sees it."""

    name: str
    folder: Path
    seen: Path
    address: str
    pid: int
    started: str
    marker: str
    gateway: Gateway

    def kill(self) -> None:
        """End everything on this node at once, as a lost machine would."""
        processes.stop([], [self.marker])


@dataclass
class Cluster:
    """Running nodes, the first of them the head."""

    nodes: list[Node]
    env: dict[str, str]
    isolated: bool

    @property
    def dashboard(self) -> str:
        return self.env["RAY_API_SERVER_ADDRESS"]

    def get(self, path: str) -> Any:
        """What the dashboard answers."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        answer = requests.get(self.dashboard + path, headers={"Authorization": f"Bearer {token}"}, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def alive(self) -> dict[str, str]:
        """Address of every living node by its Ray id."""
        found = self.get("/api/v0/nodes?limit=100")["data"]["result"]["result"]
        return {node["node_id"]: node["node_ip"] for node in found if node["state"] == "ALIVE"}

    def running(self, name: str) -> dict[str, str]:
        """Running tasks whose name starts so, with the address of their node."""
        where = self.alive()
        query = "limit=1000&filter_keys=state&filter_predicates=%3D&filter_values=RUNNING"
        found = self.get(f"/api/v0/tasks?{query}")["data"]["result"]["result"]
        return {task["name"]: where.get(task["node_id"], "") for task in found if task["name"].startswith(name)}


@contextlib.contextmanager
def cluster(base: Path, services: Mapping[str, str], count: int, hidden: Sequence[Path]) -> Iterator[Cluster]:
    """`count` nodes of one CPU each below the folder `base`, stopped at the end.

    `services` are the variables of a client of S3 and MLflow, which every node gets as they are but for the paths and
    the address of S3. `hidden` are folders that no node sees.
    """
    enter = unshare()
    wanted = {name: number for number, name in enumerate(["gcs", "dashboard", "s3", *map(str, range(count))], 21000)}
    ports = processes.choose_ports(wanted, frozenset())
    head, dashboard = f"127.0.0.2:{ports['gcs']}", f"http://127.0.0.1:{ports['dashboard']}"
    made = Cluster([], {**services, "RAY_ADDRESS": head, "RAY_API_SERVER_ADDRESS": dashboard}, enter is not None)
    try:
        for number in range(count):
            for attempt in range(_ATTEMPTS):
                folder = base / f"node{number}" if attempt == 0 else base / f"node{number}-{attempt}"
                made.nodes.append(_start(folder, number, services, ports, enter, hidden))
                if _joins(made):
                    break
                late = made.nodes.pop()
                late.kill()
                late.gateway.close()
            else:
                raise AssertionError(f"{late.name} did not start:\n{processes.tail(folder.with_suffix('.log'))}")
        yield made
    finally:
        leaders = [(node.pid, node.started) for node in made.nodes]
        processes.stop(leaders, [node.marker for node in made.nodes], grace=3)
        for node in made.nodes:
            node.gateway.close()
            if enter is None:
                shutil.rmtree(node.folder, ignore_errors=True)


def _start(
    folder: Path,
    number: int,
    services: Mapping[str, str],
    ports: Mapping[str, int],
    enter: list[str] | None,
    hidden: Sequence[Path],
) -> Node:
    """Start a node, the first of them the head."""
    log = folder.with_suffix(".log")
    if enter is None:  # Ray's sockets need a short path
        folder = Path(tempfile.mkdtemp(prefix=f"node{number}-", dir="/tmp"))
    for name in ("work", "home", "cache", "ray", "t", "venv"):
        (folder / name).mkdir(parents=True)
    shutil.copy(services["RAY_AUTH_TOKEN_PATH"], folder / "token")
    ip, seen = f"127.0.0.{number + 2}", Path("/tmp") if enter else folder
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{ip} {_S3}\n")
    s3 = urlsplit(services["FACTORY_S3_ENDPOINT"])
    gateway = Gateway((ip, ports["s3"]), (s3.hostname or "", s3.port or 80))
    role = ["--address", f"127.0.0.2:{ports['gcs']}"]
    if number == 0:
        role = ["--head", "--port", str(ports["gcs"]), "--dashboard-host", "127.0.0.1"]
        role += ["--dashboard-port", str(ports["dashboard"])]
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *role,
        "--node-ip-address", ip, "--temp-dir", str(seen / "ray"), "--num-cpus", "1",
        "--memory", str(4 << 30), "--object-store-memory", str(80 << 20),
        "--dashboard-agent-listen-port", str(ports[str(number)]),
        # Ranges apart, for the nodes share this machine's ports.
        "--min-worker-port", str(24000 + 500 * number), "--max-worker-port", str(24499 + 500 * number),
    ]  # fmt: skip
    if enter is not None:
        command = [*enter, "sh", "-c", _ENTER, "sh", str(folder), sys.prefix, *map(str, hidden), "--", *command]
    marker = f"test-{os.getpid()}/{folder.name}/"
    env = _environment(services, seen, f"http://{_S3 if enter else ip}:{ports['s3']}")
    pid, started = processes.spawn(command, env, log, folder / "work", marker)
    return Node(f"node{number}", folder, seen, ip, pid, started, marker, gateway)


def _environment(services: Mapping[str, str], seen: Path, endpoint: str) -> dict[str, str]:
    dropped = ("RAY_", "MLFLOW_", "AWS_", "FACTORY_", "HF_", "XDG_", "PYTEST_", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "HOME": str(seen / "home"),
        "TMPDIR": str(seen / "t"),
        "FACTORY_CACHE": str(seen / "cache"),
        "FACTORY_S3_ENDPOINT": endpoint,
        "RAY_AUTH_TOKEN_PATH": str(seen / "token"),
        "OMP_NUM_THREADS": "1",
        "RAY_num_workers_soft_limit": "3",
        "RAY_memory_monitor_refresh_ms": "0",  # each node would take the whole machine's memory for its own
        "NO_PROXY": "*",
        "no_proxy": "*",
    }
    local = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "FACTORY_HOME")
    services = {name: value for name, value in services.items() if name not in local}
    return {**inherited, **services, **own}


def _joins(made: Cluster) -> bool:
    """Wait until the node started last is part of the cluster; False if it gave up, as Ray does on a busy machine."""
    node, deadline = made.nodes[-1], time.monotonic() + _READY_SECONDS
    while processes.alive(node.pid, node.started) and time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException, KeyError, TypeError):
            if len(made.alive()) == len(made.nodes) and made.get("/api/jobs/") == []:
                return True
        time.sleep(0.2)
    return False
