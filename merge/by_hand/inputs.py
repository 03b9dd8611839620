"""The experts of a merge by hand: whether they fit the base and each other, from headers alone.

`locate_experts` and `find_experts` check names, shapes, bases and duplicates without reading a tensor, `hash_experts`
reads their bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from infra.artifacts.manifests import Recipe
from infra.digests import file_sha256
from infra.errors import AdapterError, BaseModelError, ConfigError, MergeError, RegistryError
from infra.store.source import StoreSource
from merge.by_hand.sources import Place, locate, names_in
from merge.files.checkpoint import BaseCheckpoint, CheckpointDelta
from workers.adapters.writer import AdapterReader
from workers.base.layout import BaseLayout, read_layout, read_shapes
from workers.base.prepare import PreparedBase
from workers.conversion.companions import COMPANIONS, Read, compare_companions, in_folder, leftovers
from workers.conversion.formats import peft_notices, unchanged_notices
from workers.conversion.peft import PEFT_CONFIG, PEFT_TENSORS, peft_outline
from workers.measuring.catalogue import MEASUREMENTS
from workers.tensors.checkpoint import CheckpointFiles, weight_files
from workers.tensors.quantised import read_settings, refuse_quantised, settings_of
from workers.tensors.source import ByteSource, FileSource

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Expert:
    """An expert whose header was read: shapes and stored positions of the tensors that it changes.

    `head` names the tensors of a classification head, which no merge keeps. `sha256` is that of its files, "" before
    `hash_experts`; `recipe` the key that a trained adapter has in its information.
    """

    name: str
    place: Place
    shapes: Mapping[str, tuple[int, ...]]
    counts: Mapping[str, int]
    head: tuple[str, ...] = ()
    sha256: str = ""
    recipe: str = ""
    base_sha256: str = ""
    notices: tuple[str, ...] = ()
    """What of it a merge ignores, one line each."""

    @property
    def identity(self) -> str:
        """Seeds random choices, the same flat and stored: the recipe key that its file carries, else that of its bytes
        and base.

        It names no artifact: a file may carry any key (`given_recipe` names the bytes).
        """
        return self.recipe or self.given_recipe.key

    @property
    def given_recipe(self) -> Recipe:
        """Of the expert as an artifact that somebody gave."""
        return Recipe("given_expert", 1, {"base_sha256": self.base_sha256, "sha256": self.sha256})


def locate_experts(sources: Mapping[str, str]) -> dict[str, Place]:
    """Where the experts are, by sorted name; nothing of them is read.

    Raises ConfigError, RegistryError or StoreError for a source that is none, MergeError for one expert twice.
    """
    places = {name: _found(f"expert {name!r}", source) for name, source in sorted(sources.items())}
    owners: dict[str, str] = {}
    for name, place in places.items():
        if (other := owners.setdefault(place.uri, name)) != name:
            raise _twice(other, name, place.given)
    return places


def find_experts(
    places: Mapping[str, Place], base: PreparedBase, scratch: Path, names: Collection[str] = ()
) -> list[Expert]:
    """The experts by name, their headers read and checked against the base and each other.

    A PEFT adapter in S3 is copied to `scratch`. `names`: what the base is called, compared with what PEFT adapters say
    they were made for. Raises FactoryError naming the expert, or the base if that is quantised.
    """
    layout = _layout(base, any(place.kind == "peft" for place in places.values()))
    checkpoint = BaseCheckpoint.in_folder(base.path, base.sha256)
    refuse_quantised(f"base {base.name}", read_settings(base.path / "config.json"), checkpoint.weights)
    found = []
    for at, (name, place) in enumerate(places.items()):
        if place.kind == "checkpoint":
            found.append(_read_checkpoint(name, place, base, checkpoint))
        else:
            found.append(_read_header(name, place, layout, scratch / f"peft-{at}", names))
    return found


def _read_checkpoint(name: str, place: Place, base: PreparedBase, checkpoint: BaseCheckpoint) -> Expert:
    what, theirs = f"expert {name!r} ({place.given})", _companion(place)
    refuse_quantised(what, settings_of(theirs("config.json")))
    delta = open_checkpoint(name, place, checkpoint)
    notices = compare_companions(f"expert {name!r}", theirs, in_folder(base.path))
    notices += leftovers(f"expert {name!r}", names_in(place.path, place.store, place.name), checkpoint_files(place))
    shapes, counts = {n: delta.shape(n) for n in delta.names}, {n: delta.count(n) for n in delta.names}
    return Expert(name, place, shapes, counts, base_sha256=base.sha256, notices=notices)


def _companion(place: Place) -> Read:
    """Reads the small files beside an expert's weights."""
    if place.store is None:
        assert place.path is not None
        return in_folder(place.path)
    store, names = place.store, names_in(place.path, place.store, place.name)
    return functools.cache(lambda name: store.get(f"{place.name}/{name}") if name in names else None)


