"""Registered models: adapters and full checkpoints, by reference, with what they were made of.

Covers idempotent registration (the same key, digest, place and configuration is the same version) with tags, a
description and a lineage, and finding the version of a key. A card belongs to a version; the registered model says what
all of its versions are. Which version is champion is `infra.registry.aliases`. What a registered model does when it is
loaded is `workers.serving.adapter_model` and `workers.serving.checkpoint_model`; the server and its runs are
`infra.registry.runs`.
"""

import hashlib
import json
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from infra.errors import RegistryError
from infra.registry.lineage import LINEAGE_FILE, TAG_LENGTH, Lineage
from infra.registry.packaging import save_model
from infra.registry.runs import asking, client, tracking_uri
from infra.store.layout import split_stored
from infra.store.s3 import FileRef, split_uri

KEY_TAG, DIGEST_TAG = "factory.key", "factory.digest"
HEADS_TAG = "factory.heads"
"""How many heads a version's configuration names."""
ADAPTER_TAG, CHECKPOINT_TAG = "factory.adapter_uri", "factory.checkpoint_uri"
"""Where a version's bytes are: a version has one of the two."""
BASE_TAG = "factory.base_sha256"
CONFIG_TAG = "factory.config_sha256"
"""Tag of a version: SHA-256 of what its code is told (`model_config`), so of how it is asked and answers."""
VERSION_MARK = "<version>"
"""Stands in a description for the version's number, which is known once the version is made."""
_ALIASES = """\
- `champion`: the version that serves: `models:/{name}@champion`
- `challenger`: the newest version that is no champion

Each version's own page says what it was made of, how it scores, and why it is champion or not."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A model to register: which, how it is prompted, and where it came from.

    ``name`` is the registered model's (see ``infra.registry.runs.model_name``); ``digest`` the artifact's. ``heads`` of
    a classifier: task to ``adapter`` (URI of the file that holds its head), ``sha256``, ``labels`` and
    ``prompt_template``. ``max_input_tokens`` truncates an input on the left, as in training. ``prompt_wrapper`` holds
    ``{prompt}``, ``prompt_template`` holds ``{input}``. ``prompts`` of a language model: task to ``template``,
    ``max_new_tokens``, ``chooses`` (among given options, by likelihood) and ``length_normalised``, for inputs that name
    their task; those that do not get ``prompt_template`` and ``max_new_tokens``. ``batch_size`` is that of the scores:
    rows answered together. ``lineage`` is that of a merge. ``description`` is the version's; ``about`` says in a
    sentence what the registered model is, whatever the version.
    """

    name: str
    task: str
    key: str
    digest: str
    base_sha256: str
    base_name: str
    prompt_wrapper: str
    prompt_template: str
    max_new_tokens: int
    dtype: str
    run_id: str
    description: str
    tags: dict[str, str] = field(default_factory=dict)
    max_input_tokens: int | None = None
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompts: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch_size: int = 24
    lineage: Lineage | None = None
    about: str = ""
    code: ClassVar[str]
    """File beside this one that MLflow runs when the model is loaded."""

    def place(self) -> tuple[str, str]:
        """Tag name and URI of where the bytes are."""
        raise NotImplementedError

    def references(self) -> dict[str, Any]:
        """What the code needs to find the bytes."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RegisteredAdapter(Registration):
    """An adapter, added to its base when it is loaded.

    ``adapter_uri`` is the ``s3://`` URI of the adapter file, of which only a reference is kept; ``adapter_sha256``
    (optional) that of the file, verified on loading.
    """

    adapter_uri: str
    adapter_sha256: str = ""
    code = "adapter_model.py"

    def place(self) -> tuple[str, str]:
        return ADAPTER_TAG, self.adapter_uri

    def references(self) -> dict[str, Any]:
        return {
            "adapter": _object_name(self.adapter_uri),
            "adapter_uri": self.adapter_uri,
            "adapter_sha256": self.adapter_sha256,
        }


@dataclass(frozen=True, kw_only=True)
class RegisteredCheckpoint(Registration):
    """A full checkpoint: a folder with config.json, tokenizer and safetensors shards in the object store.

    ``checkpoint_uri`` is the folder's ``s3://`` URI; ``files``: name inside the folder to its reference in the store,
    as in the artifact's manifest. ``base_sha256`` is the base that it was merged on.
    """

    checkpoint_uri: str
    files: Mapping[str, FileRef]
    code = "checkpoint_model.py"

    def place(self) -> tuple[str, str]:
        return CHECKPOINT_TAG, self.checkpoint_uri

    def references(self) -> dict[str, Any]:
        return {
            "checkpoint_uri": self.checkpoint_uri,
            "files": {name: asdict(ref) for name, ref in self.files.items()},
        }


def register(model: Registration) -> tuple[int, bool]:
    """Register the model, or find the version that already has its key, digest, place and configuration.

    Returns the version and whether this call made it. A version keeps the lineage that it was registered with. One
    whose files are gone (`mlflow gc` removes them with the run that made it) is not found: it cannot be loaded.

    Raises RegistryError, naming the model.
    """
    mlflow = client()
    with asking(f"register the model {model.name!r}"):
        _ensure_model(mlflow, model)
        found, made = _find(mlflow, model), None
        if found is None:
            source = _log_model(mlflow, model)
            made = mlflow.create_model_version(
                model.name,
                source,
                run_id=model.run_id,
                tags=_tags(model),
                description=_description(model),
                await_creation_for=30,
            )
            # Two that registered the same at once agree on the first; the other goes.
            found = _find(mlflow, model)
            if found is None:
                raise RegistryError(f"version {made.version} of the model {model.name!r} vanished meanwhile")
            if int(found.version) != int(made.version):
                mlflow.delete_model_version(model.name, made.version)
        if found.description and VERSION_MARK in found.description:  # made now, or by a call that was interrupted
            mlflow.update_model_version(model.name, found.version, numbered(found.description, found.version))
    return int(found.version), made is not None and int(found.version) == int(made.version)


def numbered(description: str, version: int | str) -> str:
    """A description with the number of its version filled in."""
    return description.replace(VERSION_MARK, str(version))


def registered_as(key: str, digest: str) -> str | None:
    """``models:/<name>/<version>`` of an artifact, whatever its name; the first of several. Raises RegistryError."""
    with asking("look for a registered version"):
        found = next(iter(_with(client(), key, {DIGEST_TAG: digest})), None)
    return f"models:/{found.name}/{found.version}" if found else None


def reuse(model: Registration) -> int | None:
    """The version that already has this key, digest, place and configuration; None where there is none.

    As `register` would find it, but nothing is made: ``run_id`` does not matter. Raises RegistryError.
    """
    with asking(f"look for the model {model.name!r}"):
        found = _find(client(), model)
    return int(found.version) if found else None


def check_model(name: str, task: str, kind: str) -> None:
    """Prove that versions of this task and kind can be registered under the name.

    Raises RegistryError where the name belongs to another task, or its versions are of another kind, and where the
    server does not answer.
    """
    mlflow = client()
    with asking(f"look at the model {name!r}"):
        try:
            found = mlflow.get_registered_model(_quoted(name))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return
            raise
        _check_task(name, found.tags.get("factory.task"), task)
        others = {version.tags.get("kind") for version in mlflow.search_model_versions(f"name = '{_quoted(name)}'")}
        if other := next(iter(others - {None, kind}), None):
            raise RegistryError(
                f"the model {name!r} is registered for versions of kind {other!r}, not {kind!r}; take another name"
            )


def _check_task(name: str, registered: str | None, task: str) -> None:
    if registered is not None and registered != task:
        raise RegistryError(
            f"the model {name!r} is registered for the task {registered!r}, not for {task!r}; "
            "rename the task or choose another suite name"
        )


def _ensure_model(mlflow: MlflowClient, model: Registration) -> None:
    tags = {"factory.task": model.task, "factory.base": model.base_name}
    about = f"{model.about or f'Versions of {model.name}.'}\n\n{_ALIASES.format(name=model.name)}"
    try:
        mlflow.create_registered_model(model.name, tags=tags, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        _check_task(model.name, mlflow.get_registered_model(model.name).tags.get("factory.task"), model.task)


def _description(model: Registration) -> str:
    """The description with the lineage's lines, as long as MLflow takes it."""
    lineage = f"\n{model.lineage.text()}" if model.lineage else ""
    room = TAG_LENGTH - len(lineage)
    own = model.description if len(model.description) <= room else model.description[: room - 2] + " …"
    return own + lineage


