"""A snapshot answers as the store did when it was first asked, and asks for each object once."""

from pathlib import Path

import pytest

from infra.artifacts.manifests import Manifest, Recipe, find, peek, publish
from infra.artifacts.snapshot import Snapshot
from infra.store.s3 import ObjectInfo, Store


class Counted:
    """A store that counts its readers' requests."""

    def __init__(self, store: Store) -> None:
        self._store, self.asked = store, 0

    def get_with_etag(self, name: str) -> tuple[bytes, str] | None:
        self.asked += 1
        return self._store.get_with_etag(name)

    def head(self, name: str) -> ObjectInfo | None:
        self.asked += 1
        return self._store.head(name)


@pytest.fixture
def made(store: Store, tmp_path: Path) -> list[Manifest]:
    found = []
    for number in range(5):
        file = tmp_path / "data"
        file.write_text(str(number))
        found.append(publish(store, Recipe("thing", 1, {"number": number}), {"data": file}, {}, {})[0])
    return found


def test_finding_in_a_snapshot_is_finding_in_its_store(store: Store, made: list[Manifest]) -> None:
    counted = Counted(store)
    snapshot = Snapshot(counted)
    missing = Recipe("thing", 1, {"number": 9}).key
    keys = [manifest.key for manifest in made]
    snapshot.read_ahead([*keys, missing, *keys])
    assert counted.asked == 2 * len(keys) + 1
    assert [find(snapshot, key, {}) for key in keys] == made
    assert find(snapshot, missing, {}) is None
    assert find(snapshot, keys[0], {"0" * 64: "another input"}) is None
    assert [snapshot.holds(key) for key in (keys[0], missing)] == [True, False]
    assert counted.asked == 2 * len(keys) + 1


def test_what_a_listing_lacks_is_not_asked_for(store: Store, made: list[Manifest]) -> None:
    counted, missing = Counted(store), Recipe("thing", 1, {"number": 9}).key
    snapshot = Snapshot(counted, listed=frozenset(store.list("artifacts/")))
    snapshot.read_ahead([*(manifest.key for manifest in made), missing])
    assert counted.asked == 2 * len(made)
    assert [find(snapshot, manifest.key, {}) for manifest in made] == made
    assert find(snapshot, missing, {}) is None
    assert not snapshot.holds(missing)


def test_what_happens_later_is_not_seen(store: Store, made: list[Manifest]) -> None:
    snapshot, later = Snapshot(store), Recipe("thing", 1, {"number": 1}).key
    snapshot.read_ahead([later])
    store.delete(made[1].files["data"].name)
    assert find(snapshot, later, {}) == made[1]
    assert find(Snapshot(store), later, {}) is None


def test_a_manifest_that_is_none_is_held_and_of_no_use(store: Store, made: list[Manifest]) -> None:
    store.put(f"artifacts/{made[0].key}.json", b"{}")
    snapshot = Snapshot(store)
    snapshot.read_ahead([made[0].key])
    assert snapshot.holds(made[0].key)
    assert find(snapshot, made[0].key, {}) is None
    assert peek(snapshot, made[0].key) is None
    assert peek(snapshot, made[1].key) == made[1]
