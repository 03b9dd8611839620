"""The Gram matrices of an expert's inputs: of each adapted linear weight the sum of xᵀx over all tokens of all rows.

x is the module's input (RegMean, arXiv 2212.09849, equation 2). Rows go through the model one at a time, so nothing is
ever padded. Not covered: weights that are not those of linear modules.

The file holds of each weight [out, in] the fp32 sum [in, in], its upper triangle row by row. Weights that share one
input (query, key and value) share one stored piece.

Two further measurements hold the *mean* over tokens, so that an expert's weight does not grow with the length of its
prompts: `gram_tokens` over all of them, `gram_answers` over those that predict the answer. Their files take half the
bytes: they hold correlations in fp16, and the inputs' root mean squares in two parts, as good as fp32. The matrices
themselves in bf16 would change a merge by ten times as much (docs/performance.md), as a few inputs are far larger than
all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from infra.errors import AdapterError, ConfigError
from workers.base.hooks import swap_forward
from workers.measuring.file import MeasuredOn, MeasurementFile, MeasurementWriter
from workers.measuring.linear import linear_modules
from workers.measuring.measurement import Measurement, Needed, Subject
from workers.tensors.source import ByteSource

NAME, TOKENS, ANSWERS = "gram", "gram_tokens", "gram_answers"
TOGETHER = 256
"""Tokens whose products are added at once: those of short answers one row at a time would cost a pass over all sums."""
GRAM_BYTES = 2**31
"""Memory of the matrices that are summed at a time; for more of them the rows go through the model again."""


def measure(subject: Subject, file: Path, about: MeasuredOn) -> None:
    """Write the matrices of the adapted linear weights."""
    linear = _linear(subject)
    _write(GramWriter(file, about, linear), gram_matrices(subject.model, subject.losses, linear))


def measure_means(kind: str, subject: Subject, file: Path, about: MeasuredOn) -> None:
    """Write the means over tokens. Raises ConfigError where a classification is asked for its answers."""
    parts: list[Tensor] = []
    if kind == ANSWERS:
        parts = [loss.predicts for loss in subject.losses if loss.predicts is not None]
        if len(parts) < len(subject.losses):
            raise ConfigError("a label is no text, so that no tokens predict it: take the Gram matrices of all tokens")
    linear = _linear(subject)
    _write(GramWriter(file, about, linear, kind), gram_means(subject.model, subject.losses, linear, parts))


def _linear(subject: Subject) -> list[str]:
    modules = dict(subject.model.named_modules())
    return [n for n in subject.adapter.names if isinstance(modules.get(n.removesuffix(".weight")), nn.Linear)]


def _write(file: GramWriter, matrices: Iterator[tuple[list[str], Tensor]]) -> None:
    with file as writer:
        for names, matrix in matrices:
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
    for share in _shares(_shared_inputs(passes[0], modules), modules, limit, 8):
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


@torch.no_grad()
def gram_means(
    model: nn.Module,
    passes: Sequence[Callable[[], Any]],
    names: Sequence[str],
    parts: Sequence[Tensor] = (),
    limit: int = GRAM_BYTES,
) -> Iterator[tuple[list[str], Tensor]]:
    """As `gram_matrices`, the mean over tokens in fp32, in half the memory: products are added where they are made,
    of `TOGETHER` tokens or more at a time.

    `parts`: of each pass, which of its tokens count, bool [tokens]; none: all. Raises ConfigError for a module that
    sees the tokens in another order or number, where only a part is to count.
    """
    modules = linear_modules(model, names)
    for share in _shares(_shared_inputs(passes[0], modules), modules, limit, 4):
        means = {group[0]: _Mean() for group in share}

        def add(name: str, x: Tensor, to: Mapping[str, _Mean] = means) -> None:
            to[name].add(x)

        with _Observed({name: modules[name] for name in means}, add) as observed:
            for at, run in enumerate(passes):
                observed.part = parts[at] if parts else None
                run()
        for group in share:
            mean = means.pop(group[0]).result()
            if mean is not None:
                yield group, mean


class _Mean:
    """The mean of xᵀx over tokens, fp32."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._held = self._tokens = 0

    def add(self, x: Tensor) -> None:
        self._waiting.append(x.detach().reshape(-1, x.shape[-1]).float().clone())
        self._held += len(self._waiting[-1])
        if self._held >= TOGETHER:
            self._join()

    def _join(self) -> None:
        joined = torch.cat(self._waiting)
        if self._sum is None:
            self._sum = joined.t() @ joined
        else:
            self._sum.addmm_(joined.t(), joined)
        self._tokens, self._held, self._waiting = self._tokens + self._held, 0, []

    def result(self) -> Tensor | None:
        """None where there was no token."""
        if self._held:
            self._join()
        return None if self._sum is None else self._sum.div_(self._tokens)


