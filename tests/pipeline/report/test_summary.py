"""The table of scores and the lines below it."""

import pytest

from pipeline.report.summary import summary_lines
from tests.pipeline.report.given import results, terminal


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_shows_every_task_and_both_means(width: int) -> None:
    lines = terminal(results(), width).splitlines()
    cells = {line.strip("│┃| ").split("│")[0].strip(): line for line in lines if "│" in line}
    assert {"alpha", "beta", "gamma", "mean of held-in", "mean of held-out"} <= set(cells)
    assert [cell.strip() for cell in cells["alpha"].strip("│").split("│")] == [
        "alpha", "rouge_l", "0.00", "0.75", "0.50", "0.25",
    ]  # fmt: skip
    assert [cell.strip() for cell in cells["gamma"].strip("│").split("│")] == [
        "gamma", "rouge_l", "0.25", "0.75", "", "0.50",
    ]  # fmt: skip
    assert "mine: scores on the test splits" in lines[0]


def test_a_name_with_brackets_is_shown_as_it_is() -> None:
    found = results()
    renamed = found.model_copy(update={"held_in": {"task[bold]": found.held_in["alpha"]}})
    assert "task[bold]" in terminal(renamed)


def test_the_lines_below_the_table() -> None:
    lines = "\n".join(summary_lines(results()))
    assert "chosen on validation: ties (lambda 0.5, density 1, density_of support)" in lines
    assert "keeps 50% of the experts' gain (merged 0.500, 95 % interval 0.500 to 0.500)" in lines
    assert "experts above base: 2 of 2" in lines
    assert "merged weights rounded to bfloat16: score 0.250; rounding to bfloat16 loses 25%" in lines
    assert "merged adapter: 0 MB, 10% of the adapted weights" in lines
    assert "made:   1 experts, 1 merge nodes, 9 evaluations" in lines
    assert "reused: 1 experts, 0 merge nodes, 2 evaluations" in lines
    assert "total 9; 2 slots 50% busy with experts" in lines
