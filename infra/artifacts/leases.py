"""Leases: at most one worker works on a key at a time, agreed on by conditional writes to the object store.

``leases/<key>.json`` names the holder and counts its heartbeats. Who puts it there first holds the key; a heartbeat
replaces it under If-Match, so its entity tag changes as long as the holder lives. An observer that has seen one and
the same tag for longer than the expiry, by its own monotonic clock, takes over under If-Match. Clocks of different
machines are never compared.

A lease saves duplicated work and guarantees nothing else: a holder that was stopped may come back and go on, and what
keeps a key's result single is that publishing is put-if-absent (`infra/artifacts/manifests.py`). Not covered: queues,
fairness, and what a piece of work with several keys does (`infra/artifacts/claims.py`).

A release deletes the lease under If-Match. Where the delete ignores its condition, a lease may vanish that somebody
took over between the last look and the delete, so after the releasing holder had missed its heartbeats: the new holder
finds itself lost, and the work may be done twice. Where the delete is refused, a free lease takes the place.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar

from infra.errors import StoreError
from infra.store.admin import delete_if_match
from infra.store.layout import lease_name
from infra.store.s3 import Store

EXPIRY_S = 60.0
"""Seconds without a heartbeat after which a lease may be taken over. The same for holders and observers."""
BEATS_PER_EXPIRY = 6
"""Heartbeats in that time: five in a row have to fail before anybody takes over."""
_PATIENCE = 1 / 3
"""Part of that time for which a heartbeat's request waits for an answer: a connection that hangs costs no lease."""
_LEAST_PATIENCE_S = 1.0
_LOOKS = 3  # an observer must have looked at least this often in the time
_ATTEMPTS = 5
_THREADS = 16  # requests at a time, where one holder has many keys
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Holder:
    """What a lease says. ``owner`` is unique to one acquisition, ``started`` is for people (seconds since the epoch).

    An empty owner is a released lease. Whoever comes with the same ``claim`` may take over at once: it is the same
    work, started again after its worker was lost. ``expiry_s`` is what the holder promises to beat within.
    """

    owner: str
    host: str
    pid: int
    started: float
    beat: int = 0
    claim: str = ""
    expiry_s: float = 0.0

    def to_json(self) -> bytes:
        """The lease object's bytes."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Holder | None":
        """The holder in these bytes, None if they are no lease."""
        try:
            body = json.loads(data)
            return cls(
                str(body["owner"]), str(body["host"]), int(body["pid"]), float(body["started"]), int(body["beat"]),
                str(body.get("claim", "")), float(body.get("expiry_s", 0.0)),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError):
            return None


def new_owner() -> str:
    """An owner that nobody else has."""
    return uuid.uuid4().hex


class Lease:
    """A key held by this process. `beat` keeps it, `release` gives it back; `holding` does both.

    Thread-safe: one thread may beat while another reads ``lost`` or releases.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        holder: Holder,
        expiry_s: float = EXPIRY_S,
        clock: Callable[[], float] = time.monotonic,
        confirmed: float | None = None,
    ) -> None:
        """``confirmed``: when, by ``clock``, the request began that made this process the holder; default now."""
        self.store, self.key, self.owner = store, key, holder.owner
        self._expiry_s, self._clock = expiry_s, clock
        self._confirmed = clock() if confirmed is None else confirmed
        self._taken = False
        self._lock = threading.Lock()

    @property
    def lost(self) -> bool:
        """Whether somebody else holds the key or may do by now, because no heartbeat got through for the expiry.

        The latter can end: if the store comes back and the lease is still ours, the next beat confirms it.
        """
        return self._taken or self._clock() - self._confirmed > self._expiry_s

    def beat(self) -> bool:
        """Renew the lease; False once it is known to be lost for good. Raises StoreError, which changes nothing."""
        store = self.store.hasty(max(_LEAST_PATIENCE_S, self._expiry_s * _PATIENCE))
        with self._lock:
            return not self._taken and self._write(store, lambda held: replace(held, beat=held.beat + 1)) is not None

    def release(self) -> bool:
        """Make the key free again if it is still ours; False if it is not. Raises StoreError."""
        with self._lock:
            if self._taken:
                return False
            freed = free_lease(self.store.hasty(), self.key, lambda held: held.owner == self.owner)
            self._taken = True  # whatever happens from here on, this object does not hold the key
            return freed

    def _write(self, store: Store, change: Callable[[Holder], Holder]) -> bytes | None:
        """Replace the lease if it is still ours; what was written, or None if it is lost.

        What the store holds decides, not what was written last: a write whose answer got lost counts if it arrived.
        """
        name = lease_name(self.key)
        for _ in range(_ATTEMPTS):
            began = self._clock()
            found = store.get_with_etag(name)
            held = Holder.from_json(found[0]) if found else None
            if found is None or held is None or held.owner != self.owner:
                break
            data = change(held).to_json()
            if store.replace_if_match(name, data, found[1]):
                self._confirmed = began
                return data
        self._taken = True
        return None


def free_lease(store: Store, key: str, ours: Callable[[Holder], bool]) -> bool:
    """Make a key free if its lease is held and ours; False if it is not. Raises StoreError."""
    name, asked = lease_name(key), False
    for _ in range(_ATTEMPTS):
        found = store.get_with_etag(name)
        held = Holder.from_json(found[0]) if found else None
        if found is None or held is None or not held.owner or not ours(held):
            return found is None and asked  # a delete whose answer got lost
        asked = True
        try:
            if delete_if_match(store, name, found[1]):
                return True
        except StoreError:  # an endpoint without conditional deletes
            if store.replace_if_match(name, replace(held, owner="", beat=held.beat + 1).to_json(), found[1]):
                return True
    return False


