"""What a merge needs of an expert's δ, whatever it is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from workers.adapters.support import SparseTensor


class DeltaReader(Protocol):
    """An expert's δ, tensor by tensor: `merge.files.merged.AdapterDelta` or
    `merge.files.checkpoint_writer.CheckpointDelta`.

    `base_sha256` is the base it is a difference from; `identity` names its content (it seeds random choices).
    """

    base_sha256: str
    identity: str

    @property
    def names(self) -> Sequence[str]:
        """Tensors that have a δ, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""

    def count(self, name: str) -> int:
        """How many positions `load` returns."""

    def load(self, name: str) -> SparseTensor:
        """One tensor's δ, fp32. Called from several threads."""
