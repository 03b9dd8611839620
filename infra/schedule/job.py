"""The job that a schedule submits: its command, its configuration, and whether a cluster elsewhere can read it.

A job runs in a copy of the checkout, on the cluster's head node. Other files of the scheduler's machine are not there.
Does not cover files of the checkout that .gitignore or .rayignore keep out of the copy.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from infra.environment import ROOT
from infra.errors import ConfigError
from infra.store.client import is_loopback

_READ_CONFIG = """
import json, sys
from infra.ending import message
from pipeline.config.model import load_config
try:
    config = load_config(sys.argv[1], sys.argv[2:])
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

    Returns the sources with absolute paths, which may name a disk of the cluster: only the head node knows. Nothing is
    refused where the job API is this machine's. Raises ConfigError.
    """
    if is_loopback(address):
        return ()
    advice = f"put it into the checkout ({ROOT}), a copy of which every job gets, or use s3:// sources"
    if not config.resolve().is_relative_to(ROOT):
        raise ConfigError(f"--config {config} is a file of this machine, which Ray at {address} lacks; {advice}")
    doubtful = []
    for source in scheduled.sources:
        kind, _, place = source.partition(":")
        if kind not in ("jsonl", "path") or place.startswith("s3://"):
            continue
        path = Path(place).expanduser()
        if path.is_absolute() and not path.is_relative_to(ROOT):
            doubtful.append(source)
        elif path.is_absolute() or not _in_checkout(path):
            raise ConfigError(
                f"{config}: {source} names no file of the checkout's copy, in which the cluster at {address} runs the "
                f"job; {advice}, with a path relative to the checkout"
            )
    return tuple(dict.fromkeys(doubtful))


def _in_checkout(relative: Path) -> bool:
    path = (ROOT / relative).resolve()
    return path.is_relative_to(ROOT) and path.exists()
