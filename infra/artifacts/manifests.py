"""Content-addressed artifacts: recipes and their keys, manifests and their digests, publishing and finding.

A *key* names a recipe: the SHA-256 of everything the artifact is a function of. A *digest* names bytes. Two attempts
at one key may produce different bytes, so data goes to a name unique to the attempt and the manifest, at the fixed
name of the key, is put-if-absent: the first manifest wins, a loser drops its bytes and uses the winner's. Files can be
uploaded before (several tasks may each make one); they become the artifact with the manifest.

Layout in the store: ``objects/<key>/<attempt>/<label>`` (data) and ``artifacts/<key>.json`` (manifest). Does not
cover deleting artifacts that nobody needs any more, bytes of a manifest that was replaced (something else may refer to
them), nor bytes left by a process that was killed between its upload and its manifest: nothing ever refers to those.
All of that is `infra/artifacts/gc.py`.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from infra.errors import StoreError
from infra.store.layout import data_folder, manifest_name, new_attempt
from infra.store.s3 import FileRef, ObjectInfo, Store

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ATTEMPTS = 50
_THREADS = 16


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with one spelling per value: sorted keys, no spaces, floats by repr, tuples as lists.

    Accepts None, bool, int, float, str, lists, tuples and mappings with string keys. Raises TypeError for other
    types (a set has no order, an object no spelling) and ValueError for NaN and infinities.
    """
    plain = _plain(value, "value")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: only finite numbers have a key")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for name in value:
            if type(name) is not str:
                raise TypeError(f"{where} has the key {name!r}: only strings are accepted")
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}: only plain JSON values have a key")


@dataclass(frozen=True)
class Recipe:
    """Everything an artifact is a function of.

    ``version`` is that of the algorithm: raise it when a numerical result changes. ``inputs`` are the keys of the
    artifacts consumed, in an order that means something (sort them where it does not).
    """

    kind: str
    version: int
    config: Mapping[str, Any]
    inputs: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """Hex SHA-256 of the recipe's canonical JSON."""
        return hashlib.sha256(canonical_json(_recipe_body(self))).hexdigest()


def _recipe_body(recipe: Recipe) -> dict[str, Any]:
    return {"kind": recipe.kind, "version": recipe.version, "config": recipe.config, "inputs": recipe.inputs}


