"""What an evaluation actor holds: adapters swapped in and out of one base, bit for bit, and what is refused."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.artifacts.manifests import Manifest, Recipe
from infra.digests import file_sha256
from infra.errors import AdapterError, BaseModelError, MergeError, StoreError
from infra.store.layout import rows_name
from infra.store.s3 import FileRef, ObjectInfo
from merge.files.task_mask import MaskWriter
from tests.workers.tiny import WRAPPER, tiny_encoder, tiny_encoder_tokenizer, tiny_model, tiny_tokenizer
from workers.adapters.support import SparseTensor
from workers.adapters.task_mask import MaskMeta
from workers.adapters.writer import AdapterMeta, save_adapter
from workers.base.load import load_classifier
from workers.base.prepare import PreparedBase, prepare_base
from workers.jobs.evaluator import EvaluationJob, Evaluator, Routes
from workers.jobs.router import RouterJob, make_router
from workers.jobs.shared_support import PooledTask
from workers.scoring.classification import ClassifySpec, head_state
from workers.scoring.likelihood import EvaluateSpec
from workers.text.rows import Row, fingerprint, rows_to_jsonl
from workers.training.in_place import apply_delta

UP = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
DOWN = "model.layers.0.mlp.down_proj.weight"
ROWS = [Row(str(at), f"w{at}w{at + 1}", (f"w{at + 2}",)) for at in range(6)]
ROWS_OBJECT = rows_name(fingerprint(ROWS))


class Files:
    """The store's files and small objects, in a dictionary; like the real one it verifies what it downloads."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.downloads = 0

    def get(self, name: str) -> bytes:
        return self.data[name]

    def get_with_etag(self, name: str) -> tuple[bytes, str] | None:
        return (self.data[name], "") if name in self.data else None

    def head(self, name: str) -> ObjectInfo | None:
        return ObjectInfo(len(self.data[name]), "") if name in self.data else None

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return self.data.setdefault(name, data) is data

    def upload_file(self, name: str, path: Path) -> FileRef:
        self.data[name] = path.read_bytes()
        return FileRef(name, file_sha256(path), path.stat().st_size)

    def download_file(self, ref: FileRef, path: Path) -> Path:
        self.downloads += 1
        path.write_bytes(self.data[ref.name])
        if file_sha256(path) != ref.sha256:
            raise StoreError(f"{ref.name} is corrupted")
        return path


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> PreparedBase:
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return prepare_base(f"path:{folder}", cache)


@pytest.fixture
def files() -> Files:
    files = Files()
    files.data[ROWS_OBJECT] = rows_to_jsonl(ROWS)
    return files


@pytest.fixture
def evaluator(files: Files, base: PreparedBase, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    monkeypatch.setenv("FACTORY_CACHE", str(cache))
    return Evaluator(files, base.sha256, "float32", False, ["cpu"], threads=1)  # type: ignore[arg-type]


def delta(seed: int, names: list[str]) -> dict[str, SparseTensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(parameter.shape) for name, parameter in tiny_model().named_parameters()}
    tensors = {}
    for name in names:
        shape = shapes[name]
        indices = torch.randperm(shape[0] * shape[1], generator=generator)[:300].sort().values
        tensors[name] = SparseTensor(shape, indices, torch.randn(300, generator=generator).bfloat16().float())
    return tensors


def put(files: Files, folder: Path, name: str, tensors: dict[str, SparseTensor], sha256: str) -> FileRef:
    save_adapter(folder / name, tensors, AdapterMeta(sha256))
    return files.upload_file(name, folder / name)


def job(adapter: FileRef | None, weights: str = "float32", key: str = "") -> EvaluationJob:
    spec = EvaluateSpec("exact_match", wrapper=WRAPPER, max_new_tokens=4)
    recipe = Recipe("evaluation", 1, {"adapter": adapter.name if adapter else None, "weights": weights, "key": key})
    return EvaluationJob(
        recipe, "", "task", "test", ROWS_OBJECT, spec, "expert" if adapter else "base", adapter, "float32", weights, 4,
        provenance={"data": {"source": "here", "license": "mit"}},
    )  # fmt: skip


def score(evaluator: Evaluator, job: EvaluationJob, batch_size: int = 4) -> tuple[Manifest, bool]:
    """By the evaluator, on the base that it has unless the job names one."""
    return evaluator.evaluate(replace(job, base_sha256=job.base_sha256 or evaluator._loaded), batch_size)


def weights(evaluator: Evaluator) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in evaluator._model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left)


