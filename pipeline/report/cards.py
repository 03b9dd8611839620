"""Model cards: what a registered expert, merge or checkpoint says about itself on MLflow's pages, as markdown.

Pure functions of a run's inputs and outcome. A card fits MLflow's 5000 characters: of very many tasks, those that the
merge costs most are listed, and the rest counted. Scores that are not known yet are left out. What the gate decided is
put before the code example later (`infra.registry.aliases`); the versions that a merge was made of continue the list
that a card ends with (`infra.registry.lineage`).
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from infra.artifacts.manifests import Manifest
from infra.registry.models import VERSION_MARK
from infra.registry.runs import model_name
from infra.store.layout import manifest_name
from pipeline.config.expert_kinds import EXPERT_KINDS
from pipeline.config.model import PipelineConfig
from pipeline.data.tasks import TaskData
from pipeline.records.outcome import Inputs, Outcome
from pipeline.records.refined import Refined
from pipeline.records.score import ScoreKey
from pipeline.report.candidates import rounds_text
from pipeline.report.results import interval, rounds_row

ROOM = 4900
"""Characters of a card, at most, where nothing is added to it; MLflow takes 5000."""
_TEXT = 160
"""Characters of a template, a regular expression or a list of labels."""
_NAME = 60
"""Characters of the name of a task or of a licence."""
_LICENSES = 5
"""Licences that are listed by name, the most frequent first."""
_MODELS = {"merged": "merged", "expert": "expert", "base": "base", "few_shot": "base few-shot"}


def expert_card(inputs: Inputs, outcome: Outcome, task: str) -> str:
    """The card of one task's expert."""
    config, data, manifest = inputs.config, inputs.tasks[task], outcome.experts[task]
    meta = manifest.meta
    metric, rows = data.config.metric, len(data.splits["test"])
    scored = [model for model in _MODELS if ScoreKey(model, "test", task) in outcome.scores]
    scores = ", ".join(_scored(inputs, outcome, model, [task]) for model in scored)
    facts = [
        ("Data", f"{_code(data.config.source)}, licence {data.license}; {_splits(data)}"),
        ("Base", _base(inputs)),
        ("Change", f"{change(config)} of modules {_code(config.mask.modules)}, {meta['trainable']:,} trained values, "
                   f"{meta['adapter_bytes'] / 1e6:.1f} MB"),
        ("Training", f"{meta['steps']} steps of {config.train.batch_size} rows, best after {meta['best_step']}, "
                     f"validation loss {meta['validation_loss']:.4f}, {meta['train_seconds']:.0f} s on "
                     f"{meta['device']}; seed {config.seed}"),
        *_rounds(inputs),
        ("Prompt", _prompt(inputs, data)),
        ("Lineage", _lineage(manifest, inputs, str(meta["run_id"]))),
        ("Made by", _code_version(manifest)),
        *_limits([data]),
    ]  # fmt: skip
    parts = [
        f"{config.expert.capitalize()} expert for {task} on {inputs.base.name}.",
        *([f"**Scores** ({metric}, {rows} test rows, 95 % interval): {scores}"] if scores else []),
        _usage(model_name(config.suite, task), '["a text", "another"]'),
        _bullets(facts),
    ]
    return "\n\n".join(parts)


def merge_card(inputs: Inputs, outcome: Outcome, room: int = ROOM) -> str:
    """The card of the chosen merge, at most `room` characters long (2800 at least)."""
    chosen = outcome.chosen
    assert chosen is not None
    return _merge(inputs, outcome, outcome.merged[chosen], "merged", "", [], room)


def checkpoint_card(inputs: Inputs, outcome: Outcome, room: int = ROOM) -> str:
    """The card of the chosen merge as a full checkpoint, at most `room` characters long (2800 at least)."""
    manifest = outcome.checkpoint
    assert manifest is not None
    size = sum(file.size for file in manifest.files.values()) / 1e6
    dtype = manifest.config["dtype"]
    what = ("Checkpoint", f"every floating-point tensor in {dtype}, {len(manifest.files)} files, {size:.0f} MB")
    start = f"Full checkpoint, every floating-point tensor in {dtype}. "
    return _merge(inputs, outcome, manifest, "merged-checkpoint", start, [what], room)


