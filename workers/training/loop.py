"""Training of one change, read top to bottom: positions, adapter, AdamW, steps, best values.

One loop for every kind of expert (`workers/training/kinds.py`) and objective (`workers/training/objectives.py`,
`workers/scoring/classification.py`). Runs on plain tensors and reports through callbacks: no Ray, no MLflow, no object
store. On the CPU a run that was saved and resumed ends with the same bits; a step waits for the device only where its
numbers are read. Not covered: data-parallel training of one expert.
"""

import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from infra.errors import ConfigError, ExpertError, FactoryError
from workers.adapters.support import SparseTensor, SupportSpec
from workers.adapters.writer import LowRank
from workers.base.memory import give_back
from workers.masks.spec import MaskSpec, select_supports
from workers.training.batches import Batch, own_batches
from workers.training.kinds import ExpertSpec, Trainable, change_norm, make_adapter, stored_values
from workers.training.objectives import Objective, mean_loss
from workers.training.state import (
    TrainState,
    as_rows,
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    random_state,
)

TRAIN_VERSION = 2
"""Part of every expert's key: raise it whenever the same inputs would give other numbers."""
STEPS_BETWEEN_READS = 10
"""Steps on an accelerator between two looks at losses and norms, each of which waits for the device."""


@dataclass(frozen=True)
class TrainSpec:
    """Everything the optimisation is a function of, beside data and adapter. Units: optimizer steps."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    schedule: str
    clip_norm: float
    validate_every: int | None
    seed: int
    micro_batch_size: int | None = None
    """Rows of one forward pass; the gradients of a batch's micro-batches add up to that of the batch."""
    patience: int | None = None
    """Validations without a better loss after which training ends."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step looked like. `tokens` counts real (unpadded) tokens since the start."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    validation_loss: float | None = None


@dataclass(frozen=True)
class TrainedExpert:
    """The best values seen: change per parameter name, the head's own tensors, and how they came about."""

    delta: Mapping[str, SparseTensor | LowRank]
    head: dict[str, torch.Tensor]
    history: list[StepReport]
    best_step: int
    best_validation_loss: float
    """Infinite without validation rows."""
    reselections: int
    trainable: int
    density: float
    shapes: dict[str, tuple[int, ...]]
    """Shape of each changed weight."""
    delta_norm: float
    """L2 norm of the whole change."""
    resumed_after: int
    """Steps that were taken over from a saved state."""


