"""What is registered in MLflow of an expert, of the merge and of its full checkpoint. Handing it over is
`pipeline.flow.promotion`; what the descriptions say is `pipeline.report.cards`."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from infra.artifacts.manifests import Manifest
from infra.registry.lineage import Ancestor, Lineage
from infra.registry.models import RegisteredAdapter, RegisteredCheckpoint
from infra.registry.runs import CHECKPOINT, MERGED, model_name
from infra.registry.versions import MERGE_TAG
from pipeline.records.outcome import Inputs, Outcome
from pipeline.records.refined import Refined
from pipeline.records.score import ScoreKey
from pipeline.report.cards import ROOM, checkpoint_card, expert_card, merge_card

_VERDICT_ROOM = 700
"""Characters of a description that are left for the gate's verdict, where they can be spared."""
_LEAST_ROOM = 2800
"""Characters that a merge's card takes at least."""


def expert_model(inputs: Inputs, outcome: Outcome, task: str) -> tuple[RegisteredAdapter, dict[str, float]]:
    """One expert, and the metrics that its run gets."""
    manifest, score = outcome.experts[task], outcome.scores[ScoreKey("expert", "test", task)]
    metrics = {f"test/{score.metric}": score.score, "test/format_free": score.format_free}
    about = f"Expert for the task {task} of the suite {inputs.config.suite}."
    return replace(
        plain_expert(inputs, task, manifest), description=expert_card(inputs, outcome, task), about=about
    ), metrics


def plain_expert(inputs: Inputs, task: str, manifest: Manifest) -> RegisteredAdapter:
    """One expert without its card: what loading it gives."""
    common = _common(inputs, task, manifest, str(manifest.meta.get("run_id", "")), {task: manifest}) | {
        "prompt_template": inputs.tasks[task].config.template,
        "max_new_tokens": inputs.max_new_tokens[task],
        "prompts": _prompts(inputs, [task]),
    }
    return RegisteredAdapter(**common, **_adapter(inputs, manifest))


def merge_model(inputs: Inputs, outcome: Outcome) -> RegisteredAdapter:
    """The chosen merge. An input that names no task is the whole prompt."""
    assert outcome.chosen is not None
    plain, lineage = plain_merge(inputs, outcome.merged[outcome.chosen], outcome.experts), _lineage(inputs, outcome)
    card = merge_card(inputs, outcome, room=_room(lineage))
    about = f"The chosen merge of all experts of the suite {inputs.config.suite}, one model for all its tasks."
    return replace(plain, lineage=lineage, description=card, about=about)


def plain_merge(inputs: Inputs, manifest: Manifest, experts: Mapping[str, Manifest]) -> RegisteredAdapter:
    """A merge of these experts without card and lineage."""
    common = _common(inputs, MERGED, manifest, inputs.run_id, experts) | _of_merge(inputs)
    return RegisteredAdapter(**common, **_adapter(inputs, manifest))


def checkpoint_model(inputs: Inputs, outcome: Outcome) -> RegisteredCheckpoint:
    """The chosen merge as a full checkpoint. It is tagged with the merge's digest, whose fate it shares."""
    manifest = outcome.checkpoint
    assert manifest is not None
    assert outcome.chosen is not None
    plain, lineage = plain_checkpoint(inputs, manifest, outcome.experts), _lineage(inputs, outcome)
    tags = plain.tags | {MERGE_TAG: outcome.merged[outcome.chosen].digest}
    card = checkpoint_card(inputs, outcome, room=_room(lineage))
    about = f"The chosen merge of all experts of the suite {inputs.config.suite} as a full checkpoint."
    return replace(plain, tags=tags, lineage=lineage, description=card, about=about)


def plain_checkpoint(inputs: Inputs, manifest: Manifest, experts: Mapping[str, Manifest]) -> RegisteredCheckpoint:
    """A merge of these experts as a full checkpoint, without card and lineage."""
    folder = next(iter(manifest.files.values())).name.rpartition("/")[0]
    common = _common(inputs, CHECKPOINT, manifest, inputs.run_id, experts) | _of_merge(inputs)
    return RegisteredCheckpoint(**common, checkpoint_uri=inputs.store.uri(folder), files=manifest.files)


def _common(
    inputs: Inputs, task: str, manifest: Manifest, run_id: str, experts: Mapping[str, Manifest]
) -> dict[str, Any]:
    """What every kind of registration says."""
    config = inputs.config
    kind = "merged" if manifest.kind == "refined" else manifest.kind  # versions of one model are of one kind
    return {
        "name": model_name(config.suite, task),
        "task": task,
        "key": manifest.key,
        "digest": manifest.digest,
        "base_sha256": inputs.base.sha256,
        "base_name": inputs.base.name,
        "prompt_wrapper": config.prompt.wrapper,
        "max_input_tokens": config.prompt.max_input_tokens,
        "dtype": config.evaluate.compute_dtype,
        "batch_size": config.evaluate.batch_size,
        "run_id": run_id,
        "description": "",
        "tags": {"suite": config.suite, "kind": kind, "expert": config.expert},
        "heads": _heads(inputs, experts),
    }


def _adapter(inputs: Inputs, manifest: Manifest) -> dict[str, Any]:
    file = manifest.files["adapter"]
    return {"adapter_uri": inputs.store.uri(file.name), "adapter_sha256": file.sha256}


def _of_merge(inputs: Inputs) -> dict[str, Any]:
    return {
        "prompt_template": "{input}",
        "max_new_tokens": max(inputs.max_new_tokens[task] for task in inputs.config.scored),
        "prompts": _prompts(inputs, inputs.config.scored),
    }


def _room(lineage: Lineage) -> int:
    """Characters that a card may have beside the lines of the lineage and of the verdict."""
    return max(_LEAST_ROOM, ROOM - len(lineage.text()) - _VERDICT_ROOM)


def _prompts(inputs: Inputs, tasks: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each task is asked and answered; nothing for a classification, whose heads say it."""
    if inputs.config.objective == "classification":
        return {}
    return {
        task: {
            "template": inputs.tasks[task].config.template,
            "max_new_tokens": inputs.max_new_tokens[task],
            "chooses": inputs.tasks[task].config.metric == "choice_accuracy",
            "length_normalised": inputs.tasks[task].config.length_normalised,
        }
        for task in tasks
    }


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
    rounds, between = inputs.config.rounds, inputs.candidates.between
    trained = {"rounds": {"count": rounds.count, "support": rounds.support, **between.to_dict()}} if between else {}
    refined = {"refined": outcome.merged[chosen].meta["refined"]} if isinstance(chosen, Refined) else {}
    parameters = {**chosen.params, **weights, **trained, **refined}
    return Lineage(chosen.method, parameters, outcome.merged[chosen].key, tuple(experts))


def _heads(inputs: Inputs, experts: Mapping[str, Manifest]) -> dict[str, dict[str, Any]]:
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
