"""Where an expert of a merge by hand is: names and kinds of sources, looked up but not read.

A source is an adapter file, a PEFT folder, a full checkpoint, an object (or the prefix of several) in S3, a
repository of the Hugging Face hub, or a registered model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from infra.artifacts.manifests import Manifest
from infra.errors import ConfigError, RegistryError
from infra.store.errors import ObjectMissing
from infra.store.layout import manifest_name, split_stored
from infra.store.s3 import Store, split_uri
from workers.base.cache import cache_dir
from workers.base.downloads import HUB_WEIGHTS, fetch_hub, resolve_hub
from workers.conversion.companions import COMPANIONS
from workers.conversion.peft import PEFT_CONFIG, PEFT_TENSORS

ACCEPTED = (
    "accepted are an adapter file (.safetensors), the folder of a PEFT adapter (adapter_config.json), the folder of a "
    "full checkpoint (config.json and safetensors), s3://<bucket>/<name> of an adapter file or of a checkpoint's "
    "prefix, hub:<repository>[@<revision>] of a PEFT adapter or a checkpoint, and "
    "models:/<name>/<version> or models:/<name>@<alias>"
)
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_MODEL = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


def split_expert(text: str) -> tuple[str, str]:
    """`NAME=SOURCE` -> (name, source). A source alone gives the name that it is filed under.

    What stands before the first `=` is a name unless it has a `/` or `:` in it; a file of that whole name is a source.
    """
    name, separator, source = text.partition("=")
    if separator and not set("/:") & set(name) and not Path(text).exists():
        if not name or not source:
            raise ConfigError(f"expert {text!r}: give NAME=SOURCE or SOURCE; {ACCEPTED}")
        return name, source
    return name_of(text), text


def name_experts(given: Sequence[Any]) -> dict[str, str]:
    """Sources by name. Raises ConfigError where two would have the same name."""
    experts: dict[str, str] = {}
    for text in given:
        name, source = split_expert(str(text))
        if name in experts:
            raise ConfigError(
                f"two experts are named {name!r}: {experts[name]} and {source}; name them apart with NAME=SOURCE"
            )
        experts[name] = source
    return experts


def name_of(source: str) -> str:
    """The name of an expert that is given without one."""
    if found := _MODEL.fullmatch(source):
        return found["name"]
    if (stored := split_stored(source.partition("://")[2].partition("/")[2])) and stored.is_file:
        return stored.key[:12]
    if source.startswith("hub:"):
        source = source.partition("@")[0]
    name = Path(source.rstrip("/")).name.removesuffix(".safetensors")
    return name or source


# -- what a source is --

Kind = Literal["adapter", "peft", "checkpoint"]


@dataclass(frozen=True)
class Place:
    """Where a source is: on disk (`path`), or in a store (`name`, an object or the prefix of several).

    `manifest`: of the artifact that a file belongs to; `lineage` names a registered version.
    """

    given: str
    kind: Kind
    path: Path | None = None
    store: Store | None = None
    name: str = ""
    manifest: Manifest | None = None
    lineage: str | None = None

    @property
    def sha256(self) -> str | None:
        """That of the file, where a manifest says it."""
        refs = self.manifest.files.values() if self.manifest else ()
        return next((ref.sha256 for ref in refs if ref.name == self.name), None)

    @property
    def uri(self) -> str:
        """Comparable with an output: an absolute path or an `s3://` URI."""
        if self.store is not None:
            return self.store.uri(self.name)
        assert self.path is not None
        return str(self.path.resolve())


def locate(source: str) -> Place:
    """What a source is and where. Raises ConfigError for what is nothing known, with a list of what is accepted."""
    if source.startswith("models:"):
        return _registered(source)
    if source.startswith("s3://"):
        return locate_object(source)
    if source.startswith("hub:"):
        return _on_hub(source)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source):
        raise ConfigError(f"{source}: no source of an expert; {ACCEPTED}")
    path = Path(source).expanduser()
    if path.is_file():
        return Place(source, "adapter", path)
    if (path / PEFT_CONFIG).is_file():
        return Place(source, "peft", path)
    if (path / "config.json").is_file():
        return Place(source, "checkpoint", path)
    if path.is_dir():
        raise ConfigError(f"{source}: this folder has neither {PEFT_CONFIG} nor config.json; {ACCEPTED}")
    raise ConfigError(f"{source}: no such file or folder; {ACCEPTED}")


def _on_hub(source: str) -> Place:
    """A repository at one commit, fetched: it says what it is only by its files."""
    name = source.partition(":")[2]
    if not _REPOSITORY.fullmatch(name):
        raise ConfigError(f"{source}: no name of a repository; {ACCEPTED}")
    notes = cache_dir() / "hub"
    notes.mkdir(parents=True, exist_ok=True)
    small = (PEFT_CONFIG, PEFT_TENSORS, *COMPANIONS)
    pinned, folder = resolve_hub(name, notes, small)
    folder = folder or fetch_hub(pinned, small)
    if (folder / PEFT_CONFIG).is_file():
        return Place(source, "peft", folder)
    if (folder / "config.json").is_file():
        return Place(source, "checkpoint", fetch_hub(pinned, (*small, *HUB_WEIGHTS)))
    raise ConfigError(f"{source}: this repository has neither {PEFT_CONFIG} nor config.json; {ACCEPTED}")


def store_of(uri: str) -> tuple[Store, str]:
    """The store that an `s3://` URI lies in and the name there; an artifact's store has its prefix."""
    bucket, name = split_uri(uri)
    endpoint = Store.from_env().endpoint
    if (stored := split_stored(name)) and stored.is_file:
        return Store(bucket, endpoint, stored.prefix), stored.name
    return Store(bucket, endpoint), name


