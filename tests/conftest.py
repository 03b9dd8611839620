"""The real stack (SeaweedFS, MLflow, Ray), started once for all tests, beside whatever else runs on this machine. Each
service starts with the first test that asks for it."""

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
    """S3 and MLflow in a home of their own, their variables in ``os.environ``; taken down whatever happens.

    Its Ray is there for tests that ask for `ray_stack`. A head that nobody uses costs 20 s of a core to start, and a
    twelfth of a core as long as it lives.
    """
    home = tmp_path_factory.mktemp("stack")
    patch = pytest.MonkeyPatch()
    try:
        state = services.up(home, only=("s3", "mlflow"))
        for name, value in state.env().items():
            patch.setenv(name, value)
        for name in RAY_ADDRESSES:
            patch.delenv(name)
        yield state
    finally:
        patch.undo()
        services.down(home)


RAY_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@pytest.fixture(scope="session")
def ray_head(stack: services.StackState) -> services.StackState:
    """The stack with its Ray, whose address is in no variable.

    One slot: two processes of pytest share this machine's cores, and every worker costs seconds of imports. What needs
    several slots is tested on a cluster (tests/e2e/test_cluster.py).
    """
    return services.up(stack.home, num_cpus=1, object_store_mib=256)


@pytest.fixture
def ray_stack(ray_head: services.StackState, monkeypatch: pytest.MonkeyPatch) -> services.StackState:
    """The stack with its Ray, for a test that starts runs there."""
    for name in RAY_ADDRESSES:
        monkeypatch.setenv(name, ray_head.env()[name])
    return ray_head


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
