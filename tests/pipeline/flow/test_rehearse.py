"""What a run would make, from what a real store holds: artifacts without content stand for those of earlier runs."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infra.artifacts.manifests import Manifest
from infra.artifacts.snapshot import Snapshot
from infra.engine.keyed import KeyedEngine
from infra.engine.once import every
from infra.engine.step import Engine, Step
from infra.registry.models import CONFIG_TAG, identity
from infra.registry.versions import CHAMPION, DECISION, PREVIOUS, PROMOTED, Model, Version
from infra.store.s3 import Store
from merge.methods.specs import Candidate, plan_reductions
from merge.tree.trie import build_tree, path_to, post_order
from pipeline.config.search import plan_rungs, task_order
from pipeline.flow.context import Flow
from pipeline.flow.merges import merges_of
from pipeline.flow.recipes import expert_recipe, support_recipe
from pipeline.flow.registration import plain_expert
from pipeline.flow.rehearse import Count, Forecast, expert_recipes, forecast, known_keys
from pipeline.flow.run import run
from pipeline.flow.steps import (
    base_models,
    evaluation_job,
    evaluation_step,
    expert_step,
    multitask_step,
    refine_step,
    routed_job,
    router_step,
    support_step,
)
from pipeline.records.outcome import Inputs, Outcome
from pipeline.records.refined import Refined
from pipeline.report.display import Display
from tests.pipeline.given import TASK, inputs
from tests.pretend import Empty

METHODS = [{"method": "mean"}, {"method": "ties", "params": {"lambda": [0.5, 1.0, 1.5]}}]
SMALL: dict[str, Any] = {
    "merge": {"fan_in": 2, "candidates": METHODS},
    "evaluate": {"few_shot": 0, "serving_dtype": None},
}


class World:
    """Everything that a run of `given` would have left in its store, made as far as asked."""

    def __init__(self, given: Inputs, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.workers = Empty(given.store, folder, meta)
        self.experts: dict[str, Manifest] = {}
        self.merged: Mapping[Candidate, Manifest] = {}

    def make(self, step: Step, **more: Any) -> Manifest:
        (recipe,) = step.recipes
        return self.workers.put(recipe, step.inputs, step.label, **{**meta(step), **more})[0]

    def train(self, *tasks: str) -> None:
        step = support_step(self.given)
        support = self.make(step) if step else None
        wanted = tasks or self.given.config.held_in
        self.experts = {task: self.make(expert_step(self.given, task, support)) for task in wanted}

    def merge(self) -> None:
        async def flow() -> None:
            flow = flow_of(self.given, KeyedEngine(self.given.store, self.workers))
            merges = merges_of(flow)
            await every(*(merges.merge(candidate) for candidate in self.given.candidates.all))
            self.merged = merges.merged

        asyncio.run(flow())

    def score(self, model: str, split: str, task: str, manifest: Manifest | None, score: float = 0.5) -> None:
        job = evaluation_job(self.given, model, split, task, manifest, self.experts.get(task) if manifest else None)
        self.make(evaluation_step(job), score=score)

    def validate(self, candidate: Candidate, task: str, score: float) -> None:
        self.score(candidate.to_json(), "validation", task, self.merged[candidate], score)

    def forecast(self, models: Mapping[str, Model] | None = None) -> Forecast:
        return forecast(self.given, Snapshot(self.given.store), models or {})

    def run(self, given: Inputs | None = None) -> tuple[KeyedEngine, Outcome]:
        """A run of `given`, with work that is only pretended."""
        engine = KeyedEngine(self.given.store, self.workers)
        flow = flow_of(given or self.given, engine)
        asyncio.run(engine.run(run(flow)))
        return engine, flow.outcome


def meta(step: Step) -> dict[str, Any]:
    """What results and cards read of an artifact. Scores follow from the key, so that there is a best candidate."""
    found = {"base_sha256": "b" * 64, "run_id": "run1", "validation_loss": 1.0, "seconds": 1.0, "rows": 4}
    found |= {"experts": 5, "density": 0.5, "rounding_loss_bfloat16": 0.0, "delta_norm": 1.0}
    if step.kind in ("refined", "yardsticks"):
        found |= {"refined": {"rows": 4}, "first_loss": 2.0, "last_loss": 1.0}
    score = int(step.keys[0][:4], 16) / 0xFFFF
    return {**found, "score": score, "metric": "exact_match", "n": 9, "format_free": score, "scores": [score] * 9}


def flow_of(given: Inputs, engine: Engine) -> Flow:
    display = Display(list(given.config.held_in), Console(quiet=True))
    return Flow(given, engine, Outcome(), display, lambda keys: None)


@pytest.fixture
def world(store: Store, tmp_path: Path) -> World:
    return World(inputs(store, 5, **SMALL), tmp_path)


def test_of_nothing_everything_is_made(world: World) -> None:
    found, given = world.forecast(), world.given
    nodes = len(post_order(build_tree(list(given.config.held_in), 2)))
    assert found.stale == tuple(given.config.held_in)
    assert {kind: count for kind, count in found.counts.items() if count.make or count.reuse} == {
        "experts": Count(5),
        "merge_nodes": Count(nodes * len(plan_reductions(given.candidates.all))),
        "merges": Count(4),
        # tests of the base (5 + 1), of experts and of the chosen; 4 merges on validation; gate: base, experts, chosen
        "evaluations": Count(6 + 5 + 6 + 4 * 5 + 3 * 5),
        "registrations": Count(6),
    }


def test_rounds_are_planned_to_the_last_artifact(store: Store, tmp_path: Path) -> None:
    """Of nothing, after a run, and after a task got other rows"""
    world = World(inputs(store, 5, False, **SMALL, rounds=3), tmp_path)
    before = world.forecast()
    assert before.counts["experts"] == Count(3 * 5)
    assert before.counts["merges"] == Count(1 + 2 + 2 * 4), "between rounds, one of them added up; each candidate twice"
    assert before.rounds == (before.stale,) * 3
    engine, outcome = world.run()
    assert {kind: engine.tally.made[kind] for kind in before.counts} == {
        kind: count.make for kind, count in before.counts.items()
    }
    assert {manifest.key for manifest in outcome.experts.values()} == {
        recipe.key for recipe in expert_recipes(world.given).values()
    }
    assert not any(count.make for count in world.forecast().counts.values())
    again, _ = world.run()
    assert +again.tally.made == {}
    task = world.given.tasks["task1"]
    rows = {**task.fingerprints, "train": "0" * 64}
    other = replace(world.given, tasks={**world.given.tasks, "task1": replace(task, fingerprints=rows)})
    after = forecast(other, Snapshot(store), {})
    assert after.counts["experts"] == Count(1 + 2 * 5, 4)
    assert [len(tasks) for tasks in after.rounds] == [1, 5, 5]


def test_refining_is_counted_before_anybody_knows_which_merge_is_the_best(store: Store, tmp_path: Path) -> None:
    """Of nothing; with experts, merges and their scores; and after a run, of which the plan said what it would make."""
    plain = World(inputs(store, 5, False, **SMALL), tmp_path).forecast()
    assert "refined" not in plain.counts
    world = World(inputs(store, 5, False, **SMALL, refine={"merges": 2, "steps": [1, 2]}), tmp_path)
    before = world.forecast()
    assert before.counts["refined"] == Count(4)
    assert before.counts["evaluations"] == Count(plain.counts["evaluations"].make + 4 * 5)
    same = ("experts", "merges", "merge_nodes", "registrations")
    assert {kind: before.counts[kind] for kind in same} == {kind: plain.counts[kind] for kind in same}
    world.train()
    world.merge()
    for at, candidate in enumerate(world.given.candidates.all):
        for task in world.given.config.held_in:
            world.validate(candidate, task, at / 10)
    scored = world.forecast()
    assert scored.counts["refined"] == Count(4)
    engine, outcome = world.run()
    assert engine.tally.made["refined"] == 4
    assert engine.tally.made["evaluations"] == scored.counts["evaluations"].make
    best = list(world.given.candidates.all)[:-3:-1]
    assert list(outcome.standings)[4:] == [Refined(start, steps) for start in best for steps in (1, 2)]
    assert all(standing.rung == 2 for each, standing in outcome.standings.items() if isinstance(each, Refined))
    after = world.forecast()
    assert (after.counts["refined"], after.counts["evaluations"].make) == (Count(0, 4), 0)


def test_teachers_are_counted_made_once_for_all_refined_merges_and_found_again(store: Store, tmp_path: Path) -> None:
    keep = {"tasks": {"kept": {**TASK, "source": "jsonl:kept.jsonl"}}}
    refine = {"merges": 2, "steps": [1, 2], "teacher": "experts", "keep": keep}
    world = World(inputs(store, 5, False, **SMALL, refine=refine), tmp_path)
    before = world.forecast()
    assert (before.counts["teachers"], before.counts["refined"]) == (Count(5 + 1), Count(4))
    engine, _ = world.run()
    assert (engine.tally.made["teachers"], engine.tally.made["refined"]) == (6, 4)
    after = world.forecast()
    assert (after.counts["teachers"], after.counts["refined"]) == (Count(0, 6), Count(0, 4))
    # other lengths ask about other rows, and change no merge that was there
    longer = World(inputs(store, 5, False, **SMALL, refine=refine | {"steps": [1, 2, 3]}), tmp_path)
    engine, _ = longer.run()
    assert (engine.tally.made["teachers"], engine.tally.made["refined"], engine.tally.reused["refined"]) == (6, 2, 4)
    only = World(inputs(store, 5, False, **SMALL, refine={"keep": keep}), tmp_path).forecast()
    assert only.counts["teachers"] == Count(0, 1)
    assert known_keys(world.given) >= {each.key for each in after.found if each.kind == "teacher"}


def test_a_multitask_adapter_is_planned_made_and_scored_beside(store: Store, tmp_path: Path) -> None:
    plain = World(inputs(store, 5, False, **SMALL), tmp_path).forecast()
    assert "yardsticks" not in plain.counts
    world = World(inputs(store, 5, False, **SMALL, yardsticks={"multitask": {"steps": 2}}), tmp_path)
    before = world.forecast()
    assert before.counts["yardsticks"] == Count(1)
    assert before.counts["evaluations"] == Count(plain.counts["evaluations"].make + 5 + 1)
    step = multitask_step(world.given)
    assert step is not None
    assert set(step.keys) <= known_keys(world.given)
    engine, outcome = world.run()
    assert outcome.multitask is not None
    assert outcome.multitask.kind == "multitask"
    order = [each.kind for each in world.workers.steps]
    assert order.index("yardsticks") > max(at for at, kind in enumerate(order) if kind == "experts")
    assert outcome.multitask not in outcome.merged.values()
    assert engine.tally.made["evaluations"] == before.counts["evaluations"].make
    assert {score.task for score in outcome.scores if score.model == "multitask"} == set(world.given.tasks)
    assert world.forecast().counts["yardsticks"] == Count(0, 1)


def test_routed_experts_are_planned_made_and_scored_beside(store: Store, tmp_path: Path) -> None:
    plain = World(inputs(store, 5, False, **SMALL), tmp_path).forecast()
    assert "routers" not in plain.counts
    world = World(inputs(store, 5, False, **SMALL, yardsticks={"routed": {"rows": 8}}), tmp_path)
    before = world.forecast()
    assert (before.counts["routers"], "yardsticks" in before.counts) == (Count(1), False)
    assert before.counts["evaluations"] == Count(plain.counts["evaluations"].make + 5 + 1)
    assert {kind: count for kind, count in before.counts.items() if kind not in ("routers", "evaluations")} == {
        kind: count for kind, count in plain.counts.items() if kind != "evaluations"
    }
    step = router_step(world.given)
    assert step is not None
    assert set(step.keys) <= known_keys(world.given)
    engine, outcome = world.run()
    assert engine.tally.made["evaluations"] == before.counts["evaluations"].make
    assert {score.task for score in outcome.scores if score.model == "routed"} == set(world.given.tasks)
    after = world.forecast()
    assert (after.counts["routers"], after.counts["evaluations"].make) == (Count(0, 1), 0)


def test_a_merge_with_examples_is_planned_and_scored_beside(store: Store, tmp_path: Path) -> None:
    shown = {**SMALL, "evaluate": {"few_shot": 2, "serving_dtype": None}}
    plain = World(inputs(store, 5, False, **shown), tmp_path).forecast()
    world = World(inputs(store, 5, False, **shown, yardsticks={"few_shot_merge": True}), tmp_path)
    before = world.forecast().counts["evaluations"]
    assert before == Count(plain.counts["evaluations"].make + 5 + 1)
    engine, outcome = world.run()
    assert engine.tally.made["evaluations"] == before.make
    assert {score.task for score in outcome.scores if score.model == "merged_few_shot"} == set(world.given.tasks)


def test_the_order_of_tasks_does_not_matter_to_routed_experts(store: Store, tmp_path: Path) -> None:
    world = World(inputs(store, 3, False, **SMALL, yardsticks={"routed": {}}), tmp_path)
    world.train()
    step = router_step(world.given)
    assert step is not None
    router = world.make(step)
    first, *others = world.given.config.held_in
    job = routed_job(world.given, first, router, world.experts)
    turned = dict(reversed(world.experts.items()))
    assert routed_job(world.given, first, router, turned) == job
    other = {**world.experts, others[0]: world.experts[first]}
    assert routed_job(world.given, first, router, other).recipe.key != job.recipe.key, "every expert is in the key"


def test_whatever_wins_a_plan_of_refining_says_at_most(store: Store, tmp_path: Path) -> None:
    """One merge is refined already, and nobody knows whether it is the best."""
    world = World(inputs(store, 5, **SMALL, refine={"steps": [1]}), tmp_path)
    world.train()
    world.merge()
    first = world.given.candidates.all[0]
    world.make(refine_step(world.given, Refined(first, 1), world.merged[first], world.experts))
    assert world.forecast().counts["refined"] == Count(1, 0, at_most=True)


def test_scores_that_are_one_are_made_once(store: Store, tmp_path: Path) -> None:
    """Where weights are served in the type that is computed in, the chosen merge's two scores are the same."""
    evaluate = {"few_shot": 0, "compute_dtype": "float32", "serving_dtype": "float32"}
    found = World(inputs(store, 5, **SMALL | {"evaluate": evaluate}), tmp_path).forecast()
    plain = World(inputs(store, 5, **SMALL | {"evaluate": evaluate | {"serving_dtype": None}}), tmp_path).forecast()
    assert found.counts["evaluations"].make == plain.counts["evaluations"].make
    assert found.counts["evaluations"].reuse > plain.counts["evaluations"].reuse == 0


