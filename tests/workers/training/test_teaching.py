"""Training on what a teacher says: the divergence and its gradient against the formula written out, and its files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import ExpertError, FactoryError
from tests.workers.tiny import tiny_model
from workers.tensors.writer import save_tensors
from workers.text.prompt import Example
from workers.training.objectives import LanguageModelling, Predictions, chunked_loss, language_modelling
from workers.training.teaching import Lesson, Said, Teaching, ask, likeliest, load_said, save_said, taught

PLAIN = LanguageModelling(pad_id=0)
EXAMPLES = [Example(tuple(range(3, 3 + length)), start) for length, start in [(9, 4), (5, 1), (12, 11), (7, 0)]]


def by_definition(logits: Tensor, said: Said) -> Tensor:
    """The divergence of each row [n] over k tokens and the rest, by the formula."""
    log_q = logits.log_softmax(-1)
    outside = torch.ones_like(log_q, dtype=torch.bool).scatter(1, said.ids.long(), False)
    p, q = said.log_probs.exp(), log_q.gather(1, said.ids.long())
    found = (p[:, :-1] * (said.log_probs[:, :-1] - q)).sum(-1)
    if bool(outside.any()):
        found = found + p[:, -1] * (said.log_probs[:, -1] - log_q.masked_fill(~outside, -torch.inf).logsumexp(-1))
    return found


@st.composite
def cases(draw: Any) -> tuple[Tensor, Said, Tensor, Tensor, Tensor]:
    """Logits, what is said of them, targets and weights; all float64."""
    n, v = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    numbers = st.lists(st.floats(-12, 12), min_size=n * v, max_size=n * v)
    logits, teacher = (torch.tensor(draw(numbers), dtype=torch.float64).view(n, v) for _ in range(2))
    said = Said(*likeliest(teacher.clone(), draw(st.integers(1, v + 2))))
    targets = torch.tensor(draw(st.lists(st.integers(0, v - 1), min_size=n, max_size=n)))
    weights = st.lists(st.floats(0, 2), min_size=n, max_size=n)
    answer, weight = (torch.tensor(draw(weights), dtype=torch.float64) for _ in range(2))
    return logits, said, targets, answer, weight


@given(case=cases())
def test_loss_and_gradient_are_those_of_the_formula(case: tuple[Tensor, Said, Tensor, Tensor, Tensor]) -> None:
    logits, said, targets, answer, weight = case
    reference = logits.clone().requires_grad_(True)
    hit = reference.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = (weight * by_definition(reference, said) - answer * hit).sum()
    expected.backward()
    gradient = logits.clone()
    losses = taught(targets, said.ids.long(), said.log_probs, answer, weight)
    found = losses(gradient, slice(None), True)
    assert torch.allclose(found, expected.detach(), rtol=1e-9, atol=1e-9)
    assert reference.grad is not None
    assert torch.allclose(gradient, reference.grad, rtol=1e-9, atol=1e-9)
    assert torch.equal(losses(logits.clone(), slice(None), False), found)


@given(case=cases())
def test_of_the_whole_vocabulary_it_is_the_divergence_and_of_less_no_more(
    case: tuple[Tensor, Said, Tensor, Tensor, Tensor],
) -> None:
    logits, _, targets, answer, _ = case
    teacher = logits.flip(0, 1) / 2
    p, log_q = teacher.log_softmax(-1), logits.log_softmax(-1)
    exact = torch.nn.functional.kl_div(log_q, p, reduction="none", log_target=True).sum(-1)
    none, one = torch.zeros_like(answer), torch.ones_like(answer)
    before = torch.zeros_like(exact)
    for k in range(1, logits.shape[1] + 1):
        ids, log_probs = likeliest(teacher.clone(), k)
        assert torch.allclose(log_probs.exp().sum(-1), one)
        parts = [
            taught(targets, ids.long(), log_probs, none, one)(logits[at : at + 1].clone(), slice(at, at + 1), False)
            for at in range(len(targets))
        ]
        found = torch.stack(parts)
        assert bool((found >= before - 1e-9).all())  # finer outcomes tell more apart
        before = found
    assert torch.allclose(before, exact, rtol=1e-9, atol=1e-9)
    agreed = taught(targets, *(part.long() if not part.is_floating_point() else part for part in likeliest(
        logits.clone(), 1)), none, one)(logits.clone(), slice(None), False)  # fmt: skip
    assert float(agreed) == pytest.approx(0, abs=1e-9)


def test_probability_that_leaves_the_likeliest_tokens_costs() -> None:
    """Which renormalising over them would not see."""
    teacher = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[4.0, 3.0, 8.0, 0.0, 0.0]])  # the same odds between the two, most elsewhere
    ids, log_probs = likeliest(teacher.clone(), 2)
    losses = taught(torch.tensor([0]), ids.long(), log_probs, torch.zeros(1), torch.ones(1))
    assert float(losses(student.clone(), slice(None), True)) > 1
    assert float(losses(teacher.clone(), slice(None), True)) == pytest.approx(0, abs=1e-6)


def test_what_is_all_but_certain_stays_finite() -> None:
    teacher, student = torch.tensor([[90.0, 0.0, -90.0]]), torch.tensor([[-90.0, 90.0, 200.0]])
    for k in (1, 2, 3):
        ids, log_probs = likeliest(teacher.clone(), k)
        gradient = student.clone()
        loss = taught(torch.tensor([0]), ids.long(), log_probs, torch.ones(1), torch.ones(1))(
            gradient, slice(None), True
        )
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(gradient).all())


def lessons(k: int) -> list[Lesson]:
    """One without a teacher, one that is all teacher, two with both."""
    said = dict(ask(tiny_model(tied=False, seed=3), PLAIN, EXAMPLES, k, 2))
    weights = [(1.0, 0.0), (0.0, 2.0), (0.25, 0.75), (0.5, 0.5)]
    return [
        Lesson(example, *each, said[at] if each[1] else None)
        for at, (example, each) in enumerate(zip(EXAMPLES, weights, strict=True))
    ]


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("k", [1, 5, 1000])
def test_lessons_of_all_sorts_in_one_batch(k: int, head_trains: bool) -> None:
    """Through a model, by a frozen output layer or by logits of its own, against each example by itself."""
    given_lessons, found = lessons(k), []
    for by_hand in (False, True):
        model = tiny_model(tied=False).requires_grad_(False)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        model.lm_head.weight.requires_grad_(head_trains)
        if by_hand:
            loss = torch.zeros(())
            for lesson in given_lessons:
                ids, start = torch.tensor([lesson.example.input_ids]), max(1, lesson.example.target_start)
                logits = model(input_ids=ids).logits[0, start - 1 : -1]
                hit = logits.log_softmax(-1).gather(1, ids[0, start:, None])
                loss = loss - lesson.answer * hit.sum()
                if lesson.said is not None:
                    loss = loss + lesson.teacher * by_definition(logits, lesson.said).sum()
        else:
            loss = Teaching(PLAIN).loss_sum(model, given_lessons)
        (loss / 3).backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 2 + head_trains
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_a_teacher_it_is_the_plain_objective() -> None:
    model = tiny_model(tied=False)
    alone = [Lesson(example, 1.0) for example in EXAMPLES]
    objective = Teaching(language_modelling(model, 0))
    assert [objective.count(each) for each in alone] == [PLAIN.count(example) for example in EXAMPLES]
    assert [objective.length(each) for each in alone] == [PLAIN.length(example) for example in EXAMPLES]
    with torch.no_grad():
        expected = float(PLAIN.loss_sum(model, EXAMPLES))
        assert float(objective.loss_sum(model, alone)) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=20)
@given(chunk=st.integers(1, 200), own=st.booleans())
def test_chunks_do_not_show(chunk: int, own: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(23, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(50, (23,), generator=generator)
    ids, log_probs = likeliest(torch.randn(23, 50, generator=generator) * 3, 6)
    losses = taught(targets, ids.long(), log_probs, torch.full((23,), 0.3), torch.full((23,), 0.7))
    results = []
    for size in (chunk, 10**6):
        read = (hidden @ weight.t() if own else hidden).clone().requires_grad_(True)
        loss = chunked_loss(Predictions(read, None if own else weight, None, targets), losses, size)
        (loss / 3).backward()
        assert read.grad is not None
        results.append((loss.detach(), read.grad))
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(*results, strict=True))


def test_what_was_said_of_other_rows_is_refused() -> None:
    model, (first, second, *_) = tiny_model(tied=False), lessons(4)
    for wrong in (None, Said(torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 5))):
        with pytest.raises(ExpertError, match="not of these rows"):
            Teaching(PLAIN).loss_sum(model, [first, second, Lesson(EXAMPLES[3], 0.5, 0.5, wrong)])


def test_what_is_asked_does_not_depend_on_the_batch_and_comes_back_from_its_file(tmp_path: Path) -> None:
    model = tiny_model(tied=False)
    together, alone = (dict(ask(model, PLAIN, EXAMPLES, 3, size)) for size in (4, 1))
    for at, example in enumerate(EXAMPLES):
        start = max(1, example.target_start)
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, start - 1 : -1]
        log_p = logits.log_softmax(-1)
        for said in (together[at], alone[at]):
            assert torch.equal(said.ids.long(), log_p.topk(3).indices)
            assert torch.allclose(said.log_probs[:, :-1], log_p.topk(3).values, atol=1e-5)
            assert torch.allclose(said.log_probs.exp().sum(-1), torch.ones(PLAIN.count(example)), atol=1e-5)
    file = tmp_path / "said"
    save_said(file, {7: together[1], 2: together[0]})
    read = load_said(file)
    assert list(read) == [2, 7]
    for number, at in ((2, 0), (7, 1)):
        assert torch.equal(read[number].ids, together[at].ids)
        assert torch.equal(read[number].log_probs, together[at].log_probs)


SOUND = {
    "rows": torch.tensor([1, 4]), "counts": torch.tensor([2, 1]), "ids": torch.zeros(3, 2, dtype=torch.int32),
    "log_probs": torch.full((3, 3), -1.0),
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"counts": torch.tensor([2, 2])}, {"counts": torch.tensor([4, -1])}, {"rows": torch.tensor([1])},
        {"log_probs": torch.full((3, 2), -1.0)}, {"log_probs": torch.full((3, 3), torch.nan)},
        {"log_probs": torch.full((3, 3), 0.5)}, {"ids": torch.zeros(3, dtype=torch.int32)},
        {"ids": torch.full((3, 2), -1, dtype=torch.int32)}, {"ids": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_is_none_is_refused(tmp_path: Path, change: dict[str, Tensor | None]) -> None:
    save_tensors(tmp_path / "sound", SOUND, {})
    assert list(load_said(tmp_path / "sound")) == [1, 4]
    broken = {name: tensor for name, tensor in {**SOUND, **change}.items() if tensor is not None}
    save_tensors(tmp_path / "broken", broken, {})
    with pytest.raises(FactoryError, match="broken"):
        load_said(tmp_path / "broken")
