"""Where a merge by hand writes: files and folders, on disk or in S3, checked before the work and recognised after it.

A merged adapter says in its own information (`merge`) which merge it is. An output that holds exactly the wanted merge
is left alone; one that holds something else than a merge is never replaced.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.artifacts.manifests import canonical_json
from infra.errors import AdapterError, ConfigError, MergeError
from infra.store.layout import FOLDERS, split_stored
from infra.store.s3 import Store, split_uri
from infra.store.source import StoreSource
from merge.by_hand.inputs import Expert
from merge.by_hand.sources import store_of
from workers.adapters.task_mask import MaskReader
from workers.adapters.writer import AdapterReader
from workers.tensors.source import ByteSource, FileSource

RECORD_FIELD = "merge"
"""Field of a merged adapter's information that holds the record."""


@dataclass(frozen=True)
class Output:
    """A file or folder (`path`), or an object or prefix (`store` and `name`)."""

    given: str
    path: Path | None = None
    store: Store | None = None
    name: str = ""

    @property
    def uri(self) -> str:
        """Comparable with a source: an absolute path or an `s3://` URI."""
        if self.store is not None:
            return self.store.uri(self.name)
        assert self.path is not None
        return str(self.path.resolve())

    def beside(self, suffix: str) -> Output:
        """Another file next to this one: its name without `.safetensors`, then `suffix`."""
        if self.store is not None:
            name = self.name.removesuffix(".safetensors") + suffix
            return Output(self.store.uri(name), None, self.store, name)
        assert self.path is not None
        path = self.path.with_name(self.path.name.removesuffix(".safetensors") + suffix)
        return Output(str(path), path)

    def inside(self, name: str) -> Output:
        """A file in this folder."""
        given = f"{self.given.rstrip('/')}/{name}"
        if self.store is not None:
            return Output(given, None, self.store, f"{self.name}/{name}")
        assert self.path is not None
        return Output(given, self.path / name)

    def size(self) -> int | None:
        """Bytes of the file or object, None if there is none."""
        if self.store is not None:
            info = self.store.head(self.name)
            return info.size if info else None
        assert self.path is not None
        return self.path.stat().st_size if self.path.is_file() else None

    def source(self) -> ByteSource:
        """For reading what is there."""
        if self.store is not None:
            return StoreSource(self.store, self.name)
        assert self.path is not None
        return FileSource(self.path)


def output(given: str, what: str) -> Output:
    """The place that `given` names. Raises ConfigError for what is none; `what` is the option, for messages."""
    if given.startswith("s3://"):
        store, name = store_of(given.rstrip("/"))
        if not name:
            raise ConfigError(f"{what} {given}: names a bucket; give s3://<bucket>/<name>")
        bucket, whole = split_uri(given)
        own = Store.from_env()
        inside = whole.removeprefix(f"{own.prefix}/") if own.prefix else whole
        if split_stored(whole) or (bucket == own.bucket and f"{inside}/".startswith(FOLDERS)):
            raise ConfigError(
                f"{what} {given}: is among what the factory stores ({', '.join(FOLDERS)}); name another place"
            )
        return Output(given, None, store, name)
    if "://" in given or given.startswith("models:"):
        raise ConfigError(f"{what} {given}: accepted are a path and s3://<bucket>/<name>")
    return Output(given, Path(given).expanduser())


def check_file(place: Output, inputs: Mapping[str, str]) -> None:
    """Raise ConfigError unless a merged adapter may be written there. Reads the header of what is there."""
    if place.path is not None and place.path.is_dir():
        raise ConfigError(f"--out {place.given}: is a folder; name a file in it")
    check_apart(place, inputs, "--out")
    if place.size() is not None and recorded(place) is None:
        raise ConfigError(
            f"--out {place.given}: holds something else than a merge by hand; remove it, or name another file"
        )
    check_writable(place, "--out")


def check_mask(place: Output, inputs: Mapping[str, str], what: str) -> None:
    """Raise ConfigError unless a task mask may be written there. Reads the header of what is there."""
    check_apart(place, inputs, what)
    if place.path is not None and place.path.is_dir():
        raise ConfigError(f"{what} {place.given}: is a folder; name another --out")
    if place.size() is not None:
        try:
            MaskReader(place.source())
        except MergeError:
            raise ConfigError(
                f"{what} {place.given}: holds something else than a mask; remove it, or name another --out"
            ) from None


def check_buckets(places: Iterable[Output | None]) -> None:
    """Prove that the object stores of these outputs answer and can be written. Raises StoreError.

    Writes an object of a name of its own beside where the output will be, and removes it.
    """
    folders = {(p.store.bucket, p.store.endpoint, _folder_of(p.store, p.name)) for p in places if p and p.store}
    for bucket, endpoint, folder in sorted(folders, key=str):
        Store(bucket, endpoint, folder).check()


def _folder_of(store: Store, name: str) -> str:
    return split_uri(store.uri(name))[1].rpartition("/")[0]


def prepare(place: Output, what: str) -> None:
    """Prove by writing that a file or folder can be written, its parent folders made; for objects `check_buckets` did.

    Raises ConfigError.
    """
    if place.path is None:
        return
    try:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.path.parent):
            pass
    except OSError as error:
        raise _unwritable(place, what, error.strerror or str(error)) from error


# -- records --


def record(candidate: Mapping[str, Any], base_sha256: str, experts: Sequence[Expert], **more: Any) -> dict[str, Any]:
    """Everything that a merge's bytes are a function of, as plain JSON."""
    return {
        "base_sha256": base_sha256,
        **candidate,
        "experts": {expert.name: expert.sha256 for expert in experts},
        **more,
    }


def recipe_key(of: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a record."""
    return hashlib.sha256(canonical_json(of)).hexdigest()


def recorded(place: Output) -> dict[str, Any] | None:
    """The record of the merged adapter that lies there; None where nothing or something else does."""
    if place.size() is None:
        return None
    try:
        info = AdapterReader(place.source()).meta.info
    except AdapterError:
        return None
    found = info.get(RECORD_FIELD)
    return found if isinstance(found, dict) else None


# -- checks --


def check_apart(place: Output, inputs: Mapping[str, str], what: str) -> None:
    """An output is no input, lies inside none, and has none inside."""
    for name, uri in inputs.items():
        if place.uri == uri or place.uri.startswith(f"{uri}/") or uri.startswith(f"{place.uri}/"):
            same = "is" if place.uri == uri else "overlaps"
            raise ConfigError(f"{what} {place.given}: {same} the input {name} ({uri}); name another place")


def check_writable(place: Output, what: str) -> None:
    """Raise ConfigError where a file or folder cannot be written, as far as that shows without writing."""
    if place.path is None:
        return
    there = place.path if place.path.is_dir() else place.path.parent
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise _unwritable(place, what, f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(place, what, f"no permission to write in {there}")


def _unwritable(place: Output, what: str, why: str) -> ConfigError:
    return ConfigError(f"{what} {place.given}: cannot be written ({why}); name another place")
