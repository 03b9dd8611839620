"""Every object's name in the store: where each kind of thing lies, and what a name says. No other module spells one.

    artifacts/<key>.json                    manifests
    objects/<key>/<attempt>/<label>         data of artifacts
    bases/<identity>/<file>                 base models; index.json is written last
    data/<fingerprint>.jsonl                rows of tasks
    runs/<run id>/<file>                    what a run announced and reported
    checkpoints/<key>.json, …/<key>/<name>  states of unfinished trainings: the last one's name, and the states
    leases/<key>.json                       who works on a key
    schedules/<suite>.json                  states of schedules
    gc/<id>.json, gc/shared-<id>.json       what a collection is removing: manifests; rows and bases
    checks/<id>                             probes of preflight checks

Names are those inside a store, behind its prefix. Not here: what the objects hold.
"""

import re
import uuid
from dataclasses import dataclass

MANIFESTS, DATA, BASES, ROWS, RUNS = "artifacts/", "objects/", "bases/", "data/", "runs/"
STATES, LEASES, SCHEDULES, JOURNALS, PROBES = "checkpoints/", "leases/", "schedules/", "gc/", "checks/"
SHARED_JOURNALS = f"{JOURNALS}shared-"
"""Prefix of the lists of rows and bases that are being removed."""

FOLDERS = tuple(sorted((MANIFESTS, DATA, BASES, ROWS, RUNS, STATES, LEASES, SCHEDULES, JOURNALS, PROBES)))
"""All that the factory itself stores."""

ANNOUNCED, RESULTS = "keys.json", "results.json"
"""Files of a run: the hashes that it uses, and its results."""

_HASH = "[0-9a-f]{64}"
_KEY, _LEASE_KEY = re.compile(_HASH), re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MANIFEST = re.compile(rf"{MANIFESTS}({_HASH})\.json")
_ROWS, _BASE = re.compile(rf"{ROWS}({_HASH})\.jsonl"), re.compile(rf"{BASES}({_HASH})/.+")
_KEYED = re.compile(rf"({DATA}|{BASES}){_HASH}/.+|{STATES}{_HASH}(\.json|/.+)")
_ATTEMPT = re.compile(rf"({DATA}{_HASH}/[^/]+)(/.*)?")
_STORED = re.compile(rf"(?:(?P<prefix>.*)/)?(?P<name>{DATA}(?P<key>{_HASH})(?:/(?P<inside>.*))?)")


# -- names --


def manifest_name(key: str) -> str:
    """The manifest of a key. Raises ValueError if the key is not a hex SHA-256."""
    return f"{MANIFESTS}{_checked(key)}.json"


def data_folder(key: str) -> str:
    """Where all data of a key lie."""
    return f"{DATA}{key}/"


def new_attempt(key: str) -> str:
    """A folder of its own for one attempt at a key: where files go that are uploaded before they are published.

    Raises ValueError if the key is not a hex SHA-256.
    """
    return f"{data_folder(_checked(key))}{uuid.uuid4().hex}"


def base_file(sha256: str, name: str) -> str:
    """A file of a base, by its identity."""
    return f"{BASES}{sha256}/{name}"


def base_index(sha256: str) -> str:
    """A stored base's index, which is written last: a base is in the store if its index is."""
    return base_file(sha256, "index.json")


def rows_name(fingerprint: str) -> str:
    """The rows with this fingerprint."""
    return f"{ROWS}{fingerprint}.jsonl"


def run_file(run: str, name: str = "") -> str:
    """A file of a run; without a name, their folder."""
    return f"{RUNS}{run}/{name}"


def state_pointer(key: str) -> str:
    """What names the last state of a key's training."""
    return f"{STATES}{key}.json"


def new_state(key: str, step: int) -> str:
    """A name of its own for the state after a step of a key's training."""
    return f"{STATES}{key}/{step}-{uuid.uuid4().hex}"


def lease_name(key: str) -> str:
    """The lease of a key. Raises ValueError for a key that is no plain name."""
    if not _LEASE_KEY.fullmatch(key):
        raise ValueError(f"not a lease key: {key!r}")
    return f"{LEASES}{key}.json"


def schedule_name(suite: str) -> str:
    """The state of a suite's schedule."""
    return f"{SCHEDULES}{suite}.json"


def new_journal(prefix: str) -> str:
    """A name of its own for what a collection is removing: `JOURNALS` of manifests, `SHARED_JOURNALS` of the rest."""
    return f"{prefix}{uuid.uuid4().hex}.json"


def new_probe() -> str:
    """A name of its own for an object that shows what a store can do."""
    return f"{PROBES}{uuid.uuid4().hex}"


def _checked(key: str) -> str:
    if not is_key(key):
        raise ValueError(f"not a recipe key: {key!r}")
    return key


# -- what a name says --


def is_key(text: str) -> bool:
    """Whether it is a hex SHA-256."""
    return _KEY.fullmatch(text) is not None


def manifest_key(name: str) -> str | None:
    """Whose manifest an object is; None for any other object."""
    return found[1] if (found := _MANIFEST.fullmatch(name)) else None


def rows_fingerprint(name: str) -> str | None:
    """The fingerprint of the rows in an object; None for any other object."""
    return found[1] if (found := _ROWS.fullmatch(name)) else None


def base_identity(name: str) -> str | None:
    """The identity of the base that an object is a file of; None for any other object."""
    return found[1] if (found := _BASE.fullmatch(name)) else None


def lease_key(name: str) -> str:
    """The key whose lease an object is."""
    return name.removeprefix(LEASES).removesuffix(".json")


def run_of(name: str) -> tuple[str, str]:
    """Run and name of one of a run's files."""
    run, _, file = name.removeprefix(RUNS).partition("/")
    return run, file


def is_keyed(name: str) -> bool:
    """Whether an object is data, a base's file or a state that has a key: what others put there has none."""
    return _KEYED.fullmatch(name) is not None


def attempt_of(name: str) -> str | None:
    """The folder of the attempt that an object belongs to; None for what is no artifact's data."""
    return found[1] if (found := _ATTEMPT.fullmatch(name)) else None


@dataclass(frozen=True)
class Stored:
    """A place in an artifact's folder, seen from a bucket: the store's prefix there, the place's name in that store,
    the artifact's key, and the parts of the name behind it."""

    prefix: str
    name: str
    key: str
    inside: tuple[str, ...]

    @property
    def is_file(self) -> bool:
        """Whether it names a file, and not a folder."""
        return len(self.inside) == 2 and all(self.inside)


def split_stored(name: str) -> Stored | None:
    """What a name in a bucket says of an artifact; None where it is in no artifact's folder."""
    found = _STORED.fullmatch(name)
    if found is None:
        return None
    inside = tuple(found["inside"].split("/")) if found["inside"] else ()
    return Stored(found["prefix"] or "", found["name"], found["key"], inside)
