"""A few training steps on rows of all tasks, from a merge: what is published is one adapter, the merge's δ and the
trained change added up, in the file format of any other merge.

The model is the base with the merge in it, frozen; what is trained is a sparse change on top, by the loop that trains
experts (`workers.training.loop`), without validation rows: the last values are kept. An unfinished training is resumed
as an expert's is. Without a merge to start from, the base itself is trained on all tasks. What is minimised stands in
`_objective`; what teachers say was asked before (`workers.jobs.teacher`). Not covered: classification, where every task
has a head of its own.
"""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.errors import AdapterError, ExpertError
from infra.store.s3 import FileRef, Store
from merge.files.sink import Outline
from merge.methods.specs import Candidate
from merge.modelled.writing import write_merged
from merge.tree.jobs import Ref
from merge.tree.licences import licences_of
from merge.tree.reduce import DeltaTally
from workers.adapters.reader import AdapterReader, check_base
from workers.adapters.support import SparseTensor, SupportSpec, added, find_blocks
from workers.base.cache import cache_dir
from workers.base.load import load_model, load_tokenizer
from workers.base.memory import map_large_tensors, peak_bytes, reset_peak
from workers.base.prepare import fetch_base
from workers.jobs.resume import drop_checkpoint, find_checkpoint, keep_state
from workers.jobs.shared_support import PooledTask, pooled_supports
from workers.masks.selection import best, unit_scores
from workers.masks.spec import MaskSpec, select_supports, unit_of
from workers.tensors.source import FileSource
from workers.text.prompt import Example, encode_examples
from workers.text.rows import load_rows
from workers.training.batches import mixed_batches, padding_share
from workers.training.devices import algorithms, spread
from workers.training.in_place import apply_delta
from workers.training.loop import StepReport, TrainedExpert, TrainSpec, train_expert
from workers.training.objectives import LanguageModelling, Objective, language_modelling
from workers.training.teaching import Lesson, Said, Teaching, load_said

REFINE_VERSION = 1
"""Part of every refined merge's key beside `TRAIN_VERSION`: raise it whenever the same inputs give other numbers."""
Support = Literal["fresh", "merge", "both"]
"""Which positions are trained: those that the mask selects, those that the merge changes, or beside what the mask
selects as much of what the merge changes."""


@dataclass(frozen=True)
class RefineJob:
    """Train on rows of all tasks, from one merge or from the base; only names and numbers, no tensors, no paths."""

    name: str
    """For people."""
    recipe: Recipe
    base_sha256: str
    base_weights: str
    """Object name of the base's weights, for the rounding loss."""
    candidate: Candidate | None
    """What the merge is that is refined."""
    start: Ref | None
    """That merge; None: the base."""
    inputs: Mapping[str, str]
    """Digests by key of what the result is a function of: the merge, and the experts that it merges."""
    tasks: tuple[PooledTask, ...]
    """Training rows and prompt of each task, in the order of the key."""
    max_target_tokens: int
    rows_per_task: int
    """Rows of each task in a batch."""
    support: Support
    mask: MaskSpec
    """Which modules are trained, and of a fresh support which positions."""
    train: TrainSpec
    """Its `batch_size` is the rows of a whole batch, its `micro_batch_size` the most rows that run at a time."""
    compute_dtype: str
    recompute: bool
    """Recompute activations in the backward pass. Changes no number."""
    save_every: int | None
    """Steps between two saved states."""
    deterministic: bool
    """Only algorithms that give the same bits every time."""
    about: Mapping[str, Any]
    """What the manifest says of the training, for reports."""
    experts: tuple[str, ...] = ()
    """Names of those that the merge merges."""
    licences: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of base and data, beside what the merge's inputs say; part of no key."""
    teacher_weight: float = 0.0
    """Share of the divergence from the tasks' teachers in the loss."""
    kept: tuple[PooledTask, ...] = ()
    """Training rows on which the base is the teacher."""
    kept_rows: int = 0
    """Rows of theirs in a batch, all together."""
    keep_weight: float = 0.0
    """What the divergence from the base weighs at their target tokens."""
    teachers: tuple[FileRef | None, ...] = ()
    """What is said of the rows of each of `tasks`, None where nobody is asked, and of `kept`; () where there is no
    teacher at all."""

    def __call__(self, store: Store, place: Place) -> Made:
        place.resident.clear()  # no room for an evaluator's model beside this one
        return (make_refined(store, self, place.devices, place.threads, partial(place.report, self.name)),)


