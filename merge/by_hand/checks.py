"""A merge by hand from a request to a plan: everything that can be refused is refused here, from headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infra.errors import ConfigError, MergeError
from infra.store.s3 import Store
from merge.by_hand.checkpoints import check_folder
from merge.by_hand.inputs import (
    Expert,
    MeasuredFile,
    find_experts,
    find_measured,
    hash_experts,
    hash_measured,
    locate_experts,
    locate_measured,
)
from merge.by_hand.outputs import Output, check_apart, check_buckets, check_file, check_mask, output, record
from merge.by_hand.request import MergeRequest, shard_bytes
from merge.files.checkpoint_writer import CHECKPOINT_VERSION
from merge.methods.catalogue import METHODS
from merge.methods.parameters import number
from merge.methods.per_task import PER_TASK_VERSION
from merge.methods.specs import Candidate, Reduction, check_candidate, check_without_model, plan_reductions
from merge.tree.reduce import ROOT_VERSIONS, Fused
from merge.tree.trie import DEFAULT_FAN_IN, TREE_VERSION
from workers.adapters.task_mask import MASK_FILE_VERSION
from workers.base.cache import cache_dir
from workers.base.layout import fused_rows
from workers.base.prepare import PreparedBase, prepare_base
from workers.conversion.formats import base_names
from workers.measuring.catalogue import MEASUREMENTS
from workers.measuring.file import IMPORTANCE_READ_VERSION
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles

REGISTERED_KIND = "merged"
"""Kind of a registered merge, as the pipeline tags its own."""


@dataclass(frozen=True)
class Checked:
    """A request whose every part was found to fit; nothing but headers was read."""

    request: MergeRequest
    candidate: Candidate
    reductions: tuple[Reduction, ...]
    base: PreparedBase
    experts: tuple[Expert, ...]
    measured: Mapping[str, MeasuredFile]
    """File of each expert's measurement, where the method reads one."""
    out: Output | None
    checkpoint: Output | None
    fused: Fused
    """Rows of the parts of fused weights, where the candidate asks for them."""
    wrapper: str = ""
    """What prompts of the registered merge stand in."""

    @property
    def measurement(self) -> str | None:
        """Which measurement the method reads."""
        return _measurement(self.reductions)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that some expert changes."""
        return dict(sorted((name, shape) for expert in self.experts for name, shape in expert.shapes.items()))

    @property
    def union_elements(self) -> int:
        """Elements of those tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def notices(self) -> list[str]:
        """What of the experts is ignored, one line each."""
        return [line for expert in self.experts for line in expert.notices]

    @property
    def heads(self) -> list[str]:
        """Experts whose classification head stays behind."""
        return [expert.name for expert in self.experts if expert.head]


