"""Pictures of a run: what stands in them, that nothing is cut off, and that models differ without colour."""

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pipeline.records.results import Results
from pipeline.report import plots
from tests.pipeline.report.given import changed, held_in_row, held_out_row, told

LONG = "wiqa_what_is_the_final_step_of_the_following_process_and_of_all_that_follow"


def results(tasks: int = 4, held_out: int = 2, **changes: Any) -> Results:
    """Results of so many tasks, the last with a long name."""

    def scores(at: int, models: tuple[str, ...]) -> dict[str, Any]:
        found = {model: (at % 7) / 10 + number / 10 for number, model in enumerate(models)}
        return {**found, "intervals": {model: [score - 0.05, score + 0.05] for model, score in found.items()}}

    models = ("base", "base_few_shot", "merged", "expert")
    inside, outside = held_in_row(), held_out_row()
    mean = {"base": 0.2, "base_few_shot": 0.3, "expert": 0.6, "merged": 0.4}
    given = {
        "suite": "a$b$",
        "held_in": {f"task_{at}": inside | scores(at, models) | {"best_step": 4} for at in range(tasks - 1)}
        | {LONG: inside | scores(3, models) | {"best_step": 4}},
        "held_out": {f"out_{at}": outside | scores(at, ("base", "merged")) for at in range(held_out)},
        "summary": {
            "held_in": {**mean, **{f"{name}_interval": [value - 0.1, value + 0.1] for name, value in mean.items()}},
            "held_out": {"base": 0.2, "merged": 0.3, "base_interval": [0.1, 0.3], "merged_interval": [0.2, 0.4]},
        },
        "candidates": [
            {"method": "mean", "params": {}, "validation": 0.3, "first_rung": 0.2, "interval": [0.2, 0.4], "tasks": 2,
             "rung": 1, "chosen": False},
            *({"method": "ties", "params": {"lambda": value, "density": 1.0, "density_of": "support"},
               "validation": value / 2, "first_rung": value / 3, "interval": [value / 2, value], "tasks": tasks,
               "rung": 2, "chosen": value == 0.9} for value in (0.3, 0.9)),
        ],
        "per_task": [{"method": "emr", "params": {}, "validation": 0.7}],
        "search": {"rungs": [{"candidates": 3, "tasks": 2}, {"candidates": 2, "tasks": tasks - 2}]},
    }  # fmt: skip
    return changed(**(given | changes))


def curves(found: Results) -> dict[str, plots.Curve]:
    points = [(step, 5 / step) for step in range(1, 9)]
    return {task: plots.Curve(points, points[3::4]) for task in found.held_in}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn in the test, as they were saved."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def texts(figure: Figure) -> Iterator[Text]:
    """Visible texts, those of axes that are hidden left out."""
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and (text.axes is None or text.axes.get_visible()):
            yield text


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts(figure))


def check_legible(figure: Figure) -> None:
    """Nothing reaches beyond the picture, and labels of one axis do not overlap."""
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= 0, "cut off on the left"
    assert drawn.y0 >= 0, "cut off at the bottom"
    assert drawn.x1 <= width, "cut off on the right"
    assert drawn.y1 <= height, "cut off at the top"
    assert min(text.get_fontsize() for text in texts(figure)) >= 7
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
        boxes.sort(key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))


