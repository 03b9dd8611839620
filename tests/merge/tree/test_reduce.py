"""Nodes and roots end to end on local files: trees equal the flat merge, outputs are adapters, misfits are refused."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infra.errors import AdapterError, MergeError
from merge.files.merged import AdapterDelta, AdapterWriter
from merge.methods.catalogue import METHODS
from merge.methods.specs import Candidate, LiftSpec, plan_reductions
from merge.tree.prefetch import Load, prefetch
from merge.tree.reduce import (
    ROOT_VERSIONS,
    ExpertChild,
    NodeChild,
    flat_merge,
    reduce_node,
    reduce_root,
)
from merge.tree.trie import Leaf, Node, build_tree, leaf_names, post_order
from tests.merge.experts import BASE, SHAPES, children, default_candidate, load, make_experts, make_measured, only, same
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, save_adapter
from workers.tensors.source import FileSource

CANDIDATES = [
    Candidate("mean"),
    Candidate("overlap_mean"),
    Candidate("task_arithmetic", {"lambda": 0.5}),
    Candidate("ties"),
    Candidate("ties", {"density": 0.25}),
]
EXACT = {"regmean": {"off_diagonal": 0.5}}
"""Parameters with which a method's statistics stay dyadic, where the default ones are not."""

ROUNDED = ("della", "della_linear", "wudi")
"""Methods whose statistics are not dyadic."""


def by_default(method: str, names) -> Candidate:
    return Candidate(method, EXACT[method]) if method in EXACT else default_candidate(method, names)


def run_tree(folder: Path, paths: dict[str, Path], fan_in: int, candidates) -> dict[Candidate, Path]:
    """All reductions and rounds over the whole tree."""
    tree = build_tree(list(paths), fan_in)
    outs: dict[Candidate, Path] = {}
    for number, reduction in enumerate(plan_reductions(candidates, len(paths))):
        files: dict[Node, Path] = {}
        spec = reduction.spec
        earlier = AdapterDelta(FileSource(outs[spec.reference]), "earlier") if spec.reference else None
        experts = {child.name: child for child in children(paths, spec.measurement)}

        def below(node: Node, experts=experts, files=files):
            return [
                experts[c.name] if isinstance(c, Leaf) else NodeChild(c.label, (FileSource(files[c]),))
                for c in node.children
            ]

        for node in post_order(tree)[:-1]:
            files[node] = folder / f"node-{number}-{node.label}"
            info = reduce_node(below(node), spec, files[node], BASE, earlier)
            assert info.experts == tuple(leaf_names(node))
        targets = {candidate: folder / f"out-{number}-{i}" for i, candidate in enumerate(reduction.candidates)}
        info = reduce_root(below(tree), spec, {c: AdapterWriter(p) for c, p in targets.items()}, BASE, None, earlier)
        assert [merged.candidate for merged in info.merged] == list(reduction.candidates)
        assert info.experts == tuple(leaf_names(tree))
        outs.update(targets)
    return outs


def run_flat(folder: Path, paths: dict[str, Path], candidates, base: Path | None = None):
    """`flat_merge` into a new folder; infos, and the files by candidate."""
    folder.mkdir()
    measured = {r.spec.measurement for r in plan_reductions(candidates, len(paths))} - {None}
    outs = {candidate: folder / f"{number}" for number, candidate in enumerate(candidates)}
    infos = flat_merge(
        children(paths, measured.pop() if measured else None),
        candidates,
        lambda candidate: AdapterWriter(outs[candidate]),
        BASE,
        FileSource(base) if base else None,
        folder,
    )
    return infos, outs


@pytest.mark.parametrize("fan_in", [2, 4, 16])
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_a_tree_equals_the_flat_merge_exactly(tmp_path, fan_in, n):
    paths = make_experts(tmp_path, [f"task-{i}" for i in range(n)], seed=n, skip="l1.v.weight")
    shuffled = list(paths.items())
    random.Random(n).shuffle(shuffled)
    outs = run_tree(tmp_path, dict(shuffled), fan_in, CANDIDATES)
    _, flat = run_flat(tmp_path / "flat", paths, CANDIDATES)
    for candidate in CANDIDATES:
        assert same(load(flat[candidate]), load(outs[candidate])), candidate


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_for_any_tree(tmp_path, method):
    paths = make_experts(tmp_path, [f"task-{i}" for i in range(9)], seed=4)
    candidate = by_default(method, paths)
    _, outs = run_flat(tmp_path / "flat", paths, [candidate])
    flat = load(outs[candidate])
    for fan_in in (2, 4):
        (tmp_path / str(fan_in)).mkdir()
        tree = load(run_tree(tmp_path / str(fan_in), paths, fan_in, [candidate])[candidate])
        if method not in ROUNDED:
            assert same(flat, tree)
        for name in flat:
            assert torch.equal(flat[name].indices, tree[name].indices)
            assert torch.allclose(flat[name].values, tree[name].values, rtol=1e-5, atol=1e-6)
    assert any(bool(tensor.values.any()) for tensor in flat.values())


