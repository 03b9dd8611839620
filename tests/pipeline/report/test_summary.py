"""The table of scores and the lines below it."""

import pytest

from pipeline.report.summary import summary_lines
from tests.pipeline.report.given import changed, results, terminal


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


def test_rounds_are_told() -> None:
    row = {"count": 2, "support": "kept", "method": "ties", "params": {"lambda": 1.0}}
    assert (
        "experts in 2 rounds, each from the merge of the one before by ties (lambda 1); positions of later rounds: kept"
    ) in summary_lines(changed(rounds=row))
    assert "rounds" not in results().to_json()


def test_a_multitask_adapter_is_a_line_with_its_rows_and_what_the_merge_has_of_its_gain() -> None:
    plain = results()
    yardstick = {"key": "k", "digest": "d", "uri": "u", "steps": 160, "rows": 3200, "share": 1.0}
    held_in = {"multitask": 0.75, "multitask_interval": [0.5, 1.0], "of_multitask": 0.5}
    found = changed(multitask=yardstick, summary={"held_in": held_in, "held_out": {"multitask": 0.5}})
    line = next(line for line in summary_lines(found) if line.startswith("multitask"))
    assert line == (
        "multitask, one adapter trained on all tasks from the base (160 steps, 3200 training rows, 100% of the "
        "experts'): held-in 0.750 (95 % interval 0.500 to 1.000), held-out 0.500"
    )
    assert "keeps 50% of the experts' gain and 50% of the multitask adapter's (merged 0.500," in summary_lines(found)[0]
    assert not any("multitask" in line for line in summary_lines(plain))
    assert "multitask" not in plain.to_json()


def test_routed_experts_and_a_merge_with_examples_are_lines_of_their_own() -> None:
    plain = results()
    held_in = {"routed": 0.625, "routed_interval": [0.5, 0.75], "merged_few_shot": 0.5}
    found = changed(summary={"held_in": held_in, "held_out": {"routed": 0.25, "merged_few_shot": 0.75}})
    lines = summary_lines(found)
    assert (
        "routed, each row by the expert that a router picks from its prompt: held-in 0.625 (95 % interval 0.500 to "
        "0.750), held-out 0.250; the experts, each on its own task, 0.750"
    ) in lines
    assert "merged with examples in the prompt: held-in 0.500, held-out 0.750; the base with them 0.750" in lines
    assert not any(word in "\n".join(summary_lines(plain)) for word in ("routed", "with examples"))
    assert not any(word in plain.to_json() for word in ("routed", "merged_few_shot"))
