"""Training of one expert on a tiny model: every kind, best values, re-selection, resumption, failures, pins."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from infra.errors import ExpertError
from tests.workers.tiny import WRAPPER, tiny_model, tiny_tokenizer
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.masks.spec import MaskSpec, match_modules
from workers.tensors.source import FileSource
from workers.text.prompt import Example, PromptSpec, encode_example
from workers.text.rows import Row
from workers.training.batches import Batch, mixed_batches, own_batches
from workers.training.in_place import apply_delta
from workers.training.kinds import ExpertSpec, FullSpec, LoraSpec
from workers.training.loop import TRAIN_VERSION, StepReport, TrainedExpert, TrainSpec, train_expert
from workers.training.objectives import LanguageModelling, mean_loss
from workers.training.state import TrainState, read_state, write_state

MODULES = r".*\.(v_proj|up_proj)"
MASK = MaskSpec("random", "element", 0.2, (8, 8), MODULES, None, seed=7)
SENSITIVE = MaskSpec("connection_sensitivity", "element", 0.2, (8, 8), MODULES, 5, seed=7)
KINDS: dict[str, ExpertSpec] = {
    "random": MASK,
    "sensitive": SENSITIVE,
    "blocks": MaskSpec("random", "block", 0.2, (8, 8), MODULES),
    "lora": LoraSpec(MODULES, rank=4, alpha=8, dropout=0.2, seed=1),
    "full": FullSpec(MODULES),
}
SPEC = TrainSpec(
    steps=12, batch_size=4, learning_rate=0.05, weight_decay=0.0, warmup_ratio=0.1, schedule="linear", clip_norm=1.0,
    validate_every=4, seed=3,
)  # fmt: skip
OBJECTIVE = LanguageModelling(pad_id=0)


def mask(**changes: object) -> MaskSpec:
    return MaskSpec(**{**vars(SENSITIVE), **changes})  # type: ignore[arg-type]


def spec(**changes: object) -> TrainSpec:
    return TrainSpec(**{**vars(SPEC), **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    tokenizer, prompt = tiny_tokenizer(), PromptSpec("{input}?", WRAPPER)
    rows = [Row(str(i), f"w{i}w{(7 * i) % 50}w{i % 5}", (f"w{i % 3}" * (1 + i % 2),)) for i in range(24)]
    return [encode_example(tokenizer, prompt, row) for row in rows]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return tiny_model(tied=False)


def train(
    model: LlamaForCausalLM, examples: list[Example], kind: ExpertSpec, spec: TrainSpec = SPEC, **options: object
) -> TrainedExpert:
    return train_expert(model, OBJECTIVE, examples[:16], examples[16:], kind, spec, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_and_the_model_is_left_as_it_was(
    model: LlamaForCausalLM, examples: list[Example], kind: str
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    start = mean_loss(model, OBJECTIVE, examples[16:], 4)
    rate = 0.02 if kind == "full" else 0.05
    trained = train(model, examples, KINDS[kind], spec(learning_rate=rate))
    assert trained.best_validation_loss < start - 0.2
    assert [report.step for report in trained.history] == list(range(1, 13))
    assert [r.step for r in trained.history if r.validation_loss is not None] == [4, 8, 12]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert all(p.requires_grad for p in model.parameters())
    assert set(trained.delta) == {
        f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.v_proj", "mlp.up_proj")
    }
    expected = {"full": 1.0, "lora": 4 * (32 + 16 + 32 + 48) * 2 / (2 * 32 * (16 + 48))}.get(kind, 0.2)
    assert trained.density == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_values_are_returned(
    model: LlamaForCausalLM, examples: list[Example], kind: str, tmp_path: Path
) -> None:
    """Applied in place from the adapter file, they have the validation loss that training saw."""
    trained = train(model, examples, KINDS[kind], spec(learning_rate=0.2, steps=20))
    seen = {r.step: r.validation_loss for r in trained.history if r.validation_loss is not None}
    assert trained.best_step == min(seen, key=lambda step: seen[step])
    save_adapter(tmp_path / "a", trained.delta, AdapterMeta("x" * 64), value_dtype=torch.float32)
    with apply_delta(model, AdapterReader(FileSource(tmp_path / "a"))):
        assert mean_loss(model, OBJECTIVE, examples[16:], 4) == pytest.approx(trained.best_validation_loss, rel=1e-4)


def test_full_training_is_what_torch_does(model: LlamaForCausalLM, examples: list[Example]) -> None:
    trained = train(model, examples, FullSpec(MODULES), spec(validate_every=None, learning_rate=0.01))
    plain = tiny_model(tied=False).requires_grad_(False)
    weights = [module.weight.requires_grad_(True) for module in match_modules(plain, MODULES).values()]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    batches = [[examples[i] for i in rows] for rows in batches_of(examples)]
    for report, batch in zip(trained.history, batches, strict=True):
        optimizer.zero_grad()
        (OBJECTIVE.loss_sum(plain, batch) / sum(map(OBJECTIVE.count, batch))).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = report.learning_rate
        optimizer.step()
    fresh = tiny_model(tied=False)
    for name, change in trained.delta.items():
        expected = plain.get_parameter(name) - fresh.get_parameter(name)
        assert torch.allclose(change.values.view(change.shape), expected, atol=2e-5)  # type: ignore[union-attr]


def batches_of(examples: list[Example]) -> list[list[int]]:
    source = own_batches([OBJECTIVE.length(example) for example in examples[:16]], SPEC.batch_size, SPEC.seed)
    return [next(source)[0] for _ in range(SPEC.steps)]


def test_the_rate_rises_from_the_first_step_and_has_not_ended_at_the_last(
    model: LlamaForCausalLM, examples: list[Example]
) -> None:
    rates = [r.learning_rate for r in train(model, examples, MASK, spec(warmup_ratio=0.25)).history]
    assert rates[:3] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05])
    assert rates[3:] == pytest.approx([0.05 * left / 10 for left in range(9, 0, -1)])


@pytest.mark.parametrize(("rounds", "expected"), [(None, 2), (1, 1)])
def test_reselection_happens_on_schedule(
    model: LlamaForCausalLM, examples: list[Example], rounds: int | None, expected: int
) -> None:
    trained = train(model, examples, mask(reselect_rounds=rounds))
    assert trained.reselections == expected
    assert trained.trainable == sum(t.indices.unique().numel() for t in trained.delta.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "pinned"),
    [
        ("sensitive", (5.4961028, 4.0199962, 3.5183917)),
        ("blocks", (5.4961028, 3.3468015, 3.378711)),
        ("lora", (5.4961028, 3.1321456, 3.2531269)),
        ("full", (5.4961028, 2.5390971, 2.6754691)),
    ],
)
def test_numbers_are_tied_to_the_algorithm_version(
    model: LlamaForCausalLM, examples: list[Example], kind: str, pinned: tuple[float, float, float]
) -> None:
    """If this fails, a recipe gives other numbers: raise TRAIN_VERSION in workers/training/loop.py and pin new ones."""
    trained = train(model, examples, KINDS[kind])
    found = (TRAIN_VERSION, trained.history[0].loss, trained.history[-1].loss, trained.best_validation_loss)
    assert found == pytest.approx((2, *pinned), rel=2e-4)


def test_a_loss_that_is_not_finite_names_step_and_rows(model: LlamaForCausalLM, examples: list[Example]) -> None:
    with pytest.raises(ExpertError, match=r"step \d+: loss .*training rows \[.*learning_rate"):
        train(model, examples, MASK, spec(learning_rate=1e38, clip_norm=1e30))
    assert all(map(torch.equal, model.state_dict().values(), tiny_model(tied=False).state_dict().values()))


@pytest.mark.parametrize("kind", ["random", "full"])
def test_micro_batches_add_up_to_the_batch(model: LlamaForCausalLM, examples: list[Example], kind: str) -> None:
    """Targets have different lengths, so averaging the means of micro-batches would give another loss."""
    whole = train(model, examples, KINDS[kind], spec(steps=3, batch_size=6))
    parts = train(model, examples, KINDS[kind], spec(steps=3, batch_size=6, micro_batch_size=2))
    assert [r.loss for r in parts.history] == pytest.approx([r.loss for r in whole.history], rel=1e-5)
    assert [r.gradient_norm for r in parts.history] == pytest.approx([r.gradient_norm for r in whole.history], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_activations_changes_no_bit(model: LlamaForCausalLM, examples: list[Example], kind: str) -> None:
    calls = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    kept = train(model, examples, KINDS[kind], spec(steps=3, validate_every=None))
    forwards, calls[:] = sum(calls), []
    again = train(model, examples, KINDS[kind], spec(steps=3, validate_every=None), recompute=True)
    assert sum(calls) > forwards
    assert numbers(again) == numbers(kept)
    assert same_change(again, kept)


def test_training_ends_when_validation_stops_improving(model: LlamaForCausalLM, examples: list[Example]) -> None:
    trained = train(model, examples, MASK, spec(steps=60, learning_rate=0.5, validate_every=2, patience=2))
    seen = [r.validation_loss for r in trained.history if r.validation_loss is not None]
    assert len(trained.history) < 60
    assert trained.best_step == len(trained.history) - 4
    assert min(seen) == seen[-3] == trained.best_validation_loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bits(
    model: LlamaForCausalLM, examples: list[Example], kind: str, tmp_path: Path
) -> None:
    """After a re-selection, with moments of two ages, dropout, and a best step on either side of the interruption."""
    saved: list[Path] = []

    def save(state: TrainState) -> None:
        saved.append(tmp_path / f"{state.step}")
        write_state(state, saved[-1])

    whole = train(model, examples, KINDS[kind], spec(validate_every=3), save_every=2, on_save=save)
    assert [path.name for path in saved] == ["2", "4", "6", "8", "10"]
    for path in saved[::2]:
        torch.rand(7)  # another state of the generator than the interrupted process had
        reports: list[StepReport] = []
        resumed = train(
            tiny_model(tied=False), examples, KINDS[kind], spec(validate_every=3), resume=read_state(path),
            on_step=reports.append,
        )  # fmt: skip
        assert resumed.resumed_after == int(path.name)
        assert [report.step for report in reports] == list(range(resumed.resumed_after + 1, 13))
        assert numbers(resumed) == numbers(whole)
        assert (resumed.best_step, resumed.best_validation_loss, resumed.reselections) == (
            whole.best_step, whole.best_validation_loss, whole.reselections,
        )  # fmt: skip
        assert same_change(resumed, whole)


def test_given_batches_are_taken_and_without_validation_rows_the_last_values(
    model: LlamaForCausalLM, examples: list[Example], tmp_path: Path
) -> None:
    """Parts of several sizes add up to the batch; a resumed run ends with the same bits."""
    lengths = [[OBJECTIVE.length(example) for example in part] for part in (examples[:8], examples[8:16])]
    flat = [length for part in lengths for length in part]
    cut = mixed_batches(lengths, 3, 6, seed=1, part_rows=2)
    whole_batches = [[sorted((row for part in batch for row in part), key=lambda row: -flat[row])] for batch in cut]
    states: list[Path] = []

    def save(state: TrainState) -> None:
        states.append(tmp_path / f"{state.step}")
        write_state(state, states[-1])

    def mixed(batches: list[Batch], **options: object) -> TrainedExpert:
        given = (tiny_model(tied=False), OBJECTIVE, examples[:16], [], KINDS["blocks"], spec(steps=6))
        return train_expert(*given, batches=batches, **options)  # type: ignore[arg-type]

    parts = mixed(cut, save_every=2, on_save=save)
    whole = mixed(whole_batches)
    assert len(cut[0]) > 1
    assert [r.loss for r in parts.history] == pytest.approx([r.loss for r in whole.history], rel=1e-4)
    assert [r.gradient_norm for r in parts.history] == pytest.approx([r.gradient_norm for r in whole.history], rel=1e-3)
    assert (parts.best_step, parts.best_validation_loss) == (6, float("inf"))
    assert all(report.validation_loss is None for report in parts.history)
    assert [path.name for path in states] == ["2", "4"]
    for path in states:
        assert same_change(mixed(cut, resume=read_state(path)), parts)


def numbers(trained: TrainedExpert) -> list[tuple[object, ...]]:
    """The history without its times."""
    return [(r.step, r.loss, r.gradient_norm, r.learning_rate, r.tokens, r.validation_loss) for r in trained.history]


def same_change(one: TrainedExpert, other: TrainedExpert) -> bool:
    """Bit equality of every tensor of every change."""
    pairs = [(one.delta[name], other.delta[name]) for name in one.delta]
    tensors = [
        (getattr(a, field), getattr(b, field))
        for a, b in pairs
        for field in ("a", "b", "indices", "values")
        if hasattr(a, field)
    ]
    return one.delta.keys() == other.delta.keys() and all(torch.equal(a, b) for a, b in tensors)


def test_a_selection_that_fails_names_step_and_rows(model: LlamaForCausalLM, examples: list[Example]) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ExpertError, match=r"selecting positions before step 1 on training rows \[\[.*not finite"):
        train(model, examples, SENSITIVE)


def test_a_validation_loss_that_is_not_finite_ends_training(model: LlamaForCausalLM, examples: list[Example]) -> None:
    """Also where a state would have been saved, which must never hold it."""
    saved: list[TrainState] = []
    wild = spec(steps=4, learning_rate=3e38, clip_norm=1e30, warmup_ratio=0.0, schedule="constant_with_warmup")
    with pytest.raises(ExpertError, match=r"step 1: validation loss (nan|inf) after training rows"):
        train(model, examples, MASK, replace(wild, validate_every=1), save_every=1, on_save=saved.append)
    assert not saved


def test_a_state_of_other_modules_is_left_aside(
    model: LlamaForCausalLM, examples: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    saved: list[TrainState] = []
    train(model, examples, MASK, spec(steps=4), save_every=2, on_save=saved.append)
    other = replace(saved[0], adapter={f"0/{name}": tensor for name, tensor in saved[0].adapter.items()})
    resumed = train(model, examples, MASK, spec(steps=4), resume=other)
    assert resumed.resumed_after == 0
    assert len(resumed.history) == 4
    assert "after step 2 is left aside" in caplog.text


def test_every_selection_recomputes_activations_too(model: LlamaForCausalLM, examples: list[Example]) -> None:
    seen: list[bool] = []
    layer = model.model.layers[0]
    model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(bool(layer.gradient_checkpointing)))
    train(model, examples, SENSITIVE, spec(steps=6, validate_every=None), recompute=True)
    selections_and_steps = seen[: 1 + 5 + 1 + 1]
    assert all(selections_and_steps)
