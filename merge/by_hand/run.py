"""Merges that were checked (`merge.by_hand.checks`), made: flat on this machine, or as a stored tree.

`merge_flat` streams every expert once per round into the outputs. `merge_in_store` keeps every node in the object
store, so that a later merge recomputes only what changed. Both leave the same files.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.digests import file_sha256
from infra.errors import MergeError, StoreError
from infra.store.layout import base_file, manifest_name
from infra.store.s3 import Store
from merge.by_hand.checkpoints import CheckpointPlace, checkpoint_place, recorded_checkpoint
from merge.by_hand.checks import Checked, checkpoint_record_of, mask_outputs, record_of, torch_dtype
from merge.by_hand.inputs import Expert, MeasuredFile, adapter_source, open_checkpoint, source_sha256
from merge.by_hand.outputs import RECORD_FIELD, Output, recipe_key, recorded
from merge.by_hand.request import shard_bytes
from merge.files.checkpoint import BaseCheckpoint
from merge.files.checkpoint_writer import CheckpointInfo, CheckpointWriter, write_checkpoint
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.files.sink import Outline, Sink, Tee
from merge.files.task_mask import MaskWriter, write_task_mask
from merge.methods.catalogue import METHODS
from merge.methods.spectral import merge_device
from merge.tree.jobs import Ref
from merge.tree.local import merge_stored
from merge.tree.reduce import ROOT_VERSIONS, DeltaReader, ExpertChild, flat_merge
from merge.tree.reduction import NODES
from merge.tree.trie import DEFAULT_FAN_IN, build_tree, leaf_names
from workers.adapters.task_mask import MaskReader
from workers.base.layout import read_layout
from workers.base.prepare import PreparedBase, upload_base
from workers.conversion.formats import from_peft
from workers.tensors.checkpoint import WEIGHTS
from workers.tensors.source import ByteSource, FileSource

_WORKERS = 4
"""Most nodes of a stored tree that are made at once: each holds one tensor's statistics of its children."""

Report = Callable[[str, int, int], None]
"""Called with what is being done, how many steps of it are done, and how many there are."""


@dataclass(frozen=True)
class Done:
    """A finished merge. `density` of the union of the supports, `norm` ‖δ‖, `rounding_loss` as a bf16 model loses it.

    `files`: every file written, with its bytes. `nodes`: combines of a stored tree that were made and reused.
    """

    density: float
    norm: float
    rounding_loss: float | None
    files: Mapping[str, int]
    checkpoint: CheckpointInfo | None = None
    nodes: tuple[int, int] | None = None


def up_to_date(checked: Checked) -> bool:
    """Whether every output holds exactly this merge already. Reads headers, and the unified adapter of task masks."""
    if checked.out and recorded(checked.out) != record_of(checked):
        return False
    if checked.out and METHODS[checked.candidate.method].per_task and not _masks_fit(checked, checked.out):
        return False
    return not checked.checkpoint or recorded_checkpoint(checked.checkpoint) == checkpoint_record_of(checked)


def _masks_fit(checked: Checked, out: Output) -> bool:
    unified = source_sha256(out.source())
    for mask in mask_outputs(checked).values():
        if mask.size() is None:
            return False
        try:
            if MaskReader(mask.source()).meta.unified_sha256 != unified:
                return False
        except MergeError:
            return False
    return True


