"""Which objects of a store can go: what no kept run and no registered version reaches, and what spares it.

*Roots* are the keys that kept runs announced and registered versions name; an artifact's manifest names its inputs;
what the roots reach stays. To be removed: the manifests and data of other artifacts, attempts that no manifest names,
saved training states of finished or unreachable keys, leases that nobody renews, unfinished multipart uploads, folders
of runs that are not kept, task rows and bases that neither a root nor any manifest that stays names, and probes of
preflight checks. Spared in any case: what is younger than 24 h by the store's own clock, what a live lease covers, and
the inputs of such artifacts, so that what stays is whole.

Pure: `infra/artifacts/gc.py` looks at the store and removes. Not covered: anything else that the bucket holds
(``schedules/``, results of merges by hand, whatever lies under ``objects/`` and ``checkpoints/`` without a key), which
always stays.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from infra.store import layout
from infra.store.admin import PendingUpload, StoredObject

MIN_AGE_S = 24 * 3600.0
"""Nothing younger is removed. Must exceed the time between an upload and its manifest, and the expiry of a lease."""
LEASE_S = 3600.0
"""A lease that was renewed within this time is live, however small the minimal age: holders renew every few seconds."""

Kind = Literal["artifact", "orphan", "checkpoint", "lease", "upload", "run", "rows", "base", "probe"]
KINDS: tuple[Kind, ...] = ("artifact", "orphan", "checkpoint", "lease", "upload", "run", "rows", "base", "probe")
YOUNG, LEASED = "younger than the minimal age", "live lease"


@dataclass(frozen=True)
class Roots:
    """What is kept: keys of artifacts, fingerprints of rows and identities of bases (one namespace, all SHA-256); ids
    of runs (those within retention and those in progress); folders ``objects/<key>/<attempt>`` that registered
    versions name, whatever the key's manifest names today."""

    keys: frozenset[str]
    runs: frozenset[str]
    attempts: frozenset[str] = frozenset()

    @property
    def reach(self) -> frozenset[str]:
        """The hashes that reachability starts from: those of the attempts too."""
        return self.keys | {attempt.split("/")[1] for attempt in self.attempts}


@dataclass(frozen=True)
class Links:
    """What a manifest names: the keys of its inputs and the objects (``objects/<its key>/…``) that hold its data."""

    inputs: frozenset[str]
    files: frozenset[str]
    kind: str = ""
    """Of the artifact, for people."""


@dataclass(frozen=True)
class Inventory:
    """What a store holds at one moment. ``links`` has a key for every manifest; None if it cannot be read."""

    now: datetime
    objects: tuple[StoredObject, ...]
    uploads: tuple[tuple[PendingUpload, int], ...]
    """With the bytes that their parts hold."""
    links: Mapping[str, Links | None]
    mentions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Rows and bases whose hashes a key's manifest contains anywhere, even one that cannot be read."""


@dataclass(frozen=True)
class Removal:
    """One thing to remove, as a whole. ``key`` is the hash of an artifact, of rows or of a base, or a run's id."""

    kind: Kind
    key: str
    objects: tuple[StoredObject, ...] = ()
    """An artifact's data without its manifest."""
    manifest: StoredObject | None = None
    upload: PendingUpload | None = None
    size: int = 0
    """Bytes freed."""


@dataclass(frozen=True)
class Spared:
    """What nothing reaches and yet stays."""

    kind: Kind
    key: str
    size: int
    reason: str


@dataclass(frozen=True)
class GcPlan:
    """What would be removed and what is spared."""

    removals: tuple[Removal, ...]
    spared: tuple[Spared, ...]
    kept: int
    """Artifacts that are reached."""
    inventory: Inventory = field(repr=False)
    """What it was made from, for a second look at the roots."""

    @property
    def size(self) -> int:
        """Bytes that the removals free."""
        return sum(removal.size for removal in self.removals)

    def of(self, kind: Kind) -> list[Removal]:
        """The removals of one kind."""
        return [removal for removal in self.removals if removal.kind == kind]


