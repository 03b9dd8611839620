"""Classifiers on every style of checkpoint: loading, the head, training, prediction and scoring."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from transformers import AutoModel, AutoModelForSequenceClassification

from infra.errors import AdapterError, BaseModelError, ConfigError, DataError
from tests.workers.tiny import tiny_encoder, tiny_encoder_tokenizer, tiny_model, tiny_tokenizer
from workers.adapters.support import SupportSpec
from workers.base.load import (
    head_parameters,
    load_classifier,
    load_classifier_tokenizer,
    load_model,
    load_tokenizer,
    weights_file,
)
from workers.base.prepare import prepare_base
from workers.scoring.classification import (
    Classification,
    ClassifySpec,
    distinct_labels,
    encode_labelled,
    encode_text,
    evaluate_labels,
    head_state,
    label_logits,
    predict_labels,
    set_head,
)
from workers.tensors.checkpoint import WEIGHTS
from workers.text.prompt import PromptSpec
from workers.text.rows import Row
from workers.training.in_place import InPlaceAdapter
from workers.training.objectives import mean_loss

LABELS = ("one", "three", "two")
PLAIN = PromptSpec(wrapper="{prompt}", max_input_tokens=20)


def _causal(folder: Path) -> None:
    tiny_model(tied=False).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _masked(folder: Path) -> None:
    tiny_encoder().save_pretrained(folder)
    tiny_encoder_tokenizer().save_pretrained(folder)


def _bare(folder: Path) -> None:
    _masked(folder)
    AutoModel.from_pretrained(folder).save_pretrained(folder)  # adds a pooler, removes the prefix and the heads


def _old_names(folder: Path) -> None:
    _masked(folder)
    tensors = load_file(folder / WEIGHTS)
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t.clone()
        for n, t in tensors.items()
    }
    save_file(renamed | {"bert.embeddings.position_ids": torch.arange(64)[None]}, folder / WEIGHTS)


Prepare = Callable[[Callable[[Path], None]], Path]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Writes a checkpoint and gives the folder of the prepared base."""

    def make(write: Callable[[Path], None]) -> Path:
        folder = tmp_path / write.__name__
        folder.mkdir(exist_ok=True)
        write(folder)
        return prepare_base(f"path:{folder}", tmp_path / "cache").path

    return make


def _rows(n: int, seed: int = 0) -> list[Row]:
    """Ten kinds of filler and one keyword, somewhere, that gives the label."""
    draw = random.Random(seed)
    rows = []
    for at in range(n):
        key = draw.randrange(3)
        words = [f"w{draw.randrange(10, 20)}" for _ in range(draw.randrange(2, 7))]
        words.insert(draw.randrange(len(words) + 1), f"w{key + 1}")
        rows.append(Row(str(at), " ".join(words), (("one", "two", "three")[key],)))
    return rows


# -- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "head"),
    [
        (_causal, ["score.weight"]),
        (_masked, ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]),
        (_bare, ["classifier.weight", "classifier.bias"]),
        (_old_names, ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]),
    ],
)
def test_same_logits_as_transformers_with_the_same_head(
    write: Callable[[Path], None], head: list[str], prepare: Prepare, tmp_path: Path
) -> None:
    path = prepare(write)
    model = load_classifier(path, 3, torch.float32, seed=5)
    assert list(head_parameters(model)) == head
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / write.__name__, num_labels=3).eval()
    assert set(theirs.state_dict()) == set(model.state_dict())
    theirs.load_state_dict(head_state(model), strict=False)
    ids = [[1, 7, 9, 30, 2], [1, 8, 2]]
    padded = {
        "input_ids": torch.tensor([ids[0], [*ids[1], 0, 0]]),
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
    }
    with torch.no_grad():
        torch.testing.assert_close(label_logits(model, ids, 0), theirs(**padded).logits)