def try_acquire(
    store: Store,
    key: str,
    owner: str,
    takeover: str | None = None,
    expiry_s: float = EXPIRY_S,
    clock: Callable[[], float] = time.monotonic,
    claim: str = "",
) -> Lease | None:
    """Hold the key if it is free, has the same ``claim``, or still the entity tag ``takeover`` of an expired lease.

    Of any number of racing callers one gets the lease, the others None. ``owner`` must be new to every call
    (`new_owner`); no claim is nobody's. Raises StoreError.
    """
    if not owner:
        raise ValueError("a lease needs an owner")
    name = lease_name(key)
    mine = Holder(owner, socket.gethostname(), os.getpid(), time.time(), 0, claim, expiry_s)
    for _ in range(_ATTEMPTS):
        began = clock()
        if store.put_if_absent(name, mine.to_json()):
            return _confirmed(Lease(store, key, mine, expiry_s, clock, began))
        found = store.get_with_etag(name)
        if found is None:
            continue  # released meanwhile
        held = Holder.from_json(found[0])
        free = held is not None and (not held.owner or (held.claim == claim and claim != ""))
        if not free and found[1] != takeover:
            return None
        if store.replace_if_match(name, mine.to_json(), found[1]):
            return _confirmed(Lease(store, key, mine, expiry_s, clock, began))
    return None


def _confirmed(lease: Lease) -> Lease:
    """A new lease. Where the store was away for the expiry while it was asked for, a beat tells whose it is."""
    if lease.lost:
        lease.beat()
    return lease


State = Literal["free", "live", "expired"]


@dataclass(frozen=True)
class Observation:
    """What a look at a key's lease says: its state, its entity tag (for `try_acquire`) and who holds it."""

    state: State
    etag: str | None = None
    holder: Holder | None = None


@dataclass
class _Seen:
    etag: str
    at: float
    unchanged_s: float = 0.0


class Watcher:
    """Judges by repeated looks whether holders live, without holding anything itself. Not thread-safe.

    Only time in which the observer looked counts: a gap between two looks counts as at most a third of the expiry,
    and a failed look starts the count anew. So neither a pause of the observer nor an outage of the store, in which
    no holder could beat, makes a living holder look dead. Look at least three times per expiry. A lease that names a
    longer expiry than the observer's is judged by its own.
    """

    def __init__(self, expiry_s: float = EXPIRY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._expiry_s, self._clock = expiry_s, clock
        self._seen: dict[str, _Seen] = {}

    def observe(self, store: Store, key: str) -> Observation:
        """Look at the lease of a key. Raises StoreError."""
        return self.observe_all(store, [key])[0]

    def observe_all(self, store: Store, keys: Sequence[str]) -> list[Observation]:
        """Look at the leases of several keys, many at a time. Raises StoreError; then none of them was looked at."""
        try:
            bodies = _each(lambda key: store.get_with_etag(lease_name(key)), keys)
        except StoreError:
            for key in keys:
                self._seen.pop(key, None)
            raise
        return [
            self.judge(key, found[1], Holder.from_json(found[0])) if found else self.judge(key, None, None)
            for key, found in zip(keys, bodies, strict=True)
        ]

    def judge(self, key: str, etag: str | None, holder: Holder | None) -> Observation:
        """What one look amounts to: the lease has this tag and holder now, no tag if there is none."""
        now = self._clock()
        if etag is None or (holder is not None and not holder.owner):
            self._seen.pop(key, None)
            return Observation("free", etag)
        seen = self._seen.get(key)
        if seen is None or seen.etag != etag:
            self._seen[key] = _Seen(etag, now)
            return Observation("live", etag, holder)
        expiry = max(self._expiry_s, holder.expiry_s if holder else 0.0)
        seen.unchanged_s += min(now - seen.at, expiry / _LOOKS)
        seen.at = now
        # Exactly at the expiry a beat may still be under way, so more than that is asked for.
        state: State = "expired" if seen.unchanged_s > expiry else "live"
        return Observation(state, etag, holder)


@contextlib.contextmanager
def holding(
    store: Store,
    key: str,
    takeover: str | None = None,
    expiry_s: float = EXPIRY_S,
    beat_s: float | None = None,
) -> Iterator[Lease | None]:
    """Hold a key while the block runs, a thread beating every ``beat_s`` (a sixth of the expiry); None if it is taken.

    An error of the store during a beat is tried again at the next one. The block may ask ``lease.lost`` and stop, or
    go on: what it publishes is put-if-absent. Raises StoreError if the store fails while acquiring; a release that
    fails leaves a lease that expires.
    """
    lease = try_acquire(store, key, new_owner(), takeover, expiry_s)
    if lease is None:
        yield None
        return
    with beating(expiry_s / BEATS_PER_EXPIRY if beat_s is None else beat_s) as held:
        held.append(lease)
        yield lease


@contextlib.contextmanager
def beating(pause: float) -> Iterator[list[Lease]]:
    """One thread renews, every ``pause`` seconds, the leases that the block puts into the list; at its end they are
    released. An error of the store during a beat is tried again at the next one; what cannot be released expires."""
    held: list[Lease] = []
    stop = threading.Event()

    def beat(lease: Lease) -> None:
        with contextlib.suppress(StoreError):
            if not stop.is_set():
                lease.beat()

    def release(lease: Lease) -> None:
        with contextlib.suppress(StoreError):
            lease.release()

    def renew() -> None:
        while not stop.wait(pause):
            _each(beat, list(held))

    thread = threading.Thread(target=renew, name="leases", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        stop.set()
        _each(release, held)
        thread.join()


def _each(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """The function of every item: a single one in this thread, else many at a time."""
    if len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(_THREADS, len(items))) as pool:
        return list(pool.map(function, items))
