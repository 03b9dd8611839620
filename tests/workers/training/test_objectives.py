"""The loss at target positions against transformers' and torch's own."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.workers.tiny import tiny_model
from workers.text.prompt import Example
from workers.training.objectives import LanguageModelling, frozen_head_loss, language_modelling, mean_loss

OBJECTIVE = LanguageModelling(pad_id=0)
EXAMPLES = [Example(tuple(range(3, 3 + length)), start) for length, start in [(9, 4), (5, 1), (12, 11), (7, 0)]]


def labels(examples: list[Example]) -> dict[str, torch.Tensor]:
    """The batch as transformers' models take it."""
    width = max(len(e.input_ids) for e in examples)
    rows = [list(e.input_ids) + [0] * (width - len(e.input_ids)) for e in examples]
    marks = [[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in examples]
    wanted = [[-100] * e.target_start + list(e.input_ids[e.target_start :]) for e in examples]
    wanted = [row + [-100] * (width - len(row)) for row in wanted]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(marks), "labels": torch.tensor(wanted)}


def count(examples: list[Example]) -> int:
    return sum(OBJECTIVE.count(e) for e in examples)


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradient_equal_the_models_own(head_trains: bool, tied: bool) -> None:
    """With a trained output layer the logits come from the model itself."""
    found = []
    for own in (False, True):
        model = tiny_model(tied=tied).requires_grad_(False)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        model.lm_head.weight.requires_grad_(head_trains)
        loss = model(**labels(EXAMPLES)).loss if own else OBJECTIVE.loss_sum(model, EXAMPLES) / count(EXAMPLES)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 2 + head_trains
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_models_that_change_their_logits_are_asked_for_them() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.1,
        )
    ).requires_grad_(False)  # fmt: skip
    assert language_modelling(tiny_model(), 0) == OBJECTIVE
    objective = language_modelling(model, 0)
    assert objective.own_logits
    ours = objective.loss_sum(model, EXAMPLES) / count(EXAMPLES)
    assert float(ours) == pytest.approx(float(model(**labels(EXAMPLES)).loss), rel=1e-5)
    assert float(OBJECTIVE.loss_sum(model, EXAMPLES) / count(EXAMPLES)) != pytest.approx(float(ours), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_do_not_show(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(23, 8).to(dtype).requires_grad_(True), torch.randn(50, 8).to(dtype)
    targets, offset = torch.randint(50, (23,)), torch.randn(50).to(dtype) if bias else None
    reference = hidden.detach().clone().requires_grad_(True)
    logits = torch.nn.functional.linear(reference, weight, offset).float()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected / 3).backward()
    for chunk in (1, 50 * 7, 10**6):
        hidden.grad = None
        loss = frozen_head_loss(hidden, weight, offset, targets, chunk)
        (loss / 3).backward()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        assert hidden.grad is not None
        assert torch.allclose(hidden.grad, reference.grad, rtol=tolerance, atol=tolerance)


def test_the_mean_over_batches_is_the_mean_over_predictions() -> None:
    model = tiny_model()
    together = float(OBJECTIVE.loss_sum(model, EXAMPLES)) / count(EXAMPLES)
    assert mean_loss(model, OBJECTIVE, EXAMPLES, 2) == pytest.approx(together, rel=1e-5)


def test_the_loss_never_waits_for_the_device() -> None:
    """Tensors without data: whatever would read a value back from the device fails."""
    hidden = torch.randn(30, 8, device="meta", requires_grad=True)
    weight, targets = torch.randn(50, 8, device="meta"), torch.randint(50, (30,), device="meta")
    loss = frozen_head_loss(hidden, weight, None, targets, 50 * 7)
    loss.backward()
    assert loss.device.type == "meta"
    assert hidden.grad is not None
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()
