"""Merges by hand name their files by address: the stack's own store."""

import pytest

from infra.store.s3 import Store


@pytest.fixture
def store(real_store: Store) -> Store:
    """The stack's."""
    return real_store
