"""Keys: which recipe every artifact of a run has. The one place that says what is in a key and what is not.

In a key: base identity, data fingerprints, prompt, mask, optimisation, compute dtype, seed, algorithm versions and the
keys of the inputs. Not in a key: names of tasks, resources, retries, paths, endpoints, library versions.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from infra.artifacts import Recipe
from merge.methods import Candidate, LiftSpec
from merge.reduce import NODE_VERSIONS, ROOT_VERSIONS
from pipeline.config import PipelineConfig
from pipeline.tasks import TaskData
from workers.masks import MaskSpec
from workers.metrics import METRIC_VERSION
from workers.scoring import SCORING_VERSION, EvaluateSpec
from workers.train import TRAIN_VERSION, TrainSpec


def derived_seed(seed: int, *parts: str) -> int:
    """A 63-bit seed that is a pure function of its arguments."""
    digest = hashlib.sha256("\n".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def mask_spec(config: PipelineConfig, data: TaskData) -> MaskSpec:
    """The mask of one expert. Experts differ in their random supports because their training rows differ."""
    mask = config.mask
    return MaskSpec(
        criterion=mask.criterion,
        granularity=mask.granularity,
        density=mask.density,
        block_size=mask.block_size,
        modules=mask.modules,
        reselect_every=mask.reselect_every,
        seed=derived_seed(config.seed, "mask", data.fingerprints["train"]),
    )


def train_spec(config: PipelineConfig, data: TaskData) -> TrainSpec:
    """The optimisation of one expert, epochs turned into steps."""
    train = config.train
    rows = len(data.splits["train"])
    steps = train.steps or max(1, round((train.epochs or 1.0) * rows / min(train.batch_size, rows)))
    return TrainSpec(
        steps=steps,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        warmup_ratio=train.warmup_ratio,
        schedule=train.schedule,
        clip_norm=train.clip_norm,
        validate_every=train.validate_every,
        seed=derived_seed(config.seed, "batches", data.fingerprints["train"]),
    )


def expert_recipe(config: PipelineConfig, base_sha256: str, data: TaskData) -> Recipe:
    """An expert is a function of the base, its training and validation rows, prompt, mask and optimisation."""
    return Recipe(
        kind="expert",
        version=TRAIN_VERSION,
        config={
            "base": base_sha256,
            "data": {split: data.fingerprints[split] for split in ("train", "validation")},
            "prompt": {**config.prompt.model_dump(), "template": data.config.template},
            "mask": _plain(mask_spec(config, data)),
            "train": _plain(train_spec(config, data)),
            "compute_dtype": config.train.compute_dtype,
            "value_dtype": config.train.value_dtype,
        },
    )


def node_recipe(lift: LiftSpec, children: Sequence[str]) -> Recipe:
    """A node of the merge tree is a function of what is lifted and of its children, in the order of the tree."""
    return Recipe("node", 1, {"lift": lift.to_dict(), "versions": NODE_VERSIONS}, tuple(children))


def merged_recipe(candidate: Candidate, root: str) -> Recipe:
    """A merged adapter is a function of the root's statistics and of the method that lowers them."""
    return Recipe("merged", 1, {**candidate.to_dict(), "versions": ROOT_VERSIONS}, (root,))


def evaluation_recipe(
    model_digest: str, data: TaskData, split: str, spec: EvaluateSpec, dtype: str, weights_dtype: str
) -> Recipe:
    """A score is a function of the model's bytes, the rows, the prompt and decoding, the metric and the dtypes."""
    return Recipe(
        "evaluation",
        SCORING_VERSION,
        {
            "model": model_digest,
            "rows": data.fingerprints[split],
            "split": split,
            "spec": _plain(spec),
            "metric_version": METRIC_VERSION,
            "compute_dtype": dtype,
            "weights_dtype": weights_dtype,
        },
    )


def _plain(spec: Any) -> Mapping[str, Any]:
    return dataclasses.asdict(spec)
