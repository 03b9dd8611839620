"""The trie: deterministic, fan-in respected, and only one path changes when an expert comes, goes or changes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import MergeError
from merge.tree.trie import FAN_INS, Leaf, Node, build_tree, digits, leaf_names, path_to, post_order

names = st.lists(st.text(max_size=8), min_size=1, max_size=40, unique=True)
fan_ins = st.sampled_from(FAN_INS)


@given(names, fan_ins, st.randoms())
@settings(max_examples=80, deadline=None)
def test_shape(experts, fan_in, rng):
    tree = build_tree(experts, fan_in)
    shuffled = list(experts)
    rng.shuffle(shuffled)
    assert build_tree(shuffled, fan_in) == tree
    assert sorted(leaf_names(tree)) == sorted(experts)
    nodes = post_order(tree)
    assert nodes[-1] == tree
    assert len(nodes) <= max(1, len(experts) - 1)
    for node in nodes:
        assert len(node.children) <= fan_in
        assert len(node.children) >= 2 or len(experts) == 1
        assert all(digits(name, fan_in).startswith(node.label) for name in leaf_names(node))
        for child in node.children:
            if isinstance(child, Node):
                assert nodes.index(child) < nodes.index(node)
    assert len({node.label for node in nodes}) == len(nodes)


@given(names, st.text(max_size=8), fan_ins)
@settings(max_examples=80, deadline=None)
def test_one_path_changes_when_a_name_is_added_or_removed(experts, new, fan_in):
    if new in experts:
        experts = [e for e in experts if e != new] or ["another"]
    without, tree = build_tree(experts, fan_in), build_tree([*experts, new], fan_in)
    path = path_to(tree, new)
    old = set(post_order(without))
    added = [node for node in post_order(tree) if node not in old]
    assert set(added) <= set(path)
    gone = [node for node in post_order(without) if node not in set(post_order(tree))]
    assert len(gone) <= len(path)


@given(names, fan_ins, st.data())
@settings(max_examples=60, deadline=None)
def test_the_path_of_an_expert_is_the_nodes_that_hold_it(experts, fan_in, data):
    name = data.draw(st.sampled_from(experts))
    tree = build_tree(experts, fan_in)
    assert set(path_to(tree, name)) == {node for node in post_order(tree) if name in leaf_names(node)}


def test_small_trees():
    assert build_tree(["a"], 4) == Node("", (Leaf("a"),))
    assert digits("a", 16) == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert digits("a", 2)[:8] == "11001010"
    assert digits("a", 8)[:3] == "625"
    assert len(digits("a", 8)) == 86


def test_this_tree_does_not_change():
    """If this fails, raise TREE_VERSION: nodes made before cannot be found any more."""
    tree = build_tree([f"task-{i}" for i in range(6)], 4)
    shape = {
        node.label: [child.name if isinstance(child, Leaf) else child.label for child in node.children]
        for node in post_order(tree)
    }
    assert shape == {
        "132": ["task-2", "task-1"],
        "1": ["task-0", "132"],
        "": ["task-3", "1", "task-4", "task-5"],
    }


def test_bad_input_is_refused():
    with pytest.raises(MergeError, match="empty"):
        build_tree([], 4)
    with pytest.raises(MergeError, match="'a' appears twice"):
        build_tree(["a", "b", "a"], 4)
    with pytest.raises(MergeError, match="accepted: 2, 4, 8, 16"):
        build_tree(["a"], 3)
    with pytest.raises(MergeError, match="no expert named"):
        path_to(build_tree(["a"], 2), "b")
