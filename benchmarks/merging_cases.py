"""The cases of the merging benchmark, each run in a process of its own: this project, mergekit and PEFT.

Every case imports what it needs and nothing else (which is why imports are inside), then returns the merge as a
function without arguments; only that is counted as the merge. TIES trims each expert to the share `density` of a
tensor, except in the cases that say `untrimmed`; every expert has weight 1. Does not cover
measuring (`benchmarks.merging_measure`).

    python -m benchmarks.merging_cases NAME SETUP.json RESULT.json
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.merging_measure import STORE_PREFIX, Counters, StoreTraffic, status_bytes

Extra = dict[str, Any]
Account = Callable[[], Extra]
"""What a finished merge says about itself; finding it out is not counted."""
Merge = Callable[[], Account]
STORED_EXPERTS = "MERGING_EXPERTS"
"""Environment variable: file that says where base and adapters are in the object store."""


@dataclass(frozen=True)
class Setup:
    """What the cases of one table share. JSON-able. `threads` are those of a peer; this project takes as many workers,
    of one thread each: two that read ahead of a flat merge, or two jobs of the tree at a time."""

    folder: str
    """Of the inputs, as in `benchmarks.merging_inputs.Inputs`."""
    outputs: str
    modules: str
    experts: int
    density: float
    """Share of a tensor's positions that TIES keeps of each expert."""
    fan_in: int
    """Jobs that the tensors of one node of the tree are split over."""
    threads: int

    def adapters(self) -> dict[str, Path]:
        folder = Path(self.folder) / self.modules / "adapters"
        return {path.stem: path for path in sorted(folder.glob("*.safetensors"))[: self.experts]}

    def checkpoints(self) -> dict[str, Path]:
        folder = Path(self.folder) / self.modules / "checkpoints"
        return {path.name: path for path in sorted(folder.iterdir())[: self.experts]}

    def base(self) -> Path:
        return Path(self.folder) / "base"

    def base_sha256(self) -> str:
        return (Path(self.folder) / "base.sha256").read_text()

    def out(self, name: str) -> Path:
        return Path(self.outputs) / name


Prepare = Callable[[Setup, str], Merge]
"""From a setup and the case's name, which is that of its output, too."""

# -- this project --


def _candidate(method: str, setup: Setup, trimmed: bool = True) -> Any:
    from merge.methods.specs import Candidate

    ties = method == "ties"
    return Candidate(method, {"density": setup.density, "density_of": "tensor"} if ties and trimmed else {})


def ours_adapters(method: str, trimmed: bool = True) -> Prepare:
    """Adapter files to a merged adapter file, one flat merge; earlier rounds' results lie beside the output."""

    def prepare(setup: Setup, name: str) -> Merge:
        import tempfile

        import torch

        from merge.files.merged import AdapterDelta, AdapterWriter
        from merge.tree.children import ExpertChild
        from merge.tree.reduce import flat_merge
        from workers.tensors.source import FileSource

        torch.set_num_threads(1)
        candidate = _candidate(method, setup, trimmed)

        def merge() -> Account:
            experts = [
                ExpertChild(name, AdapterDelta(FileSource(path), name)) for name, path in setup.adapters().items()
            ]
            out = setup.out(name)
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
                info = flat_merge(
                    experts, [candidate], lambda _: AdapterWriter(out), setup.base_sha256(), scratch=Path(scratch)
                )
            return lambda: {"density": info[candidate].density}

        return merge

    return prepare


def ours_full(method: str, trimmed: bool = True) -> Prepare:
    """Full checkpoints and their base to a full fp32 checkpoint, one flat merge."""

    def prepare(setup: Setup, name: str) -> Merge:
        import torch

        from merge.files.checkpoint import BaseCheckpoint, CheckpointDelta
        from merge.files.checkpoint_writer import CheckpointWriter, FolderTarget
        from merge.tree.children import ExpertChild
        from merge.tree.reduce import flat_merge
        from workers.tensors.checkpoint import CheckpointFiles

        torch.set_num_threads(1)
        candidate = _candidate(method, setup, trimmed)

        def merge() -> Account:
            base = BaseCheckpoint.in_folder(setup.base(), setup.base_sha256())
            experts = [
                ExpertChild(expert, CheckpointDelta(CheckpointFiles.in_folder(path), base, expert))
                for expert, path in setup.checkpoints().items()
            ]
            sink = CheckpointWriter(base, FolderTarget(setup.out(name)), torch.float32)
            flat_merge(experts, [candidate], lambda _: sink, base.sha256)
            return dict

        return merge

    return prepare


