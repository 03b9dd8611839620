"""Whether the merging benchmark's cases give the same merge: outputs compared position by position.

Two programs that add the same numbers in another order differ by rounding. TIES can differ by more where the sign it
elects hangs on that rounding; those positions are counted, and the sum of the experts' δ there is computed in double
precision from the adapters, which shows how close to zero it was. Does not cover anything but fp32 outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.merging_cases import Setup
from benchmarks.merging_inputs import SUPPORT, dense
from workers.adapters.writer import AdapterReader
from workers.tensors.source import FileSource

ROUNDING = 1e-6
"""Outputs further apart than this differ by more than rounding: δ are around 1e-3, an ulp of a weight 4e-9."""
PAIRS = (
    ("ours_full", "mergekit_ties"),
    ("ours_adapters", "mergekit_ties"),
    ("ours_adapters", "peft_ties"),
    ("ours_tree", "ours_adapters"),
    ("ours_full_untrimmed", "mergekit_ties_untrimmed"),
    ("ours_adapters_untrimmed", "peft_ties_untrimmed"),
    ("ours_full_linear", "mergekit_linear"),
    ("ours_adapters_mean", "mergekit_linear"),
)
"""Pairs in which one side is a checkpoint compare base + δ rounded once, the others δ."""


@dataclass(frozen=True)
class Comparison:
    """Two outputs. `different`: positions whose bits differ; `apart`: those that differ by more than ROUNDING, with
    the largest |Σδ| among them (None without any); `largest`: the largest difference among the others."""

    one: str
    other: str
    positions: int
    different: int
    largest: float
    apart: int
    sum_there: float | None


Load = Callable[[str], Tensor]


def compare_outputs(setup: Setup, names: list[str]) -> list[Comparison]:
    """All pairs of which both outputs are there."""
    return [_compare(setup, one, other) for one, other in PAIRS if one in names and other in names]


def _compare(setup: Setup, one: str, other: str) -> Comparison:
    whole = any(_is_checkpoint(setup.out(name)) for name in (one, other))
    adapters = [AdapterReader(FileSource(path)) for path in setup.adapters().values()]
    whole_support = "untrimmed" in one or setup.density >= SUPPORT
    first, second = _loader(setup, one, whole), _loader(setup, other, whole)
    positions = different = apart = 0
    largest, sums = 0.0, []
    names = list(_checkpoint_names(setup.base())) if whole else adapters[0].names
    for name in names:
        a, b = first(name), second(name)
        gap = (a - b).abs()
        far = gap > ROUNDING
        positions += gap.numel()
        different += int((a != b).sum())
        apart += int(far.sum())
        largest = max(largest, float(gap[~far].max()) if not bool(far.all()) else 0.0)
        if bool(far.any()) and whole_support:
            total = sum(dense(reader.load(name)).double() for reader in adapters)
            sums.append(float(torch.as_tensor(total)[far].abs().max()))
    return Comparison(one, other, positions, different, largest, apart, max(sums, default=None))


def _loader(setup: Setup, name: str, whole: bool) -> Load:
    """One tensor of an output by its name; base + δ if `whole`."""
    path = setup.out(name)
    if _is_checkpoint(path):
        return _checkpoint(path)
    if name.startswith("peft"):
        return _checkpoint(path)
    reader = AdapterReader(FileSource(path))
    if not whole:
        return lambda tensor: dense(reader.load(tensor))
    base, adapted = _checkpoint(setup.base()), set(reader.names)
    return lambda tensor: base(tensor) + dense(reader.load(tensor)) if tensor in adapted else base(tensor)


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir()


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _checkpoint_names(path: Path) -> Iterator[str]:
    for file in _files(path):
        with safe_open(file, framework="pt") as opened:
            yield from opened.keys()


def _checkpoint(path: Path) -> Load:
    opened = [safe_open(file, framework="pt") for file in _files(path)]
    where = {name: each for each in opened for name in each.keys()}  # noqa: SIM118 (not a dict)
    return lambda name: where[name].get_tensor(name)
