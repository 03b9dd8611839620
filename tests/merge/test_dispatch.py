"""A merge schedule in the hands of several drivers at once: every artifact is made once, and a dead holder replaced."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import merge.local
from infra.artifacts import Manifest
from infra.claims import Claim, claimed
from infra.elsewhere import Elsewhere
from infra.leases import holding, new_owner, try_acquire
from infra.store import Store
from merge.dispatch import Dispatch
from merge.jobs import FinishJob, Job, JobResult, NodeJob, RootJob, keys_of, run_job
from merge.local import run_threads
from merge.schedule import NODES, MergeSchedule
from merge.specs import Candidate, plan_reductions
from tests.merge.test_jobs import BASE, CANDIDATES, NAMES, Experts

SOME = [Candidate("mean"), Candidate("ties"), Candidate("sce", {"density": 0.5}), Candidate("emr")]


@pytest.fixture
def experts(store: Store, tmp_path: Path) -> Experts:
    found = Experts(store, tmp_path)
    for seed, name in enumerate(NAMES):
        found.make(name, seed)
    return found


def schedule_of(experts: Experts, candidates: Sequence[Candidate], parts: int = 1) -> MergeSchedule:
    weights = "bases/b/model.safetensors"
    return MergeSchedule(experts.store, plan_reductions(candidates), NAMES, 2, BASE, weights, parts)


def drive(experts: Experts, schedule: MergeSchedule, expiry_s: float = 60.0) -> list[Job]:
    done: list[Job] = []
    run_threads(schedule, experts.store, experts.refs, 2, {}, done.append, expiry_s)
    assert schedule.complete
    return done


def manifests(store: Store) -> Iterator[Manifest]:
    return (Manifest.from_json(store.get(name)) for name in store.list("artifacts/"))


def assert_no_leftovers(experts: Experts) -> None:
    """No lease, and no bytes of an attempt that was not published: nothing was made twice."""
    store = experts.store
    assert list(store.list("leases/")) == []
    published = {ref.name for manifest in manifests(store) for ref in manifest.files.values()}
    given = {ref.files[0].name for ref in [*experts.refs.values(), *experts.extras.values()]}
    assert set(store.list("objects/")) == published | given


@pytest.mark.parametrize("parts", [(1, 1), (2, 2), (1, 3)], ids=str)
def test_drivers_at_the_same_time_share_the_work(
    experts: Experts, parts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second asks for other candidates too; a node in parts and a whole one are one artifact."""
    others = [*SOME[1:], Candidate("magmax"), Candidate("task_arithmetic", {"lambda": 0.7})]
    schedules = [schedule_of(experts, SOME, parts[0]), schedule_of(experts, others, parts[1])]
    worked: Counter[str] = Counter()
    guard, start = threading.Lock(), threading.Barrier(2)

    def slowly(store: Store, job: Job) -> JobResult:
        before = set(store.list("artifacts/"))
        result = run_job(store, job)
        if isinstance(result, tuple):
            with guard:
                worked.update(manifest.key for manifest, made in result if made)
        time.sleep(0.02)
        assert before <= set(store.list("artifacts/"))
        return result

    def run(schedule: MergeSchedule) -> list[Job]:
        start.wait()
        return drive(experts, schedule)

    monkeypatch.setattr(merge.local, "run_job", slowly)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, schedules))
    assert set(worked) == {manifest.key for manifest in manifests(experts.store)}
    assert set(worked.values()) == {1}
    both = set(SOME) & set(others)
    assert {schedules[0].merged[c].digest for c in both} == {schedules[1].merged[c].digest for c in both}
    assert sum(schedule.reused[NODES] for schedule in schedules) > 0
    assert_no_leftovers(experts)


def test_a_driver_with_nothing_to_do_takes_no_lease(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    drive(experts, schedule_of(experts, SOME))
    monkeypatch.setattr("infra.claims.try_acquire", None)
    assert drive(experts, schedule_of(experts, SOME)) == []


@pytest.mark.parametrize("parts", [1, 3])
def test_who_holds_a_node_is_waited_for_and_when_dead_replaced(
    experts: Experts, store: Store, parts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    done = drive(experts, schedule_of(experts, CANDIDATES[:1]))
    node = next(job for job in done if isinstance(job, NodeJob))
    again = Experts(Store(store.bucket, store.endpoint, f"{store.prefix}-again"), experts.folder)
    for seed, name in enumerate(NAMES):
        again.make(name, seed)
    (key,) = keys_of(node)
    began = time.monotonic()
    assert try_acquire(again.store, key, new_owner(), expiry_s=3.0) is not None  # and never beats
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(drive, again, schedule_of(again, CANDIDATES[:1], parts), 3.0)
        while len(list(again.store.list("artifacts/"))) < 1:
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        assert not later.done(), "the other nodes are made meanwhile"
        later.result(60)
    assert time.monotonic() - began > 3.0
    assert capsys.readouterr().err.count("being made elsewhere (process ") == 1
    assert {m.key for m in manifests(again.store)} == {m.key for m in manifests(store)}
    assert_no_leftovers(again)


def test_a_root_takes_the_leases_of_all_its_merges(experts: Experts, store: Store) -> None:
    candidates = [Candidate("task_arithmetic", {"lambda": scale}) for scale in (0.25, 0.5, 1.0)]
    done = drive(experts, schedule_of(experts, candidates))
    (root,) = [job for job in done if isinstance(job, RootJob)]
    assert len(keys_of(root)) == 3
    for key in keys_of(root):
        store.delete(f"artifacts/{key}.json")
    with holding(store, keys_of(root)[1]), claimed(store, Claim(keys_of(root))) as busy:
        assert busy is not None
    assert list(store.list("leases/")) == []
    drive(experts, schedule_of(experts, candidates))


def test_a_node_whose_part_failed_makes_room_for_the_next(experts: Experts) -> None:
    """The driver gives its lease back and hands out another node's parts; only one is open at a time here."""
    store, handed = experts.store, list[Job]()
    schedule = schedule_of(experts, CANDIDATES[:1], 2)
    dispatch = Dispatch(store, schedule, Elsewhere(store), lambda job, *_: handed.append(job), lambda *_: None, 1)

    def nodes() -> list[str]:
        return list(dict.fromkeys(job.label for job in handed if isinstance(job, NodeJob)))

    try:
        dispatch.start(schedule.add_experts(experts.refs))
        (first,) = nodes()
        held = list(store.list("leases/"))
        assert len(held) == 1
        dispatch.failed(handed[0])
        assert nodes() == [first, nodes()[1]]
        assert list(store.list("leases/")) != held
        assert len(list(store.list("leases/"))) == 1
        dispatch.failed(handed[1])  # the other part of the first: nothing is held for it any more
        assert len(nodes()) == 2
    finally:
        dispatch.close()
    assert list(store.list("leases/")) == []


def test_a_failing_part_gives_the_node_back(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: Store, job: Job) -> JobResult:
        if isinstance(job, FinishJob):
            raise ZeroDivisionError
        held = [json.loads(store.get(name)) for name in store.list("leases/")]
        assert held, "the driver holds the node while its parts are made"
        return run_job(store, job)

    monkeypatch.setattr(merge.local, "run_job", fail)
    with pytest.raises(ZeroDivisionError):
        drive(experts, schedule_of(experts, CANDIDATES[:1], 2))
    assert list(experts.store.list("leases/")) == []
