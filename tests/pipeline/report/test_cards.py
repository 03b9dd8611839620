"""Model cards: what they say, that they fit MLflow's limit whatever the names and numbers, and that they render."""

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from infra.artifacts.manifests import Manifest
from infra.store.s3 import FileRef, Store
from merge.methods.specs import Candidate
from pipeline.config.candidates import Candidates
from pipeline.config.model import PipelineConfig
from pipeline.config.search import Standing
from pipeline.data.tasks import TaskConfig, TaskData
from pipeline.records.outcome import Inputs, Outcome
from pipeline.records.refined import Refined
from pipeline.records.score import Score
from pipeline.report.cards import checkpoint_card, expert_card, merge_card
from workers.base.prepare import PreparedBase
from workers.text.rows import Row, fingerprint

BASE = PreparedBase(Path("/nowhere"), "tiny", "b" * 64, "mit")
TIES = Candidate("ties", {"lambda": 0.5})
ENVIRONMENT = {"python": "3.11.4", "torch": "2.13.0", "git_commit": "c" * 40, "source_sha256": "5" * 64}


def data(name: str, source: str, licence: str, template: str = "Say:\n{input} `x` | {input}") -> TaskData:
    splits = {split: (Row(split, f"{split} {name}", ("yes",)),) for split in ("train", "validation", "gate", "test")}
    config = TaskConfig(source=source, metric="rouge_l", template=template)
    return TaskData(name, config, splits, {split: fingerprint(rows) for split, rows in splits.items()}, licence)


def manifest(kind: str, letter: str, inputs: dict[str, str] | None = None, **meta: Any) -> Manifest:
    key = letter * 64
    file = FileRef(f"objects/{key}/1/adapter", "0" * 64, 2_000_000)
    return Manifest(key, kind, 1, {"dtype": "bfloat16"}, {"adapter": file}, inputs or {}, meta)


def expert_manifest(letter: str, **changes: Any) -> Manifest:
    meta = {
        "trainable": 1234, "adapter_bytes": 2_000_000, "steps": 8, "best_step": 4, "validation_loss": 0.5,
        "train_seconds": 3.2, "device": "cpu", "run_id": "run7", "environment": ENVIRONMENT,
    }  # fmt: skip
    return manifest("expert", letter, {"9" * 64: "8" * 64}, **(meta | changes))


def make(count: int = 2, name: str = "task{:04d}", licenses: tuple[str, ...] = ("mit",)) -> tuple[Inputs, Outcome]:
    """Inputs and outcome with so many held-in tasks and one held-out task; the merge loses most on the last task."""
    names = [name.format(at) for at in range(count)]
    sources = {each: "bigbench:some_task" if at == 0 else "jsonl:s3://b/rows.jsonl" for at, each in enumerate(names)}
    tasks = {each: data(each, sources[each], licenses[at % len(licenses)]) for at, each in enumerate(names)}
    tasks["out"] = data("out", "jsonl:out.jsonl", "not stated")
    config = PipelineConfig.model_validate(
        {
            "suite": "mine",
            "prompt": {"wrapper": "{prompt}"},
            "base": "path:/nowhere",
            "held_in": {each: tasks[each].config for each in names},
            "held_out": {"out": tasks["out"].config},
            "train": {"steps": 8},
            "merge": {"candidates": [{"method": "ties", "params": {"lambda": 0.5}}]},
        }
    )
    outcome = Outcome(
        experts={each: expert_manifest("1") for each in names},
        merged={TIES: manifest("merged", "4", density=0.1, rounding_loss_bfloat16=0.25, environment=ENVIRONMENT)},
        chosen=TIES,
        standings={TIES: Standing(1, 2, 2, 0.5)},
        checkpoint=manifest("checkpoint", "5"),
    )
    for at, each in enumerate([*names, "out"]):
        values = {"base": 0.1, "expert": 0.8, "merged": 0.7 - 0.5 * at / count}
        for model, value in values.items():
            if not (each == "out" and model == "expert"):
                outcome.scores[model, "test", each] = Score("rouge_l", value, 2, value, (value,))
    store = Store("bucket", "http://127.0.0.1:9", "suite")
    caps = dict.fromkeys(tasks, 7)
    return Inputs(config, store, BASE, "bases/b/model.safetensors", tasks, caps, Candidates((TIES,)), "run1"), outcome


def rendered(card: str) -> str:
    return str(MarkdownIt("commonmark").enable("table").render(card))