def hash_experts(experts: Sequence[Expert]) -> list[Expert]:
    """The experts with the SHA-256 of their files; of a checkpoint in S3 it is that of sizes and entity tags.

    Raises MergeError where two are the same bytes.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        hashed = [
            replace(expert, sha256=digest)
            for expert, digest in zip(experts, pool.map(lambda expert: _sha256(expert.place), experts), strict=True)
        ]
    owners: dict[str, str] = {}
    for expert in hashed:
        if (other := owners.setdefault(expert.sha256, expert.name)) != expert.name:
            raise _twice(other, expert.name, "the same bytes")
    return hashed


def hash_measured(files: Mapping[str, MeasuredFile], experts: Sequence[Expert]) -> dict[str, MeasuredFile]:
    """The files with their SHA-256. Raises MergeError for one that was measured with another adapter."""
    for expert in experts:
        file = files[expert.name]
        if expert.place.kind == "adapter" and file.adapter_sha256 != expert.sha256:
            raise MergeError(
                f"{file.place.given}: measured with the adapter {file.adapter_sha256[:12]}…, expert {expert.name!r} "
                f"is {expert.sha256[:12]}…; measure it again"
            )
    return {name: replace(file, sha256=_sha256(file.place)) for name, file in files.items()}


def checkpoint_files(place: Place) -> dict[str, ByteSource]:
    """The safetensors files of a checkpoint by file name. Raises TensorFileError where there is none or one is
    missing."""

    def source(name: str) -> ByteSource:
        if place.store is not None:
            return StoreSource(place.store, f"{place.name}/{name}")
        assert place.path is not None
        return FileSource(place.path / name)

    def read(name: str) -> bytes:
        file = source(name)
        return file.read(0, file.size)

    present = names_in(place.path, place.store, place.name)
    return {name: source(name) for name in weight_files(place.given, present, read)}


def adapter_source(place: Place) -> ByteSource:
    """An adapter file's bytes, where they are."""
    if place.store is not None:
        return StoreSource(place.store, place.name)
    assert place.path is not None
    return FileSource(place.path)


def _found(what: str, source: str) -> Place:
    try:
        return locate(source)
    except (BaseModelError, ConfigError, RegistryError) as error:
        raise type(error)(f"{what}: {error}") from None


def _twice(one: str, other: str, what: str) -> MergeError:
    return MergeError(
        f"experts {one!r} and {other!r} are the same one ({what}); name it once, and give it a larger weight where the "
        "method takes weights"
    )


def _layout(base: PreparedBase, linear: bool) -> BaseLayout:
    """Names and shapes of the base; which are linear layers' (seconds of imports) only where a PEFT adapter asks."""
    if linear:
        return read_layout(base)
    return BaseLayout(base.path, base.sha256, read_shapes(base.path), frozenset())


def _read_header(name: str, place: Place, base: BaseLayout, scratch: Path, names: Collection[str]) -> Expert:
    try:
        if place.kind == "peft":
            place = _fetch_peft(place, scratch)
            assert place.path is not None
            found, what = peft_outline(place.path, base), f"expert {name!r}"
            notices = [*peft_notices(place.path, what, base, names), *unchanged_notices(what, found.unchanged)]
            counts = {n: math.prod(s) for n, s in found.shapes.items()}
            return Expert(
                name, place, found.shapes, counts, found.head, base_sha256=base.sha256, notices=tuple(notices)
            )
        reader = AdapterReader(adapter_source(place))
    except AdapterError as error:
        raise AdapterError(f"expert {name!r}: {error}") from error
    if reader.meta.base_sha256 != base.sha256:
        raise MergeError(
            f"expert {name!r} ({place.given}) was made for base {reader.meta.base_sha256[:12]}…, the base of this "
            f"merge is {base.sha256[:12]}…; give its base with --base, or leave this expert out"
        )
    if reader.meta.kind == "support":
        raise MergeError(f"expert {name!r} ({place.given}) holds positions only, no values; it is no expert")
    if not reader.names:
        raise MergeError(f"expert {name!r} ({place.given}) changes no weight of the base")
    for tensor in reader.names:
        base.check_shape(tensor, reader.shape(tensor), f"expert {name!r} ({place.given})")
    shapes = {n: tuple(reader.shape(n)) for n in reader.names}
    recipe = reader.meta.info.get("recipe")
    return Expert(
        name,
        place,
        shapes,
        {n: reader.count(n) for n in reader.names},
        tuple(reader.head_names),
        recipe=recipe if isinstance(recipe, str) and re.fullmatch("[0-9a-f]{64}", recipe) else "",
        base_sha256=base.sha256,
    )


