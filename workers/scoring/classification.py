"""Classification experts: labelled examples, their objective, the values of the head, and the score of a set of rows.

The model is a sequence classifier made by `workers.base.load.load_classifier`; its adapted body is changed elsewhere,
its head is trained in full, goes into the adapter file whole, and takes no part in merges (SpaRTA, arXiv 2502.15975).
Covers one label of a closed set per row; several labels at once and regression are not covered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import AdapterError, ConfigError, DataError
from workers.base.load import head_parameters
from workers.scoring.decoding import batches, by_length, device_of
from workers.scoring.metrics import CLASSIFICATION_METRICS, LabelMetric, LabelScores, label_score
from workers.text.literal import rendered_ids
from workers.text.prompt import DEFAULT_WRAPPER, PromptSpec, pieces, truncate_left
from workers.text.rows import Row

#: Part of every classification's key: raise it when encoding or prediction change. 2: control tokens in data are text.
CLASSIFICATION_VERSION = 2


@dataclass(frozen=True)
class LabelledExample:
    """Token ids of a whole text, special tokens included, and the number of its label."""

    input_ids: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class ClassifySpec:
    """What a classification score is a function of, besides the model and the rows; belongs in its key."""

    metric: LabelMetric
    labels: tuple[str, ...]
    """Label texts; a label's number is its place here and the head's output."""
    template: str = "{input}"
    wrapper: str = DEFAULT_WRAPPER
    max_input_tokens: int = 96

    def __post_init__(self) -> None:
        if self.metric not in CLASSIFICATION_METRICS:
            raise ConfigError(
                f"metric {self.metric!r} does not score labels; accepted: {', '.join(CLASSIFICATION_METRICS)}"
            )
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"labels {list(self.labels)}: at least two, all different, are needed")

    @property
    def prompt(self) -> PromptSpec:
        return PromptSpec(self.template, self.wrapper, self.max_input_tokens)


@dataclass(frozen=True)
class ClassificationResult:
    """Per row, in the order of the rows: predicted and right label; and the metric that scores them together."""

    labels: tuple[str, ...]
    label_scores: LabelScores

    @property
    def outputs(self) -> tuple[str, ...]:
        """Text of each row's predicted label."""
        return tuple(self.labels[at] for at in self.label_scores.predicted)

    @property
    def scores(self) -> tuple[float, ...]:
        """1.0 for each row that is right, else 0.0; their mean is the accuracy, whatever the metric."""
        return tuple(float(a == b) for a, b in zip(self.label_scores.predicted, self.label_scores.target, strict=True))

    @property
    def score(self) -> float:
        """The metric of all rows."""
        return label_score(self.label_scores)


# -- rows --------------------------------------------------------------------------------------------------------


def distinct_labels(rows: Iterable[Row]) -> tuple[str, ...]:
    """The labels (first targets) that occur, sorted."""
    return tuple(sorted({row.targets[0] for row in rows}))


def label_number(row: Row, labels: Sequence[str]) -> int:
    """Place of the row's first target in `labels`; DataError naming both if it is none of them."""
    if not row.targets or row.targets[0] not in labels:
        found = repr(row.targets[0]) if row.targets else "none"
        raise DataError(f"row {row.id}: its label is {found}; known labels: {', '.join(map(repr, labels))}")
    return list(labels).index(row.targets[0])


def encode_text(tokenizer: Any, prompt: PromptSpec, row: Row) -> list[int]:
    """Ids of the row's prompt with the tokenizer's own special tokens (CLS and SEP, or bos), its input left-truncated.

    DataError if that is nothing or longer than the tokenizer says the model takes.
    """
    text = truncate_left(tokenizer, row.input, prompt.max_input_tokens)
    ids = rendered_ids(tokenizer, pieces(prompt, text, row.options), add_special_tokens=True)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # the wrapper's and the tokenizer's own
        del ids[0]
    if not 0 < len(ids) <= tokenizer.model_max_length:
        raise DataError(
            f"row {row.id}: {len(ids)} tokens with template and wrapper, 1 to {tokenizer.model_max_length} accepted; "
            "change prompt.max_input_tokens, template or wrapper"
        )
    return ids


def encode_labelled(tokenizer: Any, prompt: PromptSpec, row: Row, labels: Sequence[str]) -> LabelledExample:
    """The row as `encode_text` gives it, with the number of its label. DataError as there and in `label_number`."""
    return LabelledExample(tuple(encode_text(tokenizer, prompt, row)), label_number(row, labels))


