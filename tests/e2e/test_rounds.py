"""Experts in two rounds, with a merge between them, through whole runs in this process."""

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

from infra.artifacts.manifests import Manifest, peek
from infra.artifacts.snapshot import Snapshot
from infra.engine.step import Place
from infra.store.layout import manifest_name
from infra.store.s3 import Store
from merge.methods.specs import Candidate
from pipeline.config.model import PipelineConfig
from pipeline.config.rounds import RoundsConfig
from pipeline.flow.rehearse import Forecast, forecast
from pipeline.flow.steps import expert_step
from pipeline.plan.preflight import Prepared, prepare_inputs, upload_inputs
from pipeline.plan.reasons import find_reasons
from pipeline.records.outcome import Inputs, Outcome
from pipeline.running.driver import start_run
from tests.e2e.conftest import write_task
from tests.e2e.here import Pipeline
from tests.e2e.made import made_here
from workers.adapters.reader import AdapterReader
from workers.adapters.support import SparseTensor
from workers.tensors.source import FileSource

CONFIG = Callable[..., dict[str, Any]]
MASK = {"granularity": "element", "density": 0.2, "modules": r".*\.(v_proj|o_proj|up_proj)"}
SCORED = MASK | {"criterion": "connection_sensitivity"}
MERGE = {"fan_in": 2, "candidates": [{"method": "consensus"}, {"method": "task_arithmetic", "params": {"lambda": 0.5}}]}
ROUNDS = {"count": 2, "merge": {"method": "spectral_power", "params": {"p": 0.5, "lambda": 0.9}}}
EXACT = {"steps": 8, "batch_size": 8, "learning_rate": 0.02, "compute_dtype": "float32", "value_dtype": "float32"}
TASKS = ("in0", "in1", "in2")


@dataclass(frozen=True)
class World:
    prepared: Prepared
    inputs: Inputs
    folder: Path

    def forecast(self) -> Forecast:
        return forecast(self.inputs, Snapshot(self.inputs.store), {})

    def makes(self) -> dict[str, int]:
        return {kind: count.make for kind, count in self.forecast().counts.items() if count.make}

    def run(self) -> tuple[dict[str, int], Outcome]:
        engine, outcome = made_here(self.inputs)
        return {kind: made for kind, made in engine.tally.made.items() if made}, outcome

    def delta(self, manifest: Manifest, label: str) -> dict[str, SparseTensor]:
        file = self.inputs.store.download_file(manifest.files[label], self.folder / f"{manifest.key}.{label}")
        reader = AdapterReader(FileSource(file))
        return {name: reader.load(name) for name in reader.names}

    def experts_of(self, merge: Manifest) -> dict[str, Manifest]:
        found = [peek(self.inputs.store, key) for key in merge.inputs]
        return {each.meta["task"]: each for each in found if each is not None and each.kind == "expert"}


@pytest.fixture
def world(store: Store, tiny_config: CONFIG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))

    def make(suite: str, rows_of: str = "", **sections: Any) -> World:
        """`rows_of`: a task that has other rows."""
        common = {"merge": MERGE, "registers": False, "rounds": ROUNDS, "mask": MASK}
        given = tiny_config(suite, held_in=3, **(common | sections))
        if rows_of:
            write_task(Path(given["held_in"][rows_of]["source"].removeprefix("jsonl:")), f"{suite} otherwise")
        prepared = prepare_inputs(PipelineConfig.model_validate(given), store, Console(quiet=True))
        inputs = prepared.inputs(start_run(prepared))
        upload_inputs(prepared)
        return World(prepared, inputs, tmp_path)

    return make