def merge_flat(checked: Checked, scratch: Path, report: Report | None = None) -> Done:
    """Merge on this machine, without a tree. `scratch`: an existing folder for what is fetched and earlier rounds.

    Raises FactoryError; outputs exist complete or not at all.
    """
    inputs = Inputs(checked.base, scratch)
    children = [ExpertChild(e.name, inputs.reader(e), _source(checked.measured.get(e.name))) for e in checked.experts]
    base, candidate = FileSource(checked.base.path / WEIGHTS), checked.candidate
    with _outputs(checked, scratch) as outputs:
        sinks: list[Sink] = []
        if outputs.checkpoint:  # first: it is closed before the adapter
            sinks.append(_checkpoint_writer(checked, inputs, outputs.checkpoint))
        if checked.out:
            sinks.append(AdapterWriter(outputs.adapter, _about(checked)))
        sink = sinks[0] if len(sinks) == 1 else Tee(sinks)
        info = flat_merge(
            children,
            [candidate],
            lambda _: sink,
            checked.base.sha256,
            base,
            scratch,
            report,
            checked.fused,
            merge_device(),
        )[candidate]
        written = next((sink.info for sink in sinks if isinstance(sink, CheckpointWriter)), None)
        files = outputs.publish(written)
        if checked.out and METHODS[candidate.method].per_task:
            files |= _write_masks(checked, outputs, children, scratch)
        files |= outputs.deliver()
    return Done(info.density, info.norm, info.rounding_loss, files, written)


def merge_in_store(checked: Checked, scratch: Path, report: Report | None = None) -> Done:
    """Merge as a tree whose nodes stay in the object store. Raises FactoryError."""
    store = Store.from_env()
    upload_base(store, checked.base)
    inputs = Inputs(checked.base, scratch)
    experts = {expert.name: _stored_expert(store, expert, inputs) for expert in checked.experts}
    kind = checked.measurement
    measured = {
        (name, str(kind)): _stored_measured(store, file, str(kind), scratch) for name, file in checked.measured.items()
    }
    made = merge_stored(
        store,
        [checked.candidate],
        experts,
        DEFAULT_FAN_IN,
        checked.base.sha256,
        base_file(checked.base.sha256, WEIGHTS),
        measured,
        checked.fused,
        min(_WORKERS, len(os.sched_getaffinity(0))),
        tell=report or (lambda name, done, nodes: None),
    )
    manifest = made.merged[checked.candidate]
    file = store.download_file(manifest.files["adapter"], scratch / "merged.safetensors")
    merged = AdapterDelta(FileSource(file), "the merge")
    written = None
    with _outputs(checked, scratch) as outputs:
        if outputs.checkpoint:
            dtype, limit = torch_dtype(checked.request.dtype), shard_bytes(checked.request.shard_gib)
            written = write_checkpoint(merged, inputs.checkpoint, outputs.checkpoint, dtype, limit)
        if checked.out:
            _copy_delta(merged, AdapterWriter(outputs.adapter, _about_tree(checked)))
        files = outputs.publish(written)
        for name, mask in mask_outputs(checked).items():
            (ref,) = made.masks[checked.candidate, name].files.values()
            stored, copied = store.download_file(ref, scratch / "stored.mask"), scratch / "mask.safetensors"
            _copy_task_mask(stored, copied, file_sha256(outputs.adapter), name)
            files |= _deliver(copied, mask)
        files |= outputs.deliver()
    meta, tally = manifest.meta, made.tally
    nodes = tally.made[NODES], tally.reused[NODES]
    return Done(meta["density"], meta["delta_norm"], meta["rounding_loss_bfloat16"], files, written, nodes)


# -- inputs --


class Inputs:
    """Makes experts readable: fetches what lies elsewhere, converts PEFT adapters, subtracts the base."""

    def __init__(self, base: PreparedBase, scratch: Path) -> None:
        """`scratch`: an existing folder for what is fetched or converted."""
        self.scratch = scratch
        self.checkpoint = BaseCheckpoint.in_folder(base.path, base.sha256)
        self._base = base

    def reader(self, expert: Expert) -> DeltaReader:
        """The expert's δ, tensor by tensor."""
        if expert.place.kind == "checkpoint":
            return open_checkpoint(expert.name, expert.place, self.checkpoint, expert.identity)
        return AdapterDelta(FileSource(self.file(expert)), expert.name, expert.identity)

    def file(self, expert: Expert) -> Path:
        """The expert as an adapter file."""
        target = self.scratch / f"expert-{expert.sha256}.safetensors"
        if target.exists():
            return target
        place = expert.place
        if place.kind == "peft":
            assert place.path is not None
            from_peft(place.path, read_layout(self._base), target)
        elif place.kind == "checkpoint":
            _copy_delta(self.reader(expert), AdapterWriter(target))
        elif place.store is not None:
            place.store.download_file(place.name, target, expert.sha256)
        else:
            assert place.path is not None
            return place.path
        return target