def test_what_exists_is_reused_and_a_stale_expert_takes_its_path_along(world: World) -> None:
    world.train()
    world.merge()
    tree = build_tree(list(world.experts), 2)
    found = world.forecast()
    assert found.stale == ()
    assert found.counts["merges"] == Count(0, 4)
    assert found.counts["merge_nodes"].make == 0
    changed = world.given.config.held_in["task1"].model_copy(update={"template": "{input}?"})
    config = world.given.config.model_copy(update={"held_in": {**world.given.config.held_in, "task1": changed}})
    tasks = dict(world.given.tasks)
    tasks["task1"] = type(tasks["task1"])("task1", changed, tasks["task1"].splits, tasks["task1"].fingerprints)
    later = World(replace(world.given, config=config, tasks=tasks), world.folder).forecast()
    assert later.stale == ("task1",)
    reductions, path = len(plan_reductions(world.given.candidates.all)), len(path_to(tree, "task1"))
    assert later.counts["merge_nodes"] == Count(reductions * path, reductions * (len(post_order(tree)) - path))
    assert not later.counts["merge_nodes"].at_most


def test_what_follows_from_bytes_that_are_made_again_is_at_most(world: World) -> None:
    world.train()
    world.merge()
    world.given.store.delete(world.experts["task2"].files["adapter"].name)
    found = world.forecast()
    assert found.counts["experts"] == Count(1, 4, False)
    assert found.counts["merge_nodes"].at_most
    assert found.counts["merge_nodes"].make > 0


