"""Licences of a merge, from the manifests of what it was made from, those of older versions among them."""

import hashlib
from pathlib import Path
from typing import Any

from infra.artifacts.manifests import Recipe, publish
from infra.store.s3 import Store
from merge.tree.licences import licences_of


def test_licences_are_those_of_experts_and_merges(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"bytes")

    def made(kind: str, number: int, meta: dict[str, Any]) -> str:
        return publish(store, Recipe(kind, 1, {"number": number}), {"adapter": file}, {}, meta)[0].key

    def expert(number: int, base: str, data: str) -> str:
        meta = {"base": {"name": "b", "license": base}, "data": {"source": "s", "license": data}}
        return made("expert", number, meta)

    first, second, third = expert(1, "mit", "cc0"), expert(2, "mit", "apache-2.0"), expert(3, "mit", "cc0")
    assert licences_of(store, [first, second, third]) == {"base": ["mit"], "data": ["apache-2.0", "cc0"]}
    older = made("expert", 4, {"task": "t"})
    fisher = made("fisher", 5, {"task": "t"})
    assert licences_of(store, [first, older, fisher]) == {"base": ["mit", "not stated"], "data": ["cc0", "not stated"]}
    merged = made("merged", 6, {"licenses": {"base": ["mit"], "data": ["cc0", "gpl-3.0"]}})
    assert licences_of(store, [merged]) == {"base": ["mit"], "data": ["cc0", "gpl-3.0"]}
    assert licences_of(store, [made("merged", 7, {})]) == {"base": [], "data": []}
    node = made("node", 8, {"licenses": {"base": ["mit"], "data": ["cc-by-4.0"]}})
    assert licences_of(store, [node, third]) == {"base": ["mit"], "data": ["cc-by-4.0", "cc0"]}
    assert licences_of(store, [made("node", 9, {})]) == {"base": ["not stated"], "data": ["not stated"]}
    unknown = hashlib.sha256(b"no artifact").hexdigest()
    assert licences_of(store, [unknown]) == {"base": ["not stated"], "data": ["not stated"]}
