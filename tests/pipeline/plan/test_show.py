"""What the plan looks like, for people and for machines."""

import json
from io import StringIO
from typing import Any

from rich.console import Console

from infra.store.s3 import Store
from pipeline.flow.rehearse import Count, Forecast, expert_recipes
from pipeline.plan.estimate import Estimate, Slots, Stage
from pipeline.plan.preflight import Cost, Prepared
from pipeline.plan.reasons import Reasons
from pipeline.plan.show import Plan, plan_json, show
from tests.pipeline.given import inputs

GIVEN = inputs(Store("bucket", "http://127.0.0.1:9"), 3, merge={"fan_in": 2, "candidates": [{"method": "mean"}]})
COUNTS = {
    "support": Count(),
    "experts": Count(1, 2),
    "evaluations": Count(7, 30, at_most=True),
    "registrations": Count(2, 2),
}  # fmt: skip
STAGES = (
    Stage("experts", 90.4, 12_300_000, "time: the expert before (1); bytes: mean of 3 that exist"),
    Stage("evaluations", 7500.0, None, "time: run 01234567"),
)


def plan(counts: dict[str, Count], reasons: dict[str, Reasons], stages: tuple[Stage, ...] = STAGES) -> Plan:
    cost = Cost(1, 1, 1, {}, 1, {}, 1)
    given = {
        name: getattr(GIVEN, name) for name in ("config", "store", "base", "tasks", "max_new_tokens", "candidates")
    }
    forecast = Forecast(GIVEN, None, counts, tuple(reasons), (), 2)
    return Plan(Prepared(**given, cost=cost), (forecast,), (reasons,), Estimate(Slots(2, 1, "the Ray cluster"), stages))


STALE = plan(COUNTS, {"task1": Reasons("task1", ("data: 3 rows added to train, 1 removed", "seed → 1"))})


def shown(found: Plan) -> str:
    out = StringIO()
    show(found, Console(file=out, soft_wrap=True, width=160))
    return out.getvalue()


def test_people_read_what_why_and_at_what_cost() -> None:
    text = shown(STALE)
    lines = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line.strip()}
    assert lines["task1"] == "task1 data: 3 rows added to train, 1 removed; seed → 1"
    assert lines["experts"] == "experts 1 2 90 s 12.3 MB time: the expert before (1); bytes: mean of 3 that exist"
    assert lines["evaluations"] == "evaluations at most 7 at least 30 2.1 h time: run 01234567"
    assert lines["registrations"] == "registrations 2 2"
    assert "support" not in lines
    assert "on 2 slots (the Ray cluster)" in text


def test_nothing_to_do_is_said() -> None:
    text = shown(plan({"experts": Count(0, 3), "evaluations": Count(0, 30)}, {}, ()))
    assert "all 3 experts exist" in text
    assert "nothing to do" in text


def test_machines_read_names_that_stay() -> None:
    found: dict[str, Any] = json.loads(json.dumps(plan_json(STALE)))
    assert found["suite"] == "mine"
    assert found["base"] == {"name": "tiny", "sha256": "b" * 64}
    assert found["kinds"]["evaluations"] == {"make": 7, "reuse": 30, "at_most": True}
    assert [row["state"] for row in found["experts"]] == ["reuse", "make", "reuse"]
    row = found["experts"][1]
    assert row == {
        "task": "task1", "seed": 0, "state": "make", "why": ["data: 3 rows added to train, 1 removed", "seed → 1"],
        "key": expert_recipes(GIVEN)["task1"].key,
    }  # fmt: skip
    assert found["estimate"]["slots"] == 2
    assert found["estimate"]["seconds"] == 7590.4
    assert found["estimate"]["bytes"] == 12_300_000
    assert found["estimate"]["stages"]["evaluations"] == {
        "seconds": 7500.0,
        "bytes": None,
        "from": "time: run 01234567",
    }


def test_seeds_are_planned_one_by_one_and_counted_together() -> None:
    one = plan(COUNTS, {})
    both = Plan(one.prepared, one.forecasts * 2, one.reasons * 2, one.estimate)
    assert both.counts()["experts"] == Count(2, 4)
    assert both.counts()["evaluations"] == Count(14, 60, True)
    assert shown(both).count("seed 0") == 2
    assert len(plan_json(both)["experts"]) == 6
