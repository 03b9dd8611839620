"""The merge of a later round: what its experts started from, and what is merged of their changes, added up.

Experts of such a round change the base with an earlier merge in it. So does what a tree makes of their changes; the sum
is a change of the base, a merge like any other.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.store.s3 import Store
from merge.files.sink import Outline
from merge.methods.specs import Candidate
from merge.modelled.writing import write_merged
from merge.tree.jobs import Ref, merged_meta
from merge.tree.licences import licences_of
from workers.adapters.reader import AdapterReader, check_base
from workers.adapters.support import SparseTensor, added
from workers.tensors.source import FileSource


@dataclass(frozen=True)
class OntoJob:
    """Add a merge of changes to the merge that they are changes of; only names and numbers."""

    candidate: Candidate
    """How the changes were merged."""
    recipe: Recipe
    base_sha256: str
    base_weights: str
    """Object name of the base's weights, for the rounding loss."""
    start: Ref
    change: Ref
    inputs: Mapping[str, str]
    """Digests by key of both, and of the experts whose changes were merged."""
    experts: tuple[str, ...]
    """Their names."""

    def __call__(self, store: Store, place: Place) -> Made:
        torch.set_num_threads(place.threads)
        return (make_onto(store, self),)


def make_onto(store: Store, job: OntoJob) -> tuple[Manifest, bool]:
    """Add up and publish, unless it exists. Returns the manifest and whether this call made it.

    Raises:
        AdapterError, StoreError: inputs cannot be read.
        MergeError: the sum is not finite.
    """
    began = time.perf_counter()
    found = find(store, job.recipe.key, job.inputs)
    if found is not None:  # made meanwhile, or by a try before this one
        return found, False
    with tempfile.TemporaryDirectory(prefix="factory-onto-") as folder:
        parts = []
        for ref in (job.start, job.change):
            (file,) = ref.files
            parts.append(AdapterReader(FileSource(store.download_file(file, Path(folder) / f"{file.sha256}.part"))))
            check_base(parts[-1], job.base_sha256)
        shapes = {name: tuple(part.shape(name)) for part in parts for name in part.names}
        shapes = dict(sorted(shapes.items()))
        info = {**job.candidate.to_dict(), "start": job.start.key, "experts": list(job.experts)}

        def tensors() -> Iterator[tuple[str, SparseTensor]]:
            for name in shapes:
                yield name, added([part.load(name) for part in parts if name in part.names])

        out = Path(folder) / "merged.safetensors"
        outline = Outline(job.base_sha256, shapes, info)
        tally, size = write_merged(store, job.base_weights, outline, tensors(), out)
        merged = tally.info(job.candidate, job.experts, sum(map(math.prod, shapes.values())), size, with_base=True)
        seconds, licences = time.perf_counter() - began, licences_of(store, job.inputs)
        meta = merged_meta(merged, "a later round", job.base_sha256, seconds, licences)
        meta |= {"start": job.start.key, "environment": environment()}
        return publish(store, job.recipe, {"adapter": out}, job.inputs, meta)