def reachable(roots: Iterable[str], links: Mapping[str, Links | None]) -> set[str]:
    """The keys that the roots reach over inputs, the roots included, whether they have a manifest or not."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            named = links.get(key)
            waiting.extend(named.inputs if named else ())
    return found


def plan_gc(roots: Roots, inventory: Inventory, min_age_s: float = MIN_AGE_S) -> GcPlan:
    """Decide what goes. Pure: ages are the inventory's ``now`` less the time that the store gave the object.

    An artifact or attempt is as young as its youngest object. A lease is live if it was renewed within ``min_age_s``
    or `LEASE_S`, whichever is longer.
    """
    plan = _Planner(roots, inventory, min_age_s)
    plan.artifacts()
    plan.orphans()
    plan.checkpoints()
    plan.leases()
    plan.uploads()
    plan.runs()
    plan.shared()
    plan.probes()
    return GcPlan(tuple(plan.removals), tuple(plan.spared), len(plan.reached & inventory.links.keys()), inventory)


def shared_hash(name: str) -> tuple[Kind, str] | None:
    """Whether an object holds rows or is a file of a base, and of which hash; None for any other object."""
    if fingerprint := layout.rows_fingerprint(name):
        return "rows", fingerprint
    identity = layout.base_identity(name)
    return ("base", identity) if identity else None


def mentioned(keys: Iterable[str], mentions: Mapping[str, frozenset[str]]) -> set[str]:
    """The rows and bases that the manifests of these keys name."""
    return set().union(*(mentions.get(key, frozenset()) for key in keys))


class _Planner:
    def __init__(self, roots: Roots, inventory: Inventory, min_age_s: float) -> None:
        self.inventory, self.roots, self._min_age_s = inventory, roots, min_age_s
        self.removals: list[Removal] = []
        self.spared: list[Spared] = []
        self._manifests = {found.name: found for found in self._under(layout.MANIFESTS)}
        self._attempts: dict[tuple[str, str], list[StoredObject]] = {}
        for found in self._keyed(layout.DATA):
            self._attempts.setdefault(_attempt(found.name), []).append(found)
        self._attempts_of: dict[str, list[tuple[str, str]]] = {}
        for attempt in self._attempts:
            self._attempts_of.setdefault(attempt[0], []).append(attempt)
        self._leases = {layout.lease_key(found.name): found for found in self._under(layout.LEASES)}
        live_s = max(min_age_s, LEASE_S)
        self._leased = {key for key, found in self._leases.items() if self._age(found.modified) < live_s}
        young = {key for key in inventory.links if self._young([self._manifest(key), *self._data(key)])}
        self._guarded = reachable(young | self._leased, inventory.links)
        self.reached = reachable(roots.reach, inventory.links)

    def artifacts(self) -> None:
        for key in sorted(self.inventory.links.keys() - self.reached):
            manifest, data = self._manifest(key), tuple(self._data(key))
            if key in self._leased:
                self._spare("artifact", key, [manifest, *data], LEASED)
            elif self._young([manifest, *data]):
                self._spare("artifact", key, [manifest, *data], YOUNG)
            elif key in self._guarded:
                self._spare("artifact", key, [manifest, *data], "input of what is spared")
            else:
                self._remove("artifact", key, data, manifest)

    def orphans(self) -> None:
        """Attempts are judged as a whole; those of a lost race, a killed upload or a replaced artifact, unless a
        registered version names them."""
        named = {found.name for key in self.inventory.links for found in self._data(key)}
        for (key, attempt), objects in sorted(self._attempts.items()):
            if objects[0].name not in named and f"{layout.data_folder(key)}{attempt}" not in self.roots.attempts:
                self._judge("orphan", key, objects)

    def checkpoints(self) -> None:
        states: dict[str, list[StoredObject]] = {}
        for found in self._keyed(layout.STATES):
            states.setdefault(found.name.split("/")[1].removesuffix(".json"), []).append(found)
        for key, objects in sorted(states.items()):
            if key in self.inventory.links or key not in self.reached:
                # The pointer first: a state that is named is there.
                self._judge("checkpoint", key, sorted(objects, key=lambda found: not found.name.endswith(".json")))

    def leases(self) -> None:
        for key in sorted(self._leases.keys() - self._leased):
            self._remove("lease", key, (self._leases[key],))

    def uploads(self) -> None:
        for upload, size in sorted(self.inventory.uploads, key=lambda found: (found[0].name, found[0].upload_id)):
            key = _attempt(upload.name)[0]
            if not layout.is_keyed(upload.name):
                continue
            if self._age(upload.started) < self._min_age_s:
                self.spared.append(Spared("upload", key, size, YOUNG))
            elif key in self._leased:
                self.spared.append(Spared("upload", key, size, LEASED))
            else:
                self.removals.append(Removal("upload", key, upload=upload, size=size))

    def runs(self) -> None:
        folders: dict[str, list[StoredObject]] = {}
        for found in self._under(layout.RUNS):
            folders.setdefault(layout.run_of(found.name)[0], []).append(found)
        for run, objects in sorted(folders.items()):
            if run not in self.roots.runs:
                self._judge("run", run, objects)

    def shared(self) -> None:
        """Rows and bases: they stay with every manifest that stays. After `artifacts`, which says what stays."""
        going = {removal.key for removal in self.removals if removal.kind == "artifact"}
        named = self.roots.keys | mentioned(self.inventory.links.keys() - going, self.inventory.mentions)
        found: dict[tuple[Kind, str], list[StoredObject]] = {}
        for each in self.inventory.objects:
            if (place := shared_hash(each.name)) is not None and place[1] not in named:
                found.setdefault(place, []).append(each)
        for (kind, sha256), objects in sorted(found.items()):
            # A base's index goes first: without it a reader takes the base for absent.
            self._judge(kind, sha256, sorted(objects, key=lambda each: each.name != layout.base_index(sha256)))

    def probes(self) -> None:
        for found in self._under(layout.PROBES):
            self._judge("probe", found.name.split("/")[1], [found])

    def _judge(self, kind: Kind, key: str, objects: Sequence[StoredObject]) -> None:
        if self._young(objects):
            self._spare(kind, key, objects, YOUNG)
        elif key in self._leased and kind != "run":
            self._spare(kind, key, objects, LEASED)
        else:
            self._remove(kind, key, tuple(objects))

    def _remove(
        self, kind: Kind, key: str, objects: tuple[StoredObject, ...], manifest: StoredObject | None = None
    ) -> None:
        size = sum(found.size for found in objects) + (manifest.size if manifest else 0)
        self.removals.append(Removal(kind, key, objects, manifest, size=size))

    def _spare(self, kind: Kind, key: str, objects: Sequence[StoredObject], reason: str) -> None:
        self.spared.append(Spared(kind, key, sum(found.size for found in objects), reason))

    def _under(self, prefix: str) -> list[StoredObject]:
        return [found for found in self.inventory.objects if found.name.startswith(prefix)]

    def _keyed(self, prefix: str) -> list[StoredObject]:
        """Those that are the factory's: what others put there is none of a collection's business."""
        return [found for found in self._under(prefix) if layout.is_keyed(found.name)]

    def _manifest(self, key: str) -> StoredObject:
        return self._manifests[layout.manifest_name(key)]

    def _data(self, key: str) -> list[StoredObject]:
        """Everything in the attempts that the artifact's manifest names; in all of them if it cannot be read."""
        links = self.inventory.links[key]
        attempts = sorted({_attempt(name) for name in links.files} if links else self._attempts_of.get(key, ()))
        return [found for attempt in attempts for found in self._attempts.get(attempt, ())]

    def _young(self, objects: Sequence[StoredObject]) -> bool:
        return any(self._age(found.modified) < self._min_age_s for found in objects)

    def _age(self, then: datetime) -> float:
        return (self.inventory.now - then).total_seconds()


