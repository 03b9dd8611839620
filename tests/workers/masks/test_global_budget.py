"""The budget across modules: two passes against a full ranking, ties, unequal units, passes that differ."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import FactoryError
from workers.masks import global_budget
from workers.masks.global_budget import Scan, global_units

Shape = tuple[int, int]
UNITS: dict[str, Callable[[Shape], Shape | None]] = {
    "element": lambda shape: None,
    "block": lambda shape: (2, 2),
    "row": lambda shape: (1, shape[1]),
    "column": lambda shape: (shape[0], 1),
}


def fixed(scores: dict[str, torch.Tensor]) -> Scan:
    """A scan in backward order of scores that stay the same."""

    def scan(take: Callable[[str, torch.Tensor], None]) -> None:
        for name in reversed(scores):
            take(name, scores[name])

    return scan


def ranked(scores: dict[str, torch.Tensor], kind: str, elements: int, keep: str) -> dict[str, list[int]]:
    """The definition: sort all units of the model by mean score, module order, index; take what fits."""
    units = []
    for order, (name, score) in enumerate(scores.items()):
        height, width = UNITS[kind](tuple(score.shape)) or (1, 1)
        cells = score.unfold(0, height, height).unfold(1, width, width).reshape(-1, height * width)
        for index, cell in enumerate(cells):
            mean = float(cell.sum() / (height * width))
            units.append((-mean if keep == "largest" else mean, order, index, name, height * width))
    units.sort()
    chosen: dict[str, list[int]] = {name: [] for name in scores}
    used = 0
    for at, (_, _, index, name, area) in enumerate(units):
        if used + area > elements and at:
            break
        used += area
        chosen[name].append(index)
    return {name: sorted(ids) for name, ids in chosen.items()}


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from(["largest", "smallest"]),
    st.floats(0.0, 1.0),
    st.integers(1, 40),
    st.integers(0, 99),
)
@settings(max_examples=250, deadline=None)
def test_two_passes_equal_a_full_ranking(
    halves: list[Shape], kind: str, keep: str, share: float, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"m{i}": torch.randint(levels, (2 * h, 2 * w), generator=generator).float() * 2.0 ** (i - 2)
        for i, (h, w) in enumerate(halves)
    }
    elements = max(1, round(share * sum(score.numel() for score in scores.values())))
    blocks = {name: UNITS[kind](tuple(score.shape)) for name, score in scores.items()}
    found = global_units(fixed(scores), blocks, elements, keep)
    assert {name: ids.tolist() for name, ids in found.items()} == ranked(scores, kind, elements, keep)


@pytest.mark.parametrize("noise", [1e-6, 0.02, 3.0])
@pytest.mark.parametrize("keep", ["largest", "smallest"])
def test_the_budget_is_exact_when_the_passes_differ(noise: float, keep: str) -> None:
    """The worst case: every later pass is shifted so that units fall out of the bins that the first one pointed to."""
    generator = torch.Generator().manual_seed(0)
    scores = {f"m{i}": torch.rand(40, 30, generator=generator) + 0.1 for i in range(3)}
    passes = 0

    def scan(take: Callable[[str, torch.Tensor], None]) -> None:
        nonlocal passes
        passes += 1
        shift = 1.0 if passes == 1 else 1 - noise / (1 + noise) if keep == "largest" else 1 + noise
        for name, score in scores.items():
            take(name, score * shift)

    found = global_units(scan, dict.fromkeys(scores), 200, keep)
    assert sum(ids.numel() for ids in found.values()) == 200
    assert {name: ids.tolist() for name, ids in found.items()} == ranked(scores, "element", 200, keep)
    assert passes == {1e-6: 2, 0.02: 3, 3.0: 4}[noise]


@pytest.mark.parametrize("block", [None, (2, 1)])
def test_only_the_units_that_can_matter_are_collected(block: Shape | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {f"m{i}": torch.rand(100, 100, generator=generator) for i in range(4)}
    collected = []
    cut = global_budget._cut

    def counting(found: dict[str, global_budget._Candidates], elements: int) -> dict[str, torch.Tensor]:
        collected.append(sum(one.ids.numel() for one in found.values()))
        return cut(found, elements)

    monkeypatch.setattr(global_budget, "_cut", counting)
    global_units(fixed(scores), dict.fromkeys(scores, block), 4000)
    area = 1 if block is None else 2
    assert 4000 <= area * collected[0] < 4000 + 2 * 0.01 * 40_000


def test_scores_that_are_not_finite() -> None:
    scores = {"a": torch.rand(4, 4), "layer.b": torch.rand(4, 4)}
    scores["layer.b"][1, 2] = float("nan")
    with pytest.raises(FactoryError, match=r"layer\.b: the mask scores are not finite"):
        global_units(fixed(scores), dict.fromkeys(scores), 3)
