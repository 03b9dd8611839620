"""How much an expert's positions and inputs matter, for merges that weigh by it: Fisher diagonal and Gram matrices.

Both are measured at W + δ in fp32, on training rows of the expert's own task, with its prompt and objective:

- ``fisher``: the diagonal of the empirical Fisher matrix (arXiv 2111.09832, section 3.2), the mean over rows of
  (∂ log p(answer | input) / ∂w)², on the adapter's support only; for LoRA and full experts on every adapted position.
- ``gram``: of each adapted linear weight the sum of xᵀx over all tokens of all rows, x being the module's input
  (RegMean, arXiv 2212.09849, equation 2).

Rows go through the model one at a time: a squared gradient is exactly that row's, and nothing is ever padded. An
importance is an artifact of its own beside the expert: asking for a Fisher candidate later retrains no expert. Files
are `workers.adapters.importance_file`. Not covered: weights that are not those of linear modules, and, for ``fisher``,
modules that are used several times in one pass.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.artifacts.manifests import Manifest, Recipe, find, publish
from infra.engine.step import Made, Place
from infra.environment import environment
from infra.errors import AdapterError, ConfigError, ExpertError
from infra.store.s3 import FileRef, Store
from workers.adapters.importance_file import FisherWriter, GramWriter, ImportanceMeta
from workers.adapters.writer import AdapterReader, FileSource, check_base
from workers.base.cache import cache_dir
from workers.base.hooks import check_module, swap_forward
from workers.base.load import load_classifier, load_classifier_tokenizer, load_model, load_tokenizer
from workers.base.modules import Target
from workers.base.prepare import fetch_base
from workers.masks.criteria import Loss, score_scan
from workers.scoring.classification import Classification, encode_labelled, set_head
from workers.text.prompt import PromptSpec, encode_example
from workers.text.rows import Row, load_rows
from workers.training.devices import spread
from workers.training.in_place import apply_delta
from workers.training.objectives import Objective, language_modelling

IMPORTANCE_VERSION = 1
"""Part of every importance's key: raise it whenever the same inputs would give other numbers."""
KINDS = ("fisher", "gram")
GRAM_BYTES = 2**31
"""Memory of the Gram matrices that are summed at a time; for more of them the rows go through the model again."""


@dataclass(frozen=True)
class ImportanceJob:
    """Measure one expert; only names and numbers, no tensors and no paths."""

    task: str
    recipe: Recipe
    """Its kind, fisher or gram, says what is measured."""
    base_sha256: str
    adapter: FileRef
    """The expert's adapter file."""
    expert_key: str
    expert_digest: str
    train_rows: str
    """Object name of the expert's training rows."""
    rows: int
    """Most rows that are measured, evenly spaced over the training rows."""
    prompt: PromptSpec
    max_target_tokens: int
    labels: tuple[str, ...] | None
    """Labels of a classification task; None for language modelling."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says about base and data (name, source, licence); part of no key."""

    def __post_init__(self) -> None:
        if self.recipe.kind not in KINDS:
            raise ConfigError(f"importance {self.recipe.kind!r}; accepted: {', '.join(KINDS)}")
        if self.rows < 1:
            raise ConfigError(f"{self.recipe.kind} of {self.rows} rows: accepted is 1 or more")

    def __call__(self, store: Store, place: Place) -> Made:
        return (make_importance(store, self, place.devices, place.threads),)


