"""Champions and challengers against a real MLflow server and object store: recorded, undone, raced for."""

import itertools
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import mlflow
import pytest

from infra.artifacts.leases import Watcher, holding
from infra.errors import RegistryError
from infra.registry import runs
from infra.registry.aliases import Conclusion, Decision, conclude, enter, follow, lease_key, note, promote, rollback
from infra.registry.models import CONFIG_TAG
from infra.registry.versions import (
    BY_HAND,
    DECISION,
    LEADER,
    MERGE_TAG,
    OPPONENT,
    PREVIOUS,
    REASON,
    ROLLED_BACK,
    RUN,
    barred,
    champion,
    models_of,
)
from infra.stack.services import StackState
from infra.store.s3 import Store

YES, NO = (Decision(promoted, f"because {promoted}", "base", "run1") for promoted in (True, False))
MAKE = Callable[..., int]


@pytest.fixture
def name(stack: StackState) -> str:
    task = uuid.uuid4().hex
    name = runs.model_name("aliases", task)
    runs.client().create_registered_model(name, tags={"factory.task": task})
    return name


@pytest.fixture(scope="module")
def run_id(stack: StackState) -> str:
    """A run with the files of versions."""
    made = runs.start_run("aliases", "run", {}, {})
    runs.log_text(made, "x", "model/MLmodel")
    return made


@pytest.fixture(scope="module")
def source(run_id: str) -> str:
    """Where they are."""
    return f"{runs.client().get_run(run_id).info.artifact_uri}/model"


@pytest.fixture
def make(name: str, source: str, run_id: str) -> MAKE:
    """Make a version with a digest of its own, or the given one."""

    def version(digest: str = "", model: str = name, files: str = source, **tags: str) -> int:
        tags |= {"factory.key": "1" * 64, "factory.digest": digest or uuid.uuid4().hex}
        made = runs.client().create_model_version(model, files, run_id, tags, description="A card.")
        return int(made.version)

    return version


def aliases(name: str) -> dict[str, int]:
    found = runs.client().get_registered_model(name).aliases
    return {alias: int(version) for alias, version in found.items()}


def tags(name: str, version: int) -> dict[str, str]:
    return dict(runs.client().get_model_version(name, str(version)).tags)


def judge(store: Store, name: str, version: int, decision: Decision) -> Conclusion:
    """Enter a version and conclude against whoever is champion."""
    standing = enter(store, name, version)
    return conclude(store, name, version, standing.champion.version if standing.champion else None, decision)


def test_without_a_champion_a_version_is_challenger_until_the_gate_lets_it_through(
    store: Store, name: str, make: MAKE
) -> None:
    version = make()
    standing = enter(store, name, version)
    assert (standing.champion, standing.judged, standing.leads, standing.is_open) == (None, None, False, True)
    assert aliases(name) == {"challenger": version}
    refused = conclude(store, name, version, None, NO)
    assert (refused.how, refused.standing.leads, refused.standing.is_open) == ("recorded", False, False)
    assert aliases(name) == {"challenger": version}
    found = tags(name, version)
    assert [found[tag] for tag in (DECISION, REASON, OPPONENT, RUN)] == ["challenger", "because False", "base", "run1"]
    second = make()
    assert judge(store, name, second, YES).standing.leads
    assert aliases(name) == {"champion": second}
    assert (tags(name, second)[DECISION], tags(name, second)[PREVIOUS]) == ("promoted", "")
    assert enter(store, name, second).leads
    assert aliases(name) == {"champion": second}, "the champion is not made a challenger"


def test_bytes_that_were_judged_are_not_judged_again(store: Store, name: str, make: MAKE) -> None:
    first = make("d" * 64)
    judge(store, name, first, NO)
    again = make("d" * 64)  # the same bytes by another recipe
    standing = enter(store, name, again)
    assert not standing.is_open
    assert standing.judged is not None
    assert (standing.judged.version, standing.judged.tags[REASON]) == (first, "because False")
    assert conclude(store, name, again, None, YES).how == "known"
    assert "champion" not in aliases(name)
    promote(store, name, first, "by hand")
    assert not enter(store, name, make("d" * 64)).is_open, "the champion's bytes"


