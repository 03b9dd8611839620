"""The pieces of keyed work of a run, made from its inputs: recipe, job, and what each needs.

The one place that knows how a configuration becomes work; plans, announcements and runs all ask here. Merging's steps
are `merge.tree.reduction`'s. What is in a key is `pipeline.flow.recipes`' business.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace

from infra.artifacts.manifests import Manifest
from infra.engine.step import Needs, Step
from infra.store.s3 import FileRef
from merge.methods.specs import Candidate
from merge.modelled.job import ModelledJob
from merge.modelled.refining import RefineJob
from merge.modelled.rounds import OntoJob
from merge.tree.export import export_job
from merge.tree.jobs import Ref
from merge.tree.keys import modelled_recipe, onto_recipe
from merge.tree.reduction import MERGES
from pipeline.config.expert_kinds import mask_spec, shares_scored_support
from pipeline.config.model import GIB, PipelineConfig
from pipeline.config.refine import RefineConfig
from pipeline.data.tasks import TaskData
from pipeline.flow import recipes
from pipeline.gate.opponent import Opponent
from pipeline.records.outcome import Inputs
from pipeline.records.refined import Refined
from workers.jobs.evaluator import EvaluationJob, Routes
from workers.jobs.expert import ExpertJob, StartRef
from workers.jobs.measurement import MeasurementJob, TrainingRows
from workers.jobs.router import RouterJob
from workers.jobs.shared_support import PooledTask, SupportJob, SupportRef
from workers.jobs.teacher import TeacherJob
from workers.scoring.classification import ClassifySpec
from workers.scoring.likelihood import EvaluateSpec
from workers.text.prompt import PromptSpec

SUPPORT, EXPERTS, MEASUREMENTS, TEACHERS, REFINED, YARDSTICKS, ROUTERS, EVALUATIONS, CHECKPOINTS = (
    "support", "experts", "importances", "teachers", "refined", "yardsticks", "routers", "evaluations", "checkpoints",
)  # fmt: skip
REGISTRATIONS = "registrations"
MULTITASK, ROUTED = "multitask", "routed"
"""Names of the yardsticks, and of their scores."""
KINDS = (
    SUPPORT, EXPERTS, MEASUREMENTS, "merge_nodes", "merges", "task_masks", TEACHERS, REFINED, YARDSTICKS, ROUTERS,
    EVALUATIONS, CHECKPOINTS, REGISTRATIONS,
)  # fmt: skip
"""What is counted, in the order of a run. Merge nodes count the roots too, and merges what roots are lowered to."""

_EXPERT = Needs("expert")


def support_step(inputs: Inputs) -> Step | None:
    """Score positions on the training rows of all held-in tasks, for a support that all experts share; None where each
    has its own, or no data are needed."""
    config, tasks = inputs.config, inputs.tasks
    if not shares_scored_support(config):
        return None
    recipe = recipes.support_recipe(config, inputs.base.sha256, tasks)
    order = recipes.pooled_order(config, tasks)
    licences = {"base": [inputs.base.license], "data": sorted({tasks[name].license for name in order})}
    job = SupportJob(
        recipe=recipe,
        base_sha256=inputs.base.sha256,
        tasks=pooled_tasks(inputs),
        max_target_tokens=config.prompt.max_target_tokens,
        mask=mask_spec(config, "shared"),
        batch_size=config.train.micro_batch_size or config.train.batch_size,
        compute_dtype=config.train.compute_dtype,
        recompute=config.train.gradient_checkpointing,
        provenance={"licenses": licences},
    )
    return Step(SUPPORT, "shared support", (recipe,), {}, job, _EXPERT, "support")


def support_ref(config: PipelineConfig, manifest: Manifest) -> SupportRef:
    """The finished support, or the positions of an expert of the round before."""
    file = manifest.files.get("support") or changed(manifest)
    return SupportRef(manifest.key, manifest.digest, file, mask_spec(config, "shared"))


def changed(expert: Manifest) -> FileRef:
    """What an expert changes of what it started from."""
    return expert.files.get("change") or expert.files["adapter"]


def expert_step(
    inputs: Inputs, task: str, support: Manifest | None, number: int = 1, start: Manifest | None = None
) -> Step:
    """Train one expert in a round; in a later one from the merge `start`. `support` has positions that were chosen
    before."""
    config, data = inputs.config, inputs.tasks[task]
    recipe = recipes.expert_recipe(
        config, inputs.base.sha256, data, support.key if support else None, number, start.key if start else None
    )
    last = number == config.rounds.count
    job = ExpertJob(
        task=task,
        recipe=recipe,
        base_sha256=inputs.base.sha256,
        train_rows=data.object_name("train"),
        validation_rows=data.object_name("validation"),
        prompt=recipes.prompt_spec(config, data),
        max_target_tokens=config.prompt.max_target_tokens,
        labels=data.labels if config.objective == "classification" else None,
        expert=recipes.expert_spec(recipes.in_round(config, number), data),
        train=recipes.train_spec(config, data, number),
        support=support_ref(config, support) if support else None,
        compute_dtype=config.train.compute_dtype,
        value_dtype=config.train.value_dtype,
        recompute=config.train.gradient_checkpointing,
        save_every=config.train.checkpoint_every,
        deterministic=config.train.deterministic,
        experiment=config.suite,
        parent_run_id=inputs.run_id,
        tags={"suite": config.suite, "base": inputs.base.name, "source": data.config.source},
        provenance=provenance(inputs, data),
        round=number,
        start=StartRef(start.key, start.digest, start.files["adapter"]) if start else None,
        last=last,
    )
    label = "adapter" if start is None or last else "change"
    return Step(EXPERTS, f"expert {job.title}", (recipe,), job.inputs, job, _EXPERT, label)


def onto_step(
    inputs: Inputs, candidate: Candidate, start: Manifest, change: Manifest, experts: Mapping[str, Manifest]
) -> Step:
    """The merge of a later round: what was merged of its experts' changes (`change`), on what they started from."""
    recipe = onto_recipe(candidate, change.key, start.key)
    job = OntoJob(
        candidate=candidate,
        recipe=recipe,
        base_sha256=inputs.base.sha256,
        base_weights=inputs.base_weights,
        start=Ref.of(start),
        change=Ref.of(change),
        inputs={each.key: each.digest for each in (start, change, *experts.values())},
        experts=tuple(sorted(experts)),
    )
    return Step(MERGES, f"merge {candidate} of a later round", (recipe,), job.inputs, job, Needs("node"), "adapter")


