"""One piece of merging as work: read inputs from the object store, reduce, publish. Plain functions of (store, job).

With `merge.tree.export` the only module of `merge` that reads and writes artifacts. What follows what:
`merge.tree.reduction`.
"""

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.errors import MergeError
from infra.store.s3 import FileRef, Store
from infra.store.source import StoreSource
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.files.task_mask import write_task_mask
from merge.methods.specs import Candidate, LiftSpec
from merge.methods.spectral import merge_device
from merge.tree.licences import licences_of
from merge.tree.reduce import Child, ExpertChild, Fused, MergedInfo, NodeChild, reduce_node, reduce_root
from workers.tensors.source import FileSource, ReadAhead


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
    measured: Ref | None = None
    """An expert's measurement."""
    experts: tuple[str, ...] = ()
    """Names of a node's experts in this merge; its file may have been made under others."""


@dataclass(frozen=True)
class NodeJob:
    """An inner node: combine the children and store the statistics."""

    label: str
    spec: LiftSpec
    children: tuple[ChildRef, ...]
    base_sha256: str
    reference: Ref | None
    """The merge that a later round's lift reads."""
    recipe: Recipe

    def __call__(self, store: Store, place: Place) -> Made:
        return (make_node(store, self),)


@dataclass(frozen=True)
class RootJob:
    """The root: its statistics stream straight into every candidate's lower step and are not stored."""

    label: str
    spec: LiftSpec
    children: tuple[ChildRef, ...]
    base_sha256: str
    reference: Ref | None
    base_weights: str | None
    """Object name of the base's weights, for the rounding loss."""
    candidates: tuple[tuple[Candidate, Recipe], ...]
    inputs: Mapping[str, str]
    """Digests by key of all that the merges are functions of: experts, their measurements, the reference. Not of the
    nodes between, which other candidates' needs may have made otherwise."""
    fused: Fused = field(default_factory=dict)

    def __call__(self, store: Store, place: Place) -> Made:
        return make_root(store, self)


@dataclass(frozen=True)
class TaskMaskJob:
    """One task's mask over a unified adapter."""

    expert: str
    candidate: Candidate
    recipe: Recipe
    unified: Ref
    adapter: Ref

    @property
    def inputs(self) -> dict[str, str]:
        """Digests by key of what the mask is a function of."""
        return {self.unified.key: self.unified.digest, self.adapter.key: self.adapter.digest}

    def __call__(self, store: Store, place: Place) -> Made:
        return (make_mask(store, self),)


def consumed(children: Sequence[ChildRef], reference: Ref | None) -> dict[str, str]:
    """Digests of everything that an inner node reads, by key. Raises MergeError as `digests_of`."""
    read = [child.ref for child in children] + [child.measured for child in children if child.measured]
    return digests_of([*read, *([reference] if reference else [])])


def digests_of(refs: Iterable[Ref]) -> dict[str, str]:
    """Digests by key. Raises MergeError where one key stands for two contents."""
    digests: dict[str, str] = {}
    for ref in refs:
        if digests.setdefault(ref.key, ref.digest) != ref.digest:
            raise MergeError(f"two inputs of one merge have the key {ref.key}, but different bytes")
    return digests


# -- nodes ------------------------------------------------------------------------------------------------------


def make_node(store: Store, job: NodeJob) -> tuple[Manifest, bool]:
    """Make an inner node, unless it exists. Raises StoreError, AdapterError or MergeError."""
    start = time.perf_counter()
    read = consumed(job.children, job.reference)
    earlier = find(store, job.recipe.key, read)
    if earlier is not None:  # made meanwhile, or by a try before this one
        return earlier, False
    with tempfile.TemporaryDirectory(prefix="factory-node-") as folder:
        inputs = _Inputs(store, job, Path(folder))
        out = Path(folder) / "statistics.safetensors"
        info = reduce_node(inputs.children, job.spec, out, job.base_sha256, inputs.reference)
        meta = {
            "label": job.label,
            "experts": len(info.experts),
            "seconds": time.perf_counter() - start,
            "positions": info.positions,
            "bytes_written": info.bytes_written,
            "base_sha256": job.base_sha256,
            "licenses": licences_of(store, read),
            "environment": environment(),
        }
        return publish(store, job.recipe, {"statistics": out}, read, meta)


