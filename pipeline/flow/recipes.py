"""Keys of experts, refined merges and scores: the one place that says what is in them and what is not. Those of merges:
`merge.tree.keys`.

In a key: base identity, data fingerprints, prompt, mask, optimisation, compute dtype, seed, algorithm versions and the
keys of the inputs. Not in a key: names of tasks, resources, retries, paths, endpoints, library versions.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from infra.artifacts.manifests import Recipe, canonical_json
from infra.errors import ConfigError
from merge.modelled.refining import REFINE_VERSION
from pipeline.config.expert_kinds import EXPERT_KINDS, derived_seed, mask_spec
from pipeline.config.model import PipelineConfig, TrainConfig
from pipeline.config.refine import RefineConfig, RoutedConfig
from pipeline.data.tasks import TaskData
from workers.masks.spec import MaskSpec
from workers.measuring.catalogue import MEASUREMENTS
from workers.measuring.file import IMPORTANCE_FILE_VERSION
from workers.scoring.classification import CLASSIFICATION_VERSION, ClassifySpec
from workers.scoring.likelihood import SCORING_VERSION, EvaluateSpec
from workers.scoring.metrics import METRIC_VERSIONS
from workers.scoring.routing import ROUTING_VERSION
from workers.text.prompt import PromptSpec
from workers.training.batches import mixed_rows
from workers.training.kinds import ExpertSpec
from workers.training.loop import TRAIN_VERSION, TrainSpec
from workers.training.teaching import TEACHING_VERSION


def expert_spec(config: PipelineConfig, data: TaskData) -> ExpertSpec:
    """The change of one expert. Random supports and factors differ between experts because their training rows do."""
    return EXPERT_KINDS[config.expert].spec(config, data.fingerprints["train"])


def training_steps(train: TrainConfig, rows: int) -> int:
    """Optimizer steps over this many training rows: as many as configured, or those of the configured epochs."""
    return train.steps or max(1, round((train.epochs or 1.0) * rows / min(train.batch_size, rows)))


def in_round(config: PipelineConfig, number: int) -> PipelineConfig:
    """The configuration with the seed of which everything is drawn in a round: positions, factors, batches. In the
    first one it is the run's."""
    if number == 1:
        return config
    return config.model_copy(update={"seed": derived_seed(config.seed, "round", str(number))})


def train_spec(config: PipelineConfig, data: TaskData, number: int = 1) -> TrainSpec:
    """The optimisation of one expert in a round, epochs turned into steps. Steps that do not divide go to the first
    rounds. Raises ConfigError where the steps of all are fewer than the rounds."""
    config, train = in_round(config, number), config.train
    steps, rounds = training_steps(train, len(data.splits["train"])), config.rounds.count
    if steps < rounds:
        raise ConfigError(
            f"rounds.count is {rounds}, but the expert for {data.name} takes {steps} optimizer steps in all: lower it"
        )
    return TrainSpec(
        steps=steps // rounds + (number <= steps % rounds),
        batch_size=train.batch_size,
        learning_rate=train.learning_rate or EXPERT_KINDS[config.expert].learning_rate,
        weight_decay=train.weight_decay,
        warmup_ratio=train.warmup_ratio,
        schedule=train.schedule,
        clip_norm=train.clip_norm,
        validate_every=train.validate_every,
        seed=derived_seed(config.seed, "batches", data.fingerprints["train"]),
        micro_batch_size=train.micro_batch_size,
        patience=train.patience,
    )


def prompt_spec(config: PipelineConfig, data: TaskData) -> PromptSpec:
    """How a task's rows become inputs."""
    return PromptSpec(data.config.template, config.prompt.wrapper, config.prompt.max_input_tokens)


def pooled(config: PipelineConfig, data: TaskData) -> tuple[str, str]:
    """A task as a part of the pool: its training rows and its prompt."""
    return data.fingerprints["train"], canonical_json(_plain(prompt_spec(config, data))).decode()


def pooled_order(
    config: PipelineConfig, tasks: Mapping[str, TaskData], names: Iterable[str] | None = None
) -> list[str]:
    """Held-in tasks, or those of these `names`, in the order in which their rows are pooled, which does not depend on
    names or the file's order."""
    return sorted(config.held_in if names is None else names, key=lambda name: pooled(config, tasks[name]))


def support_recipe(config: PipelineConfig, base_sha256: str, tasks: Mapping[str, TaskData]) -> Recipe:
    """The shared support is a function of the base, the training rows and prompts of all held-in tasks and the mask."""
    return Recipe(
        kind="support",
        version=TRAIN_VERSION,
        config={
            "base": base_sha256,
            "tasks": [pooled(config, tasks[name]) for name in pooled_order(config, tasks)],
            "max_target_tokens": config.prompt.max_target_tokens,
            "mask": _plain(mask_spec(config, "shared")),
            "batch_size": config.train.micro_batch_size or config.train.batch_size,
            "compute_dtype": config.train.compute_dtype,
        },
    )


