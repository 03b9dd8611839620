"""The reduction tree: the radix trie of SHA-256(expert name).

An expert's place depends on its name alone, so that a retrained expert keeps its leaf and an expert that comes or goes
changes only the nodes between its leaf and the root. The radix is the fan-in; nodes with a single child are collapsed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from infra.errors import MergeError

TREE_VERSION = 1
"""Raise it when the same names give another tree."""

DEFAULT_FAN_IN: Literal[16] = 16
FAN_INS = (2, 4, 8, 16)
"""Accepted fan-ins: one digit of the digest is 1, 2, 3 or 4 bits."""

_DIGEST_BITS = 256


@dataclass(frozen=True)
class Leaf:
    """One expert."""

    name: str


@dataclass(frozen=True)
class Node:
    """One combine. `label` is the digits that all experts below share (one hexadecimal character a digit)."""

    label: str
    children: tuple[Node | Leaf, ...]


def digits(name: str, fan_in: int) -> str:
    """The digits of SHA-256(name) in base `fan_in`, most significant first, one hexadecimal character a digit."""
    bits = fan_in.bit_length() - 1
    value = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    count = -(-_DIGEST_BITS // bits)
    value <<= count * bits - _DIGEST_BITS
    return "".join(f"{(value >> bits * i) & (fan_in - 1):x}" for i in reversed(range(count)))


def build_tree(names: Sequence[str], fan_in: int) -> Node:
    """The trie of these names; the order of `names` does not matter.

    The root is a Node even for one name. Raises MergeError for no names, duplicates, or an unsupported fan-in.
    """
    if fan_in not in FAN_INS:
        raise MergeError(f"fan-in of the merge tree is {fan_in}; accepted: {', '.join(map(str, FAN_INS))}")
    if not names:
        raise MergeError("no experts to merge: the list of names is empty")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise MergeError(f"expert name {name!r} appears twice in one merge; names must be unique")
        seen.add(name)
    keyed = sorted((digits(name, fan_in), name) for name in names)
    tree = _build(keyed, 0)
    return tree if isinstance(tree, Node) else Node("", (tree,))


def _build(keyed: list[tuple[str, str]], depth: int) -> Node | Leaf:
    """The subtree of sorted (digits, name) pairs that agree on their first `depth` digits."""
    if len(keyed) == 1:
        return Leaf(keyed[0][1])
    first, last = keyed[0][0], keyed[-1][0]
    while first[depth] == last[depth]:
        depth += 1
    children = []
    start = 0
    for end in range(1, len(keyed) + 1):
        if end == len(keyed) or keyed[end][0][depth] != keyed[start][0][depth]:
            children.append(_build(keyed[start:end], depth + 1))
            start = end
    return Node(first[:depth], tuple(children))


def post_order(root: Node) -> list[Node]:
    """All nodes, children before their parents, the root last."""
    found: list[Node] = []
    for child in root.children:
        if isinstance(child, Node):
            found.extend(post_order(child))
    found.append(root)
    return found


def leaf_names(tree: Node | Leaf) -> list[str]:
    """The experts below, in the order in which they are combined."""
    if isinstance(tree, Leaf):
        return [tree.name]
    return [name for child in tree.children for name in leaf_names(child)]


def path_to(root: Node, name: str) -> list[Node]:
    """The nodes that change when expert `name` does, from the root down. Raises MergeError for an unknown name."""
    for child in root.children:
        if isinstance(child, Leaf):
            if child.name == name:
                return [root]
        elif name in leaf_names(child):
            return [root, *path_to(child, name)]
    raise MergeError(f"no expert named {name!r} in this tree")