def check(request: MergeRequest, scratch: Path) -> Checked:
    """Everything that can be refused without reading a tensor, cheapest first: the request, services, places, the base,
    headers.

    Raises FactoryError: ConfigError, MergeError, AdapterError, BaseModelError, StoreError or RegistryError.
    """
    candidate = Candidate(request.method, _numbers(request.params), request.weights or None)
    method = METHODS[candidate.method]
    if method.internal:
        raise MergeError(f"merge method {candidate.method!r} is a step of other methods, not one of its own")
    check_candidate(candidate, sorted(request.experts))
    check_without_model(candidate)
    if not (request.out or request.checkpoint):
        raise ConfigError("no output: give --out FILE, --checkpoint FOLDER, or both")
    if method.per_task and not request.out:
        raise ConfigError(
            f"{candidate.method} gives a unified adapter and a mask for each task: give --out FILE, and make the "
            "checkpoint of one task with `export FILE --mask MASK`"
        )
    if method.per_task and request.checkpoint:
        raise ConfigError(
            f"{candidate.method} needs the task's mask at inference, so one checkpoint cannot hold it: leave out "
            "--checkpoint, and make that of one task with `export FILE --mask MASK`"
        )
    if method.per_task and request.register_as:
        raise ConfigError(
            f"{candidate.method} needs the task's mask at inference, which a registered adapter has not: leave out "
            "--register"
        )
    if request.register_as and not (request.out or "").startswith("s3://"):
        raise ConfigError("--register needs the adapter in S3, which the registry refers to: give --out s3://…")
    shard_bytes(request.shard_gib)
    reductions = plan_reductions([candidate], len(request.experts))
    kind = _measurement(reductions)
    _check_measured_names(request, candidate.method, kind)
    out = output(request.out, "--out") if request.out else None
    checkpoint = output(request.checkpoint, "--checkpoint") if request.checkpoint else None
    _check_services(request, out, checkpoint)
    places = locate_experts(request.experts)
    measured_places = locate_measured(request.measurements[MEASUREMENTS[kind].given_by], kind) if kind else {}
    inputs = {f"expert {name!r}": place.uri for name, place in places.items()}
    inputs |= {f"{kind} of {name!r}": place.uri for name, place in measured_places.items()}
    inputs |= base_place(request.base)
    if out:
        check_file(out, inputs)
    if out and method.per_task:
        check_masks(out, request.experts, inputs)
    if checkpoint:
        check_folder(checkpoint, inputs | ({"--out": out.uri} if out else {}), "--checkpoint")
    base = prepare_base(request.base, cache_dir())
    cached = {"the cached base": str(base.path.resolve())}
    for place, option in ((out, "--out"), (checkpoint, "--checkpoint")):
        if place:
            check_apart(place, cached, option)
    experts = find_experts(places, base, scratch, base_names(base, request.base))
    measured = find_measured(measured_places, kind, experts, base.sha256) if kind else {}
    shapes = {name: shape for expert in experts for name, shape in expert.shapes.items()}
    fused = fused_rows(base.path, shapes) if candidate.splits_fused else {}
    wrapper = ""
    if request.register_as:
        from merge.by_hand.prompts import find_wrapper  # MLflow: seconds of imports, for this flag only

        wrapper = find_wrapper(places, base)
    return Checked(request, candidate, reductions, base, tuple(experts), measured, out, checkpoint, fused, wrapper)


def _measurement(reductions: Sequence[Reduction]) -> str | None:
    return next((each.spec.measurement for each in reductions if each.spec.measurement), None)


def _check_services(request: MergeRequest, out: Output | None, checkpoint: Output | None) -> None:
    """Whether what the merge writes to can be reached. Raises StoreError or RegistryError."""
    if request.register_as:
        from infra.registry import runs
        from infra.registry.models import check_model

        runs.check()
        check_model(request.register_as, request.register_as, REGISTERED_KIND)
    if request.store:
        Store.from_env().check()
    check_buckets((out, checkpoint))


def _numbers(params: Mapping[str, float | str]) -> dict[str, float | str]:
    """Parameters from a command line are text: what reads as a number is one."""

    def value(given: float | str) -> float | str:
        if isinstance(given, str):
            try:
                return float(given)
            except ValueError:
                return given
        return given

    return {name: value(given) for name, given in params.items()}


def _check_measured_names(request: MergeRequest, method: str, kind: str | None) -> None:
    """Files of a measurement are given for every expert of the methods that read it, and for no other method."""
    reads = MEASUREMENTS[kind].given_by if kind else None
    for option, given in request.measurements.items():
        if given and option != reads:
            raise ConfigError(f"merge method {method!r} reads no {option} files: leave out --{option}")
        if option != reads:
            continue
        if unknown := sorted(set(given) - set(request.experts)):
            raise ConfigError(
                f"--{option} names {unknown[0]!r}, which is not merged; experts: {_list(request.experts)}"
            )
        if lacking := sorted(set(request.experts) - set(given)):
            raise ConfigError(
                f"merge method {method!r} needs the {option} file of every expert; missing: {_list(lacking)} "
                f"(--{option} NAME=FILE)"
            )


def base_place(spec: str) -> dict[str, str]:
    """The base's own folder, where it has one, comparable with outputs: it must not be written over."""
    if not spec.startswith("path:"):
        return {}
    return {"the base": str(Path(spec.removeprefix("path:")).expanduser().resolve())}


def _list(names: Any) -> str:
    return ", ".join(sorted(names))