def _copy_delta(reader: DeltaReader, writer: AdapterWriter) -> None:
    """A δ into an adapter file, tensor by tensor."""
    try:
        writer.open(Outline(reader.base_sha256, {name: reader.shape(name) for name in reader.names}, {}))
        for name in reader.names:
            writer.add(name, reader.load(name))
        writer.close()
    except BaseException:
        writer.abort()
        raise


def _stored_expert(store: Store, expert: Expert, inputs: Inputs) -> Ref:
    """The expert as an artifact of this store, uploaded unless it is there.

    Its key names its bytes. The key that its file carries counts only where this store has the same file under it:
    then the nodes of the pipeline that made it are found.
    """
    if expert.recipe:
        own = _find_any(store, expert.recipe)
        if own is not None and [ref.sha256 for ref in own.files.values()] == [expert.sha256]:
            return Ref.of(own)
    given, place = expert.given_recipe, expert.place
    if place.manifest is not None and place.store is not None and place.store.uri("") == store.uri(""):
        return replace(Ref.of(place.manifest), key=given.key, identity=expert.identity)

    def files() -> dict[str, Path]:
        return {"adapter": inputs.file(expert)}

    return replace(Ref.of(_given(store, given, files, inputs.scratch)), identity=expert.identity)


def _find_any(store: Store, key: str) -> Manifest | None:
    """The usable artifact of a key, whatever it was made from."""
    found = store.get_with_etag(manifest_name(key))
    if found is None:
        return None
    try:
        return find(store, key, Manifest.from_json(found[0]).inputs)
    except StoreError:
        return None


def _stored_measured(store: Store, file: MeasuredFile, kind: str, scratch: Path) -> Ref:
    """A measurement's file as an artifact of this store."""
    place = file.place
    if place.manifest is not None and place.store is not None and place.store.uri("") == store.uri(""):
        return Ref.of(place.manifest)

    def files() -> dict[str, Path]:
        if place.path is not None:
            return {kind: place.path}
        assert place.store is not None
        return {kind: place.store.download_file(place.name, scratch / f"{kind}-{file.sha256}", file.sha256)}

    return Ref.of(_given(store, Recipe(f"given_{kind}", 1, {"sha256": file.sha256}), files, scratch))


def _given(store: Store, recipe: Recipe, make: Callable[[], Mapping[str, Path]], scratch: Path) -> Manifest:
    """Files that somebody gave, under a key that names their bytes. They are made only where they are not there, and
    what was made in `scratch` goes again: the store has it."""
    found = find(store, recipe.key, {})
    if found is not None:
        return found
    files = make()
    try:
        return publish(store, recipe, files, {}, {})[0]
    finally:
        for file in files.values():
            if file.parent == scratch:
                file.unlink()


def _source(file: MeasuredFile | None) -> ByteSource | None:
    return adapter_source(file.place) if file else None


# -- outputs --


