"""Full checkpoints as outputs of a merge by hand: written beside or unseen first, and recognised afterwards.

Beside a checkpoint lies `merge.json`, written last: which merge it is, and its files with their sizes. Only files that
such a record names, of the size that it names, are ever replaced or removed. In S3 `merge.partial.json` does the same
for a checkpoint that is being put in place, so that a run which was killed meanwhile can be repeated.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from infra.errors import ConfigError, MergeError, StoreError
from infra.store.s3 import Store
from infra.store.writer import StoreWriter
from merge.by_hand.outputs import RECORD_FIELD, Output, check_apart, check_writable
from merge.by_hand.sources import names_in
from merge.files.checkpoint_writer import FolderTarget, Target

RECORD_FILE, PARTIAL_FILE = "merge.json", "merge.partial.json"


def check_folder(place: Output, inputs: Mapping[str, str], what: str) -> None:
    """Raise ConfigError unless a checkpoint may be written there: in an empty place, or over one of ours."""
    check_apart(place, inputs, what)
    if place.path is not None and place.path.exists() and not place.path.is_dir():
        raise ConfigError(f"{what} {place.given}: is a file; name a folder")
    if strange := _strange(place):
        raise ConfigError(f"{what} {place.given}: {strange}; empty it, or name another folder")
    check_writable(place, what)


def recorded_checkpoint(place: Output) -> dict[str, Any] | None:
    """The record of the checkpoint that lies there, if its files are complete; {} if they are not."""
    found = _read_record(place, RECORD_FILE)
    if found is None:
        return None
    record, files = found
    complete = all(place.inside(name).size() in sizes for name, sizes in files.items())
    return record if complete else {}


class CheckpointPlace(Target, Protocol):
    """Where a checkpoint's files go. `publish` ends it, `discard` gives up; one of them must be called."""

    def publish(self, of: Mapping[str, Any], files: Mapping[str, int]) -> None:
        """Write down what the checkpoint is and put it in its place, an older one removed. `files`: bytes by name."""

    def discard(self) -> None:
        """Leave nothing behind; harmless after `publish`."""


def checkpoint_place(place: Output) -> CheckpointPlace:
    """For writing a checkpoint there; what is there stays until the new one is complete."""
    if place.store is not None:
        return _StorePlace(place, place.store)
    return _FolderPlace(place)


class _FolderPlace(FolderTarget):
    """A folder beside the final one, of a name that is only this run's."""

    def __init__(self, place: Output) -> None:
        assert place.path is not None
        self._place, self._path = place, place.path.resolve()
        super().__init__(self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.merging"))

    def publish(self, of: Mapping[str, Any], files: Mapping[str, int]) -> None:
        _check_still_ours(self._place)
        (self.folder / RECORD_FILE).write_bytes(_record_text(of, {name: [size] for name, size in files.items()}))
        for name in _own_files(self._place):
            (self._path / name).unlink(missing_ok=True)
        self.folder.replace(self._path)  # the empty folder there is replaced

    def discard(self) -> None:
        self.abort()
        shutil.rmtree(self.folder, ignore_errors=True)


class _StorePlace:
    """Objects below a prefix. All of their bytes are in the store before the first one appears or replaces another."""

    def __init__(self, place: Output, store: Store) -> None:
        self._place, self._store = place, store
        self._writers: dict[str, StoreWriter] = {}
        self._visible: list[str] = []
        self._older: dict[str, int] = {}

    def open(self, name: str) -> StoreWriter:
        writer = self._store.open_write(self._place.inside(name).name)
        self._writers[name] = writer
        return writer

    def finish(self, name: str) -> None:
        self._writers[name].seal()

    def commit(self) -> None:
        _check_still_ours(self._place)
        new = {name: writer.size for name, writer in self._writers.items()}
        self._older = _own_files(self._place)
        planned: dict[str, list[int]] = {name: [size] for name, size in new.items()}
        for name, size in self._older.items():
            if name not in (RECORD_FILE, PARTIAL_FILE):
                planned.setdefault(name, []).append(size)
        self._store.put(self._place.inside(PARTIAL_FILE).name, _record_text({}, planned))
        self._visible.append(PARTIAL_FILE)
        self._delete(RECORD_FILE)
        for name, writer in self._writers.items():
            self._visible.insert(0, name)
            writer.close()
        for name in set(self._older) - set(new) - {RECORD_FILE, PARTIAL_FILE}:
            self._delete(name)
        self._older = {}

    def publish(self, of: Mapping[str, Any], files: Mapping[str, int]) -> None:
        text = _record_text(of, {name: [size] for name, size in files.items()})
        self._store.put(self._place.inside(RECORD_FILE).name, text)
        self._writers.clear()
        self._visible.clear()
        self._delete(PARTIAL_FILE)

    def abort(self) -> None:
        """What is left of an older checkpoint stays recognised, by the partial record."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()
        left = set(self._older) - {RECORD_FILE, PARTIAL_FILE}
        with contextlib.suppress(StoreError):
            for name in self._visible:
                if name != PARTIAL_FILE or not left:
                    self._delete(name)
        self._visible.clear()

    discard = abort

    def _delete(self, name: str) -> None:
        self._store.delete(self._place.inside(name).name)


# -- records --


def _record_text(of: Mapping[str, Any], files: Mapping[str, list[int]]) -> bytes:
    sizes = {name: found[0] if len(found) == 1 else found for name, found in files.items()}
    return json.dumps({RECORD_FIELD: dict(of), "files": sizes}, indent=1, sort_keys=True).encode()


def _read_record(place: Output, name: str) -> tuple[dict[str, Any], dict[str, list[int]]] | None:
    """A record and the sizes that each file may have; None where there is no record, or something else."""
    file = place.inside(name)
    if file.size() is None:
        return None
    source = file.source()
    try:
        content = json.loads(source.read(0, source.size))
        record, files = content[RECORD_FIELD], content["files"]
        sizes = {name: found if isinstance(found, list) else [found] for name, found in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    plain = all(name not in ("", ".", "..") and not set("/\\\0") & set(name) for name in sizes)
    whole = all(type(size) is int for found in sizes.values() for size in found)
    return (record, sizes) if isinstance(record, dict) and plain and whole else None


def _strange(place: Output) -> str:
    """What is wrong with a place that holds something else than a merge, "" for nothing."""
    strange = sorted(names_in(place.path, place.store, place.name) - set(_own_files(place)))
    return f"holds {strange[0]!r}, which is no part of a merge" if strange else ""


def _check_still_ours(place: Output) -> None:
    """What was checked before the merge, again before anything there is replaced."""
    if strange := _strange(place):
        raise MergeError(f"{place.given}: {strange}; it was changed meanwhile")


def _own_files(place: Output) -> dict[str, int]:
    """Files there that belong to a merge, the records themselves included, with their sizes."""
    own: dict[str, int] = {}
    for record in (RECORD_FILE, PARTIAL_FILE):
        found = _read_record(place, record)
        if found is None:
            continue
        own[record] = place.inside(record).size() or 0
        for name, sizes in found[1].items():
            size = place.inside(name).size()
            if size is not None and size in sizes:
                own[name] = size
    return own
