"""Why an expert has to be made: what its recipe has now that the recipe of the expert before had not.

Pure: recipes, manifests and rows in, sentences out. Fields are named as in the configuration. What follows from
another change is not repeated: seeds that derive from training rows, steps that derive from their number, the learning
rate that a kind of expert has by default. Which expert was the one before is `infra.registry.history`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.artifacts.manifests import Manifest, Readable, Recipe, canonical_json, peek
from infra.store.layout import manifest_name
from pipeline.config.expert_kinds import EXPERT_KINDS, derived_seed
from pipeline.config.model import PipelineConfig
from pipeline.data.tasks import TaskData
from pipeline.flow.recipes import in_round, pooled, training_steps
from workers.text.rows import Row

Rows = Callable[[str], Sequence[Row] | None]
"""Rows by their fingerprint; None if the store no longer has them."""

_SHOWN = 40
"""Longest text of a value that is shown whole."""
_ABSENT = object()
SEED = "seed →"
"""How the sentence about another seed begins."""


def why_stale(
    config: PipelineConfig,
    data: TaskData,
    recipe: Recipe,
    before: Manifest,
    rows: Rows,
    base_name: Callable[[str], str],
    supports: tuple[Recipe, Manifest | None, Mapping[str, TaskData]] | None = None,
) -> list[str]:
    """What differs between `recipe`, made of this configuration and task, and the expert `before` of the same task.

    `base_name` names a base by its identity, for people. `supports`: recipe of the shared support, the manifest of the
    one that `before` had (None: gone) and all tasks; None where experts do not share a scored one.
    """
    now, then = _plain(recipe.config), before.config
    found: list[str] = []
    if now["base"] != then.get("base"):
        found.append(f"base {base_name(str(then.get('base')))} → {base_name(now['base'])}")
    if recipe.version != before.version:
        found.append(f"algorithm version {before.version} → {recipe.version}")
    found += _changed({"version of classification": "classification_version"}, now, then)
    same_kind = now["kind"] == then.get("kind")
    if not same_kind:
        found.append(f"expert {then.get('kind')} → {now['kind']}")
    found += _data(now["data"], then.get("data", {}), rows)
    prompt = {f"prompt.{name}": name for name in now["prompt"] if name != "template"}
    prompt[f"held_in.{data.name}.template"] = "template"
    found += _changed(prompt, now["prompt"], then.get("prompt", {}))
    if data.config.labels is not None:  # else they follow from the rows
        found += _changed({f"held_in.{data.name}.labels": "labels"}, now, then)
    if same_kind:
        found += _changed(_kind_fields(now["kind"], now), now[now["kind"]], then.get(then["kind"], {}))
    found += _training(config, now, then, rows, same_kind)
    found += _changed({f"train.{name}": name for name in ("compute_dtype", "value_dtype")}, now, then)
    rounds, earlier = now.get("round", {}), then.get("round", {})
    found += _changed({"round": "number"}, {"number": 1} | rounds, {"number": 1} | earlier)
    if rounds and earlier:
        found += _changed({"rounds.support": "support"}, rounds, earlier)
    number = rounds.get("number", 1)
    if number == earlier.get("number", 1):
        found += _seeds(config, number, now, then)
    if rounds and not found and set(recipe.inputs) != set(before.inputs):
        found.append(f"the merge of round {number - 1}, which it starts from, is another")
    if not rounds and supports is not None and before.inputs and set(recipe.inputs) != set(before.inputs):
        found.append(_support(config, *supports))
    if not found:  # labels that are not configured follow from the rows of every split, test and gate among them
        found += _changed({f"labels of {data.name} in its rows:": "labels"}, now, then)
    return found


def why_lost(store: Readable, key: str, inputs: Mapping[str, str]) -> str | None:
    """Why the artifact of this very key is there and yet of no use; None if it is not there. Raises StoreError."""
    if store.get_with_etag(manifest_name(key)) is None:
        return None
    manifest = peek(store, key)
    if manifest is None:
        return "its manifest cannot be read"
    if manifest.inputs != dict(inputs):
        what = "merge that it starts from" if "round" in manifest.config else "shared support"
        return f"the {what} was or will be made again: its bytes are others, or not known yet"
    gone = [label for label, ref in manifest.files.items() if store.head(ref.name) is None]
    return "its file is gone" if gone else "its file is not as long as recorded"


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it is read back from a manifest."""
    return dict(json.loads(canonical_json(value)))


