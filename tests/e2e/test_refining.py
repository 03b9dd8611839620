"""Merges that are trained on after the search, through whole runs in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console

from infra.artifacts.snapshot import Snapshot
from infra.engine.keyed import KeyedEngine
from infra.store.s3 import Store
from pipeline.config.model import PipelineConfig
from pipeline.config.refine import YardsticksConfig
from pipeline.flow.rehearse import Count, forecast
from pipeline.flow.steps import pooled_tasks
from pipeline.plan.preflight import Prepared, prepare_inputs, upload_inputs
from pipeline.records.outcome import Inputs, Outcome
from pipeline.records.refined import Refined
from pipeline.report.results import build_results
from pipeline.report.summary import summary_lines
from pipeline.running.driver import start_run
from tests.e2e.here import Pipeline
from tests.e2e.made import made_here
from workers.adapters.reader import AdapterReader
from workers.base.load import load_model, load_tokenizer
from workers.tensors.source import FileSource
from workers.text.prompt import encode_examples
from workers.text.rows import load_rows
from workers.training.in_place import apply_delta
from workers.training.objectives import language_modelling, mean_loss

CONFIG = Callable[..., dict[str, Any]]
REFINE = {"merges": 2, "steps": [3, 6], "rows_per_task": 2, "learning_rate": 0.02}
YARDSTICKS = {"multitask": {"steps": 6, "rows_per_task": 2, "learning_rate": 0.02}, "routed": {"rows": 16},
              "few_shot_merge": True}  # fmt: skip
MERGE = {"fan_in": 2, "candidates": [{"method": "mean"}, {"method": "task_arithmetic", "params": {"lambda": [0.3, 1]}}]}


@dataclass(frozen=True)
class World:
    prepared: Prepared
    inputs: Inputs
    folder: Path

    def forecast(self) -> dict[str, Count]:
        return dict(forecast(self.inputs, Snapshot(self.inputs.store), {}).counts)

    def run(self) -> tuple[KeyedEngine, Outcome]:
        engine, outcome = made_here(self.inputs)
        outcome.seconds |= {"experts": 0.0, "merge": 0.0, "evaluate": 0.0, "total": 0.0}
        return engine, outcome

    def adapter(self, file: Any, name: str) -> AdapterReader:
        return AdapterReader(FileSource(self.inputs.store.download_file(file, self.folder / name)))

    def loss(self, adapter: AdapterReader | None) -> float:
        """Mean over the training rows of all tasks, at the base with the adapter in it."""
        base, config = self.prepared.base.path, self.inputs.config
        model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
        if adapter is not None:
            apply_delta(model, adapter)
        examples = []
        for task in pooled_tasks(self.inputs):
            rows = load_rows(self.inputs.store, task.rows)
            examples += encode_examples(tokenizer, task.prompt, rows, config.prompt.max_target_tokens)
        with torch.no_grad():
            return mean_loss(model, language_modelling(model, int(tokenizer.pad_token_id)), examples, 16)


@pytest.fixture
def world(store: Store, tiny_config: CONFIG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    given = tiny_config("refining", held_in=2, merge=MERGE, refine=REFINE, yardsticks=YARDSTICKS, registers=False)
    prepared = prepare_inputs(PipelineConfig.model_validate(given), store, Console(quiet=True))
    inputs = prepared.inputs(start_run(prepared))
    upload_inputs(prepared)
    return World(prepared, inputs, tmp_path)


def test_the_best_merges_are_trained_on_and_stand_beside_the_others(world: World) -> None:
    planned = world.forecast()
    assert [planned[kind] for kind in ("refined", "yardsticks", "routers")] == [Count(4), Count(1), Count(1)]
    engine, outcome = world.run()
    made = engine.tally.made
    assert {kind: made[kind] for kind, count in planned.items() if count.make} == {
        kind: count.make for kind, count in planned.items() if count.make
    }
    refined = [each for each in outcome.standings if isinstance(each, Refined)]
    ranked = sorted(
        (each for each in outcome.standings if not isinstance(each, Refined)),
        key=lambda each: -outcome.standings[each].mean,
    )
    assert refined == [Refined(start, steps) for start in ranked[:2] for steps in (3, 6)]
    best = max(outcome.standings.values(), key=lambda standing: standing.mean)
    assert outcome.chosen is not None
    assert outcome.standings[outcome.chosen].mean == best.mean
    for each in refined:
        manifest, start = outcome.merged[each], outcome.merged[each.start]
        told = manifest.meta["refined"]
        assert told == {"steps": each.steps, "rows": 4 * each.steps, "share": 4 * each.steps / 128, "start": start.key}
        assert manifest.inputs == {m.key: m.digest for m in (start, *outcome.experts.values())}
        before, after = (world.adapter(m.files["adapter"], m.key) for m in (start, manifest))
        assert after.names == before.names
        assert world.loss(after) < world.loss(before) < world.loss(None)
    check_results(world.inputs, outcome, refined)
    # a second run makes nothing, and a plan says so
    after_all = world.forecast()
    assert {kind: count.make for kind, count in after_all.items() if count.make} == {}
    assert after_all["refined"] == Count(0, 4)
    again, second = world.run()
    assert +again.tally.made == {}
    assert (second.chosen, second.standings) == (outcome.chosen, outcome.standings)
    # without the section nothing is said of it, and everything else has the key that it had
    without = {"refine": None, "yardsticks": YardsticksConfig()}
    inputs = replace(world.inputs, config=world.inputs.config.model_copy(update=without))
    plain = World(world.prepared, inputs, world.folder)
    left_out = ("refined", "yardsticks", "routers", "evaluations")
    assert {kind: count for kind, count in plain.forecast().items() if kind != "evaluations"} == {
        kind: count for kind, count in after_all.items() if kind not in left_out
    }
    engine, outcome = plain.run()
    assert engine.tally.made["experts"] == engine.tally.made["merge_nodes"] == 0
    assert not any(isinstance(each, Refined) for each in outcome.standings)
    told = build_results(inputs, outcome).to_json()
    assert "refine" not in told
    assert "multitask" not in told
    assert "route" not in told
    assert "merged_few_shot" not in told


def test_experts_teach_and_the_base_is_kept_on_rows_that_are_named(
    store: Store, tiny_config: CONFIG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run: planned, made once for both merges, found again; without the fields all keys are as they were."""
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    given = tiny_config("taught", held_in=2, merge=MERGE, registers=False)
    kept = tiny_config("taught", held_in=3)["held_in"]["in2"]
    refine = REFINE | {"merges": 1, "teacher": "experts", "top_k": 8,
                       "keep": {"tasks": {"kept": kept}, "weight": 4, "rows_per_step": 4}}  # fmt: skip
    console = Console(record=True, width=400)
    prepared = prepare_inputs(PipelineConfig.model_validate(given | {"refine": refine}), store, console)
    assert "each by 3, 6 steps of 8 training rows" in console.export_text()
    inputs = prepared.inputs(start_run(prepared))
    upload_inputs(prepared)
    world = World(prepared, inputs, tmp_path)
    planned = world.forecast()
    assert (planned["teachers"], planned["refined"]) == (Count(3), Count(2))
    engine, outcome = world.run()
    assert {kind: engine.tally.made[kind] for kind, count in planned.items()} == {
        kind: count.make for kind, count in planned.items()
    }
    refined = [each for each in outcome.standings if isinstance(each, Refined)]
    for each in refined:
        manifest, start = outcome.merged[each], outcome.merged[each.start]
        assert manifest.meta["refined"] | {"start": ""} == {
            "steps": each.steps, "rows": 8 * each.steps, "share": 8 * each.steps / 128, "start": ""
        }  # fmt: skip
        assert manifest.inputs == {m.key: m.digest for m in (start, *outcome.experts.values())}
        before, after = (world.adapter(m.files["adapter"], m.key) for m in (start, manifest))
        assert world.loss(after) < world.loss(before)
    results = build_results(inputs, outcome)
    assert set(results.held_in) | set(results.held_out) == {"in0", "in1", "out0"}, "kept rows are not scored"
    outcome.made.teachers = 3
    assert build_results(inputs, outcome).made.teachers == 3
    # a second run makes nothing
    assert {kind: count.make for kind, count in world.forecast().items() if count.make} == {}
    again, second = world.run()
    assert +again.tally.made == {}
    assert second.standings == outcome.standings
    # what differs from a run without them is the refined merges alone
    plain = PipelineConfig.model_validate(given | {"refine": REFINE | {"merges": 1}})
    others = World(prepared, replace(inputs, config=plain), tmp_path).forecast()
    assert "teachers" not in others
    assert {kind: count.make for kind, count in others.items() if count.make} == {
        "refined": 2, "evaluations": others["evaluations"].make
    }  # fmt: skip
    assert '"teachers"' not in build_results(replace(inputs, config=plain), outcome).to_json()