def identity(model: Registration) -> dict[str, str]:
    """The tags by which a version is that of the model: the same bytes, at the same place, asked in the same way."""
    told = json.dumps(model_config(model), sort_keys=True).encode()
    return {
        KEY_TAG: model.key,
        DIGEST_TAG: model.digest,
        CONFIG_TAG: hashlib.sha256(told).hexdigest(),
        **dict([model.place()]),
    }


def has_files(source: str) -> bool:
    """Whether the files of a version (code, configuration, lineage; not the bytes that they refer to) are there."""
    import mlflow.artifacts as artifacts

    found = artifacts.list_artifacts(artifact_uri=source, tracking_uri=tracking_uri())
    return any(file.path.endswith("MLmodel") for file in found)  # some stores keep empty folders


def _find(mlflow: MlflowClient, model: Registration) -> ModelVersion | None:
    found = _with(mlflow, model.key, identity(model), model.name)
    return next((version for version in found if has_files(version.source or "")), None)


def _with(mlflow: MlflowClient, key: str, tags: Mapping[str, str], name: str | None = None) -> list[ModelVersion]:
    """The versions of this key that are ready and have these tags, the first one first; of the named model, or of
    any."""
    named = f"name = '{_quoted(name)}' and " if name else ""
    where = f"{named}tags.`{KEY_TAG}` = '{_quoted(key)}'"
    versions = [
        version
        for version in mlflow.search_model_versions(where, max_results=1000)
        if version.status == "READY" and all(version.tags.get(tag) == value for tag, value in tags.items())
    ]
    return sorted(versions, key=lambda version: (version.name, int(version.version)))


