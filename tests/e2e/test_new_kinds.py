"""A measurement and merge methods that the project does not have go through a whole run, told by this file alone.

One method reads the measurement; the other runs a model, as a job of its own where evaluations run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from infra.artifacts.snapshot import Snapshot
from infra.errors import MergeError
from infra.store.s3 import Store
from merge.files.merged import AdapterDelta
from merge.methods.catalogue import METHODS, AtHand, Method
from merge.methods.lowering import Root
from merge.methods.parameters import Number, Params
from merge.methods.specs import Candidate, check_without_model
from merge.methods.statistic_table import STATISTICS, Lifted, Statistic
from pipeline.config.model import PipelineConfig
from pipeline.flow.recipes import prompt_spec
from pipeline.flow.rehearse import forecast
from pipeline.plan.preflight import Prepared, prepare_inputs, upload_inputs
from pipeline.records.outcome import Inputs, Outcome
from pipeline.running.driver import start_run
from tests.e2e.made import made_here
from workers.adapters.reader import AdapterReader
from workers.adapters.support import SparseTensor
from workers.base.load import load_model, load_tokenizer
from workers.jobs.measurement import TrainingRows, row_losses
from workers.measuring.catalogue import MEASUREMENTS
from workers.measuring.file import MeasuredOn, MeasurementFile, MeasurementWriter
from workers.measuring.measurement import Measurement, Needed, Subject
from workers.tensors.source import ByteSource, FileSource
from workers.training.in_place import apply_delta

# -- a measurement: how hard a task is, one number for each weight ----------------------------------------------


@torch.no_grad()
def measure_hardness(subject: Subject, file: Path, about: MeasuredOn) -> None:
    loss = torch.stack([loss() for loss in subject.losses]).mean().view(1)
    writer = MeasurementWriter(file, "hardness", about, subject.adapter.names)
    for name in subject.adapter.names:
        writer.add([name], loss * subject.adapter.load(name).values.norm())
    writer.close()


class HardnessReader:
    def __init__(self, source: ByteSource) -> None:
        self._file = MeasurementFile(source, "hardness", torch.float32)
        self.names, self.meta = self._file.names, self._file.meta

    def load(self, name: str) -> Tensor:
        return self._file.values(name)

    def misfit(self, name: str, shape: Sequence[int], count: int) -> str | None:
        return None if name in self._file else f"it has nothing for {name}"


def needed(shapes: Mapping[str, tuple[int, int]], trainable: int) -> Needed:
    return Needed(0, 4 * len(shapes))


HARDNESS = Measurement("hardness", "Hardness", 1, measure_hardness, HardnessReader, needed)

# -- a method that reads it: Σ hardness · δ ---------------------------------------------------------------------


def _hard_mass(x: Lifted) -> Tensor:
    assert x.measured is not None
    return x.delta * x.measured


HARD_MASS = Statistic("hard_mass", "sum", "mass", _hard_mass, measurement="hardness")


def _scaled(root: Root, params: Params) -> Tensor:
    return root["hard_mass"] * float(params["lambda"])


BY_HARDNESS = Method("of this test", ("hard_mass",), _scaled, {"lambda": Number(0.1, 0, 10)})

# -- a method that runs a model: one step of gradient descent on the rows of all tasks, from the mean ------------


def _descend(at_hand: AtHand, params: Params) -> Iterator[tuple[str, SparseTensor]]:
    names, weights = at_hand.reference.names, dict(at_hand.model.named_parameters())
    for name in names:
        weights[name].requires_grad_(True)
    losses = [loss() for task in at_hand.losses for loss in task]
    gradients = torch.autograd.grad(torch.stack(losses).sum() / len(losses), [weights[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        values = dense(at_hand.reference, name) - float(params["rate"]) * gradient.reshape(-1)
        yield name, SparseTensor(tuple(gradient.shape), torch.arange(values.numel()), values)


DESCENT = Method(
    "of this test", params={"rate": Number(0.0005, 0, 1)}, reference=lambda params: ("mean", {}), by_model=_descend
)


def dense(reader: AdapterReader | AdapterDelta, name: str) -> Tensor:
    tensor = reader.load(name)
    return torch.zeros(tensor.numel).index_copy_(0, tensor.indices, tensor.values.float())


@pytest.fixture
def new_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEASUREMENTS, HARDNESS.name, HARDNESS)
    monkeypatch.setitem(STATISTICS, HARD_MASS.name, HARD_MASS)
    monkeypatch.setitem(METHODS, "by_hardness", BY_HARDNESS)
    monkeypatch.setitem(METHODS, "descent", DESCENT)


@dataclass(frozen=True)
class Ran:
    prepared: Prepared
    inputs: Inputs
    outcome: Outcome
    made: Mapping[str, int]
    scratch: Path

    def adapter(self, file: Any, name: str) -> AdapterReader:
        return AdapterReader(FileSource(self.inputs.store.download_file(file, self.scratch / name)))


@pytest.fixture
def ran(
    new_kinds: None, store: Store, tiny_config: Callable[..., dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Ran:  # fmt: skip
    """A run with the three, in this process."""
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    descent = {"method": "descent", "params": {"rate": [0.0005, 0.001]}}
    candidates = [{"method": "mean"}, {"method": "by_hardness"}, descent]
    given = tiny_config("new-kinds", held_in=2, merge={"fan_in": 2, "candidates": candidates, "importance_rows": 8})
    config = PipelineConfig.model_validate(given)
    console = Console(quiet=True)
    prepared = prepare_inputs(config, store, console)
    inputs = prepared.inputs(start_run(prepared))
    before = forecast(inputs, Snapshot(store), {}).counts
    assert (before["importances"].make, before["importances"].at_most) == (2, False)
    assert before["merges"].make == 4
    upload_inputs(prepared)
    engine, outcome = made_here(inputs)
    return Ran(prepared, inputs, outcome, dict(engine.tally.made), tmp_path)


def test_a_measurement_and_the_methods_that_read_it_or_run_a_model_are_told_in_one_place(ran: Ran) -> None:
    store, outcome = ran.inputs.store, ran.outcome
    assert ran.made["importances"] == 2
    assert ran.made["merges"] == 4
    found = {str(candidate): ran.adapter(m.files["adapter"], str(candidate)) for candidate, m in outcome.merged.items()}
    assert set(found) == {"mean", "by_hardness(lambda=0.1)", "descent(rate=0.0005)", "descent(rate=0.001)"}
    assert outcome.chosen in outcome.merged
    # what the measurement is: by hand, from the experts
    base = ran.prepared.base.path
    tokenizer = load_tokenizer(base)
    experts, hardness = {}, {}
    for task, manifest in outcome.experts.items():
        reader = experts[task] = ran.adapter(manifest.files["adapter"], task)
        model = load_model(base, torch.float32)
        apply_delta(model, reader)
        with torch.no_grad():
            losses = [loss() for loss in row_losses(store, model, tokenizer, rows_of(ran, task))]
        hardness[task] = {n: torch.stack(losses).mean() * reader.load(n).values.norm() for n in reader.names}
    merged = found["by_hardness(lambda=0.1)"]
    for name in merged.names:
        expected = sum(hardness[task][name] * dense(reader, name) for task, reader in experts.items())
        torch.testing.assert_close(dense(merged, name), 0.1 * expected)
    # a step of descent lowers what it descends on, the larger one by more
    losses_of = {each: mean_loss(ran, found[each]) for each in ("mean", "descent(rate=0.0005)", "descent(rate=0.001)")}
    assert losses_of["descent(rate=0.001)"] < losses_of["descent(rate=0.0005)"] < losses_of["mean"]
    # and a plan of the same finds everything
    after = forecast(ran.inputs, Snapshot(store), {}).counts
    assert {kind: after[kind].make for kind in ("experts", "importances", "merge_nodes", "merges", "evaluations")} == {
        "experts": 0, "importances": 0, "merge_nodes": 0, "merges": 0, "evaluations": 0,
    }  # fmt: skip
    with pytest.raises(MergeError, match="runs a model on rows of the experts' tasks"):
        check_without_model(Candidate("descent"))


def rows_of(ran: Ran, task: str) -> TrainingRows:
    data = ran.inputs.tasks[task]
    config = ran.inputs.config
    return TrainingRows(data.object_name("train"), 8, prompt_spec(config, data), config.prompt.max_target_tokens, None)


def mean_loss(ran: Ran, adapter: AdapterReader) -> float:
    model = load_model(ran.prepared.base.path, torch.float32)
    apply_delta(model, adapter)
    tokenizer = load_tokenizer(ran.prepared.base.path)
    losses = [row_losses(ran.inputs.store, model, tokenizer, rows_of(ran, each)) for each in ran.inputs.config.held_in]
    with torch.no_grad():
        return float(torch.stack([loss() for task in losses for loss in task]).mean())
