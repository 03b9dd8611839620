"""The merge tree as a flow: every node once, after its inputs; what exists is found; large merges stay fast and small.

Real bytes on a real store: `test_jobs.py`. Here work is only pretended.
"""

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infra.artifacts.manifests import Manifest
from infra.engine.keyed import KeyedEngine
from infra.engine.once import every
from infra.engine.step import Step
from infra.engine.tally import Tally
from infra.errors import MergeError
from infra.store.s3 import FileRef
from merge.methods.catalogue import METHODS
from merge.methods.specs import Candidate, plan_reductions
from merge.tree.jobs import NodeJob, Ref, RootJob, TaskMaskJob
from merge.tree.reduction import MASKS, MERGES, NODES, Merges
from merge.tree.trie import FAN_INS, build_tree, path_to, post_order
from tests.pretend import InMemory, Memory, turns

BASE = "b" * 64
MEAN, TIES, SCALED = Candidate("mean"), Candidate("ties", {"density": 0.5}), Candidate("task_arithmetic")
CONSENSUS, FISHER, EMR = Candidate("consensus"), Candidate("fisher_on_support"), Candidate("emr")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def ref(name: str, content: str = "") -> Ref:
    key = sha(name + content)
    return Ref(key, sha(key), (FileRef(f"objects/{key}/1/adapter", sha(key), 1),))


@dataclass(frozen=True)
class Ran:
    """What one merge of everything did."""

    steps: list[Step]
    merged: dict[Candidate, Manifest]
    tally: Tally

    @property
    def jobs(self) -> list[Any]:
        return [step.call for step in self.steps]


def run(
    store: Memory,
    names: Sequence[str],
    *candidates: Candidate,
    fan_in: int = 4,
    rng: random.Random | None = None,
    expert: Callable[[str], Ref] = ref,
    complete: bool = False,
    workers: InMemory | None = None,
) -> Ran:
    """Merge with all candidates; experts, what is measured of them and nodes come in random order."""
    rng = rng or random.Random(0)

    async def flow() -> Ran:
        mine = workers or InMemory(store, rng)
        engine = KeyedEngine(store, mine)  # type: ignore[arg-type]
        merges = merges_of(engine, names, candidates, fan_in, rng, expert, complete)
        await every(*(merges.merge(each) for each in candidates))
        per_task = [each for each in candidates if METHODS[each.method].per_task]
        await every(*(merges.mask(each, name) for each in per_task for name in names))
        assert merges.visited == merges.nodes
        return Ran(mine.steps, merges.merged, engine.tally)

    return asyncio.run(flow())


def merges_of(
    engine: Any, names: Sequence[str], candidates: Sequence[Candidate], fan_in: int, rng: random.Random,
    expert: Callable[[str], Ref] = ref, complete: bool = False,
) -> Merges:  # fmt: skip
    async def one(name: str) -> Ref:
        await turns(rng)
        return expert(name)

    async def measurement(name: str, kind: str) -> Ref:
        await turns(rng)
        return ref(name, f"{kind} of {expert(name).key}")

    async def is_complete(kind: str | None) -> bool:
        return complete

    return Merges(engine, plan_reductions(candidates), names, fan_in, BASE, one, measurement, is_complete)


def nodes(names: Sequence[str], fan_in: int = 4) -> int:
    return len(post_order(build_tree(names, fan_in)))


def of_nodes(ran: Ran) -> list[NodeJob | RootJob]:
    return [job for job in ran.jobs if isinstance(job, NodeJob | RootJob)]


names_of = st.integers(1, 24).map(lambda n: [f"task{i}" for i in range(n)])
plans = st.lists(st.sampled_from([MEAN, TIES, SCALED, CONSENSUS, FISHER, EMR]), min_size=1, unique=True)


@given(names_of, plans, st.sampled_from(FAN_INS), st.booleans(), st.randoms())
@settings(max_examples=60, deadline=None)
def test_every_node_is_made_once_after_its_inputs_and_found_the_next_time(names, candidates, fan_in, complete, rng):
    store = Memory()
    first = run(store, names, *candidates, fan_in=fan_in, rng=rng)
    assert set(candidates) <= set(first.merged)
    keys = [key for step in first.steps for key in step.keys]
    assert len(keys) == len(set(keys))
    assert len(of_nodes(first)) == first.tally.made[NODES] == len(plan_reductions(candidates)) * nodes(names, fan_in)
    assert first.tally.reused[NODES] == first.tally.reused[MERGES] == 0
    assert first.tally.made[MASKS] == (len(names) if EMR in candidates else 0)
    before: set[str] = set()
    for step in first.steps:
        read = [child.ref.key for child in step.call.children if child.kind == "node"] if of_node(step) else []
        assert before.issuperset(read)
        before.update(step.keys)
    again = run(store, names, *candidates, fan_in=fan_in, rng=rng, complete=complete)
    assert again.steps == []
    assert +again.tally.made == {}
    assert +again.tally.reused == +first.tally.made
    assert {c: m.key for c, m in again.merged.items()} == {c: m.key for c, m in first.merged.items()}


