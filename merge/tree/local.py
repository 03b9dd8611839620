"""The stored tree in this process: every node a piece of work in a thread, as soon as its inputs exist.

What another process is making is waited for.
"""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from infra.artifacts.leases import EXPIRY_S
from infra.artifacts.manifests import Manifest
from infra.engine.keyed import KeyedEngine, Workers
from infra.engine.once import every
from infra.engine.tally import Tally
from infra.engine.threads import Threads
from infra.store.s3 import Store
from merge.methods.catalogue import METHODS
from merge.methods.specs import Candidate, plan_reductions
from merge.tree.jobs import Ref
from merge.tree.reduce import NOT_FUSED, Fused
from merge.tree.reduction import Merges


@dataclass(frozen=True)
class Stored:
    """Merges that are there, those that only later rounds read included; masks by candidate and expert; and what was
    made and reused by kind."""

    merged: Mapping[Candidate, Manifest]
    masks: Mapping[tuple[Candidate, str], Manifest]
    tally: Tally


def merge_stored(
    store: Store,
    candidates: Sequence[Candidate],
    experts: Mapping[str, Ref],
    fan_in: int,
    base_sha256: str,
    base_weights: str | None = None,
    measured: Mapping[tuple[str, str], Ref] | None = None,
    fused: Fused = NOT_FUSED,
    workers: Workers | int = 1,
    expiry_s: float = EXPIRY_S,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    tell: Callable[[str, int, int], None] = lambda name, done, nodes: None,
) -> Stored:
    """Make everything that is still missing of these merges, and of the masks of methods that need them.

    `base_weights`, `fused`: as of `merge.tree.reduction.Merges`. `measured`: (expert name, kind) -> its
    measurement. `workers`: how many nodes are made at a time, each with the memory of one, or who makes them.
    `expiry_s`: of leases. `say` gets a line about each piece of work that another process is making; `tell`, what was
    made and how many of all nodes are there. The first error is raised once the work under way has ended; what depends
    on it is not started.
    """
    return asyncio.run(
        _merge(store, candidates, experts, fan_in, base_sha256, base_weights, measured or {}, fused, workers, expiry_s,
               say, tell)
    )  # fmt: skip


async def _merge(
    store: Store,
    candidates: Sequence[Candidate],
    experts: Mapping[str, Ref],
    fan_in: int,
    base_sha256: str,
    base_weights: str | None,
    measured: Mapping[tuple[str, str], Ref],
    fused: Fused,
    workers: Workers | int,
    expiry_s: float,
    say: Callable[[str], None],
    tell: Callable[[str, int, int], None],
) -> Stored:
    async def expert(name: str) -> Ref:
        return experts[name]

    async def measurement(name: str, kind: str) -> Ref:
        return measured[name, kind]

    async def complete(kind: str | None) -> bool:
        return True

    def made(name: str, manifest: Manifest) -> None:
        tell(name, merges.visited, merges.nodes)

    threads = Threads(store, {"node": workers}) if isinstance(workers, int) else workers
    engine = KeyedEngine(store, threads, expiry_s, say)
    merges = Merges(
        engine, plan_reductions(candidates, len(experts)), list(experts), fan_in, base_sha256, expert, measurement,
        complete, base_weights, fused, tell=made,
    )  # fmt: skip

    async def flow() -> Stored:
        await every(*(merges.merge(candidate) for candidate in candidates))
        masked = [(each, name) for each in candidates if METHODS[each.method].per_task for name in experts]
        masks = await every(*(merges.mask(*each) for each in masked))
        return Stored(dict(merges.merged), dict(zip(masked, masks, strict=True)), engine.tally)

    try:
        return await engine.run(flow())
    finally:
        engine.close()