def expert_recipe(
    config: PipelineConfig, base_sha256: str, data: TaskData, support: str | None = None, number: int = 1,
    start: str | None = None,
) -> Recipe:  # fmt: skip
    """An expert is a function of base, training and validation rows, prompt, kind, optimisation, and positions that
    were chosen before (`support`: the key of what holds them); in a later round of the merge that it starts from
    (`start`: its key). An expert of the first round does not know that others follow."""
    body: dict[str, Any] = {
        "base": base_sha256,
        "data": {split: data.fingerprints[split] for split in ("train", "validation")},
        "prompt": {**config.prompt.model_dump(), "template": data.config.template},
        "kind": config.expert,
        config.expert: _plain(expert_spec(in_round(config, number), data)),
        "train": _plain(train_spec(config, data, number)),
        "compute_dtype": config.train.compute_dtype,
        "value_dtype": config.train.value_dtype,
    }
    if config.objective == "classification":
        body |= {"labels": list(data.labels), "classification_version": CLASSIFICATION_VERSION}
    if number > 1:
        rounds = config.rounds
        body["round"] = {"number": number, "last": number == rounds.count, "support": rounds.support}
    return Recipe("expert", TRAIN_VERSION, body, tuple(key for key in (support, start) if key))


def refine_mask(config: PipelineConfig, refine: RefineConfig) -> MaskSpec:
    """Which positions refining trains where they are fresh: with a seed of their own, selected once; half of them where
    the other half is the merge's."""
    mask = (refine.mask or config.mask).model_copy(update={"reselect_every": None, "reselect_rounds": None})
    if refine.support == "both":
        mask = mask.model_copy(update={"density": mask.density / 2})
    return mask.spec(derived_seed(_refine_seed(config, refine), "refine", "mask"))


def refine_train(config: PipelineConfig, refine: RefineConfig, steps: int) -> TrainSpec:
    """The optimisation of a refined merge. No more rows run at a time than in an expert's training."""
    train = config.train
    rows = refine.rows(len(config.held_in))
    return TrainSpec(
        steps=steps,
        batch_size=rows,
        learning_rate=refine.learning_rate,
        weight_decay=train.weight_decay,
        warmup_ratio=train.warmup_ratio,
        schedule=train.schedule,
        clip_norm=train.clip_norm,
        validate_every=None,
        seed=derived_seed(_refine_seed(config, refine), "refine", "rows"),
        micro_batch_size=min(rows, train.micro_batch_size or train.batch_size),
    )


@dataclasses.dataclass(frozen=True)
class RowsRead:
    """Training rows of a task, by number, that refining asks a teacher about; `kept`: the base, else an expert."""

    task: str
    numbers: tuple[int, ...]
    kept: bool


def rows_read(config: PipelineConfig, refine: RefineConfig, tasks: Mapping[str, TaskData]) -> list[RowsRead]:
    """What teachers are asked of each task that has one: all rows that the longest of the trainings reads, which are
    those of shorter ones, too."""
    held, kept = pooled_order(config, tasks), pooled_order(config, tasks, config.kept)
    counts, others = ([len(tasks[name].splits["train"]) for name in names] for names in (held, kept))
    seed, beside = refine_train(config, refine, 1).seed, refine.keep.rows_per_step if refine.keep is not None else 0
    batches = mixed_rows(counts, refine.rows_per_task, max(refine.steps), seed, others, beside)
    read, found, first = sorted({row for batch in batches for row in batch}), [], 0
    for name, count in zip((*held, *kept), (*counts, *others), strict=True):
        if name in config.kept or refine.teacher is not None:
            numbers = tuple(row - first for row in read if first <= row < first + count)
            found.append(RowsRead(name, numbers, name in config.kept))
        first += count
    return found


def teacher_recipe(
    config: PipelineConfig, refine: RefineConfig, base_sha256: str, data: TaskData, numbers: Sequence[int],
    expert: str | None,
) -> Recipe:  # fmt: skip
    """What a teacher says is a function of the rows, the prompt, and of who is asked: an expert (its key) or the
    base."""
    fingerprint, prompt = pooled(config, data)
    body = {
        "base": base_sha256,
        "rows": fingerprint,
        "numbers": list(numbers),
        "prompt": prompt,
        "max_target_tokens": config.prompt.max_target_tokens,
        "top_k": refine.top_k,
        "compute_dtype": config.evaluate.compute_dtype,
    }
    return Recipe("teacher", TEACHING_VERSION, body, (expert,) if expert is not None else ())