def of_node(step: Step) -> bool:
    return not isinstance(step.call, TaskMaskJob)


@given(names_of, st.data())
@settings(max_examples=30, deadline=None)
def test_a_change_remakes_its_path_alone_but_all_of_later_rounds(names, data):
    store, changed = Memory(), data.draw(st.sampled_from(names))
    run(store, names, TIES, CONSENSUS)
    again = run(store, names, TIES, CONSENSUS, expert=lambda name: ref(name, "changed" if name == changed else ""))
    path = {node.label for node in path_to(build_tree(names, 4), changed)}
    first = {job.label for job in of_nodes(again) if job.reference is None}
    second = {job.label for job in of_nodes(again) if job.reference is not None}
    assert first == path
    assert second == {node.label for node in post_order(build_tree(names, 4))}


@given(st.integers(2, 30), st.integers(0, 29))
@example(3, 0)  # an inner node becomes the root, and the other way round
@settings(max_examples=30, deadline=None)
def test_an_added_or_removed_expert_remakes_only_nodes_that_differ(count, at):
    names = [f"task{number}" for number in range(count)]
    fewer = [name for number, name in enumerate(names) if number != at % count]
    for before, after in ((fewer, names), (names, fewer)):
        store = Memory()
        run(store, before, MEAN)
        labels = {job.label for job in of_nodes(run(store, after, MEAN))}
        *old, _ = post_order(build_tree(before, 4))  # a root stores merges, an inner node statistics
        *inner, root = post_order(build_tree(after, 4))
        assert labels == {root.label} | {node.label for node in inner if node not in old}


def test_another_scale_or_weight_remakes_what_depends_on_it():
    names = [f"task{number}" for number in range(20)]
    store = Memory()
    run(store, names, SCALED)
    jobs = run(store, names, Candidate("task_arithmetic", {"lambda": 0.9})).jobs
    assert [type(job) for job in jobs] == [RootJob]
    even = dict.fromkeys(names, 0.05)
    run(store, names, Candidate("weighted_mean", {}, even))
    moved = even | {names[0]: 0.04, names[1]: 0.06}
    jobs = run(store, names, Candidate("weighted_mean", {}, moved)).jobs
    tree = build_tree(names, 4)
    assert {job.label for job in jobs} == {node.label for name in names[:2] for node in path_to(tree, name)}


def test_two_reductions_make_a_shared_node_once():
    names = [f"task{number}" for number in range(20)]
    even = dict.fromkeys(names, 0.05)
    moved = even | {names[0]: 0.04, names[1]: 0.06}
    both = run(Memory(), names, Candidate("weighted_mean", {}, even), Candidate("weighted_mean", {}, moved))
    tree = build_tree(names, 4)
    touched = {node.label for name in names[:2] for node in path_to(tree, name)}
    assert len(both.jobs) == nodes(names) + len(touched)
    assert both.tally.made[NODES] + both.tally.reused[NODES] == 2 * nodes(names)


def test_a_job_holds_the_weights_of_its_own_experts_only():
    names = [f"task{number}" for number in range(20)]
    weights = {name: (number + 1) / 210 for number, name in enumerate(names)}
    for job in of_nodes(run(Memory(), names, Candidate("weighted_mean", {}, weights))):
        if isinstance(job, NodeJob):
            own = {child.name for child in job.children if child.kind == "expert"}
            assert dict(job.spec.weights or ()) == {name: weights[name] for name in own}
            assert job.spec.weighted


ALONE = [MEAN, TIES, SCALED, CONSENSUS, FISHER, EMR, Candidate("overlap_mean"), Candidate("consensus_ties")]


