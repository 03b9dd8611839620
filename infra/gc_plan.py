"""Which objects of a store can go: what no kept run and no registered version reaches, and what spares it.

*Roots* are the keys that kept runs planned and registered versions name; an artifact's manifest names its inputs; what
the roots reach stays. To be removed: the manifests and data of other artifacts, attempts that no manifest names, saved
training states of finished or unreachable keys, leases that nobody renews, unfinished multipart uploads and folders of
runs that are not kept. Spared in any case: what is younger than 24 h by the store's own clock, what a live lease
covers, and the inputs of such artifacts, so that what stays is whole.

Pure: `infra/gc.py` looks at the store and removes. Not covered: bases and task rows, which runs share and find by
content, not by manifest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from infra.artifacts import manifest_name
from infra.store_admin import PendingUpload, StoredObject

MIN_AGE_S = 24 * 3600.0
"""Nothing younger is removed. Must exceed the time between an upload and its manifest, and the expiry of a lease."""

Kind = Literal["artifact", "orphan", "checkpoint", "lease", "upload", "run"]
KINDS: tuple[Kind, ...] = ("artifact", "orphan", "checkpoint", "lease", "upload", "run")
YOUNG, LEASED = "younger than the minimal age", "live lease"


@dataclass(frozen=True)
class Roots:
    """What is kept: artifact keys, and ids of runs (those within retention and those in progress)."""

    keys: frozenset[str]
    runs: frozenset[str]


@dataclass(frozen=True)
class Links:
    """What a manifest names: the keys of its inputs and the objects (``objects/<its key>/…``) that hold its data."""

    inputs: frozenset[str]
    files: frozenset[str]


@dataclass(frozen=True)
class Inventory:
    """What a store holds at one moment. ``links`` has a key for every manifest; None if it cannot be read."""

    now: datetime
    objects: tuple[StoredObject, ...]
    uploads: tuple[tuple[PendingUpload, int], ...]
    """With the bytes that their parts hold."""
    links: Mapping[str, Links | None]


@dataclass(frozen=True)
class Removal:
    """One thing to remove, as a whole. ``key`` is an artifact's key, a run's id, or empty."""

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
    links: Mapping[str, Links | None] = field(repr=False)
    """The inventory's, for a second look at the roots."""

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

    An artifact or attempt is as young as its youngest object. A lease is live if it was renewed within ``min_age_s``:
    a holder renews it every few seconds.
    """
    plan = _Planner(roots, inventory, min_age_s)
    plan.artifacts()
    plan.orphans()
    plan.checkpoints()
    plan.leases()
    plan.uploads()
    plan.runs()
    return GcPlan(tuple(plan.removals), tuple(plan.spared), len(plan.reached & inventory.links.keys()), inventory.links)


class _Planner:
    def __init__(self, roots: Roots, inventory: Inventory, min_age_s: float) -> None:
        self.inventory, self.roots, self._min_age_s = inventory, roots, min_age_s
        self.removals: list[Removal] = []
        self.spared: list[Spared] = []
        self._manifests = {found.name: found for found in self._under("artifacts/")}
        self._attempts: dict[tuple[str, str], list[StoredObject]] = {}
        for found in self._under("objects/"):
            self._attempts.setdefault(_attempt(found.name), []).append(found)
        self._leases = {_lease_key(found.name): found for found in self._under("leases/")}
        self._leased = {key for key, found in self._leases.items() if self._young([found])}
        young = {key for key in inventory.links if self._young([self._manifest(key), *self._data(key)])}
        self._guarded = reachable(young | self._leased, inventory.links)
        self.reached = reachable(roots.keys, inventory.links)

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
        """Attempts are judged as a whole; those of a lost race, a killed upload or a replaced artifact."""
        named = {found.name for key in self.inventory.links for found in self._data(key)}
        unreadable = {key for key, links in self.inventory.links.items() if links is None}
        for (key, _), objects in sorted(self._attempts.items()):
            if objects[0].name in named:
                continue
            if key in unreadable and key in self.reached | self._guarded:
                self._spare("orphan", key, objects, "manifest unreadable")
            else:
                self._judge("orphan", key, objects)

    def checkpoints(self) -> None:
        states: dict[str, list[StoredObject]] = {}
        for found in self._under("checkpoints/"):
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
            if self._age(upload.started) < self._min_age_s:
                self.spared.append(Spared("upload", key, size, YOUNG))
            elif key in self._leased:
                self.spared.append(Spared("upload", key, size, LEASED))
            else:
                self.removals.append(Removal("upload", key, upload=upload, size=size))

    def runs(self) -> None:
        folders: dict[str, list[StoredObject]] = {}
        for found in self._under("runs/"):
            folders.setdefault(found.name.split("/")[1], []).append(found)
        for run, objects in sorted(folders.items()):
            if run not in self.roots.runs:
                self._judge("run", run, objects)

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

    def _manifest(self, key: str) -> StoredObject:
        return self._manifests[manifest_name(key)]

    def _data(self, key: str) -> list[StoredObject]:
        """Everything in the attempts that the artifact's manifest names."""
        links = self.inventory.links[key]
        attempts = sorted({_attempt(name) for name in links.files}) if links else []
        return [found for attempt in attempts for found in self._attempts.get(attempt, ())]

    def _young(self, objects: Sequence[StoredObject]) -> bool:
        return any(self._age(found.modified) < self._min_age_s for found in objects)

    def _age(self, then: datetime) -> float:
        return (self.inventory.now - then).total_seconds()


def _attempt(name: str) -> tuple[str, str]:
    """Key and attempt of an object's name; what is not in an attempt's folder is an attempt of its own."""
    parts = name.split("/")
    return (parts[1].removesuffix(".json"), parts[2]) if len(parts) > 2 else (parts[-1], "")


def _lease_key(name: str) -> str:
    return name.removeprefix("leases/").removesuffix(".json")


def describe(plan: GcPlan) -> str:
    """The plan as a table: how many and how much of each kind would go, how much is spared and why."""
    lines = [f"{'':8}{'kind':12}{'count':>8}{'size':>12}"]
    for kind in KINDS:
        if removals := plan.of(kind):
            lines.append(_line("remove", kind, len(removals), sum(removal.size for removal in removals)))
    groups: dict[tuple[Kind, str], list[Spared]] = {}
    for spared in plan.spared:
        groups.setdefault((spared.kind, spared.reason), []).append(spared)
    for (kind, reason), items in sorted(groups.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1])):
        lines.append(_line("spare", kind, len(items), sum(item.size for item in items)) + f"  {reason}")
    lines.append(f"{plan.kept} artifacts are reached and stay; {_bytes(plan.size)} would be freed")
    return "\n".join(lines)


def _line(word: str, kind: str, count: int, size: int) -> str:
    return f"{word:8}{kind:12}{count:>8}{_bytes(size):>12}"


def _bytes(size: int) -> str:
    number, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} B" if units[0] == "B" else f"{number:.1f} {units[0]}"
