"""The job that a schedule submits: its command, its configuration, and whether a cluster elsewhere can read it.

A job runs in a copy of the checkout, on the cluster's head node. Other files of the scheduler's machine are not there,
nor are files of the checkout that .gitignore or .rayignore keep out of the copy.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.environment import ROOT
from infra.errors import ConfigError
from infra.store.client import is_loopback

_READ_CONFIG = """
import json, sys
from infra.ending import message
from pipeline.config.candidates import list_candidates
from pipeline.config.model import load_config
try:
    config = load_config(sys.argv[1], sys.argv[2:])
    list_candidates(config)
except Exception as error:
    sys.exit(message(error))
sources = [config.base, *(task.source for task in [*config.held_in.values(), *config.held_out.values()])]
print(json.dumps({"suite": config.suite, "sources": sources}))
"""


@dataclass(frozen=True)
class Scheduled:
    """What a scheduler must know of a configuration: its suite, and where base and tasks come from."""

    suite: str
    sources: tuple[str, ...]


def read_scheduled(config: Path, overrides: list[str]) -> Scheduled:
    """The configuration, as far as it matters here; ConfigError if anything in it is wrong.

    In a process of its own: reading the configuration imports torch, which a scheduler need not keep in memory.
    """
    done = subprocess.run(
        [sys.executable, "-c", _READ_CONFIG, str(config), *overrides],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ConfigError(done.stderr.strip())
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Scheduled(found["suite"], tuple(found["sources"]))


def job_entrypoint(config: Path, overrides: list[str]) -> str:
    """The command that every tick runs, relative to the project's copy where the configuration is part of it."""
    path = config.resolve()
    shown = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    return shlex.join(["python", "pipeline/main.py", "--config", shown, *overrides])


def check_reachable(address: str, config: Path, scheduled: Scheduled) -> tuple[str, ...]:
    """Refuse what the head node at `address` cannot have: files of this machine outside the checkout's copy.

    Returns the sources with absolute paths, which may name a disk of the cluster: only the head node knows. Where the
    job API is this machine's, only what is left out of the copy is refused. Raises ConfigError.
    """
    files = [
        (source, Path(place).expanduser())
        for source, (kind, _, place) in ((source, source.partition(":")) for source in scheduled.sources)
        if kind in ("jsonl", "path") and not place.startswith("s3://")
    ]
    _check_copied(config, [(source, path) for source, path in files if not path.is_absolute()])
    if is_loopback(address):
        return ()
    advice = f"put it into the checkout ({ROOT}), a copy of which every job gets, or use s3:// sources"
    if not config.resolve().is_relative_to(ROOT):
        raise ConfigError(f"--config {config} is a file of this machine, which Ray at {address} lacks; {advice}")
    doubtful = []
    for source, path in files:
        if path.is_absolute() and not path.is_relative_to(ROOT):
            doubtful.append(source)
        elif path.is_absolute() or not _in_checkout(path):
            raise ConfigError(
                f"{config}: {source} names no file of the checkout's copy, in which the cluster at {address} runs the "
                f"job; {advice}, with a path relative to the checkout"
            )
    return tuple(dict.fromkeys(doubtful))


def _check_copied(config: Path, files: Sequence[tuple[str, Path]]) -> None:
    """Raises ConfigError if a file of the checkout is kept out of the copy. `files`: sources, relative to the
    checkout."""
    asked = [
        (f"--config {config}", config.resolve()),
        *((f"{config}: {source}", ROOT / path) for source, path in files),
    ]
    for what, path in asked:
        if _in_checkout(path) and (reason := left_out(path.resolve(), ROOT.resolve())):
            raise ConfigError(
                f"{what} is not in the copy of the checkout that a job runs in ({reason}); remove that line there, or "
                "use an s3:// source"
            )


def left_out(path: Path, root: Path) -> str | None:
    """Why Ray leaves `path`, or a file below it, out of a job's copy of `root`; None if all of it travels."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging  # what Ray itself asks: its own reading of these files

    honours = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    always = packaging._get_excludes(root, ray_constants.get_runtime_env_default_excludes())
    for part in [path, *(sorted(path.rglob("*")) if path.is_dir() else ())]:
        if part.name.startswith(".") or "__pycache__" in part.parts:
            continue  # no data
        above = [part, *(folder for folder in part.parents if folder.is_relative_to(root))]
        if any(always(folder) for folder in above):
            return f"Ray leaves {part.relative_to(root)} out by itself"
        for folder in above[1:]:
            for name in (".gitignore", ".rayignore") if honours else (".rayignore",):
                matches = packaging._get_ignore_file(folder, name)
                if matches and any(matches(inner) for inner in above[: above.index(folder)]):
                    return f"{(folder / name).relative_to(root)} names {part.relative_to(root)}"
    return None


def _in_checkout(relative: Path) -> bool:
    path = (ROOT / relative).resolve()
    return path.is_relative_to(ROOT) and path.exists()