def fingerprint(checked: Checked) -> Checked:
    """The same with the SHA-256 of every input. Raises MergeError for one expert under two names."""
    experts = hash_experts(checked.experts)
    return replace(
        checked, experts=tuple(experts), measured=hash_measured(checked.measured, experts) if checked.measured else {}
    )


def record_of(checked: Checked) -> dict[str, Any]:
    """Everything that the merged adapter's bytes are a function of."""
    kind = checked.measurement
    more: dict[str, Any] = {
        "plan": "flat",
        "versions": ROOT_VERSIONS,
        "identities": {e.name: e.identity for e in checked.experts},
    }
    if checked.request.store:
        more |= {"plan": "tree", "tree": {"version": TREE_VERSION, "fan_in": DEFAULT_FAN_IN}}
    if METHODS[checked.candidate.method].per_task:
        more["mask_versions"] = {"mask": PER_TASK_VERSION, "file": MASK_FILE_VERSION}
    if kind:
        more |= {kind: {n: file.sha256 for n, file in checked.measured.items()}, "importance": IMPORTANCE_READ_VERSION}
    return record(checked.candidate.to_dict(), checked.base.sha256, checked.experts, **more)


def checkpoint_record_of(checked: Checked) -> dict[str, Any]:
    """Everything that the checkpoint's bytes are a function of."""
    request = checked.request
    return record_of(checked) | {
        "dtype": request.dtype,
        "shard_bytes": shard_bytes(request.shard_gib),
        "file": CHECKPOINT_VERSION,
    }


def mask_outputs(checked: Checked) -> dict[str, Output]:
    """Where each task's mask goes: beside the unified adapter. Empty for methods without task masks."""
    if not (checked.out and METHODS[checked.candidate.method].per_task):
        return {}
    return {expert.name: mask_beside(checked.out, expert.name) for expert in checked.experts}


def mask_beside(out: Output, task: str) -> Output:
    """The place of one task's mask; characters of its name that file systems may refuse become `-`."""
    return out.beside(f".{re.sub(r'[^A-Za-z0-9_.-]', '-', task)}.mask.safetensors")


def check_masks(out: Output, tasks: Iterable[str], inputs: Mapping[str, str]) -> None:
    """Raise ConfigError where two tasks' masks would be one file, or one an input or over something else."""
    owners: dict[str, str] = {}
    for task in sorted(tasks):
        place = mask_beside(out, task)
        check_mask(place, inputs, f"mask of {task!r}")
        if (other := owners.setdefault(place.uri, task)) != task:
            raise ConfigError(f"the masks of {other!r} and {task!r} would both be {place.given}; rename one")


# -- the plan --


def union_estimate(checked: Checked) -> int:
    """Positions in the union of the supports, if experts choose them independently of each other."""
    total = 0.0
    for name, shape in checked.shapes.items():
        numel = math.prod(shape)
        absent = math.prod(1 - expert.counts.get(name, 0) / numel for expert in checked.experts) if numel else 1.0
        total += numel * (1 - absent)
    return round(total)


def adapter_bytes_estimate(checked: Checked) -> int:
    """Bytes of the merged adapter: fp32 values, and a byte for each position or a bit for each weight."""
    positions = union_estimate(checked)
    numel = checked.union_elements
    if METHODS[checked.candidate.method].matrix:  # vectors are few
        positions = round(numel * number(checked.candidate.params, "density"))
    return positions * 4 + (0 if positions == numel else min(positions, numel // 8))


def checkpoint_bytes(checked: Checked) -> int:
    """Bytes of the checkpoint's tensors."""
    wanted = torch_dtype(checked.request.dtype)
    weights = CheckpointFiles.in_file(checked.base.path / WEIGHTS)
    return sum(
        math.prod(piece.shape) * (wanted if wanted and piece.dtype.is_floating_point else piece.dtype).itemsize
        for piece in map(weights.piece, weights.names)
    )


def torch_dtype(name: str | None) -> torch.dtype | None:
    """A checkpoint's type by name; None keeps those of the base."""
    return None if name is None else getattr(torch, name)
