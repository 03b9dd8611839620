"""The roots of a real store: what kept runs announced, and what registered versions name."""

import json
import math
from datetime import timedelta

import pytest

from infra.artifacts import announcements
from infra.artifacts.announcements import Keep, Registered, RootReader, announce
from infra.artifacts.gc_plan import Roots
from infra.errors import StoreError
from infra.store.admin import server_time
from infra.store.s3 import Store


def keeps(*runs: str) -> Keep:
    return lambda run, _: run in runs


def reader_of(store: Store, keep: Keep) -> RootReader:
    return RootReader(store, lambda: Registered(keep))


def test_roots_are_what_kept_runs_announced_and_versions_name(store: Store) -> None:
    announce(store, "new", {"b", "a"})
    announce(store, "other", {"z"})
    results = {"chosen": {"key": "m"}, "held_in": {"t": {"expert_key": "e"}}}
    store.put("runs/older/results.json", json.dumps(results).encode())
    store.put("runs/new/results.json", b"not read where there is a list")
    store.put("runs/begun/config.yaml", b"")
    registered = Registered(keeps("new", "older", "absent", "begun"), frozenset("v"), frozenset({"objects/k/x"}))
    reader = RootReader(store, lambda: registered)
    assert reader() == Roots(
        frozenset({"a", "b", "m", "e", "v"}), frozenset({"new", "older", "begun"}), frozenset({"objects/k/x"})
    )


def test_every_reading_sees_what_was_announced_since_and_forgets_nothing(store: Store) -> None:
    kept = {"one", "two"}
    reader = reader_of(store, lambda run, _: run in kept)
    announce(store, "one", {"a"})
    assert reader() == Roots(frozenset("a"), frozenset({"one"}))
    announce(store, "one", {"b"})
    announce(store, "two", {"c"})
    kept.remove("one")
    assert reader() == Roots(frozenset("abc"), frozenset({"one", "two"}))


def test_every_reading_asks_the_registry_anew_and_forgets_nothing(store: Store) -> None:
    announce(store, "one", {"a"})
    answers = [
        Registered(keeps(), frozenset("v"), frozenset({"objects/k/x"})),
        Registered(keeps("one"), frozenset("w"), frozenset({"objects/k/y"})),
    ]
    reader = RootReader(store, lambda: answers.pop(0))
    assert reader() == Roots(frozenset("v"), frozenset(), frozenset({"objects/k/x"}))
    both = frozenset({"objects/k/x", "objects/k/y"})
    assert reader() == Roots(frozenset("avw"), frozenset({"one"}), both)


def test_a_list_that_did_not_change_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(store, "one", {"a"})
    announce(store, "two", {"b"})
    reader, get = reader_of(store, keeps("one", "two")), store.get_with_etag
    read: list[str] = []

    def counted(name: str) -> tuple[bytes, str] | None:
        read.append(name)
        return get(name)

    monkeypatch.setattr(store, "get_with_etag", counted)
    reader()
    announce(store, "two", {"c"})
    assert reader().keys == frozenset("abc")
    assert sorted(read) == ["runs/one/keys.json", "runs/two/keys.json", "runs/two/keys.json"]


def test_the_rule_is_told_how_long_ago_a_run_announced_something(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(store, "said", {"a"})
    store.put("runs/silent/results.json", b"{}")
    told: dict[str, float] = {}
    later = server_time(store) + timedelta(days=2)
    monkeypatch.setattr(announcements, "server_time", lambda _: later)
    reader_of(store, lambda run, age_s: bool(told.update({run: age_s})))()
    assert told["silent"] == math.inf
    assert 0 <= told["said"] - 2 * 86400 < 60 or -60 < told["said"] - 2 * 86400 <= 0  # whole seconds


@pytest.mark.parametrize(("name", "data"), [("keys.json", b"{"), ("keys.json", b"3"), ("results.json", b"{}")])
def test_a_list_that_cannot_be_understood_stops_everything(store: Store, name: str, data: bytes) -> None:
    store.put(f"runs/bad/{name}", data)
    with pytest.raises(StoreError, match="does not say"):
        reader_of(store, keeps("bad"))()
    assert reader_of(store, keeps())() == Roots(frozenset(), frozenset())