def test_an_experts_card_says_what_it_is() -> None:
    inputs, outcome = make()
    card = expert_card(inputs, outcome, "task0000")
    assert card.startswith("Sparse expert for task0000 on tiny.\n\n")
    for said in (
        "merged 0.700 [0.700, 0.700], expert 0.800 [0.800, 0.800], base 0.100",
        "`bigbench:some_task`, licence mit; rows: train 1 (`",
        "tiny, licence mit, identity `" + "b" * 64,
        "1,234 trained values, 2.0 MB",
        "8 steps of 16 rows, best after 4, validation loss 0.5000, 3 s on cpu; seed 0",
        "answers of 7",
        "`" + "1" * 64 + "`, digest `" + outcome.experts["task0000"].digest,
        "manifest `s3://bucket/suite/artifacts/" + "1" * 64 + ".json`, run `run7`; made from `" + "9" * 64,
        "commit `" + "c" * 40 + "`, python 3.11.4, torch 2.13.0",
        'mlflow.pyfunc.load_model("models:/mine.task0000/<version>")',
        "BIG-bench",
    ):
        assert said in card
    assert "BIG-bench" not in expert_card(inputs, outcome, "task0001")
    page = rendered(card)
    assert page.count("<li>") == 8
    assert "<code>Say:\\n{input} 'x' | {input}</code>" in page  # one span, on one line


def test_a_card_before_scores_and_of_an_older_manifest() -> None:
    inputs, outcome = make()
    outcome.scores.clear()
    outcome.experts["task0000"] = expert_manifest("1", environment={"torch": "2.0"})
    card = expert_card(inputs, outcome, "task0000")
    assert "Scores" not in card
    assert "**Made by**: torch 2.0" in card
    outcome.experts["task0000"] = expert_manifest("1", environment={})
    assert "**Made by**: not recorded" in expert_card(inputs, outcome, "task0000")


def test_a_merges_card_lists_its_tasks_and_licences() -> None:
    inputs, outcome = make(3, licenses=("mit", "Apache-2.0", "mit"))
    card = merge_card(inputs, outcome)
    assert card.startswith(
        "Merge of 3 sparse experts on tiny by ties (lambda 0.5, density 1.0, density_of support).\n\n"
    )
    for said in (
        "held-in mean: merged 0.533",
        "held-out mean: merged 0.200 [0.200, 0.200], base 0.100",
        "licences: mit (`task0000`, `task0002`), Apache-2.0 (`task0001`)",
        "merged density 0.1; rounding to bfloat16 loses 25% of it",
        "merged `" + "4" * 64,
        'model.predict([{"input": "a text", "task": "task0000"}])',
    ):
        assert said in card
    page = rendered(card)
    assert page.count("<tr>") == 5  # head, three held-in tasks, one held-out task
    assert "<td><code>out</code> (held out)</td>" in page
    whole = checkpoint_card(inputs, outcome)
    assert whole.startswith("Full checkpoint, every floating-point tensor in bfloat16. Merge of 3 sparse experts")
    assert "models:/mine.merged-checkpoint/<version>" in whole


def test_a_refined_merges_card_says_what_it_was_trained_on() -> None:
    inputs, outcome = make()
    refined, told = Refined(TIES, 10), {"steps": 10, "rows": 20, "share": 0.0625, "start": "4" * 64}
    meta = outcome.merged[TIES].meta | {"refined": told, "first_loss": 2.0, "last_loss": 1.5}
    outcome.merged[refined] = manifest("refined", "6", {"4" * 64: "1" * 64}, **meta)
    outcome.standings[refined] = Standing(1, 3, 2, 0.75)
    outcome.chosen = refined
    card = merge_card(inputs, outcome)
    assert "by ties (lambda 0.5, density 1.0, density_of support) + 10 steps." in card
    assert "mean validation score 0.750, the best of 2 candidates" in card
    assert (
        "10 steps after merging, on 20 training rows of all tasks mixed evenly (6% of the experts'); training loss "
        "2.000 to 1.500, started from `" + "4" * 64
    ) in card
    assert "Refined" not in merge_card(*make())


@pytest.mark.parametrize(
    "name", ["task{:04d}", "`na|me` " + "n" * 230 + "{:04d}", "日本語 " * 60 + "{:04d}"], ids=["plain", "long", "wide"]
)
@pytest.mark.parametrize("room", [4900, 2800])
def test_cards_of_very_many_tasks_fit(name: str, room: int) -> None:
    inputs, outcome = make(400, name, tuple(f"licence {at} {'x' * 99}" for at in range(30)))
    card = merge_card(inputs, outcome, room)
    assert len(card) <= room
    assert "and 25 more licences" in card
    assert "**Made by**: commit" in card  # what is shortened is the table
    if name == "task{:04d}":
        page = rendered(card)
        assert "<code>task0399</code>" in page  # the one that loses most
        assert "<code>task0000</code></td>" not in page
        shown = page.count("<tr>") - 1
        assert f"<p>{401 - shown} more tasks: see the run's report." in page
    last = list(inputs.config.held_in)[-1]
    assert len(expert_card(inputs, outcome, last)) <= 4900
