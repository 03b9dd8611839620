"""One tree in the hands of several drivers at once: every artifact is made once, and a dead holder replaced."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts.claims import Busy, Claim, claimed
from infra.artifacts.leases import holding, new_owner, try_acquire
from infra.artifacts.manifests import Manifest
from infra.engine.step import Answer, Made, Place, Step, Work
from infra.store.s3 import Store
from merge.methods.specs import Candidate
from merge.tree.jobs import NodeJob
from merge.tree.reduction import NODES
from tests.merge.tree.test_jobs import CANDIDATES, NAMES, Experts, Recording, Stored

SOME = [Candidate("mean"), Candidate("ties"), Candidate("sce", {"density": 0.5}), Candidate("emr")]


@pytest.fixture
def experts(store: Store, tmp_path: Path) -> Experts:
    found = Experts(store, tmp_path)
    for seed, name in enumerate(NAMES):
        found.make(name, seed)
    return found


def drive(
    experts: Experts, candidates: Sequence[Candidate], expiry_s: float = 60.0, workers: Recording | None = None
) -> tuple[Stored, list[Any]]:
    """Merge with all candidates; what there is, and the jobs that were run here."""
    workers = workers or Recording(experts.store, {"node": 2})
    return experts.stored(workers, NAMES, candidates, expiry_s=expiry_s), workers.jobs


def manifests(store: Store) -> Iterator[Manifest]:
    return (Manifest.from_json(store.get(name)) for name in store.list("artifacts/"))


def assert_no_leftovers(experts: Experts) -> None:
    """No lease, and no bytes of an attempt that was not published: nothing was made twice."""
    store = experts.store
    assert list(store.list("leases/")) == []
    published = {ref.name for manifest in manifests(store) for ref in manifest.files.values()}
    given = {ref.files[0].name for ref in [*experts.refs.values(), *experts.measured.values()]}
    assert set(store.list("objects/")) == published | given


class Slow(Recording):
    """Counts what was made, and holds every lease a little longer."""

    def __init__(self, experts: Experts, worked: Counter[str]) -> None:
        super().__init__(experts.store, {"node": 2})
        self._store_of, self._worked = experts.store, worked

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        return await super().run(replace(step, call=SlowWork(step.call, self._worked)), claim)


@dataclass(frozen=True)
class SlowWork:
    call: Work
    worked: Counter[str]

    def __call__(self, store: Store, place: Place) -> Made:
        before = set(store.list("artifacts/"))
        result = self.call(store, place)
        with GUARD:
            self.worked.update(manifest.key for manifest, made in result if made)
        time.sleep(0.02)
        assert before <= set(store.list("artifacts/"))
        return result


GUARD = threading.Lock()


def test_drivers_at_the_same_time_share_the_work(experts: Experts) -> None:
    """The second asks for other candidates too."""
    others = [*SOME[1:], Candidate("magmax"), Candidate("task_arithmetic", {"lambda": 0.7})]
    worked: Counter[str] = Counter()
    start = threading.Barrier(2)

    def run(candidates: Sequence[Candidate]) -> Stored:
        start.wait()
        return drive(experts, candidates, workers=Slow(experts, worked))[0]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, (SOME, others))
    assert set(worked) == {manifest.key for manifest in manifests(experts.store)}
    assert set(worked.values()) == {1}
    both = set(SOME) & set(others)
    assert {first.merged[c].digest for c in both} == {second.merged[c].digest for c in both}
    assert first.tally.reused[NODES] + second.tally.reused[NODES] > 0
    assert_no_leftovers(experts)


def test_a_driver_with_nothing_to_do_takes_no_lease(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    drive(experts, SOME)
    monkeypatch.setattr("infra.artifacts.claims.try_acquire", None)
    assert drive(experts, SOME)[1] == []


def test_who_holds_a_node_is_waited_for_and_when_dead_replaced(
    experts: Experts, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    _, done = drive(experts, CANDIDATES[:1])
    node = next(job for job in done if isinstance(job, NodeJob))
    again = Experts(Store(store.bucket, store.endpoint, f"{store.prefix}-again"), experts.folder)
    for seed, name in enumerate(NAMES):
        again.make(name, seed)
    key = node.recipe.key
    began = time.monotonic()
    assert try_acquire(again.store, key, new_owner(), expiry_s=3.0) is not None  # and never beats
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(drive, again, CANDIDATES[:1], 3.0)
        while len(list(again.store.list("artifacts/"))) < 1:
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        assert not later.done(), "the other nodes are made meanwhile"
        later.result(60)
    assert time.monotonic() - began > 3.0
    assert capsys.readouterr().err.count("being made elsewhere (process ") == 1
    assert {m.key for m in manifests(again.store)} == {m.key for m in manifests(store)}
    assert_no_leftovers(again)


class Held(Recording):
    """Notes which keys were claimed together."""

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        self.held.append(claim.keys)
        return await super().run(step, claim)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.held: list[tuple[str, ...]] = []


def test_a_root_takes_the_leases_of_all_its_merges(experts: Experts, store: Store) -> None:
    candidates = [Candidate("task_arithmetic", {"lambda": scale}) for scale in (0.25, 0.5, 1.0)]
    workers = Held(experts.store, {"node": 2})
    drive(experts, candidates, workers=workers)
    (keys,) = [keys for keys in workers.held if len(keys) > 1]
    assert len(keys) == 3
    for key in keys:
        store.delete(f"artifacts/{key}.json")
    with holding(store, keys[1]), claimed(store, Claim(keys)) as busy:
        assert busy is not None
    assert list(store.list("leases/")) == []
    drive(experts, candidates)
