"""What several ask for and the first of them finds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Once:
    """Values by key, each found by whoever asks first; the others wait."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}
        self._lock = threading.RLock()

    def __call__(self, key: Hashable, find: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._found:
                self._found[key] = find()
            return self._found[key]