def _attempt(name: str) -> tuple[str, str]:
    """Key and attempt of an object's name; what is not in an attempt's folder is an attempt of its own."""
    parts = name.split("/")
    return (parts[1].removesuffix(".json"), parts[2]) if len(parts) > 2 else (parts[-1], "")


@dataclass(frozen=True)
class Line:
    """How many things of one kind would go (no reason), or are spared for a reason, and their bytes."""

    kind: Kind
    what: str
    """Of artifacts which: expert, node, …"""
    count: int
    size: int
    reason: str = ""


def summary(plan: GcPlan) -> list[Line]:
    """The plan for people: removals first, by kind, then what nothing reaches and yet stays."""
    totals: dict[tuple[bool, int, str, str], list[int]] = {}
    things: list[Removal | Spared] = [*plan.removals, *plan.spared]
    for found in things:
        links = plan.inventory.links.get(found.key) if found.kind == "artifact" else None
        reason = found.reason if isinstance(found, Spared) else ""
        place = (bool(reason), KINDS.index(found.kind), links.kind if links else "", reason)
        total = totals.setdefault(place, [0, 0])
        total[0] += 1
        total[1] += found.size
    return [
        Line(KINDS[kind], what, count, size, reason)
        for (_, kind, what, reason), (count, size) in sorted(totals.items())
    ]
