"""Collections are asked for by a command, which finds the stack's own store."""

import pytest

from infra.store.s3 import Store


@pytest.fixture
def store(real_store: Store) -> Store:
    """The stack's."""
    return real_store
