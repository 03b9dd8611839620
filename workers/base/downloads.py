"""Checksummed, cached downloads from the Python package index.

Files come through `pip download --no-deps --require-hashes`, so the user's index, proxy and certificates apply and
pip refuses anything else than the file that was named by its SHA-256. Nothing is installed. Unpacking is the caller's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from infra.digests import file_sha256
from infra.errors import DataError

_CHUNK = 1 << 20
_LINE_EVERY_S = 5.0


def _verified(path: Path, sha256: str) -> bool:
    """Whether the file is the one asked for; a marker beside it (size and time) saves hashing it again."""
    if not path.is_file():
        return False
    stat = path.stat()
    marker = path.with_name(path.name + ".verified")
    stamp = f"{sha256} {stat.st_size} {stat.st_mtime_ns}"
    if marker.is_file() and marker.read_text() == stamp:
        return True
    if file_sha256(path) != sha256:
        return False
    marker.write_text(stamp)
    return True


def fetch_pypi(requirement: str, sha256: str, filename: str, cache_dir: Path) -> Path:
    """Path of `filename` of `requirement` ("name==version") in `cache_dir`, downloaded once and verified.

    Safe to call from several processes: one downloads, the others wait. DataError, naming the file and what to do,
    when the index cannot be reached, does not have the file, or offers one with another checksum.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    target = cache_dir / filename
    if _verified(target, sha256):
        return target
    with FileLock(str(target) + ".lock"):
        if _verified(target, sha256):
            return target
        target.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as temporary:
            found = _download(requirement, sha256, filename, Path(temporary))
            if file_sha256(found) != sha256:
                raise DataError(f"{filename} ({requirement}): its SHA-256 is not {sha256}; nothing was kept")
            os.replace(found, target)
        if not _verified(target, sha256):
            raise DataError(f"{target}: damaged while it was moved into the cache; check the disk and try again")
    return target


def _download(requirement: str, sha256: str, filename: str, folder: Path) -> Path:
    pins = folder / "requirements.txt"
    pins.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    work, out = folder / "work", folder / "out"
    work.mkdir()
    out.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--no-input", "--progress-bar", "off", "-r", str(pins), "-d", str(out)]
    if filename.endswith(".whl"):
        command += ["--only-binary", ":all:"]
    log = folder / "pip.log"
    # Temporary files go below our folder, where their growth can be shown (pip 24+ caches elsewhere: then only time
    # is shown).
    environment = {**os.environ, "TMPDIR": str(work), "PIP_NO_CACHE_DIR": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            _follow(filename, lambda: _largest(folder), lambda: process.poll() is not None)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    found = out / filename
    if process.returncode != 0 or not found.is_file():
        raise DataError(_explain(requirement, filename, sha256, log.read_text(errors="replace")))
    return found


def _explain(requirement: str, filename: str, sha256: str, log: str) -> str:
    tail = " | ".join(line.strip() for line in log.splitlines() if line.strip())[-600:]
    if "DO NOT MATCH THE HASHES" in log:
        got = re.search(r"Got\s+([0-9a-f]{64})", log)
        return (
            f"{filename} ({requirement}): the index offers a file with SHA-256 {got.group(1) if got else 'unknown'}, "
            f"expected {sha256}; it was not kept. Check the package index that pip uses (pip config list)."
        )
    if re.search(r"No matching distribution|Could not find a version", log):
        return f"{filename}: the package index has no {requirement}, or is out of reach. pip: {tail}"
    return f"{filename} ({requirement}): download failed; check the network and `pip config list`. pip: {tail}"


def _largest(folder: Path) -> int:
    """Bytes of the largest file below `folder`, which pip fills, moves and empties while we look."""
    largest = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, it passes over folders that vanish
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _follow(name: str, size: Callable[[], int], ended: Callable[[], bool]) -> None:
    """Show growth until `ended`: a moving line in a terminal, else a line every few seconds."""
    started = shown = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), DownloadColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            row = progress.add_task(f"fetching {name}", total=None)
            while not ended():
                progress.update(row, completed=size())
                time.sleep(0.2)
        return
    while not ended():
        time.sleep(0.1)
        if time.monotonic() - shown >= _LINE_EVERY_S:
            shown = time.monotonic()
            print(f"fetching {name}: {size() / 1e6:.0f} MB, {shown - started:.0f} s", file=sys.stderr, flush=True)


def free_bytes(path: Path) -> int:
    """Free space of the file system that holds `path`."""
    return shutil.disk_usage(path).free
