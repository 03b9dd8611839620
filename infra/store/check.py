"""Whether an object store can be relied on, before any work does: what it refuses, and what it does not keep to.

Only names below the store's prefix are asked for, so a policy that grants no more than that is enough. That no two of
racing writers win cannot be proven from outside; one that looks before it writes is found by a few that race.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

from infra.errors import StoreError
from infra.store.errors import CHECKSUM_VARIABLES, NO_CONDITIONS, code_of, where
from infra.store.layout import new_probe
from infra.store.s3 import Store

_WRITERS = 8
_ROUNDS = 2


def check(probe: Store) -> None:
    """Write, read, list and race below the prefix of `probe`, a store that does not wait for an outage to end.

    Raises StoreError, which says what the store lacks and what to do.
    """
    name = new_probe()
    place = where(probe.endpoint, probe.bucket)
    probe.put(name, b"first")
    try:
        if (found := probe.get(name)) != b"first":
            raise StoreError(
                f"the object store at {place} keeps other bytes than it is sent ({found[:60]!r} instead of b'first'); "
                f"if it does not know the newer checksums, set {CHECKSUM_VARIABLES}, here and for the cluster's workers"
            )
        probe.head(f"{name}-absent")  # without leave to list, this is refused
        if name not in list(probe.list(name)):
            raise StoreError(f"the object store at {place} does not list what was just written; use one that does")
        _check_conditions(probe, name, place)
    finally:
        with contextlib.suppress(StoreError):
            probe.delete(name)


def _check_conditions(probe: Store, name: str, place: str) -> None:
    try:
        taken = probe.put_if_absent(name, b"second")
        replaced = probe.replace_if_match(name, b"third", '"00000000000000000000000000000000"')
    except StoreError as error:
        if error.__cause__ is not None and code_of(error.__cause__) in NO_CONDITIONS:
            raise _ignored(place, f"does not take conditional writes ({error.__cause__})") from error
        raise
    if taken or replaced or probe.get(name) != b"first":
        raise _ignored(place, "ignores conditional writes")
    for number in range(_ROUNDS):
        fresh = f"{name}-{number}"
        try:
            won = race(probe, fresh, None)
            etag = (probe.get_with_etag(fresh) or (b"", ""))[1]
            won_again = race(probe, fresh, etag)
        finally:
            with contextlib.suppress(StoreError):
                probe.delete(fresh)
        for count, what in ((won, "If-None-Match"), (won_again, "If-Match")):
            if count != 1:
                raise _ignored(
                    place,
                    f"lets {count} of {_WRITERS} writers of one name win at the same moment ({what}), so it does not "
                    "honour conditional writes",
                )


def race(probe: Store, name: str, etag: str | None) -> int:
    """How many of several writers are told that their write was the one: to an absent name, or in place of `etag`."""
    ready = threading.Barrier(_WRITERS)

    def write(number: int) -> bool:
        ready.wait()
        if etag is None:
            return probe.put_if_absent(name, b"%d" % number)
        return probe.replace_if_match(name, b"again %d" % number, etag)  # never the same bytes, with the same tag

    with ThreadPoolExecutor(_WRITERS) as pool:
        return sum(pool.map(write, range(_WRITERS)))


def _ignored(place: str, what: str) -> StoreError:
    return StoreError(
        f"the object store at {place} {what} (If-None-Match, If-Match), without which two runs could overwrite each "
        "other; use an S3 server that honours them (AWS S3, SeaweedFS, MinIO, Ceph from Tentacle on)"
    )
