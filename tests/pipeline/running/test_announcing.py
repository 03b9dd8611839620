"""What a run announces, in a real store."""

import json
import threading
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from infra.artifacts.announcements import announce
from infra.artifacts.leases import holding
from infra.artifacts.manifests import Manifest
from infra.errors import ExpertError, StoreError
from infra.store.layout import SHARED_JOURNALS
from infra.store.s3 import Store
from pipeline.records.outcome import Outcome
from pipeline.running import announcing
from pipeline.running.announcing import Announcements


def inputs(base: str, *rows: str) -> Any:
    tasks = {name: SimpleNamespace(fingerprints={"train": name, "test": f"{name}t"}) for name in rows}
    return SimpleNamespace(base=SimpleNamespace(sha256=base), tasks=tasks)


def said(store: Store) -> set[str]:
    return set(json.loads(store.get("runs/r/keys.json")))


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that need no configuration."""
    monkeypatch.setattr(announcing, "known_keys", lambda each: frozenset({f"key of {each.base.sha256}"}))


def test_all_seeds_are_announced_and_what_is_learnt_is_added(store: Store) -> None:
    announced = Announcements(store, "r")
    announced.plan([inputs("b", "x"), inputs("c", "x", "y")])
    planned = {"b", "c", "x", "xt", "y", "yt", "key of b", "key of c"}
    assert said(store) == planned
    checkpoint = Manifest("d" * 64, "checkpoint", 1, {}, {}, {})
    with announced.following(Outcome(evaluations={"e1"}, checkpoint=checkpoint)):
        pass
    with announced.following(Outcome(evaluations={"e2"})):
        pass
    assert said(store) == planned | {"e1", "e2", "d" * 64}


def test_what_a_run_learns_is_announced_while_it_goes_on_and_when_it_fails(store: Store) -> None:
    announced, outcome = Announcements(store, "r"), Outcome()
    announced.plan([inputs("b")])

    def run() -> None:
        outcome.evaluations.add("early")
        give_up = time.monotonic() + 30
        while "early" not in said(store) and time.monotonic() < give_up:
            time.sleep(0.02)
        assert "early" in said(store)
        outcome.evaluations.add("late")
        raise ExpertError("one of them")

    with pytest.raises(ExpertError), announced.following(outcome, every_s=0.05):
        run()
    assert {"early", "late"} <= said(store)


def test_a_store_that_fails_meanwhile_does_not_end_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    works, failed, announced = threading.Event(), threading.Event(), threading.Event()

    def flaky(of: Store, run: str, hashes: Iterable[str]) -> None:
        if not works.is_set():
            failed.set()
            raise StoreError("down")
        announce(of, run, hashes)
        announced.set()

    monkeypatch.setattr(announcing, "announce", flaky)
    with Announcements(store, "r").following(Outcome(evaluations={"e"}), every_s=0.01):
        assert failed.wait(30)
        works.set()
        assert announced.wait(30)  # it went on trying
        assert said(store) == {"e"}
        works.clear()
    assert said(store) == {"e"}


def test_a_run_that_learns_nothing_still_announces_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = Announcements(store, "r")
    announced.plan([inputs("b")])
    again = threading.Semaphore(0)

    def counted(of: Store, run: str, hashes: Iterable[str]) -> None:
        announce(of, run, hashes)
        again.release()

    monkeypatch.setattr(announcing, "announce", counted)
    with announced.following(Outcome(), every_s=0.01):
        assert all(again.acquire(timeout=30) for _ in range(2))
    assert said(store) == {"b", "key of b"}


def test_what_two_threads_announce_is_announced(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    announced, together = Announcements(store, "r"), threading.Barrier(8)

    def add(number: int) -> None:
        together.wait(30)
        announced.add({str(number)})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert said(store) == set(map(str, range(8)))


def test_a_run_announces_before_it_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def watch(of: Store, hashes: set[str]) -> None:
        seen.extend([said(of), set(hashes)])

    monkeypatch.setattr(announcing, "await_removals", watch)
    Announcements(store, "r").plan([inputs("b", "x")])
    assert seen == [{"b", "x", "xt", "key of b"}, {"b", "x", "xt"}]


def test_a_run_with_other_rows_does_not_wait(store: Store) -> None:
    store.put(f"{SHARED_JOURNALS}1.json", json.dumps(["other"]).encode())
    with holding(store, "gc"):
        Announcements(store, "r").plan([inputs("b", "x")])
    assert cast(set, said(store))