def dense(delta: dict[str, SparseTensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(each.numel).index_add(0, each.indices, each.values.float()) for name, each in delta.items()
    }


def check_sums(world: World, outcome: Outcome) -> Manifest:
    """Experts and merges of the second round are what they started from and what they changed; returns the start."""
    made = [*outcome.experts.values(), *(each for each in outcome.merged.values() if each.kind == "merged")]
    (start,) = {manifest.meta["start"] for manifest in made}
    begun = peek(world.inputs.store, start)
    assert begun is not None
    before = dense(world.delta(begun, "adapter"))
    for manifest in outcome.experts.values():
        assert manifest.inputs[begun.key] == begun.digest
        change, whole = (dense(world.delta(manifest, label)) for label in ("change", "adapter"))
        for name in before:
            assert change[name].any()
            rounding = 2**-7 * (before[name].abs() + change[name].abs())  # both are stored, perhaps in bfloat16
            assert (whole[name] - before[name] - change[name]).abs().le(rounding).all()
    merged = outcome.merged[Candidate("task_arithmetic", {"lambda": 0.5})]
    assert set(merged.inputs) >= {begun.key, *(expert.key for expert in outcome.experts.values())}
    changes = [dense(world.delta(expert, "change")) for expert in outcome.experts.values()]
    for name, found in dense(world.delta(merged, "adapter")).items():
        wanted = before[name] + 0.5 * sum(change[name] for change in changes)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    return begun


def test_experts_of_the_second_round_start_from_the_merge_of_the_first(world: Callable[..., World]) -> None:
    two = world("rounds", mask=SCORED, refine={"steps": [2], "learning_rate": 0.02})
    planned = two.makes()
    assert planned["experts"] == 6
    assert planned["merges"] == 1 + 3 + 2, "between the rounds; of changes, consensus' reference included; added up"
    made, outcome = two.run()
    assert made == planned
    assert {expert.meta["steps"] for expert in outcome.experts.values()} == {4}
    start = check_sums(two, outcome)
    experts = [*two.experts_of(start).values(), *outcome.experts.values()]
    size = sum(file.size for expert in experts for file in expert.files.values())
    assert size == pytest.approx(two.prepared.cost.kind_bytes["experts"], rel=0.3)
    (refined,) = (manifest for manifest in outcome.merged.values() if manifest.kind == "refined")
    assert two.delta(refined, "adapter").keys() == two.delta(start, "adapter").keys()
    # a second run makes nothing, and a plan says so
    assert two.makes() == {}
    assert two.run()[0] == {}
    # experts of the first round are those of a run of one round with as many steps
    config = two.inputs.config
    short = {"rounds": RoundsConfig(), "train": config.train.model_copy(update={"steps": 4})}
    one = World(two.prepared, replace(two.inputs, config=config.model_copy(update=short)), two.folder)
    assert one.forecast().counts["experts"].reuse == 3


def test_a_task_that_changes_remakes_every_expert_of_the_second_round(world: Callable[..., World]) -> None:
    """Of the first round its own alone; and a plan says why."""
    before = world("changed")
    before.run()
    after = world("changed", rows_of="in1")
    found = after.forecast()
    assert (found.counts["experts"].make, found.counts["experts"].reuse) == (1 + 3, 2)
    assert (found.rounds, found.stale) == ((("in1",), TASKS), TASKS)
    reasons = find_reasons(found, Snapshot(after.inputs.store), [])
    other = ("the merge of round 1, which it starts from, is another",)
    assert {task: reasons[task].why for task in ("in0", "in2")} == {"in0": other, "in2": other}
    assert [why.partition(":")[0] for why in reasons["in1"].why] == ["data", "data"]
    made, _ = after.run()
    assert made["experts"] == 4
    assert after.makes() == {}


@pytest.mark.parametrize(
    "sections",
    [
        {"mask": SCORED, "rounds": ROUNDS | {"support": "kept"}},
        {"mask": SCORED | {"shared": True}, "rounds": ROUNDS | {"support": "kept"}},
        {"expert": "lora", "train": EXACT},
        {"expert": "full", "rounds": {"count": 2, "merge": {"method": "mean"}}},
    ],
    ids=["kept", "shared", "lora", "full"],
)
def test_every_kind_of_expert_can_be_trained_in_rounds(
    world: Callable[..., World], sections: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    two = world(f"rounds-{request.node.callspec.id}", **sections)
    made, outcome = two.run()
    assert made["experts"] == 6
    start = check_sums(two, outcome)
    assert two.makes() == {}
    if sections.get("rounds", {}).get("support") == "kept":
        first = two.experts_of(start)
        for task, expert in outcome.experts.items():
            before, after = two.delta(first[task], "adapter"), two.delta(expert, "change")
            assert all(torch.equal(before[name].indices, after[name].indices) for name in before)


def test_an_interrupted_expert_of_a_later_round_goes_on_to_the_same_bytes(world: Callable[..., World]) -> None:
    two = world("resumed", mask=SCORED | {"reselect_every": 2}, train=EXACT | {"checkpoint_every": 1})
    _, outcome = two.run()
    before, store = outcome.experts["in0"], two.inputs.store
    store.delete(manifest_name(before.key))
    start = peek(store, before.meta["start"])
    step = expert_step(two.inputs, "in0", None, 2, start)
    assert step.keys == (before.key,)

    def stop(subject: str, report: Any) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step.call(store, Place(report=stop))
    ((again, made),) = step.call(store, Place())
    assert made
    assert again.meta["resumed_after"] == 2
    assert again.digest == before.digest


def test_a_run_registers_and_reports_what_came_of_several_rounds(
    pipeline: Pipeline, tiny_config: CONFIG, tmp_path: Path
) -> None:
    """By the main job: results, report, the registered version and what it says of itself"""
    rounds = {"count": 2, "merge": {"method": "mean"}}
    found = pipeline(tiny_config("two-rounds", held_in=2, merge=MERGE, mask=MASK, rounds=rounds))
    assert found.code == 0, found.output
    results = found.results
    assert results is not None
    assert results["rounds"] == {"count": 2, "support": "fresh", "method": "mean", "params": {}}
    assert results["made"]["experts"] == 4
    line = "experts in 2 rounds, each from the merge of the one before by mean; positions of later rounds: fresh"
    assert line in (tmp_path / "report" / "report.md").read_text()
    assert line in found.output
    version = MlflowClient().get_model_version("two-rounds.merged", "1")
    assert json.loads(version.tags["factory.lineage.parameters"])["rounds"] == results["rounds"]
    assert "in0/1" in version.tags["factory.lineage.experts"]
    assert "2 rounds" in version.description
    for name, task in (("two-rounds.merged", "in0"), ("two-rounds.in0", "in0")):
        answers = mlflow.pyfunc.load_model(f"models:/{name}/1").predict([{"input": "the cat", "task": task}])
        assert len(answers) == 1
