"""Which merge job can run when: a state machine over the tree, several reductions and rounds. No Ray, no threads.

A node can run when its children exist; a later round's nodes wait for the merge that their lift reads, too, and nodes
with Fisher or Gram artifacts for those. What exists in the store is found here, so that only missing work becomes a
job: as soon as the last expert is there, the merges are looked for, and where all of a reduction exist, none of its
nodes is asked for. A caller adds experts as they appear, runs the jobs it is given, however it likes, and reports their
results (`merge.local` with threads, the pipeline with Ray). Names, keys and references pass through, never tensors.

Not here: running jobs, retries, and Fisher or Gram artifacts, which training data makes (`workers.importance`).
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from infra.artifacts import Manifest, Readable, Recipe, find, find_each
from infra.errors import MergeError
from merge.children import Part
from merge.jobs import (
    ChildRef,
    FinishJob,
    Job,
    JobResult,
    NodeJob,
    PartOutput,
    Ref,
    RootJob,
    TaskMaskJob,
    consumed,
    digests_of,
    manifests_of,
)
from merge.keys import merged_recipe, node_recipe, root_key, task_mask_recipe
from merge.methods import METHODS
from merge.reduce import Fused
from merge.specs import Candidate, LiftSpec, Reduction, candidate_lift
from merge.tree import Leaf, Node, build_tree, post_order

NODES, MASKS = "merge_nodes", "task_masks"
"""What is counted: combines of the tree, roots included, and per-task masks."""


@dataclass(frozen=True)
class _Children:
    """A node's children by name (experts) or number (nodes), in order, and the number of its parent (root: itself)."""

    of: tuple[str | int, ...]
    label: str
    parent: int


