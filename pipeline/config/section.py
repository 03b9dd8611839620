"""What every section of a configuration is made of."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

DType = Literal["float32", "bfloat16"]
"""Types of weights and activations."""


class Section(BaseModel):
    """Base of every configuration section: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
