"""The merge schedule: every node once, after its inputs; what exists is found; large merges stay fast and small.

Real bytes on a real store: `test_jobs.py`. Here jobs are only pretended to run.
"""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infra.artifacts import Manifest, Recipe, manifest_name
from infra.errors import MergeError
from infra.store import FileRef, ObjectInfo
from merge.jobs import FinishJob, Job, JobResult, NodeJob, PartOutput, Ref, RootJob, TaskMaskJob, consumed
from merge.reduce import NodeInfo
from merge.schedule import MASKS, NODES, MergeSchedule
from merge.specs import Candidate, plan_reductions
from merge.tree import FAN_INS, build_tree, path_to, post_order

BASE = "b" * 64
MEAN, TIES, SCALED = Candidate("mean"), Candidate("ties", {"density": 0.5}), Candidate("task_arithmetic")
CONSENSUS, FISHER, EMR = Candidate("consensus"), Candidate("fisher_on_support"), Candidate("emr")


class Memory:
    """Manifests by name: as much of a store as finding artifacts takes."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def get_with_etag(self, name: str) -> tuple[bytes, str] | None:
        return (self.objects[name], "") if name in self.objects else None

    def head(self, name: str) -> ObjectInfo | None:
        return ObjectInfo(1, "")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def ref(name: str, content: str = "") -> Ref:
    key = sha(name + content)
    return Ref(key, sha(key), (FileRef(f"objects/{key}/1/adapter", sha(key), 1),))


def publish(store: Memory, recipe: Recipe, inputs: dict[str, str]) -> tuple[Manifest, bool]:
    file = FileRef(f"objects/{recipe.key}/1/file", sha(recipe.key), 1)
    manifest = Manifest(recipe.key, recipe.kind, recipe.version, dict(recipe.config), {"file": file}, inputs)
    store.objects[manifest_name(recipe.key)] = manifest.to_json()
    return manifest, True


def pretend(store: Memory, job: Job) -> JobResult:
    """What running the job would answer."""
    if isinstance(job, TaskMaskJob):
        inputs = {job.unified.key: job.unified.digest, job.adapter.key: job.adapter.digest}
        return (publish(store, job.recipe, inputs),)
    whole = job.whole if isinstance(job, FinishJob) else job
    if not isinstance(job, FinishJob) and job.part is not None:
        return PartOutput({}, NodeInfo((), 0, 0, 0), 0.0)
    if isinstance(whole, NodeJob):
        return (publish(store, whole.recipe, consumed(whole.children, whole.reference)),)
    return tuple(publish(store, recipe, dict(whole.inputs)) for _, recipe in whole.candidates)


def schedule(store: Any, names: Sequence[str], *candidates: Candidate, **options: Any) -> MergeSchedule:
    settings = {"fan_in": 4, "base_sha256": BASE} | options
    return MergeSchedule(store, plan_reductions(candidates), names, **settings)


def run(
    made: MergeSchedule,
    store: Memory,
    names: Sequence[str],
    rng: random.Random | None = None,
    expert: Callable[[str], Ref] = ref,
) -> list[Job]:
    """Add everything and pretend all jobs, in random order; returns them as they were given out."""
    rng = rng or random.Random(0)
    events = [("expert", name) for name in names] + [(kind, name) for kind in made.extras for name in names]
    rng.shuffle(events)
    waiting: list[Job] = []
    given: list[Job] = []
    while events or waiting:
        if events and (not waiting or rng.random() < 0.5):
            kind, name = events.pop()
            found = (
                made.add_expert(name, expert(name))
                if kind == "expert"
                else made.add_extra(name, kind, ref(name, f"{kind} of {expert(name).key}"))
            )
        else:
            job = waiting.pop(rng.randrange(len(waiting)))
            found = made.finished(job, pretend(store, job))
        waiting += found
        given += found
    return given


def nodes(names: Sequence[str], fan_in: int = 4) -> int:
    return len(post_order(build_tree(names, fan_in)))


names_of = st.integers(1, 24).map(lambda n: [f"task{i}" for i in range(n)])
plans = st.lists(st.sampled_from([MEAN, TIES, SCALED, CONSENSUS, FISHER, EMR]), min_size=1, unique=True)


@given(names_of, plans, st.sampled_from(FAN_INS), st.integers(1, 3), st.randoms())
@settings(max_examples=60, deadline=None)
def test_every_node_is_made_once_after_its_inputs_and_found_the_next_time(names, candidates, fan_in, parts, rng):
    store = Memory()
    first = schedule(store, names, *candidates, fan_in=fan_in, parts=parts)
    given_out = run(first, store, names, rng)
    assert first.complete
    assert set(candidates) <= set(first.merged)
    whole = [job for job in given_out if isinstance(job, FinishJob if parts > 1 else NodeJob | RootJob)]
    labels = [(j.reduction, j.label) for j in (job.whole if isinstance(job, FinishJob) else job for job in whole)]
    assert len(labels) == len(set(labels)) == first.made[NODES]
    reductions = plan_reductions(candidates)
    assert first.made[NODES] + first.reused[NODES] == len(reductions) * nodes(names, fan_in)
    assert first.reused[NODES] == 0
    assert first.made[MASKS] == (len(names) if EMR in candidates else 0)
    again = schedule(store, names, *candidates, fan_in=fan_in)
    assert run(again, store, names, rng) == []
    assert again.complete
    assert (again.made, again.reused) == (Counter(), first.made)
    assert {c: m.key for c, m in again.merged.items()} == {c: m.key for c, m in first.merged.items()}


@given(names_of, st.data())
@settings(max_examples=30, deadline=None)
def test_a_change_remakes_its_path_alone_but_all_of_later_rounds(names, data):
    store, changed = Memory(), data.draw(st.sampled_from(names))
    run(schedule(store, names, TIES, CONSENSUS), store, names)
    again = schedule(store, names, TIES, CONSENSUS)
    jobs = run(again, store, names, expert=lambda name: ref(name, "changed" if name == changed else ""))
    path = {node.label for node in path_to(build_tree(names, 4), changed)}
    by_round = {reduction.round: set() for reduction in plan_reductions([TIES, CONSENSUS])}
    for job in jobs:
        by_round[plan_reductions([TIES, CONSENSUS])[job.reduction].round].add(job.label)
    assert by_round[1] == path
    assert by_round[2] == {node.label for node in post_order(build_tree(names, 4))}


@given(st.integers(2, 30), st.integers(0, 29))
@example(3, 0)  # an inner node becomes the root, and the other way round
@settings(max_examples=30, deadline=None)
def test_an_added_or_removed_expert_remakes_only_nodes_that_differ(count, at):
    names = [f"task{number}" for number in range(count)]
    fewer = [name for number, name in enumerate(names) if number != at % count]
    for before, after in ((fewer, names), (names, fewer)):
        store = Memory()
        run(schedule(store, before, MEAN), store, before)
        again = schedule(store, after, MEAN)
        labels = {job.label for job in run(again, store, after)}
        *old, _ = post_order(build_tree(before, 4))  # a root stores merges, an inner node statistics
        *inner, root = post_order(build_tree(after, 4))
        assert labels == {root.label} | {node.label for node in inner if node not in old}


def test_another_scale_or_weight_remakes_what_depends_on_it():
    names = [f"task{number}" for number in range(20)]
    store = Memory()
    run(schedule(store, names, SCALED), store, names)
    jobs = run(schedule(store, names, Candidate("task_arithmetic", {"lambda": 0.9})), store, names)
    assert [type(job) for job in jobs] == [RootJob]
    even = dict.fromkeys(names, 0.05)
    run(schedule(store, names, Candidate("weighted_mean", {}, even)), store, names)
    moved = even | {names[0]: 0.04, names[1]: 0.06}
    jobs = run(schedule(store, names, Candidate("weighted_mean", {}, moved)), store, names)
    tree = build_tree(names, 4)
    expected = {node.label for name in names[:2] for node in path_to(tree, name)}
    assert {job.label for job in jobs} == expected


def test_two_reductions_make_a_shared_node_once():
    names = [f"task{number}" for number in range(20)]
    even = dict.fromkeys(names, 0.05)
    moved = even | {names[0]: 0.04, names[1]: 0.06}
    store = Memory()
    both = schedule(store, names, Candidate("weighted_mean", {}, even), Candidate("weighted_mean", {}, moved))
    jobs = run(both, store, names)
    tree = build_tree(names, 4)
    touched = {node.label for name in names[:2] for node in path_to(tree, name)}
    assert len(jobs) == nodes(names) + len(touched)
    assert both.made[NODES] + both.reused[NODES] == 2 * nodes(names)
    assert both.complete


def test_a_job_holds_the_weights_of_its_own_experts_only():
    names = [f"task{number}" for number in range(20)]
    weights = {name: (number + 1) / 210 for number, name in enumerate(names)}
    jobs = run(schedule(Memory(), names, Candidate("weighted_mean", {}, weights)), Memory(), names)
    for job in jobs:
        if isinstance(job, NodeJob):
            own = {child.name for child in job.children if child.kind == "expert"}
            assert dict(job.spec.weights or ()) == {name: weights[name] for name in own}
            assert job.spec.weighted


ALONE = [MEAN, TIES, SCALED, CONSENSUS, FISHER, EMR, Candidate("overlap_mean"), Candidate("consensus_ties")]


@given(names_of, st.lists(st.sampled_from(ALONE), min_size=2, unique=True), st.data())
@settings(max_examples=30, deadline=None)
def test_a_merge_that_exists_is_found_whatever_else_is_listed(names, candidates, data):
    store, some = Memory(), data.draw(st.integers(1, len(candidates) - 1))
    first = schedule(store, names, *candidates[:some])
    run(first, store, names)
    second = schedule(store, names, *data.draw(st.permutations(candidates)))
    lowered = [c for job in run(second, store, names) if isinstance(job, RootJob) for c, _ in job.candidates]
    assert not set(lowered) & set(first.merged)
    assert set(lowered) | set(first.merged) == set(second.merged)
    assert {c: second.merged[c] for c in first.merged} == first.merged
    fewer = schedule(store, names, *candidates[some:])
    every = {name: ref(name) for name in names}
    for kind in fewer.extras:
        for name in names:
            assert fewer.add_extra(name, kind, ref(name, f"{kind} of {every[name].key}")) == []
    assert fewer.add_experts(every) == []  # not even a node that these alone would need
    assert fewer.complete


def test_a_merge_names_its_experts_extras_and_reference_not_the_nodes_between():
    names, store = [f"task{number}" for number in range(9)], Memory()
    made = schedule(store, names, MEAN, FISHER, CONSENSUS)
    run(made, store, names)
    experts = {ref(name).key: ref(name).digest for name in names}
    extras = [ref(name, f"fisher of {ref(name).key}") for name in names]
    reference = made.merged[CONSENSUS.reference]
    assert made.merged[MEAN].inputs == experts
    assert made.merged[FISHER].inputs == experts | {each.key: each.digest for each in extras}
    assert made.merged[CONSENSUS].inputs == experts | {reference.key: reference.digest}


def test_a_later_round_waits_for_the_merge_that_it_reads():
    names = ["a", "b"]
    store = Memory()
    made = schedule(store, names, CONSENSUS)
    first = made.add_expert("a", ref("a")) + made.add_expert("b", ref("b"))
    assert [job.reduction for job in first] == [0]
    assert first[0].reference is None
    (second,) = made.finished(first[0], pretend(store, first[0]))
    assert isinstance(second, RootJob)
    assert second.reference == Ref.of(made.merged[CONSENSUS.reference])
    assert not made.complete
    made.finished(second, pretend(store, second))
    assert made.complete


def test_fisher_waits_for_its_artifacts_and_others_do_not():
    made = schedule(Memory(), ["a", "b"], MEAN, FISHER)
    assert made.extras == {"fisher"}
    assert made.add_extra("a", "fisher", ref("fa")) == []
    jobs = made.add_expert("a", ref("a")) + made.add_expert("b", ref("b"))
    assert [candidate for job in jobs for candidate, _ in job.candidates] == [MEAN]
    (job,) = made.add_extra("b", "fisher", ref("fb"))
    assert [child.extra for child in job.children] == [
        {"a": ref("fa"), "b": ref("fb")}[child.name] for child in job.children
    ]
    with pytest.raises(MergeError, match="gram artifact of expert 'a' is not wanted"):
        made.add_extra("a", "gram", ref("g"))
    with pytest.raises(MergeError, match="'a' was added already"):
        made.add_expert("a", ref("a"))
    with pytest.raises(MergeError, match="'c' is not part of this merge"):
        made.add_expert("c", ref("c"))


def test_an_artifact_made_of_other_bytes_is_made_again():
    names, store = ["a", "b", "c"], Memory()
    run(schedule(store, names, MEAN), store, names)
    other = {name: Ref(ref(name).key, sha("other bytes"), ref(name).files) for name in names}
    again = schedule(store, names, MEAN)
    run(again, store, names, expert=other.__getitem__)
    assert again.made[NODES] == nodes(names)


def test_two_thousand_experts_are_scheduled_quickly_in_little_memory():
    names = [f"task{number}" for number in range(2000)]
    weights = {name: 1 / 2000 for name in names}
    candidates = [MEAN, TIES, CONSENSUS, Candidate("weighted_mean", {}, weights), FISHER]
    store = Memory()
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    made = schedule(store, names, *candidates)
    jobs = run(made, store, names)
    seconds = time.perf_counter() - start
    grown = process.memory_info().rss - before
    assert made.complete
    assert made.made[NODES] == len(plan_reductions(candidates)) * nodes(names)
    assert len(jobs) == made.made[NODES]
    assert seconds < 30  # about 2 s on a free core
    assert grown < 150 << 20, grown  # about 25 MiB
