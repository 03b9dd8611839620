"""Which runs are kept."""

import math

import pytest

from infra.artifacts.gc_plan import MIN_AGE_S
from infra.registry.roots import RunState
from pipeline.collection.retention import ABANDONED_S, DAY_S, Rule, abandoned

NOW = 1_000_000_000.0
OLD = MIN_AGE_S + 1
RUNS = {
    "young": RunState(False, False, NOW - 2 * DAY_S),
    "old": RunState(False, False, NOW - 40 * DAY_S),
    "running": RunState(False, True, NOW - 40 * DAY_S),
    "deleted": RunState(True, False, NOW - 2 * DAY_S),
}


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Rule(), {"young", "old", "running", "unknown"}),
        (Rule(keep_days=30), {"young", "running", "unknown"}),
        (Rule(keep_days=0, forget_unknown=True), {"running"}),
    ],
)
def test_which_runs_are_kept(rule: Rule, kept: set[str]) -> None:
    keep = rule.keep(RUNS, NOW)
    assert {run for run in [*RUNS, "unknown"] if keep(run, OLD)} == kept
    silent = kept if rule.keep_days is None else kept - {"running"}  # for 40 days
    assert {run for run in [*RUNS, "unknown"] if keep(run, math.inf)} == silent


def test_runs_that_may_be_in_progress_are_kept() -> None:
    deleted_while_running = {"stopped": RunState(True, True, NOW - DAY_S)}
    keep = Rule(keep_days=0, forget_unknown=True).keep(RUNS | deleted_while_running, NOW)
    runs = [*RUNS, "stopped", "began"]
    assert [run for run in runs if keep(run, MIN_AGE_S - 1)] == ["running", "stopped", "began"]
    assert [run for run in runs if keep(run, OLD)] == ["running"]


def test_a_small_minimal_age_still_keeps_a_run_that_began_after_mlflow_was_asked() -> None:
    keep = Rule(keep_days=0, min_age_s=0, forget_unknown=True).keep(RUNS, NOW)
    assert [run for run in [*RUNS, "began"] if keep(run, 5.0)] == ["running", "began"]


def test_a_run_in_progress_that_is_silent_for_days_counts_as_ended_when_it_was_last_heard_of() -> None:
    running = RUNS["running"]
    assert not abandoned(running, ABANDONED_S - 1, NOW)
    assert abandoned(running, ABANDONED_S, NOW)
    assert not abandoned(RunState(False, True, NOW - 60), math.inf, NOW)  # began just now, announces soon
    assert not abandoned(RUNS["old"], math.inf, NOW)  # said itself that it ended

    def kept(keep_days: float | None, announced_s: float) -> bool:
        return Rule(keep_days=keep_days).keep(RUNS, NOW)("running", announced_s)

    assert kept(0, ABANDONED_S - 1)
    assert not kept(0, ABANDONED_S)
    assert kept(30, 29 * DAY_S)
    assert not kept(30, 30 * DAY_S)
    assert kept(None, 1000 * DAY_S)
