"""What a run is told in: keyed work, un-keyed questions to services, and the engine that sees to both.

A flow is plain `async` functions that say what depends on what. `await engine.make(step)` gives the artifacts of a
step: found, made under a lease, or waited for where somebody else makes them, once per key however often it is awaited.
Where it runs, how many at a time, and what happens when a worker is lost is the engine's business.

Engines: `infra.engine.keyed` with workers of Ray (`pipeline.running.ray_workers`) or threads of this process
(`infra.engine.threads`), and `infra.engine.rehearsal`, which makes nothing and counts.
"""

from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from infra.artifacts.manifests import Manifest, Recipe
from infra.engine.tally import Tally
from infra.store.s3 import Store

Made = tuple[tuple[Manifest, bool], ...]
"""Manifests in the order of a step's recipes, each with whether it was made now (else it was found)."""


@dataclass(frozen=True)
class Answer:
    """What a worker did, and when: seconds since the epoch."""

    made: Made
    began: float
    ended: float


Pool = Literal["expert", "evaluator", "refine", "node", "registry"]
"""Kinds of worker: each has its own resources and limit in a configuration."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def _unheard(subject: str, what: Any) -> None:
    pass


@dataclass(frozen=True)
class Place:
    """Where work runs: what the engine grants it."""

    devices: tuple[str, ...] = ("cpu",)
    threads: int = 1
    report: Callable[[str, Any], None] = _unheard
    """Told of progress: of what, and a picklable record. May be lost."""
    resident: dict[Hashable, Any] = field(default_factory=dict)
    """What stays in memory between calls of this process, one thing at most."""

    def keep(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when it was last kept under this name; anything else that is kept is let go before."""
        if name not in self.resident:
            self.resident.clear()
            self.resident[name] = make()
        kept: T = self.resident[name]
        return kept


class Work(Protocol):
    """Picklable: names and numbers, no tensors. Looks first whether its artifacts exist, then makes and publishes."""

    def __call__(self, store: Store, place: Place) -> Made: ...


@dataclass(frozen=True)
class Needs:
    """What a step takes. `affinity` and `base`: calls of one pool prefer a worker that had the same `affinity` last,
    then the same `base`, for another one takes longest to load."""

    pool: Pool
    affinity: str = ""
    base: str = ""


@dataclass(frozen=True)
class Step:
    """Keyed work: its artifacts are a function of nothing but the recipes and the bytes that `inputs` names."""

    kind: str
    """What it is counted as: experts, merge_nodes, …"""
    name: str
    """For people and for titles of processes."""
    recipes: tuple[Recipe, ...]
    inputs: Mapping[str, str]
    """Digests consumed, by key."""
    call: Work
    needs: Needs
    label: str
    """Of the file that each artifact has."""
    each: str = ""
    """What every single artifact is counted as, where a step makes several at once."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the artifacts."""
        return tuple(recipe.key for recipe in self.recipes)


class Query(Protocol[T_co]):
    """Un-keyed work at a service, such as registering: picklable, and harmless to repeat."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def __call__(self, store: Store) -> T_co: ...

    def expected(self, known: Any) -> T_co:
        """What it would answer, told by a rehearsal from what it `known`s of the service. Changes nothing."""
        ...


class Engine(Protocol):
    """What a flow awaits. Not thread-safe: for one event loop."""

    tally: Tally

    async def make(self, step: Step) -> Made:
        """The step's artifacts. Raises whatever the work raised, the same for everybody who awaits it."""
        ...

    async def find(self, wanted: Sequence[tuple[str, Mapping[str, str]]]) -> list[Manifest | None]:
        """What exists of these keys, made from these digests; nothing is made."""
        ...

    async def ask(self, query: Query[T]) -> T:
        """A service's answer. Raises whatever it raised."""
        ...

    def known(self, *manifests: Manifest) -> bool:
        """Whether all of these exist, so that what they say can be read. Always, but in a rehearsal."""
        ...

    async def some_of(self, count: int, steps: Sequence[Step]) -> None:
        """`count` of these steps will be wanted, and nobody knows which: only in a rehearsal."""
        ...

    async def alternatives(self, options: Collection[T], then: Callable[["Engine", T], Awaitable[None]]) -> None:
        """Go on with one of the options, the only one but in a rehearsal: that goes on with each by itself, and counts
        what the dearest takes."""
        ...


async def make_one(engine: Engine, step: Step) -> Manifest:
    """The artifact of a step with one recipe."""
    ((manifest, _),) = await engine.make(step)
    return manifest
