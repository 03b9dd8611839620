"""Which version of a registered model is the champion, which the challenger, and how that changes.

The alias ``champion`` moves by a gate's decision (`conclude`), by hand (`promote`) and back (`rollback`). Each change
is made under a lease of the model, so that of two runs, or of a run and a person, one comes first and the other sees
what it did; and each is recorded in tags of the version, so that the former champion is known. MLflow's aliases are no
transaction: somebody who moves them in MLflow's pages is not kept from it, but noticed.

Not covered: whether a challenger deserves it (`pipeline/gate/rule.py`), registering (`infra/registry/models.py`), and
looking at versions without changing anything (`infra/registry/versions.py`).
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mlflow import MlflowClient

from infra.artifacts.leases import Lease, Watcher, holding
from infra.errors import RegistryError
from infra.registry.lineage import TAG_LENGTH
from infra.registry.models import CONFIG_TAG, DIGEST_TAG
from infra.registry.runs import client
from infra.registry.versions import (
    BY_HAND,
    CHALLENGER,
    CHAMPION,
    DECISION,
    LEADER,
    MERGE_TAG,
    OPPONENT,
    PREVIOUS,
    PROMOTED,
    REASON,
    REFUSED,
    ROLLED_BACK,
    RUN,
    Version,
    aliased,
    asking,
    barred,
    former_champion,
    gone,
    version_of,
    versions_where,
)
from infra.store.s3 import Store

LEASE_S = 20.0
"""Expiry of a lease that guards aliases; they are held for parts of a second."""
WAIT_S = 60.0
"""Longest wait for such a lease."""
_PAUSE_S = 0.25
_VERDICT = "**Gate**: "
_VERDICT_LENGTH = 600


@dataclass(frozen=True)
class Standing:
    """Where a version stands. ``judged``: a version of the same bytes, perhaps itself, that needs no gate any more.
    ``replaced``: the champion whose place it was just given, for that one has the same bytes, but they are gone, or it
    is asked in another way. ``former``: where there is no champion, the version that was one last."""

    version: Version
    champion: Version | None
    judged: Version | None
    replaced: int | None = None
    former: int | None = None

    @property
    def leads(self) -> bool:
        """Whether it is the champion."""
        return self.champion is not None and self.champion.version == self.version.version

    @property
    def is_open(self) -> bool:
        """Whether a gate has to decide: it is not the champion, has other bytes, and nobody decided before."""
        return self.judged is None and not self.leads and not self.is_same

    @property
    def is_same(self) -> bool:
        """Whether it has the champion's bytes."""
        return self.champion is not None and self.champion.digest == self.version.digest


@dataclass(frozen=True)
class Decision:
    """What a gate decided about a version, on what grounds, against whom and in which MLflow run."""

    promoted: bool
    reason: str
    opponent: str
    run_id: str


@dataclass(frozen=True)
class Conclusion:
    """What became of a decision. ``recorded``: it stands. ``known``: somebody decided before, and that stands.
    ``changed``: the champion is no longer the one that was compared with, so nothing was decided."""

    how: Literal["recorded", "known", "changed"]
    standing: Standing


def enter(store: Store, name: str, version: int) -> Standing:
    """Make a registered version the challenger, unless it is the champion, and say where it stands.

    A version with the bytes of the champion takes its place where that one's were deleted, or it is asked in another
    way than this one, which is today's. Bytes that were rolled back stay so in a version of their own.
    Raises RegistryError or StoreError.
    """
    mlflow = client()
    with asking(f"make version {version} of {name!r} the challenger"):
        standing = _standing(mlflow, name, version)
        model = mlflow.get_registered_model(name).tags
        if _bar(mlflow, standing, model):
            standing = _standing(mlflow, name, version)
        challenger = aliased(mlflow, name, CHALLENGER)
        known = challenger is not None and challenger.version == version
        if standing.leads != known and _succeeds(store, standing) is None and not _untold(standing, model):
            return standing
        with _alone(store, name) as lease:
            standing = _standing(mlflow, name, version)
            if standing.leads:  # what a change that was interrupted left to do
                _set_champion(mlflow, name, version, lease)
                if _is_undecided(standing.version):
                    mlflow.set_model_version_tag(name, str(version), DECISION, PROMOTED)
                    standing = _standing(mlflow, name, version)
            elif (reason := _succeeds(store, standing)) is not None:
                return _renew(mlflow, standing, lease, reason)
            else:
                mlflow.set_registered_model_alias(name, CHALLENGER, str(version))
            return standing


