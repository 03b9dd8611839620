"""Engines for tests: real bookkeeping over workers that only pretend, and a store in memory for finding artifacts."""

import asyncio
import hashlib
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from infra.artifacts.claims import Busy, Claim, under_claim
from infra.artifacts.manifests import Manifest, Recipe, publish
from infra.engine.in_thread import in_thread
from infra.engine.step import Answer, Query, Step
from infra.store.layout import manifest_name
from infra.store.s3 import FileRef, ObjectInfo, Store


class Memory:
    """Manifests by name: as much of a store as finding artifacts takes."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def get_with_etag(self, name: str) -> tuple[bytes, str] | None:
        return (self.objects[name], "") if name in self.objects else None

    def head(self, name: str) -> ObjectInfo | None:
        return ObjectInfo(1, "")

    def hasty(self) -> "Memory":
        return self

    def publish(self, recipe: Recipe, inputs: Mapping[str, str]) -> Manifest:
        file = FileRef(f"objects/{recipe.key}/1/file", hashlib.sha256(recipe.key.encode()).hexdigest(), 1)
        found = Manifest(recipe.key, recipe.kind, recipe.version, dict(recipe.config), {"file": file}, dict(inputs))
        self.objects[manifest_name(recipe.key)] = found.to_json()
        return found


class InMemory:
    """Workers that publish into a `Memory`, in an order that a random generator decides."""

    def __init__(self, store: Memory, rng: random.Random) -> None:
        self.store, self._rng = store, rng
        self.steps: list[Step] = []

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        self.steps.append(step)
        await turns(self._rng)
        made = tuple((self.store.publish(recipe, step.inputs), True) for recipe in step.recipes)
        return Answer(made, 0.0, 0.0)

    async def ask(self, query: Query[Any]) -> Any:
        raise NotImplementedError


async def turns(rng: random.Random) -> None:
    """Let others go on for a while."""
    for _ in range(rng.randrange(5)):
        await asyncio.sleep(0)


class Empty:
    """Workers that publish files without content into a real store, under the leases of their keys."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        meta: Callable[[Step], Mapping[str, Any]] = lambda step: {},
        answer: Callable[[Query[Any]], Any] = lambda query: None,
    ) -> None:
        """`meta` of a step's artifacts; `answer` to a query."""
        self.store, self._folder, self._meta, self._answer = store, folder, meta, answer
        self.steps: list[Step] = []
        self.queries: list[Query[Any]] = []

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        def work() -> tuple[tuple[Manifest, bool], ...]:
            return tuple(self.put(recipe, step.inputs, step.label, **self._meta(step)) for recipe in step.recipes)

        made = await in_thread(under_claim, self.store, claim, work)
        if isinstance(made, Busy):
            return made
        self.steps.append(step)
        return Answer(made, 1.0, 2.0)

    async def ask(self, query: Query[Any]) -> Any:
        self.queries.append(query)
        return self._answer(query)

    def put(self, recipe: Recipe, used: Mapping[str, str], label: str, **meta: Any) -> tuple[Manifest, bool]:
        """An artifact without content."""
        file = self._folder / f"{recipe.key}-{label}"
        file.write_text(recipe.key)
        return publish(self.store, recipe, {label: file}, used, meta)
