"""A store as somebody saw it who asks for many artifacts at once: answers are kept, so that all are of one moment.

`infra.artifacts.manifests.find` takes a snapshot where it takes a store. Reading ahead asks in parallel what finding
would ask one request after the other. Does not cover writing, nor noticing what others publish afterwards.
"""

import contextlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from infra.artifacts.manifests import Manifest, Readable
from infra.errors import StoreError
from infra.store.layout import manifest_name
from infra.store.s3 import ObjectInfo


class Snapshot:
    """Manifests, and whether their files are there. Names that were not read ahead are asked for when needed."""

    def __init__(self, store: Readable, threads: int = 16, listed: Collection[str] | None = None) -> None:
        """`listed`: names of all manifests, where somebody has them; what is not among them is not asked for."""
        self._store, self._threads, self._listed = store, threads, listed
        self._objects: dict[str, tuple[bytes, str] | None] = {}
        self._infos: dict[str, ObjectInfo | None] = {}

    def read_ahead(self, keys: Iterable[str]) -> None:
        """Ask for the manifests of these keys and for their files, concurrently. Raises StoreError."""
        names = [name for name in map(manifest_name, dict.fromkeys(keys)) if name not in self._objects]
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(self._read, names))

    def _read(self, name: str) -> None:
        found = self.get_with_etag(name)
        if found is not None:
            with contextlib.suppress(StoreError):  # not a manifest: `find` says so
                for ref in Manifest.from_json(found[0]).files.values():
                    self.head(ref.name)

    def holds(self, key: str) -> bool:
        """Whether there is a manifest of this key, usable or not. Raises StoreError."""
        return self.get_with_etag(manifest_name(key)) is not None

    def get_with_etag(self, name: str) -> tuple[bytes, str] | None:
        """As `infra.store.s3.Store.get_with_etag`."""
        if name not in self._objects:
            absent = self._listed is not None and name not in self._listed
            self._objects[name] = None if absent else self._store.get_with_etag(name)
        return self._objects[name]

    def head(self, name: str) -> ObjectInfo | None:
        """As `infra.store.s3.Store.head`."""
        if name not in self._infos:
            self._infos[name] = self._store.head(name)
        return self._infos[name]
