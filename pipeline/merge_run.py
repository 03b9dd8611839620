"""Merges that were checked (`pipeline.merge_by_hand`), made: flat on this machine, or as a stored tree.

`merge_flat` streams every expert once per round into the outputs. `merge_stored` keeps every node in the object store,
so that a later merge recomputes only what changed. Both leave the same files. Not here: the checks, what is printed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infra.artifacts import Manifest, Recipe, find, publish
from infra.digests import file_sha256
from infra.errors import MergeError
from infra.store import Store
from infra.store_writer import StoreTarget
from merge.adapter_file import AdapterDelta, AdapterWriter
from merge.checkpoint_file import (
    BaseCheckpoint,
    CheckpointInfo,
    CheckpointWriter,
    FolderTarget,
    write_checkpoint,
)
from merge.jobs import Job, Ref, job_name
from merge.local import run_threads
from merge.mask_file import MaskReader, write_task_mask
from merge.methods import METHODS
from merge.reduce import DeltaReader, ExpertChild, flat_merge
from merge.schedule import MergeSchedule
from merge.sink import Outline, Sink, Tee
from merge.stream_file import LocalFile
from pipeline.config import MergeConfig
from pipeline.merge_by_hand import Checked, checkpoint_record_of, mask_outputs, record_of, shard_bytes
from pipeline.merge_inputs import Expert, Extra, adapter_source, open_checkpoint, source_sha256
from pipeline.merge_outputs import (
    RECORD_FIELD,
    Output,
    clear_checkpoint,
    recipe_key,
    recorded,
    recorded_checkpoint,
    write_checkpoint_record,
)
from workers.adapter import ByteSource
from workers.base import PreparedBase, upload_base
from workers.convert import from_peft
from workers.layout import read_layout
from workers.tensorfile import WEIGHTS

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
    children = [
        ExpertChild(e.name, inputs.reader(e), _extra_source(checked.extras.get(e.name))) for e in checked.experts
    ]
    file = scratch / "merged.safetensors"
    if checked.out and checked.out.path:
        file = checked.out.path
    record = record_of(checked)
    sinks: list[Sink] = []
    writer = None
    if checked.out:
        sinks.append(AdapterWriter(file, {RECORD_FIELD: record, "recipe": recipe_key(record)}))
    if checked.checkpoint:
        dtype, target = torch_dtype(checked.request.dtype), checkpoint_target(checked.checkpoint)
        writer = CheckpointWriter(inputs.checkpoint, target, dtype, shard_bytes(checked.request))
        sinks.append(writer)
    info = flat_merge(
        children,
        [checked.candidate],
        lambda _: sinks[0] if len(sinks) == 1 else Tee(sinks),
        checked.base.sha256,
        LocalFile(checked.base.path / WEIGHTS),
        scratch,
        report,
    )[checked.candidate]
    files: dict[str, int] = {}
    if checked.out:
        files |= _deliver(file, checked.out)
        if METHODS[checked.candidate.method].per_task:
            files |= _write_masks(checked, file, children, scratch)
    if writer and checked.checkpoint:
        files |= finish_checkpoint(checked.checkpoint, checkpoint_record_of(checked), writer.info)
    return Done(info.density, info.norm, info.rounding_loss, files, writer.info if writer else None)


def merge_stored(checked: Checked, scratch: Path, report: Report | None = None) -> Done:
    """Merge as a tree whose nodes stay in the object store. Raises FactoryError."""
    store = Store.from_env()
    upload_base(store, checked.base)
    inputs = Inputs(checked.base, scratch)
    schedule = MergeSchedule(
        store,
        checked.reductions,
        [expert.name for expert in checked.experts],
        MergeConfig.model_fields["fan_in"].default,
        checked.base.sha256,
        f"bases/{checked.base.sha256}/{WEIGHTS}",
    )
    experts = {expert.name: _stored_expert(store, expert, inputs) for expert in checked.experts}
    kind = checked.extra_kind
    extras = {
        (name, str(kind)): _stored_extra(store, extra, str(kind), scratch) for name, extra in checked.extras.items()
    }
    jobs = schedule.open
    done = 0

    def progress(job: Job) -> None:
        nonlocal done
        done += 1
        if report:
            report(job_name(job), min(done, jobs), jobs)

    run_threads(schedule, store, experts, os.cpu_count() or 1, extras, progress)
    manifest = schedule.merged[checked.candidate]
    file = store.download_file(manifest.files["adapter"], scratch / "merged.safetensors")
    files: dict[str, int] = {}
    if checked.out:
        files |= _deliver(file, checked.out)
        for name, mask in mask_outputs(checked).items():
            (ref,) = schedule.masks[checked.candidate, name].files.values()
            files |= _deliver(store.download_file(ref, scratch / f"{ref.sha256}.mask"), mask)
    info = None
    if checked.checkpoint:
        dtype, target = torch_dtype(checked.request.dtype), checkpoint_target(checked.checkpoint)
        merged = AdapterDelta(LocalFile(file), "the merge")
        info = write_checkpoint(merged, inputs.checkpoint, target, dtype, shard_bytes(checked.request))
        files |= finish_checkpoint(checked.checkpoint, checkpoint_record_of(checked), info)
    meta = manifest.meta
    nodes = (schedule.made["merge_nodes"], schedule.reused["merge_nodes"])
    return Done(meta["density"], meta["delta_norm"], meta["rounding_loss_bfloat16"], files, info, nodes)


# -- inputs --


class Inputs:
    """Makes experts readable: fetches what lies elsewhere, converts PEFT adapters, subtracts the base."""

    def __init__(self, base: PreparedBase, scratch: Path) -> None:
        """`scratch`: an existing folder for what is fetched or converted."""
        self.checkpoint = BaseCheckpoint.in_folder(base.path, base.sha256)
        self._base, self._scratch = base, scratch

    def reader(self, expert: Expert) -> DeltaReader:
        """The expert's δ, tensor by tensor."""
        if expert.place.kind == "checkpoint":
            return open_checkpoint(expert.name, expert.place, self.checkpoint, expert.identity)
        return AdapterDelta(LocalFile(self.file(expert)), expert.name, expert.identity)

    def file(self, expert: Expert) -> Path:
        """The expert as an adapter file."""
        target = self._scratch / f"expert-{expert.sha256}.safetensors"
        if target.exists():
            return target
        place = expert.place
        if place.kind == "peft":
            assert place.path is not None
            from_peft(place.path, read_layout(self._base), target)
        elif place.kind == "checkpoint":
            _write_delta(self.reader(expert), target)
        elif place.store is not None:
            place.store.download_file(place.name, target, expert.sha256)
        else:
            assert place.path is not None
            return place.path
        return target