def locate_object(uri: str, lineage: str | None = None) -> Place:
    """What lies at an `s3://` URI: an object is an adapter file, a prefix with config.json a checkpoint."""
    store, name = store_of(uri.rstrip("/"))
    if not name:
        raise ConfigError(f"{uri}: names a bucket; {ACCEPTED}")
    info = store.head(name)
    if info is not None and info.size:  # some servers show a prefix as an empty object
        return Place(uri, "adapter", None, store, name, _manifest(store, name), lineage)
    if store.head(f"{name}/{PEFT_CONFIG}") is not None:
        return Place(uri, "peft", None, store, name, lineage=lineage)
    if store.head(f"{name}/config.json") is not None:
        return Place(uri, "checkpoint", None, store, name, lineage=lineage)
    raise ConfigError(f"{uri}: no such object at {store.endpoint or 'AWS'}, and no checkpoint below it; {ACCEPTED}")


def names_in(path: Path | None, store: Store | None, name: str) -> set[str]:
    """What lies in a folder, or in a store below a name; nothing where it does not exist."""
    if store is not None:
        return {found.removeprefix(f"{name}/") for found in store.list(f"{name}/")}
    assert path is not None
    return {entry.name for entry in path.iterdir()} if path.is_dir() else set()


def _manifest(store: Store, name: str) -> Manifest | None:
    """Of the artifact that a file belongs to; None for other objects."""
    stored = split_stored(name)
    if stored is None or not stored.is_file:
        return None
    try:
        manifest = Manifest.from_json(store.get(manifest_name(stored.key)))
    except ObjectMissing:
        return None
    return manifest if any(ref.name == name for ref in manifest.files.values()) else None


def _registered(source: str) -> Place:
    found = _MODEL.fullmatch(source)
    if not found:
        raise ConfigError(
            f"{source}: not a registered model; accepted: models:/<name>/<version>, models:/<name>@<alias>"
        )
    version, uri = _registered_version(found["name"], found["version"], found["alias"])
    return replace(locate_object(uri, f"models:/{found['name']}/{version}"), given=source)


def _registered_version(name: str, version: str | None, alias: str | None) -> tuple[str, str]:
    """Number of a registered model's version and the URI of its adapter or checkpoint."""
    from mlflow.exceptions import MlflowException  # seconds of imports, for this kind of source only

    from infra.registry import runs
    from infra.registry.models import ADAPTER_TAG, CHECKPOINT_TAG

    mlflow = runs.client()
    which = f"version {version}" if version else f"alias {alias!r}"
    with runs.asking(f"look for {which} of {name!r}"):
        try:
            found = (
                mlflow.get_model_version_by_alias(name, alias)
                if alias
                else mlflow.get_model_version(name, str(version))
            )
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise RegistryError(
                f"the MLflow server at {runs.tracking_uri()} has no {which} of {name!r}: {error}"
            ) from error
    uri = found.tags.get(ADAPTER_TAG) or found.tags.get(CHECKPOINT_TAG)
    if not uri:
        raise RegistryError(
            f"models:/{name}/{found.version} refers to no adapter or checkpoint; was it registered by other software?"
        )
    return str(found.version), uri