def added(before: dict[str, torch.Tensor], tensors: dict[str, SparseTensor]) -> dict[str, torch.Tensor]:
    after = {name: weight.clone() for name, weight in before.items()}
    for name, tensor in tensors.items():
        after[name].view(-1)[tensor.indices] += tensor.values
    return after


# -- swapping --


def test_adapters_come_and_go_and_leave_the_base_as_it_was(
    evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path
) -> None:
    first, second = delta(1, UP), delta(2, [UP[1], DOWN])  # they overlap in one weight
    one = put(files, tmp_path, "one", first, base.sha256)
    two = put(files, tmp_path, "two", second, base.sha256)
    before = weights(evaluator)
    score(evaluator, job(None), 4)
    assert same(weights(evaluator), before)
    score(evaluator, job(one), 4)
    assert same(weights(evaluator), added(before, first))
    assert not same(weights(evaluator), before)
    score(evaluator, job(two), 4)
    assert same(weights(evaluator), added(before, second))
    score(evaluator, job(two, "bfloat16"), 4)
    score(evaluator, job(one, key="again"), 4)
    assert same(weights(evaluator), added(before, first))
    score(evaluator, job(None, key="again"), 4)
    assert same(weights(evaluator), before)


def test_a_router_sends_each_row_to_the_expert_of_the_task_that_it_is_like(
    evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path
) -> None:
    experts = [put(files, tmp_path, f"expert{at}", delta(at, UP), base.sha256) for at in range(2)]
    answers = [score(evaluator, job(each, key="alone"))[0] for each in experts]
    tasks = []
    for at in range(2):  # of one task the first rows, of the other the last ones
        part = ROWS[3 * at : 3 * at + 3]
        name = rows_name(fingerprint(part))
        files.data[name] = rows_to_jsonl(part)
        tasks.append(PooledTask(name, EvaluateSpec("exact_match", wrapper=WRAPPER).prompt))
    recipe = Recipe("router", 1, {})
    router_job = RouterJob(recipe, base.sha256, tuple(tasks), rows=1, compute_dtype="float32", batch_size=4)
    router, made = make_router(files, router_job, evaluator)  # type: ignore[arg-type]
    assert (made, router.meta["rows"], router.meta["tasks"]) == (True, 2, 2)
    assert make_router(files, router_job, evaluator) == (router, False)  # type: ignore[arg-type]
    routes = Routes(router.files["router"], tuple(experts))
    before = weights(evaluator)
    found, _ = score(evaluator, replace(job(None, key="routed"), routes=routes))
    again, _ = score(evaluator, replace(job(None, key="alone"), routes=routes), batch_size=1)

    def outputs(manifest: Manifest) -> list[str]:
        lines = files.data[manifest.files["rows"].name].decode().splitlines()
        return [json.loads(line)["output"] for line in lines]

    by_expert = list(zip(*map(outputs, answers), strict=True))
    taken = [pair.index(own) for own, pair in zip(outputs(found), by_expert, strict=True) if pair[0] != pair[1]]
    assert set(taken) == {0, 1}, "the experts answer otherwise, and both are asked"
    first, second = outputs(found)[0], outputs(found)[3]
    assert (first, second) == (by_expert[0][0], by_expert[3][1]), "the rows that are the centroids"
    assert outputs(again) == outputs(found)
    score(evaluator, job(None, key="after"))
    assert same(weights(evaluator), before)


