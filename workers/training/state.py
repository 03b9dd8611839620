"""The state of an unfinished training: all that the rest of it is a function of, as one file.

Positions and values, optimizer moments and step counts, the best values so far, the generators of random numbers, and
the step, from which the position in the data follows. Where such a file is kept is `workers.jobs.resume`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.errors import FactoryError, TensorFileError
from workers.tensors.reader import TensorReader
from workers.tensors.source import FileSource
from workers.tensors.writer import save_tensors

STATE_VERSION = 1
_GROUPS = ("adapter", "head", "optimizer", "random", "best", "best_head")


@dataclass(frozen=True)
class TrainState:
    """After `step` optimizer steps.

    `adapter`: the adapter's state now; `best`: that of its best snapshot, empty before the first validation. `head`,
    `best_head`: the head's tensors. `optimizer`: `<number of the parameter> <name>` to tensor. `random`: `cpu` and
    `cuda:<index>` to the generator's state. `history`: the steps' reports as plain rows.
    """

    step: int
    reselections: int
    unimproved: int
    best_loss: float | None
    best_step: int
    history: list[dict[str, Any]]
    adapter: dict[str, Tensor]
    head: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    best: dict[str, Tensor]
    best_head: dict[str, Tensor]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of every parameter, by its number in the order of the groups."""
    numbered = enumerate(p for group in optimizer.param_groups for p in group["params"])
    return {
        f"{number} {name}": value.detach()
        for number, parameter in numbered
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse, for an optimizer of as many parameters of the same shapes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        number, _, name = key.partition(" ")
        parameter = parameters[int(number)]
        optimizer.state[parameter][name] = value.to(parameter.device, copy=True)


def random_state(devices: Sequence[int]) -> dict[str, Tensor]:
    """States of the generators that training draws from: the CPU's and those of CUDA devices."""
    return {"cpu": torch.get_rng_state()} | {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in devices}


def load_random_state(tensors: Mapping[str, Tensor]) -> None:
    """The inverse; devices that this machine lacks are left out."""
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        if name != "cpu" and torch.cuda.is_available() and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))


def write_state(state: TrainState, path: str | os.PathLike[str]) -> None:
    """Save as safetensors with JSON metadata."""
    tensors = {f"{group}/{name}": tensor.cpu() for group in _GROUPS for name, tensor in getattr(state, group).items()}
    plain = ("step", "reselections", "unimproved", "best_loss", "best_step", "history")
    meta = {name: getattr(state, name) for name in plain} | {"version": STATE_VERSION}
    save_tensors(path, tensors, {"state": json.dumps(meta, allow_nan=False)})


def read_state(path: str | os.PathLike[str]) -> TrainState:
    """The state in a file. `FactoryError` if it is not one of this version."""
    try:
        file = TensorReader(FileSource(path), TensorFileError)
        meta = json.loads(file.metadata["state"])
        if meta.pop("version") != STATE_VERSION:
            raise ValueError("another version")
        groups: dict[str, Any] = {group: {} for group in _GROUPS}
        for key in file.pieces:
            group, _, name = key.partition("/")
            groups[group][name] = file.read(key)
        return TrainState(**meta, **groups)
    except (FactoryError, OSError, KeyError, TypeError, ValueError) as error:
        raise FactoryError(f"{path}: not a saved training state ({error})") from error


def as_rows(history: Sequence[Any]) -> list[dict[str, Any]]:
    """Reports (dataclasses) as plain rows, fields that were not measured left out."""
    return [
        {name: value for name, value in dataclasses.asdict(report).items() if value is not None} for report in history
    ]
