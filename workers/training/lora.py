"""Low-rank experts: PEFT's LoRA layers put into the model, trained, taken out again.

PEFT owns layers, initialisation and forward passes; this module gives them the interface of
`workers.training.kinds.Trainable`. Factors are fp32 whatever the weights are. Not covered: DoRA, rank patterns,
embeddings, biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from infra.errors import FactoryError
from workers.adapters.writer import LowRank
from workers.base.modules import find_targets
from workers.base.structure import quiet_transformers
from workers.training.kinds import LoraSpec, check_whole

_NAME = "default"


class LoraAdapter:
    """LoRA factors A [rank, in] and B [out, rank] in the modules that `spec` names; B starts at 0."""

    def __init__(self, model: nn.Module, spec: LoraSpec) -> None:
        from peft import LoraConfig, get_peft_model  # seconds of imports, for this kind of expert only
        from peft.tuners.lora import LoraLayer

        targets = find_targets(model, spec.modules)
        names = list(targets)
        for name, target in targets.items():
            check_whole(name, target, spec.modules)
        config = LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=names, bias="none"
        )  # fmt: skip
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(spec.seed)
            self._peft: Any = get_peft_model(model, config)
        modules = dict(model.named_modules())
        self._layers: dict[str, Any] = {name: modules[name] for name in names}
        for layer in self._layers.values():
            assert isinstance(layer, LoraLayer)
            if spec.dropout:
                layer.lora_dropout[_NAME].train()
        self._factors: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            self._factors[f"{name}.a"] = layer.lora_A[_NAME].weight
            self._factors[f"{name}.b"] = layer.lora_B[_NAME].weight

    @property
    def num_values(self) -> int:
        """Trained values."""
        return sum(factor.numel() for factor in self._factors.values())

    def parameters(self) -> list[nn.Parameter]:
        return list(self._factors.values())

    def zero_grad(self) -> None:
        for factor in self._factors.values():
            if factor.grad is not None:
                factor.grad.zero_()

    def write_back(self) -> None:
        """Nothing: the factors are parameters of the model."""

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: factor.detach().clone() for name, factor in self._factors.items()}

    def delta(self, snapshot: dict[str, torch.Tensor] | None = None) -> dict[str, LowRank]:
        """Factors on the CPU: parameter name of the adapted weight to A, B and scale."""
        factors = snapshot or self.snapshot()
        return {
            f"{name}.weight": LowRank(factors[f"{name}.a"].cpu(), factors[f"{name}.b"].cpu(), layer.scaling[_NAME])
            for name, layer in self._layers.items()
        }

    def state(self, snapshot: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        return snapshot or {name: factor.detach() for name, factor in self._factors.items()}

    def read_snapshot(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`FactoryError` for another adapter's state."""
        shapes = {name: factor.shape for name, factor in self._factors.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise FactoryError("the saved state is of another adapter: its factors differ in names or shapes")
        return dict(tensors)

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """`FactoryError` for another adapter's state."""
        saved = self.read_snapshot(tensors)
        with torch.no_grad():
            for name, factor in self._factors.items():
                factor.copy_(saved[name])

    def restore(self) -> None:
        """Take the layers out; the base's own modules, never touched, are back in their places. Idempotent."""
        if self._peft is not None:
            self._peft.unload()
            self._peft = None
            for parameter, flag in self._flags:
                parameter.requires_grad_(flag)
