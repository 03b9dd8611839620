"""Leases against a real store: one winner, life and death of a holder, release, and what a lost holder learns."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.artifacts import leases
from infra.artifacts.leases import Holder, Lease, Observation, Watcher, holding, new_owner, try_acquire
from infra.errors import StoreError
from infra.store.admin import list_objects
from infra.store.layout import lease_name
from infra.store.s3 import Store
from tests.e2e.nodes import Gateway

ROOT = Path(__file__).resolve().parents[3]
ALICE = Holder("alice", "here", 1, 0.0)


class Clock:
    """A clock that goes on when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# -- judging, without a store ------------------------------------------------------------------------------------


def _look(watcher: Watcher, clock: Clock, after: float, etag: str | None = "1", holder: Holder | None = ALICE) -> str:
    clock.now += after
    return watcher.judge("k", etag, holder).state


def test_a_lease_expires_when_its_tag_stays_and_not_before() -> None:
    clock = Clock()
    watcher = Watcher(9.0, clock)
    assert [_look(watcher, clock, 3.0) for _ in range(5)] == ["live", "live", "live", "live", "expired"]
    assert _look(watcher, clock, 3.0, "2") == "live"
    assert [_look(watcher, clock, 3.0, "2") for _ in range(4)] == ["live", "live", "live", "expired"]
    assert _look(watcher, clock, 0.0, None, None) == "free"
    assert _look(watcher, clock, 0.0, "3", Holder("", "here", 1, 0.0)) == "free"
    assert _look(watcher, clock, 99.0, "4", None) == "live"  # unreadable bytes expire like any lease
    assert [_look(watcher, clock, 3.0, "4", None) for _ in range(4)][-1] == "expired"


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 2)), min_size=1, max_size=30), st.floats(1, 20))
def test_expired_means_one_tag_for_longer_than_the_expiry(looks: list[tuple[float, int]], expiry: float) -> None:
    clock = Clock()
    watcher, history = Watcher(expiry, clock), []
    for pause, tag in looks:
        state = _look(watcher, clock, pause, str(tag))
        history.append((clock.now, tag))
        same = [at for at, _ in history[next((i for i in range(len(history), 0, -1) if history[i - 1][1] != tag), 0) :]]
        if state == "expired":
            assert same[-1] - same[0] > expiry
            assert len(same) > 3
        elif len(same) > 1 and all(b - a <= expiry / 3 for a, b in itertools.pairwise(same)):
            assert same[-1] - same[0] <= expiry * (1 + 1e-9)


def test_an_outage_of_the_store_or_a_pause_of_the_observer_kills_nobody(store: Store) -> None:
    clock = Clock()
    watcher = Watcher(9.0, clock)
    assert try_acquire(store, "k", "alice", expiry_s=9.0) is not None

    class Broken(Store):
        def get_with_etag(self, name: str) -> tuple[bytes, str] | None:
            raise StoreError("down")

    def look(after: float, at: Store = store) -> str:
        clock.now += after
        return watcher.observe(at, "k").state

    assert [look(3.0) for _ in range(4)] == ["live"] * 4
    with pytest.raises(StoreError):
        look(3.0, Broken(store.bucket))
    assert [look(3.0) for _ in range(4)] == ["live"] * 4
    assert look(1000.0) == "expired"  # unchanged for 9 s already
    watcher = Watcher(9.0, clock)
    assert [look(1000.0) for _ in range(2)] == ["live", "live"]


# -- holders -----------------------------------------------------------------------------------------------------


def test_hold_beat_and_release(store: Store) -> None:
    lease = try_acquire(store, "k", "alice")
    assert lease is not None
    assert try_acquire(store, "k", "bob") is None
    seen = Watcher().observe(store, "k")
    assert seen.state == "live"
    assert seen.holder is not None
    assert (seen.holder.owner, seen.holder.pid, seen.holder.beat) == ("alice", os.getpid(), 0)
    assert lease.beat()
    after = Watcher().observe(store, "k")
    assert after.etag != seen.etag
    assert after.holder is not None
    assert after.holder.beat == 1
    assert not lease.lost
    assert lease.release()
    assert list(store.list("leases/")) == []
    assert not lease.release()
    assert not lease.beat()
    assert Watcher().observe(store, "k") == Observation("free")
    assert try_acquire(store, "k", "bob") is not None


