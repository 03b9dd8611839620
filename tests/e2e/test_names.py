"""Names of tasks in any script, through everything that is called after them: workers, metrics, models, the report."""

from collections.abc import Callable
from typing import Any

import mlflow

from infra.registry.runs import model_name

NAMES = ("größe", "отзывы", "हिन्दी 🙂 a$b_c^d")


def test_any_script(stack: Any, pipeline: Any, tiny_config: Callable[..., dict[str, Any]]) -> None:
    config = tiny_config("scripts", held_in=3)
    held_in = dict(zip(NAMES, config["held_in"].values(), strict=True))
    held_out = {"مهمة": config["held_out"]["out0"]}
    finished = pipeline(config | {"held_in": held_in, "held_out": held_out})
    assert finished.code == 0, finished.output[-3000:]
    assert set(finished.results["held_in"]) == set(NAMES)
    assert finished.results["made"]["experts"] == 3
    client = mlflow.MlflowClient(stack.env()["MLFLOW_TRACKING_URI"])
    for name in NAMES:
        assert client.get_registered_model(model_name("scripts", name)).tags["factory.task"] == name
    metrics = client.get_run(finished.results["run_id"]).data.metrics
    assert sum(name.startswith("test_expert/") for name in metrics) == 3