def _untold(standing: Standing, model: Mapping[str, str]) -> bool:
    """Whether it is champion by a change that was interrupted before all was written down."""
    return standing.leads and (model.get(LEADER) != str(standing.version.version) or _is_undecided(standing.version))


def _is_undecided(leader: Version) -> bool:
    """Whether a gate made it champion and was interrupted before it said so."""
    return RUN in leader.tags and DECISION not in leader.tags and BY_HAND not in leader.tags


def _bar(mlflow: MlflowClient, standing: Standing, model: Mapping[str, str]) -> bool:
    """Mark a version whose bytes were rolled back when they were another version, which may be deleted by now; whether
    it was one."""
    own = standing.version
    if standing.leads or not own.digest or ROLLED_BACK in own.tags:
        return False
    found = model.get(barred(own.digest))
    if found is not None:
        mlflow.set_model_version_tag(own.name, str(own.version), ROLLED_BACK, found)
    return found is not None


def _succeeds(store: Store, standing: Standing) -> str | None:
    """Why a version takes the place of a champion with the same bytes without being compared; None if it does not."""
    leader, own = standing.champion, standing.version
    if leader is None or standing.leads or not own.digest or leader.digest != own.digest or ROLLED_BACK in own.tags:
        return None
    anew, was = leader.tags.get(CONFIG_TAG) != own.tags.get(CONFIG_TAG), f"version {leader.version}, the champion then"
    lost = gone(store, leader) is not None
    if not (anew or lost) or gone(store, own) is not None:
        return None
    return f"same bytes, stored anew: {was}, cannot be loaded" if lost else f"same bytes as {was}, asked as is set now"


def _renew(mlflow: MlflowClient, standing: Standing, lease: Lease, reason: str) -> Standing:
    """Make a version champion in place of one with the same bytes, as if it had been that one all the time."""
    leader, own = standing.champion, standing.version
    assert leader is not None
    mlflow.set_model_version_tag(own.name, str(own.version), REASON, reason)
    for tag in (PREVIOUS, OPPONENT, RUN, DECISION, BY_HAND):
        if tag in leader.tags:
            mlflow.set_model_version_tag(own.name, str(own.version), tag, leader.tags[tag])
    _describe(mlflow, own.name, own.version, reason)
    _set_champion(mlflow, own.name, own.version, lease)
    return replace(_standing(mlflow, own.name, own.version), replaced=leader.version)


def conclude(store: Store, name: str, version: int, opponent: int | None, decision: Decision) -> Conclusion:
    """Record a gate's decision on a version and, if it is promoted, make it champion.

    ``opponent`` is the champion that it was compared with, None if there was none. Repeating a call that was
    interrupted, with the same run, does what is left. Raises RegistryError or StoreError.
    """
    mlflow = client()
    with asking(f"record the decision on version {version} of {name!r}"), _alone(store, name) as lease:
        before = _standing(mlflow, name, version)
        if _begun(before, decision):
            if before.leads:
                _set_champion(mlflow, name, version, lease)
            mlflow.set_model_version_tag(name, str(version), DECISION, PROMOTED if decision.promoted else REFUSED)
            return Conclusion("recorded", _standing(mlflow, name, version))
        if before.leads or before.judged is not None:
            return Conclusion("known", before)
        if (before.champion.version if before.champion else None) != opponent or before.former is not None:
            return Conclusion("changed", before)
        for tag, value in ((REASON, decision.reason), (OPPONENT, decision.opponent), (RUN, decision.run_id)):
            mlflow.set_model_version_tag(name, str(version), tag, value[:TAG_LENGTH])
        _describe(mlflow, name, version, decision.reason)
        if decision.promoted:
            _move(mlflow, name, version, before.champion, lease)
        mlflow.set_model_version_tag(name, str(version), DECISION, PROMOTED if decision.promoted else REFUSED)
        return Conclusion("recorded", _standing(mlflow, name, version))


def _begun(standing: Standing, decision: Decision) -> bool:
    """Whether this very decision was recorded by a call that did not come back: wholly, or all but its tag DECISION
    after the alias moved."""
    tags = standing.version.tags
    if tags.get(RUN) != decision.run_id or ROLLED_BACK in tags:
        return False
    if DECISION in tags:
        return tags[DECISION] == (PROMOTED if decision.promoted else REFUSED)
    return standing.leads and decision.promoted