class _Outputs:
    """The adapter and the checkpoint of one merge: both are complete before either appears, the adapter last."""

    def __init__(self, checked: Checked, scratch: Path) -> None:
        self._checked = checked
        out, place = checked.out, checked.checkpoint
        self.checkpoint = checkpoint_place(place) if place else None
        self.adapter = scratch / "out.safetensors"
        """Where the adapter's file is made: where it can be renamed, if it stays on this machine."""
        if out and out.path:
            self.adapter = _beside(out.path)

    def publish(self, info: CheckpointInfo | None) -> dict[str, int]:
        """Put the checkpoint in its place; returns its files' bytes by place."""
        if self.checkpoint is None or self._checked.checkpoint is None or info is None:
            return {}
        return publish_checkpoint(self.checkpoint, self._checked.checkpoint, checkpoint_record_of(self._checked), info)

    def deliver(self) -> dict[str, int]:
        """Put the adapter in its place; returns the place and the file's bytes."""
        out = self._checked.out
        if out is None:
            return {}
        if out.path is None:
            return _deliver(self.adapter, out)
        size = self.adapter.stat().st_size
        self.adapter.replace(out.path)
        return {out.given: size}


@contextmanager
def _outputs(checked: Checked, scratch: Path) -> Iterator[_Outputs]:
    outputs = _Outputs(checked, scratch)
    try:
        yield outputs
    finally:
        outputs.adapter.unlink(missing_ok=True)
        if outputs.checkpoint:
            outputs.checkpoint.discard()


def publish_checkpoint(
    target: CheckpointPlace, place: Output, of: Mapping[str, Any], info: CheckpointInfo
) -> dict[str, int]:
    """A finished checkpoint appears in its place; returns its files' bytes by place."""
    target.publish(of, info.files)
    return {f"{place.given.rstrip('/')}/{name}": size for name, size in info.files.items()}


def _about(checked: Checked) -> dict[str, Any]:
    """What a merged adapter says about itself beside its method and experts."""
    record = record_of(checked)
    return {RECORD_FIELD: record, "recipe": recipe_key(record)}


def _about_tree(checked: Checked) -> dict[str, Any]:
    """The same with what a flat merge's writer adds: a stored merge may have been made under other names."""
    names = leaf_names(build_tree([expert.name for expert in checked.experts], DEFAULT_FAN_IN))
    return {**checked.candidate.to_dict(), "experts": names, "versions": ROOT_VERSIONS, **_about(checked)}


def _checkpoint_writer(checked: Checked, inputs: Inputs, target: CheckpointPlace) -> CheckpointWriter:
    dtype, limit = torch_dtype(checked.request.dtype), shard_bytes(checked.request.shard_gib)
    return CheckpointWriter(inputs.checkpoint, target, dtype, limit)


def _beside(path: Path) -> Path:
    """A hidden file of this run's own in the same folder."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def _deliver(file: Path, out: Output) -> dict[str, int]:
    """Copy a finished file to its place; returns the place and the file's bytes."""
    size = file.stat().st_size
    if out.store is not None:
        out.store.upload_file(out.name, file)
    else:
        assert out.path is not None
        part = _beside(out.path)
        try:
            shutil.copyfile(file, part)
            part.replace(out.path)
        finally:
            part.unlink(missing_ok=True)
    return {out.given: size}


def _write_masks(checked: Checked, outputs: _Outputs, children: Sequence[ExpertChild], scratch: Path) -> dict[str, int]:
    """Each task's mask over the unified adapter."""
    unified, sha256 = AdapterDelta(FileSource(outputs.adapter), "the merge"), file_sha256(outputs.adapter)
    files: dict[str, int] = {}
    masks = mask_outputs(checked)
    for child in children:
        made = scratch / "mask.safetensors"
        write_task_mask(made, checked.candidate, unified, child.reader, sha256, child.name)
        files |= _deliver(made, masks[child.name])
    return files


def _copy_task_mask(stored: Path, made: Path, unified_sha256: str, task: str) -> None:
    """A stored tree's mask over the unified adapter's delivered file, whose information and so digest are others."""
    reader = MaskReader(FileSource(stored))
    meta = replace(reader.meta, unified_sha256=unified_sha256, task=task)
    with MaskWriter(made, meta, {name: reader.positions(name) for name in reader.names}) as writer:
        for name in reader.names:
            writer.add(name, reader.load(name))
        writer.close(reader.scale)