def test_a_race_that_scores_decide_is_followed_to_its_end(world: World) -> None:
    world.train()
    world.merge()
    candidates = world.given.candidates.eligible
    for number, candidate in enumerate(candidates):
        for task in world.experts:
            world.validate(candidate, task, number / 10)
    for task in [*world.experts, "other"]:
        world.score("merged", "test", task, world.merged[candidates[-1]])
    found = world.forecast()
    assert found.counts["evaluations"] == Count(6 + 5 + 3 * 5, 20 + 6)  # of the winner, only the gate is missing


def test_a_race_that_is_open_is_bounded(store: Store, tmp_path: Path) -> None:
    merge = {**SMALL["merge"], "search": {"evaluations": 14}}
    world = World(inputs(store, 5, **{**SMALL, "merge": merge}), tmp_path)
    world.train()
    world.merge()
    config, candidates = world.given.config, world.given.candidates.eligible
    first, *later = plan_rungs(len(candidates), 5, 14)
    assert later
    tasks = task_order(list(config.held_in), config.seed)
    for task in tasks:
        world.validate(candidates[0], task, 0.9)  # the others are new
    found = world.forecast()
    made = (len(candidates) - 1) * first.tasks  # and then every rung might leave the one candidate with scores out
    most = sum(min(rung.candidates, len(candidates) - 1) * rung.tasks for rung in later)
    rest = 6 + 5 + 6 + 3 * 5
    assert found.counts["evaluations"].make == made + most + rest
    assert found.counts["evaluations"].at_most
    total = found.counts["evaluations"].make + found.counts["evaluations"].reuse
    assert total == sum(rung.candidates * rung.tasks for rung in [first, *later]) + rest