def check_results(inputs: Inputs, outcome: Outcome, refined: list[Refined]) -> None:
    found = build_results(inputs, outcome)
    rows = [row for row in found.candidates if row.refined is not None]
    assert [(row.method, row.refined.steps, row.refined.rows) for row in rows if row.refined] == [
        (each.method, each.steps, 4 * each.steps) for each in refined
    ]
    assert {row.rung for row in rows} == {2}
    assert found.search.evaluations == 3 * 2
    assert isinstance(outcome.chosen, Refined) == (found.chosen.refined is not None)
    # and the same training from the base, as a yardstick
    summary, yardstick = found.summary, found.multitask
    assert yardstick is not None
    assert (yardstick.steps, yardstick.rows, yardstick.share) == (6, 24, 24 / 128)
    assert summary.held_in.multitask == pytest.approx(
        sum(row.multitask or 0.0 for row in found.held_in.values()) / len(found.held_in)
    )
    assert summary.held_out.multitask == found.held_out["out0"].multitask
    assert outcome.multitask not in outcome.merged.values()
    # and the experts behind a router, whose rows are answered by one of them
    assert summary.held_in.routed == pytest.approx(
        sum(row.routed or 0.0 for row in found.held_in.values()) / len(found.held_in)
    )
    assert summary.held_out.routed == found.held_out["out0"].routed
    assert summary.held_in.merged_few_shot is not None
    assert summary.held_out.merged_few_shot == found.held_out["out0"].merged_few_shot
    assert any(line.startswith("routed, each row by the expert") for line in summary_lines(found))


