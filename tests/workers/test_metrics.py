"""Row metrics and the bootstrap interval."""

import pytest

from infra.errors import ConfigError
from workers.metrics import bootstrap_interval, choice_correct, exact_match, rouge_l, text_metric


def test_exact_match_ignores_whitespace_only() -> None:
    assert exact_match("  a \n b ", ["x", "a b"]) == 1.0
    assert exact_match("A b", ["a b"]) == 0.0


def test_rouge_l_takes_the_best_reference() -> None:
    assert rouge_l("the cat sat", ["dogs", "the cat sat"]) == pytest.approx(1.0)
    assert rouge_l("the cat", ["the cat sat on"]) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert rouge_l("", ["x"]) == 0.0


def test_choice_takes_the_first_of_equals() -> None:
    assert choice_correct([-1.0, -1.0], ["a", "b"], ["a"]) == 1.0
    assert choice_correct([-2.0, -1.0], ["a", "b"], ["a"]) == 0.0


def test_interval_holds_the_mean_is_seeded_and_narrows_with_rows() -> None:
    few, many = [[0.0, 1.0] * 6, [1.0] * 12], [[0.0, 1.0] * 200, [1.0] * 400]
    low, high = bootstrap_interval(few, seed=1)
    assert low < 0.75 < high
    assert (low, high) == bootstrap_interval(few, seed=1)
    narrow = bootstrap_interval(many, seed=1)
    assert narrow[1] - narrow[0] < (high - low) / 2
    assert bootstrap_interval([[0.5] * 4], seed=0) == (0.5, 0.5)


def test_refusals() -> None:
    with pytest.raises(ConfigError):
        bootstrap_interval([[]], seed=0)
    with pytest.raises(ConfigError, match="bleu"):
        text_metric("bleu")
