"""Which rows count as one, and that every row that is read is kept or counted."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.distinct import DistinctBy, RowCounts, distinct_rows, normalised
from workers.text.rows import Row

YES_NO = ("yes", "no")


def row(text: str, *targets: str, options: Sequence[str] | None = None) -> Row:
    return Row("0", text, targets, None if options is None else tuple(options))


def kept(rows: Sequence[Row], closed: bool = False, by: DistinctBy = "text") -> dict[str, tuple[str, ...]]:
    return {each.row.input: each.row.targets for each in distinct_rows(rows, closed, by)[0]}


def counts(rows: Sequence[Row], closed: bool = False, by: DistinctBy = "text") -> RowCounts:
    return distinct_rows(rows, closed, by)[1]


def test_case_and_spaces_make_different_rows_unless_the_task_says_otherwise() -> None:
    rows = [row("apple inc", "lower"), row("Apple Inc", "upper"), row("apple  inc", "wide")]
    assert kept(rows) == {"apple inc": ("lower",), "Apple Inc": ("upper",), "apple  inc": ("wide",)}
    assert counts(rows) == RowCounts(read=3, kept=3, alike=3)
    assert [set(targets) for targets in kept(rows, by="words").values()] == [{"lower", "upper", "wide"}]
    assert counts(rows, by="words") == RowCounts(read=3, kept=1, joined=2, several_answers=1)


def test_blank_rows_are_counted() -> None:
    rows = [row("a", "x"), row(" \n", "x"), row("b", ""), row("c", " ", "\t"), row("d", "", "x")]
    unseen = [row("\u200b\ufeff", "x"), row("e", "\u2060")]
    assert kept(rows + unseen) == {"a": ("x",), "d": ("x",)}
    assert counts(rows + unseen) == RowCounts(read=7, kept=2, blank_input=2, blank_target=3)


@pytest.mark.parametrize("options", [YES_NO, None], ids=["options", "labels"])
def test_contradictory_closed_answers_are_put_to_the_vote(options: Sequence[str] | None) -> None:
    rows = [row("q", "yes", options=options)] * 9 + [row("q", "no", options=options)]
    assert kept(rows, closed=True) == {"q": ("yes",)}
    assert counts(rows, closed=True) == RowCounts(read=10, kept=1, outvoted=1, joined=8)
    draw = [row("q", "yes", options=options), row("q", "no", options=options), row("p", "no", options=options)]
    assert kept(draw, closed=True) == {"p": ("no",)}
    assert counts(draw, closed=True) == RowCounts(read=3, kept=1, undecided=2)
    assert len(kept(draw, closed=True, by="words")) == 2


def test_free_answers_to_one_input_are_all_right_and_the_commonest_comes_first() -> None:
    rows = [row("q", "no"), *[row("q", "yes")] * 9, row("q", "maybe", "yes")]
    assert kept(rows)["q"][0] == "yes"
    assert set(kept(rows)["q"]) == {"yes", "no", "maybe"}
    assert counts(rows) == RowCounts(read=11, kept=1, joined=10, several_answers=1)
    assert kept([row("q", "b", "a", "b")]) == {"q": ("b", "a")}  # the order of one row's answers is its own


def test_one_input_with_other_options_is_another_row() -> None:
    rows = [row("best?", "a", options="ab"), row("best?", "c", options="cd"), row("best?", "a", options="ba")]
    assert counts(rows) == RowCounts(read=3, kept=2, joined=1, alike=2)
    assert counts(rows, by="words").other_options > 0
    assert counts(rows, by="words").kept == 1


ROWS = st.lists(
    st.builds(
        row,
        st.sampled_from(["a", "A", " a", "b", "", "b "]),
        st.sampled_from(["yes", "no", ""]),
        options=st.sampled_from([None, YES_NO, ("no", "yes"), (*YES_NO, "maybe")]),
    ),
    max_size=25,
)


@given(ROWS, st.booleans(), st.sampled_from(["text", "words"]), st.randoms(use_true_random=False))
def test_every_row_is_kept_or_counted_whatever_their_order(
    rows: list[Row], closed: bool, by: DistinctBy, random
) -> None:
    found, told = distinct_rows(rows, closed, by)
    assert told.read == len(rows)
    assert told.kept == len(found)
    assert told.kept + told.joined + sum(told.dropped.values()) == told.read
    assert min(vars(told).values()) >= 0
    assert len({each.named().id for each in found}) == len(found)
    assert all(each.words == normalised(each.row.input) for each in found)
    shuffled = list(rows)
    random.shuffle(shuffled)
    again, retold = distinct_rows(shuffled, closed, by)
    assert retold == told
    if by == "words":
        assert {(e.words, e.row.options) for e in again} == {(e.words, e.row.options) for e in found}