@pytest.mark.parametrize("method", ["mean", "task_arithmetic", "overlap_mean", "ties"])
def test_real_values_agree_across_trees_within_the_bound_of_their_sums(tmp_path, method):
    g = torch.Generator().manual_seed(0)
    paths = {}
    for number in range(13):
        tensor = SparseTensor((40, 50), torch.arange(2000), torch.randn(2000, generator=g) * 10.0 ** (number % 5 - 3))
        paths[f"t{number}"] = tmp_path / f"t{number}"
        save_adapter(paths[f"t{number}"], {"w": tensor}, AdapterMeta(BASE), torch.float32)
    stack = torch.stack([load(path)["w"].values for path in paths.values()]).double()
    bound = 13 * torch.finfo(torch.float32).eps * stack.abs().sum(0)
    candidate = Candidate(method)
    _, outs = run_flat(tmp_path / "flat", paths, [candidate])
    flat = load(outs[candidate])["w"].values.double()
    tree = load(run_tree(tmp_path, paths, 2, [candidate])[candidate])["w"].values.double()
    clear = stack.sum(0).abs() > bound if method == "ties" else torch.ones(2000, dtype=torch.bool)
    assert bool(((flat - tree).abs() <= bound)[clear].all())
    assert int(clear.sum()) > 1990
    assert not torch.equal(flat, tree)  # else the test says nothing


def test_merged_adapters_say_what_they_are_and_repeat_byte_for_byte(tmp_path):
    paths = make_experts(tmp_path, ["a", "b", "c"])
    reduction = plan_reductions(CANDIDATES)[0]
    seen: list[tuple[int, int]] = []
    files = []
    for attempt in range(2):
        outs = {candidate: tmp_path / f"{attempt}-{i}" for i, candidate in enumerate(reduction.candidates)}
        sinks = {candidate: AdapterWriter(out, {"suite": "x"}) for candidate, out in outs.items()}
        reduce_root(children(paths), reduction.spec, sinks, progress=lambda *p: seen.append(p))
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
    paths = make_experts(tmp_path, ["a", "b", "c"])
    g = torch.Generator().manual_seed(5)
    base = {name: (torch.randn(shape, generator=g) * 0.2).to(dtype) for name, shape in SHAPES.items()}
    base["other.weight"] = torch.zeros(3, dtype=dtype)
    save_file(base, tmp_path / "base")
    infos, outs = run_flat(tmp_path / "out", paths, [Candidate("mean")], tmp_path / "base")
    one, out = infos[Candidate("mean")], outs[Candidate("mean")]
    merged = load(out)
    lost = square = 0.0
    for name, tensor in merged.items():
        delta, at = tensor.values, base[name].view(-1)[tensor.indices].float()
        lost += float((((at + delta).bfloat16().float() - at - delta).double() ** 2).sum())
        square += float((delta.double() ** 2).sum())
    assert one.rounding_loss == pytest.approx((lost / square) ** 0.5, rel=1e-9)
    assert 0 < one.rounding_loss < 1
    assert one.norm == pytest.approx(square**0.5)
    assert one.positions == sum(t.indices.numel() for t in merged.values())
    assert one.density == one.positions / (60 + 128 + 60)
    assert one.nonzero == sum(int((t.values != 0).sum()) for t in merged.values())
    assert one.bytes_written == out.stat().st_size


def test_experts_without_change_have_no_rounding_loss(tmp_path):
    tensor = SparseTensor((2, 2), torch.arange(2), torch.zeros(2))
    save_adapter(tmp_path / "a", {"w": tensor}, AdapterMeta(BASE))
    save_file({"w": torch.ones(2, 2)}, tmp_path / "base")
    infos, _ = run_flat(tmp_path / "out", {"a": tmp_path / "a"}, [Candidate("ties")], tmp_path / "base")
    (info,) = infos.values()
    assert (info.rounding_loss, info.norm, info.nonzero) == (0.0, 0.0, 0)


