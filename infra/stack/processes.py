"""Child services of the local stack: starting, recognising and stopping them, and choosing their ports.

A service is recognised by its pid *and* its start time, so a recycled pid is never taken for it. Everything that a
service starts (Ray's workers leave its process group) is recognised by a marker in the environment it inherited.
Covers Linux and macOS; not Windows.
"""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

MARKER = "FACTORY_STACK_SERVICE"
# Fallback ports: each, and each + 10000, stays clear of Ray's worker ports (10002-19999) and of ephemeral ports.
_FALLBACK = (20500, 22700)


def start_id(pid: int) -> str | None:
    """What tells this process from any other that has had or will have its pid; None if it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
            # in bytes: the process's title may end inside a letter
            ticks = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
            return f"{boot}/{ticks}"
        return f"{process.create_time():.2f}"
    except (psutil.Error, OSError):
        return None


def spawn(command: list[str], env: Mapping[str, str], log: Path, cwd: Path, marker: str) -> tuple[int, str]:
    """Start a command in a session of its own, its output appended to ``log``; returns pid and start id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            env={**env, MARKER: marker},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
        )
    _CHILDREN[process.pid] = process
    return process.pid, start_id(process.pid) or ""


_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}


def alive(pid: int, started: str) -> bool:
    """Whether the process with this pid is the one that was started then."""
    child = _CHILDREN.get(pid)
    if child is not None:
        child.poll()  # reap it, so that it does not linger as a zombie of this process
    return bool(started) and start_id(pid) == started


def marked(prefixes: Iterable[str]) -> list[psutil.Process]:
    """This user's live processes that inherited a marker starting with one of the prefixes, except this process."""
    wanted = tuple(prefixes)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.uids().real != os.getuid():
                continue
            if process.environ().get(MARKER, "").startswith(wanted) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def stop(leaders: Iterable[tuple[int, str]], markers: Iterable[str], grace: float = 8.0) -> None:
    """Stop services and whatever they started: ask, wait up to ``grace`` seconds, then kill; returns when all are gone.

    Raises TimeoutError if a process outlives being killed.
    """
    wanted = tuple(markers)
    for pid, started in leaders:
        if alive(pid, started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 15)
    deadline = time.monotonic() + grace
    for pid, started in leaders:
        while alive(pid, started) and time.monotonic() < deadline:
            time.sleep(0.05)
    deadline = time.monotonic() + 10
    while remaining := marked(wanted):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {[process.pid for process in remaining]} did not end when killed")
        for process in remaining:
            with contextlib.suppress(psutil.Error):
                process.kill()  # psutil checks the start time itself
        psutil.wait_procs(remaining, timeout=2)
    for child in list(_CHILDREN.values()):
        if child.poll() is not None:
            _CHILDREN.pop(child.pid, None)


def port_free(port: int) -> bool:
    """Whether nothing listens on this port, on loopback or on all interfaces."""
    for host in ("127.0.0.1", "0.0.0.0"):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return False
    return True


def wait_free(ports: Iterable[int], seconds: float) -> None:
    """Wait until the ports are free, at most so long: a killed process lets go of them a moment after it died."""
    deadline = time.monotonic() + seconds
    for port in ports:
        while not port_free(port) and time.monotonic() < deadline:
            time.sleep(0.05)


def choose_ports(wanted: Mapping[str, int], paired: frozenset[str], taken: Iterable[int] = ()) -> dict[str, int]:
    """A free port for each name: the wanted one if it is free, else one from the fallback range.

    Names in ``paired`` also need their port + 10000 to be free. Raises OSError if none is left.
    """
    used = set(taken)
    chosen: dict[str, int] = {}

    def fits(name: str, port: int) -> bool:
        needed = [port, port + 10000] if name in paired else [port]
        return not used.intersection(needed) and all(map(port_free, needed))

    for name, port in wanted.items():
        candidates = [port, *random.Random().sample(range(*_FALLBACK), 400)]
        found = next((candidate for candidate in candidates if fits(name, candidate)), None)
        if found is None:
            raise OSError(f"no free port for {name}: tried {port} and the range {_FALLBACK[0]}-{_FALLBACK[1]}")
        chosen[name] = found
        used.update([found, found + 10000] if name in paired else [found])
    return chosen


def tail(log: Path) -> str:
    """The last 25 lines of a log file, or a note that there are none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.splitlines()[-25:]) or "(the log is empty)"
