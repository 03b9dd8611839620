"""Refining as a job: the loop that trains experts, on top of a merge, and one adapter that holds both."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.artifacts.manifests import Manifest, Recipe, publish
from infra.engine.step import Place
from infra.errors import AdapterError, ExpertError
from infra.store.layout import base_file, rows_name
from infra.store.s3 import Store
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.files.sink import Outline
from merge.methods.specs import Candidate
from merge.modelled.refining import RefineJob, added, beside_merged, make_refined, merged_supports
from merge.tree.jobs import Ref
from tests.workers.tiny import WRAPPER, tiny_model, tiny_tokenizer
from workers.adapters.reader import AdapterReader
from workers.adapters.support import SparseTensor
from workers.base.load import load_model, load_tokenizer
from workers.base.prepare import prepare_base, upload_base
from workers.jobs.resume import find_checkpoint
from workers.jobs.shared_support import PooledTask
from workers.jobs.teacher import BATCH, TeacherJob, ask_teacher
from workers.masks.spec import MaskSpec, select_supports
from workers.tensors.checkpoint import WEIGHTS
from workers.tensors.source import FileSource
from workers.text.prompt import PromptSpec, encode_examples
from workers.text.rows import Row, fingerprint, load_rows, rows_to_jsonl
from workers.training.batches import mixed_batches
from workers.training.in_place import apply_delta
from workers.training.loop import StepReport, TrainSpec, train_expert
from workers.training.objectives import language_modelling
from workers.training.teaching import Lesson, Teaching, ask

UP, V = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"
MODULES = r".*\.(v_proj|up_proj)"
MASK = MaskSpec("random", "block", 0.25, (8, 8), MODULES, seed=7)
SPEC = TrainSpec(6, 4, 0.05, 0.0, 0.1, "linear", 1.0, None, 5, micro_batch_size=3)
PROMPTS = (PromptSpec("{input}?", WRAPPER), PromptSpec("w1 {input}", WRAPPER))
ROWS = [[Row(f"{task}{at}", "".join(f"w{at + i}" for i in range(1 + 5 * task)), (f"w{task}",)) for at in range(9)]
        for task in range(2)]  # fmt: skip
KEPT = [Row(f"k{at}", f"w{at}w{at}w{at}", ("w9w8w7",)) for at in range(9)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class World:
    """A store with a base, a merge of it and rows of two tasks."""

    def __init__(self, store: Store, folder: Path, base_sha256: str, path: Path) -> None:
        self.store, self.folder, self.base_sha256, self.path = store, folder, base_sha256, path
        self.merged = self._merge()

    def _merge(self) -> Manifest:
        """One weight is changed at every position, one in some blocks."""
        shapes = {name: tuple(parameter.shape) for name, parameter in tiny_model(False).named_parameters()}
        generator = torch.Generator().manual_seed(1)
        blocks = select_supports(tiny_model(False), replace(MASK, seed=1))[V.removesuffix(".weight")].indices()
        every = torch.arange(shapes[UP][0] * shapes[UP][1])
        file = self.folder / "merge.safetensors"
        writer = AdapterWriter(file)
        writer.open(Outline(self.base_sha256, {UP: shapes[UP], V: shapes[V]}, {}))
        for name, at in ((UP, every), (V, blocks)):
            writer.add(name, SparseTensor(shapes[name], at, torch.randn(at.numel(), generator=generator) * 0.05))
        writer.close()
        return publish(self.store, Recipe("merged", 1, {}), {"adapter": file}, {}, {"licenses": {"data": ["mit"]}})[0]

    def job(self, **changes: Any) -> RefineJob:
        given = {
            "name": "mean + 6 steps", "recipe": Recipe("refined", 1, {"n": str(sorted(map(str, changes.items())))}),
            "base_sha256": self.base_sha256, "base_weights": base_file(self.base_sha256, WEIGHTS),
            "candidate": Candidate("mean"), "start": Ref.of(self.merged),
            "inputs": {self.merged.key: self.merged.digest},
            "tasks": tuple(PooledTask(rows_name(fingerprint(rows)), prompt)
                           for rows, prompt in zip(ROWS, PROMPTS, strict=True)),
            "max_target_tokens": 8, "rows_per_task": 2, "support": "fresh", "mask": MASK, "train": SPEC,
            "compute_dtype": "float32", "recompute": False, "save_every": 2, "deterministic": False,
            "about": {"steps": 6, "rows": 24, "share": 0.1, "start": "m"}, "experts": ("a", "b"),
        }  # fmt: skip
        return RefineJob(**{**given, **changes})

    def teacher(self, task: PooledTask, expert: Manifest | None) -> TeacherJob:
        inputs = {expert.key: expert.digest} if expert else {}
        return TeacherJob(
            "t", Recipe("teacher", 1, {"rows": task.rows}, tuple(inputs)), inputs, self.base_sha256,
            expert.files["adapter"] if expert else None, task.rows, tuple(range(9)), task.prompt, 8, 5, "float32",
        )  # fmt: skip

    def taught(self, **changes: Any) -> RefineJob:
        """With the merge as everybody's expert, and the base's answers on a third task's rows."""
        plain = self.job()
        kept = PooledTask(rows_name(fingerprint(KEPT)), PROMPTS[0])
        asked = [*((task, self.merged) for task in plain.tasks), (kept, None)]
        said = tuple(ask_teacher(self.store, self.teacher(*each), Place())[0].files["teacher"] for each in asked)
        given = {"teachers": said, "teacher_weight": 0.75, "kept": (kept,), "kept_rows": 3, "keep_weight": 3.0,
                 "licences": {"data": ["cc0"]}}  # fmt: skip
        return self.job(**given | changes)

    def make(self, job: RefineJob, **options: Any) -> Manifest:
        return make_refined(self.store, job, ["cpu"], 1, options.get("on_step", lambda report: None))[0]

    def open(self, manifest: Manifest) -> AdapterReader:
        file = self.store.download_file(manifest.files["adapter"], self.folder / manifest.key)
        return AdapterReader(FileSource(file))


