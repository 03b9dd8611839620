"""Keyed work under leases, as a driver hands it out and a worker takes it: all keys of the work, or none.

A driver gives each piece of work a `Claim` of its own. A worker that finds a key held by somebody else answers `Busy`
and does nothing; the driver then waits (`infra/elsewhere.py`). The same piece of work, started again because its worker
was lost, comes with the same claim and goes on at once. Nobody waits for a lease while holding another, so there is no
deadlock. The work itself has to look first whether its result exists: somebody may have published it just before.

Not covered: work that hangs. A lease says that its holder's process lives, not that it gets on.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from infra.artifacts.leases import BEATS_PER_EXPIRY, EXPIRY_S, beating, free_lease, new_owner, try_acquire
from infra.errors import StoreError
from infra.store.s3 import Store

_T = TypeVar("_T")
_THREADS = 16


@dataclass(frozen=True)
class Claim:
    """The right to take some keys' leases, and to take them again after the worker was lost."""

    keys: tuple[str, ...]
    takeover: Mapping[str, str] = field(default_factory=dict)
    """Entity tags of expired leases, by key."""
    expiry_s: float = EXPIRY_S
    """Seconds without a heartbeat after which the leases may be taken over."""
    id: str = field(default_factory=new_owner)


@dataclass(frozen=True)
class Busy:
    """Somebody else holds this key."""

    key: str


@contextlib.contextmanager
def claimed(store: Store, claim: Claim) -> Iterator[Busy | None]:
    """Hold all keys of the claim while the block runs, with heartbeats; if one is taken, hold none and give `Busy`.

    Keys are taken one after the other in sorted order, so of several claims on common keys one gets through; what is
    taken is renewed meanwhile. Raises StoreError.
    """
    with contextlib.ExitStack() as leases:
        held, busy = leases.enter_context(beating(claim.expiry_s / BEATS_PER_EXPIRY)), None
        for key in sorted(set(claim.keys)):
            takeover = claim.takeover.get(key)
            lease = try_acquire(store, key, new_owner(), takeover, claim.expiry_s, claim=claim.id)
            if lease is None:
                busy = Busy(key)
                leases.close()
                break
            held.append(lease)
        yield busy


def under_claim(store: Store, claim: Claim, work: Callable[[], _T]) -> _T | Busy:
    """What the work returns, or `Busy` without doing it. Raises StoreError and whatever the work raises."""
    with claimed(store, claim) as busy:
        return work() if busy is None else busy


def release_claims(store: Store, claims: Iterable[Claim]) -> int:
    """Free the leases that still belong to these claims, for a driver on its way out; returns how many.

    Their workers are dying or dead: one that lives on finds its lease lost. What cannot be freed now expires.
    """

    hasty = store.hasty()

    def free(key: str, claim: str) -> bool:
        with contextlib.suppress(StoreError):
            return free_lease(hasty, key, lambda held: held.claim == claim)
        return False

    pairs = [(key, claim.id) for claim in claims for key in claim.keys]
    with ThreadPoolExecutor(_THREADS) as pool:
        return sum(pool.map(lambda pair: free(*pair), pairs))
