"""Finding the champion again: its base, prompts and heads as it was made with, and what is missing is said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError

from infra.artifacts.manifests import Manifest, Recipe, publish
from infra.errors import AdapterError, RegistryError, StoreError
from infra.registry.lineage import Ancestor, Lineage
from infra.registry.versions import Version
from infra.store.errors import ObjectCorrupted, ObjectMissing
from infra.store.layout import manifest_name, rows_name
from infra.store.s3 import FileRef, Store
from pipeline.config.candidates import Candidates
from pipeline.config.model import PipelineConfig
from pipeline.data.tasks import SPLITS, TaskConfig, TaskData
from pipeline.flow.steps import evaluation_job, opponent_job
from pipeline.gate.opponent import Incomparable, Opponent, find_champion, is_lasting, unseen
from pipeline.records.outcome import Inputs
from workers.base.prepare import PreparedBase
from workers.scoring.metrics import LabelScores
from workers.text.prompt import PromptSpec
from workers.text.rows import Row, fingerprint, rows_to_jsonl

BASE = "b" * 64
OLD = {"template": "Old: {input}", "wrapper": "<{prompt}>", "max_input_tokens": 7, "max_target_tokens": 9}
TODAY = PromptSpec("New: {input}", "[{prompt}]", 5)


def put(store: Store, folder: Path, recipe: Recipe, inputs: dict[str, str], **meta: Any) -> Manifest:
    """An artifact whose bytes are those of its recipe's name."""
    file = folder / recipe.key
    file.write_text(f"{recipe.kind} {recipe.key}")
    return publish(store, recipe, {"adapter": file}, inputs, {"base_sha256": BASE} | meta)[0]


def expert(store: Store, folder: Path, task: str, labels: tuple[str, ...] = (), **data: str) -> Manifest:
    """Of a classification if it has labels."""
    config = {"prompt": OLD, "task": task, "data": data, **({"labels": list(labels)} if labels else {})}
    return put(store, folder, Recipe("expert", 1, config), {}, task=task)


def merge(store: Store, folder: Path, *experts: Manifest) -> Manifest:
    fisher = put(store, folder, Recipe("fisher", 1, {}), {})
    made_of = {each.key: each.digest for each in (*experts, fisher)}
    return put(store, folder, Recipe("merged", 1, {}, tuple(made_of)), made_of)


def version(manifest: Manifest, number: int = 3) -> Version:
    return Version("mine.x", number, {"factory.key": manifest.key, "factory.digest": manifest.digest})


@pytest.fixture
def with_base(store: Store) -> Store:
    store.put(f"bases/{BASE}/index.json", b"{}")
    return store


def test_an_expert_is_asked_as_it_was_trained(with_base: Store, tmp_path: Path) -> None:
    made = expert(with_base, tmp_path, "before it was renamed")
    found = find_champion(with_base, version(made), "mine", "task", ["task"], {})
    assert (found.version, found.manifest, found.base_sha256, str(found)) == (3, made, BASE, "champion (version 3)")
    assert found.prompt("task", TODAY) == PromptSpec("Old: {input}", "<{prompt}>", 7)


def test_a_merge_is_asked_as_its_experts_and_on_a_new_task_in_its_own_wrapper(with_base: Store, tmp_path: Path) -> None:
    one, two = (expert(with_base, tmp_path, task, ("a", "b")) for task in ("one", "two"))
    merged = merge(with_base, tmp_path, one, two)
    found = find_champion(
        with_base, version(merged), "mine", "merged", ["one", "two", "new"], {"one": ("a", "b"), "new": ("x", "y")}
    )
    assert found.experts == {"one": one, "two": two}
    assert found.prompt("two", TODAY).template == "Old: {input}"
    assert found.prompt("new", TODAY) == PromptSpec("New: {input}", "<{prompt}>", 7)