def test_a_run_registers_a_refined_merge_with_its_lineage(
    pipeline: Pipeline, tiny_config: CONFIG, tmp_path: Path
) -> None:
    """By the main job: results, report, the registered version and what it says of itself"""
    refine = {"steps": [25], "learning_rate": 0.02}
    found = pipeline(tiny_config("refined", held_in=2, merge=MERGE, refine=refine))
    assert found.code == 0, found.output
    results = found.results
    assert results is not None
    row = results["candidates"][-1]
    assert row["refined"] == {"steps": 25, "rows": 50, "share": 50 / 128}
    assert row["chosen"], "25 steps on all tasks are better than any merge of experts of eight steps"
    chosen = results["chosen"]
    assert chosen["refined"] == row["refined"]
    assert (results["made"]["refined"], results["reused"]["refined"]) == (1, 0)
    assert results["seconds"]["refine"] > 0
    name = f"{row['method']} + 25 steps"
    report = (tmp_path / "report" / "report.md").read_text()
    assert name in report
    assert "50 training rows, 39% of the experts'" in report
    table = (tmp_path / "report" / "candidates.csv").read_text().splitlines()
    assert table[0].endswith(",chosen,steps,training_rows")
    assert table[-1].endswith(",True,25,50")
    version = MlflowClient().get_model_version("refined.merged", "1")
    assert version.tags["kind"] == "merged"
    assert json.loads(version.tags["factory.lineage.parameters"])["refined"]["rows"] == 50
    assert "in0/1" in version.tags["factory.lineage.experts"]
    assert "50 training rows of all tasks" in version.description
    answers = mlflow.pyfunc.load_model("models:/refined.merged/1").predict([{"input": "the cat", "task": "in0"}])
    assert len(answers) == 1