def stored_tree(changed: bool) -> Prepare:
    """Adapters in the object store to a merged adapter there, by the stored tree: every node is a job of its own, and
    its statistics are kept. As many jobs at a time as there are threads, each with one.

    `changed`: with another adapter for one expert, in a store that holds the tree of the others.
    """

    def prepare(setup: Setup, name: str) -> Merge:
        import torch

        from infra.artifacts.manifests import Manifest
        from infra.store.s3 import FileRef, Store
        from merge.methods.specs import plan_reductions
        from merge.methods.statistics import statistic_dtype
        from merge.tree.jobs import Ref
        from merge.tree.local import merge_stored
        from merge.tree.trie import build_tree, path_to
        from workers.adapters.writer import AdapterReader
        from workers.tensors.source import FileSource

        torch.set_num_threads(1)
        store = Store(os.environ["FACTORY_S3_BUCKET"], os.environ["FACTORY_S3_ENDPOINT"], STORE_PREFIX)
        table = json.loads(Path(os.environ[STORED_EXPERTS]).read_text())

        def ref(of: str) -> Ref:
            row = table[of]
            return Ref(row["key"], row["sha256"], (FileRef(row["name"], row["sha256"], row["size"]),))

        experts = {expert: ref(expert) for expert in table if expert not in ("base", "changed")}
        first = min(experts)
        if changed:
            experts[first] = ref("changed")
        candidate = _candidate("ties", setup)
        plan = plan_reductions([candidate])
        before = set(store.list("artifacts/"))
        traffic = StoreTraffic(store)

        def merge() -> Account:
            base = setup.base_sha256(), table["base"]["name"]
            done = merge_stored(store, [candidate], experts, setup.fan_in, *base, workers=setup.threads)
            totals = traffic.totals()

            def account() -> Extra:
                new = [name for name in store.list("artifacts/") if name not in before]
                manifests = [Manifest.from_json(store.get(name)) for name in new]
                stored = sum(f.size for each in manifests if "adapter" not in each.files for f in each.files.values())
                root = done.merged[candidate]
                merged = AdapterReader(FileSource(store.download_file(root.files["adapter"], setup.out(name))))
                width = sum(statistic_dtype(each, setup.experts).itemsize for each in plan[0].spec.statistics)
                positions = sum(map(merged.count, merged.names))
                elements = sum(math.prod(merged.shape(each)) for each in merged.names)
                return {
                    **totals,
                    "nodes_made": done.tally.made["merge_nodes"],
                    "nodes_reused": done.tally.reused["merge_nodes"],
                    "path_nodes": len(path_to(build_tree(list(experts), setup.fan_in), first)),
                    # the root's statistics are not stored: what they would take, in the bitmap that they fill
                    "node_bytes": stored + positions * width + elements // 8,
                }

            return account

        return merge

    return prepare


# -- peers --


def mergekit(method: str, trimmed: bool = True) -> Prepare:
    """mergekit on full checkpoints: what `mergekit-yaml --lazy-unpickle --num-threads N` runs.

    fp32, int8 masks (its recipe for less memory); no tokenizer, no model card.
    """

    def prepare(setup: Setup, name: str) -> Merge:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        options = MergeOptions(
            lazy_unpickle=True,
            low_cpu_memory=True,
            num_threads=setup.threads,
            copy_tokenizer=False,
            write_model_card=False,
            quiet=True,
        )
        options.apply_global_options()
        ties = method == "ties"
        own = {"weight": 1.0, **({"density": setup.density if trimmed else 1.0} if ties else {})}
        text = {
            "merge_method": method,
            "models": [{"model": str(path), "parameters": own} for path in setup.checkpoints().values()],
            "dtype": "float32",
            "parameters": {"normalize": True, **({"int8_mask": True} if ties else {})},
            **({"base_model": str(setup.base())} if ties else {}),
        }
        config = MergeConfiguration.model_validate(text)

        def merge() -> Account:
            run_merge(config, str(setup.out(name)), options)
            return dict

        return merge

    return prepare


