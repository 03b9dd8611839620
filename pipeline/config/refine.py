"""Training on rows of all tasks: the sections `refine` and `yardsticks` of a configuration (docs/refining.md)."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.mask import MaskConfig
from pipeline.config.section import DType, Section
from pipeline.data.fields import Name, Natural, Number, Positive
from pipeline.data.tasks import TaskConfig


class KeepConfig(Section):
    """Rows on which a refined merge is to answer as the base does."""

    tasks: Annotated[dict[Name, TaskConfig], Field(min_length=1)]
    """Where the rows come from, written as in `held_in`. Their training rows are read; they are neither scored nor
    learned. No held-out task's rows are read unless its source is named here."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """What the divergence from the base weighs at each of their target tokens; a held-in target token weighs 1."""
    rows_per_step: Positive = 4
    """Rows of theirs in every batch, beside those of held-in tasks; these tasks take turns."""


class RefineConfig(Section):
    """A few training steps on rows of all held-in tasks, from the merges that do best on validation rows. Every one is
    a further candidate. Warm-up, schedule, clipping, weight decay and rows at a time are those of `train`."""

    merges: Positive = 1
    """How many of the best merges are refined, each by itself."""
    steps: Annotated[list[Positive], Field(min_length=1, default_factory=lambda: [10])]
    """Optimizer steps; each number stands for one candidate of every merge, trained by itself."""
    rows_per_task: Positive = 1
    """Training rows of each held-in task in every batch."""
    learning_rate: Annotated[Number, Field(gt=0)] = 2e-3
    """Peak learning rate of AdamW."""
    support: Literal["fresh", "merge", "both"] = "fresh"
    """Which weights are trained: positions chosen anew; all that the merge changes, which takes more memory; or both,
    half of the mask's density each: chosen anew, and where the merge changes a weight most."""
    mask: MaskConfig | None = None
    """How fresh positions are chosen, with a seed of their own and once; null: as `mask` says, whatever the experts
    are."""
    compute_dtype: DType = "float32"
    """Type of the weights and activations in training (a merged change often vanishes in bfloat16)."""
    seed: Natural | None = None
    """Seed of fresh positions and of the order of rows; null: the run's."""
    teacher: Literal["experts"] | None = None
    """`experts`: at target tokens, the divergence from the task's own expert is minimised too; null: only the
    cross-entropy of the targets."""
    teacher_weight: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Share of the divergence from the teacher in the loss; the rest is the cross-entropy of the targets."""
    top_k: Positive = 64
    """How many of a teacher's likeliest tokens are kept by themselves at each target token, of experts and of the base;
    all others count as one."""
    keep: KeepConfig | None = None
    """Rows that are not held-in, on which the refined merge is held to the base; null: none."""

    def rows(self, tasks: int) -> int:
        """Rows of one batch, with so many held-in tasks."""
        return self.rows_per_task * tasks + (self.keep.rows_per_step if self.keep is not None else 0)

    @property
    def asks(self) -> bool:
        """Whether teachers are asked."""
        return self.teacher is not None or self.keep is not None

    @field_validator("steps")
    @classmethod
    def _every_one_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("every number of steps once")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.support == "merge" and self.mask is not None:
            raise ValueError("support=merge trains the positions of the merge: remove mask, or support")
        if self.mask is not None and self.mask.shared:
            raise ValueError("mask.shared is about experts: remove it")
        if self.mask is not None and self.mask.reselect_every:
            raise ValueError("positions are chosen once: remove mask.reselect_every")
        return self


class MultitaskConfig(Section):
    """One adapter for all tasks: what refining does, but from the base. Fields as in `refine`."""

    steps: Positive | None = None
    """Optimizer steps; null: as many as it takes to see as many rows as all experts together."""
    rows_per_task: Positive = 1
    """Training rows of each held-in task in every batch."""
    learning_rate: Annotated[Number, Field(gt=0)] = 2e-3
    """Peak learning rate of AdamW."""
    mask: MaskConfig | None = None
    """How its positions are chosen, once; null: as `mask` says, whatever the experts are."""
    compute_dtype: DType = "float32"
    """Type of the weights and activations in training."""
    seed: Natural | None = None
    """Seed of positions and of the order of rows; null: the run's."""

    def refining(self, steps: int) -> RefineConfig:
        """The same, as refining by so many steps. Raises ValueError as that does."""
        return RefineConfig(
            steps=[steps], rows_per_task=self.rows_per_task, learning_rate=self.learning_rate, mask=self.mask,
            compute_dtype=self.compute_dtype, seed=self.seed,
        )  # fmt: skip

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.refining(1)
        return self


class RoutedConfig(Section):
    """The experts as one model: each row is answered by the one that a router picks from its prompt alone."""

    rows: Positive = 64
    """Training rows of each task whose mean is its centroid; at most all."""


class YardsticksConfig(Section):
    """What the merge is held against beside base and experts: made, scored on test rows and reported, never chosen or
    registered."""

    multitask: MultitaskConfig | None = None
    """One adapter trained on rows of all held-in tasks mixed evenly; null: none."""
    routed: RoutedConfig | None = None
    """Experts behind a router: the task whose centroid among the base's mean hidden states is nearest to the prompt's;
    null: none."""
    few_shot_merge: bool = False
    """The chosen merge shown as many training examples as the few-shot base (`evaluate.few_shot`)."""