def test_a_decision_against_another_champion_does_not_count(store: Store, name: str, make: MAKE) -> None:
    first, second, third = make(), make(), make()
    judge(store, name, first, YES)
    enter(store, name, second)
    judge(store, name, third, YES)  # while the second was compared with the first
    late = conclude(store, name, second, first, YES)
    assert late.how == "changed"
    assert late.standing.is_open, "the next run may compare it again"
    assert aliases(name)["champion"] == third
    assert REASON not in tags(name, second)


def test_of_two_that_promote_at_once_one_comes_first(store: Store, name: str, make: MAKE) -> None:
    first, second = make(), make()
    for version in (first, second):
        enter(store, name, version)
    barrier = threading.Barrier(2)

    def race(version: int) -> str:
        barrier.wait(10)
        return conclude(store, name, version, None, YES).how

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(race, (first, second)))
    assert sorted(found) == ["changed", "recorded"]
    winner = (first, second)[found.index("recorded")]
    loser = first + second - winner
    assert aliases(name) == {"champion": winner} | ({"challenger": loser} if loser == second else {})
    assert DECISION not in tags(name, loser)


def test_two_runs_with_the_same_version_agree(store: Store, name: str, make: MAKE) -> None:
    version = make()
    enter(store, name, version)
    with ThreadPoolExecutor(2) as pool:
        decisions = [replace(YES, run_id=run) for run in ("run1", "run2")]
        found = list(pool.map(lambda decision: conclude(store, name, version, None, decision), decisions))
    assert sorted(each.how for each in found) == ["known", "recorded"]
    assert all(each.standing.leads for each in found)
    assert tags(name, version)[PREVIOUS] == ""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Do something, dying instead of changing a tag."""

    def attempt(method: str, tag: str, work: Callable[[], Any]) -> None:
        real = getattr(mlflow.MlflowClient, method)

        def dies(self: Any, name: str, *given: str) -> Any:
            if tag in given:
                raise InterruptedError(tag)
            return real(self, name, *given)

        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, method, dies)
            with pytest.raises(InterruptedError):
                work()

    return attempt


def test_a_decision_that_was_interrupted_is_finished_by_a_retry(
    store: Store, name: str, make: MAKE, killed: Callable[..., None]
) -> None:
    first, second, third = make(), make(), make()
    judge(store, name, first, YES)
    enter(store, name, second)
    killed("set_model_version_tag", DECISION, lambda: conclude(store, name, second, first, YES))
    assert (aliases(name), DECISION in tags(name, second)) == ({"champion": second}, False)
    other = replace(YES, run_id="run2")
    assert conclude(store, name, second, first, other).how == "known", "it leads, and another run brought it there"
    retried = conclude(store, name, second, first, YES)
    assert (retried.how, retried.standing.leads) == ("recorded", True)
    assert (tags(name, second)[DECISION], tags(name, second)[PREVIOUS]) == ("promoted", str(first))
    assert conclude(store, name, second, first, YES).how == "recorded", "killed on its way back"
    enter(store, name, third)
    killed("set_model_version_tag", DECISION, lambda: conclude(store, name, third, second, NO))
    assert conclude(store, name, third, second, NO).how == "recorded"
    assert conclude(store, name, third, second, NO).how == "recorded"
    assert tags(name, third)[DECISION] == "challenger"
    assert rollback(store, name, "")[0].version == first
    assert conclude(store, name, second, first, YES).how == "known", "what was rolled back stays so"


def test_a_promotion_by_hand_that_was_interrupted_is_finished_by_a_retry(
    store: Store, name: str, make: MAKE, killed: Callable[..., None]
) -> None:
    first, second = make(), make()
    for version in (first, second):
        promote(store, name, version, "")
    rollback(store, name, "")
    killed("delete_model_version_tag", ROLLED_BACK, lambda: promote(store, name, second, "again"))
    assert (aliases(name)["champion"], ROLLED_BACK in tags(name, second)) == (second, True)
    promote(store, name, second, "again")
    assert ROLLED_BACK not in tags(name, second)
    assert tags(name, second)[PREVIOUS] == str(first)


def test_a_champion_whose_bytes_were_lost_gives_its_place_to_the_same_bytes(
    store: Store, name: str, make: MAKE
) -> None:
    places = [f"objects/{letter * 64}/1/adapter" for letter in "abc"]
    for place in places:
        store.put(place, b"x")
    given = [{"factory.adapter_uri": store.uri(place)} for place in places]
    first, second = make(), make("d" * 64, **given[0])
    judge(store, name, first, YES)
    judge(store, name, second, YES)
    third = make("d" * 64, **given[1])
    kept = enter(store, name, third)
    assert (kept.replaced, kept.leads, kept.is_same, kept.is_open) == (None, False, True, False)
    assert aliases(name) == {"champion": second, "challenger": third}
    store.delete(places[0])
    other = make("e" * 64, **given[2])
    assert enter(store, name, other).replaced is None, "other bytes have to be compared"
    moved = enter(store, name, third)
    assert (moved.replaced, moved.leads, moved.is_open) == (second, True, False)
    assert aliases(name) == {"champion": third, "challenger": other}
    assert tags(name, third)[REASON].startswith("same bytes, stored anew")
    assert enter(store, name, third).replaced is None
    assert rollback(store, name, "")[0].version == first


def test_the_champions_bytes_asked_in_another_way_take_its_place(store: Store, name: str, make: MAKE) -> None:
    """What serves answers as today's runs score it; and back, if the configuration goes back."""
    first = make()
    old, new = (make("d" * 64, **{CONFIG_TAG: letter * 64}) for letter in "ab")
    for version in (first, old):
        judge(store, name, version, YES)
    moved = enter(store, name, new)
    assert (moved.replaced, moved.leads, moved.is_open) == (old, True, False)
    assert tags(name, new)[REASON] == f"same bytes as version {old}, the champion then, asked as is set now"
    assert aliases(name) == {"champion": new}
    assert enter(store, name, old).replaced == new
    assert rollback(store, name, "")[0].version == first