def train_expert(
    model: Any,
    objective: Objective,
    train: Sequence[Any],
    validation: Sequence[Any],
    kind: ExpertSpec,
    spec: TrainSpec,
    *,
    supports: Mapping[str, SupportSpec] | None = None,
    batches: Sequence[Batch] | None = None,
    head: Mapping[str, nn.Parameter] | None = None,
    recompute: bool = False,
    resume: TrainState | None = None,
    save_every: int | None = None,
    on_save: Callable[[TrainState], None] = lambda state: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> TrainedExpert:
    """Train one expert and leave `model` bit-exactly as it was.

    Args:
        model: frozen model on the device to train on; its weights' dtype is the compute dtype.
        objective: what is predicted; knows the type of the examples.
        train, validation: tokenised rows. Without validation rows the last values are the best.
        kind: which change is trained.
        spec: the optimisation.
        supports: positions of a sparse expert; None selects them.
        batches: of each step, numbers of rows; None: the rows in their own epochs, by `spec`.
        head: parameters trained in full beside the change.
        recompute: activations are recomputed in the backward pass instead of kept. The same numbers.
        resume: state to go on from, of the same arguments.
        save_every, on_save: steps between two states that are handed over to be saved.
        on_step: called for every optimizer step, on an accelerator a few steps later.

    Raises:
        ExpertError: a loss or gradient is not finite; the message names step and rows.
        ConfigError: modules, blocks or layers that the model does not have.
    """
    scored = kind.score_batches if isinstance(kind, MaskSpec) else 0
    own = own_batches(list(map(objective.length, train)), spec.batch_size, spec.seed, spec.micro_batch_size)
    planned = list(itertools.islice(own, spec.steps + scored)) if batches is None else batches
    heads = dict(head or {})
    size = spec.micro_batch_size or spec.batch_size

    def select(step: int) -> dict[str, SupportSpec]:
        """Positions, scored on the batches that come next and at the current weights."""
        assert isinstance(kind, MaskSpec)
        ahead = [parts[0] for parts in planned[step - 1 : step - 1 + scored]]
        try:
            losses = [_mean_of(model, objective, [train[i] for i in rows]) for rows in ahead]
            return select_supports(model, kind, losses)
        except ConfigError:
            raise
        except FactoryError as error:
            raise ExpertError(f"selecting positions before step {step} on training rows {ahead}: {error}") from error

    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng(devices=cuda))
        torch.manual_seed(spec.seed)
        if recompute:
            undo.callback(recompute_layers(model))
        if isinstance(kind, MaskSpec) and supports is None:
            supports = select(1)
        adapter = make_adapter(model, kind, supports or {})
        supports = None  # 8 bytes for each of their positions
        undo.callback(adapter.restore)
        undo.callback(_train_in_full(heads))

        done = reselections = unimproved = largest = 0
        best = _Best(math.inf, 0, None, {})
        log = _Log(on_step)
        if resume is not None and not _fits(adapter, resume):
            resume = None
        if resume is not None:
            done, reselections, unimproved = resume.step, resume.reselections, resume.unimproved
            adapter.load_state(resume.adapter)
            _copy_into(heads, resume.head)
            if resume.best_loss is not None:
                best = _Best(resume.best_loss, resume.best_step, adapter.read_snapshot(resume.best), resume.best_head)
            log.continue_after([StepReport(**row) for row in resume.history])
        optimizer = torch.optim.AdamW(
            [{"params": adapter.parameters()}, *([{"params": list(heads.values())}] if heads else [])],
            lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True,
        )  # fmt: skip
        rate_at = _schedule(spec, optimizer)
        if resume is not None:
            load_optimizer_state(optimizer, resume.optimizer)
            load_random_state(resume.random)
            resume = None  # as large as the training state itself

        for step in range(done + 1, spec.steps + 1):
            parts = planned[step - 1]
            rows = [row for part in parts for row in part]
            if isinstance(kind, MaskSpec) and _selects_again(kind, step, reselections):
                cast(Any, adapter).reselect(select(step), optimizer)
                reselections += 1
            adapter.zero_grad()
            for parameter in heads.values():
                parameter.grad = None
            count = sum(objective.count(train[i]) for i in rows)
            losses = []
            for part in parts:
                padded = len(part) * max(objective.length(train[i]) for i in part)
                if padded > largest:  # the holes that smaller batches left in the heap do not fit its tensors
                    largest = padded
                    give_back()
                loss = objective.loss_sum(model, [train[i] for i in part]) / count
                loss.backward()
                losses.append(loss.detach())
            norm = nn.utils.clip_grad_norm_([*adapter.parameters(), *heads.values()], spec.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step)
            optimizer.step()
            adapter.write_back()
            tokens = sum(objective.length(train[i]) for i in rows)
            log.unread.append(_Step(step, rows, torch.stack(losses).sum(), norm, rate_at(step), tokens))
            last = step == spec.steps
            due = last or bool(spec.validate_every and step % spec.validate_every == 0)
            validates = due and bool(validation)
            saves = not last and bool(save_every and step % save_every == 0)
            found = _validation_loss(model, objective, validation, size) if validates else None
            if validates or saves or len(log.unread) >= (STEPS_BETWEEN_READS if cuda else 1):
                log.read(found)
            if found is not None:
                unimproved += 1
                if found < best.loss:
                    best, unimproved = _Best(found, step, adapter.snapshot(), _copies(heads)), 0
                if spec.patience and unimproved >= spec.patience:
                    break
            if saves:
                on_save(
                    TrainState(
                        step=step, reselections=reselections, unimproved=unimproved,
                        best_loss=best.loss if best.step else None, best_step=best.step, history=as_rows(log.history),
                        adapter=adapter.state(), head=_copies(heads), optimizer=optimizer_state(optimizer),
                        random=random_state(cuda), best=adapter.state(best.snapshot) if best.step else {},
                        best_head=best.head,
                    )
                )  # fmt: skip
        if not validation:
            best = _Best(math.inf, spec.steps, adapter.snapshot(), _copies(heads))
        delta = adapter.delta(best.snapshot)
    shapes: dict[str, tuple[int, ...]] = {}
    trainable, square = 0, 0.0
    for name, change in delta.items():  # once: a tensor is put in order each time it is asked for
        shapes[name] = change.shape
        trainable += stored_values(change)
        square += change_norm(change) ** 2
    return TrainedExpert(
        delta=delta,
        head=best.head,
        history=log.history,
        best_step=best.step,
        best_validation_loss=best.loss,
        reselections=reselections,
        trainable=trainable + sum(tensor.numel() for tensor in best.head.values()),
        density=trainable / sum(map(math.prod, shapes.values())),
        shapes=shapes,
        delta_norm=math.sqrt(square),
        resumed_after=done,
    )


