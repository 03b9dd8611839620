"""Versions of registered models as MLflow has them: tags, aliases and what a gate recorded with them; reads only."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import mlflow.artifacts
import yaml
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from infra.errors import RegistryError
from infra.registry import lineage
from infra.registry.answers import one_line
from infra.registry.lineage import LINEAGE_FILE, Lineage
from infra.registry.models import ADAPTER_TAG, CHECKPOINT_TAG, DIGEST_TAG, KEY_TAG, has_files
from infra.registry.runs import asking, client, model_name, pages
from infra.store.s3 import Store, split_uri

CHAMPION, CHALLENGER = "champion", "challenger"
DECISION, REASON = "factory.gate.decision", "factory.gate.reason"
"""What a gate decided (PROMOTED or REFUSED) and why. A reason without a decision: it could not decide."""
OPPONENT, RUN = "factory.gate.opponent", "factory.gate.run"
"""What the version was compared with, and the MLflow run that did it."""
PREVIOUS = "factory.gate.previous"
"""The version that was champion before this one; empty if there was none."""
BY_HAND = "factory.gate.by_hand"
"""When and why a person made the version champion."""
ROLLED_BACK = "factory.gate.rolled_back"
"""When and why the version ceased to be champion. No gate looks at its bytes again, for the same stands in a tag of the
registered model (`barred`), where it stays if the version is deleted."""
LEADER = "factory.champion"
"""Tag of a registered model: its last champion, which stays known if that version or its alias is removed by hand."""
PROMOTED, REFUSED = "promoted", "challenger"
MERGE_TAG = "factory.merge_digest"
"""Digest of the merge that a full checkpoint was made of."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model as MLflow has it."""

    name: str
    version: int
    tags: Mapping[str, str]
    created: float = 0.0
    """Seconds since the epoch."""
    source: str = ""
    """Where its files are: code, configuration, lineage."""

    @property
    def key(self) -> str:
        """Recipe of its artifact."""
        return self.tags.get(KEY_TAG, "")

    @property
    def digest(self) -> str:
        """Of its artifact's bytes."""
        return self.tags.get(DIGEST_TAG, "")

    @property
    def is_judged(self) -> bool:
        """Whether a gate decided on it, or it was rolled back."""
        return DECISION in self.tags or ROLLED_BACK in self.tags

    @property
    def was_champion(self) -> bool:
        """Whether it became champion, by a gate or by hand, and was not rolled back."""
        chosen = self.tags.get(DECISION) == PROMOTED or BY_HAND in self.tags
        return chosen and PREVIOUS in self.tags and ROLLED_BACK not in self.tags


@dataclass(frozen=True)
class Model:
    """A registered model with its versions, the newest first."""

    name: str
    task: str
    aliases: Mapping[str, int]
    versions: tuple[Version, ...]
    tags: Mapping[str, str] = field(default_factory=dict)


def champion(name: str) -> Version | None:
    """The version that is champion now. Raises RegistryError."""
    with asking(f"look for the champion of {name!r}"):
        return aliased(client(), name, CHAMPION)


def find_version(name: str, version: int) -> Version | None:
    """A version by its number. Raises RegistryError."""
    with asking(f"look for version {version} of {name!r}"):
        return version_of(client(), name, version)


def models_of(suite: str) -> list[Model]:
    """The registered models of a suite, by name. Raises RegistryError."""
    mlflow = client()
    with asking(f"list the models of {suite!r}"):
        found = [model for model in _registered(mlflow, suite) if _belongs(model, suite)]
        with ThreadPoolExecutor(max_workers=8) as pool:
            versions = list(pool.map(lambda model: versions_where(mlflow, f"name = '{model.name}'"), found))
    models = [
        Model(
            model.name,
            model.tags["factory.task"],
            {k: int(v) for k, v in model.aliases.items()},
            tuple(listed),
            model.tags,
        )
        for model, listed in zip(found, versions, strict=True)
    ]
    return sorted(models, key=lambda model: model.name)


