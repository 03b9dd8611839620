"""What training minimises: the objective of language modelling, with its loss at target positions only.

An objective says how long an example is, how many predictions it has, and the *sum* of their cross-entropies, so that a
batch cut into micro-batches has the very mean that the whole batch has. Logits exist for target positions and for one
chunk of them at a time: their gradient is taken in the same pass, so nothing of the vocabulary's width is kept.
Classification is `workers.scoring.classification`, teachers beside the targets `workers.training.teaching`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from infra.errors import ExpertError
from workers.base.hooks import is_plain_linear
from workers.text.prompt import Example, collate

CHUNK_LOGITS = 2**24
"""Logits of one chunk, 64 MiB in float32."""


class Objective(Protocol):
    """What a model is trained for. Examples are of one type that the objective knows."""

    def length(self, example: Any) -> int:
        """Tokens of an example, to put similar ones into one batch."""
        ...

    def count(self, example: Any) -> int:
        """Predictions of an example that the loss sums over."""
        ...

    def loss_sum(self, model: Any, examples: Sequence[Any]) -> Tensor:
        """Sum of the cross-entropies of all predictions: a differentiable fp32 scalar."""
        ...


class Predictions(NamedTuple):
    """What a model predicts n targets from: inputs `read` [n, h] of a frozen output layer and that layer's `weight`
    [v, h] and `bias` [v], or, without a weight, the logits [n, v] themselves. `targets`: int64 [n]."""

    read: Tensor
    weight: Tensor | None
    bias: Tensor | None
    targets: Tensor

    def logits(self, part: slice) -> Tensor:
        """Of some of the targets: fp32, a copy."""
        if self.weight is None:
            return self.read[part].to(torch.float32, copy=True)
        return nn.functional.linear(self.read[part], self.weight, self.bias).float()

    def chunks(self, most: int = CHUNK_LOGITS) -> list[slice]:
        """All targets, in parts of at most so many logits."""
        rows = max(1, most // (self.read.shape[1] if self.weight is None else self.weight.shape[0]))
        return [slice(at, at + rows) for at in range(0, self.read.shape[0], rows)]


@dataclass(frozen=True)
class LanguageModelling:
    """Predict the target tokens of each example after its prompt.

    `pad_id` fills short rows: on the right, where causal attention never looks back from, so no mask is needed, which
    transformers would read back from the device (it still looks at the positions, once a forward pass).
    `own_logits`: take the logits from the model itself, at all positions; for models that change them after the output
    layer (see `language_modelling`).
    """

    pad_id: int
    own_logits: bool = False

    def length(self, example: Example) -> int:
        return len(example.input_ids)

    def count(self, example: Example) -> int:
        return len(example.input_ids) - max(1, example.target_start)

    def predictions(self, model: Any, examples: Sequence[Example]) -> Predictions:
        """`model` is a causal language model of transformers, perhaps spread over several devices."""
        batch = collate(examples, self.pad_id)
        tokens = batch["input_ids"].to(model.get_input_embeddings().weight.device, non_blocking=True)
        head = model.get_output_embeddings()
        if _is_frozen(head) and not self.own_logits:
            hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            read = hidden.index_select(0, batch["reads"].to(hidden.device, non_blocking=True)).to(head.weight.device)
            return Predictions(read, head.weight, head.bias, batch["targets"].to(read.device, non_blocking=True))
        logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        read = logits.index_select(0, batch["reads"].to(logits.device, non_blocking=True))
        return Predictions(read, None, None, batch["targets"].to(read.device, non_blocking=True))

    def loss_sum(self, model: Any, examples: Sequence[Example]) -> Tensor:
        """Of the targets' cross-entropies."""
        read, weight, bias, targets = self.predictions(model, examples)
        if weight is None:
            return nn.functional.cross_entropy(read.float(), targets, reduction="sum")
        return frozen_head_loss(read, weight, bias, targets)


@torch.no_grad()
def language_modelling(model: Any, pad_id: int) -> LanguageModelling:
    """The objective for `model`: its own logits if they are not just what its output layer gives.

    `ExpertError` for a model without output embeddings.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ExpertError(f"{type(model).__name__} has no output embeddings; a causal language model is needed")
    embeddings = model.get_input_embeddings().weight
    tokens = torch.arange(min(8, embeddings.shape[0]), device=embeddings.device)[None]  # the padding's row may be 0
    own = model(input_ids=tokens, use_cache=False).logits
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    plain = is_plain_linear(head) and torch.equal(head(hidden.to(head.weight.device)).to(own.device), own)
    return LanguageModelling(pad_id, own_logits=not plain)


def _is_frozen(head: nn.Module) -> bool:
    """A linear layer that nobody trains or has replaced the forward of."""
    return is_plain_linear(head) and not any(parameter.requires_grad for parameter in head.parameters())


Losses = Callable[[Tensor, slice, bool], Tensor]
"""Sum of the losses of some targets of all, from their logits, fp32 [m, v]; where that is wanted, the logits become
their gradient in place."""


def frozen_head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_logits: int = CHUNK_LOGITS
) -> Tensor:
    """Sum of cross-entropies of linear(hidden, weight, bias) against `targets`, chunk by chunk.

    `hidden` [n, h], `weight` [v, h], `targets` int64 [n]; the softmax is fp32. Differentiable in `hidden` only.
    """

    def losses(logits: Tensor, part: slice, wanted: bool) -> Tensor:
        normaliser = logits.logsumexp(-1, keepdim=True)
        target = targets[part, None]
        total = (normaliser - logits.gather(1, target)).sum()
        if wanted:  # softmax minus one at the target
            logits.sub_(normaliser).exp_()
            logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
        return total

    return chunked_loss(Predictions(hidden, weight, bias, targets), losses, chunk_logits)


def chunked_loss(found: Predictions, losses: Losses, chunk_logits: int = CHUNK_LOGITS) -> Tensor:
    """Sum of `losses` of all targets, chunk by chunk: an fp32 scalar, differentiable in `found.read` only."""
    total: Tensor = _ChunkedLoss.apply(found.read, found.weight, found.bias, found.targets, losses, chunk_logits)
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, read: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor, losses: Losses,
        chunk_logits: int,
    ) -> Tensor:  # fmt: skip
        found = Predictions(read, weight, bias, targets)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(read) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=read.device)
        for part in found.chunks(chunk_logits):
            logits = found.logits(part)
            total += losses(logits, part, wanted)
            if gradient is not None:
                gradient[part] = logits if weight is None else logits.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None


@torch.no_grad()
def mean_loss(model: Any, objective: Objective, examples: Sequence[Any], batch_size: int) -> float:
    """Mean cross-entropy per prediction over all examples, in batches of similar length."""
    order = sorted(range(len(examples)), key=lambda i: objective.length(examples[i]))
    total = 0.0
    for first in range(0, len(order), batch_size):
        total += float(objective.loss_sum(model, [examples[i] for i in order[first : first + batch_size]]))
    return total / sum(objective.count(example) for example in examples)
