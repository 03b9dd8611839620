"""What runs say they use, so that garbage collection (`infra/artifacts/gc.py`) leaves it alone.

``runs/<run>/keys.json`` lists hashes: keys of artifacts, fingerprints of task rows, identities of bases. A run writes
it before it looks for any of them, adds what it learns on the way, writes it again from time to time as long as it
lives, and its last list keeps what it used for as long as the run is kept. Artifacts survive a look that comes too
late, because a collection that meets a new announcement puts back what it took. Rows and bases have one name each and
cannot come back under another, so a run also waits, once, for a collection that is removing just those
(`await_removals`): whichever of the two writes first, the other one sees it.

Not covered: readers that announce nothing.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from infra.artifacts.gc_plan import Roots
from infra.artifacts.leases import EXPIRY_S, Watcher
from infra.errors import StoreError
from infra.store.admin import StoredObject, list_objects, server_time
from infra.store.layout import ANNOUNCED, RESULTS, RUNS, SHARED_JOURNALS, run_file, run_of
from infra.store.s3 import Store

LEASE = "gc"
"""Key of the lease under which a collection runs."""
_THREADS = 16
_POLL_S = 0.2

Keep = Callable[[str, float], bool]
"""Whether a run of the store is to be kept, told its id and the seconds since it announced something, by the store's
clock; infinity if it announced nothing."""


@dataclass(frozen=True)
class Registered:
    """What a registry says at one moment: which runs to keep, and what registered versions refer to (see `Roots`)."""

    keep: Keep
    keys: frozenset[str] = frozenset()
    attempts: frozenset[str] = frozenset()


def announce(store: Store, run: str, hashes: Iterable[str]) -> None:
    """Record all that a run plans to use or uses, instead of what it said before. Raises StoreError.

    To be called before the run looks for any of it.
    """
    store.put(run_file(run, ANNOUNCED), json.dumps(sorted(hashes)).encode())


def await_removals(store: Store, hashes: Collection[str]) -> None:
    """Wait until no living collection is removing any of these rows and bases: seconds, if at all.

    To be called after `announce` and before looking for them: from then on they stay. Raises StoreError.
    """
    watcher, wanted = Watcher(EXPIRY_S), frozenset(hashes)
    while any(not wanted.isdisjoint(_condemned(store, entry)) for entry in list_objects(store, SHARED_JOURNALS)):
        if watcher.observe(store, LEASE).state != "live":
            return  # it was killed: nobody removes anything now
        time.sleep(_POLL_S)


def _condemned(store: Store, journal: StoredObject) -> set[str]:
    found = store.get_with_etag(journal.name)
    try:
        return set(json.loads(found[0])) if found else set()
    except (ValueError, TypeError) as error:
        where = store.uri(journal.name)
        raise StoreError(f"{where} is damaged ({error}); delete the object when no gc is running") from error


class RootReader:
    """The roots of a store, read anew by every call; what a former call found stays a root.

    ``ask`` asks the registry, once per call. Lists that did not change since the last call are not fetched again. A run
    that announced nothing keeps the experts and the merge that its results name. Not thread-safe.
    """

    def __init__(self, store: Store, ask: Callable[[], Registered]) -> None:
        self._store, self._ask = store, ask
        self._keys, self._attempts, self._runs = set[str](), set[str](), set[str]()
        self._read: set[tuple[str, str]] = set()

    def __call__(self) -> Roots:
        """Raises StoreError, also for a list that cannot be understood, and whatever the asking raises."""
        registered, now = self._ask(), server_time(self._store)
        self._keys |= registered.keys
        self._attempts |= registered.attempts
        runs: dict[str, dict[str, StoredObject]] = {}
        for entry in list_objects(self._store, RUNS):
            run, name = run_of(entry.name)
            runs.setdefault(run, {})[name] = entry
        waiting: list[StoredObject] = []
        for run, files in runs.items():
            said = files.get(ANNOUNCED)
            age_s = (now - said.modified).total_seconds() if said else math.inf
            if run in self._runs or registered.keep(run, age_s):
                self._runs.add(run)
                waiting += [entry for entry in (said or files.get(RESULTS),) if entry is not None]
        new = [entry for entry in waiting if (entry.name, entry.etag) not in self._read]
        with ThreadPoolExecutor(_THREADS) as pool:
            for found in pool.map(self._hashes, new):
                self._keys |= found
        self._read.update((entry.name, entry.etag) for entry in new)
        return Roots(frozenset(self._keys), frozenset(self._runs), frozenset(self._attempts))

    def _hashes(self, entry: StoredObject) -> set[str]:
        found = self._store.get_with_etag(entry.name)
        try:
            if found is None:
                return set()
            body = json.loads(found[0])
            if entry.name.endswith(RESULTS):
                return {body["chosen"]["key"], *(row["expert_key"] for row in body["held_in"].values())}
            return {str(each) for each in body}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{self._store.uri(entry.name)} does not say which artifacts the run used "
                f"({type(error).__name__}: {error}); nothing can be removed while the run is kept"
            ) from error
