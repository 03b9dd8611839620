"""Pydantic's errors as lines for people: which field, what was found, what is accepted, and what was meant perhaps."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line per wrong field of `model`: dotted path, what was found, what is accepted."""
    lines = []
    for item in error.errors():
        location = ".".join(str(part) or "''" for part in item["loc"] if part != "[key]")
        if item["type"] == "extra_forbidden":
            accepted = _fields_at(model, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), accepted, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(accepted)}"
            lines.append(f"{location}: unknown field; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{location}: missing (required)")
        else:
            found = repr(item["input"])
            shown = found if len(found) <= 60 else found[:57] + "..."
            hint = "; write a text in quotes" if item["type"] == "string_type" and item["input"] is not None else ""
            lines.append(
                f"{location or 'configuration'}: {item['msg'].removeprefix('Value error, ')} (found {shown}){hint}"
            )
    return lines


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the section at `location`; mappings and lists are stepped through by their element type."""
    section: Any = model
    for part in location:
        if isinstance(section, type) and issubclass(section, BaseModel) and part in section.model_fields:
            section = section.model_fields[str(part)].annotation
            while not _is_model(section) and (arguments := get_args(section)):
                section = next((a for a in reversed(arguments) if a is not type(None)), None)
                if not _is_model(section) and not get_args(section):
                    break
    return sorted(section.model_fields) if _is_model(section) else []


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
