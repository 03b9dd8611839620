"""What a measurement of an expert is: one object that says all that the rest needs to know of it.

A measurement is made of a finished expert on training rows of its own task, kept as an artifact of its own beside it
(asking for one later retrains nothing), and read by the lift of merge methods. The table of all is
`workers.measuring.catalogue`; the job that makes one is `workers.jobs.measurement`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from workers.adapters.reader import AdapterReader
from workers.masks.criteria import Loss
from workers.measuring.file import MeasuredOn
from workers.tensors.source import ByteSource


@dataclass(frozen=True)
class RowLoss:
    """The summed loss of one row: called, the model runs on that row alone. `predicts` bool [tokens]: at which of its
    tokens the answer is predicted; None for a label, which is no text."""

    run: Loss
    predicts: Tensor | None = None

    def __call__(self) -> Tensor:
        return self.run()


@dataclass(frozen=True)
class Subject:
    """What is measured: a model at W + δ in fp32, the loss of each row, and the adapter that δ is from."""

    model: nn.Module
    losses: Sequence[RowLoss]
    adapter: AdapterReader


class Measured(Protocol):
    """An opened file. `names`: sorted names of the weights that it has something of."""

    names: list[str]
    meta: MeasuredOn

    def load(self, name: str) -> Tensor:
        """What was measured of one weight. Raises AdapterError for damaged data."""
        ...

    def misfit(self, name: str, shape: Sequence[int], count: int) -> str | None:
        """Why this is not of an expert whose weight `name` has this shape and `count` positions, from the header alone;
        None: it may be."""
        ...


@dataclass(frozen=True)
class Needed:
    """Upper bounds, in bytes, for one expert."""

    memory: int
    """Of the sums while it is measured."""
    file: int


@dataclass(frozen=True)
class Measurement:
    """One kind of measurement."""

    name: str
    """The kind of its artifacts and the label of their file."""
    title: str
    """For people."""
    version: int
    """Part of the key: raise it whenever the same inputs would give other numbers."""
    measure: Callable[[Subject, Path, MeasuredOn], None]
    """Write the file. Raises AdapterError, ConfigError or ExpertError where the expert cannot be measured."""
    open: Callable[[ByteSource], Measured]
    """Reads the header. Raises AdapterError for anything else than a sound file."""
    needed: Callable[[Mapping[str, tuple[int, int]], int], Needed]
    """Of an expert with `trainable` values in weights of these shapes [out, in]."""
    option: str = ""
    """The option of `python -m merge` that gives its files, where that is not its name."""

    @property
    def given_by(self) -> str:
        """That option."""
        return self.option or self.name