def test_experts_of_a_support_that_must_be_made_are_stale_at_most(store: Store, tmp_path: Path) -> None:
    world = World(inputs(store, 3, **SMALL, mask={"shared": True, "criterion": "gradient"}), tmp_path)
    world.train()
    assert world.forecast().counts["experts"] == Count(0, 3)
    support = world.forecast().support
    assert support is not None
    store.delete(support.files["support"].name)
    found = world.forecast()
    assert (found.support, found.counts["support"]) == (None, Count(1))
    assert found.counts["experts"] == Count(3, 0, True)


def test_seeds_share_the_scores_of_the_base(world: World) -> None:
    expected: set[str] = set()
    other = world.given.config.model_copy(update={"seed": 1})
    both = [world.given, replace(world.given, config=other, registers=False)]
    first, second = (forecast(each, Snapshot(world.given.store), {}, expected) for each in both)
    assert len(base_models(other)) == 1
    assert second.counts["evaluations"].reuse == 6
    assert second.counts["experts"] == first.counts["experts"] == Count(5)
    assert second.counts["registrations"] == Count()


def registered(given: Inputs, *versions: tuple[Manifest, dict[str, str]], champion: int | None) -> Model:
    found = [
        Version("mine.task0", number, identity(plain_expert(given, "task0", manifest)) | tags)
        for number, (manifest, tags) in enumerate(versions, 1)
    ]
    return Model("mine.task0", "task0", {CHAMPION: champion} if champion else {}, tuple(reversed(found)))