def test_racing_callers_have_one_winner(store: Store) -> None:
    for takeover in (False, True):
        etag = Watcher().observe(store, "k").etag if takeover else None
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda _, e=etag: try_acquire(store, "k", new_owner(), e), range(8)))
        assert sum(lease is not None for lease in won) == 1


def test_a_holder_that_was_replaced_learns_it_and_harms_nobody(store: Store) -> None:
    alice = try_acquire(store, "k", "alice")
    assert alice is not None
    bob = try_acquire(store, "k", "bob", Watcher().observe(store, "k").etag)
    assert bob is not None
    assert not alice.lost  # it cannot know yet
    assert not alice.beat()
    assert alice.lost
    assert not alice.release()
    assert bob.beat()


@pytest.mark.parametrize("beaten", [True, False])
def test_takeover_only_of_the_lease_that_was_seen(store: Store, beaten: bool) -> None:
    alice = try_acquire(store, "k", "alice")
    assert alice is not None
    etag = Watcher().observe(store, "k").etag
    if beaten:
        alice.beat()
    assert (try_acquire(store, "k", "bob", etag) is None) == beaten


def test_a_free_lease_that_stayed_counts_as_free(store: Store) -> None:
    store.put(lease_name("k"), Holder("", "there", 1, 0.0, 7).to_json())
    assert Watcher().observe(store, "k").state == "free"
    lease = try_acquire(store, "k", "bob")
    assert lease is not None
    assert lease.beat()


def test_release_at_an_endpoint_that_cannot_delete_leaves_a_free_lease(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        raise StoreError("not implemented")

    monkeypatch.setattr("infra.artifacts.leases.delete_if_match", refuse)
    for owner in ("alice", "bob"):
        lease = try_acquire(store, "k", owner)
        assert lease is not None
        assert lease.release()
    assert len(list(store.list("leases/"))) == 1


class Flaky(Store):
    """A store whose writes fail while ``broken``; "after" means that they arrive and the answer does not."""

    broken = ""

    def hasty(self, seconds: float | None = None) -> Store:
        return self

    def replace_if_match(self, name: str, data: bytes, etag: str) -> bool:
        if self.broken == "after":
            super().replace_if_match(name, data, etag)
        if self.broken:
            raise StoreError("no answer")
        return super().replace_if_match(name, data, etag)


@pytest.mark.parametrize("broken", ["before", "after"])
def test_a_beat_without_an_answer_changes_nothing(store: Store, broken: str) -> None:
    flaky, clock = Flaky(store.bucket, store.endpoint, store.prefix), Clock()
    lease = try_acquire(flaky, "k", "alice", expiry_s=10.0, clock=clock)
    assert lease is not None
    flaky.broken = broken
    clock.now += 8.0
    with pytest.raises(StoreError):
        lease.beat()
    assert not lease.lost
    clock.now += 4.0
    assert lease.lost  # by now somebody may have taken over
    flaky.broken = ""
    assert lease.beat()
    assert not lease.lost


def test_the_thread_survives_an_outage(store: Store) -> None:
    flaky = Flaky(store.bucket, store.endpoint, store.prefix)
    with holding(flaky, "k", expiry_s=60.0, beat_s=0.05) as lease:
        assert lease is not None
        flaky.broken = "before"
        time.sleep(0.3)
        flaky.broken = ""
        before = Watcher().observe(store, "k").etag
        _until(lambda: Watcher().observe(store, "k").etag != before)
        assert not lease.lost
        with holding(store, "k") as other:
            assert other is None
    assert list(list_objects(store, "leases/")) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "leases"]


