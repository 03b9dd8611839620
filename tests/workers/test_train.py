"""Training of one expert on a tiny model: losses, best values, re-selection, failures, and pinned numbers."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from infra.errors import ExpertError
from tests.workers.tiny import WRAPPER, tiny_model, tiny_tokenizer
from workers.inplace import apply_delta
from workers.masks import MaskSpec
from workers.prompt import Example, PromptSpec, collate, encode_example
from workers.rows import Row
from workers.train import TRAIN_VERSION, TrainSpec, mean_target_loss, target_loss, train_expert

MASK = MaskSpec("random", "element", 0.2, (8, 8), r".*\.(v_proj|up_proj)", None, seed=7)
SPEC = TrainSpec(
    steps=12, batch_size=4, learning_rate=0.05, weight_decay=0.0, warmup_ratio=0.1, schedule="linear", clip_norm=1.0,
    validate_every=4, seed=3,
)  # fmt: skip


def mask(**changes: object) -> MaskSpec:
    return MaskSpec(**{**vars(MASK), **changes})  # type: ignore[arg-type]


def spec(**changes: object) -> TrainSpec:
    return TrainSpec(**{**vars(SPEC), **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    tokenizer, prompt = tiny_tokenizer(), PromptSpec("{input}?", WRAPPER)
    rows = [Row(str(i), f"w{i}w{(7 * i) % 50}w{i % 5}", (f"w{i % 3}",)) for i in range(24)]
    return [encode_example(tokenizer, prompt, row) for row in rows]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return tiny_model(tied=False)


@pytest.mark.parametrize("criterion", ["random", "connection_sensitivity"])
@pytest.mark.parametrize("granularity", ["element", "block"])
def test_loss_falls_and_the_model_is_left_as_it_was(
    model: LlamaForCausalLM, examples: list[Example], criterion: str, granularity: str
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = mean_target_loss(model, examples[16:], 4, 0)
    trained = train_expert(
        model, examples[:16], examples[16:], mask(criterion=criterion, granularity=granularity), SPEC, pad_id=0
    )
    assert trained.best_validation_loss < start - 0.2
    assert [report.step for report in trained.history] == list(range(1, 13))
    assert [r.step for r in trained.history if r.validation_loss is not None] == [4, 8, 12]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trained.density == pytest.approx(0.2, abs=0.05)
    assert set(trained.delta) == {
        f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.v_proj", "mlp.up_proj")
    }


def test_the_best_values_are_returned(model: LlamaForCausalLM, examples: list[Example]) -> None:
    trained = train_expert(model, examples[:16], examples[16:], MASK, spec(learning_rate=0.3, steps=20), pad_id=0)
    seen = {r.step: r.validation_loss for r in trained.history if r.validation_loss is not None}
    assert trained.best_step == min(seen, key=lambda step: seen[step])
    with apply_delta(model, trained.delta):
        assert mean_target_loss(model, examples[16:], 4, 0) == pytest.approx(trained.best_validation_loss, rel=1e-5)


def test_reselection_happens_on_schedule(model: LlamaForCausalLM, examples: list[Example]) -> None:
    chosen = mask(criterion="connection_sensitivity", reselect_every=5)
    trained = train_expert(model, examples[:16], examples[16:], chosen, SPEC, pad_id=0)
    assert trained.reselections == 2
    assert trained.trainable == sum(t.indices.unique().numel() for t in trained.delta.values())


def test_numbers_are_tied_to_the_algorithm_version(model: LlamaForCausalLM, examples: list[Example]) -> None:
    """If this fails, a recipe gives other numbers: raise TRAIN_VERSION in workers/train.py and pin the new ones."""
    trained = train_expert(
        model, examples[:16], examples[16:], mask(criterion="connection_sensitivity", reselect_every=5), SPEC, pad_id=0
    )
    norm = math.sqrt(sum(float(t.values.double().square().sum()) for t in trained.delta.values()))
    found = (TRAIN_VERSION, trained.history[0].loss, trained.history[-1].loss, trained.best_validation_loss, norm)
    assert found == pytest.approx((1, 5.3653951, 3.7282505, 3.6493791, 2.9992818), rel=2e-4)


def test_a_loss_that_is_not_finite_names_step_and_rows(model: LlamaForCausalLM, examples: list[Example]) -> None:
    with pytest.raises(ExpertError, match=r"step \d+: loss .*training rows \[.*learning_rate"):
        train_expert(model, examples[:16], examples[16:], MASK, spec(learning_rate=1e38, clip_norm=1e30), pad_id=0)


def test_target_loss_equals_the_models_own(model: LlamaForCausalLM, examples: list[Example]) -> None:
    batch = collate(examples[:6], 0)
    own = model(**batch).loss
    assert float(target_loss(model, batch)) == pytest.approx(float(own), rel=1e-5)
