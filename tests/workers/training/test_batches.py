"""Batches: one task's own, several tasks' mixed evenly, and how a batch is cut into parts of similar length."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from workers.text.prompt import length_bucketed_batches
from workers.training.batches import MOST_PADDING, cut_by_length, mixed_batches, own_batches, padding_share

tasks = st.lists(st.lists(st.integers(1, 200), min_size=3, max_size=12), min_size=1, max_size=6)


@given(lengths=tasks, per_task=st.integers(1, 3), steps=st.integers(1, 9), part=st.integers(1, 8), seed=st.integers(0))
def test_every_batch_holds_every_task_evenly(
    lengths: list[list[int]], per_task: int, steps: int, part: int, seed: int
) -> None:
    batches = mixed_batches(lengths, per_task, steps, seed, part)
    assert batches == mixed_batches(lengths, per_task, steps, seed, part)
    assert batches == mixed_batches(lengths, per_task, steps + 3, seed, part)[:steps]
    owner = [at for at, task in enumerate(lengths) for _ in task]
    flat = [length for task in lengths for length in task]
    taken: list[Counter[int]] = [Counter() for _ in lengths]
    assert len(batches) == steps
    for batch in batches:
        rows = [row for part in batch for row in part]
        assert Counter(owner[row] for row in rows) == dict.fromkeys(range(len(lengths)), per_task)
        for row in rows:
            taken[owner[row]][row] += 1
    for at, task in enumerate(lengths):  # a row comes again when the others have come
        counts = [taken[at][row] for row in range(len(flat)) if owner[row] == at]
        assert max(counts) - min(counts) <= 1, task


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40), part=st.integers(1, 9))
def test_parts_are_of_similar_length_and_of_few_rows(lengths: list[int], part: int) -> None:
    batch = cut_by_length(range(len(lengths)), lengths, part)
    assert sorted(row for rows in batch for row in rows) == list(range(len(lengths)))
    for rows in batch:
        assert 1 <= len(rows) <= part
        assert padding_share([[rows]], lengths) <= MOST_PADDING + 1e-9
    assert padding_share([batch], lengths) <= MOST_PADDING + 1e-9
    longest_first = [lengths[row] for rows in batch for row in rows]
    assert longest_first == sorted(longest_first, reverse=True)


def test_rows_of_one_length_are_not_cut_without_need() -> None:
    assert cut_by_length([4, 2, 0], [7] * 5, 8) == [[0, 2, 4]]
    assert cut_by_length(range(5), [7] * 5, 2) == [[0, 1], [2, 3], [4]]
    assert cut_by_length(range(3), [100, 50, 49], 8) == [[0], [1, 2]]


def test_another_seed_is_another_order() -> None:
    lengths = [[5] * 20, [6] * 20]
    assert mixed_batches(lengths, 1, 5, 0, 8) != mixed_batches(lengths, 1, 5, 1, 8)


@pytest.mark.parametrize(("per_task", "steps", "part"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (3, 1, 1)])
def test_what_is_no_batch_is_refused(per_task: int, steps: int, part: int) -> None:
    with pytest.raises(ConfigError):
        mixed_batches([[4, 4], [4, 4, 4]], per_task, steps, 0, part)


def test_own_batches_are_epochs_cut_into_parts() -> None:
    lengths = [3, 9, 4, 8, 5, 7, 6]
    whole = list(islice(own_batches(lengths, 4, seed=1), 4))
    epochs = [*length_bucketed_batches(lengths, 4, 1, 0), *length_bucketed_batches(lengths, 4, 1, 1)]
    assert whole == [[rows] for rows in epochs]
    parts = list(islice(own_batches(lengths, 4, seed=1, part_rows=3), 4))
    assert parts == [[rows[:3], *([rows[3:]] if rows[3:] else [])] for rows in epochs]
