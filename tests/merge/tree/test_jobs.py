"""Merge jobs on a real store: the tree gives what one flat merge gives, and only what changed is made again."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge.tree.jobs
from infra.artifacts.claims import Busy, Claim
from infra.artifacts.manifests import find, peek
from infra.engine.step import Answer, Place, Step
from infra.engine.threads import Threads
from infra.errors import AdapterError, StoreError
from infra.store.s3 import Store
from infra.store.source import StoreSource
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.methods.catalogue import METHODS
from merge.methods.specs import Candidate, plan_reductions
from merge.methods.spectral import spectrum
from merge.tree.export import export_checkpoint, export_job
from merge.tree.jobs import ChildRef, NodeJob, Ref, RootJob, TaskMaskJob
from merge.tree.keys import merged_recipe
from merge.tree.local import Stored, merge_stored
from merge.tree.reduce import ExpertChild, Fused, flat_merge
from merge.tree.reduction import MASKS, NODES
from merge.tree.trie import build_tree, path_to, post_order
from tests.workers.tiny import tiny_model, tiny_tokenizer
from workers.adapters.support import SparseTensor
from workers.adapters.task_mask import MaskedAdapter, MaskReader
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.base.prepare import prepare_base, upload_base
from workers.measuring.file import MeasuredOn
from workers.measuring.fisher import FisherWriter
from workers.measuring.gram import GramWriter
from workers.tensors.source import FileSource

BASE = "b" * 64
SHAPES = {"l0.v.weight": (8, 12), "l0.up.weight": (16, 12), "l1.v.weight": (8, 16)}
NAMES = [f"task{number}" for number in range(7)]
EVEN = dict.fromkeys(NAMES, 1 / 8) | {NAMES[0]: 1 / 4}
CANDIDATES = (
    Candidate("mean"),
    Candidate("task_arithmetic", {"lambda": 0.5}),
    Candidate("ties", {"density": 0.5}),
    Candidate("weighted_mean", {}, EVEN),
    Candidate("dare_linear", {"density": 0.5, "seed": 3}),
    Candidate("magmax"),
    Candidate("consensus"),
    Candidate("sce", {"density": 0.5}),
    Candidate("fisher_on_support"),
    Candidate("regmean"),
    Candidate("emr"),
    Candidate("spectral_power", {"p": -0.5}),
    Candidate("iso_c"),
    Candidate("wudi", {"ridge": 0.5}),
    Candidate("tsv_m"),
    Candidate("iso_cts", {"common_share": 0.5, "trim": 0.5}),
    Candidate("svc"),
    Candidate("knots"),
)


class Recording(Threads):
    """Notes the jobs that were done."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.jobs: list[Any] = []

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        answer = await super().run(step, claim)
        if not isinstance(answer, Busy):
            self.jobs.append(step.call)
        return answer


def do(store: Store, job: Any) -> list[bool]:
    """Run a job again: of each of its artifacts, whether it was made."""
    return [made for _, made in job(store, Place())]


