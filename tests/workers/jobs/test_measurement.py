"""Fisher diagonals and Gram matrices against plain autograd and explicit products, for every kind of expert."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.artifacts.manifests import Recipe
from infra.errors import AdapterError, ConfigError
from infra.store.layout import rows_name
from infra.store.s3 import FileRef, Store
from infra.store.source import StoreSource
from tests.workers.tiny import WRAPPER, tiny_encoder, tiny_encoder_tokenizer, tiny_model, tiny_tokenizer
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, LowRank, save_adapter
from workers.base.load import load_classifier, load_classifier_tokenizer, load_model, load_tokenizer
from workers.base.prepare import PreparedBase, prepare_base, upload_base
from workers.jobs.measurement import MeasurementJob, TrainingRows, make_measurement, spaced
from workers.measuring.fisher import FLOOR, FisherReader, fisher_diagonal
from workers.measuring.gram import GramReader, gram_matrices, gram_means
from workers.scoring.classification import encode_text, head_state, set_head
from workers.tensors.source import FileSource
from workers.text.prompt import PromptSpec, encode_example
from workers.text.rows import Row, fingerprint, rows_to_jsonl
from workers.training.in_place import apply_delta

LAYER = "model.layers.{}."
SPARSE = [LAYER.format(0) + "self_attn.q_proj.weight", LAYER.format(1) + "mlp.up_proj.weight"]
WHOLE = [
    LAYER.format(layer) + name
    for layer in (0, 1)
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
]
BERT = "bert.encoder.layer.{}.attention.self.{}.weight"
BERT_NAMES = [BERT.format(layer, name) for layer in (0, 1) for name in ("query", "key")]
ROUNDING = 2**-8 + 1e-3
"""Of a value to bf16, and what the rounding of all values does to their norm."""
LABELS = ("no", "perhaps", "yes")
PROMPT = PromptSpec("{input}?", WRAPPER)
PLAIN = PromptSpec(wrapper="{prompt}", max_input_tokens=20)
ROWS = [
    Row(str(at), "".join(f"w{at + i}" for i in range(1 + at % 4)), (f"w{at}w3" if at % 2 else "w1",)) for at in range(9)
]
LABELLED = [Row(row.id, row.input, (LABELS[at % 3],)) for at, row in enumerate(ROWS)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def change(kind: str, model: nn.Module) -> dict[str, SparseTensor | LowRank]:
    """A change of this kind of the model's weights."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, SparseTensor | LowRank] = {}
    own = shapes(model)
    names = BERT_NAMES if BERT_NAMES[0] in own else (SPARSE if kind == "sparse" else WHOLE)
    for name in names:
        rows, columns = own[name]
        count = rows * columns
        if kind == "lora":
            factors = [torch.randn(*shape, generator=generator) * 0.3 for shape in ((2, columns), (rows, 2))]
            tensors[name] = LowRank(factors[0], factors[1], 0.5)
        else:
            kept = count if kind == "full" else count // 5
            at = torch.randperm(count, generator=generator)[:kept].sort().values
            tensors[name] = SparseTensor((rows, columns), at, torch.randn(kept, generator=generator) * 0.2)
    return tensors


def causal_loss(model: Any, tokenizer: Any, row: Row) -> Tensor:
    """-log p(answer | input), from the model's own logits."""
    example = encode_example(tokenizer, PROMPT, row, max_target_tokens=8)
    ids = torch.tensor([example.input_ids])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    chosen = logits.gather(1, ids[0, 1:, None])[:, 0]
    return -chosen[example.target_start - 1 :].sum()


def label_loss(model: Any, tokenizer: Any, row: Row) -> Tensor:
    ids = torch.tensor([encode_text(tokenizer, PLAIN, row)])
    return -model(input_ids=ids).logits[0].log_softmax(-1)[LABELS.index(row.targets[0])]