@pytest.mark.parametrize(
    ("versions", "champion", "registrations", "gate"),
    [
        (["other"], 1, 1, "champion cannot be scored"),
        (["own"], 1, 0, "settled"),
        (["own"], None, 0, "base"),
        (["judged"], None, 0, "settled"),
        (["asked otherwise"], 1, 1, "settled"),
        (["was champion", "own"], None, 0, "settled"),
    ],
)
def test_what_the_gate_asks_for_follows_from_the_registered_versions(
    world: World, versions: list[str], champion: int | None, registrations: int, gate: str
) -> None:
    world.train()
    own = world.experts["task0"]
    other, was = world.experts["task1"], {DECISION: PROMOTED, PREVIOUS: ""}
    listed = {
        "own": (own, {}),
        "judged": (own, {DECISION: PROMOTED}),
        "asked otherwise": (own, {CONFIG_TAG: "before"}),
        "other": (other, {}),
        "was champion": (other, was),
    }
    model = registered(world.given, *(listed[name] for name in versions), champion=champion)
    found, plain = world.forecast({"mine.task0": model}), world.forecast()
    assert plain.counts["registrations"].make - found.counts["registrations"].make == 1 - registrations
    spared = plain.counts["evaluations"].make - found.counts["evaluations"].make
    assert spared == {"champion cannot be scored": 1, "settled": 1, "base": 0}[gate]