def test_an_earlier_round_can_be_asked_for_too(tmp_path):
    paths = make_experts(tmp_path, ["a", "b", "c"])
    first, second = Candidate("task_arithmetic", {"lambda": 1.0}), Candidate("consensus")
    infos, outs = run_flat(tmp_path / "out", paths, [second, first])
    assert list(infos) == [second, first]
    _, other = run_flat(tmp_path / "alone", paths, [second])
    assert same(load(outs[second]), load(other[second]))
    assert infos[first].nonzero >= infos[second].nonzero > 0
    with pytest.raises(MergeError, match="several rounds need a folder"):
        flat_merge(children(paths), [second], lambda c: AdapterWriter(tmp_path / "x"))


def test_misfits_are_refused_and_leave_no_file(tmp_path):
    paths = make_experts(tmp_path, ["a", "b"])
    spec, out = LiftSpec(("sum",)), tmp_path / "out"
    one = SparseTensor((2, 2), torch.arange(2), torch.ones(2))
    save_adapter(tmp_path / "other-base", {"w": one}, AdapterMeta("c" * 64))
    save_adapter(tmp_path / "other-shape", {"l0.v.weight": one}, AdapterMeta(BASE))
    (other_base,) = children({"other": tmp_path / "other-base"})
    (other_shape,) = children({"odd": tmp_path / "other-shape"})
    with pytest.raises(MergeError, match=r"expert 'other' was made for base cccc.* expert 'a' for bbbb"):
        reduce_node([*children(paths), other_base], spec, out)
    with pytest.raises(MergeError, match="the base of this merge is dddd"):
        reduce_node(children(paths), spec, out, "d" * 64)
    with pytest.raises(MergeError, match=r"l0.v.weight has shape \[2, 2\] in expert 'odd', \[6, 10\] in expert 'a'"):
        reduce_node([*children(paths), other_shape], spec, out)
    with pytest.raises(MergeError, match="expert 'a' is merged twice"):
        reduce_node(children(paths) + children(paths), spec, out)
    with pytest.raises(MergeError, match="at least one child"):
        reduce_node([], spec, out)
    with pytest.raises(MergeError, match="has no weight"):
        reduce_node(children(paths), LiftSpec(("sum",), weights=(("a", 1.0),)), out)
    for candidate in (Candidate("ties"), Candidate("overlap_mean"), Candidate("ties", {"density": 0.5})):
        with pytest.raises(MergeError, match="cannot be lowered"):
            reduce_root(children(paths), spec, {candidate: AdapterWriter(out)})
    with pytest.raises(MergeError, match="no candidate"):
        reduce_root(children(paths), spec, {})
    with pytest.raises(MergeError, match="weights of merge method 'weighted_mean' are missing"):
        flat_merge(children(paths), [Candidate("weighted_mean")], lambda c: AdapterWriter(out))
    save_file({"l0.v.weight": torch.zeros(6, 10)}, tmp_path / "base")
    mean = {Candidate("mean"): AdapterWriter(out)}
    with pytest.raises(MergeError, match="missing in the base"):
        reduce_root(children(paths), spec, mean, base=FileSource(tmp_path / "base"))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_nodes_of_other_reductions_are_refused(tmp_path):
    paths = make_experts(tmp_path, ["a", "b"])
    plain, trimmed = LiftSpec(("sum",)), LiftSpec(("sum",), "trim", (("density", 0.5), ("density_of", "support")))
    weighted = LiftSpec(("sum",), weights=(("a", 1.0), ("b", 0.0)))
    later = plan_reductions([Candidate("consensus")])[1].spec
    reduce_node(children(paths), plain, tmp_path / "node")
    node = NodeChild("n", (FileSource(tmp_path / "node"),))
    for spec in (trimmed, weighted):
        with pytest.raises(MergeError, match="node 'n' holds the reduction"):
            reduce_node([node], spec, tmp_path / "out")
    with pytest.raises(MergeError, match="none was given"):
        reduce_node(children(paths), later, tmp_path / "out")
    with pytest.raises(MergeError, match="another was given"):
        reduce_node(children(paths), plain, tmp_path / "out", reference=AdapterDelta(FileSource(paths["a"]), "a"))
    _, outs = run_flat(tmp_path / "flat", paths, [later.reference])
    reference = AdapterDelta(FileSource(outs[later.reference]), "earlier")
    reduce_node(children(paths), later, tmp_path / "second", reference=reference)
    other = plan_reductions([Candidate("consensus_ties")])[1].spec
    with pytest.raises(MergeError, match="holds the reduction"):
        reduce_node([NodeChild("n", (FileSource(tmp_path / "second"),))], other, tmp_path / "out", reference=reference)


