"""Results of several seeds as one."""

import pytest

from pipeline.records.replicates import combine
from pipeline.records.results import Results
from tests.pipeline.report.given import changed, held_in_row, told


def result(expert: float, retention: float | None) -> Results:
    return changed(
        held_in={"a": held_in_row(base=0.1, expert=expert, merged=0.2)},
        held_out={},
        summary={
            "held_in": {"base": 0.1, "expert": expert, "merged": 0.2, "retention": retention},
            "held_out": {"base": None, "merged": None, "base_few_shot": None},
        },
        made={"experts": 1},
        reused={"experts": 2},
        seconds={"total": 3.5},
        slot_utilisation=None if expert < 0.5 else expert,
    )


def test_one_seed_is_left_as_it_is() -> None:
    one = result(0.5, 0.4)
    assert combine([7], [one]) is one


def test_scores_get_mean_and_sample_deviation_and_counts_add_up() -> None:
    found = told(combine([1, 2, 3], [result(0.4, 0.5), result(0.6, None), result(0.8, 0.5)]))
    expert = found["seeds"]["summary"]["held_in"]["expert"]
    assert (expert["mean"], expert["sd"]) == (pytest.approx(0.6), pytest.approx(0.2))
    assert expert["values"] == [0.4, 0.6, 0.8]
    assert found["seeds"]["tasks"]["held_in"]["a"]["merged"]["sd"] == 0
    assert "retention" not in found["seeds"]["summary"]["held_in"]
    assert found["seeds"]["summary"]["held_out"] == {}
    added = (found["made"]["experts"], found["reused"]["experts"], found["seconds"]["total"])
    assert added == (3, 6, 10.5)
    assert found["slot_utilisation"] == pytest.approx(0.7)
    assert found["summary"]["held_in"]["expert"] == 0.4
