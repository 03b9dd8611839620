"""The real stack (SeaweedFS, MLflow, Ray), started once for all tests, beside whatever else runs on this machine."""

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from infra.stack import services
from infra.store import s3
from infra.store.client import make_client
from infra.store.s3 import Store
from tests.memory_s3 import BUCKET, MemoryS3

settings.register_profile("shared machine", deadline=None)  # an example may be interrupted for seconds
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.StackState]:
    """A running stack in a home of its own, its variables in ``os.environ``; taken down whatever happens.

    One slot: two processes of pytest share this machine's cores, and every worker costs seconds of imports. What needs
    several slots is tested on a cluster (tests/e2e/test_cluster.py).
    """
    home = tmp_path_factory.mktemp("stack")
    patch = pytest.MonkeyPatch()
    try:
        state = services.up(home, num_cpus=1, object_store_mib=256)
        for name, value in state.env().items():
            patch.setenv(name, value)
        yield state
    finally:
        patch.undo()
        services.down(home)


@pytest.fixture
def real_store(stack: services.StackState) -> Store:
    """A fresh prefix in the stack's object store."""
    return Store(os.environ["FACTORY_S3_BUCKET"], os.environ["FACTORY_S3_ENDPOINT"], f"tests/{uuid.uuid4().hex}")


@pytest.fixture
def store(real_store: Store) -> Store:
    """The store of a test. Where no server is needed, a folder's or file's own `store` is `store_in_memory`."""
    return real_store


MEMORY = "http://memory.invalid"
"""The endpoint of `store_in_memory`."""


@pytest.fixture
def store_in_memory(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of this process alone, for tests that are about something else; its copies, pickled too, see the same
    objects."""
    client = MemoryS3()

    def connected(endpoint: str | None, *arguments: Any, **named: Any) -> Any:
        return client if endpoint == MEMORY else make_client(endpoint, *arguments, **named)

    monkeypatch.setattr(s3, "make_client", connected)
    return Store(BUCKET, MEMORY, f"tests/{uuid.uuid4().hex}")
