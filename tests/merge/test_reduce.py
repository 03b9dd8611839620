"""Nodes and roots end to end on local files: trees equal the flat merge, outputs are adapters, misfits are refused."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infra.errors import AdapterError, MergeError
from merge.methods import Candidate, LiftSpec, group_candidates
from merge.reduce import ROOT_VERSIONS, Child, flat_merge, reduce_node, reduce_root
from merge.tree import Leaf, Node, build_tree, leaf_names, post_order
from workers.adapter import AdapterMeta, AdapterReader, FileSource, save_adapter
from workers.support import SparseTensor

BASE = "b" * 64
SHAPES = {"l0.v.weight": (6, 10), "l0.up.weight": (8, 16), "l1.v.weight": (6, 10)}
CANDIDATES = [
    Candidate("mean"),
    Candidate("overlap_mean"),
    Candidate("task_arithmetic", {"lambda": 0.5}),
    Candidate("ties"),
    Candidate("ties", {"density": 0.25}),
]


def make(folder: Path, names, seed: int = 0, skip: str = "") -> dict[str, Path]:
    """Adapters with dyadic values; every third expert lacks the tensor `skip`."""
    g = torch.Generator().manual_seed(seed)
    paths = {}
    for number, name in enumerate(names):
        tensors = {}
        for tensor, shape in SHAPES.items():
            if tensor == skip and number % 3 == 0:
                continue
            numel = shape[0] * shape[1]
            indices = torch.randperm(numel, generator=g)[: numel // 4].sort().values
            values = torch.randint(-32, 33, (indices.numel(),), generator=g) / 64
            tensors[tensor] = SparseTensor(shape, indices, values)
        paths[name] = folder / f"{name}.safetensors"
        save_adapter(paths[name], tensors, AdapterMeta(BASE))
    return paths


def adapters(paths: dict[str, Path]) -> list[Child]:
    return [Child("expert", name, FileSource(path)) for name, path in paths.items()]


def run_tree(folder: Path, paths: dict[str, Path], fan_in: int, candidates: list[Candidate]) -> dict[Candidate, Path]:
    """All groups over the whole tree."""
    tree = build_tree(list(paths), fan_in)
    outs = {}
    for number, (spec, members) in enumerate(group_candidates(candidates).items()):
        files: dict[Node, Path] = {}

        def children(node: Node, files: dict[Node, Path] = files) -> list[Child]:
            return [
                Child("expert", c.name, FileSource(paths[c.name]))
                if isinstance(c, Leaf)
                else Child("node", c.label, FileSource(files[c]))
                for c in node.children
            ]

        for node in post_order(tree)[:-1]:
            files[node] = folder / f"node-{number}-{node.label}"
            assert reduce_node(children(node), spec, files[node], BASE).experts == tuple(leaf_names(node))
        targets = {candidate: folder / f"out-{number}-{i}" for i, candidate in enumerate(members)}
        info = reduce_root(children(tree), spec, targets, BASE)
        assert [merged.candidate for merged in info.merged] == members
        assert info.experts == tuple(leaf_names(tree))
        outs.update(targets)
    return outs


def load(path: Path) -> dict[str, SparseTensor]:
    reader = AdapterReader(FileSource(path))
    return {name: reader.load(name) for name in reader.names}


@pytest.mark.parametrize("fan_in", [2, 4, 16])
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_a_tree_equals_the_flat_merge_exactly(tmp_path, fan_in, n):
    paths = make(tmp_path, [f"task-{i}" for i in range(n)], seed=n, skip="l1.v.weight")
    shuffled = list(paths.items())
    random.Random(n).shuffle(shuffled)
    outs = run_tree(tmp_path, dict(shuffled), fan_in, CANDIDATES)
    for candidate in CANDIDATES:
        flat_merge({name: FileSource(p) for name, p in paths.items()}, candidate, tmp_path / "flat")
        flat, tree = load(tmp_path / "flat"), load(outs[candidate])
        assert list(flat) == list(tree)
        for name in flat:
            assert torch.equal(flat[name].indices, tree[name].indices)
            assert torch.equal(flat[name].values, tree[name].values)


def test_merged_adapters_say_what_they_are_and_repeat_byte_for_byte(tmp_path):
    paths = make(tmp_path, ["a", "b", "c"])
    spec, members = next(iter(group_candidates(CANDIDATES).items()))
    seen: list[tuple[int, int]] = []
    files = []
    for attempt in range(2):
        outs = {candidate: tmp_path / f"{attempt}-{i}" for i, candidate in enumerate(members)}
        reduce_root(adapters(paths), spec, outs, info={"suite": "x"}, progress=lambda *p: seen.append(p))
        files.append([out.read_bytes() for out in outs.values()])
    assert files[0] == files[1]
    assert seen[:3] == [(1, 3), (2, 3), (3, 3)]
    meta = AdapterReader(FileSource(tmp_path / "0-2")).meta
    assert meta.base_sha256 == BASE
    assert meta.info == {
        "suite": "x",
        "method": "task_arithmetic",
        "params": {"lambda": 0.5},
        "experts": ["a", "b", "c"],
        "versions": ROOT_VERSIONS,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_loss_and_counts(tmp_path, dtype):
    paths = make(tmp_path, ["a", "b", "c"])
    g = torch.Generator().manual_seed(5)
    base = {name: (torch.randn(shape, generator=g) * 0.2).to(dtype) for name, shape in SHAPES.items()}
    base["other.weight"] = torch.zeros(3, dtype=dtype)
    save_file(base, tmp_path / "base")
    sources = {name: FileSource(path) for name, path in paths.items()}
    info = flat_merge(sources, Candidate("mean"), tmp_path / "out", BASE, FileSource(tmp_path / "base"))
    merged = load(tmp_path / "out")
    lost = square = 0.0
    for name, tensor in merged.items():
        delta, at = tensor.values, base[name].view(-1)[tensor.indices].float()
        lost += float((((at + delta).bfloat16().float() - at - delta).double() ** 2).sum())
        square += float((delta.double() ** 2).sum())
    (one,) = info.merged
    assert one.rounding_loss == pytest.approx((lost / square) ** 0.5, rel=1e-9)
    assert 0 < one.rounding_loss < 1
    assert one.norm == pytest.approx(square**0.5)
    assert info.positions == sum(t.indices.numel() for t in merged.values())
    assert info.density == info.positions / (60 + 128 + 60)
    assert one.nonzero == sum(int((t.values != 0).sum()) for t in merged.values())
    assert one.bytes_written == (tmp_path / "out").stat().st_size


def test_experts_without_change_have_no_rounding_loss(tmp_path):
    tensor = SparseTensor((2, 2), torch.arange(2), torch.zeros(2))
    save_adapter(tmp_path / "a", {"w": tensor}, AdapterMeta(BASE))
    save_file({"w": torch.ones(2, 2)}, tmp_path / "base")
    base = FileSource(tmp_path / "base")
    (info,) = flat_merge({"a": FileSource(tmp_path / "a")}, Candidate("ties"), tmp_path / "o", None, base).merged
    assert (info.rounding_loss, info.norm, info.nonzero) == (0.0, 0.0, 0)


def test_misfits_are_refused_and_leave_no_file(tmp_path):
    paths = make(tmp_path, ["a", "b"])
    spec = LiftSpec(("sum",))
    out = tmp_path / "out"
    one = SparseTensor((2, 2), torch.arange(2), torch.ones(2))
    save_adapter(tmp_path / "other-base", {"w": one}, AdapterMeta("c" * 64))
    save_adapter(tmp_path / "other-shape", {"l0.v.weight": one}, AdapterMeta(BASE))
    other_base = Child("expert", "other", FileSource(tmp_path / "other-base"))
    other_shape = Child("expert", "odd", FileSource(tmp_path / "other-shape"))
    with pytest.raises(MergeError, match=r"expert 'other' was made for base cccc.* expert 'a' for bbbb"):
        reduce_node([*adapters(paths), other_base], spec, out)
    with pytest.raises(MergeError, match="the base of this merge is dddd"):
        reduce_node(adapters(paths), spec, out, "d" * 64)
    with pytest.raises(MergeError, match=r"l0.v.weight has shape \[2, 2\] in expert 'odd', \[6, 10\] in expert 'a'"):
        reduce_node([*adapters(paths), other_shape], spec, out)
    with pytest.raises(MergeError, match="expert 'a' is merged twice"):
        reduce_node(adapters(paths) + adapters(paths), spec, out)
    with pytest.raises(MergeError, match="at least one child"):
        reduce_node([], spec, out)
    with pytest.raises(MergeError, match="accepted: expert, node"):
        Child("lora", "x", FileSource(paths["a"]))
    reduce_node(adapters(paths), LiftSpec(("sum",), 0.5), tmp_path / "node")
    with pytest.raises(MergeError, match="holds the reduction"):
        reduce_node([Child("node", "n", FileSource(tmp_path / "node"))], spec, out)
    for candidate in (Candidate("ties"), Candidate("overlap_mean"), Candidate("ties", {"density": 0.5})):
        with pytest.raises(MergeError, match="cannot be lowered"):
            reduce_root(adapters(paths), spec, {candidate: out})
    with pytest.raises(MergeError, match="no candidate"):
        reduce_root(adapters(paths), spec, {})
    save_file({"l0.v.weight": torch.zeros(6, 10)}, tmp_path / "base")
    with pytest.raises(MergeError, match="missing in the base"):
        reduce_root(adapters(paths), spec, {Candidate("mean"): out}, base=FileSource(tmp_path / "base"))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_corrupted_children_are_refused_by_name(tmp_path):
    paths = make(tmp_path, ["a", "b"])
    spec = LiftSpec(("sum",))
    reduce_node(adapters(paths), spec, tmp_path / "node")
    for path in (paths["b"], tmp_path / "node"):
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(AdapterError, match="'b'"):
        reduce_node(adapters(paths), spec, tmp_path / "out")
    with pytest.raises(MergeError, match="node 'x'"):
        reduce_node([Child("node", "x", FileSource(tmp_path / "node"))], spec, tmp_path / "out")


def test_results_do_not_change_without_a_version(tmp_path):
    """If this fails, raise LIFT_VERSION, STATISTICS_VERSION, NODE_FILE_VERSION or LOWER_VERSION, whichever changed."""
    for number, name in enumerate(("a", "b", "c")):
        indices = torch.tensor([i for i in range(96) if (i * 7 + number) % 5 < 2])
        tensor = SparseTensor((8, 12), indices, ((indices * 37 + number * 11) % 129 - 64) / 64)
        save_adapter(tmp_path / name, {"w": tensor}, AdapterMeta(BASE))
    children = adapters({name: tmp_path / name for name in ("a", "b", "c")})
    digests = {}
    for spec, members in group_candidates(CANDIDATES).items():
        reduce_node(children, spec, tmp_path / "node")
        digests[f"node {spec.density}"] = hashlib.sha256((tmp_path / "node").read_bytes()).hexdigest()[:16]
        for candidate in members:
            reduce_root(children, spec, {candidate: tmp_path / "out"})
            tensor = load(tmp_path / "out")["w"]
            data = tensor.indices.numpy().tobytes() + tensor.values.numpy().tobytes()
            digests[str(candidate)] = hashlib.sha256(data).hexdigest()[:16]
    assert digests == {
        "node 1.0": "cb1d36187d758686",
        "mean": "99eb347d78d17af1",
        "overlap_mean": "817a1761cd2d0dfe",
        "task_arithmetic(lambda=0.5)": "4a5d6ef15bf8d6b1",
        "ties(lambda=1, density=1)": "8fd3a7b2fba464d2",
        "node 0.25": "f03a65fef6a85af8",
        "ties(lambda=1, density=0.25)": "a400490ee0dd5d5b",
    }
