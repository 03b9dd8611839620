"""The Ray cluster as the driver sees it: joining it, how many experts it runs at a time, what a worker asks for."""

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

from infra.ending import summary
from infra.environment import job_variables
from infra.errors import FactoryError
from pipeline.config.model import GIB, WorkerResources

ROOT = Path(__file__).resolve().parents[2]
_ANSWER_S = 15.0
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # of a submitted job's driver; the name is Ray's


class ClusterError(FactoryError):
    """The Ray cluster does not answer, or cannot be used."""


def connect_to_ray(oom_retries: int = 3) -> None:
    """Join the cluster of `RAY_ADDRESS` or of the submitted job; without either, one that `ray start` left running on
    this machine; else start Ray here.

    A submitted job brings its code as the job's working directory; otherwise this checkout is sent to the workers.
    `oom_retries`: how often Ray starts work again whose worker its memory monitor killed. By itself it would for ever.

    Raises ClusterError where no cluster answers, within `_ANSWER_S` seconds, or Ray cannot be started.
    """
    import ray  # here and below, not above: a plan asks for slots and joins nothing

    os.environ.setdefault("RAY_task_oom_retries", str(oom_retries))  # this process's own, read by ray.init
    check_answers(os.environ.get("RAY_ADDRESS", ""))
    in_job = _JOB_CONFIG in os.environ
    environment: dict[str, Any] = {} if in_job else {
        "working_dir": str(ROOT),
        "excludes": [".factory", "demo-report", "tests", "docs", "**/__pycache__", ".mypy_cache"],
        "env_vars": job_variables(),
    }  # fmt: skip
    try:
        ray.init(
            None if in_job or os.environ.get("RAY_ADDRESS") else _on_this_machine(),
            runtime_env=environment or None, log_to_driver=False, configure_logging=True, logging_level=logging.WARNING,
        )  # fmt: skip
    except Exception as error:  # Ray raises what it pleases: versions that differ, a token, a node without Ray, …
        place = os.environ.get("RAY_ADDRESS") or "this machine"
        raise ClusterError(f"Ray at {place} cannot be used: {summary(error)}") from error


def _on_this_machine() -> str:
    """The address of the head that `ray start` left running here; "local" if it left none, or one that has ended: Ray
    keeps the address of a head that was killed, and ray.init would ask it for ever."""
    from ray._private.utils import read_ray_address

    address = read_ray_address()
    try:
        check_answers(address or "", seconds=5)
    except ClusterError:
        return "local"
    return address or "local"


def check_answers(address: str, seconds: float = _ANSWER_S) -> None:
    """Raises ClusterError if `address`, a host and port, is no Ray head that answers; ray.init would ask it for ever.

    Other kinds of address (none, local, ray://…) are Ray's to look up, which it does within a minute; of "auto" it is
    the head that `ray start` left on this machine.
    """
    if address == "auto":
        from ray._private.utils import read_ray_address

        address = read_ray_address() or ""
    if not address or address == "local" or address.startswith("ray://"):
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not (colon and host and port.isdigit()):
        raise ClusterError(
            f"RAY_ADDRESS is {address!r}; accepted: host:port of a Ray head (usually port 6379), auto or local "
            "(the address of Ray's dashboard belongs into RAY_API_SERVER_ADDRESS)"
        )
    import grpc
    from ray._private.gcs_utils import create_gcs_channel

    channel = create_gcs_channel(address)
    try:
        grpc.channel_ready_future(channel).result(timeout=seconds)
    except grpc.FutureTimeoutError:
        raise ClusterError(
            f"no Ray head answers at {address} (RAY_ADDRESS) within {seconds:.0f} s ({_refusal(host, int(port))}); "
            "start it, correct RAY_ADDRESS, or unset it to start Ray on this machine"
        ) from None
    finally:
        channel.close()


def _refusal(host: str, port: int) -> str:
    """Why nothing is heard from there."""
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=2):
            return "something listens there, but no Ray head"
    except OSError as error:
        return error.strerror or str(error)


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