def _changed(paths: Mapping[str, str], now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """`path old → new` for each field (path to name) that differs; one that neither has does not."""
    pairs = ((path, then.get(name, _ABSENT), now.get(name, _ABSENT)) for path, name in paths.items())
    return [f"{path} {_shown(old)} → {_shown(new)}" for path, old, new in pairs if old != new]


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _kind_fields(kind: str, now: Mapping[str, Any]) -> dict[str, str]:
    """Configuration paths of what a kind of expert is made of; the modules are named in `mask` for all of them."""
    section = EXPERT_KINDS[kind].section
    return {f"{'mask' if name == 'modules' else section}.{name}": name for name in now[kind] if name != "seed"}


def _training(
    config: PipelineConfig, now: Mapping[str, Any], then: Mapping[str, Any], rows: Rows, same_kind: bool
) -> list[str]:
    """Fields of the optimisation, without what follows from other rows or another kind of expert."""
    old = dict(then.get("train", {}))
    skipped = {"seed"}
    if config.train.learning_rate is None and not same_kind:
        kind = EXPERT_KINDS.get(then["kind"])
        skipped |= {"learning_rate"} if kind and old.get("learning_rate") == kind.learning_rate else set()
    paths = {f"train.{name}": name for name in now["train"] if name not in skipped}
    if config.train.epochs is not None:
        before = rows(then.get("data", {}).get("train", ""))
        follows = before is not None and training_steps(config.train, len(before)) == old.get("steps")
        del paths["train.steps"]
        if not follows:
            paths["train.epochs, in steps:"] = "steps"
    return _changed(paths, now["train"], old)


def _seeds(config: PipelineConfig, number: int, now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Whether the run's seed or the sharing of a seed by all experts changed: the seeds in recipes derive from it."""
    rows, seed = then.get("data", {}).get("train", ""), in_round(config, number).seed
    if then.get("train", {}).get("seed") != derived_seed(seed, "batches", rows):
        return [f"{SEED} {config.seed}"]
    if now["kind"] != "sparse" or then.get("kind") != "sparse":
        return []
    was_shared = then["sparse"].get("seed") == derived_seed(seed, "mask", "shared")
    return [] if was_shared == config.mask.shared else [f"mask.shared {_shown(was_shared)} → {_shown(not was_shared)}"]


def _data(now: Mapping[str, str], then: Mapping[str, str], rows: Rows) -> list[str]:
    return [f"data: {_rows(s, now[s], then.get(s, ''), rows)}" for s in now if now[s] != then.get(s)]


def _rows(split: str, now: str, then: str, rows: Rows) -> str:
    """How the rows of one split differ."""
    new, old = rows(now), rows(then)
    if new is None or old is None:
        return f"other rows in {split} (those of before are no longer stored)"
    new_rows, old_rows = {row.id: row for row in new}, {row.id: row for row in old}
    changed = sum(row != new_rows[name] for name, row in old_rows.items() if name in new_rows)
    counts = {
        "added to": len(new_rows.keys() - old_rows.keys()),
        "removed from": len(old_rows.keys() - new_rows.keys()),
        "changed in": changed,
    }
    parts = [(count, words) for words, count in counts.items() if count]
    if not parts:
        return f"the rows of {split} in another order"
    (count, words), *rest = parts
    first = f"{count} {'row' if count == 1 else 'rows'} {words} {split}"
    return ", ".join([first, *(f"{count} {words.split()[0]}" for count, words in rest)])


def _support(config: PipelineConfig, recipe: Recipe, before: Manifest | None, tasks: Mapping[str, TaskData]) -> str:
    """Why the shared support is another one."""
    if before is None:
        return "shared support changed"
    now, then = _plain(recipe.config), before.config
    old = [tuple(pair) for pair in then.get("tasks", [])]
    pools = {name: pooled(config, tasks[name]) for name in config.held_in}
    causes = []
    if others := [name for name, pool in pools.items() if pool not in old]:
        causes.append(f"training rows or prompt of {', '.join(others)}")
    gone = sum(pair not in pools.values() for pair in old)
    if gone > len(others):
        causes.append("tasks that left")
    causes += [name for name in now if name != "tasks" and now[name] != then.get(name)]
    if recipe.version != before.version:
        causes.append("algorithm version")
    return f"shared support changed because of {', '.join(causes)}" if causes else "shared support changed"
