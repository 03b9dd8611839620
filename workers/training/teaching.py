"""Training on what a teacher says of each target token, beside the targets themselves or in their place.

Of every target position a teacher's k likeliest tokens K are kept with their probabilities p_i, at temperature 1 and
normalised over the whole vocabulary, and p_r = 1 - sum p_i of all other tokens together. With q likewise of the model
that is trained, the loss is the Kullback-Leibler divergence (Hinton, Vinyals and Dean, arXiv 1503.02531, at T = 1)

    D = sum over K of p_i log(p_i / q_i)  +  p_r log(p_r / q_r).

So what lies outside of K is one further outcome, "the rest". Renormalising over K instead would not see how much
probability leaves K altogether, which a model could then move there for nothing; the rest says how much belongs there,
and leaves open to which tokens. By the log-sum inequality D is at most the divergence over the whole vocabulary, and
with k = v it is that. Its gradient in the logits is q_j - p_j inside of K and q_j (1 - p_r / q_r) outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import ExpertError, TensorFileError
from workers.tensors.reader import TensorReader
from workers.tensors.source import FileSource
from workers.tensors.writer import save_tensors
from workers.text.prompt import Example
from workers.training.objectives import LanguageModelling, Losses, chunked_loss

TEACHING_VERSION = 1
"""Part of the keys of what teachers say and of what is trained on it: raise it whenever either gives other numbers."""


@dataclass(frozen=True)
class Said:
    """What a teacher says of the n targets of an example: `ids` int32 [n, k], its likeliest tokens, and `log_probs`
    fp32 [n, k + 1], their log-probabilities and that of all others together, -inf where there is no other."""

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Lesson:
    """An example, and what the cross-entropy of its targets (`answer`) and the divergence from its teacher weigh."""

    example: Example
    answer: float
    teacher: float = 0.0
    said: Said | None = None
    """Needed where the teacher weighs anything."""


@dataclass(frozen=True)
class Teaching:
    """The objective whose examples are lessons. All that teachers say is of one k."""

    plain: LanguageModelling

    def length(self, lesson: Lesson) -> int:
        return self.plain.length(lesson.example)

    def count(self, lesson: Lesson) -> int:
        return self.plain.count(lesson.example)

    def loss_sum(self, model: Any, lessons: Sequence[Lesson]) -> Tensor:
        """Sum over targets of answer × cross-entropy + teacher × divergence, by the lessons' weights: an fp32 scalar.

        Raises ExpertError where nothing was said, or of another number of targets.
        """
        found = self.plain.predictions(model, [lesson.example for lesson in lessons])
        counts = list(map(self.count, lessons))
        k = next((lesson.said.ids.shape[1] for lesson in lessons if lesson.said is not None), 0)
        ids, log_probs = [], []
        for lesson, count in zip(lessons, counts, strict=True):
            said = lesson.said
            if said is None and not lesson.teacher:  # weighs nothing, whatever it is
                said = Said(torch.arange(k, dtype=torch.int32).expand(count, k), torch.zeros(count, k + 1))
            if said is None or said.ids.shape != (count, k):
                raise ExpertError("what the teacher says is not of these rows: delete its artifact and run again")
            ids.append(said.ids)
            log_probs.append(said.log_probs)
        weights = torch.tensor([[lesson.answer, lesson.teacher] for lesson in lessons])
        each = weights.repeat_interleave(torch.tensor(counts), dim=0)
        told = (torch.cat(ids).long(), torch.cat(log_probs), *each.unbind(1))
        at_hand = [tensor.to(found.targets.device, non_blocking=True) for tensor in told]
        return chunked_loss(found, taught(found.targets, *at_hand))


def taught(targets: Tensor, ids: Tensor, log_probs: Tensor, answer: Tensor, teacher: Tensor) -> Losses:
    """Sum of answer × cross-entropy + teacher × divergence, and its gradient, from logits [m, v].

    `targets` int64 [n]; `ids` int64 [n, k], of a row all different; `log_probs` [n, k + 1]; weights [n].
    """

    def losses(logits: Tensor, part: slice, wanted: bool) -> Tensor:
        target, inside, log_p = targets[part, None], ids[part], log_probs[part]
        by_answer, by_teacher = answer[part, None], teacher[part, None]
        logits.sub_(logits.logsumexp(-1, keepdim=True))
        hit, log_q = logits.gather(1, target), logits.gather(1, inside)
        outside = logits.exp_().scatter_(1, inside, 0)  # summed, not 1 - sum q_i, of which little would be left
        rest = outside.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
        p = log_p.exp()
        terms = torch.where(p > 0, p * (log_p - torch.cat([log_q, rest.log()], 1)), 0)
        total = (by_teacher * terms.sum(-1, keepdim=True) - by_answer * hit).sum()
        if wanted:
            both = by_answer + by_teacher
            outside.mul_(both - by_teacher * p[:, -1:] / rest)
            outside.scatter_(1, inside, both * log_q.exp() - by_teacher * p[:, :-1])
            outside.scatter_add_(1, target, -by_answer)
        return total

    return losses


@torch.no_grad()
def ask(
    model: Any, objective: LanguageModelling, examples: Sequence[Example], k: int, batch_size: int
) -> Iterator[tuple[int, Said]]:
    """What `model` says of the targets of each example, which goes by its number; in batches of similar length."""
    order = sorted(range(len(examples)), key=lambda at: objective.length(examples[at]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        found = objective.predictions(model, [examples[at] for at in batch])
        said = [likeliest(found.logits(part), k) for part in found.chunks()]
        counts = [objective.count(examples[at]) for at in batch]
        ids, log_probs = (torch.cat(parts).cpu().split(counts) for parts in zip(*said, strict=True))
        yield from zip(batch, map(Said, ids, log_probs), strict=True)


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of logits [n, v] the k likeliest tokens int32 [n, k], at most v, and log-probabilities [n, k + 1]: theirs, and
    that of the rest. Logits are used up."""
    logits.sub_(logits.logsumexp(-1, keepdim=True))
    top, ids = logits.topk(min(k, logits.shape[1]), -1)
    rest = logits.scatter_(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids.int(), torch.cat([top, rest], 1)


def save_said(path: Path, said: Mapping[int, Said]) -> None:
    """A safetensors file of what is said of rows, by their numbers."""
    rows = sorted(said)
    tensors = {
        "rows": torch.tensor(rows, dtype=torch.int64),
        "counts": torch.tensor([said[row].ids.shape[0] for row in rows], dtype=torch.int64),
        "ids": torch.cat([said[row].ids for row in rows]),
        "log_probs": torch.cat([said[row].log_probs for row in rows]),
    }
    save_tensors(path, tensors, {"format": "teacher"})


def load_said(path: Path) -> dict[int, Said]:
    """What `save_said` wrote. TensorFileError for anything else."""

    def bad(reason: str) -> TensorFileError:
        return TensorFileError(f"{path}: {reason}; not what a teacher says, or damaged: delete its artifact, run again")

    file = TensorReader(FileSource(path), bad)
    rows, counts, ids, log_probs = (file.read(name) for name in ("rows", "counts", "ids", "log_probs"))
    n, k = ids.shape if ids.ndim == 2 else (-1, 0)
    if log_probs.shape != (n, k + 1) or rows.shape != counts.shape or rows.ndim != 1 or bool((counts < 0).any()):
        raise bad("its shapes do not belong together")
    if int(counts.sum()) != n or bool((ids < 0).any()) or not bool((log_probs <= 1e-3).all()):
        raise bad("its numbers are no probabilities of tokens")
    parts = map(Said, ids.split(counts.tolist()), log_probs.split(counts.tolist()))
    return dict(zip(rows.tolist(), parts, strict=True))