def expected_tokens(inputs: Inputs, task: str) -> float:
    """About how long an expert trains in a round, to begin with the longest."""
    data = inputs.tasks[task]
    return recipes.train_spec(inputs.config, data).steps * data.mean_tokens


def provenance(inputs: Inputs, data: TaskData) -> dict[str, dict[str, str]]:
    """Name and licence of the base, source and licence of a task's data: notes of a manifest, part of no key."""
    return {
        "base": {"name": inputs.base.name, "license": inputs.base.license},
        "data": {"source": data.config.source, "license": data.license},
    }


def measurement_step(inputs: Inputs, task: str, kind: str, expert: Manifest) -> Step:
    """Measure one expert (`workers.measuring.catalogue`)."""
    recipe = recipes.measurement_recipe(inputs.config, kind, expert.key, inputs.tasks[task])
    job = MeasurementJob(
        task=task,
        recipe=recipe,
        base_sha256=inputs.base.sha256,
        adapter=expert.files["adapter"],
        expert_key=expert.key,
        expert_digest=expert.digest,
        rows=training_rows(inputs, task),
        provenance=provenance(inputs, inputs.tasks[task]),
    )
    consumed = {expert.key: expert.digest}
    return Step(MEASUREMENTS, f"{kind} of {task}", (recipe,), consumed, job, _EXPERT, kind)


def training_rows(inputs: Inputs, task: str) -> TrainingRows:
    """Training rows of a task, as a model is shown them once it is trained."""
    config, data = inputs.config, inputs.tasks[task]
    return TrainingRows(
        name=data.object_name("train"),
        count=recipes.measured_rows(config, data),
        prompt=recipes.prompt_spec(config, data),
        max_target_tokens=config.prompt.max_target_tokens,
        labels=data.labels if config.objective == "classification" else None,
    )


def modelled_step(inputs: Inputs, candidate: Candidate, reference: Ref) -> Step:
    """A merge that is made by running a model, from the merge that is its reference."""
    rows = sorted((training_rows(inputs, task) for task in inputs.config.held_in), key=lambda rows: rows.name)
    job = ModelledJob(
        candidate=candidate,
        recipe=modelled_recipe(candidate, reference.key, [asdict(each) for each in rows]),
        base_sha256=inputs.base.sha256,
        base_weights=inputs.base_weights,
        reference=reference,
        experts=tuple(sorted(inputs.config.held_in)),
        rows=tuple(rows),
    )
    needs = Needs("evaluator", base=inputs.base.sha256)
    return Step(MERGES, f"merge {candidate}", (job.recipe,), job.inputs, job, needs, "adapter")