def test_a_version_whose_files_mlflow_removed_cannot_serve(store: Store, name: str, make: MAKE, source: str) -> None:
    """`mlflow gc` removes them with a deleted run and asks no registry."""
    first, second = make(files=f"{source}-gone"), make()
    for version in (first, second):
        judge(store, name, version, YES)
    with pytest.raises(RegistryError, match=r"cannot serve: \S+/model-gone is gone"):
        rollback(store, name, "")
    lost, again = make("d" * 64, files=f"{source}-gone"), make("d" * 64)
    judge(store, name, lost, YES)
    assert enter(store, name, again).replaced == lost
    assert aliases(name) == {"champion": again}


def test_what_was_rolled_back_stays_so_when_its_version_is_deleted(store: Store, name: str, make: MAKE) -> None:
    first, second = make(), make("d" * 64)
    for version in (first, second):
        judge(store, name, version, YES)
    rollback(store, name, "it swears")
    runs.client().delete_model_version(name, str(second))
    third = make("d" * 64)
    assert not enter(store, name, third).is_open
    assert tags(name, third)[ROLLED_BACK].endswith("it swears")
    assert conclude(store, name, third, first, YES).how == "known"
    promote(store, name, third, "it does not")
    assert aliases(name)["champion"] == third
    runs.client().delete_model_version(name, str(third))
    assert ROLLED_BACK not in enter(store, name, make("d" * 64)).version.tags


