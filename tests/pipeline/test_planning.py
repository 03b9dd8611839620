"""Keys that are known before a run: exactly those that the run then uses, checked against the merge schedule itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from infra.artifacts import Manifest
from infra.store import FileRef, Store
from merge.jobs import NodeJob, Ref, RootJob, TaskMaskJob
from merge.schedule import MergeSchedule
from merge.specs import plan_reductions
from pipeline.candidates import list_candidates
from pipeline.config import PipelineConfig
from pipeline.jobs import evaluation_job, support_ref
from pipeline.outcome import Inputs
from pipeline.planning import plan_recipes, planned_keys
from pipeline.recipes import expert_recipe, importance_recipe, support_recipe
from pipeline.tasks import SPLITS, TaskConfig, TaskData
from workers.base import PreparedBase
from workers.rows import Row, fingerprint

TASK = {"source": "jsonl:rows.jsonl", "metric": "exact_match"}
CANDIDATES: list[dict[str, Any]] = [
    {"method": "mean"},
    {"method": "ties", "params": {"lambda": [0.5, 1.0], "density": [0.5, 1.0]}},
    {"method": "weighted_mean", "weights": "training_rows"},
    {"method": "sce"},
    {"method": "consensus"},
    {"method": "fisher_on_support"},
    {"method": "regmean"},
    {"method": "emr"},
    {"method": "tall"},
]


def inputs(store: Store, tasks: int = 6, **sections: Any) -> Inputs:
    given = {
        "suite": "mine",
        "base": "path:/nowhere",
        "held_in": {f"task{number}": TASK for number in range(tasks)},
        "held_out": {"other": TASK},
        "train": {"steps": 3},
        "merge": {"fan_in": 2, "candidates": CANDIDATES},
    }
    config = PipelineConfig.model_validate(given | sections)
    data = {}
    for name in [*config.held_in, *config.held_out]:
        rows = tuple(Row(str(at), f"{name} {at}", ("yes" if at % 2 else "no",)) for at in range(9))
        splits = {split: rows for split in SPLITS}
        data[name] = TaskData(name, TaskConfig(**TASK), splits, {split: fingerprint(rows) for split in SPLITS})
    listed = list_candidates(config, {name: 9 for name in config.held_in})
    base = PreparedBase(Path("/nowhere"), "tiny", "b" * 64, "none")
    return Inputs(config, store, base, "bases/x", data, dict.fromkeys(data, 4), listed, "run")


def made(key: str, kind: str) -> Ref:
    return Ref.of(Manifest(key, kind, 1, {}, {kind: FileRef(f"objects/{key}/1/{kind}", key, 1)}, {}, {}))


def driven(given: Inputs) -> set[str]:
    """Keys that the merge schedule asks for, when everything is made that it asks for."""
    config, keys = given.config, set()
    reductions = plan_reductions(given.candidates.all)
    schedule = MergeSchedule(given.store, reductions, list(config.held_in), config.merge.fan_in, given.base.sha256)
    todo = []
    for task in config.held_in:
        recipe = expert_recipe(config, given.base.sha256, given.tasks[task])
        keys.add(recipe.key)
        todo += schedule.add_expert(task, made(recipe.key, "adapter"))
        for kind in schedule.extras:
            extra = importance_recipe(config, kind, recipe.key, given.tasks[task])
            keys.add(extra.key)
            todo += schedule.add_extra(task, kind, made(extra.key, kind))
    while todo:
        job = todo.pop()
        recipes = [recipe for _, recipe in job.candidates] if isinstance(job, RootJob) else [job.recipe]
        assert isinstance(job, RootJob | NodeJob | TaskMaskJob)
        keys |= {recipe.key for recipe in recipes}
        files = [{"adapter": FileRef(f"objects/{recipe.key}/1/adapter", recipe.key, 1)} for recipe in recipes]
        manifests = [Manifest(r.key, r.kind, 1, {}, f, {}, {}) for r, f in zip(recipes, files, strict=True)]
        todo += schedule.finished(job, tuple((manifest, True) for manifest in manifests))
    assert schedule.complete
    return keys


def test_planned_keys_are_those_of_the_merge_schedule_and_the_base_scores(store: Store) -> None:
    given = inputs(store)
    scores = {
        evaluation_job(given, model, "test", task, None, None, shots).recipe.key
        for task in given.tasks
        for model, shots in (("base", 0), ("few_shot", 4))
    }
    assert planned_keys(given) == driven(given) | scores
    assert len(scores) == 2 * len(given.tasks)


def test_experts_of_a_scored_shared_support_are_keyed_by_it(store: Store) -> None:
    mask = {"shared": True, "criterion": "gradient"}
    given = inputs(store, mask=mask, merge={"candidates": [{"method": "mean"}]})
    support = support_recipe(given.config, given.base.sha256, given.tasks)
    plan = plan_recipes(given)
    assert plan.support == support
    file = FileRef(f"objects/{support.key}/1/support", support.key, 1)
    ref = support_ref(given.config, Manifest(support.key, "support", 1, {}, {"support": file}, {}, {}))
    for task, recipe in plan.experts.items():
        assert recipe == expert_recipe(given.config, given.base.sha256, given.tasks[task], ref.key)
    assert support in list(plan.recipes())


def test_what_is_not_scored_beforehand_is_not_planned(store: Store) -> None:
    given = inputs(store, evaluate={"few_shot": 0})
    assert len(plan_recipes(given).base_scores) == len(given.tasks)
    other = replace(given, config=given.config.model_copy(update={"seed": 1}))
    shared = planned_keys(given) & planned_keys(other)
    assert shared == {recipe.key for recipe in plan_recipes(given).base_scores}
