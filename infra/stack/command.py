"""`python -m infra.stack`: what its commands do and print."""

import os
import shlex
import sys
import time
from pathlib import Path

from infra.errors import FactoryError
from infra.stack.home import StackError, other_factory, ray_token
from infra.stack.services import StackState, default_home, down, load, up


def run(command: str, home: Path | None, num_cpus: int | None, object_store_mib: int) -> int:
    """``up``, ``down``, ``status`` or ``env``; returns the exit status: 1 for what fails, and for a status of which a
    part is down."""
    root = (home or default_home()).resolve()
    try:
        if command == "up":
            began = time.monotonic()
            print(f"starting the local stack in {root} (S3, MLflow, Ray) …", flush=True)
            state = up(root, num_cpus, object_store_mib)
            print(f"up after {time.monotonic() - began:.0f} s")
            if chosen := other_factory(os.environ):
                print(f"  {' '.join(chosen)} is this shell's and no part of the stack; a job gets it by")
                print('  ray job submit --runtime-env-json "$(python -m infra.environment)"')
            return _print_status(state)
        if command == "down":
            down(root)
            print(f"the local stack in {root} is down; its data stays there")
            return 0
        found = load(root)
        if found is None or (command == "env" and not all(found.running().values())):
            raise StackError(f"no local stack is running in {root}; start it with: python -m infra.stack up")
        if command == "env":
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