@pytest.mark.parametrize("what", ["version", "alias"])
def test_a_champion_that_was_removed_by_hand_is_not_replaced_unseen(
    store: Store, name: str, make: MAKE, what: str
) -> None:
    first, second, third = (make() for _ in range(3))
    for version in (first, second):
        judge(store, name, version, YES)
    if what == "version":
        runs.client().delete_model_version(name, str(second))
    else:
        runs.client().delete_registered_model_alias(name, "champion")
    standing = enter(store, name, third)
    assert standing.former == second
    assert conclude(store, name, third, None, YES).how == "changed"
    promote(store, name, third, "by hand")
    fourth = enter(store, name, make())
    assert (fourth.former, fourth.is_open) == (None, True)


def test_an_only_champion_that_was_deleted_does_not_come_back_by_itself(store: Store, name: str, make: MAKE) -> None:
    judge(store, name, make("d" * 64), YES)
    runs.client().delete_model_version(name, "1")
    again = enter(store, name, make("d" * 64))
    assert (again.champion, again.former) == (None, 1)
    assert conclude(store, name, again.version.version, None, YES).how == "changed"
    assert aliases(name) == {"challenger": again.version.version}


def test_a_champion_from_before_there_was_a_record_of_it_is_recorded(store: Store, name: str, make: MAKE) -> None:
    """Of an earlier release, or of a run that was killed between alias and record."""
    version = make()
    judge(store, name, version, YES)
    mlflow = runs.client()
    mlflow.delete_registered_model_tag(name, LEADER)
    mlflow.delete_model_version_tag(name, str(version), DECISION)
    standing = enter(store, name, version)
    assert (standing.leads, standing.is_open) == (True, False)
    assert tags(name, version)[DECISION] == "promoted"
    assert mlflow.get_registered_model(name).tags[LEADER] == str(version)
    mlflow.delete_registered_model_alias(name, "champion")
    assert not enter(store, name, version).is_open, "never compared twice"


def test_what_took_its_twins_place_needs_no_gate_when_that_is_deleted(store: Store, name: str, make: MAKE) -> None:
    old, new = (make("d" * 64, **{CONFIG_TAG: letter * 64}) for letter in "ab")
    judge(store, name, old, YES)
    assert enter(store, name, new).replaced == old
    runs.client().delete_model_version(name, str(old))
    judge(store, name, make(), YES)
    assert not enter(store, name, new).is_open


def test_a_promotion_unbars_the_bytes_whichever_version_was_rolled_back(store: Store, name: str, make: MAKE) -> None:
    first = make()
    old, new = (make("d" * 64, **{CONFIG_TAG: letter * 64}) for letter in "ab")
    for version in (first, old):
        judge(store, name, version, YES)
    assert enter(store, name, new).leads
    rollback(store, name, "it swears")
    promote(store, name, old, "it does not")
    mlflow = runs.client()
    assert barred("d" * 64) not in mlflow.get_registered_model(name).tags
    mlflow.set_registered_model_tag(name, barred("d" * 64), "by an earlier release")
    assert enter(store, name, old).leads
    assert ROLLED_BACK not in tags(name, old), "who is champion is not marked"


def test_a_rollback_of_a_named_version_may_be_repeated(
    store: Store, name: str, make: MAKE, killed: Callable[..., None]
) -> None:
    versions = [make() for _ in range(3)]
    for version in versions:
        judge(store, name, version, YES)
    first, second, third = versions
    killed("set_registered_model_tag", LEADER, lambda: rollback(store, name, "", third))
    assert aliases(name) == {"champion": second}
    former, gone = rollback(store, name, "", third)
    assert (former.version, gone.version) == (second, third)
    assert aliases(name) == {"champion": second}
    assert runs.client().get_registered_model(name).tags[LEADER] == str(second)
    with pytest.raises(RegistryError, match=rf"version {first} of '{name}' is not its champion; version {second} is"):
        rollback(store, name, "", first)
    assert aliases(name) == {"champion": second}


