"""What a run would make, from what a real store holds: artifacts without content stand for those of earlier runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts import Manifest, Recipe, publish
from infra.model_registry import CONFIG_TAG, identity
from infra.model_versions import CHAMPION, DECISION, PREVIOUS, PROMOTED, Model, Version
from infra.snapshot import Snapshot
from infra.store import Store
from merge.jobs import NodeJob, Ref, RootJob, TaskMaskJob, consumed
from merge.schedule import MergeSchedule
from merge.specs import Candidate, plan_reductions
from merge.tree import build_tree, path_to, post_order
from pipeline.forecast import Count, Forecast, forecast
from pipeline.jobs import base_models, evaluation_job
from pipeline.outcome import Inputs
from pipeline.planning import plan_recipes
from pipeline.registration import plain_expert
from pipeline.search import plan_rungs, task_order
from tests.pipeline.test_planning import inputs

METHODS = [{"method": "mean"}, {"method": "ties", "params": {"lambda": [0.5, 1.0, 1.5]}}]
SMALL: dict[str, Any] = {
    "merge": {"fan_in": 2, "candidates": METHODS},
    "evaluate": {"few_shot": 0, "serving_dtype": None},
}


class World:
    """Everything that a run of `given` would have left in its store, made as far as asked."""

    def __init__(self, given: Inputs, folder: Path) -> None:
        self.given, self._folder = given, folder
        self.experts: dict[str, Manifest] = {}
        self.merged: Mapping[Candidate, Manifest] = {}

    def put(self, recipe: Recipe, used: Mapping[str, str], label: str, **meta: Any) -> Manifest:
        file = self._folder / label
        file.write_text(recipe.key)
        return publish(self.given.store, recipe, {label: file}, used, meta)[0]

    def train(self, *tasks: str) -> None:
        planned = plan_recipes(self.given)
        support = self.put(planned.support, {}, "support") if planned.support else None
        used = {support.key: support.digest} if support else {}
        self.experts = {
            task: self.put(planned.experts[task], used, "adapter", base_sha256=self.given.base.sha256, run_id="run1")
            for task in tasks or planned.experts
        }

    def merge(self) -> None:
        given = self.given
        reductions, names = plan_reductions(given.candidates.all), list(given.config.held_in)
        schedule = MergeSchedule(given.store, reductions, names, given.config.merge.fan_in, given.base.sha256)
        todo = schedule.add_experts({task: Ref.of(manifest) for task, manifest in self.experts.items()})
        while todo:
            job = todo.pop()
            if isinstance(job, RootJob):
                made = [self.put(recipe, job.inputs, "adapter") for _, recipe in job.candidates]
            elif isinstance(job, NodeJob):
                made = [self.put(job.recipe, consumed(job.children, job.reference), "statistics")]
            else:
                assert isinstance(job, TaskMaskJob)
                read = {ref.key: ref.digest for ref in (job.unified, job.adapter)}
                made = [self.put(job.recipe, read, "mask")]
            todo += schedule.finished(job, tuple((manifest, True) for manifest in made))
        self.merged = schedule.merged

    def score(self, model: str, split: str, task: str, manifest: Manifest | None, score: float = 0.5) -> None:
        job = evaluation_job(self.given, model, split, task, manifest, self.experts.get(task) if manifest else None)
        self.put(job.recipe, {}, "rows", score=score)

    def validate(self, candidate: Candidate, task: str, score: float) -> None:
        self.score(candidate.to_json(), "validation", task, self.merged[candidate], score)

    def forecast(self, models: Mapping[str, Model] | None = None) -> Forecast:
        return forecast(self.given, Snapshot(self.given.store), models or {})


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
    later = World(Inputs(**{**vars(world.given), "config": config, "tasks": tasks}), world._folder).forecast()
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
    both = [world.given, Inputs(**{**vars(world.given), "config": other, "registers": False})]
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
