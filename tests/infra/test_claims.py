"""Claims and the list of work that is held elsewhere, against a real store: all keys or none, takeover, waiting."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra.claims import Busy, Claim, claimed, release_claims, under_claim
from infra.elsewhere import Elsewhere
from infra.errors import StoreError
from infra.leases import Holder, Watcher, holding, lease_name, new_owner, try_acquire
from infra.store import Store

ROOT = Path(__file__).resolve().parents[2]


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

    monkeypatch.setattr("infra.leases.delete_if_match", refuse)
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
    from infra.claims import Claim, claimed
    from infra.store import Store
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


# -- what is held elsewhere --------------------------------------------------------------------------------------


class Driver:
    """A driver whose worker is the test: claims that were handed out, results, and what `find` gives."""

    def __init__(self, store: Store, expiry_s: float = 6.0) -> None:
        self.now = 0.0
        self.said: list[str] = []
        self.elsewhere = Elsewhere(store, expiry_s, self.said.append, lambda: self.now)
        self.handed: list[tuple[Claim, Callable[[Any], None]]] = []
        self.results: list[Any] = []
        self.existing: Any = None
        self.looks = 0

    def submit(self, *keys: str) -> None:
        self.elsewhere.submit(
            "it", keys, lambda claim, answer: self.handed.append((claim, answer)), self.find, self.results.append
        )

    def find(self) -> Any:
        self.looks += 1
        return self.existing

    def work(self, store: Store) -> None:
        """Do what was handed out last, as a worker would."""
        claim, answer = self.handed.pop()
        answer(under_claim(store, claim, lambda: "mine"))

    def polls(self, seconds: float, step: float = 0.1) -> int:
        """Poll for so long; how often something moved."""
        moved = 0
        for _ in range(round(seconds / step)):
            self.now += step
            moved += self.elsewhere.poll()
        return moved


def test_what_nobody_holds_is_done_at_once(store: Store) -> None:
    driver = Driver(store)
    driver.submit("a", "b")
    driver.work(store)
    assert driver.results == ["mine"]
    assert driver.elsewhere.open == 0
    assert driver.polls(10) == 0
    assert driver.looks == 0


def test_what_somebody_else_publishes_is_used_and_not_made(store: Store) -> None:
    driver = Driver(store)
    with holding(store, "a"):
        driver.submit("a")
        driver.work(store)
        assert (driver.results, driver.elsewhere.open) == ([], 1)
        assert driver.polls(0.2) == 0
        driver.existing = "theirs"  # published, although the lease is still held
        assert driver.polls(5) == 1
    assert (driver.results, driver.handed, driver.elsewhere.open) == (["theirs"], [], 0)


def test_what_somebody_else_gave_up_is_handed_out_again(store: Store) -> None:
    driver = Driver(store)
    with holding(store, "b"):
        driver.submit("a", "b")
        (first, _) = driver.handed[0]
        driver.work(store)
        assert driver.polls(30) == 0  # half of the expiry that the lease names
    assert driver.polls(5) == 1
    assert driver.handed[0][0].keys == ("a", "b")
    assert driver.handed[0][0].id != first.id
    driver.work(store)
    assert driver.results == ["mine"]


def test_what_a_dead_one_held_is_taken_over_after_the_expiry(store: Store) -> None:
    driver = Driver(store)
    dead = {key: try_acquire(store, key, new_owner(), expiry_s=6.0) for key in "ab"}
    assert all(dead.values())
    driver.submit("a", "b", "c")
    driver.work(store)
    driver.polls(5.5)
    assert driver.handed == []
    assert driver.polls(2.0) == 1
    assert set(driver.handed[0][0].takeover) == {"a", "b"}
    driver.work(store)
    assert driver.results == ["mine"]
    assert list(store.list("leases/")) == []


def test_of_two_drivers_that_take_over_one_works_and_the_other_waits_for_it(store: Store) -> None:
    assert try_acquire(store, "a", new_owner(), expiry_s=6.0) is not None
    drivers = [Driver(store), Driver(store)]
    for driver in drivers:
        driver.submit("a")
        driver.work(store)
        assert driver.polls(10) == 1
    (claim, answer) = drivers[0].handed.pop()
    with claimed(store, claim) as busy:
        assert busy is None
        drivers[1].work(store)
        assert drivers[1].polls(2) == 0
    answer("mine")
    drivers[1].existing = "theirs"
    assert drivers[1].polls(2) == 1
    assert [driver.results for driver in drivers] == [["mine"], ["theirs"]]


def test_who_beats_is_waited_for(store: Store) -> None:
    driver = Driver(store)
    alive = try_acquire(store, "a", new_owner(), expiry_s=6.0)
    assert alive is not None
    driver.submit("a")
    driver.work(store)
    for _ in range(12):
        assert driver.polls(3.0) == 0
        assert alive.beat()
    assert driver.elsewhere.open == 1
    assert driver.looks < 12 * 3.0 / 0.4  # it is not asked for at every poll
    assert len(driver.said) == 1
    assert "it: being made elsewhere (process " in driver.said[0]


def test_an_outage_of_the_store_is_survived_up_to_the_expiry(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(store)
    assert try_acquire(store, "a", new_owner(), expiry_s=6.0) is not None
    driver.submit("a")
    driver.work(store)
    driver.polls(4)

    def fail(name: str) -> Any:
        raise StoreError("down")

    with monkeypatch.context() as down:
        down.setattr(store.hasty(), "get_with_etag", fail)
        driver.polls(4)
    assert driver.polls(4) == 0  # nobody could beat meanwhile
    monkeypatch.setattr(store.hasty(), "get_with_etag", fail)
    with pytest.raises(StoreError, match="down"):
        driver.polls(7)


def test_work_behind_work_that_fails_is_looked_at_and_the_failing_one_raises_in_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(store)
    broken, found = [True], ["theirs"]

    def fails() -> Any:
        if broken[0]:
            raise StoreError("not readable")

    again: list[Any] = []
    driver.elsewhere.wait("bad", ("a",), fails, driver.results.append, again.append)
    driver.elsewhere.wait("good", ("b",), lambda: found.pop() if found else None, driver.results.append, again.append)
    assert driver.polls(1) == 1
    assert driver.results == ["theirs"]
    alive = try_acquire(store, "b", new_owner(), expiry_s=6.0)
    assert alive is not None
    driver.elsewhere.wait("long", ("b",), lambda: None, driver.results.append, again.append)
    for _ in range(4):  # others that succeed do not make it start anew
        assert driver.polls(1) == 0
        assert alive.beat()
    with pytest.raises(StoreError, match="not readable"):
        driver.polls(3)
    assert driver.elsewhere.open == 2


def test_a_driver_that_ends_frees_what_its_workers_hold(store: Store) -> None:
    driver = Driver(store)
    driver.submit("a")
    driver.submit("b")
    driver.submit("c")
    driver.work(store)  # c
    for claim, _ in driver.handed:
        assert try_acquire(store, claim.keys[0], new_owner(), claim=claim.id) is not None
    assert try_acquire(store, "c", new_owner()) is not None
    driver.elsewhere.release()
    assert [state(store, key) for key in "abc"] == ["free", "free", "live"]


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
