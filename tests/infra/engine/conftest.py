"""Engines are about who works on what: a store in memory will do."""

import pytest

from infra.store.s3 import Store


@pytest.fixture
def store(store_in_memory: Store) -> Store:
    """In memory."""
    return store_in_memory