def teacher_step(inputs: Inputs, read: recipes.RowsRead, expert: Manifest | None) -> Step:
    """Ask a task's expert, or the base, what it says of the rows that refining reads."""
    config, data = inputs.config, inputs.tasks[read.task]
    refine = config.refine
    assert refine is not None
    recipe = recipes.teacher_recipe(
        config, refine, inputs.base.sha256, data, read.numbers, expert.key if expert is not None else None
    )
    consumed = {expert.key: expert.digest} if expert is not None else {}
    job = TeacherJob(
        task=read.task,
        recipe=recipe,
        inputs=consumed,
        base_sha256=inputs.base.sha256,
        adapter=expert.files["adapter"] if expert is not None else None,
        rows=data.object_name("train"),
        numbers=read.numbers,
        prompt=recipes.prompt_spec(config, data),
        max_target_tokens=config.prompt.max_target_tokens,
        top_k=refine.top_k,
        compute_dtype=config.evaluate.compute_dtype,
        provenance=provenance(inputs, data),
    )
    affinity = " ".join([*([job.adapter.name] if job.adapter else []), job.compute_dtype])
    needs = Needs("evaluator", affinity, inputs.base.sha256)
    return Step(TEACHERS, f"teacher of {read.task}", (recipe,), consumed, job, needs, "teacher")


def refine_step(
    inputs: Inputs, refined: Refined, start: Manifest, experts: Mapping[str, Manifest],
    teachers: Mapping[str, Manifest] | None = None,
) -> Step:  # fmt: skip
    """Train on from the merge `start` of these experts. `teachers`: what is said of each task's rows.

    That is no input: it follows from experts, base and rows, so other rows asked beside make nothing anew.
    """
    config, refine, said = inputs.config, inputs.config.refine, teachers or {}
    assert refine is not None
    order = [
        name for names in (config.held_in, config.kept) for name in recipes.pooled_order(config, inputs.tasks, names)
    ]
    consumed = {each.key: each.digest for each in (start, *(experts[name] for name in inputs.config.held_in))}
    keys = {name: expert.key for name, expert in experts.items()}
    job = replace(
        _mixed_job(inputs, refine, refined.steps, str(refined), start, keys),
        candidate=refined.start,
        inputs=consumed,
        experts=tuple(sorted(inputs.config.held_in)),
        teachers=tuple(said[name].files["teacher"] if name in said else None for name in order) if said else (),
        licences={"data": sorted({inputs.tasks[name].license for name in inputs.config.kept})},
    )
    return Step(REFINED, f"refine {refined}", (job.recipe,), job.inputs, job, Needs("refine"), "adapter")


def multitask_step(inputs: Inputs) -> Step | None:
    """Train one adapter for all tasks from the base, if a configuration asks for that yardstick."""
    refine = recipes.multitask_refining(inputs.config, inputs.tasks)
    if refine is None:
        return None
    data = sorted({inputs.tasks[name].license for name in inputs.config.held_in})
    job = replace(
        _mixed_job(inputs, refine, refine.steps[0], MULTITASK, None),
        licences={"base": [inputs.base.license], "data": data},
    )
    return Step(YARDSTICKS, MULTITASK, (job.recipe,), {}, job, Needs("refine"), "adapter")


def router_step(inputs: Inputs) -> Step | None:
    """Take the centroids of all held-in tasks, if a configuration asks for routed experts."""
    config, routed = inputs.config, inputs.config.yardsticks.routed
    if routed is None:
        return None
    data = sorted({inputs.tasks[name].license for name in config.held_in})
    job = RouterJob(
        recipe=recipes.router_recipe(config, routed, inputs.base.sha256, inputs.tasks),
        base_sha256=inputs.base.sha256,
        tasks=pooled_tasks(inputs),
        rows=routed.rows,
        compute_dtype=config.evaluate.compute_dtype,
        batch_size=config.evaluate.batch_size,
        provenance={"licenses": {"base": [inputs.base.license], "data": data}},
    )
    return Step(ROUTERS, "router", (job.recipe,), {}, job, Needs("evaluator", base=inputs.base.sha256), "router")