def note(store: Store, name: str, version: int, reason: str) -> None:
    """Say in the version's tags and description why no gate could decide on it, unless somebody has decided meanwhile.
    Raises RegistryError or StoreError."""
    mlflow = client()
    with asking(f"tag version {version} of {name!r}"), _alone(store, name):
        standing = _standing(mlflow, name, version)
        if standing.leads or standing.judged is not None:
            return
        mlflow.set_model_version_tag(name, str(version), REASON, reason[:TAG_LENGTH])
        _describe(mlflow, name, version, reason)


def promote(store: Store, name: str, version: int, reason: str) -> Version | None:
    """Make a version champion whatever any gate said; returns the champion before, None if there was none.

    If it is champion already, only what an interrupted call left is done. Raises RegistryError (no such version) or
    StoreError.
    """
    mlflow = client()
    with asking(f"promote version {version} of {name!r}"), _alone(store, name) as lease:
        chosen = _existing(mlflow, name, version)
        before = aliased(mlflow, name, CHAMPION)
        if before is None or before.version != version:
            mlflow.set_model_version_tag(name, str(version), BY_HAND, _dated(reason))
            _describe(mlflow, name, version, f"made champion by hand, {_dated(reason)}")
            _move(mlflow, name, version, before, lease)
        else:
            _set_champion(mlflow, name, version, lease)
        # Last: until the alias moves, the version and its bytes, which may be another version's too, stay barred.
        if chosen.digest and barred(chosen.digest) in mlflow.get_registered_model(name).tags:
            mlflow.delete_registered_model_tag(name, barred(chosen.digest))
        if ROLLED_BACK in chosen.tags:
            mlflow.delete_model_version_tag(name, str(version), ROLLED_BACK)
        return before


def rollback(store: Store, name: str, reason: str, version: int | None = None) -> tuple[Version, Version]:
    """Restore the champion before the present one; returns both, the restored one first.

    The version that goes is marked, so that no gate promotes the same bytes again. A call that names that ``version``
    may be repeated: it does what is left, and takes no other version away. Raises RegistryError, which says what to do,
    where there is nothing to go back to, or its bytes are gone; StoreError.
    """
    mlflow = client()
    with asking(f"roll {name!r} back"), _alone(store, name) as lease:
        present = aliased(mlflow, name, CHAMPION)
        if present is None:
            raise RegistryError(f"the model {name!r} has no champion, so there is nothing to roll back")
        if version is not None and present.version != version:
            went = version_of(mlflow, name, version)
            if went is None or ROLLED_BACK not in went.tags or went.tags.get(PREVIOUS) != str(present.version):
                raise RegistryError(f"version {version} of {name!r} is not its champion; version {present.version} is")
            _set_champion(mlflow, name, present.version, lease)  # as it is, with all that belongs to it
            return present, went
        former = _former(mlflow, store, present)
        if present.digest:
            mlflow.set_registered_model_tag(name, barred(present.digest), _dated(reason))
        mlflow.set_model_version_tag(name, str(present.version), ROLLED_BACK, _dated(reason))
        _describe(mlflow, name, present.version, f"rolled back, {_dated(reason)}")
        _set_champion(mlflow, name, former.version, lease)
        return former, present


def follow(store: Store, leader: str, follower: str, *, strict: bool) -> int | None:
    """Make the version of ``follower`` champion that was made of the champion of ``leader``; returns its number.

    A full checkpoint follows its merge so. None, and nothing changes, if there is no such version; but ``strict`` takes
    the alias from a version made of something else. Raises RegistryError or StoreError.
    """
    mlflow = client()
    with asking(f"let {follower!r} follow {leader!r}"):
        made = versions_where(mlflow, f"name = '{follower}'")
        if not made:
            return None
        with _alone(store, follower) as lease:
            leading, present = aliased(mlflow, leader, CHAMPION), aliased(mlflow, follower, CHAMPION)
            digest = leading.digest if leading else None
            of_leader = [version for version in made if digest and version.tags.get(MERGE_TAG) == digest]
            if of_leader and (present is None or present.version not in {version.version for version in of_leader}):
                _set_champion(mlflow, follower, of_leader[0].version, lease)
            elif not of_leader and present is not None and strict:
                mlflow.delete_registered_model_alias(follower, CHAMPION)
        return of_leader[0].version if of_leader else None