def open_checkpoint(name: str, place: Place, base: BaseCheckpoint, identity: str | None = None) -> CheckpointDelta:
    """A full checkpoint's δ. Raises TensorFileError for none, and BaseModelError for one that is not of this base."""
    what = f"expert {name!r} ({place.given})"
    files = CheckpointFiles(list(checkpoint_files(place).values()), what)
    refuse_quantised(what, {}, files)
    return CheckpointDelta(files, base, name, identity)


def _fetch_peft(place: Place, scratch: Path) -> Place:
    if place.store is None:
        return place
    for name in (PEFT_CONFIG, PEFT_TENSORS, *sorted(names_in(place.path, place.store, place.name) & set(COMPANIONS))):
        place.store.download_file(f"{place.name}/{name}", scratch / name)
    return replace(place, path=scratch)


def _sha256(place: Place) -> str:
    if place.kind == "checkpoint":
        if place.store is None:
            assert place.path is not None
            return _joint({name: file_sha256(place.path / name) for name in checkpoint_files(place)})
        infos = {name: place.store.head(f"{place.name}/{name}") for name in checkpoint_files(place)}
        return _joint({name: f"{info.size} {info.etag}" for name, info in infos.items() if info is not None})
    if place.kind == "peft":
        assert place.path is not None
        return _joint({name: file_sha256(place.path / name) for name in (PEFT_CONFIG, PEFT_TENSORS)})
    return place.sha256 or source_sha256(adapter_source(place))


def _joint(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def source_sha256(source: ByteSource) -> str:
    """Hex SHA-256 of a file or object."""
    digest = hashlib.sha256()
    for start in range(0, source.size, _CHUNK):
        digest.update(source.read(start, min(_CHUNK, source.size - start)))
    return digest.hexdigest()


# -- measurements --


@dataclass(frozen=True)
class MeasuredFile:
    """The file of an expert's measurement."""

    place: Place
    adapter_sha256: str
    sha256: str = ""


def locate_measured(given: Mapping[str, str], kind: str) -> dict[str, Place]:
    """Where each expert's file is. `kind`: the measurement's name. Raises ConfigError, RegistryError or StoreError."""
    places = {name: _found(f"{kind} of expert {name!r}", source) for name, source in given.items()}
    for name, place in places.items():
        if place.kind != "adapter":
            raise ConfigError(f"{kind} of expert {name!r}: {place.given}: is no file")
    return places


def find_measured(
    places: Mapping[str, Place], kind: str, experts: Sequence[Expert], base_sha256: str
) -> dict[str, MeasuredFile]:
    """The file of each expert, its header checked.

    Raises AdapterError or MergeError naming the expert: another base, another adapter's file, or one that does not fit
    its tensors.
    """
    return {expert.name: _find_measured(places[expert.name], kind, expert, base_sha256) for expert in experts}


def _find_measured(place: Place, kind: str, expert: Expert, base_sha256: str) -> MeasuredFile:
    where = f"{kind} file {place.given} of expert {expert.name!r}"
    try:
        reader = MEASUREMENTS[kind].open(adapter_source(place))
    except AdapterError as error:
        raise AdapterError(f"{kind} of expert {expert.name!r}: {error}") from None
    if reader.meta.base_sha256 != base_sha256:
        raise MergeError(f"{where}: measured on base {reader.meta.base_sha256[:12]}…, this is {base_sha256[:12]}…")
    for name, shape in expert.shapes.items():
        if wrong := reader.misfit(name, shape, expert.counts[name]):
            raise MergeError(f"{where}: {wrong}")
    return MeasuredFile(place, reader.meta.adapter_sha256)
