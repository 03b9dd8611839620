"""What is said of lost rows, and above which share a run is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

from infra.errors import DataError
from pipeline.data.counting import check_shares, rows_json, rows_lines, with_cuts
from pipeline.data.distinct import RowCounts
from pipeline.data.tasks import SPLITS, TaskConfig, TaskData
from pipeline.records.row_results import TaskRows
from pipeline.report.rows import lost_lines, rows_section
from tests.workers.tiny import tiny_tokenizer
from workers.text.cuts import CutCounts
from workers.text.rows import Row

PLAIN = TaskData("mine", TaskConfig(source="jsonl:x", metric="exact_match"), dict.fromkeys(SPLITS, ()))
CLEAN = replace(PLAIN, counts=RowCounts(read=1000, kept=1000), cuts=CutCounts(rows=500, taught=400))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "blank targets": (
        {"counts": RowCounts(read=1000, kept=980, blank_target=20)},
        "task mine: 2.0% of its 1000 rows would be dropped (20 with a blank target); at most 1.0% are tolerated. Mend "
        "the data, or raise data.tolerate.dropped or the task's tolerate.dropped",
    ),
    "contradictions": (
        {"counts": RowCounts(read=100, kept=90, outvoted=4, undecided=6)},
        "task mine: 10.0% of its 100 rows would be dropped (4 contradict most rows with the same input, 6 contradict "
        "each other, same input and no majority); at most 1.0%",
    ),
    "lost instruction": (
        {"cuts": CutCounts(rows=500, taught=400, inputs=50, instructions=50, beginning="Translate", either=50)},
        "task mine: 10.0% of its 500 rows would be cut: 50 inputs lose their beginning (50 of them what half of the "
        "task's begin with), 0 targets their end; at most 5.0% are tolerated. Raise prompt.max_input_tokens or "
        "prompt.max_target_tokens; what all inputs begin with can stand in the task's template, which nothing cuts",
    ),
    "cut targets": (
        {"cuts": CutCounts(rows=500, taught=400, targets=26, either=26)},
        "task mine: 5.2% of its 500 rows would be cut: 0 inputs lose their beginning, 26 targets their end",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_more_than_is_tolerated_is_refused(changes: dict[str, Any], message: str) -> None:
    lossy = replace(CLEAN, **changes)
    with pytest.raises(DataError) as caught:
        check_shares({"mine": lossy}, 0.01, 0.05)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    check_shares({"mine": lossy}, 0.2, 0.2)
    own = lossy.config.model_validate({**lossy.config.model_dump(), "tolerate": {"dropped": 0.1, "cut": 0.1}})
    check_shares({"mine": replace(lossy, config=own)}, 0, 0)
    with pytest.raises(DataError, match="1 more, see the counts above"):
        check_shares({"mine": lossy, "other": replace(lossy, name="other")}, 0.01, 0.05)


def test_what_is_tolerated_is_said_all_the_same() -> None:
    lossy = replace(
        CLEAN,
        counts=RowCounts(read=20, kept=9, blank_target=1, joined=10, several_answers=3, alike=2),
        cuts=CutCounts(rows=9, taught=6, inputs=2, instructions=2, beginning="a|b", targets=1, either=2),
    )
    (line,) = rows_lines({"clean": CLEAN, "mine": lossy})
    assert line == (
        "mine: 20 rows; dropped: 1 with a blank target; joined: 10 with the same input as another row (3 with several "
        "answers, all right); 2 have the same input as another row but for case, whitespace or options; cut: 2 of 9 "
        "inputs lose their beginning, 2 lose the task's beginning 'a|b'; cut: 1 of 6 targets lose their end"
    )
    rows = {"clean": TaskRows(**rows_json(CLEAN)), "mine": TaskRows(**rows_json(lossy))}
    assert json.loads(rows["mine"].model_dump_json()) == rows_json(lossy)
    assert rows["mine"].dropped["blank_target"] == 1
    assert rows["mine"].cut.model_dump() == {"rows": 2, "inputs": 2, "instructions": 2, "targets": 1}
    assert lost_lines(rows) == [
        "data: dropped 1 rows of 1 task, joined 10 rows of 1 task, cut 2 rows of 1 task (report.md has them by task)"
    ]
    assert next(line for line in rows_section(rows) if "| mine |" in line).count("\\|") == 1
    for nothing in ({}, {"clean": TaskRows(**rows_json(CLEAN))}):
        assert lost_lines(nothing) == rows_section(nothing) == []


def test_only_what_is_taught_counts_targets() -> None:
    row = Row("1", "w1", ("w1w2w3",))
    data = replace(PLAIN, splits={"train": (row, row), "validation": (row,), "gate": (row,), "test": (row,)})
    tokenizer = tiny_tokenizer()
    assert with_cuts({"mine": data}, ["mine"], tokenizer, 5, 2)["mine"].cuts == CutCounts(5, 3, 0, 0, "", 3, 3)
    assert with_cuts({"mine": data}, [], tokenizer, 5, 2)["mine"].cuts == CutCounts(5, 0, 0, 0, "", 0, 0)
    assert with_cuts({"mine": data}, ["mine"], tokenizer, 5, None)["mine"].cuts.either == 0
