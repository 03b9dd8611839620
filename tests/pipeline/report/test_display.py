"""What a person follows: lines in a log, one block per interval, and a live table in a terminal."""

import re
from io import StringIO

import pytest
from rich.console import Console

from pipeline.report import display
from pipeline.report.display import LINE_INTERVAL_S, Display


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def log(experts: list[str]) -> tuple[Display, StringIO]:
    out = StringIO()
    return Display(experts, Console(file=out, force_terminal=False, soft_wrap=True)), out


def take(out: StringIO) -> list[str]:
    """The lines since the last call."""
    text = out.getvalue()
    out.seek(0)
    out.truncate()
    return text.splitlines()


def test_a_log_has_a_line_for_every_change_of_state(clock: Clock) -> None:
    shown, out = log(["alpha", "beta"])
    with shown:
        shown.state("alpha", "reused", "abc123")
        clock.now += 75
        shown.state("beta", "failed")
        clock.now += 3600
        shown.line("chosen: mean")
    assert take(out) == ["[00:00] alpha: reused – abc123", "[01:15] beta: failed", "[61:15] chosen: mean"]
    assert shown.rows["alpha"].state == "reused"


def test_a_log_has_no_control_characters_and_no_table(clock: Clock) -> None:
    shown, out = log(["alpha"])
    with shown:
        shown.progress("alpha", 1, 10, 2.5, 100.0, 9.0)
        shown.tick("experts 0/1")
    text = out.getvalue()
    assert "\x1b" not in text
    assert "│" not in text


def test_progress_appears_once_per_interval(clock: Clock) -> None:
    shown, out = log(["alpha", "beta", "gamma"])
    shown.progress("alpha", 3, 24, 1.23456, 987.6, 62.0)
    assert take(out) == []
    shown.tick("experts 0/3")
    assert take(out) == ["[00:00] experts 0/3", "[00:00]   alpha: step 3/24, loss 1.235, 988 tokens/s, 01:02 left"]
    clock.now += LINE_INTERVAL_S - 1
    shown.progress("beta", 1, 24, 3.0, 500.0, 10.0)
    shown.tick("experts 0/3")
    assert take(out) == []
    clock.now += 1
    shown.tick("experts 1/3")
    lines = take(out)
    assert lines[0] == "[00:20] experts 1/3"
    assert [line.split()[1] for line in lines[1:]] == ["alpha:", "beta:"]
    shown.tick("experts 1/3")
    assert take(out) == []


def test_only_experts_in_training_have_a_progress_line(clock: Clock) -> None:
    shown, out = log(["alpha", "beta"])
    shown.progress("alpha", 3, 24, 1.0, 100.0, 1.0)
    shown.progress("beta", 3, 24, 1.0, 100.0, 1.0)
    shown.state("alpha", "done")
    shown.progress("alpha", 24, 24, 0.5, 100.0, 0.0)  # a late report
    assert shown.rows["alpha"].state == "done"
    take(out)
    shown.tick("stage")
    assert [line.split()[1] for line in take(out)] == ["stage", "beta:"]


def test_square_brackets_in_a_line_are_kept(clock: Clock) -> None:
    shown, out = log(["alpha"])
    shown.state("alpha", "failed", "rows [1, 2] of [bold]x[/bold]")
    assert take(out) == ["[00:00] alpha: failed – rows [1, 2] of [bold]x[/bold]"]


def test_a_terminal_gets_a_table_of_all_experts_and_the_stage() -> None:
    out = StringIO()
    names = [f"task{number}" for number in range(6)]
    shown = Display(names, Console(file=out, force_terminal=True, width=100, height=40))
    with shown:
        shown.progress("task1", 7, 24, 1.5, 812.0, 95.0)
        shown.state("task2", "done", "validation loss 0.500, 12 s")
        shown.progress("task3", 24, 24, 0.25, 700.0, 0.0)
        shown.state("task3", "done")
        shown.tick("experts 2/6, merge nodes to do 1")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    table = text[text.rindex("┌") if "┌" in text else text.rindex("┏") :]
    for title in ("expert", "state", "step", "loss", "tokens/s", "left"):
        assert title in table
    rows = {line.split("│")[1].strip(): line for line in table.splitlines() if line.startswith("│")}
    assert list(rows) == names
    assert [cell.strip() for cell in rows["task1"].strip("│").split("│")] == [
        "task1", "training", "7/24", "1.500", "812", "01:35",
    ]  # fmt: skip
    assert [cell.strip() for cell in rows["task3"].strip("│").split("│")] == ["task3", "done", "24/24", "0.250", "", ""]
    assert [cell.strip() for cell in rows["task0"].strip("│").split("│")] == ["task0", "waiting", "", "", "", ""]
    assert "experts 2/6, merge nodes to do 1" in table
    assert "task2: done – validation loss 0.500, 12 s" in text


def test_a_terminal_is_left_clean() -> None:
    out = StringIO()
    shown = Display(["alpha"], Console(file=out, force_terminal=True, width=100))
    with pytest.raises(KeyError), shown:
        shown.state("unknown", "done")
    assert out.getvalue().rstrip().endswith("\x1b[2K")  # the table is erased
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")  # the cursor is shown again
    before = out.getvalue()
    shown.tick("after")
    assert "alpha" not in out.getvalue()[len(before) :]


def test_a_name_with_brackets_is_shown_as_it_is() -> None:
    out = StringIO()
    shown = Display(["task[bold]"], Console(file=out, force_terminal=True, width=100))
    with shown:
        shown.tick("stage")
    assert "task[bold]" in out.getvalue()