def test_classifiers_and_language_models_map_one_file(prepare: Prepare) -> None:
    path = prepare(_causal)
    language, first, second = (
        load_model(path),
        load_classifier(path, 3, torch.bfloat16, 0),
        load_classifier(path, 2, torch.bfloat16, 0),
    )
    name = "model.layers.1.mlp.down_proj.weight"
    for model in (first, second):
        torch.testing.assert_close(model.get_parameter(name), language.get_parameter(name), rtol=0, atol=0)
    assert sorted(path.glob("*.safetensors")) == sorted({path / WEIGHTS, weights_file(path, torch.bfloat16)})
    assert "weights.bfloat16" in Path("/proc/self/maps").read_text()
    with torch.no_grad():  # private: written pages are nobody else's
        first.get_parameter(name).zero_()
    assert second.get_parameter(name).abs().sum() > 0


def test_a_base_without_a_body_weight_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    def broken(change: Callable[[dict[str, Any]], None], kind: Callable[[Path], None]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            kind(folder)
            tensors = load_file(folder / WEIGHTS)
            change(tensors)
            save_file(tensors, folder / WEIGHTS)

        return write

    name = "model.layers.0.self_attn.q_proj.weight"
    path = prepare(broken(lambda tensors: tensors.pop(name), _causal))
    with pytest.raises(BaseModelError, match=r"missing.*q_proj"):
        load_classifier(path, 2)
    path = prepare(broken(lambda tensors: tensors.update({f"{name}_scale": torch.ones(1)}), _causal))
    with pytest.raises(BaseModelError, match=r"unexpected.*q_proj\.weight_scale"):
        load_classifier(path, 2)
    with pytest.raises(ConfigError, match="2 labels"):
        load_classifier(path, 1)


def test_head_is_reproducible_and_seeded(prepare: Prepare) -> None:
    path = prepare(_masked)
    made = [head_state(load_classifier(path, 3, dtype, seed)) for dtype, seed in ((torch.float32, 1),) * 2]
    made += [head_state(load_classifier(path, 3, torch.bfloat16, 1)), head_state(load_classifier(path, 3, seed=2))]
    first = made[0]
    for other in made[1:3]:
        assert all(torch.equal(first[name], other[name]) for name in first)
    weights = [name for name in first if name.endswith("weight")]
    assert all(not torch.equal(first[name], made[3][name]) for name in weights)
    dense = first["bert.pooler.dense.weight"]  # 1024 draws with the config's standard deviation 0.3
    assert abs(float(dense.std()) - 0.3) < 0.03
    assert not first["classifier.bias"].any()


@pytest.mark.parametrize("write", [_causal, _masked, _bare])
def test_bfloat16_body_with_a_float32_head(write: Callable[[Path], None], prepare: Prepare) -> None:
    model = load_classifier(prepare(write), 3, torch.bfloat16, seed=0)
    head = head_parameters(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in head else torch.bfloat16), name
    for parameter in head.values():
        parameter.requires_grad_(True)
    logits = label_logits(model, [[1, 7, 9, 2], [1, 8, 2]], 0)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.values())


def test_decoders_classify_at_the_last_token_whatever_the_padding(prepare: Prepare) -> None:
    """The checkpoint's own configuration knows no pad token, or another one than the tokenizer."""

    def odd(folder: Path) -> None:
        model = tiny_model(tied=False)
        model.config.pad_token_id = None
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    model = load_classifier(prepare(odd), 3, torch.float32, seed=0)
    ids = [1, 20, 30, 9]
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([ids])).logits[0]
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        right = label_logits(model, [ids, [1] * 9], 0)[0]
        left = model(
            input_ids=torch.tensor([[0, 0, *ids], [1] * 6]), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        ).logits[0]
    for found in (right, left, model.score(hidden).detach()):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_tokenizers(prepare: Prepare) -> None:
    encoder, decoder = prepare(_masked), prepare(_causal)
    with pytest.raises(BaseModelError, match="no eos"):
        load_tokenizer(encoder)
    tokenizer = load_classifier_tokenizer(encoder)
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == ("right", 0)
    assert load_classifier_tokenizer(decoder).pad_token_id != load_tokenizer(decoder).eos_token_id


# -- rows --------------------------------------------------------------------------------------------------------