@given(names_of, st.lists(st.sampled_from(ALONE), min_size=2, unique=True), st.data())
@settings(max_examples=30, deadline=None)
def test_a_merge_that_exists_is_found_whatever_else_is_listed(names, candidates, data):
    store, some = Memory(), data.draw(st.integers(1, len(candidates) - 1))
    first = run(store, names, *candidates[:some])
    second = run(store, names, *data.draw(st.permutations(candidates)))
    lowered = [c for job in second.jobs if isinstance(job, RootJob) for c, _ in job.candidates]
    assert not set(lowered) & set(first.merged)
    assert set(lowered) | set(first.merged) >= set(second.merged)
    asked = set(candidates[:some])
    assert {c: second.merged[c].digest for c in asked} == {c: first.merged[c].digest for c in asked}
    # where all experts are there from the start, not even a node that these alone would need
    assert run(store, names, *candidates[some:], complete=True).steps == []


def test_a_merge_names_its_experts_measurements_and_reference_not_the_nodes_between():
    names = [f"task{number}" for number in range(9)]
    merged = run(Memory(), names, MEAN, FISHER, CONSENSUS).merged
    experts = {ref(name).key: ref(name).digest for name in names}
    measured = [ref(name, f"fisher of {ref(name).key}") for name in names]
    reference = merged[CONSENSUS.reference]
    assert merged[MEAN].inputs == experts
    assert merged[FISHER].inputs == experts | {each.key: each.digest for each in measured}
    assert merged[CONSENSUS].inputs == experts | {reference.key: reference.digest}


def test_a_later_round_reads_the_merge_that_it_waited_for():
    ran = run(Memory(), ["a", "b"], CONSENSUS)
    first, second = of_nodes(ran)
    assert first.reference is None
    assert second.reference == Ref.of(ran.merged[CONSENSUS.reference])


def test_fisher_waits_for_its_artifacts_and_others_do_not():
    async def flow() -> None:
        store, measured, rng = Memory(), asyncio.Event(), random.Random(0)
        engine = KeyedEngine(store, workers := InMemory(store, rng))  # type: ignore[arg-type]
        merges = merges_of(engine, ["a", "b"], [MEAN, FISHER], 4, rng)

        async def measurement(name: str, kind: str) -> Ref:
            await measured.wait()
            return ref(name, kind)

        merges._measurement = measurement
        fisher = asyncio.ensure_future(merges.merge(FISHER))
        await merges.merge(MEAN)
        assert [candidate for step in workers.steps for candidate, _ in step.call.candidates] == [MEAN]  # type: ignore[attr-defined]
        assert not fisher.done()
        measured.set()
        await fisher
        job = workers.steps[-1].call
        assert isinstance(job, RootJob)
        assert [child.measured for child in job.children] == [ref(child.name, "fisher") for child in job.children]

    asyncio.run(flow())


def test_an_artifact_made_of_other_bytes_is_made_again():
    names, store = ["a", "b", "c"], Memory()
    run(store, names, MEAN)
    other = {name: Ref(ref(name).key, sha("other bytes"), ref(name).files) for name in names}
    assert run(store, names, MEAN, expert=other.__getitem__).tally.made[NODES] == nodes(names)


class Failing(InMemory):
    """Fails at one node."""

    async def run(self, step, claim):
        if isinstance(step.call, NodeJob):
            self.steps.append(step)
            raise ZeroDivisionError(step.name)
        return await super().run(step, claim)


def test_what_does_not_depend_on_a_failure_is_done_and_each_node_tried_once():
    names, store = [f"task{number}" for number in range(20)], Memory()
    workers = Failing(store, random.Random(0))
    with pytest.raises(ZeroDivisionError):
        run(store, names, MEAN, SCALED, workers=workers)
    lowest = [n for n in post_order(build_tree(names, 4)) if all(not hasattr(c, "children") for c in n.children)]
    keys = [step.keys for step in workers.steps]
    assert len(keys) == len(set(keys)) == len(plan_reductions([MEAN, SCALED])) * len(lowest)


def test_names_that_make_no_tree_are_refused():
    with pytest.raises(MergeError, match="'a' appears twice"):
        run(Memory(), ["a", "a"], MEAN)


def test_two_thousand_experts_are_merged_quickly_in_little_memory():
    names = [f"task{number}" for number in range(2000)]
    weights = {name: 1 / 2000 for name in names}
    candidates = [MEAN, TIES, CONSENSUS, Candidate("weighted_mean", {}, weights), FISHER]
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    ran = run(Memory(), names, *candidates)
    seconds = time.perf_counter() - start
    grown = process.memory_info().rss - before
    assert ran.tally.made[NODES] == len(ran.steps) == len(plan_reductions(candidates)) * nodes(names)
    assert seconds < 60  # about 8 s on a free core
    assert grown < 300 << 20, grown
