"""The parameters of merge methods: which values they take, and what a wrong one is told."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from infra.errors import MergeError

Value = float | str
EVEN = "even"
"""The word for the share 1/N of N experts."""
Params = Mapping[str, Value]
"""A method's parameters by name: numbers are floats (whole ones too), choices are strings."""


@dataclass(frozen=True)
class Number:
    """A number that a method takes: its default and range (`high` is allowed); or `word`, for one that follows from the
    merge. `later`: the method had merges before it had this number, whose recipes leave it out at its default."""

    default: float | str
    low: float
    high: float
    low_allowed: bool = False
    integer: bool = False
    word: str | None = None
    later: bool = False

    @property
    def accepted(self) -> str:
        """The range in words."""
        kind = "a whole number" if self.integer else "a number"
        words = f", or {self.word}" if self.word else ""
        return f"{kind} {'from' if self.low_allowed else 'above'} {self.low:g} to {self.high:g}{words}"

    def check(self, where: str, value: object) -> float | str:
        """The value as a float, or the word. Raises MergeError naming `where` when it is no finite number in range."""
        if isinstance(value, str) and value == self.word:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MergeError(f"{where} is {value!r}; accepted: {self.accepted}")
        number = float(value)
        inside = self.low <= number <= self.high and (self.low_allowed or number != self.low)
        if not math.isfinite(number) or not inside or (self.integer and not number.is_integer()):
            raise MergeError(f"{where} is {value!r}; accepted: {self.accepted}")
        return number

    def unsaid(self, value: Value) -> bool:
        """Whether recipes leave this value out."""
        return self.later and value == self.default


@dataclass(frozen=True)
class Choice:
    """A parameter with a few named values, its default among them. `later` as of `Number`."""

    default: str
    options: tuple[str, ...]
    later: bool = False

    @property
    def accepted(self) -> str:
        """The options in words."""
        return ", ".join(self.options)

    def check(self, where: str, value: object) -> str:
        """The value. Raises MergeError naming `where` when it is none of the options."""
        if not isinstance(value, str) or value not in self.options:
            raise MergeError(f"{where} is {value!r}; accepted: {self.accepted}")
        return value

    def unsaid(self, value: Value) -> bool:
        """Whether recipes leave this value out."""
        return self.later and value == self.default


def number(params: Params, name: str) -> float:
    """A numeric parameter. Raises MergeError where it is a string (a `Choice`)."""
    value = params[name]
    if isinstance(value, str):
        raise MergeError(f"parameter {name!r} is {value!r}, not a number")
    return value


def even_share(value: Value, experts: int) -> float:
    """A share that may be `EVEN`, of that many experts."""
    return 1 / experts if isinstance(value, str) else value


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, if any, and all known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Accepted: {', '.join(known) or 'none'}"
