"""Types of configuration fields: what a number or a name has to be so that everything behind it can work with it.

Checked where a configuration is read, because what refuses them otherwise (numpy, Ray, MLflow) is asked hours later.
"""

import difflib
import re
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

LONGEST_NAME = 256
"""Characters of a registered model's name and of an experiment's in MLflow's database."""


_JOINERS = "\u200c\u200d"
"""Invisible, and part of how some scripts are written."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PLACEHOLDER = re.compile(r"\{\s*(\w+)\s*\}")
_NOT_FILLED = ("prompt", "target", "targets", "label", "labels")


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a number is needed, {str(value).lower()} is none")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("a text is needed, this one is blank")
    return value


def _plain_name(value: str) -> str:
    if not value.strip():
        raise ValueError("a name is needed, this one is empty")
    if value != value.strip():
        raise ValueError("a name neither begins nor ends with blanks")
    if bad := next(
        (character for character in value if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")), ""
    ):
        raise ValueError(f"a name is one line of text, without {bad!r}")
    if bad := next((each for each in value if unicodedata.category(each) == "Cf" and each not in _JOINERS), ""):
        raise ValueError(f"a name shows all of its characters, {bad!a} is invisible: remove it")
    if (composed := unicodedata.normalize("NFC", value)) != value:
        raise ValueError(f"write {composed!r} in composed characters (Unicode NFC): names that look alike are two")
    if "?" in value:
        raise ValueError("a name holds no '?', at which MLflow ends it in models:/<name>")
    return value


def check_place(kind: str, place: str) -> None:
    """Raises ValueError if no task's data can be at `place`, what follows a source's kind and colon."""
    if place != place.strip():
        raise ValueError(f"blanks around {place.strip()!r}: a source is <kind>:<place>, without blanks between")
    scheme = _SCHEME.match(place)
    if kind == "jsonl" and scheme:
        if scheme.group() != "s3://":
            raise ValueError(f"{scheme.group()} is not read; accepted: a path, or s3://<bucket>/<object>")
        if not re.fullmatch(r"s3://[^/]+/.*[^/]", place):
            raise ValueError(f"{place!r} names no object: s3://<bucket>/<object>")
    if kind == "hub" and (scheme or place.startswith(("/", "~")) or "" in place.split("/")):
        raise ValueError(f"{place!r} is no dataset of a hub: <owner>/<name>[/config], or <name>")


def check_placeholders(template: str) -> None:
    """Raises ValueError for what looks like a placeholder of a task's template and would be shown to the model as it
    stands: other fields of a row, and misspelt ones. Any other `{…}` is text."""
    for name in _PLACEHOLDER.findall(template):
        if name in ("input", "options"):
            continue
        near = difflib.get_close_matches(name.lower(), ("input", "inputs", "options"), n=1, cutoff=0.8)
        if near or name.lower() in _NOT_FILLED:
            raise ValueError(
                f"{{{name}}} is not filled in; placeholders are {{input}} and {{options}}"
                + (f" (did you mean {{{'options' if near[0] == 'options' else 'input'}}}?)" if near else "")
            )


Whole = Annotated[int, BeforeValidator(_no_boolean)]
"""An integer; `true` is none."""
Natural = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Whole, Field(gt=0)]
Number = Annotated[float, BeforeValidator(_no_boolean)]
"""A finite number; `true` is none."""
Text = Annotated[str, AfterValidator(_not_blank)]
"""A text that is not blank."""
Name = Annotated[str, AfterValidator(_plain_name)]
"""What people, MLflow, and paths call something."""
