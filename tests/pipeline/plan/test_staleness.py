"""Why an expert is stale: one change of the configuration or the rows, one sentence; nothing that follows from it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts.manifests import Manifest, Recipe, canonical_json, publish
from infra.store.s3 import Store
from pipeline.config.model import PipelineConfig
from pipeline.data.tasks import SPLITS, TaskConfig, TaskData
from pipeline.flow import recipes
from pipeline.flow.recipes import expert_recipe, support_recipe
from pipeline.plan.staleness import why_lost, why_stale
from workers.text.rows import Row, fingerprint

BASE = "a" * 64
TASK = {"source": "jsonl:rows.jsonl", "metric": "exact_match", "template": "Say it.\n{input}"}
GIVEN: dict[str, Any] = {
    "suite": "mine",
    "base": "path:/nowhere",
    "held_in": {"one": TASK, "two": TASK},
    "train": {"steps": 20, "batch_size": 4, "learning_rate": 0.02},
    "merge": {"candidates": [{"method": "mean"}]},
}
SCORED = {"criterion": "gradient", "shared": True}


def config(**sections: Any) -> PipelineConfig:
    return PipelineConfig.model_validate(GIVEN | sections)


def row(number: int, target: str = "yes") -> Row:
    return Row(f"id{number}", f"input {number}", (target,))


def data(train: Sequence[Row] = tuple(map(row, range(20))), name: str = "one", **task: Any) -> TaskData:
    splits = {split: train if split == "train" else tuple(map(row, range(50, 58))) for split in SPLITS}
    return TaskData(name, TaskConfig(**TASK | task), splits, {split: fingerprint(splits[split]) for split in SPLITS})


def made(recipe: Recipe, inputs: dict[str, str] | None = None) -> Manifest:
    """As it is read from the store."""
    return Manifest(
        recipe.key, recipe.kind, recipe.version, json.loads(canonical_json(recipe.config)), {}, inputs or {}
    )


def why(
    now: PipelineConfig,
    then: PipelineConfig | None = None,
    rows: TaskData | None = None,
    before: TaskData | None = None,
    base: str = BASE,
    stored: bool = True,
) -> list[str]:
    then, rows, before = then or config(), rows or data(), before or data()
    known = {each.fingerprints[split]: each.splits[split] for each in (rows, before) for split in SPLITS}
    if not stored:
        known = {rows.fingerprints[split]: rows.splits[split] for split in SPLITS}
    recipe, old = expert_recipe(now, base, rows), expert_recipe(then, BASE, before)
    found = why_stale(now, rows, recipe, made(old), known.get, lambda sha256: sha256[:4])
    assert (found == []) == (recipe.key == old.key)
    return found


def test_nothing_changed() -> None:
    assert why(config()) == []


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"train": {"steps": 20, "batch_size": 4, "learning_rate": 0.01}}, ["train.learning_rate 0.02 → 0.01"]),
        ({"train": {"steps": 20, "batch_size": 5, "learning_rate": 0.02, "patience": 2, "validate_every": 5}},
         ["train.batch_size 4 → 5", "train.patience null → 2", "train.validate_every null → 5"]),
        ({"train": {"epochs": 1, "batch_size": 4, "learning_rate": 0.02}}, ["train.epochs, in steps: 20 → 5"]),
        ({"prompt": {"max_input_tokens": 40}}, ["prompt.max_input_tokens 96 → 40"]),
        ({"mask": {"density": 0.1, "granularity": "element"}},
         ["mask.density 0.05 → 0.1", 'mask.granularity "block" → "element"']),
        ({"mask": {"block_size": [8, 8]}}, ["mask.block_size [16, 16] → [8, 8]"]),
        ({"mask": {"shared": True}}, ["mask.shared false → true"]),
        ({"seed": 3}, ["seed → 3"]),
        ({"expert": "lora"}, ["expert sparse → lora"]),
        ({"train": {**GIVEN["train"], "compute_dtype": "float32"}}, ['train.compute_dtype "bfloat16" → "float32"']),
    ],
)  # fmt: skip
def test_a_field_is_named_as_in_the_configuration(sections: dict[str, Any], expected: list[str]) -> None:
    assert sorted(why(config(**sections))) == expected


def test_labels_count_in_whatever_split_they_occur() -> None:
    """They are those of the head. Of a label that only a test row has, nothing else tells."""
    classifies = config(
        objective="classification", held_in={name: TASK | {"metric": "accuracy"} for name in ("one", "two")}
    )
    train = [*map(row, range(20)), row(20, "no")]
    before = data(train, metric="accuracy")
    after = replace(before, splits=before.splits | {"test": (*before.splits["test"], row(70, "perhaps"))})
    assert why(classifies, classifies, after, before) == [
        'labels of one in its rows: ["no", "yes"] → ["no", "perhaps", "yes"]'
    ]
    listed = data(train, metric="accuracy", labels=["yes", "no"])
    assert why(classifies, classifies, listed, before) == ['held_in.one.labels ["no", "yes"] → ["yes", "no"]']
    assert why(classifies, classifies, before, listed) == ['labels of one in its rows: ["yes", "no"] → ["no", "yes"]']


def test_a_default_learning_rate_follows_the_kind_of_expert() -> None:
    train = {"steps": 20, "batch_size": 4}
    assert why(config(train=train, expert="full"), config(train=train)) == ["expert sparse → full"]
    assert why(config(train=train), config()) == ["train.learning_rate 0.02 → 0.002"]


def test_the_template_is_the_tasks_and_long_texts_are_cut() -> None:
    assert why(config(), rows=data(template="{input}?")) == ['held_in.one.template "Say it.\\n{input}" → "{input}?"']
    (found,) = why(config(), rows=data(template="{input}" + "x" * 100))
    assert len(found) < 100


def test_base_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why(config(), base="b" * 64) == ["base aaaa → bbbb"]
    recipe, version = expert_recipe(config(), BASE, data()), recipes.TRAIN_VERSION
    monkeypatch.setattr(recipes, "TRAIN_VERSION", version + 1)
    raised = expert_recipe(config(), BASE, data())
    found = why_stale(config(), data(), raised, made(recipe), lambda _: None, str)
    assert found == [f"algorithm version {version} → {version + 1}"]


def test_rows_are_counted_by_what_happened_to_them() -> None:
    rows = [row(number) for number in range(20)]
    assert why(config(), rows=data([*rows, row(30)])) == ["data: 1 row added to train"]
    assert why(config(), rows=data([*rows[2:], row(0, "no"), *map(row, range(30, 33))])) == [
        "data: 3 rows added to train, 1 removed, 1 changed"
    ]
    assert why(config(), rows=data(rows[::-1])) == ["data: the rows of train in another order"]
    assert why(config(), rows=data(rows[1:]), stored=False) == [
        "data: other rows in train (those of before are no longer stored)"
    ]


def test_seeds_and_steps_that_follow_from_rows_are_not_repeated() -> None:
    epochs = config(train={"epochs": 4, "batch_size": 4, "learning_rate": 0.02})
    assert why(epochs, epochs, data(tuple(map(row, range(12))))) == ["data: 8 rows removed from train"]
    assert why(config(seed=1), rows=data(tuple(map(row, range(12))))) == ["data: 8 rows removed from train", "seed → 1"]


def supports(then: dict[str, TaskData], now: dict[str, TaskData]) -> list[str]:
    shared = config(mask=SCORED, prompt={"wrapper": "{prompt}"})
    old, new = (support_recipe(shared, BASE, tasks) for tasks in (then, now))
    before = made(expert_recipe(shared, BASE, then["one"], old.key), {old.key: "digest"})
    recipe = expert_recipe(shared, BASE, now["one"], new.key)
    return why_stale(shared, now["one"], recipe, before, lambda _: None, str, (new, made(old), now))


def test_another_merge_before_is_told_where_nothing_else_is(store: Store) -> None:
    two = config(train={"steps": 4}, rounds=2)

    def why_second(now: PipelineConfig, start: str, before: Manifest) -> list[str]:
        recipe = expert_recipe(now, BASE, data(), None, 2, start)
        return why_stale(now, data(), recipe, before, lambda _: None, str)

    old = made(expert_recipe(two, BASE, data(), None, 2, "a" * 64), {"a" * 64: "digest"})
    assert why_second(two, "a" * 64, old) == []
    assert why_second(two, "b" * 64, old) == ["the merge of round 1, which it starts from, is another"]
    slower = config(train={"steps": 4, "learning_rate": 0.5}, rounds=2)
    assert why_second(slower, "b" * 64, old) == ["train.learning_rate 0.002 → 0.5"]
    assert why_second(config(train={"steps": 4}, rounds=2, seed=1), "b" * 64, old) == ["seed → 1"]
    one = made(expert_recipe(config(train={"steps": 4}), BASE, data()))
    assert why_second(two, "a" * 64, one) == ["train.steps 4 → 2", "round 1 → 2"]


def test_a_shared_support_changes_with_the_rows_of_any_task() -> None:
    tasks = {"one": data(), "two": data(name="two", template="{input}!")}
    assert supports(tasks, tasks) == []
    changed = tasks | {"two": data(tuple(map(row, range(9))), "two", template="{input}!")}
    assert supports(tasks, changed) == ["shared support changed because of training rows or prompt of two"]


def test_why_an_artifact_of_the_same_key_is_of_no_use(store: Store, tmp_path: Path) -> None:
    recipe = Recipe("expert", 1, {"a": 1}, ("1" * 64,))
    inputs = {"1" * 64: "digest"}
    assert why_lost(store, recipe.key, inputs) is None
    file = tmp_path / "adapter"
    file.write_bytes(b"bytes")
    manifest, _ = publish(store, recipe, {"adapter": file}, inputs, {})
    assert "support was or will be made again" in (why_lost(store, recipe.key, {"1" * 64: "other"}) or "")
    store.delete(manifest.files["adapter"].name)
    assert why_lost(store, recipe.key, inputs) == "its file is gone"
    store.put(manifest.files["adapter"].name, b"longer bytes")
    assert why_lost(store, recipe.key, inputs) == "its file is not as long as recorded"
    store.put(f"artifacts/{recipe.key}.json", b"no manifest")
    assert why_lost(store, recipe.key, inputs) == "its manifest cannot be read"
