"""The real stack (SeaweedFS, MLflow, Ray), started once for all tests, beside whatever else runs on this machine."""

import os
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from infra.stack import services as local_stack
from infra.store.s3 import Store

settings.register_profile("shared machine", deadline=None)  # an example may be interrupted for seconds
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local_stack.StackState]:
    """A running stack in a home of its own, its variables in ``os.environ``; taken down whatever happens.

    One slot: two processes of pytest share this machine's cores, and every worker costs seconds of imports. What needs
    several slots is tested on a cluster (tests/e2e/test_cluster.py).
    """
    home = tmp_path_factory.mktemp("stack")
    patch = pytest.MonkeyPatch()
    try:
        state = local_stack.up(home, num_cpus=1, object_store_mib=256)
        for name, value in state.env().items():
            patch.setenv(name, value)
        yield state
    finally:
        patch.undo()
        local_stack.down(home)


@pytest.fixture
def store(stack: local_stack.StackState) -> Store:
    """A fresh prefix in the stack's object store."""
    return Store(os.environ["FACTORY_S3_BUCKET"], os.environ["FACTORY_S3_ENDPOINT"], f"tests/{uuid.uuid4().hex}")
