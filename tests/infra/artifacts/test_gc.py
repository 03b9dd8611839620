"""Collections of a real store: what goes, and what happens to whoever reads, publishes or is killed meanwhile."""

import contextlib
import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.artifacts import announcements, gc
from infra.artifacts.announcements import LEASE, Registered, RootReader, announce, await_removals
from infra.artifacts.gc import GcOutcome, execute, links_of, plan_collection, take_inventory
from infra.artifacts.gc_plan import GcPlan, Links, Roots, plan_gc
from infra.artifacts.leases import Holder, Lease, Watcher, holding, try_acquire
from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.errors import StoreError
from infra.store.admin import list_uploads
from infra.store.layout import SHARED_JOURNALS, lease_name, manifest_name
from infra.store.s3 import Store

USED, KEPT, GONE = "1" * 64, "2" * 64, "3" * 64


def roots(*keys: str, runs: tuple[str, ...] = ()) -> Roots:
    return Roots(frozenset(keys), frozenset(runs))


def made(store: Store, folder: Path, letter: str, *inputs: Manifest, uses: str = "") -> Manifest:
    path = folder / letter
    path.write_bytes(letter.encode())
    recipe = Recipe("test", 1, {"name": letter, "rows": {"train": uses}}, tuple(found.key for found in inputs))
    return publish(store, recipe, {"w": path}, {found.key: found.digest for found in inputs}, {"ä": "ö"})[0]


