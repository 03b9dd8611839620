"""Registering experts and the merge in MLflow: what the entries say. Ray tasks that ask for no CPU do the work."""

from typing import Any

from ray import ObjectRef

from infra.artifacts import Manifest
from infra.lineage import Ancestor, Lineage
from infra.model_registry import RegisteredAdapter, RegisteredCheckpoint, Registration
from infra.registry import model_name
from pipeline import remote
from pipeline.config import PipelineConfig
from pipeline.outcome import Inputs, Outcome

MERGED = "merged"
"""Task name under which the merge is registered."""
CHECKPOINT = "merged-checkpoint"
"""Task name under which the merge as a full checkpoint is registered."""


def register_expert(inputs: Inputs, task: str, manifest: Manifest, score: dict[str, Any]) -> ObjectRef:
    """Register one expert and log its test score to its run."""
    config, data, meta = inputs.config, inputs.tasks[task], manifest.meta
    description = (
        f"{config.expert.capitalize()} expert for {task} on {inputs.base.name}.\n\n"
        f"- data: {data.config.source}, {len(data.splits['train'])} training rows; licence of the base: "
        f"{inputs.base.license}\n"
        f"- change: {_change(config)} of modules `{config.mask.modules}`, "
        f"{meta['trainable']:,} trained values, {meta['adapter_bytes'] / 1e6:.1f} MB\n"
        f"- training: {meta['steps']} steps, best after {meta['best_step']}, "
        f"validation loss {meta['validation_loss']:.4f}\n"
        f"- test: {score['metric']} {score['score']:.3f} on {score['n']} rows\n"
        f"- lineage: recipe {manifest.key}, digest {manifest.digest}"
    )
    metrics = {f"test_{score['metric']}": score["score"], "test_format_free": score["format_free"]}
    adapter = _adapter(
        inputs, task, data.config.template, inputs.max_new_tokens[task], manifest, meta["run_id"], description,
        _heads(inputs, {task: manifest}),
    )  # fmt: skip
    return _submit(inputs, f"register {task}", adapter, metrics)


def register_merge(inputs: Inputs, outcome: Outcome) -> ObjectRef:
    """Register the chosen merge. Its prompt is the bare input: the caller writes the task's instruction."""
    assert outcome.chosen is not None
    manifest, cap = outcome.merged[outcome.chosen], max(inputs.max_new_tokens.values())
    adapter = _adapter(
        inputs, MERGED, "{input}", cap, manifest, inputs.run_id, _merge_description(inputs, outcome),
        _heads(inputs, outcome.experts), _lineage(inputs, outcome),
    )  # fmt: skip
    return _submit(inputs, "register merge", adapter, {})


def register_checkpoint(inputs: Inputs, outcome: Outcome) -> ObjectRef:
    """Register the chosen merge as a full checkpoint."""
    manifest, config = outcome.checkpoint, inputs.config
    assert manifest is not None
    folder = next(iter(manifest.files.values())).name.rpartition("/")[0]
    dtype = manifest.config["dtype"]
    checkpoint = RegisteredCheckpoint(
        name=model_name(config.suite, CHECKPOINT),
        task=CHECKPOINT,
        key=manifest.key,
        digest=manifest.digest,
        checkpoint_uri=inputs.store.uri(folder),
        files=manifest.files,
        base_sha256=inputs.base.sha256,
        base_name=inputs.base.name,
        prompt_wrapper=config.prompt.wrapper,
        prompt_template="{input}",
        max_input_tokens=config.prompt.max_input_tokens,
        max_new_tokens=max(inputs.max_new_tokens.values()),
        dtype=config.evaluate.compute_dtype,
        run_id=inputs.run_id,
        description=f"Full checkpoint, every floating-point tensor in {dtype}. {_merge_description(inputs, outcome)}",
        tags={"suite": config.suite, "kind": manifest.kind, "expert": config.expert},
        heads=_heads(inputs, outcome.experts),
        lineage=_lineage(inputs, outcome),
    )
    return _submit(inputs, "register checkpoint", checkpoint, {})


