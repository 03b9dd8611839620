"""One piece of merging as a job: read inputs from the object store, reduce, publish. Plain functions of (store, job).

With `merge.export` the only module of `merge` that reads and writes artifacts; `merge.schedule` says which job can run
when. A node's tensors can be split over several jobs (`part`), whose outputs one `FinishJob` joins.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from infra.artifacts import Manifest, Recipe, find, find_published, new_attempt, publish
from infra.environment import environment
from infra.errors import MergeError, StoreError
from infra.store import FileRef, Store
from infra.store_source import StoreSource
from merge.adapter_file import AdapterDelta, AdapterWriter
from merge.assemble import assemble
from merge.licences import licences_of
from merge.mask_file import write_task_mask
from merge.reduce import (
    Child,
    ExpertChild,
    Fused,
    MergedInfo,
    NodeChild,
    NodeInfo,
    Part,
    RootInfo,
    join_roots,
    reduce_node,
    reduce_root,
)
from merge.specs import Candidate, LiftSpec
from merge.spectral import merge_device
from workers.adapter import ByteSource
from workers.ranged_file import LocalFile, ReadAhead


@dataclass(frozen=True)
class Ref:
    """An artifact as an input: its key, the digest of its bytes, and its files in the order of their labels.

    `identity` seeds random choices of an expert; "": the key does. It is a function of the bytes that the key names.
    """

    key: str
    digest: str
    files: tuple[FileRef, ...]
    identity: str = ""

    @staticmethod
    def of(manifest: Manifest) -> "Ref":
        """The artifact of a manifest."""
        return Ref(manifest.key, manifest.digest, tuple(manifest.files[label] for label in sorted(manifest.files)))


@dataclass(frozen=True)
class ChildRef:
    """A child of a node: an expert's adapter (lifted while reading) or another node's statistics."""

    kind: Literal["expert", "node"]
    name: str
    """Expert name or node label."""
    ref: Ref
    extra: Ref | None = None
    """An expert's Fisher or Gram artifact."""
    experts: tuple[str, ...] = ()
    """Names of a node's experts in this merge; its file may have been made under others."""


@dataclass(frozen=True)
class NodeJob:
    """An inner node: combine the children and store the statistics."""

    reduction: int
    """Number of the reduction in the plan."""
    label: str
    spec: LiftSpec
    children: tuple[ChildRef, ...]
    base_sha256: str
    reference: Ref | None
    """The merge that a later round's lift reads."""
    recipe: Recipe
    part: Part | None = None


@dataclass(frozen=True)
class RootJob:
    """The root: its statistics stream straight into every candidate's lower step and are not stored."""

    reduction: int
    label: str
    spec: LiftSpec
    children: tuple[ChildRef, ...]
    base_sha256: str
    reference: Ref | None
    base_weights: str | None
    """Object name of the base's weights, for the rounding loss."""
    candidates: tuple[tuple[Candidate, Recipe], ...]
    inputs: Mapping[str, str]
    """Digests by key of all that the merges are functions of: experts, their extras, the reference. Not of the nodes
    between, which other candidates' needs may have made otherwise."""
    part: Part | None = None
    fused: Fused = field(default_factory=dict)


@dataclass(frozen=True)
class PartOutput:
    """What one part of a node left in the store, a file for each recipe key, and what it found."""

    files: Mapping[str, FileRef]
    info: NodeInfo | RootInfo
    seconds: float


@dataclass(frozen=True)
class FinishJob:
    """Publish a node whose parts are all there."""

    whole: NodeJob | RootJob
    outputs: tuple[PartOutput, ...]


@dataclass(frozen=True)
class TaskMaskJob:
    """One task's mask over a unified adapter."""

    expert: str
    candidate: Candidate
    recipe: Recipe
    unified: Ref
    adapter: Ref


KeyedJob = NodeJob | RootJob | TaskMaskJob
Job = KeyedJob | FinishJob
Made = tuple[tuple[Manifest, bool], ...]
"""Manifests in the order of the job's recipes, each with whether this call made it."""
JobResult = Made | PartOutput


def run_job(store: Store, job: Job) -> JobResult:
    """Do a job of the schedule. Raises StoreError, AdapterError or MergeError; a repeated call is harmless."""
    if isinstance(job, FinishJob):
        return _finish(store, job)
    if isinstance(job, TaskMaskJob):
        return (_make_mask(store, job),)
    return _make_node(store, job) if isinstance(job, NodeJob) else _make_root(store, job)


def manifests_of(result: JobResult) -> Made:
    """The artifacts that a whole job made or found."""
    if isinstance(result, PartOutput):
        raise TypeError("a part of a node is no artifact: its FinishJob makes one")
    return result


def keys_of(job: KeyedJob) -> tuple[str, ...]:
    """Keys of the artifacts that the job makes."""
    return tuple(recipe.key for _, recipe in job.candidates) if isinstance(job, RootJob) else (job.recipe.key,)