def test_a_note_does_not_overwrite_what_was_decided_meanwhile(store: Store, name: str, make: MAKE) -> None:
    version, other = make(), make()
    judge(store, name, version, YES)
    note(store, name, version, "cannot be scored")
    assert tags(name, version)[REASON] == "because True"
    enter(store, name, other)
    note(store, name, other, "cannot be scored")
    assert tags(name, other)[REASON] == "cannot be scored"


def test_rollback_changes_nothing_where_the_former_champions_bytes_are_gone(
    store: Store, name: str, make: MAKE
) -> None:
    first, second = make("", **{"factory.adapter_uri": store.uri("objects/nothing")}), make()
    for version in (first, second):
        promote(store, name, version, "")
    with pytest.raises(RegistryError, match=r"cannot serve: s3://.*objects/nothing is gone; make another one champion"):
        rollback(store, name, "")
    assert aliases(name) == {"champion": second}
    assert ROLLED_BACK not in tags(name, second)


def test_rollback_goes_back_one_champion_and_bars_the_bytes(store: Store, name: str, make: MAKE) -> None:
    versions = [make() for _ in range(3)]
    for version in versions:
        judge(store, name, version, YES)
    former, present = rollback(store, name, "it swears")
    assert (former.version, present.version) == (versions[1], versions[2])
    assert aliases(name)["champion"] == versions[1]
    assert tags(name, versions[2])[ROLLED_BACK].endswith("Z: it swears")
    barred = enter(store, name, versions[2])
    assert not barred.is_open
    assert conclude(store, name, versions[2], versions[1], YES).how == "known"
    assert rollback(store, name, "it too")[0].version == versions[0]
    with pytest.raises(RegistryError, match=r"is its first champion; make another one champion"):
        rollback(store, name, "and it")
    assert aliases(name)["champion"] == versions[0]


def test_a_promotion_by_hand_is_recorded_and_undone(store: Store, name: str, make: MAKE) -> None:
    first, second = make(), make()
    judge(store, name, first, YES)
    judge(store, name, second, NO)
    before = promote(store, name, second, "I know better")
    assert before is not None
    assert before.version == first
    assert aliases(name) == {"champion": second}
    assert tags(name, second)[BY_HAND].endswith(": I know better")
    assert promote(store, name, second, "once more") == champion(name)
    assert tags(name, second)[BY_HAND].endswith(": I know better"), "it was champion already"
    assert tags(name, second)[REASON] == "because False", "what the gate said stays"
    assert rollback(store, name, "I did not")[0].version == first
    with pytest.raises(RegistryError, match=r"first champion"):
        rollback(store, name, "")
    promote(store, name, second, "I did")
    assert ROLLED_BACK not in tags(name, second)
    assert rollback(store, name, "no")[0].version == first
    with pytest.raises(RegistryError, match=r"there is no version 9"):
        promote(store, name, 9, "")


def test_rollback_says_what_to_do_where_it_cannot(store: Store, name: str, make: MAKE) -> None:
    with pytest.raises(RegistryError, match=r"has no champion"):
        rollback(store, name, "")
    first, second = make(), make()
    client = runs.client()
    client.set_registered_model_alias(name, "champion", str(first))  # on MLflow's pages
    with pytest.raises(RegistryError, match=r"without a record of the one before"):
        rollback(store, name, "")
    promote(store, name, second, "")
    client.delete_model_version(name, str(first))
    with pytest.raises(RegistryError, match=rf"version {first} of .* was deleted"):
        rollback(store, name, "")
    assert aliases(name)["champion"] == second
    assert ROLLED_BACK not in tags(name, second)


