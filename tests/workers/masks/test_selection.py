"""Selection within a tensor: exact budgets, stable random streams, ties by index, N of every group, random counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError, FactoryError
from workers.masks import selection
from workers.masks.selection import (
    random_counts,
    random_groups,
    random_indices,
    random_units,
    top_groups,
    top_indices,
    top_units,
)

DENSITY = st.one_of(st.just(1.0), st.floats(1e-4, 1.0))


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([None, (1, 3), (2, 1), (2, 3)]), DENSITY)
@settings(max_examples=100, deadline=None)
def test_budgets_are_exact(height: int, width: int, block: tuple[int, int] | None, density: float) -> None:
    shape = (2 * height, 3 * width)
    total = shape[0] * shape[1] // (block[0] * block[1] if block else 1)
    count = max(1, round(density * total))
    score = torch.randint(3, shape, generator=torch.Generator().manual_seed(height)).float()
    for units in (
        random_units(shape, density, 0, "w", block),
        top_units(score, density, block),
        top_units(score, density, block, keep="smallest"),
    ):
        assert units.tolist() == sorted(set(units.tolist()))
        assert units.numel() == count
        assert int(units[0]) >= 0
        assert int(units[-1]) < total


def test_random_masks_differ_by_tensor_and_seed_and_are_stable() -> None:
    base = random_indices((64, 64), 0.05, 0, "layers.0.w")
    assert torch.equal(base, random_indices((64, 64), 0.05, 0, "layers.0.w"))
    assert not torch.equal(base, random_indices((64, 64), 0.05, 0, "layers.1.w"))
    assert not torch.equal(base, random_indices((64, 64), 0.05, 1, "layers.0.w"))
    # The draw is part of every expert's identity: this changes only together with the mask's algorithm version.
    assert random_units((20, 10), 0.05, 7, "golden").tolist() == GOLDEN
    assert random_units((64, 32), 0.9, 7, "golden", (8, 8)).numel() == 29
    assert random_groups((2, 8), 1, 4, 7).tolist() == GOLDEN_GROUPS
    assert random_counts([1000, 2000, 500], [1, 1, 1], 350, 7) == GOLDEN_COUNTS


GOLDEN = [7, 40, 71, 82, 96, 97, 124, 163, 167, 169]
GOLDEN_GROUPS = [2, 7, 10, 14]
GOLDEN_COUNTS = [110, 197, 43]


def test_random_masks_are_uniform() -> None:
    hits, grouped = torch.zeros(40), torch.zeros(40)
    for seed in range(600):
        hits[random_units((8, 5), 0.4, seed, "w")] += 1
        grouped[random_groups((4, 10), 2, 5, seed)] += 1
    assert hits.sum() == grouped.sum() == 600 * 16
    assert min(hits.min(), grouped.min()) > 180
    assert max(hits.max(), grouped.max()) < 300


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("block", [None, (2, 4)])
def test_top_matches_a_full_sort_with_ties_by_index(block: tuple[int, int] | None, keep: str) -> None:
    score = torch.randint(0, 4, (12, 16), generator=torch.Generator().manual_seed(1)).float()
    units = score if block is None else score.view(6, 2, 4, 4).sum((1, 3))
    order = torch.sort(units.reshape(-1), descending=keep == "largest", stable=True).indices
    for density in (0.05, 0.3, 0.77, 1.0):
        want = order[: max(1, round(density * order.numel()))].sort().values
        assert torch.equal(top_units(score, density, block, keep=keep), want)
    assert top_indices(score, 0.25, block).numel() == 48


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 9), st.data(), st.sampled_from(["largest", "smallest"]))
@settings(max_examples=100, deadline=None)
def test_every_group_keeps_its_best(rows: int, groups: int, group: int, data: st.DataObject, keep: str) -> None:
    kept, shape = data.draw(st.integers(1, group)), (rows, groups * group)
    score = torch.randint(4, shape, generator=torch.Generator().manual_seed(rows)).float()
    want = []
    for start in range(0, rows * groups * group, group):
        values = score.view(-1)[start : start + group].tolist()
        ranked = sorted(range(group), key=lambda i: (-values[i] if keep == "largest" else values[i], i))
        want += sorted(start + i for i in ranked[:kept])
    assert top_groups(score, kept, group, keep=keep).tolist() == want
    drawn = random_groups(shape, kept, group, 0)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert torch.bincount(drawn // group, minlength=rows * groups).tolist() == [kept] * (rows * groups)


def test_groups_in_chunks_are_those_of_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.rand(6, 40)
    whole, drawn = top_groups(score, 3, 8), random_groups((6, 40), 3, 8, 1)
    monkeypatch.setattr(selection, "CHUNK", 24)
    assert torch.equal(top_groups(score, 3, 8), whole)
    assert torch.equal(random_groups((6, 40), 3, 8, 1), drawn)
    with pytest.raises(ConfigError, match=r"w: groups of 7 do not divide its rows of 40"):
        top_groups(score, 3, 7, "w")


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(keep: str, bad: float) -> None:
    score = torch.tensor([[1.0, bad, 0.0, 2.0]])
    with pytest.raises(FactoryError, match="not finite"):
        top_units(score, 0.25, keep=keep)
    with pytest.raises(FactoryError, match="not finite"):
        top_groups(score, 1, 4, keep=keep)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.floats(0.0, 1.0), st.integers(0, 99), st.booleans())
@settings(max_examples=150, deadline=None)
def test_random_counts_are_exact(sizes: list[int], share: float, seed: int, mixed: bool) -> None:
    sizes[0] += 1
    areas = [3 + i * mixed for i in range(len(sizes))]
    total = sum(size * area for size, area in zip(sizes, areas, strict=True))
    elements = max(1, round(share * total))
    counts = random_counts(sizes, areas, elements, seed)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    used = sum(count * area for count, area in zip(counts, areas, strict=True))
    if not mixed:
        assert sum(counts) == max(1, elements // 3)
    elif elements >= max(areas):
        assert elements - max(areas) < used <= elements
    else:
        assert sum(counts) >= 1


def test_random_counts_follow_the_hypergeometric_distribution() -> None:
    sizes, count = [30, 50, 20], 40
    for areas in ([1, 1, 1], [1, 1, 2]):
        drawn = torch.tensor([random_counts(sizes, areas, count, seed) for seed in range(3000)], dtype=torch.float64)
        share = drawn / drawn.sum(1, keepdim=True)
        assert torch.allclose(share.mean(0), torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64), atol=0.008)
        if areas == [1, 1, 1]:
            p = torch.tensor(sizes, dtype=torch.float64) / 100
            assert torch.allclose(drawn.var(0), count * p * (1 - p) * (100 - count) / 99, rtol=0.12)


def test_random_counts_of_more_units_than_numpy_draws() -> None:
    sizes = [3 * 10**9, 10**9, 4096]
    counts = random_counts(sizes, [1, 1, 1], 2 * 10**8, 0)
    assert sum(counts) == 2 * 10**8
    assert abs(counts[0] - 1.5e8) < 1e5
