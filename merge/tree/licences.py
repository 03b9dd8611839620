"""Licences of what a merge, a node or a mask was made from, by its inputs' manifests. Notes, no part of a key."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from infra.artifacts.manifests import Manifest, peek
from infra.store.s3 import Store

NOT_STATED = "not stated"
_READERS = 16


def licences_of(store: Store, keys: Iterable[str]) -> dict[str, list[str]]:
    """``base`` and ``data``: the licences, each once and sorted, of experts, merges and nodes among these artifacts.

    An expert or node without a readable manifest, or whose manifest is older than the field, is ``not stated``. Raises
    StoreError if the store does not answer.
    """
    found: dict[str, set[str]] = {"base": set(), "data": set()}
    with ThreadPoolExecutor(_READERS) as pool:
        for manifest in pool.map(lambda key: peek(store, key), keys):
            if manifest is not None and manifest.kind in ("merged", "refined", "node"):
                older = {what: [NOT_STATED] for what in found} if manifest.kind == "node" else {}
                for what, names in manifest.meta.get("licenses", older).items():
                    found[what].update(names)
            elif manifest is None or manifest.kind == "expert":
                for what, names in found.items():
                    names.add(_stated(manifest, what))
    return {what: sorted(names) for what, names in found.items()}


def _stated(expert: Manifest | None, what: str) -> str:
    stated = expert.meta.get(what) if expert else None
    return str(stated.get("license") or NOT_STATED) if isinstance(stated, dict) else NOT_STATED