@pytest.fixture
def world(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    tiny_model(tied=False).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = prepare_base(f"path:{tmp_path / 'base'}", tmp_path / "cache")
    upload_base(store, base)
    for rows in (*ROWS, KEPT):
        store.put_if_absent(rows_name(fingerprint(rows)), rows_to_jsonl(rows))
    return World(store, tmp_path, base.sha256, base.path)


def test_the_result_is_the_merge_and_what_was_trained_on_top_of_it(world: World) -> None:
    """By hand: the base with the merge in it, frozen, and the loop on batches of both tasks."""
    reports: list[StepReport] = []
    manifest = world.make(world.job(), on_step=reports.append)
    tokenizer, model, start = (
        load_tokenizer(world.path),
        load_model(world.path, torch.float32),
        world.open(world.merged),
    )
    plain = {name: parameter.clone() for name, parameter in model.named_parameters()}
    apply_delta(model, start)
    objective = language_modelling(model, int(tokenizer.pad_token_id))
    pools = [encode_examples(tokenizer, prompt, rows, 8) for rows, prompt in zip(ROWS, PROMPTS, strict=True)]
    batches = mixed_batches([list(map(objective.length, pool)) for pool in pools], 2, 6, SPEC.seed, 3)
    trained = train_expert(model, objective, [*pools[0], *pools[1]], [], MASK, SPEC, batches=batches)
    assert [report.loss for report in reports] == [report.loss for report in trained.history]
    assert reports[-1].loss < reports[0].loss - 0.2
    found = world.open(manifest)
    assert set(found.names) == set(trained.delta) | {UP, V}
    for name in found.names:
        expected = torch.zeros(found.shape(name)).view(-1)
        for part in (start.load(name) if name in start.names else None, trained.delta.get(name)):
            if part is not None:
                assert isinstance(part, SparseTensor)
                expected[part.indices] += part.values
        change = found.load(name)
        dense = torch.zeros_like(expected)
        dense[change.indices] = change.values
        assert torch.equal(dense, expected)
    # the model that an evaluator makes of it is the one that was trained, but for the order in which sums are rounded
    served = load_model(world.path, torch.float32)
    apply_delta(served, found)
    with torch.no_grad():
        losses = [float(objective.loss_sum(served, pool)) for pool in pools]
    assert sum(losses) / sum(map(objective.count, [*pools[0], *pools[1]])) < reports[0].loss
    assert all(torch.equal(plain[name], parameter) for name, parameter in load_model(
        world.path, torch.float32).named_parameters())  # fmt: skip
    told = manifest.meta
    assert told["refined"] == {"steps": 6, "rows": 24, "share": 0.1, "start": "m"}
    assert (told["method"], told["experts"], told["steps"], told["resumed_after"]) == ("mean", 2, 6, 0)
    assert told["losses"] == [report.loss for report in reports]
    assert told["licenses"] == {"base": [], "data": ["mit"]}
    assert 0 < told["density"] < 1
    assert 0 < told["rounding_loss_bfloat16"] < 1
    assert told["padding"] < 0.1
    assert manifest.inputs == {world.merged.key: world.merged.digest}
    # and it is an input of a merge like any other
    delta = AdapterDelta(FileSource(world.folder / manifest.key), "refined")
    assert (delta.identity, delta.base_sha256) == (manifest.key, world.base_sha256)


def test_experts_teach_their_own_rows_and_the_base_those_that_are_kept(world: World) -> None:
    """By hand: the same loop, on what the merge (for an expert) and the base say; and the base is kept indeed."""
    job = world.taught()
    manifest = world.make(job)
    tokenizer, model, expert = (load_tokenizer(world.path), *(load_model(world.path, torch.float32) for _ in range(2)))
    apply_delta(expert, world.open(world.merged))
    plain = language_modelling(model, int(tokenizer.pad_token_id))
    pools = [encode_examples(tokenizer, task.prompt, load_rows(world.store, task.rows), 8)
             for task in (*job.tasks, *job.kept)]  # fmt: skip
    lessons = []
    for at, pool in enumerate(pools):
        said = dict(ask(expert if at < 2 else load_model(world.path, torch.float32), plain, pool, 5, BATCH))
        weights = (0.25, 0.75) if at < 2 else (0.0, 3.0)
        lessons += [Lesson(example, *weights, said[number]) for number, example in enumerate(pool)]
    apply_delta(model, world.open(world.merged))
    lengths = [list(map(plain.length, pool)) for pool in pools]
    batches = mixed_batches(lengths[:2], 2, 6, SPEC.seed, 3, lengths[2:], 3)
    trained = train_expert(model, Teaching(plain), lessons, [], MASK, SPEC, batches=batches)
    assert manifest.meta["losses"] == pytest.approx([report.loss for report in trained.history], rel=1e-5)
    assert manifest.meta["licenses"] == {"base": [], "data": ["cc0", "mit"]}

    def distance(made: Manifest) -> float:
        """From the base, of what is kept."""
        changed = load_model(world.path, torch.float32)
        apply_delta(changed, world.open(made))
        away = [replace(lesson, answer=0.0, teacher=1.0) for lesson in lessons[len(pools[0]) + len(pools[1]) :]]
        with torch.no_grad():
            return float(Teaching(plain).loss_sum(changed, away))

    let_go = world.make(world.taught(keep_weight=1e-6))
    assert distance(manifest) < 0.8 * distance(let_go)
    # one teacher is made once, and says the same again
    again, made = ask_teacher(world.store, world.teacher(job.kept[0], None), Place())
    assert not made
    assert (again.meta["rows"], again.meta["targets"]) == (9, sum(map(plain.count, pools[2])))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_rows_of_held_in_tasks_have_teachers_or_not_beside_those_that_are_kept(world: World, weight: float) -> None:
    job = world.taught(teacher_weight=weight)
    silent = replace(job, teachers=(None, None, job.teachers[2]))
    if weight:
        with pytest.raises(ExpertError, match="not of these rows"):
            world.make(silent)
    else:
        found = [world.make(each).meta["losses"] for each in (silent, replace(job, recipe=Recipe("refined", 1, {})))]
        assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("criterion", ["random", "connection_sensitivity", "taught"])
def test_who_is_interrupted_goes_on_from_the_last_state_to_the_same_bytes(world: World, criterion: str) -> None:
    job = world.taught() if criterion == "taught" else world.job(mask=replace(MASK, criterion=criterion))

    def stop(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.make(job, on_step=stop)
    state = find_checkpoint(world.store, job.recipe.key)
    assert state is not None
    assert state.step == 4
    seen: list[int] = []
    resumed = world.make(job, on_step=lambda report: seen.append(report.step))
    assert seen == [5, 6]
    assert resumed.meta["resumed_after"] == 4
    assert find_checkpoint(world.store, job.recipe.key) is None
    whole = world.make(replace(job, recipe=Recipe("refined", 1, {"another": 1})))
    assert [whole.meta[name] for name in ("losses", "delta_norm", "resumed_after")] == [
        resumed.meta["losses"], resumed.meta["delta_norm"], 0,
    ]  # fmt: skip
    assert same(world.open(resumed), world.open(whole))
    assert make_refined(world.store, job, ["cpu"], 1, lambda report: None) == (resumed, False)


def same(one: AdapterReader, other: AdapterReader) -> bool:
    pairs = [(one.load(name), other.load(name)) for name in one.names]
    return one.names == other.names and all(
        torch.equal(a.indices, b.indices) and torch.equal(a.values, b.values) for a, b in pairs
    )


def test_the_positions_of_the_merge_may_be_trained_instead(world: World) -> None:
    start = world.open(world.merged)
    manifest = world.make(world.job(support="merge"))
    found = world.open(manifest)
    assert found.names == start.names
    assert all(torch.equal(found.load(name).indices, start.load(name).indices) for name in found.names)
    assert not any(torch.equal(found.load(name).values, start.load(name).values) for name in found.names)
    supports = merged_supports(start, MASK)
    assert {name: spec.block for name, spec in supports.items()} == {
        UP.removesuffix(".weight"): (1, 32), V.removesuffix(".weight"): (8, 8),
    }  # fmt: skip
    other = merged_supports(start, replace(MASK, granularity="element"))
    assert [spec.block for spec in other.values()] == [(1, 32), None]
    for each in (supports, other):
        assert all(torch.equal(spec.indices(), start.load(f"{name}.weight").indices) for name, spec in each.items())


@pytest.mark.parametrize("mask", [MASK, replace(MASK, granularity="element", density=0.01)], ids=["blocks", "elements"])
def test_as_many_of_the_merges_positions_may_be_trained_beside_fresh_ones(world: World, mask: MaskSpec) -> None:
    start, model = world.open(world.merged), tiny_model(False)
    fresh = select_supports(model, mask)
    both = beside_merged(fresh, start)
    for name, spec in both.items():
        own, units = set(fresh[name].units.tolist()), set(spec.units.tolist())
        assert own <= units
        assert spec.block == fresh[name].block
        spec.check(name)
        if f"{name}.weight" not in start.names:
            assert own == units
            continue
        tensor, change = start.load(f"{name}.weight"), torch.zeros(spec.shape)
        change.view(-1)[tensor.indices] = tensor.values.abs()
        height, width = spec.block or (1, 1)
        strength = change.view(spec.shape[0] // height, height, spec.shape[1] // width, width).mean((1, 3)).flatten()
        strongest = set(strength.argsort(descending=True)[: len(own)].tolist())
        assert units == own | strongest
    manifest = world.make(world.job(support="both", mask=mask))
    assert manifest.meta["trainable"] == sum(spec.count for spec in both.values())
    assert manifest.meta["losses"][-1] < manifest.meta["losses"][0]


def test_from_the_base_all_tasks_are_trained_without_a_merge(world: World) -> None:
    job = world.job(start=None, candidate=None, inputs={}, experts=(), licences={"base": ["x"], "data": ["y"]})
    manifest = world.make(job)
    assert "method" not in manifest.meta
    assert manifest.meta["licenses"] == {"base": ["x"], "data": ["y"]}
    assert set(world.open(manifest).names) == {f"{name}.weight" for name in select_supports(tiny_model(False), MASK)}


def test_a_training_that_diverges_and_a_merge_of_another_base_are_told_by_name(world: World) -> None:
    with pytest.raises(ExpertError, match=r"mean \+ 6 steps: step 2: loss"):
        world.make(world.job(train=replace(SPEC, learning_rate=1e38, clip_norm=1e30)))
    with pytest.raises(AdapterError, match="base"):
        world.make(world.job(base_sha256="c" * 64))


def test_sums_hold_every_position_of_both() -> None:
    one = SparseTensor((2, 3), torch.tensor([0, 4]), torch.tensor([1.0, 2.0]))
    other = SparseTensor((2, 3), torch.tensor([1, 4, 5]), torch.tensor([8.0, 16.0, 32.0]))
    total = added([one, other])
    assert total.indices.tolist() == [0, 1, 4, 5]
    assert total.values.tolist() == [1.0, 8.0, 18.0, 32.0]
    assert added([one]) is one