def _standing(mlflow: MlflowClient, name: str, version: int) -> Standing:
    own = _existing(mlflow, name, version)
    leader = aliased(mlflow, name, CHAMPION)
    same = versions_where(mlflow, f"name = '{name}' and tags.`{DIGEST_TAG}` = '{own.digest}'") if own.digest else [own]
    judged = [each for each in same if each.is_judged]
    # Of several the one that says most: rolled back, then the version itself, then the newest.
    judged.sort(key=lambda each: (ROLLED_BACK not in each.tags, each.version != version, -each.version))
    former = None
    if leader is None:
        tags = mlflow.get_registered_model(name).tags
        former = former_champion(tags, versions_where(mlflow, f"name = '{name}'"), version)
    return Standing(own, leader, judged[0] if judged else None, former=former)


def _existing(mlflow: MlflowClient, name: str, version: int) -> Version:
    found = version_of(mlflow, name, version)
    if found is None:
        raise RegistryError(f"there is no version {version} of {name!r}")
    return found


def _former(mlflow: MlflowClient, store: Store, present: Version) -> Version:
    """The champion before this one, if it may come back."""
    name, hint = present.name, "make another one champion: python -m pipeline promote … --version N"
    if PREVIOUS not in present.tags:
        raise RegistryError(
            f"version {present.version} of {name!r} became champion without a record of the one before; {hint}"
        )
    if not present.tags[PREVIOUS]:
        raise RegistryError(f"version {present.version} of {name!r} is its first champion; {hint}")
    number = int(present.tags[PREVIOUS])
    former = version_of(mlflow, name, number)
    if former is None:
        raise RegistryError(f"version {number} of {name!r}, the champion before, was deleted; {hint}")
    if ROLLED_BACK in former.tags:
        raise RegistryError(
            f"version {number} of {name!r}, the champion before, was rolled back itself ({former.tags[ROLLED_BACK]}); "
            f"{hint}"
        )
    if (uri := gone(store, former)) is not None:
        raise RegistryError(f"version {number} of {name!r}, the champion before, cannot serve: {uri} is gone; {hint}")
    return former


def _move(mlflow: MlflowClient, name: str, version: int, before: Version | None, lease: Lease) -> None:
    """Make a version champion. The tag comes first: an alias without one could not be rolled back."""
    mlflow.set_model_version_tag(name, str(version), PREVIOUS, str(before.version) if before else "")
    _set_champion(mlflow, name, version, lease)


def _set_champion(mlflow: MlflowClient, name: str, version: int, lease: Lease) -> None:
    if lease.lost:
        raise RegistryError(f"somebody else changes the aliases of {name!r} meanwhile; try again")
    mlflow.set_registered_model_alias(name, CHAMPION, str(version))
    mlflow.set_registered_model_tag(name, LEADER, str(version))
    _drop_challenger(mlflow, name, version)


def _drop_challenger(mlflow: MlflowClient, name: str, version: int) -> None:
    """Take the alias of the challenger from a version that is champion."""
    challenger = aliased(mlflow, name, CHALLENGER)
    if challenger is not None and challenger.version == version:
        mlflow.delete_registered_model_alias(name, CHALLENGER)


def _describe(mlflow: MlflowClient, name: str, version: int, reason: str) -> None:
    """Put the verdict into the version's description, before the code example, in place of an older verdict."""
    text = mlflow.get_model_version(name, str(version)).description or ""
    parts = [part for part in text.split("\n\n") if part and not part.startswith(_VERDICT)]
    at = next((i for i, part in enumerate(parts) if part.startswith("```")), len(parts))
    line = " ".join(reason.split())
    parts.insert(at, f"{_VERDICT}{line}"[:_VERDICT_LENGTH])
    mlflow.update_model_version(name, str(version), "\n\n".join(parts)[:TAG_LENGTH])


def _dated(reason: str) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}: {reason}"[:TAG_LENGTH]


def lease_key(name: str) -> str:
    """Key of the lease under which the aliases of a model change."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)[:80]
    return f"promote-{plain}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def _alone(store: Store, name: str) -> Iterator[Lease]:
    """Nobody else changes the model's aliases inside. Raises RegistryError after waiting for long."""
    key, watcher, takeover = lease_key(name), Watcher(LEASE_S), None
    deadline = time.monotonic() + WAIT_S
    while True:
        with holding(store, key, takeover, LEASE_S) as lease:
            if lease is not None:
                yield lease
                return
        if time.monotonic() > deadline:
            raise RegistryError(f"the aliases of {name!r} are being changed by somebody else for {WAIT_S:g} s")
        time.sleep(_PAUSE_S)
        seen = watcher.observe(store, key)
        takeover = seen.etag if seen.state == "expired" else None