class MergeSchedule:
    """Attributes: `merged` (candidates, those that later rounds read included, in the order in which they were made),
    `masks` ((candidate, expert) of methods with per-task masks), `extras` (kinds of artifact that every expert needs
    beside its adapter: "fisher", "gram"), `made` and `reused` (counts of `NODES` and `MASKS`)."""

    def __init__(
        self,
        store: Readable,
        reductions: Sequence[Reduction],
        names: Sequence[str],
        fan_in: int,
        base_sha256: str,
        base_weights: str | None = None,
        parts: int = 1,
        fused: Fused | None = None,
    ) -> None:
        """`base_weights` is the object name of the base's weights, for the rounding loss; `parts`, how many jobs the
        tensors of one node are split over; `fused`, the rows of fused weights' parts. Raises MergeError for names or a
        fan-in that make no tree."""
        self._store, self._reductions, self._parts = store, tuple(reductions), parts
        self._fused = dict(fused or {})
        self._base_sha256, self._base_weights = base_sha256, base_weights
        self._tree = build_tree(names, fan_in)
        self._nodes, self._leaf_parents = _flatten(self._tree)
        self._root = len(self._nodes) - 1
        self._numbers = {node.label: number for number, node in enumerate(self._nodes)}
        self._missing = [[len(node.of) for node in self._nodes] for _ in self._reductions]
        self._weights = [dict(reduction.spec.weights or ()) for reduction in self._reductions]
        self._references: dict[int, Ref] = {}  # of reductions whose lift reads an earlier merge, once that exists
        self._experts: dict[str, Ref] = {}
        self._extras: dict[tuple[str, str], Ref] = {}
        self._extra_counts: Counter[str] = Counter()
        self._made_nodes: dict[tuple[int, int], Ref] = {}
        self._open = [len(self._nodes) for _ in self._reductions]
        self._missing_merges: dict[int, tuple[tuple[Candidate, Recipe], ...]] = {}  # of reductions looked up
        self._held: dict[int, list[int]] = defaultdict(list)  # ready but for the reduction's reference
        self._sharing: dict[str, list[tuple[int, int]]] = {}  # nodes whose key is being made
        self._outputs: dict[tuple[int, int], list[PartOutput | None]] = {}
        self.extras = frozenset(r.spec.extra for r in self._reductions if r.spec.extra)
        self.merged: dict[Candidate, Manifest] = {}
        self.masks: dict[tuple[Candidate, str], Manifest] = {}
        self.made: Counter[str] = Counter()
        self.reused: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """How many nodes are still to do."""
        return sum(self._open)

    @property
    def complete(self) -> bool:
        """Whether every node and every mask exists."""
        masks = len(self._leaf_parents) * sum(METHODS[candidate.method].per_task for candidate in self.merged)
        return not self.open and len(self.masks) == masks

    # -- events -------------------------------------------------------------------------------------------------

    def add_expert(self, name: str, ref: Ref) -> list[Job]:
        """An expert exists; returns the jobs that can run now."""
        return self.add_experts({name: ref})

    def add_experts(self, refs: Mapping[str, Ref]) -> list[Job]:
        """Experts exist: best all that do at once, with their extras added before, so that no node is asked for where
        the merges exist. Returns the jobs that can run now."""
        for name in refs:
            if name not in self._leaf_parents or name in self._experts:
                known = "was added already" if name in self._experts else "is not part of this merge"
                raise MergeError(f"expert {name!r} {known}")
        self._experts.update(refs)
        reductions = range(len(self._reductions))
        jobs = self._look_up(reductions)
        for name in refs:
            jobs += self._arrived(name, [number for number in reductions if self._has_leaf(number, name)])
        return jobs

    def add_extra(self, name: str, kind: str, ref: Ref) -> list[Job]:
        """An expert's Fisher or Gram artifact exists; returns the jobs that can run now."""
        if kind not in self.extras or name not in self._leaf_parents or (name, kind) in self._extras:
            raise MergeError(f"a {kind} artifact of expert {name!r} is not wanted")
        self._extras[name, kind] = ref
        self._extra_counts[kind] += 1
        if name not in self._experts:
            return []
        reading = [n for n, reduction in enumerate(self._reductions) if reduction.spec.extra == kind]
        return self._look_up(reading) + self._arrived(name, reading)

    def finished(self, job: Job, result: JobResult) -> list[Job]:
        """A job is done; returns the jobs that can run now."""
        if isinstance(job, TaskMaskJob):
            ((manifest, made),) = manifests_of(result)
            self._count(MASKS, made)
            self.masks[job.candidate, job.expert] = manifest
            return []
        whole = job.whole if isinstance(job, FinishJob) else job
        slot = whole.reduction, self._numbers[whole.label]
        if isinstance(result, PartOutput):
            return self._part_finished(slot, whole, result)
        found = manifests_of(result)
        self._outputs.pop(slot, None)  # parts that were not made: the node was made elsewhere
        if isinstance(whole, RootJob):
            self._count(NODES, any(made for _, made in found))
            self._open[whole.reduction] -= 1
            candidates = [candidate for candidate, _ in whole.candidates]
            merges = zip(candidates, (manifest for manifest, _ in found), strict=True)
            return [later for candidate, manifest in merges for later in self._merged(candidate, manifest)]
        ((manifest, made),) = found
        ready = []
        for number, (reduction, node) in enumerate(self._sharing.pop(whole.recipe.key)):
            if self._open[reduction]:  # else all its merges were found meanwhile
                self._count(NODES, made and number == 0)
                ready += self._node_exists(reduction, node, Ref.of(manifest))
        return self._start(ready)

    # -- merges that exist ----------------------------------------------------------------------------------------

    def _has_leaf(self, reduction: int, name: str) -> bool:
        """Whether all that the reduction reads of this expert is there."""
        extra = self._reductions[reduction].spec.extra
        return name in self._experts and (extra is None or (name, extra) in self._extras)

    def _look_up(self, reductions: Iterable[int]) -> list[Job]:
        """Find the merges of these reductions, once everything that they are functions of is known."""
        if len(self._experts) < len(self._leaf_parents):
            return []
        jobs: list[Job] = []
        for number in reductions:
            waits = self._reductions[number].spec.reference is not None and number not in self._references
            kind = self._reductions[number].spec.extra
            lacks = kind is not None and self._extra_counts[kind] < len(self._leaf_parents)
            if number in self._missing_merges or waits or lacks:
                continue
            keys, inputs = self._root_keys(number), self._root_inputs(number)
            recipes = [(c, merged_recipe(c, keys[candidate_lift(c)])) for c in self._reductions[number].candidates]
            found = [find(self._store, recipe.key, inputs) for _, recipe in recipes]
            self._missing_merges[number] = tuple(r for r, hit in zip(recipes, found, strict=True) if hit is None)
            if not self._missing_merges[number]:
                self.reused[NODES] += self._open[number]
                self._open[number] = 0
            for (candidate, _), hit in zip(recipes, found, strict=True):
                jobs += self._merged(candidate, hit) if hit is not None else []
        return jobs

    def _root_keys(self, reduction: int) -> dict[LiftSpec, str]:
        """The root's key for each distinct lift of the reduction's candidates."""
        extra, reference = self._reductions[reduction].spec.extra, self._references.get(reduction)
        experts = {name: ref.key for name, ref in self._experts.items()}
        extras = {name: ref.key for (name, kind), ref in self._extras.items() if kind == extra}
        lifts = {candidate_lift(candidate) for candidate in self._reductions[reduction].candidates}
        after = reference.key if reference else None
        return {lift: root_key(lift, self._tree, experts, extras, after) for lift in lifts}

    def _root_inputs(self, reduction: int) -> dict[str, str]:
        """Digests of all that the reduction's merges are functions of."""
        extra, reference = self._reductions[reduction].spec.extra, self._references.get(reduction)
        extras = [ref for (_, kind), ref in self._extras.items() if kind == extra]
        return digests_of([*self._experts.values(), *extras, *([reference] if reference else [])])

    # -- what follows -------------------------------------------------------------------------------------------

    def _arrived(self, name: str, reductions: Iterable[int]) -> list[Job]:
        """A leaf is complete for these reductions."""
        parent = self._leaf_parents[name]
        return self._start([slot for number in reductions for slot in self._child_exists(number, parent)])

    def _child_exists(self, reduction: int, parent: int) -> list[tuple[int, int]]:
        """The parent, if that was its last missing child."""
        self._missing[reduction][parent] -= 1
        return [(reduction, parent)] if not self._missing[reduction][parent] else []

    def _node_exists(self, reduction: int, node: int, ref: Ref) -> list[tuple[int, int]]:
        self._open[reduction] -= 1
        self._made_nodes[reduction, node] = ref
        return self._child_exists(reduction, self._nodes[node].parent)

    def _start(self, slots: Iterable[tuple[int, int]]) -> list[Job]:
        """Jobs for nodes whose children exist; what the store has is followed up to where something is missing."""
        jobs: list[Job] = []
        ready = deque(slots)
        while ready:
            reduction, node = ready.popleft()
            if not self._open[reduction]:
                continue  # all its merges exist
            if self._reductions[reduction].spec.reference is not None and reduction not in self._references:
                self._held[reduction].append(node)
            elif node == self._root:
                jobs += self._split((reduction, node), self._root_job(reduction))
            else:
                found = self._start_node(reduction, node)
                jobs += found if isinstance(found, list) else []
                ready += self._node_exists(reduction, node, found) if isinstance(found, Ref) else []
        return jobs

    def _start_node(self, reduction: int, node: int) -> list[Job] | Ref:
        """Jobs for an inner node, or where it is."""
        children, recipe = self._inputs(reduction, node)
        if recipe.key in self._sharing:
            self._sharing[recipe.key].append((reduction, node))
            return []
        found = find(self._store, recipe.key, consumed(children, self._references.get(reduction)))
        if found is not None:
            self._count(NODES, made=False)
            return Ref.of(found)
        self._sharing[recipe.key] = [(reduction, node)]
        job = NodeJob(
            reduction=reduction,
            label=self._nodes[node].label,
            spec=self._local_spec(reduction, children),
            children=children,
            base_sha256=self._base_sha256,
            reference=self._references.get(reduction),
            recipe=recipe,
        )
        return self._split((reduction, node), job)

    def _root_job(self, reduction: int) -> RootJob:
        """The root, for the merges that were not found when its last input appeared."""
        children, _ = self._inputs(reduction, self._root)
        return RootJob(
            reduction=reduction,
            label=self._nodes[self._root].label,
            spec=self._reductions[reduction].spec,
            children=children,
            base_sha256=self._base_sha256,
            reference=self._references.get(reduction),
            base_weights=self._base_weights,
            candidates=self._missing_merges[reduction],
            inputs=self._root_inputs(reduction),
            fused=self._fused,
        )

    def _merged(self, candidate: Candidate, manifest: Manifest) -> list[Job]:
        """A candidate exists: its task masks and the rounds that read it can follow."""
        self.merged[candidate] = manifest
        jobs: list[Job] = []
        if METHODS[candidate.method].per_task:
            jobs += self._start_masks(candidate)
        for number, reduction in enumerate(self._reductions):
            if reduction.spec.reference == candidate:
                self._references[number] = Ref.of(manifest)
                jobs += self._look_up([number])
                jobs += self._start([(number, node) for node in self._held.pop(number, [])])
        return jobs

    def _start_masks(self, candidate: Candidate) -> list[Job]:
        unified, experts = Ref.of(self.merged[candidate]), [(name, self._experts[name]) for name in self._leaf_parents]
        recipes = [task_mask_recipe(candidate, unified.key, expert.key) for _, expert in experts]
        consumed = [{unified.key: unified.digest, expert.key: expert.digest} for _, expert in experts]
        looked = find_each(self._store, [(r.key, inputs) for r, inputs in zip(recipes, consumed, strict=True)])
        jobs: list[Job] = []
        for (name, expert), recipe, found in zip(experts, recipes, looked, strict=True):
            if found is None:
                jobs.append(TaskMaskJob(name, candidate, recipe, unified, expert))
            else:
                self._count(MASKS, made=False)
                self.masks[candidate, name] = found
        return jobs

    # -- parts --------------------------------------------------------------------------------------------------

    def _split(self, slot: tuple[int, int], job: NodeJob | RootJob) -> list[Job]:
        if self._parts == 1:
            return [job]
        self._outputs[slot] = [None] * self._parts
        return [replace(job, part=Part(number, self._parts)) for number in range(self._parts)]

    def _part_finished(self, slot: tuple[int, int], job: NodeJob | RootJob, output: PartOutput) -> list[Job]:
        assert job.part is not None
        outputs = self._outputs[slot]
        outputs[job.part.index] = output
        done = tuple(each for each in outputs if each is not None)
        if len(done) < self._parts:
            return []
        del self._outputs[slot]
        return [FinishJob(replace(job, part=None), done)]

    # -- inputs -------------------------------------------------------------------------------------------------

    def _inputs(self, reduction: int, node: int) -> tuple[tuple[ChildRef, ...], Recipe]:
        """A node's children, which are asked for once, and its recipe."""
        spec = self._reductions[reduction].spec
        children = []
        for child in self._nodes[node].of:
            if isinstance(child, str):
                extra = self._extras[child, spec.extra] if spec.extra else None
                children.append(ChildRef("expert", child, self._experts[child], extra))
            else:
                ref = self._made_nodes.pop((reduction, child))
                children.append(ChildRef("node", self._nodes[child].label, ref, experts=tuple(self._below(child))))
        experts = [child for child in children if child.kind == "expert"]
        reference = self._references.get(reduction)
        recipe = node_recipe(
            spec,
            [child.ref.key for child in children],
            [self._weights[reduction][child.name] for child in experts] if spec.weighted else (),
            [child.extra.key for child in experts if child.extra],
            reference.key if reference else None,
        )
        return tuple(children), recipe

    def _below(self, node: int) -> Iterator[str]:
        """Names of a node's experts, in the order of the tree."""
        for child in self._nodes[node].of:
            if isinstance(child, str):
                yield child
            else:
                yield from self._below(child)

    def _local_spec(self, reduction: int, children: Sequence[ChildRef]) -> LiftSpec:
        """The reduction's spec with the weights of these children only: a job of a large merge stays small."""
        spec = self._reductions[reduction].spec
        if not spec.weighted:
            return spec
        own = self._weights[reduction]
        return replace(spec, weights=tuple((c.name, own[c.name]) for c in children if c.kind == "expert"))

    def _count(self, what: str, made: bool) -> None:
        (self.made if made else self.reused)[what] += 1


def _flatten(tree: Node) -> tuple[list[_Children], dict[str, int]]:
    """The tree's nodes by number, children before parents, and every expert's parent."""
    order = post_order(tree)
    numbers = {node.label: number for number, node in enumerate(order)}
    parents: dict[str | int, int] = {numbers[tree.label]: numbers[tree.label]}
    children: list[tuple[str | int, ...]] = []
    for number, node in enumerate(order):
        of = tuple(child.name if isinstance(child, Leaf) else numbers[child.label] for child in node.children)
        children.append(of)
        parents.update(dict.fromkeys(of, number))
    nodes = [_Children(of, order[number].label, parents[number]) for number, of in enumerate(children)]
    return nodes, {child: number for child, number in parents.items() if isinstance(child, str)}
