"""One driver for many runs, in a process of its own: Ray's workers are kept from run to run, which saves their starts.

A line of JSON on stdin asks for a run: `config` and `report` (paths), `train_version` (added to that of the training
algorithm). A line on stdout answers: `status`, as of the command, and `output`.
"""

import json
import sys
from io import StringIO
from pathlib import Path

import ray
from rich.console import Console

from infra.store import Store
from pipeline import recipes
from pipeline.cluster import connect_to_ray
from pipeline.config import load_config
from pipeline.main import run, start_run
from pipeline.preflight import prepare_inputs


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # MLflow prints links
    connect_to_ray()
    version = recipes.TRAIN_VERSION
    for line in sys.stdin:
        asked = json.loads(line)
        recipes.TRAIN_VERSION = version + asked["train_version"]
        output = StringIO()
        console = Console(file=output, width=120)
        prepared = prepare_inputs(load_config(asked["config"]), Store.from_env(), console)
        slots = prepared.check_cluster(ray.nodes(), console)
        status = run(prepared, start_run(prepared), slots, Path(asked["report"]), console)
        print(json.dumps({"status": status, "output": output.getvalue()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
