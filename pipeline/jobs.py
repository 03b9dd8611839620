"""What workers are asked to do: jobs of names and numbers, made from a run's inputs. `pipeline.run` hands them out."""

from infra.artifacts import Manifest, Recipe
from pipeline import recipes
from pipeline.config import PipelineConfig
from pipeline.opponent import Opponent
from pipeline.outcome import Inputs
from pipeline.tasks import TaskData
from workers.classification import ClassifySpec
from workers.evaluator import EvaluationJob
from workers.expert import ExpertJob
from workers.importance import ImportanceJob
from workers.prompt import PromptSpec
from workers.scoring import EvaluateSpec
from workers.shared_support import PooledTask, SupportJob, SupportRef


def support_job(inputs: Inputs, recipe: Recipe) -> SupportJob:
    """Score positions on the training rows of all held-in tasks."""
    config, tasks = inputs.config, inputs.tasks
    return SupportJob(
        recipe=recipe,
        base_sha256=inputs.base.sha256,
        tasks=tuple(
            PooledTask(tasks[name].object_name("train"), recipes.prompt_spec(config, tasks[name]))
            for name in recipes.pooled_order(config, tasks)
        ),
        max_target_tokens=config.prompt.max_target_tokens,
        mask=recipes.mask_spec(config, "shared"),
        batch_size=config.train.micro_batch_size or config.train.batch_size,
        compute_dtype=config.train.compute_dtype,
        recompute=config.train.gradient_checkpointing,
        provenance={
            "licenses": {
                "base": [inputs.base.license],
                "data": sorted({tasks[name].license for name in recipes.pooled_order(config, tasks)}),
            }
        },
    )


def support_ref(config: PipelineConfig, manifest: Manifest) -> SupportRef:
    """The finished support, for experts."""
    return SupportRef(manifest.key, manifest.digest, manifest.files["support"], recipes.mask_spec(config, "shared"))


def expert_job(inputs: Inputs, task: str, recipe: Recipe, support: SupportRef | None) -> ExpertJob:
    """Train one expert."""
    config, data = inputs.config, inputs.tasks[task]
    return ExpertJob(
        task=task,
        recipe=recipe,
        base_sha256=inputs.base.sha256,
        train_rows=data.object_name("train"),
        validation_rows=data.object_name("validation"),
        prompt=recipes.prompt_spec(config, data),
        max_target_tokens=config.prompt.max_target_tokens,
        labels=data.labels if config.objective == "classification" else None,
        expert=recipes.expert_spec(config, data),
        train=recipes.train_spec(config, data),
        support=support,
        compute_dtype=config.train.compute_dtype,
        value_dtype=config.train.value_dtype,
        recompute=config.train.gradient_checkpointing,
        save_every=config.train.checkpoint_every,
        deterministic=config.train.deterministic,
        experiment=config.suite,
        parent_run_id=inputs.run_id,
        tags={"suite": config.suite, "base": inputs.base.name, "source": data.config.source},
        provenance=provenance(inputs, data),
    )


def provenance(inputs: Inputs, data: TaskData) -> dict[str, dict[str, str]]:
    """Name and licence of the base, source and licence of a task's data: notes of a manifest, part of no key."""
    return {
        "base": {"name": inputs.base.name, "license": inputs.base.license},
        "data": {"source": data.config.source, "license": data.license},
    }


def importance_job(inputs: Inputs, task: str, recipe: Recipe, expert: Manifest) -> ImportanceJob:
    """Measure the Fisher diagonal or the Gram matrices of one expert."""
    config, data = inputs.config, inputs.tasks[task]
    return ImportanceJob(
        task=task,
        recipe=recipe,
        base_sha256=inputs.base.sha256,
        adapter=expert.files["adapter"],
        expert_key=expert.key,
        expert_digest=expert.digest,
        train_rows=data.object_name("train"),
        rows=recipes.importance_rows(config, data),
        prompt=recipes.prompt_spec(config, data),
        max_target_tokens=config.prompt.max_target_tokens,
        labels=data.labels if config.objective == "classification" else None,
        provenance=provenance(inputs, data),
    )


def base_models(config: PipelineConfig) -> tuple[tuple[str, int], ...]:
    """The ways in which the base is scored: name and number of training examples shown."""
    shots = config.evaluate.few_shot if config.objective == "language_modelling" else 0
    return (("base", 0), *((("few_shot", shots),) if shots else ()))


def evaluation_job(
    inputs: Inputs,
    model: str,
    split: str,
    task: str,
    manifest: Manifest | None,
    expert: Manifest | None,
    few_shot: int = 0,
    weights_dtype: str | None = None,
    mask: Manifest | None = None,
    prompt: PromptSpec | None = None,
    base_sha256: str | None = None,
) -> EvaluationJob:
    """Score one model on one split of one task.

    `manifest` is the expert or merge that is scored, None for the base; `mask` the task's mask of that merge. `expert`
    is the task's own expert, whose head a classification takes; None takes the head that the expert started from.
    `prompt` and `base_sha256` of a model that was made for others than this run's.
    """
    config, data = inputs.config, inputs.tasks[task]
    classifies = config.objective == "classification"
    spec = _evaluation_spec(inputs, data, few_shot, prompt or recipes.prompt_spec(config, data))
    dtype = config.evaluate.compute_dtype
    seed = recipes.train_spec(config, data).seed
    change = mask or manifest  # a mask names the adapter that it is a mask of
    recipe = recipes.evaluation_recipe(
        change.digest if change else inputs.base.sha256, data, split, spec, dtype, weights_dtype or dtype,
        expert.digest if expert else seed,
    )  # fmt: skip
    return EvaluationJob(
        recipe=recipe,
        task=task,
        split=split,
        rows=data.object_name(split),
        spec=spec,
        model=model,
        adapter=manifest.files["adapter"] if manifest else None,
        weights_dtype=weights_dtype or dtype,
        head=expert.files["adapter"] if expert and classifies else None,
        head_seed=seed,
        mask=mask.files["mask"] if mask else None,
        base_sha256=base_sha256,
        # Of another base only the identity is at hand; its name and licence are in its champion's manifest.
        provenance={**provenance(inputs, data), **({"base": {"sha256": base_sha256}} if base_sha256 else {})},
    )


def opponent_job(inputs: Inputs, model: str, task: str, opponent: Opponent) -> EvaluationJob:
    """Score the opponent of a gate, called `model`, on a task's gate rows."""
    prompt = opponent.prompt(task, recipes.prompt_spec(inputs.config, inputs.tasks[task]))
    base = opponent.base_sha256 if opponent.base_sha256 != inputs.base.sha256 else None
    expert = opponent.experts.get(task)
    return evaluation_job(inputs, model, "gate", task, opponent.manifest, expert, prompt=prompt, base_sha256=base)


def _evaluation_spec(inputs: Inputs, data: TaskData, few_shot: int, prompt: PromptSpec) -> EvaluateSpec | ClassifySpec:
    metric = data.config.metric
    if metric == "accuracy" or metric == "f1" or metric == "matthews":
        return ClassifySpec(metric, data.labels, prompt.template, prompt.wrapper, prompt.max_input_tokens)
    return EvaluateSpec(
        metric=metric,
        template=prompt.template,
        wrapper=prompt.wrapper,
        max_input_tokens=prompt.max_input_tokens,
        max_new_tokens=inputs.max_new_tokens[data.name],
        length_normalised=data.config.length_normalised,
        few_shot=tuple(data.splits["train"][:few_shot]),
    )