def _registered(mlflow: MlflowClient, suite: str) -> Iterator[RegisteredModel]:
    where = f"name LIKE '{suite}.%'"
    yield from pages(lambda token: mlflow.search_registered_models(where, max_results=500, page_token=token))


def _belongs(model: RegisteredModel, suite: str) -> bool:
    """A suite's name may begin like another's."""
    return model.name == model_name(suite, model.tags.get("factory.task", ""))


def versions_where(mlflow: MlflowClient, where: str) -> list[Version]:
    """Those that a filter of MLflow's names, the newest first."""
    found: Iterable[ModelVersion] = mlflow.search_model_versions(where, max_results=1000)
    return sorted((_plain(version) for version in found if version.status == "READY"), key=lambda v: -v.version)


def aliased(mlflow: MlflowClient, name: str, alias: str) -> Version | None:
    """The version with an alias."""
    return _unless_absent(lambda: _plain(mlflow.get_model_version_by_alias(name, alias)))


def version_of(mlflow: MlflowClient, name: str, version: int) -> Version | None:
    """The version with a number."""
    return _unless_absent(lambda: _plain(mlflow.get_model_version(name, str(version))))


def _unless_absent(get: Callable[[], Version]) -> Version | None:
    try:
        return get()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the latter: no such alias
            return None
        raise


def _plain(version: ModelVersion) -> Version:
    created = (version.creation_timestamp or 0) / 1000
    return Version(version.name, int(version.version), dict(version.tags), created, version.source or "")


def former_champion(tags: Mapping[str, str], versions: Iterable[Version], but: int) -> int | None:
    """The last champion of a model that has none, by its tags. One from before there was such a tag: the newest of its
    versions that was champion, ``but`` left out; the newest come first."""
    if LEADER in tags:
        return int(tags[LEADER])
    return next((each.version for each in versions if each.was_champion and each.version != but), None)


def barred(digest: str) -> str:
    """Tag of a registered model that says when and why these bytes were rolled back."""
    return f"factory.rolled_back.{digest[:40]}"


def lineage_of(version: Version) -> Lineage | None:
    """What a version was made of when it was registered; None if that was not recorded, or its files are gone.

    Raises RegistryError.
    """
    if lineage.KEY_TAG not in version.tags or not version.source:
        return None
    with asking(f"say what version {version.version} of {version.name!r} was made of"):
        if not has_files(version.source):
            return None
        text = mlflow.artifacts.load_text(f"{version.source}/{LINEAGE_FILE}")
    try:
        return Lineage.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{version.source}/{LINEAGE_FILE} is damaged: {error}") from error


def told(source: str) -> dict[str, Any]:
    """What the code of a version with these files is told (`infra.registry.models.model_config`); nothing if its files
    are gone: then it cannot be loaded. Raises RegistryError."""
    if not source:
        return {}
    with asking(f"read what {source} was registered with"):
        try:
            text = mlflow.artifacts.load_text(f"{source}/MLmodel")
        except MlflowException:
            if has_files(source):
                raise
            return {}
    try:
        return dict(yaml.safe_load(text)["flavors"]["python_function"].get("config") or {})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise RegistryError(f"{source}/MLmodel is damaged: {one_line(str(error))}") from error


def gone(store: Store, version: Version) -> str | None:
    """The URI of a version's bytes if they are no longer in the object store of `store`'s endpoint, or that of the
    files that load them if MLflow no longer has those. Raises StoreError or RegistryError."""
    for tag in (ADAPTER_TAG, CHECKPOINT_TAG):
        if uri := version.tags.get(tag):
            bucket, name = split_uri(uri)
            whole = store.beside(bucket)
            there = whole.head(name) is not None if tag == ADAPTER_TAG else any(True for _ in whole.list(f"{name}/"))
            if not there:
                return uri
    with asking(f"look for the files of version {version.version} of {version.name!r}"):
        return None if has_files(version.source) else version.source
