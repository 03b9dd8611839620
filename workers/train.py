"""Training of one sparse expert, read top to bottom: mask, in-place adapter, AdamW, steps, best values.

The model's own forward runs on W + delta in place (`workers/inplace.py`); the loss and the logits exist only at target
positions. Runs on plain tensors and reports through a callback: no Ray, no MLflow, no object store.
Not covered: gradient accumulation, checkpoints in the middle of training, LoRA and full fine-tuning.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, get_scheduler

from infra.errors import ExpertError
from workers.inplace import InPlaceAdapter
from workers.masks import MaskSpec, select_supports
from workers.memory import give_back
from workers.prompt import IGNORED_LABEL, Example, collate, length_bucketed_batches
from workers.support import SparseTensor, SupportSpec

TRAIN_VERSION = 1
"""Part of every expert's key: raise it whenever the same inputs would give other numbers."""


@dataclass(frozen=True)
class TrainSpec:
    """Everything the optimisation is a function of, beside data and mask. Units: optimizer steps."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    schedule: str
    clip_norm: float
    validate_every: int | None
    seed: int


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
    """The best values seen: delta per parameter name, and how they came about."""

    delta: dict[str, SparseTensor]
    history: list[StepReport]
    best_step: int
    best_validation_loss: float
    reselections: int
    trainable: int
    density: float


def train_expert(
    model: PreTrainedModel,
    train: Sequence[Example],
    validation: Sequence[Example],
    mask: MaskSpec,
    spec: TrainSpec,
    pad_id: int,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> TrainedExpert:
    """Train one expert and leave `model` bit-exactly as it was.

    Args:
        model: frozen causal language model on the device to train on; its weights' dtype is the compute dtype.
        train, validation: tokenised rows (`workers/prompt.py`).
        mask: which positions may change.
        spec: the optimisation.
        pad_id: token id that fills short rows.
        on_step: called after every optimizer step.

    Raises:
        ExpertError: a loss or gradient is not finite; the message names step and rows.
    """
    batches = _endless_batches(train, spec)
    device = next(model.parameters()).device

    def batch_loss(rows: list[int]) -> torch.Tensor:
        return target_loss(model, _batch([train[i] for i in rows], pad_id, device))

    def select(rows: list[int]) -> dict[str, SupportSpec]:
        return select_supports(model, mask, lambda: batch_loss(rows))

    ahead = next(batches)
    supports = select(ahead)
    with InPlaceAdapter(model, supports) as adapter:
        optimizer = torch.optim.AdamW(
            adapter.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True
        )
        scheduler = get_scheduler(spec.schedule, optimizer, math.ceil(spec.warmup_ratio * spec.steps), spec.steps)
        history: list[StepReport] = []
        best = (math.inf, 0, adapter.delta())
        largest, reselections, tokens, start = 0, 0, 0, time.perf_counter()
        for step in range(1, spec.steps + 1):
            rows, ahead = ahead, next(batches)
            if (
                mask.criterion != "random"
                and mask.reselect_every
                and step > 1
                and (step - 1) % mask.reselect_every == 0
            ):
                adapter.reselect(select(rows), optimizer)
                reselections += 1
            adapter.zero_grad()
            size = len(rows) * max(len(train[i].input_ids) for i in rows)
            if size > largest:  # the holes that smaller batches left in the heap do not fit its tensors
                largest = size
                give_back()
            loss = batch_loss(rows)
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(adapter.parameters(), spec.clip_norm))
            if not (math.isfinite(norm) and math.isfinite(loss.item())):
                raise ExpertError(
                    f"step {step}: loss {loss.item()}, gradient norm {norm} on training rows {rows}; "
                    "lower train.learning_rate or inspect these rows"
                )
            rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            adapter.write_back()
            tokens += sum(len(train[i].input_ids) for i in rows)
            validation_loss = None
            if step == spec.steps or (spec.validate_every and step % spec.validate_every == 0):
                validation_loss = mean_target_loss(model, validation, spec.batch_size, pad_id)
                if validation_loss < best[0]:
                    best = (validation_loss, step, adapter.delta())
            report = StepReport(step, loss.item(), rate, norm, tokens, time.perf_counter() - start, validation_loss)
            history.append(report)
            on_step(report)
    if not math.isfinite(best[0]):
        raise ExpertError(f"no finite validation loss in {spec.steps} steps; lower train.learning_rate")
    trainable = sum(tensor.values.numel() for tensor in best[2].values())
    adapted = sum(math.prod(tensor.shape) for tensor in best[2].values())
    return TrainedExpert(
        delta=best[2],
        history=history,
        best_step=best[1],
        best_validation_loss=best[0],
        reselections=reselections,
        trainable=trainable,
        density=trainable / adapted,
    )


def target_loss(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy at the target positions only; logits [targets, vocabulary] are never made for prompt or padding.

    Models that change logits after the output layer (soft-capping, scaling) are not covered.
    """
    hidden = model.get_decoder()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state  # [rows, length, hidden]
    targets = batch["labels"][:, 1:]
    predicts = targets != IGNORED_LABEL  # position t predicts token t + 1
    head = model.get_output_embeddings()
    if head is None:
        raise ExpertError(f"{type(model).__name__} has no output embeddings; a causal language model is needed")
    logits = head(hidden[:, :-1][predicts])  # [targets, vocabulary]
    return torch.nn.functional.cross_entropy(logits.float(), targets[predicts], reduction=reduction)


@torch.no_grad()
def mean_target_loss(model: PreTrainedModel, examples: Sequence[Example], batch_size: int, pad_id: int) -> float:
    """Mean cross-entropy per target token over all examples, in batches of similar length."""
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    total, count = 0.0, 0
    for first in range(0, len(order), batch_size):
        batch = _batch([examples[i] for i in order[first : first + batch_size]], pad_id, device)
        total += float(target_loss(model, batch, reduction="sum"))
        count += int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    return total / count


def _batch(examples: Sequence[Example], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in collate(examples, pad_id).items()}


def _endless_batches(examples: Sequence[Example], spec: TrainSpec) -> Iterator[list[int]]:
    """Row numbers of one batch after the other, epoch after epoch, each epoch in an order of its own."""
    lengths = [len(example.input_ids) for example in examples]
    epoch = 0
    while True:
        yield from length_bucketed_batches(lengths, min(spec.batch_size, len(lengths)), spec.seed, epoch)
        epoch += 1


def history_as_rows(history: Sequence[StepReport]) -> list[dict[str, float]]:
    """The history as flat rows of numbers, fields that were not measured left out."""
    return [
        {name: value for name, value in dataclasses.asdict(report).items() if value is not None} for report in history
    ]