def make_refined(
    store: Store, job: RefineJob, devices: Sequence[str], threads: int, on_step: Callable[[StepReport], None]
) -> tuple[Manifest, bool]:
    """Train, add up and publish, unless it exists. Returns the manifest and whether this call made it.

    Raises:
        ExpertError: training failed.
        AdapterError, BaseModelError, StoreError: inputs cannot be read.
        MergeError: the sum is not finite.
    """
    started = time.time()
    map_large_tensors()
    reset_peak()
    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts; deterministic products need it
    found = find(store, job.recipe.key, job.inputs)
    if found is not None:  # made meanwhile, or by a try before this one
        drop_checkpoint(store, job.recipe.key)
        return found, False
    with tempfile.TemporaryDirectory(prefix="factory-refine-") as folder:
        start = None
        if job.start is not None:
            (file,) = job.start.files
            start = AdapterReader(FileSource(store.download_file(file, Path(folder) / "start.safetensors")))
            check_base(start, job.base_sha256)
        try:
            with algorithms(job.deterministic):
                trained, padding = _train(store, job, start, devices, on_step)
        except ExpertError as error:
            raise ExpertError(f"{job.name}: {error}") from error
        finally:
            if devices[0].startswith("cuda"):
                torch.cuda.empty_cache()
        out = Path(folder) / "refined.safetensors"
        tally, elements = _write(store, job, start, trained, out)
        meta = {
            **_meta(job, trained),
            "delta_norm": tally.norm,
            "rounding_loss_bfloat16": tally.rounding_loss,
            "density": tally.positions / elements,
            "licenses": _licences(store, job),
            "padding": padding,
            "seconds": time.time() - started,
            "device": ", ".join(devices),
            "peak_rss_bytes": peak_bytes(),
            "environment": environment(devices),
        }
        manifest, made = publish(store, job.recipe, {"adapter": out}, job.inputs, meta)
    drop_checkpoint(store, job.recipe.key)
    return manifest, made


# -- training ---------------------------------------------------------------------------------------------------


def _train(
    store: Store, job: RefineJob, start: AdapterReader | None, devices: Sequence[str],
    on_step: Callable[[StepReport], None],
) -> tuple[TrainedExpert, float]:  # fmt: skip
    """The trained change, and the share of tokens that was padding."""
    path = fetch_base(store, job.base_sha256, cache_dir())
    tokenizer = load_tokenizer(path)
    model = spread(load_model(path, getattr(torch, job.compute_dtype)), devices)
    if start is not None:
        apply_delta(model, start)
    plain = language_modelling(model, int(tokenizer.pad_token_id))
    pools = [
        encode_examples(tokenizer, task.prompt, load_rows(store, task.rows), job.max_target_tokens)
        for task in (*job.tasks, *job.kept)
    ]
    lengths = [[plain.length(example) for example in pool] for pool in pools]
    size, held = job.train.micro_batch_size or job.train.batch_size, len(job.tasks)
    batches = mixed_batches(
        lengths[:held], job.rows_per_task, job.train.steps, job.train.seed, size, lengths[held:], job.kept_rows
    )
    objective, examples = _objective(store, job, plain, pools)
    trained = train_expert(
        model,
        objective,
        examples,
        [],
        job.mask,
        job.train,
        supports=_supports(model, job, start, pools[:held], int(tokenizer.pad_token_id)),
        batches=batches,
        recompute=job.recompute,
        resume=find_checkpoint(store, job.recipe.key),
        save_every=job.save_every,
        on_save=partial(keep_state, store, job.name, job.recipe.key),
        on_step=on_step,
    )
    return trained, padding_share(batches, [length for pool in lengths for length in pool])


def _objective(
    store: Store, job: RefineJob, plain: LanguageModelling, pools: Sequence[Sequence[Example]]
) -> tuple[Objective, list[Any]]:
    """What is minimised, and over what: the rows of all tasks, then those that are kept, each target token by itself.

    Without teachers the cross-entropy; with them (1 - w) cross-entropy + w divergence, of kept rows the divergence
    alone, by its own weight. The sum is divided by the number of target tokens of the batch, kept ones among them.
    """
    if not job.teachers:
        return plain, [example for pool in pools for example in pool]
    lessons = []
    for at, (pool, file) in enumerate(zip(pools, job.teachers, strict=True)):
        held, said = at < len(job.tasks), _said(store, file) if file is not None else {}
        weights = (1 - job.teacher_weight, job.teacher_weight) if held else (0.0, job.keep_weight)
        lessons += [Lesson(example, *weights, said.get(number)) for number, example in enumerate(pool)]
    return Teaching(plain), lessons


def _said(store: Store, file: FileRef) -> dict[int, Said]:
    with tempfile.TemporaryDirectory(prefix="factory-teacher-") as folder:
        return load_said(store.download_file(file, Path(folder) / "teacher.safetensors"))