def plan_later(store: Store, kept: Roots) -> GcPlan:
    """The plan two days from now."""
    inventory = take_inventory(store)
    return plan_gc(kept, dataclasses.replace(inventory, now=inventory.now + timedelta(days=2)))


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, time flies for those who watch leases, and for nobody who holds one."""

    class Hurried(Watcher):
        def __init__(self, expiry_s: float) -> None:
            looks = itertools.count()
            super().__init__(expiry_s, clock=lambda: next(looks) * expiry_s)

    def call() -> None:
        for module in (gc, announcements):
            monkeypatch.setattr(module, "Watcher", Hurried)
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))

    return call


def names(store: Store) -> set[str]:
    return set(store.list())


def of(*manifests: Manifest) -> set[str]:
    return {name for m in manifests for name in (manifest_name(m.key), *(ref.name for ref in m.files.values()))}


def test_only_what_nothing_reaches_goes(store: Store, tmp_path: Path) -> None:
    a = made(store, tmp_path, "a", uses=USED)
    b = made(store, tmp_path, "b", a)
    c, d = made(store, tmp_path, "c"), made(store, tmp_path, "d", uses=GONE)
    begun = Recipe("test", 1, {"name": "begun"}).key
    for name in (
        f"objects/{b.key}/lost/w", f"objects/{begun}/x/w", f"checkpoints/{b.key}.json", f"checkpoints/{begun}.json",
        f"checkpoints/{begun}/1-x", lease_name(d.key), "runs/kept/keys.json", "runs/gone/keys.json",
        *(f"bases/{used}/{name}" for used in (KEPT, GONE) for name in ("index.json", "model.safetensors")),
        *(f"data/{used}.jsonl" for used in (USED, GONE)), "checks/x",
        "artifacts/README", "schedules/nightly.json", "merges/by-hand.safetensors", "data/README",
    ):  # fmt: skip
        store.put(name, b"{}")
    s3, where = store._client(), {"Bucket": store.bucket, "Key": store._key(f"objects/{begun}/y/w")}
    s3.upload_part(**where, UploadId=s3.create_multipart_upload(**where)["UploadId"], PartNumber=1, Body=b"123")
    before = names(store)

    kept = roots(b.key, begun, KEPT, runs=("kept",))
    assert plan_collection(store, lambda: kept).removals == ()  # all is young
    plan = plan_later(store, kept)
    assert names(store) == before  # to plan is to look only

    done = execute(store, plan, lambda: kept)
    assert before - names(store) == of(c, d) | {
        f"objects/{b.key}/lost/w", f"objects/{begun}/x/w", f"checkpoints/{b.key}.json", lease_name(d.key),
        "runs/gone/keys.json", f"data/{GONE}.jsonl", f"bases/{GONE}/index.json", f"bases/{GONE}/model.safetensors",
        "checks/x",
    }  # fmt: skip
    assert names(store) <= before
    assert list(list_uploads(store)) == []
    assert done.removed == {
        "artifact": 2, "orphan": 2, "checkpoint": 1, "lease": 1, "upload": 1, "run": 1, "rows": 1, "base": 1, "probe": 1
    }  # fmt: skip
    assert (done.size, done.skipped, done.restored) == (plan.size, 0, 0)
    assert find(store, b.key, {a.key: a.digest}) == b
    assert plan_later(store, kept).removals == ()


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff"])
def test_a_damaged_journal_is_named(store: Store, tmp_path: Path, damage: bytes) -> None:
    made(store, tmp_path, "a")
    store.put("gc/broken.json", damage)
    with pytest.raises(StoreError, match=r"gc/broken.json, what an interrupted collection.*delete the object"):
        execute(store, plan_later(store, roots()), roots)
    store.put("gc/shared-broken.json", damage)
    if damage != b"[1]":  # that is a list
        with pytest.raises(StoreError, match=r"gc/shared-broken.json is damaged"):
            await_removals(store, {USED})


# -- races -------------------------------------------------------------------------------------------------------


def test_a_run_that_announced_itself_meanwhile_keeps_what_it_found(store: Store, tmp_path: Path) -> None:
    a = made(store, tmp_path, "a")
    b = made(store, tmp_path, "b", a)
    c = made(store, tmp_path, "c")
    plan = plan_later(store, roots())
    seen: list[bool] = []

    def again() -> Roots:
        seen.append(find(store, b.key, {a.key: a.digest}) is None)
        return roots(b.key)

    done = execute(store, plan, again)
    assert seen[0]  # for a moment it was absent, so a run that looked then would have made it again
    assert find(store, b.key, {a.key: a.digest}) == b
    assert find(store, a.key, {}) == a
    assert names(store) == of(a, b)
    assert (done.restored, done.skipped, done.removed["artifact"]) == (2, 2, 1)
    assert find(store, c.key, {}) is None


def test_a_version_registered_meanwhile_keeps_its_artifact_its_heads_and_its_base(store: Store, tmp_path: Path) -> None:
    head = made(store, tmp_path, "head")
    merged = made(store, tmp_path, "merged", uses=USED)
    lost = [f"objects/{head.key}/replaced/w", f"objects/{head.key}/lost/w"]
    base, rows = f"bases/{KEPT}/index.json", f"data/{USED}.jsonl"
    for name in (*lost, base, rows, f"data/{GONE}.jsonl"):
        store.put(name, b"{}")
    plan = plan_later(store, roots())
    assert {removal.kind for removal in plan.removals} == {"artifact", "orphan", "base", "rows"}
    registered = Roots(frozenset({merged.key, KEPT}), frozenset(), frozenset({f"objects/{head.key}/replaced"}))
    done = execute(store, plan, lambda: registered)
    assert names(store) == of(head, merged) | {lost[0], base, rows}
    assert find(store, merged.key, {}) == merged
    assert (done.restored, done.removed["orphan"], done.removed["rows"], done.removed["base"]) == (2, 1, 1, 0)


def test_who_makes_it_again_meanwhile_keeps_the_new_one(store: Store, tmp_path: Path) -> None:
    old = made(store, tmp_path, "a")
    new: list[Manifest] = []

    def again() -> Roots:
        if not new:
            new.append(made(store, tmp_path, "a"))
        return roots()

    execute(store, plan_later(store, roots()), again)
    assert find(store, old.key, {}) == new[0]
    assert new[0].files != old.files
    assert names(store) == of(new[0])


def test_what_changed_since_the_plan_stays(store: Store, tmp_path: Path) -> None:
    a = made(store, tmp_path, "a")
    late = Recipe("test", 1, {"name": "late"})
    data = f"objects/{late.key}/x/w"
    for name in (data, f"checkpoints/{late.key}.json", f"checkpoints/{late.key}/1-x", "runs/back/keys.json"):
        store.put(name, b"1")
    lease = try_acquire(store, "k", "alice")
    assert lease is not None
    plan = plan_later(store, roots())
    assert len(plan.removals) == 5

    store.delete(a.files["w"].name)
    replaced = made(store, tmp_path, "a")  # unusable, so another attempt's manifest takes its place
    body = {"key": late.key, "inputs": {}, "files": {"w": {"name": data}}}
    store.put(manifest_name(late.key), json.dumps(body).encode())
    store.put(f"checkpoints/{late.key}.json", b"2")
    lease.beat()
    before = names(store)
    done = execute(store, plan, lambda: roots(runs=("back",)))
    assert names(store) == before
    assert done.skipped == 5
    assert find(store, a.key, {}) == replaced


def test_a_state_that_a_new_run_plans_to_use_stays(store: Store) -> None:
    key = Recipe("test", 1, {}).key
    store.put(f"checkpoints/{key}.json", b"1")
    plan = plan_later(store, roots())
    assert execute(store, plan, lambda: roots(key)).skipped == 1
    assert execute(store, plan, roots).removed["checkpoint"] == 1
    assert names(store) == set()


def shared(store: Store) -> list[str]:
    """Rows and a base that nothing needs."""
    found = [f"data/{USED}.jsonl", f"bases/{KEPT}/index.json", f"bases/{KEPT}/model.safetensors"]
    for name in found:
        store.put(name, b"{}")
    return found


def test_rows_and_bases_that_a_run_announced_meanwhile_stay(store: Store) -> None:
    kept = shared(store)
    store.put(f"data/{GONE}.jsonl", b"{}")
    reader = RootReader(store, lambda: Registered(lambda *_: True))
    plan = plan_later(store, reader())
    seen: list[set[str]] = []

    def again() -> Roots:  # the run comes in the last moment: after the list was written, before the roots are read
        seen.append({name for name in names(store) if name.startswith(SHARED_JOURNALS)})
        announce(store, "late", {USED, KEPT})
        return reader()

    done = execute(store, plan, again)
    assert len(seen[-1]) == 1
    assert names(store) == {*kept, "runs/late/keys.json"}
    assert (done.removed["rows"], done.removed["base"], done.skipped) == (1, 0, 2)


def test_a_run_waits_for_a_collection_that_is_removing_its_rows(store: Store) -> None:
    shared(store)
    plan = plan_later(store, roots())
    began, goes_on, waited = threading.Event(), threading.Event(), threading.Event()

    def again() -> Roots:
        began.set()
        assert goes_on.wait(30)
        return roots()  # read before the run announced anything

    def run() -> None:
        assert began.wait(30)
        announce(store, "late", {USED, KEPT})
        await_removals(store, {"f" * 64})  # what others lose is no reason to wait
        threading.Timer(0.5, goes_on.set).start()
        await_removals(store, {USED, KEPT})
        assert goes_on.is_set()
        assert not [name for name in names(store) if name.startswith(("data/", "bases/", SHARED_JOURNALS))]
        waited.set()

    thread = threading.Thread(target=run)
    thread.start()
    done = execute(store, plan, again)
    thread.join(30)
    assert waited.is_set()
    assert (done.removed["rows"], done.removed["base"]) == (1, 1)


def test_nobody_waits_for_a_collection_that_was_killed(store: Store, hurry: Callable[[], None]) -> None:
    hurry()
    store.put(f"{SHARED_JOURNALS}x.json", json.dumps([USED]).encode())
    await_removals(store, {USED})  # there is no lease
    store.put(lease_name(LEASE), Holder("killed", "there", 1, 0.0).to_json())
    await_removals(store, {USED})  # nobody renews it
    execute(store, plan_later(store, roots()), roots)
    assert names(store) == set()


# -- accidents ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


class Dying(Store):
    """Lives for a number of deletions, then cannot do anything any more."""

    left = 0

    def delete(self, name: str) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        super().delete(name)


@pytest.mark.parametrize("left", [0, 1])
def test_a_collection_that_was_killed_is_undone_by_the_next(store: Store, tmp_path: Path, left: int) -> None:
    a = made(store, tmp_path, "a")
    plan = plan_later(store, roots())
    dying = Dying(store.bucket, store.endpoint, store.prefix)
    dying.left = left
    with pytest.raises(Killed):
        execute(dying, plan, roots)
    assert find(store, a.key, {}) is None  # no manifest is left that has no data
    assert [name for name in names(store) if name.startswith("gc/")]

    done = execute(store, plan_later(store, roots(a.key)), lambda: roots(a.key))
    assert not [name for name in names(store) if name.startswith("gc/")]
    if left == 0:  # its data are whole
        assert done.restored == 1
        assert find(store, a.key, {}) == a
    else:
        assert done.restored == 0
        assert names(store) == set()


def test_when_the_roots_cannot_be_read_again_everything_comes_back(store: Store, tmp_path: Path) -> None:
    a = made(store, tmp_path, "a")

    def fail() -> Roots:
        raise StoreError("the registry is down")

    with pytest.raises(StoreError, match="registry"):
        execute(store, plan_later(store, roots()), fail)
    assert names(store) == of(a)


def test_one_collection_at_a_time(store: Store, tmp_path: Path, hurry: Callable[[], None]) -> None:
    a = made(store, tmp_path, "a")
    plan = plan_later(store, roots())
    with holding(store, LEASE, beat_s=0.05), pytest.raises(StoreError, match="another garbage collection"):
        execute(store, plan, roots, expiry_s=1.0)
    assert names(store) == of(a)
    store.put(lease_name(LEASE), Holder("killed", "there", 1, 0.0).to_json())  # nobody renews it
    hurry()
    assert execute(store, plan, roots).removed["artifact"] == 1
    assert names(store) == set()


def test_two_collections_of_one_plan_remove_everything_once(store: Store, tmp_path: Path) -> None:
    kept, *others = (made(store, tmp_path, str(number)) for number in range(40))
    plan = plan_later(store, roots(kept.key))
    together = threading.Barrier(2)

    def run(_: int) -> GcOutcome:
        together.wait(30)
        return execute(store, plan, lambda: roots(kept.key), expiry_s=6.0)

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, number) for number in range(2)]
    refused = [error for each in both if (error := each.exception()) is not None]
    assert all("another garbage collection" in str(error) for error in refused)
    done = [each.result() for each in both if each.exception() is None]
    assert sum(outcome.removed["artifact"] for outcome in done) == len(others)
    assert names(store) == of(kept)


def test_a_collection_that_lost_its_lease_stops_and_undoes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Lease] = []

    @contextlib.contextmanager
    def kept(*given: Any) -> Iterator[Lease | None]:
        with holding(*given) as lease:
            held.extend([lease] if lease else [])
            yield lease

    monkeypatch.setattr(gc, "holding", kept)
    a = made(store, tmp_path, "a")
    b = made(store, tmp_path, "b")
    plan = plan_later(store, roots())

    def lose() -> Roots:
        found = store.get_with_etag(lease_name(LEASE))
        assert found is not None
        assert try_acquire(store, LEASE, "other", found[1]) is not None
        assert not held[0].beat()
        return roots()

    with pytest.raises(StoreError, match="lost its lease"):
        execute(store, plan, lose)
    assert names(store) == of(a, b) | {lease_name(LEASE)}


def test_links_are_read_leniently_and_never_lead_elsewhere() -> None:
    body = {"inputs": {"i": "d"}, "files": {"w": {"name": "objects/k/x/w"}, "v": {"name": "bases/x"}}, "kind": "node"}
    assert links_of("k", json.dumps(body).encode()) == Links(frozenset("i"), frozenset({"objects/k/x/w"}), "node")
    for bad in (b"", b"[]", b'{"inputs": {}}', b'{"inputs": {}, "files": {"w": {}}}', b"\xff"):
        assert links_of("k", bad) is None
