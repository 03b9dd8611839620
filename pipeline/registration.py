"""Registering experts and the merge in MLflow: what the entries say. Ray tasks that ask for no CPU do the work."""

from typing import Any

from ray import ObjectRef

from infra.artifacts import Manifest
from infra.registry import RegisteredAdapter, model_name
from pipeline import remote
from pipeline.config import PipelineConfig
from pipeline.outcome import Inputs, Outcome

MERGED = "merged"
"""Task name under which the merge is registered."""


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
    manifest = outcome.merged[outcome.chosen]
    tasks = list(inputs.config.held_in)
    mean = sum(outcome.scores["merged", "test", task]["score"] for task in tasks) / len(tasks)
    description = (
        f"Merge of {len(tasks)} {inputs.config.expert} experts on {inputs.base.name} by {outcome.chosen}.\n\n"
        f"- held-in mean on the test splits: {mean:.3f}\n"
        f"- chosen with a mean validation score of {outcome.validation[outcome.chosen]:.3f} among "
        f"{len(inputs.candidates)} candidates\n"
        f"- experts: {', '.join(tasks)}\n"
        f"- lineage: recipe {manifest.key}, digest {manifest.digest}"
    )
    cap = max(inputs.max_new_tokens.values())
    heads = _heads(inputs, {task: outcome.experts[task] for task in tasks})
    adapter = _adapter(inputs, MERGED, "{input}", cap, manifest, inputs.run_id, description, heads)
    return _submit(inputs, "register merge", adapter, {})


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
    )


def _submit(inputs: Inputs, name: str, adapter: RegisteredAdapter, metrics: dict[str, float]) -> ObjectRef:
    task = remote.register_adapter.options(name=name, max_retries=inputs.config.resources.retries)
    return task.remote(adapter, metrics, inputs.run_id)