# -- objective ---------------------------------------------------------------------------------------------------


def label_logits(model: Any, sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Logits [rows, labels] of token sequences in one pass, padded on the right; on the device of the model's head."""
    width = max(len(ids) for ids in sequences)
    tokens = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.int64)
    for at, ids in enumerate(sequences):
        tokens[at, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[at, : len(ids)] = 1
    device = device_of(model)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    logits: Tensor = model(**{name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}).logits
    return logits


@dataclass(frozen=True)
class Classification:
    """The objective (`workers.training.objectives.Objective`): one label per text. `pad_id` fills short rows."""

    pad_id: int

    def length(self, example: LabelledExample) -> int:
        return len(example.input_ids)

    def count(self, example: LabelledExample) -> int:
        return 1

    def loss_sum(self, model: Any, examples: Sequence[LabelledExample]) -> Tensor:
        """`model` is a sequence classifier; differentiable in its head and in an adapter on its body."""
        logits = label_logits(model, [example.input_ids for example in examples], self.pad_id)
        targets = torch.tensor([example.label for example in examples], dtype=torch.int64)
        return nn.functional.cross_entropy(
            logits.float(), targets.to(logits.device, non_blocking=True), reduction="sum"
        )


# -- the head ----------------------------------------------------------------------------------------------------


def head_state(model: Any) -> dict[str, Tensor]:
    """A copy of the head's tensors, fp32, on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in head_parameters(model).items()}


def set_head(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give the model's head these values, perhaps for another number of labels than it has now.

    With the number it has, values are written into the same parameters; a parameter whose size changes is replaced
    (so none that an optimizer holds may). AdapterError, and no change, if names or other sizes differ.
    """
    current = head_parameters(model)
    if set(current) != set(tensors):
        raise AdapterError(f"head: tensors {sorted(tensors)} found, {sorted(current)} needed")
    resized = {name: tensors[name].shape for name in current if tensors[name].shape != current[name].shape}
    labels = next((shape[0] for shape in resized.values() if shape), model.config.num_labels)
    layers = {name.rpartition(".")[0] for name in resized}
    for name, parameter in current.items():
        shape = tuple(parameter.shape)
        if name.rpartition(".")[0] in layers and shape[0] == model.config.num_labels:
            shape = (labels, *shape[1:])
        if tuple(tensors[name].shape) != shape or labels < 2:
            raise AdapterError(f"head: {name} has shape {list(tensors[name].shape)}, {list(shape)} needed")
    with torch.no_grad():
        for name, parameter in current.items():
            if name in resized:
                layer, _, leaf = name.rpartition(".")
                value = tensors[name].to(parameter.device, parameter.dtype, copy=True)
                setattr(model.get_submodule(layer), leaf, nn.Parameter(value, parameter.requires_grad))
            else:
                parameter.copy_(tensors[name])
    if resized:
        model.config.num_labels = model.num_labels = labels


# -- prediction --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_labels(
    model: Any, tokenizer: Any, prompt: PromptSpec, rows: Sequence[Row], labels: Sequence[str], batch_size: int = 24
) -> list[int]:
    """Number of the likeliest label of each row, in order; targets are not looked at.

    ConfigError if the model's head is for another number of labels.
    """
    if model.config.num_labels != len(labels):
        raise ConfigError(f"{len(labels)} labels, but the model's head is for {model.config.num_labels}")
    ids = [encode_text(tokenizer, prompt, row) for row in rows]
    found = [0] * len(rows)
    for batch in batches(ids, by_length(ids), batch_size):
        best = label_logits(model, [ids[i] for i in batch], int(tokenizer.pad_token_id)).argmax(-1)
        for i, label in zip(batch, best.tolist(), strict=True):
            found[i] = label
    return found


def evaluate_labels(
    model: Any, tokenizer: Any, rows: Sequence[Row], spec: ClassifySpec, batch_size: int = 24
) -> ClassificationResult:
    """Score `rows` under `spec`. DataError if a row's label is none of `spec.labels`."""
    targets = tuple(label_number(row, spec.labels) for row in rows)
    predicted = predict_labels(model, tokenizer, spec.prompt, rows, spec.labels, batch_size)
    return ClassificationResult(spec.labels, LabelScores(tuple(predicted), targets, spec.metric))
