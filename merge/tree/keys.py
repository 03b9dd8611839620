"""Keys of everything that merging makes: the one place that says what is in them and what is not.

In a key: what is lifted, the inputs' keys in the order of the tree, the weights of the experts that are a node's direct
children, the merge that a later round refers to, the method that lowers, algorithm and file versions. Not in a key:
names of experts, the number of tasks that a node is split over, fan-in (the tree shows in the children), paths.

A node's key names the statistics that it holds, which are those of all candidates that share it. A merge's key names
what the merge alone needs, as if it were the only candidate: it is found whatever it is merged beside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from infra.artifacts.manifests import Recipe
from merge.files.checkpoint_writer import CHECKPOINT_VERSION
from merge.methods.per_task import PER_TASK_VERSION
from merge.methods.specs import Candidate, LiftSpec
from merge.tree.reduce import NODE_VERSIONS, ROOT_VERSIONS
from merge.tree.trie import Leaf, Node, post_order
from workers.adapters.task_mask import MASK_FILE_VERSION
from workers.measuring.file import IMPORTANCE_READ_VERSION

ONTO_VERSION = 1
"""Part of the key of every merge of a later round: raise it when the same two parts give another sum."""


def node_recipe(
    spec: LiftSpec,
    children: Sequence[str],
    weights: Sequence[float] = (),
    measured: Sequence[str] = (),
    reference: str | None = None,
) -> Recipe:
    """A node is a function of what is lifted and of its children.

    `children` are their keys in the order of the tree; `weights` and `measured` (keys of their measurements) are
    those of the children that are experts, in the same order; `reference` is the key of the merge that lift reads.
    """
    own = {"weights": list(weights) if spec.weighted else None, "reference": reference}
    read = {"importance": IMPORTANCE_READ_VERSION} if spec.measurement else {}
    body = {"lift": spec.recipe(), "versions": {**NODE_VERSIONS, **read}, **own}
    return Recipe("node", 1, body, (*children, *measured, *([reference] if reference else [])))


def tree_recipes(
    spec: LiftSpec,
    tree: Node,
    experts: Mapping[str, str],
    measured: Mapping[str, str] | None = None,
    reference: str | None = None,
) -> dict[str, Recipe]:
    """The recipes of the tree's nodes by label as `spec` would make them, whether or not they exist; the root is last.

    `experts` and `measured` (for specs that read a measurement) are keys by expert name. Raises KeyError for a name
    without a key or weight.
    """
    weights, own_measured = dict(spec.weights or ()), measured or {}
    recipes: dict[str, Recipe] = {}
    for node in post_order(tree):
        leaves = [child.name for child in node.children if isinstance(child, Leaf)]
        recipes[node.label] = node_recipe(
            spec,
            [experts[child.name] if isinstance(child, Leaf) else recipes[child.label].key for child in node.children],
            [weights[name] for name in leaves] if spec.weighted else (),
            [own_measured[name] for name in leaves] if spec.measurement else (),
            reference,
        )
    return recipes


def root_key(
    spec: LiftSpec,
    tree: Node,
    experts: Mapping[str, str],
    measured: Mapping[str, str] | None = None,
    reference: str | None = None,
) -> str:
    """The key of the tree's root; arguments as in `tree_recipes`."""
    return tree_recipes(spec, tree, experts, measured, reference)[tree.label].key


def merged_recipe(candidate: Candidate, root: str) -> Recipe:
    """A merged adapter is a function of its own lift's statistics (`root`: `root_key` of it) and how it is lowered."""
    return Recipe("merged", 1, {**candidate.recipe(), "versions": ROOT_VERSIONS}, (root,))


def onto_recipe(candidate: Candidate, change: str, start: str) -> Recipe:
    """The merge of a later round is a function of what was merged of its experts' changes, and of the merge that they
    started from (both by key)."""
    return Recipe("merged", 1, {**candidate.recipe(), "onto": ONTO_VERSION}, (change, start))


def modelled_recipe(candidate: Candidate, reference: str, rows: Sequence[Mapping[str, Any]]) -> Recipe:
    """A merge that a model makes is a function of the merge that it starts from, which knows the base, and of each
    task's training rows as the model is shown them."""
    body = {**candidate.recipe(), "versions": ROOT_VERSIONS, "rows": list(rows)}
    return Recipe("merged", 1, body, (reference,))


def task_mask_recipe(candidate: Candidate, merged: str, expert: str) -> Recipe:
    """A task's mask is a function of the unified adapter and of the task's expert."""
    versions = {"mask": PER_TASK_VERSION, "file": MASK_FILE_VERSION}
    return Recipe("task_mask", 1, {**candidate.recipe(), "versions": versions}, (merged, expert))


def checkpoint_recipe(merged_digest: str, base_sha256: str, dtype: str, shard_bytes: int) -> Recipe:
    """A full checkpoint is a function of the bytes of base and merged adapter, its dtype and the size of its shards."""
    body = {"merged": merged_digest, "base": base_sha256, "dtype": dtype, "shard_bytes": shard_bytes}
    return Recipe("checkpoint", CHECKPOINT_VERSION, body)
