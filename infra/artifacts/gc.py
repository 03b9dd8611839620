"""Garbage collection: removes from the object store what `infra/artifacts/gc_plan.py` says can go. The default is to
look only.

What protects a reader:

- Manifests go first, then data, so that no manifest is found whose data this collection has removed.
- A run announces the keys it plans (`infra/artifacts/announcements.py`) *before* it looks for artifacts. A collection
  removes manifests, then reads the roots again (what runs announced, MLflow's runs and versions), then removes data. A
  run that found a manifest before it was removed had announced its keys even earlier, so the second reading sees them:
  the manifest is put back, its data were never touched. A run that looks later finds nothing and makes the artifact
  again, under another attempt's name.
- Removed manifests stand in a journal in the store until their data are gone. A collection that was killed is undone
  by the next one, which puts back every manifest whose data are complete; the rest of their data are then orphans.
- Rows and bases have fixed names. Those that are to go stand in a list in the store before the roots are read again;
  a run announces them, then waits while a list names them, then stores what is missing.
- One collection runs at a time, under a lease, and stops when it loses it. Should a stopped one come back in the very
  moment between asking and deleting, a manifest may stay without data: `find` takes it as absent.
- Before it goes, each manifest, orphan, state, lease and run is looked at again: what changed since the plan stays.

Unprotected: readers that look artifacts up without announcing them (a merge by hand of unregistered experts, with
`--store` also the nodes and the base that it finds), and a training state that a run wants just when it goes, which
costs that expert's steps so far.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from infra.artifacts.announcements import LEASE
from infra.artifacts.gc_plan import (
    KINDS,
    MIN_AGE_S,
    GcPlan,
    Inventory,
    Kind,
    Links,
    Removal,
    Roots,
    mentioned,
    plan_gc,
    reachable,
    shared_hash,
)
from infra.artifacts.leases import EXPIRY_S, Lease, Watcher, holding
from infra.errors import StoreError
from infra.store import layout
from infra.store.admin import abort_upload, delete_if_match, list_objects, list_uploads, server_time, upload_size
from infra.store.layout import manifest_name
from infra.store.s3 import Store

_HASH = re.compile(rb"[0-9a-f]{64}")
_PREFIXES = (
    layout.DATA, layout.STATES, layout.LEASES, layout.RUNS, layout.ROWS, layout.BASES, layout.PROBES,
)  # fmt: skip
_UPLOADS = (layout.DATA, layout.STATES, layout.BASES)
_BATCH = 200  # removals between two looks at the roots
_THREADS = 16
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass
class GcOutcome:
    """What a collection did."""

    removed: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    size: int = 0
    """Bytes freed."""
    restored: int = 0
    """Manifests put back: a run announced them meanwhile, or an earlier collection was killed."""
    skipped: int = 0
    """Removals left alone because something changed since the plan."""


def plan_collection(store: Store, roots: Callable[[], Roots], min_age_s: float = MIN_AGE_S) -> GcPlan:
    """What a collection would remove (`execute` does it). Changes nothing. Raises StoreError."""
    inventory = take_inventory(store)  # before the roots are read: what is made between the two stands in no list
    return plan_gc(roots(), inventory, min_age_s)


def take_inventory(store: Store) -> Inventory:
    """List the store and read its manifests: a request per thousand objects and one per manifest.

    The clock is read first, so ages come out too low rather than too high; data are listed before leases and those
    before manifests, so data whose manifest arrives meanwhile are not taken for orphans. Raises StoreError.
    """
    now = server_time(store)
    objects = [found for prefix in _PREFIXES for found in list_objects(store, prefix)]
    shared = {place[1] for found in objects if (place := shared_hash(found.name))}
    uploads = [found for prefix in _UPLOADS for found in list_uploads(store, prefix)]
    manifests = {
        key: found for found in list_objects(store, layout.MANIFESTS) if (key := layout.manifest_key(found.name))
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda upload: upload_size(store, upload), uploads))
        bodies = pool.map(lambda key: store.get_with_etag(manifest_name(key)), manifests)
        links: dict[str, Links | None] = {}
        mentions: dict[str, frozenset[str]] = {}
        for key, found in zip(manifests, bodies, strict=True):
            if found is not None:
                links[key], mentions[key] = links_of(key, found[0]), _hashes(found[0], shared)
    objects += [manifests[key] for key in links]
    return Inventory(now, tuple(objects), tuple(zip(uploads, sizes, strict=True)), links, mentions)


def _hashes(manifest: bytes, among: Collection[str]) -> frozenset[str]:
    """Those of the given hashes that a manifest contains, wherever: in its recipe, its inputs or its notes."""
    return frozenset(text for found in _HASH.findall(manifest) if (text := found.decode()) in among)


def links_of(key: str, manifest: bytes) -> Links | None:
    """What a manifest names. Lenient: its inputs count even if the rest would be refused; None if there are none."""
    try:
        body = json.loads(manifest)
        names = frozenset(str(ref["name"]) for ref in body["files"].values())
        files = frozenset(name for name in names if name.startswith(layout.data_folder(key)))
        return Links(frozenset(body["inputs"]), files, str(body.get("kind", "")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def execute(store: Store, plan: GcPlan, roots: Callable[[], Roots], expiry_s: float = EXPIRY_S) -> GcOutcome:
    """Remove what the plan says, except what changed since. Raises StoreError; then the next collection goes on.

    ``roots`` is asked again between steps, so it must look anew each time. Takes up to two expiries longer if an
    earlier collection was killed, to see that its lease is dead.
    """
    outcome = GcOutcome()
    with _alone(store, expiry_s) as lease:
        outcome.restored += _recover(store)
        for batch in _batches(plan.of("artifact")):
            _check(store, lease)
            _remove_artifacts(store, lease, batch, plan, roots, outcome)
        others = [removal for removal in plan.removals if removal.kind not in ("artifact", "rows", "base")]
        for batch in _batches(others):
            _check(store, lease)
            _remove_others(store, batch, plan, roots, outcome)
        for batch in _batches([*plan.of("rows"), *plan.of("base")]):
            _check(store, lease)
            _remove_shared(store, lease, batch, plan, roots, outcome)
    return outcome


def _batches(removals: Sequence[Removal]) -> Iterator[Sequence[Removal]]:
    for start in range(0, len(removals), _BATCH):
        yield removals[start : start + _BATCH]


@contextlib.contextmanager
def _alone(store: Store, expiry_s: float) -> Iterator[Lease]:
    """The lease of collections. StoreError if another one lives."""
    watcher, etags = Watcher(expiry_s), set()
    while (seen := watcher.observe(store, LEASE)).state == "live":
        etags.add(seen.etag)
        if len(etags) > 1:
            break
        time.sleep(expiry_s / 6)
    with holding(store, LEASE, seen.etag if seen.state == "expired" else None, expiry_s) as lease:
        if lease is None:
            holder = f" (process {seen.holder.pid} on {seen.holder.host})" if seen.holder else ""
            raise StoreError(f"another garbage collection of {store.uri('')} is running{holder}; wait for its end")
        yield lease


def _check(store: Store, lease: Lease) -> None:
    if lease.lost:
        raise StoreError(
            f"this garbage collection of {store.uri('')} lost its lease, so another may be running; start it again"
        )


def _remove_artifacts(
    store: Store, lease: Lease, batch: Sequence[Removal], plan: GcPlan, roots: Callable[[], Roots], outcome: GcOutcome
) -> None:
    """Manifests into the journal and out of the way, a second look at the roots, then data."""
    etags = {removal.key: removal.manifest.etag for removal in batch if removal.manifest}
    found = dict(zip(etags, _each(lambda key: store.get_with_etag(manifest_name(key)), etags), strict=True))
    bodies = {key: answer[0] for key, answer in found.items() if answer is not None and answer[1] == etags[key]}
    journal = layout.new_journal(layout.JOURNALS)
    store.put(journal, json.dumps({key: body.decode("latin-1") for key, body in bodies.items()}).encode())
    try:
        _each(lambda key: delete_if_match(store, manifest_name(key), etags[key]), bodies)
        reached = reachable(roots().reach, plan.inventory.links)
        _check(store, lease)
    except BaseException:
        with contextlib.suppress(StoreError):  # the next collection tries again
            _undo(store, journal)
        raise
    for key in bodies.keys() & reached:
        outcome.restored += store.put_if_absent(manifest_name(key), bodies[key])
    gone = [removal for removal in batch if removal.key in bodies.keys() - reached]
    _each(store.delete, [data.name for removal in gone for data in removal.objects])
    store.delete(journal)
    outcome.removed["artifact"] += len(gone)
    outcome.size += sum(removal.size for removal in gone)
    outcome.skipped += len(batch) - len(gone)


def _recover(store: Store) -> int:
    """Undo collections that did not end. Returns how many manifests came back."""
    restored = 0
    for journal in list(list_objects(store, layout.JOURNALS)):
        if journal.name.startswith(layout.SHARED_JOURNALS):
            store.delete(journal.name)  # what went is stored again by the run that wants it
        else:
            restored += _undo(store, journal.name)
    return restored


def _undo(store: Store, journal: str) -> int:
    """Put back the journal's manifests, except those whose data went already; forget the journal."""
    restored = 0
    try:
        entries = dict(json.loads(store.get(journal)))
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{store.uri(journal)}, what an interrupted collection had removed, is damaged ({error}); runs make those "
            "artifacts anew when they want them: delete the object and start again"
        ) from error
    for key, text in entries.items():
        body = text.encode("latin-1")
        links = links_of(key, body)
        if links is not None and all(_each(lambda name: store.head(name) is not None, sorted(links.files))):
            restored += store.put_if_absent(manifest_name(key), body)
    store.delete(journal)
    return restored