def routed_job(inputs: Inputs, task: str, router: Manifest, experts: Mapping[str, Manifest]) -> EvaluationJob:
    """Score the experts behind a router on the test rows of a task."""
    config, data = inputs.config, inputs.tasks[task]
    parts = [experts[name] for name in recipes.pooled_order(config, inputs.tasks)]
    job = evaluation_job(inputs, ROUTED, "test", task, None, None)
    digests, dtype = [each.digest for each in (router, *parts)], job.compute_dtype
    return replace(
        job,
        recipe=recipes.evaluation_recipe(digests, data, "test", job.spec, dtype, dtype),
        routes=Routes(router.files["router"], tuple(each.files["adapter"] for each in parts)),
    )


def _mixed_job(
    inputs: Inputs, refine: RefineConfig, steps: int, name: str, start: Manifest | None,
    experts: Mapping[str, str] | None = None,
) -> RefineJob:  # fmt: skip
    """Train on rows of all held-in tasks, from a merge or from the base."""
    config, tasks = inputs.config, inputs.tasks
    train = recipes.refine_train(config, refine, steps)
    rows = steps * train.batch_size
    share = rows / recipes.experts_rows(config, tasks)
    begin = {"start": start.key} if start is not None else {}
    return RefineJob(
        name=name,
        recipe=recipes.refine_recipe(
            config, refine, inputs.base.sha256, tasks, steps, start.key if start is not None else None, experts
        ),
        base_sha256=inputs.base.sha256,
        base_weights=inputs.base_weights,
        candidate=None,
        start=Ref.of(start) if start is not None else None,
        inputs={},
        tasks=pooled_tasks(inputs),
        max_target_tokens=config.prompt.max_target_tokens,
        rows_per_task=refine.rows_per_task,
        teacher_weight=refine.teacher_weight if refine.teacher is not None else 0.0,
        kept=pooled_tasks(inputs, config.kept) if refine.keep is not None else (),
        kept_rows=refine.keep.rows_per_step if refine.keep is not None else 0,
        keep_weight=refine.keep.weight if refine.keep is not None else 0.0,
        support=refine.support,
        mask=recipes.refine_mask(config, refine),
        train=train,
        compute_dtype=refine.compute_dtype,
        recompute=config.train.gradient_checkpointing,
        save_every=config.train.checkpoint_every,
        deterministic=config.train.deterministic,
        about={"steps": steps, "rows": rows, "share": share, **begin},
    )


def pooled_tasks(inputs: Inputs, names: Iterable[str] | None = None) -> tuple[PooledTask, ...]:
    """Training rows and prompts of all held-in tasks, or of these, in the order in which keys have them."""
    config, tasks = inputs.config, inputs.tasks
    return tuple(
        PooledTask(tasks[name].object_name("train"), recipes.prompt_spec(config, tasks[name]))
        for name in recipes.pooled_order(config, tasks, names)
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
        base_sha256=base_sha256 or inputs.base.sha256,
        task=task,
        split=split,
        rows=data.object_name(split),
        spec=spec,
        model=model,
        adapter=manifest.files["adapter"] if manifest else None,
        compute_dtype=dtype,
        weights_dtype=weights_dtype or dtype,
        batch_size=config.evaluate.batch_size,
        head=expert.files["adapter"] if expert and classifies else None,
        head_seed=seed,
        mask=mask.files["mask"] if mask else None,
        # Of another base only the identity is at hand; its name and licence are in its champion's manifest.
        provenance={**provenance(inputs, data), **({"base": {"sha256": base_sha256}} if base_sha256 else {})},
    )


def evaluation_step(job: EvaluationJob) -> Step:
    """What an evaluator has to do."""
    affinity = " ".join([ref.name for ref in (job.adapter, job.mask) if ref] + [job.weights_dtype])
    needs = Needs("evaluator", affinity, job.base_sha256)
    return Step(EVALUATIONS, f"{job.model} on {job.task}", (job.recipe,), {}, job, needs, "rows")


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


def export_step(inputs: Inputs, merged: Manifest) -> Step | None:
    """The merge as a full checkpoint, if one is asked for; of several seeds, the first one's."""
    export = inputs.config.merge.export
    if export is None or not inputs.registers:
        return None
    job = export_job(merged, inputs.base.sha256, export.dtype, round(export.shard_gib * GIB))
    return Step(CHECKPOINTS, "export", (job.recipe,), {}, job, Needs("node"), "checkpoint")
