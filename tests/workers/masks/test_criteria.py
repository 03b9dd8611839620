"""Scores against their definitions by plain autograd, on plain modules: one and several batches, Fisher, memory."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from infra.errors import ConfigError
from workers.base.modules import Target, find_targets
from workers.masks.criteria import score_scan

CRITERIA = ["magnitude", "gradient", "connection_sensitivity", "fisher"]
SIDE = 256


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4, bias=False)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 5, 6, generator=generator).to(dtype) for rows in (3, 2)]


def example_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Loss of one example [1, length, in], with a gradient that differs between examples."""
    return model(x).float().pow(3).mean()


def batch_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).float().pow(3).mean()


def definition(model: nn.Module, criterion: str, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The scores as the module's docstring defines them, up to one factor for all weights."""
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = list(linear.values())
    if criterion == "fisher":
        examples = [row for batch in data for row in batch.split(1)]
        grads = [torch.autograd.grad(example_loss(model, row), weights) for row in examples]
        return {name: torch.stack([g[i].float() for g in grads]).square().mean(0) for i, name in enumerate(linear)}
    each = [torch.autograd.grad(batch_loss(model, batch), weights) for batch in data]
    mean = [torch.stack([g[i].float() for g in each]).mean(0) for i in range(len(weights))]
    score = {
        "magnitude": lambda w, g: w.detach().float().abs(),
        "gradient": lambda w, g: g.abs(),
        "connection_sensitivity": lambda w, g: (w.detach().float() * g).abs(),
    }[criterion]
    return {name: score(w, g) for (name, w), g in zip(linear.items(), mean, strict=True)}


def scores(model: nn.Module, criterion: str, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    scan = score_scan(
        model, find_targets(model, "all_linear"), criterion, [lambda b=b: batch_loss(model, b) for b in data]
    )
    for _ in range(2):  # a scan can be repeated
        found.clear()
        scan(lambda name, score: found.update({name: score.clone()}))
    return found


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_follow_their_definition(criterion: str, dtype: torch.dtype, tolerance: float, count: int) -> None:
    model, data = mlp(dtype), batches(dtype)[:count]
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    found, want = scores(model, criterion, data), definition(model, criterion, data)
    assert set(found) == set(want) == {"0", "2"}
    factor = float(want["0"].sum() / found["0"].sum())
    for name in want:
        assert found[name].dtype == torch.float32
        limit = tolerance * float(want[name].max())
        torch.testing.assert_close(found[name] * factor, want[name], rtol=tolerance, atol=limit)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert "forward" not in model[0].__dict__


def test_rows_are_scored_as_in_the_whole() -> None:
    model, data = mlp(), batches()
    losses = [lambda b=b: batch_loss(model, b) for b in data]
    part: dict[str, torch.Tensor] = {}
    for criterion in CRITERIA:
        whole = scores(model, criterion, data)["0"]
        score_scan(model, {"0": Target(model[0], range(3, 8))}, criterion, losses)(lambda n, s: part.update({n: s}))
        torch.testing.assert_close(part["0"], whole[3:8])


def test_fisher_needs_rows() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match=r"2: its input has shape \[7, 10\].*\[rows, length, in\].*fisher"):
        scores(model, "fisher", [torch.randn(7, 6)])
    assert set(scores(model, "gradient", [torch.randn(7, 6)])) == {"0", "2"}


def peak(work: Callable[[], object]) -> float:
    """Most memory allocated at a time while ``work`` runs, in dense fp32 scores of SIDE x SIDE."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest / (4 * SIDE * SIDE)


@pytest.mark.parametrize(("criterion", "dense"), [("magnitude", 1), ("gradient", 1), ("fisher", 2)])
def test_one_dense_score_is_alive_at_a_time(criterion: str, dense: int) -> None:
    """Eight layers: streamed, one score (Fisher: and one product); over two batches, eight sums and one product."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(8)))
    x = torch.randn(2, 3, SIDE)
    targets = find_targets(model, "all_linear")

    def run(count: int) -> None:
        score_scan(model, targets, criterion, [lambda: model(x).square().mean()] * count)(lambda name, score: None)

    run(1)
    assert dense <= peak(lambda: run(1)) < dense + 0.5
    if criterion != "magnitude":
        assert 8 + dense - 1 <= peak(lambda: run(2)) < 8 + dense + 0.5
