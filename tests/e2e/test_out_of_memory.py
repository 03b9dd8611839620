"""A worker that Ray's memory monitor ends every time: Ray by itself would start it again for ever."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import time
import ray
from pipeline.config.model import WorkerResources
from pipeline.plan.cluster import connect_to_ray, ray_options
from pipeline.running.ray_workers import lost

connect_to_ray(1)
options = ray_options(WorkerResources(cpus=1, memory_gib=0.2), 1)
try:
    ray.get(ray.remote(lambda: time.sleep(60)).options(**options, name="expert größe").remote(), timeout=240)
except ray.exceptions.OutOfMemoryError as error:
    print("lost:", lost(error, "expert", 0.2))
ray.shutdown()
"""


def test_its_retries_are_counted() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = {
        **clean, "RAY_memory_usage_threshold": "0.02", "RAY_memory_monitor_refresh_ms": "250",
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert "lost: out of memory: Ray's memory monitor ended each of its workers" in done.stdout, done.stderr[-3000:]
    assert "resources.expert.memory_gib=0.2" in done.stdout
