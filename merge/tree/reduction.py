"""The merges of a run as a flow: a recursion over the tree, awaited.

A node is made when its children are there, while other experts still train; a later round reads the merge that it
awaits, and nodes that read measurements of experts await those. Where every expert is there from the start, merges are
looked for before nodes, so that a node which only they would need is not made again. Names, keys and references pass
through, never tensors.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from infra.artifacts.manifests import Manifest, Recipe
from infra.engine.once import Failed, Once, every
from infra.engine.step import Engine, Needs, Step
from infra.errors import MergeError
from merge.methods.catalogue import METHODS
from merge.methods.specs import Candidate, LiftSpec, Reduction, candidate_lift, check_without_model
from merge.tree.jobs import ChildRef, NodeJob, Ref, RootJob, TaskMaskJob, consumed, digests_of
from merge.tree.keys import merged_recipe, node_recipe, root_key, task_mask_recipe
from merge.tree.reduce import NOT_FUSED, Fused
from merge.tree.trie import Leaf, Node, build_tree, leaf_names, post_order

NODES, MERGES, MASKS = "merge_nodes", "merges", "task_masks"
"""What is counted: combines of the tree (roots included), candidates that roots are lowered to, and masks of tasks."""

_NODE = Needs("node")


class Merges:
    """The merges of one tree of experts. Each is made once, however often it is awaited."""

    def __init__(
        self,
        engine: Engine,
        reductions: Sequence[Reduction],
        names: Sequence[str],
        fan_in: int,
        base_sha256: str,
        expert: Callable[[str], Awaitable[Ref]],
        measurement: Callable[[str, str], Awaitable[Ref]],
        complete: Callable[[str | None], Awaitable[bool]],
        base_weights: str | None = None,
        fused: Fused = NOT_FUSED,
        by_model: Callable[[Candidate, Ref], Step] | None = None,
        tell: Callable[[str, Manifest], None] = lambda name, made: None,
        failed: Callable[[str, Exception], Exception] = lambda name, error: error,
    ) -> None:
        """`expert(name)` gives an expert, `measurement(name, kind)` one of its measurements, `complete(kind)` whether
        every expert, and its measurement of that kind, is there without being made. `base_weights` is the object name
        of the base's weights, for the rounding loss; `fused`, the rows of fused weights' parts.
        `by_model(candidate, reference)` is the step of a merge that is made by running a model, where that can be done.

        `tell` hears of what was made by the name of its step; `failed` says what to raise where one failed.

        Raises MergeError for names or a fan-in that make no tree.
        """
        self._engine, self._once, self._tell, self._failed = engine, Once(), tell, failed
        self._expert, self._measurement, self._complete = expert, measurement, complete
        self._base_sha256, self._base_weights, self._fused = base_sha256, base_weights, fused
        self._by_model = by_model
        self._reductions = tuple(reductions)
        self._of = {candidate: at for at, each in enumerate(self._reductions) for candidate in each.candidates}
        self._weights = [dict(each.spec.weights or ()) for each in self._reductions]
        self._tree = build_tree(names, fan_in)
        self._names = leaf_names(self._tree)
        self._nodes = len(post_order(self._tree))
        self._visited = [0] * len(self._reductions)
        self._settled: set[int] = set()  # reductions of which every merge was found
        self._arrived: dict[str | None, set[str]] = {each.spec.measurement: set() for each in self._reductions}
        self.merged: dict[Candidate, Manifest] = {}
        """What is there so far, merges that only later rounds read included."""

    @property
    def nodes(self) -> int:
        """Combines of all reductions together."""
        return self._nodes * len(self._reductions)

    @property
    def visited(self) -> int:
        """Combines that are asked for, or known not to be needed."""
        return sum(self._visited)

    async def merge(self, candidate: Candidate) -> Manifest:
        """A candidate's merge, as soon as it is there."""
        if METHODS[candidate.method].by_model:
            manifest = await self._once(("by model", candidate), lambda: self._modelled(candidate))
        else:
            at = self._of[candidate]
            existing, _ = await self._once(("existing", at), lambda: self._start(at))
            manifest = existing.get(candidate) or (await self._once(("root", at), lambda: self._root(at)))[candidate]
        self.merged[candidate] = manifest
        return manifest

    async def _modelled(self, candidate: Candidate) -> Manifest:
        if self._by_model is None or candidate.reference is None:
            check_without_model(candidate)
            raise MergeError(f"{candidate} names no merge to start from")
        reference = Ref.of(await self.merge(candidate.reference))
        return (await self._make(self._by_model(candidate, reference)))[0]

    async def mask(self, candidate: Candidate, name: str) -> Manifest:
        """An expert's mask of a method that needs the task at inference."""
        unified, adapter = Ref.of(await self.merge(candidate)), await self._expert(name)
        job = TaskMaskJob(name, candidate, task_mask_recipe(candidate, unified.key, adapter.key), unified, adapter)
        step = Step(MASKS, f"{candidate.method} mask of {name}", (job.recipe,), job.inputs, job, _NODE, "mask")
        return (await self._make(step))[0]

    # -- one reduction ------------------------------------------------------------------------------------------

    async def _start(self, at: int) -> tuple[dict[Candidate, Manifest], tuple[tuple[Candidate, Recipe], ...]]:
        """The reduction's merges that exist, and the recipes of the others. Nodes are begun unless all experts are
        there and all merges exist."""
        if not await self._complete(self._reductions[at].spec.measurement):
            self._once(("children", at), lambda: self._children(at, self._tree))
        existing, missing = await self._existing(at)
        if not missing:
            self._settled.add(at)
            self._engine.tally.add(NODES, 0, self._nodes - self._visited[at])
            self._visited[at] = self._nodes
        return existing, missing

    async def _existing(self, at: int) -> tuple[dict[Candidate, Manifest], tuple[tuple[Candidate, Recipe], ...]]:
        inputs, candidates = await self._inputs(at), self._reductions[at].candidates
        keys = await self._root_keys(at)
        recipes = [(each, merged_recipe(each, keys[candidate_lift(each, len(self._names))])) for each in candidates]
        looked = await self._engine.find([(recipe.key, inputs) for _, recipe in recipes])
        existing = {each: found for each, found in zip(candidates, looked, strict=True) if found is not None}
        self._engine.tally.add(MERGES, 0, len(existing))
        return existing, tuple(pair for pair in recipes if pair[0] not in existing)

    async def _root(self, at: int) -> dict[Candidate, Manifest]:
        """The merges that did not exist when the last input appeared."""
        spec = self._reductions[at].spec
        _, missing = await self._once(("existing", at), lambda: self._start(at))
        children = await self._once(("children", at), lambda: self._children(at, self._tree))
        job = RootJob(
            label=self._tree.label,
            spec=spec,
            children=tuple(children),
            base_sha256=self._base_sha256,
            reference=await self._reference(at),
            base_weights=self._base_weights,
            candidates=missing,
            inputs=await self._inputs(at),
            fused=self._fused,
        )
        recipes = tuple(recipe for _, recipe in missing)
        made = await self._make(Step(NODES, "merge root", recipes, job.inputs, job, _NODE, "adapter", each=MERGES))
        self._visited[at] += 1
        return {candidate: manifest for (candidate, _), manifest in zip(missing, made, strict=True)}

    async def _make(self, step: Step) -> list[Manifest]:
        try:
            made = await self._engine.make(step)
        except Exception as error:
            raise self._failed(step.name, error) from error
        new = [manifest for manifest, is_new in made if is_new]
        if new:
            self._tell(step.name, new[-1])
        return [manifest for manifest, _ in made]

    async def _children(self, at: int, node: Node) -> list[ChildRef]:
        return await every(*(self._child(at, child) for child in node.children))

    async def _child(self, at: int, child: Node | Leaf) -> ChildRef:
        if isinstance(child, Leaf):
            ref, measured = await self._leaf(at, child.name)
            return ChildRef("expert", child.name, ref, measured)
        children = await self._children(at, child)
        if len(self._arrived[self._reductions[at].spec.measurement]) == len(self._names):
            await self._once(("existing", at), lambda: self._start(at))  # a last expert may be one that was known
        if at in self._settled:
            raise Failed(f"node {child.label} is not needed")
        self._visited[at] += 1
        reference = await self._reference(at)
        job = NodeJob(
            label=child.label,
            spec=self._local_spec(at, children),
            children=tuple(children),
            base_sha256=self._base_sha256,
            reference=reference,
            recipe=self._node_recipe(at, children, reference),
        )
        inputs = consumed(children, reference)
        step = Step(NODES, f"merge node {child.label}", (job.recipe,), inputs, job, _NODE, "statistics")
        (made,) = await self._make(step)
        return ChildRef("node", child.label, Ref.of(made), experts=tuple(leaf_names(child)))

    # -- what a reduction reads ---------------------------------------------------------------------------------

    async def _leaf(self, at: int, name: str) -> tuple[Ref, Ref | None]:
        kind = self._reductions[at].spec.measurement
        ref = await self._expert(name)
        measured = None if kind is None else await self._measurement(name, kind)
        self._arrived[kind].add(name)
        return ref, measured

    async def _leaves(self, at: int) -> Mapping[str, tuple[Ref, Ref | None]]:
        kind = self._reductions[at].spec.measurement

        async def all_leaves() -> Mapping[str, tuple[Ref, Ref | None]]:
            return dict(zip(self._names, await every(*(self._leaf(at, name) for name in self._names)), strict=True))

        return await self._once(("leaves", kind), all_leaves)

    async def _reference(self, at: int) -> Ref | None:
        read = self._reductions[at].spec.reference
        return None if read is None else Ref.of(await self.merge(read))

    async def _inputs(self, at: int) -> dict[str, str]:
        """Digests of all that the reduction's merges are functions of."""
        leaves, reference = (await self._leaves(at)).values(), await self._reference(at)
        read = [ref for ref, _ in leaves] + [measured for _, measured in leaves if measured is not None]
        return digests_of([*read, *([reference] if reference else [])])

    async def _root_keys(self, at: int) -> dict[LiftSpec, str]:
        """The root's key for each distinct lift of the reduction's candidates."""
        leaves, reference = await self._leaves(at), await self._reference(at)
        experts = {name: ref.key for name, (ref, _) in leaves.items()}
        measured = {name: each.key for name, (_, each) in leaves.items() if each is not None}
        lifts = {candidate_lift(each, len(self._names)) for each in self._reductions[at].candidates}
        after = reference.key if reference else None
        return {lift: root_key(lift, self._tree, experts, measured, after) for lift in lifts}

    def _node_recipe(self, at: int, children: Sequence[ChildRef], reference: Ref | None) -> Recipe:
        spec = self._reductions[at].spec
        experts = [child for child in children if child.kind == "expert"]
        return node_recipe(
            spec,
            [child.ref.key for child in children],
            [self._weights[at][child.name] for child in experts] if spec.weighted else (),
            [child.measured.key for child in experts if child.measured],
            reference.key if reference else None,
        )

    def _local_spec(self, at: int, children: Sequence[ChildRef]) -> LiftSpec:
        """The reduction's spec with the weights of these children only: a job of a large merge stays small."""
        spec = self._reductions[at].spec
        if not spec.weighted:
            return spec
        own = self._weights[at]
        return replace(spec, weights=tuple((c.name, own[c.name]) for c in children if c.kind == "expert"))
