"""Which rows each optimizer step sees, and in which parts they go through the model. Plain numbers, no tensors.

One task's rows come in epochs, in batches of similar length. Rows of several tasks are mixed evenly in every batch, so
long and short ones meet: such a batch is cut by length, and its parts' gradients add up to that of the batch.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from infra.errors import ConfigError
from workers.text.prompt import length_bucketed_batches

Batch = list[list[int]]
"""Numbers of the rows of one optimizer step, by the part of it (micro-batch) that goes through the model at a time."""
MOST_PADDING = 0.1
"""Share of a part's tokens that may be padding where a batch is cut by length."""


def own_batches(lengths: Sequence[int], batch_size: int, seed: int, part_rows: int | None = None) -> Iterator[Batch]:
    """One task's batches without end, epoch after epoch, each epoch in an order of its own; parts of `part_rows` rows.

    `lengths`: tokens of every row.
    """
    size = part_rows or batch_size
    for epoch in itertools.count():
        for rows in length_bucketed_batches(lengths, min(batch_size, len(lengths)), seed, epoch):
            yield [rows[at : at + size] for at in range(0, len(rows), size)]


def mixed_batches(
    lengths: Sequence[Sequence[int]], rows_per_task: int, steps: int, seed: int, part_rows: int,
    beside: Sequence[Sequence[int]] = (), rows_beside: int = 0,
) -> list[Batch]:  # fmt: skip
    """The rows of `mixed_rows`, cut by length. `lengths`: tokens of every row, by task; `beside`: of the others.

    Raises ConfigError as that does.
    """
    if part_rows < 1:
        raise ConfigError(f"{part_rows} rows at a time: at least 1")
    flat = [length for task in (*lengths, *beside) for length in task]
    rows = mixed_rows(list(map(len, lengths)), rows_per_task, steps, seed, list(map(len, beside)), rows_beside)
    return [cut_by_length(step, flat, part_rows) for step in rows]


def mixed_rows(
    counts: Sequence[int], rows_per_task: int, steps: int, seed: int, beside: Sequence[int] = (), rows_beside: int = 0
) -> list[list[int]]:
    """Numbers of the rows of each of `steps` batches: `rows_per_task` of each task, and `rows_beside` of the tasks
    `beside`, which take turns.

    `counts`, `beside`: rows of every task; rows are numbered task after task. Each task goes through its own rows in
    an order of its own, and again in another one when they are used up. The first batches are those of more steps, too.

    Raises ConfigError for fewer than one step or row, or for a task that has fewer rows than a batch takes of it.
    """
    if steps < 1 or rows_per_task < 1:
        raise ConfigError(f"{steps} steps of {rows_per_task} rows a task: at least 1 of each")
    if (fewest := min(counts)) < rows_per_task:
        raise ConfigError(f"{rows_per_task} rows a task in every batch, but a task has {fewest}")
    every = [*counts, *beside]
    starts = itertools.accumulate(every, initial=0)
    orders = [_shuffled(first, count, f"mixed:{seed}:{at}")
              for at, (first, count) in enumerate(zip(starts, every, strict=False))]  # fmt: skip
    turns = itertools.cycle(orders[len(counts) :])
    return [
        [row for order in orders[: len(counts)] for row in itertools.islice(order, rows_per_task)]
        + [next(order) for order in itertools.islice(turns, rows_beside)]
        for _ in range(steps)
    ]


def _shuffled(first: int, count: int, seed: str) -> Iterator[int]:
    """`count` numbers from `first`, shuffled anew each time they are used up."""
    for epoch in itertools.count():
        numbers = list(range(first, first + count))
        random.Random(f"{seed}:{epoch}").shuffle(numbers)
        yield from numbers


def cut_by_length(rows: Sequence[int], lengths: Sequence[int], part_rows: int) -> Batch:
    """The rows in parts of at most `part_rows`, longest first, in each of which at most `MOST_PADDING` is padding."""
    parts: Batch = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if parts and len(parts[-1]) < part_rows:
            padded = lengths[parts[-1][0]] * (len(parts[-1]) + 1)
            if tokens + lengths[row] >= (1 - MOST_PADDING) * padded:
                parts[-1].append(row)
                tokens += lengths[row]
                continue
        parts.append([row])
        tokens = lengths[row]
    return parts


def padding_share(batches: Sequence[Batch], lengths: Sequence[int]) -> float:
    """Share of the tokens that go through the model that is padding."""
    parts = [part for batch in batches for part in batch]
    padded = sum(len(part) * max(lengths[row] for row in part) for part in parts)
    return 1 - sum(lengths[row] for part in parts for row in part) / padded
