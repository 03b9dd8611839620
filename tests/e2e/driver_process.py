"""The commands of `python -m pipeline`, one after the other in one process that joined Ray once (`driver.py`).

A line of JSON on stdin asks for a command: `arguments`, and `train_version`, which is added to that of the training
algorithm. A line on stdout answers: `code`, the exit status, and `output`.
"""

import contextlib
import io
import json
import os
import sys
import traceback

from pipeline.__main__ import main as command
from pipeline.flow import recipes
from pipeline.plan import cluster
from pipeline.running import driver


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit status and what was printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            command.main(args=arguments, prog_name="python -m pipeline")
        except SystemExit as ended:
            return int(ended.code or 0), output.getvalue()
        except Exception:
            traceback.print_exc()
    return 1, output.getvalue()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else writes there, libraries in C too, goes to the log
    cluster.connect_to_ray()
    driver.connect_to_ray = lambda retries: None  # type: ignore[assignment]
    version = recipes.TRAIN_VERSION
    for line in sys.stdin:
        asked = json.loads(line)
        recipes.TRAIN_VERSION = version + asked["train_version"]
        code, output = run(asked["arguments"])
        print(json.dumps({"code": code, "output": output}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