def test_a_merge_whose_expert_is_gone_misses_heads_only(with_base: Store, tmp_path: Path) -> None:
    one, two = (expert(with_base, tmp_path, task) for task in ("one", "two"))
    merged = merge(with_base, tmp_path, one, two)
    with_base.delete(manifest_name(two.key))
    found = find_champion(with_base, version(merged), "mine", "merged", ["one", "two", "new", "fresh"], {})
    assert set(found.experts) == {"one"}
    one, two = (expert(with_base, tmp_path, task, ("a", "b")) for task in ("one", "two"))
    merged = merge(with_base, tmp_path, one, two)
    with_base.delete(manifest_name(two.key))
    with pytest.raises(Incomparable, match=rf"no artifact {two.key}"):
        find_champion(with_base, version(merged), "mine", "merged", ["one", "two", "new", "fresh"], {"one": ("a", "b")})
    with_base.put(manifest_name(two.key), replace(two, files={"adapter": FileRef(
        two.files["adapter"].name, "0" * 64, two.files["adapter"].size)}).to_json())  # fmt: skip
    with pytest.raises(Incomparable, match=rf"expert {two.key} now has other bytes"):
        find_champion(with_base, version(merged), "mine", "merged", ["one", "two", "new", "fresh"], {"one": ("a", "b")})


def test_what_is_missing_is_said(store: Store, tmp_path: Path) -> None:
    made = expert(store, tmp_path, "task")
    with pytest.raises(Incomparable, match=rf"its base {BASE} is not"):
        find_champion(store, version(made), "mine", "task", ["task"], {})
    store.put(f"bases/{BASE}/index.json", b"{}")
    labelled = expert(store, tmp_path, "task", ("a", "b"))
    with pytest.raises(Incomparable, match=r"other labels of the task 'task'"):
        find_champion(store, version(labelled), "mine", "task", ["task"], {"task": ("a", "c")})
    with pytest.raises(Incomparable, match=r"it generates, as its expert for 'task' does"):
        find_champion(store, version(made), "mine", "task", ["task"], {"task": ("a", "b")})
    with pytest.raises(Incomparable, match=r"it classifies, as its expert for 'task' does"):
        find_champion(store, version(labelled), "mine", "task", ["task"], {})
    other = replace(version(made), tags={"factory.key": made.key, "factory.digest": "0" * 64})
    with pytest.raises(Incomparable, match=r"other bytes than were registered"):
        find_champion(store, other, "mine", "task", ["task"], {})
    store.delete(made.files["adapter"].name)
    with pytest.raises(Incomparable, match=r"adapter is gone"):
        find_champion(store, version(made), "mine", "task", ["task"], {})
    store.delete(manifest_name(made.key))
    with pytest.raises(Incomparable, match=rf"no artifact {made.key}"):
        find_champion(store, version(made), "mine", "task", ["task"], {})
    with pytest.raises(Incomparable, match=r"no artifact"):
        find_champion(store, Version("mine.x", 1, {}), "mine", "task", ["task"], {})


def named(monkeypatch: pytest.MonkeyPatch, *experts: tuple[str, Manifest]) -> None:
    """Say under which names the champion's experts were registered."""
    made_of = tuple(Ancestor(name, each.key, each.digest) for name, each in experts)
    monkeypatch.setattr("pipeline.gate.opponent.lineage_of", lambda _: Lineage("mean", {}, "k", made_of))


