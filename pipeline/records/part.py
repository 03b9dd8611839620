"""What the sections of results.json (`pipeline.records.results`) have in common."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")
Maybe = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
"""Left out of the file where it is None."""
Interval = tuple[float, float]
"""Ends of a 95 % bootstrap interval, rows resampled within tasks."""
Params = dict[str, int | float | str]
"""Parameters of a merge method."""


class Part(BaseModel):
    """Base of everything in the file: values cannot change, NaN is refused, unknown names are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