def _quoted(text: str) -> str:
    if "'" in text:
        raise RegistryError(f"the name {text!r} contains a quote; names without one are accepted")
    return text


def _tags(model: Registration) -> dict[str, str]:
    return {
        **model.tags,
        **(model.lineage.tags() if model.lineage else {}),
        **identity(model),
        "factory.task": model.task,
        "factory.base": model.base_name,
        BASE_TAG: model.base_sha256,
        HEADS_TAG: str(len(model.heads)),
    }


def model_config(model: Registration) -> dict[str, Any]:
    """What the model's code needs when it is loaded: references and prompting, no bytes."""
    bucket, prefix, _ = split_place(model.place()[1])
    return {
        "bucket": bucket,
        "prefix": prefix,
        **model.references(),
        "digest": model.digest,
        "base_sha256": model.base_sha256,
        "prompt_wrapper": model.prompt_wrapper,
        "prompt_template": model.prompt_template,
        "max_new_tokens": model.max_new_tokens,
        "max_input_tokens": model.max_input_tokens,
        "dtype": model.dtype,
        "device": "cpu",
        "batch_size": model.batch_size,
        "prompts": model.prompts,
        "heads": {task: {**head, "adapter": _object_name(head["adapter"])} for task, head in model.heads.items()},
    }


def split_place(uri: str) -> tuple[str, str, str]:
    """Bucket, prefix of the store, and name inside that store of the object or folder at an ``s3://`` URI.

    What lies in an artifact's folder (`infra.store.layout`) is in the store that has the artifact; any other place is
    in a store without a prefix. A registered model looks for its base in that store, too.
    """
    bucket, name = split_uri(uri)
    found = split_stored(name)
    return (bucket, found.prefix, found.name) if found and found.inside else (bucket, "", name)


def _object_name(uri: str) -> str:
    return split_place(uri)[2]


def _log_model(mlflow: MlflowClient, model: Registration) -> str:
    """Store the pyfunc model (code and configuration, a few KB) with the run; returns its URI."""
    target = f"models/{model.digest[:16]}-{uuid.uuid4().hex[:8]}"  # never the place of another version of this run
    with tempfile.TemporaryDirectory(prefix="factory-model-") as folder:
        about = {"key": model.key, "digest": model.digest, "task": model.task}
        path = save_model(Path(folder), f"workers/serving/{model.code}", model_config(model), about)
        if model.lineage:
            (path / LINEAGE_FILE).write_text(model.lineage.to_json())
        mlflow.log_artifacts(model.run_id, str(path), target)
    return f"{mlflow.get_run(model.run_id).info.artifact_uri}/{target}"
