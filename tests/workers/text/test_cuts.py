"""What the length limits take from rows, against the encoding itself."""

from hypothesis import given
from hypothesis import strategies as st

from tests.workers.tiny import WRAPPER, tiny_tokenizer
from workers.text.cuts import CutCounts, count_cuts
from workers.text.prompt import PromptSpec, encode_prompt, encode_target
from workers.text.rows import Row

TOKENIZER = tiny_tokenizer()
WORDS = st.lists(st.sampled_from(["w1", "w2", "w30", "é", "日", " "]), min_size=1, max_size=12).map("".join)


@given(st.lists(st.tuples(WORDS, WORDS), max_size=8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 8))
def test_a_row_counts_as_cut_exactly_if_it_is(texts, inputs: int, targets: int, taught: int) -> None:
    rows = [Row(str(at), text, (target,)) for at, (text, target) in enumerate(texts)]
    whole, cut = (PromptSpec(wrapper=WRAPPER, max_input_tokens=limit) for limit in (99, inputs))
    long = [encode_prompt(TOKENIZER, whole, row) != encode_prompt(TOKENIZER, cut, row) for row in rows]
    long = [long[at] or len(TOKENIZER(row.input)["input_ids"]) > inputs for at, row in enumerate(rows)]
    ends = [encode_target(TOKENIZER, row.targets[0], targets)[-1] != 2 for row in rows[:taught]]
    found = count_cuts(TOKENIZER, rows[:taught], rows[taught:], inputs, targets)
    assert (found.inputs, found.targets) == (sum(long), sum(ends))
    assert found.either == sum(a or b for a, b in zip(long, [*ends, *[False] * len(rows)], strict=False))
    assert (found.rows, found.taught) == (len(rows), min(taught, len(rows)))
    assert count_cuts(TOKENIZER, rows[:taught], rows[taught:], inputs, None).targets == 0


def test_an_instruction_that_is_lost_is_told_apart() -> None:
    long = "".join(f"w{at}" for at in range(20))
    rows = [Row(str(at), f"Translate into French: w{at}{long}", ("w1",)) for at in range(6)]
    others = [Row("x", long, ("w1",)), Row("y", "w1", ("w1",))]
    found = count_cuts(TOKENIZER, rows, others, 10, 5)
    assert (found.inputs, found.instructions, found.beginning) == (7, 6, "Translate in")
    varied = [Row(str(at), f"w{at}{long}", ("w1",)) for at in range(10, 16)]
    assert count_cuts(TOKENIZER, varied, (), 10, 5).instructions == 0
    assert count_cuts(TOKENIZER, (), (), 10, 5) == CutCounts()
