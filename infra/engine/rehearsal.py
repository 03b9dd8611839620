"""An engine that makes nothing: it answers what is missing with a stand-in, and counts. A plan is a flow rehearsed.

Existing artifacts are looked up as a run would. For a missing one an empty manifest stands in, whose bytes nothing
knows, and the flow goes on. Where it cannot know how a run goes on, it counts what the dearest way takes, and says "at
most". It is assumed that what is made does not have the bytes of something that exists.
"""

import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from infra.artifacts.manifests import Manifest, Recipe, canonical_json, find
from infra.artifacts.snapshot import Snapshot
from infra.engine.step import Engine, Made, Query, Step
from infra.engine.tally import Tally
from infra.engine.together import Together
from infra.store.layout import data_folder
from infra.store.s3 import FileRef

T = TypeVar("T")
_DIGEST = re.compile(rb"[0-9a-f]{64}")


def unmade(recipe: Recipe, label: str = "adapter") -> Manifest:
    """Stands for an artifact that does not exist: its digest is that of no bytes."""
    file = FileRef(f"{data_folder(recipe.key)}-/{label}", f"unmade {recipe.key}", 0)
    return Manifest(recipe.key, recipe.kind, recipe.version, {}, {label: file}, {}, {})


@dataclass
class Rehearsal:
    """`infra.engine.step.Engine` over what a store holds at one moment. `order`: kinds in the order of a run."""

    snapshot: Snapshot
    order: Sequence[str]
    services: Any = None
    """What is known of the services that queries are for."""
    expected: set[str] = field(default_factory=set)
    """Keys that are made before: by runs of other seeds, and by this one so far."""
    tally: Tally = field(default_factory=Tally)
    found: list[Manifest] = field(default_factory=list)
    """What would be reused."""
    steps: list[Step] = field(default_factory=list)
    """All that was asked for."""
    lacking: set[str] = field(default_factory=set)
    """Keys of what would be made."""
    _unknown: set[str] = field(default_factory=set)
    """Digests of stand-ins."""
    _doubt: set[str] = field(default_factory=set)
    """Kinds of which something is made again under a key that has a manifest: it may get the bytes that it had, and
    then what was made of those is found after all."""

    def __post_init__(self) -> None:
        self._read = Together(self._read_ahead)

    # -- the protocol -------------------------------------------------------------------------------------------

    async def make(self, step: Step) -> Made:
        self.steps.append(step)
        await self._read(step.keys)
        made = tuple(self._look(step, recipe) for recipe in step.recipes)
        self.tally.add_step(step.kind, step.each, [new for _, new in made])
        return made

    async def find(self, wanted: Sequence[tuple[str, Mapping[str, str]]]) -> list[Manifest | None]:
        await self._read(key for key, _ in wanted)
        found = [find(self.snapshot, key, inputs) for key, inputs in wanted]
        self.found += [each for each in found if each is not None]
        return found

    async def ask(self, query: Query[T]) -> T:
        return query.expected(self.services)

    def known(self, *manifests: Manifest) -> bool:
        return all(manifest.key not in self.lacking for manifest in manifests)

    async def some_of(self, count: int, steps: Sequence[Step]) -> None:
        await self._read(key for step in steps for key in step.keys)
        lacking = sum(self._missing(steps))
        least, most = max(0, lacking - (len(steps) - count)), min(lacking, count)
        for kind in {step.kind for step in steps}:
            self.tally.add(kind, most, count - most)
            if least < most:
                self.tally.at_most.add(kind)

    async def alternatives(self, options: Collection[T], then: Callable[[Engine, T], Awaitable[None]]) -> None:
        if len(options) == 1:
            (option,) = options
            await then(self, option)
            return
        branches = [self._branch() for _ in options]
        for branch, option in zip(branches, options, strict=True):
            await then(branch, option)
        tallies = [branch.tally for branch in branches]
        for kind in {kind for tally in tallies for kind in (*tally.made, *tally.reused)}:
            ways = [(tally.made[kind], tally.reused[kind]) for tally in tallies]
            self.tally.add(kind, max(made for made, _ in ways), min(reused for _, reused in ways))
            if len(set(ways)) > 1 or any(kind in tally.at_most for tally in tallies):
                self.tally.at_most.add(kind)

    # -- what was found out -------------------------------------------------------------------------------------

    def doubtful(self) -> set[str]:
        """Kinds of which fewer may be made: those that `tally` says, and what follows from what is in doubt."""
        after = set[str]()
        for kind in self._doubt:
            after |= set(self.order[self.order.index(kind) + 1 :])
        return self.tally.at_most | after

    def keys(self) -> Iterator[str]:
        """Of all that was asked for and whose key follows from no bytes that would have to be made."""
        for step in self.steps:
            for recipe in step.recipes:
                if self._unknown.isdisjoint(map(bytes.decode, _DIGEST.findall(canonical_json(recipe.config)))):
                    yield recipe.key

    # -- counting -----------------------------------------------------------------------------------------------

    def _look(self, step: Step, recipe: Recipe) -> tuple[Manifest, bool]:
        """The artifact or what stands for it, and whether it is this that makes it: of two that need one key, the
        first."""
        found = find(self.snapshot, recipe.key, step.inputs)
        if found is not None:
            self.found.append(found)
            return found, False
        made = recipe.key not in self.expected
        self.expected.add(recipe.key)
        self.lacking.add(recipe.key)
        stand_in = unmade(recipe, step.label)
        self._unknown.add(stand_in.digest)
        if self.snapshot.holds(recipe.key):
            self._doubt.add(step.kind)
            if not self.lacking.isdisjoint(step.inputs):
                self.tally.at_most.add(step.kind)
        return stand_in, made

    def _missing(self, steps: Sequence[Step]) -> list[bool]:
        """Whether each step would be made, not counted. Of several that are one the first is made."""
        keys = [step.keys for step in steps]
        return [
            any(key not in self.expected and find(self.snapshot, key, step.inputs) is None for key in step.keys)
            and step.keys not in keys[:at]
            for at, step in enumerate(steps)
        ]

    def _branch(self) -> "Rehearsal":
        """One way on from here, which counts by itself."""
        return Rehearsal(
            self.snapshot, self.order, self.services, set(self.expected), lacking=set(self.lacking),
            _unknown=set(self._unknown), _doubt=set(self._doubt),
        )  # fmt: skip

    def _read_ahead(self, keys: Sequence[str]) -> Sequence[None]:
        self.snapshot.read_ahead(keys)
        return [None] * len(keys)
