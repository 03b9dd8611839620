"""Which weights a sparse change may touch: the section `mask` of a configuration."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from infra.errors import ConfigError
from pipeline.config.section import Section
from pipeline.data.fields import Number, Positive, Whole
from workers.masks.spec import MaskSpec

Fraction = Annotated[Number, Field(gt=0, le=1)]


class MaskConfig(Section):
    """Which modules are adapted and, for sparse experts, which of their weights may change."""

    modules: str = "attention"
    """A preset (attention, value_output, mlp, value_output_mlp, all_linear) or a regular expression that must match the
    whole name of each adapted linear module. For every kind of expert."""
    criterion: Literal["random", "magnitude", "gradient", "connection_sensitivity", "fisher"] = "random"
    """`random` (SpaRTA, arXiv 2502.15975), `magnitude` |W|, `gradient` |dL/dW|, `connection_sensitivity` |W * dL/dW|
    (arXiv 2507.07140) or `fisher`, the mean squared gradient of single rows."""
    keep: Literal["largest", "smallest"] = "largest"
    """`smallest`, for magnitude, connection sensitivity and Fisher: the least sensitive weights are the task-localised
    choice of TaLoS (arXiv 2504.02620)."""
    granularity: Literal["element", "block", "row", "column", "n_m"] = "block"
    """Single weights, aligned blocks of `block_size`, whole rows or columns, or N of every `group` weights of a row."""
    block_size: tuple[Positive, Positive] = (16, 16)
    """Rows x columns of a block; both must divide every adapted weight."""
    group: Annotated[Whole, Field(ge=2)] = 16
    """`n_m`: length of a group; N is `density` of it, at least 1. Must divide the width of every adapted weight."""
    density: Fraction = 0.05
    """Kept share of the adapted weights (the keep ratio)."""
    budget: Literal["tensor", "global"] = "tensor"
    """`tensor`: every weight keeps this share; `global`: the share of all together goes where the scores are best."""
    score_batches: Positive = 1
    """Training batches (of `train.micro_batch_size` rows, if that is set) that scores are taken over. With several, a
    worker holds an fp32 copy of the adapted weights while it selects."""
    reselect_every: Positive | None = None
    """Steps between selections of a new mask; null keeps the first one."""
    reselect_rounds: Positive | None = None
    """Selections after the first one before the mask is frozen; null: no limit."""
    shared: bool = False
    """One support for all experts, scored on the rows of all tasks together: it does not fill up in the merge, but a
    change of any task's data remakes every expert (unless the criterion is random or magnitude)."""

    @field_validator("modules")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"neither a preset nor a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        try:
            self.spec(seed=0)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def spec(self, seed: int) -> MaskSpec:
        """The mask of one expert."""
        return MaskSpec(**self.model_dump(exclude={"shared"}), seed=seed)