def make_root(store: Store, job: RootJob) -> Made:
    """Make the merges of a root that do not exist. Raises as `make_node`."""
    start = time.perf_counter()
    found = _found_merges(store, job)
    if found:  # made meanwhile, or by a try before this one
        missing = tuple((candidate, recipe) for candidate, recipe in job.candidates if recipe.key not in found)
        rest = make_root(store, replace(job, candidates=missing)) if missing else ()
        made = found | {manifest.key: (manifest, new) for manifest, new in rest}
        return tuple(made[recipe.key] for _, recipe in job.candidates)
    with tempfile.TemporaryDirectory(prefix="factory-root-") as folder:
        inputs = _Inputs(store, job, Path(folder))
        outs = {candidate: Path(folder) / f"{at}.safetensors" for at, (candidate, _) in enumerate(job.candidates)}
        sinks = {candidate: AdapterWriter(out) for candidate, out in outs.items()}
        base = ReadAhead(StoreSource(store, job.base_weights)) if job.base_weights else None
        info = reduce_root(
            inputs.children, job.spec, sinks, job.base_sha256, base, inputs.reference,
            fused=job.fused, device=merge_device(),
        )  # fmt: skip
        seconds = time.perf_counter() - start
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
    file: Path,
    merged: MergedInfo,
    seconds: float,
    licences: Mapping[str, list[str]],
) -> tuple[Manifest, bool]:
    meta = merged_meta(merged, job.label, job.base_sha256, seconds, licences)
    return publish(store, recipe, {"adapter": file}, job.inputs, meta | {"environment": environment()})


def merged_meta(
    merged: MergedInfo, label: str, base_sha256: str, seconds: float, licences: Mapping[str, list[str]]
) -> dict[str, Any]:
    """What the manifest of a merged adapter says beside the environment. `label`: of the node that made it."""
    return {
        "label": label,
        **merged.candidate.to_dict(),
        "experts": len(merged.experts),
        "delta_norm": merged.norm,
        "seconds": seconds,
        "base_sha256": base_sha256,
        "rounding_loss_bfloat16": merged.rounding_loss,
        "density": merged.density,
        "licenses": licences,
    }


# -- masks ------------------------------------------------------------------------------------------------------


def make_mask(store: Store, job: TaskMaskJob) -> tuple[Manifest, bool]:
    """Make a task's mask, unless it exists. Raises as `make_node`."""
    start = time.perf_counter()
    earlier = find(store, job.recipe.key, job.inputs)
    if earlier is not None:  # made meanwhile, or by a try before this one
        return earlier, False
    with tempfile.TemporaryDirectory(prefix="factory-mask-") as folder:
        unified, expert, out = (Path(folder) / name for name in ("unified", "expert", "mask"))
        store.download_file(job.unified.files[0], unified)
        store.download_file(job.adapter.files[0], expert)
        info = write_task_mask(
            out,
            job.candidate,
            AdapterDelta(FileSource(unified), str(job.candidate)),
            AdapterDelta(FileSource(expert), job.expert, job.adapter.key),
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
            "licenses": licences_of(store, job.inputs),
            "environment": environment(),
        }
        return publish(store, job.recipe, {"mask": out}, job.inputs, meta)


class _Inputs:
    """Opened inputs of a node. Adapters are fetched whole, so that their SHA-256 is verified: they are small and may
    lie in the store for months. Statistics are large and just made: those are read tensor by tensor."""

    def __init__(self, store: Store, job: NodeJob | RootJob, folder: Path) -> None:
        self._store, self._folder = store, folder
        self.children = [self._child(ref) for ref in job.children]
        self.reference = None
        if job.reference is not None:
            self.reference = AdapterDelta(self._adapter(job.reference), "of an earlier round")

    def _child(self, child: ChildRef) -> Child:
        if child.kind == "node":
            sources = tuple(ReadAhead(StoreSource(self._store, file.name, file.size)) for file in child.ref.files)
            return NodeChild(child.name, sources, child.experts)
        measured = child.measured.files[0] if child.measured else None
        return ExpertChild(
            child.name,
            AdapterDelta(self._adapter(child.ref), child.name, identity=child.ref.identity or child.ref.key),
            ReadAhead(StoreSource(self._store, measured.name, measured.size)) if measured else None,
        )

    def _adapter(self, ref: Ref) -> FileSource:
        (file,) = ref.files
        return FileSource(self._store.download_file(file, self._folder / f"{file.sha256}.safetensors"))
