"""Row metrics, label metrics against scikit-learn, and the bootstrap interval."""

import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from infra.errors import ConfigError
from workers.scoring.metrics import (
    LabelMetric,
    LabelScores,
    bootstrap_interval,
    choice_correct,
    exact_match,
    label_score,
    rouge_l,
    text_metric,
)
from workers.scoring.words import symbols_of, words_of

ORACLES: dict[LabelMetric, Callable[[list[int], list[int]], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda target, predicted: f1_score(target, predicted, average="macro"),
    "matthews": matthews_corrcoef,
}
PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)


def test_exact_match_ignores_whitespace_only() -> None:
    assert exact_match("  a \n b ", ["x", "a b"]) == 1.0
    assert exact_match("A b", ["a b"]) == 0.0


def test_rouge_l_takes_the_best_reference() -> None:
    assert rouge_l("the cat sat", ["dogs", "the cat sat"]) == pytest.approx(1.0)
    assert rouge_l("the cat", ["the cat sat on"]) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert rouge_l("", ["x"]) == 0.0


def test_exact_match_composes_characters_on_both_sides() -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert exact_match(composed, [apart]) == exact_match(apart, [composed]) == 1.0
    assert exact_match("a\u00a0 b\u3000", ["a b"]) == 1.0
    assert exact_match("cafe", [composed]) == 0.0


SENTENCES = {
    "Russian": "красная кошка спит", "Greek": "ΟΔΟΣ ονειρων", "Arabic": "القطة الحمراء نائمة",
    "Hebrew": "שָׁלוֹם עולם", "Hindi": "लाल बिल्ली सो रही है", "Tamil": "சிவப்பு பூனை தூங்குகிறது",
    "Chinese": "红色的猫在睡觉", "Japanese": "赤い猫はネコだ。", "Korean": "빨간 고양이가 잔다",
    "Thai": "แมวสีแดงกำลังนอน",
    "Khmer": "ឆ្មាក្រហម", "Burmese": "ကြောင်နီ", "Amharic": "ቀይ ድመት", "Georgian": "წითელი კატა",
    "accents": "l'été dernier à Évian", "outside the first plane": "𠀋𡈽 𝟙𝟚", "arrow": "→",
    "signs": "+ -", "emoji": "👍🏽",
}  # fmt: skip


@pytest.mark.parametrize("text", SENTENCES.values(), ids=SENTENCES)
def test_rouge_l_reads_every_script(text: str) -> None:
    assert rouge_l(text, [text]) == 1.0
    assert rouge_l(f"{text} {text}", [text]) < 1.0
    assert rouge_l(unicodedata.normalize("NFD", text).upper(), [text.lower()]) == 1.0
    for name, other in SENTENCES.items():
        if other != text and {name} <= {"Russian", "Chinese", "Thai", "Korean", "arrow"}:
            assert rouge_l(text, [other]) < 0.5


def test_rouge_l_splits_words_where_a_script_does_and_characters_where_it_does_not() -> None:
    assert words_of("Pâté, d'été") == ["pâté", "d", "été"]
    assert words_of("GPT模型2号") == ["gpt", "模", "型", "2", "号"]
    assert words_of("กำลัง") == ["กำ", "ลั", "ง"] or words_of("กำลัง")[-1] == "ง"
    assert words_of("बिल्ली सो") == ["बिल्ली", "सो"]
    assert words_of("می\u200cخواهم x\u00ady") == ["میخواهم", "xy"]
    assert rouge_l("pâté", ["p t"]) == 0.0
    assert rouge_l("the red cat", ["красная кошка"]) == 0.0
    assert rouge_l("红色的狗", ["红色的猫"]) == pytest.approx(0.75)
    assert rouge_l("yes →", ["→"]) > 0


@given(st.text(st.characters(max_codepoint=127), max_size=40), st.text(st.characters(max_codepoint=127), max_size=40))
def test_rouge_l_of_ascii_is_rouge_scores(prediction: str, target: str) -> None:
    own = RougeScorer(["rougeL"]).score(target, prediction)["rougeL"].fmeasure
    assume(words_of(target))
    assert rouge_l(prediction, [target]) == own


@given(st.text(max_size=30))
def test_rouge_l_of_a_text_and_itself_is_one_if_there_is_anything_to_see(text: str) -> None:
    assert rouge_l(text, [text]) == float(bool(words_of(text) or symbols_of(text)))


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


def test_intervals_of_row_scores_stay_what_they_were() -> None:
    """Published intervals are reproduced from seed and scores: these are the first release's figures."""
    rows = [[0.0, 1.0, 1.0, 0.25], [0.5, 0.75, 0.0]]
    assert bootstrap_interval(rows, seed=3) == (0.19791666666666666, 0.75)
    assert bootstrap_interval([LabelScores((0, 1, 1), (1, 1, 1), "accuracy"), *rows], seed=3) == bootstrap_interval(
        [[0.0, 1.0, 1.0], *rows], seed=3
    )


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("metric", ORACLES)
@given(pairs=PAIRS)
@settings(max_examples=150, deadline=None)
def test_label_scores_agree_with_scikit_learn(metric: LabelMetric, pairs: list[tuple[int, int]]) -> None:
    predicted, target = (list(labels) for labels in zip(*pairs, strict=True))
    found = label_score(LabelScores(tuple(predicted), tuple(target), metric))
    assert found == pytest.approx(ORACLES[metric](target, predicted), abs=1e-12)


@pytest.mark.parametrize("metric", ORACLES)
def test_label_intervals_resample_rows_and_score_anew(metric: LabelMetric) -> None:
    draw = np.random.default_rng(0)
    tasks = []
    for rows, labels in ((40, 2), (25, 6)):
        target = draw.integers(0, labels, rows)
        predicted = np.where(draw.random(rows) < 0.6, target, draw.integers(0, labels, rows))
        tasks.append((predicted, target))
    generator, total = np.random.default_rng(5), np.zeros(200)
    for predicted, target in tasks:
        draws = generator.integers(0, len(target), size=(200, len(target)))
        total += [ORACLES[metric](target[at].tolist(), predicted[at].tolist()) for at in draws]
    expected = np.quantile(total / 2, [0.025, 0.975])
    scores = [LabelScores(tuple(p.tolist()), tuple(t.tolist()), metric) for p, t in tasks]
    assert bootstrap_interval(scores, seed=5, n=200) == pytest.approx(tuple(expected), abs=1e-12)


def test_matthews_lies_between_minus_one_and_one() -> None:
    assert label_score(LabelScores((0, 1, 0), (1, 0, 1), "matthews")) == pytest.approx(-1.0)
    assert label_score(LabelScores((2, 0, 1), (2, 0, 1), "matthews")) == pytest.approx(1.0)
    assert label_score(LabelScores((0, 0, 0), (1, 0, 1), "matthews")) == 0.0


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="one row"):
        label_score(LabelScores((), (), "f1"))
    with pytest.raises(ConfigError, match="one row"):
        bootstrap_interval([LabelScores((), (), "f1")], seed=0)
    with pytest.raises(ConfigError, match="bleu"):
        LabelScores((0,), (0,), "bleu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="as many"):
        LabelScores((0, 1), (0,), "f1")
    with pytest.raises(ConfigError, match="negative"):
        LabelScores((-1,), (0,), "f1")
    with pytest.raises(ConfigError):
        bootstrap_interval([[]], seed=0)
    with pytest.raises(ConfigError, match="bleu"):
        text_metric("bleu")