def test_going_back_to_what_was_rolled_back_itself_is_refused(store: Store, name: str, make: MAKE) -> None:
    first, second = make(), make()
    for version in (first, second, first):
        promote(store, name, version, "")
    assert rollback(store, name, "")[0].version == second
    with pytest.raises(RegistryError, match=rf"version {first} of .* was rolled back itself"):
        rollback(store, name, "")


def test_the_verdict_stands_in_the_description_once(store: Store, name: str, make: MAKE) -> None:
    client, version = runs.client(), make()
    card = "A card.\n\n**Scores**: 1\n\n```python\ncode\n```\n\n- facts"
    client.update_model_version(name, str(version), card)
    note(store, name, version, "could not decide")
    assert enter(store, name, version).is_open, "that is no decision"
    judge(store, name, version, YES)
    text = client.get_model_version(name, str(version)).description
    assert text == card.replace("\n\n```", "\n\n**Gate**: because True\n\n```", 1)
    long = make()
    client.update_model_version(name, str(long), "x" * 5000)
    note(store, name, long, "y" * 6000)
    assert len(client.get_model_version(name, str(long)).description) == 5000


def test_a_checkpoint_follows_its_merge(store: Store, name: str, make: MAKE) -> None:
    follower = f"{name}-checkpoint"
    assert follow(store, name, follower, strict=True) is None, "there is none"
    runs.client().create_registered_model(follower)
    first, second, third = make("a" * 64), make("b" * 64), make("c" * 64)
    one, two = (make("", follower, **{MERGE_TAG: letter * 64}) for letter in "ab")
    promote(store, name, first, "")
    assert follow(store, name, follower, strict=False) == one
    promote(store, name, second, "")
    assert follow(store, name, follower, strict=False) == two
    assert aliases(follower)["champion"] == two
    promote(store, name, third, "")
    assert follow(store, name, follower, strict=False) is None
    assert aliases(follower)["champion"] == two, "a former merge's, but it serves"
    assert follow(store, name, follower, strict=True) is None
    assert "champion" not in aliases(follower)
    rollback(store, name, "")
    assert follow(store, name, follower, strict=True) == two


def test_a_change_waits_for_another_and_a_dead_one_is_overtaken(
    store: Store, name: str, make: MAKE, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()

    class Hurried(Watcher):
        def __init__(self, expiry_s: float) -> None:
            super().__init__(expiry_s, clock=lambda: next(looks) * expiry_s)

    monkeypatch.setattr("infra.registry.aliases.Watcher", Hurried)
    version = make()
    with ThreadPoolExecutor(1) as pool:
        with holding(store, lease_key(name), beat_s=0.01):
            waiting = pool.submit(promote, store, name, version, "")
            deadline = time.monotonic() + 60
            while next(looks) < 40:  # many times its expiry: but the holder beats
                assert time.monotonic() < deadline
                assert not waiting.done()
                time.sleep(0.05)
        assert waiting.result(timeout=60) is None
    with holding(store, lease_key(name), beat_s=1000.0):  # as one that was killed
        assert promote(store, name, make(), "") is not None


def test_the_models_of_a_suite_are_not_those_of_another(store: Store, name: str, make: MAKE) -> None:
    client = runs.client()
    suite = f"s_{uuid.uuid4().hex[:8]}"
    for owner, task in ((suite, "a/b"), (suite, "merged"), (f"{suite}.more", "a"), (suite.replace("_", "-"), "a")):
        model = runs.model_name(owner, task)
        client.create_registered_model(model, tags={"factory.task": task})
        make("", model)
    make("", runs.model_name(suite, "merged"))
    client.set_registered_model_alias(f"{suite}.merged", "champion", "2")
    found = models_of(suite)
    assert [(model.name, model.task) for model in found] == [(f"{suite}.a-b", "a/b"), (f"{suite}.merged", "merged")]
    assert [version.version for version in found[1].versions] == [2, 1]
    assert found[1].aliases == {"champion": 2}
    assert models_of("nobody") == []