def test_a_node_in_several_files_is_read_and_files_of_different_nodes_are_refused(tmp_path):
    """Former versions split a node's tensors over several files."""
    paths = make_experts(tmp_path, ["a", "b", "c"])
    spec, names = LiftSpec(("sum",)), sorted(SHAPES)
    for name, group, own in (("1", "ab", names[:1]), ("2", "ab", names[1:]), ("3", "ac", names[1:])):
        reduce_node(only(children({n: paths[n] for n in group}), own), spec, tmp_path / name)

    def node(*files, experts=None):
        return NodeChild("n", tuple(FileSource(tmp_path / file) for file in files), experts)

    assert reduce_node([node("1", "2")], spec, tmp_path / "out").tensors == 3
    reduce_node(children({n: paths[n] for n in "ab"}), spec, tmp_path / "whole")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert reduce_node([node("1", "2", experts=("x", "y"))], spec, tmp_path / "out").experts == ("x", "y")
    for files, message in ((("1", "3"), "metadata differ"), (("1", "1"), "two hold"), ((), "no file")):
        with pytest.raises(MergeError, match=message):
            reduce_node([node(*files)], spec, tmp_path / "out")
    with pytest.raises(MergeError, match="joins 2 experts, expected 1"):
        reduce_node([node("1", "2", experts=("x",))], spec, tmp_path / "out")


def test_measurements_are_checked_before_tensors_are_read(tmp_path):
    paths = make_experts(tmp_path, ["a", "bb"])
    spec = plan_reductions([Candidate("fisher_on_support")])[0].spec
    with pytest.raises(MergeError, match="expert 'a' has no fisher file"):
        reduce_node(children(paths), spec, tmp_path / "out")
    (tmp_path / "other").mkdir()
    other = make_experts(tmp_path / "other", ["a"], skip="l0.up.weight")["a"]
    swapped = ExpertChild("a", AdapterDelta(FileSource(paths["a"]), "a"), FileSource(make_measured("fisher", other)))
    with pytest.raises(MergeError, match=r"no values for l0\.up\.weight, which the expert changes; measure it again"):
        reduce_node([swapped], spec, tmp_path / "out")
    gram = plan_reductions([Candidate("regmean")])[0].spec
    with pytest.raises(AdapterError, match="expert 'a'"):
        reduce_node([swapped], gram, tmp_path / "out")


def test_corrupted_children_are_refused_by_name(tmp_path):
    paths = make_experts(tmp_path, ["a", "b"])
    spec = LiftSpec(("sum",))
    reduce_node(children(paths), spec, tmp_path / "node")
    for path in (paths["b"], tmp_path / "node"):
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(AdapterError, match="'b'"):
        reduce_node(children(paths), spec, tmp_path / "out")
    with pytest.raises(MergeError, match="node 'x'"):
        reduce_node([NodeChild("x", (FileSource(tmp_path / "node"),))], spec, tmp_path / "out")


def test_an_error_while_reading_names_expert_and_tensor_and_leaves_no_file(tmp_path):
    paths = make_experts(tmp_path, ["a", "b"])
    experts = children(paths)

    class Failing(AdapterDelta):
        def load(self, name):
            if name == "l1.v.weight":
                raise AdapterError("gone")
            return super().load(name)

    experts[1] = ExpertChild("b", Failing(FileSource(paths["b"]), "b"))
    with pytest.raises(AdapterError, match=r"expert 'b', tensor l1\.v\.weight: gone"):
        reduce_root(experts, LiftSpec(("sum",)), {Candidate("mean"): AdapterWriter(tmp_path / "out")})
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_results_come_in_order_and_bounded(depth):
    made: list[int] = []
    taken = 0

    def make(number: int) -> int:
        made.append(number)
        assert number - taken <= depth + 1
        return number

    for expected, result in enumerate(prefetch((Load(lambda n=n: make(n), 1) for n in range(50)), depth)):
        assert result == expected
        taken += 1
    assert sorted(made) == list(range(50))
    large = prefetch((Load(lambda n=n: n, 100) for n in range(9)), 3, budget=150)
    assert list(large) == list(range(9))