def _write_delta(reader: DeltaReader, file: Path) -> None:
    """A δ as an adapter file, tensor by tensor."""
    writer = AdapterWriter(file)
    try:
        writer.open(Outline(reader.base_sha256, {name: reader.shape(name) for name in reader.names}, {}))
        for name in reader.names:
            writer.add(name, reader.load(name))
        writer.close()
    except BaseException:
        writer.abort()
        raise


def _stored_expert(store: Store, expert: Expert, inputs: Inputs) -> Ref:
    """The expert as an artifact of this store, uploaded unless it is there."""
    place = expert.place
    if place.manifest is not None and place.store is not None and place.store.uri("") == store.uri(""):
        return Ref.of(place.manifest)
    return replace(Ref.of(_given(store, expert.given_recipe, {"adapter": inputs.file(expert)})), key=expert.identity)


def _stored_extra(store: Store, extra: Extra, kind: str, scratch: Path) -> Ref:
    """A Fisher or Gram file as an artifact of this store."""
    place = extra.place
    if place.manifest is not None and place.store is not None and place.store.uri("") == store.uri(""):
        return Ref.of(place.manifest)
    file = place.path
    if file is None:
        assert place.store is not None
        file = place.store.download_file(place.name, scratch / f"{kind}-{extra.sha256}", extra.sha256)
    return Ref.of(_given(store, Recipe(f"given_{kind}", 1, {"sha256": extra.sha256}), {kind: file}))


def _given(store: Store, recipe: Recipe, files: Mapping[str, Path]) -> Manifest:
    """Files that somebody gave, under a key that names their bytes."""
    return find(store, recipe.key, {}) or publish(store, recipe, files, {}, {})[0]


def _extra_source(extra: Extra | None) -> ByteSource | None:
    return adapter_source(extra.place) if extra else None


# -- outputs --


def checkpoint_target(place: Output) -> FolderTarget | StoreTarget:
    """Where a checkpoint's files go until `finish_checkpoint`: a folder beside its place, or the object store.

    In the object store an older checkpoint goes first.
    """
    if place.store is not None:
        clear_checkpoint(place)
        return StoreTarget(place.store, place.name)
    staging = _staging(place)
    shutil.rmtree(staging, ignore_errors=True)
    return FolderTarget(staging)


def _staging(place: Output) -> Path:
    assert place.path is not None
    return place.path.with_name(f".{place.path.name}.merging")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """A checkpoint's type by name; None keeps those of the base."""
    return None if name is None else getattr(torch, name)


def _deliver(file: Path, out: Output) -> dict[str, int]:
    """Bring a finished file to its place, if it is not there; returns the place and the file's bytes."""
    size = file.stat().st_size
    if out.store is not None:
        out.store.upload_file(out.name, file)
    elif out.path is not None and out.path != file:
        part = out.path.with_name(f".{out.path.name}.part")
        try:
            shutil.copyfile(file, part)
            part.replace(out.path)
        finally:
            part.unlink(missing_ok=True)
    return {out.given: size}


def _write_masks(checked: Checked, file: Path, children: Sequence[ExpertChild], scratch: Path) -> dict[str, int]:
    """Each task's mask over the unified adapter in `file`."""
    unified, sha256 = AdapterDelta(LocalFile(file), "the merge"), file_sha256(file)
    files: dict[str, int] = {}
    masks = mask_outputs(checked)
    for child in children:
        target = masks[child.name].path or scratch / "mask.safetensors"
        write_task_mask(target, checked.candidate, unified, child.reader, sha256, child.name)
        files |= _deliver(target, masks[child.name])
    return files


def finish_checkpoint(place: Output, of: Mapping[str, Any], info: CheckpointInfo | None) -> dict[str, int]:
    """Write down what the checkpoint is and put it in its place; returns its files' bytes by place."""
    if info is None:
        raise MergeError(f"{place.given}: the checkpoint was not finished")
    if place.path is None:
        write_checkpoint_record(place, of, info.files)
    else:
        staging = _staging(place)
        write_checkpoint_record(Output(str(staging), staging), of, info.files)
        clear_checkpoint(place)
        staging.replace(place.path)
    return {f"{place.given.rstrip('/')}/{name}": size for name, size in info.files.items()}
