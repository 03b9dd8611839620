"""How much of a task's data may be lost before a run is refused; what is lost is always said
(`pipeline.data.counting`). None of this is part of a key."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


class TolerateConfig(BaseModel):
    """Shares of a task's rows. A task may have its own (`tolerate` of a task)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    dropped: Share = 0.01
    """Most rows, of those read, whose answer is in no split: blank, or contradicted by rows with the same input."""
    cut: Share = 0.05
    """Most rows, of those in splits, whose input is longer than `prompt.max_input_tokens` or whose taught target is
    longer than `prompt.max_target_tokens`."""


class DataConfig(BaseModel):
    """What is asked of the tasks' data."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tolerate: TolerateConfig = TolerateConfig()
    """Shares of rows that may be lost."""


class TaskTolerance(BaseModel):
    """Shares of one task's rows, where they differ from the run's."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    dropped: Share | None = None
    """Most rows, of those read, whose answer is in no split."""
    cut: Share | None = None
    """Most rows, of those in splits, whose input or taught target is cut."""