def test_prefetch_raises_where_the_result_would_come_and_stops():
    def fail() -> int:
        raise ValueError("three")

    results = prefetch((Load(fail if n == 3 else lambda n=n: n, 1) for n in range(9)), 2)
    assert [next(results), next(results), next(results)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_results_do_not_change_without_a_version(tmp_path):
    """If this fails, raise LIFT_VERSION, STATISTICS_VERSION, NODE_FILE_VERSION or LOWER_VERSION, whichever changed."""
    for number, name in enumerate(("a", "b", "c")):
        indices = torch.tensor([i for i in range(96) if (i * 7 + number) % 5 < 2])
        tensor = SparseTensor((8, 12), indices, ((indices * 37 + number * 11) % 129 - 64) / 64)
        save_adapter(tmp_path / name, {"w": tensor}, AdapterMeta(BASE))
    experts = children({name: tmp_path / name for name in ("a", "b", "c")})
    digests = {}
    for reduction in plan_reductions(CANDIDATES):
        reduce_node(experts, reduction.spec, tmp_path / "node")
        digests[str(reduction.spec)] = hashlib.sha256((tmp_path / "node").read_bytes()).hexdigest()[:16]
        for candidate in reduction.candidates:
            reduce_root(experts, reduction.spec, {candidate: AdapterWriter(tmp_path / "out")})
            tensor = load(tmp_path / "out")["w"]
            data = tensor.indices.numpy().tobytes() + tensor.values.numpy().tobytes()
            digests[str(candidate)] = hashlib.sha256(data).hexdigest()[:16]
    assert digests == {
        "negative_count+negative_mass+positive_count+positive_mass+sum+zero_count [none]": "343ce836f4d4ef70",
        "mean": "99eb347d78d17af1",
        "overlap_mean": "817a1761cd2d0dfe",
        "task_arithmetic(lambda=0.5)": "4a5d6ef15bf8d6b1",
        "ties(lambda=1, density=1, density_of=support)": "8fd3a7b2fba464d2",
        "negative_count+negative_mass+positive_count+positive_mass [trim(density=0.25, density_of=support)]": (
            "87b6212615e1e024"
        ),
        "ties(lambda=1, density=0.25, density_of=support)": "a400490ee0dd5d5b",
    }


def test_no_method_changes_without_a_version(tmp_path):
    """If this fails, raise LIFT_VERSION, STATISTICS_VERSION or LOWER_VERSION, whichever changed.

    Only methods without a matrix product, whose last bits depend on the machine."""
    paths = make_experts(tmp_path, ["a", "b", "c", "d"], seed=1, skip="l1.v.weight")
    digests = {}
    for method in METHODS:
        if method != "regmean" and not METHODS[method].matrix:
            candidate = default_candidate(method, paths)
            _, outs = run_flat(tmp_path / method, paths, [candidate])
            merged = load(outs[candidate])
            data = b"".join(t.indices.numpy().tobytes() + t.values.numpy().tobytes() for t in merged.values())
            digests[method] = hashlib.sha256(data).hexdigest()[:12]
    assert digests == {
        "mean": "a189ce1271bd",
        "weighted_mean": "af05d9321353",
        "overlap_mean": "2c1fd12ba210",
        "task_arithmetic": "09156bf5d738",
        "ties": "09696cf64eba",
        "dare_linear": "c794410ecaf1",
        "dare_ties": "026560380c9b",
        "della": "fe5673672569",
        "della_linear": "1482212edc63",
        "breadcrumbs": "c485e7bf3a9f",
        "breadcrumbs_ties": "e9f3fb80a85d",
        "magmax": "24e2a73a45a7",
        "consensus": "b3f4cfb696bc",
        "consensus_ties": "0c07d51b97ab",
        "ties_sum": "0c2c214889fa",
        "trimmed_sum": "9c297532ac2e",
        "fisher_on_support": "47f91cb1b030",
        "sce_selection": "9c297532ac2e",
        "sce": "21b1f08e4907",
        "emr": "d49629209fb8",
        "tall": "9c297532ac2e",
    }
