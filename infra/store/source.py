"""An object of the store as a source of byte ranges, for readers that fetch single tensors out of a large file."""

from __future__ import annotations

from infra.store.errors import ObjectMissing
from infra.store.s3 import Store


class StoreSource:
    """Ranged reads of one object.

    Attributes: ``size``, the object's size in bytes. Raises ObjectMissing on creation if there is no such object.
    """

    def __init__(self, store: Store, name: str, size: int | None = None) -> None:
        self._store, self._name = store, name
        if size is None:
            info = store.head(name)
            if info is None:
                raise ObjectMissing(
                    f"no such object: {store.uri(name)} at {store.endpoint or 'the default AWS endpoint'}"
                )
            size = info.size
        self.size = size

    def __str__(self) -> str:
        return self._store.uri(self._name)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``. Raises StoreError outside the object."""
        return self._store.get_range(self._name, offset, length)
