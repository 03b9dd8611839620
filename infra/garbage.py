"""No search for garbage while much is made that stays."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    """Python looks for unused cycles again and again while objects are made: of 261,000 rows of tasks, which have
    none, a third of the time that it takes to read them. May be nested."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
