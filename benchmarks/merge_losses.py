"""What a merge loses, by the cross-entropy of its tasks' validation rows: cheap enough for many candidates.

    python -m benchmarks.merge_losses --list powers --config pipeline/configs/quickstart.yaml [section.field=value …]

Lists of candidates stand in benchmarks/spectral.yaml. The experts of the configuration must be in the store (a run of
the pipeline makes them); they are merged in this process, in place of the base's weights. The loss is the mean over
tasks of the cross-entropy per target token, on the first `--rows` validation rows of each, held-in and held-out. No
test row is read. Needs the local stack (`make up`) and its environment.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from infra.artifacts.manifests import Manifest, peek
from infra.errors import DataError
from infra.store.s3 import Store
from merge.files.merged import AdapterDelta
from merge.methods.catalogue import lower
from merge.methods.lowering import Root
from merge.methods.specs import Candidate, LiftSpec
from merge.tree.children import ExpertChild, Join
from pipeline.config.candidates import expand
from pipeline.config.model import PipelineConfig, load_config
from pipeline.config.rounds import CandidateConfig
from pipeline.data.tasks import TaskData, load_tasks
from pipeline.flow.recipes import expert_recipe, prompt_spec
from workers.base.cache import cache_dir
from workers.base.load import load_model, load_tokenizer
from workers.base.prepare import prepare_base
from workers.scoring.decoding import padding_id
from workers.tensors.source import FileSource
from workers.text.prompt import Example, encode_example
from workers.training.in_place import Undo, apply_delta
from workers.training.objectives import language_modelling, mean_loss

PLAN = Path(__file__).resolve().parent / "spectral.yaml"
SUM = LiftSpec(("sum",))


def find_experts(config: PipelineConfig, store: Store, base: str, tasks: Mapping[str, TaskData]) -> dict[str, Manifest]:
    """Every held-in task's expert. Raises DataError for one that has not been trained."""
    found = {}
    for name in config.held_in:
        manifest = peek(store, expert_recipe(config, base, tasks[name]).key)
        if manifest is None:
            raise DataError(f"{name}: no expert of this configuration in {store.uri('')}; run the pipeline first")
        found[name] = manifest
    return found


class Model:
    """The base, whose weights a merge takes the place of."""

    def __init__(self, path: Path, roots: Mapping[str, Root]) -> None:
        self.tokenizer, self.model = load_tokenizer(path), load_model(path, torch.float32)
        self._objective = language_modelling(self.model, padding_id(self.tokenizer))
        self._roots = roots

    def merged(self, candidate: Candidate | None) -> Undo:
        """Base + merged δ, until the result is left; None: the base."""
        deltas = {name: lower(root, candidate) for name, root in self._roots.items()} if candidate else {}
        return apply_delta(self.model, deltas)

    def loss(self, groups: Mapping[str, Sequence[Example]]) -> float:
        """Mean over tasks."""
        return statistics.fmean(mean_loss(self.model, self._objective, rows, 16) for rows in groups.values())


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--config", "path", required=True, help="Configuration of the experts.")
@click.option("--list", "lists", multiple=True, required=True, help="Lists of candidates in benchmarks/spectral.yaml.")
@click.option("--rows", default=8, show_default=True, help="Validation rows of a task.")
@click.argument("overrides", nargs=-1)
def main(path: str, lists: tuple[str, ...], rows: int, overrides: tuple[str, ...]) -> None:
    """Print the validation losses of merges of a configuration's experts."""
    torch.set_num_threads(1)
    known: Mapping[str, Any] = yaml.safe_load(PLAN.read_text())["losses"]
    if unknown := set(lists) - set(known):
        raise click.BadParameter(f"unknown lists {sorted(unknown)}; known: {', '.join(known)}")
    config, store = load_config(path, list(overrides)), Store.from_env()
    base = prepare_base(config.base, cache_dir())
    tasks = load_tasks({**config.held_in, **config.held_out}, cache_dir(), config.splits.model_dump(), config.seed)
    experts = find_experts(config, store, base.sha256, tasks)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for name, manifest in experts.items():
            file = store.download_file(manifest.files["adapter"], Path(folder) / name)
            children.append(ExpertChild(name, AdapterDelta(FileSource(file), name, manifest.key)))
        roots = {t.name: Root(t.statistics, len(experts), name=t.name) for t in Join.open(children, SUM).tensors()}
    model, limit = Model(base.path, roots), config.prompt.max_target_tokens

    def encoded(names: Sequence[str]) -> dict[str, list[Example]]:
        return {
            name: [
                encode_example(model.tokenizer, prompt_spec(config, tasks[name]), row, max_target_tokens=limit)
                for row in tasks[name].splits["validation"][:rows]
            ]
            for name in names
        }

    inside, outside = encoded(list(config.held_in)), encoded(list(config.held_out))
    print(f"{config.suite}, {config.expert} experts, {rows} validation rows a task\n")
    print("| merge | held-in | held-out |\n|---|---:|---:|")
    for candidate in [None, *(each for name in lists for each in _candidates(known[name]))]:
        with model.merged(candidate):
            print(f"| {candidate or 'base'} | {model.loss(inside):.3f} | {model.loss(outside):.3f} |", flush=True)


def _candidates(entries: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    return [Candidate(entry["method"], params) for entry in entries for params in expand(CandidateConfig(**entry))]


if __name__ == "__main__":
    main()