def _remove_others(
    store: Store, batch: Sequence[Removal], plan: GcPlan, roots: Callable[[], Roots], outcome: GcOutcome
) -> None:
    """What nobody finds by a manifest: each is looked at again, nothing of it is needed for something else."""
    again = roots()
    reached = reachable(again.reach, plan.inventory.links)

    def remove(removal: Removal) -> bool:
        if removal.kind == "run" and removal.key in again.runs:
            return False
        attempts = {layout.attempt_of(found.name) for found in removal.objects}
        if removal.kind == "orphan" and not attempts.isdisjoint(again.attempts):
            return False
        if removal.kind == "checkpoint" and removal.key in reached and removal.key not in plan.inventory.links:
            return False
        return _remove_one(store, removal)

    _count(batch, _each(remove, batch), outcome)


def _remove_one(store: Store, removal: Removal) -> bool:
    """False if it changed since the plan."""
    if removal.upload is not None:
        abort_upload(store, removal.upload)
        return True
    names = [found.name for found in removal.objects]
    if removal.kind == "orphan":
        found = store.get_with_etag(manifest_name(removal.key)) if layout.is_key(removal.key) else None
        links = links_of(removal.key, found[0]) if found else None
        if links is not None and not links.files.isdisjoint(names):
            return False
    if removal.kind in ("lease", "checkpoint") and names[0].endswith(".json"):
        if not delete_if_match(store, names[0], removal.objects[0].etag):
            return False
        names = names[1:]
    for name in names:
        store.delete(name)
    return True


def _remove_shared(
    store: Store,
    lease: Lease,
    batch: Sequence[Removal],
    plan: GcPlan,
    roots: Callable[[], Roots],
    outcome: GcOutcome,
) -> None:
    """Rows and bases: said aloud first, so that a run that announces them from now on waits for the end of this."""
    journal = layout.new_journal(layout.SHARED_JOURNALS)
    store.put(journal, json.dumps(sorted({removal.key for removal in batch})).encode())
    try:
        again = roots()
        wanted = again.keys | mentioned(reachable(again.reach, plan.inventory.links), plan.inventory.mentions)
        _check(store, lease)

        def remove(removal: Removal) -> bool:
            if removal.key in wanted:
                return False
            for found in removal.objects:  # in this order: a base's index first
                store.delete(found.name)
            return True

        _count(batch, _each(remove, batch), outcome)
    finally:
        with contextlib.suppress(StoreError):  # else the next collection forgets it
            store.delete(journal)


def _count(batch: Sequence[Removal], removed: Sequence[bool], outcome: GcOutcome) -> None:
    for removal, gone in zip(batch, removed, strict=True):
        if gone:
            outcome.removed[removal.kind] += 1
            outcome.size += removal.size
        else:
            outcome.skipped += 1


def _each(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))
