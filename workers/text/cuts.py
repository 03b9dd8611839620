"""How many rows lose something to the length limits: counted before a run, because a cut row is taught as it is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workers.text.literal import literal_ids_all
from workers.text.rows import Row

_BEGINNING = 12
"""Characters of an input that tell whether it begins like others."""


@dataclass(frozen=True)
class CutCounts:
    """Rows of a task's splits that are cut."""

    rows: int = 0
    """In all splits."""
    taught: int = 0
    """Of those, rows whose target is taught."""
    inputs: int = 0
    """Rows whose input loses its beginning."""
    instructions: int = 0
    """Of those, rows whose lost beginning is what at least half of the task's inputs begin with."""
    beginning: str = ""
    """That beginning."""
    targets: int = 0
    """Rows whose target loses its end, so that the model is not taught to stop."""
    either: int = 0
    """Rows of which input or target is cut."""

    @property
    def share(self) -> float:
        return self.either / max(1, self.rows)


def count_cuts(
    tokenizer: Any, taught: Sequence[Row], others: Sequence[Row], max_input_tokens: int, max_target_tokens: int | None
) -> CutCounts:
    """Of rows that are taught and others that are only asked: those that `workers.text.prompt` cuts.

    `max_target_tokens` counts the end token; None: targets are labels, which nothing cuts.
    """
    rows = [*taught, *others]
    inputs = _longer(tokenizer, [row.input for row in rows], max_input_tokens)
    targets = set[int]()
    if max_target_tokens is not None:
        targets = _longer(tokenizer, [row.targets[0] for row in taught], max_target_tokens - 1)
    beginning, count = "", 0
    if inputs:
        ((beginning, count),) = Counter(row.input[:_BEGINNING] for row in rows).most_common(1)
    common = len(rows) > 1 and 2 * count >= len(rows)
    lost = sum(rows[at].input.startswith(beginning) for at in inputs) if common else 0
    return CutCounts(
        len(rows), len(taught), len(inputs), lost, beginning if lost else "", len(targets), len(inputs | targets)
    )


def _longer(tokenizer: Any, texts: Sequence[str], tokens: int) -> set[int]:
    """Numbers of the texts that have more tokens. A token is at least one byte, so short ones are not tokenised."""
    unsure = [at for at, text in enumerate(texts) if len(text.encode("utf-8", "replace")) > tokens]
    encoded = literal_ids_all(tokenizer, [texts[at] for at in unsure])
    return {at for at, ids in zip(unsure, encoded, strict=True) if len(ids) > tokens}