def _merge_description(inputs: Inputs, outcome: Outcome) -> str:
    assert outcome.chosen is not None
    tasks = list(inputs.config.held_in)
    mean = sum(outcome.scores["merged", "test", task]["score"] for task in tasks) / len(tasks)
    return (
        f"Merge of {len(tasks)} {inputs.config.expert} experts on {inputs.base.name} by {outcome.chosen.method}.\n\n"
        f"- held-in mean on the test splits: {mean:.3f}\n"
        f"- chosen with a mean validation score of {outcome.standings[outcome.chosen].mean:.3f} among "
        f"{len(inputs.candidates.eligible)} candidates"
    )


def _lineage(inputs: Inputs, outcome: Outcome) -> Lineage:
    """The method, and of which registered versions the merge was made."""
    chosen = outcome.chosen
    assert chosen is not None
    experts = []
    for task in inputs.config.held_in:
        manifest, name = outcome.experts[task], model_name(inputs.config.suite, task)
        version = f"models:/{name}/{outcome.versions[task]}" if task in outcome.versions else None
        experts.append(Ancestor(name, manifest.key, manifest.digest, version))
    weights = {"weights": dict(chosen.weights)} if chosen.weights is not None else {}
    return Lineage(chosen.method, {**chosen.params, **weights}, outcome.merged[chosen].key, tuple(experts))


def _change(config: PipelineConfig) -> str:
    """What an expert changes, in words."""
    mask, lora = config.mask, config.lora
    if config.expert == "lora":
        return f"factors of rank {lora.rank}, alpha {lora.alpha:g}"
    if config.expert == "full":
        return "every weight"
    shared = "one support for all experts, " if mask.shared else ""
    return (
        f"{shared}{mask.criterion} ({mask.keep}), {mask.granularity}, density {mask.density:g} ({mask.budget} budget)"
    )


def _heads(inputs: Inputs, experts: dict[str, Manifest]) -> dict[str, dict[str, Any]]:
    """Where the heads of a classification are, with their labels; nothing for language modelling."""
    if inputs.config.objective != "classification":
        return {}
    return {
        task: {
            "adapter": inputs.store.uri(manifest.files["adapter"].name),
            "sha256": manifest.files["adapter"].sha256,
            "labels": list(inputs.tasks[task].labels),
            "prompt_template": inputs.tasks[task].config.template,
        }
        for task, manifest in experts.items()
    }


def _adapter(
    inputs: Inputs,
    task: str,
    template: str,
    cap: int,
    manifest: Manifest,
    run_id: str,
    description: str,
    heads: dict[str, dict[str, Any]],
    lineage: Lineage | None = None,
) -> RegisteredAdapter:
    config, file = inputs.config, manifest.files["adapter"]
    return RegisteredAdapter(
        name=model_name(config.suite, task),
        task=task,
        key=manifest.key,
        digest=manifest.digest,
        adapter_uri=inputs.store.uri(file.name),
        adapter_sha256=file.sha256,
        base_sha256=inputs.base.sha256,
        base_name=inputs.base.name,
        prompt_wrapper=config.prompt.wrapper,
        prompt_template=template,
        max_input_tokens=config.prompt.max_input_tokens,
        max_new_tokens=cap,
        dtype=config.evaluate.compute_dtype,
        run_id=run_id,
        description=description,
        tags={"suite": config.suite, "kind": manifest.kind, "expert": config.expert},
        heads=heads,
        lineage=lineage,
    )


def _submit(inputs: Inputs, name: str, model: Registration, metrics: dict[str, float]) -> ObjectRef:
    task = remote.register.options(name=name, max_retries=inputs.config.resources.retries)
    return task.remote(model, metrics, inputs.run_id)
