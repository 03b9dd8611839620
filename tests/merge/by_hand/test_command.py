"""`python -m merge` on a tiny Llama: what it writes against dense arithmetic, what it says, and how it ends."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infra.artifacts.manifests import Recipe, publish
from infra.digests import file_sha256
from infra.errors import MergeError
from infra.registry import runs, versions
from infra.store.s3 import Store
from infra.store.writer import StoreWriter
from merge.by_hand import run
from merge.by_hand.command import methods_markdown
from merge.commands import main
from merge.files.checkpoint_writer import CheckpointWriter
from merge.methods.catalogue import METHODS
from merge.tree.jobs import Ref
from tests.e2e.conftest import write_tiny_base
from workers.adapters.support import SparseTensor
from workers.adapters.task_mask import MaskReader
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.base.cache import cache_dir
from workers.base.prepare import PreparedBase, prepare_base
from workers.measuring.file import MeasuredOn
from workers.measuring.fisher import FisherWriter
from workers.measuring.gram import GramWriter
from workers.tensors.source import FileSource

Q = "model.layers.0.self_attn.q_proj.weight"
V = "model.layers.1.self_attn.v_proj.weight"
SHAPES = {Q: (64, 64), V: (32, 64)}
DOCS = Path(__file__).resolve().parents[3] / "docs" / "merging.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a tiny base with dyadic weights, and a cache of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FACTORY_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = write_tiny_base(tmp_path_factory.mktemp("base") / "model")
    weights = load_file(folder / "model.safetensors")
    rounded = {name: (weight * 64).round() / 64 for name, weight in weights.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def base(model: Path) -> PreparedBase:
    return prepare_base(f"path:{model}", cache_dir())


@pytest.fixture
def folder(tmp_path: Path, base: PreparedBase) -> Path:
    """A folder with four experts of dyadic values on random supports: sums in any order are exact."""
    for at in range(4):
        g = torch.Generator().manual_seed(at)
        delta = {}
        for name, shape in SHAPES.items():
            indices = torch.randperm(shape[0] * shape[1], generator=g)[:300].sort().values
            delta[name] = SparseTensor(shape, indices, torch.randint(-8, 9, (300,), generator=g) / 64)
        save_adapter(tmp_path / f"e{at}.safetensors", delta, AdapterMeta(base.sha256), torch.float32)
    return tmp_path


@pytest.fixture
def merge(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, in the experts' folder."""
    monkeypatch.chdir(folder)

    def call(command: str, *arguments: str, method: str | None = "mean", count: int = 4) -> Result:
        given = ["--base", f"path:{model}"]
        if command in ("run", "plan"):
            given += [item for at in range(count) for item in ("--expert", f"e{at}.safetensors")]
            given += ["--method", method] if method else []
        return CliRunner().invoke(main, [command, *(given if command != "methods" else []), *arguments])

    return call


def dense(file: Path | str) -> dict[str, torch.Tensor]:
    reader = AdapterReader(FileSource(file))
    found = {}
    for name in reader.names:
        tensor = reader.load(name)
        flat = torch.zeros(tensor.numel)
        flat[tensor.indices] = tensor.values
        found[name] = flat.view(tensor.shape)
    return found


def expected_mean(folder: Path, count: int = 4) -> dict[str, torch.Tensor]:
    experts = [dense(folder / f"e{at}.safetensors") for at in range(count)]
    return {name: torch.stack([expert[name] for expert in experts]).sum(0) / count for name in SHAPES}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result, told: str, status: int = 2) -> None:
    assert result.exit_code == status, result.output
    assert re.search(told, " ".join(result.output.split())), result.output
    assert "Traceback" not in result.output


# -- run --


def test_adapters_give_their_mean(merge: Callable[..., Result], folder: Path) -> None:
    said = succeeded(merge("run", "--out", "merged.safetensors"))
    check_equal(dense("merged.safetensors"), expected_mean(folder))
    assert re.search(r"4 experts, 2 tensors", said)
    norm = sum(float(d.double().square().sum()) for d in expected_mean(folder).values()) ** 0.5
    assert f"‖δ‖ {norm:.4g}" in said
    assert re.search(r"written in .* s, peak memory", said)


