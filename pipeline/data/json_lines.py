"""JSON lines as files have them: each object with its line's number, numbers as they are written.

What JSON does not have (NaN, a key twice) is refused by line, or, for NaN and Infinity, where a row uses it: other
columns of a table may lack values. What the fields mean is `pipeline.data.sources`.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra.errors import DataError


@dataclass(frozen=True)
class Numeral:
    """A number as it is written: `1`, `1.0` and `1e0` are three answers. NaN and Infinity too, which JSON lacks."""

    text: str

    @property
    def finite(self) -> bool:
        return not self.text.lstrip("-")[:1].isalpha()

    def __repr__(self) -> str:
        return self.text


def read_json(text: str, where: str) -> Any:
    """The JSON value in `text`, numbers as `Numeral`s. Raises DataError, beginning with `where`."""
    try:
        return json.loads(
            text, parse_float=Numeral, parse_int=Numeral, parse_constant=Numeral, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def json_objects(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object, and where it stands; blank lines are left out. Raises DataError naming the line."""
    # Lines of any system; not splitlines, which also splits at characters inside strings.
    for at, line in enumerate(io.StringIO(text, newline=None), 1):
        line = line.removeprefix("\ufeff")  # of a file that was appended to another
        if not line.strip():
            continue
        place = f"{where}, line {at}"
        value = read_json(line, place)
        if not isinstance(value, dict):
            kind = "number" if isinstance(value, Numeral) else type(value).__name__
            raise DataError(f"{place}: {kind} found; an object with input and target is accepted")
        yield place, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands in it twice")
    return found
