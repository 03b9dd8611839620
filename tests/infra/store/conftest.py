"""What a store promises, promised by the real one and by the one in memory that other tests use in its place."""

import pytest

from infra.store.s3 import Store


@pytest.fixture(params=["real", "in memory"])
def store(request: pytest.FixtureRequest) -> Store:
    """The store under test."""
    return request.getfixturevalue("real_store" if request.param == "real" else "store_in_memory")
