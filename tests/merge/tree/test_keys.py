"""Keys of merges change exactly when something that the bytes are a function of changes."""

import pytest

from merge.methods.specs import Candidate, LiftSpec, candidate_lift
from merge.tree import keys
from merge.tree.keys import checkpoint_recipe, merged_recipe, node_recipe, root_key, task_mask_recipe
from merge.tree.trie import build_tree

MEAN, SCALED = Candidate("mean"), Candidate("task_arithmetic", {"lambda": 0.3})
ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64


def test_a_node_is_a_function_of_its_lift_and_children_in_order() -> None:
    lift = candidate_lift(MEAN)
    node = node_recipe(lift, [ONE, TWO])
    assert node.inputs == (ONE, TWO)
    changed = [
        node_recipe(lift, [TWO, ONE]),
        node_recipe(lift, [ONE, THREE]),
        node_recipe(candidate_lift(Candidate("ties")), [ONE, TWO]),
        node_recipe(candidate_lift(Candidate("ties", {"density": 0.5})), [ONE, TWO]),
        node_recipe(candidate_lift(Candidate("dare_linear", {"seed": 1})), [ONE, TWO]),
        node_recipe(candidate_lift(Candidate("dare_linear", {"seed": 2})), [ONE, TWO]),
        node_recipe(lift, [ONE, TWO], reference=THREE),
        node_recipe(lift, [ONE, TWO], measured=[THREE]),
    ]
    assert len({recipe.key for recipe in (node, *changed)}) == 1 + len(changed)
    assert node_recipe(candidate_lift(SCALED), [ONE, TWO]).key == node.key  # λ scales in the end


def test_weights_are_those_of_the_experts_below_whatever_these_are_called() -> None:
    def spec(weights: dict[str, float]) -> LiftSpec:
        return candidate_lift(Candidate("weighted_mean", {}, weights))

    one = node_recipe(spec({"a": 0.25, "b": 0.75}), [ONE, TWO], [0.25, 0.75])
    assert node_recipe(spec({"x": 0.25, "y": 0.5, "z": 0.25}), [ONE, TWO], [0.25, 0.75]).key == one.key
    assert node_recipe(spec({"a": 0.5, "b": 0.5}), [ONE, TWO], [0.5, 0.5]).key != one.key
    assert node_recipe(candidate_lift(MEAN), [ONE, TWO]).key != one.key


def test_a_node_that_reads_a_measurement_names_how_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("fisher_on_support", "regmean", "mean"):
        lift = candidate_lift(Candidate(method))
        key = node_recipe(lift, [ONE, TWO]).key
        with monkeypatch.context() as patch:
            patch.setattr(keys, "IMPORTANCE_READ_VERSION", -1)
            assert (node_recipe(lift, [ONE, TWO]).key != key) == (method != "mean")


def test_a_roots_key_is_that_of_a_tree_made_for_one_lift() -> None:
    experts = {name: f"{at:064x}" for at, name in enumerate("abcdefg")}
    measured = {name: f"{at:064x}" for at, name in enumerate("gfedcba")}
    weights = {name: 1 / 7 for name in experts}
    tree = build_tree(list(experts), 2)
    mean, fisher = candidate_lift(MEAN), candidate_lift(Candidate("fisher_on_support"))
    weighted = candidate_lift(Candidate("weighted_mean", {}, weights))
    one = build_tree(["a", "b"], 2)
    first, second = (child.name for child in one.children)
    assert root_key(mean, one, experts) == node_recipe(mean, [experts[first], experts[second]]).key
    assert root_key(weighted, build_tree(["a"], 2), experts) == node_recipe(weighted, [experts["a"]], [1 / 7]).key
    found = [
        root_key(mean, tree, experts),
        root_key(mean, tree, experts | {"d": ONE}),
        root_key(mean, tree, experts, reference=ONE),
        root_key(mean, build_tree(list(experts), 4), experts),
        root_key(weighted, tree, experts),
        root_key(candidate_lift(Candidate("weighted_mean", {}, weights | {"a": 0.0, "b": 2 / 7})), tree, experts),
        root_key(fisher, tree, experts, measured),
        root_key(fisher, tree, experts, measured | {"c": ONE}),
    ]
    assert len(set(found)) == len(found)


def test_a_merge_is_a_function_of_its_root_and_method() -> None:
    assert merged_recipe(MEAN, ONE).key != merged_recipe(SCALED, ONE).key
    assert merged_recipe(MEAN, ONE).key != merged_recipe(MEAN, TWO).key
    assert merged_recipe(SCALED, ONE).key != merged_recipe(Candidate("task_arithmetic", {"lambda": 0.4}), ONE).key
    a, b = (Candidate("weighted_mean", {}, {name: 1.0}) for name in "ab")
    assert merged_recipe(a, ONE).key == merged_recipe(b, ONE).key


def test_masks_and_checkpoints() -> None:
    emr = Candidate("emr")
    assert task_mask_recipe(emr, ONE, TWO).inputs == (ONE, TWO)
    assert task_mask_recipe(emr, ONE, TWO).key != task_mask_recipe(emr, ONE, THREE).key
    dtypes = [(ONE, TWO, "float32", 10), (ONE, TWO, "bfloat16", 10)]
    settings = [*dtypes, (ONE, TWO, "float32", 11), (TWO, ONE, "float32", 10)]
    assert len({checkpoint_recipe(*each).key for each in settings}) == len(settings)