def test_a_job_may_name_another_base(
    evaluator: Evaluator, files: Files, base: PreparedBase, cache: Path, tmp_path: Path
) -> None:
    """As a champion's that was made on another one: its adapter fits that base only, and the own one comes back."""
    torch.manual_seed(1)
    second = tiny_model()
    for parameter in second.parameters():
        parameter.data.normal_(0, 0.1)
    second.to(torch.bfloat16).save_pretrained(tmp_path / "second")
    tiny_tokenizer().save_pretrained(tmp_path / "second")
    other = prepare_base(f"path:{tmp_path / 'second'}", cache)
    assert other.sha256 != base.sha256
    before = weights(evaluator)
    mine, theirs = delta(1, UP), delta(2, UP)
    own = replace(job(put(files, tmp_path, "own", mine, base.sha256), key="own"), base_sha256=base.sha256)
    foreign = replace(job(put(files, tmp_path, "foreign", theirs, other.sha256), key="o"), base_sha256=other.sha256)
    score(evaluator, own, 3)
    score(evaluator, foreign, 3)
    expected = {name: parameter.detach().float() for name, parameter in second.named_parameters()}
    assert same(weights(evaluator), added(expected, theirs))
    score(evaluator, replace(job(None, key="base"), base_sha256=base.sha256), 3)
    assert same(weights(evaluator), before)
    with pytest.raises(AdapterError, match=other.sha256[:12]):
        score(evaluator, replace(foreign, base_sha256=base.sha256, recipe=Recipe("evaluation", 1, {"key": "w"})), 3)
    with pytest.raises(BaseModelError, match="not in the object store"):
        score(evaluator, replace(foreign, base_sha256="0" * 64, recipe=Recipe("evaluation", 1, {"key": "g"})), 3)
    score(evaluator, replace(own, recipe=Recipe("evaluation", 1, {"key": "again"})), 3)
    assert same(weights(evaluator), added(before, mine))


def test_an_adapter_that_is_in_place_is_not_fetched_again(
    evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path
) -> None:
    one = put(files, tmp_path, "one", delta(1, UP), base.sha256)
    for number in range(3):
        score(evaluator, job(one, key=str(number)), 4)
    assert files.downloads == 1
    score(evaluator, job(one, "bfloat16"), 4)
    assert files.downloads == 2
    score(evaluator, job(None), 4)
    score(evaluator, job(one, key="again"), 4)
    assert files.downloads == 3


def test_scores_follow_the_weights(evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path) -> None:
    large = {name: SparseTensor(t.shape, t.indices, t.values * 4) for name, t in delta(1, [*UP, DOWN]).items()}
    one = put(files, tmp_path, "one", large, base.sha256)

    def outputs(adapter: FileRef | None, key: str) -> list[str]:
        manifest, made = score(evaluator, job(adapter, key=key), 4)
        assert made
        lines = [json.loads(line) for line in files.data[manifest.files["rows"].name].decode().splitlines()]
        assert [line["id"] for line in lines] == [row.id for row in ROWS]
        assert [line["targets"] for line in lines] == [list(row.targets) for row in ROWS]
        assert [line["score"] for line in lines] == manifest.meta["scores"]
        assert manifest.meta["n"] == len(ROWS)
        assert manifest.meta["data"] == {"source": "here", "license": "mit"}
        assert manifest.meta["score"] == sum(manifest.meta["scores"]) / len(ROWS)
        return [line["output"] for line in lines]

    plain = outputs(None, "1")
    assert outputs(one, "2") != plain
    assert outputs(None, "3") == plain


# -- task masks --


def put_mask(files: Files, folder: Path, name: str, unified: FileRef, base: str, scale: float, every: int) -> FileRef:
    """A mask that keeps each `every`-th position of the support."""
    meta = MaskMeta(name, {"method": "emr", "params": {}}, base, unified.sha256)
    with MaskWriter(folder / name, meta, dict.fromkeys(UP, 300)) as writer:
        for tensor in UP:
            writer.add(tensor, torch.arange(300) % every == 0)
        writer.close(scale)
    return files.upload_file(name, folder / name)