def test_encoding_keeps_special_tokens_and_the_end_of_the_input() -> None:
    tokenizer = tiny_encoder_tokenizer()
    row = Row("r7", "w1 w2 w3", ("two",))
    spec = PromptSpec("{input}?", "{prompt}", max_input_tokens=3)
    example = encode_labelled(tokenizer, spec, row, LABELS)
    assert tokenizer.convert_ids_to_tokens(list(example.input_ids)) == ["[CLS]", "w2", " ", "w3", "?", "[SEP]"]
    assert example.label == 2
    with pytest.raises(DataError, match=r"row r7: its label is 'four'; known labels: 'one', 'three', 'two'"):
        encode_labelled(tokenizer, spec, Row("r7", "w1", ("four",)), LABELS)
    with pytest.raises(DataError, match=r"row r7: 67 tokens .* 64"):
        encode_text(tokenizer, PromptSpec("w9" * 63 + "{input}", "{prompt}"), Row("r7", "w1w1", ("one",)))
    with pytest.raises(DataError, match="row r7: 0 tokens"):
        encode_text(tiny_tokenizer(), PLAIN, Row("r7", "", ("one",)))
    assert distinct_labels(_rows(40)) == LABELS


# -- training and prediction -------------------------------------------------------------------------------------


def _supports(model: Any, density: float = 0.2) -> dict[str, SupportSpec]:
    generator = torch.Generator().manual_seed(0)
    supports = {}
    for name, module in model.base_model.named_modules(prefix=model.base_model_prefix):
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in head_parameters(model):
            shape = (module.weight.shape[0], module.weight.shape[1])
            kept = torch.randperm(module.weight.numel(), generator=generator)[: int(density * module.weight.numel())]
            supports[name] = SupportSpec(shape, kept.sort().values, None)
    return supports


@pytest.mark.parametrize(("write", "dtype"), [(_causal, torch.float32), (_masked, torch.bfloat16)])
def test_training_solves_a_separable_task(write: Callable[[Path], None], dtype: torch.dtype, prepare: Prepare) -> None:
    path = prepare(write)
    model, tokenizer = load_classifier(path, 3, dtype, seed=0), load_classifier_tokenizer(path)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train = [encode_labelled(tokenizer, PLAIN, row, LABELS) for row in _rows(2000, seed=1)]
    test = _rows(64, seed=2)
    spec = ClassifySpec("f1", LABELS, wrapper="{prompt}", max_input_tokens=20)
    objective = Classification(int(tokenizer.pad_token_id))
    with InPlaceAdapter(model, _supports(model)) as adapter:
        head = list(head_parameters(model).values())
        for parameter in head:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW([*adapter.parameters(), *head], lr=5e-3, weight_decay=0.0)
        untrained = mean_loss(model, objective, train[:256], 32)
        for step in range(160):
            adapter.zero_grad()
            for parameter in head:
                parameter.grad = None
            batch = [train[(step * 32 + at) % len(train)] for at in range(32)]
            (objective.loss_sum(model, batch) / 32).backward()
            optimizer.step()
            adapter.write_back()
        result = evaluate_labels(model, tokenizer, test, spec, batch_size=16)
        assert mean_loss(model, objective, train[:256], 32) < untrained / 3
        trained = head_state(model)
    assert result.score > 0.9
    assert sum(result.scores) / len(test) > 0.9
    right = [row.targets[0] for row in test]
    assert result.score == pytest.approx(f1_score(right, result.outputs, average="macro"))
    names = head_parameters(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n not in names)
    assert all(not torch.equal(trained[name], before[name]) for name in names)


def test_predictions_do_not_depend_on_the_batch(prepare: Prepare) -> None:
    for write in (_causal, _masked):
        path = prepare(write)
        model, tokenizer = load_classifier(path, 3, torch.float32, seed=2), load_classifier_tokenizer(path)
        rows = _rows(30, seed=4)
        together = predict_labels(model, tokenizer, PLAIN, rows, LABELS, batch_size=30)
        assert together == [predict_labels(model, tokenizer, PLAIN, [row], LABELS)[0] for row in rows]
        assert together[::-1] == predict_labels(model, tokenizer, PLAIN, rows[::-1], LABELS, batch_size=7)
        assert len(set(together)) > 1
        ids = [encode_text(tokenizer, PLAIN, row) for row in rows]
        with torch.no_grad():
            alone = torch.cat([label_logits(model, [one], 0) for one in ids])
            torch.testing.assert_close(label_logits(model, ids, 0), alone, rtol=1e-4, atol=1e-5)