def _merge(
    inputs: Inputs,
    outcome: Outcome,
    manifest: Manifest,
    task: str,
    start: str,
    more: list[tuple[str, str]],
    room: int,
) -> str:
    config, chosen = inputs.config, outcome.chosen
    assert chosen is not None
    merged = outcome.merged[chosen].meta
    held_in, held_out = list(config.held_in), list(config.held_out)
    every = [inputs.tasks[name] for name in held_in]
    facts = [
        *more,
        ("Choice", f"mean validation score {outcome.standings[chosen].mean:.3f}, the best of "
                   f"{len(outcome.standings)} candidates"),
        *_rounds(inputs),
        *_training(merged),
        ("Data", f"that of {len(every)} experts; licences: {_licenses(every)}"),
        ("Base", _base(inputs)),
        ("Change", f"experts: {change(config)} of modules {_code(config.mask.modules)}; merged density "
                   f"{merged['density']:.3g}; rounding to bfloat16 loses {merged['rounding_loss_bfloat16']:.0%} of it"),
        ("Prompt", "an input with `task` gets that task's template and limits, any other is the whole prompt"),
        ("Lineage", _lineage(manifest, inputs, inputs.run_id)),
        ("Made by", _code_version(manifest)),
        *_limits(every),
    ]  # fmt: skip
    parameters = ", ".join(f"{name} {value}" for name, value in chosen.params.items())
    steps = f" + {chosen.steps} steps" if isinstance(chosen, Refined) else ""
    by = f"{chosen.method}{f' ({parameters})' if parameters else ''}{steps}"
    means = [_means(inputs, outcome, "held-in", held_in), _means(inputs, outcome, "held-out", held_out)]
    example = held_in[0] if len(held_in[0]) <= _NAME else "…"
    call = json.dumps([{"input": "a text", "task": example}], ensure_ascii=False)
    top = [
        f"{start}Merge of {len(held_in)} {config.expert} experts on {inputs.base.name} by {by}.",
        *([f"**Scores** (test splits, 95 % interval): {'; '.join(filter(None, means))}"] if any(means) else []),
        _usage(model_name(config.suite, task), call),
    ]
    used = sum(len(part) + 2 for part in [*top, _bullets(facts)])
    table = _task_table(outcome, held_in, held_out, room - used)
    return "\n\n".join([*top, *([table] if table else []), _bullets(facts)])


def _rounds(inputs: Inputs) -> list[tuple[str, str]]:
    """How experts were trained in several rounds."""
    row = rounds_row(inputs)
    return [("Rounds", rounds_text(row))] if row is not None else []