def test_nothing_is_done_twice(merge: Callable[..., Result], folder: Path, base: PreparedBase) -> None:
    succeeded(merge("run", "--out", "merged.safetensors"))
    before = Path("merged.safetensors").stat()
    assert "holds exactly this merge already" in succeeded(merge("run", "--out", "merged.safetensors"))
    assert Path("merged.safetensors").stat() == before
    for changed in (("--method", "ties"), ("--method", "task_arithmetic", "--param", "lambda=0.5")):
        assert "wrote merged" in succeeded(merge("run", "--out", "merged.safetensors", *changed, method=None))
    succeeded(merge("run", "--out", "merged.safetensors"))
    delta = {Q: SparseTensor(SHAPES[Q], torch.tensor([3]), torch.ones(1))}
    save_adapter(folder / "e2.safetensors", delta, AdapterMeta(base.sha256), torch.float32)
    assert "wrote merged" in succeeded(merge("run", "--out", "merged.safetensors")), "another input"
    check_equal(dense("merged.safetensors"), {n: d for n, d in expected_mean_of(folder).items()})


def expected_mean_of(folder: Path) -> dict[str, torch.Tensor]:
    experts = [dense(folder / f"e{at}.safetensors") for at in range(4)]
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return {n: torch.stack([(zero | expert)[n] for expert in experts]).sum(0) / 4 for n in SHAPES}