@dataclass(frozen=True)
class _Best:
    """The best validation loss so far, and the adapter's snapshot and head that had it."""

    loss: float
    step: int
    snapshot: Any
    head: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Step:
    """A step whose numbers may still be on the device."""

    step: int
    rows: list[int]
    loss: torch.Tensor
    norm: torch.Tensor
    rate: float
    tokens: int


class _Log:
    """Reads the numbers of several steps at once, checks that they are finite, and reports them."""

    def __init__(self, on_step: Callable[[StepReport], None]) -> None:
        self.history: list[StepReport] = []
        self.unread: list[_Step] = []
        self._on_step = on_step
        self._tokens, self._before, self._start = 0, 0.0, time.perf_counter()

    def continue_after(self, history: list[StepReport]) -> None:
        """Steps, tokens and seconds count on from these."""
        self.history = history
        self._tokens, self._before = history[-1].tokens, history[-1].seconds

    def read(self, validation_loss: float | None) -> None:
        """Report what is unread; `validation_loss` belongs to its last step. `ExpertError` for a number not finite."""
        numbers = [torch.stack([s.loss, s.norm.to(s.loss.device, s.loss.dtype)]) for s in self.unread]
        seconds = self._before + time.perf_counter() - self._start
        for step, (loss, norm) in zip(self.unread, torch.stack(numbers).tolist(), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ExpertError(
                    f"step {step.step}: loss {loss}, gradient norm {norm} on training rows {step.rows}; "
                    "lower train.learning_rate or inspect these rows"
                )
            self._tokens += step.tokens
            validated = validation_loss if step is self.unread[-1] else None
            self.history.append(StepReport(step.step, loss, step.rate, norm, self._tokens, seconds, validated))
            self._on_step(self.history[-1])
            if validated is not None and not math.isfinite(validated):
                raise ExpertError(
                    f"step {step.step}: validation loss {validated} after training rows {step.rows}; "
                    "lower train.learning_rate or inspect these rows and the validation rows"
                )
        self.unread = []


def _fits(adapter: Trainable, state: TrainState) -> bool:
    """Whether a saved state is of this adapter; it is not if the layers were spread over another number of devices."""
    try:
        adapter.read_snapshot(state.adapter)
    except FactoryError as error:
        logging.getLogger(__name__).warning("the saved state after step %d is left aside: %s", state.step, error)
        return False
    return True


def _mean_of(model: Any, objective: Objective, rows: list[Any]) -> Callable[[], torch.Tensor]:
    return lambda: objective.loss_sum(model, rows) / sum(objective.count(row) for row in rows)


def _selects_again(kind: MaskSpec, step: int, done: int) -> bool:
    if not kind.reselect_every or (kind.reselect_rounds is not None and done >= kind.reselect_rounds):
        return False
    return step > 1 and (step - 1) % kind.reselect_every == 0


def _schedule(spec: TrainSpec, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Learning rate of each step, counted from 1: the first is already above 0, the last not yet 0."""
    from transformers import get_scheduler  # seconds of imports, for who trains

    warm = math.ceil(spec.warmup_ratio * spec.steps)
    shape = get_scheduler(spec.schedule, optimizer, warm, spec.steps + 1).lr_lambdas[0]
    return lambda step: float(spec.learning_rate * shape(step))


def recompute_layers(model: nn.Module) -> Callable[[], None]:
    """Let every decoder or encoder layer recompute its activations in the backward pass; returns what undoes it.

    Only the layers themselves are put into training mode, not their parts, so that no dropout becomes active.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layers that can recompute; set train.gradient_checkpointing=false"
        )
    for layer in layers:  # what transformers sets for the whole model, which would also make embeddings need gradients
        layer.training = layer.gradient_checkpointing = True
        object.__setattr__(layer, "_gradient_checkpointing_func", functools.partial(checkpoint, use_reentrant=False))

    def undo() -> None:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = False

    return undo


def _validation_loss(model: nn.Module, objective: Objective, examples: Sequence[Any], batch_size: int) -> float:
    """Mean loss without dropout and without recomputation."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        return mean_loss(model, objective, examples, batch_size)
    finally:
        for module in training:
            module.training = True


def _train_in_full(head: Mapping[str, nn.Parameter]) -> Callable[[], None]:
    """Unfreeze the head's parameters; returns what freezes them again and puts their values back."""
    before = {name: parameter.detach().clone() for name, parameter in head.items()}
    for parameter in head.values():
        parameter.requires_grad_(True)

    def undo() -> None:
        for parameter in head.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        _copy_into(head, before)

    return undo


def _copies(head: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in head.items()}


def _copy_into(head: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in head.items():
            parameter.copy_(tensors[name])
