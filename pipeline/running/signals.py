"""Signals that ask a run to stop: Ctrl-C, and SIGTERM, which is what `ray job stop` sends."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


@contextlib.contextmanager
def on_signals(handler: Handler) -> Iterator[None]:
    """Inside the block SIGINT and SIGTERM are handled so. For the main thread."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, each in zip(numbers, before, strict=True):
            signal.signal(number, each)