def find_made(store: Store, job: KeyedJob) -> Made | None:
    """All that the job would make, if it exists. Raises StoreError."""
    if isinstance(job, RootJob):
        found = _found_merges(store, job)
        keys = keys_of(job)
        return tuple(found[key] for key in keys) if len(found) == len(keys) else None
    inputs = _mask_inputs(job) if isinstance(job, TaskMaskJob) else consumed(job.children, job.reference)
    made = find_published(store, job.recipe.key, inputs)
    return None if made is None else (made,)


def job_name(job: Job) -> str:
    """For people and for the names of Ray tasks."""
    if isinstance(job, TaskMaskJob):
        return f"{job.candidate.method} mask of {job.expert}"
    if isinstance(job, FinishJob):
        return f"{job_name(job.whole)}, joining parts"
    part = f", part {job.part.index + 1} of {job.part.of}" if job.part else ""
    return ("merge root" if isinstance(job, RootJob) else f"merge node {job.label}") + part


def consumed(children: Sequence[ChildRef], reference: Ref | None) -> dict[str, str]:
    """Digests of everything that an inner node reads, by key. Raises MergeError as `digests_of`."""
    read = [child.ref for child in children] + [child.extra for child in children if child.extra]
    return digests_of([*read, *([reference] if reference else [])])


def digests_of(refs: Iterable[Ref]) -> dict[str, str]:
    """Digests by key. Raises MergeError where one key stands for two contents."""
    digests: dict[str, str] = {}
    for ref in refs:
        if digests.setdefault(ref.key, ref.digest) != ref.digest:
            raise MergeError(f"two inputs of one merge have the key {ref.key}, but different bytes")
    return digests


# -- nodes ------------------------------------------------------------------------------------------------------


def _make_node(store: Store, job: NodeJob) -> JobResult:
    start = time.perf_counter()
    earlier = find(store, job.recipe.key, consumed(job.children, job.reference)) if job.part is None else None
    if earlier is not None:  # made meanwhile, or by a try before this one
        return ((earlier, False),)
    with tempfile.TemporaryDirectory(prefix="factory-node-") as folder:
        inputs = _Inputs(store, job, Path(folder))
        out = Path(folder) / "statistics.safetensors"
        info = reduce_node(inputs.children, job.spec, out, job.base_sha256, inputs.reference, job.part)
        seconds = time.perf_counter() - start
        if job.part is not None:
            name = f"{new_attempt(job.recipe.key)}/{_part_label(job.part.index)}"
            return PartOutput({job.recipe.key: store.upload_file(name, out)}, info, seconds)
        return (_publish_node(store, job, {"statistics": out}, [info], seconds),)


def _publish_node(
    store: Store, job: NodeJob, files: Mapping[str, Path | FileRef], infos: Sequence[NodeInfo], seconds: float
) -> tuple[Manifest, bool]:
    meta = {
        "label": job.label,
        "experts": len(infos[0].experts),
        "seconds": seconds,
        "positions": sum(info.positions for info in infos),
        "bytes_written": sum(info.bytes_written for info in infos),
        "base_sha256": job.base_sha256,
        "licenses": licences_of(store, consumed(job.children, job.reference)),
        "environment": environment(),
    }
    return publish(store, job.recipe, files, consumed(job.children, job.reference), meta)