def squared_gradients(model: Any, losses: Sequence[Callable[[], Tensor]], names: list[str]) -> dict[str, Tensor]:
    """By definition: dense, row by row."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    weights = [parameters[name] for name in names]
    rows = [torch.autograd.grad(loss(), weights) for loss in losses]
    return {name: torch.stack([row[at] for row in rows]).square().mean(0) for at, name in enumerate(names)}


def input_products(
    model: Any,
    tokenizer: Any,
    sequences: list[tuple[int, ...]],
    names: list[str],
    held: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """By definition: of one padded batch, the rows of x at padding (and where `held` does not hold) left out, as one
    float64 product."""
    width = max(map(len, sequences))
    tokens = torch.full((len(sequences), width), tokenizer.pad_token_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for at, ids in enumerate(sequences):
        tokens[at, : len(ids)], mask[at, : len(ids)] = torch.tensor(ids), 1
    assert int(mask.min()) == 0
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name.removesuffix(".weight")].register_forward_pre_hook(
            lambda module, inputs, name=name: seen.__setitem__(name, inputs[0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    chosen = mask.bool()
    for row, part in zip(chosen, held or (), strict=held is not None):
        row[: len(part)] &= part
    kept = {name: x[chosen].double() for name, x in seen.items()}
    return {name: x.t() @ x for name, x in kept.items()}


class Published:
    """A base, rows and one expert in the store."""

    def __init__(self, store: Store, folder: Path, kind: str, classifies: bool = False) -> None:
        self.store, self.classifies = store, classifies
        checkpoint = folder / "checkpoint"
        (tiny_encoder() if classifies else tiny_model()).to(torch.bfloat16).save_pretrained(checkpoint)
        (tiny_encoder_tokenizer() if classifies else tiny_tokenizer()).save_pretrained(checkpoint)
        self.base: PreparedBase = prepare_base(f"path:{checkpoint}", folder / "made")
        upload_base(store, self.base)
        self.rows = LABELLED if classifies else ROWS
        store.put_if_absent(rows_name(fingerprint(self.rows)), rows_to_jsonl(self.rows))
        self.file = folder / "adapter"
        model, head = self.plain(), None
        if classifies:
            head = {name: torch.randn_like(tensor) for name, tensor in head_state(model).items()}
        save_adapter(
            self.file, change(kind, model), AdapterMeta(self.base.sha256, "sparse" if kind == "sparse" else kind),
            value_dtype=torch.float32, head=head,
        )  # fmt: skip
        self.adapter: FileRef = store.upload_file("objects/adapter", self.file)
        self.reader = AdapterReader(FileSource(self.file))

    def plain(self) -> Any:
        if self.classifies:
            return load_classifier(self.base.path, len(LABELS), torch.float32)
        return load_model(self.base.path, torch.float32)

    def model(self) -> tuple[Any, Any]:
        """Base and expert together, and the tokenizer."""
        model = self.plain()
        apply_delta(model, self.reader)
        if not self.classifies:
            return model, load_tokenizer(self.base.path)
        set_head(model, {name: self.reader.load_head(name) for name in self.reader.head_names})
        return model, load_classifier_tokenizer(self.base.path)

    def job(self, kind: str, rows: int = 100) -> MeasurementJob:
        return MeasurementJob(
            task="task", recipe=Recipe(kind, 1, {"rows": rows}, ("e" * 64,)),
            base_sha256=self.base.sha256, adapter=self.adapter, expert_key="e" * 64, expert_digest="d" * 64,
            rows=TrainingRows(
                rows_name(fingerprint(self.rows)), rows, PLAIN if self.classifies else PROMPT, 8,
                LABELS if self.classifies else None,
            ),
            provenance={"data": {"source": "here", "license": "mit"}},
        )  # fmt: skip

    def source(self, manifest: Any, kind: str) -> StoreSource:
        assert list(manifest.files) == [kind]
        return StoreSource(self.store, manifest.files[kind].name)


CASES = [("sparse", False, 1), ("lora", False, 1), ("full", False, 2), ("sparse", True, 1)]


@pytest.mark.parametrize(("kind", "classifies", "devices"), CASES)
def test_an_expert_is_measured(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, classifies: bool, devices: int
) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    made = Published(store, tmp_path, kind, classifies)
    names = made.reader.names
    loss = label_loss if classifies else causal_loss

    manifest, new = make_measurement(store, made.job("fisher"), ["cpu"] * devices, 1)
    assert new
    assert manifest.inputs == {"e" * 64: "d" * 64}
    assert manifest.meta["rows"] == len(ROWS)
    assert manifest.meta["data"] == {"source": "here", "license": "mit"}
    fisher = FisherReader(made.source(manifest, "fisher"))
    assert (fisher.meta.base_sha256, fisher.meta.adapter_sha256) == (made.base.sha256, made.adapter.sha256)
    assert fisher.names == names
    model, tokenizer = made.model()
    wanted = squared_gradients(model, [lambda row=row: loss(model, tokenizer, row) for row in made.rows], names)
    found = {name: made.reader.load(name).indices for name in names}
    kept = {name: wanted[name].view(-1)[found[name]] for name in names}
    norm = float(torch.cat(list(kept.values())).double().norm())
    assert fisher.norm == pytest.approx(norm, rel=1e-3)
    for name in names:
        expected = (kept[name] / norm).clamp_min(FLOOR)
        assert torch.allclose(fisher.load(name), expected, rtol=ROUNDING, atol=0)
        assert bool((fisher.load(name) > FLOOR).any())

    gram = GramReader(made.source(make_measurement(store, made.job("gram"), ["cpu"] * devices, 1)[0], "gram"))
    assert gram.names == names
    if classifies:
        texts = [tuple(encode_text(tokenizer, PLAIN, row)) for row in made.rows]
    else:
        texts = [encode_example(tokenizer, PROMPT, row, max_target_tokens=8).input_ids for row in made.rows]
    for name, product in input_products(model, tokenizer, texts, names).items():
        assert torch.allclose(gram.load(name).double(), product, rtol=1e-5, atol=1e-5 * float(product.diagonal().max()))

    lengths = [len(text) for text in texts]
    for means in ("gram_tokens",) if classifies else ("gram_tokens", "gram_answers"):
        manifest_of_means, _ = make_measurement(store, made.job(means), ["cpu"] * devices, 1)
        gram = GramReader(made.source(manifest_of_means, means), means)
        starts = [0] * len(texts)
        if means == "gram_answers":
            examples = [encode_example(tokenizer, PROMPT, row, max_target_tokens=8) for row in made.rows]
            starts = [max(1, example.target_start) - 1 for example in examples]
        held = [torch.arange(length) >= start for start, length in zip(starts, lengths, strict=True)]
        if means == "gram_answers":
            for part in held:
                part[-1] = False
        count = sum(int(part.sum()) for part in held)
        products = input_products(model, tokenizer, texts, names, held)
        for name, product in products.items():
            expected = product / count
            atol = 5e-3 * float(expected.diagonal().max())
            assert torch.allclose(gram.load(name).double(), expected, rtol=5e-3, atol=atol)
    if classifies:
        with pytest.raises(ConfigError, match="a label is no text"):
            make_measurement(store, made.job("gram_answers"), ["cpu"] * devices, 1)

    before = list(store.list("objects/"))
    again = make_measurement(store, made.job("fisher"), ["cpu"] * devices, 1)
    assert again == (manifest, False)
    assert list(store.list("objects/")) == before


def test_few_rows_are_spaced_and_errors_name_the_expert(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    made = Published(store, tmp_path, "sparse")
    manifest, _ = make_measurement(store, made.job("fisher", rows=4), ["cpu"], 1)
    assert manifest.meta["rows"] == 4
    model, tokenizer = made.model()
    chosen = [made.rows[at] for at in (0, 2, 4, 6)]
    wanted = squared_gradients(model, [lambda row=row: causal_loss(model, tokenizer, row) for row in chosen], SPARSE)
    fisher = FisherReader(made.source(manifest, "fisher"))
    for name in SPARSE:
        kept = wanted[name].view(-1)[made.reader.load(name).indices]
        assert torch.allclose(fisher.load(name) * fisher.norm, kept, rtol=ROUNDING, atol=2e-6 * fisher.norm)
    norms = {"model.norm.weight": SparseTensor((32,), torch.tensor([1]), torch.tensor([1.0]))}
    save_adapter(made.file, norms, AdapterMeta(made.base.sha256))
    made.adapter = store.upload_file("objects/other", made.file)
    for kind, error in (("fisher", ConfigError), ("gram", AdapterError)):
        job = made.job(kind, rows=2)
        with pytest.raises(error, match=f"{kind} of the expert 'task': "):
            make_measurement(store, job, ["cpu"], 1)
    with pytest.raises(ConfigError, match="accepted: fisher, gram, gram_tokens, gram_answers"):
        made.job("hessian")
    with pytest.raises(ConfigError, match="0 rows"):
        made.job("gram", rows=0)


# -- without a store --


class Net(nn.Module):
    """q and k share an input, v has an equal one of its own, twice is used twice, never is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(3, 3, bias=False) for _ in range(3))
        self.twice, self.never = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) + self.k(x) + self.v(x.clone())
        return self.twice(self.twice(y).relu())


