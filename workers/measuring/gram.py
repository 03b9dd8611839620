"""The Gram matrices of an expert's inputs: of each adapted linear weight the sum of xᵀx over all tokens of all rows.

x is the module's input (RegMean, arXiv 2212.09849, equation 2). Rows go through the model one at a time, so nothing is
ever padded. Not covered: weights that are not those of linear modules.

The file holds of each weight [out, in] the fp32 sum [in, in], its upper triangle row by row. Weights that share one
input (query, key and value) share one stored piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from infra.errors import AdapterError
from workers.base.hooks import swap_forward
from workers.measuring.file import MeasuredOn, MeasurementFile, MeasurementWriter
from workers.measuring.linear import linear_modules
from workers.measuring.measurement import Measurement, Needed, Subject
from workers.tensors.source import ByteSource

NAME = "gram"
GRAM_BYTES = 2**31
"""Memory of the matrices that are summed at a time; for more of them the rows go through the model again."""


def measure(subject: Subject, file: Path, about: MeasuredOn) -> None:
    """Write the matrices of the adapted linear weights."""
    modules = dict(subject.model.named_modules())
    linear = [n for n in subject.adapter.names if isinstance(modules.get(n.removesuffix(".weight")), nn.Linear)]
    with GramWriter(file, about, linear) as writer:
        for names, matrix in gram_matrices(subject.model, subject.losses, linear):
            writer.add(names, matrix)
        writer.close()


@torch.no_grad()
def gram_matrices(
    model: nn.Module, passes: Sequence[Callable[[], Any]], names: Sequence[str], limit: int = GRAM_BYTES
) -> Iterator[tuple[list[str], Tensor]]:
    """(weights that share one input, sum of xᵀx [in, in] in float64) over all tokens of all `passes`.

    Every pass runs the model forward on inputs without padding. Products are fp32, sums float64; the matrices that
    are summed at a time take at most `limit` bytes (one at least), and the passes run once for each such share. Weights
    whose module no pass uses are left out.
    """
    modules = linear_modules(model, names)
    pending = _shared_inputs(passes[0], modules)
    while pending:
        share, left = [pending.pop(0)], limit
        left -= _bytes(modules, share[0])
        while pending and _bytes(modules, pending[0]) <= left:
            left -= _bytes(modules, pending[0])
            share.append(pending.pop(0))
        sums: dict[str, Tensor] = {}

        def add(name: str, x: Tensor, sums: dict[str, Tensor] = sums) -> None:
            flat = x.reshape(-1, x.shape[-1]).float()
            product = flat.t() @ flat
            if name in sums:
                sums[name].add_(product)
            else:
                sums[name] = product.double()

        with _Observed({group[0]: modules[group[0]] for group in share}, add):
            for run in passes:
                run()
        for group in share:
            if group[0] in sums:
                yield group, sums.pop(group[0])


def _bytes(modules: Mapping[str, nn.Linear], group: Sequence[str]) -> int:
    return int(modules[group[0]].in_features) ** 2 * 8


def _shared_inputs(run: Callable[[], Any], modules: Mapping[str, nn.Linear]) -> list[list[str]]:
    """The names in groups whose modules get the very same tensors as inputs in one pass."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}  # the tensors live, so that their ids are unique
    with _Observed(modules, lambda name, x: seen[name].append(x)):
        run()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, inputs in seen.items():
        groups.setdefault(tuple(map(id, inputs)) or (name,), []).append(name)
    return list(groups.values())


class _Observed:
    """While entered, `observe(name, input)` is called at every use of the modules."""

    def __init__(self, modules: Mapping[str, nn.Linear], observe: Callable[[str, Tensor], None]) -> None:
        self._modules, self._observe = modules, observe
        self._undo: list[Callable[[], None]] = []

    def _forward(self, name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            self._observe(name, x)
            return nn.functional.linear(x, module.weight, module.bias)

        return forward

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            self._undo.append(swap_forward(module, self._forward(name, module)))

    def __exit__(self, *error: object) -> None:
        while self._undo:
            self._undo.pop()()


class GramWriter:
    """Writes Gram matrices one after the other. `names`: all weights that may be added. A context manager."""

    def __init__(self, path: Path, meta: MeasuredOn, names: Sequence[str]) -> None:
        self._file = MeasurementWriter(path, NAME, meta, names)

    def add(self, names: Sequence[str], gram: Tensor) -> None:
        """Append the matrix [in, in] (floating point, symmetric up to rounding) of the inputs that `names` share."""
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not bool(torch.isfinite(gram).all()):
            raise AdapterError(f"{names[0]}: a Gram matrix must be [in, in] and finite, got shape {list(gram.shape)}")
        self._file.add(names, _pack(gram.detach().to("cpu", torch.float32)))

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.discard()


def _pack(matrix: Tensor) -> Tensor:
    """The upper triangle of [n, n], row by row: [n (n + 1) / 2]."""
    return torch.cat([torch.empty(0), *(row[at:] for at, row in enumerate(matrix.unbind()))])


def _unpack(packed: Tensor, side: int) -> Tensor:
    """Inverse of `_pack` for a symmetric matrix."""
    matrix = torch.empty(side, side, dtype=packed.dtype)
    for at, row in enumerate(packed.split(list(range(side, 0, -1)))):
        matrix[at, at:] = row
        matrix[at:, at] = row
    return matrix


class GramReader:
    """Reads Gram matrices. ``names``: sorted, those of weights that share a matrix included; ``meta``."""

    def __init__(self, source: ByteSource) -> None:
        self._file = MeasurementFile(source, NAME, torch.float32)
        self.names, self.meta = self._file.names, self._file.meta
        for name in self.names:
            count, side = self._file.count(name), self.side(name)
            if side * (side + 1) // 2 != count:
                raise self._file.bad(f"{name:.100}: {count} values are no triangle of a matrix")

    def side(self, name: str) -> int:
        """``in`` of a weight [out, in]."""
        return _side(self._file.count(name))

    def load(self, name: str) -> Tensor:
        """fp32 [in, in], symmetric, its diagonal not negative."""
        matrix = _unpack(self._file.values(name), self.side(name))
        if bool((matrix.diagonal() < 0).any()):
            raise self._file.bad(f"{name}: its diagonal has a negative value")
        return matrix

    def misfit(self, name: str, shape: Sequence[int], count: int) -> str | None:
        """A weight may have no matrix; one that it has must be of its inputs."""
        if name not in self._file or (len(shape) == 2 and self.side(name) == shape[1]):
            return None
        return f"its matrix of {name} has side {self.side(name)}, the weight has shape {list(shape)}"


def _side(count: int) -> int:
    """n of n (n + 1) / 2 = count, rounded down."""
    return (math.isqrt(8 * count + 1) - 1) // 2


def needed(shapes: Mapping[str, tuple[int, int]], trainable: int) -> Needed:
    """In double precision, a share at a time; half of each in fp32 in the file. Weights that share an input share a
    matrix, so it is less."""
    squares = sum(shape[1] ** 2 for shape in shapes.values())
    return Needed(min(8 * squares, GRAM_BYTES), 2 * squares)


GRAM = Measurement(NAME, "Gram", 1, measure, GramReader, needed)
