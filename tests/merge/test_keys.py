"""Keys of merges change exactly when something that the bytes are a function of changes."""

from merge.keys import checkpoint_recipe, merged_recipe, node_recipe, task_mask_recipe
from merge.specs import Candidate, LiftSpec, candidate_lift

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
        node_recipe(lift, [ONE, TWO], extras=[THREE]),
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