def make_importance(store: Store, job: ImportanceJob, devices: Sequence[str], threads: int) -> tuple[Manifest, bool]:
    """Measure, save and publish: the manifest's file is labelled with the kind, its input is the expert.

    Returns the manifest and whether this call made it.

    Raises:
        AdapterError: the adapter is damaged or of another base, or a measured value is not finite.
        ConfigError, ExpertError: the model cannot be measured.
        StoreError, BaseModelError: inputs cannot be read.
    """
    consumed = {job.expert_key: job.expert_digest}
    found = find(store, job.recipe.key, consumed)
    if found is not None:  # made meanwhile, or by a try before this one
        return found, False
    start = time.perf_counter()
    torch.set_num_threads(threads)
    kind = job.recipe.kind
    with tempfile.TemporaryDirectory(prefix="factory-importance-") as folder:
        local = Path(folder) / "adapter.safetensors"
        store.download_file(job.adapter, local)
        reader = AdapterReader(FileSource(local))
        check_base(reader, job.base_sha256)
        file = Path(folder) / f"{kind}.safetensors"
        try:
            rows = _measure(store, job, reader, devices, file)
        except (AdapterError, ConfigError, ExpertError) as error:
            raise type(error)(f"{kind} of the expert {job.task!r}: {error}") from error
        finally:
            if devices[0].startswith("cuda"):
                torch.cuda.empty_cache()
        meta = {
            "task": job.task, "rows": rows, "bytes": file.stat().st_size, "device": ", ".join(devices),
            "seconds": time.perf_counter() - start, **job.provenance, "environment": environment(devices),
        }  # fmt: skip
        return publish(store, job.recipe, {kind: file}, consumed, meta)


def _measure(store: Store, job: ImportanceJob, reader: AdapterReader, devices: Sequence[str], file: Path) -> int:
    """Write the importance to `file`; returns how many rows it was measured on."""
    path = fetch_base(store, job.base_sha256, cache_dir())
    labels = job.labels
    objective: Objective
    tokenizer: Any
    if labels is None:
        tokenizer = load_tokenizer(path)
        model = spread(load_model(path, torch.float32), devices)
        objective = language_modelling(model, int(tokenizer.pad_token_id))
    else:
        tokenizer = load_classifier_tokenizer(path)
        model = spread(load_classifier(path, len(labels), torch.float32), devices)
        set_head(model, {name: reader.load_head(name) for name in reader.head_names})
        objective = Classification(int(tokenizer.pad_token_id))
    apply_delta(model, reader)
    rows = spaced(load_rows(store, job.train_rows), job.rows)
    if labels is None:
        examples: list[Any] = [
            encode_example(tokenizer, job.prompt, row, max_target_tokens=job.max_target_tokens) for row in rows
        ]
    else:
        examples = [encode_labelled(tokenizer, job.prompt, row, labels) for row in rows]
    losses = [_loss_of(model, objective, example) for example in examples]
    about = ImportanceMeta(job.base_sha256, job.adapter.sha256, len(rows))
    if job.recipe.kind == "fisher":
        with FisherWriter(file, about, reader.names) as fisher:
            diagonal = fisher_diagonal(model, losses, {name: positions(reader, name) for name in reader.names})
            for name in reader.names:
                fisher.add(name, diagonal.pop(name))
            fisher.close()
    else:
        modules = dict(model.named_modules())
        linear = [n for n in reader.names if isinstance(modules.get(n.removesuffix(".weight")), nn.Linear)]
        with GramWriter(file, about, linear) as gram:
            for names, matrix in gram_matrices(model, losses, linear):
                gram.add(names, matrix)
            gram.close()
    return len(rows)