class Experts:
    """Experts of random supports and dyadic values, with Fisher and Gram files, on disk and in the store."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.paths: dict[str, Path] = {}
        self.refs: dict[str, Ref] = {}
        self.measured: dict[tuple[str, str], Ref] = {}
        self.measured_paths: dict[tuple[str, str], Path] = {}
        weights = folder / "model.safetensors"
        g = torch.Generator().manual_seed(99)
        save_file({name: torch.randn(shape, generator=g).bfloat16() for name, shape in SHAPES.items()}, weights)
        store.upload_file("bases/b/model.safetensors", weights)

    def make(self, name: str, seed: int, dyadic: bool = True) -> None:
        g = torch.Generator().manual_seed(seed)
        path = self.folder / f"{name}-{seed}.safetensors"
        tensors = {}
        for tensor, shape in SHAPES.items():
            numel = shape[0] * shape[1]
            indices = torch.randperm(numel, generator=g)[: numel // 3].sort().values
            values = torch.randint(1, 33, (indices.numel(),), generator=g) / 64
            values *= torch.where(values * 64 % 2 == 0, 1, -1)
            tensors[tensor] = SparseTensor(shape, indices, values if dyadic else values * torch.rand(1, generator=g))
        save_adapter(path, tensors, AdapterMeta(BASE), torch.float32)
        self.paths[name], self.refs[name] = path, self.put(path, f"expert {seed}")
        about = MeasuredOn(BASE, hashlib.sha256(path.read_bytes()).hexdigest(), 4)
        fisher, gram = self.folder / f"{name}-{seed}.fisher", self.folder / f"{name}-{seed}.gram"
        with FisherWriter(fisher, about, list(tensors)) as writer:
            for tensor, delta in tensors.items():
                writer.add(tensor, torch.rand(delta.indices.numel(), generator=g) + 0.1)
            writer.close()
        with GramWriter(gram, about, list(tensors)) as grams:
            for tensor, shape in SHAPES.items():
                x = torch.randn(32, shape[1], generator=g)
                grams.add([tensor], x.T @ x)
            grams.close()
        for kind, file in (("fisher", fisher), ("gram", gram)):
            self.measured[name, kind], self.measured_paths[name, kind] = self.put(file, f"{kind} {seed}"), file

    def put(self, path: Path, what: str) -> Ref:
        key = hashlib.sha256(what.encode()).hexdigest()
        file = self.store.upload_file(f"objects/{key}/1/file", path)
        return Ref(key, file.sha256, (file,))

    def merge(
        self, names: Sequence[str], candidates: Sequence[Candidate], fused: Fused | None = None
    ) -> tuple[Stored, list[Any]]:
        """Merge with all candidates; returns what there is and the jobs that were run."""
        workers = Recording(self.store, {"node": 2})
        return self.stored(workers, names, candidates, fused), workers.jobs

    def stored(
        self, workers: Threads, names: Sequence[str], candidates: Sequence[Candidate], fused: Fused | None = None,
        expiry_s: float = 60.0,
    ) -> Stored:  # fmt: skip
        """The same by these workers."""
        refs = {name: self.refs[name] for name in names}
        weights = "bases/b/model.safetensors"
        return merge_stored(
            self.store, candidates, refs, 2, BASE, weights, self.measured, fused or {}, workers, expiry_s
        )  # fmt: skip

    def flat(self, names: Sequence[str], candidate: Candidate) -> AdapterReader:
        kind = next((r.spec.measurement for r in plan_reductions([candidate], len(names)) if r.spec.measurement), None)
        children = [
            ExpertChild(
                name,
                AdapterDelta(FileSource(self.paths[name]), name, self.refs[name].key),
                FileSource(self.measured_paths[name, kind]) if kind else None,
            )
            for name in names
        ]
        out = self.folder / f"flat-{candidate.method}.safetensors"
        flat_merge(children, [candidate], lambda _: AdapterWriter(out), BASE, scratch=self.folder)
        return AdapterReader(FileSource(out))

    def merged(self, schedule: Stored, candidate: Candidate) -> AdapterReader:
        return AdapterReader(StoreSource(self.store, schedule.merged[candidate].files["adapter"].name))


@pytest.fixture
def experts(store: Store, tmp_path: Path) -> Experts:
    made = Experts(store, tmp_path)
    for number, name in enumerate(NAMES):
        made.make(name, number)
    return made


def labels(jobs: Sequence[Any]) -> Counter[str]:
    return Counter(job.label for job in jobs if isinstance(job, NodeJob | RootJob))


def path_labels(names: Sequence[str], name: str) -> Counter[str]:
    return Counter(node.label for node in path_to(build_tree(names, 2), name))


def changed(before: Sequence[str], after: Sequence[str]) -> Counter[str]:
    """Labels of nodes that another set of experts changes: the root, and inner nodes that were none before."""
    *old, _ = post_order(build_tree(before, 2))
    *inner, root = post_order(build_tree(after, 2))
    return Counter([root.label, *(node.label for node in inner if node not in old)])


def test_the_tree_gives_what_a_flat_merge_gives_and_a_second_run_makes_nothing(experts: Experts) -> None:
    schedule, _ = experts.merge(NAMES, CANDIDATES)
    exact = {"mean", "task_arithmetic", "ties", "weighted_mean", "dare_linear", "magmax", "consensus", "emr"}
    exact |= {
        "spectral_power",
        "iso_c",
        "tsv_m",
        "iso_cts",
        "svc",
        "knots",
    }  # of exact sums: the same step on the same bits
    for candidate in CANDIDATES:
        one, flat = experts.merged(schedule, candidate), experts.flat(NAMES, candidate)
        assert one.names == flat.names == sorted(SHAPES)
        for name in one.names:
            left, right = one.load(name), flat.load(name)
            assert torch.equal(left.indices, right.indices), (candidate, name)
            if candidate.method in exact:
                assert torch.equal(left.values, right.values), (candidate, name)
            else:
                torch.testing.assert_close(left.values, right.values, rtol=1e-4, atol=1e-6)
        meta = schedule.merged[candidate].meta
        assert (meta["method"], meta["experts"]) == (candidate.method, len(NAMES))
        assert meta["rounding_loss_bfloat16"] > 0
        assert meta["delta_norm"] > 0
    again, jobs = experts.merge(NAMES, CANDIDATES)
    assert jobs == []
    assert +again.tally.made == Counter()
    assert +again.tally.reused == +schedule.tally.made
    assert {c: m.digest for c, m in again.merged.items()} == {c: m.digest for c, m in schedule.merged.items()}


def test_a_mask_for_every_task_of_emr(experts: Experts) -> None:
    emr = Candidate("emr")
    schedule, jobs = experts.merge(NAMES, [emr])
    assert schedule.tally.made[MASKS] == len(NAMES) == sum(isinstance(job, TaskMaskJob) for job in jobs)
    unstated = {"base": ["not stated"], "data": ["not stated"]}  # these experts have no manifests
    nodes = [peek(experts.store, job.recipe.key) for job in jobs if isinstance(job, NodeJob)]
    assert nodes
    assert all(node is not None and node.meta["licenses"] == unstated for node in nodes)
    unified = experts.merged(schedule, emr)
    for name in NAMES:
        manifest = schedule.masks[emr, name]
        assert manifest.meta["licenses"] == unstated
        reader = MaskReader(StoreSource(experts.store, manifest.files["mask"].name))
        masked = MaskedAdapter(unified, reader, schedule.merged[emr].files["adapter"].sha256)
        own = AdapterReader(FileSource(experts.paths[name]))
        mass = sum(float(own.load(tensor).values.abs().sum()) for tensor in own.names)
        kept = sum(float(masked.load(tensor).values.abs().sum()) for tensor in masked.names)
        assert kept == pytest.approx(mass, rel=1e-5)  # the scale restores the expert's L1 norm


def test_changing_one_expert_remakes_its_path_and_all_of_later_rounds(experts: Experts) -> None:
    candidates = [CANDIDATES[0], CANDIDATES[2], CANDIDATES[6]]
    experts.merge(NAMES, candidates)
    experts.make(NAMES[3], 100)
    _, jobs = experts.merge(NAMES, candidates)
    rounds = Counter(reduction.round for reduction in plan_reductions(candidates))
    path, everything = path_labels(NAMES, NAMES[3]), Counter(node.label for node in post_order(build_tree(NAMES, 2)))
    first, later = ([job for job in jobs if (job.reference is None) == is_first] for is_first in (True, False))
    assert labels(first) == Counter({label: count * rounds[1] for label, count in path.items()})
    assert labels(later) == Counter({label: count * rounds[2] for label, count in everything.items()})


def test_adding_and_removing_an_expert_remake_what_differs(experts: Experts) -> None:
    mean = [CANDIDATES[0]]
    experts.merge(NAMES[:-1], mean)
    _, jobs = experts.merge(NAMES, mean)
    assert labels(jobs) == changed(NAMES[:-1], NAMES)
    assert set(labels(jobs)) <= set(path_labels(NAMES, NAMES[-1]))
    fewer = [name for name in NAMES if name != NAMES[2]]
    schedule, jobs = experts.merge(fewer, mean)
    assert labels(jobs) == changed(NAMES, fewer)
    flat = experts.flat(fewer, mean[0])
    for name in SHAPES:
        assert torch.equal(experts.merged(schedule, mean[0]).load(name).values, flat.load(name).values)


def test_another_scale_lowers_the_root_alone(experts: Experts) -> None:
    experts.merge(NAMES, [Candidate("task_arithmetic", {"lambda": 0.5})])
    schedule, jobs = experts.merge(NAMES, [Candidate("task_arithmetic", {"lambda": scale}) for scale in (0.5, 0.25)])
    (root,) = jobs
    assert isinstance(root, RootJob)
    assert [candidate.params["lambda"] for candidate, _ in root.candidates] == [0.25]
    assert (schedule.tally.made[NODES], schedule.tally.reused[NODES]) == (1, len(post_order(build_tree(NAMES, 2))) - 1)


def test_another_power_lowers_the_root_alone(experts: Experts) -> None:
    """Sums made for the mean serve every power, λ and floor."""
    experts.merge(NAMES, [Candidate("mean")])
    others = [Candidate("spectral_power", {"p": p, "lambda": 0.8}) for p in (0.5, -1)]
    schedule, jobs = experts.merge(NAMES, [*others, Candidate("iso_c", {"floor": 0.1})])
    (root,) = jobs
    assert isinstance(root, RootJob)
    assert (schedule.tally.made[NODES], schedule.tally.reused[NODES]) == (1, len(post_order(build_tree(NAMES, 2))) - 1)


def test_the_parts_of_a_fused_weight_reach_the_root(experts: Experts) -> None:
    name, rows = "l0.up.weight", (8, 4, 4)
    candidate = Candidate("spectral_power", {"p": -1, "parts": "qkv"})
    schedule, _ = experts.merge(NAMES, [candidate, Candidate("mean")], {name: rows})
    merged = experts.merged(schedule, candidate).load(name).values.view(SHAPES[name])
    mean = experts.merged(schedule, Candidate("mean")).load(name)
    total = torch.zeros(mean.numel).index_copy_(0, mean.indices, mean.values).view(SHAPES[name]) * len(NAMES)
    for found, own in zip(merged.split(rows), total.split(rows), strict=True):
        torch.testing.assert_close(found, spectrum(own).reweighted(-1, 0.03), rtol=1e-4, atol=1e-4)


def test_names_are_in_no_key(experts: Experts) -> None:
    """Renamed experts lie elsewhere in the tree, but a merge of two has one node, whatever they are called."""
    first, _ = experts.merge(NAMES[:2], CANDIDATES[:1])
    renamed = {"x" + name: name for name in NAMES[:2]}
    order = [child.name for child in build_tree(list(renamed), 2).children]
    if [renamed[name] for name in order] != [child.name for child in build_tree(NAMES[:2], 2).children]:
        renamed = dict(zip(renamed, reversed(list(renamed.values())), strict=True))
    for new, old in renamed.items():
        experts.paths[new], experts.refs[new] = experts.paths[old], experts.refs[old]
    second, jobs = experts.merge(list(renamed), CANDIDATES[:1])
    assert jobs == []
    assert second.merged[CANDIDATES[0]].key == first.merged[CANDIDATES[0]].key


def test_a_lost_file_is_made_again(experts: Experts, store: Store) -> None:
    schedule, jobs = experts.merge(NAMES, CANDIDATES[:1])
    inner = next(job for job in jobs if isinstance(job, NodeJob))
    found = find(store, inner.recipe.key, {c.ref.key: c.ref.digest for c in inner.children})
    assert found is not None
    store.delete(found.files["statistics"].name)
    assert experts.merge(NAMES, CANDIDATES[:1])[1] == []  # the merge is there: nobody needs the node
    again, jobs = experts.merge(NAMES, CANDIDATES[:2])
    assert [job.label for job in jobs] == [inner.label, build_tree(NAMES, 2).label]  # the same bytes again
    assert again.merged[CANDIDATES[0]] == schedule.merged[CANDIDATES[0]]


def test_a_merge_made_beside_others_has_the_bytes_and_key_of_one_made_alone(store: Store, tmp_path: Path) -> None:
    """On values whose sums are rounded, in stores of their own; a later plan finds the earlier plan's merges."""
    methods = [Candidate(name) for name, method in METHODS.items() if not (method.internal or method.weights_required)]
    weights = {name: (number + 1) / 28 for number, name in enumerate(NAMES)}
    weighted = [Candidate(name, {}, weights) for name in ("weighted_mean", "overlap_mean", "ties", "task_arithmetic")]
    found: list[dict[Candidate, tuple[str, str]]] = []
    for number, plans in enumerate(([methods + weighted], [[candidate] for candidate in methods + weighted])):
        own = Experts(Store(store.bucket, store.endpoint, f"{store.prefix}-{number}"), tmp_path)
        for seed, name in enumerate(NAMES):
            own.make(name, seed, dyadic=False)
        merges = [own.merge(NAMES, plan)[0].merged for plan in plans]
        found.append({c: (made[c].key, made[c].digest) for made in merges for c in made})
    assert found[0] == found[1]
    again, jobs = own.merge(NAMES, [*reversed(weighted), *methods, Candidate("task_arithmetic", {"lambda": 0.7})])
    assert {c: (again.merged[c].key, again.merged[c].digest) for c in found[0]} == found[0]
    lowered = [candidate for job in jobs if isinstance(job, RootJob) for candidate, _ in job.candidates]
    assert lowered == [Candidate("task_arithmetic", {"lambda": 0.7})]