def test_objective_sums_cross_entropies(prepare: Prepare) -> None:
    path = prepare(_masked)
    model, tokenizer = load_classifier(path, 3, torch.float32), load_classifier_tokenizer(path)
    objective = Classification(0)
    examples = [encode_labelled(tokenizer, PLAIN, row, LABELS) for row in _rows(5)]
    with torch.no_grad():
        logits = label_logits(model, [example.input_ids for example in examples], 0)
        expected = -logits.log_softmax(-1)[range(5), [example.label for example in examples]].sum()
        torch.testing.assert_close(objective.loss_sum(model, examples), expected)
    assert [objective.length(e) for e in examples] == [len(e.input_ids) for e in examples]
    assert [objective.count(e) for e in examples] == [1] * 5


# -- the head ----------------------------------------------------------------------------------------------------


def test_heads_are_swapped_also_for_other_numbers_of_labels(prepare: Prepare) -> None:
    path = prepare(_masked)
    model, larger = load_classifier(path, 3, torch.bfloat16, 0), load_classifier(path, 5, torch.bfloat16, 9)
    ids = [[1, 7, 9, 2], [1, 8, 2]]
    with torch.no_grad():
        own, other = label_logits(model, ids, 0), label_logits(larger, ids, 0)
        before, held = head_state(model), head_parameters(model)["classifier.weight"]
        set_head(model, {name: 2 * tensor for name, tensor in before.items()})
        assert head_parameters(model)["classifier.weight"] is held  # an optimizer's parameter stays the model's
        assert not torch.equal(label_logits(model, ids, 0), own)
        set_head(model, head_state(larger))
        assert torch.equal(label_logits(model, ids, 0), other)
        assert predict_labels(model, load_classifier_tokenizer(path), PLAIN, _rows(2), "abcde") is not None
        set_head(model, before)
        assert torch.equal(label_logits(model, ids, 0), own)
    with pytest.raises(ConfigError, match="5 labels, but the model's head is for 3"):
        predict_labels(model, load_classifier_tokenizer(path), PLAIN, _rows(2), "abcde")


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.pop("classifier.bias"),
        lambda head: head.update({"score.weight": torch.zeros(3, 32)}),
        lambda head: head.update({"classifier.bias": torch.zeros(4)}),
        lambda head: head.update({"classifier.bias": torch.tensor(1.0)}),
        lambda head: head.update({"classifier.weight": torch.zeros(3, 31)}),
        lambda head: head.update({"bert.pooler.dense.weight": torch.zeros(16, 32)}),
        lambda head: head.update({"classifier.weight": torch.zeros(1, 32), "classifier.bias": torch.zeros(1)}),
    ],
)
def test_a_head_that_does_not_fit_changes_nothing(change: Callable[[Any], None], prepare: Prepare) -> None:
    model = load_classifier(prepare(_masked), 3, torch.float32)
    before = head_state(model)
    head = {name: tensor + 1 for name, tensor in before.items()}
    change(head)
    with pytest.raises(AdapterError, match="head: "):
        set_head(model, head)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head_state(model).items())


def test_refusals(prepare: Prepare) -> None:
    with pytest.raises(ConfigError, match="has no head"):
        head_parameters(load_model(prepare(_causal)))
    with pytest.raises(ConfigError, match="rouge_l"):
        ClassifySpec("rouge_l", LABELS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="all different"):
        ClassifySpec("f1", ("a", "a"))
    with pytest.raises(DataError, match="known labels"):
        evaluate_labels(None, None, [Row("1", "w1", ("x",))], ClassifySpec("f1", LABELS))
