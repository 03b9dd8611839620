"""Claims against a real store: all keys or none, and takeover."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts.claims import Busy, Claim, claimed, release_claims, under_claim
from infra.artifacts.leases import Holder, Watcher, holding, new_owner, try_acquire
from infra.errors import StoreError
from infra.store.layout import lease_name
from infra.store.s3 import Store

ROOT = Path(__file__).resolve().parents[3]


def state(store: Store, key: str) -> str:
    return Watcher().observe(store, key).state


# -- claims ------------------------------------------------------------------------------------------------------


def test_the_same_claim_takes_over_at_once_and_no_other(store: Store) -> None:
    lost = try_acquire(store, "k", new_owner(), claim="mine")
    assert lost is not None
    assert try_acquire(store, "k", new_owner(), claim="other") is None
    assert try_acquire(store, "k", new_owner()) is None
    again = try_acquire(store, "k", new_owner(), claim="mine")
    assert again is not None
    assert not lost.beat()
    assert again.beat()


def test_no_claim_is_nobodys(store: Store) -> None:
    assert try_acquire(store, "k", new_owner()) is not None
    assert try_acquire(store, "k", new_owner(), claim="") is None


def test_a_lease_written_before_there_were_claims_is_read(store: Store) -> None:
    store.put(lease_name("k"), b'{"beat": 3, "host": "there", "owner": "alice", "pid": 1, "started": 0.0}')
    seen = Watcher().observe(store, "k")
    assert seen.state == "live"
    assert seen.holder == Holder("alice", "there", 1, 0.0, 3)


def test_a_longer_expiry_than_the_observers_is_respected(store: Store) -> None:
    now = [0.0]
    watcher = Watcher(3.0, lambda: now[0])
    assert try_acquire(store, "k", new_owner(), expiry_s=30.0) is not None

    def look() -> str:
        now[0] += 1.0
        return watcher.observe(store, "k").state

    assert [look() for _ in range(31)] == ["live"] * 31
    assert look() == "expired"


def test_all_keys_or_none(store: Store) -> None:
    with holding(store, "b"), claimed(store, Claim(("c", "b", "a"))) as busy:
        assert busy == Busy("b")
        assert [state(store, key) for key in "abc"] == ["free", "live", "free"]
    with claimed(store, Claim(("c", "b", "a", "c"))) as busy:
        assert busy is None
        assert [state(store, key) for key in "abc"] == ["live"] * 3
    assert list(store.list("leases/")) == []


def test_claims_on_common_keys_exclude_each_other_and_one_gets_through(store: Store) -> None:
    inside, most, rounds = [0], [0], []
    guard, start = threading.Lock(), threading.Barrier(4)

    def work() -> str:
        with guard:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        with guard:
            inside[0] -= 1
        return "done"

    def compete(keys: tuple[str, ...]) -> list[Any]:
        found = []
        for _ in range(5):
            start.wait()
            found.append(under_claim(store, Claim(keys), work))
        return found

    with ThreadPoolExecutor(4) as pool:
        rounds = list(pool.map(compete, [("a", "b"), ("b", "c"), ("b", "a"), ("c", "b", "a")]))
    assert most == [1]
    assert all("done" in answers for answers in zip(*rounds, strict=True))
    assert list(store.list("leases/")) == []


def test_work_is_not_done_where_a_key_is_held_and_its_error_releases(store: Store) -> None:
    with holding(store, "k"):
        assert under_claim(store, Claim(("k",)), lambda: pytest.fail("worked")) == Busy("k")
    with pytest.raises(ZeroDivisionError):
        under_claim(store, Claim(("j", "k")), lambda: 1 / 0)
    assert list(store.list("leases/")) == []


def test_only_what_belongs_to_a_claim_is_released(store: Store) -> None:
    mine, other = Claim(("a", "b", "c")), Claim(("c",))
    for key, claim in (("a", mine), ("b", mine), ("c", other)):
        assert try_acquire(store, key, new_owner(), claim=claim.id) is not None
    assert release_claims(store, [mine]) == 2
    assert [state(store, key) for key in "abc"] == ["free", "free", "live"]


def test_release_at_an_endpoint_that_cannot_delete_leaves_free_leases(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        raise StoreError("not implemented")

    monkeypatch.setattr("infra.artifacts.leases.delete_if_match", refuse)
    mine, other = Claim(("a", "b")), Claim(("b",))
    for key, claim in (("a", mine), ("b", other)):
        assert try_acquire(store, key, new_owner(), claim=claim.id) is not None
    assert release_claims(store, [mine]) == 1
    assert [state(store, key) for key in "ab"] == ["free", "live"]
    assert try_acquire(store, "a", new_owner()) is not None


def test_a_claim_with_many_keys_is_kept_by_one_thread_and_given_back_whole(store: Store) -> None:
    keys, before = tuple(f"k{number:03}" for number in range(60)), set(threading.enumerate())
    with claimed(store, Claim(keys, expiry_s=3.0)) as busy:
        assert busy is None
        watcher, give_up = Watcher(3.0), time.monotonic() + 60
        first = [seen.etag for seen in watcher.observe_all(store, keys)]
        while any(seen.etag == old for seen, old in zip(watcher.observe_all(store, keys), first, strict=True)):
            assert time.monotonic() < give_up  # every one of them beats
            time.sleep(0.1)
        started = [thread for thread in threading.enumerate() if thread not in before]
        assert sum(thread.name == "leases" for thread in started) == 1
        assert len(started) < 40
        with claimed(store, Claim(keys)) as other:
            assert other == Busy(keys[0])
    assert list(store.list("leases/")) == []


HOLD = """
    import sys, time
    from infra.artifacts.claims import Claim, claimed
    from infra.store.s3 import Store
    bucket, endpoint, prefix, claim = sys.argv[1:]
    with claimed(Store(bucket, endpoint, prefix), Claim(("j", "k"), id=claim)) as busy:
        print("busy" if busy else "held", flush=True)
        time.sleep(60)
"""


def test_a_killed_worker_is_replaced_by_its_retry_without_waiting(store: Store) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLD), store.bucket, str(store.endpoint), store.prefix, "mine"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "held\n"
        worker.send_signal(signal.SIGKILL)
    with claimed(store, Claim(("j", "k"))) as busy:
        assert busy is not None
    with claimed(store, Claim(("j", "k"), id="mine")) as busy:
        assert busy is None
    assert list(store.list("leases/")) == []


def test_requests_of_a_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three where nobody else is: one to take it, two to give it back."""
    asked: list[str] = []
    client = store._client()

    def count(model: Any, **_: Any) -> None:
        asked.append(model.name)

    client.meta.events.register("before-call.s3", count)
    try:
        with claimed(store, Claim(("a",))) as busy:
            assert busy is None
    finally:
        client.meta.events.unregister("before-call.s3", count)
    assert asked == ["PutObject", "GetObject", "DeleteObject"]
