"""A merge that is made by running a model: the base with another merge in it, on training rows of the experts' tasks.

Runs where evaluations do, one at a time on a worker, in fp32. What the model is used for is the method's business
(`merge.methods.catalogue`, `by_model`). Not covered: classification, where every task has a head of its own.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.errors import MergeError
from infra.store.s3 import Store
from merge.files.sink import Outline
from merge.methods.catalogue import METHODS, AtHand
from merge.methods.specs import Candidate
from merge.modelled.writing import write_merged
from merge.tree.jobs import Ref, merged_meta
from merge.tree.licences import licences_of
from merge.tree.reduce import ROOT_VERSIONS, MergedInfo
from workers.adapters.reader import AdapterReader, check_base
from workers.adapters.support import SparseTensor
from workers.base.cache import cache_dir
from workers.base.load import load_model, load_tokenizer
from workers.base.prepare import fetch_base
from workers.jobs.measurement import TrainingRows, row_losses
from workers.tensors.source import FileSource
from workers.training.devices import spread
from workers.training.in_place import apply_delta


@dataclass(frozen=True)
class ModelledJob:
    """Make one merge; only names and numbers, no tensors and no paths."""

    candidate: Candidate
    recipe: Recipe
    base_sha256: str
    base_weights: str
    """Object name of the base's weights, for the rounding loss."""
    reference: Ref
    """The merge that the model starts from."""
    experts: tuple[str, ...]
    """Names of those that the reference merges."""
    rows: tuple[TrainingRows, ...]
    """Of each task, in the order of the key."""

    @property
    def inputs(self) -> dict[str, str]:
        """Digests by key of what the merge is a function of."""
        return {self.reference.key: self.reference.digest}

    def __call__(self, store: Store, place: Place) -> Made:
        return (make_modelled(store, self, place),)


def make_modelled(store: Store, job: ModelledJob, place: Place) -> tuple[Manifest, bool]:
    """Make the merge, unless it exists. Returns its manifest and whether this call made it.

    Raises:
        AdapterError, BaseModelError, StoreError: inputs cannot be read.
        MergeError: the method gave a δ that is not finite or does not fit.
    """
    earlier = find(store, job.recipe.key, job.inputs)
    if earlier is not None:  # made meanwhile, or by a try before this one
        return earlier, False
    start = time.perf_counter()
    torch.set_num_threads(place.threads)
    place.resident.clear()  # no room for an evaluator's model beside this one
    with tempfile.TemporaryDirectory(prefix="factory-modelled-") as folder:
        (file,) = job.reference.files
        reference = AdapterReader(FileSource(store.download_file(file, Path(folder) / "reference.safetensors")))
        check_base(reference, job.base_sha256)
        out = Path(folder) / "merged.safetensors"
        merged = _write(job, _at_hand(store, job, reference, place), store, out)
        seconds, licences = time.perf_counter() - start, licences_of(store, job.inputs)
        meta = merged_meta(merged, str(job.candidate.reference), job.base_sha256, seconds, licences)
        meta["environment"] = environment(place.devices)
        return publish(store, job.recipe, {"adapter": out}, job.inputs, meta)


def _at_hand(store: Store, job: ModelledJob, reference: AdapterReader, place: Place) -> AtHand:
    path = fetch_base(store, job.base_sha256, cache_dir())
    tokenizer, model = load_tokenizer(path), spread(load_model(path, torch.float32), place.devices)
    apply_delta(model, reference)
    return AtHand(model, [row_losses(store, model, tokenizer, rows) for rows in job.rows], reference)


def _write(job: ModelledJob, at_hand: AtHand, store: Store, out: Path) -> MergedInfo:
    """The merged δ as an adapter file, tensor by tensor."""
    by_model, candidate = METHODS[job.candidate.method].by_model, job.candidate
    assert by_model is not None
    shapes = {name: tuple(at_hand.reference.shape(name)) for name in at_hand.reference.names}
    info: dict[str, Any] = {**candidate.to_dict(), "experts": list(job.experts), "versions": ROOT_VERSIONS}

    def tensors() -> Iterator[tuple[str, SparseTensor]]:
        for name, tensor in by_model(at_hand, candidate.params):
            if tuple(tensor.shape) != shapes.get(name):
                raise MergeError(f"{candidate}: {name} {list(tensor.shape)} is no tensor of the merge it starts from")
            yield name, tensor

    tally, size = write_merged(store, job.base_weights, Outline(job.base_sha256, shapes, info), tensors(), out)
    elements = sum(math.prod(shape) for shape in shapes.values())
    return tally.info(candidate, job.experts, elements, size, with_base=True)
