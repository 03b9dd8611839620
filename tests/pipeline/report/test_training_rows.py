"""Scores against training rows, and what refining brought each task."""

from typing import Any

from matplotlib.figure import Figure

from pipeline.records.results import Results
from pipeline.report.markdown import report_markdown
from pipeline.report.training_rows import by_task_section, draw
from tests.pipeline.report.given import changed
from tests.pipeline.report.given import results as plain_results
from tests.pipeline.report.test_plots import check_legible, figures, results, words

__all__ = ["figures"]

YARDSTICK = {"key": "k", "digest": "d", "uri": "u", "steps": 160, "rows": 3200, "share": 1.0}


def candidate(value: float, tasks: int, validation: float, steps: int = 0, **more: Any) -> dict[str, Any]:
    row = {"method": "ties", "params": {"lambda": value, "density": 1.0, "density_of": "support"}, "tasks": tasks,
           "validation": validation, "first_rung": validation - 0.1, "interval": [validation - 0.1, validation + 0.1],
           "rung": 1, "chosen": False}  # fmt: skip
    return row | ({"refined": {"steps": steps, "rows": 20 * steps, "share": steps / 160}} if steps else {}) | more


def refined() -> Results:
    names = list(results().held_in)
    before, after = dict.fromkeys(names, 0.25), dict.fromkeys(names, 0.5) | {names[0]: 0.125}
    rows = [
        candidate(0.3, 2, 0.3),
        candidate(0.9, 4, 0.4, by_task=before),
        candidate(0.9, 4, 0.45, steps=10, by_task=dict.fromkeys(names, 0.0)),
        candidate(0.9, 4, 0.5, steps=40, by_task=after, chosen=True),
    ]
    told = results(candidates=rows, chosen={"refined": rows[3]["refined"]}, multitask=YARDSTICK).model_dump()
    told["summary"]["held_in"]["multitask"], told["summary"]["held_out"]["multitask"] = 0.65, 0.32
    return Results.model_validate(told)


def positions(figure: Figure, panel: int) -> set[tuple[float, float]]:
    marks = [line for line in figure.axes[panel].lines if line.get_marker() not in ("None", "")]
    return {(float(x), round(float(y), 6)) for line in marks for x, y in zip(*line.get_data(), strict=True)}


def test_candidates_are_compared_on_the_same_tasks_beside_the_yardsticks(figures: list[Figure]) -> None:
    assert list(draw(refined())) == ["training-rows.png"]
    (figure,) = figures
    check_legible(figure)
    assert {(0, 0.2), (0, 0.3), (800, 0.4), (3200, 0.65), (3200, 0.32)} <= positions(figure, 0)
    assert positions(figure, 1) == {(0, 0.2), (0, 0.3), (200, 0.35), (800, 0.4)}, "all, on the first rung's tasks"
    assert positions(figure, 2) == {(0, 0.4), (200, 0.45), (800, 0.5)}, "those that were scored on all tasks"
    for text in ("2 tasks: all candidates", "all 4 tasks", "training rows beyond the experts'", "multitask"):
        assert text in words(figure)


def test_with_a_yardstick_alone_there_are_test_rows_alone(figures: list[Figure]) -> None:
    draw(changed(multitask=YARDSTICK, summary={"held_in": {"multitask": 0.75}}))
    assert len(figures[0].axes) == 1
    assert draw(plain_results()) == {}, "no rows but the experts' were trained on"


def test_what_was_lost_and_brought_back_stands_by_task() -> None:
    section = by_task_section(refined())
    report = report_markdown(refined(), ["training-rows.png"])
    assert "![training-rows](training-rows.png)" in report
    assert "\n".join(section) in report
    found = refined()
    lost = sorted(found.held_in, key=lambda task: found.held_in[task].merged - found.held_in[task].expert)
    rows = [line.strip("| ").split(" | ") for line in section[6:-1]]
    assert [row[0] for row in rows] == lost
    assert [row[-1] for row in rows if row[0] == "task_0"] == ["-0.12"]
    assert {row[-1] for row in rows if row[0] != "task_0"} == {"+0.25"}
    assert by_task_section(plain_results()) == []
