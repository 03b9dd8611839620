"""Where a merge by hand writes: files and folders, on disk or in S3, checked before the work and recognised after it.

What is written says which merge it is: an adapter in its own information (`merge`), a checkpoint in `merge.json`
beside it. An output that holds exactly the wanted merge is left alone; one that holds something else than a merge is
never replaced. Not here: the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.artifacts import canonical_json
from infra.errors import AdapterError, ConfigError
from infra.store import Store, StoreSource
from pipeline.merge_inputs import Expert
from pipeline.merge_sources import store_of
from workers.adapter import AdapterReader, ByteSource, FileSource

RECORD_FIELD = "merge"
"""Field of a merged adapter's information that holds the record."""

RECORD_FILE = "merge.json"
"""File beside a checkpoint that holds its record and the sizes of its files."""


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
    _check_writable(place, "--out")


def check_folder(place: Output, inputs: Mapping[str, str], what: str) -> None:
    """Raise ConfigError unless a checkpoint may be written there."""
    check_apart(place, inputs, what)
    if place.path is not None and place.path.exists() and not place.path.is_dir():
        raise ConfigError(f"{what} {place.given}: is a file; name a folder")
    if strange := sorted(_names_in(place) - _recorded_names(place)):
        raise ConfigError(
            f"{what} {place.given}: holds {strange[0]!r}, which is no part of a merge; empty it, or name another folder"
        )
    _check_writable(place, what)


def prepare(place: Output, what: str) -> None:
    """Prove by writing that the place can be written, its parent folders made. Raises ConfigError or StoreError."""
    if place.store is not None:
        probe = f"{place.name}.probe"
        place.store.put(probe, b"")
        place.store.delete(probe)
        return
    assert place.path is not None
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
    """The record of the merged adapter that lies there ({} without one); None where nothing or something else does."""
    if place.size() is None:
        return None
    try:
        info = AdapterReader(place.source()).meta.info
    except AdapterError:
        return None
    found = info.get(RECORD_FIELD, {})
    return found if isinstance(found, dict) and "method" in info and "experts" in info else None


def recorded_checkpoint(place: Output) -> dict[str, Any] | None:
    """The record of the checkpoint that lies there, if its files are complete; {} if they are not."""
    file = _in_folder(place, RECORD_FILE)
    if file.size() is None:
        return None
    source = file.source()
    try:
        content = json.loads(source.read(0, source.size))
        files, found = content["files"], content[RECORD_FIELD]
        complete = all(_in_folder(place, str(name)).size() == size for name, size in files.items())
        return dict(found) if complete else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def write_checkpoint_record(place: Output, of: Mapping[str, Any], files: Mapping[str, int]) -> None:
    """Written last: a checkpoint with a record is complete."""
    text = json.dumps({RECORD_FIELD: of, "files": dict(files)}, indent=1, sort_keys=True).encode()
    target = _in_folder(place, RECORD_FILE)
    if target.store is not None:
        target.store.put(target.name, text)
    else:
        assert target.path is not None
        target.path.write_bytes(text)


def clear_checkpoint(place: Output) -> None:
    """Remove an older checkpoint: the files that its record names."""
    for name in sorted(_recorded_names(place)):
        file = _in_folder(place, name)
        if file.store is not None:
            file.store.delete(file.name)
        else:
            assert file.path is not None
            file.path.unlink(missing_ok=True)


def _recorded_names(place: Output) -> set[str]:
    """Names of the files of the checkpoint there, its record included; none where there is no record."""
    file = _in_folder(place, RECORD_FILE)
    if file.size() is None:
        return set()
    source = file.source()
    try:
        names = json.loads(source.read(0, source.size))["files"]
        return {RECORD_FILE, *(name for name in names if Path(name).name == name)}
    except (ValueError, KeyError, TypeError):
        return set()


def _names_in(place: Output) -> set[str]:
    if place.store is not None:
        return {name.removeprefix(f"{place.name}/") for name in place.store.list(f"{place.name}/")}
    assert place.path is not None
    return {entry.name for entry in place.path.iterdir()} if place.path.is_dir() else set()


# -- checks --


def _in_folder(place: Output, name: str) -> Output:
    if place.store is not None:
        return Output(f"{place.given}/{name}", None, place.store, f"{place.name}/{name}")
    assert place.path is not None
    return Output(f"{place.given}/{name}", place.path / name)


def check_apart(place: Output, inputs: Mapping[str, str], what: str) -> None:
    """An output is no input, lies inside none, and has none inside."""
    for name, uri in inputs.items():
        if place.uri == uri or place.uri.startswith(f"{uri}/") or uri.startswith(f"{place.uri}/"):
            same = "is" if place.uri == uri else "overlaps"
            raise ConfigError(f"{what} {place.given}: {same} the input {name} ({uri}); name another place")


def _check_writable(place: Output, what: str) -> None:
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