def _make_root(store: Store, job: RootJob) -> JobResult:
    start = time.perf_counter()
    if job.part is None:
        found = _found_merges(store, job)
        missing = tuple((candidate, recipe) for candidate, recipe in job.candidates if recipe.key not in found)
        if found:  # made meanwhile, or by a try before this one
            rest = manifests_of(_make_root(store, replace(job, candidates=missing))) if missing else ()
            made = found | {manifest.key: (manifest, new) for manifest, new in rest}
            return tuple(made[recipe.key] for _, recipe in job.candidates)
    with tempfile.TemporaryDirectory(prefix="factory-root-") as folder:
        inputs = _Inputs(store, job, Path(folder))
        outs = {candidate: Path(folder) / f"{at}.safetensors" for at, (candidate, _) in enumerate(job.candidates)}
        sinks = {candidate: AdapterWriter(out) for candidate, out in outs.items()}
        base = ReadAhead(StoreSource(store, job.base_weights)) if job.base_weights else None
        info = reduce_root(
            inputs.children, job.spec, sinks, job.base_sha256, base, inputs.reference, job.part,
            fused=job.fused, device=merge_device(),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if job.part is not None:
            label = _part_label(job.part.index)
            files = {
                recipe.key: store.upload_file(f"{new_attempt(recipe.key)}/{label}", outs[candidate])
                for candidate, recipe in job.candidates
            }
            return PartOutput(files, info, seconds)
        licences = licences_of(store, job.inputs)
        return tuple(
            _publish_merged(store, job, recipe, outs[merged.candidate], merged, seconds, licences)
            for (_, recipe), merged in zip(job.candidates, info.merged, strict=True)
        )


def _found_merges(store: Store, job: RootJob) -> dict[str, tuple[Manifest, bool]]:
    """Those of the root's merges that exist, by key."""
    found = ((recipe.key, find(store, recipe.key, job.inputs)) for _, recipe in job.candidates)
    return {key: (manifest, False) for key, manifest in found if manifest is not None}


def _publish_merged(
    store: Store,
    job: RootJob,
    recipe: Recipe,
    file: Path | FileRef,
    merged: MergedInfo,
    seconds: float,
    licences: Mapping[str, list[str]],
) -> tuple[Manifest, bool]:
    meta = {
        "label": job.label,
        **merged.candidate.to_dict(),
        "experts": len(merged.experts),
        "delta_norm": merged.norm,
        "seconds": seconds,
        "base_sha256": job.base_sha256,
        "rounding_loss_bfloat16": merged.rounding_loss,
        "density": merged.density,
        "licenses": licences,
        "environment": environment(),
    }
    return publish(store, recipe, {"adapter": file}, job.inputs, meta)


def _finish(store: Store, job: FinishJob) -> Made:
    """A node's parts stay the files that they are; the parts of merged adapters become one file each."""
    start = time.perf_counter()
    before = sum(output.seconds for output in job.outputs)
    whole = job.whole
    if isinstance(whole, NodeJob):
        key = whole.recipe.key
        files = {_part_label(at): output.files[key] for at, output in enumerate(job.outputs)}
        infos = [output.info for output in job.outputs if isinstance(output.info, NodeInfo)]
        return (_publish_node(store, whole, files, infos, before),)
    info = join_roots([output.info for output in job.outputs if isinstance(output.info, RootInfo)])
    found = _found_merges(store, whole)  # by a retry after the worker was lost: the parts may be gone
    licences = licences_of(store, whole.inputs)
    for (_, recipe), merged in zip(whole.candidates, info.merged, strict=True):
        if recipe.key in found:
            continue
        parts = [output.files[recipe.key] for output in job.outputs]
        with store.open_write(f"{new_attempt(recipe.key)}/adapter") as out:
            assemble([ReadAhead(StoreSource(store, part.name, part.size)) for part in parts], out.write)
            file = out.close()
        seconds = before + time.perf_counter() - start
        found[recipe.key] = _publish_merged(store, whole, recipe, file, merged, seconds, licences)
    for output in job.outputs:  # after all of them: until then a retry may need any part
        for part in output.files.values():
            with contextlib.suppress(StoreError):  # nothing refers to them any more
                store.delete(part.name)
    return tuple(found[recipe.key] for _, recipe in whole.candidates)


def _part_label(index: int) -> str:
    return f"statistics-{index:05d}"


# -- masks ------------------------------------------------------------------------------------------------------


def _mask_inputs(job: TaskMaskJob) -> dict[str, str]:
    return {job.unified.key: job.unified.digest, job.adapter.key: job.adapter.digest}


def _make_mask(store: Store, job: TaskMaskJob) -> tuple[Manifest, bool]:
    start = time.perf_counter()
    earlier = find(store, job.recipe.key, _mask_inputs(job))
    if earlier is not None:  # made meanwhile, or by a try before this one
        return earlier, False
    with tempfile.TemporaryDirectory(prefix="factory-mask-") as folder:
        unified, expert, out = (Path(folder) / name for name in ("unified", "expert", "mask"))
        store.download_file(job.unified.files[0], unified)
        store.download_file(job.adapter.files[0], expert)
        info = write_task_mask(
            out,
            job.candidate,
            AdapterDelta(LocalFile(unified), str(job.candidate)),
            AdapterDelta(LocalFile(expert), job.expert, job.adapter.key),
            job.unified.files[0].sha256,
            job.expert,
        )
        meta = {
            **job.candidate.to_dict(),
            "task": job.expert,
            "scale": info.scale,
            "kept": info.kept,
            "positions": info.positions,
            "seconds": time.perf_counter() - start,
            "licenses": licences_of(store, _mask_inputs(job)),
            "environment": environment(),
        }
        return publish(store, job.recipe, {"mask": out}, _mask_inputs(job), meta)


class _Inputs:
    """Opened inputs of a node. A whole node's adapters are fetched whole, so that their SHA-256 is verified: they are
    small and may lie in the store for months. Statistics are large and just made, and a part needs only some tensors:
    those are read tensor by tensor."""

    def __init__(self, store: Store, job: NodeJob | RootJob, folder: Path) -> None:
        self._store, self._folder, self._whole = store, folder, job.part is None
        self.children = [self._child(ref) for ref in job.children]
        self.reference = None
        if job.reference is not None:
            self.reference = AdapterDelta(self._adapter(job.reference), "of an earlier round")

    def _child(self, child: ChildRef) -> Child:
        if child.kind == "node":
            sources = tuple(ReadAhead(StoreSource(self._store, file.name, file.size)) for file in child.ref.files)
            return NodeChild(child.name, sources, child.experts)
        extra = child.extra.files[0] if child.extra else None
        return ExpertChild(
            child.name,
            AdapterDelta(self._adapter(child.ref), child.name, identity=child.ref.identity or child.ref.key),
            ReadAhead(StoreSource(self._store, extra.name, extra.size)) if extra else None,
        )

    def _adapter(self, ref: Ref) -> ByteSource:
        (file,) = ref.files
        if self._whole:
            return LocalFile(self._store.download_file(file, self._folder / f"{file.sha256}.safetensors"))
        return ReadAhead(StoreSource(self._store, file.name, file.size))