@pytest.mark.parametrize("tasks", [1, 4, 20, 100])
def test_every_text_is_in_the_picture_and_legible(tasks: int, figures: list[Figure]) -> None:
    found = results(tasks, held_out=tasks // 2)
    names = list(plots.draw(found, curves(found)))
    pages = ["scores.png", "scores-2.png"] if tasks == 100 else ["scores.png"]
    assert names == [*pages, "candidates.png", "loss.png"]
    for figure in figures:
        check_legible(figure)
    shown = "".join(map(words, figures[: len(pages)]))
    for task in [*found.held_in, *found.held_out]:
        assert (task if task != LONG else "wiqa_what_is_the_final_") in shown
    assert f"mean of {tasks} held-in" in shown
    assert all(title in shown for title in ("Rouge-L", "score on the test split", "95 % intervals", "a\\$b\\$"))


def test_a_picture_is_a_png_that_a_page_shows_without_scaling_up() -> None:
    found = results()
    for name, content in plots.draw(found, curves(found)).items():
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG", name
            assert picture.width == 1210


def test_scores_are_where_the_axis_says_and_differ_by_shape(figures: list[Figure]) -> None:
    found = results()
    plots.draw(found, {})
    axes = figures[0].axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "mean of 4 held-in"
    best = max(found.held_in, key=lambda task: found.held_in[task].expert)
    assert labels[1].startswith(best[:20])  # the best expert first
    marks = [each for each in axes.collections if len(each.get_offsets()) and each.get_paths()[0].vertices.size]
    positions = {tuple(offset) for each in marks for offset in each.get_offsets().tolist()}
    for at, model in enumerate(("base", "base_few_shot", "expert", "merged")):
        value = getattr(found.held_in[best], model)
        assert any(x == pytest.approx(value) and round(y) == 1 for x, y in positions), (at, model)
    handles = figures[0].legends[0].legend_handles
    assert len({handle.get_marker() for handle in handles}) == len(handles) == 4


def test_intervals_of_seeds_are_standard_deviations(figures: list[Figure]) -> None:
    spread = {"expert": {"mean": 0.5, "sd": 0.1, "values": [0.4, 0.6]}}
    seeds = {"values": [0, 1], "chosen": [], "summary": {"held_in": {}, "held_out": {}},
             "tasks": {"held_in": {LONG: spread}, "held_out": {}}}  # fmt: skip
    plots.draw(results(seeds=seeds), {})
    assert "mean over 2 seeds; lines: ± 1 standard deviation" in words(figures[0])
    ends = [segment.tolist() for each in figures[0].axes[0].collections if hasattr(each, "get_segments")
            for segment in each.get_segments()]  # fmt: skip
    assert any([x for x, _ in segment] == pytest.approx([0.4, 0.6]) for segment in ends)


def test_negative_scores_are_in_the_picture(figures: list[Figure]) -> None:
    held_in = told(results())["held_in"]
    held_in[LONG] |= {"base": -0.3, "intervals": {"base": [-0.42, -0.1]}, "metric": "matthews"}
    plots.draw(results(held_in=held_in), {})
    assert figures[0].axes[0].get_xlim() == (-0.5, 1.0)
    assert "Matthews' r" in words(figures[0])


def test_candidates_are_told_apart_and_lambda_gets_a_line(figures: list[Figure]) -> None:
    plots.draw(results(), {})
    listed, by_lambda = figures[1].axes[0], figures[1].axes[1]
    assert [label.get_text() for label in listed.get_yticklabels()] == ["ties  λ 0.9", "ties  λ 0.3", "mean", "emr"]
    shown = words(figures[1])
    for text in ("4 tasks", "2 tasks", "needs the task", "chosen", "dropped earlier", "mean validation score",
                 "on the 2 tasks that every candidate was scored on"):  # fmt: skip
        assert text in shown, shown
    (line,) = [line for line in by_lambda.lines if len(line.get_xdata())]
    assert list(line.get_xdata()) == [0.3, 0.9]
    assert list(line.get_ydata()) == pytest.approx([0.1, 0.3])


def test_without_two_values_of_lambda_there_is_no_second_panel(figures: list[Figure]) -> None:
    plots.draw(results(candidates=told(results())["candidates"][:2]), {})
    assert "By λ" not in words(figures[1])


def test_each_expert_has_a_panel_with_both_losses(figures: list[Figure]) -> None:
    found = results()
    known = curves(found)
    del known["task_1"]  # its run is gone
    plots.draw(found, known)
    panels = [axes for axes in figures[2].axes if axes.get_visible()]
    assert [axes.get_title(loc="left")[:6] for axes in panels] == ["task_0", "task_2", "wiqa_w"]
    training, validation, kept = panels[0].lines
    assert list(training.get_ydata()) == pytest.approx([5 / step for step in range(1, 9)])
    assert list(validation.get_xdata()) == [4, 8]
    assert set(kept.get_xdata()) == {4}
    assert "nats a target token" in words(figures[2])


def test_no_curves_no_picture() -> None:
    assert list(plots.draw(results(), {})) == ["scores.png", "candidates.png"]