# -- a plan and the run after it --------------------------------------------------------------------------------

UNREGISTERED = SMALL | {"registers": False}
MANY: list[dict[str, Any]] = [
    {"method": "mean"},
    {"method": "ties", "params": {"lambda": [0.5, 1.0], "density": [0.5, 1.0]}},
    {"method": "weighted_mean", "weights": "training_rows"},
    {"method": "consensus"},
    {"method": "fisher_on_support"},
    {"method": "emr"},
]


@pytest.mark.parametrize(
    "sections",
    [
        UNREGISTERED,
        UNREGISTERED | {"merge": {"fan_in": 2, "candidates": MANY, "export": {"dtype": "float32"}}},
        UNREGISTERED | {"mask": {"shared": True, "criterion": "gradient"}, "merge": {"candidates": MANY[:1]}},
        UNREGISTERED | {"evaluate": {"few_shot": 2, "serving_dtype": "bfloat16"}},
    ],
    ids=["small", "many methods", "shared support", "few shots and a serving type"],
)
def test_a_run_makes_what_its_plan_says_and_the_next_plan_says_nothing(
    store: Store, tmp_path: Path, sections: dict[str, Any]
) -> None:
    world = World(inputs(store, 5, **sections), tmp_path)
    planned = world.forecast().counts
    engine, _ = world.run()
    for kind, count in planned.items():
        made, reused = engine.tally.made[kind], engine.tally.reused[kind]
        if count.at_most or kind == "evaluations":  # the choice was open
            assert made + reused == count.make + count.reuse
            assert made <= count.make
        else:
            assert (made, reused) == (count.make, count.reuse), kind
    assert not any(count.make for count in world.forecast().counts.values())
    before = len(world.workers.steps)
    again, _ = world.run()
    assert +again.tally.made == {}
    assert len(world.workers.steps) == before
    assert +again.tally.reused == +(engine.tally.made + engine.tally.reused)


def test_a_run_uses_every_key_that_it_announced(store: Store, tmp_path: Path) -> None:
    merge = {"fan_in": 2, "candidates": MANY}
    world = World(inputs(store, 5, **SMALL | {"merge": merge, "registers": False}), tmp_path)
    known = known_keys(world.given)
    world.run()
    asked = {step.kind: set[str]() for step in world.workers.steps}
    for step in world.workers.steps:
        asked[step.kind].update(step.keys)
    everything = set[str]().union(*asked.values())
    assert known <= everything
    base = {evaluation_job(world.given, "base", "test", task, None, None).recipe.key for task in world.given.tasks}
    assert everything - known == asked["evaluations"] - base  # keyed by bytes that were made meanwhile


def test_experts_of_a_scored_shared_support_are_keyed_by_it(store: Store) -> None:
    mask = {"shared": True, "criterion": "gradient"}
    given = inputs(store, mask=mask, merge={"candidates": [{"method": "mean"}]})
    support = support_recipe(given.config, given.base.sha256, given.tasks)
    for task, recipe in expert_recipes(given).items():
        assert recipe == expert_recipe(given.config, given.base.sha256, given.tasks[task], support.key)
    assert support.key in known_keys(given)


def test_seeds_have_only_the_scores_of_the_base_in_common(store: Store) -> None:
    given = inputs(store, evaluate={"few_shot": 0}, registers=False)
    other = replace(given, config=given.config.model_copy(update={"seed": 1}))
    base = {evaluation_job(given, "base", "test", task, None, None).recipe.key for task in given.tasks}
    assert known_keys(given) & known_keys(other) == base