def refine_recipe(
    config: PipelineConfig, refine: RefineConfig, base_sha256: str, tasks: Mapping[str, TaskData], steps: int,
    start: str | None, experts: Mapping[str, str] | None = None,
) -> Recipe:  # fmt: skip
    """A refined merge is a function of the merge (`start`: its key), the training rows and prompts of all held-in
    tasks, the positions and the optimisation; of the experts that teach it (their keys by task), and of the rows on
    which it holds on to the base. Without a merge it is the multitask adapter."""
    body = {
        "base": base_sha256,
        "tasks": [pooled(config, tasks[name]) for name in pooled_order(config, tasks)],
        "max_target_tokens": config.prompt.max_target_tokens,
        "rows_per_task": refine.rows_per_task,
        "support": refine.support,
        "mask": _plain(refine_mask(config, refine)),
        "train": _plain(refine_train(config, refine, steps)),
        "compute_dtype": refine.compute_dtype,
        "train_version": TRAIN_VERSION,
    }
    if refine.asks:  # what exactly they were asked is none of this: other rows change nothing
        body["teaching"] = {
            "version": TEACHING_VERSION, "top_k": refine.top_k, "compute_dtype": config.evaluate.compute_dtype
        }  # fmt: skip
    if refine.teacher is not None:
        assert experts is not None
        keys = [experts[name] for name in pooled_order(config, tasks)]
        body["teacher"] = {"experts": keys, "weight": refine.teacher_weight}
    if refine.keep is not None:
        order = [pooled(config, tasks[name]) for name in pooled_order(config, tasks, config.kept)]
        body["keep"] = {"tasks": order, "weight": refine.keep.weight, "rows_per_step": refine.keep.rows_per_step}
    if start is None:
        return Recipe("multitask", REFINE_VERSION, body)
    return Recipe("refined", REFINE_VERSION, body, (start,))


def expert_rows(config: PipelineConfig, data: TaskData) -> int:
    """Training rows that one expert sees in all rounds, rows that come again counted again."""
    return training_steps(config.train, len(data.splits["train"])) * config.train.batch_size


def router_recipe(
    config: PipelineConfig, routed: RoutedConfig, base_sha256: str, tasks: Mapping[str, TaskData]
) -> Recipe:
    """A router is a function of the base, its type, and the training rows and prompts of all held-in tasks."""
    body = {
        "base": base_sha256,
        "tasks": [pooled(config, tasks[name]) for name in pooled_order(config, tasks)],
        "rows": routed.rows,
        "compute_dtype": config.evaluate.compute_dtype,
    }
    return Recipe("router", ROUTING_VERSION, body)


def experts_rows(config: PipelineConfig, tasks: Mapping[str, TaskData]) -> int:
    """Those of all experts together."""
    return sum(expert_rows(config, tasks[name]) for name in config.held_in)


def multitask_refining(config: PipelineConfig, tasks: Mapping[str, TaskData]) -> RefineConfig | None:
    """The multitask adapter as refining, its steps settled; None where there is none."""
    multitask = config.yardsticks.multitask
    if multitask is None:
        return None
    batch = multitask.rows_per_task * len(config.held_in)
    return multitask.refining(multitask.steps or -(-experts_rows(config, tasks) // batch))


def _refine_seed(config: PipelineConfig, refine: RefineConfig) -> int:
    return config.seed if refine.seed is None else refine.seed


def measured_rows(config: PipelineConfig, data: TaskData) -> int:
    """How many training rows of a task are used to measure its expert."""
    return min(config.merge.importance_rows, len(data.splits["train"]))


def measurement_recipe(config: PipelineConfig, kind: str, expert: str, data: TaskData) -> Recipe:
    """A measurement is a function of its expert (`expert`: its key), whose key holds rows and prompt."""
    body = {"rows": measured_rows(config, data), "file": IMPORTANCE_FILE_VERSION}
    return Recipe(kind, MEASUREMENTS[kind].version, body, (expert,))


def evaluation_recipe(
    model_digest: str | Sequence[str],
    data: TaskData,
    split: str,
    spec: EvaluateSpec | ClassifySpec,
    dtype: str,
    weights_dtype: str,
    head: str | int | None = None,
) -> Recipe:
    """A score is a function of the model's bytes, the rows, the prompt and decoding, the metric and the dtypes.

    `model_digest`: of the model, or of each part that it is made of. `head` of a classification: the digest of the
    expert that has it, or the seed of an untrained one.
    """
    classifies = isinstance(spec, ClassifySpec)
    body = {
        "model": model_digest,
        "rows": data.fingerprints[split],
        "split": split,
        "spec": _plain(spec),
        "metric_version": METRIC_VERSIONS[spec.metric],
        "compute_dtype": dtype,
        "weights_dtype": weights_dtype,
    }
    version = CLASSIFICATION_VERSION if classifies else SCORING_VERSION
    return Recipe("evaluation", version, {**body, "head": head} if classifies else body)


def _plain(spec: Any) -> Mapping[str, Any]:
    return dataclasses.asdict(spec)
