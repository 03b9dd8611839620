"""A merge by hand from a request to a plan: everything that can be refused is refused here, from headers alone.

Not here: making it (`pipeline.merge_run`), the commands and what they print (`pipeline.merge_command`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, MergeError
from merge.checkpoint_file import CHECKPOINT_VERSION
from merge.mask_file import MASK_FILE_VERSION
from merge.methods import METHODS
from merge.per_task import PER_TASK_VERSION
from merge.reduce import ROOT_VERSIONS
from merge.specs import Candidate, Reduction, check_weights, plan_reductions
from pipeline.merge_inputs import Expert, Extra, find_experts, find_extras, hash_experts, hash_extras
from pipeline.merge_outputs import Output, check_apart, check_file, check_folder, output, record
from pipeline.merge_request import MergeRequest
from workers.base import PreparedBase, prepare_base
from workers.cache import cache_dir
from workers.tensorfile import DTYPES, WEIGHTS, list_entries


@dataclass(frozen=True)
class Checked:
    """A request whose every part was found to fit; nothing but headers was read."""

    request: MergeRequest
    candidate: Candidate
    reductions: tuple[Reduction, ...]
    base: PreparedBase
    experts: tuple[Expert, ...]
    extras: Mapping[str, Extra]
    out: Output | None
    checkpoint: Output | None

    @property
    def extra_kind(self) -> str | None:
        """`fisher` or `gram`, where the method needs such files."""
        return next((r.spec.extra for r in self.reductions if r.spec.extra), None)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that some expert changes."""
        return dict(sorted((name, shape) for expert in self.experts for name, shape in expert.shapes.items()))

    @property
    def union_elements(self) -> int:
        """Elements of those tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def heads(self) -> list[str]:
        """Experts whose classification head stays behind."""
        return [expert.name for expert in self.experts if expert.head]


def check(request: MergeRequest, scratch: Path) -> Checked:
    """Everything that can be refused without reading a tensor, cheapest first.

    Raises FactoryError: ConfigError, MergeError, AdapterError, BaseModelError, StoreError or RegistryError.
    """
    candidate = Candidate(request.method, _numbers(request.params), request.weights or None)
    method = METHODS[candidate.method]
    if method.internal:
        raise MergeError(f"merge method {candidate.method!r} is a step of other methods, not one of its own")
    check_weights(candidate, sorted(request.experts))
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
    if request.register_as and not (request.out or "").startswith("s3://"):
        raise ConfigError("--register needs the adapter in S3, which the registry refers to: give --out s3://…")
    reductions = plan_reductions([candidate])
    extra_kind = next((r.spec.extra for r in reductions if r.spec.extra), None)
    _check_extra_names(request, candidate.method, extra_kind)
    base = prepare_base(request.base, cache_dir())
    experts = find_experts(request.experts, base, scratch)
    extras = find_extras(request.fisher or request.gram, extra_kind, experts, base.sha256) if extra_kind else {}
    inputs = _uris(request, base, experts) | {
        f"{kind} of {n}": e.place.uri for kind, n, e in _named(extra_kind, extras)
    }
    out = output(request.out, "--out") if request.out else None
    checkpoint = output(request.checkpoint, "--checkpoint") if request.checkpoint else None
    if out:
        check_file(out, inputs)
    if out and method.per_task:
        check_masks(out, experts, inputs)
    if checkpoint:
        check_folder(checkpoint, inputs | ({"--out": out.uri} if out else {}), "--checkpoint")
    return Checked(request, candidate, reductions, base, tuple(experts), extras, out, checkpoint)


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


def _check_extra_names(request: MergeRequest, method: str, kind: str | None) -> None:
    """Fisher and Gram files are given for every expert of the methods that need them, and for no other method."""
    for option, given in (("fisher", request.fisher), ("gram", request.gram)):
        if given and option != kind:
            raise ConfigError(f"merge method {method!r} reads no {option} files: leave out --{option}")
        if option != kind:
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


def _uris(request: MergeRequest, base: PreparedBase, experts: Sequence[Expert]) -> dict[str, str]:
    """Inputs by name, comparable with outputs: neither must be written over."""
    uris = {f"expert {expert.name!r}": expert.place.uri for expert in experts}
    uris["the cached base"] = str(base.path.resolve())
    if request.base.startswith("path:"):
        uris["the base"] = str(Path(request.base.removeprefix("path:")).expanduser().resolve())
    return uris


def _named(kind: str | None, extras: Mapping[str, Extra]) -> list[tuple[str, str, Extra]]:
    return [(str(kind), name, extra) for name, extra in extras.items()]


def _list(names: Any) -> str:
    return ", ".join(sorted(names))


def fingerprint(checked: Checked) -> Checked:
    """The same with the SHA-256 of every input. Raises MergeError for one expert under two names."""
    experts = hash_experts(checked.experts)
    return replace(
        checked, experts=tuple(experts), extras=hash_extras(checked.extras, experts) if checked.extras else {}
    )


def record_of(checked: Checked) -> dict[str, Any]:
    """Everything that the merged adapter's bytes are a function of."""
    kind = checked.extra_kind
    more: dict[str, Any] = {"versions": ROOT_VERSIONS, "identities": {e.name: e.identity for e in checked.experts}}
    if METHODS[checked.candidate.method].per_task:
        more["mask_versions"] = {"mask": PER_TASK_VERSION, "file": MASK_FILE_VERSION}
    if kind:
        more[kind] = {name: extra.sha256 for name, extra in checked.extras.items()}
    return record(checked.candidate.to_dict(), checked.base.sha256, checked.experts, **more)


def checkpoint_record_of(checked: Checked) -> dict[str, Any]:
    """The same of the checkpoint's."""
    request = checked.request
    return record_of(checked) | {
        "dtype": request.dtype,
        "shard_bytes": shard_bytes(request),
        "file": CHECKPOINT_VERSION,
    }


def shard_bytes(request: MergeRequest) -> int:
    """Largest size of one of the checkpoint's files."""
    return int(request.shard_gib * 2**30)


def mask_outputs(checked: Checked) -> dict[str, Output]:
    """Where each task's mask goes: beside the unified adapter. Empty for methods without task masks."""
    if not (checked.out and METHODS[checked.candidate.method].per_task):
        return {}
    return {expert.name: mask_beside(checked.out, expert.name) for expert in checked.experts}


def mask_beside(out: Output, task: str) -> Output:
    """The place of one task's mask; characters of its name that file systems may refuse become `-`."""
    return out.beside(f".{re.sub(r'[^A-Za-z0-9_.-]', '-', task)}.mask.safetensors")


def check_masks(out: Output, experts: Sequence[Expert], inputs: Mapping[str, str]) -> None:
    """Raise ConfigError where two tasks' masks would be one file, or one an input."""
    owners: dict[str, str] = {}
    for expert in experts:
        place = mask_beside(out, expert.name)
        check_apart(place, inputs, f"mask of {expert.name!r}")
        if (other := owners.setdefault(place.uri, expert.name)) != expert.name:
            raise ConfigError(f"the masks of {other!r} and {expert.name!r} would both be {place.given}; rename one")


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
    return positions * 4 + (0 if positions == numel else min(positions, numel // 8))


def checkpoint_bytes(checked: Checked) -> int:
    """Bytes of the checkpoint's tensors."""
    wanted = _SAFETENSORS[checked.request.dtype] if checked.request.dtype else None
    return sum(
        math.prod(entry.shape) * DTYPES[wanted if wanted and entry.floating else entry.dtype].itemsize
        for entry in list_entries(checked.base.path / WEIGHTS)
    )


_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