def test_a_merges_tasks_are_those_it_was_registered_with(
    with_base: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert may have been trained for another suite, under another name, or be that of two tasks."""
    one, two = (expert(with_base, tmp_path, task, ("a", "b")) for task in ("old name", "two"))
    merged = merge(with_base, tmp_path, one, two)
    named(monkeypatch, ("mine.one", one), ("mine.two-too", two), ("mine.two", two))
    tasks, labels = ["one", "two", "two/too"], dict.fromkeys(("one", "two", "two/too"), ("a", "b"))
    found = find_champion(with_base, version(merged), "mine", "merged", tasks, labels)
    assert found.experts == {"one": one, "two": two, "two/too": two}
    with pytest.raises(Incomparable, match="other labels of the task 'one'"):
        find_champion(with_base, version(merged), "mine", "merged", tasks, labels | {"one": ("b", "a")})


def test_a_merge_for_more_tasks_is_not_compared_on_some(
    with_base: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (expert(with_base, tmp_path, task) for task in ("one", "two"))
    merged = merge(with_base, tmp_path, one, two)
    named(monkeypatch, ("mine.one", one), ("mine.dropped", two))
    with pytest.raises(Incomparable, match="it was made for 'dropped' too, which this run has no task of"):
        find_champion(with_base, version(merged), "mine", "merged", ["one", "two"], {})
    with_base.delete(manifest_name(two.key))  # whether its expert is still there makes no difference
    with pytest.raises(Incomparable, match="it was made for 'dropped' too"):
        find_champion(with_base, version(merged), "mine", "merged", ["one", "two"], {})
    with_base.put(manifest_name(two.key), two.to_json())
    named(monkeypatch, ("mine.one", one))
    found = find_champion(with_base, version(merged), "mine", "merged", ["one", "two", "new"], {})
    assert set(found.experts) == {"one", "two"}, "of one that is not in the lineage, the name that it was trained under"


def stored(store: Store, *rows: tuple[str, str]) -> str:
    """Rows of these ids and answers in the store; returns their fingerprint."""
    made = [Row(name, f"input {name}", (answer,)) for name, answer in rows]
    store.put(rows_name(fingerprint(made)), rows_to_jsonl(made))
    return fingerprint(made)


def test_gate_rows_that_the_champion_was_trained_or_validated_on_are_found(with_base: Store, tmp_path: Path) -> None:
    train = stored(with_base, ("1", "yes"), ("2", "yes"), ("3", "yes"))
    validation = stored(with_base, ("4", "yes"), ("5", "yes"))
    gone = fingerprint([Row("6", "", ("yes",))])
    one = expert(with_base, tmp_path, "one", train=train, validation=validation)
    two = expert(with_base, tmp_path, "two", train=gone, validation=validation)
    gate = {
        "one": stored(with_base, ("9", "yes"), ("4", "corrected since"), ("2", "yes")),
        "two": stored(with_base, ("6", "yes"), ("3", "another answer to the same input"), ("5", "yes")),
        "new": stored(with_base, ("1", "yes"), ("8", "yes")),  # the task was called otherwise
        "fresh": stored(with_base, ("7", "yes"), ("8", "yes")),
    }
    merged = merge(with_base, tmp_path, one, two)
    found = find_champion(with_base, version(merged), "mine", "merged", ["one", "two", "new", "fresh"], {}, gate)
    assert found.seen == {"one": (1, 2), "two": (2,), "new": (0,)}
    alone = find_champion(with_base, version(one), "mine", "renamed", ["renamed"], {}, {"renamed": gate["one"]})
    assert alone.seen == {"renamed": (1, 2)}
    assert find_champion(with_base, version(merged), "mine", "merged", ["one", "two", "new", "fresh"], {}).seen == {}


def test_rows_that_were_seen_are_left_out_for_both_models() -> None:
    labels = LabelScores((0, 1, 2, 0), (0, 1, 1, 2), "f1")
    before = {"text": [0.0, 0.25, 0.5, 0.75], "labels": labels, "fresh": [1.0, 0.0], "few": [1.0, 1.0, 1.0]}
    after = {"text": [1.0, 0.5, 0.25, 0.0], "labels": labels, "fresh": [0.0, 1.0], "few": [0.0, 0.0, 0.0]}
    rows = unseen(before, after, {"text": (0, 2), "labels": (1,), "few": (0, 2), "of another merge": (1,)}, {})
    kept = LabelScores((0, 2, 0), (0, 1, 2), "f1")
    assert rows.before == {"text": [0.25, 0.75], "labels": kept, "fresh": [1.0, 0.0]}
    assert rows.after == {"text": [0.5, 0.0], "labels": kept, "fresh": [0.0, 1.0]}
    assert rows.remark == (
        "; 5 gate rows left out: the champion was trained on them; not compared on 'few': too few gate rows are left"
    )


def test_rows_that_the_challenger_has_seen_are_left_out_too() -> None:
    scores = {"a": [0.0, 1.0, 0.5, 0.25], "b": [1.0, 1.0]}
    ours = unseen(scores, scores, {}, {"a": (3,)})
    assert ours.before == ours.after == {"a": [0.0, 1.0, 0.5], "b": [1.0, 1.0]}
    assert ours.remark == "; 1 gate row left out: the challenger was trained on it"
    both = unseen(scores, scores, {"a": (0, 3)}, {"a": (3,)})
    assert both.before == {"a": [1.0, 0.5], "b": [1.0, 1.0]}
    assert both.remark == "; 2 gate rows left out: one of the two was trained on them"


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (Incomparable("other labels"), True),
        (ObjectMissing("gone"), True),
        (ObjectCorrupted("other bytes"), True),
        (AdapterError("damaged"), True),
        (StoreError("unreachable"), False),
        (RegistryError("no answer"), False),
        (OutOfMemoryError("killed"), False),
    ],
)
def test_what_passes_is_not_laid_at_the_champions_door(error: BaseException, lasting: bool) -> None:
    assert is_lasting(error) == lasting


def test_where_nothing_was_seen_nothing_changes_and_where_all_was_nothing_is_left() -> None:
    one, two = {"a": [0.0, 1.0, 0.5]}, {"a": [1.0, 1.0, 0.5]}
    same = unseen(one, two, {}, {})
    assert (same.before, same.after, same.remark) == (one, two, "")
    single = unseen(one, two, {"a": (1,)}, {})
    assert single.remark == "; 1 gate row left out: the champion was trained on it"
    assert unseen(one, two, {"a": (0, 2)}, {}).before == {}
    many = {f"t{at}": [0.0, 1.0] for at in range(7)}
    rows = unseen(many, many, dict.fromkeys(many, (0,)), {})
    assert rows.before == rows.after == {}
    assert rows.remark.endswith("not compared on 't0', 't1', 't2', 't3', 't4' and 2 more: too few gate rows are left")


def inputs(base: str = BASE, **prompt: Any) -> Inputs:
    task = {"source": "jsonl:rows.jsonl", "metric": "exact_match", "template": prompt.pop("template", "Old: {input}")}
    config = PipelineConfig.model_validate(
        {"suite": "mine", "base": "path:/nowhere", "held_in": {"task": task}, "train": {"steps": 1},
         "merge": {"candidates": [{"method": "mean"}]},
         "prompt": {"wrapper": "<{prompt}>", "max_input_tokens": 7} | prompt}
    )  # fmt: skip
    rows = (Row("1", "x", ("y",)),)
    data = TaskData("task", TaskConfig(**task), dict.fromkeys(SPLITS, rows), dict.fromkeys(SPLITS, fingerprint(rows)))
    prepared = PreparedBase(Path("/nowhere"), "tiny", base, "none")
    store = Store("bucket", "http://127.0.0.1:9", "suite")
    return Inputs(config, store, prepared, "x", {"task": data}, {"task": 4}, Candidates(()), "run")


def test_a_champion_has_the_scores_that_it_got_as_a_challenger() -> None:
    """Its key is the same as long as nothing changes for it, whatever changes for others."""
    made = Manifest("1" * 64, "expert", 1, {"prompt": OLD}, {"adapter": FileRef("adapter", "2" * 64, 1)}, {})
    champion = Opponent(3, made, BASE, {"task": made})
    then = evaluation_job(inputs(), "expert", "gate", "task", made, made)
    assert then.base_sha256 == BASE
    for today in (inputs(), inputs(template="New: {input}", wrapper="[{prompt}]", max_input_tokens=5)):
        job = opponent_job(today, "expert_champion", "task", champion)
        assert (job.recipe.key, job.split, job.adapter) == (then.recipe.key, "gate", made.files["adapter"])
        assert job.base_sha256 == BASE
    moved = opponent_job(inputs("c" * 64), "expert_champion", "task", champion)
    assert (moved.recipe.key, moved.base_sha256) == (then.recipe.key, BASE)


def test_without_a_champion_the_base_is_asked_as_today() -> None:
    given = inputs(template="New: {input}")
    job = opponent_job(given, "base", "task", Opponent())
    assert str(Opponent()) == "base"
    assert (job.adapter, job.base_sha256) == (None, given.base.sha256)
    assert job.recipe.key == evaluation_job(given, "base", "gate", "task", None, None).recipe.key