def test_checkpoints_and_adapters_together(merge: Callable[..., Result], folder: Path, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    shifted = {name: weight + 1 / 64 for name, weight in weights.items()}
    full = AutoModelForCausalLM.from_pretrained(model)
    full.load_state_dict({**shifted, "lm_head.weight": shifted["model.embed_tokens.weight"]})
    full.save_pretrained(folder / "full", max_shard_size="100KB")
    assert len(list((folder / "full").glob("model-*.safetensors"))) > 1
    succeeded(merge("run", "--expert", "full", "--out", "merged.safetensors", count=1))
    one = dense("e0.safetensors")
    expected = {n: (torch.full_like(w, 1 / 64) + one.get(n, torch.zeros(()))) / 2 for n, w in weights.items()}
    check_equal(dense("merged.safetensors"), expected)


def test_a_peft_folder_is_an_expert(merge: Callable[..., Result], folder: Path, model: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for name, value in lora.named_parameters():
            if "lora_" in name:
                value.copy_((value * 8).round() / 8)
    lora.save_pretrained(folder / "lora")
    succeeded(merge("run", "--expert", "qa=lora", "--out", "merged.safetensors", "--method", "task_arithmetic",
                    "--param", "lambda=1", method=None, count=1))  # fmt: skip
    merged = lora.merge_and_unload().state_dict()
    weights, one = load_file(model / "model.safetensors"), dense("e0.safetensors")
    found = dense("merged.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        own = one[name] if name in one else torch.zeros(())
        assert torch.equal(found[name], merged[name] - weights[name] + own)


def test_a_checkpoint_is_base_plus_delta(merge: Callable[..., Result], folder: Path, model: Path) -> None:
    succeeded(merge("run", "--checkpoint", "merged", "--dtype", "float32", "--shard-gib", "0.0001"))
    assert len(list(Path("merged").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    mean = expected_mean(folder)
    for name, weight in load_file(model / "model.safetensors").items():
        assert torch.equal(loaded[name], weight + mean.get(name, torch.zeros(()))), name
    digests = {file.name: file_sha256(file) for file in Path("merged").iterdir()}
    said = succeeded(merge("run", "--checkpoint", "merged", "--dtype", "float32", "--shard-gib", "0.0001"))
    assert "holds exactly this merge already" in said
    for file in Path("merged").iterdir():
        file.unlink()
    succeeded(merge("run", "--checkpoint", "merged", "--dtype", "float32", "--shard-gib", "0.0001"))
    assert {file.name: file_sha256(file) for file in Path("merged").iterdir()} == digests
    succeeded(merge("run", "--checkpoint", "merged", "--dtype", "bfloat16", "--out", "merged.safetensors"))
    assert sorted(f.name for f in Path("merged").glob("model*")) == ["model.safetensors"], "no old shard stays"
    assert AutoModelForCausalLM.from_pretrained("merged", dtype="auto").dtype == torch.bfloat16
    check_equal(dense("merged.safetensors"), mean)


def test_a_spectral_merge_of_full_checkpoints(merge: Callable[..., Result], folder: Path, model: Path) -> None:
    """Every matrix takes the step, every vector the mean."""
    weights = load_file(model / "model.safetensors")
    total = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    sources = []
    for at in range(2):
        g = torch.Generator().manual_seed(at)
        delta = {n: torch.randint(-8, 9, tuple(w.shape), generator=g) / 64 for n, w in weights.items()}
        total = {name: total[name] + delta[name] for name in total}
        full = AutoModelForCausalLM.from_pretrained(model)
        tuned = {name: weight + delta[name] for name, weight in weights.items()}
        full.load_state_dict({**tuned, "lm_head.weight": tuned["model.embed_tokens.weight"]})
        full.save_pretrained(folder / f"full{at}")
        sources += ["--expert", f"full{at}"]
    succeeded(merge("run", *sources, "--param", "p=-0.5", "--param", "lambda=0.8", "--checkpoint", "merged",
                    "--dtype", "float32", method="spectral_power", count=0))  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    for name, weight in weights.items():
        if weight.ndim == 1:
            expected = total[name].double() / 2
        else:
            u, s, v = torch.linalg.svd(total[name].double(), full_matrices=False)
            q = s * (s / s[0]).clamp(min=0.03) ** -1.5
            expected = 0.8 * s.mean() / q.mean() * (u * q) @ v
        torch.testing.assert_close(loaded[name].double() - weight.double(), expected, rtol=1e-4, atol=1e-5)
    for method in ("wudi", "tsv_m", "iso_cts", "svc", "knots"):  # their formulas: tests/merge/methods
        succeeded(merge("run", *sources, "--param", "trim=0.9", "--checkpoint", method, "--dtype", "float32",
                        method=method, count=0))  # fmt: skip
        loaded = AutoModelForCausalLM.from_pretrained(method).state_dict()
        for name, weight in weights.items():
            change = loaded[name] - weight
            assert bool(change.any())
            assert bool(change.isfinite().all())


def test_weights(merge: Callable[..., Result], folder: Path) -> None:
    weights = [item for at in range(4) for item in ("--weight", f"e{at}={[0.5, 0.25, 0.125, 0.125][at]}")]
    succeeded(merge("run", "--out", "merged.safetensors", *weights, method="weighted_mean"))
    experts = [dense(f"e{at}.safetensors") for at in range(4)]
    expected = {n: 0.5 * experts[0][n] + 0.25 * experts[1][n] + 0.125 * (experts[2][n] + experts[3][n]) for n in SHAPES}
    check_equal(dense("merged.safetensors"), expected)


def test_a_configuration_file(merge: Callable[..., Result], folder: Path, model: Path) -> None:
    fields: dict[str, Any] = {
        "base": f"path:{model}", "method": "ties", "params": {"density": 0.5}, "out": "never.safetensors",
        "experts": {f"task {at}": f"e{at}.safetensors" for at in range(4)},
    }  # fmt: skip
    (folder / "merge.yaml").write_text(yaml.safe_dump(fields))
    result = CliRunner().invoke(main, ["run", "--config", "merge.yaml", "--out", "merged.safetensors"])
    assert "density=0.5" in succeeded(result)
    assert AdapterReader(FileSource("merged.safetensors")).meta.info["experts"] == [f"task {at}" for at in range(4)]
    assert not Path("never.safetensors").exists()


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.internal])
def test_every_method(merge: Callable[..., Result], folder: Path, base: PreparedBase, method: str) -> None:
    given = []
    for at in range(2):
        meta = MeasuredOn(base.sha256, file_sha256(folder / f"e{at}.safetensors"), 8)
        with FisherWriter(folder / f"f{at}", meta, list(SHAPES)) as fisher:
            for name in SHAPES:
                fisher.add(name, torch.rand(300, generator=torch.Generator().manual_seed(at)))
            fisher.close()
        with GramWriter(folder / f"g{at}", meta, list(SHAPES)) as gram:
            gram.add(list(SHAPES), torch.eye(64) * (at + 1))
            gram.close()
        given += ["--fisher", f"e{at}=f{at}"] if method == "fisher_on_support" else []
        given += ["--gram", f"e{at}=g{at}"] if method == "regmean" else []
        given += ["--weight", f"e{at}=0.5"] if METHODS[method].weights_required else []
    succeeded(merge("run", "--out", "merged.safetensors", *given, method=method, count=2))
    assert any(bool(delta.any()) for delta in dense("merged.safetensors").values())
    assert "nothing to do" in succeeded(merge("run", "--out", "merged.safetensors", *given, method=method, count=2))


def test_task_masks(merge: Callable[..., Result], folder: Path, model: Path) -> None:
    succeeded(merge("run", "--out", "unified.safetensors", method="emr"))
    masks = [Path(f"unified.e{at}.mask.safetensors") for at in range(4)]
    unified, own = dense("unified.safetensors"), dense("e1.safetensors")
    said = succeeded(merge("export", "unified.safetensors", "--mask", str(masks[1]), "--out", "task"))
    assert "parameters in the base's types" in said
    scale = MaskReader(FileSource(masks[1])).scale
    weights, written = load_file(model / "model.safetensors"), load_file("task/model.safetensors")
    for name, delta in unified.items():
        kept = delta * ((delta * own[name]) > 0)
        assert torch.equal(written[name], weights[name] + kept * scale), name
    masks[2].unlink()
    succeeded(merge("run", "--out", "unified.safetensors", method="emr"))
    assert masks[2].exists(), "a missing mask is made again"
    other = ["export", "e0.safetensors", "--mask", str(masks[1]), "--out", "other"]
    refused(merge(*other), "mask of task 'e1'")


# -- plan, methods, export --


def test_a_plan_writes_nothing(merge: Callable[..., Result], folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    said = succeeded(merge("plan", "--out", "new/merged.safetensors", "--checkpoint", "new/full", method="sce"))
    assert "2 reductions, 2 rounds" in said
    assert "later rounds re-lift every expert" in said
    assert sorted(folder.rglob("*")) == before


def test_the_estimates_of_a_plan(merge: Callable[..., Result], folder: Path) -> None:
    said = succeeded(merge("plan", "--out", "merged.safetensors", "--checkpoint", "full"))
    found = re.search(r"about ([\d,]+) positions", said)
    assert found
    succeeded(merge("run", "--out", "merged.safetensors"))
    reader = AdapterReader(FileSource("merged.safetensors"))
    positions = sum(reader.count(name) for name in reader.names)
    assert int(found[1].replace(",", "")) == pytest.approx(positions, rel=0.05)


def test_the_documentation_has_every_method(merge: Callable[..., Result]) -> None:
    table = succeeded(merge("methods", "--markdown"))
    assert table == methods_markdown()
    assert table in DOCS.read_text(encoding="utf-8"), "write the output of `python -m merge methods --markdown` there"
    shown = succeeded(merge("methods"))
    for name, method in METHODS.items():
        assert (f"`{name}`" in table) != method.internal
        assert (f"│ {name} " in shown) != method.internal


def test_export(merge: Callable[..., Result], folder: Path, model: Path) -> None:
    succeeded(merge("export", "e0.safetensors", "--out", "full"))
    weights, written = load_file(model / "model.safetensors"), load_file("full/model.safetensors")
    check_equal(written, {n: w + dense("e0.safetensors").get(n, torch.zeros(())) for n, w in weights.items()})
    assert "nothing to do" in succeeded(merge("export", "e0.safetensors", "--out", "full"))
    refused(merge("export", str(model), "--out", "other"), "is a full checkpoint already")
    refused(merge("export", "e0.safetensors", "--out", str(folder)), "overlaps the input")
    refused(merge("export", "none", "--out", "other"), "no such file or folder; accepted are")


# -- what is refused, what fails --


def test_bad_input_ends_with_status_2(merge: Callable[..., Result], folder: Path) -> None:
    for arguments, told in (
        (["--out", "m", "--method", "tise"], "unknown merge method 'tise'; did you mean 'ties'"),
        (["--out", "m", "--method", "ties", "--param", "density=2"], r"'density'.*accepted: a number above 0 to 1"),
        (["--out", "m", "--method", "ties", "--param", "density"], "--param 'density': give NAME=VALUE"),
        (["--out", "m", "--method", "ties", "--param", "density=1", "--param", "density=.5"], "is given twice"),
        (["--out", "m", "--method", "ties", "--weight", "e0=much"], "--weight e0=much: the weight is no number"),
        (["--out", "m", "--method", "mean", "--expert", "other/e0.safetensors"], "two experts are named 'e0'"),
        (["--out", "m", "--method", "mean", "--expert", "again=e0.safetensors"], "are the same one"),
        (["--out", "e0.safetensors", "--method", "mean"], "is the input expert 'e0'"),
        (["--out", "/proc/none/m", "--method", "mean"], "--out /proc/none/m: cannot be written"),
        (["--out", "m"], "method: missing; give --method"),
        (["--method", "mean"], "no output"),
        (["--out", "m", "--method", "mean", "--config", "none.yaml"], "none.yaml: not readable"),
        (["--out", "m", "--method", "mean", "--shard-gib", "0"], "--shard-gib"),
        (["--out", "m", "--method", "mean", "--shard-gib", "nan"], "shard_gib"),
        (["--out", "m", "--method", "mean", "--shard-gib", "inf"], "shard_gib"),
    ):
        refused(merge("run", *arguments, method=None), told)
    assert not Path("m").exists()


def test_a_failure_ends_with_status_1_and_leaves_nothing(merge: Callable[..., Result], folder: Path) -> None:
    data = bytearray((folder / "e3.safetensors").read_bytes())
    data[-4:] = b"\xff" * 4  # in the last tensor
    (folder / "e3.safetensors").write_bytes(data)
    refused(merge("run", "--out", "merged.safetensors", "--checkpoint", "full"), rf"expert 'e3', tensor {V}", status=1)
    assert {path.name for path in folder.iterdir()} == {f"e{at}.safetensors" for at in range(4)}


def test_a_checkpoint_that_cannot_be_finished_leaves_no_adapter(
    merge: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("finish", "publish"):

        def fail(*_: object) -> None:
            raise MergeError("no more room")

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointWriter, step, fail)
            refused(merge("run", "--out", "merged.safetensors", "--checkpoint", "full"), "no more room", status=1)
        assert {path.name for path in folder.iterdir()} == {f"e{at}.safetensors" for at in range(4)}


def test_a_folder_of_the_same_name_as_ours_is_left_alone(merge: Callable[..., Result], folder: Path) -> None:
    (folder / ".full.merging").mkdir()
    (folder / ".full.merging" / "thesis.tex").write_text("…")
    succeeded(merge("run", "--checkpoint", "full"))
    assert (folder / ".full.merging" / "thesis.tex").exists()


def test_unreachable_services_are_bad_input(merge: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORY_S3_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("merge.by_hand.checks.prepare_base", None)  # they come before any download
    refused(merge("run", "--out", "s3://elsewhere/m"), "unreachable")
    refused(merge("run", "--out", "m", "--store"), "unreachable")
    refused(merge("run", "--out", "s3://elsewhere/m", "--register", "x"), "MLFLOW_TRACKING_URI")


# -- object store and registry --


def claiming(folder: Path, base: PreparedBase, name: str, recipe: str, seed: int) -> Path:
    """An expert that says what its recipe is."""
    g = torch.Generator().manual_seed(seed)
    delta = {Q: SparseTensor(SHAPES[Q], torch.arange(300), torch.randint(1, 9, (300,), generator=g) / 64)}
    file = folder / f"{name}.safetensors"
    save_adapter(file, delta, AdapterMeta(base.sha256, info={"recipe": recipe}), torch.float32)
    return file


def test_a_claimed_recipe_names_no_bytes(
    merge: Callable[..., Result], folder: Path, store: Store, base: PreparedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "from_env", classmethod(lambda _: store))
    recipe = Recipe("expert", 1, {"x": store.prefix})
    own = claiming(folder, base, "own", recipe.key, 0)
    edited = claiming(folder, base, "edited", recipe.key, 1)
    publish(store, recipe, {"adapter": own}, {}, {})
    found: dict[str, list[str]] = {}
    make = run.merge_stored

    def note(store: Store, candidates: Any, experts: dict[str, Ref], *more: Any, **named: Any) -> Any:
        for name, ref in experts.items():
            found.setdefault(name, []).append(ref.key)
        return make(store, candidates, experts, *more, **named)

    monkeypatch.setattr(run, "merge_stored", note)
    for method in ("mean", "dare_linear"):
        given = [item for file in (own, edited) for item in ("--expert", str(file))]
        succeeded(merge("run", "--store", *given, "--out", "stored", method=method, count=0))
        succeeded(merge("run", *given, "--out", "flat", method=method, count=0))
        check_equal(dense("stored"), dense("flat"))
    assert set(found["own"]) == {recipe.key}
    assert recipe.key not in found["edited"]


def test_a_stored_artifact_without_a_recipe_draws_the_same(
    merge: Callable[..., Result], folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "from_env", classmethod(lambda _: store))
    manifest, _ = publish(store, Recipe("merged", 1, {}), {"adapter": folder / "e0.safetensors"}, {}, {})
    given = ["--expert", "x=" + store.uri(manifest.files["adapter"].name), "--expert", "e1.safetensors"]
    succeeded(merge("run", "--store", *given, "--out", "stored", method="dare_linear", count=0))
    succeeded(merge("run", *given, "--out", "flat", method="dare_linear", count=0))
    succeeded(merge("run", "--expert", "x=e0.safetensors", *given[2:], "--out", "local", method="dare_linear", count=0))
    check_equal(dense("stored"), dense("flat"))
    check_equal(dense("local"), dense("flat"))


def test_a_checkpoint_in_s3_survives_what_fails_and_what_is_killed(
    merge: Callable[..., Result], folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = store.uri("full")

    def there() -> set[str]:
        return {name.removeprefix("full/") for name in store.list("full/")}

    succeeded(merge("run", "--checkpoint", full, "--shard-gib", "0.0001"))
    names = there()
    assert "merge.partial.json" not in names
    assert len(names) > 4
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "finish", lambda _: (_ for _ in ()).throw(MergeError("no more room")))
        refused(merge("run", "--checkpoint", full, method="ties"), "no more room", status=1)
    assert "nothing to do" in succeeded(merge("run", "--checkpoint", full, "--shard-gib", "0.0001")), (
        "it is still whole"
    )

    class Killed(BaseException):
        pass

    closed = StoreWriter.close

    def killed(self: StoreWriter) -> None:
        closed(self)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "close", killed)
        patch.setattr(StoreWriter, "abort", lambda _: None)
        patch.setattr("merge.by_hand.checkpoints._StorePlace.abort", lambda _: None)
        patch.setattr("merge.by_hand.checkpoints._StorePlace.discard", lambda _: None)
        with pytest.raises(Killed):
            merge("run", "--checkpoint", full, method="ties")
    assert "merge.json" not in there()
    succeeded(merge("run", "--checkpoint", full, method="ties"))
    assert {name for name in there() if name.startswith("m")} == {"model.safetensors", "merge.json"}
    store.put("full/thesis.tex", b"...")
    refused(merge("run", "--checkpoint", full), "holds 'thesis.tex'")


def test_a_stored_tree_computes_only_what_changed(
    merge: Callable[..., Result], folder: Path, store: Store, base: PreparedBase
) -> None:
    said = succeeded(merge("run", "--store", "--out", "stored.safetensors", method="ties"))
    made = re.search(r"merge nodes: (\d+) made, 0 reused", said)
    assert made
    succeeded(merge("run", "--out", "flat.safetensors", method="ties"))
    check_equal(dense("stored.safetensors"), dense("flat.safetensors"))
    again = succeeded(merge("run", "--store", "--out", "stored.safetensors", method="ties"))
    assert "nothing to do" in again
    assert "merge nodes: 0 made" in succeeded(merge("run", "--store", "--out", "other.safetensors", method="ties"))
    assert Path("other.safetensors").read_bytes() == Path("stored.safetensors").read_bytes()
    assert "wrote stored" in succeeded(merge("run", "--out", "stored.safetensors", method="ties")), "another plan"
    succeeded(merge("run", "--store", "--out", "emr.safetensors", method="emr"))
    succeeded(merge("run", "--out", "flat.safetensors", method="emr"))
    check_equal(dense("emr.safetensors"), dense("flat.safetensors"))
    for at in range(4):
        stored, flat = (MaskReader(FileSource(f"{n}.e{at}.mask.safetensors")) for n in ("emr", "flat"))
        assert stored.scale == flat.scale
        assert stored.meta.unified_sha256 == file_sha256("emr.safetensors")
        assert all(torch.equal(stored.load(name), flat.load(name)) for name in SHAPES)


def test_random_methods_draw_the_same_flat_and_stored(merge: Callable[..., Result], store: Store) -> None:
    succeeded(merge("run", "--store", "--out", "stored.safetensors", method="dare_linear"))
    succeeded(merge("run", "--out", "flat.safetensors", method="dare_linear"))
    stored, flat = dense("stored.safetensors"), dense("flat.safetensors")
    for name in SHAPES:
        assert torch.equal(stored[name] != 0, flat[name] != 0)
        torch.testing.assert_close(stored[name], flat[name])


def test_s3_and_the_registry(merge: Callable[..., Result], folder: Path, store: Store) -> None:
    name = store.prefix.replace("/", "-")
    out, full = store.uri("merged.safetensors"), store.uri("full")
    said = succeeded(merge("run", "--out", out, "--checkpoint", full, "--register", name))
    version = f"models:/{name}/1"
    assert f"registered as {version}; prompts stand in '{{prompt}}\\n'" in said, "the base has no chat template"
    registered = versions.find_version(name, 1)
    assert registered
    assert versions.told(registered.source)["prompt_wrapper"] == "{prompt}\n"
    shown = succeeded(
        merge("plan", "--expert", f"x={version}", "--out", store.uri("more"), "--register", f"{name}-more", count=0)
    )
    assert f"registered: {name}-more, prompts stand in '{{prompt}}\\n'" in shown
    mlflow = runs.client()
    experiment = mlflow.get_experiment_by_name(name)
    assert experiment is not None
    again = succeeded(merge("run", "--out", out, "--checkpoint", full, "--register", name))
    assert len(mlflow.search_runs([experiment.experiment_id])) == 1, "no run for a version that is there"
    assert f"registered as {version} (it was already)" in again
    assert again.count("nothing to do") == 2
    mlflow.create_registered_model(f"{name}-full")
    mlflow.create_model_version(f"{name}-full", full, tags={"factory.checkpoint_uri": full})
    result = merge("run", "--expert", f"x=models:/{name}-full/1", "--out", "m.safetensors", count=0)
    succeeded(result)
    for tensor, delta in expected_mean(folder).items():
        assert torch.equal(dense("m.safetensors")[tensor], delta)
    mlflow.create_registered_model(f"{name}-task", tags={"factory.task": "another"})
    refused(merge("run", "--out", out, "--register", f"{name}-task"), "registered for the task 'another'")
    sources = {"a": out, "b": full, "c": version, "d": f"models:/{name}@champion"}
    for source in sources:
        if source in "ab":
            result = merge("run", "--expert", f"x={sources[source]}", "--out", "m.safetensors", count=0)
            succeeded(result)
            found = dense("m.safetensors")
            for tensor, delta in expected_mean(folder).items():
                assert torch.equal(found[tensor], delta), source
    succeeded(merge("run", "--expert", f"x={version}", "--out", "m.safetensors", count=0))
    check_equal(dense("m.safetensors"), expected_mean(folder))
    refused(
        merge("run", "--expert", f"x={sources['d']}", "--expert", f"y={version}", "--out", "m", count=0), "same one"
    )
    refused(
        merge("run", "--expert", f"x=models:/{name}/9", "--out", "m", count=0), f"expert 'x'.*no version 9 of '{name}'"
    )
