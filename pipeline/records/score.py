"""A score as a run knows it: of what it is, and what an evaluation's manifest says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from workers.scoring.metrics import LabelScores


class ScoreKey(NamedTuple):
    """`model` is base, few_shot, expert, merged, serving, multitask, routed,
    merged_few_shot, or a candidate as JSON; on the gate split
    expert_champion and merged_champion too."""

    model: str
    split: str
    task: str


@dataclass(frozen=True)
class Score:
    """One model on one split of one task. Scores lie in 0-1, Matthews' correlation in -1 to 1."""

    metric: str
    score: float
    n: int
    """Rows."""
    format_free: float
    """What does not ask for a format: by option log-likelihood for choices, Rouge-L for the rest."""
    rows: tuple[float, ...]
    """Of each row."""
    labels: LabelScores | None = None
    """Of a classification, whose metric may be no mean of rows."""
    swap_seconds: float | None = None
    """What fetching and applying the adapter took, if it was not in place; none of scores older than this figure."""

    @staticmethod
    def of(meta: Mapping[str, Any]) -> "Score":
        """The score that a manifest's notes tell."""
        labels = None
        if "predicted" in meta:
            labels = LabelScores(tuple(meta["predicted"]), tuple(meta["target"]), meta["metric"])
        rows = tuple(meta["scores"])
        return Score(
            meta["metric"], meta["score"], meta["n"], meta["format_free"], rows, labels, meta.get("swap_seconds")
        )  # fmt: skip

    @property
    def resampled(self) -> Sequence[float] | LabelScores:
        """What an interval resamples: scores of rows, or labels whose metric is no mean of rows."""
        return self.labels or self.rows
