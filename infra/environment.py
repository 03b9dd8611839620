"""What a manifest records about where an artifact was made, and by which code. None of it is part of a key.

    ray job submit … --runtime-env-json "$(python -m infra.environment)" -- python pipeline/main.py …

tells the copy that a submitted job runs, which has no ``.git``, which commit it is a copy of, and which bucket and
prefix the shell that submits works in, so that a job and the commands beside it look at the same place.
"""

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "ray", "mlflow")
COMMIT_VARIABLE = "FACTORY_GIT_COMMIT"
"""Environment variable that names the commit where the code is a copy without ``.git``."""
STORE_VARIABLES = ("FACTORY_S3_BUCKET", "FACTORY_S3_PREFIX")
"""Which factory of an object store is meant (see ``infra.store.s3``). Names, no secrets; the endpoint stays the
cluster's, which may reach the store under another address."""
STOP_VARIABLES = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""How long Ray lets a stopped job release its leases and mark its runs in MLflow; its own default is 3."""
_CODE = ("infra", "workers", "merge", "pipeline")
_GIT_SECONDS = 10.0


def environment(devices: Sequence[str] = ("cpu",)) -> dict[str, str]:
    """Library versions, processor, devices used, host, Ray node and code version of this process."""
    found = {**versions(), "device": ", ".join(map(_device, devices)), "host": platform.node(), **code_version()}
    node = _ray_node()
    return {**found, "ray_node": node} if node else found


@functools.cache
def versions() -> dict[str, str]:
    """Python, processor and library versions of this process."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} {_processor()}".strip()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def code_version() -> dict[str, str]:
    """``source_sha256`` of the project's source files and, where it is known, their ``git_commit``.

    A commit ends in ``-dirty`` where source files differ from it. A checkout asks git; a copy believes
    ``FACTORY_GIT_COMMIT``, which its submitter sets, and the hash says whether two copies are the same.
    """
    commit = _commit()
    return {"source_sha256": source_sha256(ROOT), **({"git_commit": commit} if commit else {})}


def job_variables() -> dict[str, str]:
    """Environment variables for a job and its workers: the commit of the code as it is now, and this shell's factory.

    What is not set here is the cluster's.
    """
    commit = _commit()  # never the cached one: a scheduler lives through many commits
    factory = {name: os.environ[name] for name in STORE_VARIABLES if os.environ.get(name)}
    return {**({COMMIT_VARIABLE: commit} if commit else {}), **factory, **STOP_VARIABLES}


def _commit() -> str:
    return git_commit(ROOT) or os.environ.get(COMMIT_VARIABLE, "").strip()[:100]


def git_commit(root: Path) -> str:
    """The checkout's commit, with ``-dirty`` where Python files of the project differ from it; "" if git has none."""
    if not (root / ".git").exists():  # a folder that merely lies inside somebody else's checkout is none
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS
        ).stdout.strip()  # fmt: skip

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", *(f"{package}/*.py" for package in _CODE))
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}-dirty" if changed else commit


def source_sha256(root: Path) -> str:
    """Hex SHA-256 over names and bytes of the project's Python files: the same for a checkout and its copies."""
    digest = hashlib.sha256()
    for package in _CODE:
        for path in sorted((root / package).rglob("*.py")):
            data = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _device(name: str) -> str:
    """A device with the name of its GPU."""
    if not name.startswith("cuda"):
        return name
    import torch

    return f"{name} ({torch.cuda.get_device_name(name)})"


def _ray_node() -> str:
    """Id of the Ray node that this process works on; "" for a process that does not use Ray, which stays so."""
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().get_node_id()) if ray is not None and ray.is_initialized() else ""


def _processor() -> str:
    """Model name of the first CPU on Linux, else what Python knows."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


if __name__ == "__main__":
    print(json.dumps({"env_vars": job_variables()}))
