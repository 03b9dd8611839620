"""What a merge costs as a process of its own: wall, CPU, memory, bytes; and the object store that some merges use.

Wall and CPU seconds are given twice: of the merge itself, after its program is imported, and of the whole process. The
resident size is the process's largest; the anonymous part of it, without pages of mapped files, is sampled. Does not
cover what is merged (`benchmarks.merging_cases`). Linux only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.stack import services
from infra.store.s3 import Store

SAMPLE_SECONDS = 0.02
STORE_PREFIX = "merging"
"""Of all objects of the benchmark."""
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Counters:
    """What a process has used since it started. Bytes as in proc(5)'s io: `read` and `written` through system calls on
    files (sockets do not count), `fetched` from the disk, which includes mapped files that were not in memory."""

    wall_s: float
    cpu_s: float
    read: int
    written: int
    fetched: int

    @staticmethod
    def now() -> Counters:
        times = os.times()
        table = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        cpu = times.user + times.system + times.children_user + times.children_system
        read, written, fetched = (int(table[key]) for key in ("rchar", "wchar", "read_bytes"))
        return Counters(time.perf_counter(), cpu, read, written, fetched)

    def __sub__(self, other: Counters) -> Counters:
        mine, theirs = asdict(self), asdict(other)
        return Counters(**{key: mine[key] - theirs[key] for key in mine})


@dataclass(frozen=True)
class Usage:
    """One run of one case. `extra` is what the case says about itself; `server` is what the store's server used."""

    merge: Counters
    process_wall_s: float
    process_cpu_s: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    extra: dict[str, Any] = field(default_factory=dict)
    server: dict[str, float] | None = None

    @property
    def store_read(self) -> int:
        return int(self.extra.get("store_read", 0))

    @property
    def store_written(self) -> int:
        return int(self.extra.get("store_written", 0))


def status_bytes(pid: int | str, key: str) -> int:
    """A size from /proc/PID/status: VmHWM (largest resident size) or RssAnon. 0 when the process is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def run_process(
    module: str, arguments: list[str], threads: int, env: Mapping[str, str], result: Path, server: int | None = None
) -> Usage:
    """Run `python -m module arguments…`, which writes its own account to `result`; `server` is a pid to watch as well.

    Raises RuntimeError with the end of the process's output when it fails.
    """
    result.unlink(missing_ok=True)
    log = result.with_suffix(".log")
    limits = {f"{kind}_NUM_THREADS": str(threads) for kind in ("OMP", "MKL", "OPENBLAS")}
    before = _server_usage(server)
    anonymous = 0
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **limits, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while True:
            anonymous = max(anonymous, status_bytes(process.pid, "RssAnon"))
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(SAMPLE_SECONDS)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not result.exists():
        tail = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {process.returncode}:\n{tail}")
    body = json.loads(result.read_text())
    after = _server_usage(server)
    return Usage(
        Counters(**body["merge"]),
        wall,
        used.ru_utime + used.ru_stime,
        body["peak_rss_bytes"],
        anonymous,
        body["extra"],
        {key: after[key] - before.get(key, 0.0) for key in after} if server else None,
    )


def _server_usage(pid: int | None) -> dict[str, float]:
    """CPU seconds and bytes so far. Its memory is not a difference: see `local_s3`."""
    if pid is None:
        return {}
    import psutil  # what it measures does not need it

    process = psutil.Process(pid)
    times, io = process.cpu_times(), process.io_counters()
    return {
        "cpu_s": times.user + times.system,
        "bytes_read": float(io.read_chars),
        "bytes_written": float(io.write_chars),
    }


# -- the disk --


def settle(files: Iterable[Path], cold: bool) -> None:
    """Write what is still to be written to the disk; then bring the files into memory, or out of it."""
    os.sync()
    for path in files:
        with path.open("rb", buffering=0) as stream:
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(_CHUNK):
                    pass


def copy_seconds(sources: Iterable[Path], target: Path, written: int) -> float:
    """The disk's own time for a merge's bytes: read the sources in order, write `written` bytes, one thread."""
    data = bytes(os.urandom(1 << 20)) * (_CHUNK >> 20)
    start = time.perf_counter()
    for path in sources:
        with path.open("rb", buffering=0) as stream:
            while stream.read(_CHUNK):
                pass
    with target.open("wb", buffering=0) as out:
        left = written
        while left > 0:
            left -= out.write(data[:left])
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


# -- the object store --


@dataclass(frozen=True)
class Server:
    """A running SeaweedFS with nothing in it. `data` is where its volumes lie."""

    pid: int
    env: Mapping[str, str]
    data: Path

    def store(self) -> Store:
        keys = (self.env["AWS_ACCESS_KEY_ID"], self.env["AWS_SECRET_ACCESS_KEY"])
        return Store(self.env["FACTORY_S3_BUCKET"], self.env["FACTORY_S3_ENDPOINT"], STORE_PREFIX, credentials=keys)

    def files(self) -> list[Path]:
        return [path for path in self.data.rglob("*") if path.is_file()]


@contextlib.contextmanager
def local_s3(home: Path) -> Iterator[Server]:
    """Start the local stack's object store alone, in a fresh folder that is removed at the end."""
    services.down(home)  # left by a run that was killed
    shutil.rmtree(home, ignore_errors=True)
    state = services.up(home, only=("s3",))
    try:
        yield Server(state.services["s3"].pid, state.env(), home / "s3")
    finally:
        services.down(home)
        shutil.rmtree(home, ignore_errors=True)


class StoreTraffic:
    """Counts the bytes of object bodies that a store's client receives and sends from now on, over all threads."""

    def __init__(self, store: Store) -> None:
        self.received: list[int] = []
        self.sent: list[int] = []
        events = store._client().meta.events  # botocore's own hooks; the store offers none
        events.register("before-send.s3", self._on_request)
        events.register("after-call.s3.GetObject", self._on_answer)

    def _on_request(self, request: Any, **_: Any) -> None:
        if request.method in ("PUT", "POST"):
            self.sent.append(int(request.headers.get("Content-Length") or 0))

    def _on_answer(self, parsed: Mapping[str, Any], **_: Any) -> None:
        self.received.append(int(parsed.get("ContentLength", 0)))

    def totals(self) -> dict[str, int]:
        return {
            "store_read": sum(self.received),
            "store_written": sum(self.sent),
            "store_requests": len(self.received) + len(self.sent),
        }
