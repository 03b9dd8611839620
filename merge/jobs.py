"""One node of the merge tree as a job: read children from the object store, reduce, publish.

The only module of `merge` that touches the store. These are plain functions; the pipeline runs them as Ray tasks.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.artifacts import Manifest, Recipe, publish
from infra.environment import environment
from infra.store import FileRef, Store, StoreSource
from merge.methods import Candidate, LiftSpec
from merge.reduce import Child, reduce_node, reduce_root
from workers.adapter import ByteSource, FileSource


@dataclass(frozen=True)
class ChildRef:
    """A child of a node: an expert's adapter (lifted while reading) or another node's statistics."""

    key: str
    digest: str
    kind: Literal["expert", "node"]
    """`expert` or `node`."""
    name: str
    """Expert name or node label, for messages."""
    file: FileRef


@dataclass(frozen=True)
class NodeJob:
    """An inner node: combine the children and store the statistics."""

    label: str
    recipe: Recipe
    lift: LiftSpec
    children: tuple[ChildRef, ...]
    base_sha256: str


@dataclass(frozen=True)
class RootJob:
    """The root: its statistics stream straight into every candidate's lower step and are not stored."""

    label: str
    lift: LiftSpec
    children: tuple[ChildRef, ...]
    base_sha256: str
    base_weights: str
    """Object name of the base's weights, for the rounding loss."""
    candidates: tuple[tuple[Candidate, Recipe], ...]


def make_node(store: Store, job: NodeJob) -> tuple[Manifest, bool]:
    """Reduce one inner node and publish it; returns the manifest and whether this call made it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="factory-node-") as folder:
        out = Path(folder) / "statistics.safetensors"
        info = reduce_node(_children(store, job.children, Path(folder)), job.lift, out, job.base_sha256)
        meta = {
            "label": job.label,
            "experts": len(info.experts),
            "seconds": time.perf_counter() - start,
            "positions": info.positions,
            "bytes_written": info.bytes_written,
            "base_sha256": job.base_sha256,
            "environment": environment(),
        }
        return publish(store, job.recipe, {"statistics": out}, _consumed(job.children), meta)


def make_root(store: Store, job: RootJob) -> dict[str, tuple[Manifest, bool]]:
    """Reduce the root and publish one merged adapter per candidate, keyed by the candidate's recipe key."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="factory-root-") as folder:
        outs = {
            candidate: Path(folder) / f"{number}.safetensors" for number, (candidate, _) in enumerate(job.candidates)
        }
        base = StoreSource(store, job.base_weights)
        info = reduce_root(_children(store, job.children, Path(folder)), job.lift, outs, job.base_sha256, base)
        merged = {each.candidate: each for each in info.merged}
        published = {}
        for candidate, recipe in job.candidates:
            meta = {
                "label": job.label,
                "method": candidate.method,
                "params": dict(candidate.params),
                "experts": len(info.experts),
                "delta_norm": merged[candidate].norm,
                "seconds": time.perf_counter() - start,
                "base_sha256": job.base_sha256,
                "rounding_loss_bfloat16": merged[candidate].rounding_loss,
                "density": info.density,
                "environment": environment(),
            }
            published[recipe.key] = publish(store, recipe, {"adapter": outs[candidate]}, _consumed(job.children), meta)
            outs[candidate].unlink()
        return published


def _children(store: Store, refs: Sequence[ChildRef], folder: Path) -> list[Child]:
    """Where the children's bytes come from.

    Adapters are small and may lie in the store for months: they are fetched whole, so that their SHA-256 is verified.
    Statistics are large and just made: they are read tensor by tensor.
    """

    def source(number: int, ref: ChildRef) -> ByteSource:
        if ref.kind == "node":
            return StoreSource(store, ref.file.name, ref.file.size)
        return FileSource(store.download_file(ref.file, folder / f"child-{number}.safetensors"))

    return [Child(ref.kind, ref.name, source(number, ref)) for number, ref in enumerate(refs)]


def _consumed(refs: Sequence[ChildRef]) -> Mapping[str, str]:
    return {ref.key: ref.digest for ref in refs}
