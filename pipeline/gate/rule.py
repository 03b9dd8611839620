"""The promotion gate: whether a challenger takes the champion's place, from their scores on the same rows.

Paired bootstrap (Efron & Tibshirani 1993, percentile interval; for paired system comparison Koehn 2004): in each
resample every task draws as many of its rows as it has, with replacement, the same rows for both models; the task's
metric is computed for both, the differences are averaged over tasks without weights. A task's resampled differences are
spread by sqrt(n / (n - 1)) around its difference on all n rows, for resampled means vary by that much too little. Tasks
are taken as given, so the answer holds for these tasks. The interval is the middle ``confidence`` of the resampled
differences; its lower end decides:

- ``superior``: promoted if the lower end lies above ``margin``.
- ``not_worse``: promoted if the lower end lies at or above ``-margin`` (non-inferiority).

A challenger that is no better than ``margin`` (or worse by ``margin`` and more) is so promoted in about
``(1 - confidence) / 2`` of all cases. Two models with equal scores on every row are never superior and always
not worse. With margin 0, ``not_worse`` asks nearly as much as ``superior``: give it a margin.

Pure functions on numbers. Not covered: which rows are scored, and what follows from the decision.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infra.errors import ConfigError
from pipeline.config.model import GateConfig
from workers.scoring.metrics import LabelScores, drawn_label_scores, label_score

TaskScores = Sequence[float] | LabelScores
"""A task's rows: their scores, whose mean is the task's score, or labels, whose metric is no mean of rows."""
_CELLS = 1 << 21  # most row numbers drawn at a time: 16 MiB
_DIGITS = 12  # sums in another order differ behind these


@dataclass(frozen=True)
class GateDecision:
    """Whether the challenger is promoted, on what grounds, and a sentence that says so. Scores are means over tasks."""

    promoted: bool
    champion: float
    challenger: float
    difference: float
    """Challenger less champion."""
    low: float
    high: float
    """Interval of the difference."""
    tasks: dict[str, tuple[float, float]]
    """Scores of champion and challenger by task."""
    reason: str


def decide(
    champion: Mapping[str, TaskScores],
    challenger: Mapping[str, TaskScores],
    config: GateConfig,
    opponent: str = "champion",
) -> GateDecision:
    """Compare two models on the same rows of the same tasks. ``opponent`` is what the reason calls the first one.

    The decision is a function of scores, task names and configuration, whatever the order of the tasks. ConfigError
    if there is no task, or the two were not scored on the same rows.
    """
    _check(champion, challenger)
    names = sorted(champion)
    tasks = {name: (task_score(champion[name]), task_score(challenger[name])) for name in names}
    before, after = (math.fsum(pair[i] for pair in tasks.values()) / len(tasks) for i in (0, 1))
    differences = resampled_differences(champion, challenger, config.resamples, config.seed)
    tail = (1.0 - config.confidence) / 2.0
    low, high = (round(float(end), _DIGITS) for end in np.quantile(differences, [tail, 1.0 - tail]))
    promoted = low > config.margin if config.rule == "superior" else low >= -config.margin
    difference = round(after - before, _DIGITS)
    words = {"superior": ("not superior", "superior"), "not_worse": ("may be worse", "not worse")}
    verdict = words[config.rule][promoted] + (f" by more than {config.margin:g}" if config.margin else "")
    reason = (
        f"challenger {after:.3f} vs {opponent} {before:.3f}, difference {_signed(difference)} "
        f"[{_signed(low)}, {_signed(high)}] at {100 * config.confidence:g} %: {verdict}"
    )
    return GateDecision(promoted, before, after, difference, low, high, tasks, reason)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def task_score(scores: TaskScores) -> float:
    """A task's score on all its rows."""
    return label_score(scores) if isinstance(scores, LabelScores) else math.fsum(scores) / len(scores)


def resampled_differences(
    champion: Mapping[str, TaskScores], challenger: Mapping[str, TaskScores], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Challenger less champion, mean over tasks, in each resample and so spread: float64 [resamples].

    Each task draws from a generator of its own, seeded with its name, so one task's draws do not depend on the others.
    """
    total = np.zeros(resamples)
    for name in sorted(champion):
        before, after = champion[name], challenger[name]
        generator = np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()])
        rows = len(before)
        step = max(1, _CELLS // rows)
        for start in range(0, resamples, step):
            draws = generator.integers(0, rows, size=(min(step, resamples - start), rows))
            total[start : start + step] += _spread_differences(before, after, draws)
    return total / len(champion)


def _spread_differences(before: TaskScores, after: TaskScores, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Differences in each draw, corrected for the number of rows."""
    rows = draws.shape[1]
    whole = float(_differences(before, after, np.arange(rows)[None])[0])
    return whole + (_differences(before, after, draws) - whole) * math.sqrt(rows / (rows - 1))


def _differences(before: TaskScores, after: TaskScores, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    if isinstance(before, LabelScores) and isinstance(after, LabelScores):
        return drawn_label_scores(after, draws) - drawn_label_scores(before, draws)
    rows = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    means: NDArray[np.float64] = rows[draws].mean(axis=1)
    return means


def _check(champion: Mapping[str, TaskScores], challenger: Mapping[str, TaskScores]) -> None:
    if not champion or champion.keys() != challenger.keys():
        one = ", ".join(sorted(champion.keys() ^ challenger.keys())) or "none at all"
        raise ConfigError(f"gate: both models need scores of the same tasks; scored for one of them only: {one}")
    for name, before in champion.items():
        after = challenger[name]
        if isinstance(before, LabelScores) and isinstance(after, LabelScores):
            same = before.metric == after.metric and before.target == after.target
        elif isinstance(before, LabelScores) or isinstance(after, LabelScores):
            same = False
        else:
            same = len(before) == len(after)
            if not all(map(math.isfinite, [*before, *after])):
                raise ConfigError(f"gate: a row of the task {name!r} has a score that is no number")
        if same and len(before) < 2:
            raise ConfigError(f"gate: the task {name!r} has {len(before)} gate rows; at least 2 are needed")
        if not same:
            raise ConfigError(
                f"gate: the task {name!r} was not scored on the same rows for both models "
                f"({len(before)} and {len(after)} rows); score both by one metric on the gate rows of today"
            )