NET = ["k.weight", "never.weight", "q.weight", "twice.weight", "v.weight"]


@pytest.mark.parametrize("limit", [2**31, 72 * 2, 1])
def test_shared_inputs_shares_of_memory_and_modules_that_are_used_twice_or_never(limit: int) -> None:
    model = Net()
    inputs = [torch.randint(-2, 3, (1, length, 3)).float() for length in (2, 5, 1)]
    runs: list[int] = []

    def run(at: int) -> None:
        runs.append(at)
        model(inputs[at])

    found = dict(
        (tuple(names), gram)
        for names, gram in gram_matrices(model, [lambda at=at: run(at) for at in range(3)], NET, limit)
    )
    assert sorted(found) == [("k.weight", "q.weight"), ("twice.weight",), ("v.weight",)]
    x = torch.cat([part[0] for part in inputs])
    assert torch.equal(found["k.weight", "q.weight"], (x.t() @ x).double())
    assert torch.equal(found["v.weight",], (x.t() @ x).double())
    y = (model.q(x) + model.k(x) + model.v(x)).detach()
    z = torch.cat([y, model.twice(y).relu().detach()])
    assert torch.allclose(found["twice.weight",].float(), z.t() @ z, rtol=1e-5)
    assert found["twice.weight",].dtype == torch.float64
    assert len(runs) == 1 + 3 * {2**31: 1, 144: 2, 1: 4}[limit]
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("limit", [2**31, 36, 1])
def test_means_are_sums_over_the_tokens_that_count(limit: int) -> None:
    model = Net()
    inputs = [torch.randint(-2, 3, (1, length, 3)).float() for length in (2, 5, 1)]
    held = [torch.tensor([False, True]), torch.tensor([True, False, True, True, False]), torch.tensor([False])]
    passes = [lambda part=part: model(part) for part in inputs]
    for parts, count in (([], 8), (held, 4)):
        sums = {n: g for names, g in gram_matrices(model, passes, ["q.weight", "twice.weight"]) for n in names}
        means = {
            n: g for names, g in gram_means(model, passes, ["q.weight", "twice.weight"], parts, limit) for n in names
        }
        x = torch.cat([x[0][part] for x, part in zip(inputs, parts or [slice(None)] * 3, strict=True)])
        assert torch.allclose(means["q.weight"], x.t() @ x / count)
        assert means["twice.weight"].dtype == torch.float32
        if not parts:  # a module that is used twice has seen twice the tokens
            assert torch.allclose(means["twice.weight"], (sums["twice.weight"] / 16).float(), rtol=1e-5)
    with pytest.raises(ConfigError, match=r"q\.weight is not shown each token once"):
        list(gram_means(model, passes, ["q.weight"], [torch.ones(3, dtype=torch.bool)] * 3))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_only_the_support_of_each_weight_is_returned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
    x = torch.randn(1, 4, 6)
    supports: dict[str, Tensor | None] = {"0.weight": torch.tensor([0, 7, 35]), "2.weight": None}

    def loss() -> Tensor:
        return model(x).square().sum()

    found = fisher_diagonal(model, [loss], supports)
    wanted = squared_gradients(model, [loss], list(supports))
    assert torch.allclose(found["0.weight"], wanted["0.weight"].view(-1)[[0, 7, 35]], rtol=1e-4)
    assert torch.allclose(found["2.weight"], wanted["2.weight"].view(-1), rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["4.weight", "0.bias", "1.weight"])
def test_only_weights_of_linear_modules(name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ConfigError, match=name.removesuffix(".weight")):
        fisher_diagonal(model, [], {name: None})
    with pytest.raises(ConfigError, match=name.removesuffix(".weight")):
        list(gram_matrices(model, [], [name]))


def test_rows_are_evenly_spaced() -> None:
    assert [row.id for row in spaced(ROWS, 3)] == ["0", "3", "6"]
    assert [row.id for row in spaced(ROWS, 8)] == ["0", "1", "2", "3", "4", "5", "6", "7"]
    assert spaced(ROWS, 9) == spaced(ROWS, 100) == ROWS