@dataclass(frozen=True)
class Manifest:
    """What was made for a key: the files by label, the digests of the inputs consumed, and notes (``meta``)."""

    key: str
    kind: str
    version: int
    config: dict[str, Any]
    files: dict[str, FileRef]
    inputs: dict[str, str]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hex SHA-256 over the files' labels and bytes: equal digests mean equal bytes."""
        body = {label: ref.sha256 for label, ref in self.files.items()}
        return hashlib.sha256(canonical_json(body)).hexdigest()

    def to_json(self) -> bytes:
        """Canonical JSON of the manifest, its digest included for readers."""
        return canonical_json({**asdict(self), "digest": self.digest})

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """The manifest in these bytes. Raises StoreError if they are not one or contradict themselves."""
        try:
            body = json.loads(data)
            files = {
                str(label): FileRef(str(ref["name"]), str(ref["sha256"]), int(ref["size"]))
                for label, ref in body["files"].items()
            }
            inputs = {str(key): str(digest) for key, digest in body["inputs"].items()}
            manifest = cls(
                key=str(body["key"]),
                kind=str(body["kind"]),
                version=int(body["version"]),
                config=dict(body["config"]),
                files=files,
                inputs=inputs,
                meta=dict(body["meta"]),
            )
            digest = str(body["digest"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"not a manifest ({type(error).__name__}: {error}): {data[:80]!r}") from error
        if digest != manifest.digest:
            raise StoreError(f"the manifest of {manifest.key} records digest {digest}, not {manifest.digest}")
        prefix = data_folder(manifest.key)
        for ref in manifest.files.values():
            if not ref.name.startswith(prefix) or ".." in ref.name.split("/"):
                raise StoreError(f"the manifest of {manifest.key} refers to {ref.name!r}; accepted: {prefix}…")
        return manifest


class Readable(Protocol):
    """What finding an artifact needs of a store: `infra.store.s3.Store`, or a snapshot of one."""

    def get_with_etag(self, name: str) -> tuple[bytes, str] | None: ...
    def head(self, name: str) -> ObjectInfo | None: ...


def find(store: Readable, key: str, inputs: Mapping[str, str]) -> Manifest | None:
    """The artifact of a key, or None if it is absent or unusable and so has to be made.

    Unusable: its manifest is unreadable, it was made from other input digests than ``inputs``, or one of its files
    is missing or of another size. Bytes are verified where they are downloaded.
    """
    found = store.get_with_etag(manifest_name(key))
    return None if found is None else _usable(store, key, found[0], inputs)


def find_each(store: Readable, wanted: Iterable[tuple[str, Mapping[str, str]]]) -> list[Manifest | None]:
    """As `find` for each key with its inputs, in their order, several at a time: a run asks for thousands."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda each: find(store, *each), wanted))


def peek(store: Readable, key: str) -> Manifest | None:
    """The manifest of a key, whether or not it is usable; None if it is absent or cannot be read."""
    found = store.get_with_etag(manifest_name(key))
    with contextlib.suppress(StoreError):
        return Manifest.from_json(found[0]) if found is not None else None
    return None


def publish(
    store: Store,
    recipe: Recipe,
    files: Mapping[str, Path | FileRef],
    inputs: Mapping[str, str],
    meta: Mapping[str, Any],
) -> tuple[Manifest, bool]:
    """Make the files the artifact of the recipe, unless another attempt already did.

    A file is a local one, or the reference of one that is in the store already, in a folder of `new_attempt(key)`
    (several tasks may have written there). Returns the manifest that holds and whether it is this one. A loser's bytes
    are deleted, those given by reference included, unless the winner refers to them (a repeated call). Those of an
    unusable artifact (other input digests, missing bytes) that this one replaces stay: a registered model may point at
    them. Where publishing fails, references given stay, so that the call can be repeated. Raises StoreError, also for
    a reference to nothing.
    """
    key = recipe.key
    name = manifest_name(key)
    given = {label: file for label, file in files.items() if isinstance(file, FileRef)}
    for label in files:
        if not _LABEL.fullmatch(label):
            raise ValueError(f"bad file label {label!r}: letters, digits, '.', '_' and '-' are accepted")
    for label, ref in given.items():
        if not ref.name.startswith(data_folder(key)) or ".." in ref.name.split("/"):
            raise ValueError(f"{label}: {ref.name!r} is not in a folder of this artifact, {data_folder(key)}…")
        info = store.head(ref.name)
        if info is None or info.size != ref.size:
            raise StoreError(f"{store.uri(ref.name)} is not there with {ref.size} bytes: {label} was not stored")
    folder = new_attempt(key)
    names = [f"{folder}/{label}" for label in files if label not in given]
    try:
        refs = {
            label: file if isinstance(file, FileRef) else store.upload_file(f"{folder}/{label}", file)
            for label, file in files.items()
        }
        config = json.loads(canonical_json(recipe.config))
        notes = json.loads(canonical_json(meta))
        mine = Manifest(key, recipe.kind, recipe.version, config, refs, dict(inputs), notes)
        data = mine.to_json()
    except BaseException:
        _drop(store, names)
        raise
    # From here on a failure may have been applied: the bytes stay, so that no manifest ever refers to deleted ones.
    for _ in range(_ATTEMPTS):
        if store.put_if_absent(name, data):
            return mine, True
        found = store.get_with_etag(name)
        if found is None:
            continue
        winner = _usable(store, key, found[0], inputs)
        if winner is not None:
            if winner == mine:
                return mine, True
            _drop(store, {ref.name for ref in refs.values()} - {ref.name for ref in winner.files.values()})
            return winner, False
        if store.replace_if_match(name, data, found[1]):
            return mine, True
    raise StoreError(f"{store.uri(name)} kept changing during {_ATTEMPTS} attempts to publish it")


def _usable(store: Readable, key: str, data: bytes, inputs: Mapping[str, str]) -> Manifest | None:
    try:
        manifest = Manifest.from_json(data)
    except StoreError:
        return None
    if manifest.key != key or manifest.inputs != dict(inputs):
        return None
    for ref in manifest.files.values():
        info = store.head(ref.name)
        if info is None or info.size != ref.size:
            return None
    return manifest


def _drop(store: Store, names: Iterable[str]) -> None:
    """Delete what can be deleted: a store that fails here leaves bytes that nothing refers to."""
    for name in names:
        with contextlib.suppress(StoreError):
            store.delete(name)
