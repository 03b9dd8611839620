"""Where unfinished trainings are kept: `checkpoints/<key>.json` in the object store names the last state's object.

The state goes to a name of its own, then the pointer is replaced, then the state before is deleted: whenever a worker
is lost, the pointer names a complete state. Two attempts at one key may overwrite each other's pointer; both states are
valid. A state that cannot be read is ignored, which costs its steps and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from pathlib import Path

from infra.errors import FactoryError, StoreError
from infra.store.layout import new_state, state_pointer
from infra.store.s3 import FileRef, Store
from workers.training.state import TrainState, read_state, write_state


def _saved(store: Store, key: str) -> FileRef | None:
    found = store.get_with_etag(state_pointer(key))
    if found is None:
        return None
    try:
        body = json.loads(found[0])
        return FileRef(str(body["name"]), str(body["sha256"]), int(body["size"]))
    except (ValueError, KeyError, TypeError):
        return None


def save_checkpoint(store: Store, key: str, state: TrainState) -> None:
    """Keep `state` as the last one of the recipe `key`. StoreError if the store cannot be written."""
    before = _saved(store, key)
    with tempfile.TemporaryDirectory(prefix="factory-checkpoint-") as folder:
        file = Path(folder) / "state.safetensors"
        write_state(state, file)
        ref = store.upload_file(new_state(key, state.step), file)
    store.put(state_pointer(key), json.dumps({"name": ref.name, "sha256": ref.sha256, "size": ref.size}).encode())
    if before is not None:
        with contextlib.suppress(FactoryError):
            store.delete(before.name)


def keep_state(store: Store, name: str, key: str, state: TrainState) -> None:
    """`save_checkpoint` if the store takes it: training does not depend on it. `name`: for the log."""
    try:
        save_checkpoint(store, key, state)
    except StoreError as error:
        logging.getLogger(__name__).warning(
            "%s: the state after step %d could not be saved: %s", name, state.step, error
        )


def find_checkpoint(store: Store, key: str) -> TrainState | None:
    """The last state of the recipe `key`, its bytes verified; None if there is none that can be read."""
    ref = _saved(store, key)
    if ref is None:
        return None
    with tempfile.TemporaryDirectory(prefix="factory-checkpoint-") as folder:
        file = Path(folder) / "state.safetensors"
        try:
            store.download_file(ref, file)
            return read_state(file)
        except FactoryError:
            return None


def drop_checkpoint(store: Store, key: str) -> None:
    """Forget the recipe's state: its artifact exists. What cannot be deleted now is only bytes."""
    with contextlib.suppress(FactoryError):
        ref = _saved(store, key)
        if ref is not None:
            store.delete(state_pointer(key))
            store.delete(ref.name)