def test_a_task_mask_is_applied_and_taken_off(
    evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path
) -> None:
    whole = delta(1, UP)
    unified = put(files, tmp_path, "unified", whole, base.sha256)
    masks = {every: put_mask(files, tmp_path, f"mask{every}", unified, base.sha256, 1.5, every) for every in (2, 3)}
    before = weights(evaluator)
    score(evaluator, job(unified), 4)
    for every in (2, 3):
        score(evaluator, replace(job(unified, key=str(every)), mask=masks[every]), 4)
        kept = torch.arange(300) % every == 0
        seen = {name: SparseTensor(t.shape, t.indices[kept], t.values[kept] * 1.5) for name, t in whole.items()}
        assert same(weights(evaluator), added(before, seen))
    downloads = files.downloads
    score(evaluator, replace(job(unified, key="again"), mask=masks[3]), 4)
    assert files.downloads == downloads
    score(evaluator, job(unified, key="unmasked"), 4)
    assert same(weights(evaluator), added(before, whole))
    other = put(files, tmp_path, "other", delta(2, UP), base.sha256)
    with pytest.raises(MergeError, match="is over the merged adapter"):
        score(evaluator, replace(job(other, key="wrong"), mask=masks[2]), 4)
    assert same(weights(evaluator), before)


# -- classification --


def test_the_file_of_an_expert_is_fetched_once_for_its_change_and_its_head(
    files: Files, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(cache))
    tiny_encoder().save_pretrained(tmp_path / "bert")
    tiny_encoder_tokenizer().save_pretrained(tmp_path / "bert")
    encoder = prepare_base(f"path:{tmp_path / 'bert'}", cache)
    labelled = [Row(row.id, row.input, (("a", "b")[at % 2],)) for at, row in enumerate(ROWS)]
    files.data[rows_name(fingerprint(labelled))] = rows_to_jsonl(labelled)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    change = {query: SparseTensor((32, 32), torch.arange(32), torch.ones(32))}
    refs = {}
    for seed, name in enumerate(("expert", "other", "merged")):
        head = head_state(load_classifier(encoder.path, 2, torch.float32, seed)) if name != "merged" else None
        save_adapter(tmp_path / name, change, AdapterMeta(encoder.sha256), head=head)
        refs[name] = files.upload_file(name, tmp_path / name)
    spec = ClassifySpec("accuracy", ("a", "b"), wrapper="{prompt}", max_input_tokens=20)
    evaluator = Evaluator(files, encoder.sha256, "float32", True, ["cpu"], threads=1)  # type: ignore[arg-type]

    def downloads(adapter: str, head: str) -> int:
        before = files.downloads
        recipe = Recipe("evaluation", 1, {"adapter": adapter, "head": head})
        rows = rows_name(fingerprint(labelled))
        score(
            evaluator,
            replace(
                job(refs[adapter]), recipe=recipe, base_sha256=encoder.sha256, rows=rows, spec=spec, head=refs[head]
            ),
        )
        expected = load_classifier(encoder.path, 2, torch.float32, ("expert", "other").index(head))
        found = head_state(evaluator._model)
        assert all(torch.equal(found[name], tensor) for name, tensor in head_state(expected).items())
        return files.downloads - before

    assert downloads("expert", "expert") == 1
    assert downloads("merged", "expert") == 1
    assert downloads("merged", "other") == 1
    assert downloads("other", "other") == 1
    assert downloads("other", "expert") == 0


# -- refusals --


def test_an_adapter_of_another_base_is_refused(
    evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path
) -> None:
    own = put(files, tmp_path, "own", delta(1, UP), base.sha256)
    other = put(files, tmp_path, "other", delta(1, UP), "f" * 64)
    before = weights(evaluator)
    score(evaluator, job(own), 4)
    with pytest.raises(AdapterError, match="made for base ffffffffffff"):
        score(evaluator, job(other), 4)
    assert same(weights(evaluator), before)
    score(evaluator, job(own, key="again"), 4)  # applied anew, although it was the last one that worked
    assert same(weights(evaluator), added(before, delta(1, UP)))


