"""Names and shapes of a prepared base's tensors, and which of them are linear layers' weights, without reading them.

What a conversion checks foreign files against. Loading a base for computation is `workers.base.load`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import AdapterError, BaseModelError
from workers.base.modules import stacked_rows
from workers.base.prepare import PreparedBase
from workers.base.structure import first_line, quiet_transformers, read_config
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles, resized

_EMBEDDING = re.compile(r"embed|wte|wpe")


@dataclass(frozen=True)
class BaseLayout:
    """``shapes`` of all floating tensors by name; ``linear``, the names among them that are weights of linear layers.

    A weight that is tied to another is listed under the name that the base's file has, so a tied output layer is not
    among them: ``tied`` names the tensor that stands for it.
    """

    path: Path
    sha256: str
    shapes: dict[str, tuple[int, ...]]
    linear: frozenset[str]
    tied: Mapping[str, str] = field(default_factory=dict)

    def check_linear(self, name: str, shape: Iterable[int], where: str) -> None:
        """Raise ``AdapterError`` unless ``name`` is a linear weight of this base with this shape."""
        if name in self.tied:
            raise AdapterError(
                f"{where}: {name} is tied to {self.tied[name]} in this base, one tensor for both, so the output layer "
                "has no weight of its own to change; save the base with the two untied (tie_word_embeddings false, "
                f"{name} written out) and give that"
            )
        if name not in self.linear:
            if _EMBEDDING.search(name) and name in self.shapes:
                raise AdapterError(
                    f"{where}: {name} is an embedding, not a linear layer's weight; train without it, or merge the "
                    "adapter with PEFT (merge_and_unload) and convert the result with from-checkpoint --all"
                )
            kind = "not a linear layer's weight there" if name in self.shapes else "unknown there (or tied to another)"
            raise AdapterError(f"{where}: {name} is {kind}; was it made for another base than {self.sha256[:12]}…?")
        self.check_shape(name, shape, where)

    def check_shape(self, name: str, shape: Iterable[int], where: str) -> None:
        """Raise ``AdapterError`` unless ``name`` is a tensor of this base with this shape."""
        found, own = list(shape), self.shapes.get(name)
        if own is None or found != list(own):
            if own is not None and (said := resized(name, found, own)):
                raise AdapterError(f"{where}: {said}")
            expected = "the base has no such tensor" if own is None else f"the base's is {list(own)}"
            raise AdapterError(f"{where}: {name} has shape {found}, {expected}; give the base that it was made for")


def read_layout(base: PreparedBase) -> BaseLayout:
    """The layout of ``base``. ``BaseModelError`` if its configuration names no model of transformers."""
    shapes = read_shapes(base.path)
    model = _empty_model(base.path)
    return BaseLayout(base.path, base.sha256, shapes, _linear_weights(model) & frozenset(shapes), _tied(model, shapes))


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the floating tensors of the prepared base in `path`."""
    weights = CheckpointFiles.in_file(path / WEIGHTS)
    return {name: weights.piece(name).shape for name in weights.floating}


def fused_rows(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int, int]]:
    """The rows of query, key and value in each fused attention weight among these tensors of a prepared base in `path`.

    ``ConfigError`` for a fused weight that interleaves them, or whose layout is unknown.
    """
    return stacked_rows(read_config(path), shapes)


def _empty_model(path: Path) -> Any:
    """A model of the class that the configuration names, built without memory."""
    import transformers
    from accelerate import init_empty_weights

    config = read_config(path)
    kind: Any = getattr(transformers, (config.architectures or ["none"])[0], None)
    if not hasattr(kind, "_from_config"):
        raise BaseModelError(f"base {path}: its configuration names no known model class: {config.architectures}")
    try:
        with quiet_transformers(), init_empty_weights():
            return kind._from_config(config)
    except Exception as error:  # a field of the configuration that its class stumbles over
        raise BaseModelError(f"base {path}: transformers builds no model of it ({first_line(error)})") from error


def _linear_weights(model: Any) -> frozenset[str]:
    from torch import nn

    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear))


def _tied(model: Any, shapes: Mapping[str, object]) -> dict[str, str]:
    """The output layer's weight, where the input embedding stands for it, whether it is written out or not."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return {names[head]: names[table]} if names.get(table) in shapes else {}
