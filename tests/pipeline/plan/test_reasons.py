"""Which expert a stale one is compared with, and what is said where there is none, or nothing of it is left."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from infra.artifacts.manifests import Recipe, publish
from infra.artifacts.snapshot import Snapshot
from infra.store.layout import manifest_name, rows_name
from infra.store.s3 import Store
from pipeline.flow.recipes import expert_recipe
from pipeline.flow.rehearse import Forecast
from pipeline.plan.reasons import NEW, Reasons, find_reasons
from tests.pipeline.plan.test_staleness import BASE, config, data, row
from tests.pipeline.report.given import changed, held_in_row
from workers.text.rows import rows_to_jsonl

NOW = expert_recipe(config(), BASE, data())
FASTER = expert_recipe(config(train={"steps": 20, "batch_size": 4, "learning_rate": 0.04}), BASE, data())
FEWER = data([row(number) for number in range(19)])
OTHER_ROWS = expert_recipe(config(), BASE, FEWER)


@pytest.fixture
def ask(store: Store, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is said of the one stale expert, where MLflow remembers these keys and the latest run had that one."""

    def found(*remembered: str, latest: str | None = None) -> Reasons:
        monkeypatch.setattr("pipeline.plan.reasons.expert_keys", lambda suite, task, limit: list(remembered))
        inputs = SimpleNamespace(config=config(), tasks={"one": data()}, store=store, base=SimpleNamespace(sha256=BASE))
        given = {"experts": {"one": NOW}, "support": None, "support_recipe": None, "inputs": inputs, "consumed": {}}
        forecast = SimpleNamespace(stale=["one"], **given)
        results = [changed(held_in={"one": held_in_row() | {"expert_key": latest}})] if latest else []
        return find_reasons(cast(Forecast, forecast), Snapshot(store), results)["one"]

    return found


def put(store: Store, folder: Path, recipe: Recipe) -> None:
    file = folder / recipe.key
    file.write_text(recipe.key)
    publish(store, recipe, {"adapter": file}, {}, {})


def test_a_task_that_never_had_an_expert_is_new(ask: Any) -> None:
    assert ask().why == (NEW,)


def test_the_expert_of_the_latest_run_is_the_one_before(ask: Any, store: Store, tmp_path: Path) -> None:
    for recipe in (FASTER, OTHER_ROWS):
        put(store, tmp_path, recipe)
    store.put(rows_name(FEWER.fingerprints["train"]), rows_to_jsonl(FEWER.splits["train"]))
    assert ask(OTHER_ROWS.key, FASTER.key).why == ("data: 1 row added to train",)
    assert ask(OTHER_ROWS.key, latest=FASTER.key).why == ("train.learning_rate 0.04 → 0.02",)


def test_what_was_made_and_is_gone_is_not_explained_by_another_expert(ask: Any, store: Store, tmp_path: Path) -> None:
    """Nothing has changed: comparing with an older expert would name a difference that is none."""
    for recipe in (NOW, FASTER):
        put(store, tmp_path, recipe)
    store.delete(manifest_name(NOW.key))
    assert ask(NOW.key, FASTER.key).why == ("its manifest is gone",)
    assert ask(FASTER.key, latest=NOW.key).why == ("its manifest is gone",)
    assert ask("9" * 64).why == ("the expert before is gone: nothing to compare with",)
    store.put(manifest_name(NOW.key), b"damaged")
    assert ask(NOW.key).why == ("its manifest cannot be read",)
