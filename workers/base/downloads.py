"""Checksummed, cached downloads from the Python package index, and repositories of the Hugging Face hub.

Files of the index come through `pip download --no-deps --require-hashes`, so the user's index, proxy and certificates
apply and pip refuses anything else than the file that was named by its SHA-256. Nothing is installed. Unpacking is the
caller's. A repository is read at one commit, which is told; without a commit in its name, the newest one is asked for
each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from infra.digests import file_sha256
from infra.errors import BaseModelError, DataError

_CHUNK = 1 << 20
_LINE_EVERY_S = 5.0
_HUB_TIMEOUT_S = 30.0


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


# -- the Hugging Face hub --

_COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "pytorch_model-*.safetensors",
)
"""What a repository calls a model's weights. Others hold them a second time, in the formats of other programs."""
_INDEX = HUB_WEIGHTS[1]


def resolve_hub(name: str, notes: Path, patterns: Sequence[str]) -> tuple[str, Path | None]:
    """`repository[@revision]` with the commit that it is now, and its folder where it had to be fetched to know that.

    A name with a commit is its own answer. Where the hub cannot be asked, the commit is that of the hub's own cache
    (fetched by `patterns`), else that of the last time, noted in the folder `notes`. Which commit it is, is told on
    stderr. BaseModelError where none is known.
    """
    repo, _, revision = name.partition("@")
    if _COMMIT.fullmatch(revision):
        return name, None
    note = notes / f"hub-{hashlib.sha256(name.encode()).hexdigest()}.json"
    last = json.loads(note.read_text())["commit"] if note.is_file() else None
    folder, why = None, ""
    try:
        commit = _newest(repo, revision)
    except Exception as error:  # the hub's client raises many kinds: network, credentials, names
        why = f" (the hub cannot be asked: {type(error).__name__})"
        try:
            folder = fetch_hub(name, patterns)
            commit = folder.name
        except BaseModelError:
            if last is None:
                raise
            commit = last
    if not _COMMIT.fullmatch(commit):  # a folder that is no snapshot of the hub's cache
        return name, folder
    changed = f", it was {last[:12]} before" if last not in (None, commit) else ""
    print(f"hub:{name}: commit {commit}{changed}{why}", file=sys.stderr, flush=True)
    part = note.with_name(f"{note.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"source": f"hub:{name}", "commit": commit}))
    part.replace(note)
    return f"{repo}@{commit}", folder


def _newest(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().model_info(repo, revision=revision or None, timeout=_HUB_TIMEOUT_S).sha)


def fetch_hub(name: str, patterns: Sequence[str]) -> Path:
    """The folder in the hub's own cache with those files of `repository[@revision]` that match `patterns`, and the
    shards that an index among them lists. BaseModelError where they cannot be fetched."""
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(patterns)))
        if shards := _unfetched(folder):
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=[*patterns, *shards]))
    except Exception as error:  # as above
        raise BaseModelError(f"hub:{name}: cannot be fetched ({type(error).__name__}: {error})") from error
    return folder


def _unfetched(folder: Path) -> list[str]:
    """Shards of other names than usual."""
    if not (folder / _INDEX).is_file():
        return []
    try:
        listed = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return []  # told by whoever reads the checkpoint
    return sorted(shard for shard in listed if isinstance(shard, str) and not (folder / shard).is_file())
