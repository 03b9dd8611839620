"""Metrics of one row, and intervals over rows and tasks. All scores lie in 0..1.

Exact match and Rouge-L compare text; choice accuracy compares the option that the model finds likeliest.
Generation and option log-likelihoods come from `workers.scoring`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from infra.errors import ConfigError

#: Part of every evaluation's key: raise it when any score below can change.
METRIC_VERSION = 1

Metric = Literal["exact_match", "rouge_l", "choice_accuracy"]
METRICS: tuple[Metric, ...] = ("exact_match", "rouge_l", "choice_accuracy")


def normalise_answer(text: str) -> str:
    """Outer whitespace removed, inner whitespace collapsed. Case and punctuation count, as in BIG-bench's exact
    match."""
    return " ".join(text.split())


def exact_match(prediction: str, targets: Sequence[str]) -> float:
    """1.0 if the prediction equals any target after `normalise_answer`, else 0.0."""
    wanted = normalise_answer(prediction)
    return float(any(wanted == normalise_answer(target) for target in targets))


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(prediction: str, targets: Sequence[str]) -> float:
    """Best Rouge-L F1 over the targets (rouge-score, no stemming; its tokens are lower-cased ASCII letters and
    digits)."""
    scorer = _rouge_scorer()
    return max((float(scorer.score(target, prediction)["rougeL"].fmeasure) for target in targets), default=0.0)


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


def bootstrap_interval(
    task_row_scores: Sequence[Sequence[float]], seed: int, n: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of task means, rows resampled within each task (tasks are taken as given).

    Returns (low, high), equal when every row scores the same. ConfigError if there is no task or a task has no row.
    """
    if not task_row_scores or any(len(rows) == 0 for rows in task_row_scores):
        raise ConfigError("bootstrap_interval: at least one task, and one row in each, is needed")
    generator = np.random.default_rng(seed)
    total = np.zeros(n)
    for rows in task_row_scores:
        scores = np.asarray(rows, dtype=np.float64)
        total += scores[generator.integers(0, len(scores), size=(n, len(scores)))].mean(axis=1)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(total / len(task_row_scores), [tail, 1.0 - tail])
    return float(low), float(high)
