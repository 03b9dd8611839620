"""The Ray cluster as the driver sees it: joining it, how many experts it runs at a time, what a worker asks for."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from infra.environment import job_variables
from pipeline.config.model import GIB, WorkerResources

ROOT = Path(__file__).resolve().parents[2]
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # of a submitted job's driver; the name is Ray's


def connect_to_ray() -> None:
    """Join the cluster of `RAY_ADDRESS` or of the submitted job; without either, start Ray on this machine.

    A submitted job brings its code as the job's working directory; otherwise this checkout is sent to the workers.
    """
    import ray  # not above: a plan asks for slots, and joins nothing

    in_job = _JOB_CONFIG in os.environ
    environment: dict[str, Any] = {} if in_job else {
        "working_dir": str(ROOT),
        "excludes": [".factory", "demo-report", "tests", "docs", "**/__pycache__", ".mypy_cache"],
        "env_vars": job_variables(),
    }  # fmt: skip
    ray.init(
        runtime_env=environment or None, log_to_driver=False, configure_logging=True, logging_level=logging.WARNING
    )


def submission_id() -> str:
    """The id under which Ray's job API knows this job; empty for a driver that was not submitted as a job.

    Ray puts it into no variable of its own: it is in the metadata of the job's configuration.
    """
    configuration = json.loads(os.environ.get(_JOB_CONFIG) or "{}")
    return str(configuration.get("metadata", {}).get("job_submission_id", ""))


def ray_options(resources: WorkerResources, retries: int | None = None) -> dict[str, Any]:
    """Ray's options of one worker: what it needs, and that equal workers go to different nodes.

    Ray's own preference is to fill the driver's node first, and to put there whatever asks for no CPU.
    """
    options: dict[str, Any] = {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "memory": int(resources.memory_gib * GIB),
        "scheduling_strategy": "SPREAD",
    }
    if retries is not None:
        options |= {"max_retries": retries}
    return options


def slots_of(nodes: list[dict[str, Any]], resources: WorkerResources) -> int:
    """How many such workers the cluster's living nodes hold at a time, node by node; 0 if not even one fits.

    `nodes` is what `ray.nodes()` returns.
    """
    asked = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_gib * GIB}
    wanted = {name: amount for name, amount in asked.items() if amount}
    return sum(
        min(int(node["Resources"].get(name, 0) / amount + 1e-9) for name, amount in wanted.items())
        for node in nodes
        if node["Alive"]
    )
