"""What refining takes, and what of it can be refused before anything is trained."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from infra.errors import ConfigError
from pipeline.config.model import GIB, PipelineConfig
from pipeline.config.refine import RefineConfig
from pipeline.data.tasks import TaskData, learned_elsewhere
from pipeline.flow.recipes import refine_mask, rows_read
from pipeline.plan.figures import given, needed
from workers.masks.spec import accumulator_bytes, trainable_elements, unit_of


@dataclass(frozen=True)
class RefineNeed:
    """Of one training of a merge."""

    trainable: int
    """Trained values, at most."""
    step_tokens: float
    """Tokens of one optimizer step."""
    worker_bytes: int
    """Memory of its worker."""
    file_bytes: int
    """Size of what is published, at most."""
    steps: float = 1.0
    """Optimizer steps, the mean of all budgets."""

    @property
    def tokens(self) -> float:
        """Of one training."""
        return self.steps * self.step_tokens


def check_refine_rows(config: PipelineConfig, tasks: Mapping[str, TaskData]) -> None:
    """Raises ConfigError if a batch takes more rows of a task than it has, or if rows that are scored are kept."""
    for name, count in learned_elsewhere(tasks, config.kept).items():
        if name in config.scored:
            raise ConfigError(
                f"refine.keep.tasks: {count} of their rows are test rows of the task {name}, whose score would say "
                "little: take other rows; those of one source are apart where `sizes` are the same"
            )
    for field, section in (("refine", config.refine), ("yardsticks.multitask", config.yardsticks.multitask)):
        for name in config.held_in if section is not None else ():
            assert section is not None
            if (rows := len(tasks[name].splits["train"])) < section.rows_per_task:
                raise ConfigError(
                    f"{field}.rows_per_task is {section.rows_per_task}, but task {name} has {rows} training rows: "
                    "lower it to that"
                )


def refined_count(config: PipelineConfig) -> int:
    """Merges that are trained on."""
    return config.refine.merges * len(config.refine.steps) if config.refine is not None else 0


def teachers_cost(
    config: PipelineConfig, tasks: Mapping[str, TaskData], lengths: Mapping[str, float], vocabulary: int
) -> tuple[float, int]:
    """Tokens that all teachers of a run read, and the bytes of what they say, at most; `lengths`: mean tokens of a
    training example by task."""
    refine = config.asking
    if refine is None:
        return 0.0, 0
    read = {each.task: len(each.numbers) for each in rows_read(config, refine, tasks)}
    tokens = math.fsum(count * lengths[name] for name, count in read.items())
    per_target = 8 * min(refine.top_k, vocabulary) + 4
    return tokens, sum(read.values()) * config.prompt.max_target_tokens * per_target


def refine_need(
    config: PipelineConfig, refine: RefineConfig, model: Any, lengths: Mapping[str, float], changed: int,
    process_bytes: float, activations: Callable[[int], int],
) -> RefineNeed:  # fmt: skip
    """Of a base without values, `model`, and tasks whose training rows have these mean `lengths` in tokens.

    `changed`: weights that the merge changes, at most, 0 where the base is the start; `activations`: bytes of those of
    one forward pass by the bytes of a number. Raises ConfigError for modules or blocks that do not fit the base.
    """
    mask, kept = refine_mask(config, refine), 0.0
    if refine.keep is not None:
        kept = refine.keep.rows_per_step * math.fsum(lengths[name] for name in config.kept) / len(config.kept)
    trainable, adapted = trainable_elements(model, mask)
    per_value, beside = (24 if unit_of(mask, (1, 1)) is None else 20), accumulator_bytes(model, mask)
    if refine.support == "merge":
        trainable, per_value, beside = max(trainable, changed), 24, 0
    elif refine.support == "both":
        trainable *= 2
    width = torch.finfo(getattr(torch, refine.compute_dtype)).bits // 8
    parameters = sum(parameter.numel() for parameter in model.parameters())
    copies = 1 + bool(config.train.checkpoint_every)
    largest = max(parameter.numel() for parameter in model.parameters())
    state = trainable * (per_value + 4 * copies) + beside + 24 * largest
    both = min(max(adapted, changed), changed + trainable)
    return RefineNeed(
        trainable,
        refine.rows_per_task * math.fsum(lengths[name] for name in config.held_in) + kept,
        int(process_bytes + parameters * width + state + activations(width)),
        round(4.2 * both),
        math.fsum(refine.steps) / len(refine.steps),
    )


def check_refine_room(config: PipelineConfig, need: RefineNeed) -> None:
    """Raises ConfigError if refining needs more memory than it reserves."""
    reserved = config.resources.refining
    if reserved.gpus == 0 and need.worker_bytes > reserved.memory_gib * GIB:
        raise ConfigError(
            f"resources.refine.memory_gib is {given(reserved.memory_gib)} (as an expert's, where it is not given), but "
            f"refining is expected to need {needed(need.worker_bytes / GIB)} GiB; raise it to that, or lower "
            "train.micro_batch_size or refine.mask.density"
        )
