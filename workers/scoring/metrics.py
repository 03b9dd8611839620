"""Metrics of one row or of a set of labels, and intervals over rows and tasks.

Exact match and Rouge-L compare text; choice accuracy compares the option that the model finds likeliest. Accuracy, F1
and Matthews correlation compare a set of predicted labels with the right ones. Scores lie in 0..1, Matthews
correlation in -1..1. Generation and option log-likelihoods come from `workers.scoring.likelihood`, labels from
`workers.scoring.classification`, the words that Rouge-L compares from `workers.scoring.words`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infra.errors import ConfigError
from workers.scoring.words import symbols_of, words_of

#: Part of every evaluation's key: raise a metric's when its score, or the Rouge-L beside an exact match, can change.
METRIC_VERSIONS: Mapping[str, int] = {
    "exact_match": 2,
    "rouge_l": 2,
    "choice_accuracy": 1,
    "accuracy": 1,
    "f1": 1,
    "matthews": 1,
}

Metric = Literal["exact_match", "rouge_l", "choice_accuracy"]
METRICS: tuple[Metric, ...] = ("exact_match", "rouge_l", "choice_accuracy")
LabelMetric = Literal["accuracy", "f1", "matthews"]
CLASSIFICATION_METRICS: tuple[LabelMetric, ...] = ("accuracy", "f1", "matthews")


@dataclass(frozen=True)
class LabelScores:
    """Predicted and right label numbers of a task's rows, scored together: the metric is not a mean over rows."""

    predicted: tuple[int, ...]
    target: tuple[int, ...]
    metric: LabelMetric

    def __post_init__(self) -> None:
        if self.metric not in CLASSIFICATION_METRICS:
            raise ConfigError(
                f"metric {self.metric!r} does not score labels; accepted: {', '.join(CLASSIFICATION_METRICS)}"
            )
        if len(self.predicted) != len(self.target) or min((*self.predicted, *self.target), default=0) < 0:
            raise ConfigError("labels: as many predicted as right ones are needed, none of them negative")

    def __len__(self) -> int:
        return len(self.target)


def normalise_answer(text: str) -> str:
    """Characters composed (Unicode's NFC), outer whitespace removed, inner whitespace collapsed. Case and punctuation
    count, as in BIG-bench's exact match."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(prediction: str, targets: Sequence[str]) -> float:
    """1.0 if the prediction equals any target after `normalise_answer`, else 0.0."""
    wanted = normalise_answer(prediction)
    return float(any(wanted == normalise_answer(target) for target in targets))


def rouge_l(prediction: str, targets: Sequence[str]) -> float:
    """Best Rouge-L F1 over the targets (rouge-score's, no stemming) on the words of any script (`words_of`); a target
    without a word is compared by its symbols. Texts in ASCII with a word score as rouge-score has them."""
    return max((_rouge_l(prediction, target) for target in targets), default=0.0)


def _rouge_l(prediction: str, target: str) -> float:
    tokens = words_of if words_of(target) else symbols_of
    return float(_rouge_scorer(tokens).score(target, prediction)["rougeL"].fmeasure)


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer as rouge-score asks for one."""

    tokenize: Callable[[str], list[str]]


@cache
def _rouge_scorer(tokens: Callable[[str], list[str]]) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokens(tokens))


def choice_correct(option_scores: Sequence[float], options: Sequence[str], targets: Sequence[str]) -> float:
    """1.0 if the option with the highest score (the first of equals) is one of the targets, else 0.0."""
    best = max(range(len(options)), key=lambda i: option_scores[i])
    return float(options[best] in targets)


def text_metric(name: str) -> Callable[[str, Sequence[str]], float]:
    """The function behind a text metric's name; ConfigError for any other name."""
    functions = {"exact_match": exact_match, "rouge_l": rouge_l}
    if name not in functions:
        raise ConfigError(f"metric {name!r} does not score text; accepted here: {', '.join(functions)}")
    return functions[name]


def label_score(scores: LabelScores) -> float:
    """Accuracy, macro F1 or Matthews correlation of all rows. ConfigError if there is none.

    Macro F1 is the mean over the labels that occur, predicted or right. Matthews correlation is its multi-class form
    (Gorodkin 2004), 0 when predicted or right labels are all the same. Both agree with scikit-learn.
    """
    if not len(scores):
        raise ConfigError(f"{scores.metric}: at least one row is needed")
    return float(drawn_label_scores(scores, np.arange(len(scores))[None])[0])


def drawn_label_scores(scores: LabelScores, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """The metric of each of n draws [n, rows] of row numbers: float64 [n].

    All three are functions of counts per label: rows of that label, predictions of it, and both at once.
    """
    target, predicted = (np.asarray(labels, dtype=np.int64)[draws] for labels in (scores.target, scores.predicted))
    hit = target == predicted
    if scores.metric == "accuracy":
        return hit.mean(axis=1)
    labels = 1 + max(*scores.target, *scores.predicted)

    def count(chosen: NDArray[np.int64], where: NDArray[np.bool_] | bool = True) -> NDArray[np.float64]:
        cells = chosen + labels * np.arange(len(draws))[:, None]
        counts = np.bincount(cells[np.broadcast_to(where, cells.shape)], minlength=labels * len(draws))
        return counts.reshape(len(draws), labels).astype(np.float64)

    rows, guesses, hits = count(target), count(predicted), count(target, hit)
    if scores.metric == "f1":
        occurs = rows + guesses  # TP + FN + TP + FP
        f1 = np.divide(2 * hits, occurs, out=np.zeros_like(occurs), where=occurs > 0)
        return f1.sum(axis=1) / (occurs > 0).sum(axis=1)
    total = float(draws.shape[1])
    agreement = hits.sum(axis=1) * total - (rows * guesses).sum(axis=1)
    spread = (total**2 - (rows**2).sum(axis=1)) * (total**2 - (guesses**2).sum(axis=1))
    return np.divide(agreement, np.sqrt(spread), out=np.zeros_like(agreement), where=spread > 0)


def bootstrap_interval(
    task_row_scores: Sequence[Sequence[float] | LabelScores], seed: int, n: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the mean of task scores, rows resampled within each task (tasks are taken as given).

    A task is the scores of its rows, whose mean is its score, or labels, whose metric is computed anew from each
    resample. Returns (low, high), equal when every row scores the same. ConfigError if there is no task or a task has
    no row.
    """
    if not task_row_scores or any(len(rows) == 0 for rows in task_row_scores):
        raise ConfigError("bootstrap_interval: at least one task, and one row in each, is needed")
    generator = np.random.default_rng(seed)
    total = np.zeros(n)
    for rows in task_row_scores:
        draws = generator.integers(0, len(rows), size=(n, len(rows)))
        if isinstance(rows, LabelScores):
            total += drawn_label_scores(rows, draws)
        else:
            total += np.asarray(rows, dtype=np.float64)[draws].mean(axis=1)
    tail = (1.0 - 0.95) / 2.0
    low, high = np.quantile(total / len(task_row_scores), [tail, 1.0 - tail])
    return float(low), float(high)