def _supports(
    model: Any, job: RefineJob, start: AdapterReader | None, pools: Sequence[Sequence[Example]], pad_id: int
) -> dict[str, SupportSpec]:
    """The positions that are trained, by module; scored, if they are, on rows of all tasks at the weights of the start.

    Once: there is no other selection in a few steps.
    """
    if job.support == "merge":
        assert start is not None
        return merged_supports(start, job.mask)
    if job.mask.needs_data:
        size = job.train.micro_batch_size or job.train.batch_size
        per_task = math.ceil(job.mask.score_batches * size / len(pools))
        fresh = pooled_supports(model, [pool[:per_task] for pool in pools], job.mask, size, pad_id)
    else:
        fresh = select_supports(model, job.mask)
    return beside_merged(fresh, start) if job.support == "both" and start is not None else fresh


def beside_merged(fresh: Mapping[str, SupportSpec], start: AdapterReader) -> dict[str, SupportSpec]:
    """Fresh positions and, of each weight that the merge changes, as many units where its |δ| sum to most."""
    found = dict(fresh)
    for name, spec in fresh.items():
        if f"{name}.weight" in start.names and spec.units.numel():
            tensor, change = start.load(f"{name}.weight"), torch.zeros(spec.shape)
            change.view(-1)[tensor.indices] = tensor.values.float().abs()
            most = best(unit_scores(change, spec.block, name), spec.units.numel())
            found[name] = replace(spec, units=torch.unique(torch.cat([spec.units, most])))
    return found


def merged_supports(start: AdapterReader, mask: MaskSpec) -> dict[str, SupportSpec]:
    """The positions that a merge changes, by module: whole rows where it changes all of a weight, the mask's blocks
    where they are a union of those, else single weights."""
    supports = {}
    for name in start.names:
        tensor = start.load(name)
        rows, columns = tensor.shape
        if tensor.indices.numel() == tensor.numel:
            spec = SupportSpec((rows, columns), torch.arange(rows), (1, columns))
        else:
            spec = SupportSpec((rows, columns), tensor.indices)
            if (block := unit_of(mask, (rows, columns))) is not None:
                with contextlib.suppress(AdapterError):
                    spec = SupportSpec((rows, columns), find_blocks(tensor.indices, tensor.shape, block, name), block)
        supports[name.removesuffix(".weight")] = spec
    return supports


# -- the result -------------------------------------------------------------------------------------------------


def _write(
    store: Store, job: RefineJob, start: AdapterReader | None, trained: TrainedExpert, out: Path
) -> tuple[DeltaTally, int]:
    """The merge's δ and the trained change, added up tensor by tensor in fp32; returns what they come to, and the
    elements of all tensors."""
    merged = {name: tuple(start.shape(name)) for name in start.names} if start is not None else {}
    shapes = dict(sorted({**trained.shapes, **merged}.items()))
    told = job.candidate.to_dict() if job.candidate is not None else {}
    info = {**told, "refined": dict(job.about), "experts": list(job.experts), "recipe": job.recipe.key}

    def tensors() -> Iterator[tuple[str, SparseTensor]]:
        for name in shapes:
            parts = [start.load(name)] if start is not None and name in merged else []
            if name in trained.delta:
                change = trained.delta[name]
                assert isinstance(change, SparseTensor)
                parts.append(change)
            yield name, added(parts)

    tally, _ = write_merged(store, job.base_weights, Outline(job.base_sha256, shapes, info), tensors(), out)
    return tally, sum(map(math.prod, shapes.values()))


def _licences(store: Store, job: RefineJob) -> dict[str, list[str]]:
    found = licences_of(store, job.inputs) if job.start is not None else {}
    return {what: sorted({*found.get(what, ()), *job.licences.get(what, ())}) for what in ("base", "data")}


def _meta(job: RefineJob, trained: TrainedExpert) -> dict[str, Any]:
    """What the manifest says of the merge, as of any, and of the training."""
    history = trained.history
    return {
        "label": job.name,
        **(job.candidate.to_dict() if job.candidate is not None else {}),
        "experts": len(job.experts),
        "base_sha256": job.base_sha256,
        "refined": dict(job.about),
        "steps": len(history),
        "tokens": history[-1].tokens,
        "train_seconds": history[-1].seconds,
        "first_loss": history[0].loss,
        "last_loss": history[-1].loss,
        "losses": [report.loss for report in history],
        "resumed_after": trained.resumed_after,
        "trainable": trained.trainable,
        "trained_norm": trained.delta_norm,
    }
