"""What a run is expected to cost, and that every figure says where it is from."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts.manifests import Manifest
from infra.store.s3 import FileRef, Store
from pipeline.flow.rehearse import Count, Forecast
from pipeline.plan.check_refine import RefineNeed
from pipeline.plan.estimate import Estimate, Slots, Stage, estimate, find_slots, spread
from pipeline.plan.preflight import Cost
from pipeline.records.results import Results
from tests.pipeline.given import inputs
from tests.pipeline.report.given import changed

NOWHERE = Store("bucket", "http://127.0.0.1:9")
INNER = 2
TASKS = [f"task{number}" for number in range(4)]
COST = Cost(
    trainable=100, adapted=500, parameters=1000, expert_tokens=dict.fromkeys(TASKS, 300), worker_bytes=1,
    kind_bytes={"base": 2000, "experts": 4000, "merges": 600, "merge_nodes": 1200}, cache_bytes=1,
)  # fmt: skip


def manifest(kind: str, number: int = 0, size: int = 10, **meta: Any) -> Manifest:
    key = f"{number:064x}"
    return Manifest(key, kind, 1, {}, {"file": FileRef(f"objects/{key}/1/file", "0" * 64, size)}, {}, meta)


def of(
    counts: dict[str, Count], *found: Manifest, stale: tuple[str, ...] = (), before: dict[str, Manifest] | None = None,
    results: list[Results] | None = None, slots: int = 2,
) -> dict[str, Stage]:  # fmt: skip
    given = inputs(NOWHERE, 4, merge={"fan_in": 2, "candidates": [{"method": "mean"}]})
    forecast = Forecast(given, None, counts, stale, found, INNER)
    cost = estimate([forecast], before or {}, results or [], COST, Slots(slots, slots, "a test"), lambda: 1000.0)
    return {stage.kind: stage for stage in cost.stages}


def test_an_expert_costs_what_the_one_before_cost_for_each_token() -> None:
    trained = manifest("expert", 1, 50, tokens=100, train_seconds=5.0, seconds=7.0)
    slower = manifest("expert", 2, 70, tokens=100, train_seconds=10.0)
    counts = {"experts": Count(2, 2)}
    stage = of(counts, slower, stale=("task0", "task1"), before={"task0": trained})["experts"]
    own, other = 0.05 * 300 + 2, (0.05 + 0.1) / 2 * 300 + 1
    assert stage.seconds == pytest.approx(max(own, other))  # side by side
    assert stage.bytes == 2 * 60
    assert "the expert before (1), other experts (1)" in stage.source
    assert of(counts, stale=("task0",), before={"task0": trained}, slots=1)["experts"].seconds == pytest.approx(own)


def test_one_round_begins_when_the_one_before_is_over() -> None:
    given = inputs(NOWHERE, 4, merge={"fan_in": 2, "candidates": [{"method": "mean"}]}, rounds=2)
    trained = manifest("expert", 1, 50, tokens=100, train_seconds=5.0, seconds=7.0)
    one = 0.05 * 150 + 2  # half of the tokens
    forecast = Forecast(given, None, {"experts": Count(5)}, tuple(TASKS), (trained,), INNER, rounds=(("task0",), TASKS))
    cost = replace(COST, whole_bytes=500)
    (stage,) = estimate([forecast], {}, [], cost, Slots(2, 2, "a test"), lambda: 1000.0).stages
    assert stage.seconds == pytest.approx(one + 2 * one)
    assert stage.bytes == 50 + 4 * ((4000 - 4 * 500) / 8 + 500), "of the first round one exists"


def test_without_any_expert_training_and_bytes_are_calculated() -> None:
    stage = of({"experts": Count(4)}, stale=tuple(TASKS))["experts"]
    assert stage.seconds == pytest.approx(COST.seconds(2, 1000.0))
    assert stage.bytes == 4000
    assert stage.source == "time: calculated, at 0 GFLOP/s a slot (4); bytes: calculated"


def test_refining_costs_what_training_costs_for_each_token() -> None:
    given = inputs(NOWHERE, 4, merge={"fan_in": 2, "candidates": [{"method": "mean"}]}, refine={"steps": [10, 30]})
    need = RefineNeed(trainable=9, step_tokens=5.0, worker_bytes=1, file_bytes=400, steps=20)

    def stage(*found: Manifest, slots: int = 1) -> Stage:
        forecast = Forecast(given, None, {"refined": Count(2)}, (), found, INNER)
        cost = replace(COST, mixed={"refined": need})
        return estimate([forecast], {}, [], cost, Slots(slots, slots, "a test"), lambda: 1000.0).stages[0]

    tokens = 20 * 5.0
    calculated = stage()
    assert calculated.seconds == pytest.approx(2 * COST.seconds(1, 1000.0) * tokens / 1200)
    assert (calculated.bytes, calculated.source) == (800, "time: calculated; bytes: calculated")
    expert = manifest("expert", 1, tokens=100, train_seconds=5.0, seconds=7.0)
    assert stage(expert).seconds == pytest.approx(2 * (0.05 * tokens + 2))
    assert stage(expert, slots=2).seconds == pytest.approx(0.05 * tokens + 2)
    own = manifest("refined", 2, 30, tokens=100, train_seconds=1.0, seconds=1.5)
    measured = stage(expert, own)
    assert measured.seconds == pytest.approx(2 * (0.01 * tokens + 0.5))
    assert (measured.bytes, measured.source) == (60, "time: those that exist, by tokens; bytes: mean of 1 that exist")


def test_teachers_cost_a_third_of_what_training_on_their_tokens_would() -> None:
    def stage(*found: Manifest) -> Stage:
        forecast = Forecast(inputs(NOWHERE, 4), None, {"teachers": Count(3, 1)}, (), found, INNER)
        cost = replace(COST, teacher_tokens=400.0, kind_bytes={**COST.kind_bytes, "teachers": 80})
        return estimate([forecast], {}, [], cost, Slots(1, 3, "a test"), lambda: 1000.0).stages[0]

    calculated = stage()
    assert calculated.seconds == pytest.approx(COST.seconds(1, 1000.0) * 400 / 1200 / 4 / 3)
    assert (calculated.bytes, calculated.source) == (60, "time: calculated; bytes: calculated")
    known = stage(manifest("teacher", 1, 30, seconds=2.0))
    assert (known.seconds, known.bytes) == (2.0, 90)


def test_other_work_costs_what_exists_or_the_latest_run_took() -> None:
    scores = [manifest("evaluation", number, 20, seconds=float(number)) for number in (1, 3)]
    stage = of({"evaluations": Count(5, 2)}, *scores)["evaluations"]
    assert (stage.seconds, stage.bytes) == (2.0 * 5 / 2, 100)
    assert stage.source == "time: mean of 2 that exist; bytes: mean of 2 that exist"
    runs = [
        changed(run_id="nothing-made", made={"evaluations": 0, "merge_nodes": 0}),
        changed(
            run_id="0123456789", made={"evaluations": 4, "merge_nodes": 3}, seconds={"evaluate": 8.0, "merge": 30.0}
        ),
    ]
    stages = of({"evaluations": Count(5), "merge_nodes": Count(6)}, results=runs)
    assert (stages["evaluations"].seconds, stages["evaluations"].bytes) == (5.0, None)
    assert stages["evaluations"].source == "time: run 01234567"
    assert stages["merge_nodes"].seconds == 10 * 6 / 2
    assert stages["merge_nodes"].source == "time: run 01234567; bytes: calculated"
    assert of({"task_masks": Count(1)})["task_masks"] == Stage("task_masks", None, None, "nothing measured yet")


def test_a_root_that_several_merges_came_from_counts_once_and_stores_no_node() -> None:
    merges = [manifest("merged", number, 5, label="", seconds=4.0) for number in (1, 2)]
    node = manifest("node", 3, 100, label="0", seconds=2.0)
    stages = of({"merge_nodes": Count(2, 2), "merges": Count(1, 2)}, *merges, node)
    assert stages["merge_nodes"].seconds == 3.0
    assert stages["merge_nodes"].bytes == 100 * INNER / 4 * 2
    assert (stages["merges"].seconds, stages["merges"].bytes) == (None, 5)


def test_what_is_not_made_costs_nothing_and_stages_add_up() -> None:
    assert of({"experts": Count(0, 4), "registrations": Count(5)}) == {}
    stages = (Stage("a", 1.5, 10, ""), Stage("b", None, None, ""), Stage("c", 2.0, None, ""))
    total = Estimate(Slots(1, 1, ""), stages)
    assert (total.seconds, total.bytes) == (3.5, 10)


def test_work_is_spread_over_slots_the_longest_first() -> None:
    assert spread([], 3) == 0
    assert spread([1, 1, 4], 2) == 4
    assert spread([3, 3, 2, 2, 2], 2) == 7
    assert spread([5], 0) == 5


def test_slots_are_those_of_the_cluster_that_is_there(ray_stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import ray; from pipeline.config.model import ResourcesConfig; from pipeline.plan.estimate import find_slots\n"
        "small = {'memory_gib': 0.1}\n"
        "print(find_slots(ResourcesConfig(expert=small, evaluator=small), []), ray.is_initialized())"
    )
    done = subprocess.run(  # of its own: Ray reads its token once
        [sys.executable, "-c", program], env={**os.environ, **ray_stack.env()}, cwd=Path(__file__).parents[3],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout == f"{Slots(1, 1, 'the Ray cluster')} False\n", done.stderr
    resources = inputs(NOWHERE).config.resources
    runs = [changed(run_id="0123456789", slots=7)]
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert find_slots(resources, runs) == Slots(7, 7, "run 01234567; no Ray cluster answered")
    assert find_slots(resources, []).experts >= 1