def spaced(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` of `rows`, evenly spaced, in order: every part of rows that are sorted is among them."""
    kept = min(count, len(rows))
    return [rows[at * len(rows) // kept] for at in range(kept)]


def positions(reader: AdapterReader, name: str) -> Tensor | None:
    """Flat positions int64 [n] of a weight's support; None for every position."""
    if reader.count(name) == torch.Size(reader.shape(name)).numel():
        return None
    return reader.load(name).indices


def _loss_of(model: Any, objective: Objective, example: Any) -> Loss:
    return lambda: objective.loss_sum(model, [example])


def _linear(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The plain linear modules whose weights have these names, by weight; ``ConfigError`` if one is none."""
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        owner = name.removesuffix(".weight")
        if owner == name or owner not in modules:
            raise ConfigError(f"{name} is not the weight of a linear module: its importance cannot be measured")
        found[name] = check_module(owner, modules[owner])
    return found


def fisher_diagonal(
    model: nn.Module, losses: Sequence[Loss], supports: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """The mean over `losses` (each of one row) of the squared gradient, per weight on its support.

    `supports`: parameter name to sorted flat positions int64 [n], None for all. Returns fp32 [n] on the weights'
    devices. Takes 4 bytes for each position, 4 for its place, and one layer's dense gradient at a time.
    """
    modules = _linear(model, supports)
    targets = {name.removesuffix(".weight"): Target(module) for name, module in modules.items()}
    places, sums = {}, {}
    for name, indices in supports.items():
        weight = modules[name].weight
        small = torch.int32 if weight.numel() < 2**31 else torch.int64
        places[name] = None if indices is None else indices.to(weight.device, small)
        count = weight.numel() if indices is None else indices.numel()
        sums[name] = torch.zeros(count, dtype=torch.float32, device=weight.device)

    def add(module: str, gradient: Tensor) -> None:
        """`gradient`: absolute values [out, in]; their squares are those of the gradient."""
        place, total = places[f"{module}.weight"], sums[f"{module}.weight"]
        found = gradient.view(-1) if place is None else gradient.view(-1).index_select(0, place)
        total.addcmul_(found, found)

    for loss in losses:
        score_scan(model, targets, "gradient", [loss])(add)
    return {name: total.div_(len(losses)) for name, total in sums.items()}


@torch.no_grad()
def gram_matrices(
    model: nn.Module, passes: Sequence[Callable[[], Any]], names: Sequence[str], limit: int = GRAM_BYTES
) -> Iterator[tuple[list[str], Tensor]]:
    """(weights that share one input, sum of xᵀx [in, in] in float64) over all tokens of all `passes`.

    Every pass runs the model forward on inputs without padding. Products are fp32, sums float64; the matrices that
    are summed at a time take at most `limit` bytes (one at least), and the passes run once for each such share. Weights
    whose module no pass uses are left out.
    """
    modules = _linear(model, names)
    pending = _shared_inputs(passes[0], modules)
    while pending:
        share, left = [pending.pop(0)], limit
        left -= _bytes(modules, share[0])
        while pending and _bytes(modules, pending[0]) <= left:
            left -= _bytes(modules, pending[0])
            share.append(pending.pop(0))
        sums: dict[str, Tensor] = {}

        def add(name: str, x: Tensor, sums: dict[str, Tensor] = sums) -> None:
            flat = x.reshape(-1, x.shape[-1]).float()
            product = flat.t() @ flat
            if name in sums:
                sums[name].add_(product)
            else:
                sums[name] = product.double()

        with _Observed({group[0]: modules[group[0]] for group in share}, add):
            for run in passes:
                run()
        for group in share:
            if group[0] in sums:
                yield group, sums.pop(group[0])


def _bytes(modules: Mapping[str, nn.Linear], group: Sequence[str]) -> int:
    return int(modules[group[0]].in_features) ** 2 * 8


def _shared_inputs(run: Callable[[], Any], modules: Mapping[str, nn.Linear]) -> list[list[str]]:
    """The names in groups whose modules get the very same tensors as inputs in one pass."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}  # the tensors live, so that their ids are unique
    with _Observed(modules, lambda name, x: seen[name].append(x)):
        run()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, inputs in seen.items():
        groups.setdefault(tuple(map(id, inputs)) or (name,), []).append(name)
    return list(groups.values())


class _Observed:
    """While entered, `observe(name, input)` is called at every use of the modules."""

    def __init__(self, modules: Mapping[str, nn.Linear], observe: Callable[[str, Tensor], None]) -> None:
        self._modules, self._observe = modules, observe
        self._undo: list[Callable[[], None]] = []

    def _forward(self, name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            self._observe(name, x)
            return nn.functional.linear(x, module.weight, module.bias)

        return forward

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            self._undo.append(swap_forward(module, self._forward(name, module)))

    def __exit__(self, *error: object) -> None:
        while self._undo:
            self._undo.pop()()