def test_changed_bytes_are_refused(evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path) -> None:
    one = put(files, tmp_path, "one", delta(1, UP), base.sha256)
    before = weights(evaluator)
    files.data["one"] = files.data["one"][:-1] + b"\x00"
    with pytest.raises(StoreError, match="corrupted"):
        score(evaluator, job(one), 4)
    assert same(weights(evaluator), before)


def cut(raw: bytes) -> bytes:
    return raw[:-4]


def false_header(raw: bytes) -> bytes:
    return struct.pack("<Q", 2**40) + raw[8:]


def not_finite(raw: bytes) -> bytes:
    return raw[:-2] + struct.pack("<H", 0x7FC0)  # the last value becomes NaN in bfloat16


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("damage", [cut, false_header, not_finite])
def test_a_file_that_is_no_adapter_is_refused_and_leaves_the_base(
    evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path, damage: Any, weights_dtype: str
) -> None:
    save_adapter(tmp_path / "one", delta(1, UP), AdapterMeta(base.sha256))
    (tmp_path / "one").write_bytes(damage((tmp_path / "one").read_bytes()))
    one = files.upload_file("one", tmp_path / "one")
    before = weights(evaluator)
    with pytest.raises(AdapterError, match="damaged"):
        score(evaluator, job(one, weights_dtype), 4)
    assert same(weights(evaluator), before)
    score(evaluator, job(None), 4)
    assert same(weights(evaluator), before)


def test_a_wrong_shape_is_refused(evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path) -> None:
    wrong = SparseTensor((2, 2), torch.tensor([1]), torch.tensor([1.0]))
    one = put(files, tmp_path, "one", {UP[0]: delta(1, UP)[UP[0]], UP[1]: wrong}, base.sha256)
    before = weights(evaluator)
    with pytest.raises(AdapterError, match="shape"):
        score(evaluator, job(one), 4)
    assert same(weights(evaluator), before)


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_absent_or_tied_is_refused(
    evaluator: Evaluator, files: Files, base: PreparedBase, tmp_path: Path, name: str
) -> None:
    shape = tuple(tiny_model().lm_head.weight.shape) if name == "lm_head.weight" else (48, 32)
    odd = {name: SparseTensor(shape, torch.tensor([1]), torch.tensor([1.0]))}
    with pytest.raises(AdapterError, match=r"does not have|tied"):
        score(evaluator, job(put(files, tmp_path, "one", odd, base.sha256)), 4)


# -- rounding --


def rounded(weight: torch.Tensor, values: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What the weight becomes, as `apply_delta` adds it."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype).requires_grad_(False)
    module.weight.copy_(weight)
    whole = SparseTensor(tuple(weight.shape), torch.arange(weight.numel()), values)
    with apply_delta(module, {"weight": whole}, dtype):
        changed = module.weight.detach().clone().view(-1)
    assert torch.equal(module.weight, weight)
    return changed


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0])
def test_a_rounded_change_lands_on_the_grid(scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16().float()  # as a base that was published in bfloat16
    values = torch.randn(64 * 64) * scale
    assert torch.equal(rounded(weight, values), (weight.view(-1) + values).bfloat16().float())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1])
def test_also_from_weights_that_are_not_on_the_grid(scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.rand(64, 64) + 1.0
    values = torch.randn(64 * 64) * scale
    assert torch.equal(rounded(weight, values), (weight.view(-1) + values).bfloat16().float())


def test_also_where_the_change_turns_the_sign() -> None:
    torch.manual_seed(0)
    weight = -1.0 - torch.rand(64, 64)
    values = (torch.rand(64 * 64) + 2.0).bfloat16().float()
    assert torch.equal(rounded(weight, values), (weight.view(-1) + values).bfloat16().float())


def test_a_type_that_is_no_narrower_changes_nothing() -> None:
    torch.manual_seed(0)
    weight, values = torch.randn(8, 8), torch.randn(64) * 1e-3
    assert torch.equal(rounded(weight, values, torch.float32), weight.view(-1) + values)
