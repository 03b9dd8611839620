"""The promotion gate: its rule, its error rates by simulation, and what must not change a decision."""

import time
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import ConfigError
from pipeline.config.model import GateConfig
from pipeline.gate.rule import TaskScores, decide, resampled_differences, task_score
from workers.scoring.metrics import LabelMetric, LabelScores

FAST = GateConfig(resamples=1000)


def config(**changes: object) -> GateConfig:
    return GateConfig.model_validate({"resamples": 1000, **changes})


ROWS = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n, max_size=n)] * 2)
)
PAIRS = st.dictionaries(st.sampled_from("abcde"), ROWS, min_size=1)


def split(pairs: dict[str, tuple[list[float], list[float]]]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


# -- the rule ----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(PAIRS)
def test_equal_models_are_never_superior_and_never_worse(pairs: dict[str, tuple[list[float], list[float]]]) -> None:
    champion, _ = split(pairs)
    decision = decide(champion, champion, FAST)
    assert (decision.promoted, decision.difference, decision.low, decision.high) == (False, 0.0, 0.0, 0.0)
    assert decide(champion, champion, config(rule="not_worse")).promoted


@settings(max_examples=30)
@given(PAIRS, st.sampled_from([0.0, 0.125, 0.5]))
def test_the_lower_end_decides(pairs: dict[str, tuple[list[float], list[float]]], margin: float) -> None:
    champion, challenger = split(pairs)
    superior = decide(champion, challenger, config(margin=margin))
    not_worse = decide(champion, challenger, config(margin=margin, rule="not_worse"))
    assert (superior.low, superior.high) == (not_worse.low, not_worse.high)
    assert superior.promoted == (superior.low > margin)
    assert not_worse.promoted == (superior.low >= -margin)
    assert superior.challenger - superior.champion == pytest.approx(superior.difference, abs=1e-9)
    means = [np.mean([np.mean(rows) for rows in model.values()]) for model in (champion, challenger)]
    assert [superior.champion, superior.challenger] == pytest.approx(means)


@settings(max_examples=30)
@given(PAIRS)
def test_more_confidence_and_more_margin_never_promote_more(
    pairs: dict[str, tuple[list[float], list[float]]],
) -> None:
    champion, challenger = split(pairs)
    lows = [decide(champion, challenger, config(confidence=level)).low for level in (0.5, 0.8, 0.95, 0.99)]
    assert lows == sorted(lows, reverse=True)
    for rule, order in (("superior", True), ("not_worse", False)):
        said = [decide(champion, challenger, config(rule=rule, margin=m)).promoted for m in (0.0, 0.1, 0.3, 1.0)]
        assert said == sorted(said, reverse=order)


@settings(max_examples=30)
@given(PAIRS, st.randoms())
def test_roles_and_order_of_tasks_do_not_matter(
    pairs: dict[str, tuple[list[float], list[float]]], random: Random
) -> None:
    champion, challenger = split(pairs)
    forward, backward = decide(champion, challenger, FAST), decide(challenger, champion, FAST)
    assert (backward.low, backward.high) == pytest.approx((-forward.high, -forward.low), abs=1e-9)
    shuffled = list(pairs.items())
    random.shuffle(shuffled)
    assert decide(*split(dict(shuffled)), FAST) == forward
    assert not (forward.promoted and backward.promoted)


def test_the_draws_are_paired_within_tasks_and_seeded() -> None:
    rows = np.linspace(0, 1, 24).tolist()
    better = [score + 0.125 for score in rows]  # the same on every row: no doubt, however much rows differ
    assert np.ptp(resampled_differences({"t": rows}, {"t": better}, 1000, 0)) < 1e-12
    assert decide({"t": rows}, {"t": better}, FAST).promoted
    noise = {"t": [0.0, 1.0] * 8}, {"t": [1.0, 0.0, 0.0, 1.0] * 4}
    first = resampled_differences(*noise, 1000, 0)
    assert (first == resampled_differences(*noise, 1000, 0)).all()
    assert (first != resampled_differences(*noise, 1000, 1)).any()
    # As many draws at a time as fit: the number of rows does not change what a row's task gets.
    big = {"t": np.tile(rows, 200).tolist()}, {"t": np.tile(rows[::-1], 200).tolist()}
    assert resampled_differences(*big, 1000, 0).shape == (1000,)


def test_the_spread_is_that_of_a_mean_over_tasks() -> None:
    generator = np.random.default_rng(0)
    champion = {str(i): generator.random(6).tolist() for i in range(8)}
    challenger = {str(i): generator.random(6).tolist() for i in range(8)}
    differences = resampled_differences(champion, challenger, 200_000, 0)
    of_tasks = [np.subtract(challenger[name], champion[name]) for name in champion]
    assert differences.mean() == pytest.approx(np.mean(of_tasks), abs=2e-3)
    variance = np.mean([rows.var(ddof=1) / 6 for rows in of_tasks]) / 8  # unbiased, although 6 rows are few
    assert differences.var() == pytest.approx(variance, rel=0.02)


def test_the_reason_says_it_in_a_sentence() -> None:
    champion, challenger = {"t": [0.0, 0.5, 0.25, 0.25]}, {"t": [0.25, 0.5, 0.0, 0.5]}
    decision = decide(champion, challenger, FAST, opponent="few-shot base")
    assert decision.reason == (
        "challenger 0.312 vs few-shot base 0.250, difference +0.062 "
        f"[\N{MINUS SIGN}{-decision.low:.3f}, +{decision.high:.3f}] at 95 %: not superior"
    )
    assert decision.low < 0
    relaxed = decide(champion, challenger, config(rule="not_worse", margin=0.5, confidence=0.9))
    assert relaxed.reason.endswith("at 90 %: not worse by more than 0.5")
    strict = decide(challenger, champion, config(rule="not_worse", margin=0.01))
    assert strict.reason.endswith(": may be worse by more than 0.01")


# -- error rates -------------------------------------------------------------------------------------------------


def _binary(generator: np.random.Generator, tasks: int, rows: int, gain: float) -> tuple[dict[str, list[float]], ...]:
    """Right and wrong answers of two models that disagree on a fifth of the rows; ``gain`` is their true difference."""
    champion, challenger = {}, {}
    for task in map(str, range(tasks)):
        shared, differs = generator.random(rows) < 0.5, generator.random(rows) < 0.2
        up = generator.random(rows) < 0.5 + gain / 0.4
        champion[task] = np.where(differs, ~up, shared).astype(float).tolist()
        challenger[task] = np.where(differs, up, shared).astype(float).tolist()
    return champion, challenger


def _rate(rule: str, margin: float, gain: float, trials: int = 300, tasks: int = 8, rows: int = 24) -> float:
    generator = np.random.default_rng(7)
    pairs = (_binary(generator, tasks, rows, gain) for _ in range(trials))
    return sum(decide(*pair, config(rule=rule, margin=margin)).promoted for pair in pairs) / trials


@pytest.mark.parametrize(("rule", "margin", "gain"), [("superior", 0.0, 0.0), ("superior", 0.05, 0.05),
                                                      ("not_worse", 0.05, -0.05)])  # fmt: skip
def test_at_the_border_one_in_forty_is_promoted(rule: str, margin: float, gain: float) -> None:
    assert 0.005 <= _rate(rule, margin, gain) <= 0.05  # 0.025 nominal; four standard errors are 0.036


def test_a_difference_is_found_and_a_loss_is_not_promoted() -> None:
    assert _rate("superior", 0.0, 0.15, trials=100) > 0.95
    assert _rate("not_worse", 0.1, 0.0, trials=100) > 0.7
    assert _rate("superior", 0.0, -0.05, trials=100) == 0.0


def test_few_rows_per_task_promote_no_more_often() -> None:
    generator = np.random.default_rng(3)
    promoted = sum(decide(*_binary(generator, 20, 3, 0.0), FAST).promoted for _ in range(300)) / 300
    assert promoted <= 0.05


@pytest.mark.parametrize("metric", ["f1", "matthews"])
def test_coverage_of_metrics_that_are_no_mean_of_rows(metric: LabelMetric) -> None:
    generator = np.random.default_rng(11)

    def scores(target: np.ndarray) -> LabelScores:
        guess = np.where(generator.random(len(target)) < 0.7, target, generator.integers(0, 3, len(target)))
        return LabelScores(tuple(guess.tolist()), tuple(target.tolist()), metric)

    outside = 0
    for _ in range(100):
        targets = {task: generator.integers(0, 3, 50) for task in "abc"}
        models: list[dict[str, TaskScores]] = [{t: scores(target) for t, target in targets.items()} for _ in "12"]
        decision = decide(models[0], models[1], FAST)
        outside += not decision.low <= 0.0 <= decision.high
    assert outside / 100 <= 0.13  # 0.05 nominal; four standard errors are 0.087


def test_labels_are_scored_together() -> None:
    target = (0, 0, 0, 0, 1, 1, 2, 2)
    right, majority = (LabelScores(guess, target, "f1") for guess in (target, (0,) * 8))
    decision = decide({"t": majority}, {"t": right}, FAST)
    assert decision.tasks == {"t": (task_score(majority), 1.0)}
    assert task_score(majority) == pytest.approx((2 / 3) / 3)
    assert decision.promoted
    assert decide({"t": right}, {"t": right}, config(rule="not_worse")).promoted


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("champion", "challenger", "match"), [
    ({}, {}, "same tasks"),
    ({"a": [1.0, 0.0]}, {"b": [1.0, 0.0]}, "a, b"),
    ({"a": [1.0, 0.0]}, {"a": [1.0, 0.0, 1.0]}, "2 and 3 rows"),
    ({"a": [1.0]}, {"a": [1.0]}, "at least 2"),
    ({"a": [1.0, float("nan")]}, {"a": [1.0, 0.0]}, "no number"),
    ({"a": [1.0, 0.0]}, {"a": LabelScores((0, 1), (0, 1), "f1")}, "same rows"),
    ({"a": LabelScores((0, 1), (0, 0), "f1")}, {"a": LabelScores((0, 1), (0, 1), "f1")}, "same rows"),
    ({"a": LabelScores((0, 1), (0, 1), "f1")}, {"a": LabelScores((0, 1), (0, 1), "matthews")}, "one metric"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    champion: dict[str, TaskScores], challenger: dict[str, TaskScores], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        decide(champion, challenger, FAST)


@pytest.mark.parametrize("change", [{"margin": -0.1}, {"confidence": 1.0}, {"rule": "equal"}, {"resamples": 10}])
def test_bad_configurations_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GateConfig.model_validate(change)


def test_a_large_gate_is_decided_in_seconds_and_little_memory() -> None:
    generator = np.random.default_rng(0)
    champion, challenger = ({str(i): generator.random(2000).tolist() for i in range(5)} for _ in range(2))
    began = time.monotonic()
    decide(champion, challenger, GateConfig())
    assert time.monotonic() - began < 20
