"""Where a merged δ goes, tensor by tensor: what every writer of one has in common. Writers are `merge.files.merged` and
`merge.files.checkpoint_writer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.adapters.support import SparseTensor


@dataclass(frozen=True)
class Outline:
    """What is about to be written, known from headers: the base, the tensors' shapes by sorted name (those of the
    whole merge, also where one part of it is written), and JSON about how it is made."""

    base_sha256: str
    shapes: Mapping[str, tuple[int, ...]]
    info: Mapping[str, Any]


class Sink(Protocol):
    """Takes one merged δ: `open`, `add` for each tensor in the order of names, `finish`, `publish`; or `abort`.

    Finishing and publishing are two steps so that of several sinks none publishes before all have finished.
    """

    def open(self, outline: Outline) -> None:
        """Prepare for these tensors. Raises MergeError where they cannot be written there."""

    def add(self, name: str, tensor: SparseTensor, support: tuple[str, Tensor] | None = None) -> None:
        """Take one tensor. `support` is its `encode_support`, where the caller has it already."""

    def finish(self) -> None:
        """Complete everything that can fail."""

    def publish(self) -> None:
        """Give what was finished its final name: only now anything exists there."""

    def abort(self) -> None:
        """Leave nothing behind; harmless after `publish` and when repeated."""

    @property
    def bytes_written(self) -> int:
        """Size of what was written, once it is published."""


class Tee:
    """One δ into several sinks."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        """The first one's bytes are those reported."""
        self._sinks = tuple(sinks)

    def open(self, outline: Outline) -> None:
        for sink in self._sinks:
            sink.open(outline)

    def add(self, name: str, tensor: SparseTensor, support: tuple[str, Tensor] | None = None) -> None:
        for sink in self._sinks:
            sink.add(name, tensor, support)

    def finish(self) -> None:
        for sink in self._sinks:
            sink.finish()

    def publish(self) -> None:
        for sink in self._sinks:
            sink.publish()

    def abort(self) -> None:
        for sink in self._sinks:
            sink.abort()

    @property
    def bytes_written(self) -> int:
        return self._sinks[0].bytes_written


def squared_norm(x: Tensor) -> float:
    """‖x‖², summed in double precision."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
