"""The kinds of experts, and the one interface through which the training loop sees each of them.

`sparse` changes a share of the adapted modules' weights (`workers.masks.spec`), `full` all of them (the same in-place
training on every position), `lora` adds low-rank factors (`workers.training.lora`). Embeddings, norms and the output
layer stay frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from infra.errors import ConfigError
from workers.adapters.support import SparseTensor, SupportSpec
from workers.adapters.writer import LowRank
from workers.base.modules import Target, find_targets
from workers.masks.spec import MaskSpec
from workers.training.devices import attach


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adaptation (arXiv 2106.09685): delta = alpha / rank * B @ A in every module that `modules` names."""

    modules: str
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora rank {self.rank}: accepted is 1 or more")
        if self.alpha < 1:
            raise ConfigError(f"lora alpha {self.alpha}: accepted is 1 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora dropout {self.dropout}: accepted is from 0 to less than 1")


@dataclass(frozen=True)
class FullSpec:
    """Every weight of the modules that `modules` names is trained."""

    modules: str


ExpertSpec = MaskSpec | LoraSpec | FullSpec


class Trainable(Protocol):
    """What the training loop needs of an adapter that is attached to a model."""

    def parameters(self) -> list[nn.Parameter]: ...
    def zero_grad(self) -> None: ...
    def write_back(self) -> None:
        """Make the last optimizer step take effect in the model."""
        ...

    def snapshot(self) -> Any:
        """A copy of the trained values that later steps do not change."""
        ...

    def delta(self, snapshot: Any = None) -> Mapping[str, SparseTensor | LowRank]:
        """The change of each parameter, now or at a snapshot, on the CPU."""
        ...

    def state(self, snapshot: Any = None) -> dict[str, torch.Tensor]:
        """All that `load_state` needs to go on, or `read_snapshot` to have a snapshot again."""
        ...

    def read_snapshot(self, tensors: Mapping[str, torch.Tensor]) -> Any: ...

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None: ...
    def restore(self) -> None:
        """Detach, and put the model back bit for bit."""
        ...


def kind_name(spec: ExpertSpec) -> str:
    """The word for this kind of expert: sparse, lora or full."""
    return {MaskSpec: "sparse", LoraSpec: "lora", FullSpec: "full"}[type(spec)]


def check_whole(name: str, target: Target, modules: str) -> None:
    """Low-rank factors change a whole weight: `ConfigError` if only some of its rows are meant."""
    if target.rows is not None:
        raise ConfigError(
            f"modules {modules!r} means only some rows of {name}, which joins several projections; low-rank factors "
            "change all of them: choose a wider preset or an expression"
        )


def stored_values(change: SparseTensor | LowRank) -> int:
    """Numbers that a change is made of."""
    return change.a.numel() + change.b.numel() if isinstance(change, LowRank) else change.values.numel()


def change_norm(change: SparseTensor | LowRank) -> float:
    """L2 norm of a change."""
    if isinstance(change, LowRank):  # without the product: |BA|^2 = trace of (B^T B)(A A^T)
        a, b = change.a.double(), change.b.double()
        return abs(change.scale) * math.sqrt(max(0.0, float(((b.t() @ b) * (a @ a.t())).sum())))
    return float(change.values.double().norm())


def every_row(model: nn.Module, spec: FullSpec) -> dict[str, SupportSpec]:
    """Supports that hold every position that may be changed, as rows."""
    supports = {}
    for name, target in find_targets(model, spec.modules).items():
        rows, columns = target.module.weight.shape
        chosen = torch.arange(target.first, target.first + target.shape[0])
        supports[name] = SupportSpec((rows, columns), chosen, (1, columns))
    return supports


def make_adapter(model: nn.Module, spec: ExpertSpec, supports: Mapping[str, SupportSpec]) -> Trainable:
    """Attach an adapter of the spec's kind; `supports` are those of a sparse one."""
    if isinstance(spec, LoraSpec):
        from workers.training.lora import LoraAdapter  # PEFT takes a second to import

        return LoraAdapter(model, spec)
    if isinstance(spec, FullSpec):
        return attach(model, every_row(model, spec))
    return attach(model, supports)
