"""Experts in several rounds: the section `rounds` of a configuration, and how a merge is named in one."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section
from pipeline.data.fields import Positive

Strict = Annotated[float, Field(strict=True)]
"""A number where YAML has one: `true` is none, nor is text."""
Weights = dict[str, Strict] | Literal["training_rows"]


class CandidateConfig(Section):
    """A merge method. A list, of a parameter's values or of weights, stands for one candidate per element."""

    method: str
    """Name of a method in `merge/methods/catalogue.py`."""
    params: dict[str, Strict | str | Annotated[list[Strict | str], Field(min_length=1)]] = Field(default_factory=dict)
    """The method's parameters."""
    weights: Weights | Annotated[list[Weights], Field(min_length=1)] | None = None
    """A weight for every held-in task, for methods that take weights; `training_rows`: in proportion to the rows that
    the experts are trained on, with sum 1."""


class RoundsConfig(Section):
    """Experts in several rounds: those of a round start from the merge of the round before (docs/rounds.md). A number
    alone stands for `count`."""

    count: Positive = 1
    """How many rounds share the training steps of each expert; what does not divide goes to the first ones."""
    support: Literal["fresh", "kept"] = "fresh"
    """Which weights a sparse expert changes in a later round: positions chosen anew, or those of the first round."""
    merge: CandidateConfig = CandidateConfig(method="spectral_power", params={"p": -0.75, "lambda": 1, "floor": 0.01})
    """How the experts of a round are merged for the next one. The last round's merge is chosen from
    `merge.candidates`."""

    @model_validator(mode="before")
    @classmethod
    def _number_alone(cls, value: Any) -> Any:
        return {"count": value} if isinstance(value, int) else value
