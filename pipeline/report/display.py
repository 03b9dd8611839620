"""What a person sees while a run is under way: a live table in a terminal, lines of text in a job's log.

Both show the same facts: the state of every expert, its step, loss, tokens per second and the time it still needs.
"""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

LINE_INTERVAL_S = 20.0
"""Seconds between two progress lines in a log that is not a terminal."""


@dataclass
class ExpertRow:
    """State of one expert as last heard of."""

    state: str = "waiting"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_s: float | None = None


class Display:
    """Shows progress; use as a context manager. `line` is for things that happen once."""

    def __init__(self, experts: list[str], console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self.rows = {name: ExpertRow() for name in experts}
        self.stage = ""
        self._start = time.monotonic()
        self._last_line = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        """Print one line, with the time since the start in front."""
        self.console.print(Text(f"[{_clock(time.monotonic() - self._start)}] {text}"))

    def state(self, expert: str, state: str, detail: str = "") -> None:
        """An expert changed its state."""
        self.rows[expert].state = state
        self.line(f"{expert}: {state}{' – ' + detail if detail else ''}")

    def progress(self, expert: str, step: int, steps: int, loss: float, tokens_per_second: float, eta_s: float) -> None:
        """An expert finished an optimizer step."""
        state = self.rows[expert].state
        state = "training" if state == "waiting" else state
        self.rows[expert] = ExpertRow(state, step, steps, loss, tokens_per_second, eta_s)

    def tick(self, stage: str) -> None:
        """Redraw the table, or print one line per running expert if the last one is long enough ago."""
        self.stage = stage
        if self._live:
            self._live.update(self._render())
        elif time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            self.line(stage)
            for name, row in self.rows.items():
                if row.state == "training" and row.loss is not None:
                    self.line(
                        f"  {name}: step {row.step}/{row.steps}, loss {row.loss:.3f}, "
                        f"{row.tokens_per_second or 0:.0f} tokens/s, {_clock(row.eta_s or 0)} left"
                    )

    def _render(self) -> RenderableType:
        table = Table(expand=False)
        table.add_column("expert")
        table.add_column("state")
        for name in ("step", "loss", "tokens/s", "left"):
            table.add_column(name, justify="right")
        for name, row in self.rows.items():
            running = row.state == "training"
            table.add_row(
                Text(name),
                row.state,
                f"{row.step}/{row.steps}" if row.steps else "",
                f"{row.loss:.3f}" if row.loss is not None else "",
                f"{row.tokens_per_second:.0f}" if running and row.tokens_per_second else "",
                _clock(row.eta_s) if running and row.eta_s is not None else "",
            )
        return Group(table, Text(f"[{_clock(time.monotonic() - self._start)}] {self.stage}"))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02d}:{rest:02d}"