def test_a_repeated_job_finds_what_it_published(
    experts: Experts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, done = experts.merge(NAMES, CANDIDATES[:3])
    monkeypatch.setattr(merge.tree.jobs, "reduce_node", None)
    monkeypatch.setattr(merge.tree.jobs, "reduce_root", None)
    for job in done:
        assert not any(do(store, job))


def test_a_root_lowers_only_what_is_missing(experts: Experts, store: Store) -> None:
    schedule, done = experts.merge(NAMES, CANDIDATES[:2])
    (root,) = [job for job in done if isinstance(job, RootJob)]
    store.delete(schedule.merged[CANDIDATES[0]].files["adapter"].name)
    assert do(store, root) == [True, False]


def test_corrupted_and_missing_inputs_end_the_merge_with_their_reason(experts: Experts, store: Store) -> None:
    (file,) = experts.refs[NAMES[1]].files
    data = bytearray(store.get(file.name))
    data[-1] ^= 0xFF
    store.put(file.name, bytes(data))
    with pytest.raises(StoreError, match="corrupt"):
        experts.merge(NAMES, CANDIDATES[:1])
    store.put(file.name, bytes(data[:100]))
    with pytest.raises((StoreError, AdapterError)):
        experts.merge(NAMES, CANDIDATES[:1])


def test_a_checkpoint_is_exported_and_found(experts: Experts, tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    base = prepare_base(f"path:{folder}", tmp_path / "cache")
    upload_base(store, base)
    name = "model.layers.0.self_attn.q_proj.weight"
    path = tmp_path / "adapter.safetensors"
    delta = SparseTensor((32, 32), torch.tensor([0, 5]), torch.tensor([0.5, -0.25]))
    save_adapter(path, {name: delta}, AdapterMeta(base.sha256))
    ref = experts.put(path, "one")
    (reduction,) = plan_reductions(CANDIDATES[:1])
    recipe = merged_recipe(CANDIDATES[0], "r" * 64)
    child = ChildRef("expert", "one", ref)
    root = RootJob("", reduction.spec, (child,), base.sha256, None, None, ((CANDIDATES[0], recipe),), {})
    ((merged, _),) = root(store, Place())
    assert merged.meta["rounding_loss_bfloat16"] is None  # no base was given
    job = export_job(merged, base.sha256, "float32", 1 << 30)
    manifest, made = export_checkpoint(store, job)
    assert made
    assert {"config.json", "model.safetensors"} <= set(manifest.files)
    local: Mapping[str, Path] = {
        label: store.download_file(file, tmp_path / "out" / label) for label, file in manifest.files.items()
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).get_parameter(name).detach().clone()
    expected.view(-1)[delta.indices] += delta.values
    assert torch.equal(loaded.get_parameter(name), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids
    assert json.loads(local["config.json"].read_text())["architectures"]
    again, made = export_checkpoint(store, export_job(merged, base.sha256, "float32", 1 << 30))
    assert (again, made) == (manifest, False)
    other = replace(merged, key=hashlib.sha256(b"another merge of the same bytes").hexdigest())
    again, made = export_checkpoint(store, export_job(other, base.sha256, "float32", 1 << 30))
    assert (again, made) == (manifest, False)
    assert all(store.head(file.name) for file in manifest.files.values())
    assert len(list(store.list(f"objects/{manifest.key}/"))) == len(manifest.files)
    assert export_job(merged, base.sha256, "bfloat16", 1 << 30).recipe.key != job.recipe.key