def _training(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How a refined merge was trained on."""
    if "refined" not in meta:
        return []
    told = meta["refined"]
    return [
        ("Refined", f"{told['steps']} steps after merging, on {told['rows']} training rows of all tasks mixed evenly "
                    f"({told['share']:.0%} of the experts'); training loss {meta['first_loss']:.3f} to "
                    f"{meta['last_loss']:.3f}, started from {_code(told['start'])}"),
    ]  # fmt: skip


def change(config: PipelineConfig) -> str:
    """What an expert changes, in words."""
    return EXPERT_KINDS[config.expert].describe(config)


# -- scores -----------------------------------------------------------------------------------------------------


def _scored(inputs: Inputs, outcome: Outcome, model: str, tasks: list[str]) -> str:
    """The mean score of a model with its interval."""
    low, high = interval(outcome, model, tasks, inputs.config.seed)
    mean = sum(outcome.scores[ScoreKey(model, "test", task)].score for task in tasks) / len(tasks)
    return f"{_MODELS[model]} {mean:.3f} [{low:.3f}, {high:.3f}]"


def _means(inputs: Inputs, outcome: Outcome, group: str, tasks: list[str]) -> str:
    """Mean scores of the models that are scored on all of the tasks; "" if there is none."""
    scored = [model for model in _MODELS if all(ScoreKey(model, "test", task) in outcome.scores for task in tasks)]
    if not tasks or not scored:
        return ""
    return f"{group} mean: " + ", ".join(_scored(inputs, outcome, model, tasks) for model in scored)


def _task_table(outcome: Outcome, held_in: list[str], held_out: list[str], room: int) -> str:
    """Scores by task, as many rows as there is room for: first those that lose most by the merge."""

    def score(model: str, task: str) -> float | None:
        found = outcome.scores.get(ScoreKey(model, "test", task))
        return None if found is None else found.score

    def gain(task: str) -> float:
        return (score("merged", task) or 0.0) - (score("expert", task) or 0.0)

    def row(task: str, group: str) -> str:
        cells = ["" if (value := score(model, task)) is None else f"{value:.2f}" for model in models]
        return f"| {_cell(task)}{group} | {' | '.join(cells)} |"

    models = ("base", "expert", "merged")
    named = [(task, "") for task in held_in] + [(task, " (held out)") for task in held_out]
    lines = ["| task | base | expert | merged |", "|---|---:|---:|---:|"]
    rows = [row(*each) for each in named]
    left = room - sum(len(line) + 1 for line in lines) - 100  # for the line below
    if sum(len(line) + 1 for line in rows) <= left:
        return "\n".join([*lines, *rows])
    shown: list[str] = []
    for task in sorted(held_in, key=gain):  # the first of equals stays the first
        left -= len(row(task, "")) + 1
        if left < 0:
            break
        shown.append(row(task, ""))
    rest = f"{len(rows) - len(shown)} more tasks: see the run's report. The merge costs those listed most."
    return "\n".join([*lines, *shown]) + f"\n\n{rest}" if shown else ""


# -- facts ------------------------------------------------------------------------------------------------------


def _splits(data: TaskData) -> str:
    """Rows of each split, and the beginning of its fingerprint."""
    sizes = (f"{name} {len(rows)} ({_code(data.fingerprints[name][:12])})" for name, rows in data.splits.items())
    return f"rows: {', '.join(sizes)}"


def _base(inputs: Inputs) -> str:
    return f"{inputs.base.name}, licence {inputs.base.license}, identity {_code(inputs.base.sha256)}"


def _prompt(inputs: Inputs, data: TaskData) -> str:
    limits = f"inputs of at most {inputs.config.prompt.max_input_tokens} tokens"
    if inputs.config.objective == "classification":
        return f"{_code(data.config.template)}, {limits}; labels {_code(', '.join(data.labels))}"
    return f"{_code(data.config.template)}, {limits}, answers of {inputs.max_new_tokens[data.name]}"


def _lineage(manifest: Manifest, inputs: Inputs, run_id: str) -> str:
    used = "; made from " + ", ".join(_code(key) for key in manifest.inputs) if manifest.kind == "expert" else ""
    return (
        f"{manifest.kind} {_code(manifest.key)}, digest {_code(manifest.digest)}, manifest "
        f"{_code(inputs.store.uri(manifest_name(manifest.key)), 400)}, run {_code(run_id)}"
        f"{used if manifest.inputs else ''}"
    )


def _code_version(manifest: Manifest) -> str:
    """Which code and libraries made the artifact, as its manifest says."""
    found: Mapping[str, str] = manifest.meta.get("environment") or {}
    code = [f"commit {_code(found['git_commit'])}"] if "git_commit" in found else []
    if "source_sha256" in found and not code:
        code = [f"source {_code(found['source_sha256'])}"]
    names = [f"{name} {found[name]}" for name in ("python", "torch", "transformers") if name in found]
    return ", ".join([*code, *names]) or "not recorded"


def _licenses(tasks: Iterable[TaskData]) -> str:
    """Each licence with the number of its tasks, or their names where there are few; the most frequent first."""
    by: dict[str, list[str]] = {}
    for data in tasks:
        by.setdefault(data.license, []).append(data.name)
    ordered = sorted(by.items(), key=lambda item: -len(item[1]))
    words = [
        f"{_line(name)[:_NAME]} ({len(names)} tasks)" if len(names) > 3 or len(by) == 1
        else f"{_line(name)[:_NAME]} ({', '.join(_code(task, 40) for task in names)})"
        for name, names in ordered[:_LICENSES]
    ]  # fmt: skip
    return ", ".join(words) + (f" and {len(by) - _LICENSES} more licences" if len(by) > _LICENSES else "")


def _limits(tasks: Iterable[TaskData]) -> list[tuple[str, str]]:
    """What BIG-bench's authors ask."""
    if any(data.config.source.startswith("bigbench:") for data in tasks):
        return [("Limits", "trained on BIG-bench data, which its authors ask to keep out of training for benchmarks")]
    return []


def _usage(name: str, call: str) -> str:
    """How to load the version, anywhere with the variables of the store and the server."""
    return (
        "```python\n"
        "import mlflow  # MLFLOW_TRACKING_URI, FACTORY_S3_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY\n"
        f'model = mlflow.pyfunc.load_model("models:/{name}/{VERSION_MARK}")\n'
        f"model.predict({call})\n"
        "```"
    )


# -- markdown ---------------------------------------------------------------------------------------------------


def _bullets(facts: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- **{name}**: {text}" for name, text in facts)


def _line(text: str) -> str:
    """Text as one line."""
    return " ".join(str(text).split())


def _code(text: str, limit: int = _TEXT) -> str:
    """Text as a code span of at most so many characters; line breaks as escapes, no backticks."""
    shown = "".join(json.dumps(each)[1:-1] if each < " " else each for each in text).replace("`", "'")
    return f"`{shown if len(shown) <= limit else shown[: limit - 1] + '…'}`"


def _cell(text: str) -> str:
    """Text as a cell of a table."""
    return _code(text, _NAME).replace("|", "¦")