def test_a_connection_that_hangs_costs_one_beat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that a router has dropped without a word. boto3's own patience would be a minute a try."""
    monkeypatch.setattr(leases, "_PATIENCE", 1 / 60)
    assert store.endpoint
    place = urlsplit(store.endpoint)
    assert place.hostname
    assert place.port
    gateway = Gateway(("127.0.0.1", 0), (place.hostname, place.port))
    try:
        there = Store(store.bucket, f"http://127.0.0.1:{gateway.port}", store.prefix)
        with holding(there, "k", expiry_s=60.0, beat_s=0.5) as lease:
            assert lease is not None
            beats = lambda: json.loads(store.get("leases/k.json"))["beat"]  # noqa: E731
            _until(lambda: beats() > 0)
            gateway.swallow = 1
            before = beats()
            _until(lambda: gateway.swallow == 0 and beats() > before)
            assert not lease.lost
    finally:
        gateway.close()


def test_a_failing_block_releases(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), holding(store, "k"):
        _ = 1 / 0
    assert Watcher().observe(store, "k").state == "free"


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".x"])
def test_bad_keys_are_refused(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="lease"):
        try_acquire(store, key, "alice")


# -- processes ---------------------------------------------------------------------------------------------------

HOLD = """
    import os, sys, time
    from infra.artifacts.leases import holding
    from infra.store.s3 import Store
    bucket, endpoint, prefix, start = sys.argv[1:]
    store = Store(bucket, endpoint, prefix)
    store.head("warm")
    while not os.path.exists(start):
        time.sleep(0.005)
    with holding(store, "k", expiry_s=60.0, beat_s=0.2) as lease:
        print("held" if lease else "taken", flush=True)
        while lease and not lease.lost:
            time.sleep(0.02)
        if lease:
            print("lost", flush=True)
"""


@pytest.fixture
def spawn(store: Store, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts processes that take the lease of ``k`` once the file ``start`` exists."""
    children: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(HOLD), store.bucket, str(store.endpoint), store.prefix]
        child = subprocess.Popen([*command, str(tmp_path / "start")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


def _until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def _take_over(store: Store) -> Lease:
    """As bob, who looks at a lease whose holder is dead, with a clock that runs fast."""
    looks = itertools.count()
    watcher = Watcher(60.0, clock=lambda: next(looks) * 60.0)
    bob = None
    while bob is None:  # a beat that was on its way when the holder was stopped may still arrive
        seen = watcher.observe(store, "k")
        assert seen.state != "free"
        if seen.state == "expired":
            bob = try_acquire(store, "k", "bob", seen.etag)
    return bob


def test_of_racing_processes_one_holds_and_when_killed_is_replaced(
    store: Store, spawn: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    children = [spawn() for _ in range(4)]
    (tmp_path / "start").touch()
    said = [_line(child) for child in children]
    assert sorted(said) == ["held", "taken", "taken", "taken"]
    holder = children[said.index("held")]
    watcher = Watcher(60.0)

    def beats() -> int:
        seen = watcher.observe(store, "k")
        assert seen.state == "live"
        assert seen.holder is not None
        assert seen.holder.pid == holder.pid
        return seen.holder.beat

    _until(lambda: beats() >= 5)  # it lives
    holder.kill()
    holder.wait()
    assert _take_over(store).owner == "bob"


def test_a_stopped_holder_that_comes_back_learns_that_it_lost(
    store: Store, spawn: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "start").touch()
    holder = spawn()
    assert _line(holder) == "held"
    holder.send_signal(signal.SIGSTOP)
    bob = _take_over(store)
    holder.send_signal(signal.SIGCONT)
    assert _line(holder) == "lost"
    assert holder.wait(20) == 0
    seen = Watcher().observe(store, "k").holder
    assert seen is not None
    assert seen.owner == "bob"
    assert bob.beat()