def _shares(
    groups: list[list[str]], modules: Mapping[str, nn.Linear], limit: int, width: int
) -> Iterator[list[list[str]]]:
    """The groups in shares whose matrices, of `width` bytes an element, take at most `limit` bytes (one at least)."""
    share: list[list[str]] = []
    left = limit
    for group in groups:
        need = int(modules[group[0]].in_features) ** 2 * width
        if share and need > left:
            yield share
            share, left = [], limit
        share.append(group)
        left -= need
    if share:
        yield share


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
    """While entered, `observe(name, input)` is called at every use of the modules: with the tokens that `part`, bool
    [tokens], holds of the input (None: all)."""

    def __init__(self, modules: Mapping[str, nn.Linear], observe: Callable[[str, Tensor], None]) -> None:
        self._modules, self._observe = modules, observe
        self.part: Tensor | None = None
        self._undo: list[Callable[[], None]] = []

    def _forward(self, name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            self._observe(name, x if self.part is None else self._some(name, x, self.part))
            return nn.functional.linear(x, module.weight, module.bias)

        return forward

    @staticmethod
    def _some(name: str, x: Tensor, part: Tensor) -> Tensor:
        if x.ndim < 2 or x.numel() != part.numel() * x.shape[-1]:
            raise ConfigError(
                f"{name} is not shown each token once, so that those of the answer cannot be told: take the Gram "
                "matrices of all tokens"
            )
        return x.reshape(-1, x.shape[-1])[part.to(x.device)]

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._undo.append(swap_forward(module, self._forward(name, module)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._undo:
            self._undo.pop()()


class GramWriter:
    """Writes Gram matrices one after the other. `names`: all weights that may be added. A context manager."""

    def __init__(self, path: Path, meta: MeasuredOn, names: Sequence[str], kind: str = NAME) -> None:
        self._file, self._sums = MeasurementWriter(path, kind, meta, names), kind == NAME

    def add(self, names: Sequence[str], gram: Tensor) -> None:
        """Append the matrix [in, in] (floating point, symmetric up to rounding) of the inputs that `names` share."""
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not bool(torch.isfinite(gram).all()):
            raise AdapterError(f"{names[0]}: a Gram matrix must be [in, in] and finite, got shape {list(gram.shape)}")
        matrix = gram.detach().to("cpu", torch.float32)
        self._file.add(names, _pack(matrix) if self._sums else _pack_mean(matrix))

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


def _pack_mean(gram: Tensor) -> Tensor:
    """[n, n] with a diagonal that is not negative in fp16: the packed triangle of [n + 1, n + 1], whose first row is an
    exponent and the roots of the diagonal over two to it; below are the correlations, and in place of their diagonal
    what fp16 lacks of the roots, times 2048."""
    roots = gram.diagonal().clamp(min=0).double().sqrt()
    exponent = math.frexp(float(roots.max()))[1]
    parts = roots * 2.0**-exponent
    inverse = torch.where(roots > 0, 1 / roots, 0.0)
    packed = torch.zeros(len(gram) + 1, len(gram) + 1)
    packed[1:, 1:] = (gram * inverse * inverse[:, None]).clamp(-1, 1)
    packed[0, 0], packed[0, 1:] = exponent, parts.half().float()
    packed.diagonal()[1:] = (parts - packed[0, 1:]) * _LOW
    return _pack(packed).half()


def _unpack_mean(packed: Tensor, side: int) -> Tensor:
    """Inverse of `_pack_mean`; nothing finite where the numbers are none that it makes."""
    matrix = _unpack(packed, side + 1)
    exponent, high, low = float(matrix[0, 0]), matrix[0, 1:].double(), matrix.diagonal()[1:].double()
    roots = (high + low / _LOW) * 2.0 ** max(-_EXPONENTS, min(_EXPONENTS, exponent))
    whole = matrix[1:, 1:].double().fill_diagonal_(1).mul_(roots).mul_(roots[:, None])
    return whole.float()


_LOW = 2048.0
_EXPONENTS = 100
"""Most that a root's exponent is read as, so that hostile ones overflow nothing but the result."""


class GramReader:
    """Reads Gram matrices. ``names``: sorted, those of weights that share a matrix included; ``meta``."""

    def __init__(self, source: ByteSource, kind: str = NAME) -> None:
        self._sums = kind == NAME
        self._file = MeasurementFile(source, kind, torch.float32 if self._sums else torch.float16)
        self.names, self.meta = self._file.names, self._file.meta
        for name in self.names:
            count, side = self._file.count(name), self.side(name)
            held = side if self._sums else side + 1
            if side < 0 or held * (held + 1) // 2 != count:
                raise self._file.bad(f"{name:.100}: {count} values are no triangle of a matrix")

    def side(self, name: str) -> int:
        """``in`` of a weight [out, in]."""
        return _side(self._file.count(name)) - (not self._sums)

    def load(self, name: str) -> Tensor:
        """fp32 [in, in], symmetric, its diagonal not negative."""
        unpack = _unpack if self._sums else _unpack_mean
        matrix = unpack(self._file.values(name), self.side(name))
        if not bool(torch.isfinite(matrix).all()):
            raise self._file.bad(f"{name}: a value is not finite")
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


def needed_for_means(shapes: Mapping[str, tuple[int, int]], trainable: int) -> Needed:
    """In fp32, a share at a time, with the tokens that wait; half of each in fp16 in the file."""
    sides = [shape[1] for shape in shapes.values()]
    squares, waiting = sum(side**2 for side in sides), TOGETHER * sum(sides)
    return Needed(min(4 * squares, GRAM_BYTES) + 8 * waiting, sum((side + 2) ** 2 for side in sides))


def _means(kind: str, title: str) -> Measurement:
    measured, opened = partial(measure_means, kind), partial(GramReader, kind=kind)
    return Measurement(kind, title, 1, measured, opened, needed_for_means, option=NAME)


GRAM = Measurement(NAME, "Gram", 1, measure, GramReader, needed)
GRAM_TOKENS, GRAM_ANSWERS = _means(TOKENS, "Gram of tokens"), _means(ANSWERS, "Gram of answers")