def peft_ties(trimmed: bool = True) -> Prepare:
    """PEFT's own TIES on dense δ, tensor by tensor, from adapter files to a file of dense fp32 δ.

    PEFT neither reads these files nor writes tensor by tensor: this project's reader and a streaming writer do.
    """

    def prepare(setup: Setup, name: str) -> Merge:
        import torch
        from peft.utils.merge_utils import ties

        from benchmarks.merging_inputs import dense
        from workers.adapters.writer import AdapterReader
        from workers.tensors.source import FileSource
        from workers.tensors.writer import write_tensors

        density = setup.density if trimmed else 1.0

        def merge() -> Account:
            readers = [AdapterReader(FileSource(path)) for path in setup.adapters().values()]
            weights = torch.ones(len(readers))

            def merged(tensor: str) -> list[Any]:
                deltas = [dense(reader.load(tensor)) for reader in readers]
                return [ties(deltas, weights, density).view(torch.uint8).numpy().data]

            first = readers[0]
            write_tensors(setup.out(name), [(each, torch.float32, first.shape(each)) for each in first.names], merged)
            return dict

        return merge

    return prepare


# -- the object store's own speed --


def store_copy(setup: Setup, name: str) -> Merge:
    """What the stored tree moved, by the store's own transfers and as many at a time as there are threads: get the
    base, the adapters and every node, put every node and the merge."""
    from concurrent.futures import ThreadPoolExecutor

    from infra.store.s3 import Store

    store = Store(os.environ["FACTORY_S3_BUCKET"], os.environ["FACTORY_S3_ENDPOINT"], STORE_PREFIX)
    made = list(store.list("objects/"))
    inputs = ["bases/weights.safetensors", *(f"experts/{expert}" for expert in setup.adapters())]
    folder = setup.out(name)
    traffic = StoreTraffic(store)

    def move(item: tuple[int, str]) -> None:
        number, source = item
        path = store.download_file(source, folder / str(number))
        if source in made:
            store.upload_file(f"copies/{number}", path)
        path.unlink()

    def merge() -> Account:
        with ThreadPoolExecutor(setup.threads) as pool:
            list(pool.map(move, enumerate([*inputs, *made])))
        return traffic.totals

    return merge


@dataclass(frozen=True)
class Case:
    """`reads`: "adapters", "checkpoints" or "store"."""

    prepare: Prepare
    reads: str


REFERENCE = "store_copy"
CASES: Mapping[str, Case] = {
    "ours_adapters": Case(ours_adapters("ties"), "adapters"),
    "mergekit_ties": Case(mergekit("ties"), "checkpoints"),
    "ours_full": Case(ours_full("ties"), "checkpoints"),
    "peft_ties": Case(peft_ties(), "adapters"),
    "ours_full_linear": Case(ours_full("mean"), "checkpoints"),
    "mergekit_linear": Case(mergekit("linear"), "checkpoints"),
    "ours_adapters_mean": Case(ours_adapters("mean"), "adapters"),
    "ours_adapters_spectral": Case(ours_adapters("spectral_power"), "adapters"),
    "ours_full_spectral": Case(ours_full("spectral_power"), "checkpoints"),
    "ours_adapters_iso_c": Case(ours_adapters("iso_c"), "adapters"),
    "ours_adapters_wudi": Case(ours_adapters("wudi"), "adapters"),
    "ours_adapters_tsv_m": Case(ours_adapters("tsv_m"), "adapters"),
    "ours_adapters_iso_cts": Case(ours_adapters("iso_cts"), "adapters"),
    "mergekit_ties_untrimmed": Case(mergekit("ties", trimmed=False), "checkpoints"),
    "ours_adapters_untrimmed": Case(ours_adapters("ties", trimmed=False), "adapters"),
    "ours_full_untrimmed": Case(ours_full("ties", trimmed=False), "checkpoints"),
    "peft_ties_untrimmed": Case(peft_ties(trimmed=False), "adapters"),
    "ours_tree": Case(stored_tree(changed=False), "store"),
    REFERENCE: Case(store_copy, "store"),
    "ours_incremental": Case(stored_tree(changed=True), "store"),
}
"""In the order of a round. `REFERENCE` is no merge."""


def main(name: str, setup_path: str, result_path: str) -> None:
    """Run one case and write what it used."""
    setup = Setup(**json.loads(Path(setup_path).read_text()))
    import torch

    torch.set_num_threads(setup.threads)
    merge = CASES[name].prepare(setup, name)
    before = Counters.now()
    account = merge()
    used, peak = Counters.now() - before, status_bytes("self", "VmHWM")
    body = {"merge": asdict(used), "peak_rss_bytes": peak, "extra": account()}
    Path(result_path).write_text(json.dumps(body))


if __name__ == "__main__":
    main(*sys.argv[1:])
