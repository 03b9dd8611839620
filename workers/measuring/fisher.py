"""The diagonal of an expert's empirical Fisher matrix on its support.

The mean over rows of (∂ log p(answer | input) / ∂w)² (arXiv 2111.09832, section 3.2), on the adapter's support only;
for LoRA and full experts on every adapted position. Rows go through the model one at a time, so that a squared gradient
is exactly that row's, and nothing is ever padded. Not covered: weights that are not those of linear modules, and
modules that are used several times in one pass.

The file holds of each adapted weight the bf16 values [n] of its n support positions, in the adapter's own order (the
exponents of fp32 at half its bytes; a rounding of 0.4 %, where the mean over some hundred rows is known to several
percent), and the L2 norm of all stored values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from infra.errors import AdapterError
from workers.adapters.reader import AdapterReader
from workers.base.modules import Target
from workers.masks.criteria import Loss, score_scan
from workers.measuring.file import MeasuredOn, MeasurementFile, MeasurementWriter
from workers.measuring.linear import linear_modules
from workers.measuring.measurement import Measurement, Needed, Subject
from workers.tensors.source import ByteSource

NAME = "fisher"
FLOOR = 1e-6
"""Least value that :meth:`FisherReader.load` returns: no position of a support is without weight."""
_MAX_NORM = 1e60  # any number of the largest values of bf16


def measure(subject: Subject, file: Path, about: MeasuredOn) -> None:
    """Write the diagonal on the adapter's support."""
    reader = subject.adapter
    with FisherWriter(file, about, reader.names) as writer:
        diagonal = fisher_diagonal(subject.model, subject.losses, {n: positions(reader, n) for n in reader.names})
        for name in reader.names:
            writer.add(name, diagonal.pop(name))
        writer.close()


def positions(reader: AdapterReader, name: str) -> Tensor | None:
    """Flat positions int64 [n] of a weight's support; None for every position."""
    if reader.count(name) == torch.Size(reader.shape(name)).numel():
        return None
    return reader.load(name).indices


def fisher_diagonal(
    model: nn.Module, losses: Sequence[Loss], supports: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """The mean over `losses` (each of one row) of the squared gradient, per weight on its support.

    `supports`: parameter name to sorted flat positions int64 [n], None for all. Returns fp32 [n] on the weights'
    devices. Takes 4 bytes for each position, 4 for its place, and one layer's dense gradient at a time.
    """
    modules = linear_modules(model, supports)
    targets = {name.removesuffix(".weight"): Target(module) for name, module in modules.items()}
    places, sums = {}, {}
    for name, indices in supports.items():
        weight = modules[name].weight
        small = torch.int32 if weight.numel() < 2**31 else torch.int64
        places[name] = None if indices is None else indices.to(weight.device, small)
        count = weight.numel() if indices is None else indices.numel()
        sums[name] = torch.zeros(count, dtype=torch.float32, device=weight.device)

    def add(module: str, gradient: Tensor) -> None:
        """`gradient`: absolute values [out, in]; their squares are those of the gradient."""
        place, total = places[f"{module}.weight"], sums[f"{module}.weight"]
        found = gradient.view(-1) if place is None else gradient.view(-1).index_select(0, place)
        total.addcmul_(found, found)

    for loss in losses:
        score_scan(model, targets, "gradient", [loss])(add)
    return {name: total.div_(len(losses)) for name, total in sums.items()}


class FisherWriter:
    """Writes Fisher values tensor by tensor. `names`: all weights that may be added. A context manager."""

    def __init__(self, path: Path, meta: MeasuredOn, names: Sequence[str]) -> None:
        self._file = MeasurementWriter(path, NAME, meta, names, ["norm"])
        self._square = 0.0

    def add(self, name: str, values: Tensor) -> None:
        """Append one weight's values: floating point [n], finite and not negative, in the adapter's order."""
        stored = values.detach().to("cpu", torch.bfloat16)
        if stored.ndim != 1 or not bool((torch.isfinite(stored) & (stored >= 0)).all()):
            raise AdapterError(f"{name}: Fisher values must be [n], finite in bf16 and not negative")
        self._square += float(stored.double().square().sum())
        self._file.add([name], stored)

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._file.close(norm=math.sqrt(self._square))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.discard()


class FisherReader:
    """Reads Fisher values. ``names``: sorted; ``meta``; ``norm``: L2 norm of all stored values."""

    def __init__(self, source: ByteSource) -> None:
        self._file = MeasurementFile(source, NAME, torch.bfloat16)
        self.names, self.meta = self._file.names, self._file.meta
        norm = self._file.content.get("norm")
        if type(norm) not in (int, float) or not 0 <= norm <= _MAX_NORM:  # type: ignore[operator]
            raise self._file.bad(f"its norm is no number from 0 to {_MAX_NORM}")
        self.norm = float(norm)  # type: ignore[arg-type]

    def count(self, name: str) -> int:
        """Number of values of a weight: that of the adapter's support."""
        return self._file.count(name)

    def load(self, name: str) -> Tensor:
        """fp32 [n]: the values divided by ``norm``, at least ``FLOOR``; all ``FLOOR`` where every value is zero."""
        values = self._file.values(name)
        if values.numel() and (float(values.min()) < 0 or float(values.max()) > self.norm * (1 + 1e-6)):
            raise self._file.bad(f"{name}: a value is negative or larger than the norm {self.norm}")
        # fp64: of the smallest norms the reciprocal, of the smallest values the quotient would be lost
        return (values.double() / (self.norm or 1.0)).clamp_(min=FLOOR).to(torch.float32)

    def misfit(self, name: str, shape: Sequence[int], count: int) -> str | None:
        """A value is needed for each position of every weight."""
        if name not in self._file:
            return f"it has no values for {name}, which the expert changes"
        found = self.count(name)
        return None if found == count else f"it has {found} values for {name}, the expert's support has {count}"


def needed(shapes: Mapping[str, tuple[int, int]], trainable: int) -> Needed:
    """4 bytes for each position and 4 for its place; 2 in the file."""
    return Needed(8 * trainable, 2 * trainable)


FISHER = Measurement(NAME, "Fisher", 1, measure, FisherReader, needed)
